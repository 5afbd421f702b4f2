"""Score tiny-wan with the policy's first-order steps on UniPC's sigma grid and on the grid that shifts twice.

    python benchmarks/sampling_grids.py

`FlowMatchEulerDiscreteScheduler(shift=3).set_timesteps(N)` starts from a shifted sigma_min and shifts again; UniPC and
DPM-Solver shift once. 96 prompts of the seen split, no guidance, fixed noise; intervals are 95 %.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from tiny_wan_scores import row_of

from pisces_rl.assets import asset_path
from pisces_rl.policy import VideoPolicy
from pisces_rl.shapemotion import load_prompts, verify

SCHEDULERS = {
    "UniPC, flow_shift 3": UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "FlowMatchEuler, shift 3": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def main() -> None:
    pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=torch.float32)
    prompts = list(load_prompts("test_seen", 96, 0)["prompt"])
    call = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 24, "guidance_scale": 1.0}
    for steps in (4, 8):
        for name, scheduler in SCHEDULERS.items():
            pipe.scheduler = scheduler
            policy = VideoPolicy(pipe, num_inference_steps=steps, pipeline_kwargs=call)
            videos = torch.cat(
                [
                    policy.sample(prompts[i : i + 16], noise_seeds=list(range(i, i + 16))).videos
                    for i in range(0, 96, 16)
                ]
            )
            policy.scheduler.set_timesteps(steps)
            sigmas = " ".join(f"{s:.3f}" for s in policy.scheduler.sigmas.tolist())
            row = row_of(verify(videos.clamp(0, 1), prompts))
            print(
                f"{steps} steps, {name}: correct {row['correct']:.3f} ± {row['correct_interval']:.3f}, "
                f"alignment {row['alignment']:.3f}, quality {row['quality']:.3f}  ({sigmas})",
                flush=True,
            )


if __name__ == "__main__":
    main()
