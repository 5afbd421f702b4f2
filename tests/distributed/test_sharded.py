"""Two real processes (accelerate launch, gloo, CPU) with FSDP2 equal one process without."""

from pathlib import Path

import pytest
import scenarios
import torch
from comparisons import (
    assert_equal_ranks,
    assert_equal_rewards_move_nothing,
    assert_equals_one,
    assert_evaluated_as_one,
    assert_resumed,
    numbers,
    one_process,
    start,
)
from diffusers import WanTransformer3DModel
from processes import accelerate
from safetensors.torch import load_file
from scenarios import tiny_runs

EQUAL_ONE = ["split_group", "backpropagated", "full"]
FULL = {
    "full_idle": 1e-6,
    "full_expert": 1e-6,
    "full_experts": 1e-6,
    "full_evaluated": 1e-6,
    "full_compiled": 1e-6,
    "full_backpropagated": 1e-6,
    "full_half": 5e-5,
    "full_twice": 1e-4,
}  # AdamW makes much of little gradients
FULL_BESIDES = ["full_resumed", "full_stopped", "full_uninterrupted", "full_resumed_elsewhere", "full_unequal_texts"]
SLOW = ["whole_groups", "idle_rank", "distilled", "accumulated", "backpropagated_k2", "compiled"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    result = accelerate(
        scenarios.__file__, folder, *EQUAL_ONE, "parts_of_weights", "full_parts", "unequal_texts", timeout=500
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    result = accelerate(
        scenarios.__file__,
        folder,
        *SLOW,
        "resumed",
        "evaluated",
        "half_precision",
        "fp8",
        "no_spread",
        "full_no_spread",
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


def test_each_process_holds_about_half_of_the_weights(sharded):
    held = [numbers(sharded, "parts_of_weights", rank)["held"] for rank in (0, 1)]
    whole = numbers(sharded, "parts_of_weights")["whole"]
    assert sum(held) == whole and all(0.45 * whole < own < 0.55 * whole for own in held)
    assert not numbers(sharded, "parts_of_weights")["sharded_adapter"]


def test_each_process_holds_about_half_of_each_copy_of_all_weights(sharded):
    """Of full fine-tuning: weights, gradients, optimizer states, average, and the reference in the host's memory."""
    assert_halves(sharded)


def assert_halves(folder: Path) -> None:
    first, second = (numbers(folder, "full_parts", rank) for rank in (0, 1))
    assert first["held"].keys() == {"weights", "gradients", "states", "reference", "average"}
    for name, own in first["held"].items():
        assert own + second["held"][name] == first["whole"] and 0.45 < own / first["whole"] < 0.55, name


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_sharded_processes_equal_one(sharded, name):
    assert_equal_ranks(sharded, name)
    assert_equals_one(sharded, name, scenarios.METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_sharded_processes_equal_one(more, name):
    assert_equal_ranks(more, name)
    assert_equals_one(more, name, scenarios.METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no_spread", "full_no_spread"])
def test_equal_rewards_move_nothing(more, name):
    assert_equal_ranks(more, name)
    assert_equal_rewards_move_nothing(more, name)


@pytest.mark.slow
def test_a_sharded_run_resumes(more):
    assert_resumed(more)


@pytest.mark.slow
def test_evaluation_of_few_prompts_equals_that_of_one_process(more):
    """A process without a prompt samples together with the other and scores nothing."""
    assert_evaluated_as_one(more)


def test_processes_with_texts_of_unequal_lengths_make_the_same_calls(sharded):
    for rank in (0, 1):
        result = numbers(sharded, "unequal_texts", rank)
        assert result["videos"] < 1e-4 and result["log_probs"] < 1e-4
        assert max(float(g.abs().max()) for g in load_file(sharded / f"unequal_texts_{rank}.safetensors").values()) > 0


@pytest.mark.slow
def test_weights_of_two_dtypes_are_sharded(more):
    assert_equal_ranks(more, "half_precision")


@pytest.mark.slow
def test_an_fp8_base_is_sharded(more):
    """Sums in another order fall on the other side of a step of e4m3 here and there: the gradient turns a little."""
    assert_equal_ranks(more, "fp8")
    one, two = one_process("fp8"), load_file(more / "fp8_0.safetensors")
    assert numbers(more, "fp8")["reward"] == pytest.approx(one["reward"], rel=1e-3)
    a, b = (torch.cat([(weights[k] - one["before"][k]).flatten() for k in two]) for weights in (one["weights"], two))
    assert float(a @ b / (a.norm() * b.norm())) > 0.9


@pytest.mark.slow
def test_gathered_weights_may_be_kept(tmp_path):
    result = accelerate(scenarios.__file__, tmp_path, "split_group", timeout=300, fsdp_reshard_after_forward=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_equals_one(tmp_path, "split_group")


@pytest.mark.slow
def test_methods_with_sharded_weights_equal_one_process(tmp_path):
    """Also an old policy, an average and a reference; a process whose rewards are equal; a window for each prompt."""
    names = ["nft", "awm", "rvm", "flow_dpo", "flash_grpo_halves"]
    result = accelerate(scenarios.__file__, tmp_path, *names, timeout=500)
    assert result.returncode == 0, result.stdout[-5000:]
    for name in names:
        assert_equal_ranks(tmp_path, name)
        assert_equals_one(tmp_path, name, [m for m in scenarios.METRICS if name != "rvm" or "velocity" not in m])


# --- two GPUs, over NCCL ---

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ON_GPUS = ["split_group", "nft", "full", "full_idle"]


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PISCES_RL_TESTS_ON", "cuda")
        result = accelerate(scenarios.__file__, folder, *ON_GPUS, "full_resumed", "full_parts", timeout=300)
        assert result.returncode == 0, result.stdout[-5000:]
        yield folder


@TWO_GPUS
@pytest.mark.parametrize("name", ON_GPUS)
def test_two_gpus_equal_one(on_gpus, name):
    """Equal up to fp32 rounding, at most a hundredth of what was learned."""
    assert_equal_ranks(on_gpus, name)
    one, two = one_process(name)["weights"], load_file(on_gpus / f"{name}_0.safetensors")
    learned = tiny_runs.largest_difference(one, start(full=name.startswith("full")))
    assert tiny_runs.largest_difference(one, two) < 1e-2 * learned


@TWO_GPUS
def test_all_weights_on_two_gpus_resume(on_gpus):
    """To the bit; and each holds about half of every copy."""
    for rank in (0, 1):
        assert numbers(on_gpus, "full_resumed", rank)["difference"] == 0
    assert_halves(on_gpus)


# --- full fine-tuning ---


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    scenarios.run("full_stopped", folder)  # by one process
    result = accelerate(scenarios.__file__, folder, *FULL, *FULL_BESIDES, timeout=580)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_all_weights_train_as_in_one_process(full, name):
    """An idle process, several backwards, clipping, experts, autocast, compiled blocks, the other trainer."""
    one = one_process(name)
    assert_equal_ranks(full, name)
    assert tiny_runs.largest_difference(one["weights"], load_file(full / f"{name}_0.safetensors")) < FULL[name]
    if "expert" not in name:
        assert tiny_runs.largest_difference(one["weights"], start(full=True)) > 10 * FULL[name]
    for key in scenarios.METRICS if FULL[name] == 1e-6 else ():
        assert numbers(full, name)[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key
    for own, expected in zip(numbers(full, name).get("norms", []), one.get("norms", []), strict=True):
        assert own == pytest.approx(expected, rel=1e-4)
    if name == "full_idle":
        assert min(numbers(full, name)["grad_norm"]) > 2e-2  # it is clipped at half of that
    if name == "full_evaluated":
        assert numbers(full, name)["eval"] == pytest.approx(one["eval"], rel=1e-5)
        assert numbers(full, name)["best"] == one["best"]
        assert (full / "full_evaluated_2" / "samples" / "before_after_eval.png").exists()


@pytest.mark.slow
def test_all_weights_with_texts_of_unequal_lengths(full):
    for rank in (0, 1):
        result = numbers(full, "full_unequal_texts", rank)
        assert result["videos"] < 1e-4 and result["log_probs"] < 1e-4
    assert_equal_ranks(full, "full_unequal_texts")


@pytest.mark.slow
def test_a_run_of_all_weights_resumes(full):
    """To the bit: NFT with its old policy between rollouts, and GRPO inside the use of one."""
    for rank in (0, 1):
        assert numbers(full, "full_resumed", rank)["difference"] == 0
    whole = load_file(full / "full_uninterrupted_0.safetensors")
    assert tiny_runs.largest_difference(whole, load_file(full / "full_resumed_elsewhere_0.safetensors")) == 0


@pytest.mark.slow
def test_checkpoints_of_all_weights_of_one_process_and_of_two_mean_the_same(full):
    """Two processes resume what one saved, and one what two saved."""
    here, there = scenarios.run("full_resumed_elsewhere", full), numbers(full, "full_resumed_elsewhere")
    assert max(here["difference"], there["difference"]) < 1e-4
    assert tiny_runs.largest_difference(here["weights"], one_process("full_uninterrupted")["weights"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_expert", "full_experts"])
def test_saved_components_of_sharded_weights_load_in_plain_diffusers(full, name):
    """To the bit, and of the classes that they had before; the frozen expert is not saved."""
    trained, loaded = load_file(full / f"{name}_0.safetensors"), {}
    for component in sorted({key.split(".")[0] for key in trained}):
        denoiser = WanTransformer3DModel.from_pretrained(full / f"{name}_2", subfolder=component)
        loaded |= {f"{component}.{key}": value.detach() for key, value in denoiser.named_parameters()}
    assert tiny_runs.largest_difference(trained, loaded) == 0
    assert numbers(full, name)["files"] == one_process(name)["files"]
    assert not any("FSDP" in path.read_text() for path in (full / f"{name}_2").rglob("*.[jm][sd]*"))
