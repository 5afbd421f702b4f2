"""Compare the adapter's gradient on an FP8 base with that on a bf16 base, and separate the rounding in backward.

    python benchmarks/fp8_gradient.py            # Wan 2.1 1.3B at full size with random weights, one GPU
    python benchmarks/fp8_gradient.py --tiny     # the same code on a CPU

The gradient is of the difference of two videos' log-probs over three of four steps, for the adapter of speed.py.
"bf16 backward" multiplies unrounded gradients by the rounded weights in bf16.
"""

import argparse

import torch
from speed import adapted_wan
from torch import Tensor

from pisces_rl.policy import VideoPolicy, lora_parameters
from pisces_rl.policy.fast import fp8
from pisces_rl.policy.fast.products import fuse_products


def gradient(args, device: str, precision: str | None) -> dict[str, Tensor]:
    pipe = adapted_wan(args, torch.float32 if args.tiny else torch.bfloat16, device)
    size = dict(height=16, width=16, num_frames=9) if args.tiny else dict(height=240, width=416, num_frames=33)
    policy = VideoPolicy(
        pipe,
        transition="flow_sde",
        num_inference_steps=4,
        attention_kernel=None if args.tiny else "cudnn",
        pipeline_kwargs=dict(guidance_scale=5.0, max_sequence_length=512, **size),
        autocast_dtype=None if args.tiny else torch.bfloat16,
    )
    policy.set_base_precision(precision)
    fuse_products(pipe.transformer)
    rollout = policy.sample(["a", "b"], noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1, 2], output_type="latent")
    sign = torch.tensor([1.0, -1.0], device=device)
    policy.replay(rollout, [0, 1], lambda step: (step.log_prob * sign).sum().backward())
    return {name: p.grad.double().flatten() for name, p in lora_parameters({"transformer": pipe.transformer}).items()}


def exact_backward(grad: Tensor, rounded, x, u, weight: Tensor, a, b, dtype: torch.dtype) -> tuple:
    """`fp8._backward` with the unrounded gradient; the scale that rounding folds into it is applied to the weight."""
    grad_x = grad @ (weight.view(fp8.E4M3).float() * SCALES[-1].float()[:, None]).to(dtype)
    if a is None:
        return grad_x, None, None
    grad_u = grad @ b
    return grad_x + grad_u @ a, grad_u.T @ x, grad.T @ u


SCALES: list[Tensor] = []  # of the weight that backward multiplies with


def remember_scales() -> None:
    rounds, gelu = fp8.quantised, fp8.quantised_gelu_backward

    def quantised(x, factor):
        SCALES.append(factor) if factor is not None else None
        return rounds(x, factor)

    def quantised_gelu_backward(grad, z, factor, kept):
        SCALES.append(factor)
        return gelu(grad, z, factor, True)

    fp8.quantised, fp8.quantised_gelu_backward, fp8._backward = quantised, quantised_gelu_backward, exact_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few hundred parameters, for a CPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    found = {"bf16": gradient(args, device, None), "FP8": gradient(args, device, "fp8")}
    remember_scales()
    found["FP8, bf16 backward"] = gradient(args, device, "fp8")
    print("| | cosine | norm ratio | least cosine of a tensor | median |\n" + "|---" * 5 + "|")
    for ours, theirs in (("FP8", "bf16"), ("FP8, bf16 backward", "bf16"), ("FP8", "FP8, bf16 backward")):
        a, b = (torch.cat(list(found[name].values())) for name in (ours, theirs))
        each = torch.stack([torch.cosine_similarity(found[ours][k], found[theirs][k], 0) for k in found[ours]])
        print(
            f"| {ours}, against {theirs} | {torch.cosine_similarity(a, b, 0):.4f} | {a.norm() / b.norm():.4f} | "
            f"{each.min():.3f} | {each.median():.3f} |"
        )


if __name__ == "__main__":
    main()
