"""Training of a neural map: alternating steps of map and critic, evaluation, and a resumable state."""

import copy
import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pisces_rl.ot.divergence import BankDivergence
from pisces_rl.ot.maps.batches import Batches
from pisces_rl.ot.maps.closed_form import LinearMap
from pisces_rl.ot.metrics import default_blur

WARM_UP = 3  # steps before one is captured as a CUDA graph
STATE, PROGRESS = "training.safetensors", "training.json"


def body(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the network used for map and critic."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.LayerNorm(hidden),
        nn.Linear(hidden, outputs),
    )


class Training:
    """The state of one fit: networks, optimizers, moving average, and evaluations so far.

    Args:
        map_: the `NeuralMap`, for its settings.
        source: (n, D) tensor or iterable of (b, D).
        target: (m, D) tensor or iterable of (b, D).
        held_source: points on which the moving average is evaluated.
        held_target: points against which it is evaluated.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, map_, source, target, held_source: Tensor, held_target: Tensor, rank: int, world: int):
        self.map, self.rank, self.world, device = map_, rank, world, map_.device
        dimension = held_source.shape[1]
        share = map_.batch_size // world
        self.sources = Batches("source", source, share, map_, 2 * map_.seed, rank, world, dimension)
        self.targets = Batches("target", target, share, map_, 2 * map_.seed + 1, rank, world, dimension)
        data = hashlib.sha256()
        for points in (held_source, held_target, self.sources.first(), self.targets.first()):
            data.update(points.double().cpu().numpy().tobytes())
        self.data = data.hexdigest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(map_.seed)
            self.network, self.critic = body(dimension, map_.hidden, dimension), body(dimension, map_.hidden, 1)
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
                m.parameters(),
                torch.tensor(map_.learning_rate, device=device) if cuda else map_.learning_rate,
                weight_decay=map_.weight_decay,
                fused=cuda,
                capturable=cuda,
            )
            for m in (self.network, self.critic)
        ]
        self.records, self.warm_up, self.graph = cuda and world == 1, WARM_UP, None
        self.held_source = held_source.float().to(device)
        blur = default_blur(held_target)
        self.divergence = BankDivergence(held_target.float().to(device), blur=blur, tolerance=1e-4)
        self.step, self.stale, self.best, self.curve = 0, 0, float("inf"), []

    def transport(self, network: nn.Module, x: Tensor) -> Tensor:
        return self.map.with_skip(network, self.constants, x)

    def advance(self) -> None:
        """Run `inner_steps` of the map and one of the critic, and update the moving average."""
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
        """Run a step on a side stream: what the first steps allocate must not be allocated during capture."""
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
        """Measure the moving average on held-out points, on the first rank for all. A non-finite map ends training."""
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
                "is kept. Lower learning_rate or max_grad_norm.",
                stacklevel=4,
            )
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
            "network": self.network.state_dict(),
            "critic": self.critic.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best_weights,
            **optimizers,
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{a}/{b}": v.contiguous().clone() for a, part in self._modules().items() for b, v in part.items()}
        name = f"{self.step}.{STATE}"
        save_file(tensors, folder / name)
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by the owner only
        state = {
            "file": name,
            "step": self.step,
            "stale": self.stale,
            "best": self.best,
            "curve": self.curve,
            "arguments": self.arguments(),
        }
        (folder / f"{PROGRESS}.partial").write_text(json.dumps(state), encoding="utf-8")
        os.replace(folder / f"{PROGRESS}.partial", folder / PROGRESS)
        for old in folder.glob(f"*.{STATE}"):
            if old.name != name:
                old.unlink()

    def arguments(self) -> dict:
        of_map = {name: getattr(self.map, name) for name in (*self.map.settings, "normalise")}
        return of_map | {"processes": self.world, "data": self.data}

    def resume(self, folder: Path) -> None:
        """Resume from a folder that `save` wrote; do nothing if it holds no state yet."""
        if not (folder / PROGRESS).is_file():
            return
        try:
            state = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            arguments = state["arguments"]
            tensors = load_file(folder / state["file"], device=str(self.map.device))
        except (KeyError, TypeError, OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(f"folder: the training state in {folder} is damaged ({error!r}).") from error
        differ = [k for k, v in self.arguments().items() if arguments.get(k) != v]
        if differ:
            raise ValueError(
                f"folder: {folder} holds a training state with other {', '.join(differ)}; choose another folder."
            )
        try:
            self._restore(state, tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"folder: the training state in {folder} is damaged ({error!r}).") from error

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
