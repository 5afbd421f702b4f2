"""A reward of pure noise, as a control: any change that an optimizer makes with it is drift.

make demo ARGS="--rewards benchmarks/noise_reward.py:noise_reward --output_dir outputs/control"
"""

import hashlib

from torch import Tensor


def noise_reward(prompts: list[str], videos: Tensor, **columns) -> list[float]:
    """Return a hash of each video's pixels, uniform in [0, 1): equal videos get equal rewards."""
    quantised = (videos * 255).round().byte().cpu().numpy()
    return [int(hashlib.sha256(video.tobytes()).hexdigest()[:8], 16) / 2**32 for video in quantised]
