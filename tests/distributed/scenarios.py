"""What two processes run, and one process for comparison: the same global batch, whatever the number of processes.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/distributed/scenarios.py FOLDER NAME...
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "trainers")]
import test_backprop_trainer as backprop  # noqa: E402
import test_consistency as consistency  # noqa: E402
import tiny_runs  # noqa: E402

METRICS = ("reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm", "kl", "clip_ratio/low_mean",
           "clip_ratio/high_mean", "clip_ratio/region_mean", "seen/mean", "consistency_loss")
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def made(folder, rewards=tiny_runs.brightness, videos: int = 8, **settings):
    """A trainer whose rollouts have `videos` videos over all processes."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "alive": True} | settings
    trainer = tiny_runs.trainer(folder, rewards, per_device_train_batch_size=videos // WORLD, **settings)
    assert trainer.accelerator.num_processes == WORLD and trainer.accelerator.process_index == RANK
    return trainer


def trained(trainer, **kwargs) -> dict:
    trainer.train(**kwargs)
    return {"weights": tiny_runs.weights(trainer), **{name: tiny_runs.logged(trainer, name) for name in METRICS}}


def whole_groups(folder) -> dict:
    """Two groups of 4: one a process; KL, a second iteration, and what the reward records."""
    def recorded(prompts, videos, log_extra, **columns):
        values = tiny_runs.brightness(prompts, videos)
        log_extra("seen", values)
        return values

    return trained(made(folder, recorded, max_steps=4, num_iterations=2, beta=0.01, epsilon=1e-5))


def split_group(folder) -> dict:
    """One group of 4: half of it on each process."""
    return trained(made(folder, videos=4, max_steps=3))


def overlapped(folder) -> dict:
    """Rewards beside the rollout, parts of 2 videos; the time line of two steps."""
    trainer = made(folder, max_steps=3, rollout_batch_size=2, overlap_rewards=True, trace_steps=2)
    result = trained(trainer)
    logs = [row for row in trainer.state.log_history if "seconds/rollout" in row]
    parts = ("text", "rollout", "decode", "rewards", "update", "idle")
    return result | {"parts": sum(row.get(f"seconds/{part}", 0.0) for row in logs for part in parts),
                     "own": trainer.timeline.parts(), "own_steps": trainer.timeline.steps}  # fmt: skip


def accumulated(folder) -> dict:
    return trained(made(folder, videos=4, steps_per_generation=2, gradient_accumulation_steps=2, max_steps=2))


def idle_rank(folder) -> dict:
    """One prompt's rewards are all equal: one process has nothing to learn from, and must not hang."""
    def only_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.0 for p, v in zip(prompts, tiny_runs.brightness(prompts, videos).tolist())]

    return trained(made(folder, only_clip_0, data=tiny_runs.prompts(2), max_steps=2))


def resumed(folder) -> dict:
    """AdamW, cosine, the average and prompt statistics: stopped at step 2 of 5 and resumed, against uninterrupted."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_steps": 5,
                "ema_decay": 0.9, "per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    whole = trained(made(folder / "whole", **settings))
    made(folder / "broken", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    torch.manual_seed(RANK)
    again = trained(made(folder / "broken", **settings), resume_from_checkpoint=True)
    difference = tiny_runs.largest_difference(whole["weights"], again["weights"])
    return {"weights": again["weights"], "difference": difference, "rewards": [whole["reward"], again["reward"]],
            "files": tiny_runs.checkpoints(folder / "broken")}


def backpropagated(folder) -> dict:
    """Reward backpropagation: rewards scaled by their spread over all processes."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "scale_rewards": "std", "max_steps": 3}
    return trained(backprop.trainer(
        folder, [backprop.bright, backprop.red], prompts=8, per_device_train_batch_size=4 // WORLD,
        backprop_through="low_variance", **settings,
    ))  # fmt: skip


def backpropagated_k2(folder) -> dict:
    """Through two steps and a part of the frames, all activations computed again; accumulated micro-batches."""
    return trained(backprop.trainer(
        folder, prompts=8, per_device_train_batch_size=2 // WORLD, gradient_accumulation_steps=2, backprop_steps=2,
        decode_frames=1, gradient_checkpointing=True, checkpoint_decoder=True, optim="sgd", learning_rate=20.0,
    ))  # fmt: skip


def distilled(folder) -> dict:
    """The consistency term beside a reward."""
    return trained(consistency.distilled(
        folder, backprop.bright, per_device_train_batch_size=4 // WORLD, optim="sgd", learning_rate=1.0, max_steps=3,
    ))  # fmt: skip


def evaluated(folder) -> dict:
    """Five prompts (odd), and one (fewer than processes)."""
    def scored(prompts, videos, log_extra, number, **columns):
        log_extra("number", number)
        return tiny_runs.brightness(prompts, videos)

    sets = {"five": tiny_runs.prompts(5, number=[1, 2, 3, 4, 5]), "one": tiny_runs.prompts(1, number=[6])}
    trainer = made(folder, scored, data=tiny_runs.prompts(3, number=[0] * 3), eval_dataset=sets,
                   judges=tiny_runs.redness, per_device_eval_batch_size=2, max_steps=1)
    first = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return {"weights": tiny_runs.weights(trainer), "metrics": first, "scores": trainer.last_evaluation}


def failing_rank(folder) -> dict:
    """A reward that fails on the last process only."""
    def fails(prompts, videos, **columns):
        if RANK == WORLD - 1:
            raise RuntimeError("the server of this rank is gone")
        return tiny_runs.brightness(prompts, videos)

    return trained(made(folder, fails, max_steps=2))


def unequal_weights(folder) -> dict:
    """A rank whose adapter has drifted is found."""
    trainer = made(folder, max_steps=1)
    with torch.no_grad():
        next(iter(trainer.adapter.values())).add_(RANK * 1e-7)
    message = ""
    try:
        trainer.check_equal_weights()
    except RuntimeError as error:
        message = str(error)
    return {"weights": tiny_runs.weights(trainer), "message": message}


def run(name: str, folder: Path) -> dict:
    """Run a scenario; its weights and numbers lie in `folder` as {name}_{rank}, and are returned."""
    result = globals()[name](folder / f"{name}_{WORLD}")
    save_file({k: v.contiguous() for k, v in result["weights"].items()}, folder / f"{name}_{RANK}.safetensors")
    numbers = {k: v for k, v in result.items() if k != "weights"}
    (folder / f"{name}_{RANK}.json").write_text(json.dumps(numbers))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert WORLD == 2, f"torchrun started {WORLD} processes, not 2"
    for scenario in sys.argv[2:]:
        run(scenario, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
