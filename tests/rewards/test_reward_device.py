"""Rewards on a separate device: the same values and gradients as on the policy's."""

import pytest
import torch
from torch import nn
from trainers import tiny_runs
from trainers.tiny_runs import largest_difference, trainer, weights

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer
from pisces_rl.rewards import RewardPanel, load_reward

ELSEWHERE = [
    pytest.param("cpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]
PROMPTS = ["a red circle", "two blue squares"]


def videos(device: str) -> torch.Tensor:
    return torch.rand(2, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)


class Brightness(nn.Module):
    differentiable = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen = set()

    def forward(self, videos, **columns):
        self.seen.add(str(videos.device))
        return self.scale * videos.mean((1, 2, 3, 4))


@pytest.mark.parametrize("device", ELSEWHERE)
def test_values_and_gradients_are_those_of_the_videos_device(device):
    home = videos("cuda")
    for names in (["temporal_smoothness", Brightness()], ["cosine"], ["ot_semantic"]):
        here, there = (
            RewardPanel([n if isinstance(n, str) else Brightness() for n in names], device=d)
            for d in ("cuda:0", device)
        )
        plain, moved = here(PROMPTS, home, {}).values, there(PROMPTS, home, {}).values
        torch.testing.assert_close(moved, plain, rtol=2e-3, atol=1e-4)
        (_, first), (_, second) = (panel.with_gradients(PROMPTS, home, {}) for panel in (here, there))
        for a, b in zip(first, second):
            assert b.device == home.device
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
            if device != "cpu":  # the same kernels; some sum in an unspecified order
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("kind", ["backprop", "grpo"])
def test_a_run_is_that_of_the_videos_device(tmp_path, device, kind):
    """Equal up to fp32 rounding, at most a hundredth of what was learned: AdamW would amplify it."""
    found = []
    for where in ("cuda:0", device):
        reward = Brightness()
        settings = dict(
            reward_device=where, use_cpu=False, optim="sgd", learning_rate=1.0, num_sample_videos=0, max_grad_norm=0.0
        )
        if kind == "grpo":
            made = trainer(tmp_path / where, reward, alive=True, **settings)
        else:
            config = RewardBackpropConfig(
                output_dir=str(tmp_path / where),
                max_steps=2,
                report_to="none",
                bf16=False,
                per_device_train_batch_size=2,
                num_inference_steps=2,
                height=16,
                width=16,
                num_frames=5,
                **settings,
            )
            made = RewardBackpropTrainer(tiny_runs.pipeline(), reward, config, tiny_runs.prompts())
        before = weights(made)
        made.train()
        assert reward.seen == {where} and str(reward.scale.device) == where
        found.append(weights(made))
    learned = largest_difference(before, found[0])
    assert 0 < learned and largest_difference(*found) < 1e-2 * learned


def test_all_kinds_of_rewards_go_there():
    encoder = load_reward("cosine").encoder
    module, own = Brightness(), load_reward("cosine", device="meta")
    assert own.encoder.device.type == "meta" and encoder.device.type != "meta"  # shared by device
    RewardPanel([module], device="meta")
    assert module.scale.device.type == "meta"
    waiting = load_reward("cosine", offload="cpu")
    RewardPanel([waiting], device="meta")
    assert waiting.offload == "meta" and waiting.encoder.device.type == "cpu"  # until it works
    waiting.offload = "cpu"
    assert [RewardPanel(name, device="cpu").names for name in ("cosine", "motion_amount")]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("nowhere", "'nowhere' is not a device"),
        ("cpu,", "'' is not a device"),
        ("cuda:77", "this host has no cuda:77, only"),
    ],
)
def test_wrong_devices(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        RewardBackpropConfig(output_dir=str(tmp_path), report_to="none", bf16=False, reward_device=wrong)


def test_processes_take_devices_in_turn(tmp_path, monkeypatch):
    config = RewardBackpropConfig(output_dir=str(tmp_path), report_to="none", bf16=False, reward_device="cpu, cpu:0")
    found = []
    for rank in (0, 1, 2, 3):
        monkeypatch.setattr(type(config), "local_process_index", rank)
        found.append(config.own_reward_device().index)
    assert found == [None, 0, None, 0]
