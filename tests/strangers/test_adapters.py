"""Adapters that users bring: already on the pipeline, or with peft options that a run cannot keep."""

import dataclasses
import re

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import BUILD, CALLS, quiet
from trainers import tiny_runs
from trainers.tiny_runs import config, largest_difference, prompts, trainer, weights

from pisces_rl import VideoGRPOTrainer
from pisces_rl.policy import (
    add_lora,
    check_lora_config,
    check_no_adapters,
    check_saved_lora,
    default_lora_config,
    load_lora_state,
    lora_parameters,
    save_lora,
)
from pisces_rl.policy.fast.execution import CompiledBlock
from pisces_rl.policy.lora.options import KEPT, NOTES, REFUSED


def with_adapter(name="mine", targets=("to_q",), family="wan"):
    pipe = quiet(BUILD[family]())
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), name)
    return pipe


def snapshot(pipe) -> dict:
    """Weights, their flags and the modes of a pipeline, to see that nothing was changed."""
    return {
        f"{name}.{key}": (p.detach().clone(), p.requires_grad)
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for key, p in module.named_parameters()
    }


def equal(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[k][0], after[k][0]) and before[k][1] == after[k][1] for k in before
    )


# --- a pipeline that carries a LoRA ---


def loaded(tmp_path):
    """By pipe.load_lora_weights, as most people have one."""
    save_lora(with_adapter("default"), tmp_path / "lora")
    pipe = quiet(BUILD["wan"]())
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    return pipe


def fused(tmp_path):
    pipe = loaded(tmp_path)
    pipe.fuse_lora()
    return pipe


def disabled(tmp_path):
    pipe = loaded(tmp_path)
    pipe.disable_lora()
    return pipe


def several(tmp_path):
    pipe = with_adapter("one")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "style")
    return pipe


def everywhere(tmp_path):
    pipe = quiet(BUILD["wan"]())
    add_lora({"transformer": pipe.transformer}, default_lora_config(4))
    pipe.transformer.peft_config["style"] = pipe.transformer.peft_config.pop("default")
    for layer in pipe.transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            for part in (layer.lora_A, layer.lora_B):
                part["style"] = part.pop("default")
    return pipe


def wrapped(tmp_path):
    pipe = quiet(BUILD["wan"]())
    pipe.transformer = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"]), "style")
    return pipe


def in_text_encoder(tmp_path):
    pipe = quiet(BUILD["wan"]())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), pipe.text_encoder, "style")
    return pipe


@pytest.mark.parametrize("bring", [loaded, fused, disabled, several, everywhere, wrapped, in_text_encoder])
def test_a_pipeline_with_a_lora_is_refused_unchanged(bring, tmp_path):
    """Someone trains the pipeline they have been generating with."""
    pipe = bring(tmp_path)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"already has the adapter .*'style'.*continue_from") as raised:
        trainer(tmp_path / "run", model=pipe)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)
    fix = {wrapped: "merge_and_unload", in_text_encoder: "save: load the pipeline again"}.get(bring, "unload_lora")
    assert fix in str(raised.value)
    assert equal(before, snapshot(pipe))


def follow_advice(pipe) -> int:
    """Run the code that each error names until none is raised; returns how many there were."""
    for count in range(4):
        try:
            check_no_adapters({name: c for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)})
        except ValueError as error:
            exec(re.search("`(.*)`", str(error))[1], {"pipe": pipe})
        else:
            return count
    raise AssertionError("the advice does not end")


@pytest.mark.parametrize("family", ["wan22_a14b", "hunyuan15"])
def test_the_advice_keeps_every_adapter(family):
    """Adapters on both experts of Wan 2.2, and on a pipeline without fuse_lora: what it computes stays."""
    pipe = quiet(BUILD[family]())
    names = [name for name in ("transformer", "transformer_2") if pipe.components.get(name) is not None]
    merged = {}
    for name in names:
        module = pipe.components[name]
        module.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        layer = next(m for m in module.modules() if isinstance(m, BaseTunerLayer))
        merged[name] = layer.weight + layer.get_delta_weight("style")
    where = {
        name: next(k for k, m in pipe.components[name].named_modules() if isinstance(m, BaseTunerLayer))
        for name in names
    }
    assert follow_advice(pipe) == len(names) == (2 if family == "wan22_a14b" else 1)
    for name in names:
        torch.testing.assert_close(pipe.components[name].get_submodule(where[name]).weight, merged[name])


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_no_advice_that_cannot_be_followed(component):
    """A LoRA that peft put into Latte, or into a text encoder: neither has a method that fuses it."""
    pipe = quiet(BUILD["latte"]())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "q"]), pipe.components[component], "style")
    with pytest.raises(ValueError, match=f"{component} already has .* save: load the pipeline again. [^`]*$"):
        check_no_adapters({component: pipe.components[component]})


