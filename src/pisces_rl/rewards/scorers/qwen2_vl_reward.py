"""Qwen2-VL with a reward head on special tokens, shared by VideoAlign and HPSv3: sizes, patches, names of weights."""

import ast
import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from pisces_rl.rewards.contract import check_inputs, check_pixels
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.offloaded_model import OffloadedModel
from pisces_rl.rewards.scorers.frame_scorer import at_least_float, scale

UNUSED = ("lm_head.",)
PROMPT = "{text_prompt}"  # where the authors' templates take the prompt


class Qwen2VLReward(nn.Module):
    """Qwen2-VL without its word head, and a head that reads the hidden states of special tokens.

    Args: config: Qwen2-VL's. head: from (..., width) to (..., outputs), in fp32.
    """

    def __init__(self, config: Qwen2VLConfig, head: nn.Module):
        super().__init__()
        self.model, self.rm_head = Qwen2VLModel(config), head

    def forward(self, read: Tensor, **inputs: Tensor) -> Tensor:
        """(B, n, outputs): of the n tokens of each row that `read` (B, L) marks, in order."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state[read].unflatten(0, (len(read), -1))
        return self.rm_head(at_least_float(hidden))


class QwenScorer(OffloadedModel, ABC):
    """What scorers on a `Qwen2VLReward` share: how a clip and a prompt are laid out. Differentiable.

    Each clip of `clips` is scaled to sides divisible by 28 pixels (a merged patch), with `tokens[0]` to `tokens[1]` of
    them a frame, bicubic with antialiasing, and normalised as by CLIP. Then it follows the chat template: the clip
    and the authors' template with the prompt in it. Padding is on the right.

    Args:
        model: frozen by this class. tokenizer: Qwen2-VL's, to which `special` are added.
        template: holds `{text_prompt}` and each special token once, in order. batch_size: clips at once.
        offload: the device, such as "cuda", on which the model works while its weights lie on the CPU between calls.
            A call that leaves a graph leaves them on the device.
    """

    differentiable = True
    special: Sequence[str]
    tokens: tuple[int, int]
    media: str  # "image" or "video", as the chat template names it

    def __init__(
        self, model: Qwen2VLReward, tokenizer: PreTrainedTokenizerBase, template: str, *, batch_size: int, name: str,
        offload: str | torch.device | None,
    ):  # fmt: skip
        places = [template.find(word) for word in (*self.special, PROMPT)]
        if -1 in places or places[:-1] != sorted(places[:-1]) or any(template.count(w) > 1 for w in self.special):
            raise ValueError(f"template: it must hold {PROMPT} and, once each, in order, {', '.join(self.special)}.")
        tokenizer.add_tokens(list(self.special), special_tokens=True)
        rows = model.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(f"tokenizer: it has {len(tokenizer)} tokens, the model {rows}; pass the model's own.")
        self.model, self.tokenizer, self.template = model.eval().requires_grad_(False), tokenizer, template
        self.marks = torch.tensor(tokenizer.convert_tokens_to_ids(list(self.special)))
        self.batch_size, self.__name__ = batch_size, name
        if offload is not None:
            self.offload = offload

    def check(self, prompts: Sequence[str], videos: Tensor) -> None:
        """A ValueError for shapes and pixels as of every reward, and for a prompt with one of the model's tokens."""
        check_inputs(prompts, videos)
        check_pixels(videos)
        known = self.tokenizer.all_special_tokens + list(self.special)
        for prompt in prompts:
            if held := [token for token in known if token in prompt]:
                raise ValueError(f"prompts: {prompt!r} holds {held[0]!r}, a token of {self.__name__}; leave it out.")

    def outputs(self, prompts: Sequence[str], clips: Tensor) -> Tensor:
        """(B, specials, outputs) of the head, for clips (B, F, 3, H, W) of an even number of frames, or of one."""
        graph = torch.is_grad_enabled() and clips.requires_grad
        rows = range(0, len(prompts), self.batch_size)
        try:
            if self.offload is not None:
                self.model.to(self.offload)
            with torch.set_grad_enabled(graph):
                parts = [self._ask(prompts[i : i + self.batch_size], clips[i : i + self.batch_size]) for i in rows]
        finally:
            if self.offload is not None and not graph:
                self.model.to("cpu")
        return torch.cat(parts).to(clips.device)

    def _ask(self, prompts: Sequence[str], clips: Tensor) -> Tensor:
        config, parameter = self.model.model.config, next(self.model.parameters())
        vision = config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        size = qwen_size(*clips.shape[-2:], *(n * factor**2 for n in self.tokens), factor=factor)
        clips = at_least_float(clips.to(parameter.device, torch.promote_types(clips.dtype, parameter.dtype)))
        patches, grid = qwen_patches(clips, size, vision, passes=self.media == "image")
        places = math.prod(grid) // vision.spatial_merge_size**2
        ids, mask = self._tokens(prompts, places)
        ids, mask = ids.to(parameter.device), mask.to(parameter.device)
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        pixels = "pixel_values" if self.media == "image" else "pixel_values_videos"
        inputs = {
            "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds,
            pixels: patches.flatten(0, 1).to(parameter.dtype),
            f"{self.media}_grid_thw": torch.tensor([grid] * len(prompts), device=parameter.device),
        }  # fmt: skip
        return self.model(torch.isin(ids, self.marks.to(ids.device)), **inputs)

    def _tokens(self, prompts: Sequence[str], places: int) -> tuple[Tensor, Tensor]:
        """Token numbers (B, L) and mask (B, L); the clip has `places` tokens."""
        pad = f"<|{self.media}_pad|>"
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": [{"type": self.media}, {"type": "text", "text": text}]}],
                add_generation_prompt=True, tokenize=False,
            ).replace(pad, pad * places)
            for text in (self.template.replace(PROMPT, prompt) for prompt in prompts)
        ]  # fmt: skip
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]


