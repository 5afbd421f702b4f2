"""Adapters: what is adapted, and that plain diffusers loads what is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from policy.adapted import give_adapter
from tiny_pipelines import BUILD, CALLS, CONDITIONS, EXPERTS, often, quiet

from pisces_rl.hub import model_card
from pisces_rl.policy import (
    VideoPolicy,
    adapters_off,
    add_lora,
    check_saved_lora,
    default_lora_config,
    load_lora,
    load_lora_state,
    lora_parameters,
    save_lora,
    without_adapters,
)
from pisces_rl.policy.lora.lora_files import LORA_FILE, has_lora_loader

# plain diffusers has no LoRA loader for them
PEFT_LAYOUT = ("t2v_sd", "allegro", "latte", "easyanimate", "cosmos", "hunyuan15")


def adapted(family, r=4, seed=0, only=None):
    pipe = quiet(BUILD[family]())
    denoisers = dict(VideoPolicy(pipe).denoiser.items())
    parameters, counts = give_adapter(denoisers, r, seed, std=0.3, only=only)
    return pipe, denoisers, parameters, counts


def call_of(family) -> dict:
    conditions = {name: values[0] for name, values in CONDITIONS[family].items()}
    return dict(prompt=["a fish"], num_inference_steps=2, **CALLS[family], **conditions)


def latents(pipe, family, seed=0):
    return pipe(output_type="latent", generator=torch.Generator().manual_seed(seed), **call_of(family))[0]


@pytest.mark.parametrize("family", often(BUILD))
def test_saved_adapter_loads_into_a_fresh_pipeline(family, tmp_path):
    pipe, _, parameters, counts = adapted(family)
    assert 2 * sum(counts.values()) == len(parameters)
    save_lora(pipe, tmp_path)
    trained = latents(pipe, family)
    fresh = quiet(BUILD[family]())
    base = latents(fresh, family)
    assert has_lora_loader(pipe) == (family not in PEFT_LAYOUT)
    if family in PEFT_LAYOUT:
        load_lora(fresh, tmp_path)
    else:
        fresh.load_lora_weights(tmp_path)
    if family in EXPERTS:
        second = "transformer_2/pytorch_lora_weights.safetensors"
        fresh.load_lora_weights(tmp_path, weight_name=second, load_into_transformer_2=True)
    torch.testing.assert_close(latents(fresh, family), trained)
    assert not torch.allclose(base, trained, atol=1e-3)
    assert check_saved_lora(pipe, tmp_path, call_of(family), 1e-4) <= 1e-4


@pytest.mark.parametrize("family", PEFT_LAYOUT)
def test_the_card_of_a_peft_layout_loads_it(family, tmp_path):
    """The lines of the card's snippet that load the adapter, run as they are."""
    pipe, _, _, _ = adapted(family)
    save_lora(pipe, tmp_path)
    card = model_card("you/base", "Video GRPO", type(pipe).__name__, {}, folder=tmp_path, repo_id=str(tmp_path))
    lines = [line for line in card.splitlines() if "PeftModel" in line]
    assert len(lines) == 2, card
    fresh = quiet(BUILD[family]())
    exec("\n".join(lines), {"pipe": fresh})
    torch.testing.assert_close(latents(fresh, family), latents(pipe, family))


@pytest.mark.parametrize("family", PEFT_LAYOUT)
def test_peft_loads_its_own_layout(family, tmp_path):
    pipe, denoisers, _, _ = adapted(family)
    save_lora(pipe, tmp_path)
    fresh = quiet(BUILD[family]())
    for name in denoisers:
        setattr(fresh, name, PeftModel.from_pretrained(getattr(fresh, name), tmp_path, subfolder=name))
    torch.testing.assert_close(latents(fresh, family), latents(pipe, family))


@pytest.mark.parametrize("expert, other", [("transformer", "transformer_2"), ("transformer_2", "transformer")])
def test_one_expert(expert, other, tmp_path):
    """Of Wan 2.2 one denoiser is adapted: only it is trained and saved, and plain diffusers loads it."""
    pipe, denoisers, parameters, counts = adapted("wan22_a14b", only=[expert])
    assert list(counts) == [expert] and all(name.startswith(f"{expert}.") for name in parameters)
    assert not any(p.requires_grad for p in denoisers[other].parameters())
    (file,) = save_lora(pipe, tmp_path)
    assert file == tmp_path / ("transformer_2" if expert == "transformer_2" else "") / LORA_FILE and file.exists()
    fresh = quiet(BUILD["wan22_a14b"]())
    into = dict(load_into_transformer_2=True) if expert == "transformer_2" else {}
    fresh.load_lora_weights(tmp_path, weight_name=str(file.relative_to(tmp_path)), **into)
    torch.testing.assert_close(latents(fresh, "wan22_a14b"), latents(pipe, "wan22_a14b"))
    assert check_saved_lora(pipe, tmp_path, dict(prompt=["a"], num_inference_steps=2, **CALLS["wan"]), 1e-4) <= 1e-4
    with pytest.raises(ValueError, match=f"does not fit {other}"):
        load_lora_state(adapted("wan22_a14b")[0], tmp_path)


def test_both_experts_are_restored(tmp_path):
    pipe, _, parameters, _ = adapted("wan22_a14b")
    save_lora(pipe, tmp_path)
    other, _, others, _ = adapted("wan22_a14b", seed=1)
    load_lora_state(other, tmp_path)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


