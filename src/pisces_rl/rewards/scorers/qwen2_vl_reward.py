"""Qwen2-VL with a reward head on special tokens, shared by VideoAlign and HPSv3. Its frame sizes, patches, chats and
templates are also used by the generative judges."""

import ast
import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from pisces_rl.rewards.contract import check_inputs, check_pixels, check_prompts
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.offloaded_model import OffloadedModel
from pisces_rl.rewards.scorers.frame_scorer import at_least_float, scale

UNUSED = ("lm_head.",)
PROMPT = "{text_prompt}"  # placeholder for the prompt in the authors' templates


class Qwen2VLReward(nn.Module):
    """Qwen2-VL without its language-model head, plus a head that reads the hidden states of special tokens.

    Args:
        config: Qwen2-VL's.
        head: from (..., width) to (..., outputs), in fp32.
    """

    def __init__(self, config: Qwen2VLConfig, head: nn.Module):
        super().__init__()
        self.model, self.rm_head = Qwen2VLModel(config), head

    def forward(self, read: Tensor, **inputs: Tensor) -> Tensor:
        """Return (B, n, outputs) for the n tokens of each row that `read` (B, L) marks, in order."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state[read].unflatten(0, (len(read), -1))
        return self.rm_head(at_least_float(hidden))


class QwenScorer(OffloadedModel, ABC):
    """Base of scorers on a `Qwen2VLReward`: how a clip and a prompt are laid out. Differentiable.

    Each clip is scaled to sides divisible by 28 pixels (a merged patch), with `tokens[0]` to `tokens[1]` merged
    patches per frame, bicubic with antialiasing, and normalised as for CLIP. The chat template then gets the clip and
    the authors' template with the prompt in it. Padding is on the right.

    Args:
        model: frozen by this class.
        tokenizer: Qwen2-VL's, to which `special` are added.
        template: contains `{text_prompt}` and each special token once, in order.
        batch_size: clips per forward pass.
        name: under which it is logged.
        offload: the device, such as "cuda", on which the model computes while its weights stay on the CPU between
            calls. A call that leaves a graph leaves them on the device; in a panel, until its backward pass.
    """

    differentiable = True
    special: Sequence[str]
    tokens: tuple[int, int]
    media: str  # "image" or "video", as the chat template calls it

    def __init__(
        self,
        model: Qwen2VLReward,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        batch_size: int,
        name: str,
        offload: str | torch.device | None,
    ):
        places = [template.find(word) for word in (*self.special, PROMPT)]
        if -1 in places or places[:-1] != sorted(places[:-1]) or any(template.count(w) > 1 for w in self.special):
            raise ValueError(f"template: it must contain {PROMPT} and once each, in order, {', '.join(self.special)}.")
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
        """Raise a ValueError for wrong shapes or pixels, and for a prompt with one of the model's special tokens."""
        check_inputs(prompts, videos)
        check_pixels(videos)
        check_prompts(prompts, self.tokenizer.all_special_tokens + list(self.special), self.__name__)

    def outputs(self, prompts: Sequence[str], clips: Tensor) -> Tensor:
        """Return the head's (B, specials, outputs) for clips (B, F, 3, H, W) with an even number of frames, or one."""
        graph = torch.is_grad_enabled() and clips.requires_grad
        rows = range(0, len(prompts), self.batch_size)
        with self.working(graph), torch.set_grad_enabled(graph):
            parts = [self._ask(prompts[i : i + self.batch_size], clips[i : i + self.batch_size]) for i in rows]
        return torch.cat(parts).to(clips.device)

    def _ask(self, prompts: Sequence[str], clips: Tensor) -> Tensor:
        texts = [self.template.replace(PROMPT, prompt) for prompt in prompts]
        parameter = next(self.model.parameters())
        inputs = qwen_inputs(
            self.tokenizer, texts, clips, self.model.model.config, parameter, media=self.media, tokens=self.tokens
        )
        return self.model(torch.isin(inputs["input_ids"], self.marks.to(parameter.device)), **inputs)


