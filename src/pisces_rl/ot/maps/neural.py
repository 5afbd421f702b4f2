"""Neural optimal transport as trained in the PISCES paper, with additional guards."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from tqdm.auto import tqdm

from pisces_rl.ot.maps.batches import WithoutFirst, checked_batch
from pisces_rl.ot.maps.neural_training import Training, body
from pisces_rl.ot.maps.transport_map import TransportMap
from pisces_rl.ot.plans import check_positive

SKIPS = ("none", "linear")
HELD_OUT = 1024  # points per side for early stopping, if none are given


class NeuralMap(TransportMap):
    """A network T trained against a critic f:  sup_f inf_T  E_target f + E_source [ |x - T(x)|^2 - f(T(x)) ].

    One step: `inner_steps` of Adam on mean[|x - T(x)|^2 - f(T(x))], then one on mean f(T(x)) - mean f(y). T is Linear
    D-hidden, ReLU, LayerNorm, hidden-hidden, ReLU, LayerNorm, hidden-D; f is the same with one output. The defaults
    are the published ones. The guards: with `skip="linear"` T is `LinearMap` plus the network, which starts at 0; the
    map is a moving average of T; every `evaluate_every` steps its debiased Sinkhorn divergence from held-out target
    points is measured, the best map is kept, and training ends after `patience` evaluations without improvement.

    Under torch.distributed each rank draws its share of every batch and gradients are averaged, so the effective batch
    stays `batch_size` and ranks stay equal. On one GPU steps are replayed from a CUDA graph.

    Args:
        hidden: width.
        skip: "none", as published, or "linear".
        steps: largest number of steps of f.
        inner_steps: steps of T per step of f.
        batch_size: points per side and step, over all ranks.
        learning_rate: Adam's; it decays along a cosine to a twentieth.
        weight_decay: Adam's.
        max_grad_norm: for T and for f.
        ema_decay: of the moving average.
        evaluate_every: steps between evaluations.
        patience: evaluations without improvement before training ends.
        seed: of weights and batches.
        device: default: the process's CUDA device if available.

    Source: arXiv 2602.01624, section 4.1, with the settings published by its authors; Korotin et al. 2023
    (arXiv 2201.12220).
    """

    kind = "neural"
    settings = (
        "hidden",
        "skip",
        "steps",
        "inner_steps",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "ema_decay",
        "evaluate_every",
        "patience",
        "seed",
    )

    def __init__(
        self,
        *,
        hidden: int = 1024,
        skip: str = "none",
        steps: int = 160_000,
        inner_steps: int = 10,
        batch_size: int = 128,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-10,
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.999,
        evaluate_every: int = 1000,
        patience: int = 20,
        seed: int = 0,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if skip not in SKIPS:
            raise ValueError(f"skip={skip!r}: expected one of {', '.join(SKIPS)}.")
        counts = dict(
            hidden=hidden,
            steps=steps,
            inner_steps=inner_steps,
            batch_size=batch_size,
            evaluate_every=evaluate_every,
            patience=patience,
        )
        for name, value in counts.items():
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name}={value!r}: expected an integer > 0.")
        check_positive(learning_rate=learning_rate, max_grad_norm=max_grad_norm)
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay={weight_decay!r}: expected a finite number >= 0.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay!r}: expected a number in [0, 1).")
        if not (isinstance(seed, int) and 0 <= seed < 2**31):
            raise ValueError(f"seed={seed!r}: expected an integer in [0, 2^31).")
        self.hidden, self.skip, self.steps, self.inner_steps = hidden, skip, steps, inner_steps
        self.batch_size, self.learning_rate, self.weight_decay = batch_size, learning_rate, weight_decay
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.evaluate_every, self.patience, self.seed = evaluate_every, patience, seed
        rank = os.environ.get("LOCAL_RANK", "0")
        self.device = torch.device(device or (f"cuda:{rank}" if torch.cuda.is_available() else "cpu"))

    def fit(
        self,
        source: Tensor | Iterable[Tensor],
        target: Tensor | Iterable[Tensor],
        *,
        held_out: tuple[Tensor, Tensor] | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> "NeuralMap":
        """Train; return self.

        Args:
            source: points (n, D). For data larger than memory, an iterable of (b, D) tensors that can be iterated
                repeatedly in the same shuffled order, for instance a DataLoader with a fixed seed.
            target: points (m, D), or such an iterable.
            held_out: points of both sides for early stopping. Default: up to a tenth of each side, at most 1,024.
            folder: where the training state is saved at each evaluation; a later call with the same arguments resumes
                from there and yields the same map.
            progress: show a progress bar on the first rank.
        """
        for _ in self._fit_by_steps(source, target, held_out, folder, progress):
            pass
        return self

    def _fit_by_steps(
        self, source: Any, target: Any, held_out: Any = None, folder: Any = None, progress: bool = False
    ) -> Iterator[int]:
        """Run `fit`, yielding after each step."""
        rank, world = (
            (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        )
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size}: expected a multiple of the {world} processes.")
        source, held_source = self._split("source", source, None if held_out is None else held_out[0])
        target, held_target = self._split("target", target, None if held_out is None else held_out[1])
        if held_source.shape[1] != held_target.shape[1]:
            raise ValueError(
                f"target: expected points of {held_source.shape[1]} dimensions, got {held_target.shape[1]}."
            )
        for name, data, held in (("source", source, held_source), ("target", target, held_target)):
            if isinstance(data, Tensor) and data.shape[1] != held.shape[1]:
                raise ValueError(
                    f"held_out {name}: expected points of {data.shape[1]} dimensions, got {held.shape[1]}."
                )
        training = Training(self, source, target, held_source, held_target, rank, world)
        if folder is not None:
            training.resume(Path(folder))
        if not training.curve:
            training.evaluate()
        hidden = not progress or rank > 0
        bar = tqdm(total=self.steps, initial=training.step, disable=hidden or None, desc="neural map")
        while training.step < self.steps and training.stale < self.patience:
            training.advance()
            bar.update(1)
            if training.step % self.evaluate_every == 0 or training.step == self.steps:
                bar.set_postfix(divergence=f"{training.evaluate():.4g}", best=f"{training.best:.4g}")
                if folder is not None and rank == 0:
                    training.save(Path(folder))
            yield training.step
        bar.close()
        self.tensors = training.result()
        self.report = {"steps_done": training.step, "best_divergence": training.best, "curve": training.curve}

    def _split(self, name: str, data: Tensor | Iterable[Tensor], held: Tensor | None) -> tuple:
        """Return the training data and the held-out points, which are split off if not given."""
        if not isinstance(data, Tensor) and iter(data) is data:
            raise ValueError(f"{name}: an iterator ends after one pass; pass an iterable such as a DataLoader.")
        if held is not None:
            held = self.points(f"held_out {name}", held)
            return (self.points(name, data) if isinstance(data, Tensor) else data), held
        if isinstance(data, Tensor):
            points = self.points(name, data)
            count = min(HELD_OUT, max(2, len(points) // 10))
            if len(points) < 2 * count:
                raise ValueError(f"{name}: expected at least {2 * count} points, got {len(points)}.")
            order = torch.randperm(len(points), generator=torch.Generator().manual_seed(self.seed))
            return points[order[count:]], points[order[:count]]
        first, count = [], 0
        for batch in data:
            first.append(checked_batch(name, batch))
            count += len(batch)
            if count >= HELD_OUT:
                break
        if not first:
            raise ValueError(f"{name}: the iterable has no points.")
        return WithoutFirst(data, len(first)), self.points(name, torch.cat(first)[:HELD_OUT])

    def _map(self, x: Tensor) -> Tensor:
        network = body(x.shape[1], self.hidden, x.shape[1]).requires_grad_(False)
        weights = {k.removeprefix("network."): v for k, v in self.tensors.items() if k.startswith("network.")}
        network.load_state_dict(weights, assign=True)
        return self.with_skip(network.to(x), self.tensors, x)

    def with_skip(self, network: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return T(x) of normalised points: the network plus, with skip="linear", the linear map in `tensors`."""
        if self.skip == "none":
            return network(x)
        mean_s, mean_t, matrix = (tensors[name].to(x) for name in ("source_mean", "target_mean", "matrix"))
        return (x - mean_s) @ matrix.T + mean_t + network(x)
