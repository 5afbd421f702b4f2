"""A resumed run of each method equals the uninterrupted one to the bit; and the files that it leaves."""

import pytest
import tiny_runs
import torch
from diffusers import WanPipeline
from test_flow_dpo import PAIRS, clips
from test_resume import state_of
from tiny_pipelines import CALLS
from tiny_runs import StopAt, largest_difference, logged, prompts, trainer, weights

from pisces_rl.trainers.base.run.checkpoint import load_tree

#: One rollout serves two optimizer steps: each half once, or the whole twice.
HALVES = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "data": prompts(4),
}
TWICE = {"num_iterations": 2}


@pytest.mark.parametrize(
    "method, stop, settings",
    [
        pytest.param("nft", 2, {"old_decay_rate": 0.2, "ema_decay": 0.8}, marks=pytest.mark.slow),
        ("nft", 3, TWICE | {"old_decay_rate": 0.2, "ema_decay": 0.8}),
        pytest.param(
            "awm",
            3,
            HALVES | {"average_decay_rate": 0.2, "average_decay_max": 0.5, "rollout_batch_size": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param("rvm", 3, HALVES, marks=pytest.mark.slow),
        pytest.param("flow_dpo", 3, HALVES | {"num_generations": 2}, marks=pytest.mark.slow),
        pytest.param(
            "flow_dpo",
            3,
            PAIRS | {"per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
            marks=pytest.mark.slow,
        ),
        ("flash_grpo", 3, HALVES | {"num_inference_steps": 4, "num_generations": 2}),
        pytest.param("flow_dppo", 3, TWICE, marks=pytest.mark.slow),
    ],
    ids=["nft-between", "nft-inside", "awm", "rvm", "flow_dpo", "flow_dpo-pairs", "flash_grpo", "flow_dppo"],
)
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, method, stop, settings):
    """Stop between two rollouts, or inside one (stop=3: it is drawn again with the weights that drew it)."""
    pairs = "method" in settings
    settings = settings | {"method": method, "max_steps": 4, "num_sample_videos": 0}
    if pairs:
        settings |= {"rewards": None, "data": clips(tmp_path)}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    broken = trainer(tmp_path / "broken", callbacks=[StopAt(stop)], **settings)
    broken.train()
    assert broken.state.global_step == stop
    torch.manual_seed(999)  # another process has another past
    resumed = trainer(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert largest_difference(state_of(whole), state_of(resumed)) == 0
    assert whole.followers.keys() == resumed.followers.keys()
    for name, follower in whole.followers.items():
        other = resumed.followers[name]
        assert follower.updates == other.updates and largest_difference(follower.average, other.average) == 0
        if method == "nft":
            assert largest_difference(follower.average, weights(whole)) > 0  # it lags
    for name in ("reward", "loss", "velocity/old_distance", "grad_norm"):
        assert logged(whole, name) == logged(resumed, name), name


def test_averages_are_saved_separately(tmp_path):
    """The adapter's file holds ema_decay's average; the trained weights and the old policy come from elsewhere."""
    settings = {"method": "nft", "old_decay_rate": 0.2, "ema_decay": 0.9, "max_steps": 3}
    made = trainer(tmp_path, callbacks=[StopAt(3)], **settings)
    made.train()
    again = trainer(tmp_path, **settings)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    for before, after in (
        (weights(made), weights(again)),
        (made.ema.average, again.ema.average),
        (made.followers["old"].average, again.followers["old"].average),
    ):
        assert largest_difference(before, after) == 0
    kinds = weights(made), made.ema.average, made.followers["old"].average
    assert all(largest_difference(kinds[i], kinds[j]) > 0 for i, j in ((0, 1), (0, 2), (1, 2)))
    without = trainer(tmp_path, **settings | {"ema_decay": None})  # switched off: the trained weights go on
    without._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(made), weights(without)) == 0
    assert largest_difference(made.followers["old"].average, without.followers["old"].average) == 0


def test_the_trained_weights_are_saved_once(tmp_path):
    """Beside ema_decay's average, for the adapter's file holds that; an earlier checkpoint holds them beside each."""
    settings = {"method": "nft", "old_decay_rate": 0.2, "ema_decay": 0.9, "max_steps": 3}
    made = trainer(tmp_path, callbacks=[StopAt(3)], **settings)
    made.train()
    saved = load_tree(tmp_path / "checkpoint-3" / "trainer")
    assert saved["ema"].keys() == {"updates", "average", "weights"} and saved["old"].keys() == {"updates", "average"}
    earlier = saved | {"old": saved["old"] | {"weights": saved["ema"]["weights"]}}
    again = trainer(tmp_path / "again", **settings)
    again.trained.load(again.pipeline, tmp_path / "checkpoint-3")
    again._load_extra_state(earlier)
    assert largest_difference(weights(made), weights(again)) == 0
    assert largest_difference(made.followers["old"].average, again.followers["old"].average) == 0


def test_nft_s_adapter_reloads_in_plain_diffusers(tmp_path):
    """The best model at the end, here the first; the average is evaluated and saved."""

    def falls(prompts, videos, trainer_state, **columns):
        return tiny_runs.brightness(prompts, videos) / 1e3 - trainer_state.global_step

    made = trainer(
        tmp_path,
        falls,
        method="nft",
        max_steps=2,
        ema_decay=0.5,
        eval_dataset=prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    made.train()
    assert made.state.best_global_step == 1
    average = made.ema.average
    assert (
        largest_difference(average, weights(made)) == 0 == largest_difference(average, made.followers["old"].average)
    )
    made.save_model()
    fresh = tiny_runs.pipeline()
    assert isinstance(fresh, WanPipeline)
    fresh.load_lora_weights(tmp_path)
    call = {"prompt": ["a"], "num_inference_steps": 2, "output_type": "latent", **CALLS["wan"]}
    plain, ours, theirs = (
        pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        for pipe in (tiny_runs.pipeline(), made.pipeline, fresh)
    )
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(plain, theirs)
