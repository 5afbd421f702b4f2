"""NFT, AWM, RVM and Flow-DPO: their losses from velocities in fp64, and the gradient of a whole run in one graph."""

from collections import defaultdict

import pytest
import torch
import velocity_losses as by_velocity
from tiny_runs import Gradients, brightness, config, largest_difference, logged, prompts, trainer, weights
from torch.autograd import gradcheck
from transformers import TrainerCallback

from pisces_rl.trainers.base.data.seeds import sample_seed
from pisces_rl.trainers.forward.flow_dpo import preference_loss
from pisces_rl.trainers.forward.forward_process import NOISE, Noised
from pisces_rl.trainers.forward.nft import nft_loss
from pisces_rl.trainers.methods import METHODS

VIDEOS, ROWS, SHAPE, TIME = 4, 2, (3, 5), torch.tensor(0.7, dtype=torch.float64)


class Velocities:
    """Random velocities of four videos of two rows each, in fp64, and what a method is given of them."""

    def __init__(self, **fixed):
        generator = torch.Generator().manual_seed(3)

        def drawn(scale: float = 1.0):
            return scale * torch.randn(VIDEOS * ROWS, *SHAPE, generator=generator, dtype=torch.float64)

        self.clean, self.noise = drawn(), drawn()
        self.target = self.noise - self.clean
        self.v = (self.target + drawn(0.5)).requires_grad_()
        self.others = {name: self.target + drawn(0.5) for name in ("old", "reference", "average")}
        self.advantages = torch.tensor([0.8, -1.7, 0.0, 9.0], dtype=torch.float64)
        for name, value in fixed.items():
            if name == "advantages":
                self.advantages = value
            else:
                self.others[name] = value

    def noised(self, v: torch.Tensor | None = None, *names: str) -> Noised:
        state = (1 - TIME) * self.clean + TIME * self.noise
        v = self.v if v is None else v
        return Noised(
            TIME,
            self.clean,
            state - TIME * v,
            self.advantages,
            **{name: state - TIME * self.others[name] for name in names},
        )

    def flat(self, v: torch.Tensor) -> torch.Tensor:
        return v.reshape(VIDEOS, -1)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.flat(self.others[name])


def method(name: str, folder, **settings):
    """The loss of a trainer that has settings, and nothing else."""
    made = METHODS[name][0].__new__(METHODS[name][0])
    made.args = config(folder, name, **settings)
    return lambda noised: made.loss(noised, defaultdict(list))


