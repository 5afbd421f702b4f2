"""Image-to-video of Wan 2.1 (with its image encoder), LTX and CogVideoX, tiny and random."""

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from .first_seven import tiny_cogvideox, tiny_ltx, tiny_wan
from .parts import byte_tokenizer, t5_encoder


def picture(seed: int, size: int = 24) -> Image.Image:
    """A random RGB picture."""
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def tiny_wan_i2v(seed=0, **settings):
    """`pos_embed_seq_len=34` makes it one of first and last frame: its image encoder gives 17 tokens an image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    vae = tiny_wan(seed).vae
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,  # latents, those of the image, its mask
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        image_dim=4,
        added_kv_proj_dim=24,
        **settings,
    )
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=4,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4,
            patch_size=1,
        )
    ).eval()
    return WanImageToVideoPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(cls=UMT5EncoderModel, cfg=UMT5Config),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_processor=CLIPImageProcessor(crop_size=4, size=4),
        image_encoder=image_encoder,
        transformer=transformer,
    )


def tiny_ltx_i2v(seed=0):
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**tiny_ltx(seed).components)


def tiny_cogvideox_i2v(seed=0):
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

    components = tiny_cogvideox(seed).components
    torch.manual_seed(seed)
    components["transformer"] = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=8,  # latents and those of the image
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    return CogVideoXImageToVideoPipeline(**components)


CALLS = dict(
    # the transformer tells text from image by 512 text tokens, whatever it is given
    wan_i2v=dict(height=16, width=16, num_frames=9, max_sequence_length=512, guidance_scale=5.0),
    ltx_i2v=dict(height=32, width=32, num_frames=9, max_sequence_length=16, guidance_scale=3.0),
    cogvideox_i2v=dict(height=16, width=16, num_frames=9, max_sequence_length=16, guidance_scale=5.0),
)
BUILD = dict(wan_i2v=tiny_wan_i2v, ltx_i2v=tiny_ltx_i2v, cogvideox_i2v=tiny_cogvideox_i2v)
FLOW = ("wan_i2v", "ltx_i2v")
GUIDANCE = {name: ({"guidance_scale": CALLS[name]["guidance_scale"]}, {"guidance_scale": 1.0}) for name in CALLS}

# What each of two videos is conditioned on.
CONDITIONS = {name: {"image": [picture(0), picture(1)]} for name in CALLS}