def test_the_advice_to_fuse_works(tmp_path):
    """Someone does as the error says: their LoRA is part of the base, and trains like a base that had it."""
    pipe = loaded(tmp_path)
    assert follow_advice(pipe) == 1
    other = fused(tmp_path).transformer.blocks[0].attn1.to_q.get_base_layer().weight
    assert torch.equal(pipe.transformer.blocks[0].attn1.to_q.weight, other)
    made = trainer(tmp_path / "run", model=pipe, max_steps=1)
    assert all("lora_" in name for name in made.adapter)
    made.train()
    made.save_model()


def test_the_advice_to_merge_a_peft_model_works(tmp_path):
    """Someone wrapped the denoiser by get_peft_model, and merges it as the error says."""
    pipe = wrapped(tmp_path)
    pipe.transformer = pipe.transformer.merge_and_unload()
    made = trainer(tmp_path / "run", model=pipe, max_steps=1)
    made.train()
    made.save_model()


def one_step(folder, pipe) -> tuple[dict, dict]:
    """Weights after one optimizer step, and the classes of a pipeline's modules."""
    made = trainer(folder, model=pipe, max_steps=1)
    modules = {
        f"{name}.{key}": m
        for name, c in pipe.components.items()
        if isinstance(c, torch.nn.Module)
        for key, m in c.named_modules()
    }
    assert not any(vars(m).keys() & {"_hf_hook", "decode", "encode"} for m in modules.values())
    assert not any(isinstance(vars(m).get("forward"), CompiledBlock) for m in modules.values())
    assert not pipe.transformer.is_gradient_checkpointing
    made.train()
    return weights(made), {key: type(m) for key, m in modules.items()}


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("fresh"), tiny_runs.pipeline())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
        {"offload": ["text_encoder", "vae"]},
    ],
    ids=["plain", "compiled", "checkpointed", "offloaded"],
)
def test_two_trainers_on_one_pipeline(settings, tmp_path, fresh_run):
    """A notebook: a second trainer on the pipeline of the first. It is refused; after unloading it is like new."""
    pipe = tiny_runs.pipeline()
    first = trainer(tmp_path / "first", model=pipe, max_steps=1, **settings)
    if not first.policy.compiled:  # the blocks are replaced already
        first.train()
    with pytest.raises(ValueError, match="transformer already has the adapter 'default'"):
        trainer(tmp_path / "second", model=pipe)
    pipe.unload_lora_weights()
    own, classes = one_step(tmp_path / "second", pipe)
    assert classes == fresh_run[1]
    assert largest_difference(own, fresh_run[0]) == 0


# --- options of peft ---


def test_every_peft_option_is_either_supported_or_refused():
    """An option that a new peft adds is refused until lora_options.py lists it."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == KEPT | NOTES | REFUSED.keys()
    assert not KEPT & REFUSED.keys() and not NOTES & (KEPT | REFUSED.keys())


#: A value of each refused option, as a stranger may set it after the config was made or in it.
VALUES = {
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["proj_out"],
    "layers_to_transform": [0],
    "layers_pattern": "blocks",
    "megatron_config": {"a": 1},
    "megatron_core": "other",
    "trainable_token_indices": [1],
    "loftq_config": {"bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "use_dora": True,
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"a": 1},
    "layer_replication": [(0, 1)],
    "lora_bias": True,
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "target_parameters": ["a.weight"],
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_that_a_run_cannot_keep(option):
    """Someone copies a peft config from a language model's script."""
    asked = LoraConfig(r=4, target_modules=["to_q"])
    setattr(asked, option, VALUES[option])
    with pytest.raises(ValueError, match=f"peft_config: {option}=[^:]*.*: .{{10}}"):
        check_lora_config(asked)


