"""Train on a custom reward: any function of prompts and videos.

accelerate launch examples/custom_reward.py
"""

from datasets import Dataset

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer


def redness(prompts, videos, **columns):
    """Return red minus the mean of the other channels per video; `videos` is (B, F, 3, H, W) in [0, 1]."""
    red, green, blue = videos.mean(dim=(1, 3, 4)).unbind(1)
    return (red - (green + blue) / 2).tolist()


if __name__ == "__main__":
    motions = ["moving left", "moving up", "growing", "staying still"]
    shapes = ["circle", "square", "triangle", "cross"]
    prompts = Dataset.from_dict({"prompt": [f"a {shape} {motion}" for shape in shapes for motion in motions]})
    trainer = VideoGRPOTrainer(
        model="tiny-wan",  # or any Hub id of a text-to-video pipeline
        reward_funcs=redness,
        args=VideoGRPOConfig(
            output_dir="outputs/redness",
            max_steps=12,
            learning_rate=2e-3,
            gradient_checkpointing=False,
            per_device_train_batch_size=32,
            num_generations=8,
            num_inference_steps=8,
            sde_window_size=2,
            sde_window_range=[0, 5],
            guidance_scale=1.0,
            height=64,
            width=64,
            num_frames=17,
            pipeline_kwargs={"max_sequence_length": 24},
            per_device_eval_batch_size=16,
        ),
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    trainer.train()
    trainer.save_model()
