"""The model card cites the papers of what a run used: its method's and its transition's."""

import re

import pytest
import test_backprop_trainer as backprop
import test_consistency as consistency
import tiny_runs
from tiny_pipelines import BUILD, CALLS, quiet

from pisces_rl.transitions import TRANSITIONS, Paper

#: transition: a family that it fits, and the papers that its docstring names.
SOURCES = {
    "flow_sde": ("wan", ["2505.05470"]),
    "flow_sde_linear": ("wan", ["2505.05470"]),
    "dance_sde": ("wan", ["2505.07818"]),
    "cps": ("wan", ["2509.05952"]),
    "ddim": ("cogvideox", ["2010.02502", "2305.13301"]),
    "ancestral": ("cosmos", ["2206.00364"]),
}


def cited(trainer, folder) -> list[str]:
    """The arXiv ids on a trainer's card, besides this library's own."""
    trainer.create_model_card()
    ids = re.findall(r"eprint = \{(.*)\}", (folder / "README.md").read_text(encoding="utf-8"))
    assert ids[0] == "2602.01624"
    return ids[1:]


def grpo(folder, transition, made=tiny_runs.VideoGRPOTrainer):
    family = SOURCES[transition][0]
    call = dict(CALLS[family])
    settings = {name: call.pop(name, None) for name in ("height", "width", "num_frames", "guidance_scale")}
    args = tiny_runs.config(folder, transition=transition, pipeline_kwargs=call, **settings)
    return made(quiet(BUILD[family]()), tiny_runs.brightness, args, tiny_runs.prompts())


def test_every_transition_names_its_papers():
    """Every kernel cites the sources that its docstring or its module names."""
    assert SOURCES.keys() == TRANSITIONS.keys()
    for name, (_, ids) in SOURCES.items():
        assert [paper.arxiv for paper in TRANSITIONS[name].papers] == ids


@pytest.mark.parametrize("transition", SOURCES)
def test_grpo_cites_the_paper_of_its_transition(transition, tmp_path):
    """A recipe with `cps` never cited Flow-CPS, one with `ancestral` nothing but GRPO."""
    assert cited(grpo(tmp_path, transition), tmp_path) == ["2402.03300", *SOURCES[transition][1]]


@pytest.mark.parametrize("weighting, paper", [("longcat", "2510.22200"), ("guard", "2510.22319")])
def test_grpo_cites_the_paper_of_its_weights_of_steps(weighting, paper, tmp_path):
    made = tiny_runs.trainer(tmp_path, step_weighting=weighting)
    assert cited(made, tmp_path)[-1] == paper


def test_a_subclass_cites_its_own_paper(tmp_path):
    """A custom method on top of GRPO sets `papers`; a paper that the transition also lists is cited once."""

    class Mine(tiny_runs.VideoGRPOTrainer):
        papers = (Paper("2611.00001", "Mine"), *TRANSITIONS["cps"].papers)

    assert cited(grpo(tmp_path, "cps", Mine), tmp_path) == ["2611.00001", "2509.05952"]


def test_backpropagation_cites_its_methods_and_no_transition(tmp_path):
    """It samples by the ODE."""
    assert cited(backprop.trainer(tmp_path), tmp_path) == ["2304.05977", "2309.17400", "2310.03739", "2407.08737"]


def test_distillation_alone_cites_no_reward_gradient(tmp_path):
    """Without rewards the trainer cites no reward-gradient paper, only that of the auxiliary term."""
    assert cited(consistency.distilled(tmp_path), tmp_path) == ["2310.04378"]
