"""Qwen2.5-VL writing an answer that contains scores, shared by UnifiedReward and VideoScore2."""

import itertools
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from pisces_rl.rewards.contract import RewardError, check_inputs, check_pixels, check_prompts
from pisces_rl.rewards.offloaded_model import OffloadedModel
from pisces_rl.rewards.scorers.published_weights import (
    check_config,
    check_names,
    published_folder,
    shapes_of,
    stored_shapes,
)
from pisces_rl.rewards.scorers.qwen2_vl_reward import flat_name, qwen_inputs
from pisces_rl.rewards.vlm_judge import digit_tokens, expected_digit

#: Entries of the published config.json that identify the sizes of Qwen2.5-VL.
SIZES = {
    "3B": {"hidden_size": 2048, "num_hidden_layers": 36},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28},
}


class GenerativeJudge(OffloadedModel, ABC):
    """A model answers the authors' question, and the scores are expectations over the digits in its answer.

        r = sum_k weights_k s_k,   s_k = sum_j 10^-j sum_d d p_kj(d)

    s_k is a number in the answer, k in `dimensions`, and j = 0, 1, ... are its digits. p_kj(d) is the model's
    probability of digit d at that place given everything it wrote before, among 1 to 5 for the first digit and 0 to 9
    for those after the point. The answer is decoded greedily, without sampling, temperature or repetition penalty, so
    a video's score is always the same. Each s_k is recorded as `<name>_<dimension>`. No gradients.

    Args:
        model: frozen by this class, which also replaces its generation settings.
        tokenizer: Qwen2.5-VL's.
        template: the authors' question, which contains `placeholder` for the prompt.
        weights: of `dimensions`.
        batch_size: videos per forward pass.
        max_new_tokens: limit for the answer.
        name: under which it is logged.
        offload: the device, such as "cuda", on which the model computes while its weights stay on the CPU between
            calls.

    Raises RewardError, naming the prompt and quoting the answer, for an answer without the scores.
    """

    dimensions: Sequence[str]
    answer: re.Pattern  # finds the scores: one group per dimension, in order
    placeholder: str
    media: str  # "image" or "video", as the chat template calls it
    tokens: tuple[int, int]  # smallest and largest number of merged patches per frame

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        weights: Sequence[float],
        batch_size: int,
        max_new_tokens: int,
        name: str,
        offload: str | torch.device | None,
    ):
        if self.placeholder not in template:
            raise ValueError(f"template: it must contain {self.placeholder}, the placeholder for the prompt.")
        if len(weights) != len(self.dimensions) or batch_size < 1 or max_new_tokens < 1:
            raise ValueError(
                f"weights={tuple(weights)}, batch_size={batch_size}, max_new_tokens={max_new_tokens}: expected "
                f"{len(self.dimensions)} weights ({', '.join(self.dimensions)}) and numbers of at least 1."
            )
        self.model, self.tokenizer, self.template = model.eval().requires_grad_(False), tokenizer, template
        self.digits = digit_tokens(tokenizer, range(10))
        ends = model.generation_config.eos_token_id  # for Qwen2.5-VL <|im_end|> and <|endoftext|>
        self.ends = [ends] if isinstance(ends, int) else list(ends or [tokenizer.eos_token_id])
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self.ends, pad_token_id=tokenizer.pad_token_id
        )
        self.weights, self.batch_size, self.__name__ = torch.tensor(weights, dtype=torch.float32), batch_size, name
        if offload is not None:
            self.offload = offload

    @abstractmethod
    def frames_of(self, videos: Tensor) -> Tensor:
        """Return the frames that the authors show, (B, n, 3, H, W)."""

    def __call__(self, prompts: Sequence[str], videos: Tensor, log_extra: Callable | None = None, **columns) -> Tensor:
        """Return (B,) rewards of videos (B, F, 3, H, W) in [0, 1], on their device.

        Raises ValueError for other shapes, pixels outside [0, 1] and a prompt with one of the model's special tokens.
        """
        check_inputs(prompts, videos)
        check_pixels(videos)
        check_prompts(prompts, self.tokenizer.all_special_tokens, self.__name__)
        clips, rows = self.frames_of(videos.detach()), range(0, len(prompts), self.batch_size)
        with self.working():
            parts = [self.scores(prompts[i : i + self.batch_size], clips[i : i + self.batch_size]) for i in rows]
        scores = torch.cat(parts)
        if log_extra is not None:
            for dimension, values in zip(self.dimensions, scores.T):
                log_extra(f"{self.__name__}_{dimension}", values.tolist())
        return (scores @ self.weights).to(videos.device)

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], clips: Tensor) -> Tensor:
        """Return (B, K) scores, on the CPU, for clips (B, n, 3, H, W) of the frames to show."""
        texts = [self.template.replace(self.placeholder, prompt) for prompt in prompts]
        inputs = qwen_inputs(
            self.tokenizer,
            texts,
            clips,
            self.model.config,
            next(self.model.parameters()),
            media=self.media,
            tokens=self.tokens,
            padding_side="left",
        )
        digits = DigitLogits(self.digits)
        answers = self.model.generate(**inputs, logits_processor=LogitsProcessorList([digits]))
        answers = answers[:, inputs["input_ids"].shape[1] :].tolist()
        logits = torch.stack(digits.steps, 1).cpu()
        return torch.stack([self.read(*row) for row in zip(prompts, answers, logits)])

    def read(self, prompt: str, answer: Sequence[int], logits: Tensor) -> Tensor:
        """Return the (K,) scores in an answer of n tokens, given the digits' logits (n, 10) at each place."""
        answer = list(itertools.takewhile(lambda token: token not in self.ends, answer))
        pieces = self.tokenizer.batch_decode([[token] for token in answer], clean_up_tokenization_spaces=False)
        places = self._digits_of(pieces)
        if places is None:
            longest = self.model.generation_config.max_new_tokens
            cut = f" after max_new_tokens={longest}" if len(answer) == longest else ""
            raise RewardError(
                f"reward {self.__name__!r}: the answer for prompt {prompt!r} does not give "
                f"{', '.join(self.dimensions)} from 1 to 5; it ends{cut} with {''.join(pieces)[-500:]!r}. Raise "
                "max_new_tokens if it was cut, and check that the template belongs to the model."
            )
        return torch.stack([expected_number(logits[number]) for number in places])

    def _digits_of(self, pieces: Sequence[str]) -> list[list[int]] | None:
        """Return, for each score, which tokens are its digits; None if the answer does not give all scores."""
        text, ends = "".join(pieces), list(itertools.accumulate(map(len, pieces)))
        if (found := self.answer.search(text)) is None:
            return None
        spans = [range(*found.span(k)) for k in range(1, self.answer.groups + 1)]
        places = [[bisect_right(ends, i) for i in span if text[i] != "."] for span in spans]
        return places if all(len(pieces[place]) == 1 for number in places for place in number) else None


