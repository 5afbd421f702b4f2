"""Consistency distillation on captioned videos: the policy learns to solve its ODE in one step from any point."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...policy import Rollout, VideoPolicy
from ...transitions import Paper
from ..base.data.images import images_of
from ..base.data.seeds import sample_seed
from ..base.data.video_data import check_prompt, check_videos, undecoded, video_of
from ..base.watch.callbacks import AdapterEMA
from .auxiliary_loss import AuxiliaryLoss

ROWS, NOISE, STEP = range(20, 23)  # purposes of seeds


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Return mean(sqrt((x - y)^2 + c^2) - c) over all but the batch dimension (Song & Dhariwal, arXiv 2310.14189)."""
    return ((x - y).square() + c**2).sqrt().sub(c).flatten(1).mean(1)


class ConsistencyDistillation(AuxiliaryLoss):
    r"""Latent consistency distillation (LCM, arXiv 2310.04378) as an auxiliary loss, for any pipeline.

    From a clip's latents x0 and a step n of a schedule of N steps,

        x_n     = x0 with noise at the level of step n
        x_{n+1} = one step of the reference policy's ODE from x_n, optionally with guidance
        L       = huber( x0^(x_n),  x0^_average(x_{n+1}) ),         huber(d) = sqrt(d^2 + c^2) - c

    x0^ is the model's prediction with the adapter, x0^_average with the adapter's moving average. At the last step,
    the target is x_{n+1} itself. At the first, x_n is the pipeline's start noise.

    Args:
        video_dataset: captioned videos, rows with `prompt`, the image columns, and `video`: a path, the bytes of a
            file, a `datasets.Video`, or a tensor (F, 3, H, W) in [0, 1] or uint8.
        weight: weight of the term.
        steps: N, steps of the schedule.
        guidance: guidance_scale of the ODE step, which is distilled too; None: that of the pipeline call.
        decay: decay of the moving average per optimizer step.
        batch_size: clips of a micro-batch on each process; None: per_device_train_batch_size.
        huber_c: c, where the loss turns from quadratic to linear.

    Raises:
        ValueError: a setting is out of range, or the dataset has no length or lacks a column.
    """

    name = "consistency"
    uses_reference = True
    papers = (
        Paper("2310.04378", "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference"),
    )

    def __init__(
        self,
        video_dataset: Dataset | Sequence[dict],
        weight: float = 1.0,
        *,
        steps: int = 16,
        guidance: float | None = None,
        decay: float = 0.95,
        batch_size: int | None = None,
        huber_c: float = 1e-3,
    ):
        super().__init__(weight, batch_size)
        if steps < 2 or not 0 < decay < 1:
            raise ValueError(
                f"ConsistencyDistillation: steps={steps} must be at least 2, and decay={decay} must lie between 0 "
                "and 1."
            )
        check_videos(video_dataset)
        self.dataset, self.steps, self.decay, self.huber_c = undecoded(video_dataset), steps, decay, huber_c
        self.guidance: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}

    def begin(
        self,
        policy: VideoPolicy,
        adapter: dict[str, nn.Parameter],
        *,
        seed: int,
        image_columns: Sequence[str],
        reference: Callable[[], AbstractContextManager],
    ) -> None:
        self.policy, self.seed, self.image_columns, self.reference = policy, seed, image_columns, reference
        self.average = AdapterEMA(adapter, self.decay)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.average.update()

    def state_dict(self) -> dict:
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state)

    def restart(self) -> None:
        self.average.restart()

    def card_settings(self) -> dict[str, str]:
        return {"consistency distillation": f"weight {self.weight}"}

    def loss(self, number: int, count: int, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Return the losses of this process's part of a micro-batch, (count,), with gradients.

        Rows, noise and step are drawn for the whole batch, so every division into parts gives the same losses.
        """
        which, parts = part
        own = range(which * count, (which + 1) * count)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, ROWS, number))
        rows = torch.randint(len(self.dataset), (count * parts,), generator=generator).tolist()
        seeds = [sample_seed(self.seed, NOISE, number, i) for i in own]
        prompts, images, clean = self._clips([rows[i] for i in own])
        clips, every = Rollout(prompts, seeds, None, [], conditions=images, clean=clean), range(count)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, STEP, number))
        step = int(torch.randint(self.steps, (1,), generator=generator))
        drawn: dict[str, Any] = {"noise_seeds": seeds, "num_inference_steps": self.steps}

        with self.reference():
            teacher = self.policy.predict(clips, every, step=step, **drawn, **self.guidance)
        target = teacher.following
        if step + 1 < self.steps:
            with self.average:
                target = self.policy.predict(clips, every, step=step + 1, state=teacher.following, **drawn).clean
        predicted = self.policy.predict(clips, every, step=step, state=teacher.state, grad=True, **drawn).clean
        return pseudo_huber(predicted.unflatten(0, (count, -1)), target.unflatten(0, (count, -1)), self.huber_c)

    def _clips(self, rows: list[int]) -> tuple[list[str], dict[str, list], Tensor]:
        """Return the prompts, condition images and latents of these rows."""
        samples = [self.dataset[row] for row in rows]
        prompts = [sample["prompt"] for sample in samples]
        for row, prompt in zip(rows, prompts):
            check_prompt(row, prompt)
        columns = {name: [s[name] for s in samples] for name in self.image_columns if name in samples[0]}
        images = images_of(columns | {"prompt": prompts}, self.image_columns)
        codec = self.policy.latent_codec({name: own[:1] for name, own in images.items()})
        videos = [codec.fitted(video_of(row, sample, codec.video[0])) for row, sample in zip(rows, samples)]
        return prompts, images, codec.encode(self.policy.pipeline, torch.stack(videos))
