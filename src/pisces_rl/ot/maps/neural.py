"""Neural optimal transport as the PISCES paper trains it, with guards that the paper does not have."""

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from pisces_rl.ot.divergence import BankDivergence
from pisces_rl.ot.maps.base import TransportMap
from pisces_rl.ot.maps.closed_form import LinearMap
from pisces_rl.ot.metrics import default_blur
from pisces_rl.ot.plans import check_positive

SKIPS = ("none", "linear")
HELD_OUT = 1024  # points a side for early stopping, if none are given
SAMPLE = 16_384  # points of a stream that the linear skip is fitted on
WARM_UP = 3  # steps before a step is recorded as a CUDA graph
STATE, PROGRESS = "training.safetensors", "training.json"


class NeuralMap(TransportMap):
    """A network T trained against a critic f:  sup_f inf_T  E_target f + E_source [ |x - T(x)|^2 - f(T(x)) ].

    One step: `inner_steps` of Adam on mean[|x - T(x)|^2 - f(T(x))], then one on mean f(T(x)) - mean f(y). T is Linear
    D-hidden, ReLU, LayerNorm, hidden-hidden, ReLU, LayerNorm, hidden-D; f the same with one output. The defaults are
    the published ones. The guards: with `skip="linear"` T is `LinearMap` plus the network, which starts at 0; the map
    is a moving average of T; every `evaluate_every` steps its debiased Sinkhorn divergence from held-out target
    points is measured, the best one is kept, and training ends after `patience` measures without a better one.

    Under torch.distributed each rank draws its own share of every batch and gradients are averaged, so the effective
    batch stays `batch_size`; ranks stay equal. On one GPU a step is replayed from a CUDA graph.

    Args:
        hidden: width. skip: "none", as published, or "linear". steps: of f, at most. inner_steps: of T per step of f.
        batch_size: points a side and step, over all ranks. learning_rate, weight_decay: Adam's; the rate follows a
            cosine down to a twentieth. max_grad_norm: of T and of f. ema_decay: of the moving average.
            evaluate_every, patience: steps, and measures. seed: of weights and batches. device: unset, the
            process's CUDA device if there is one.

    Source: arXiv 2602.01624, section 4.1, and the settings that its authors published; Korotin et al. 2023
    (arXiv 2201.12220).
    """

    kind = "neural"
    settings = (
        "hidden", "skip", "steps", "inner_steps", "batch_size", "learning_rate", "weight_decay", "max_grad_norm",
        "ema_decay", "evaluate_every", "patience", "seed",
    )  # fmt: skip

    def __init__(
        self, *, hidden: int = 1024, skip: str = "none", steps: int = 160_000, inner_steps: int = 10,
        batch_size: int = 128, learning_rate: float = 1e-4, weight_decay: float = 1e-10, max_grad_norm: float = 1.0,
        ema_decay: float = 0.999, evaluate_every: int = 1000, patience: int = 20, seed: int = 0,
        device: str | torch.device | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        if skip not in SKIPS:
            raise ValueError(f"skip={skip!r}: expected one of {', '.join(SKIPS)}.")
        counts = dict(hidden=hidden, steps=steps, inner_steps=inner_steps, batch_size=batch_size,
                      evaluate_every=evaluate_every, patience=patience)  # fmt: skip
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
        """Train; returns self.

        Args:
            source, target: points (n, D), or for data larger than memory an iterable of (b, D) tensors that can be
                iterated again and again in the same, shuffled, order (a DataLoader with a fixed seed, say).
            held_out: points of both sides to stop early by. Unset: up to a tenth, at most 1,024, are set apart.
            folder: where the state of training is kept, at each evaluation; a later call with the same arguments goes
                on from there to the same map.
            progress: show a bar, on the first rank.
        """
        for _ in self._fit_by_steps(source, target, held_out, folder, progress):
            pass
        return self

    def _fit_by_steps(self, source, target, held_out=None, folder=None, progress=False) -> Iterator[int]:
        """`fit`, yielding after each step."""
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
        training = _Training(self, source, target, held_source, held_target, rank, world)
        if folder is not None:
            training.resume(Path(folder))
        if not training.curve:
            training.evaluate()
        bar = tqdm(total=self.steps, initial=training.step, disable=not progress or rank > 0, desc="neural map")
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
        """The training data, and held-out points."""
        if not isinstance(data, Tensor) and iter(data) is data:
            raise ValueError(f"{name}: an iterator ends after one pass; pass an iterable, a DataLoader for instance.")
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
        held, count = [], 0
        for batch in data:
            held.append(_checked(name, batch))
            count += len(batch)
            if count >= HELD_OUT:
                break
        if not held:
            raise ValueError(f"{name}: the iterable has no points.")
        return _Skip(data, len(held)), self.points(name, torch.cat(held)[:HELD_OUT])

    def _map(self, x: Tensor) -> Tensor:
        network = _body(x.shape[1], self.hidden, x.shape[1]).requires_grad_(False)
        weights = {k.removeprefix("network."): v for k, v in self.tensors.items() if k.startswith("network.")}
        network.load_state_dict(weights, assign=True)
        return self._with_skip(network.to(x), self.tensors, x)

    def _with_skip(self, network: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.skip == "none":
            return network(x)
        mean_s, mean_t, matrix = (tensors[name].to(x) for name in ("source_mean", "target_mean", "matrix"))
        return (x - mean_s) @ matrix.T + mean_t + network(x)


class _Training:
    """The state of one fit: networks, optimizers, moving average, and what has been measured."""

    def __init__(
        self, map_: NeuralMap, source, target, held_source: Tensor, held_target: Tensor, rank: int, world: int
    ):
        self.map, self.rank, self.world, device = map_, rank, world, map_.device
        dimension = held_source.shape[1]
        share = map_.batch_size // world
        self.sources = _Batches("source", source, share, map_, 2 * map_.seed, rank, world, dimension)
        self.targets = _Batches("target", target, share, map_, 2 * map_.seed + 1, rank, world, dimension)
        data = hashlib.sha256()
        for points in (held_source, held_target, self.sources.first(), self.targets.first()):
            data.update(points.double().cpu().numpy().tobytes())
        self.data = data.hexdigest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(map_.seed)
            self.network, self.critic = _body(dimension, map_.hidden, dimension), _body(dimension, map_.hidden, 1)
        self.constants: dict[str, Tensor] = {"dimension": torch.tensor(dimension)}
        if map_.skip == "linear":
            self.constants |= LinearMap()._fit(self.sources.sample(), self.targets.sample())
            nn.init.zeros_(self.network[-1].weight)
            nn.init.zeros_(self.network[-1].bias)
        self.constants = {k: v.float().to(device) if v.is_floating_point() else v for k, v in self.constants.items()}
        self.network.to(device), self.critic.to(device)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.best_weights = copy.deepcopy(self.network.state_dict())
        cuda = device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(
                m.parameters(), torch.tensor(map_.learning_rate, device=device) if cuda else map_.learning_rate,
                weight_decay=map_.weight_decay, fused=cuda, capturable=cuda,
            )
            for m in (self.network, self.critic)
        ]  # fmt: skip
        self.records, self.warm_up, self.graph = cuda and world == 1, WARM_UP, None
        self.held_source = held_source.float().to(device)
        blur = default_blur(held_target)
        self.divergence = BankDivergence(held_target.float().to(device), blur=blur, tolerance=1e-4)
        self.step, self.stale, self.best, self.curve = 0, 0, float("inf"), []

    def transport(self, network: nn.Module, x: Tensor) -> Tensor:
        return self.map._with_skip(network, self.constants, x)

    def advance(self) -> None:
        """`inner_steps` of the map, one of the critic, and the moving average."""
        share = (1 + math.cos(math.pi * self.step / self.map.steps)) / 2
        for optimizer in self.optimizers:
            group, rate = optimizer.param_groups[0], self.map.learning_rate * (0.05 + 0.95 * share)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        sources, targets = self.sources.draw(self.map.inner_steps + 1), self.targets.draw(1)
        if self.records and self.warm_up == 0:
            self._replay(sources, targets)
        elif self.records:
            self._warm_up(sources, targets)
        else:
            self._alternate(sources, targets)
        with torch.no_grad():
            decay = min(self.map.ema_decay, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.step += 1

    def _alternate(self, sources: Tensor, targets: Tensor) -> None:
        """Step the map on each batch of sources but the last, then the critic on that one and on the targets."""
        map_optimizer, critic_optimizer = self.optimizers
        self.critic.requires_grad_(False)
        for x in sources[:-1]:
            moved = self.transport(self.network, x)
            self._update(map_optimizer, ((x - moved).square().sum(1) - self.critic(moved)[:, 0]).mean())
        self.critic.requires_grad_(True)
        with torch.no_grad():
            moved = self.transport(self.network, sources[-1])
        self._update(critic_optimizer, self.critic(moved).mean() - self.critic(targets[0]).mean())

    def _warm_up(self, sources: Tensor, targets: Tensor) -> None:
        """A step on a side stream: what is made by the first steps must not be made while one is recorded."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._alternate(sources, targets)
        current.wait_stream(side)
        self.warm_up -= 1

    def _replay(self, sources: Tensor, targets: Tensor) -> None:
        if self.graph is None:
            self.inputs = sources.clone(), targets.clone()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):
                self._alternate(*self.inputs)
        for kept, new in zip(self.inputs, (sources, targets)):
            kept.copy_(new)
        self.graph.replay()

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            distributed.all_reduce(flat)
            for p, g in zip(parameters, (flat / self.world).split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
        nn.utils.clip_grad_norm_(parameters, self.map.max_grad_norm)
        optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Measure the moving average on held-out points, on the first rank for all; a map that broke ends training."""
        moved = self.transport(self.average, self.held_source)
        whole = bool(moved.isfinite().all())
        value = torch.tensor(float(self.divergence(moved)) if whole else math.inf, device=self.map.device)
        if self.world > 1:
            distributed.broadcast(value, 0)
        value = float(value)
        self.curve.append([self.step, value])
        if value < self.best:
            self.best, self.stale, self.best_weights = value, 0, copy.deepcopy(self.average.state_dict())
        else:
            self.stale += 1
        if value == math.inf:
            self.stale = self.map.patience
            warnings.warn(
                f"the neural map is no longer finite after {self.step} steps: training ends, and the best map so far "
                "is kept. Lower learning_rate or max_grad_norm.", stacklevel=4,
            )  # fmt: skip
        return value

    def result(self) -> dict[str, Tensor]:
        weights = {f"network.{k}": v.detach().cpu().clone() for k, v in self.best_weights.items()}
        return weights | {k: v.cpu() for k, v in self.constants.items()}

    def _modules(self) -> dict[str, dict[str, Tensor]]:
        optimizers = {
            f"adam_{i}": {f"{j}.{k}": v for j, state in o.state_dict()["state"].items() for k, v in state.items()}
            for i, o in enumerate(self.optimizers)
        }
        return {
            "network": self.network.state_dict(), "critic": self.critic.state_dict(),
            "average": self.average.state_dict(), "best": self.best_weights, **optimizers,
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{a}/{b}": v.contiguous().clone() for a, part in self._modules().items() for b, v in part.items()}
        name = f"{self.step}.{STATE}"
        save_file(tensors, folder / name)
        state = {"file": name, "step": self.step, "stale": self.stale, "best": self.best, "curve": self.curve,
                 "arguments": self.arguments()}  # fmt: skip
        (folder / f"{PROGRESS}.partial").write_text(json.dumps(state))
        os.replace(folder / f"{PROGRESS}.partial", folder / PROGRESS)
        for old in folder.glob(f"*.{STATE}"):
            if old.name != name:
                old.unlink()

    def arguments(self) -> dict:
        of_map = {name: getattr(self.map, name) for name in (*self.map.settings, "normalise")}
        return of_map | {"processes": self.world, "data": self.data}

    def resume(self, folder: Path) -> None:
        """Go on from a folder that `save` wrote; a folder without a state is where one will be written."""
        if not (folder / PROGRESS).is_file():
            return
        try:
            state = json.loads((folder / PROGRESS).read_text())
            arguments = state["arguments"]
            tensors = load_file(folder / state["file"], device=str(self.map.device))
        except (KeyError, TypeError, OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(f"folder: {folder} holds a training that is damaged ({error!r}).") from error
        differ = [k for k, v in self.arguments().items() if arguments.get(k) != v]
        if differ:
            raise ValueError(
                f"folder: {folder} holds a training with other {', '.join(differ)}; choose another folder."
            )
        try:
            self._restore(state, tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"folder: {folder} holds a training that is damaged ({error!r}).") from error

    def _restore(self, state: dict, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = value
        self.network.load_state_dict(parts["network"])
        self.critic.load_state_dict(parts["critic"])
        self.average.load_state_dict(parts["average"])
        self.best_weights = parts["best"]
        for i, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            whole["state"] = {}
            for key, value in parts[f"adam_{i}"].items():
                index, field = key.split(".")
                whole["state"].setdefault(int(index), {})[field] = value
            optimizer.load_state_dict(whole)
        self.step, self.stale, self.best, self.curve = (state[k] for k in ("step", "stale", "best", "curve"))
        self.sources.skip(state["step"], self.map.inner_steps + 1)
        self.targets.skip(state["step"], 1)


class _Batches:
    """Batches of normalised points on the device: drawn at random from a tensor, or read in turn from an iterable."""

    def __init__(
        self, name: str, data, batch: int, map_: NeuralMap, seed: int, rank: int, world: int, width: int
    ):
        self.name, self.data, self.batch, self.map, self.drawn, self.width = name, data, batch, map_, 0, width
        self.rank, self.world = rank, world
        if isinstance(data, Tensor):
            self.data = data.float().to(map_.device)
            self.generator = torch.Generator(map_.device)
            self.seed = seed
        else:
            self.iterator, self.rest = iter(()), None

    def draw(self, batches: int) -> Tensor:
        """(batches, batch, D)."""
        self.drawn += 1
        if isinstance(self.data, Tensor):
            # seeded by its number, so that resuming needs no state of a generator
            self.generator.manual_seed((self.seed * 1_000_003 + self.drawn) * 4099 + self.rank)
            shape = (batches, self.batch)
            return self.data[torch.randint(len(self.data), shape, generator=self.generator, device=self.data.device)]
        whole = self._read(batches * self.batch * self.world)
        points = whole.unflatten(0, (batches, self.world, self.batch))[:, self.rank].flatten(0, 1)
        return self.map._normalised(points.float().to(self.map.device)).unflatten(0, (batches, self.batch))

    def skip(self, count: int, batches: int) -> None:
        """What `count` draws of so many batches would take."""
        if isinstance(self.data, Tensor):
            self.drawn = count
        else:
            for _ in range(count):
                self._read(batches * self.batch * self.world)

    def first(self) -> Tensor:
        """All points, or the first few of an iterable."""
        if isinstance(self.data, Tensor):
            return self.data
        return _checked(self.name, next(iter(self.data), None), self.width)[:16]

    def sample(self) -> Tensor:
        """Points for a closed-form fit: all of a tensor, the first of a stream."""
        if isinstance(self.data, Tensor):
            return self.data.double().cpu()
        points, count = [], 0
        for batch in self.data:
            points.append(self.map.points(self.name, _checked(self.name, batch, self.width)))
            count += len(batch)
            if count >= SAMPLE:
                break
        return torch.cat(points)

    def _read(self, count: int) -> Tensor:
        while self.rest is None or len(self.rest) < count:
            batch = next(self.iterator, None)
            if batch is None:
                self.iterator = iter(self.data)
                batch = next(self.iterator, None)
            batch = _checked(self.name, batch, self.width)
            self.rest = batch if self.rest is None else torch.cat([self.rest, batch])
        points, self.rest = self.rest[:count], self.rest[count:]
        return points


class _Skip:
    """An iterable without its first batches, which are held out."""

    def __init__(self, data: Iterable[Tensor], count: int):
        self.data, self.count = data, count

    def __iter__(self):
        return (batch for i, batch in enumerate(self.data) if i >= self.count)


def _checked(name: str, batch: Tensor | None, width: int | None = None) -> Tensor:
    """A batch of an iterable, or what is wrong with it."""
    if batch is None:
        raise ValueError(f"{name}: the iterable has no points, or none besides the held-out ones.")
    right = isinstance(batch, Tensor) and batch.ndim == 2 and width in (None, batch.shape[1])
    if not right or not batch.isfinite().all():
        found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        mend = " (a TensorDataset gives tuples: wrap it to give its tensor)" if isinstance(batch, list | tuple) else ""
        raise ValueError(f"{name}: expected batches of finite points (b, {width or 'D'}), got {found}{mend}.")
    return batch


def _body(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.LayerNorm(hidden),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden),
        nn.Linear(hidden, outputs),
    )  # fmt: skip
