"""The card's snippet, run as a reader runs it, for each way in which an adapter is saved.

Only the repository's and the model's name and the pictures' files are replaced.
"""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_pipelines import BUILD, CALLS, CONDITIONS, quiet
from trainers.tiny_runs import enliven, trainer

from pisces_rl.policy.pipeline.guider import guided

#: kind: family, further settings. The layouts of diffusers and of peft, Wan 2.2's experts, a guider, images.
KINDS = {
    "diffusers": ("wan", {}),
    "both experts": ("wan22_a14b", {}),
    "second expert": ("wan22_a14b", {"lora_denoisers": ["transformer_2"]}),
    "first expert": ("wan22_a14b", {"lora_denoisers": ["transformer"]}),
    "peft": ("t2v_sd", {}),
    "peft and a guider": ("hunyuan15", {}),
    "image to video": ("ltx_i2v", {}),
    "still": ("sd3", {}),
    "vae tiling": ("wan", {"vae_tiling": True}),
    "all weights": ("wan", {"peft_config": "full"}),
    "all weights of an expert": ("wan22_a14b", {"peft_config": "full", "lora_denoisers": ["transformer_2"]}),
}


def saved_run(kind, tmp_path, **given):
    """A trainer on a model in a folder, whose adapter is not zero, saved; its pictures."""
    family, more = KINDS[kind]
    quiet(BUILD[family]()).save_pretrained(tmp_path / "model")
    call = dict(CALLS[family])
    settings = {name: call.pop(name, None) for name in ("height", "width", "num_frames", "guidance_scale")}
    pictures = CONDITIONS[family].get("image", [])
    columns = {"image": pictures} if pictures else {}
    data = Dataset.from_dict({"prompt": ["clip 0", "clip 1"], **columns})
    made = trainer(
        tmp_path / "run",
        data=data,
        model=str(tmp_path / "model"),
        pipeline_kwargs=call,
        eval_dataset=data.select([0]),
        **settings | more | given,
    )
    enliven(made, 5.0)
    made.evaluate()
    made.save_model()
    return made, pictures


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippet_makes_what_the_trained_model_makes(kind, tmp_path, monkeypatch):
    """From the same noise, in fp32."""
    made, pictures = saved_run(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    for picture in pictures[:1]:
        picture.save("your_image.png")
    found = run_snippet(tmp_path)
    images = {"image": Image.open("your_image.png")} if pictures else {}
    trained = trained_output(made, images)
    assert (tmp_path / ("image.png" if kind == "still" else "video.mp4")).stat().st_size > 0
    shown = pixels(Image.open("image.png") if kind == "still" else found["video"])
    tolerance = 1e-4 if isinstance(found.get("video"), np.ndarray) else 1.01 / 255
    error = np.abs(shown - trained).max()
    assert shown.shape == trained.shape and error <= tolerance
    with made.initial.untrained():
        untrained = trained_output(made, images)
    assert np.abs(untrained - trained).max() > 2 * error + 1e-5  # the adapter matters


def test_the_snippet_in_bf16_is_nearer_than_rounding(tmp_path, monkeypatch):
    """In bf16 it differs from the trained model by less than bf16 itself differs from fp32."""
    monkeypatch.chdir(tmp_path)
    made, _ = saved_run("diffusers", tmp_path, bf16=True)
    shown, trained = pixels(run_snippet(tmp_path)["video"]), trained_output(made, {})
    assert "dtype=torch.bfloat16" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    made.pipeline.to(torch.float32)
    assert np.abs(shown - trained).mean() < 0.5 * np.abs(trained_output(made, {}) - trained).mean()


def run_snippet(folder) -> dict:
    """The names that the card's code leaves, run in the present folder with the generator of torch at 0."""
    code = re.search(r"```python\n(.*?)```", (folder / "run" / "README.md").read_text(encoding="utf-8"), re.S)[1]
    code = re.sub("you/this-(adapter|model)", str(folder / "run"), code)
    code = code.replace("path/to/model", str(folder / "model"))
    load, run = re.match(r"(.*\n)((?:video = )?pipe\(.*)", code, re.S).groups()
    found = {}
    exec(load, found)
    torch.manual_seed(0)
    exec(run, found)
    return found


def trained_output(made, images) -> np.ndarray:
    """What the trainer's own pipeline makes of the card's prompt and of the settings that it trained with."""
    call = {"num_inference_steps": made.args.num_inference_steps} | made.policy.pipeline_kwargs | images
    torch.manual_seed(0)
    with guided(made.pipeline, call) as arguments:
        output = made.pipeline(prompt="your prompt", **arguments)
    return pixels((output.images if made.policy.makes_images else output.frames)[0])


def pixels(shown) -> np.ndarray:
    """Values in [0, 1] of a video's array, its pictures or one picture."""
    if isinstance(shown, np.ndarray):
        return shown.astype(float)
    return np.asarray([np.asarray(frame) for frame in shown] if isinstance(shown, list) else shown) / 255.0
