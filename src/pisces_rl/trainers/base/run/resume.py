"""Whether a checkpoint can be resumed: it is one, and of the same trainer, model, adapter and batches."""

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

#: Settings that may change on resume. They act from there on, and the run says so: on the console and in its card.
TOLD = (
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
#: Settings that may not: what a checkpoint holds would mean something else.
FIXED = {
    "optim": "the optimizer's state is of another kind",
    "optim_args": "the optimizer's state is of another kind",
    "metric_for_best_model": "the best value so far is of another metric",
}
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
#: Schedules that are no function of the step.
_FOLLOWS_SCORES = (SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value)


def last_checkpoint(output_dir: str) -> str | None:
    """The checkpoint of the highest step; another program's or a user's `checkpoint-...` is none."""
    return next((str(path) for path in reversed(own_checkpoints(output_dir).values())), None)


def requested_checkpoint(output_dir: str, checkpoint: str | bool | None) -> str | None:
    """The folder to resume from; a ValueError where there is none, or it is not a checkpoint."""
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
    """The optimizer step of a checkpoint, whatever its folder is called."""
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
    """What a checkpoint must agree with: trainer, pipeline, denoisers' architecture, and how data is counted; and the
    settings of the run, with what changed in them where it was resumed.

    Args:
        trainer: its name. model: where the pipeline is from. args: the config. position: settings by which the
            position in the data is counted. auxiliary_losses: their weights are settings of the run, too.
        rewards: those of servers have an identity, of their code and weights.
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
        "settings": {name: _plain(getattr(args, name)) for name in (*TOLD, *FIXED)}
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
    """A ValueError that says in what the checkpoint differs from the run of identity `own`."""
    saved = json.loads((Path(checkpoint) / "policy.json").read_text(encoding="utf-8"))
    if saved.get("trainer", own["trainer"]) != own["trainer"]:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is a run of {saved['trainer']}, not of {own['trainer']}: resume "
            "it with the trainer that wrote it."
        )
    if (saved["pipeline"], saved["denoisers"]) != (own["pipeline"], own["denoisers"]):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is of another model: {saved['pipeline']} from "
            f"{saved['model']!r}, while this run trains {own['pipeline']} from {own['model']!r}."
        )
    if saved.get("full") != own.get("full"):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} trained {_trained(saved)}, this run trains {_trained(own)}: "
            "resume with the peft_config and the lora_denoisers of that run."
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
                f"resume_from_checkpoint={checkpoint!r} was trained on {what} than this run's: the adapter would "
                f"mean something else. It was made from {saved['model']!r}."
            )
    if _beginning(saved) != _beginning(own):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} began from {_beginning(saved)}, this run from {_beginning(own)}. "
            "Resume with the continue_from and continue_reference of that run, and the same file there."
        )
    for name, value in own["batches"].items():
        if saved["batches"][name] != value:
            raise ValueError(
                f"{name}={value}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{saved['batches'][name]}: the position in the data would be another. Keep it, or start anew."
            )
    settings, own = saved.get("settings", own["settings"]), own["settings"]
    for name, why in FIXED.items():
        unused = name == "metric_for_best_model" and None in (settings[name], own[name])  # nothing is best yet
        if settings[name] != own[name] and not unused:
            raise ValueError(
                f"{name}={own[name]!r}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{settings[name]!r}: {why}. Keep it, or start anew."
            )
    kinds = {settings["lr_scheduler_type"], own["lr_scheduler_type"]}
    for name in _SCHEDULE if kinds & set(_FOLLOWS_SCORES) else ():
        if settings[name] != own[name]:
            raise ValueError(
                f"{name}={own[name]!r}, but resume_from_checkpoint={checkpoint!r} was saved with "
                f"{settings[name]!r}: a schedule that follows the scores cannot be changed under way. Keep it, or "
                "start anew."
            )


def changes_since(checkpoint: str, own: dict) -> list[str]:
    """What changed at this checkpoint and at earlier ones: "learning_rate 0.001 until step 20, then 0.0001"."""
    saved, step = json.loads((Path(checkpoint) / "policy.json").read_text(encoding="utf-8")), step_of(checkpoint)
    now = own["settings"]
    then = saved.get("settings", now)
    weights = dict.fromkeys([name for name in (*then, *now) if name not in (*TOLD, *FIXED)], 0.0)  # auxiliary losses'
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
            for name in (*TOLD, *weights, *objective)
            if then[name] != now[name]
        ]
        + [
            f"code or weights of the remote reward {name!r} {before} until step {step}, then {after}"
            for name, (before, after) in servers.items()
            if before != after
        ]
    )


def follow_settings(optimizer: torch.optim.Optimizer, scheduler, groups: list[dict]) -> None:
    """An optimizer and its schedule that were loaded take the settings of this run; their state stays.

    Args:
        groups: the optimizer's groups before they were loaded.
    """
    for group, own in zip(optimizer.param_groups, groups):
        group.update({key: own[key] for key in ("betas", "eps", "weight_decay", "initial_lr") if key in own})
    if isinstance(scheduler, LambdaLR):  # the others follow scores: `check_same_run` keeps them as they were
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
    return f"a saved one (SHA-256 {began['adapter'][:16]}, continue_reference={began['reference']!r})"


def _architecture(module: nn.Module) -> str:
    """A digest of a module's config, without where it was loaded from."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """A digest of some of a module's own weights, the same in fp32 and bf16."""
    weights = [p for name, p in sorted(module.named_parameters()) if "lora_" not in name]
    some = weights[:: max(1, len(weights) // 8)]
    parts = [p.detach().flatten()[:256].float().cpu().bfloat16().float() for p in some]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()


def _lora_scale(module: nn.Module) -> list[float]:
    """The factor of the adapter's product: one for all modules, or theirs in order where they differ."""
    scales = [
        scale for layer in module.modules() if isinstance(layer, BaseTunerLayer) for scale in layer.scaling.values()
    ]
    return scales if len(set(scales)) > 1 else scales[:1]