def expected_number(logits: Tensor) -> Tensor:
    """Return sum_j 10^-j sum_d d p_j(d) for the digits' logits (n, 10) at n places; the first digit is 1 to 5."""
    first = expected_digit(logits[0, 1:6], torch.arange(1, 6))
    return first + expected_digit(logits[1:], torch.arange(10)) @ 0.1 ** torch.arange(1, len(logits)).to(logits)


class DigitLogits(LogitsProcessor):
    """A processor that records the digits' logits (B, 10) at each step, in fp32, and changes nothing."""

    def __init__(self, digits: Sequence[int]):
        self.digits, self.steps = list(digits), []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[:, self.digits].float())
        return scores


def load_judge(
    name: str | Path, judge: str, sizes: Sequence[str], dtype: torch.dtype, device: str | torch.device
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a Hub id or folder, after checking names and shapes of all weights.

    Args:
        name: the Hub id or folder.
        judge: its name, for messages.
        sizes: the entries of `SIZES` that the authors published.
        dtype: of the model.
        device: of the model.

    Raises ValueError if the weights are missing or belong to another model.
    """
    folder = published_folder(name, judge, ("*.json", "*.txt", "*.jinja", "*.safetensors"))
    config = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    )
    width = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
    size = next((size for size in sizes if SIZES[size]["hidden_size"] == width), sizes[0])
    nested = {f"text_config.{key}": value for key, value in SIZES[size].items()}
    check_config(folder, f"{judge} (Qwen2.5-VL-{size})", "qwen2_5_vl", SIZES[size] | nested)
    check_weights(folder, judge)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "chat_template.json").is_file():  # the processor's template, as saved by transformers before 5
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))[
            "chat_template"
        ]
    return model, tokenizer


def check_weights(folder: Path, judge: str) -> None:
    """Raise a ValueError unless a folder holds all weights of its configuration under their names: `visual.` and
    `model.` at the top level, as transformers before 5 writes them, or `model.visual.` and `model.language_model.`"""
    found, config = stored_shapes(folder, judge), Qwen2_5_VLConfig.from_pretrained(folder)
    expected = official_shapes(config, flat=any(name.startswith("visual.") for name in found))
    check_names(found, expected, folder, judge, ("lm_head.",) if config.tie_word_embeddings else ())


def official_shapes(config: Qwen2_5_VLConfig, flat: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights in a published file; no lm_head if it is tied to the embedding."""
    with torch.device("meta"):
        shapes = shapes_of(Qwen2_5_VLForConditionalGeneration(config).state_dict())
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {flat_name(name) if flat else name: shape for name, shape in shapes.items()}
