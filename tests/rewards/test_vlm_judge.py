"""The vision-language judge with a tiny random LLaVA."""

import pytest
import torch
from tiny_llava import tiny_llava

from pisces_rl.rewards import RewardPanel
from pisces_rl.rewards.vlm_judge import PROMPT, VLMJudge


@pytest.fixture(scope="module")
def judge():
    return VLMJudge(*tiny_llava(PROMPT.read_text().split()), batch_size=2, frames=4)


@pytest.fixture
def videos():
    return torch.rand(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


PROMPTS = ["a red circle", "a blue square", "a red red red circle square"]


def test_scores_do_not_depend_on_the_batch(judge, videos):
    together = judge(PROMPTS, videos)
    alone = [judge([prompt], video[None])[0] for prompt, video in zip(PROMPTS, videos)]
    assert together == pytest.approx(alone, abs=1e-4) and all(0 < score < 1 for score in together)
    assert len(set(together)) == 3


def test_scores_know_video_and_prompt(judge, videos):
    same_video = judge(PROMPTS[:2], videos[:1].expand(2, -1, -1, -1, -1))
    same_prompt = judge(PROMPTS[:1] * 2, videos[:2])
    assert same_video[0] != same_video[1] and same_prompt[0] != same_prompt[1]


def test_it_is_a_reward(judge, videos):
    table = RewardPanel(judge)([*PROMPTS[:2], ""], videos, {})
    assert table.values.shape == (3, 1) and table.values.isfinite().all() and "vlm_judge" in table.seconds


@pytest.mark.parametrize(
    ("prompts", "change", "error", "message"),
    [
        ("abc", lambda x: x, TypeError, "prompts: expected a list of strings"),
        (PROMPTS[:2], lambda x: x, ValueError, "2 prompts for 3 videos"),
        ([], lambda x: x[:0], ValueError, "with no empty axis"),
        (PROMPTS, lambda x: x * 255, ValueError, "video 0 has values from"),
        (PROMPTS, lambda x: x.index_fill(0, torch.tensor(1), torch.nan), ValueError, "video 1 has values from nan"),
        (["a", "a <image> b", "a"], lambda x: x, ValueError, "'a <image> b' contains '<image>', a special token of"),
    ],
)
def test_bad_inputs_are_named(judge, videos, prompts, change, error, message):
    with pytest.raises(error, match=message):
        judge(prompts, change(videos))


def test_it_waits_on_the_cpu_between_calls(judge, videos, monkeypatch):
    places = []
    monkeypatch.setattr(judge.model, "to", lambda place: places.append(place) or judge.model)
    judge(PROMPTS, videos)
    assert places == []
    offloaded = VLMJudge(judge.model, judge.processor, batch_size=2, frames=4, offload="cuda")
    assert offloaded(PROMPTS, videos) == judge(PROMPTS, videos) and places == ["cpu", "cuda", "cpu"]
    with pytest.raises(ValueError, match="nan"):
        offloaded(PROMPTS, videos * torch.nan)
    assert places == ["cpu", "cuda", "cpu"]


def test_bad_settings(judge, tmp_path):
    for scores in ((1,), (2, 1), (1, 10)):
        with pytest.raises(ValueError, match="scores="):
            VLMJudge(judge.model, judge.processor, scores=scores)
    with pytest.raises(ValueError, match="processor: a model object"):
        VLMJudge(judge.model)
    (tmp_path / "question.txt").write_text("How good?")
    with pytest.raises(ValueError, match="question: .* does not contain"):
        VLMJudge(judge.model, judge.processor, question=tmp_path / "question.txt")
