"""`pisces-rl estimate`: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch

from pisces_rl import AWMConfig, NFTConfig, RewardBackpropConfig, VideoGRPOConfig
from pisces_rl.cli import estimate_command

ROOT = Path(__file__).parents[2]
TINY = [
    "--model",
    "tiny-wan",
    "--height",
    "64",
    "--width",
    "64",
    "--num_frames",
    "17",
    "--report_to",
    "none",
    "--pipeline_kwargs",
    '{"max_sequence_length": 24}',
    "--guidance_scale",
    "1",
    "--num_inference_steps",
    "4",
    "--per_device_train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "4",
]


@pytest.fixture
def script(tmp_path):
    def run(*arguments: str) -> None:
        estimate_command.main(["--output_dir", str(tmp_path), *arguments])

    run.module = estimate_command
    return run


@pytest.mark.slow
def test_prints_a_table_and_whether_it_fits(script, capsys):
    script(*TINY, "--gpu_gib", "1")
    printed = capsys.readouterr().out
    for name in ("transformer", "adapter", "optimizer states", "peak", "Not counted: rewards"):
        assert name in printed
    assert "GiB fits 1 GiB" in printed
    script(*TINY, "--gpu_gib", "0.001", "--sharding", "fsdp2", "--num_processes", "2")
    printed = capsys.readouterr().out
    assert "gathered weights" in printed and "does not fit 0.001 GiB" in printed


def test_bf16_is_on_unless_said_otherwise(script):
    for arguments, dtype in (([], torch.bfloat16), (["--bf16", "false"], torch.float32)):
        _, _, config = script.module.parsed([*TINY, *arguments])
        assert config.bf16 == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "arguments, config",
    [
        ([], VideoGRPOConfig),
        (["--method", "nft"], NFTConfig),
        (["--method", "backprop"], RewardBackpropConfig),
        (["--config", str(ROOT / "recipes" / "wan21_1.3b_awm.yaml")], AWMConfig),
        (["--config", str(ROOT / "recipes" / "wan21_1.3b_grpo.yaml")], VideoGRPOConfig),
    ],
)
def test_the_method_decides_which_settings_there_are(script, arguments, config):
    assert type(script.module.parsed([*arguments, "--report_to", "none"])[2]) is config


@pytest.mark.slow
def test_tells_what_nft_takes(script, capsys):
    script(*TINY, "--method", "nft")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("followers", "trained weights", "predictions of other policies"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "sft"], "--method 'sft' must be one of grpo, .*, backprop"),
        (["--sharding", "zero3"], "invalid choice: 'zero3' .choose from '?none'?, '?fsdp2"),
        (["--num_processes", "2"], "--num_processes 2: without sharding every GPU needs as much memory as one"),
        (["--sharding", "fsdp2"], "--num_processes 1: fsdp2 needs at least 2"),
        (["--table"], "--table takes no other arguments"),
        (["--table=true"], "--table takes no other arguments"),
    ],
)
def test_an_invalid_command_line(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script(*TINY, *arguments)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_an_unknown_model(script):
    with pytest.raises(SystemExit, match="model='no-such-folder' must be a model folder or Hub id"):
        script(*TINY, "--model", "no-such-folder")


@pytest.mark.slow
def test_a_recipe_at_full_size(script, capsys):
    """14 B parameters in bf16 are 26.6 GiB, and with the text encoder of 5.7 B the run does not fit 40 GiB."""
    script("--config", str(ROOT / "recipes" / "wan21_14b_grpo.yaml"), "--gpu_gib", "40")
    printed = capsys.readouterr().out
    assert "26.6" in printed and "10.58" in printed and "does not fit 40 GiB" in printed
