"""Flow-DPO from pairs of videos in a dataset, and what is wrong with them."""

import warnings
from pathlib import Path

import pytest
import tiny_runs
import torch
import velocity_losses as by_velocity
from datasets import Dataset, Video
from tiny_runs import Gradients, largest_difference, logged, pipeline, trainer, weights
from transformers import TrainerCallback

from pisces_rl.media import load_video, save_video
from pisces_rl.trainers.base.data.seeds import sample_seed
from pisces_rl.trainers.forward.forward_process import NOISE
from pisces_rl.trainers.methods import METHODS

PAIRS = {"method": "flow_dpo", "num_generations": 2}


def clips(folder, count: int = 4, **columns) -> Dataset:
    """Pairs of files, of another size than the pipeline's; a bright one is chosen."""
    sides = {"chosen": [], "rejected": []}
    for row in range(count):
        for side, low in (("chosen", 0.5), ("rejected", 0.0)):
            generator = torch.Generator().manual_seed(row)
            sides[side].append(str(folder / f"{side}_{row}.mp4"))
            save_video(low + 0.5 * torch.rand(7, 3, 20, 24, generator=generator), sides[side][-1], fps=8)
    return Dataset.from_dict({"prompt": [f"clip {i}" for i in range(count)], **sides, **columns})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Dataset:
    return clips(tmp_path_factory.mktemp("clips"))


