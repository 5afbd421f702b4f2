"""GRPO runs of families whose denoisers, guidance or LoRA layout are not Wan 2.1's: train, save, reload, resume."""

import re
import warnings

import pytest
import torch
from peft import PeftModel
from tiny_pipelines import BUILD, CALLS, quiet
from tiny_runs import logged, prompts, trainer, weights

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer
from pisces_rl.policy import PolicyError, default_lora_config

A14B = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 5.0}


def snippet(folder) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


def test_each_expert_learns_from_its_own_steps(tmp_path):
    """Wan 2.2: of 4 steps the first two are the high-noise expert's; only step 1 is trained."""
    made = trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), sde_window_range=[1, 2], **A14B)
    before = weights(made)
    with pytest.warns(UserWarning, match="no trained denoising step called transformer_2 at optimizer step 1"):
        made.train()
    changed = {name.split(".")[0] for name, p in made.adapter.items() if not torch.equal(p, before[name])}
    assert changed == {"transformer"}
    assert min(logged(made, "grad_norm/transformer")) > 0 and set(logged(made, "grad_norm/transformer_2")) == {0.0}
    made.save_model()
    lines = [line for line in snippet(tmp_path).splitlines() if "load_lora" in line]
    assert len(lines) == 2 and "load_into_transformer_2=True" in lines[1]


def test_only_the_second_expert(tmp_path):
    settings = A14B | {"sde_window_range": [2, 3], "lora_denoisers": ["transformer_2"]}
    made = trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), save_strategy="steps", save_steps=1, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no trained denoising step")
        made.train()
    assert list(made.adapted_modules) == ["transformer_2"]
    again = trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected, found = weights(made), weights(again)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)
    both = trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), **settings | {"lora_denoisers": None})
    with pytest.raises(ValueError, match="other lora_denoisers"):
        both.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("method", ["grpo", "rvm"])
def test_a_step_of_the_frozen_expert_teaches_nothing(tmp_path, method):
    """Steps 0 and 1 are the first expert's; a step that only it denoises has no gradient, and the run goes on."""
    settings = A14B | {"lora_denoisers": ["transformer_2"], "method": method, "max_steps": 1, "beta": 0.0}
    if method == "grpo":
        settings |= {"sde_window_range": [1, 3], "sde_window_size": 2}
    made = trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), **settings)
    with pytest.warns(UserWarning, match="calls only denoisers without an adapter.*Train the steps of transformer_2"):
        made.train()
    row = made.state.log_history[0]
    assert {key for key in row if key.startswith("grad_norm/step_")} == {
        f"grad_norm/step_{step}" for step in ((2,) if method == "grpo" else (2, 3))
    }
    assert row["grad_norm"] > 0


def test_backpropagation_through_the_frozen_expert_is_refused(tmp_path):
    made = RewardBackpropTrainer(
        quiet(BUILD["wan22_a14b"]()),
        brightness_with_gradients,
        peft_config=default_lora_config(4),
        train_dataset=prompts(),
        args=RewardBackpropConfig(
            str(tmp_path),
            **A14B,
            lora_denoisers=["transformer"],
            per_device_train_batch_size=1,
            max_steps=1,
            pipeline_kwargs={"max_sequence_length": 16},
            use_cpu=True,
            report_to="none",
            num_sample_videos=0,
            gradient_checkpointing=False,
        ),
    )
    with pytest.raises(PolicyError, match=r"not trained. Train the denoiser that they call \(lora_denoisers\)"):
        made.train()


def brightness_with_gradients(prompts, videos, **columns):
    return videos.mean(dim=(1, 2, 3, 4))


brightness_with_gradients.differentiable = True


def test_a_guider_and_peft_s_layout(tmp_path):
    """HunyuanVideo 1.5 has no LoRA loader and no guidance_scale in its call: the card's snippet knows both."""
    made = trainer(tmp_path, model=quiet(BUILD["hunyuan15"]()), guidance_scale=3.0, num_frames=5, pipeline_kwargs=None)
    made.train()
    made.save_model()
    code = snippet(tmp_path)
    assert "pipe.guider = pipe.guider.new(guidance_scale=3.0)" in code and "PeftModel.from_pretrained(" in code
    fresh = quiet(BUILD["hunyuan15"]())
    fresh.transformer = PeftModel.from_pretrained(fresh.transformer, tmp_path, subfolder="transformer")
    call = dict(CALLS["hunyuan15"], prompt=["a"], num_inference_steps=2, output_type="latent")
    videos = [pipe(**call, generator=torch.Generator().manual_seed(0)).frames for pipe in (made.pipeline, fresh)]
    torch.testing.assert_close(videos[0], videos[1])


def test_prompts_of_several_lengths_without_a_mask(tmp_path):
    """Kandinsky 5: micro-batches of prompts of other lengths than the rollout's."""
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["a", "a bird in the snow", "a fish", "cat"]})
    made = trainer(
        tmp_path,
        data=data,
        model=quiet(BUILD["kandinsky5"]()),
        guidance_scale=1.0,
        num_frames=5,
        num_generations=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    made.train()
    assert max(logged(made, "replay/max_log_prob_error")) <= 1e-5
    made.save_model()