@pytest.mark.parametrize("only", ["transformer", [], ["transformer_3"], ["transformer", "unet"]])
def test_denoisers_that_do_not_exist(only):
    with pytest.raises(ValueError, match=r"lora_denoisers=.*\['transformer', 'transformer_2'\].*unset"):
        adapted("wan22_a14b", only=only)


def test_the_last_text_stream_of_dual_blocks_is_left_alone():
    """Nothing reads it in HunyuanVideo 1.5; HunyuanVideo's single-stream blocks do."""
    text = ("add_q_proj", "to_add_out", "ff_context")
    names = adapted("hunyuan15")[2]
    assert not [n for n in names if "transformer_blocks.1." in n and any(t in n for t in text)]
    assert [n for n in names if "transformer_blocks.0." in n and "to_add_out" in n]
    assert [n for n in names if "transformer_blocks.1." in n and "add_k_proj" in n]
    assert [n for n in adapted("hunyuan")[2] if "to_add_out" in n]


def test_a_fresh_pipeline_keeps_what_the_user_set(tmp_path):
    pipe, _, _, _ = adapted("kandinsky5")
    fresh = without_adapters(pipe)
    assert fresh.prompt_template == pipe.prompt_template and fresh.config.transformer == pipe.config.transformer
    assert fresh.transformer is not pipe.transformer and fresh.vae is pipe.vae


def test_check_finds_an_adapter_that_is_not_the_trained_one(tmp_path):
    pipe, _, parameters, _ = adapted("wan")
    save_lora(pipe, tmp_path)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.5)
    with pytest.raises(RuntimeError, match="does not reproduce the trained model"):
        check_saved_lora(pipe, tmp_path, dict(prompt=["a"], num_inference_steps=2, **CALLS["wan"]), 1e-4)


def test_adapters_off_is_the_base_model():
    pipe, denoisers, _, _ = adapted("wan")
    base = latents(quiet(BUILD["wan"]()), "wan")
    with adapters_off(denoisers["transformer"]):
        torch.testing.assert_close(latents(pipe, "wan"), base)
    assert not torch.allclose(latents(pipe, "wan"), base, atol=1e-3)


def test_fresh_pipeline_shares_the_base_weights():
    pipe, _, _, _ = adapted("wan")
    fresh = without_adapters(pipe)
    assert not any("lora" in name for name, _ in fresh.transformer.named_parameters())
    assert fresh.transformer.patch_embedding.weight is pipe.transformer.patch_embedding.weight
    torch.testing.assert_close(latents(fresh, "wan"), latents(quiet(BUILD["wan"]()), "wan"))
    assert any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_default_targets_leave_token_refiners_and_poolers_alone():
    for family, forbidden in (
        ("hunyuan", "refiner"),
        ("mochi", "pooler"),
        ("hunyuan15", "refiner"),
        ("kandinsky5", "text_transformer"),
        ("kandinsky5", "modulation"),
    ):
        _, _, parameters, _ = adapted(family)
        assert not [name for name in parameters if forbidden in name]
        assert [n for n in parameters if "ff" in n or "feed_forward" in n], f"{family}: no feed-forward adapted"


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(r=4, target_modules=["to_qq"]), r"\['to_qq'\] matches no module of transformer"),
        (LoraConfig(r=4, target_modules=["to_q", "nothing"]), r"\['nothing'\] matches no module"),
        (LoraConfig(r=4, target_modules="no.*match"), "matches no module"),
        (LoraConfig(r=4, target_modules=["to_q"], lora_dropout=0.1), "lora_dropout=0.1"),
        (LoraConfig(r=4, target_modules=["to_q"], task_type="CAUSAL_LM"), "task_type"),
    ],
)
def test_configs_that_do_not_fit(config, message):
    pipe = quiet(BUILD["wan"]())
    with pytest.raises(ValueError, match=message):
        add_lora({"transformer": pipe.transformer}, config)


def test_state_of_another_adapter_is_refused(tmp_path):
    pipe, _, _, _ = adapted("wan", r=4)
    save_lora(pipe, tmp_path)
    other, _, _, _ = adapted("wan", r=8)
    with pytest.raises(ValueError, match="does not fit transformer"):
        load_lora_state(other, tmp_path)
    with pytest.raises(ValueError, match="holds no adapter"):
        load_lora(quiet(BUILD["wan"]()), tmp_path / "nowhere")


def test_state_is_restored_into_the_same_adapter(tmp_path):
    pipe, _, parameters, _ = adapted("wan")
    save_lora(pipe, tmp_path)
    other, _, others, _ = adapted("wan", seed=1)
    load_lora_state(other, tmp_path)
    for name in parameters:
        assert torch.equal(parameters[name], others[name])


def test_the_rounding_of_a_large_adapter_is_no_error(tmp_path):
    """A pipeline in bf16 loads an adapter in bf16 whichever dtype it was trained in."""
    pipe = quiet(BUILD["wan"]()).to(torch.bfloat16)
    torch.manual_seed(0)
    add_lora({"transformer": pipe.transformer}, default_lora_config(4))
    for parameter in lora_parameters({"transformer": pipe.transformer}).values():
        parameter.data = torch.randn(parameter.shape)
    before = {name: p.data.clone() for name, p in lora_parameters({"transformer": pipe.transformer}).items()}
    save_lora(pipe, tmp_path)
    call = {"prompt": ["a video"], "num_inference_steps": 2} | CALLS["wan"]
    assert check_saved_lora(pipe, tmp_path, call, 5e-2) < 1e-3
    after = lora_parameters({"transformer": pipe.transformer})
    assert all(torch.equal(before[name], p) and p.dtype == torch.float32 for name, p in after.items())
