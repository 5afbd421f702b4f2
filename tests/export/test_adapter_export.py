"""Exported adapters: names, weights, and that diffusers' own converters read them as the trained adapter."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILD, CALLS, CONDITIONS, quiet
from torch import nn

from pisces_rl import export_adapter
from pisces_rl.export import FAMILIES
from pisces_rl.export.adapter_export import original_state
from pisces_rl.hub import model_card
from pisces_rl.policy import (
    SavedAdapter,
    VideoPolicy,
    add_lora,
    default_lora_config,
    load_lora,
    lora_parameters,
    read_adapter,
    save_lora,
    without_adapters,
)
from pisces_rl.run_files import RunFiles, described

ROOT = Path(__file__).parents[2]
HUNYUAN_DOUBLE = r"transformer_blocks\..*(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|net\.0\.proj|net\.2)"


def trained(family: str, folder: Path, **config):
    """A tiny pipeline with an adapter that is saved in the folder."""
    pipe = quiet(BUILD[family]())
    denoisers = dict(VideoPolicy(pipe).denoiser.items())
    torch.manual_seed(0)
    settings = default_lora_config(config.pop("r", 4), config.pop("lora_alpha", None), config.pop("targets", None))
    for name, value in config.items():
        setattr(settings, name, value)
    add_lora(denoisers, settings)
    for name, parameter in lora_parameters(denoisers).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    save_lora(pipe, folder)
    return pipe


def latents(pipe, family: str) -> torch.Tensor:
    call = CALLS[family] | {name: values[0] for name, values in CONDITIONS[family].items()}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=["a fish"], num_inference_steps=2, output_type="latent", generator=generator, **call)[0]


READ_BY_DIFFUSERS = [
    ("wan", "comfyui", {}),
    ("wan", "comfyui", {"targets": "all-linear", "lora_alpha": 6}),
    ("wan_i2v", "comfyui", {"lora_alpha": 8}),
    ("wan22_ti2v", "comfyui", {}),
    ("skyreels", "comfyui", {}),
    ("ltx", "comfyui", {"use_rslora": True}),
    ("ltx_i2v", "comfyui", {}),
    ("ltx2", "comfyui", {}),
    # its converter takes single blocks of HunyuanVideo's full width alone: see the test of deltas
    ("hunyuan", "comfyui", {"targets": HUNYUAN_DOUBLE, "lora_alpha": 2, "rank_pattern": {r".*to_k": 2}}),
    ("hunyuan", "original", {"targets": HUNYUAN_DOUBLE}),
]


@pytest.mark.parametrize("family, format, config", READ_BY_DIFFUSERS)
def test_diffusers_converts_it_back_to_the_trained_adapter(family, format, config, tmp_path):
    pipe = trained(family, tmp_path / "run", **config)
    (file,) = export_adapter(tmp_path / "run", tmp_path / "out", format, dtype="fp32")
    fresh = quiet(BUILD[family]())
    base, expected = latents(fresh, family), latents(pipe, family)
    fresh.load_lora_weights(file.parent, weight_name=file.name)
    torch.testing.assert_close(latents(fresh, family), expected, rtol=1e-4, atol=1e-4)
    assert (base - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_diffusers_converts_hunyuan_video_of_the_published_width(tmp_path):
    """One block of each kind, the default adapter."""
    pipe = quiet(BUILD["hunyuan"]())
    sizes = dict(num_attention_heads=24, attention_head_dim=128, rope_axes_dim=(16, 56, 56))
    pipe.register_modules(transformer=type(pipe.transformer).from_config(dict(pipe.transformer.config) | sizes))
    add_lora({"transformer": pipe.transformer}, default_lora_config(4, 6))
    for name, parameter in lora_parameters({"transformer": pipe.transformer}).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    save_lora(pipe, tmp_path)
    (file,) = export_adapter(tmp_path, tmp_path / "out", "comfyui", dtype="fp32")
    assert "diffusion_model.single_blocks.0.linear1.lora_B.weight" in load_file(file)
    fresh = without_adapters(pipe)
    base, expected = latents(fresh, "hunyuan"), latents(pipe, "hunyuan")
    fresh.load_lora_weights(file.parent, weight_name=file.name)
    torch.testing.assert_close(latents(fresh, "hunyuan"), expected, rtol=1e-3, atol=1e-3)
    assert (base - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 2e-2), ("fp16", 2e-3)])
def test_of_half_precision_within_its_rounding(dtype, tolerance, tmp_path):
    pipe = trained("wan", tmp_path / "run")
    (file,) = export_adapter(tmp_path / "run", tmp_path / "out", "comfyui", dtype=dtype)
    kinds = {(".alpha" in key, t.dtype) for key, t in load_file(file).items()}
    assert kinds == {(True, torch.float32), (False, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])}
    fresh = quiet(BUILD["wan"]())
    fresh.load_lora_weights(file.parent, weight_name=file.name)
    expected = latents(pipe, "wan")
    assert (latents(fresh, "wan") - expected).abs().max() <= tolerance * expected.abs().max()


def test_two_experts_are_two_files_and_one_folder_of_diffusers(tmp_path):
    pipe = trained("wan22_a14b", tmp_path / "run")
    high, low = export_adapter(tmp_path / "run", tmp_path / "out", "comfyui", dtype="fp32")
    assert (high.name, low.name) == ("comfyui_lora_high_noise.safetensors", "comfyui_lora_low_noise.safetensors")
    fresh, expected = quiet(BUILD["wan22_a14b"]()), latents(pipe, "wan22_a14b")
    fresh.load_lora_weights(high.parent, weight_name=high.name)
    assert (latents(fresh, "wan22_a14b") - expected).abs().max() > 1e-3
    fresh.load_lora_weights(low.parent, weight_name=low.name, load_into_transformer_2=True)
    torch.testing.assert_close(latents(fresh, "wan22_a14b"), expected, rtol=1e-4, atol=1e-4)
    files = export_adapter(tmp_path / "run", tmp_path / "diffusers", dtype="fp32")
    weights = "pytorch_lora_weights.safetensors"
    assert [f.relative_to(tmp_path).as_posix() for f in files] == [
        f"diffusers/{weights}",
        f"diffusers/transformer_2/{weights}",
    ]
    again = quiet(BUILD["wan22_a14b"]())
    load_lora(again, tmp_path / "diffusers")
    torch.testing.assert_close(latents(again, "wan22_a14b"), expected)


def test_one_expert_is_named_by_its_noise(tmp_path):
    pipe = quiet(BUILD["wan22_a14b"]())
    add_lora({"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}, None, ["transformer"])
    save_lora(pipe, tmp_path)
    names = [export_adapter(tmp_path, tmp_path / "out", "comfyui", model=model)[0].name for model in (pipe, None)]
    assert names == ["comfyui_lora_high_noise.safetensors", "comfyui_lora.safetensors"]


@pytest.mark.parametrize(
    "family, config",
    [
        ("wan", {"use_rslora": True, "lora_alpha": 3}),
        ("hunyuan15", {}),  # without a LoRA loader
    ],
)
def test_layouts_of_diffusers_and_peft_hold_the_adapter(family, config, tmp_path):
    pipe = trained(family, tmp_path / "run", **config)
    expected = latents(pipe, family)
    for format in ("diffusers", "peft") if family == "wan" else ("peft",):
        export_adapter(tmp_path / "run", tmp_path / format, format, dtype="fp32", model=pipe)
        fresh = quiet(BUILD[family]())
        load_lora(fresh, tmp_path / format)
        torch.testing.assert_close(latents(fresh, family), expected)
    fresh = quiet(BUILD[family]())
    fresh.transformer = PeftModel.from_pretrained(fresh.transformer, tmp_path / "peft", subfolder="transformer")
    torch.testing.assert_close(latents(fresh, family), expected)


# Deltas, by diffusers' converters of whole checkpoints, which split and order rows of weights.


class Checkpoint(dict):
    """Weights that a converter asks for and no adapter has are zeros."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(12))


