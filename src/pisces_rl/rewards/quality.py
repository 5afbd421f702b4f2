"""The distributional reward: is the video close to real videos for its text?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pisces_rl.ot import BankDivergence
from pisces_rl.ot.maps import TransportMap
from pisces_rl.rewards.contract import check_inputs
from pisces_rl.rewards.encoder_reward import EncoderReward
from pisces_rl.rewards.encoders.encoder import VideoTextEncoder
from pisces_rl.rewards.encoders.load_encoder import shared_encoder
from pisces_rl.rewards.encodings import MICRO_BATCH, shared_encodings, text_features, video_features


class OTQualityReward(EncoderReward):
    """How close a video's embedding x is to those of real videos.

        R_q = cosine_weight cos(T(y), x) - divergence_weight F(x)

    y is the text's embedding and T a map from text embeddings to those of real videos. F(x) is the video's share of
    the debiased Sinkhorn divergence between all videos of the call and a bank of real ones
    (`BankDivergence.per_sample`); it asks whether the videos as a set look real, and ignores the prompts.

    Args:
        encoder: its pooled features are compared; an encoder, or its name, folder or Hub id.
        ot_map: T, bound to this encoder; None: the identity, the raw cosine.
        bank: (M, D), pooled features of real videos, or a `BankDivergence` of them; required by `divergence_weight`.
        cosine_weight: of the cosine term; 0 disables it.
        divergence_weight: of the divergence term; 0 disables it.
        blur: of the bank's divergence; None: `pisces_rl.ot.metrics.default_blur` of the bank.
        solver: of the bank's divergence, "native" or "geomloss"; None: `BankDivergence`'s default.
        micro_batch: videos encoded at once.
        name: under which it is logged.

    A call takes prompts and videos (B, F, 3, H, W) in [0, 1] and returns (B,), differentiable: the gradient of the
    divergence term's sum is that of B times the divergence. Source: arXiv 2602.01624, section 4.1.
    """

    def __init__(
        self,
        encoder: VideoTextEncoder | str | Path,
        ot_map: TransportMap | None = None,
        *,
        bank: Tensor | BankDivergence | None = None,
        cosine_weight: float = 1.0,
        divergence_weight: float = 0.0,
        blur: float | None = None,
        solver: str | None = None,
        micro_batch: int = MICRO_BATCH,
        name: str = "ot_quality",
    ):
        encoder = shared_encoder(encoder)
        if ot_map is not None and ot_map.encoder != encoder.name:
            raise ValueError(
                f"ot_map: it is bound to the encoder {ot_map.encoder!r}, not to {encoder.name!r}; fit one for it."
            )
        if not (cosine_weight or divergence_weight):
            raise ValueError("cosine_weight, divergence_weight: at least one must differ from 0.")
        if divergence_weight and bank is None:
            raise ValueError("bank: a divergence_weight needs the features of real videos.")
        for setting, value in (("bank", bank), ("blur", blur), ("solver", solver)):
            if value is not None and not divergence_weight:
                raise ValueError(f"{setting}: it has no effect without a divergence_weight.")
            if setting != "bank" and value is not None and isinstance(bank, BankDivergence):
                raise ValueError(f"{setting}: the bank, a BankDivergence, already sets it.")
        self.encoder, self.ot_map, self.micro_batch = encoder, ot_map, micro_batch
        self.cosine_weight, self.divergence_weight = cosine_weight, divergence_weight
        self.compares_videos = bool(divergence_weight)
        self.bank: Any = bank  # a BankDivergence, if it is used
        if bank is not None and not isinstance(bank, BankDivergence):
            from pisces_rl.ot.metrics import default_blur

            blur = default_blur(bank) if blur is None else blur
            chosen: dict[str, Any] = {} if solver is None else {"solver": solver}
            self.bank = BankDivergence(bank.to(encoder.offload or encoder.device), blur=blur, **chosen)
        self.__name__ = name

    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns: object) -> Tensor:
        check_inputs(prompts, videos)
        with shared_encodings():
            x = video_features(self.encoder, videos, self.micro_batch).pooled
            reward = torch.zeros_like(x[:, 0])
            if self.cosine_weight:
                y = text_features(self.encoder, prompts).pooled
                target = y if self.ot_map is None else self.ot_map(y)
                reward = reward + self.cosine_weight * F.cosine_similarity(target, x, dim=-1)
            if self.divergence_weight:
                reward = reward - self.divergence_weight * self._credit(x).to(x.device)
        return reward.to(videos.device)

    def _credit(self, x: Tensor) -> Tensor:
        """Return each video's share of the divergence, (B,), on the bank's device; its gradient is that of B times the
        divergence."""
        x = x.to(self.bank.bank.device)
        credit = self.bank.per_sample(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return credit
        features = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(len(x) * self.bank(features), features)
        return credit + (slope * (x - x.detach())).sum(1)
