"""Scorers whose weights wait on the CPU: where they are while a graph exists, and after it has been used."""

import sys
import weakref
from pathlib import Path

import pytest
import test_video_align
import tiny_encoders
import torch
from test_pickscore import tiny_clip

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
import test_backprop_trainer as backprop
import tiny_runs

from pisces_rl.rewards import RewardError, RewardPanel, load_reward
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.scorers.pickscore import PickScore


def pickscore(name="pickscore") -> PickScore:
    return PickScore(tiny_clip(), tiny_encoders.tokenizer(), frames=2, name=name)


@pytest.mark.parametrize("make", [pickscore, test_video_align.reward])
def test_weights_of_scorers_wait_on_the_cpu_after_a_panels_backward(make, monkeypatch):
    """The first scorer's are back before the second works, and none are left when the next batch is sampled."""
    places = []
    first, second = make(name="a"), make(name="b")
    for i, scorer in enumerate((first, second)):
        monkeypatch.setattr(scorer.model, "to", lambda place, i=i: places.append((i, str(place))))
    panel = RewardPanel([first, second])
    videos = torch.rand(2, 4, 3, 32, 48)
    _, expected = panel.with_gradients(["a red circle"] * 2, videos, {})
    assert not places, "without offload nothing moves"
    panel.offload("cuda")
    _, gradients = panel.with_gradients(["a red circle"] * 2, videos, {})
    assert places == [(0, "cpu"), (1, "cpu"), (0, "cuda"), (0, "cpu"), (1, "cuda"), (1, "cpu")]
    assert all(map(torch.equal, gradients, expected))
    places.clear()
    with torch.no_grad():
        first(["a red circle"] * 2, videos.requires_grad_())
    assert places == [(0, "cuda"), (0, "cpu")]


def test_weights_of_scorers_go_back_when_a_panels_backward_fails(monkeypatch):
    scorer, places = pickscore(), []
    monkeypatch.setattr(scorer.model, "to", places.append)
    scorer.offload = "cuda"
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        RewardPanel(scorer).with_gradients(["a"], torch.rand(1, 4, 3, 32, 32), {})
    assert places == ["cpu", "cuda", "cpu"]


@pytest.mark.parametrize("part", ["model", "encoder"])
def test_offload_of_none_moves_nothing_or_undoes_it(part, monkeypatch):
    reward = pickscore() if part == "model" else load_reward("cosine", encoder=load_encoder("tiny-vtm"))
    model, places = getattr(reward, part), []
    monkeypatch.setattr(model, "to", lambda place, *args: places.append(str(place)) or model)
    reward.offload = None
    assert places == [], "it stays where it is"
    reward.offload = "cuda"
    reward.offload = None
    assert places == ["cpu", "cuda"] and reward.offload is None, "back to where it worked"


def test_a_reward_does_not_keep_anothers_graph():
    """Which would hold the weights on the device that have gone to the CPU."""
    kept = []

    def first(prompts, videos):
        weight = torch.rand(videos.shape[1:])
        kept.append(weakref.ref(weight))
        return (videos * weight).mean(dim=(1, 2, 3, 4))

    def second(prompts, videos):
        assert kept[0]() is None
        return first(prompts, videos)

    first.differentiable = second.differentiable = True
    RewardPanel([first, second]).with_gradients(["a"], torch.rand(1, 2, 3, 4, 4), {})
    assert len(kept) == 2


def test_a_run_samples_without_the_scorers_weights_and_leaves_the_same_adapter(tmp_path, monkeypatch):
    scorer, moves, sampled = pickscore(), [], []
    made = backprop.trainer(tmp_path / "a", scorer)
    made.train()
    made.save_model()
    monkeypatch.setattr(scorer.model, "to", moves.append)
    offloaded = backprop.trainer(tmp_path / "b", scorer, offload=["rewards"])
    sample = offloaded.policy.sample_with_gradients
    offloaded.policy.sample_with_gradients = lambda *args, **k: sampled.append(len(moves)) or sample(*args, **k)
    offloaded.train()
    offloaded.save_model()
    assert sampled == [1, 3] and len(moves) == 5, "away at once, then there and away for each step"
    found, expected = tiny_runs.weights(offloaded), tiny_runs.weights(made)
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)
