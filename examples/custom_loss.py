"""GRPO with a custom loss: a subclass overrides `policy_loss`.

    accelerate launch examples/custom_loss.py

`policy_loss` receives one denoising step of a few videos and returns a loss per video and the clipped shares. Here, a
penalty replaces the clip to keep the ratio near 1 (Simple Policy Optimization, arXiv 2401.16025).
"""

from datasets import Dataset

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer


class PenaltyTrainer(VideoGRPOTrainer):
    def policy_loss(self, step, log_ratio, advantage, samples):
        ratio = log_ratio.exp()
        loss = -advantage * ratio + advantage.abs() * (ratio - 1).square() / (2 * self.args.epsilon)
        nothing = log_ratio.new_zeros(())  # nothing is clipped; logged as clip_ratio
        return loss, nothing, nothing


def brightness(prompts, videos, **columns):
    return videos.mean(dim=(1, 2, 3, 4)).tolist()


if __name__ == "__main__":
    config = VideoGRPOConfig(
        output_dir="outputs/penalty",
        max_steps=12,
        learning_rate=2e-3,
        num_inference_steps=8,
        per_device_train_batch_size=16,
        num_iterations=2,
        height=64,
        width=64,
        num_frames=17,
        pipeline_kwargs={"max_sequence_length": 24},
    )
    prompts = Dataset.from_dict({"prompt": [f"a {shape} moving left" for shape in ("circle", "square", "cross")]})
    trainer = PenaltyTrainer("tiny-wan", brightness, config, prompts)
    trainer.train()
    trainer.save_model()
