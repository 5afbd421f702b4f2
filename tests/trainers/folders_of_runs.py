"""Folders as runs leave them, without a trainer: red videos before, green ones after."""

import torch

from pisces_rl.run_files import RunFiles
from pisces_rl.trainers.base.run.run_folder import evaluation_file, write_report, write_samples
from pisces_rl.whole_files import write_json

#: What users write. The last line has an override of direction that nothing ends.
HOSTILE = [
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>",
    "quotes \" ' ` and & &lt; <!-- \u2028 {{7*7}} %%DATA%%",
    "a cat 🐈 and a family 👨‍👩‍👧",
    "قطة صغيرة على سجادة حمراء \u202e override",
    "long " * 400,
]
PLAIN = ["a red square", "a blue circle", "a green cross"]


def clip(colour: int, frames: int = 16, size: int = 32) -> torch.Tensor:
    """(F, 3, H, W): one channel that grows brighter with time."""
    video = torch.zeros(frames, 3, size, size)
    video[:, colour] = torch.linspace(0.2, 1.0, frames)[:, None, None]
    return video


def folder_of_run(folder, prompts=PLAIN, steps=(0, 4), shown: int = 2, name: str = "held_out", gain: float = 0.5):
    """A finished run: scores of every prompt, videos of the first `shown`; the last prompt became worse."""
    files, sets, shown = RunFiles(folder), {}, min(shown, len(prompts))
    files.begin()
    for step in steps:
        last = len(prompts) - 1
        reward = [
            0.1 * row + (gain * (1 - row / 10) if row < last else -0.3) * (step / steps[-1] if steps[-1] else 0)
            for row in range(len(prompts))
        ]
        scores = {
            "reward": reward,
            "rewards/bright": reward,
            "judges/true": [0.5 * value for value in reward],
            "other": [1.0] * len(prompts),
        }
        if shown:
            videos = torch.stack([clip(0 if step == 0 else 1)] * shown)
            write_samples(
                files,
                f"samples/step_{step:06d}/{name}",
                videos,
                prompts[:shown],
                {key: values[:shown] for key, values in scores.items()},
                fps=8,
            )
        sets[step] = {name: {"prompts": prompts, "scores": scores}}
        files.claim(evaluation_file(step))
        write_json(folder / evaluation_file(step), {"step": step, "sets": sets[step]})
    if len(steps) > 1:
        write_report(files, (steps[0], steps[-1]), sets[steps[0]], sets[steps[-1]], {})
    files.claim("run.json")
    log = [
        {
            "step": step,
            "reward": step / 10,
            "kl": 0.01 * step,
            "grad_norm": 0.5,
            "loss": float("nan"),
            "seconds/rollout": 2.0,
            "seconds/rewards": 1.0,
            "seconds/rewards/bright": 1.0,
            "seconds/idle": 0.5,
            "reward_correlation/a/b": 0.5,
        }
        for step in range(1, 5)
    ]
    write_json(
        folder / "run.json",
        {
            "trainer": "Video GRPO",
            "model": "tiny",
            "fps": 8,
            "given": ["learning_rate"],
            "settings": {"learning_rate": 1e-3, "seed": 0, "output_dir": folder.name},
            "state": {"global_step": 4, "max_steps": 4, "log_history": log},
        },
    )
    return folder
