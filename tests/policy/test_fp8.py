"""FP8 products: the values and gradients of the formulas, and the same in sampling and update."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from peft import LoraConfig, inject_adapter_in_model
from policy.adapted import build, give_adapter
from policy.test_execution import run
from torch import nn
from trainers import tiny_runs
from triton_scripts import check

from pisces_rl.assets import asset_path
from pisces_rl.policy import PolicyError, VideoPolicy, adapters_off
from pisces_rl.policy.fast import fp8, fp8_kernels
from pisces_rl.policy.fast.fp8 import FP8FeedForward, FP8Linear, FP8NormProduct, FP8Product, dequantised, quantise
from pisces_rl.policy.fast.products import fuse_products, unfuse_products
from pisces_rl.policy.lora.adapters import PRODUCTS


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def rounded(x: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """x with each row rounded to e4m3, over a factor."""
    q, scale = fp8_kernels.quantised(x, factor)
    return q.double() * scale / (1 if factor is None else factor.double())


class Rounded(torch.autograd.Function):
    """Rounds a value forward; hands the gradient on as it is."""

    @staticmethod
    def forward(ctx, x):
        return rounded(x.float())

    @staticmethod
    def backward(ctx, grad):
        return grad


class RoundedGradient(torch.autograd.Function):
    """Hands a value on; rounds its gradient times a factor."""

    @staticmethod
    def forward(ctx, y, factor):
        ctx.factor = factor
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad.float(), ctx.factor), None


def layer(out: int, width: int, lora: bool) -> tuple:
    """Bits, scales, bias, A, B, and the weight in fp64."""
    linear = nn.Linear(width, out).requires_grad_(False)
    quantise(linear)
    a, b = (draw(2, width).requires_grad_(), draw(out, 2).requires_grad_()) if lora else (None, None)
    return (linear.weight, linear.weight_scale, linear.bias, a, b), dequantised(linear).double()


def plainly(x: torch.Tensor, parameters: tuple, weight: torch.Tensor) -> torch.Tensor:
    """The formula in fp64, in which only the product with the base sees rounded values and gradients."""
    _, scale, bias, a, b = parameters
    y = RoundedGradient.apply(Rounded.apply(x) @ weight.T, scale) + bias.double()
    return y if a is None else y + x.double() @ a.double().T @ b.double().T


def assert_same(ours, theirs, inputs) -> None:
    """Values and gradients in fp32 of a scalar of both."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=1e-4)
    grads = []
    for outputs in (ours, theirs):
        torch.manual_seed(7)
        total = sum((o.double() * torch.randn(o.shape, dtype=torch.float64)).sum() for o in outputs)
        grads.append(torch.autograd.grad(total, inputs))
    for mine, other in zip(*grads):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


# --- rounding ---


def test_rows_are_rounded_by_the_least_power_of_two_that_holds_them():
    torch.manual_seed(0)
    x = draw(50, 32) * 10 ** torch.linspace(-6, 6, 50)[:, None]
    q, scale = fp8_kernels.quantised(x, None)
    assert torch.equal(scale, torch.exp2(torch.ceil(torch.log2(x.abs().amax(1, keepdim=True) / 448))))
    error = (q.float() * scale - x).abs()
    assert bool((error <= x.abs() / 16 + scale * 2**-10).all())  # half a step: of four bits, or of the least numbers
    assert torch.equal(rounded(rounded(x).float()), rounded(x))


def test_a_row_of_zeros_stays_zero_and_nan_or_inf_stays_visible():
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    q, scale = fp8_kernels.quantised(x, None)
    values = (q.float() * scale).sum(1)
    assert values[0] == 0 and not values[1:].isfinite().any()


def test_bf16_holds_a_rounded_weight_exactly():
    linear = nn.Linear(48, 32).requires_grad_(False)
    before = linear.weight.clone()
    quantise(linear)
    weight = dequantised(linear)
    assert torch.equal(weight, weight.bfloat16().float())
    assert float((weight - before).norm() / before.norm()) < 0.04
    assert linear.weight.dtype == torch.uint8 and linear.half().weight.dtype == torch.uint8
    assert torch.equal(dequantised(linear), weight) and linear.weight_scale.dtype == torch.float32


# --- products ---


