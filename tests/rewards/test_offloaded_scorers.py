"""Scorers whose weights wait on the CPU: where they are when a graph is left, and when it has been used."""

import pytest
import test_video_align
import tiny_encoders
import torch
from test_pickscore import tiny_clip

from pisces_rl.rewards import RewardError, RewardPanel, load_reward
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.scorers.pickscore import PickScore


def pickscore(name="pickscore") -> PickScore:
    return PickScore(tiny_clip(), tiny_encoders.tokenizer(), frames=2, name=name)


@pytest.mark.parametrize("make", [pickscore, test_video_align.reward])
def test_weights_of_scorers_wait_on_the_cpu_after_a_panels_backward(make, monkeypatch):
    """Those of the first are back before the second works, and nothing is left when the next batch is sampled."""
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
