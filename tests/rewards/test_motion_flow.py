"""The guard against frozen videos, on clips whose motion is known."""

import sys

import pytest
import torch
import torch.nn.functional as F

from pisces_rl.cli import load_reward_function
from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.scorers.motion_flow import MotionFlow
from pisces_rl.shapemotion import load_prompts, parse, render

pytest.importorskip("cv2")


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(3, H, W): smooth noise in [0, 1], of blobs of about 8 pixels."""
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def moving(shift: int, frames: int = 5, height: int = 128, width: int = 192) -> torch.Tensor:
    """(F, 3, H, W): a window on a texture that moves by `shift` pixels a frame."""
    world = texture(height, width + 8 * ((shift * frames + 7) // 8))
    return torch.stack([world[..., shift * i : shift * i + width] for i in range(frames)])


def noised(clip: torch.Tensor, noise: float) -> torch.Tensor:
    return (clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 16])
def test_a_moved_texture_has_its_flow(shift):
    """In pixels of a frame whose shorter side is 256: twice as many as at 128."""
    measured = MotionFlow(video_fps=8).magnitudes(moving(shift))
    assert measured.shape == (4,) and measured == pytest.approx(2 * shift, rel=0.05)


def test_larger_frames_are_scaled_down_and_give_the_same():
    small = moving(4, height=256, width=320)
    large = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    reward = MotionFlow(video_fps=8)
    assert reward.magnitudes(large) == pytest.approx(reward.magnitudes(small), rel=0.05)


def test_a_frozen_clip_has_none_and_half_of_one_half():
    reward, clip, parts = load_reward("motion_flow", video_fps=8), moving(6), {}
    frozen = clip[:1].expand_as(clip)
    halted = torch.cat([clip, clip[-1:].expand(4, -1, -1, -1)])
    assert reward(["a"], frozen[None], log_extra=parts.__setitem__) == [0.0]
    assert parts == {"motion_flow_pixels": [pytest.approx(0, abs=1e-3)]}
    assert reward(["a"], clip[None]) == [1.0] and reward(["a"], halted[None]) == [pytest.approx(0.5, abs=0.01)]


def test_it_saturates():
    clips = torch.stack([moving(shift) for shift in (1, 2, 4, 8)])
    rewards = MotionFlow(video_fps=8)(["a"] * 4, clips)
    assert rewards[:2] == pytest.approx([2 / 6, 4 / 6], rel=0.1) and rewards[2:] == [1.0, 1.0]


def test_frames_are_taken_eight_a_second_or_more_slowly_if_there_are_fewer():
    clip = moving(2, frames=9)
    assert len(MotionFlow(video_fps=16).magnitudes(clip)) == 4  # every second frame, twice the shift
    assert MotionFlow(video_fps=16).magnitudes(clip) == pytest.approx(8, rel=0.1)
    assert MotionFlow(video_fps=4)(["a"], clip[None])[0] == pytest.approx(4 / 12, rel=0.1)
    assert len(MotionFlow(video_fps=24).magnitudes(clip[:2])) == 1


def test_an_object_counts_by_a_twentieth_of_the_frame():
    """A still scene with one object that moves: the largest 5 % are the object's."""
    still, thing = texture(128, 192), texture(40, 48, seed=1)
    clip = still.repeat(5, 1, 1, 1)
    for i in range(5):
        clip[i, :, 40:80, 40 + 4 * i : 88 + 4 * i] = thing
    assert MotionFlow(video_fps=8).magnitudes(clip) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("picture", [texture(128, 192), torch.full((3, 128, 192), 0.5)], ids=["textured", "plain"])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
def test_noise_is_no_motion(picture, noise):
    """By flow alone noise on a plain picture moves at more than the threshold."""
    clip = noised(picture.expand(5, -1, -1, -1), noise)
    assert MotionFlow(video_fps=8)(["a"], clip[None])[0] < 0.01


def test_noise_does_not_hide_motion():
    assert MotionFlow(video_fps=8).magnitudes(noised(moving(4), 0.03)) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("levels", [[1, 0.9, 0.8, 0.7, 0.6], [1, 0.9, 1, 0.9, 1]], ids=["fade", "flicker"])
def test_a_still_that_fades_or_flickers_does_not_move(levels):
    clip = texture(128, 192) * torch.tensor(levels).view(-1, 1, 1, 1)
    assert MotionFlow(video_fps=8)(["a"], clip[None])[0] < 0.01


def test_shapes_that_stand_still_and_shapes_that_move():
    scenes = [parse(prompt) for prompt in load_prompts("train", n=40, seed=0)["prompt"]]
    motions = [{group.motion for group in scene.groups} for scene in scenes]
    still = [scene for scene, motion in zip(scenes, motions) if motion == {"staying still"}]
    moving = [scene for scene, motion in zip(scenes, motions) if motion <= {"moving left", "moving right"}]
    reward = MotionFlow(video_fps=8)
    assert still and max(reward(["a"] * len(still), render(still))) < 0.01
    assert moving and min(reward(["a"] * len(moving), render(moving))) > 0.3


def test_small_frames_and_batch_mates():
    clips = torch.rand(3, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    reward = MotionFlow()
    alone = [reward(["a"], clip[None])[0] for clip in clips]
    table = RewardPanel(reward)(["a"] * 3, clips, {})
    assert table.values[:, 0].tolist() == pytest.approx(alone) and "motion_flow" in table.seconds


def test_what_is_wrong_is_named(monkeypatch):
    with pytest.raises(ValueError, match="video_fps=0"):
        MotionFlow(video_fps=0)
    with pytest.raises(ValueError, match="needs at least 2 frames"):
        MotionFlow()(["a"], torch.rand(1, 1, 3, 16, 16))
    with pytest.raises(ValueError, match="video 0 has values"):
        MotionFlow()(["a"], torch.full((1, 2, 3, 16, 16), 255.0))
    with pytest.raises(ValueError, match="'motion_flow' does not use offload; it takes video_fps, threshold"):
        load_reward("motion_flow", offload="cuda")
    assert isinstance(load_reward_function("motion_flow", encoder="tiny-vtm", offload="cuda"), MotionFlow)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"flow from OpenCV; install it: pip install 'pisces_rl\[motion\]'"):
        load_reward("motion_flow")


@pytest.mark.parametrize("near", ["motion_flw", "unifed_reward", "video_score"])
def test_near_names_are_offered(near):
    with pytest.raises(ValueError, match=f"'{near}' is unknown; did you mean .*Known: .*unified_reward, video_score2"):
        load_reward(near)