def linear_sizes(family: str, replace: Callable[[str], str] = lambda name: name) -> dict[str, tuple[int, int]]:
    """{module: (features in, features out)} of all linear layers of a tiny denoiser."""
    modules = BUILD[family]().transformer.named_modules()
    return {replace(name): (m.in_features, m.out_features) for name, m in modules if isinstance(m, nn.Linear)}


def hunyuan_sizes() -> dict[str, tuple[int, int]]:
    """With the published width in single blocks: the converter knows no other."""
    wide = {"to_q": 3072, "to_k": 3072, "to_v": 3072, "proj_mlp": 4 * 3072}
    return {
        name: (size[0], wide.get(name.rpartition(".")[2], size[1]) if name.startswith("single_") else size[1])
        for name, size in linear_sizes("hunyuan").items()
    }


def mochi_sizes() -> dict[str, tuple[int, int]]:
    """With the last of the two tiny blocks as the last of 48, whose text stream ends early."""
    return linear_sizes("mochi", lambda name: name.replace("transformer_blocks.1.", "transformer_blocks.47."))


def random_adapter(sizes: dict[str, tuple[int, int]], rslora: bool = False, source: str = "run") -> SavedAdapter:
    """Ranks and alphas that differ from module to module."""
    torch.manual_seed(0)
    state, alphas = {}, {}
    for i, (module, (inside, outside)) in enumerate(sizes.items()):
        rank = 1 + i % 3
        alphas[module.replace(".", r"\.")] = 1 + i % 5
        state[f"{module}.lora_A.weight"] = torch.randn(rank, inside)
        state[f"{module}.lora_B.weight"] = torch.randn(outside, rank)
    config = LoraConfig(r=1, target_modules=set(sizes), alpha_pattern=alphas, use_rslora=rslora)
    return SavedAdapter(source, {"transformer": config}, {"transformer": state})


