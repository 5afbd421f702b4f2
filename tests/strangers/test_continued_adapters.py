"""Training a saved LoRA further: whoever wrote it, it is the start; what cannot be one is refused by name."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILD, CALLS, quiet
from trainers import tiny_runs
from trainers.tiny_runs import StopAt, config, largest_difference, logged, prompts, trainer, weights

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.estimate.networks import Networks
from pisces_rl.policy import add_lora, lora_parameters, read_adapter, save_lora
from pisces_rl.policy.lora.saved_adapter import LORA_FILE

ALPHA = 6


def adapted(family="wan", seed=3, only=None, **options):
    """A pipeline whose adapter is not zero; rank 4, alpha 6, some modules."""
    pipe = quiet(BUILD[family]())
    denoisers = {n: getattr(pipe, n) for n in ("transformer", "transformer_2") if getattr(pipe, n, None) is not None}
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": ALPHA, "target_modules": ["to_q", "to_out.0"]}
    add_lora(denoisers, LoraConfig(**defaults | options), only)
    with torch.no_grad():
        for parameter in lora_parameters(denoisers).values():
            parameter.normal_(std=0.1)
    return pipe


def latents(pipe, family="wan"):
    call = dict(prompt=["a fish"], num_inference_steps=2, output_type="latent", **CALLS[family])
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def continued(folder, start, *, model=None, peft_config=None, callbacks=None, **settings):
    return VideoGRPOTrainer(
        model or tiny_runs.pipeline(),
        tiny_runs.brightness,
        config(folder, continue_from=str(start), **settings),
        prompts(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of ours with one adapter of Wan. Nobody changes it."""
    folder = tmp_path_factory.mktemp("saved")
    save_lora(adapted(), folder)
    return folder


# --- who may have written it ---


def ours(folder):
    save_lora(adapted(), folder)
    return folder


def of_diffusers(folder):
    """`pipe.save_lora_weights` as diffusers' training scripts call it: no metadata, so alpha is the rank."""
    pipe = adapted(lora_alpha=4)
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def of_unequal_ranks(folder):
    pipe = adapted(lora_alpha=4, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def a_file(folder):
    ours(folder)
    return (folder / LORA_FILE).rename(folder / "my_style.safetensors")


def in_bf16(folder):
    pipe = adapted(lora_alpha=4)
    state = {k: v.bfloat16() for k, v in get_peft_model_state_dict(pipe.transformer).items()}
    pipe.save_lora_weights(folder, transformer_lora_layers=state)
    return folder


def with_rslora(folder):
    save_lora(adapted(use_rslora=True), folder)
    return folder


def with_dropout(folder):
    """How it was trained is no part of what it is."""
    pipe = adapted()
    pipe.transformer.peft_config["default"].lora_dropout = 0.1
    save_lora(pipe, folder)
    return folder


@pytest.mark.parametrize("write", [ours, of_diffusers, of_unequal_ranks, a_file, in_bf16, with_rslora, with_dropout])
def test_it_starts_from_what_plain_diffusers_loads(write, tmp_path):
    """Someone continues from a LoRA they trained elsewhere: before the first step the model is that one."""
    start = write(tmp_path / "start")
    reference = tiny_runs.pipeline()
    place = {"weight_name": start.name} if start.is_file() else {}
    reference.load_lora_weights(start.parent if start.is_file() else start, **place)
    reference.transformer.eval()
    made = continued(tmp_path / "run", start)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in made.adapter.values())
    torch.testing.assert_close(latents(made.pipeline), latents(reference))
    assert not torch.allclose(latents(made.pipeline), latents(tiny_runs.pipeline()), atol=1e-3)


def test_a_run_on_it_learns_saves_and_says_so(saved, tmp_path):
    """The card names the start by its last name only, and the saved adapter alone is the trained model."""
    made = continued(tmp_path, saved)
    before = weights(made)
    made.train()
    made.save_model()  # reloads in a fresh pipeline and compares
    assert largest_difference(before, weights(made)) > 0
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| continued from | {saved.name} |" in card and str(saved) not in card
    assert "| reference |" not in card  # beta is 0: nothing refers to it
    assert read_adapter(tmp_path).configs["transformer"].lora_alpha == ALPHA