class ByHand(TrainerCallback):
    """Before the first step, the gradient of all pairs in one graph, their videos encoded anew."""

    trainer = gradient = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, samples = self.trainer, self.trainer.scored.samples
        count = len(samples)
        assert made.scored.advantages.tolist() == [1.0, -1.0] * (count // 2)
        assert samples.prompts[::2] == samples.prompts[1::2] and len(set(samples.prompts)) == count // 2
        codec, rows = made.policy.latent_codec({}), {row["prompt"]: row for row in made.train_dataset}
        videos = [
            codec.fitted(load_video(rows[prompt][side], 5))
            for prompt in samples.prompts[::2]
            for side in ("chosen", "rejected")
        ]
        clean = codec.encode(made.pipeline, torch.stack(videos))
        torch.testing.assert_close(samples.clean, clean)
        total = 0.0
        for step in range(args.num_inference_steps):
            seeds = [sample_seed(args.seed, NOISE, 0, row // 2, step) for row in range(count)]
            asked = {"noise_seeds": seeds, "step": step}
            with made.initial.reference():
                reference = made.policy.predict(samples, range(count), **asked)
            own = made.policy.predict(samples, range(count), grad=True, **asked)
            v, v_ref, target = (
                (own.state - x).flatten(1) / own.time for x in (own.clean, reference.clean, samples.clean)
            )
            total = total + by_velocity.flow_dpo(v, target, v_ref, beta=args.beta, sft_weight=args.sft_weight).mean()
        total = total / args.num_inference_steps
        self.gradient = dict(zip(made.adapter, torch.autograd.grad(total, list(made.adapter.values()))))


def test_pairs_of_files_without_rewards(tmp_path, pairs):
    """The gradient is that of all pairs in one graph; both videos of a pair have the same noise."""
    by_hand, gradients = ByHand(), Gradients()
    made = trainer(
        tmp_path,
        None,
        pairs,
        alive=True,
        max_steps=1,
        callbacks=[gradients, by_hand],
        beta=50.0,
        sft_weight=0.1,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **PAIRS,
    )
    by_hand.trainer = made
    made.train()
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0 and float((gradients.steps[0][f"denoiser.{name}"] - expected).abs().max()) <= 1e-3 * scale


def test_it_learns_to_prefer_the_chosen_videos(tmp_path, pairs):
    """And its report, card and adapter need no reward; a judge measures."""
    made = trainer(
        tmp_path,
        None,
        pairs,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        beta=200.0,
        eval_dataset=tiny_runs.prompts(2),
        judges=tiny_runs.redness,
        num_sample_videos=0,
        **PAIRS,
    )
    made.train()
    made.save_model()
    margin, positive = logged(made, "rewards/margins"), logged(made, "rewards/accuracies")
    assert margin[0] == 0 < margin[-1] and positive[0] == 0 and positive[-1] > 0.5
    assert logged(made, "loss")[0] == pytest.approx(0.6931, abs=1e-3) and logged(made, "loss")[-1] < 0.69
    assert len(logged(made, "eval_judges/redness/mean")) == 2 and not logged(made, "reward")
    assert "none" in (tmp_path / "README.md").read_text()


def test_bytes_and_a_video_column_are_the_same_run_as_paths(tmp_path, pairs):
    read = [Path(path).read_bytes() for path in pairs["chosen"]]
    other = changed(pairs, chosen=read).cast_column("rejected", Video())
    found = []
    for name, data in (("paths", pairs), ("other", other)):
        made = trainer(tmp_path / name, None, data, max_steps=1, per_device_train_batch_size=2, **PAIRS)
        made.train()
        found.append(weights(made))
    assert largest_difference(*found) == 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    return pipeline()


def changed(pairs: Dataset, **columns) -> Dataset:
    return Dataset.from_dict(pairs.to_dict() | columns)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.remove_columns("rejected"), "has columns .*but none named `rejected`: a pair needs"),
        (lambda d: d.remove_columns("chosen"), "has columns .*but none named `chosen`: a pair needs"),
        (lambda d: d.remove_columns("prompt"), "none named `prompt`"),
        (
            lambda d: changed(d, chosen=[d[0]["chosen"], None, *d["chosen"][2:]]),
            r"row 1 \('clip 1'\): `chosen` is missing; add it",
        ),
        (lambda d: changed(d, rejected=[*d["rejected"][:3], ""]), r"row 3 \('clip 3'\): `rejected` is missing"),
        (
            lambda d: changed(d, rejected=[*d["rejected"][:2], d[2]["chosen"], d[3]["rejected"]]),
            r"row 2 \('clip 2'\): `chosen` and `rejected` are the same video",
        ),
        (
            lambda d: changed(d, chosen=["nowhere.mp4", *d["chosen"][1:]]),
            r"row 0 \('clip 0'\): `chosen` is 'nowhere.mp4', which is not a file",
        ),
    ],
    ids=["no-rejected", "no-chosen", "no-prompt", "none", "empty", "same", "no-file"],
)
def test_pairs_are_checked_before_a_model_is_loaded(tmp_path, pairs, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None, change(pairs), model="no such model", **PAIRS)


@pytest.mark.parametrize(
    "rewards, settings, message",
    [
        (tiny_runs.brightness, {}, "reward_funcs is given, but train_dataset holds pairs"),
        (None, {"num_generations": 4}, "num_generations=4 and num_iterations=1, but train_dataset holds pairs"),
        (None, {"num_iterations": 2}, "num_generations=2 and num_iterations=2, but train_dataset holds pairs"),
        (
            None,
            {"overlap_rewards": True, "rollout_batch_size": 2},
            "overlap_rewards=True, but train_dataset holds pairs",
        ),
        (None, {"rollout_batch_size": 2}, "rollout_batch_size=2, but train_dataset holds pairs"),
        (None, {"reward_weights": [1.0]}, r"reward_weights=\[1.0\], but train_dataset holds pairs"),
        (
            None,
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum', but train_dataset holds pairs",
        ),
    ],
)
def test_settings_that_do_not_fit_pairs(tmp_path, pairs, rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rewards, pairs, model="no such model", **PAIRS | settings)


