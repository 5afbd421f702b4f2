"""The passes of a block: gradients, the plain forms, and Triton's kernels on a GPU or by its interpreter."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from triton_scripts import check

from pisces_rl.policy.fast.kernels import (
    modulated_norm,
    modulated_norm_backward,
    rotated_heads,
    rotated_heads_backward,
)
from pisces_rl.policy.fast.linear import NormProduct
from pisces_rl.policy.fast.products import fuse_products, unfuse_products
from pisces_rl.policy.fast.wan_block import FewPassesWanBlock, _NormHeads, _RotatedHeads


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def angles(length: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angle = draw(length, size // 2, dtype=dtype).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("summed", ["nothing", "y", "gate * y"])
@pytest.mark.parametrize("lora, gelu", [(True, False), (False, True), (True, True)])
def test_the_gradient_of_a_norm_and_its_product(summed, lora, gelu):
    torch.manual_seed(0)
    x, y, gate, scale, shift = draw(2, 3, 4), draw(2, 3, 4), draw(2, 4), draw(2, 4), draw(2, 4)
    gate, y = gate if summed == "gate * y" else None, None if summed == "nothing" else y
    weight, bias, a, b = draw(5, 4), draw(5), draw(2, 4), draw(5, 2)
    if not lora:
        a = b = None

    def plain(x, y, a, b):
        total = x if y is None else x + (y if gate is None else gate[:, None] * y)
        n = F.layer_norm(total, (4,), eps=1e-6) * scale[:, None] + shift[:, None]
        out = F.linear(n, weight, bias) + (0 if a is None else n @ a.T @ b.T)
        return total, F.gelu(out, approximate="tanh") if gelu else out

    def ours(x, y, a, b):
        total, out = NormProduct.apply(x, y, gate, scale, shift, 1e-6, weight, bias, a, b, gelu)
        return total, out.view(2, 3, 5)

    inputs = [t if t is None else t.requires_grad_() for t in (x, y, a, b)]
    for mine, theirs in zip(ours(*inputs), plain(*inputs)):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(ours, inputs)


def test_the_gradient_of_rotated_heads():
    torch.manual_seed(0)
    qkv, weight_q, weight_k = draw(2, 3, 3 * 2 * 4).requires_grad_(), draw(8), draw(8)
    cos, sin = angles(3, 4)
    assert torch.autograd.gradcheck(
        lambda qkv: _RotatedHeads.apply(qkv, weight_q, weight_k, cos, sin, 1e-6, torch.float64), qkv
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_gradient_of_heads_after_a_norm(lora):
    torch.manual_seed(0)
    x, scale, shift = draw(2, 3, 8), draw(2, 8), draw(2, 8)
    weight, bias, a, b = draw(24, 8), draw(24), draw(2, 8), draw(24, 2)
    if not lora:
        a = b = None
    last = (draw(8), draw(8), *angles(3, 4), 1e-6, torch.float64)

    def apart(x, a, b):
        x, qkv = NormProduct.apply(x, None, None, scale, shift, 1e-6, weight, bias, a, b, False)
        return x, *_RotatedHeads.apply(qkv.view(2, 3, 24), *last)

    def ours(x, a, b):
        return _NormHeads.apply(x, scale, shift, 1e-6, weight, bias, a, b, *last)

    inputs = [t if t is None else t.requires_grad_() for t in (x, a, b)]
    for mine, theirs in zip(ours(*inputs), apart(*inputs)):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(ours, inputs)


def test_the_operators_pass_opcheck():
    torch.manual_seed(0)
    x, y, gate, scale, shift, a = (
        draw(*s, dtype=torch.float32) for s in ((2, 3, 8), (2, 3, 8), *[(2, 8)] * 3, (2, 8))
    )
    qkv, weight, (cos, sin) = draw(2, 3, 24, dtype=torch.float32), scale[0], angles(3, 4, torch.float32)
    heads, b = draw(2, 3, 2, 4, dtype=torch.float32), draw(24, 2, dtype=torch.float32)
    for operator, arguments in (
        (modulated_norm, (x, y, gate, scale, shift, 1e-6, a, torch.float32)),
        (modulated_norm, (x, None, None, scale, shift, 1e-6, None, torch.bfloat16)),
        (modulated_norm_backward, (x, y, x.flatten(0, 1), gate, scale, 1e-6)),
        (rotated_heads, (qkv, weight, weight, cos, sin, 1e-6, torch.float32)),
        (rotated_heads_backward, (qkv, heads, heads, heads, weight, weight, cos, sin, 1e-6, None)),
        (rotated_heads_backward, (qkv, heads, heads, heads, weight, weight, cos, sin, 1e-6, b)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("change", [None, "a timestep a token", "trained norm", "trained modulation", "no norm"])
def test_a_block_equals_diffusers(change):
    """In fewer passes if the block allows it, else as diffusers does, with all gradients."""
    torch.manual_seed(0)
    block = WanTransformerBlock(16, 32, 2, cross_attn_norm=change != "no norm").requires_grad_(False)
    x, text = draw(2, 5, 16, dtype=torch.float32).requires_grad_(), draw(2, 3, 16, dtype=torch.float32)
    temb = draw(2, *((5,) if change == "a timestep a token" else ()), 6, 16, dtype=torch.float32)
    rotary = tuple(part[None, :, None] for part in angles(5, 8, torch.float32))
    trained = {"trained norm": next(block.norm2.parameters(), None), "trained modulation": temb}.get(change)
    if trained is not None:
        trained.requires_grad_()
    wanted = [x] if trained is None else [x, trained]
    expected = block(x, text, temb, rotary)
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    fuse_products(block)
    assert type(block) is FewPassesWanBlock and block._is_usual(temb) == (change is None)
    ours = block(x, text, temb, rotary)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(torch.autograd.grad(ours.square().sum(), wanted), gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    unfuse_products(block)
    assert type(block) is WanTransformerBlock
    torch.testing.assert_close(block(x, text, temb, rotary), expected, rtol=0, atol=0)


def test_bf16_products_on_a_cpu_read_no_uninitialised_memory():
    """They read on behind a row's end: what lies there must be a number."""
    torch.manual_seed(0)
    for _ in range(20):
        rubbish = torch.full((22, 192), torch.nan, dtype=torch.bfloat16)
        x, scale, a = (draw(*s, dtype=torch.bfloat16) for s in ((2, 11, 144), (2, 144), (5, 144)))
        del rubbish
        joined = modulated_norm(x, None, None, scale.float(), scale.float(), 1e-6, a, torch.bfloat16)[1]
        assert joined.isfinite().all()


