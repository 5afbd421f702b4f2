"""Whole runs with everything offloaded: the same adapter to the bit, and only the policy moves weights."""

import pytest
import test_backprop_trainer as backprop
import test_consistency as consistency
import tiny_runs
import torch
from tiny_pipelines import BUILD, quiet

from pisces_rl.policy import VideoPolicy
from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.encoders import load_encoder

ALL = ["text_encoder", "vae", "rewards", "denoiser"]


def left(made) -> dict[str, torch.Tensor]:
    made.train()
    made.save_model()
    return tiny_runs.weights(made)


def resident(made) -> set[str]:
    return {n for n, c in made.pipeline.components.items() if hasattr(c, "_hf_hook") and c._hf_hook.is_resident}


@pytest.mark.usefixtures("absent_weights_are_nan")
@pytest.mark.parametrize(
    "settings",
    [
        {"offload": ["text_encoder", "vae", "rewards"]},
        pytest.param({"offload": ALL}, marks=pytest.mark.slow),
        {"offload": ALL, "gradient_checkpointing": True, "beta": 0.1, "ema_decay": 0.5, "rollout_batch_size": 2},
        pytest.param(
            {
                "offload": ALL,
                "gradient_checkpointing": True,
                "torch_compile": True,
                "torch_compile_backend": "aot_eager",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["idle parts", "all", "reference and average", "compiled"],
)
def test_grpo_leaves_the_same_adapter(tmp_path, settings):
    common = {
        "eval_dataset": tiny_runs.prompts(2),
        "judges": tiny_runs.redness,
        "alive": True,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    offloaded = tiny_runs.trainer(tmp_path / "a", **common, **settings)
    assert resident(offloaded) == set()
    plain = tiny_runs.trainer(tmp_path / "b", **common, **settings | {"offload": None})
    found, expected = left(offloaded), left(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    scores = "eval_judges/redness/mean"
    assert tiny_runs.logged(offloaded, scores) == tiny_runs.logged(plain, scores) and tiny_runs.logged(plain, scores)
    errors = [tiny_runs.logged(made, "replay/max_log_prob_error") for made in (offloaded, plain)]
    assert errors[0] == errors[1] and max(errors[0]) < 1e-6


@pytest.mark.usefixtures("absent_weights_are_nan")
def test_grpo_of_two_experts(tmp_path):
    settings = {"num_inference_steps": 5, "alive": True, "guidance_scale": 3.0}
    made = [
        tiny_runs.trainer(tmp_path / str(i), model=quiet(BUILD["wan22_a14b"]()), offload=offload, **settings)
        for i, offload in enumerate((ALL, None))
    ]
    found, expected = map(left, made)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name.split(".")[0] for name in expected} == {"transformer", "transformer_2"}


@pytest.mark.usefixtures("absent_weights_are_nan")
@pytest.mark.parametrize(
    "through", ["last_steps", *(pytest.param(name, marks=pytest.mark.slow) for name in ("low_variance", "one_step"))]
)
def test_backpropagation_and_the_consistency_term_leave_the_same_adapter(tmp_path, through):
    made = [
        consistency.distilled(
            tmp_path / str(i), backprop.bright, offload=offload, backprop_through=through, gradient_checkpointing=True
        )
        for i, offload in enumerate((ALL, None))
    ]
    found, expected = map(left, made)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_resumes_with_other_offloading(tmp_path):
    settings = {"alive": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = tiny_runs.trainer(tmp_path / "whole", **settings)
    whole.train()
    cut = tiny_runs.trainer(tmp_path / "cut", callbacks=[tiny_runs.StopAt(1)], offload=ALL, **settings)
    cut.train()
    resumed = tiny_runs.trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert tiny_runs.largest_difference(tiny_runs.weights(whole), tiny_runs.weights(resumed)) == 0


def test_the_trainer_does_not_move_an_offloaded_model(tmp_path, monkeypatch):
    """Trainer and accelerate would also move the idle expert to the device."""
    moved = []
    monkeypatch.setattr(VideoPolicy, "to", lambda policy, *args, **kwargs: moved.append(args) or policy)
    made = tiny_runs.trainer(tmp_path, offload=ALL)
    made.train()
    assert made.state.global_step == 2 and not moved


def test_a_second_trainer_of_a_pipeline_may_use_other_offloading(tmp_path):
    model = tiny_runs.pipeline()
    tiny_runs.trainer(tmp_path / "a", model=model, offload=["vae"])
    assert hasattr(model.vae, "_hf_hook")
    model.unload_lora_weights()
    tiny_runs.trainer(tmp_path / "b", model=model).train()
    assert not hasattr(model.vae, "_hf_hook")


def test_rewards_are_told_where_to_work(tmp_path):
    own = load_reward("cosine", encoder=load_encoder("tiny-vtm"))
    judge = load_reward("matching", encoder=load_encoder("tiny-vtm"))
    judge.encoder.offload = "cpu"
    settings = {"rewards": [own, tiny_runs.brightness], "judges": judge}
    tiny_runs.trainer(tmp_path / "a", **settings)
    assert own.offload is None
    made = tiny_runs.trainer(tmp_path / "b", offload=["rewards"], **settings)
    assert own.encoder.offload == made.accelerator.device
    assert judge.offload == "cpu", "what a user set stays"
    made.train()
    assert made.state.global_step == 2


def test_weights_of_rewards_wait_on_the_cpu():
    """The encoder goes away at once and after each call."""
    own = load_reward("cosine", encoder=load_encoder("tiny-vtm"))
    places, to = [], own.encoder.to
    own.encoder.to = lambda place, *args: places.append(str(place)) or to("cpu")
    RewardPanel([own]).offload(torch.device("cuda"))
    assert places == ["cpu"] and own.encoder.offload == torch.device("cuda")
    own(["a red circle"], torch.rand(1, 5, 3, 16, 16))
    assert places[1] == "cuda" and places[-1] == "cpu"
