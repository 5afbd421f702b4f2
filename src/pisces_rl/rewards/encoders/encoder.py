"""The protocol of video-text encoders, with their shared frame sampling, resizing and tokenising."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pisces_rl.rewards.attention import Fusion
from pisces_rl.rewards.contract import check_pixels


@dataclass
class TextFeatures:
    """pooled (B, D); tokens (B, N, d); mask (B, N) bool, False for padding; words (B, N) bool, True if the token is
    part of the prompt (neither padding nor special); pieces: the tokens as text, B lists of N."""

    pooled: Tensor
    tokens: Tensor
    mask: Tensor
    words: Tensor
    pieces: list[list[str]]

    def __getitem__(self, rows: slice) -> "TextFeatures":
        return TextFeatures(self.pooled[rows], self.tokens[rows], self.mask[rows], self.words[rows], self.pieces[rows])


@dataclass
class VideoFeatures:
    """pooled (B, D); tokens (B, M, d); positions (M, 3): frame, row and column of each token, in units of tokens; NaN
    for a token without a position (a class token)."""

    pooled: Tensor
    tokens: Tensor
    positions: Tensor

    def __getitem__(self, rows: slice) -> "VideoFeatures":
        return VideoFeatures(self.pooled[rows], self.tokens[rows], self.positions)


class VideoTextEncoder(nn.Module, ABC):
    """A frozen model of videos and texts.

    Attributes:
        name: what maps and caches are bound to, "base@hash options"; two encoders of equal name have equal weights
            and, if they were loaded from a transformers folder, equal sizes, tokenizers and pixel statistics too.
        resolution: (height, width) of the frames it sees.
        num_frames: number of frames it sees.
        mean: of its pixels.
        std: of its pixels.
        crop: crop the centre to the model's aspect ratio (as published for CLIP-like models) instead of stretching.
        dimension: of pooled features.
        max_text_tokens: special tokens included.
        cross_layers: numbers of the text layers that attend to the video, for models that match; else empty.
        cross_heads: number of heads in these layers.
        offload: the device it computes on while its weights stay on the CPU between uses; None: it stays where it is.
            Setting it here moves nothing before the next use; setting a reward's `offload` does.
    """

    name: str
    resolution: tuple[int, int]
    num_frames: int
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    crop: bool = False
    dimension: int
    max_text_tokens: int
    cross_layers: Sequence[int] = ()
    cross_heads: int = 0
    offload: str | torch.device | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def precision(self) -> torch.dtype:
        """dtype of pixels and pooled features: fp32, or fp64 for a model in fp64."""
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32

    def unit(self, x: Tensor) -> Tensor:
        """Scale to length 1, in `precision`."""
        return F.normalize(x.to(self.precision), dim=-1)

    @property
    def matches(self) -> bool:
        return len(self.cross_layers) > 0

    @property
    def fused_layers(self) -> Sequence[int]:
        """The part of `cross_layers` where a word's attention can still reach the match. The head reads the class
        token, which reads words only in later layers, so the last layer is excluded."""
        return self.cross_layers[:-1]

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode texts. An empty prompt has no words, only the features of the special tokens. A prompt longer than
        the text tower's limit is cut, with a warning."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> VideoFeatures:
        """Encode videos (B, F, 3, H, W) in [0, 1], of any size and number of frames; differentiable."""

    def match(self, text: TextFeatures, video: VideoFeatures, fusion: Fusion | None = None) -> Tensor:
        """Return (B, 2) logits for "differs" and "matches". `fusion`: see `pisces_rl.rewards.attention`."""
        raise ValueError(f"{self.name} has no matching head; the semantic reward needs an encoder that has one.")

    def sample(self, videos: Tensor) -> Tensor:
        """Return `num_frames` evenly spaced frames of (B, F, ...), with first and last; repeat some if F is less."""
        frames = torch.linspace(0, videos.shape[1] - 1, self.num_frames, device=videos.device).round().long()
        return videos[:, frames]

    def padded(self, videos: Tensor) -> Tensor:
        """Add the frames that the model needs before tokenising to sampled frames (B, num_frames, ...); here none."""
        return videos

    def prepare(self, videos: Tensor) -> Tensor:
        """Return frames (B, num_frames, 3, *resolution), normalised, on the model's device and in its `precision`.

        Frames are those of `sample`. Resizing is bicubic with antialiasing. Pixels up to 0.1 outside [0, 1] are
        clamped.

        Raises ValueError for other shapes, and for pixels further outside or NaN, naming the video.
        """
        if not isinstance(videos, Tensor) or videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape:
            found = tuple(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
            raise ValueError(f"videos: expected a tensor (B, F, 3, H, W), got {found}.")
        videos = videos.to(self.device, self.precision)
        check_pixels(videos)
        count, size = len(videos), self.resolution
        videos = self.sample(videos).clamp(0, 1).flatten(0, 1)
        if self.crop:
            videos = _center_crop(videos, size[0] / size[1])
        if videos.shape[-2:] != size:
            videos = F.interpolate(videos, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (videos.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return ((videos - mean) / std).unflatten(0, (count, self.num_frames))


def digest(*files: Path) -> str:
    """Return 12 digits of the SHA-256 of concatenated files; takes about 1.4 s per GB on one core."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                found.update(chunk)
    return found.hexdigest()[:12]


def _center_crop(frames: Tensor, aspect: float) -> Tensor:
    """Crop the centre of frames (n, 3, H, W) to an aspect ratio H / W."""
    height, width = frames.shape[-2:]
    rows, columns = min(height, round(width * aspect)), min(width, round(height / aspect))
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[..., top : top + rows, left : left + columns]


def grid(frames: int, rows: int, columns: int, class_tokens: int = 0) -> Tensor:
    """Return positions (class_tokens + frames rows columns, 3): first tokens without a position, then row-major."""
    axes = [torch.arange(n, dtype=torch.float32) for n in (frames, rows, columns)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    return torch.cat([torch.full((class_tokens, 3), torch.nan), places])


def tokenize(tokenizer, prompts: Sequence[str], max_length: int, device, fixed: bool = False) -> tuple:
    """Return token ids (B, N), attention mask (B, N) bool, words (B, N) bool, and the tokens as text.

    Pads to the longest prompt, or with `fixed` to `max_length`.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts: expected a list of strings, got {prompts!r}.")
    whole = tokenizer(list(prompts), add_special_tokens=True, verbose=False)["input_ids"]
    long = [i for i, ids in enumerate(whole) if len(ids) > max_length]
    if long:
        warnings.warn(
            f"{len(long)} of {len(prompts)} prompts are longer than the {max_length} tokens of the text tower and are "
            f"cut: {prompts[long[0]]!r} has {len(whole[long[0]])}.",
            stacklevel=3,
        )
    batch = tokenizer(
        list(prompts),
        padding="max_length" if fixed else True,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        return_attention_mask=True,
        return_special_tokens_mask=True,
    )
    mask = batch["attention_mask"].bool()
    words = mask & ~batch["special_tokens_mask"].bool()
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"].tolist()]
    return batch["input_ids"].to(device), mask.to(device), words.to(device), pieces


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask (B, 1, 1, N): 0 where the mask is True, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
        :, None, None
    ]