SCRIPT = """
    import sys
    import torch
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock
    from pisces_rl.policy.fast import kernels
    from pisces_rl.policy.fast.products import fuse_products
    device = sys.argv[1]
    torch.manual_seed(0)

    def both(operator, *arguments):
        results = []
        for served in (False, True):
            kernels.serves = lambda x: served
            out = operator(*arguments)
            results.append(out if isinstance(out, tuple) else (out,))
        return results

    def close(pairs, dtype):
        tolerance = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
        for plain, ours in zip(*pairs):
            assert plain.dtype == ours.dtype and plain.stride() == ours.stride()
            torch.testing.assert_close(ours, plain, **tolerance)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(device, dtype)

    full, half = torch.float32, torch.bfloat16
    for dtype, out in ((full, full), (half, half), (full, half)):
        for batch, length, width in ((2, 11, 48), (1, 3, 1536), (3, 1, 64)):
            x, y, grad, grad_n = (draw(batch, length, width, dtype=dtype) for _ in range(4))
            table = draw(batch, 6, width)
            scale, shift, gate = table[:, 1], table[:, 2], table[:, 4]
            a = draw(5, width, dtype=out) / width
            close(both(kernels.modulated_norm, x, None, None, scale, shift, 1e-6, a, out), out)
            close(both(kernels.modulated_norm, x, y, gate, scale, shift, 1e-6, a, out), out)
            one = scale[:1].expand(batch, -1)
            close(both(kernels.modulated_norm, x, y, None, one, one, 1e-6, None, out), out)
            grad_n = grad_n.flatten(0, 1).to(out)
            close(both(kernels.modulated_norm_backward, x, grad, grad_n, gate, scale, 1e-6), dtype)
            close(both(kernels.modulated_norm_backward, x, grad, grad_n, None, one, 1e-6), dtype)
        for batch, length, heads, size in ((2, 11, 3, 16), (1, 9, 12, 128), (3, 1, 1, 4)):
            qkv = draw(batch, length, 3 * heads * size, dtype=out)
            weight_q, weight_k = draw(2, heads * size, dtype=dtype)
            angle = draw(length, size // 2).repeat_interleave(2, -1)
            cos, sin = angle.cos(), angle.sin()
            grads = [draw(batch, heads, length, size, dtype=out).transpose(1, 2) for _ in range(3)]
            close(both(kernels.rotated_heads, qkv, weight_q, weight_k, cos, sin, 1e-6, out), out)
            b = draw(3 * heads * size, 5, dtype=out) / size
            for b in (None, b):
                close(both(kernels.rotated_heads_backward, qkv, *grads, weight_q, weight_k, cos, sin, 1e-6, b), out)

    block = SkyReelsV2TransformerBlock(16, 32, 2, cross_attn_norm=True).requires_grad_(False).to(device)
    fuse_products(block)
    angle = draw(1, 5, 1, 4).repeat_interleave(2, -1)
    x = draw(2, 16, 5).transpose(1, 2).requires_grad_()  # as the patches of a video come
    inputs = draw(2, 3, 16), draw(2, 6, 16), (angle.cos(), angle.sin())

    def run(x):
        out = block(x, *inputs, None)
        return out, *torch.autograd.grad(out.square().sum(), x)

    close(both(run, x), full)
    print("agree")
"""


def test_the_kernels_agree_with_plain_torch(tmp_path):
    check(SCRIPT, tmp_path)
