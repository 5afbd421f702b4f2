"""Scorers that others trained on people's judgements, as rewards: one file a model, loaded by `load_reward`."""