@pytest.mark.parametrize("lora", [False, True])
def test_a_product(lora):
    torch.manual_seed(0)
    parameters, weight = layer(32, 48, lora)
    x = draw(5, 48).requires_grad_()
    inputs = [x, *parameters[3:]] if lora else [x]
    assert_same([FP8Product.apply(x, *parameters)], [plainly(x, parameters, weight)], inputs)


@pytest.mark.parametrize("summed", ["nothing", "y", "gate * y"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_norm_and_its_product_or_feed_forward(summed, lora, whole):
    torch.manual_seed(0)
    x, y, gate, scale, shift = draw(2, 3, 48), draw(2, 3, 48), draw(2, 48), draw(2, 48), draw(2, 48)
    gate, y = gate if summed == "gate * y" else None, None if summed == "nothing" else y
    (first, weight), (second, down) = layer(32, 48, lora), layer(16, 32, lora)
    inputs = [t.requires_grad_() for t in (x, y, *first[3:], *(second[3:] if whole else ())) if t is not None]
    total = x if y is None else x + (y if gate is None else gate[:, None] * y)
    n = F.layer_norm(total, (48,), eps=1e-6) * scale[:, None] + shift[:, None]
    theirs = plainly(n.flatten(0, 1), first, weight)
    common = x, y, gate, scale, shift, 1e-6, torch.float32
    if whole:
        theirs = plainly(F.gelu(theirs, approximate="tanh"), second, down)
        ours = FP8FeedForward.apply(*common, *first, *second)
    else:
        ours = FP8NormProduct.apply(*common, *first)
    assert_same(ours, [total, theirs], inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_may_have_any_stride(bias):
    """Expanded gradients, and inputs that are views."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).requires_grad_(False)
    quantise(linear)
    x = draw(1, 48, 5).transpose(1, 2).requires_grad_()
    y = linear(x)
    torch.testing.assert_close(y, linear(x.contiguous()))
    y.sum().backward()
    strided, x.grad = x.grad, None
    linear(x).backward(torch.ones_like(y))
    torch.testing.assert_close(strided, x.grad)


def test_the_operators_pass_opcheck():
    torch.manual_seed(0)
    z, factor = draw(5, 48), torch.exp2(torch.randint(-5, 2, (48,)).float())
    x, y, gate, scale, shift = draw(2, 3, 48), draw(2, 3, 48), draw(2, 48), draw(2, 48), draw(2, 48)
    (bits, scales, bias, a, b), _ = layer(32, 48, True)
    q, s = fp8_kernels.quantised(z, None)
    weight = bits.view(fp8_kernels.E4M3).T
    k = fp8_kernels
    for operator, arguments in (
        (k.quantised, (z, None)),
        (k.quantised, (z, factor)),
        (k.quantised_gelu, (z, True)),
        (k.quantised_gelu, (z, False)),
        (k.quantised_gelu_backward, (z, z, factor, True)),
        (k.quantised_norm, (x, y, gate, scale, shift, 1e-6, True, torch.float32)),
        (k.quantised_norm, (x, None, None, scale, shift, 1e-6, False, torch.bfloat16)),
        (k.product_with_lora, (q, weight, s, scales[None], bias, z @ a.detach().T, b.detach().T, torch.float32)),
        (k.product_with_lora, (q, weight, s, scales[None], None, None, None, torch.bfloat16)),
        (k.transposed, (bits,)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_the_kernels_are_the_plain_forms(tmp_path):
    """Equal up to the last digit of e4m3."""
    check(
        """
        import sys
        import torch
        from pisces_rl.policy.fast import fp8_kernels, kernels

        device = sys.argv[1]
        torch.manual_seed(0)
        dtype = torch.bfloat16

        def compare(operator, *arguments, error=0.0):
            # `error`: of the values before they are rounded, in a row whose scale is 2^-7 or larger.
            found = []
            for served in (True, False):
                kernels.serves = fp8_kernels.serves = lambda x, served=served: served
                found.append(operator(*arguments))
            for ours, plain in zip(*(f if isinstance(f, tuple) else (f,) for f in found)):
                if ours.dtype == fp8_kernels.E4M3:
                    difference = (ours.float() - plain.float()).abs()
                    if device == "cuda":
                        allowed = (plain.float().abs() / 8).clamp_min(2**-9) + error * 2**7
                        assert bool((difference <= allowed).all()), operator
                        assert float((difference > 0).float().mean()) < (0.1 if error else 1e-3), operator
                    else:  # the interpreter loses a rounding's carry, and subnormal numbers
                        assert float((difference > plain.float().abs() / 4 + 2**-6).float().mean()) < 0.1, operator
                else:
                    torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)

        for width in (16, 48, 64, 140):
            x, grad = (torch.randn(5, width, device=device).to(dtype) for _ in range(2))
            factor = torch.exp2(torch.randint(-9, 2, (width,), device=device).float())
            compare(fp8_kernels.quantised, x, None)
            compare(fp8_kernels.quantised, x, factor)
            for kept in (True, False):
                compare(fp8_kernels.quantised_gelu, x, kept, error=1e-3)
                compare(fp8_kernels.quantised_gelu_backward, grad, x, factor, kept, error=1e-2)
        x, y = (torch.randn(2, 5, 48, device=device).to(dtype) for _ in range(2))
        gate, scale, shift = (torch.randn(2, 48, device=device) for _ in range(3))
        compare(fp8_kernels.quantised_norm, x, y, gate, scale, shift, 1e-6, True, dtype)
        compare(fp8_kernels.quantised_norm, x, y, None, scale, shift, 1e-6, True, dtype)
        compare(fp8_kernels.quantised_norm, x, None, None, scale, shift, 1e-6, False, dtype)
        bits = torch.randint(0, 255, (70, 130), dtype=torch.uint8, device=device)
        compare(fp8_kernels.transposed, bits)
        compare(fp8_kernels.quantised, torch.randn(48, 5, device=device).to(dtype).T, None)
        compare(fp8_kernels.quantised, torch.ones(1, 1, device=device, dtype=dtype).expand(5, 48), None)
        print("agree")
    """,
        tmp_path,
    )


# --- policies ---


def quantised_policy(family: str = "wan") -> tuple[VideoPolicy, dict]:
    """The embedded model, whose widths FP8 takes, or another family's tiny one."""
    if family == "wan":
        pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        policy = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=tiny_runs.CALL | {"max_sequence_length": 16})
        parameters = give_adapter(dict(policy.denoiser.items()), std=0.02)[0]
    else:
        policy, parameters = build(family)
    policy.set_base_precision("fp8")
    return policy, parameters


@pytest.mark.parametrize(
    "family",
    [
        "wan",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ltx", "cogvideox", "mochi", "hunyuan15", "kandinsky5", "flux")
        ),
    ],
)
def test_sampling_and_update_are_one_computation(family):
    """Plain, fused and compiled; fused computes what peft and diffusers do with the same layers."""
    policy, parameters = quantised_policy(family)
    transformer = policy.denoiser["transformer"]
    plain = run(policy, parameters)
    fuse_products(transformer)
    fused = run(policy, parameters)
    unfuse_products(transformer)
    torch._dynamo.reset()
    policy.compile_blocks(backend="aot_eager")
    compiled = run(policy, parameters)
    assert plain[1] == fused[1] == compiled[1] == 0
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled[0], fused[0], rtol=1e-4, atol=1e-4)
    norm = plain[2].norm()
    assert float((fused[2] - plain[2]).norm() / norm) < 0.03 and float((compiled[2] - fused[2]).norm() / norm) < 0.03


