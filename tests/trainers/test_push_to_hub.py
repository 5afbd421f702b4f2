"""`push_to_hub=True`: a real run and the real client, against a local stand-in for the Hub's API."""

from fake_hub import TOKEN, running_hub
from tiny_runs import prompts, trainer


def test_a_run_uploads_adapter_card_and_samples(tmp_path):
    with running_hub() as server:
        settings = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": TOKEN}
        made = trainer(tmp_path / "run", eval_dataset=prompts(2), **settings)
        made.train()
        made.save_model()
    files = server.commits[-1]["files"]
    assert server.commits[-1]["repo"] == "me/mine"
    assert {"README.md", "pytorch_lora_weights.safetensors", "report.md"} <= set(files)
    assert any(name.endswith(".mp4") for name in files) and not any("checkpoint" in name for name in files)
    assert TOKEN not in files["README.md"].decode()
