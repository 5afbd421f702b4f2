"""Shared settings: offline, one thread a process, tiny real pipelines."""

import gc
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

sys.path.insert(0, str(Path(__file__).parent))

PARITY_FILE = Path(__file__).parents[1] / "outputs" / "replay_parity"


def pytest_configure(config):
    """The process that distributes the tests over others (-n) runs none, so it imports neither torch nor diffusers,
    for which the others would wait."""
    if not config.getoption("numprocesses", None):
        import torch

        torch.set_num_threads(1)
        skip_search_for_group_offloading()


def skip_search_for_group_offloading():
    """Pipelines ask every module for its group offloading each time that they need their device, which takes a
    tenth of a tiny run's time. Skip the search until a hook of that kind exists."""
    from diffusers.hooks import group_offloading

    made, begin = [], group_offloading.GroupOffloadingHook.__init__
    look = group_offloading._get_top_level_group_offload_hook

    def begin_counted(hook, *args, **kwargs):
        made.append(True)
        begin(hook, *args, **kwargs)

    group_offloading.GroupOffloadingHook.__init__ = begin_counted
    group_offloading._get_top_level_group_offload_hook = lambda module: look(module) if made else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """AnimateDiff's is the slowest of the tiny pipelines; TextToVideoSD is another UNet that predicts epsilon."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("family") == "animatediff":
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    forget_what_lives()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        forget_what_lives()


def forget_what_lives():
    """Exclude the objects of torch, diffusers and transformers from garbage collection: accelerate collects once per
    run, which was 40 % of a tiny run's time. Called again for each file, since its tests import more of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def parity_results():
    """Rows of the replay-parity suite, written as JSON when the session ends."""
    rows = []
    yield rows
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    PARITY_FILE.mkdir(parents=True, exist_ok=True)
    (PARITY_FILE / f"{worker}.json").write_text(json.dumps(rows, indent=1))


@pytest.fixture
def absent_weights_are_nan(monkeypatch):
    """On a CPU host and device share memory: NaN in offloaded weights exposes every use that was not announced."""
    import torch

    from pisces_rl.policy.pipeline.offload import Part

    leave, begin = Part.leave, Part.__init__

    def leave_nan(part):
        leave(part)
        if not part.is_resident:
            for parameter in part.frozen:
                if parameter.is_floating_point():
                    parameter.data = torch.full_like(parameter, torch.nan)

    def begin_nan(part, *args):
        begin(part, *args)
        part.leave()

    monkeypatch.setattr(Part, "leave", leave_nan)
    monkeypatch.setattr(Part, "__init__", begin_nan)
