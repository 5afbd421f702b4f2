"""DeepSpeed ZeRO-2, which shards gradients and optimizer states, and ZeRO-3, which also shards frozen weights."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ....policy import VideoPolicy
from ....policy.sharded.partition import partition

# Optimizers that update each element independently, so that they work on a part of a parameter.
OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
MESSAGE = 2**28  # elements per message between processes, 1 GiB in fp32; an adapter fits into one message


def requested_zero(args) -> int | None:
    """Return the ZeRO stage that `accelerate launch` requests; None without DeepSpeed.

    Raises:
        ValueError: a DeepSpeed option that is not supported.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return None
    if args.deepspeed:
        raise ValueError(
            f"deepspeed={args.deepspeed!r} is not supported: leave it unset and start the run with accelerate launch "
            "--config_file recipes/accelerate/deepspeed_zero2.yaml (or deepspeed_zero3.yaml); there, set "
            "deepspeed_config_file to use the same file."
        )
    if plugin.zero_stage not in (2, 3):
        raise ValueError(
            f"zero_stage={plugin.zero_stage}: set zero_stage: 2 or 3 under deepspeed_config in the accelerate config "
            "file, or --zero_stage; to train without sharding, use DDP (accelerate launch --multi_gpu)."
        )
    for name in ("offload_optimizer_device", "offload_param_device"):
        if getattr(plugin, name) not in (None, "none"):
            raise ValueError(
                f"{name}={getattr(plugin, name)!r}: set it to none. The optimizer states of an adapter are too small "
                "to be worth offloading; to keep frozen weights in host memory, use FSDP2 with fsdp_offload_params, "
                "or offload=['denoiser'] without sharding."
            )
    unset_hf_deepspeed_config()  # otherwise transformers would partition the text encoders that it loads
    return plugin.zero_stage


def use_zero(stage: int, policy: VideoPolicy, accelerator: Accelerator, max_grad_norm: float) -> None:
    """Partition the policy (stage 3) and the optimizer that accelerate will prepare; with one process, neither.

    accelerate then treats the run as plain data-parallel processes.
    """
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    unset_hf_deepspeed_config()
    device = accelerator.device
    several = DistributedType.MULTI_CPU if device.type == "cpu" else DistributedType.MULTI_GPU
    plain = several if accelerator.num_processes > 1 else DistributedType.NO
    PartialState().distributed_type = accelerator.state.distributed_type = plain
    if accelerator.num_processes == 1:
        return
    if stage == 3:
        partition(policy, device.type, accelerator.num_processes)

    def prepare(optimizer, device_placement=None):
        if not isinstance(optimizer, PartitionedOptimizer):  # it already is one in a second call of train()
            optimizer = PartitionedOptimizer(optimizer, max_grad_norm)
        accelerator._optimizers = [optimizer]
        return optimizer

    def gradient_norm(parameters, max_norm, norm_type=2):
        return accelerator._optimizers[-1].norm()

    accelerator.prepare_optimizer, accelerator.clip_grad_norm_ = prepare, gradient_norm


