"""The memory estimate against bytes that were allocated, and what it must do with sizes."""

import functools
import gc
import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from pisces_rl import VideoGRPOConfig, assets
from pisces_rl.estimate import estimate_memory, weightless_pipeline
from pisces_rl.estimate.live_bytes import LiveBytes
from pisces_rl.estimate.memory import remembered_prompts
from pisces_rl.policy import (
    FullWeights,
    PolicyError,
    VideoPolicy,
    add_lora,
    default_lora_config,
    lora_parameters,
)

ROOT = Path(__file__).parents[2]
ARCHITECTURES = json.loads((ROOT / "recipes" / "architectures.json").read_text())


def config(**settings) -> VideoGRPOConfig:
    settings = (
        dict(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=8,
            max_steps=1,
            num_inference_steps=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        | settings
    )
    return VideoGRPOConfig(output_dir="outputs/unused", **settings)


WAN = dict(height=64, width=64, num_frames=17, guidance_scale=5.0, pipeline_kwargs={"max_sequence_length": 16})


def wan(width: int = 32):
    """Tiny Wan, wide enough that its activations outweigh latents."""
    pipeline = tiny_pipelines.BUILD["wan"]()
    settings = dict(pipeline.transformer.config) | dict(num_attention_heads=4, attention_head_dim=width, ffn_dim=512)
    pipeline.transformer = WanTransformer3DModel.from_config(settings)
    return tiny_pipelines.quiet(pipeline)


# --- the counter ---


@pytest.mark.parametrize("fake", [False, True])
def test_live_bytes_of_a_few_operators(fake):
    mode = FakeTensorMode() if fake else torch.no_grad()
    with mode, LiveBytes() as count:
        x = torch.zeros(1024)  # 4096 bytes
        y = x + 1
        view = y[:10]
        assert count.live == 2 * 4096
        z = torch.cat([x, y])  # twice as much
        del z
        assert (count.live, count.peak) == (2 * 4096, 4 * 4096)
        del y
        assert count.live == 2 * 4096  # the view keeps it
        del view
        assert count.live == 4096
        x.add_(1)
        assert (count.live, count.peak) == (4096, 4 * 4096)


def test_weights_are_left_out_and_inputs_held():
    weight, x = torch.zeros(1024), torch.zeros(256)
    count = LiveBytes()
    count.leave_out(weight)
    count.hold(x, [x[:3]])
    with count:
        weight.mul_(2)
    assert count.live == count.peak == 1024


# --- against what was allocated ---


def allocated_peak(call) -> int:
    """The most bytes that the CPU's allocator held at once during a call, above what it held before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_takes_what_is_estimated(checkpointing):
    settings = {} if checkpointing else {"gradient_checkpointing": False}
    estimate = estimated("wan", **settings)
    policy = VideoPolicy(wan(), **config(**WAN | settings).policy_settings())
    add_lora(dict(policy.denoiser.items()), default_lora_config())
    if checkpointing:
        policy.activation_checkpointing_enable()
    rollout = policy.sample(["a prompt"] * 4, noise_seeds=range(4), step_seeds=range(4), steps=[0])
    peak = allocated_peak(lambda: policy.replay(rollout, range(4), lambda step: step.log_prob.mean().backward()))
    assert estimate.phases["update"]["activations and gradients"] == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_all_weights_takes_what_is_estimated(checkpointing):
    """Where gradients of earlier steps are there already."""
    args = config(**WAN, gradient_checkpointing=checkpointing)
    estimate = estimate_memory(wan(), args, "full")
    policy = VideoPolicy(wan(), **args.policy_settings())
    FullWeights(dict(policy.denoiser.items()))
    if checkpointing:
        policy.activation_checkpointing_enable()
    rollout = policy.sample(["a prompt"] * 4, noise_seeds=range(4), step_seeds=range(4), steps=[0])
    update = functools.partial(policy.replay, rollout, range(4), lambda step: step.log_prob.mean().backward())
    update()
    assert estimate.phases["update"]["activations and gradients"] == pytest.approx(allocated_peak(update), rel=0.1)


@pytest.mark.slow
def test_sampling_and_decoding_take_what_is_estimated():
    estimate = estimated("wan")
    policy = VideoPolicy(wan(), **config(**WAN).policy_settings())
    add_lora(dict(policy.denoiser.items()), default_lora_config())
    call = dict(prompts=["a prompt"] * 8, noise_seeds=range(8))
    policy.sample(**call)  # prompts are encoded
    sampling = allocated_peak(lambda: policy.sample(**call, output_type="latent"))
    assert estimate.phases["sampling"]["denoiser"] == pytest.approx(sampling, rel=0.15)
    decoding = allocated_peak(lambda: policy.sample(**call))
    assert decoding > 1.5 * sampling  # so it is the decoder's
    # oneDNN's convolution takes a workspace besides, here of 8 MiB
    assert decoding - 9 * 2**20 < estimate.phases["decoding"]["decoder"] <= decoding


def test_weights_and_states_are_exact():
    pipeline = tiny_pipelines.quiet(tiny_pipelines.BUILD["wan"]())
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    args = config(sde_window_size=1, **WAN | dict(height=32, width=32, num_frames=5))
    estimate = estimate_memory(pipeline, args, default_lora_config(4))
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())
    for name in ("transformer", "text_encoder", "vae"):
        module = getattr(pipeline, name)
        own = {id(t): t for t in [*module.parameters(), *module.buffers()]}
        assert estimate.resident[name] == sum(t.numel() * t.element_size() for t in own.values())

    policy = VideoPolicy(pipeline, **args.policy_settings())
    add_lora(dict(policy.denoiser.items()), default_lora_config(4))
    adapter = 4 * sum(p.numel() for p in lora_parameters(dict(policy.denoiser.items())).values())
    assert estimate.resident["adapter"] == adapter and estimate.resident["optimizer states"] == 2 * adapter
    rollout = policy.sample(["a prompt"] * 8, noise_seeds=range(8), step_seeds=range(8), steps=policy.draw_window(0))
    kept = [*rollout.states.values(), *rollout.means.values(), rollout.clean]
    assert estimate.phases["update"]["states"] == sum(t.numel() * 4 for t in kept)
    assert estimate.phases["sampling"]["videos"] == rollout.videos.numel() * 4
    memo = [t for output in policy.prompt_memo.memory.values() for t in output if t is not None]
    assert estimate.resident["prompt embeddings"] == sum(t.numel() * t.element_size() for t in memo)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_weights_and_states_of_full_fine_tuning_are_exact(dtype):
    """The denoiser's weights are in fp32 whichever dtype they were loaded in; there is no adapter."""
    pipeline = tiny_pipelines.quiet(tiny_pipelines.BUILD["wan"]()).to(dtype)
    call = WAN | {"num_frames": 5, "guidance_scale": 1.0}
    args = config(sde_window_size=1, bf16=dtype == torch.bfloat16, ema_decay=0.9, **call)
    estimate = estimate_memory(pipeline, args, "full")
    assert {p.dtype for p in pipeline.transformer.parameters()} == {dtype}  # as it was
    encoder = {id(t): t for t in [*pipeline.text_encoder.parameters(), *pipeline.text_encoder.buffers()]}
    assert estimate.resident["text_encoder"] == sum(t.numel() * t.element_size() for t in encoder.values())

    policy = VideoPolicy(pipeline, **args.policy_settings())
    FullWeights(dict(policy.denoiser.items()))
    states = [*pipeline.transformer.parameters(), *pipeline.transformer.buffers()]
    trained = 4 * sum(p.numel() for p in pipeline.transformer.parameters())
    assert estimate.resident["transformer"] == sum(t.numel() * t.element_size() for t in states)
    assert estimate.resident["optimizer states"] == 2 * trained and estimate.resident["adapter's average"] == trained
    assert estimate.phases["update"]["gradients of earlier steps"] == trained
    assert estimate.details["trainable parameters"] == trained // 4 and "adapter" not in estimate.resident
    parts = estimate.fsdp2(4)  # of each copy of all weights a quarter, and at most two blocks' whole gradients
    for name in ("transformer", "optimizer states", "adapter's average"):
        assert parts.resident[name] == -(-estimate.resident[name] // 4)
    assert parts.phases["update"]["gradients of earlier steps"] == -(-trained // 4)
    blocks = estimate.blocks["transformer"]
    outside = estimate.resident["transformer"] - sum(blocks)
    assert parts.phases["update"]["gathered gradients"] == outside + 2 * max(blocks)
    assert parts.phases["update"]["gathered weights"] == outside + 3 * max(blocks)
    assert parts.resident["text_encoder"] == estimate.resident["text_encoder"]


@pytest.mark.parametrize(
    "settings, prompts",
    [
        (dict(max_steps=3), 3),
        (dict(max_steps=1000), 256),
        (dict(num_train_epochs=1, max_steps=-1), 256),
        (dict(max_steps=3, gradient_accumulation_steps=8, steps_per_generation=2), 12),
        (dict(max_steps=3, num_iterations=2), 2),
        (dict(max_steps=3, num_generations=4), 6),
    ],
)
def test_prompts_that_are_remembered(settings, prompts):
    assert remembered_prompts(config(**settings)) == prompts


# --- more of this takes more of that ---


@functools.cache
def estimated(family, **settings):
    call = WAN if family == "wan" else tiny_pipelines.CALLS[family]
    own = {name: call[name] for name in ("height", "width", "num_frames", "guidance_scale") if name in call}
    own["pipeline_kwargs"] = call.get("pipeline_kwargs") or {
        name: value for name, value in call.items() if name not in own and name != "num_inference_steps"
    }
    pipeline = wan() if family == "wan" else tiny_pipelines.BUILD[family]()
    return estimate_memory(pipeline, config(**own | settings))


def peaks(family="wan", **settings) -> dict[str, int]:
    return estimated(family, **settings).peaks


@pytest.mark.slow
def test_more_frames_and_videos_take_more():
    base = peaks()
    longer, larger = peaks(num_frames=33), peaks(per_device_train_batch_size=8)
    for other in (longer, larger):
        assert all(other[phase] > base[phase] for phase in base)
    chunked = peaks(rollout_batch_size=2)
    assert chunked["decoding"] < base["decoding"] and chunked["update"] == base["update"]


@pytest.mark.slow
def test_guidance_recomputation_and_averages():
    base = peaks(gradient_checkpointing=False)
    assert peaks(gradient_checkpointing=False, guidance_scale=1.0)["update"] < base["update"]
    checkpointed = peaks()
    assert checkpointed["update"] < base["update"] and checkpointed["decoding"] == base["decoding"]
    assert peaks(gradient_checkpointing=False, ema_decay=0.9)["update"] > base["update"]
    compiled = [peaks(torch_compile=True, recompute=kind)["update"] for kind in ("everything", "all_but_attention")]
    assert compiled[0] < compiled[1] < base["update"]


@pytest.mark.slow
def test_how_the_vae_decodes():
    large = dict(height=320, width=320, num_frames=5, guidance_scale=1.0)
    base, half = estimated("wan", **large), estimated("wan", vae_dtype="bfloat16", **large)
    assert half.resident["vae"] < 0.6 * base.resident["vae"]
    decoder = [
        e.phases["decoding"]["decoder"]
        for e in (base, half, *(estimated("wan", **large, **{name: True}) for name in ("vae_slicing", "vae_tiling")))
    ]
    assert all(smaller < decoder[0] for smaller in decoder[1:])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(vae_dtype="float64"), "vae_dtype='float64' must be one of"),
        (dict(transition="ddim"), "transition='ddim' does not fit"),
        (dict(sde_window_range=[0, 9]), r"sde_window_range=\[0, 9\] must satisfy"),
        (dict(attention_kernel="fast"), "attention_kernel='fast' must be one of"),
        (dict(pipeline_kwargs={"fps": 8}), "WanPipeline takes no argument 'fps'"),
    ],
)
def test_settings_are_refused_as_in_training(settings, message):
    with pytest.raises(PolicyError, match=message):
        estimate_memory(wan(), config(**WAN | settings))


