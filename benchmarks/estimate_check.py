"""Compare the memory estimate with peaks measured on an H100 or, for methods, an H200 (docs/); needs no GPU.

    python benchmarks/estimate_check.py

Pipelines, sizes and adapters are those of benchmarks/speed.py (VAE in fp32), benchmarks/real_check.py (in bf16),
benchmarks/method_speed.py (in fp32) and benchmarks/backprop_memory.py (in fp32, minus its rewards): Wan 2.1 without
weights, with a small text encoder if it is not offloaded. speed.py has neither an optimizer nor decoding.
"""

import tempfile

import torch
import yaml
from method_speed import VIDEOS, settings_of
from real_check import RECIPE, SCRIPT_KEYS, SHORT, random_wan
from speed import ATTENTION

from pisces_rl import METHODS, RewardBackpropConfig, VideoGRPOConfig
from pisces_rl.estimate import MemoryEstimate, estimate_memory
from pisces_rl.policy import default_lora_config

GIB = 2**30
MEASURED = [  # frames, height, width, batch, micro-batch, GiB of rollout, GiB of update: benchmarks/speed.py
    (33, 240, 416, 8, 4, 4.79, 11.86),
    (81, 480, 832, 1, 1, 4.8, 22.6),
]
WHOLE_ITERATION = 12.2  # benchmarks/real_check.py --random_weights --gradient_accumulation_steps 2
OFFLOADED = {  # benchmarks/real_check.py --short --offload ...: text, decoding, update
    "wan21_1.3b": (dict(height=480, width=832, num_frames=81), 14.21, 8.48, 12.94),
    "wan21_14b": (dict(height=240, width=416, num_frames=33), 39.39, 29.92, 33.01),
}
METHODS_MEASURED = {"grpo": 21.1, "flash_grpo": 21.1, "flow_dppo": 21.0, "nft": 21.5, "awm": 21.8}  # method_speed.py
BACKPROP_REWARDS = 2.6  # GiB, benchmarks/backprop_memory.py
BACKPROP = [(1, 2, 16.5), (1, None, 59.4), (4, 2, 17.4)]  # K, latent frames decoded, GiB of 33 x 240 x 416


def estimated(settings: dict, lora, pipeline=None, make_config: type = VideoGRPOConfig) -> MemoryEstimate:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(output_dir=folder, use_cpu=True, bf16=True, **settings)
    pipeline = random_wan(False, torch.bfloat16, "meta") if pipeline is None else pipeline
    return estimate_memory(pipeline, config, lora)


def line(what: str, measured: float, counted: float) -> None:
    print(f"| {what} | {measured:.1f} | {counted:.1f} | {100 * (counted / measured - 1):+.0f} % |", flush=True)


def main() -> None:
    print("| peak, GiB | measured | estimated | |")
    print("|---|---|---|---|")
    for frames, height, width, batch, micro, rollout, update in MEASURED:
        estimate = estimated(
            dict(
                per_device_train_batch_size=micro,
                generation_batch_size=batch,
                num_generations=8 if batch == 8 else 2,
                gradient_accumulation_steps=1,
                height=height,
                width=width,
                num_frames=frames,
                num_inference_steps=4,
                guidance_scale=5.0,
                torch_compile=True,
                gradient_checkpointing=True,
                report_to="none",
                max_steps=1,
            )
            | ({} if batch > 1 else dict(generation_batch_size=2, rollout_batch_size=1)),
            default_lora_config(32, target_modules=ATTENTION),
        )
        resident, size = dict(estimate.resident), f"{frames} x {height} x {width}"
        resident.pop("optimizer states")
        phases = {name: dict(parts) for name, parts in estimate.phases.items()}
        phases["sampling"].pop("videos")
        plain = MemoryEstimate(resident, phases, estimate.blocks, estimate.details)
        line(f"rollout without decoding, batch {batch} of {size}, guidance", rollout, plain.peaks["sampling"] / GIB)
        line(f"update, micro-batch {micro} of {size}, guidance", update, plain.peaks["update"] / GIB)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    settings = {key: value for key, value in recipe.items() if key not in (*SCRIPT_KEYS, "output_dir")}
    settings |= dict(max_steps=2, save_strategy="no", report_to="none")
    whole = estimated(
        settings | dict(gradient_accumulation_steps=2),
        default_lora_config(recipe["lora_r"]),
        random_wan(False, torch.bfloat16, "meta", vae_dtype=torch.bfloat16),
    )
    line(
        f"an iteration of 8 videos of {RECIPE.name} ({max(whole.peaks, key=whole.peaks.get)})",
        WHOLE_ITERATION,
        whole.peak / GIB,
    )
    for model, (size, *measured) in OFFLOADED.items():
        pipeline = random_wan(
            False, torch.bfloat16, "meta", model=model, text_encoder="full", vae_dtype=torch.bfloat16
        )
        own = (
            settings
            | SHORT
            | size
            | dict(offload=["text_encoder", "vae", "rewards"], recompute="everything", sde_window_range=[0, 3])
        )
        peaks = estimated(own, default_lora_config(recipe["lora_r"]), pipeline).peaks
        for phase, value in zip(("text", "decoding", "update"), measured):
            line(f"{phase}, {model} offloaded, {' x '.join(str(v) for v in size.values())}", value, peaks[phase] / GIB)
    for method, measured in METHODS_MEASURED.items():
        settings, rank = settings_of(method)
        settings |= dict(max_steps=5, report_to="none", num_inference_steps=16)
        settings["gradient_accumulation_steps"] = VIDEOS // settings["per_device_train_batch_size"]
        del settings["output_dir"]
        estimate = estimated(settings, default_lora_config(rank), make_config=METHODS[method][1])
        line(f"a step of `{method}` ({max(estimate.peaks, key=estimate.peaks.get)})", measured, estimate.peak / GIB)
    for last_steps, decoded, measured in BACKPROP:
        estimate = estimated(
            dict(
                num_frames=33,
                height=240,
                width=416,
                num_inference_steps=4,
                guidance_scale=1.0,
                max_steps=2,
                backprop_steps=last_steps,
                decode_frames=decoded,
                per_device_train_batch_size=1,
                report_to="none",
                gradient_accumulation_steps=1,
                gradient_checkpointing=True,
            ),
            default_lora_config(32),
            make_config=RewardBackpropConfig,
        )
        line(
            f"backpropagation, K = {last_steps}, {decoded or 'all'} latent frames decoded",
            measured - BACKPROP_REWARDS,
            estimate.peak / GIB,
        )


if __name__ == "__main__":
    main()