def test_the_gradient_is_near_that_of_unquantised_weights():
    policy, parameters = quantised_policy()
    found = run(policy, parameters)[2]
    for module in list(policy.denoiser["transformer"].modules()):
        if isinstance(module, FP8Linear):
            weight = dequantised(module)
            del module.weight_scale
            module.__class__, module.weight = nn.Linear, nn.Parameter(weight, requires_grad=False)
    exact = run(policy, parameters)[2]
    assert float(found @ exact / (found.norm() * exact.norm())) > 0.95
    assert 0.85 < float(found.norm() / exact.norm()) < 1.15


def test_which_layers_and_how_much_memory():
    """The frozen projections of attention and feed-forward, one byte per weight; the LoRA stays fp32."""
    policy, parameters = quantised_policy()
    block = policy.denoiser["transformer"].blocks[0]
    layers = [name for name, module in block.named_modules() if isinstance(module, FP8Linear)]
    assert len(layers) == 10 and all(name.endswith(("base_layer", "proj", "net.2")) for name in layers)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    with adapters_off(policy):
        x = draw(2, 5, 192)
        assert torch.equal(block.attn1.to_q(x), block.attn1.to_q.get_base_layer()(x))
    policy.set_base_precision("fp8")  # again: nothing to do


def test_blocks_of_one_stream_have_their_products_in_fp8():
    for name, held in (("proj_mlp", True), ("proj_out", True), ("attn.to_q", True), ("norm.linear", False)):
        assert bool(re.fullmatch(PRODUCTS, f"single_transformer_blocks.0.{name}")) is held
    assert not re.fullmatch(PRODUCTS, "proj_out")  # behind the blocks


