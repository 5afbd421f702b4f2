"""One optimizer step of NFT on every family that can start later, and of AWM, RVM and Flow-DPO on a v- and an
epsilon-prediction and on two experts; the others refuse."""

import warnings

import pytest
import tiny_runs
import torch
from datasets import Dataset
from policy.test_one_step import STARTING
from tiny_pipelines import BUILD, CALLS, CONDITIONS, EXPERTS, GUIDANCE, REFUSES, quiet
from tiny_runs import Gradients, largest_difference, logged, weights

#: One of each kind: v- and epsilon-prediction, EDM, two experts, an image to begin with.
FAST = ("cogvideox", "latte", "cosmos", "wan22_a14b", "cogvideox_i2v")
OTHERS = ("awm", "rvm", "flow_dpo")
SIZE = ("height", "width", "num_frames", "guidance_scale")


def trainer(folder, family: str, **settings):
    """As `tiny_runs.trainer`, on a family's own call without guidance."""
    call = CALLS[family] | GUIDANCE[family][1]
    size = {name: call.pop(name, None) for name in SIZE}
    data = {"prompt": ["a fish", "a bird in the snow"]} | CONDITIONS[family]
    return tiny_runs.trainer(
        folder,
        data=Dataset.from_dict(data),
        model=quiet(BUILD[family]()),
        alive=True,
        **{
            "method": "nft",
            "pipeline_kwargs": call,
            "max_steps": 1,
            "num_generations": 2,
            "num_sample_videos": 0,
            "beta": 0.1,
        }
        | size
        | settings,
    )


@pytest.mark.parametrize(
    "method, family",
    [
        *(
            ("nft", family) if family in FAST else pytest.param("nft", family, marks=pytest.mark.slow)
            for family in STARTING
        ),
        *((method, "wan22_a14b") for method in OTHERS),
        *(
            pytest.param(method, family, marks=pytest.mark.slow)
            for method in OTHERS
            for family in ("cogvideox", "latte")
        ),
    ],
)
def test_a_step(tmp_path, method, family):
    """Its gradients are finite and reach every adapter; of Wan 2.2's experts both, each from its own levels."""
    keep = Gradients()
    made = trainer(tmp_path, family, method=method, callbacks=[keep])
    before = weights(made)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no trained denoising step")
        made.train()
    (gradients,) = keep.steps
    assert len(gradients) == len(before)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and float(gradient.abs().max()) > 0, name
    (loss,) = logged(made, "loss")
    assert torch.isfinite(torch.tensor(loss)) and largest_difference(before, weights(made)) > 0
    if method == "nft":
        widths = torch.tensor(logged(made, "weight/plus") + logged(made, "weight/minus"))
        assert widths.isfinite().all() and widths.min() >= 1e-5
    assert logged(made, "velocity/reference_distance")[0] > 0


@pytest.mark.parametrize("method", ["nft", *OTHERS])
def test_the_level_decides_which_expert_learns(tmp_path, method):
    """Wan 2.2: one level a micro-batch; the expert that it calls has the gradient, and no other."""
    keep = Gradients()
    made = trainer(tmp_path, "wan22_a14b", method=method, callbacks=[keep], train_levels=1, max_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    called = set()
    for row, gradients in zip(made.state.log_history, keep.steps):
        (step,) = (int(key.rpartition("_")[2]) for key in row if key.startswith("grad_norm/step_"))
        own = EXPERTS["wan22_a14b"][step]
        called.add(own)
        for name, gradient in gradients.items():
            assert (float(gradient.abs().max()) > 0) == name.startswith(f"denoiser.{own}."), name
        assert row[f"grad_norm/{own}"] > 0
    assert called == {"transformer", "transformer_2"}


@pytest.mark.parametrize("family", [family for family, what in REFUSES if what == "a later start"])
def test_families_that_cannot_start_later_refuse_before_a_rollout(tmp_path, family):
    with pytest.raises(
        ValueError, match="denoises audio together with the video, but DiffusionNFT trains at noise levels"
    ):
        trainer(tmp_path, family)
