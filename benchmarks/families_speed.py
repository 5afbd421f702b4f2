"""Measure the speedup of compiled and fused blocks per family: forward, and forward with backward; one GPU.

    python benchmarks/families_speed.py                              # every family, random weights
    python benchmarks/families_speed.py --families wan hunyuan15     # some of them
    python benchmarks/families_speed.py --tiny                       # the same code path on a CPU

Each family's diffusers transformer class has its published width and 4 blocks (HunyuanVideo: 2 two-stream and 2
one-stream), 3,510 video tokens (33 x 240 x 416 in most families) and as many text tokens as its pipeline gives; batch
4, bf16 under autocast, LoRA of rank 32 with nonzero B on the blocks' attention projections. Embeddings and the output
layer are included; with 4 blocks, they take a larger share than in the full model. No pipeline, no guidance:
    forward   no gradients; compiled blocks still run the graph with gradients, as in a rollout
    update    forward with gradients and backward, with gradient checkpointing
for the variants `eager`, `compiled` and `fused` of benchmarks/speed.py. Times are ms per sample, medians of --repeats
after two warm-up runs. GiB: the update's peak. Omitted from docs/models.md's families: those that share a class (image
to video, Wan 2.2, CogVideoX's other scheduler), those whose blocks cannot be compiled (UNets, Latte, Allegro, LTX-2),
and images.
"""

import argparse
import gc

import diffusers
import speed
import torch
from accelerate import init_empty_weights
from random_wan import SIZES, fill
from torch import Tensor, nn

from pisces_rl.policy import add_lora, default_lora_config, lora_parameters
from pisces_rl.policy.fast.execution import attention_kernel, compile_blocks
from pisces_rl.policy.fast.products import fuse_products
from pisces_rl.policy.lora.adapters import ATTENTION, BLOCKS

# Class, its arguments, changes for --tiny, inputs. In the inputs, a tuple is a shape of normal numbers and a list a
# shape of ones, both without the batch; "video" stands for frames, rows, columns of latents that the class patches by
# 2, "tokens" for those of latents that it does not patch; a function makes an input without a batch from frames, rows,
# columns of tokens; other values are passed as they are.
BLOCKS_OF_EACH = dict(num_layers=4)
FAMILIES = {
    "wan": (
        "WanTransformer3DModel",
        SIZES["wan21_1.3b"] | BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(16, "video"), encoder_hidden_states=(512, 4096)),
    ),
    "wan_14b": (
        "WanTransformer3DModel",
        SIZES["wan21_14b"] | BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(16, "video"), encoder_hidden_states=(512, 4096)),
    ),
    "skyreels": (
        "SkyReelsV2Transformer3DModel",
        SIZES["wan21_14b"] | BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(16, "video"), encoder_hidden_states=(512, 4096)),
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        dict(num_layers=2, num_single_layers=2),
        {},
        dict(
            hidden_states=(16, "video"),
            encoder_hidden_states=(256, 4096),
            encoder_attention_mask=[256],
            pooled_projections=(768,),
            guidance=[],
        ),
    ),
    "hunyuan15": (
        "HunyuanVideo15Transformer3DModel",
        BLOCKS_OF_EACH,
        {},
        dict(
            hidden_states=(65, "tokens"),
            encoder_hidden_states=(1000, 3584),
            encoder_attention_mask=[1000],
            encoder_hidden_states_2=(256, 1472),
            encoder_attention_mask_2=[256],
            image_embeds=(729, 1152),
        ),
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        BLOCKS_OF_EACH,
        dict(cross_attention_dim=128),
        dict(
            hidden_states=("count", 128),
            encoder_hidden_states=(128, 4096),
            encoder_attention_mask=[128],
            num_frames=lambda f, r, c: f,
            height=lambda f, r, c: r,
            width=lambda f, r, c: c,
        ),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",  # the 5B
        dict(num_attention_heads=48, use_rotary_positional_embeddings=True) | BLOCKS_OF_EACH,
        {},
        dict(
            hidden_states=("frames first", 16),
            encoder_hidden_states=(226, 4096),
            image_rotary_emb=lambda f, r, c: torch.randn(2, f * r * c, 64).unbind(),
        ),
    ),
    "mochi": (
        "MochiTransformer3DModel",
        BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(12, "video"), encoder_hidden_states=(256, 4096), encoder_attention_mask=[256]),
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        dict(in_visual_dim=16, out_visual_dim=16, num_visual_blocks=4),
        dict(model_dim=128, ff_dim=256),
        dict(
            hidden_states=("channels last", 16),
            encoder_hidden_states=(256, 3584),
            pooled_projections=(768,),
            text_rope_pos=lambda f, r, c: torch.arange(256),
            visual_rope_pos=lambda f, r, c: [torch.arange(n) for n in (f, r, c)],
        ),
    ),
    "easyanimate": (
        "EasyAnimateTransformer3DModel",
        dict(in_channels=16, out_channels=16, patch_size=2) | BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(16, "video"), encoder_hidden_states=(256, 3584)),
    ),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        BLOCKS_OF_EACH,
        dict(num_cross_attention_heads=2, cross_attention_dim=224),
        dict(hidden_states=(16, "video"), encoder_hidden_states=(300, 2304), encoder_attention_mask=[300]),
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        dict(concat_padding_mask=False) | BLOCKS_OF_EACH,
        {},
        dict(hidden_states=(16, "video"), encoder_hidden_states=(512, 1024), fps=30),
    ),
}
VARIANTS = ("eager", "compiled", "fused")