class _Adapter(nn.Module):
    """The trained parameters in a module, as DeepSpeed's engine expects; its forward is never called."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)


class PartitionedOptimizer(AcceleratedOptimizer):
    """An optimizer of unsharded parameters whose states are sharded over the ranks by DeepSpeed's ZeRO-2.

    Gradients accumulate on each rank, over any number of backward passes, until `reduce`; then each rank holds its
    part of their mean. `step` clips, updates each part on its rank, and gathers the parameters. Without a preceding
    `reduce` it does nothing.

    Args:
        optimizer: one of `OPTIMIZERS`, on the trainable parameters.
        max_grad_norm: largest norm of the gradient, as in torch's clipping; 0 disables clipping.

    Raises:
        ValueError: any other optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float):
        import deepspeed

        if type(optimizer) not in OPTIMIZERS:
            raise ValueError(
                f"optim: {type(optimizer).__name__} may need whole parameters, but ZeRO splits them at any element. "
                f"Use one of {[cls.__name__ for cls in OPTIMIZERS]} (adamw_torch, sgd), or DDP or FSDP2."
            )
        self.empty = [group for group in optimizer.param_groups if not group["params"]]  # DeepSpeed rejects these
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        message = min(MESSAGE, sum(p.numel() for p in parameters))
        self.engine = deepspeed.initialize(
            model=_Adapter(parameters),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "steps_per_print": None,
                "gradient_clipping": max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": 2,
                    "overlap_comm": False,
                    "reduce_bucket_size": message,
                    "allgather_bucket_size": message,
                },
            },
        )[0]
        super().__init__(optimizer, device_placement=False)
        self.reduced = False  # whether `reduce` was called since the last step
        for hook in self.engine.optimizer._grad_acc_hooks:  # they would reduce in each backward pass
            hook.remove()

    @property
    def param_groups(self) -> list[dict]:
        """All groups, including empty ones, as schedules and checkpoints of unsharded parameters expect."""
        return self.optimizer.param_groups + self.empty

    def reduce(self) -> None:
        """Average the gradients; each rank keeps its part. Every parameter must have a gradient."""
        self.engine.optimizer.refresh_fp32_params()  # the parameters may have been set since the last step
        with self.engine.coalesce_grad_reduction():  # reduces all accumulated gradients on exit
            pass
        self.reduced = True

    def norm(self) -> Tensor:
        """Return the norm of the averaged gradient, before clipping."""
        if not self.reduced:
            return torch.zeros(())
        return self.engine.optimizer.scaled_global_norm()

    def norms(self, parts: dict[str, list[nn.Parameter]]) -> dict[str, float]:
        """Return {name: norm of the averaged gradient of its parameters}."""
        if not self.reduced:
            return dict.fromkeys(parts, 0.0)
        zero, names = self.engine.optimizer, list(parts)
        squares = torch.zeros(len(names), device=zero.device)
        for i, parameters in enumerate(zero.bit16_groups):
            own = torch.cat([t.flatten() for t in zero.averaged_gradients[i]])
            for parameter, (start, end) in zip(parameters, self._places(i)):
                where = next(k for k, name in enumerate(names) if any(parameter is p for p in parts[name]))
                squares[where] += own[start:end].square().sum()
        torch.distributed.all_reduce(squares)
        return dict(zip(names, squares.sqrt().tolist()))

    def step(self, closure=None) -> None:
        if self.reduced:
            self.engine.step()
        self.reduced = False

    def zero_grad(self, set_to_none=None) -> None:
        self.engine.optimizer.zero_grad()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped because a gradient was not finite."""
        return self.engine.optimizer.overflow

    def _places(self, group: int) -> list[tuple[int, int]]:
        """Return [start, end) of each parameter in this rank's part; empty if none of it is here."""
        zero = self.engine.optimizer
        size, rank = zero.partition_size[group], torch.distributed.get_rank()
        places, offset = [], -rank * size
        for parameter in zero.bit16_groups[group]:
            end = offset + parameter.numel()
            places.append((min(max(offset, 0), size), min(max(end, 0), size)))
            offset = end
        return places

    def state_dict(self) -> dict:
        """Return the state dict of the equivalent unsharded optimizer; all ranks must call this."""
        zero, states, groups = self.engine.optimizer, {}, []
        for i, group in enumerate(self.param_groups):
            parameters = zero.bit16_groups[i] if group["params"] else []
            indices = list(range(len(states), len(states) + len(parameters)))
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": indices})
            part = group["params"][0] if parameters else None
            own = self.optimizer.state.get(part, {})
            whole = {key: self._gathered(value) if _of_shape(value, part) else value for key, value in own.items()}
            offset = 0
            for index, parameter in zip(indices, parameters):
                states[index] = {
                    key: value[offset : offset + parameter.numel()].view_as(parameter)
                    if _of_shape(own[key], part)
                    else value
                    for key, value in whole.items()
                }
                offset += parameter.numel()
        return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of `state_dict`, or the state dict of an unsharded optimizer."""
        zero, rank, states = self.engine.optimizer, torch.distributed.get_rank(), {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for i, parameters in enumerate(zero.bit16_groups):
            size = zero.partition_size[i]
            kept = [state_dict["state"].get(j, {}) for j in state_dict["param_groups"][i]["params"]]
            states[i] = dict(kept[0])
            for key, value in kept[0].items():
                if _of_shape(value, parameters[0]):
                    own = torch.cat([state[key].flatten() for state in kept])[rank * size : (rank + 1) * size]
                    states[i][key] = nn.functional.pad(own, (0, size - len(own)))
        groups = [group | {"params": [i]} for i, group in enumerate(self.optimizer.param_groups)]
        self.optimizer.load_state_dict({"state": {i: s for i, s in states.items() if s}, "param_groups": groups})

    @staticmethod
    def _gathered(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, part)
        return torch.cat(parts)


def _of_shape(value, parameter: Tensor) -> bool:
    """Return whether a state has one value per element of a parameter."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