def gradient(losses: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(losses.sum(), v, retain_graph=True)[0]


def slopes(function, v: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences of the sum of function(v)."""
    found = torch.zeros_like(v)
    for index in range(v.numel()):
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                moved = v.detach().clone()
                moved.view(-1)[index] += sign * step
                ends.append(function(moved).sum())
            found.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return found


close = torch.testing.assert_close

# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture, contrast", [(1.0, 5.0), (0.1, 1.0), (2.0, 5.0)])
def test_nft_from_velocities(mixture, contrast):
    """Value, weights, and the slopes while the weights are held."""
    given, settings = Velocities(), {"mixture": mixture, "contrast": contrast}
    loss, plus, minus = nft_loss(given.noised(None, "old"), **settings)

    def expected(v, widths=None):
        return by_velocity.nft(
            given.flat(v), given.flat(given.target), given["old"], given.advantages, TIME, widths=widths, **settings
        )

    value, widths = expected(given.v)
    close(loss, value)
    close((plus, minus), widths)
    close(gradient(loss, given.v), slopes(lambda v: expected(v, widths)[0], given.v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mixture", [1.0, 0.1, 2.0])
def test_nft_without_its_weights_is_a_signed_step_in_a_trust_region(mixture):
    """bracket / b = 2 (2r - 1) <d, v_old - v*> + b |d|^2 + const, d = v - v_old: the regression's sign is the
    advantage's, and b holds the policy near the old one."""
    given, contrast = Velocities(), 5.0
    parts = []
    for r in (1, 0):  # each side alone, times its weight
        only = Velocities(advantages=torch.full((VIDEOS,), contrast * (2 * r - 1), dtype=torch.float64))
        loss, plus, minus = nft_loss(only.noised(None, "old"), mixture, contrast)
        parts.append(loss * (plus if r else minus) * mixture / contrast / TIME**2)
    r = given.advantages.clamp(-contrast, contrast) / (2 * contrast) + 0.5
    bracket = r * parts[0] + (1 - r) * parts[1]
    d, off = given.flat(given.v) - given["old"], given["old"] - given.flat(given.target)
    expected = 2 * (2 * r - 1) * (d * off).mean(1) + mixture * d.square().mean(1) + off.square().mean(1) / mixture
    close(bracket / mixture, expected)


def test_while_the_old_policy_is_the_trained_one_nft_is_a_signed_regression():
    """For every b: A / w times the regression's gradient, in x0^."""
    given = Velocities()
    given = Velocities(old=given.v.detach())
    error = TIME * (given.flat(given.v) - given.flat(given.target))
    expected = gradient(given.advantages.clamp(-5, 5) / error.detach().abs().mean(1) * error.square().mean(1), given.v)
    for mixture in (1.0, 0.1):
        close(gradient(nft_loss(given.noised(None, "old"), mixture, 5.0)[0], given.v), expected)


def test_weights_of_nft_stay_finite():
    """A prediction that is exact has a weight of 1e-5 in its place, and no gradient."""
    given = Velocities()
    exact = given.target.clone().requires_grad_()
    given.others["old"] = given.target
    loss, plus, minus = nft_loss(given.noised(exact, "old"), 1.0, 5.0)
    assert loss.isfinite().all() and plus.max() <= 1.1e-5 and minus.max() <= 1.1e-5
    assert gradient(loss, exact).abs().max() < 1e-8


AWM = {"power": 0.25, "epsilon": 0.2, "average_weight": 0.7, "beta": 0.3}


@pytest.mark.parametrize("settings", [AWM, AWM | {"epsilon": 1.0, "power": 1.0}], ids=["clips", "linear"])
def test_awm_from_velocities(tmp_path, settings):
    given = Velocities()
    given.advantages[2] = -0.4
    ours = method("awm", tmp_path, **settings)

    def loss(v):
        return ours(given.noised(v, "old", "reference", "average"))

    own = {name: value for name, value in settings.items() if name != "beta"}
    expected = by_velocity.awm(
        given.flat(given.v), given.flat(given.target), given["old"], given["average"], given.advantages, TIME, **own
    )
    expected = expected + settings["beta"] * (given.flat(given.v) - given["reference"]).square().mean(1)
    close(loss(given.v), expected)
    close(gradient(loss(given.v), given.v), gradient(expected, given.v))
    assert gradcheck(loss, given.v)


def test_awm_has_a_slope_where_the_prediction_is_exact(tmp_path):
    given = Velocities()
    exact = given.target.clone().requires_grad_()
    loss = method("awm", tmp_path)(given.noised(exact, "old", "reference", "average"))
    assert loss.isfinite().all() and gradient(loss, exact).isfinite().all()


def test_rvm_is_a_signed_regression_whose_value_is_bounded(tmp_path):
    given, settings = Velocities(), {"reward_scale": 0.1, "beta": 0.3}
    loss = method("rvm", tmp_path, **settings)(given.noised(None, "reference"))

    def expected(v):
        return by_velocity.rvm(
            given.flat(v), given.flat(given.target), given["reference"], given.advantages, **settings
        )

    close(gradient(loss, given.v), gradient(expected(given.v), given.v))
    close(gradient(loss, given.v), slopes(expected, given.v), rtol=1e-6, atol=1e-8)
    a = (settings["reward_scale"] * given.advantages)[:, None]
    step = a * (given.flat(given.v) - given.flat(given.target)) + 0.3 * (given.flat(given.v) - given["reference"])
    close(loss, 0.5 * step.square().mean(1))


def test_flow_dpo_from_velocities(tmp_path):
    given, settings = Velocities(), {"beta": 3.0, "sft_weight": 0.2}
    ours = method("flow_dpo", tmp_path, **settings)

    def loss(v):
        return ours(given.noised(v, "reference"))

    expected = by_velocity.flow_dpo(given.flat(given.v), given.flat(given.target), given["reference"], **settings)
    close(loss(given.v), expected)
    close(gradient(loss(given.v), given.v), gradient(expected, given.v))
    assert gradcheck(loss, given.v)


def test_a_preference_that_is_far_off_stays_finite():
    """log sigmoid of -1000 and of 1000."""
    error = torch.tensor([2.0, 0.0, 0.0, 2.0], requires_grad=True)
    loss, margin = preference_loss(error, torch.zeros(4), 1000.0)
    assert margin.tolist() == [-1000, 1000] and loss.tolist() == [1000, 0]
    assert gradient(loss, error).tolist() == [500, -500, 0, 0]


@pytest.mark.parametrize("name", ["nft", "awm", "rvm"])
def test_without_an_advantage_only_the_anchor_pulls(tmp_path, name):
    """NFT's own anchor is the old policy, which is the trained one here."""
    given = Velocities(advantages=torch.zeros(VIDEOS, dtype=torch.float64))
    if name == "nft":
        given.others["old"] = given.v.detach()
    names = {"nft": ("old", "reference"), "awm": ("old", "reference", "average"), "rvm": ("reference",)}[name]
    loss = method(name, tmp_path, beta=0.3)(given.noised(None, *names))
    v = given.flat(given.v)
    expected = (0.15 if name == "rvm" else 0.3) * (v - given["reference"]).square().mean(1)
    if name == "awm":
        expected = expected + (v - given["average"]).square().mean(1)
    close(gradient(loss, given.v), gradient(expected, given.v))


# --- the gradient of a run -------------------------------------------------------------------------------------------


def part_from(made) -> None:
    """Averages that are neither the trained policy, nor the base model, nor each other."""
    generator = torch.Generator().manual_seed(11)
    for follower in made.followers.values():
        for value in follower.average.values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


class ByHand(TrainerCallback):
    """Before the first optimizer step, the gradient of the whole objective, level by level."""

    def __init__(self, name: str):
        self.name, self.trainer, self.gradient = name, None, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, scored = self.trainer, self.trainer.scored
        rows = list(range(len(scored.advantages)))
        share, advantages = torch.ones(len(rows)) / len(rows), scored.advantages
        if self.name == "flow_dpo":
            groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
            rows = [best(group, key=lambda row: float(advantages[row])) for group in groups for best in (max, min)]
            share = torch.ones(len(groups)) / len(groups)
        places = [row // 4 if self.name == "flow_dpo" else row for row in rows]
        clean = scored.samples.clean_rows(rows).flatten(1)
        steps = range(args.num_inference_steps)
        asked = [
            {"noise_seeds": [sample_seed(args.seed, NOISE, 0, place, step) for place in places], "step": step}
            for step in steps
        ]
        compared = {}
        for name, policy in made.compared(scored).items():
            with policy:
                compared[name] = [self.velocity(rows, **asked[step])[0] for step in steps]
        total = 0.0
        for step in steps:
            v, state, time = self.velocity(rows, grad=True, **asked[step])
            losses = self.losses(
                args,
                v,
                (state - clean) / time,
                time,
                advantages[rows],
                **{name: velocities[step] for name, velocities in compared.items()},
            )
            total = total + (losses * share).sum() / len(steps)
        gradient = torch.autograd.grad(total, list(made.adapter.values()))
        self.loss, self.gradient = float(total.detach()), dict(zip(made.adapter, gradient))

    def velocity(self, rows, **asked):
        found = self.trainer.policy.predict(self.trainer.scored.samples, rows, **asked)
        return ((found.state - found.clean) / found.time).flatten(1), found.state.flatten(1), found.time

    def losses(self, args, v, target, time, advantages, reference=None, **followed):
        anchor = args.beta * (v - reference).square().mean(1)
        if self.name == "nft":
            loss, _ = by_velocity.nft(
                v, target, followed["old"], advantages, time, mixture=args.mixture, contrast=args.contrast
            )
            return loss + anchor
        if self.name == "awm":
            own = {name: getattr(args, name) for name in ("power", "epsilon", "average_weight")}
            old = followed.get("old", v.detach())  # in the first step the trained one
            return by_velocity.awm(v, target, old, followed["average"], advantages, time, **own) + anchor
        if self.name == "rvm":
            return by_velocity.rvm(v, target, reference, advantages, reward_scale=args.reward_scale, beta=args.beta)
        return by_velocity.flow_dpo(v, target, reference, beta=args.beta, sft_weight=args.sft_weight)


def not_all(prompts, videos, **columns):
    """Rows without a reward have advantage 0: the anchor still holds them, and they count in the mean."""
    return [None if i in (1, 6) else v for i, v in enumerate(brightness(prompts, videos).tolist())]


DIVISIONS = {
    "whole": {"per_device_train_batch_size": 8},
    "2x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "rollout-in-parts": {"per_device_train_batch_size": 8, "rollout_batch_size": 3},
}
STRONG = {  # no weight is the default, so that none can be ignored
    "nft": {"beta": 0.3, "mixture": 0.5, "contrast": 1.0},
    "awm": {"beta": 0.3, "power": 0.7, "average_weight": 0.5},
    "rvm": {"beta": 0.3, "reward_scale": 0.3},
    "flow_dpo": {"beta": 50.0, "sft_weight": 0.1},
}


@pytest.mark.parametrize(
    "name, division",
    [
        ("nft", "4x2"),
        ("nft", "rollout-in-parts"),
        ("awm", "2x4"),
        ("rvm", "2x4"),
        ("flow_dpo", "whole"),
        ("flow_dpo", "2x4"),
    ],
)
def test_a_run_s_gradient_is_that_of_the_whole_batch(tmp_path, name, division):
    """However it is divided: a video's noise depends on its place only."""
    by_hand, gradients = ByHand(name), Gradients()
    made = trainer(
        tmp_path,
        not_all,
        method=name,
        alive=True,
        callbacks=[gradients, by_hand],
        max_steps=1,
        max_grad_norm=0.0,
        num_sample_videos=0,
        **STRONG[name] | DIVISIONS[division],
    )
    part_from(made)
    by_hand.trainer = made
    made.train()
    ours = {name.removeprefix("denoiser."): g for name, g in gradients.steps[0].items()}
    assert ours.keys() == by_hand.gradient.keys()
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        assert float((ours[name] - expected).abs().max()) <= 1e-4 * scale + 1e-9, name
    assert all(logged(made, f"grad_norm/step_{step}")[0] > 0 for step in range(3))
    if by_hand.name != "rvm":  # its value is that of the step, not of the regressions
        assert logged(made, "loss")[0] == pytest.approx(by_hand.loss, rel=1e-4)
    ((_, samples),) = made.scored.parts
    assert samples.steps == [] and samples.states == {} and samples.videos is None  # only clean latents are kept


def test_some_levels_of_another_schedule(tmp_path):
    """Two of the eight levels that sampling never visits, drawn anew for each micro-batch."""
    made = trainer(tmp_path, method="nft", alive=True, train_levels=2, train_schedule_steps=8, max_steps=3)
    made.train()
    trained = [
        sorted(int(k.rpartition("_")[2]) for k in row if k.startswith("grad_norm/step_"))
        for row in made.state.log_history[:3]
    ]
    assert all(len(levels) == 2 and levels[-1] < 8 for levels in trained) and len({*map(tuple, trained)}) > 1
    assert max(levels[-1] for levels in trained) > 2  # sampling has only three steps


def test_awm_evaluates_the_old_policy_only_after_an_update(tmp_path):
    """Before the first optimizer step on a rollout it is the trained one: a ratio of exactly 1, at no cost."""
    made = trainer(tmp_path, method="awm", alive=True, num_iterations=2, max_steps=4, average_weight=0.0)
    asked, predict = [], made.policy.predict

    def counted(*arguments, **keywords):
        asked.append(keywords.get("grad", False))
        return predict(*arguments, **keywords)

    made.policy.predict = counted
    made.train()
    steps = made.args.num_inference_steps
    own, with_reference = steps * 4, steps * 4
    assert asked.count(True) == own and asked.count(False) == with_reference + steps * 2
    apart = logged(made, "velocity/old_distance")
    assert apart[0] == apart[2] == 0 and apart[1] > 0 and apart[3] > 0
    assert logged(made, "ratio/mean")[::2] == [1, 1]


# --- what samples, and what follows ----------------------------------------------------------------------------------


def test_decays_grow_from_their_start_to_their_limit(tmp_path):
    nft = trainer(tmp_path, method="nft", old_decay_rate=0.1, old_decay_max=0.25, old_decay_start=2)
    assert [nft.followers["old"].decay(n) for n in range(7)] == pytest.approx([0, 0, 0, 0.1, 0.2, 0.25, 0.25])
    awm = trainer(tmp_path, method="awm", average_decay_rate=0.1, average_decay_max=0.25)
    assert [awm.followers["average"].decay(n) for n in range(5)] == pytest.approx([0, 0.1, 0.2, 0.25, 0.25])


def test_the_old_policy_samples_and_lags(tmp_path):
    """old <- eta old + (1 - eta) trained after each rollout: equal after the first, then behind."""
    made = trainer(tmp_path, method="nft", max_steps=4, old_decay_rate=0.2, old_decay_max=0.3)
    drawn, old, trained = [], [], []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            samples = made.scored.samples
            with made.followers["old"] as follower:
                again = made.policy.sample(samples.prompts, noise_seeds=samples.noise_seeds)
            drawn.append(torch.equal(again.clean, samples.clean))
            old.append({name: value.clone() for name, value in follower.average.items()})
            trained.append(weights(made))

    made.add_callback(Keep())
    made.train()
    assert drawn == [True] * 4
    assert largest_difference(old[1], trained[1]) == 0
    for number, decay in ((2, 0.2), (3, 0.3)):
        expected = {name: decay * v + (1 - decay) * trained[number][name] for name, v in old[number - 1].items()}
        assert largest_difference(expected, old[number]) < 1e-6 < largest_difference(old[number], trained[number])
    distance = logged(made, "velocity/old_distance")
    assert distance[1] == 0 < distance[3]


def test_awm_compares_with_the_policy_that_drew_the_rollout(tmp_path):
    made = trainer(tmp_path, method="awm", max_steps=3, num_iterations=2)
    made.train()
    distance = logged(made, "velocity/old_distance")
    assert distance[0] == distance[2] == 0 < distance[1]


# --- equal rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nft", "flow_dpo"])
def test_a_group_of_equal_rewards_gets_no_step(tmp_path, name):
    """Next to a group that differs: the gradient is half of that group's alone, since all videos count."""

    def of_clip_0(prompts, videos, **columns):
        return [v if p == "clip 0" else 0.0 for p, v in zip(prompts, brightness(prompts, videos).tolist())]

    alone, beside = Gradients(), Gradients()
    settings = dict(
        method=name, alive=True, max_steps=1, max_grad_norm=0.0, shuffle_dataset=False, scale_rewards="group"
    )
    trainer(tmp_path / "alone", of_clip_0, prompts(2), callbacks=[alone], **settings).train()
    with pytest.warns(UserWarning, match="all videos of prompt 'clip 1' have the same reward"):
        trainer(
            tmp_path / "beside", of_clip_0, prompts(2), callbacks=[beside], per_device_train_batch_size=8, **settings
        ).train()
    for key, expected in alone.steps[0].items():
        scale = float(expected.abs().max())
        assert scale > 0 and float((2 * beside.steps[0][key] - expected).abs().max()) <= 2e-4 * scale, key
