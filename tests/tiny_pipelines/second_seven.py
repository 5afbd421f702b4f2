"""Allegro, Latte, EasyAnimate, Sana-Video, LTX-2, Cosmos and CogVideoX with its DPM solver, tiny and random."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
)

from .first_seven import tiny_cogvideox
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
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


def tiny_ltx2(seed=0):
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(seed)
    text_encoder = Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    ).eval()
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
        perturbed_attn=True,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=text_encoder,
        connectors=connectors,
        vae=vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


class NoGuardrail(torch.nn.Module):
    """Stands in for Cosmos' guardrail, a large model of a package of its own; it lets everything pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def tiny_cosmos(seed=0, final_sigmas_type="zero"):
    from diffusers import (
        AutoencoderKLCosmos,
        CosmosTextToWorldPipeline,
        CosmosTransformer3DModel,
        EDMEulerScheduler,
    )

    torch.manual_seed(seed)
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # with it the transformer needs torchvision
        extra_pos_embed_type="learnable",
    )
    vae = AutoencoderKLCosmos(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return CosmosTextToWorldPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=260, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)),
        vae=vae,
        transformer=transformer,
        scheduler=EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type=final_sigmas_type,
        ),
        safety_checker=NoGuardrail(),
    )


def tiny_cogvideox_dpm(seed=0):
    """As CogVideoX-5B ships."""
    from diffusers import CogVideoXDPMScheduler

    pipe = tiny_cogvideox(seed)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


CALLS = dict(
    allegro=dict(
        height=32, width=16, num_frames=8, max_sequence_length=16, guidance_scale=6.0, clean_caption=False
    ),
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
    ("cosmos", "backpropagation"): "into numpy",
    ("ltx2", "a later start"): "with a copy of its scheduler",
}
