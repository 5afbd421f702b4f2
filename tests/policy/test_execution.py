"""Compiled blocks and fused products compute what the plain denoiser computes, the same in sampling and update."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from policy.adapted import build
from policy.test_replay_parity import PROMPTS
from tiny_pipelines import BUILD, CALLS, quiet
from torch import nn
from torch._dynamo.utils import counters

from pisces_rl.policy import (
    PolicyError,
    VideoPolicy,
    adapters_off,
    add_lora,
    check_saved_lora,
    default_lora_config,
    save_lora,
    without_adapters,
)
from pisces_rl.policy.fast.execution import CompiledBlock, compile_blocks, repeated_blocks, uncompile_blocks
from pisces_rl.policy.fast.linear import OneProductGELU, OneProductLinear, Product, gelu_product
from pisces_rl.policy.fast.products import fuse_products, unfuse_products


def run(policy: VideoPolicy, parameters: dict, rows=(0, 1)) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Log-probs, the largest error of the replay, gradients."""
    for parameter in parameters.values():
        parameter.grad = None
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1], output_type="latent")
    errors = []

    def visit(step):
        old = rollout.log_probs[step.rows, rollout.steps.index(step.index)]
        errors.append(float((step.log_prob.detach() - old).abs().max()))
        step.log_prob.sum().backward()

    policy.replay(rollout, rows, visit)
    return rollout.log_probs, max(errors), torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize(
    "recompute",
    [
        pytest.param("nothing", marks=pytest.mark.slow),
        "all_but_attention",
        pytest.param("everything", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_are_one_graph_for_sampling_and_update(recompute):
    policy, parameters = build("wan")
    log_probs, _, gradient = run(policy, parameters)
    torch._dynamo.reset()
    counters.clear()
    policy.compile_blocks(recompute, backend="aot_eager")
    compiled = run(policy, parameters)
    assert counters["stats"]["unique_graphs"] == 1  # both blocks, with gradients and without
    assert compiled[1] == 0
    torch.testing.assert_close(compiled[0], log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled[2], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def kept(recompute: str) -> int:
    """Bytes that a block with LoRA keeps for backward, compiled as inductor divides its graph; without its weights and
    states of random numbers."""
    policy, _ = build("wan")
    torch._dynamo.reset()
    policy.compile_blocks(recompute, backend="aot_eager_decomp_partition")
    block, found = policy.denoiser["transformer"].blocks[0], []
    run = vars(block)["forward"].run

    def spied(*args, **kwargs):
        output = run(*args, **kwargs)
        weights = {parameter.data_ptr() for parameter in block.parameters()}
        tensors = [t for t in output.grad_fn.saved_tensors if isinstance(t, torch.Tensor) and t.dtype != torch.uint8]
        saved = {t.data_ptr(): t.nbytes for t in tensors}
        found.append(sum(size for pointer, size in saved.items() if pointer not in weights))
        return output

    vars(block)["forward"].run = spied
    policy.sample(PROMPTS, noise_seeds=[1, 2], output_type="latent")
    return found[-1]


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept():
    everything, but_attention, nothing = (kept(r) for r in ("everything", "all_but_attention", "nothing"))
    assert everything < but_attention < nothing, (everything, but_attention, nothing)
    assert everything < nothing / 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ltx", "hunyuan", "mochi", "skyreels", "cogvideox"])
def test_families_compile(family):
    policy, parameters = build(family)
    log_probs, _, gradient = run(policy, parameters)
    torch._dynamo.reset()
    policy.compile_blocks(backend="aot_eager")
    compiled = run(policy, parameters)
    assert compiled[1] == 0
    torch.testing.assert_close(compiled[0], log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled[2], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_a_denoiser_without_repeated_blocks_says_so():
    policy, _ = build("t2v_sd")
    with pytest.raises(PolicyError, match="UNet3DConditionModel lists no repeated blocks.*leave torch_compile off"):
        policy.compile_blocks()


@pytest.mark.slow
def test_a_block_that_is_no_graph_says_so():
    policy, parameters = build("ltx2")
    torch._dynamo.reset()
    policy.compile_blocks("nothing", backend="eager")
    with pytest.raises(PolicyError, match="LTX2VideoTransformerBlock cannot be compiled.*leave torch_compile off"):
        run(policy, parameters)


def test_the_reference_and_a_fresh_pipeline_are_the_plain_ones():
    policy, parameters = build("wan")
    with adapters_off(policy):
        reference = policy.sample(PROMPTS, noise_seeds=[1, 2], output_type="pt").videos
    before = set(policy.denoiser.state_dict())
    policy.compile_blocks(backend="aot_eager")
    assert set(policy.denoiser.state_dict()) == before
    with adapters_off(policy):
        compiled = policy.sample(PROMPTS, noise_seeds=[1, 2], output_type="pt").videos
    torch.testing.assert_close(compiled, reference, rtol=1e-4, atol=1e-5)
    fresh = without_adapters(policy.pipeline).transformer
    assert not any(isinstance(vars(m).get("forward"), CompiledBlock) for m in fresh.modules())
    assert not any(isinstance(m, (OneProductGELU, OneProductLinear)) for m in fresh.modules())
    assert any(isinstance(vars(m).get("forward"), CompiledBlock) for m in policy.denoiser.modules())


def test_a_saved_adapter_is_compared_without_the_compiler_s_rounding(tmp_path):
    policy, _ = build("wan")
    save_lora(policy.pipeline, tmp_path)
    policy.compile_blocks(backend="aot_eager")
    before = [(type(m), vars(m).get("forward")) for m in policy.denoiser.modules()]
    call = {"prompt": ["a video"], "num_inference_steps": 2} | CALLS["wan"]
    assert check_saved_lora(policy.pipeline, tmp_path, call, 1e-6) < 1e-6
    assert [(type(m), vars(m).get("forward")) for m in policy.denoiser.modules()] == before


def test_blocks_are_found_and_let_go():
    policy, _ = build("wan")
    transformer = policy.denoiser["transformer"]
    assert repeated_blocks(transformer) == list(transformer.blocks)
    assert compile_blocks(transformer, backend="aot_eager") == len(transformer.blocks)
    uncompile_blocks(transformer)
    assert not any("forward" in vars(block) for block in transformer.blocks)


@pytest.mark.parametrize("family", ["wan", "skyreels", "ltx", "cogvideox"])
def test_fused_products_are_peft_s_and_diffusers_own(family):
    policy, parameters = build(family)
    log_probs, _, gradient = run(policy, parameters)
    classes = [type(module) for module in policy.denoiser.modules()]
    assert fuse_products(policy.denoiser["transformer"]) > 0
    fused = run(policy, parameters)
    assert fused[1] == 0
    torch.testing.assert_close(fused[0], log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused[2], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    unfuse_products(policy.denoiser["transformer"])
    assert [type(module) for module in policy.denoiser.modules()] == classes
    assert torch.equal(run(policy, parameters)[2], gradient)


def test_a_switched_off_or_second_adapter_takes_peft_s_own_path():
    policy, _ = build("wan")
    transformer = policy.denoiser["transformer"]
    layer = transformer.blocks[0].attn1.to_q
    x = torch.randn(2, 5, layer.in_features)
    plain, base = layer(x), layer.get_base_layer()(x)
    fuse_products(transformer)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    with adapters_off(policy):
        torch.testing.assert_close(layer(x), base)
    merged = copy.deepcopy(layer)
    merged.merge()
    torch.testing.assert_close(merged(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("gelu, bias", [(False, False), (False, True), (True, True)])  # those with a GELU have a bias
def test_the_gradient_of_a_product(gelu, lora, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    a, b = (torch.randn(2, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)) if lora else (None, None)
    inputs = [t.requires_grad_() for t in (x, a, b) if t is not None]
    plain = F.linear(x, weight, shift) + (x @ a.T @ b.T if lora else 0)
    plain = F.gelu(plain, approximate="tanh") if gelu else plain
    torch.testing.assert_close(Product.apply(x, weight, shift, a, b, gelu), plain)
    assert torch.autograd.gradcheck(
        lambda x, *ab: Product.apply(x, weight, shift, *(ab or (None, None)), gelu), inputs
    )


def test_the_gelu_operator_is_the_tanh_form():
    layer = nn.Linear(6, 7)
    x = torch.randn(4, 6)
    expected = F.gelu(layer(x), approximate="tanh")
    torch.testing.assert_close(gelu_product(x, layer.weight, layer.bias), expected)
    torch.library.opcheck(gelu_product, (x, layer.weight.detach(), layer.bias.detach()))


def test_attention_kernels_are_named():
    with pytest.raises(PolicyError, match="attention_kernel='fast' must be one of"):
        VideoPolicy(quiet(BUILD["wan"]()), attention_kernel="fast")
    policy, parameters = build("wan")
    expected = run(policy, parameters)[0]
    policy.attention_kernel = "math"
    torch.testing.assert_close(run(policy, parameters)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["efficient", "math", "flash"])
def test_gradient_checkpointing_computes_again_by_the_same_attention_kernel(kernel):
    policy, parameters = build("wan")
    policy.attention_kernel = kernel
    expected = run(policy, parameters)[2]
    policy.activation_checkpointing_enable()
    assert torch.equal(run(policy, parameters)[2], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_device():
    """As many waits in eight steps as in four, sampled and scored again with gradients."""
    pipe = quiet(BUILD["wan"]()).to("cuda")
    add_lora({"transformer": pipe.transformer}, default_lora_config(4))

    def waits(steps: int) -> int:
        policy = VideoPolicy(pipe, num_inference_steps=steps, pipeline_kwargs=CALLS["wan"])
        trained = list(range(steps - 1))
        kwargs = dict(noise_seeds=[1, 2], step_seeds=[3, 4], steps=trained, output_type="latent")
        policy.sample(PROMPTS, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rollout = policy.sample(PROMPTS, **kwargs)
                policy.replay(rollout, [0, 1], lambda step: step.log_prob.sum().backward())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    assert waits(8) == waits(4)
