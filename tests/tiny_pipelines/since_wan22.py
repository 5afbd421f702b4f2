"""Wan 2.2 (two experts; TI2V-5B), SkyReels-V2, Kandinsky 5 and HunyuanVideo 1.5, tiny and random."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from .parts import byte_tokenizer, t5_encoder


def wan_vae(**config):
    from diffusers import AutoencoderKLWan

    sizes = dict(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return AutoencoderKLWan(**sizes | dict(temperal_downsample=[False, True, True]) | config)


def wan_sizes(**config):
    return (
        dict(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        | config
    )


def wan_pipeline(vae, transformer, **more):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(cls=UMT5EncoderModel, cfg=UMT5Config),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **more,
    )


def tiny_wan22_a14b(seed=0):
    """Two experts: of 4 steps (sigmas 1, .86, .60, .01) each has two, of 3 (1, .75, .01) the second has the last."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    experts = (WanTransformer3DModel(**wan_sizes(num_layers=1)) for _ in range(2))
    return wan_pipeline(wan_vae(), next(experts), transformer_2=next(experts), boundary_ratio=0.7)


def tiny_wan22_ti2v(seed=0):
    """A timestep for each token, and the residual VAE that decodes patches of pixels."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    statistics = dict(latents_mean=[0.1] * 8, latents_std=[0.5] * 8)
    vae = wan_vae(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        **statistics,
    )
    tr = WanTransformer3DModel(**wan_sizes(in_channels=8, out_channels=8))
    return wan_pipeline(vae, tr, expand_timesteps=True)


def skyreels_parts():
    from diffusers import FlowMatchEulerDiscreteScheduler, SkyReelsV2Transformer3DModel

    return dict(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(cls=UMT5EncoderModel, cfg=UMT5Config),
        vae=wan_vae(),
        transformer=SkyReelsV2Transformer3DModel(**wan_sizes(num_layers=1)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )


def tiny_skyreels(seed=0):
    from diffusers import SkyReelsV2Pipeline

    torch.manual_seed(seed)
    return SkyReelsV2Pipeline(**skyreels_parts())


def qwen_vl(width):
    """A tiny Qwen2.5-VL, of which only the text is used."""
    text = dict(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=260,
        rope_scaling=dict(type="default", mrope_section=[1, 1, 2], rope_theta=1e6),
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=width)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def hunyuan_vae():
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )


def tiny_kandinsky5(seed=0):
    """Latents with the channels last, beside channels of a condition: a buffer that each step is written into."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    torch.manual_seed(seed)
    tr = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=8,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
        visual_cond=True,
    )
    for name, parameter in tr.named_parameters():  # modulations begin at 0: their blocks would do nothing
        if "modulation.out_layer" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    clip = CLIPTextModel(
        CLIPTextConfig(
            bos_token_id=3,
            eos_token_id=1,
            pad_token_id=0,
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=260,
            max_position_embeddings=77,
        )
    ).eval()
    pipe = Kandinsky5T2VPipeline(
        transformer=tr,
        vae=hunyuan_vae(),
        text_encoder=qwen_vl(16),
        tokenizer=byte_tokenizer(512),
        text_encoder_2=clip,
        tokenizer_2=byte_tokenizer(77),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "Video: {}", 7
    return pipe


def tiny_hunyuan15(seed=0):
    """Guidance lives in a guider object; text, glyphs and image come as three streams of tokens."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from diffusers.guiders import ClassifierFreeGuidance

    torch.manual_seed(seed)
    tr = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = HunyuanVideo15Pipeline(
        text_encoder=qwen_vl(16).model.language_model,
        tokenizer=tokenizer,
        transformer=tr,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=t5_encoder(),
        tokenizer_2=byte_tokenizer(16),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "Video: ", 7
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 24, 8, 3
    return pipe


CALLS = dict(
    wan22_a14b=dict(height=16, width=16, num_frames=9, max_sequence_length=16, guidance_scale=5.0),
    wan22_ti2v=dict(height=32, width=32, num_frames=9, max_sequence_length=16, guidance_scale=5.0),
    skyreels=dict(height=16, width=16, num_frames=9, max_sequence_length=16, guidance_scale=6.0),
    kandinsky5=dict(
        height=16,
        width=16,
        num_frames=9,
        max_sequence_length=64,
        guidance_scale=5.0,
        negative_prompt="blurry",
    ),
    hunyuan15=dict(height=16, width=16, num_frames=9),
)
BUILD = dict(
    wan22_a14b=tiny_wan22_a14b,
    wan22_ti2v=tiny_wan22_ti2v,
    skyreels=tiny_skyreels,
    kandinsky5=tiny_kandinsky5,
    hunyuan15=tiny_hunyuan15,
)
FLOW = tuple(BUILD)
EXPERTS = dict(wan22_a14b=("transformer", "transformer", "transformer_2"))  # which denoiser is called at 3 steps

GUIDANCE = {
    name: ({"guidance_scale": CALLS[name].get("guidance_scale", 6.0)}, {"guidance_scale": 1.0}) for name in BUILD
}
