"""The options of `peft.LoraConfig` that a run supports; others are rejected, with advice on what to use instead."""

import dataclasses
from typing import Any

from peft import LoraConfig, PeftType

#: Supported in training, saving, reloading and resuming.
KEPT = frozenset(
    {
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
    }
)
#: peft's notes on a config's origin; nothing depends on them.
NOTES = frozenset(
    {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
)
_MODULES = "name those modules in target_modules"
_LAYERS = r"select the layers with a pattern in target_modules, for instance r'blocks\.(0|1)\..*\.to_q'"
_PLAIN = "leave it out for a plain LoRA"
_START = "leave it out, with init_lora_weights at True or 'gaussian', which start at the base model"
_LANGUAGE = "it is for language models; leave it out"
#: Advice for each option that is stored outside lora_A and lora_B, changes the base, or does nothing here.
REFUSED = {
    "task_type": _LANGUAGE,
    "lora_dropout": "dropout makes log-probs irreproducible; set it to 0",
    "fan_in_fan_out": "no denoiser stores its weights transposed; leave it False",
    "bias": "the base's biases would be trained and not saved; leave it 'none'",
    "modules_to_save": f"these modules of the base would be trained and not saved; {_MODULES}",
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "megatron_config": "no denoiser has Megatron layers; leave it out",
    "megatron_core": "no denoiser has Megatron layers; leave it out",
    "trainable_token_indices": _LANGUAGE,
    "loftq_config": _START,
    "eva_config": _START,
    "corda_config": _START,
    "lora_ga_config": _START,
    "use_dora": f"its magnitudes are not part of lora_A and lora_B; {_PLAIN}",
    "velora_config": _PLAIN,
    "alora_invocation_tokens": _LANGUAGE,
    "use_qalora": _PLAIN,
    "qalora_group_size": _PLAIN,
    "monteclora_config": f"it samples weights, which makes log-probs irreproducible; {_PLAIN}",
    "layer_replication": "it would change the base model's depth; leave it out",
    "runtime_config": "leave it out; the config's `offload` moves idle weights",
    "lora_bias": f"biases are not part of lora_A and lora_B; {_PLAIN}",
    "target_parameters": _MODULES,
    "use_bdlora": _PLAIN,
    "arrow_config": _PLAIN,
    "kasa_config": _PLAIN,
    "ensure_weight_tying": _LANGUAGE,
}


def check_lora_config(config: Any) -> None:
    """Check that a run can train this config; needs no model.

    Raises:
        ValueError: it is not a `LoraConfig`, a rank or scale is not positive, or an option is unsupported; the message
            names the option and what to use instead.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        shown = f"{config!r:.60}" if isinstance(config, (str, dict)) else f"a {type(config).__name__}"
        fix = {
            dict: "pass peft.LoraConfig(**peft_config)",
            str: "set continue_from to start from a saved adapter, or write 'full' to train all weights instead",
        }
        raise ValueError(
            f"peft_config is {shown}, but must be a peft.LoraConfig, for instance default_lora_config(r=16); "
            f"{fix.get(type(config), 'other kinds of adapters are not supported')}."
        )
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(plain, field.name, None)
        if field.name in KEPT | NOTES or value == default or not (value or default):
            continue
        fix = REFUSED.get(field.name, "this version of pisces_rl does not know it; leave it out")
        raise ValueError(f"peft_config: {field.name}={value!r}: {fix}.")
    start = config.init_lora_weights
    if start is not True and str(start).lower() != "gaussian":
        raise ValueError(
            f"peft_config: init_lora_weights={start!r} changes the base weights or does not start at the base model, "
            "so the saved adapter would belong to another model; use True or 'gaussian'."
        )
    if config.target_modules is not None and not config.target_modules:
        raise ValueError(
            f"peft_config: target_modules={config.target_modules!r} names no module; leave it unset for attention and "
            "feed-forward projections."
        )
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"peft_config: {name}={rank!r} must be a whole number of at least 1, for instance 16.")
    scales = {"lora_alpha": config.lora_alpha}
    scales |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for name, alpha in scales.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
            raise ValueError(f"peft_config: {name}={alpha!r} must be positive, for instance the rank.")
