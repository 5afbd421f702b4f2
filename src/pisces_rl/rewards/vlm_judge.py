"""A reward for real videos: ask a vision-language model for a score, through transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from pisces_rl.rewards.contract import check_inputs, check_pixels, check_prompts
from pisces_rl.rewards.offloaded_model import OffloadedModel, first_device
from pisces_rl.rewards.scorers.frame_scorer import spread

PROMPT = Path(__file__).parent / "prompts" / "video_alignment.txt"


class VLMJudge(OffloadedModel):
    """The score that a chat model gives a video and its prompt, as an expectation over the first token of its answer.

        r = (sum_k k p(k) - k_min) / (k_max - k_min),   p(k) the model's probability of the digit k among `scores`

    in [0, 1]. No text is sampled, so a video's score is always the same. The frames are shown as images in order,
    which every chat model that accepts several images understands. VideoAlign (arXiv 2501.13918) also uses one.

    Args:
        model: a chat model that `AutoModelForImageTextToText` loads and that accepts several images (Qwen2.5-VL, for
            example), or its Hub id or folder.
        processor: the model's, with a chat template; not needed for a model given by name.
        question: file with the text to ask, with {prompt} where the video's prompt goes.
        scores: the possible answers, ascending digits of one token each.
        frames: per video, evenly spaced.
        batch_size: videos per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        name: under which it is logged.
        offload: the device, such as "cuda", on which the model computes while its weights stay on the CPU between
            calls.

    Raises ValueError for pixels that are NaN or outside [0, 1], naming the video, and for a prompt with one of the
    model's special tokens (image placeholder, end of turn), naming both.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processor: Any = None,
        *,
        question: str | Path = PROMPT,
        scores: Sequence[int] = (1, 2, 3, 4, 5),
        frames: int = 8,
        batch_size: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        name: str = "vlm_judge",
        offload: str | torch.device | None = None,
    ):
        network: Any = model
        if isinstance(model, str):
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
            network = network.to(first_device(device, offload))
        if processor is None:
            raise ValueError("processor: a model object needs its processor.")
        self.model, self.processor = network.eval().requires_grad_(False), processor
        self.question = read_question(question)
        self.tokens = digit_tokens(processor.tokenizer, scores)
        self.scores, self.frames, self.batch_size = torch.tensor(scores, dtype=torch.float32), frames, batch_size
        self.__name__ = name
        if offload is not None:
            self.offload = offload

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns: object) -> list[float]:
        check_inputs(prompts, videos)
        check_pixels(videos)
        check_prompts(prompts, self.processor.tokenizer.all_special_tokens, "the judge's model")
        rows = range(0, len(prompts), self.batch_size)
        with self.working():
            parts = [self._ask(prompts[i : i + self.batch_size], videos[i : i + self.batch_size]) for i in rows]
        return torch.cat(parts).tolist()

    def _ask(self, prompts: Sequence[str], videos: Tensor) -> Tensor:
        images = [[to_image(frame) for frame in clip] for clip in spread_frames(videos, self.frames)]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*[{"type": "image"}] * len(images[0]), {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in map(self._text, prompts)
        ]
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token of each row
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device)).logits[:, -1, self.tokens].float().cpu()
        expected = expected_digit(logits, self.scores)
        return (expected - self.scores[0]) / (self.scores[-1] - self.scores[0])

    def _text(self, prompt: str) -> str:
        return self.question.replace("{prompt}", prompt)


def read_question(file: str | Path) -> str:
    """Read the text of a question. Raises ValueError if it lacks {prompt}."""
    text = Path(file).read_text(encoding="utf-8")
    if "{prompt}" not in text:
        raise ValueError(f"question: {file} does not contain {{prompt}}.")
    return text


def spread_frames(videos: Tensor, count: int) -> Tensor:
    """Return `count` evenly spaced frames (or all) of videos (B, F, 3, H, W) in [0, 1], as bytes on the CPU."""
    return (videos[:, spread(videos.shape[1], count)].clamp(0, 1) * 255).round().byte().cpu()


def digit_tokens(tokenizer: PreTrainedTokenizerBase, scores: Sequence[int]) -> list[int]:
    """Return the token ids of two or more ascending one-token numbers; raise a ValueError for anything else."""
    tokens = [tokenizer.encode(str(score), add_special_tokens=False) for score in scores]
    if (
        len(scores) < 2
        or list(scores) != sorted(set(scores))
        or any(len(token) != 1 or token[0] == tokenizer.unk_token_id for token in tokens)
    ):
        raise ValueError(f"scores={tuple(scores)}: expected two or more ascending numbers of one token each.")
    return [token[0] for token in tokens]


def expected_digit(logits: Tensor, scores: Tensor) -> Tensor:
    """Return sum_k scores_k p_k, where p is the softmax of logits (..., K) over the answers' tokens alone."""
    return logits.softmax(-1) @ scores.to(logits)


def to_image(frame: Tensor) -> Image.Image:
    """Convert a frame (3, H, W), bytes, to an image."""
    return Image.fromarray(frame.permute(1, 2, 0).numpy())