def deltas_of(state: dict[str, torch.Tensor], suffix: str = ".weight", alphas: bool = True) -> dict[str, torch.Tensor]:
    """{original module: what its reader adds to the weight}, by ComfyUI's rule (comfy/weight_adapter/lora.py): alpha /
    rank B A, or B A where there is no alpha; without `alphas` that of a reader that does not know them."""
    modules = {key.partition(".lora_")[0] for key in state if not key.endswith(".alpha")}
    assert len(state) == 2 * len(modules) + sum(f"{m}.alpha" in state for m in modules)
    deltas = {}
    for m in modules:
        up, down = state[f"{m}.lora_B{suffix}"], state[f"{m}.lora_A{suffix}"]
        known = alphas and f"{m}.alpha" in state
        deltas[m] = (state[f"{m}.alpha"].item() / down.shape[0] if known else 1.0) * up @ down
    return deltas


def trained_delta(adapter: SavedAdapter, module: str) -> torch.Tensor:
    """alpha / r B A, by peft's definition."""
    config, state = adapter.configs["transformer"], adapter.states["transformer"]
    a, b = (state[f"{module}.lora_{part}.weight"] for part in "AB")
    alpha, rank = config.alpha_pattern[module.replace(".", r"\.")], a.shape[0]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank) * b @ a


