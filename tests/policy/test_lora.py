"""Adapters: what is adapted, and that plain diffusers loads what is saved."""

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import BUILD, CALLS, quiet

from pisces_rl.hub import model_card
from pisces_rl.policy import (
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
from pisces_rl.policy.lora import has_lora_loader

PEFT_LAYOUT = ("t2v_sd", "allegro", "latte", "easyanimate", "cosmos")  # plain diffusers has no LoRA loader for them


def adapted(family, r=4, seed=0):
    pipe = quiet(BUILD[family]())
    denoisers = {n: c for n, c in pipe.components.items() if n in ("transformer", "unet")}
    torch.manual_seed(seed)
    counts = add_lora(denoisers, default_lora_config(r))
    parameters = lora_parameters(denoisers)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return pipe, denoisers, parameters, counts


def latents(pipe, family, seed=0):
    return pipe(prompt=["a fish"], num_inference_steps=2, output_type="latent",
                generator=torch.Generator().manual_seed(seed), **CALLS[family]).frames


@pytest.mark.parametrize("family", BUILD)
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
    torch.testing.assert_close(latents(fresh, family), trained)
    assert not torch.allclose(base, trained, atol=1e-3)
    call = dict(prompt=["a fish"], num_inference_steps=2, **CALLS[family])
    assert check_saved_lora(pipe, tmp_path, call, 1e-4) <= 1e-4


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
    for family, forbidden in (("hunyuan", "refiner"), ("mochi", "pooler")):
        _, _, parameters, _ = adapted(family)
        assert not [name for name in parameters if forbidden in name]
        assert [name for name in parameters if "ff" in name], f"{family}: no feed-forward adapted"


@pytest.mark.parametrize("config, message", [
    (LoraConfig(r=4, target_modules=["to_qq"]), r"\['to_qq'\] matches no module of transformer"),
    (LoraConfig(r=4, target_modules=["to_q", "nothing"]), r"\['nothing'\] matches no module"),
    (LoraConfig(r=4, target_modules="no.*match"), "matches no module"),
    (LoraConfig(r=4, target_modules=["to_q"], lora_dropout=0.1), "lora_dropout=0.1"),
    (LoraConfig(r=4, target_modules=["to_q"], task_type="CAUSAL_LM"), "task_type"),
])
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
