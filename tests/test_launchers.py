"""The files of recipes/accelerate: accelerate reads them as they are meant, and starts processes by them."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
FILES = {
    "one_gpu": (DistributedType.NO, 1),
    "ddp": (DistributedType.MULTI_GPU, 8),
    "fsdp2": (DistributedType.FSDP, 8),
    "two_nodes": (DistributedType.MULTI_GPU, 16),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 8),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 8),
}
SCRIPT = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.ones(1) * (1 + accelerator.process_index))
print(f"rank {accelerator.process_index} of {accelerator.num_processes}: {total.item():g}", flush=True)
accelerator.end_training()
"""
TRAINING = """
from datasets import Dataset
from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.rewards import temporal_smoothness

args = VideoGRPOConfig(
    output_dir={folder!r}, use_cpu=True, max_steps=1, height=32, width=32, num_frames=5, guidance_scale=1.0,
    num_inference_steps=2, per_device_train_batch_size=2, num_generations=4, report_to="none", save_strategy="no",
    pipeline_kwargs=dict(max_sequence_length=24),
)
trainer = VideoGRPOTrainer("tiny-wan", temporal_smoothness, args, Dataset.from_dict(dict(prompt=["a red circle"])))
trainer.train()
trainer.save_model()
"""


def path_of(name: str) -> str:
    return str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")


def read(name: str, *overrides: str):
    """The arguments of `accelerate launch` after the file was read."""
    return _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path_of(name), *overrides, "train.py"])
    )[0]


def test_every_file_is_tested():
    assert {path.stem for path in (ROOT / "recipes" / "accelerate").iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(path_of(name))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes) == FILES[name]
    assert not config.use_cpu and config.dynamo_config == {}  # the recipe's torch_compile compiles blocks


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_overrides_the_number_of_processes(name):
    assert read(name, "--num_processes", "2").num_processes == 2


def test_fsdp2_reaches_the_processes():
    env = prepare_multi_gpu_env(read("fsdp2"))
    assert env["ACCELERATE_USE_FSDP"] == "true" and env["FSDP_VERSION"] == "2"
    assert env["FSDP_RESHARD_AFTER_FORWARD"].lower() == "true" and env["FSDP_OFFLOAD_PARAMS"] == "false"
    assert env["FSDP_ACTIVATION_CHECKPOINTING"] == "false" and env["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_reaches_the_processes(stage):
    """`tests/distributed/test_deepspeed.py` trains by these files."""
    args = read(f"deepspeed_zero{stage}")
    args.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` sets this, too
    _, env = prepare_deepspeed_cmd_env(args)
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true" and env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false" and env["ACCELERATE_MIXED_PRECISION"] == "no"
    assert {env[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"] for what in ("PARAM", "OPTIMIZER")} == {"none"}


def test_a_two_node_launch_starts_once_per_node():
    first = read("two_nodes", "--main_process_ip", "10.0.0.1")
    second = read("two_nodes", "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
    assert (first.machine_rank, second.machine_rank) == (0, 1)
    for args in (first, second):
        prepare_multi_gpu_env(args)  # which fills in torchrun's arguments
        assert (args.nproc_per_node, args.nnodes, args.rdzv_endpoint) == ("8", "2", "10.0.0.1:29500")


def launched(folder: Path, name: str, *overrides: str, code: str = SCRIPT, fails: bool = False) -> str:
    script = folder / "script.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        path_of(name),
        *overrides,
        str(script),
    ]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end within 120 s:\n{process.communicate()[0][-3000:]}") from None
    assert bool(process.returncode) == fails, output[-3000:]
    return output


@pytest.mark.slow
def test_one_gpu_starts_one_process(tmp_path):
    assert "rank 0 of 1: 1" in launched(tmp_path, "one_gpu", "--cpu")


@pytest.mark.slow
def test_ddp_starts_processes_that_see_each_other(tmp_path):
    """Two, on a CPU: gloo in NCCL's place."""
    output = launched(tmp_path, "ddp", "--num_processes", "2", "--main_process_port", "0")
    assert "rank 0 of 2: 3" in output and "rank 1 of 2: 3" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_processes_that_do_not_see_each_other_do_not_train(tmp_path, name):
    """Without a GPU and without use_cpu, accelerate lets each run on its own: two runs in one folder."""
    code = "from pisces_rl import VideoGRPOConfig\nVideoGRPOConfig(output_dir='run', report_to='none')\n"
    output = launched(tmp_path, name, "--num_processes", "2", "--main_process_port", "0", code=code, fails=True)
    assert "2 processes were launched, but no GPU was found, so they do not form a group" in output


@pytest.mark.slow
def test_fsdp2_trains(tmp_path):
    """From the file itself, on two processes of a CPU."""
    output = launched(
        tmp_path,
        "fsdp2",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        code=TRAINING.format(folder=str(tmp_path)),
    )
    assert "2 x cpu" in output and "read back, equal to the trained one" in output


@pytest.mark.slow
def test_two_nodes_meet(tmp_path):
    """Both commands on one machine, a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def node(rank: str) -> str:
        folder = tmp_path / rank
        folder.mkdir()
        own = "--machine_rank", rank, "--main_process_port", port
        return launched(folder, "two_nodes", "--num_processes", "2", *own)

    with ThreadPoolExecutor(2) as both:
        first, second = both.map(node, "01")
    assert "rank 0 of 2: 3" in first and "rank 1 of 2: 3" in second
