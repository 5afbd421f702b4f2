"""Adapters merged into the base: the same output, in all experts, and what is refused."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from export.test_adapter_export import latents, trained
from safetensors.torch import load_file
from tiny_pipelines import BUILD, quiet

from pisces_rl import export_adapter, merge_adapter
from pisces_rl.policy import read_adapter, save_lora


# sana_video's feed-forward layers are convolutions; hunyuan15 has no LoRA loader
@pytest.mark.parametrize("family", ["wan", "wan22_a14b", "hunyuan", "hunyuan15", "cogvideox", "mochi", "sana_video"])
def test_the_merged_model_gives_the_adapters_output(family, tmp_path):
    pipe = trained(family, tmp_path, lora_alpha=3, use_rslora=True)
    base, expected = quiet(BUILD[family]()), latents(pipe, family)
    assert (latents(base, family) - expected).abs().max() > 1e-3
    merged = merge_adapter(base, tmp_path)
    torch.testing.assert_close(latents(base, family), expected, rtol=1e-3, atol=1e-3)
    assert set(merged) == ({"transformer", "transformer_2"} if family == "wan22_a14b" else {"transformer"})
    assert all(0.99 * m.weights < m.changed <= m.weights for m in merged.values())


def test_the_saved_component_is_what_plain_diffusers_loads(tmp_path):
    pipe = trained("wan22_a14b", tmp_path / "run")
    base = quiet(BUILD["wan22_a14b"]())
    merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    fresh = quiet(BUILD["wan22_a14b"]())
    for name in ("transformer", "transformer_2"):
        setattr(fresh, name, WanTransformer3DModel.from_pretrained(tmp_path / "merged", subfolder=name))
    torch.testing.assert_close(latents(fresh, "wan22_a14b"), latents(base, "wan22_a14b"))
    torch.testing.assert_close(latents(fresh, "wan22_a14b"), latents(pipe, "wan22_a14b"), rtol=1e-3, atol=1e-3)


def test_the_sum_is_in_fp32_and_rounded_once(tmp_path):
    trained("wan", tmp_path)
    base = BUILD["wan"]().transformer.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    (merged,) = merge_adapter(base, tmp_path).values()
    adapter, changed = read_adapter(tmp_path), 0
    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, weight in base.state_dict().items():
        expected = before[name]
        if name.removesuffix(".weight") in adapter.configs["transformer"].target_modules:
            module = f"transformer.{name.removesuffix('.weight')}"
            a, b = (file[f"{module}.lora_{p}.weight"] for p in "AB")
            expected = (expected.float() + b @ a).to(torch.bfloat16)
            changed += int((expected != before[name]).sum())
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected)
    assert merged.changed == changed and merged.modules == 20


def test_a_small_adapter_is_said_to_change_few_weights_of_bf16(tmp_path):
    pipe = trained("wan", tmp_path)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-5
    save_lora(pipe, tmp_path)
    (merged,) = merge_adapter(BUILD["wan"]().transformer.to(torch.bfloat16), tmp_path).values()
    assert merged.changed < 0.1 * merged.weights


def test_nothing_changes_where_it_is_refused(tmp_path):
    pipe = trained("wan", tmp_path / "run")
    other = BUILD["ltx"]()
    before = {name: weight.clone() for name, weight in other.transformer.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit transformer of this model"):
        merge_adapter(other, tmp_path / "run")
    assert all(torch.equal(weight, before[name]) for name, weight in other.transformer.state_dict().items())
    with pytest.raises(ValueError, match="transformer already has the adapter 'default'"):
        merge_adapter(pipe, tmp_path / "run")
    eight = BUILD["wan"]().transformer
    eight.blocks[1].ffn.net[2].to(torch.float8_e4m3fn)
    before = eight.blocks[0].attn1.to_q.weight.clone()
    with pytest.raises(ValueError, match="blocks.1.ffn.net.2 of transformer is a Parameter of torch.float8_e4m3fn"):
        merge_adapter(eight, tmp_path / "run")
    assert torch.equal(eight.blocks[0].attn1.to_q.weight, before)
    trained("wan22_a14b", tmp_path / "two")
    with pytest.raises(ValueError, match="give the pipeline as model"):
        merge_adapter(BUILD["wan22_a14b"]().transformer, tmp_path / "two")
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(other, tmp_path)


def test_the_adapters_own_folder_is_no_place_for_the_merged_model(tmp_path, monkeypatch):
    trained("wan", tmp_path / "run")
    export_adapter(tmp_path / "run", tmp_path / "peft", "peft")
    monkeypatch.setenv("HOME", str(tmp_path))
    base, kept = BUILD["wan"](), sorted(tmp_path.rglob("*"))
    before = {name: weight.clone() for name, weight in base.transformer.state_dict().items()}
    for folder, output in (
        (tmp_path / "run", tmp_path / "run"),
        (tmp_path / "run", "~/run"),
        ("~/run", tmp_path / "peft" / ".." / "run"),
        (tmp_path / "run" / "pytorch_lora_weights.safetensors", tmp_path / "run"),
        (tmp_path / "peft" / "transformer", tmp_path / "peft"),
    ):
        with pytest.raises(ValueError, match="is the adapter's own folder"):
            merge_adapter(base, folder, output)
    assert sorted(tmp_path.rglob("*")) == kept
    assert all(torch.equal(weight, before[name]) for name, weight in base.transformer.state_dict().items())
    merge_adapter(base, "~/run", "~/merged")
    assert (tmp_path / "merged" / "transformer" / "config.json").is_file()
