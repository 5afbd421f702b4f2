"""Model card and upload. The upload runs the real client against a Hub on this machine."""

import json
import re

import pytest
import torch
import yaml
from fake_hub import running_hub
from huggingface_hub import HfApi
from safetensors.torch import save_file

from pisces_rl import hub

COMPARISON = {
    "test_seen": {
        "reward": {"n": 64, "before": 1.234, "after": 1.5, "difference": 0.266, "low": 0.1, "high": 0.4},
        "nothing": {"n": 0, "before": 0.0, "after": 0.0, "difference": 0.0, "low": 0.0, "high": 0.0},
    }
}
SETTINGS = {"rewards": "verifier", "learning_rate": 2e-3, "transition": "flow_sde, noise level 0.7", "x": None}
PAPERS = [("2402.03300", "DeepSeekMath: Pushing the Limits"), ("2505.05470", "Flow-GRPO: Training Flow Matching")]


@pytest.fixture
def run_folder(tmp_path):
    """What a run leaves: adapter, samples, and much that must stay at home."""
    folder = tmp_path / "run"
    samples = folder / "samples" / "step_000030" / "test_seen"
    for old in ("step_000000", "step_000030"):
        (folder / "samples" / old / "test_seen").mkdir(parents=True)
    save_file({"transformer.a.lora_A.weight": torch.rand(4, 8)}, str(folder / "pytorch_lora_weights.safetensors"))
    for i in range(6):
        (samples / f"{i:03d}.mp4").write_bytes(bytes([i]) * 1000)
    (samples / "sheet.png").write_bytes(b"png")
    (samples / "rewards.json").write_text(json.dumps({"prompts": [f"a [red] circle: {i}" for i in range(6)]}))
    (folder / "samples" / "before_after_test_seen.png").write_bytes(b"sheet")
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# card\n")
    (folder / "report.md").write_text("| a |\n|---|\n")
    for secret in (
        "checkpoint-10/optimizer.safetensors",
        "checkpoint-10/pytorch_lora_weights.safetensors",
        "checkpoint-10/transformer/adapter_model.safetensors",
        "checkpoint-10/samples/a.mp4",
        "events/events.out.tfevents.1",
        ".checkpoint-20/pytorch_lora_weights.safetensors",
        "checkpoint-10/README.md",
        "training_args.json",
        "samples/.a.mp4.tmp",
    ):
        (folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (folder / secret).write_bytes(b"stays")
    return folder


def front_matter(card: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    assert match, card[:200]
    return yaml.safe_load(match[1])


def card(base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", **changes):
    arguments = {"trainer": "Video GRPO", "pipeline_class": "WanPipeline", "settings": SETTINGS} | changes
    return hub.model_card(base_model, **arguments)


def test_front_matter_says_what_it_is(run_folder):
    front = front_matter(card(folder=run_folder, comparison=COMPARISON, tags=["trl", "grpo"]))
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-video"
    assert front["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert front["tags"] == ["lora", "pisces_rl", "text-to-video", "trl", "grpo"]
    assert [w["output"]["url"] for w in front["widget"]] == [
        f"samples/step_000030/test_seen/{i:03d}.mp4" for i in range(4)
    ]
    assert front["widget"][1]["text"] == "a [red] circle: 1"


def test_huggingface_hub_reads_the_card(run_folder):
    from huggingface_hub import ModelCard

    read = ModelCard(card(folder=run_folder))
    assert read.data.library_name == "diffusers" and read.data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_card_shows_settings_scores_and_samples(run_folder):
    text = card(folder=run_folder, comparison=COMPARISON, papers=PAPERS)
    assert "| learning_rate | 0.002 |" in text and "| x |" not in text
    assert "| test_seen | reward | 64 | 1.234 | 1.500 | +0.266 [+0.100, +0.400] |" in text and "nothing" not in text
    assert "![before after test seen](samples/before_after_test_seen.png)" in text
    assert r"[a \[red\] circle: 2](samples/step_000030/test_seen/002.mp4)" in text
    for number in ("2602.01624", "2402.03300", "2505.05470"):
        assert number in text
    for path in re.findall(r"\]\((samples/[^)]+)\)", text):
        assert (run_folder / path).exists()


def test_card_cites_what_was_used():
    """The library's paper, then the given ones, each once, as BibTeX; no method by name only."""
    text = card(papers=[*PAPERS[1:], ("2010.02502", "Denoising Diffusion Implicit Models"), *PAPERS[1:]])
    entries = re.findall(r"@(\w+)\{([\w.]+),\n((?:  \w+ = \{.*\},?\n)+)\}", text.split("## Citation")[1])
    assert [(kind, key) for kind, key, _ in entries] == [
        ("inproceedings", "pisces2026"),
        ("misc", "arxiv2505.05470"),
        ("misc", "arxiv2010.02502"),
    ]
    assert "  title = {{Denoising Diffusion Implicit Models}},\n  year = {2020},\n  eprint = {2010.02502},\n" in text
    assert "2402.03300" not in text and "@misc" not in card()


def test_card_says_no_path_of_this_machine(tmp_path):
    model = tmp_path / "secret-place" / "my-model"
    model.mkdir(parents=True)
    text = card(str(model))
    assert "secret-place" not in text and "my-model" in text and "base_model" not in front_matter(text)


@pytest.mark.parametrize("base_model", ["tiny-wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "somewhere/not/a/hub/id"])
def test_snippet_is_python(base_model):
    text = card(base_model, repo_id="me/mine", call={"height": 64, "guidance_scale": 1.0, "callback": print})
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(code, "snippet", "exec")
    assert 'pipe("your prompt", height=64, guidance_scale=1.0).frames[0]' in code
    assert 'pipe.load_lora_weights("me/mine")' in code
    assert ('asset_path("tiny-wan")' in code) == (base_model == "tiny-wan")


@pytest.mark.parametrize(
    "settings, task, line",
    [
        (
            {"images": ["image"]},
            "image-to-video",
            '(prompt="your prompt", image=load_image("your_image.png"), height=64)',
        ),
        ({"still": True}, "text-to-image", 'pipe("your prompt", height=64).images[0].save("image.png")'),
    ],
)
def test_other_tasks(settings, task, line):
    text = card(call={"height": 64}, **settings)
    assert front_matter(text)["pipeline_tag"] == task and task in front_matter(text)["tags"]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(code, "snippet", "exec")
    assert line in code and ("encode_video" in code) == task.endswith("video")


def test_snippet_for_peft_layout(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "adapter_model.safetensors").write_bytes(b"x")
    code = re.search(r"```python\n(.*?)```", card(folder=tmp_path), re.S)[1]
    compile(code, "snippet", "exec")
    assert "PeftModel.from_pretrained(pipe.unet" in code and "load_lora_weights" not in code


@pytest.mark.parametrize("files", [("", "transformer_2/"), ("transformer_2/",)], ids=["both", "second"])
def test_snippet_for_two_experts(tmp_path, files):
    (tmp_path / "transformer_2").mkdir()
    (tmp_path / "checkpoint-1" / "transformer_2").mkdir(parents=True)
    for file in (*files, "checkpoint-1/", "checkpoint-1/transformer_2/"):
        (tmp_path / file / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    code = re.search(r"```python\n(.*?)```", card(folder=tmp_path, repo_id="me/mine"), re.S)[1]
    lines = [line for line in code.splitlines() if "load_lora_weights" in line]
    first = 'pipe.load_lora_weights("me/mine", weight_name="pytorch_lora_weights.safetensors")'
    second = 'weight_name="transformer_2/pytorch_lora_weights.safetensors", load_into_transformer_2=True'
    assert lines == [first] * (len(files) - 1) + [f'pipe.load_lora_weights("me/mine", {second})']


def test_snippet_with_a_guider():
    code = re.search(r"```python\n(.*?)```", card(call={"height": 64}, guider_scale=1.0), re.S)[1]
    assert 'pipe.guider = pipe.guider.new(guidance_scale=1.0)\nvideo = pipe("your prompt", height=64)' in code


def test_push_sends_adapter_card_and_samples_in_one_commit(run_folder):
    with running_hub() as server:
        url = hub.push_adapter(run_folder, "me/mine", private=True, commit_message="done")
        again = hub.push_adapter(run_folder, "mine", revision="v2")
    assert url == f"{server.url}/me/mine" and again == url
    assert server.repos["me/mine"].get("private") is True or server.repos["me/mine"].get("visibility") == "private"
    first, second = server.commits
    assert (first["repo"], first["revision"], first["message"]) == ("me/mine", "main", "done")
    assert second["revision"] == "v2" and server.branches == [("me/mine", "v2")]
    wanted = {
        "README.md",
        "report.md",
        "pytorch_lora_weights.safetensors",
        "samples/before_after_test_seen.png",
        "samples/step_000030/test_seen/sheet.png",
    }
    wanted |= {f"samples/step_000030/test_seen/{i:03d}.mp4" for i in range(6)}
    assert set(first["files"]) == wanted
    for path, content in first["files"].items():
        assert content == (run_folder / path).read_bytes()


@pytest.mark.parametrize(
    ("refuse", "token", "wanted"),
    [
        ({"/api/repos/create": 403}, None, "403: the token may not write there"),
        ({"/commit/": 403}, None, "403"),
        ({}, "hf_wrong", "401: no valid token"),
    ],
)
def test_a_refusal_says_where_the_files_are(run_folder, refuse, token, wanted):
    with running_hub() as server:
        server.refuse = refuse
        with pytest.raises(RuntimeError) as error:
            hub.push_adapter(run_folder, "me/mine", token=token)
    said = str(error.value)
    assert wanted in said
    assert "Nothing is lost" in said and str(run_folder) in said
    assert not server.commits
    assert (run_folder / "pytorch_lora_weights.safetensors").exists()


def test_a_client_from_before_talks_to_the_running_hub():
    """transformers keeps the client that its first upload of a process made."""
    kept = HfApi(endpoint="http://127.0.0.1:9")
    with running_hub() as server:
        assert kept.create_repo("me/mine").repo_id == "me/mine"
    assert "me/mine" in server.repos and kept.endpoint == "http://127.0.0.1:9"


def test_offline_says_where_the_files_are(run_folder):
    with pytest.raises(RuntimeError, match="Nothing is lost"):
        hub.push_adapter(run_folder, "me/mine", endpoint="http://127.0.0.1:9", token="hf_x")


def test_no_adapter(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no adapter.*save_model"):
        hub.push_adapter(tmp_path, "me/mine")


def test_bad_name(run_folder):
    with pytest.raises(ValueError, match="repo_id='a b/c'.*allowed"):
        hub.push_adapter(run_folder, "a b/c")
