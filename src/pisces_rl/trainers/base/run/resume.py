"""Check that a run can resume from a checkpoint: same trainer, model, adapter and batches."""

import hashlib
import json
import os
from enum import Enum
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType

from ....policy import VideoPolicy
from ....rewards import RemoteReward, RewardPanel
from ....rewards.signature import layers
from ....run_files import own_checkpoints
from ...auxiliary.auxiliary_loss import AuxiliaryLoss

#: Settings that may change on resume. New values act from there on; the console and the model card report the change.
REPORTED = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "ema_decay",
    "reward_weights",
)
#: Settings that must not change on resume, because the checkpoint's state would have another meaning: {name: reason}.
FIXED = {
    "optim": "the saved optimizer state is of another kind",
    "optim_args": "the saved optimizer state is of another kind",
    "metric_for_best_model": "the saved best value is of another metric",
}
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
#: Schedules that depend on scores, not only on the step.
_FOLLOWS_SCORES = (SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value)


def last_checkpoint(output_dir: str) -> str | None:
    """Return the run's checkpoint with the highest step, or None; folders `checkpoint-...` of others do not count."""
    return next((str(path) for path in reversed(own_checkpoints(output_dir).values())), None)


def requested_checkpoint(output_dir: str, checkpoint: str | bool | None) -> str | None:
    """Return the folder to resume from, or None; raise a ValueError if it is missing or not a checkpoint."""
    if checkpoint in (None, False, "", "False", "false"):
        return None
    if checkpoint in (True, "True", "true"):
        last = last_checkpoint(output_dir)
        if last is None:
            raise ValueError(f"resume_from_checkpoint=True, but output_dir={output_dir!r} holds no checkpoint.")
        return last
    if not os.path.isfile(os.path.join(checkpoint, "policy.json")):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is not a checkpoint of this package (no policy.json in it); "
            "pass an output_dir/checkpoint-N folder, or True for the last one."
        )
    return str(checkpoint)


