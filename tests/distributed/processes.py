"""Starting processes that may hang: all of them are ended when time runs out, so that a hang is a failure."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import yaml
from trainers import tiny_runs


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return os.environ | own | ({} if tiny_runs.on_gpus() else {"CUDA_VISIBLE_DEVICES": ""})


def together(script: str, *arguments: str, timeout: float) -> list[subprocess.CompletedProcess]:
    """Run the script in two unsupervised processes, as on two machines: when one ends, the other runs on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, script, *arguments]
    common = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(command, p.returncode, output) for p, output in zip(processes, outputs)]


def accelerate(script: str, folder: Path, *names: str, timeout: float, **fsdp) -> subprocess.CompletedProcess:
    """`accelerate launch script folder names` with FSDP2 on two processes; `fsdp` changes its settings."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_machines": 1,
        "use_cpu": not tiny_runs.on_gpus(),
        "num_processes": 2,
        "mixed_precision": "no",
        "main_process_port": 0,
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True} | fsdp,
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    return launch(folder / "accelerate.yaml", script, str(folder), *names, timeout=timeout)


def launch(file: Path, *command: str, timeout: float) -> subprocess.CompletedProcess:
    """`accelerate launch --config_file file command`."""
    return run("accelerate.commands.launch", "--config_file", str(file), *command, timeout=timeout)


def torchrun(script: str, folder: Path, *names: str, timeout: float) -> subprocess.CompletedProcess:
    """`torchrun script folder names` on two processes."""
    return run(
        "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(folder), *names, timeout=timeout
    )


def run(module: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """`python -m module arguments`, with what it and its children print as stdout.

    When time runs out, all of its descendants are killed: ranks have sessions of their own.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        output = process.communicate()[0]
        raise AssertionError(f"{module} did not end within {timeout} s:\n{output[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)
