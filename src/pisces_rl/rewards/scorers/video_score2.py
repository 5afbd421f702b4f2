"""VideoScore2: visual quality, text alignment and physical consistency of a video, written by Qwen2.5-VL-7B."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.frame_scorer import spread
from pisces_rl.rewards.scorers.generative_judge import GenerativeJudge, load_judge
from pisces_rl.rewards.scorers.qwen2_vl_reward import frames_seen, read_constants

MODEL = "TIGER-Lab/VideoScore2"
TEMPLATE = "~/.cache/pisces_rl/vs2_inference.py"
FETCH = (
    f"curl --create-dirs -o {TEMPLATE} https://raw.githubusercontent.com/TIGER-AI-Lab/VideoScore2/"
    "e6abe26bf694c293023cb3863bd6c657128766ac/vs2_inference.py"
)


class VideoScore2(GenerativeJudge):
    """The weighted sum of three scores from 1 to 5, each an expectation over the digit that follows its name in the
    answer: see `GenerativeJudge` for the formula.

    The authors sample the answer at temperature .7 and return the most probable digit times its probability among the
    five. Here the answer is greedy and the score is the expectation, which their evaluation also uses. The model
    explains its scores before giving them, so answers are long.

    Frames: two per second, at least four and an even number, evenly spaced with first and last, scaled to 128 to 768
    merged patches of 28 x 28 pixels. As in the authors' call, the model is told that two frames are a second apart,
    whatever `video_fps` is. Their limit on total pixels for videos of several minutes is not applied. Source: arXiv
    2509.22799 and vs2_inference.py of github.com/TIGER-AI-Lab/VideoScore2; sizes from qwen-vl-utils, normalisation
    from CLIP.

    Args:
        model: the Hub id or folder of VideoScore2, or a Qwen2_5_VLForConditionalGeneration.
        tokenizer: for a model object; not needed for a name.
        template: the authors' vs2_inference.py, which is parsed and never run; or the text itself.
        video_fps: frames per second of the scored videos.
        weights: of the three scores.
        batch_size: videos per forward pass.
        max_new_tokens: limit for the answer, the authors' 1024.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `GenerativeJudge`.
        name: see `GenerativeJudge`.

    Raises ValueError if weights or template are missing, if the weights belong to another model, for a video of one
    frame, and for a prompt with one of the model's special tokens; RewardError for an answer without the three scores.
    """

    dimensions = ("visual_quality", "text_alignment", "physical_consistency")
    answer = re.compile(
        r"visual quality:\s*([1-5])(?![0-9]).*?text-to-video alignment:\s*([1-5])(?![0-9]).*?"
        r"physical/common-sense consistency:\s*([1-5])(?![0-9])",
        re.DOTALL | re.IGNORECASE,
    )
    placeholder, media, tokens = "$t2v_prompt", "video", (128, 768)

    def __init__(
        self,
        model: str | Path | Qwen2_5_VLForConditionalGeneration = MODEL,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str | Path = TEMPLATE,
        *,
        video_fps: float = 16.0,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        batch_size: int = 2,
        max_new_tokens: int = 1024,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        name: str = "video_score2",
        offload: str | torch.device | None = None,
    ):
        if video_fps <= 0:
            raise ValueError(f"video_fps={video_fps}: expected frames per second, a number > 0.")
        if self.placeholder not in str(template):
            (template,) = read_constants(template, ["VS2_QUERY_TEMPLATE"], FETCH)
        if not isinstance(model, Qwen2_5_VLForConditionalGeneration):
            device = first_device(device, offload)
            model, tokenizer = load_judge(model, "VideoScore2", ("7B",), dtype, device)
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
        self.video_fps = video_fps

    def frames_of(self, videos: Tensor) -> Tensor:
        count = videos.shape[1]
        return videos[:, spread(count, frames_seen(count, self.video_fps, math.floor))]
