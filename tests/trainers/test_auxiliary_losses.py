"""Auxiliary loss terms: a custom one, what a trainer does with each, and what it refuses."""

from pathlib import Path

import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch
from test_consistency import Videos
from tiny_runs import StopAt, largest_difference, logged, weights

from pisces_rl import AuxiliaryLoss, ConsistencyDistillation, RewardBackpropTrainer, VideoGRPOTrainer
from pisces_rl.cli import parse_arguments
from pisces_rl.cli.training_inputs import ScriptArguments, load_auxiliary_losses
from pisces_rl.policy import default_lora_config, save_lora
from pisces_rl.trainers.methods import METHODS


class Shrink(AuxiliaryLoss):
    """Half the square of every weight of the adapter, more with each step; it counts them."""

    name = "shrink"
    steps = 0

    def begin(self, policy, adapter, **parts):
        self.adapter = adapter

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def loss(self, number, count, part=(0, 1)):
        half = 0.5 * sum(p.square().sum() for p in self.adapter.values())
        return (1 + self.steps) * half.expand(count)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def restart(self):
        self.steps = 0


def made(folder, losses=None, method="grpo", rewards=tiny_runs.brightness, callbacks=None, **settings):
    trainer = METHODS[method][0](
        tiny_runs.pipeline(),
        rewards,
        tiny_runs.config(folder, method, **settings),
        tiny_runs.prompts(),
        peft_config=default_lora_config(4),
        callbacks=callbacks,
        auxiliary_losses=losses,
    )
    tiny_runs.enliven(trainer)
    return trainer


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_a_custom_loss_is_added_to_an_algorithm(tmp_path, method):
    """Its gradient is added, and its value is logged under its name."""
    gradients = {}
    for losses in (None, [Shrink(3.0)]):
        seen = tiny_runs.Gradients()
        trainer = made(tmp_path / str(losses), losses, method, callbacks=[seen], max_steps=1, max_grad_norm=0.0)
        adapter = list(weights(trainer).values())
        trainer.train()
        gradients[bool(losses)] = list(seen.steps[0].values())
    for with_it, without, weight in zip(gradients[True], gradients[False], adapter, strict=True):
        torch.testing.assert_close(with_it - without, 3 * weight, rtol=1e-3, atol=1e-4)
    assert logged(trainer, "shrink_loss") == pytest.approx([sum(float(w.square().sum()) for w in adapter) / 2])
    assert trainer._card_settings()["auxiliary loss shrink"] == "weight 3.0"


