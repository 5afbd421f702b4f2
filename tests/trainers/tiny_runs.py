"""Tiny training runs: a random WanPipeline, 16 x 16 pixels, 5 frames, 3 denoising steps; 0.3 s an optimizer step."""

import contextlib
import multiprocessing
import os
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from tiny_pipelines import BUILD, quiet
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pisces_rl import VideoGRPOTrainer
from pisces_rl.policy import default_lora_config
from pisces_rl.trainers.methods import METHODS

CALL = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}


def on_gpus() -> bool:
    """Whether runs, and processes that tests start, use a GPU each: only in tests that set this variable."""
    return os.environ.get("PISCES_RL_TESTS_ON") == "cuda"


def pipeline(seed: int = 0):
    return quiet(BUILD["wan"](seed))


def config(folder, method: str = "grpo", **settings):
    """One prompt group of 4 a step unless `settings` say otherwise; for GRPO a clip range that never clips."""
    defaults = {
        **CALL,
        "output_dir": str(folder),
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not on_gpus(),
        "num_inference_steps": 3,
        "pipeline_kwargs": {"max_sequence_length": 16},
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_sample_videos": 0 if on_gpus() else 2,
        "save_strategy": "no",
    } | ({"epsilon": 0.5} if method == "grpo" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[method][1](**defaults | settings)


def prompts(count: int = 3, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"clip {i}" for i in range(count)], **columns})


def brightness(prompts, videos, **columns):
    """Thousandths of brightness, from grey: a random model's clips differ by about one of them."""
    return 1000 * (videos.double() - 0.5).mean(dim=(1, 2, 3, 4))


def redness(prompts, videos, **columns):
    return (1000 * (videos[:, :, 0] - videos[:, :, 1]).mean(dim=(1, 2, 3))).tolist()


def trainer(
    folder,
    rewards=brightness,
    data=None,
    *,
    model=None,
    rank=4,
    callbacks=None,
    eval_dataset=None,
    judges=None,
    alive=False,
    method="grpo",
    peft_config=None,
    **settings,
):
    """A trainer on the tiny pipeline; `alive` starts from an adapter that is not zero."""
    made = METHODS[method][0](
        model or pipeline(),
        rewards,
        config(folder, method, **settings),
        prompts() if data is None else data,
        eval_dataset=eval_dataset,
        judge_funcs=judges,
        callbacks=callbacks,
        peft_config=peft_config or default_lora_config(rank),
    )
    if alive:
        enliven(made)
    return made


def enliven(made: VideoGRPOTrainer, scale: float = 0.05) -> None:
    """B = 0 hides half of the gradients: random values instead; weights that are trained whole, too, get others."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.adapter.items():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            elif "lora_A" not in name:
                parameter.mul_(1 + 0.4 * scale * torch.randn(parameter.shape, generator=generator))


def weights(made: VideoGRPOTrainer) -> dict[str, torch.Tensor]:
    """Whole, also where processes hold parts: then all must call."""
    return {
        name: (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).to("cpu", copy=True)
        for name, p in made.adapter.items()
    }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def logged(made: VideoGRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in made.state.log_history if name in row]


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, before the step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Weights(TrainerCallback):
    """Keeps the weights after every optimizer step of `trainer`, which is set once it is made."""

    trainer = None

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append({name: value.clone() for name, value in weights(self.trainer).items()})


def equal_from(step: int):
    """Rewards that are equal from an optimizer step on."""

    def rewards(prompts, videos, trainer_state, **columns):
        values = brightness(prompts, videos)
        return (values if trainer_state.global_step < step else torch.ones_like(values)).tolist()

    return rewards


class StopAt(TrainerCallback):
    """Saves and stops after a step, as if the machine was taken away between two steps."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def in_child(function, *arguments, timeout: float = 100) -> int:
    """Run in a forked process, so that it may die; returns its exit code (-9: killed)."""
    process = multiprocessing.get_context("fork").Process(target=_silently, args=(function, *arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{function.__name__} did not end within {timeout} s")
    return process.exitcode


def _silently(function, *arguments):
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        function(*arguments)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))