@pytest.mark.slow
def test_one_adapter_of_two_experts():
    both, one = (
        peaks("wan22_a14b", num_inference_steps=3, **own) for own in ({}, {"lora_denoisers": ("transformer_2",)})
    )
    assert one["update"] < both["update"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cogvideox", "ltx", "mochi", "hunyuan", "t2v_sd", "animatediff"])
def test_other_families(family):
    base, larger = peaks(family), peaks(family, per_device_train_batch_size=8)
    assert all(0 < base[phase] < larger[phase] for phase in base)


@pytest.mark.slow
def test_fsdp2_shares_the_denoiser():
    estimate = estimated("wan")
    shared = estimate.fsdp2(4)
    assert shared.resident["transformer"] == -(-estimate.resident["transformer"] // 4)
    assert shared.resident["vae"] == estimate.resident["vae"]
    gathered = shared.phases["update"]["gathered weights"]
    assert gathered > max(estimate.blocks["transformer"]) and "gathered weights" not in shared.phases["decoding"]
    with pytest.raises(ValueError, match="num_processes=1: fsdp2 needs at least 2"):
        estimate.fsdp2(1)


def test_a_network_that_looks_at_numbers():
    with pytest.raises(ValueError, match="HunyuanVideo15Pipeline: one of its networks branches on values"):
        peaks("hunyuan15")


@pytest.mark.parametrize("family", ["wan_i2v", "ltx_i2v"])
def test_images_are_not_known(family):
    with pytest.raises(ValueError, match=r"takes \['image'\] with each video.*Measure a run"):
        peaks(family)


def test_a_model_without_blocks_is_not_compiled():
    with pytest.raises(PolicyError, match="UNet3DConditionModel lists no repeated blocks.*leave torch_compile off"):
        peaks("t2v_sd", torch_compile=True)


# --- pipelines without weights ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_without_weights_is_the_loaded_one(dtype):
    bare = weightless_pipeline("tiny-wan", dtype)
    loaded = DiffusionPipeline.from_pretrained(assets.asset_path("tiny-wan"), dtype=dtype)
    assert type(bare) is type(loaded)
    for name in ("transformer", "text_encoder", "vae"):
        found, expected = (
            {k: (v.shape, v.dtype) for k, v in getattr(p, name).named_parameters()} for p in (bare, loaded)
        )
        assert found == expected
        assert all(p.is_meta for p in getattr(bare, name).parameters())


PUBLISHED = {  # billions of parameters of the denoisers and of the text encoders
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1.42, 5.68),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14.3, 5.68),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (28.6, 5.68),
    "hunyuanvideo-community/HunyuanVideo": (12.8, 7.63),
    "zai-org/CogVideoX-5b": (5.57, 4.76),
    "Lightricks/LTX-Video": (1.92, 4.76),
    "genmo/mochi-1-preview": (10.0, 4.76),
    "ali-vilab/text-to-video-ms-1.7b": (1.41, 0.34),
}


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_architectures_have_the_published_sizes(model):
    pipeline = weightless_pipeline(model, torch.bfloat16, ARCHITECTURES)
    for kinds, expected in zip((("transformer", "unet"), ("text",)), PUBLISHED[model]):
        found = sum(
            p.numel()
            for name, component in pipeline.components.items()
            if component is not None and name.split("_")[0] in kinds
            for p in component.parameters()
        )
        assert found / 1e9 == pytest.approx(expected, rel=5e-3)


def test_every_recipe_with_a_hub_model_has_an_architecture():
    models = {
        line.split()[1]
        for path in (ROOT / "recipes").glob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("model: ") and "/" in line
    }
    assert models == set(ARCHITECTURES)


def test_an_unknown_model(tmp_path):
    with pytest.raises(ValueError, match="must be a model folder or Hub id"):
        weightless_pipeline(str(tmp_path), torch.float32)


def test_what_is_offloaded_counts_where_it_is_used():
    short = {"num_frames": 5, "guidance_scale": 1.0}
    plain, away = estimated("wan", **short), estimated("wan", **short, offload=("text_encoder", "vae", "denoiser"))
    text, vae, denoiser = (plain.resident[name] for name in ("text_encoder", "vae", "transformer"))
    assert not {"text_encoder", "vae", "transformer"} & set(away.resident)
    assert plain.peaks["update"] - away.peaks["update"] == text + vae
    assert plain.peaks["sampling"] - away.peaks["sampling"] == text + vae
    assert plain.peaks["decoding"] - away.peaks["decoding"] == text + denoiser
    assert away.peaks["text"] == sum(away.resident.values()) + text
    with pytest.raises(ValueError, match="offload: sharded denoisers"):
        away.fsdp2(2)