def test_a_saved_pipeline_has_numbers_not_bits(tmp_path):
    policy, _ = quantised_policy()
    transformer = policy.pipeline.transformer
    policy.pipeline.unload_lora_weights()
    weight = dequantised(transformer.blocks[0].ffn.net[2])
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path)
    assert torch.equal(loaded.blocks[0].ffn.net[2].weight, weight)
    assert transformer.state_dict()["blocks.0.ffn.net.2.weight"].dtype == torch.uint8  # elsewhere bits


def test_what_a_policy_refuses():
    with pytest.raises(PolicyError, match="no frozen linear attention or feed-forward projections"):
        build("latte")[0].set_base_precision("fp8")  # of width 12
    with pytest.raises(ValueError, match="base_precision='int4' must be 'fp8', or unset"):
        build("ltx")[0].set_base_precision("int4")
    policy, _ = build("ltx")
    policy.compile_blocks(backend="aot_eager")
    with pytest.raises(PolicyError, match="set it before compiling blocks"):
        policy.set_base_precision("fp8")
    policy = VideoPolicy(tiny_runs.quiet(tiny_runs.BUILD["ltx"]()), num_inference_steps=2)
    policy.pipeline.transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], use_dora=True), policy.pipeline.transformer)
    with pytest.raises(PolicyError, match="DoRA reads the base weights"):
        policy.set_base_precision("fp8")


# --- runs ---


def test_a_run_with_an_fp8_base(tmp_path):
    """It learns, replays exactly, saves an adapter that reloads, resumes to the bit, and is refused another base."""
    settings = dict(base_precision="fp8", save_strategy="steps", save_steps=1, max_steps=2)
    whole = tiny_runs.trainer(tmp_path / "whole", model="tiny-wan", **settings)
    whole.train()
    whole.save_model()
    assert max(tiny_runs.logged(whole, "replay/max_log_prob_error")) == 0
    stopped = tiny_runs.trainer(tmp_path / "part", model="tiny-wan", callbacks=[tiny_runs.StopAt(1)], **settings)
    stopped.train()
    resumed = tiny_runs.trainer(tmp_path / "part", model="tiny-wan", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert tiny_runs.largest_difference(tiny_runs.weights(whole), tiny_runs.weights(resumed)) == 0
    other = tiny_runs.trainer(tmp_path / "part", model="tiny-wan", **settings | {"base_precision": None})
    with pytest.raises(ValueError, match="was trained with another base_precision"):
        other.train(resume_from_checkpoint=True)
    identity = tmp_path / "part" / "checkpoint-2" / "policy.json"
    older = json.loads(identity.read_text())
    del older["base_precision"]  # as before there was one
    identity.write_text(json.dumps(older))
    with pytest.raises(ValueError, match="was trained with another base_precision"):
        tiny_runs.trainer(tmp_path / "part", model="tiny-wan", **settings).train(resume_from_checkpoint=True)
    whole.pipeline.unload_lora_weights()
    again = tiny_runs.trainer(tmp_path / "again", model=whole.pipeline, **settings)
    again.train()
    assert tiny_runs.logged(again, "reward")[0] == tiny_runs.logged(whole, "reward")[0]
    whole.pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match="has FP8 weights from an earlier trainer, but base_precision is unset"):
        tiny_runs.trainer(tmp_path / "other", model=whole.pipeline)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="base_precision='int4' must be 'fp8', or unset"):
        tiny_runs.config(tmp_path, base_precision="int4")
    with pytest.raises(ValueError, match="base_precision='fp8' rounds frozen weights: unset it, or train a LoRA"):
        tiny_runs.trainer(tmp_path, peft_config="full", base_precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8.9 .* A100 has 8.0"):
        fp8.check_device(torch.device("cuda"))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        fp8.check_device(torch.device("mps"))
