"""Scenarios that run on two processes, and on one for comparison, with the same global batch.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/distributed/scenarios.py FOLDER NAME...

Started by `accelerate launch` with FSDP2 or DeepSpeed, the same scenarios run with sharded denoisers and optimizers;
in shared/NAME, both processes share each video's tokens.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "trainers")]
import test_backprop_trainer as backprop  # noqa: E402
import test_consistency as consistency  # noqa: E402
import test_flow_dpo as flow_dpo_data  # noqa: E402
import tiny_runs  # noqa: E402
from tiny_pipelines import CALLS  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from pisces_rl import ConsistencyDistillation, RewardBackpropTrainer  # noqa: E402
from pisces_rl.policy import FullWeights, PolicyError, VideoPolicy, add_lora, held, lora_parameters  # noqa: E402
from pisces_rl.policy.sharded.partition import partition  # noqa: E402
from pisces_rl.trainers.base.run.checkpoint import load_tree  # noqa: E402

METRICS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "loss",
    "grad_norm",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "seen/mean",
    "consistency_loss",
    "rewards/margins",
    "velocity/old_distance",
    "velocity/reference_distance",
    "velocity/average_distance",
)
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
SHARED, PARTS = 1, WORLD  # processes that share each video, and parts that the videos are divided into; set by `run`
DEVICES = torch.accelerator.device_count

if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a faster collective, which it would compile first


def made(folder, rewards=tiny_runs.brightness, videos: int = 8, **settings):
    """A trainer whose rollouts have `videos` videos over all processes."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "alive": True} | settings
    trainer = tiny_runs.trainer(
        folder, rewards, per_device_train_batch_size=videos // PARTS, context_parallel=SHARED, **settings
    )
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


def fp8(folder) -> dict:
    """One group on an FP8 base: half of it on each process."""
    trainer = made(folder, videos=4, model="tiny-wan", base_precision="fp8", max_steps=1, learning_rate=0.1)
    before = tiny_runs.weights(trainer)
    return trained(trainer) | ({"before": before} if WORLD == 1 else {})


def nft(folder) -> dict:
    """Two groups, an old policy that lags, and some of the noise levels."""
    return trained(made(folder, method="nft", max_steps=4, beta=0.3, old_decay_rate=0.3, train_levels=2))


def awm(folder) -> dict:
    """Half a group a process, a second iteration with another ratio, and an average that lags."""
    return trained(
        made(folder, videos=4, method="awm", max_steps=4, num_iterations=2, beta=0.3, average_decay_rate=0.2)
    )


def rvm(folder) -> dict:
    """Advantages by the spread of the whole batch; one group is equal, so one process has no step."""

    def only_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.0 for p, v in zip(prompts, tiny_runs.brightness(prompts, videos).tolist())]

    return trained(
        made(folder, only_clip_0, data=tiny_runs.prompts(2), method="rvm", max_steps=3, learning_rate=100.0)
    )


def full(folder) -> dict:
    """All weights of the denoiser, with a KL term to a copy of the initial ones."""
    result = trained(made(folder, peft_config="full", alive=False, max_steps=3, beta=0.01, learning_rate=0.01))
    assert not any("lora_" in name for name in result["weights"])
    return result


def full_resumed(folder) -> dict:
    """All weights by AdamW, stopped at step 2 of 4 and resumed, against uninterrupted; saved as a component."""
    settings = ADAMW | {
        "peft_config": "full",
        "alive": False,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "method": "nft",
        "beta": 0.3,
        "old_decay_rate": 0.3,
    }
    whole = trained(made(folder / "whole", **settings))
    made(folder / "broken", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    trainer = made(folder / "broken", **settings)
    again = trained(trainer, resume_from_checkpoint=True)
    trainer.save_model()
    return again | {"difference": tiny_runs.largest_difference(whole["weights"], again["weights"])}


def full_idle(folder) -> dict:
    """All weights: a process with nothing to learn from, micro-batches of several backwards, a clipped gradient."""

    def only_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.0 for p, v in zip(prompts, tiny_runs.brightness(prompts, videos).tolist())]

    return trained(
        made(
            folder,
            only_clip_0,
            videos=4,
            data=tiny_runs.prompts(2),
            peft_config="full",
            alive=False,
            max_steps=3,
            steps_per_generation=2,
            gradient_accumulation_steps=2,
            max_grad_norm=1e-2,
            learning_rate=1.0,
            lr_scheduler_type="linear",
        )
    )


