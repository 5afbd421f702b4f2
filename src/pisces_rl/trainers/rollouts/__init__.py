"""What all methods share that sample groups of videos: rollouts, rewards, advantages, losses."""
