"""GRPO with a loss of your own: override one method of the trainer.

    accelerate launch examples/custom_loss.py

The loss here has no clip on one side: a bad video is pushed away as far as it takes, while a good one keeps PPO's
upper bound. `policy_loss` is given one denoising step of a micro-batch and returns a loss for each video.
"""

import torch
from custom_reward import config, prompts, redness

from pisces_rl import VideoGRPOTrainer


class OneSidedTrainer(VideoGRPOTrainer):
    def policy_loss(self, step, log_ratio, advantage, samples):
        ratio = log_ratio.exp()
        bounded = torch.minimum(advantage * ratio, advantage * ratio.clamp(max=1 + self.args.upper_epsilon))
        return torch.where(advantage > 0, -bounded, -advantage * ratio)

    def clipped(self, step, log_ratio, advantage, samples):
        high = (log_ratio.detach().exp() > 1 + self.args.upper_epsilon) & (advantage > 0)
        return torch.zeros(()), high.float().mean()


if __name__ == "__main__":
    trainer = OneSidedTrainer("tiny-wan", redness, config("outputs/one_sided"), prompts(), eval_dataset=prompts())
    trainer.train()
    trainer.save_model()
