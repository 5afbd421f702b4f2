"""UnifiedReward 2.0: alignment, physics and style of a video, written by Qwen2.5-VL."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.generative_judge import GenerativeJudge, load_judge
from pisces_rl.rewards.scorers.qwen2_vl_reward import read_constants

MODEL = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
TEMPLATE = "~/.cache/pisces_rl/point_score_APS_video_generation.py"
FETCH = (
    f"curl --create-dirs -o {TEMPLATE} https://raw.githubusercontent.com/CodeGoat24/UnifiedReward/"
    "0b03be974afd497f53b256b62bdc2e562e799217/inference_qwen/UnifiedReward-2.0-inference/point_score_APS_video_generation.py"
)
SCORE = r" Score \(1-5\):\s*([1-5](?:\.[0-9]+)?)(?![0-9])"


class UnifiedReward(GenerativeJudge):
    """The weighted sum of three scores that the model writes as decimal numbers from 1 to 5, here as expectations over
    each digit: see `GenerativeJudge` for the formula.

    The authors use the number written in the most probable answer.

    Frames: floor(i F / n), i = 0 ... n - 1, each shown as an image at its own size, sides rounded to multiples of 28
    pixels, within 4 to 16,384 merged patches; the authors send them as JPEG of quality 95. Source: arXiv 2503.05236
    and inference_qwen/UnifiedReward-2.0-inference of github.com/CodeGoat24/UnifiedReward (an earlier version of it
    reads 16 frames); sizes and normalisation from Qwen2.5-VL's processor.

    Args:
        model: the Hub id or folder of UnifiedReward-2.0-qwen-7b or -3b, or a Qwen2_5_VLForConditionalGeneration.
        tokenizer: for a model object; not needed for a name.
        template: the authors' point_score_APS_video_generation.py, which is parsed and never run; or the text itself.
        frames: n, frames shown per video.
        weights: of alignment, physics and style.
        batch_size: videos per forward pass.
        max_new_tokens: limit for the answer, which has three lines.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `GenerativeJudge`.
        name: see `GenerativeJudge`.

    Raises ValueError if weights or template are missing, if the weights belong to another model, and for a prompt with
    one of the model's special tokens; RewardError for an answer without the three scores.
    """

    dimensions = ("alignment", "physics", "style")
    answer = re.compile(".*?".join(f"{name}{SCORE}" for name in dimensions), re.DOTALL | re.IGNORECASE)
    placeholder, media, tokens = "{prompt}", "image", (4, 16384)

    def __init__(
        self,
        model: str | Path | Qwen2_5_VLForConditionalGeneration = MODEL,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str | Path = TEMPLATE,
        *,
        frames: int = 8,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        batch_size: int = 2,
        max_new_tokens: int = 256,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        name: str = "unified_reward",
        offload: str | torch.device | None = None,
    ):
        if frames < 1:
            raise ValueError(f"frames={frames}: expected at least 1.")
        if self.placeholder not in str(template):
            (template,) = read_constants(template, ["problem"], FETCH)
        if not isinstance(model, Qwen2_5_VLForConditionalGeneration):
            device = first_device(device, offload)
            model, tokenizer = load_judge(model, "UnifiedReward 2.0", ("7B", "3B"), dtype, device)
        super().__init__(
            model,
            tokenizer,
            str(template),
            weights=weights,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            name=name,
            offload=offload,
        )
        self.frames = frames

    def frames_of(self, videos: Tensor) -> Tensor:
        return videos[:, torch.unique(torch.arange(self.frames) * videos.shape[1] // self.frames)]
