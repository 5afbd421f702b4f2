"""The quality reward at its edges: what it is given, where its bank lies."""

import pytest
import torch
from tiny_encoders import build

from pisces_rl.rewards import OTQualityReward

PROMPTS = ["a red circle", "a green square"]
VIDEOS = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("prompts", "videos", "error", "message"),
    [
        ("a red circle", VIDEOS, TypeError, "prompts: expected a list of strings, one per video, got 'a red circle'"),
        ("ab", VIDEOS, TypeError, "got 'ab'"),  # as many letters as videos
        (None, VIDEOS, TypeError, "prompts: expected a list of strings, one per video, got None"),
        (["a", 3], VIDEOS, TypeError, "got 3 as prompt 1"),
        (PROMPTS, VIDEOS.numpy(), TypeError, "videos: expected a tensor .* got ndarray; convert .* torch.from_numpy"),
        (PROMPTS, list(VIDEOS), TypeError, "got list; .* torch.stack"),
        (PROMPTS[:1], VIDEOS, ValueError, "prompts: expected one per video, got 1 prompts for 2 videos"),
        (PROMPTS, VIDEOS[:1], ValueError, "got 2 prompts for 1 videos"),
        (PROMPTS, VIDEOS[0], ValueError, r"videos: expected a tensor \(B, F, 3, H, W\)"),
        (PROMPTS, VIDEOS.movedim(2, -1), ValueError, r"got \(2, 5, 16, 16, 3\)"),
        ([], VIDEOS[:0], ValueError, "no axis empty"),
    ],
)
def test_what_is_not_prompts_and_videos_is_refused(prompts, videos, error, message):
    with pytest.raises(error, match=message):
        OTQualityReward(build("tiny_vtm"))(prompts, videos)


def test_prompts_may_be_any_sequence_of_strings():
    reward = OTQualityReward(build("tiny_vtm"))
    assert torch.equal(reward(tuple(PROMPTS), VIDEOS), reward(PROMPTS, VIDEOS))
