"""Rewards in another process, on another GPU or in another environment, over HTTP.

`pisces-rl serve` runs the server (needs the extra `pisces_rl[server]`); `RemoteReward` is its client, a reward. They
exchange safetensors and JSON, never a pickle: see `wire`.
"""
