"""Runs whose videos begin with an image of the dataset, and runs on images alone."""

import json
import re

import numpy as np
import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch
from datasets import Dataset
from PIL import Image
from tiny_pipelines import BUILD, CALLS, picture, quiet
from tiny_runs import StopAt, largest_difference, logged, weights

from pisces_rl import ConsistencyDistillation, RewardBackpropTrainer
from pisces_rl.media import load_image
from pisces_rl.policy import default_lora_config
from pisces_rl.trainers.base.data.images import check_images

PICTURES = [picture(i) for i in range(4)]
SIZES = {name: {k: CALLS[name][k] for k in ("height", "width")} for name in CALLS}


def pictures(count: int = 4, **columns) -> Dataset:
    return tiny_runs.prompts(count, image=PICTURES[:count], **columns)


def numbers(images) -> list[int]:
    """Which of PICTURES they are."""
    known = [picture.tobytes() for picture in PICTURES]
    return [known.index(image.tobytes()) for image in images]


def trainer(folder, family="wan_i2v", data=None, model=None, **settings):
    length = {"pipeline_kwargs": {"max_sequence_length": CALLS[family]["max_sequence_length"]}}
    return tiny_runs.trainer(
        folder,
        model=model or quiet(BUILD[family]()),
        data=pictures() if data is None else data,
        **SIZES[family] | length | settings,
    )


