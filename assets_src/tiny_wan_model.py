"""Build the untrained parts of tiny-wan: small versions of Wan 2.1's classes, about 5.0 M parameters in total."""

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pisces_rl.shapemotion import VOCABULARY

LATENT_CHANNELS = 16
MAX_TOKENS = 24
SHIFT = 3.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per ShapeMotion word, lower case, `</s>` at the end; at most 24 tokens."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", VOCABULARY.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def build_text_encoder() -> UMT5EncoderModel:
    """0.33 M parameters, width 128."""
    config = UMT5Config(
        vocab_size=len(VOCABULARY),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("</s>"),
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def build_vae() -> AutoencoderKLWan:
    """0.70 M parameters; (B, 3, 4k + 1, 8h, 8w) in [-1, 1] to (B, 16, k + 1, h, w). Residual, patches of 2 x 2."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        is_residual=True,
    )


def build_transformer() -> WanTransformer3DModel:
    """3.94 M parameters: 6 layers, 6 heads of 32; 80 tokens for 17 frames of 64 x 64."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=128,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_pipeline(tokenizer, text_encoder, vae, transformer) -> WanPipeline:
    """A plain WanPipeline of these parts, with flow-Euler at shift 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)