def transformer_of(family: str, tiny: bool, dtype: torch.dtype, device: str) -> nn.Module:
    name, arguments, smaller, _ = FAMILIES[family]
    if tiny:
        heads = {} if family == "kandinsky5" else dict(num_attention_heads=2)
        arguments = arguments | {key: 1 for key in arguments if key.endswith(("layers", "blocks"))} | heads | smaller
    torch.manual_seed(0)
    with torch.device(device), init_empty_weights():  # buffers are not on the meta device
        transformer = getattr(diffusers, name)(**arguments)
    fill(transformer, dtype, device, device, keep=transformer._keep_in_fp32_modules or ())
    config = default_lora_config(32, target_modules=rf"{BLOCKS}\..*{ATTENTION}")
    add_lora({"transformer": transformer}, config)
    for key, parameter in lora_parameters({"transformer": transformer}).items():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer.eval()


def inputs_of(family: str, tiny: bool, batch: int, dtype: torch.dtype, device: str) -> dict:
    frames, rows, columns = (2, 2, 2) if tiny else (9, 15, 26)
    shapes = {
        "video": (frames, 2 * rows, 2 * columns),
        "tokens": (frames, rows, columns),
        "count": (frames * rows * columns,),
    }

    def made(value):
        if callable(value):
            value = value(frames, rows, columns)
            move = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
            return type(value)(map(move, value)) if isinstance(value, (tuple, list)) else move(value)
        if isinstance(value, list):
            return torch.ones(batch, *value, device=device)
        if not isinstance(value, tuple):
            return value
        if value[0] == "frames first":
            shape = (frames, value[1], 2 * rows, 2 * columns)
        elif value[0] == "channels last":
            shape = (frames, 2 * rows, 2 * columns, value[1])
        else:
            shape = [n for part in value for n in (shapes[part] if isinstance(part, str) else (part,))]
        return torch.randn(batch, *shape, device=device).to(dtype)

    torch.manual_seed(2)
    timestep = torch.full((batch,), 500.0, device=device)
    return {"timestep": timestep, **{key: made(value) for key, value in FAMILIES[family][3].items()}}


def measure(family: str, variant: str, args, device: str) -> tuple[float, float, float]:
    """Return ms per sample of forward and of update, and the update's peak GiB."""
    compiled, recompute, kernel, fused, _ = speed.VARIANTS[variant]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transformer = transformer_of(family, args.tiny, dtype, device)
    inputs = inputs_of(family, args.tiny, args.batch, dtype, device)
    if fused:
        fuse_products(transformer)
    if compiled:
        compile_blocks(transformer, recompute=recompute, backend="aot_eager" if args.tiny else "inductor")
    else:
        transformer.enable_gradient_checkpointing()

    def call() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return transformer(**inputs).sample

    def update() -> None:
        with attention_kernel(kernel):
            call().float().square().mean().backward()

    def forward() -> None:
        with attention_kernel(kernel), torch.no_grad():
            call()

    (first, _), (second, peak) = (speed.timed(phase, args.repeats, device) for phase in (forward, update))
    return 1000 * first / args.batch, 1000 * second / args.batch, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--tiny", action="store_true", help="one block of two heads, for a CPU")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    heads = " | ".join(f"{phase} {name}" for phase in ("forward", "update", "GiB") for name in VARIANTS)
    print(f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}\n\n| family | class | {heads} |")
    print("|---" * (2 + 3 * len(VARIANTS)) + "|")
    for family in args.families:
        columns = []
        for variant in VARIANTS:
            columns.append(measure(family, variant, args, device))
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        cells = [f"{value:.2f}" for row in zip(*columns) for value in row]
        print(f"| {family} | `{FAMILIES[family][0]}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