@pytest.mark.parametrize("family", ["wan_i2v", "ltx_i2v"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family):
    settings = dict(max_steps=3, per_device_train_batch_size=2, num_generations=2, num_inference_steps=2)
    whole = trainer(tmp_path / "whole", family, **settings)
    whole.train()
    assert max(logged(whole, "replay/max_log_prob_error")) == 0
    trainer(tmp_path / "cut", family, callbacks=[StopAt(1)], **settings).train()
    resumed = trainer(tmp_path / "cut", family, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert largest_difference(weights(whole), weights(resumed)) == 0


def ti2v():
    """Wan 2.2 TI2V with an image: the first latent frame is the image's and ignores the prediction."""
    from diffusers import WanImageToVideoPipeline

    parts = BUILD["wan22_ti2v"]().components
    return quiet(
        WanImageToVideoPipeline(**parts | {"image_encoder": None, "image_processor": None}, expand_timesteps=True)
    )


def test_the_given_frame_adds_no_gradient(tmp_path):
    """Neither its prediction nor its target is in the loss: changing them changes no gradient."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "num_inference_steps": 2,
        "max_steps": 1,
        "method": "rvm",
        "alive": True,
        **{k: CALLS["wan22_ti2v"][k] for k in ("height", "width")},
    }
    taken = []
    for change in (0.0, 3.0):
        gradients = tiny_runs.Gradients()
        made = tiny_runs.trainer(
            tmp_path / str(change),
            model=ti2v(),
            data=pictures(),
            callbacks=[gradients],
            num_frames=CALLS["wan22_ti2v"]["num_frames"],
            **settings,
        )
        predict = made.policy.predict

        def moved(*arguments, predict=predict, change=change, **keywords):
            found = predict(*arguments, **keywords)
            found.clean[:, :, 0] += change * torch.randn(found.clean[:, :, 0].shape)
            return found

        made.policy.predict = moved
        made.train()
        taken.append(gradients.steps[0])
    assert largest_difference(*taken) == 0 and max(float(g.abs().max()) for g in taken[0].values()) > 0


def test_one_prompt_with_two_images(tmp_path):
    """Two groups, each with its own image and statistics, and a KL of 0 to its reference."""
    data = Dataset.from_dict({"prompt": ["a clip"] * 2, "image": PICTURES[:2]})
    seen = []

    def graded(prompts, videos, image, **columns):
        seen.append(image)
        return [1, 2, 3, 5]

    made = trainer(
        tmp_path,
        rewards=graded,
        data=data,
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=1,
        rollout_batch_size=3,
        beta=0.1,
        step_weighting="guard",
        per_prompt_stat_tracking=True,
        shuffle_dataset=False,
    )
    made.train()
    (images,) = seen
    assert numbers(images) == numbers(made.scored.samples.conditions["image"]) == [0, 0, 1, 1]
    assert logged(made, "kl") == [0] and logged(made, "ratio/max_deviation") == [0]
    buffers = made.prompt_statistics.buffers
    assert sorted(map(list, buffers.values())) == [[1, 2], [3, 5]] and all(key.startswith("a clip") for key in buffers)


def test_evaluation_adapter_and_card(tmp_path):
    made = trainer(tmp_path, eval_dataset=pictures(2), max_steps=1, num_sample_videos=2)
    used, sample = [], made.policy.sample
    made.policy.sample = lambda *a, **k: used.append(k["conditions"]["image"]) or sample(*a, **k)
    made.train()
    made.save_model()
    before, rollout, after, base, trained = used
    assert numbers(before) == numbers(after) == numbers(base) == numbers(trained) == [0, 1] and len(rollout) == 4
    assert (tmp_path / "samples" / "before_after_eval.png").exists() and (tmp_path / "report.md").exists()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(code, "snippet", "exec")
    assert 'image=load_image("your_image.png")' in code and "import encode_video, load_image" in code


def test_the_columns_may_hold_pictures_paths_or_tensors(tmp_path):
    PICTURES[0].save(tmp_path / "0.png")
    pixels = np.array(PICTURES[0]).transpose(2, 0, 1)
    for given in (
        PICTURES[0],
        str(tmp_path / "0.png"),
        tmp_path / "0.png",
        pixels,
        pixels.tolist(),
        torch.tensor(pixels) / 255,
        PICTURES[0].convert("RGBA"),
    ):
        assert np.array_equal(np.array(load_image(given)), np.array(PICTURES[0]))
    for column in ([str(tmp_path / "0.png")], [pixels.tolist()], [PICTURES[0]]):
        check_images("train_dataset", Dataset.from_dict({"prompt": ["a"], "image": column}), ["image"])


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "columns .*none named 'image', which the pipeline takes its images from"),
        ({"image": [PICTURES[0], None]}, "train_dataset row 1: image is None"),
        (
            {"image": ["here.png", "nowhere.png"]},
            "train_dataset row 0: image is 'here.png', which is not a file",
        ),
        ({"image": [1.5, 2.5]}, "train_dataset row 0: image: expected an image .*got a float"),
        ({"image": [[[1.0]], [[1.0]]]}, r"row 0: image: expected an image tensor \(3, H, W\), got \(1, 1\)"),
        ({"image": [[[[7.5]], [[0.0]], [[0.0]]]] * 2}, r"row 0: image: expected an image tensor in \[0, 1\]"),
    ],
)
def test_bad_columns(tmp_path, columns, message):
    data = Dataset.from_dict({"prompt": ["a", "b"], **columns})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, data=data)
    with pytest.raises(ValueError, match=message.replace("train_dataset", r"eval_dataset\['held'\]")):
        trainer(tmp_path, eval_dataset={"held": data})


def test_a_missing_image_is_found_in_a_selection_too(tmp_path):
    data = Dataset.from_dict({"prompt": list("abcd"), "image": [None, *PICTURES[:3]]})
    check_images("data", data.select([3, 1]), ["image"])
    with pytest.raises(ValueError, match="data row 1: image is None"):
        check_images("data", data.select([3, 0]), ["image"])


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    PICTURES[0].save(tmp_path / "0.png")
    paths = [str(tmp_path / "0.png"), str(tmp_path / "text.png")]
    data = Dataset.from_dict({"prompt": ["a", "b"], "image": paths})
    made = trainer(tmp_path / "run", data=data, eval_dataset=data, max_steps=1)
    with pytest.raises(ValueError, match="image of prompt 'b': .*text.png: cannot be read as an image"):
        made.train()


def test_image_columns(tmp_path):
    """Named as the arguments they are for; without them an image is only a column for the rewards."""
    with pytest.raises(ValueError, match="image_columns=.*takes no argument 'picture'"):
        trainer(tmp_path, image_columns=["picture"])
    data = pictures(last_image=PICTURES[::-1])
    made = trainer(
        tmp_path,
        data=data,
        # 34: the image encoder gives 17 tokens for the first frame and 17 for the last
        model=quiet(BUILD["wan_i2v"](transformer={"pos_embed_seq_len": 34})),
        image_columns=["image", "last_image"],
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
    )
    made.train()
    first, last = (made.scored.samples.conditions[name] for name in ("image", "last_image"))
    assert [a + b for a, b in zip(numbers(first), numbers(last))] == [3, 3]
    plain = tiny_runs.trainer(tmp_path / "wan", data=pictures(), max_steps=1)
    plain.train()
    assert plain.image_columns == [] and plain.scored.samples.conditions == {}


@pytest.mark.parametrize("through", ["last_steps", "low_variance"])
def test_rewards_are_followed_through_an_image_to_video_pipeline(tmp_path, through):
    call = {**SIZES["ltx_i2v"], "pipeline_kwargs": {"max_sequence_length": 16}}
    made = RewardBackpropTrainer(
        quiet(BUILD["ltx_i2v"]()),
        backprop.bright,
        backprop.config(tmp_path, backprop_through=through, **call),
        pictures(2),
        eval_dataset=pictures(2),
        peft_config=default_lora_config(4),
    )
    tiny_runs.enliven(made)
    start, used, sample = weights(made), [], made.policy.sample_with_gradients
    made.policy.sample_with_gradients = lambda *a, **k: used.append(k["conditions"]["image"]) or sample(*a, **k)
    made.train()
    assert all(sorted(numbers(images)) == [0, 1] for images in used)
    assert largest_difference(start, weights(made)) > 0 and (tmp_path / "samples" / "before_after_eval.png").exists()


def test_the_consistency_term_of_image_to_video(tmp_path):
    """Its clips have images; the first latent frame, which is the image's, is not part of the loss."""
    clips = [{"prompt": f"clip {i}", "video": torch.rand(9, 3, 32, 32), "image": PICTURES[i]} for i in range(2)]
    call = {**SIZES["ltx_i2v"], "pipeline_kwargs": {"max_sequence_length": 16}}
    made = RewardBackpropTrainer(
        quiet(BUILD["ltx_i2v"]()),
        None,
        backprop.config(tmp_path, max_steps=2, **call),
        pictures(4),
        peft_config=default_lora_config(4),
        auxiliary_losses=[ConsistencyDistillation(clips, steps=3)],
    )
    made.train()
    assert all(np.isfinite(value) and value > 0 for value in logged(made, "consistency_loss"))
    (term,) = made.auxiliary_losses
    term.dataset = [{k: clip[k] for k in ("prompt", "video")} for clip in clips]
    with pytest.raises(ValueError, match="none named 'image'"):
        term.loss(0, 1)


def test_a_run_on_images(tmp_path):
    """A text-to-image pipeline makes videos of one frame; its card says what it makes."""
    made = trainer(
        tmp_path, "sd3", tiny_runs.prompts(), num_frames=None, max_steps=2, eval_dataset=tiny_runs.prompts(2)
    )
    made.train()
    made.save_model()
    assert len(logged(made, "reward")) == 2 and max(logged(made, "replay/max_log_prob_error")) <= 1e-6
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and '.images[0].save("image.png")' in card
    assert json.loads((tmp_path / "report.json").read_text())["comparison"]["eval"]["reward"]["n"] == 2
    with Image.open(tmp_path / "samples" / "before_after_eval.png") as sheet:
        assert sheet.size[0] > 0
