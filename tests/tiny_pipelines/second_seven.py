"""Allegro, Latte, EasyAnimate, Sana-Video, LTX-2, Cosmos and CogVideoX with its DPM solver, tiny and random."""

import torch
from transformers import Gemma2Config, Gemma2Model, Qwen2Config, Qwen2Model

from .first_seven import tiny_cogvideox
from .ltx2_cosmos import tiny_cosmos, tiny_ltx2
from .parts import byte_tokenizer, t5_encoder


def tiny_allegro(seed=0):
    from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

    torch.manual_seed(seed)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae.kernel, vae.stride = (8, 16, 16), (4, 8, 8)  # tiles of 24 x 320 x 320 would not fit, and decode to zeros
    vae.enable_tiling()  # it decodes in tiles only
    vae.enable_slicing()  # and a tile holds one video only
    return AllegroPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(24),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False),
    )


def tiny_latte(seed=0):
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel

    torch.manual_seed(seed)
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    return LattePipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


def tiny_easyanimate(seed=0):
    from diffusers import (
        AutoencoderKLMagvit,
        EasyAnimatePipeline,
        EasyAnimateTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )

    torch.manual_seed(seed)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = AutoencoderKLMagvit(
        in_channels=3,
        out_channels=3,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    text_encoder = Qwen2Model(
        Qwen2Config(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    tokenizer = byte_tokenizer(256)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    return EasyAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def tiny_sana_video(seed=0):
    from diffusers import (
        AutoencoderKLWan,
        DPMSolverMultistepScheduler,
        SanaVideoPipeline,
        SanaVideoTransformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
        attention_bias=False,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text_encoder = Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=260,
            attn_implementation="eager",
        )
    ).eval()
    return SanaVideoPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )


def tiny_cogvideox_dpm(seed=0):
    """As CogVideoX-5B ships."""
    from diffusers import CogVideoXDPMScheduler

    pipe = tiny_cogvideox(seed)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


CALLS = dict(
    allegro=dict(height=32, width=16, num_frames=8, max_sequence_length=16, guidance_scale=6.0, clean_caption=False),
    latte=dict(height=16, width=16, video_length=4, guidance_scale=5.0, clean_caption=False, mask_feature=False),
    easyanimate=dict(height=16, width=16, num_frames=5, guidance_scale=5.0, negative_prompt="blurry"),
    sana_video=dict(
        height=32,
        width=32,
        frames=9,
        max_sequence_length=16,
        guidance_scale=6.0,
        complex_human_instruction=[],
        use_resolution_binning=False,
    ),
    ltx2=dict(
        height=32,
        width=32,
        num_frames=5,
        frame_rate=25.0,
        max_sequence_length=16,
        guidance_scale=3.0,
        spatio_temporal_guidance_blocks=[1],
    ),
    cosmos=dict(
        height=32, width=32, num_frames=9, max_sequence_length=16, guidance_scale=7.0, negative_prompt="blurry"
    ),
    cogvideox_dpm=dict(height=16, width=16, num_frames=8, max_sequence_length=16, guidance_scale=6.0),
)
BUILD = dict(
    allegro=tiny_allegro,
    latte=tiny_latte,
    easyanimate=tiny_easyanimate,
    sana_video=tiny_sana_video,
    ltx2=tiny_ltx2,
    cosmos=tiny_cosmos,
    cogvideox_dpm=tiny_cogvideox_dpm,
)

FLOW = ("easyanimate", "sana_video", "ltx2")
EDM = ("cosmos",)

GUIDANCE = {name: ({"guidance_scale": CALLS[name]["guidance_scale"]}, {"guidance_scale": 1.0}) for name in CALLS}
# Besides text, LTX-2 is guided by perturbed blocks and by the other modality, all with passes of their own.
GUIDANCE["ltx2"] = (
    {"guidance_scale": 3.0},
    {
        f"{part}{name}": value
        for name, value in dict(guidance_scale=1.0, stg_scale=0.0, modality_scale=1.0, guidance_rescale=0.0).items()
        for part in ("", "audio_")
    },
)

REFUSES = {
    ("allegro", "a part of the frames"): "Allegro: 6",
    ("cosmos", "backpropagation"): "to numpy",
    ("ltx2", "a later start"): "with a copy of its scheduler",
}