def test_neither_rewards_nor_pairs(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"reward_funcs is empty, and train_dataset has no columns `chosen` and "
        r"`rejected`, only \['prompt'\]: pass rewards",
    ):
        trainer(tmp_path, None, model="no such model", method="flow_dpo")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row | {"rejected": row["chosen"]}, "prompt 'clip .': `chosen` and `rejected` are the same video"),
        (lambda row: row | {"rejected": __file__}, "prompt 'clip .': `rejected`: .*cannot be read as a video"),
        (lambda row: row | {"rejected": None}, "prompt 'clip .': `rejected`: "),
    ],
    ids=["same", "no-video", "none"],
)
def test_a_bad_clip_found_while_reading_names_the_prompt_and_takes_no_step(tmp_path, pairs, shared, change, message):
    """A transform returns the videos, so they cannot be checked before they are read."""

    def transform(batch):
        rows = [change(dict(zip(batch, values))) for values in zip(*batch.values())]
        return {name: [row[name] for row in rows] for name in batch}

    made = trainer(tmp_path, None, pairs.with_transform(transform), **PAIRS)
    before = weights(made)
    with pytest.raises(ValueError, match=message):
        made.train()
    assert made.state.global_step == 0 and largest_difference(before, weights(made)) == 0


# --- best against worst of a rollout ---------------------------------------------------------------------------------


class Taught(TrainerCallback):
    """The rewards of the winner and the loser of each step's pairs; None where a video has none."""

    def __init__(self):
        self.trainer, self.pairs = None, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made = self.trainer
        rows, _ = made.taught(made.scored, made.scored.micro_batches[0])
        self.pairs += [(made.given[winner], made.given[loser]) for winner, loser in zip(rows[::2], rows[1::2])]


@pytest.mark.parametrize("scored", [[3.0, 2.0, 1.0], [-1.0, -2.0, -3.0]], ids=["falling", "rising"])
def test_a_video_without_a_reward_is_neither_winner_nor_loser(tmp_path, scored):
    """Running statistics compare with earlier rollouts, beside which all of a group may be better, or worse; an
    unscored video's advantage of 0 was then the worst, or the best."""
    taught = Taught()

    def one_of_four_is_unscored(prompts, videos, trainer_state, **columns):
        step = trainer_state.global_step
        made.given = [(10.0 * step * scored[0] + v) if v is not None else None for v in [scored[0], None, *scored[1:]]]
        return made.given

    taught.trainer = made = trainer(
        tmp_path,
        one_of_four_is_unscored,
        tiny_runs.prompts(1),
        method="flow_dpo",
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_min_count=1,
        max_steps=3,
        callbacks=[taught],
        num_sample_videos=0,
    )
    made.train()
    best, worst = max(scored), min(scored)
    assert taught.pairs == [(best + step * 10 * scored[0], worst + step * 10 * scored[0]) for step in range(3)]


@pytest.mark.parametrize("rewards", [[1.0, None, None, None], [9.0, None, 9.0, 9.0], [None] * 4])
def test_a_group_with_fewer_than_two_distinct_rewards_makes_no_pair(tmp_path, rewards):
    """Also beside the statistics of earlier rollouts, from which all of them differ."""

    def later(prompts, videos, trainer_state, **columns):
        return [4.0, 3.0, 2.0, 1.0] if trainer_state.global_step == 0 else rewards

    kept = tiny_runs.Weights()
    kept.trainer = made = trainer(
        tmp_path,
        later,
        tiny_runs.prompts(1),
        method="flow_dpo",
        callbacks=[kept],
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_min_count=1,
        max_steps=2,
        num_sample_videos=0,
    )
    made.train()
    assert largest_difference(*kept.steps) == 0


@pytest.mark.parametrize("method, warns", [("flow_dpo", False), ("grpo", True), ("nft", True)])
def test_two_videos_are_a_group_for_a_preference(tmp_path, method, warns):
    """The sign of an advantage, which a small group often has wrong, counts for the other methods."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        METHODS[method][1](output_dir=str(tmp_path), num_generations=2, use_cpu=True)
    assert any("groups below 8" in str(w.message) for w in told) == warns
