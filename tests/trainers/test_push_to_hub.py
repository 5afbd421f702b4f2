"""`push_to_hub=True`, against a local stand-in for the Hub's API: a real run and the real client."""

from fake_hub import TOKEN, client_environment, running_hub
from huggingface_hub import close_session, constants, hf_api
from tiny_runs import prompts, trainer


def test_a_run_uploads_adapter_card_and_samples(tmp_path, monkeypatch):
    with running_hub() as server:
        for name, value in client_environment(server, {}, tmp_path).items():
            monkeypatch.setenv(name, value)
        for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)  # read from the environment when they were imported
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # of create_repo and the other functions
        close_session()  # another one follows, with this environment
        made = trainer(tmp_path / "run", eval_dataset=prompts(2), push_to_hub=True, hub_model_id="me/mine",
                       hub_token=TOKEN)  # fmt: skip
        made.train()
        made.save_model()
    close_session()
    files = server.commits[-1]["files"]
    assert server.commits[-1]["repo"] == "me/mine"
    assert {"README.md", "pytorch_lora_weights.safetensors", "report.md"} <= set(files)
    assert any(name.endswith(".mp4") for name in files) and not any("checkpoint" in name for name in files)
    assert TOKEN not in files["README.md"].decode()