def test_a_new_adapter_says_nothing_of_it(tmp_path):
    made = trainer(tmp_path)
    assert "continued from" not in made._card_settings() and "continued" not in made._identity


@pytest.mark.parametrize("layout", ["subfolder", "root"])
def test_layouts_of_peft(layout, tmp_path):
    """A pipeline without a LoRA loader: our subfolder of it, or what PeftModel.save_pretrained writes."""
    if layout == "subfolder":
        pipe = adapted("latte")
        save_lora(pipe, tmp_path)
    else:
        pipe = quiet(BUILD["latte"]())
        torch.manual_seed(0)
        model = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        model.save_pretrained(tmp_path)
    fresh = quiet(BUILD["latte"]())
    add_lora({"transformer": fresh.transformer}, start=read_adapter(tmp_path))
    torch.testing.assert_close(latents(fresh, "latte"), latents(pipe, "latte"))


@pytest.mark.parametrize("only", [None, ["transformer"], ["transformer_2"]])
def test_experts(only, tmp_path):
    """Wan 2.2 with two files or one: the file says which expert has an adapter."""
    pipe = adapted("wan22_a14b", only=only)
    save_lora(pipe, tmp_path)
    fresh = quiet(BUILD["wan22_a14b"]())
    both = {"transformer": fresh.transformer, "transformer_2": fresh.transformer_2}
    counts = add_lora(both, start=read_adapter(tmp_path))
    assert list(counts) == (only or list(both))
    torch.testing.assert_close(latents(fresh, "wan22_a14b"), latents(pipe, "wan22_a14b"))
    other = ["transformer_2" if only == ["transformer"] else "transformer"]
    fresh = quiet(BUILD["wan22_a14b"]())
    both = {"transformer": fresh.transformer, "transformer_2": fresh.transformer_2}
    with pytest.raises(ValueError, match=rf"lora_denoisers={re.escape(repr(other))}.*leave lora_denoisers unset"):
        add_lora(both, only=other, start=read_adapter(tmp_path))


