"""The token-level reward: P(match) of a matching model whose attention is fused with transport plans."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pisces_rl.rewards.contract import check_inputs
from pisces_rl.rewards.encoder_reward import EncoderReward
from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder
from pisces_rl.rewards.encoders.load_encoder import shared_encoder
from pisces_rl.rewards.encodings import MICRO_BATCH, shared_encodings, text_features, video_features
from pisces_rl.rewards.ot_attention import BoundOTAttention, Drawing, OTAttention


class OTSemanticReward(EncoderReward):
    """P(match) of a video-text matching model whose cross-attention is fused with transport plans.

        R_s = softmax(VTM(A~ x))[match]

    Args:
        matcher: an encoder with a matching head, or its name, folder or Hub id.
        attention: an `OTAttention`, how to fuse; None: no fusion, the plain matching probability. Only the matcher's
            `fused_layers` are changed: plans in the last layer cannot reach the match.
        solver: of the plans, overriding the attention's; None: keep it.
        micro_batch: videos matched at once.
        name: under which it is logged.

    A call takes prompts and videos (B, F, 3, H, W) in [0, 1] and returns (B,) in [0, 1], differentiable. A prompt
    without words is matched without a plan. Source: arXiv 2602.01624, section 4.2.
    """

    def __init__(
        self,
        matcher: VideoTextEncoder | str | Path,
        attention: OTAttention | None = None,
        *,
        solver: str | None = None,
        micro_batch: int = MICRO_BATCH,
        name: str = "ot_semantic",
    ):
        if solver is not None:
            if attention is None:
                raise ValueError("solver: it has no effect without an attention.")
            attention = replace(attention, solver=solver)
        matcher = shared_encoder(matcher)
        if not matcher.matches:
            raise ValueError(f"matcher: {matcher.name} has no matching head.")
        unknown = set() if attention is None or attention.layers is None else set(attention.layers)
        unknown -= set(matcher.cross_layers)
        if unknown:
            raise ValueError(
                f"attention: layers {sorted(unknown)} of {matcher.name} do not attend to the video; these do: "
                f"{list(matcher.cross_layers)}."
            )
        asked = matcher.cross_layers if attention is None or attention.layers is None else attention.layers
        if attention is not None and not set(asked) & set(matcher.fused_layers):
            raise ValueError(
                f"attention: plans in layers {list(asked)} cannot reach the match of {matcher.name}, whose head reads "
                f"the class token; plans in these can: {list(matcher.fused_layers)}."
            )
        most = matcher.cross_heads
        if attention is not None and (beyond := [head for head in attention.heads or () if head >= most]):
            raise ValueError(
                f"attention: heads {beyond} of {matcher.name} do not exist; it has {most} heads, 0 to {most - 1}."
            )
        self.encoder, self.attention, self.micro_batch = matcher, attention, micro_batch
        self.__name__ = name

    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns: object) -> Tensor:
        return self.logits(prompts, videos).softmax(1)[:, 1].to(videos.device)

    def logits(self, prompts: Sequence[str], videos: Tensor) -> Tensor:
        """Return (B, 2) logits for "differs" and "matches"."""
        check_inputs(prompts, videos)
        with shared_encodings():
            text = text_features(self.encoder, prompts)
            video = video_features(self.encoder, videos, self.micro_batch)
            parts = []
            for start in range(0, len(prompts), self.micro_batch):
                rows = slice(start, start + self.micro_batch)
                part = text[rows]
                parts.append(self.encoder.match(part, video[rows], self._fusion(self.attention, part, video)))
            return torch.cat(parts)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], videos: Tensor) -> tuple[list[list[str]], Tensor, list[Drawing]]:
        """Return each prompt's tokens as text, the video tokens' positions (M, 3), and a `Drawing` per fused layer."""
        check_inputs(prompts, videos)
        if self.attention is None:
            raise ValueError("attention: without it there are no plans to draw.")
        drawings: list[Drawing] = []
        attention = replace(self.attention, drawings=drawings)
        with shared_encodings():
            text, video = text_features(self.encoder, prompts), video_features(self.encoder, videos)
            self.encoder.match(text, video, self._fusion(attention, text, video))
        return text.pieces, video.positions.cpu(), drawings

    def _fusion(
        self, attention: OTAttention | None, text: TextFeatures, video: VideoFeatures
    ) -> BoundOTAttention | None:
        if attention is None:
            return None
        return attention.bind(text.words, video.positions, self.encoder.fused_layers)