def qwen_inputs(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    clips: Tensor,
    config: PreTrainedConfig,
    parameter: Tensor,
    *,
    media: str,
    tokens: tuple[int, int],
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """Build the inputs of Qwen2-VL and Qwen2.5-VL: for each row the chat template with its clip, then its text.

    Args:
        tokenizer: with a chat template.
        texts: B of them.
        clips: (B, F, 3, H, W) in [0, 1].
        config: the model's.
        parameter: one of the model's, for device and dtype.
        media: "video", or "image" for F separate images in a row.
        tokens: smallest and largest number of merged patches per frame.
        padding_side: "right" or "left".
    """
    vision, rows = config.vision_config, len(clips)
    factor = vision.patch_size * vision.spatial_merge_size
    size = qwen_size(*clips.shape[-2:], *(n * factor**2 for n in tokens), factor=factor)
    clips = at_least_float(clips.to(parameter.device, torch.promote_types(clips.dtype, parameter.dtype)))
    if media == "image":
        clips = clips.flatten(0, 1)[:, None]
    patches, grid = qwen_patches(clips, size, vision, passes=media == "image")
    content, pad = [{"type": media}] * (len(clips) // rows), f"<|{media}_pad|>"
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        ).replace(pad, pad * (math.prod(grid) // vision.spatial_merge_size**2))
        for text in texts
    ]
    batch = tokenizer(chats, padding=True, padding_side=padding_side, return_tensors="pt").to(parameter.device)
    ids = batch["input_ids"]
    pixels = "pixel_values" if media == "image" else "pixel_values_videos"
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
        pixels: patches.flatten(0, 1).to(parameter.dtype),
        f"{media}_grid_thw": torch.tensor([grid] * len(clips), device=parameter.device),
    }


def frames_seen(
    frames: int,
    video_fps: float,
    whole: Callable[[float], int] = round,
    *,
    fps: float = 2.0,
    least: int = 4,
    most: int = 768,
) -> int:
    """Return how many frames `smart_nframes` of qwen-vl-utils samples: `fps` per second within bounds, made even by
    `whole`: `round` in VideoAlign's copy, `math.floor` in later releases."""
    if frames < 2:
        raise ValueError(f"videos: the model needs at least 2 frames, got {frames}.")
    return whole(min(max(frames / video_fps * fps, least), min(most, frames) // 2 * 2) / 2) * 2


def qwen_size(height: int, width: int, lowest: int, highest: int, factor: int = 28) -> tuple[int, int]:
    """Return a frame's size with sides divisible by `factor`, keeping the aspect ratio as far as possible.

    Each side is rounded to the nearest multiple. A frame with more than `highest` pixels is scaled down to them, with
    sides rounded down; one with fewer than `lowest` is scaled up, with sides rounded up. Source: qwen-vl-utils, as
    VideoAlign and HPSv3 use it.
    """
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
    """Return patches (B, t h w, numbers) as Qwen2-VL reads them, and their grid (t, h, w).

    Clips (B, F, 3, H, W) in [0, 1] are scaled as in PIL or, without `passes`, as in torchvision. A patch is
    `temporal_patch_size` frames of `patch_size` pixels, channel first; patches that are merged later are adjacent. A
    single frame, and the last of an odd number, is repeated.
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
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    config: Qwen2VLConfig,
    head: Callable[[], nn.Module],
    dtype: torch.dtype,
) -> Qwen2VLReward:
    """Build a model with weights `state[names[name]]` for each of its names; the head in fp32, the rest in `dtype`."""
    with init_empty_weights(include_buffers=False):
        model = Qwen2VLReward(config, head())
    own = {name: state[names[name]] for name in model.state_dict()}
    kinds = {name: torch.float32 if name.startswith("rm_head.") else dtype for name in own}
    model.load_state_dict({name: tensor.to(kinds[name]) for name, tensor in own.items()}, assign=True)
    return model


def empty_shapes(config: Qwen2VLConfig, head: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's weights without allocating them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Qwen2VLReward(config, head()).state_dict().items()}


def flat_name(name: str) -> str:
    """Return a weight's name in the layout of transformers before 4.52: `visual.` and `model.` at the top level."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def read_constants(path: str | Path, names: Sequence[str], fetch: str) -> list[str]:
    """Return the strings that a Python file of the authors assigns to names, without running the file.

    Raises ValueError with the command `fetch` if there is no such file, or naming what it does not assign.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"template: there is no {path}; fetch the authors' file with `{fetch}`.")
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Assign) and (text := _constant(node.value)) is not None:
            found |= {target.id: text for target in node.targets if isinstance(target, ast.Name)}
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"template: {path} does not assign {', '.join(missing)}; fetch it with `{fetch}`.")
    return [found[name] for name in names]


def _constant(node: ast.expr) -> str | None:
    """Return the text of a string, of an f-string with its insertions left in braces, or of `Template(string)`."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Template":
        return _constant(node.args[0])
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = (p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in node.values)
    return "".join(parts)