def full_experts(folder, **settings) -> dict:
    """All weights of both experts of Wan 2.2: the first trained step calls one, the second the other."""
    pipe = tiny_runs.quiet(tiny_runs.BUILD["wan22_a14b"]())
    pipe.register_to_config(boundary_ratio=0.9)
    trainer = made(folder, model=pipe, peft_config="full", alive=False, max_steps=2, learning_rate=0.01, **settings)
    result = trained(trainer)
    trainer.save_model()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return result | {
        "norms": [tiny_runs.logged(trainer, f"grad_norm/{name}") for name in trainer.adapted_modules],
        "files": files,
    }


def full_expert(folder) -> dict:
    """One of them, while the other is frozen."""
    return full_experts(folder, lora_denoisers=["transformer_2"], sde_window_range=[1, 2], sde_window_size=1)


def full_half(folder) -> dict:
    """All weights in fp32 of a bf16 pipeline under autocast, with activations computed again and an old policy."""
    return trained(
        made(
            folder,
            model=tiny_runs.pipeline().to(torch.bfloat16),
            peft_config="full",
            alive=False,
            bf16=True,
            gradient_checkpointing=True,
            method="nft",
            beta=0.3,
            max_steps=2,
            learning_rate=0.01,
        )
    )


def full_compiled(folder) -> dict:
    """All weights with blocks as graphs."""
    return trained(
        made(
            folder,
            peft_config="full",
            alive=False,
            max_steps=2,
            learning_rate=0.01,
            torch_compile=True,
            torch_compile_backend="aot_eager",
        )
    )


