"""Settings of many processes that are refused before a model is loaded, and the sum that compares weights."""

import pytest
import torch
from accelerate import DeepSpeedPlugin
from tiny_runs import brightness, config, prompts

from pisces_rl import VideoGRPOTrainer
from pisces_rl.trainers.base.distributed.ranks import digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZERO_STAGE": "1"}, "zero_stage=1: set zero_stage: 2 or 3"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device='cpu': set it to none"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device='nvme': set it to none"),
    ],
)
def test_unsupported_deepspeed_settings_are_refused(tmp_path, monkeypatch, settings, message):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ValueError, match=message):
        VideoGRPOTrainer("tiny-wan", brightness, config(tmp_path), prompts())


def test_the_launcher_enables_deepspeed(tmp_path):
    args = config(tmp_path)
    args.deepspeed, args.deepspeed_plugin = "zero.json", DeepSpeedPlugin(zero_stage=2)
    with pytest.raises(ValueError, match="deepspeed='zero.json' is not supported: .*deepspeed_zero2.yaml"):
        VideoGRPOTrainer("tiny-wan", brightness, args, prompts())


def test_fsdp1_is_refused(tmp_path, monkeypatch):
    """The environment variables of `accelerate launch --use_fsdp` without --fsdp_version 2."""
    args = config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version=1: FSDP1 flattens.*--fsdp_version 2"):
        VideoGRPOTrainer("tiny-wan", brightness, args, prompts())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_parallel": 2}, "context_parallel=2 must be at least 1 and divide the number of processes, 1"),
        ({"context_parallel": 0}, "context_parallel=0 must be at least 1"),
        ({"equal_weights_steps": 0}, "equal_weights_steps=0 must be at least 1 optimizer step"),
        ({"reward_timeout": -1}, "reward_timeout=-1 must be 0"),
    ],
)
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_any_changed_bit_and_any_exchange_shows_in_the_digest():
    weights = [torch.randn(3, 5), torch.randn(7)]
    before = digest(weights)
    assert digest([w.clone() for w in weights]) == before
    for bit in (0, 22, 31):
        changed = [w.clone() for w in weights]
        changed[1].view(torch.int32)[4] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert digest(changed) != before
    exchanged = [weights[0].clone(), weights[1][[1, 0, 2, 3, 4, 5, 6]]]
    assert digest(exchanged) != before
