"""Build Wan 2.1 at its real sizes with random weights, directly on the device, without downloads.

python benchmarks/random_wan.py                             # print the sizes of its parts in bf16
python benchmarks/random_wan.py --save /tmp/wan             # save Wan 2.1 1.3B with a small text encoder
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SIZES = {
    "wan21_1.3b": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
    "wan21_14b": dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40),
    "tiny": dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=2),
}
TEXT_ENCODERS = {  # without the vocabulary: small is one layer of Wan's width, full is UMT5-XXL's encoder
    "small": dict(d_kv=8, d_ff=64, num_layers=1, num_heads=4),
    "full": dict(vocab_size=256384, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
}


def random_wan(
    tiny: bool,
    dtype: torch.dtype,
    device: str,
    *,
    model: str = "wan21_1.3b",
    text_encoder: str = "small",
    vae_dtype: torch.dtype = torch.float32,
) -> WanPipeline:
    """Build a Wan 2.1 with matrices N(0, 0.02), norms 1 and biases 0; `tiny` shrinks every part.

    The denoiser and the autoencoder are created on `device`. The text encoder is filled there, matrix by matrix, and
    kept on the CPU. The tokenizer's tokens are bytes.
    """
    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    width = 64 if tiny else 4096
    torch.manual_seed(0)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(
            UMT5Config(
                **dict(vocab_size=len(vocabulary), d_model=width, dropout_rate=0.0)
                | TEXT_ENCODERS["small" if tiny else text_encoder]
            )
        )
    with torch.device(device), init_empty_weights():  # buffers, such as rotary angles, are not on the meta device
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            in_channels=16,
            out_channels=16,
            text_dim=width,
            freq_dim=256,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            **SIZES["tiny" if tiny else model],
        )
    with torch.device(device):
        vae = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1) if tiny else AutoencoderKLWan()
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(vae_dtype)
    fill(encoder, dtype, device, "meta" if device == "meta" else "cpu")
    fill(transformer, dtype, device, device, keep=transformer._keep_in_fp32_modules or ())
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
        ),
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@torch.no_grad()
def fill(module: nn.Module, dtype: torch.dtype, device: str, place: str, keep: Sequence[str] = ()) -> None:
    """Fill a module without weights with random ones, drawn on a device and then moved; tied weights stay tied.

    Args:
        keep: name parts of the weights that are always fp32.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            own = torch.float32 if any(k in name for k in keep) else dtype
            value = torch.empty(parameter.shape, dtype=own, device=device)
            if parameter.ndim > 1:
                value.normal_(std=0.02)
            else:
                value.fill_(float("norm" in name and name.endswith("weight")))
            made[parameter] = nn.Parameter(value.to(place), requires_grad=False)
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, made[parameter])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default=None, help="folder to save the pipeline to")
    parser.add_argument("--model", choices=list(SIZES), default="wan21_1.3b")
    arguments = parser.parse_args()
    if arguments.save:
        device, tiny = "cuda" if torch.cuda.is_available() else "cpu", arguments.model == "tiny"
        dtype = torch.float32 if tiny else torch.bfloat16
        random_wan(tiny, dtype, device, model=arguments.model, vae_dtype=dtype).save_pretrained(arguments.save)
        return
    parts = ("text_encoder", "vae", "transformer")
    print("GiB           " + "".join(f"{part:>14}" for part in parts))
    for model in ("wan21_1.3b", "wan21_14b"):
        pipe = random_wan(False, torch.bfloat16, "meta", model=model, text_encoder="full", vae_dtype=torch.bfloat16)
        sizes = [sum(p.numel() * p.element_size() for p in getattr(pipe, part).parameters()) for part in parts]
        print(f"{model:<14}" + "".join(f"{size / 2**30:>14.2f}" for size in sizes))


if __name__ == "__main__":
    main()