@pytest.mark.slow
def test_its_state_is_saved_and_resumed(tmp_path):
    settings = {"max_steps": 4}
    whole = made(tmp_path / "whole", [Shrink(0.1)], **settings)
    whole.train()
    made(tmp_path / "cut", [Shrink(0.1)], callbacks=[StopAt(2)], **settings).train()
    resumed = made(tmp_path / "cut", [Shrink(0.1)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.auxiliary_losses[0].steps == 4
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_one_object_serves_two_trainers(tmp_path):
    """The second trainer took the first one's policy and average away."""
    term = ConsistencyDistillation(Videos(), steps=4)
    first, second = (made(tmp_path / str(i), [term], max_steps=1) for i in range(2))
    first.train()
    assert first.auxiliary_losses[0].policy is first.policy and second.auxiliary_losses[0].policy is second.policy
    assert [t.auxiliary_losses[0].average.updates for t in (first, second)] == [1, 0]


def test_weights_that_change_on_resume_are_reported(tmp_path):
    terms = [Shrink(0.1), ConsistencyDistillation(Videos(), steps=4)]
    made(tmp_path, terms, callbacks=[StopAt(2)], max_steps=3).train()
    resumed = made(tmp_path, [Shrink(0.2)], max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._card_settings()["changed on resume"] == (
        "shrink_weight 0.1 until step 2, then 0.2; consistency_weight 1.0 until step 2, then 0.0"
    )


def test_a_checkpoint_with_the_consistency_term_and_the_average(tmp_path):
    """As they were written before terms were objects."""
    trainer = made(tmp_path, [ConsistencyDistillation(Videos(), steps=4)], ema_decay=0.5, max_steps=1)
    trainer.train()
    state = trainer._extra_state()
    again = made(tmp_path / "again", [ConsistencyDistillation(Videos(), steps=4)], ema_decay=0.5)
    again._load_extra_state(state | state.pop("auxiliary_losses"))
    assert again.auxiliary_losses[0].average.updates == 1
    averages = [t.auxiliary_losses[0].average.average for t in (trainer, again)]
    assert largest_difference(*averages) == 0


def test_it_needs_rewards_or_a_term(tmp_path):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        backprop.trainer(tmp_path, rewards=None)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        VideoGRPOTrainer(
            "nowhere", None, tiny_runs.config(tmp_path), tiny_runs.prompts(), auxiliary_losses=[Shrink(1.0)]
        )
    alone = RewardBackpropTrainer(
        tiny_runs.pipeline(), None, backprop.config(tmp_path), tiny_runs.prompts(), auxiliary_losses=[Shrink(1.0)]
    )
    alone.train()
    assert alone.state.global_step == 2 and min(logged(alone, "shrink_loss")) > 0


@pytest.mark.parametrize(
    "losses, message",
    [
        (Shrink(1.0), "auxiliary_losses is a Shrink; pass a list"),
        ([tiny_runs.brightness], "holds a func"),
        ([Shrink(1.0), Shrink(2.0)], r"several are named \['shrink'\]; set a different `name`"),
        ("shrink", "is a str"),
    ],
)
def test_anything_but_a_list_of_terms_is_refused(tmp_path, losses, message):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        VideoGRPOTrainer(
            "nowhere", tiny_runs.brightness, tiny_runs.config(tmp_path), tiny_runs.prompts(), auxiliary_losses=losses
        )


def test_the_teacher_may_be_the_saved_adapter(tmp_path):
    """continue_reference=adapter needs a term that refers to it, and distillation is one."""
    save_lora(made(tmp_path / "saved").pipeline, tmp_path / "adapter")
    settings = {"continue_from": str(tmp_path / "adapter"), "continue_reference": "adapter"}

    def continued(losses):
        args = tiny_runs.config(tmp_path / "on", **settings)
        return VideoGRPOTrainer(
            tiny_runs.pipeline(), tiny_runs.brightness, args, tiny_runs.prompts(), auxiliary_losses=losses
        )

    with pytest.raises(ValueError, match="has no effect: there is neither a KL penalty"):
        continued([Shrink(1.0)])
    trainer = continued([ConsistencyDistillation(Videos(), steps=4)])
    assert trainer._card_settings()["reference"] == "the adapter it was continued from"


def test_the_command_makes_the_term_of_its_options():
    root = Path(__file__).parents[2]
    recipe = ["--config", str(root / "recipes" / "shapemotion_distill.yaml"), "--use_cpu"]
    config = backprop.RewardBackpropConfig
    script, args = parse_arguments(ScriptArguments, config, arguments=recipe)
    (term,) = load_auxiliary_losses(script, args, tiny_runs.prompts())
    assert (term.weight, term.steps, term.guidance, term.decay, term.batch_size) == (
        1.0,
        16,
        {"guidance_scale": 3.0},
        0.95,
        None,
    )
    assert len(term.dataset) == 4096 and [paper.arxiv for paper in term.papers] == ["2310.04378"]
    script, args = parse_arguments(ScriptArguments, config, arguments=[*recipe, "--consistency_weight", "0"])
    assert load_auxiliary_losses(script, args, tiny_runs.prompts()) == []
    script, args = parse_arguments(ScriptArguments, config, arguments=[*recipe, "--dataset", "prompts.txt"])
    with pytest.raises(ValueError, match="has no column `video`, which --consistency_weight needs"):
        load_auxiliary_losses(script, args, tiny_runs.prompts())
