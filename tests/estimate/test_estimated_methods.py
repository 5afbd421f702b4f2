"""What the estimate counts for each method, against what its trainer holds."""

from types import SimpleNamespace

import pytest
import torch
from test_estimate import WAN, allocated_peak, wan
from trainers.tiny_runs import trainer

from pisces_rl import METHODS, RewardBackpropConfig
from pisces_rl.estimate import MemoryEstimate, estimate_memory
from pisces_rl.policy import VideoPolicy, add_lora, default_lora_config

SETTINGS = (
    dict(
        output_dir="outputs/unused",
        num_inference_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    | WAN
)


def config(method: str, **settings):
    if method == "backprop":
        return RewardBackpropConfig(**SETTINGS | settings)
    return METHODS[method][1](**SETTINGS | {"num_generations": 8} | settings)


def estimated(method: str, peft_config=None, **settings) -> MemoryEstimate:
    return estimate_memory(wan(), config(method, **settings), peft_config)


SHORT = dict(height=32, width=32, num_frames=5, guidance_scale=1.0)


def test_nft_holds_the_old_policy_clean_latents_and_two_predictions():
    grpo, nft = estimated("grpo", **SHORT), estimated("nft", **SHORT)
    adapter, latents = nft.resident["adapter"], nft.phases["update"]["states"] // 8  # one a video of the rollout
    assert nft.resident["followers"] == adapter and "followers" not in grpo.resident
    assert grpo.phases["update"]["states"] == 6 * 8 * latents  # 2 trained steps: 3 states, 2 means, and clean ones
    assert nft.phases["update"]["predictions of other policies"] == 2 * 4 * latents  # old and reference
    key = "activations and gradients"  # of one prediction's graph, as in one step of a replay
    assert nft.phases["update"][key] == grpo.phases["update"][key]
    for phase in ("sampling", "decoding"):  # which the old policy draws
        assert nft.phases[phase]["trained weights"] == adapter


@pytest.mark.slow
def test_flow_dpo_trains_on_two_videos_of_each_group():
    settings = SHORT | dict(num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    pairs, all_ = estimated("flow_dpo", **settings), estimated("rvm", **settings)
    assert pairs.details["videos per micro-batch"] == 4 and all_.details["videos per micro-batch"] == 16
    key = "activations and gradients"
    assert pairs.phases["update"][key] < 0.4 * all_.phases["update"][key]
    assert pairs.peaks["decoding"] == all_.peaks["decoding"]


@pytest.mark.slow
def test_followers_of_all_weights_count_as_much_as_these():
    awm = estimated("awm", "full", **SHORT)
    trained = 4 * awm.details["trainable parameters"]
    assert awm.resident["followers"] == trained  # the average; an old policy only if a rollout serves several steps
    awm = estimated("awm", "full", num_iterations=2, **SHORT)
    assert awm.resident["followers"] == 2 * trained
    assert awm.phases["update"]["activations and gradients"] > trained  # which wait while a follower predicts
    assert awm.fsdp2(4).resident["followers"] == -(-2 * trained // 4)


@pytest.mark.parametrize(
    "method, settings",
    [
        ("grpo", {}),
        ("flash_grpo", {}),
        ("flow_dppo", {}),
        ("nft", {}),
        ("nft", dict(beta=0.0)),
        ("awm", {}),
        ("awm", dict(average_weight=0.0)),
        ("awm", dict(num_iterations=2)),
        ("rvm", {}),
        ("rvm", dict(beta=0.0)),
        ("flow_dpo", {}),
    ],
)
def test_a_config_says_what_its_trainer_holds(tmp_path, method, settings):
    made = trainer(tmp_path, method=method, **settings)
    held = made.args.held()
    assert held.followers == len(made.followers)
    if method == "awm":  # it evaluates the old policy only if a rollout serves several optimizer steps
        assert ("old" in made.followers) == (made.args.num_iterations > 1)
    if method in ("nft", "awm", "rvm", "flow_dpo"):
        later = made.args.num_iterations > 1  # an optimizer step that is not a rollout's first
        assert held.predictions == len(made.compared(SimpleNamespace(drawn_at=-1 if later else 0)))
    steps = made.trained_steps(0, 0)
    rollout = made.policy.sample(["a"] * 4, noise_seeds=range(4), step_seeds=range(4), steps=steps)
    latents = [*rollout.states.values(), *rollout.means.values(), rollout.clean]
    assert held.latents == len(latents) and held.rollout == 4


def test_predictions_of_the_reference_in_grpo():
    """Of each trained step the prediction and the mean."""
    held = config("grpo", beta=0.1).held()
    assert held.predictions == 4 and config("grpo").held().predictions == 0


@pytest.mark.parametrize("through, graphs", [("last_steps", 2), ("random_steps", 3), ("one_step", 1)])
def test_graphs_of_reward_backpropagation(through, graphs):
    held = config("backprop", backprop_through=through, backprop_steps=2, decode_frames=2).held()
    assert (held.graphs, held.decoder, held.decode_frames, held.rollout) == (graphs, "checkpointed", 2, 0)


BACKPROP = dict(per_device_train_batch_size=1, guidance_scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, dict(checkpoint_decoder=False), dict(backprop_steps=3)])
def test_reward_backpropagation_takes_what_is_estimated(settings):
    args = config("backprop", **BACKPROP, **settings)
    estimate = estimate_memory(wan(), args, None)
    policy = VideoPolicy(wan(), **args.policy_settings())
    add_lora(dict(policy.denoiser.items()), default_lora_config())
    policy.activation_checkpointing_enable()

    def update() -> None:
        policy.sample_with_gradients(
            ["a prompt"], noise_seeds=[0], last_steps=args.backprop_steps, checkpoint_decoder=args.checkpoint_decoder
        ).square().mean().backward()

    policy.sample(["a prompt"], noise_seeds=[0])
    # oneDNN's convolutions take workspaces besides, which are not counted
    assert estimate.phases["update"]["activations and gradients"] == pytest.approx(allocated_peak(update), rel=0.2)


@pytest.mark.slow
def test_fewer_decoded_frames_take_less():
    part, whole = (estimated("backprop", **BACKPROP, num_frames=9, decode_frames=n).peaks for n in (1, None))
    assert set(whole) == {"sampling", "update"} and part["sampling"] == whole["sampling"]
    assert part["update"] < 0.5 * whole["update"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "flow_dpo"])
def test_an_update_of_a_forward_process_takes_what_is_estimated(tmp_path, method):
    """A micro-batch under the trainer itself, at one noise level."""
    settings = dict(WAN, num_generations=4, train_levels=1, gradient_checkpointing=True)
    made = trainer(tmp_path, model=wan(), method=method, **settings)
    made.train()
    made.scored.spread[:] = True
    made.scored.advantages[:] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    update = estimate_memory(wan(), made.args, default_lora_config(4)).phases["update"]
    counted = update["activations and gradients"] + update["predictions of other policies"]
    peak = allocated_peak(lambda: made.backward(made.scored, [0, 1, 2, 3], 4))
    assert counted == pytest.approx(peak, rel=0.15)