CONVERTED = {
    "wan": (lambda: linear_sizes("wan_i2v"), single_file_utils.convert_wan_transformer_to_diffusers),
    "ltx": (lambda: linear_sizes("ltx"), single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
    "ltx2": (lambda: linear_sizes("ltx2"), single_file_utils.convert_ltx2_transformer_to_diffusers),
    "hunyuan_video": (hunyuan_sizes, single_file_utils.convert_hunyuan_video_transformer_to_diffusers),
    "mochi": (mochi_sizes, single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", CONVERTED)
def test_deltas_of_all_linear_layers_by_diffusers_checkpoint_converter(family, rslora):
    sizes, convert = CONVERTED[family]
    adapter = random_adapter(sizes(), rslora)
    original = deltas_of(original_state(adapter, "transformer", family, comfyui=False), FAMILIES[family].weight)
    converted = convert(Checkpoint({f"{module}.weight": delta for module, delta in original.items()}))
    for module in adapter.configs["transformer"].target_modules:
        torch.testing.assert_close(converted.pop(f"{module}.weight"), trained_delta(adapter, module))
    assert not any(weight.any() for weight in converted.values())


@pytest.mark.parametrize("modules", ["q", "qv", "qkvm"])
def test_single_blocks_of_hunyuan_video_by_diffusers_lora_converter(modules):
    """At the published width; projections without a LoRA get none."""
    names = {letter: f"single_transformer_blocks.3.attn.to_{letter}" for letter in "qkv"}
    names["m"] = "single_transformer_blocks.3.proj_mlp"
    adapter = random_adapter({names[m]: (8, 12288 if m == "m" else 3072) for m in modules})
    state = original_state(adapter, "transformer", "hunyuan_video", comfyui=True)
    assert set(state) == {f"diffusion_model.single_blocks.3.linear1.lora_{part}.weight" for part in "AB"}
    assert state["diffusion_model.single_blocks.3.linear1.lora_B.weight"].shape[0] == 7 * 3072
    converted = lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers(state)
    for letter, name in names.items():
        a, b = (converted[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        expected = trained_delta(adapter, name) if letter in modules else torch.zeros(b.shape[0], 8)
        torch.testing.assert_close(b @ a, expected)


SIZES = {"cogvideox": lambda: linear_sizes("cogvideox"), **{name: sizes for name, (sizes, _) in CONVERTED.items()}}


@pytest.mark.parametrize("comfyui", [False, True])
@pytest.mark.parametrize("family", SIZES)
def test_deltas_by_the_map_backwards(family, comfyui):
    """Rows of the original's delta that are a module's, for each module that the format names."""
    content = FAMILIES[family]
    sizes = {name: size for name, size in SIZES[family]().items() if content.part(name, comfyui)}
    adapter = random_adapter(sizes)
    state = original_state(adapter, "transformer", family, comfyui)
    deltas = deltas_of(state, ".weight" if comfyui else content.weight)
    left = {module: delta.clone() for module, delta in deltas.items()}
    for module in sizes:
        part = content.part(module, comfyui)
        delta = left[f"diffusion_model.{part.module}" if comfyui else part.module]
        chunks = delta.view(part.of, -1, delta.shape[1])
        torch.testing.assert_close(chunks[list(part.chunks)].flatten(0, 1), trained_delta(adapter, module))
        chunks[list(part.chunks)] = 0
    assert not any(delta.any() for delta in left.values())


def test_cogvideox_modulation_rows():
    """SAT has one layer for both norms of a block, of 12 chunks: 0-2 and 6-8 are norm1's, 3-5 and 9-11 norm2's, says
    scripts/convert_cogvideox_to_diffusers.py of huggingface/diffusers."""
    adapter = random_adapter({f"transformer_blocks.0.norm{i}.linear": (2, 6) for i in (1, 2)})
    (delta,) = deltas_of(original_state(adapter, "transformer", "cogvideox", comfyui=False)).values()
    one, two = (trained_delta(adapter, f"transformer_blocks.0.norm{i}.linear") for i in (1, 2))
    torch.testing.assert_close(delta, torch.cat([one[:3], two[:3], one[3:], two[3:]]))


# Alphas.


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["wan", "wan_i2v", "skyreels", "cogvideox", "mochi"])
def test_readers_with_and_without_alpha_add_the_trained_delta(family, dtype, tmp_path):
    """Also of ranks above 256, which bf16 does not hold exactly: 3 x 129 of Mochi's q, k and v in one weight."""
    trained(family, tmp_path, r=129, lora_alpha=43, use_rslora=True, rank_pattern={r".*to_out\.0": 5})
    (file,) = export_adapter(tmp_path, tmp_path / "out", "comfyui", dtype=dtype)
    state = load_file(file)
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in state.items() if key.endswith(".alpha")}
    assert alphas.keys() == {key.partition(".lora_")[0] for key in state if not key.endswith(".alpha")}
    for module, alpha in alphas.items():
        assert alpha.shape == () and alpha.dtype == torch.float32
        assert alpha.item() == state[f"{module}.lora_A.weight"].shape[0]
    assert len({alpha.item() for alpha in alphas.values()}) > 1
    adapter = read_adapter(tmp_path)
    known, unknown = deltas_of(state), deltas_of(state, alphas=False)
    assert all(torch.equal(known[module], unknown[module]) for module in known)
    content = FAMILIES[family if family in FAMILIES else "wan"]
    for module in adapter.configs["transformer"].target_modules:
        part = content.part(module, comfyui=True)
        chunks = known[f"diffusion_model.{part.module}"].unflatten(0, (part.of, -1))
        expected = adapter.delta("transformer", module)
        tolerance = dict(rtol=0, atol=2e-2 * expected.abs().max().item()) if dtype == "bf16" else {}
        torch.testing.assert_close(chunks[list(part.chunks)].flatten(0, 1).float(), expected, **tolerance)


@pytest.mark.parametrize(
    "family, module, message",
    [
        ("wan", "time_projection.1", "should be empty .*time_projection.1.alpha"),
        ("wan_i2v", "img_emb.proj.1", "should be empty .*img_emb.proj.1.alpha"),
        ("ltx", "transformer_blocks.0.attn1.to_q", "Invalid LoRA checkpoint"),
        ("ltx2", "transformer_blocks.0.attn1.to_q", "Invalid LoRA checkpoint"),
        ("hunyuan", "double_blocks.0.img_attn_qkv", "chunk expects at least a 1-dim"),
        ("hunyuan", "double_blocks.0.img_attn_proj", "Invalid LoRA checkpoint"),
    ],
)
def test_diffusers_refuses_the_alphas_that_are_left_out(family, module, message, tmp_path):
    """When it takes one, the file may hold it."""
    targets = {"wan": "all-linear", "wan_i2v": "all-linear", "hunyuan": HUNYUAN_DOUBLE}.get(family)
    trained(family, tmp_path, targets=targets)
    (file,) = export_adapter(tmp_path, tmp_path / "out", "comfyui", dtype="fp32")
    state, alpha = load_file(file), f"diffusion_model.{module}.alpha"
    assert f"diffusion_model.{module}.lora_A.weight" in state and alpha not in state
    quiet(BUILD[family]()).load_lora_weights(dict(state))
    with pytest.raises((ValueError, RuntimeError), match=message):
        quiet(BUILD[family]()).load_lora_weights(state | {alpha: torch.tensor(4.0)})


# Names.

ATTENTION = ("q", "k", "v", "o")
WAN_T2V = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in ATTENTION] + ["ffn.0", "ffn.2"]
HUNYUAN = [f"{s}_{m}" for s in ("img", "txt") for m in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")]
LTX = [f"attn{i}.{m}" for i in (1, 2) for m in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]
#: (tiny pipeline, format, prefix of a block, names below it that are published, where).
PUBLISHED = [
    # keys of a LoRA of diffusion-pipe: github.com/tdrussell/diffusion-pipe/issues/114
    ("wan", "comfyui", "diffusion_model.blocks.0.", WAN_T2V),
    # and of an image-to-video one: github.com/ostris/ai-toolkit/issues/349
    ("wan_i2v", "comfyui", "diffusion_model.blocks.0.", [*WAN_T2V, "cross_attn.k_img", "cross_attn.v_img"]),
    ("wan", "original", "blocks.0.", WAN_T2V),
    # "diffusion-pipe lora format" of HunyuanVideo in comfy/lora.py of Comfy-Org/ComfyUI
    ("hunyuan", "comfyui", "diffusion_model.double_blocks.0.", HUNYUAN),
    ("hunyuan", "original", "double_blocks.0.", HUNYUAN),
    # comfy/ldm/cogvideo/model.py of Comfy-Org/ComfyUI
    ("cogvideox", "comfyui", "diffusion_model.blocks.0.", ["q", "k", "v", "attn_out", "ff_proj", "ff_out"]),
    # CogVideoX's SAT checkpoint: scripts/convert_cogvideox_to_diffusers.py of huggingface/diffusers
    (
        "cogvideox",
        "original",
        "transformer.layers.0.",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    # src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py and lora.py of genmoai/mochi
    (
        "mochi",
        "comfyui",
        "diffusion_model.blocks.0.",
        [
            f"{m}_{s}{end}"
            for s in "xy"
            for m, end in (("attn.qkv", ""), ("attn.proj", ""), ("mlp", ".w1"), ("mlp", ".w2"))
        ],
    ),
    # comfy/ldm/lightricks/model.py of Comfy-Org/ComfyUI
    ("ltx", "comfyui", "diffusion_model.transformer_blocks.0.", LTX),
]


@pytest.mark.parametrize("family, format, block, names", PUBLISHED)
def test_names_of_a_block_are_those_published(family, format, block, names, tmp_path):
    trained(family, tmp_path)
    (file,) = export_adapter(tmp_path, tmp_path / "out", format)
    keys = {key.removeprefix(block) for key in load_file(file) if key.startswith(block)}
    alphas = {key for key in keys if key.endswith(".alpha")}
    assert keys - alphas == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    scaled = format == "comfyui" and family in ("wan", "wan_i2v", "cogvideox", "mochi")
    assert alphas == ({f"{name}.alpha" for name in names} if scaled else set())


def test_mochis_original_names_are_those_of_its_own_lora_layers(tmp_path):
    """Parameters lora_A and lora_B of a linear layer, without a `weight` below: lora.py of genmoai/mochi."""
    trained("mochi", tmp_path)
    (file,) = export_adapter(tmp_path, tmp_path / "out", "original")
    assert {"blocks.0.attn.qkv_x.lora_A", "blocks.1.attn.proj_x.lora_B"} <= set(load_file(file))


# What is refused.


def test_unknown_words_are_refused_with_those_known(tmp_path):
    trained("wan", tmp_path)
    with pytest.raises(
        ValueError, match=r"format='kohya' is unknown; expected one of diffusers, peft, comfyui, original\."
    ):
        export_adapter(tmp_path, tmp_path / "out", "kohya")
    with pytest.raises(ValueError, match=r"dtype='fp8' is unknown; expected one of bf16, fp16, fp32\."):
        export_adapter(tmp_path, tmp_path / "out", dtype="fp8")
    with pytest.raises(
        ValueError, match="model='flux' is not a known family; known families are wan, hunyuan_video, ltx, ltx2"
    ):
        export_adapter(tmp_path, tmp_path / "out", "comfyui", model="flux")
    with pytest.raises(ValueError, match="output='.*' is a file; give a folder"):
        export_adapter(tmp_path, tmp_path / "lora.safetensors", "comfyui")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder='.*empty' holds no adapter"):
        export_adapter(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="folder='./no/such/folder' is neither an existing folder or file"):
        export_adapter("./no/such/folder", tmp_path / "out")


def test_a_dora_is_refused(tmp_path):
    trained("wan", tmp_path / "run")
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    state = load_file(file) | {"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(24)}
    save_file(state, file)
    with pytest.raises(ValueError, match=r"folder='.*run': it is a DoRA .* Merge it"):
        export_adapter(tmp_path / "run", tmp_path / "out", "comfyui")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    trained("wan", tmp_path / "wan")
    trained("allegro", tmp_path / "allegro")
    with pytest.raises(ValueError, match="adapts a WanTransformer3DModel, which is not of the family 'ltx'"):
        export_adapter(tmp_path / "wan", tmp_path / "out", "comfyui", model="ltx")
    with pytest.raises(ValueError, match="does not fit transformer of this model: it adapts 'blocks.0.attn1.to_k'"):
        export_adapter(tmp_path / "wan", tmp_path / "out", "comfyui", model=BUILD["ltx"]())
    with pytest.raises(ValueError, match="model='AllegroTransformer3DModel' is not a known family"):
        export_adapter(tmp_path / "allegro", tmp_path / "out", "original")


def test_an_adapter_without_a_note_needs_the_model(tmp_path):
    trained("wan", tmp_path / "run")
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # without metadata, as others save it
    with pytest.raises(ValueError, match="does not record which model it adapts; set model="):
        export_adapter(tmp_path / "run", tmp_path / "out", "comfyui")
    with pytest.raises(ValueError, match="'blocks.0.attn1.to_k', which has no known name in ComfyUI for the family"):
        export_adapter(tmp_path / "run", tmp_path / "out", "comfyui", model="mochi")
    for model in ("wan", "WanTransformer3DModel", BUILD["wan"](), BUILD["wan"]().transformer):
        export_adapter(tmp_path / "run", tmp_path / "out", "comfyui", model=model)


def test_values_beyond_fp16_and_the_adapter_itself_are_kept(tmp_path, monkeypatch):
    trained("wan", tmp_path / "run")
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    before = file.read_bytes()
    with pytest.raises(ValueError, match="holds the adapter itself in 'pytorch_lora_weights.safetensors'"):
        export_adapter(tmp_path / "run", tmp_path / "run")
    assert file.read_bytes() == before
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, output in (("~/run", tmp_path / "run"), (tmp_path / "run", "~/run"), ("~/run", "~/run")):
        with pytest.raises(ValueError, match="holds the adapter itself in 'pytorch_lora_weights.safetensors'"):
            export_adapter(folder, output)
    assert file.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    (written,) = export_adapter("~/run", "~/out", "comfyui", model="wan")
    assert written == tmp_path / "out" / "comfyui_lora.safetensors" and not (tmp_path / "~").exists()
    save_file({key: 1e6 * tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="dtype='fp16' cannot hold"):
        export_adapter(tmp_path / "run", tmp_path / "out", "comfyui", dtype="fp16", model="wan")


# A run's folder.


def test_the_card_lists_what_is_exported_into_the_runs_folder(tmp_path):
    trained("wan", tmp_path)
    files = RunFiles(tmp_path)
    files.begin()
    files.add("pytorch_lora_weights.safetensors", "README.md")
    card = model_card("you/base", "Video GRPO", "WanPipeline", {"lr": 1}, folder=tmp_path)
    (tmp_path / "README.md").write_text(card)
    for _ in range(2):
        export_adapter(tmp_path, tmp_path, "comfyui")
        export_adapter(tmp_path, tmp_path, "original")
    export_adapter(tmp_path, tmp_path, "peft")
    export_adapter(tmp_path, tmp_path, "comfyui")
    written = (tmp_path / "README.md").read_text()
    assert written.count("## Other formats") == written.count("## Citation") == 1
    assert "`comfyui_lora.safetensors` | ComfyUI" in written and "`original_lora.safetensors`" in written
    assert "`transformer/adapter_model.safetensors` and its `adapter_config.json` | `PeftModel" in written
    assert {"comfyui_lora.safetensors", "original_lora.safetensors"} <= set(described(tmp_path))
    assert model_card("you/base", "Video GRPO", "WanPipeline", {"lr": 1}, folder=tmp_path) == written
    fresh = quiet(BUILD["wan"]())
    fresh.load_lora_weights(tmp_path)  # the file with diffusers' name, not the others in the folder
    assert fresh.transformer.peft_config


def test_a_readme_of_the_users_stays(tmp_path):
    trained("wan", tmp_path)
    (tmp_path / "README.md").write_text("mine\n## Citation\n")
    export_adapter(tmp_path, tmp_path, "comfyui")
    assert (tmp_path / "README.md").read_text() == "mine\n## Citation\n"


def test_the_script_exports_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("export_adapter")
    pipe = trained("wan", tmp_path / "run")
    script.main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "comfyui", "--dtype", "fp16"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "comfyui_lora.safetensors")]
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), str(tmp_path / "out")])
    assert "holds no adapter" in capsys.readouterr().err
    quiet(BUILD["wan"]()).save_pretrained(tmp_path / "base")
    script.main(
        [
            str(tmp_path / "run"),
            str(tmp_path / "merged"),
            "--format",
            "merged",
            "--dtype",
            "fp32",
            "--model",
            str(tmp_path / "base"),
        ]
    )
    assert "weights of 20 modules changed" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "transformer" / "config.json").read_text())["num_layers"] == 2
    assert pipe.transformer.peft_config