def qwen_size(height: int, width: int, lowest: int, highest: int, factor: int = 28) -> tuple[int, int]:
    """A frame's size, sides divisible by `factor` and the aspect kept as far as that allows: each side rounded to the
    nearest multiple; if the frame then has more than `highest` pixels, scaled down to them, sides rounded down; if
    fewer than `lowest`, scaled up, sides rounded up. Source: qwen-vl-utils, as VideoAlign and HPSv3 use it."""
    rounded = [max(factor, round(side / factor) * factor) for side in (height, width)]
    pixels = math.prod(rounded)
    if lowest <= pixels <= highest:
        return rounded[0], rounded[1]
    bound, whole = (highest, math.floor) if pixels > highest else (lowest, math.ceil)
    scale = math.sqrt(bound / (height * width))
    sides = [max(factor, whole(side * scale / factor) * factor) for side in (height, width)]
    return sides[0], sides[1]


def qwen_patches(
    clips: Tensor, size: tuple[int, int], vision, *, passes: bool = True
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches (B, t h w, numbers) as Qwen2-VL reads them, and their grid (t, h, w).

    Of clips (B, F, 3, H, W) in [0, 1], scaled as by PIL or, without `passes`, by torchvision. A patch is
    `temporal_patch_size` frames of `patch_size` pixels, channel first; patches that are merged later lie together. A
    single frame, and the last one of an odd number, is repeated.
    """
    clips, patch, merge = clips.clamp(0, 1), vision.patch_size, vision.spatial_merge_size
    clips = scale(clips.flatten(0, 1), size, passes=passes).unflatten(0, clips.shape[:2])
    mean, std = (clips.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    clips = (clips - mean) / std
    if missing := -clips.shape[1] % vision.temporal_patch_size:
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    grid = (clips.shape[1] // vision.temporal_patch_size, size[0] // patch, size[1] // patch)
    x = clips.unflatten(1, (grid[0], -1)).unflatten(-1, (-1, merge, patch)).unflatten(-4, (-1, merge, patch))
    x = x.permute(
        0, 1, 4, 7, 5, 8, 3, 2, 6, 9
    )  # B t h w, rows and columns within a merged patch, channel, frame, pixel
    return x.flatten(6).flatten(1, 5), grid


def load_weights(
    state: Mapping[str, Tensor], names: Mapping[str, str], config: Qwen2VLConfig, head: Callable[[], nn.Module],
    dtype: torch.dtype,
) -> Qwen2VLReward:  # fmt: skip
    """A model with the weights `state[names[name]]` for each of its names; the head in fp32, the rest in `dtype`."""
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLReward(config, head())
    own = {name: state[names[name]] for name in model.state_dict()}
    kinds = {name: torch.float32 if name.startswith("rm_head.") else dtype for name in own}
    model.load_state_dict({name: tensor.to(kinds[name]) for name, tensor in own.items()}, assign=True)
    return model


def empty_shapes(config: Qwen2VLConfig, head: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, without memory for them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Qwen2VLReward(config, head()).state_dict().items()}


def flat_name(name: str) -> str:
    """The published name of a weight, in the layout of transformers before 4.52: `visual.` and `model.` on the top."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def read_constants(path: str | Path, names: Sequence[str], fetch: str) -> list[str]:
    """Strings that a Python file of the authors assigns to names, read without running it.

    Raises ValueError with the command `fetch` where there is no such file, or naming what it does not assign.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"template: there is no {path}; the authors' file is fetched with `{fetch}`.")
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    if missing := [name for name in names if not isinstance(found.get(name), str)]:
        raise ValueError(f"template: {path} does not assign {', '.join(missing)}; fetch it with `{fetch}`.")
    return [found[name] for name in names]