def test_the_hub(saved, tmp_path, monkeypatch):
    """A Hub id that is in the cache; then one that is not, without a network."""
    cache = tmp_path / "models--you--style"
    shutil.copytree(saved, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_adapter("you/style").digest == read_adapter(saved).digest
    with pytest.raises(ValueError, match="continue_from='you/other'.*could not be fetched.*HF_HUB_OFFLINE"):
        read_adapter("you/other")


def test_the_memory_of_such_a_run_is_estimated(saved, tmp_path):
    """The estimate counts the adapter of the file, not the default one."""
    networks = Networks(quiet(BUILD["wan"]()), config(tmp_path, continue_from=str(saved)), None)
    tensors = load_file(saved / LORA_FILE).values()
    assert sorted(p.numel() for p in networks.adapter.values()) == sorted(t.numel() for t in tensors)


# --- the reference, and resuming ---


def test_the_reference_is_the_base_or_the_adapter(saved, tmp_path):
    """KL to the saved adapter is 0 before it learns; to the base it is not."""
    kl = {}
    for kind in ("base", "adapter"):
        made = continued(tmp_path / kind, saved, beta=0.1, continue_reference=kind, max_steps=1)
        before = weights(made)
        made.train()
        kl[kind] = logged(made, "kl")[0]
        with made.initial.untrained():
            assert largest_difference(before, weights(made)) == 0
        assert largest_difference(before, weights(made)) > 0
        assert made._card_settings()["reference"].startswith("the base" if kind == "base" else "the adapter")
    assert kl["adapter"] == 0 < kl["base"]


def test_clips_before_are_those_whose_scores_stand_beside_them(saved, tmp_path):
    """The first evaluation saw the saved adapter, so the sheet must not show the base."""
    made = continued(tmp_path, saved)
    rows = prompts(2)
    with torch.no_grad():
        first = made.evaluator.sample([0, 1], rows[:2]).cpu()
        for parameter in made.adapter.values():
            parameter.mul_(-1)
    before, after = made.evaluator.before_and_after(rows, made.initial.untrained(), made.initial.untrained())
    assert torch.equal(before, first) and torch.equal(after, first)


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.05, "continue_reference": "adapter"}, {"beta": 0.05, "ema_decay": 0.8}],
    ids=["adapter", "base"],
)
def test_a_resumed_run_is_the_uninterrupted_one(settings, saved, tmp_path):
    settings = settings | {"max_steps": 3}
    whole = continued(tmp_path / "whole", saved, **settings)
    whole.train()
    continued(tmp_path / "parts", saved, callbacks=[StopAt(2)], **settings).train()
    resumed = continued(tmp_path / "parts", saved, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_a_checkpoint_knows_what_it_began_from(saved, tmp_path):
    """Resuming with another start, another reference or none would have another KL and other clips."""
    continued(tmp_path, saved, max_steps=1, save_strategy="steps", save_steps=1).train()
    save_lora(adapted(seed=4), tmp_path.parent / "other")
    for start, settings in ((tmp_path.parent / "other", {}), (saved, {"beta": 0.1, "continue_reference": "adapter"})):
        with pytest.raises(ValueError, match=r"began from a saved one .*this run from a saved one.*continue_from"):
            continued(tmp_path, start, **settings).train(resume_from_checkpoint=True)
    asked = LoraConfig(r=4, lora_alpha=ALPHA, target_modules=["to_q", "to_out.0"])
    new = VideoGRPOTrainer(tiny_runs.pipeline(), tiny_runs.brightness, config(tmp_path), prompts(), peft_config=asked)
    with pytest.raises(ValueError, match="this run from a new adapter"):
        new.train(resume_from_checkpoint=True)
    copied = shutil.copytree(saved, tmp_path.parent / "moved")
    continued(tmp_path, copied, max_steps=1).train(resume_from_checkpoint=True)  # the same weights elsewhere


# --- what cannot be continued ---


def rewritten(folder, change):
    """The saved adapter with other tensors and options."""
    save_lora(adapted(), folder)
    tensors, options = load_file(folder / LORA_FILE), {"transformer.r": 4, "transformer.lora_alpha": ALPHA}
    tensors = change(tensors, options) or tensors
    save_file(tensors, folder / LORA_FILE, {"lora_adapter_metadata": json.dumps(options)})
    return folder


def kohya(tensors, options):
    return {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in tensors.items()}


def comfyui(tensors, options):
    return {k.replace("transformer.", "diffusion_model."): v for k, v in tensors.items()}


def dora(tensors, options):
    tensors["transformer.blocks.0.attn1.to_q.lora_magnitude_vector.weight"] = torch.ones(4)


def bias(tensors, options):
    tensors["transformer.blocks.0.attn1.to_q.lora_B.bias"] = torch.ones(4)


def text_encoder(tensors, options):
    tensors["text_encoder.q.lora_A.weight"] = torch.ones(4, 4)


def broken(tensors, options):
    next(iter(tensors.values()))[0] = torch.nan


def half(tensors, options):
    del tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"]


def pissa(tensors, options):
    options["transformer.init_lora_weights"] = "pissa"


def of_another_rank(tensors, options):
    options["transformer.r"] = 8


def of_a_newer_peft(tensors, options):
    options["transformer.use_wonder"] = True


@pytest.mark.parametrize(
    "change, message",
    [
        (kohya, "layout of kohya or ComfyUI. Let diffusers convert it"),
        (comfyui, "tensors of 'diffusion_model'.*Let diffusers convert it"),
        (dora, "is a DoRA .*fuse_lora"),
        (bias, "lora_B.bias' is not a weight of lora_A or lora_B.*fuse_lora"),
        (text_encoder, "tensors of 'text_encoder'"),
        (broken, "holds NaN"),
        (half, "do not belong together"),
        (pissa, "init_lora_weights='pissa'"),
        (of_another_rank, "says rank 8 .*tensors have rank 4"),
        (of_a_newer_peft, "use_wonder=True, which the installed peft does not know"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_of_other_kinds(change, message, tmp_path):
    """Refused before a model is loaded: there is none by that name."""
    start = rewritten(tmp_path / "start", change)
    with pytest.raises(ValueError, match=f"continue_from='{start}'.*{message}"):
        continued(tmp_path / "run", start, model="no/such-model")


def test_the_advice_to_convert_works(tmp_path):
    """Someone has a LoRA of ComfyUI's layout, and lets diffusers convert it as the error says."""
    start = rewritten(tmp_path / "start", comfyui)
    tensors = {
        re.sub("attn1", "self_attn", re.sub(r"to_([qkv])", r"\1", k)): v
        for k, v in load_file(start / LORA_FILE).items()
        if "attn1.to_q" in k
    }
    save_file(tensors, start / "style.safetensors")
    pipe = tiny_runs.pipeline()
    pipe.load_lora_weights(start, weight_name="style.safetensors", adapter_name="default")
    save_lora(pipe, tmp_path / "converted")
    made = continued(tmp_path / "run", tmp_path / "converted")
    torch.testing.assert_close(latents(made.pipeline), latents(pipe))


def test_a_loha_of_peft(tmp_path):
    get_peft_model(quiet(BUILD["wan"]()).transformer, LoHaConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hada.*is not a weight of lora_A or lora_B"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 8, "lora_alpha": ALPHA}, "r=8, but continue_from=.*r=4"),
        ({"r": 4, "lora_alpha": 4}, f"lora_alpha=4, but .*lora_alpha={ALPHA}"),
        ({"r": 4, "lora_alpha": ALPHA, "target_modules": ["to_k"]}, "target_modules select 4 .* adapts 8.*Leave"),
    ],
    ids=["rank", "alpha", "modules"],
)
def test_a_config_that_contradicts_the_file(settings, message, saved, tmp_path):
    with pytest.raises(ValueError, match=message):
        continued(tmp_path, saved, peft_config=LoraConfig(**settings))


def test_a_config_that_agrees_with_the_file(saved, tmp_path):
    asked = LoraConfig(r=4, lora_alpha=ALPHA, target_modules=["to_q", "to_out.0"])
    assert continued(tmp_path, saved, peft_config=asked).adapted_modules == {"transformer": 8}


def test_an_adapter_of_another_model(saved):
    with pytest.raises(ValueError, match="does not fit transformer of this model: it adapts 'blocks.*Use the model"):
        add_lora({"transformer": quiet(BUILD["latte"]()).transformer}, start=read_adapter(saved))
    with pytest.raises(ValueError, match=r"adapts \['transformer'\], but this pipeline's denoisers are \['unet'\]"):
        add_lora({"unet": quiet(BUILD["latte"]()).transformer}, start=read_adapter(saved))


def test_nothing_to_continue_from(saved, tmp_path):
    """A typing error, an empty folder, another file in it, and the run's own folder."""
    with pytest.raises(ValueError, match="neither an existing folder or file, nor a Hub id"):
        read_adapter("./no/such/folder/here")
    with pytest.raises(ValueError, match="holds no adapter: no pytorch_lora_weights.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(
        ValueError, match=r"It holds \['x.safetensors'\]: if one of them is in diffusers' layout, name that file"
    ):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="could not be read"):
        read_adapter(tmp_path / "x.safetensors")
    shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run" / "checkpoint-3")
    for inside in (".", LORA_FILE, "checkpoint-3"):
        with pytest.raises(ValueError, match="lies in output_dir"):
            VideoGRPOConfig(
                output_dir=str(tmp_path / "run"), continue_from=str(tmp_path / "run" / inside), use_cpu=True
            )
    config(tmp_path, continue_from=str(tmp_path / "run"))  # another run's folder under a common one
    with pytest.raises(ValueError, match="continue_reference='adapter' needs continue_from"):
        config(tmp_path, continue_reference="adapter")
    with pytest.raises(ValueError, match="continue_reference='other' must be"):
        config(tmp_path, continue_reference="other")
    with pytest.raises(ValueError, match="nothing refers to it"):
        continued(tmp_path, "anywhere", continue_reference="adapter")