@pytest.mark.parametrize(
    "start", [False, "pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal", "mica", "lora_ga"]
)
def test_initial_values_that_change_the_base(start):
    """PiSSA, OLoRA and LoftQ take their start out of the base weights, which the saved file does not hold."""
    asked = LoraConfig(r=4, target_modules=["to_q"])
    asked.init_lora_weights = start
    with pytest.raises(ValueError, match="init_lora_weights=.*use True or 'gaussian'"):
        check_lora_config(asked)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"r": 8}, r"peft_config is \{'r': 8\}, but must be a peft.LoraConfig.*LoraConfig\(\*\*peft_config\)"),
        ("you/adapter", "peft_config is 'you/adapter'.*continue_from"),
        (LoHaConfig(target_modules=["to_q"]), "peft_config is a LoHaConfig"),
        (IA3Config(target_modules=["to_q"], feedforward_modules=[]), "peft_config is a IA3Config"),
        (AdaLoraConfig(target_modules=["to_q"], total_step=10), "peft_config is a AdaLoraConfig"),
        (LoraConfig(r=0), "r=0 must be a whole number of at least 1"),
        (LoraConfig(r=-4), "r=-4 must be"),
        (LoraConfig(r=4, lora_alpha=0), "lora_alpha=0 must be positive"),
        (LoraConfig(r=4, lora_alpha=-8), "lora_alpha=-8 must be positive"),
        (default_lora_config(4, 0), "lora_alpha=0 must be positive"),  # was taken for unset
        (LoraConfig(r=4, target_modules=[]), "names no module"),
        (default_lora_config(4, None, []), "names no module"),
        (LoraConfig(r=4, rank_pattern={"to_q": 0}), r"rank_pattern\['to_q'\]=0"),
        (LoraConfig(r=4, alpha_pattern={"to_q": -1}), r"alpha_pattern\['to_q'\]=-1"),
    ],
)
def test_configs_are_refused_before_a_model_is_loaded(asked, message, tmp_path):
    """A model that cannot be loaded shows that the config was looked at first."""
    with pytest.raises(ValueError, match=message):
        VideoGRPOTrainer("no/such-model", tiny_runs.brightness, config(tmp_path), prompts(), peft_config=asked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank_pattern": {"to_x": 8}}, "rank_pattern has 'to_x', which matches none"),
        ({"exclude_modules": ["to_q"]}, r"LoRA target \['to_q'\] matches no module"),
    ],
)
def test_options_that_match_nothing(options, message):
    """A typing error in a pattern was ignored."""
    with pytest.raises(ValueError, match=message):
        add_lora(
            {"transformer": quiet(BUILD["wan"]()).transformer},
            LoraConfig(r=4, target_modules=["to_q", "to_k"], **options),
        )


@pytest.mark.parametrize("family", ["wan", pytest.param("latte", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 6},
        {"lora_alpha": 2.5},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 9}},
        {"exclude_modules": ["to_k"]},
        {"exclude_modules": r".*ff.*"},
        {"target_modules": "all-linear"},
        {"inference_mode": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_that_are_kept_are_saved_and_reloaded(family, options, tmp_path):
    """Plain diffusers or peft loads exactly what was trained, for every scale and rank."""
    pipe, again = quiet(BUILD[family]()), quiet(BUILD[family]())
    for one, seed in ((pipe, 0), (again, 1)):
        torch.manual_seed(seed)
        add_lora({"transformer": one.transformer}, LoraConfig(r=4, **options))
    parameters = lora_parameters({"transformer": pipe.transformer})
    assert all(p.dtype == torch.float32 for p in parameters.values())
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2)
    save_lora(pipe, tmp_path)
    call = dict(prompt=["a fish"], num_inference_steps=2, **CALLS[family])
    assert check_saved_lora(pipe, tmp_path, call, 1e-4) <= 1e-4
    load_lora_state(again, tmp_path)
    restored = lora_parameters({"transformer": again.transformer})
    assert parameters.keys() == restored.keys()
    assert all(torch.equal(parameters[name], restored[name]) for name in parameters)


def test_without_target_modules_the_default_ones_are_adapted():
    """LoraConfig(r=8), as peft's own examples write it."""
    counts = [
        add_lora({"transformer": quiet(BUILD["wan"]()).transformer}, asked)
        for asked in (LoraConfig(r=8), default_lora_config(8))
    ]
    assert counts[0] == counts[1]


def test_all_linear_from_a_command_line_is_a_list():
    assert default_lora_config(4, None, ["all-linear"]).target_modules == "all-linear"


def test_the_printed_count_is_what_was_adapted():
    """A pattern for the last projection alone: peft takes its name for the end of each block's, too."""
    pipe = quiet(BUILD["wan"]())
    counts = add_lora({"transformer": pipe.transformer}, LoraConfig(r=4, target_modules=r"proj_out"))
    assert counts == {"transformer": 1}
    pipe = quiet(BUILD["hunyuan"]())
    longer = [n for n, m in pipe.transformer.named_modules() if n.endswith(".proj_out")]
    assert longer, "a family whose blocks have a projection of the same name"
    counts = add_lora({"transformer": pipe.transformer}, LoraConfig(r=4, target_modules=r"proj_out"))
    found = [n for n, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)]
    assert (counts, found) == ({"transformer": 1}, ["proj_out"])


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"alpha_pattern": {"to_q": 8}}, {"lora_alpha": 8}],
    ids=lambda settings: "+".join(settings),
)
def test_another_scale_is_not_resumed(settings, tmp_path):
    """The same shapes with another factor would be another model."""
    first = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    other = VideoGRPOTrainer(
        tiny_runs.pipeline(),
        tiny_runs.brightness,
        config(tmp_path, max_steps=2),
        prompts(),
        peft_config=LoraConfig(r=4, **{"lora_alpha": 4} | settings),
    )
    with pytest.raises(ValueError, match="another lora_alpha"):
        other.train(resume_from_checkpoint=True)