def full_backpropagated(folder) -> dict:
    """Train all weights through the sampler, with the consistency term; its teacher is the reference."""
    trainer = RewardBackpropTrainer(
        tiny_runs.pipeline(),
        backprop.bright,
        backprop.config(folder, per_device_train_batch_size=4 // PARTS, optim="sgd", learning_rate=0.01, max_steps=3),
        tiny_runs.prompts(8),
        peft_config="full",
        auxiliary_losses=[ConsistencyDistillation(consistency.Videos(), weight=0.1, steps=4)],
    )
    return trained(trainer)


def full_evaluated(folder) -> dict:
    """All weights, evaluated after each step: the best checkpoint is loaded, and compared with the initial policy."""
    trainer = made(
        folder,
        peft_config="full",
        alive=False,
        max_steps=2,
        learning_rate=0.1,
        ema_decay=0.5,
        eval_dataset=tiny_runs.prompts(3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        per_device_eval_batch_size=2,
    )
    result = trained(trainer)
    rewards = tiny_runs.logged(trainer, "eval_reward")
    return result | {"eval": rewards, "best": trainer.state.best_global_step}


def full_parts(folder) -> dict:
    """How many numbers of each copy of all weights this process holds."""

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.append(count(p.grad for p in trainer.adapter.values()))

    def count(tensors) -> int:
        return sum(held(t).numel() for t in tensors)

    gradients = []
    trainer = made(
        folder,
        peft_config="full",
        alive=False,
        callbacks=[Count()],
        beta=0.01,
        ema_decay=0.9,
        **ADAMW | {"max_steps": 1},
    )
    trainer.train()
    states = [v for state in trainer.optimizer.optimizer.state.values() for v in state.values() if v.ndim]
    copies = {"weights": trainer.adapter, "reference": trainer.initial.values, "average": trainer.ema.average}
    return {
        "weights": tiny_runs.weights(trainer),
        "whole": sum(p.numel() for p in trainer.adapter.values()),
        "held": {name: count(values.values()) for name, values in copies.items()}
        | {"gradients": gradients[-1], "states": count(states) // 2},
    }


FULL_STOPPED = {
    "peft_config": "full",
    "alive": False,
    "max_steps": 4,
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-3,
    "num_iterations": 4,
    "beta": 0.01,
    "ema_decay": 0.9,
}


def full_stopped(folder) -> dict:
    """All weights by AdamW, stopped at step 2 of 4, in the middle of the use of a rollout."""
    return trained(made(folder, callbacks=[tiny_runs.StopAt(2)], **FULL_STOPPED))


def full_uninterrupted(folder) -> dict:
    return trained(made(folder, **FULL_STOPPED))


def full_resumed_elsewhere(folder) -> dict:
    """Resume what `full_stopped` left on one process and on two."""
    weights = {}
    for world in (1, 2):
        checkpoint = folder.parent / f"full_stopped_{world}" / "checkpoint-2"
        trainer = made(folder / str(world), **FULL_STOPPED)
        weights[world] = trained(trainer, resume_from_checkpoint=str(checkpoint))["weights"]
    return {"weights": weights[WORLD], "difference": tiny_runs.largest_difference(weights[1], weights[2])}


def full_twice(folder) -> dict:
    """All weights, trained by AdamW and then again."""
    trainer = made(folder, peft_config="full", alive=False, max_steps=2, optim="adamw_torch", learning_rate=1e-3)
    trainer.train()
    return trained(trainer)


def flow_dpo(folder) -> dict:
    """The best against the worst of four."""
    return trained(made(folder, method="flow_dpo", max_steps=3, beta=100.0, learning_rate=0.01))


def flow_dpo_pairs(folder) -> dict:
    """Four pairs of videos of a dataset: two a process."""
    files = folder / f"clips_{RANK}"
    files.mkdir(parents=True)
    return trained(
        made(
            folder,
            None,
            data=flow_dpo_data.clips(files),
            method="flow_dpo",
            num_generations=2,
            max_steps=3,
            beta=100.0,
            learning_rate=0.01,
        )
    )


def flow_dppo(folder) -> dict:
    """Each rollout twice, with a mask that leaves out some terms, and a KL term."""
    return trained(made(folder, method="flow_dppo", max_steps=4, num_iterations=2, beta=0.01, divergence_limit=1e-7))


def flash_grpo(folder, halves: bool = False) -> dict:
    """Four prompts, each with its own window."""
    trainer = made(
        folder,
        data=tiny_runs.prompts(4),
        method="flash_grpo",
        num_generations=2,
        num_inference_steps=4,
        epsilon=0.5,
        max_steps=3,
        learning_rate=0.3,
    )
    own = trainer.trained_steps
    if halves and WORLD == 1:  # as where two processes share weights
        trainer.trained_steps = lambda number, group: own(number, group % 2)
    return trained(trainer)


def flash_grpo_halves(folder) -> dict:
    """Where processes share weights, the prompts at one place of each share have one window."""
    return flash_grpo(folder, halves=True)


def overlapped(folder) -> dict:
    """Rewards that overlap with the rollout, half of a process's videos at a time; the timeline of two steps."""
    trainer = made(folder, max_steps=3, rollout_batch_size=4 // PARTS, overlap_rewards=True, trace_steps=2)
    result = trained(trainer)
    logs = [row for row in trainer.state.log_history if "seconds/rollout" in row]
    parts = ("text", "rollout", "decode", "rewards", "update", "idle")
    return result | {
        "parts": sum(row.get(f"seconds/{part}", 0.0) for row in logs for part in parts),
        "own": trainer.timeline.parts(),
        "own_steps": trainer.timeline.steps,
    }


def accumulated(folder) -> dict:
    return trained(made(folder, videos=4, steps_per_generation=2, gradient_accumulation_steps=2, max_steps=2))


def idle_rank(folder) -> dict:
    """One prompt's rewards are all equal: one process has nothing to learn from, and must not hang."""

    def only_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.0 for p, v in zip(prompts, tiny_runs.brightness(prompts, videos).tolist())]

    return trained(made(folder, only_clip_0, data=tiny_runs.prompts(2), max_steps=2))


def no_spread(folder, **settings) -> dict:
    """AdamW, with rewards that are equal from the third step on: by how much each step but the first moves."""
    kept = tiny_runs.Weights()
    kept.trainer = made(folder, tiny_runs.equal_from(2), callbacks=[kept], **ADAMW | settings)
    result = trained(kept.trainer)
    return result | {"moved": [tiny_runs.largest_difference(a, b) for a, b in zip(kept.steps, kept.steps[1:])]}


def full_no_spread(folder) -> dict:
    return no_spread(folder, peft_config="full", alive=False, learning_rate=1e-3)


def compiled(folder) -> dict:
    """Blocks as graphs, without the compiler behind them."""
    return trained(made(folder, videos=4, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"))


def unlike_rewards(folder) -> dict:
    """A reward that differs between processes; processes that share a video must all use one of the values."""

    def moody(prompts, videos, **columns):
        return tiny_runs.brightness(prompts, videos) * (-1) ** (RANK % SHARED)

    return trained(made(folder, moody, max_steps=2))


def resumed(folder) -> dict:
    """AdamW, cosine, the average and prompt statistics: stopped at step 2 of 5 and resumed, against uninterrupted."""
    settings = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "max_steps": 5,
        "ema_decay": 0.9,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_min_count": 2,
    }
    whole = trained(made(folder / "whole", **settings))
    made(folder / "broken", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    torch.manual_seed(RANK)
    again = trained(made(folder / "broken", **settings), resume_from_checkpoint=True)
    difference = tiny_runs.largest_difference(whole["weights"], again["weights"])
    return {
        "weights": again["weights"],
        "difference": difference,
        "rewards": [whole["reward"], again["reward"]],
        "files": tiny_runs.checkpoints(folder / "broken"),
    }


def clipped(folder) -> dict:
    """The norm of every gradient is above the limit; the schedule is not constant."""
    return trained(made(folder, max_steps=3, max_grad_norm=1e-3, lr_scheduler_type="linear"))


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 4}


def stopped(folder) -> dict:
    """AdamW, stopped at step 2 of 4 with a checkpoint."""
    return trained(made(folder, callbacks=[tiny_runs.StopAt(2)], **ADAMW))


def resumed_elsewhere(folder) -> dict:
    """Resume what `stopped` left on one process and on two; check that the optimizer has the checkpoint's state."""

    class Compare(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            own, saved = (tree_flatten(tree)[0] for tree in (trainer.optimizer.state_dict(), kept))
            equal = [bool(torch.as_tensor(a == b).all()) for a, b in zip(own, saved)]
            same.append(len(own) == len(saved) and all(equal))

    weights, same = {}, []
    for world in (1, 2):
        checkpoint = folder.parent / f"stopped_{world}" / "checkpoint-2"
        kept = load_tree(checkpoint / "optimizer")
        trainer = made(folder / str(world), callbacks=[Compare()], **ADAMW)
        weights[world] = trained(trainer, resume_from_checkpoint=str(checkpoint))["weights"]
    return {"weights": weights[1], "same": same, "difference": tiny_runs.largest_difference(weights[1], weights[2])}


def trained_twice(folder) -> dict:
    """Run `train` again after the weights were set from outside."""
    trainer = made(folder, max_steps=2)
    trainer.train()
    tiny_runs.enliven(trainer)
    return trained(trainer)


def two_experts(folder) -> dict:
    """Wan 2.2: the first trained step calls one denoiser, the second the other."""
    pipe = tiny_runs.quiet(tiny_runs.BUILD["wan22_a14b"]())
    pipe.register_to_config(boundary_ratio=0.9)
    trainer = made(folder, model=pipe, max_steps=2)
    result = trained(trainer)
    return result | {"norms": [tiny_runs.logged(trainer, f"grad_norm/{name}") for name in trainer.adapted_modules]}


def backpropagated(folder) -> dict:
    """Reward backpropagation: rewards scaled by their spread over all processes."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "scale_rewards": "std", "max_steps": 3}
    return trained(
        backprop.trainer(
            folder,
            [backprop.bright, backprop.red],
            prompts=8,
            per_device_train_batch_size=4 // PARTS,
            context_parallel=SHARED,
            backprop_through="low_variance",
            **settings,
        )
    )


def backpropagated_k2(folder) -> dict:
    """Through two steps and a part of the frames, all activations computed again; accumulated micro-batches."""
    return trained(
        backprop.trainer(
            folder,
            prompts=8,
            per_device_train_batch_size=2 // PARTS,
            context_parallel=SHARED,
            gradient_accumulation_steps=2,
            backprop_steps=2,
            decode_frames=1,
            gradient_checkpointing=True,
            checkpoint_decoder=True,
            optim="sgd",
            learning_rate=20.0,
        )
    )


def distilled(folder) -> dict:
    """The consistency term together with a reward."""
    return trained(
        consistency.distilled(
            folder,
            backprop.bright,
            per_device_train_batch_size=4 // PARTS,
            context_parallel=SHARED,
            optim="sgd",
            learning_rate=1.0,
            max_steps=3,
        )
    )


def evaluated(folder) -> dict:
    """Five prompts (odd), and one (fewer than processes)."""

    def scored(prompts, videos, log_extra, number, **columns):
        log_extra("number", number)
        return tiny_runs.brightness(prompts, videos)

    sets = {"five": tiny_runs.prompts(5, number=[1, 2, 3, 4, 5]), "one": tiny_runs.prompts(1, number=[6])}
    trainer = made(
        folder,
        scored,
        data=tiny_runs.prompts(3, number=[0] * 3),
        eval_dataset=sets,
        judges=tiny_runs.redness,
        per_device_eval_batch_size=2,
        max_steps=1,
    )
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


def _saving(folder, reward, callbacks=(), **timeouts) -> dict:
    """Three optimizer steps with a checkpoint each."""
    return trained(
        made(folder, reward, max_steps=3, save_strategy="steps", save_steps=1, callbacks=list(callbacks), **timeouts)
    )


def dead_rank(folder) -> dict:
    """The last process is killed after the first checkpoint."""

    def kills(prompts, videos, trainer_state, **columns):
        if RANK == WORLD - 1 and trainer_state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny_runs.brightness(prompts, videos)

    return _saving(folder, kills, ddp_timeout=400, reward_timeout=390)


def hanging_reward(folder) -> dict:
    """A reward that waits for ever for a server, on the last process."""

    def waits(prompts, videos, trainer_state, **columns):
        if RANK == WORLD - 1 and trainer_state.global_step == 1:
            threading.Event().wait()
        return tiny_runs.brightness(prompts, videos)

    return _saving(folder, waits, ddp_timeout=400, reward_timeout=4)


def dead_server(folder) -> dict:
    """Each process has a reward server; the last one's is killed after the first checkpoint."""
    command = [sys.executable, "-m", "pisces_rl.command", "serve", "--rewards", f"{tiny_runs.__file__}:brightness"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if RANK == WORLD - 1 and state.global_step == 1:
                    server.kill()

        try:
            url = server.stdout.readline().split()[1]
            return _saving(folder, f"{url}?retries=1", [Kill()], ddp_timeout=400, reward_timeout=390)
        finally:
            server.kill()


def stuck_rank(folder) -> dict:
    """The last process is stuck outside of rewards, for as long as the first one runs."""

    class Stuck(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if RANK == 0 and state.global_step == 0:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "pid").write_text(str(os.getpid()))
            if RANK == WORLD - 1 and state.global_step == 1:
                while _runs(int((folder / "pid").read_text())):
                    time.sleep(0.2)
                os._exit(3)

    return _saving(folder, tiny_runs.brightness, [Stuck()], ddp_timeout=15, reward_timeout=14)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def dead_in_a_collective(folder) -> dict:
    """The last process is killed while the first one gathers weights from it."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if RANK == WORLD - 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = made(
        folder,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        callbacks=[Kill()],
        ddp_timeout=400,
        reward_timeout=390,
    )
    trainer.policy.shard(init_device_mesh("cpu", (WORLD,)))
    return trained(trainer)


def disturbed_weights(folder) -> dict:
    """One bit of one weight of the last process changes in the second of eight steps; compared every third."""

    class Disturb(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if RANK == WORLD - 1 and state.global_step == 2:
                next(iter(trainer.adapter.values())).data.view(-1)[0].view(torch.int32).bitwise_xor_(1)

    trainer = made(folder, max_steps=8, equal_weights_steps=3, callbacks=[Disturb()])
    message = ""
    try:
        trainer.train()
    except RuntimeError as error:
        message = str(error)
    return {"weights": tiny_runs.weights(trainer), "message": message, "step": trainer.state.global_step}


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


def parts_of_weights(folder) -> dict:
    """How many of the denoiser's own weights and of the optimizer's states this process holds."""
    trainer = made(folder, **ADAMW)
    trainer.train()
    denoiser = trainer.policy.denoiser["transformer"]
    frozen = [p for p in denoiser.parameters() if not p.requires_grad]
    partitioned = hasattr(frozen[0], "ds_tensor")
    trainer.policy.sample(["a"], noise_seeds=[0])  # frees what backward has left
    held = sum(
        p.numel() + p.ds_tensor.numel() if partitioned else (p.to_local() if isinstance(p, DTensor) else p).numel()
        for p in frozen
    )
    states = [v for state in trainer.optimizer.optimizer.state.values() for v in state.values() if v.ndim]
    return {
        "weights": tiny_runs.weights(trainer),
        "held": held,
        "whole": sum(p.ds_numel if partitioned else p.numel() for p in frozen),
        "states": sum(state.numel() for state in states),
        "trained": sum(p.numel() for p in trainer.adapter.values()),
        "sharded_adapter": [n for n, p in trainer.adapter.items() if isinstance(p, DTensor)],
    }


def share(policy) -> None:
    """With FSDP2, or with DeepSpeed on request."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        partition(policy, "cpu", WORLD)
    else:
        policy.shard(init_device_mesh("cpu", (WORLD,)))


def full_unequal_texts(folder) -> dict:
    return unequal_texts(folder, full=True)


def unequal_texts(folder, full: bool = False) -> dict:
    """Kandinsky 5 runs a forward for each length of text: three on the first process, one on the last."""
    prompts = [["a bird in the snow", "a", "a fish"], ["a fish", "a fish", "a fish"]][RANK]
    pipe = tiny_runs.quiet(tiny_runs.BUILD["kandinsky5"]())
    if full:
        FullWeights({"transformer": pipe.transformer})
    else:
        add_lora({"transformer": pipe.transformer}, tiny_runs.default_lora_config(4))
    policy = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["kandinsky5"])
    seeds = {"noise_seeds": [0, 1, 2], "step_seeds": [3, 4, 5], "steps": [0, 1]}
    whole = policy.sample(prompts, **seeds)
    share(policy)
    parts = policy.sample(prompts, **seeds)
    scores = []
    policy.replay(parts, [0, 1, 2], lambda step: (step.log_prob.sum().backward(), scores.append(step.log_prob)))
    gradients = {name: p.grad for name, p in lora_parameters(dict(policy.denoiser.items())).items()}
    if full:
        gradients = {name: g.full_tensor() for name, g in gradients.items()}
    return {
        "weights": gradients,
        "videos": float((whole.videos - parts.videos).abs().max()),
        "log_probs": float((torch.stack(scores, 1) - whole.log_probs).abs().max()),
    }


def freed_behind_backward(folder) -> dict:
    """Which part of the frozen weights is whole after a backward through two calls of the denoiser (guidance)."""
    pipe = tiny_runs.pipeline()
    config = dict(pipe.transformer.config) | {"num_layers": 8}
    pipe.transformer = type(pipe.transformer).from_config(config).requires_grad_(False).eval()
    add_lora({"transformer": pipe.transformer}, tiny_runs.default_lora_config(4))
    policy = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["wan"] | {"guidance_scale": 4.0})
    share(policy)
    rollout = policy.sample(["a"], noise_seeds=[0], step_seeds=[1], steps=[0])
    policy.replay(rollout, [0], lambda step: step.log_prob.sum().backward())
    frozen = [p for p in policy.denoiser.parameters() if not p.requires_grad]
    return {"weights": {}, "whole": sum(p.numel() for p in frozen) / sum(p.ds_numel for p in frozen)}


def refused_splits(folder) -> dict:
    """Tokens that cannot be split: a class without a plan, and videos of three tokens."""
    mesh = init_device_mesh("cpu", (1, 1, WORLD), mesh_dim_names=("data", "ring", "ulysses"))
    messages = []
    for family in ("cogvideox", "wan"):
        pipe = tiny_runs.quiet(tiny_runs.BUILD[family]())
        policy = VideoPolicy(pipe, num_inference_steps=2, pipeline_kwargs=CALLS[family])
        try:
            policy.share_tokens(mesh)
            policy.sample(["a"], noise_seeds=[0])
        except PolicyError as error:
            messages.append(str(error))
    return {"weights": {}, "messages": messages}


def half_precision(folder) -> dict:
    """Weights of two dtypes in a block, as bf16 pipelines have, with activations computed again."""
    model = tiny_runs.pipeline().to(torch.bfloat16)
    for name, parameter in model.transformer.named_parameters():
        if any(part in model.transformer._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    return trained(made(folder, model=model, gradient_checkpointing=True, replay_tolerance=1.0))


def run(name: str, folder: Path) -> dict:
    """Run a scenario; its weights and numbers are saved in `folder` as {name}_{rank}, and returned.

    Those of shared/NAME, in which both processes share each video's tokens, are saved in folder/shared.
    """
    global SHARED, PARTS
    together, _, name = name.rpartition("/")
    SHARED = 2 if together else 1
    PARTS = WORLD // SHARED
    torch.accelerator.device_count = (lambda: 1) if together else DEVICES  # diffusers divides by the number of GPUs
    folder = folder / together
    folder.mkdir(exist_ok=True)
    result = globals()[name](folder / f"{name}_{WORLD}")
    save_file({k: v.contiguous() for k, v in result["weights"].items()}, folder / f"{name}_{RANK}.safetensors")
    numbers = {k: v for k, v in result.items() if k not in ("weights", "before")}
    (folder / f"{name}_{RANK}.json").write_text(json.dumps(numbers))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert WORLD == 2, f"torchrun started {WORLD} processes, not 2"
    for scenario in sys.argv[2:]:
        run(scenario, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
