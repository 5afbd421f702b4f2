"""What a video-text model gives to the rewards, and what all of them share: frames, sizes, tokens."""

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
    """pooled (B, D); tokens (B, N, d); mask (B, N) bool, False is padding; words (B, N) bool, True where the token is
    part of the prompt, not padding and not special; pieces: the tokens as text, B lists of N."""

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
    for a token without a place (a class token)."""

    pooled: Tensor
    tokens: Tensor
    positions: Tensor

    def __getitem__(self, rows: slice) -> "VideoFeatures":
        return VideoFeatures(self.pooled[rows], self.tokens[rows], self.positions)


class VideoTextEncoder(nn.Module, ABC):
    """A frozen model of videos and texts.

    Attributes:
        name: what maps and caches are bound to, "base@hash options"; two encoders of equal name have equal weights
            and, if they were loaded from a folder of transformers, equal sizes, tokenizers and pixels, too.
        resolution: (height, width) of the frames it sees.
        num_frames: how many of them.
        mean: of its pixels.
        std: of its pixels.
        crop: cut the middle to the model's aspect ratio (as published for CLIP's kin) instead of stretching.
        dimension: of pooled features.
        max_text_tokens: special tokens included.
        cross_layers: numbers of the text layers that attend to the video, for models that match; else empty.
        cross_heads: how many heads these layers have.
        offload: the device it works on while its weights lie on the CPU between uses; None: it stays where it is. Set
            here it moves nothing before the next use; a reward's `offload` does.
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
        """Of pixels and pooled features: fp32, or fp64 for a model in fp64."""
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32

    def unit(self, x: Tensor) -> Tensor:
        """To length 1, in `precision`."""
        return F.normalize(x.to(self.precision), dim=-1)

    @property
    def matches(self) -> bool:
        return len(self.cross_layers) > 0

    @property
    def fused_layers(self) -> Sequence[int]:
        """Those of `cross_layers` where what a word attends to can still reach the match. The head reads the class
        token, which reads words in the layers that follow: none does after the last."""
        return self.cross_layers[:-1]

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """An empty prompt has no words, and the features of the special tokens alone. A prompt longer than the text
        tower is cut, with a warning."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> VideoFeatures:
        """Videos (B, F, 3, H, W) in [0, 1], of any size and number of frames; differentiable."""

    def match(self, text: TextFeatures, video: VideoFeatures, fusion: Fusion | None = None) -> Tensor:
        """(B, 2) logits of "differs" and "matches". `fusion`: see `pisces_rl.rewards.attention`."""
        raise ValueError(f"{self.name} has no matching head; the semantic reward needs an encoder that has one.")

    def sample(self, videos: Tensor) -> Tensor:
        """`num_frames` of the frames (B, F, ...), taken evenly, first and last included; of fewer, some repeatedly."""
        frames = torch.linspace(0, videos.shape[1] - 1, self.num_frames, device=videos.device).round().long()
        return videos[:, frames]

    def padded(self, videos: Tensor) -> Tensor:
        """Sampled frames (B, num_frames, ...), and those that are added before tokens are cut: none."""
        return videos

    def prepare(self, videos: Tensor) -> Tensor:
        """(B, num_frames, 3, *resolution), normalised, on the model's device and in its `precision`.

        Frames are those of `sample`. Resizing is bicubic with antialiasing. Pixels up to 0.1 beyond [0, 1] are
        clamped.

        Raises ValueError for other shapes, for values further out and for those that are NaN, naming the video.
        """
        if not isinstance(videos, Tensor) or videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape:
            found = tuple(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
            raise ValueError(f"videos: expected a tensor (B, F, 3, H, W), got {found}.")
        videos = videos.to(self.device, self.precision)
        check_pixels(videos)
        count, size = len(videos), self.resolution
        videos = self.sample(videos).clamp(0, 1).flatten(0, 1)
        if self.crop:
            videos = _cut(videos, size[0] / size[1])
        if videos.shape[-2:] != size:
            videos = F.interpolate(videos, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (videos.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return ((videos - mean) / std).unflatten(0, (count, self.num_frames))


def digest(*files: Path) -> str:
    """12 digits of the SHA-256 of files, one after the other; about 1.4 s a GB on a core."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                found.update(chunk)
    return found.hexdigest()[:12]


def _cut(frames: Tensor, aspect: float) -> Tensor:
    """The middle of frames (n, 3, H, W) that has an aspect H / W."""
    height, width = frames.shape[-2:]
    rows, columns = min(height, round(width * aspect)), min(width, round(height / aspect))
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[..., top : top + rows, left : left + columns]


def grid(frames: int, rows: int, columns: int, class_tokens: int = 0) -> Tensor:
    """(class_tokens + frames rows columns, 3) positions, frame by frame and row by row, after tokens without place."""
    axes = [torch.arange(n, dtype=torch.float32) for n in (frames, rows, columns)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    return torch.cat([torch.full((class_tokens, 3), torch.nan), places])


def tokenize(tokenizer, prompts: Sequence[str], max_length: int, device, fixed: bool = False) -> tuple:
    """Token numbers (B, N), attention mask (B, N) bool, words (B, N) bool, and the pieces as text.

    Padding is to the longest prompt, or with `fixed` to `max_length`.
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
    """(B, 1, 1, N): 0 where the mask is True, the smallest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
        :, None, None
    ]
