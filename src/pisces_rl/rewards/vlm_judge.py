"""A vision-language model that is asked for a score: a reward for real videos, through transformers."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from pisces_rl.rewards.contract import check_inputs, check_pixels, check_prompts
from pisces_rl.rewards.offloaded_model import OffloadedModel, first_device
from pisces_rl.rewards.scorers.frame_scorer import spread

PROMPT = resources.files("pisces_rl.rewards") / "prompts" / "video_alignment.txt"


class VLMJudge(OffloadedModel):
    """The score that a chat model gives a video and its prompt, as an expectation over its answer's first token.

        r = (sum_k k p(k) - k_min) / (k_max - k_min),   p(k) the model's probability of the digit k among `scores`

    in [0, 1]; no text is sampled, so a video's score is always the same. The video is shown as images, its frames in
    order, which every chat model with several images understands. VideoAlign (arXiv 2501.13918) asks such a model.

    Args:
        model: a chat model that `AutoModelForImageTextToText` loads and that takes several images (Qwen2.5-VL, say),
            or its Hub id or folder.
        processor: the model's, with a chat template; unset for a name.
        question: file whose text is asked, with {prompt} where the video's prompt belongs.
        scores: the answers, digits of one token each, ascending.
        frames: per video, evenly spread.
        batch_size: videos asked at once.
        dtype: of a model given by name.
        device: of a model given by name.
        name: under which it is logged.
        offload: the device, such as "cuda", on which the model works while its weights lie on the CPU between calls.

    Raises ValueError for pixels outside [0, 1] or NaN, naming the video, and for a prompt that holds one of the
    model's special tokens (an image's place, an end of turn), naming both.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processor=None,
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
        if isinstance(model, str):
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
            model = model.to(first_device(device, offload))
        if processor is None:
            raise ValueError("processor: a model object needs its processor.")
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.question = read_question(question)
        self.tokens = digit_tokens(processor.tokenizer, scores)
        self.scores, self.frames, self.batch_size = torch.tensor(scores, dtype=torch.float32), frames, batch_size
        self.__name__ = name
        if offload is not None:
            self.offload = offload

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns) -> list[float]:
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
    """The text of a question. Raises ValueError where it does not say {prompt}."""
    text = (file if hasattr(file, "read_text") else Path(file)).read_text(encoding="utf-8")
    if "{prompt}" not in text:
        raise ValueError(f"question: {file} does not say {{prompt}}.")
    return text


def spread_frames(videos: Tensor, count: int) -> Tensor:
    """(B, F, 3, H, W) in [0, 1] -> `count` frames of each or all of them, evenly spread, as bytes on the CPU."""
    return (videos[:, spread(videos.shape[1], count)].clamp(0, 1) * 255).round().byte().cpu()


def digit_tokens(tokenizer: PreTrainedTokenizerBase, scores: Sequence[int]) -> list[int]:
    """The tokens of answers, two or more ascending numbers of one token each; else a ValueError."""
    tokens = [tokenizer.encode(str(score), add_special_tokens=False) for score in scores]
    if (
        len(scores) < 2
        or list(scores) != sorted(set(scores))
        or any(len(token) != 1 or token[0] == tokenizer.unk_token_id for token in tokens)
    ):
        raise ValueError(f"scores={tuple(scores)}: expected two or more ascending numbers of one token each.")
    return [token[0] for token in tokens]


def expected_digit(logits: Tensor, scores: Tensor) -> Tensor:
    """sum_k scores_k p_k, p the softmax of logits (..., K) over the answers' tokens alone."""
    return logits.softmax(-1) @ scores.to(logits)


def to_image(frame: Tensor) -> Image.Image:
    """(3, H, W) bytes."""
    return Image.fromarray(frame.permute(1, 2, 0).numpy())
