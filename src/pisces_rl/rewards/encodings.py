"""Each video encoded once per encoder, however many rewards look at it; and which weights stay for a backward pass."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # they need transformers, which takes seconds, and a panel may have no encoder
    from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder

MICRO_BATCH = 16

_scope: contextvars.ContextVar[_Encodings | None] = contextvars.ContextVar("encodings", default=None)


class _Encodings:
    """What has been encoded in one call of a panel. Inputs are kept, so that their identity stays theirs."""

    def __init__(self):
        self.known: dict[tuple, tuple] = {}
        self.encoders: dict[int, VideoTextEncoder] = {}
        self.left: list[nn.Module] = []

    def backward_done(self) -> None:
        """Weights that wait for a reward's backward pass and for no other's go to the CPU."""
        while self.left:
            self.left.pop().to("cpu")


@contextlib.contextmanager
def shared_encodings(backward: bool = False) -> Iterator[_Encodings]:
    """Inside, features are computed once for each encoder and input. Afterwards, encoders and models with `offload` go
    back to the CPU, unless a graph is left that needs their weights: until a call without one they stay where they
    work. Inside another such block it does nothing.

    Args:
        backward: the block has a backward pass of its own, and leaves no graph.
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
    """A model's weights stay where they work for a graph that is left; they go to the CPU after the backward pass of a
    `shared_encodings` block that has one."""
    if (scope := _scope.get()) is not None:
        scope.left.append(model)


def text_features(encoder: VideoTextEncoder, prompts: Sequence[str]) -> TextFeatures:
    """Of all prompts, each distinct one encoded once."""
    key = (id(encoder), tuple(prompts), torch.is_grad_enabled())
    return _once(encoder, key, prompts, lambda: _distinct(encoder, list(prompts)))


def video_features(encoder: VideoTextEncoder, videos: Tensor, micro_batch: int = MICRO_BATCH) -> VideoFeatures:
    """Of all videos, `micro_batch` at a time."""

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
