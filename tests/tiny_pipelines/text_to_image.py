"""Stable Diffusion 3, Flux and Qwen-Image, tiny and random: their images are videos of one frame."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from .parts import byte_tokenizer, t5_encoder


def clip(cls):
    return cls(
        CLIPTextConfig(
            bos_token_id=3,
            eos_token_id=1,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            pad_token_id=0,
            projection_dim=32,
            vocab_size=1000,
        )
    ).eval()


def image_vae(latent_channels):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def tiny_sd3(seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(4),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=byte_tokenizer(77),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=byte_tokenizer(77),
        text_encoder_3=t5_encoder(64),
        tokenizer_3=byte_tokenizer(),
    )


def tiny_flux(seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(4),
        text_encoder=clip(CLIPTextModel),
        tokenizer=byte_tokenizer(77),
        text_encoder_2=t5_encoder(),
        tokenizer_2=byte_tokenizer(),
        transformer=transformer,
    )


def tiny_qwen_image(seed=0):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.1, 0.9, 1.0, 1.2],
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                rope_scaling=dict(mrope_section=[1, 1, 2], rope_type="default", type="default"),
                vocab_size=260,
            ),
            vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        )
    ).eval()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(256),
        transformer=transformer,
    )


CALLS = dict(
    sd3=dict(height=16, width=16, max_sequence_length=16, guidance_scale=5.0),
    flux=dict(height=16, width=16, max_sequence_length=16, guidance_scale=3.5),
    qwen_image=dict(height=16, width=16),
)
BUILD = dict(sd3=tiny_sd3, flux=tiny_flux, qwen_image=tiny_qwen_image)
FLOW = tuple(BUILD)

TRUE_GUIDANCE = ({"true_cfg_scale": 4.0, "negative_prompt": "blurry"}, {"true_cfg_scale": 1.0})
GUIDANCE = dict(sd3=({"guidance_scale": 5.0}, {"guidance_scale": 1.0}), flux=TRUE_GUIDANCE, qwen_image=TRUE_GUIDANCE)
