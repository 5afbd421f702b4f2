"""Groups with equal rewards: a warning names the prompt, and no step is taken on it."""

import warnings

import pytest
import tiny_runs
from tiny_runs import Weights, brightness, equal_from, largest_difference, logged, prompts, trainer, weights
from torch import nn

from pisces_rl import AuxiliaryLoss
from pisces_rl.trainers.methods import METHODS

#: Momentum and decay that would move the weights without a gradient.
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "alive": True, "num_sample_videos": 0}


def moved(folder, **settings) -> list[float]:
    """By how much each step but the first moved the weights; rewards are equal from the third on."""
    kept = Weights()
    kept.trainer = made = trainer(folder, equal_from(2), callbacks=[kept], max_steps=4, **ADAMW | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    assert logged(made, "frac_reward_zero_std") == [0.0, 0.0, 1.0, 1.0]
    return [largest_difference(a, b) for a, b in zip(kept.steps, kept.steps[1:])]


# One method that replays, one that noises, one that takes pairs; the others follow one of them.
OFTEN = [
    method if method in ("grpo", "nft", "flow_dpo") else pytest.param(method, marks=pytest.mark.slow)
    for method in METHODS
]


@pytest.mark.parametrize("method", OFTEN)
def test_without_spread_adamw_moves_nothing(tmp_path, method):
    """To the bit, despite the momentum of earlier steps."""
    first, second, third = moved(tmp_path, method=method)
    assert first > 0 and second == third == 0


def test_an_anchor_or_another_term_still_steps(tmp_path):
    """GRPO's KL, and an auxiliary loss, have a gradient without rewards."""

    class Pull(AuxiliaryLoss):
        name = "pull"

        def begin(self, policy, adapter, **given):
            self.adapter: dict[str, nn.Parameter] = adapter

        def loss(self, number, count, part=(0, 1)):
            return sum(p.square().mean() for p in self.adapter.values()).expand(count)

    assert min(moved(tmp_path / "kl", beta=0.1)) > 0
    made = trainer(tmp_path / "term", equal_from(0), max_steps=1, **ADAMW)
    made = METHODS["grpo"][0](tiny_runs.pipeline(), equal_from(0), made.args, prompts(), auxiliary_losses=[Pull(1.0)])
    tiny_runs.enliven(made)
    before = weights(made)
    made.train()
    assert largest_difference(before, weights(made)) > 0


def told_once(made, phrase: str) -> str:
    """The one warning of a training that holds a phrase."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.train()
    (message,) = (str(w.message) for w in told if phrase in str(w.message))
    return message


@pytest.mark.parametrize("method", OFTEN)
def test_the_warning_names_the_prompts_once(tmp_path, method):
    """Two of three groups; the next rollout does not repeat the warning."""

    def of_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.5 for p, v in zip(prompts, brightness(prompts, videos).tolist())]

    made = trainer(
        tmp_path, of_clip_0, method=method, per_device_train_batch_size=12, shuffle_dataset=False, num_sample_videos=0
    )
    assert told_once(made, "same reward, or none").startswith(
        "all videos of prompt 'clip 1' have the same reward, or none, so nothing is learnt from them. The same holds "
        "for 1 more of this rollout's 3 prompts."
    )


def test_a_prompt_that_no_reward_scores_is_named_once(tmp_path):
    def none_for_clip_1(prompts, videos, **columns):
        return [None if p == "clip 1" else v for p, v in zip(prompts, brightness(prompts, videos).tolist())]

    made = trainer(tmp_path, none_for_clip_1, per_device_train_batch_size=12, num_sample_videos=0)
    assert told_once(made, "no reward applies").startswith(
        "no reward applies to 4 of a rollout's 12 videos (all returned None), the first for prompt 'clip 1'"
    )
