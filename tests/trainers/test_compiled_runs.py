"""A trainer with compiled blocks trains to the weights of one without."""

import os

import pytest
import torch
from tiny_runs import config, largest_difference, logged, trainer, weights


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(tmp_path):
    # with SGD: Adam would divide a gradient of pure rounding by itself
    sgd = dict(alive=True, gradient_checkpointing=True, optim="sgd", learning_rate=1.0)
    plain = trainer(tmp_path / "plain", **sgd)
    start = weights(plain)
    plain.train()
    torch._dynamo.reset()
    compiled = trainer(tmp_path / "compiled", torch_compile_backend="aot_eager", attention_kernel="math", **sgd)
    compiled.train()
    assert compiled.policy.compiled and not plain.policy.compiled
    moved = largest_difference(start, weights(plain))
    assert largest_difference(weights(plain), weights(compiled)) < 1e-2 * moved
    assert max(logged(compiled, "replay/max_log_prob_error")) == 0
    compiled.save_model()  # plain diffusers loads the adapter and samples the same


def test_torch_compile_means_the_blocks(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    made = config(tmp_path, torch_compile=True, torch_compile_mode="default")
    assert made.torch_compile and made.torch_compile_mode == "default"
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ  # accelerate would compile the policy as a whole


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(recompute="some"), "recompute='some' must be"),
        (dict(attention_kernel="fast"), "attention_kernel='fast' must be one of"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)
