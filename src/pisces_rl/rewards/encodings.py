"""Encode each video once per encoder for all rewards, and keep weights in place for a pending backward pass."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # these imports need transformers, which takes seconds, and a panel may have no encoder
    from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder

MICRO_BATCH = 16

_scope: contextvars.ContextVar[_Encodings | None] = contextvars.ContextVar("encodings", default=None)


class _Encodings:
    """What has been encoded in one call of a panel. Inputs are kept so that their ids are not reused."""

    def __init__(self):
        self.known: dict[tuple, tuple] = {}
        self.encoders: dict[int, VideoTextEncoder] = {}
        self.left: list[nn.Module] = []

    def backward_done(self) -> None:
        """Move to the CPU the weights that waited for a reward's backward pass."""
        while self.left:
            self.left.pop().to("cpu")


@contextlib.contextmanager
def shared_encodings(backward: bool = False) -> Iterator[_Encodings]:
    """Within the block, compute features once per encoder and input.

    Afterwards encoders with `offload` return to the CPU, unless a graph that needs their weights is left: then they
    stay on their device until a call without one. A nested block does nothing.

    Args:
        backward: the block runs its own backward pass, and leaves no graph.
    """
    if _scope.get() is not None:
        yield _scope.get()
        return
    scope = _Encodings()
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)
        graph = any(features.pooled.requires_grad for features, _ in scope.known.values())
        for encoder in scope.encoders.values():
            if encoder.offload is not None and (backward or not graph):
                encoder.to("cpu")
        if backward:
            scope.backward_done()


def leave_for_backward(model: nn.Module) -> None:
    """Keep a model's weights on its device for a graph that is left; they move to the CPU after the backward pass of
    the enclosing `shared_encodings` block, if it has one."""
    if (scope := _scope.get()) is not None:
        scope.left.append(model)


def text_features(encoder: VideoTextEncoder, prompts: Sequence[str]) -> TextFeatures:
    """Return the features of all prompts; each distinct prompt is encoded once."""
    key = (id(encoder), tuple(prompts), torch.is_grad_enabled())
    return _once(encoder, key, prompts, lambda: _distinct(encoder, list(prompts)))


def video_features(encoder: VideoTextEncoder, videos: Tensor, micro_batch: int = MICRO_BATCH) -> VideoFeatures:
    """Return the features of all videos, encoded `micro_batch` at a time."""

    def encode() -> VideoFeatures:
        parts = [encoder.encode_video(part) for part in videos.split(micro_batch)]
        pooled, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("pooled", "tokens"))
        return type(parts[0])(pooled, tokens, parts[0].positions)

    version = None if videos.is_inference() else videos._version
    key = (id(encoder), id(videos), version, torch.is_grad_enabled())
    return _once(encoder, key, videos, encode)


def _once(encoder: VideoTextEncoder, key: tuple, owner, encode):
    scope = _scope.get()
    if scope is None:
        return encode()
    if encoder.offload is not None:
        encoder.to(encoder.offload)
    scope.encoders[id(encoder)] = encoder
    if key not in scope.known:
        scope.known[key] = (encode(), owner)
    return scope.known[key][0]


def _distinct(encoder: VideoTextEncoder, prompts: list[str]) -> TextFeatures:
    distinct = list(dict.fromkeys(prompts))
    features = encoder.encode_text(distinct)
    if len(distinct) == len(prompts):
        return features
    rows = [distinct.index(prompt) for prompt in prompts]
    parts = (features.pooled[rows], features.tokens[rows], features.mask[rows], features.words[rows])
    return type(features)(*parts, [features.pieces[row] for row in rows])