def step_of(checkpoint: str) -> int:
    """Return the optimizer step of a checkpoint, whatever its folder is called."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def run_identity(
    trainer: str,
    model: str,
    policy: VideoPolicy,
    args,
    position: tuple[str, ...],
    auxiliary_losses: list[AuxiliaryLoss],
    rewards: RewardPanel,
) -> dict:
    """Return the identity that checkpoints store: what must match on resume, and settings whose changes are reported.

    Args:
        trainer: name of the trainer.
        model: source of the pipeline.
        policy: the policy that is trained.
        args: the config.
        position: names of the settings that determine the position in the data.
        auxiliary_losses: their weights count as settings of the run.
        rewards: remote rewards contribute the identity of their code and weights.
    """
    denoisers = policy.denoiser
    return {
        "trainer": trainer,
        "model": model,
        "pipeline": type(policy.pipeline).__name__,
        "denoisers": {name: _architecture(module) for name, module in denoisers.items()},
        "weights": {name: _weights_digest(module) for name, module in denoisers.items()},
        "base_precision": args.base_precision,
        "lora_scale": {name: _lora_scale(module) for name, module in denoisers.items()},
        "batches": {name: getattr(args, name) for name in position},
        "settings": {name: _plain(getattr(args, name)) for name in (*REPORTED, *FIXED)}
        | {f"{loss.name}_weight": loss.weight for loss in auxiliary_losses},
        "objective": {name: _plain(getattr(args, name)) for name in args.objective()},
        "remote_rewards": {
            name: layer.identity
            for name, func in zip(rewards.names, rewards.funcs)
            for layer in layers(func)
            if isinstance(layer, RemoteReward)
        },
        "changes": [],
    }


def check_same_run(checkpoint: str, own: dict) -> None:
    """Raise a ValueError that names the difference if the checkpoint does not match a run with identity `own`."""
    saved = json.loads((Path(checkpoint) / "policy.json").read_text(encoding="utf-8"))
    if saved.get("trainer", own["trainer"]) != own["trainer"]:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} was written by {saved['trainer']}, not by {own['trainer']}: "
            "resume it with the trainer that wrote it."
        )
    if (saved["pipeline"], saved["denoisers"]) != (own["pipeline"], own["denoisers"]):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} belongs to another model: {saved['pipeline']} from "
            f"{saved['model']!r}, while this run trains {own['pipeline']} from {own['model']!r}."
        )
    if saved.get("full") != own.get("full"):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} trained {_trained(saved)}, but this run trains {_trained(own)}: "
            "resume with the peft_config and lora_denoisers of that run."
        )
    differences = (
        ("base_precision", "another base_precision"),
        ("weights", "other base weights"),
        ("lora_scale", "another lora_alpha or other lora_denoisers"),
    )
    for key, what in differences:
        before = saved.get(key, None if key == "base_precision" else own[key])  # older checkpoints lack these
        if before != own[key]:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} was trained with {what} than this run's, so its adapter would "
                f"not fit. Its model was {saved['model']!r}."
            )
    if _beginning(saved) != _beginning(own):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} began from {_beginning(saved)}, but this run from "
            f"{_beginning(own)}. Resume with the continue_from and continue_reference of that run, and with the same "
            "adapter file."
        )
    for name, value in own["batches"].items():
        if saved["batches"][name] != value:
            raise ValueError(
                f"{name}={value}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{saved['batches'][name]}: the position in the data would change. Keep that value, or start a new "
                "run."
            )
    settings, own = saved.get("settings", own["settings"]), own["settings"]
    for name, why in FIXED.items():
        unused = name == "metric_for_best_model" and None in (settings[name], own[name])  # no best model yet
        if settings[name] != own[name] and not unused:
            raise ValueError(
                f"{name}={own[name]!r}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{settings[name]!r}: {why}. Keep that value, or start a new run."
            )
    kinds = {settings["lr_scheduler_type"], own["lr_scheduler_type"]}
    for name in _SCHEDULE if kinds & set(_FOLLOWS_SCORES) else ():
        if settings[name] != own[name]:
            raise ValueError(
                f"{name}={own[name]!r}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{settings[name]!r}: a schedule that depends on scores cannot change during a run. Keep that value, "
                "or start a new run."
            )


def changes_since(checkpoint: str, own: dict) -> list[str]:
    """Return what changed at this and earlier checkpoints, like "learning_rate 0.001 until step 20, then 0.0001"."""
    saved, step = json.loads((Path(checkpoint) / "policy.json").read_text(encoding="utf-8")), step_of(checkpoint)
    now = own["settings"]
    then = saved.get("settings", now)
    weights = dict.fromkeys(
        [name for name in (*then, *now) if name not in (*REPORTED, *FIXED)], 0.0
    )  # auxiliary losses'
    then, now = weights | then, weights | now
    objective = [name for name in own["objective"] if name in saved.get("objective", {})]
    then, now = then | saved.get("objective", {}), now | own["objective"]
    servers = {
        name: (before, own["remote_rewards"][name])
        for name, before in saved.get("remote_rewards", {}).items()
        if name in own["remote_rewards"]
    }
    return (
        saved.get("changes", [])
        + [
            f"{name} {then[name]} until step {step}, then {now[name]}"
            for name in (*REPORTED, *weights, *objective)
            if then[name] != now[name]
        ]
        + [
            f"code or weights of the remote reward {name!r} {before} until step {step}, then {after}"
            for name, (before, after) in servers.items()
            if before != after
        ]
    )


def follow_settings(optimizer: torch.optim.Optimizer, scheduler, groups: list[dict]) -> None:
    """Apply this run's settings to a loaded optimizer and schedule; their state stays.

    Args:
        optimizer: the optimizer, with loaded state.
        scheduler: the schedule, with loaded state.
        groups: the optimizer's parameter groups before loading.
    """
    for group, own in zip(optimizer.param_groups, groups):
        group.update({key: own[key] for key in ("betas", "eps", "weight_decay", "initial_lr") if key in own})
    if isinstance(scheduler, LambdaLR):  # others depend on scores, and `check_same_run` allows no change
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        rates = [rate * part(scheduler.last_epoch) for rate, part in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        scheduler._last_lr = rates


def _plain(setting):
    return setting.value if isinstance(setting, Enum) else setting


def _trained(identity: dict) -> str:
    full = identity.get("full")
    return "a LoRA" if full is None else f"all weights of {' and '.join(full)}"


def _beginning(identity: dict) -> str:
    began = identity.get("continued")
    if began is None:
        return "a new adapter"
    return f"a saved adapter (SHA-256 {began['adapter'][:16]}, continue_reference={began['reference']!r})"


def _architecture(module: nn.Module) -> str:
    """Return a digest of a module's config, without the path it was loaded from."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """Return a digest of a sample of a module's base weights, the same in fp32 and bf16."""
    weights = [p for name, p in sorted(module.named_parameters()) if "lora_" not in name]
    some = weights[:: max(1, len(weights) // 8)]
    parts = [p.detach().flatten()[:256].float().cpu().bfloat16().float() for p in some]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()


def _lora_scale(module: nn.Module) -> list[float]:
    """Return the scaling factors of the adapter: a single one if all modules share it, otherwise one per module."""
    scales = [
        scale for layer in module.modules() if isinstance(layer, BaseTunerLayer) for scale in layer.scaling.values()
    ]
    return scales if len(set(scales)) > 1 else scales[:1]
