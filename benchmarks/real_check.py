"""One short GRPO run of Wan 2.1 1.3B from its recipe: replay parity, seconds, peak memory, adapter reload.

    python benchmarks/real_check.py                    # weights from the Hub, one GPU
    python benchmarks/real_check.py --random_weights   # the same sizes with random weights, no Hub
    python benchmarks/real_check.py --tiny             # the same code path on a CPU in seconds

Random weights keep the transformer and the VAE at full size; the 5.7 B text encoder is replaced by a small one of the
same output width (4,096) and a byte tokenizer.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.policy import default_lora_config
from pisces_rl.rewards import motion_amount, temporal_smoothness

RECIPE = Path(__file__).parents[1] / "recipes" / "wan21_1.3b_grpo.yaml"
SCRIPT_KEYS = ("model", "dataset", "rewards", "eval_prompts", "lora_r")
PROMPTS = ["a cat walks over wet grass", "waves break on a rocky beach", "a paper plane crosses a classroom",
           "steam rises from a cup of tea"]


def random_wan(tiny: bool, dtype: torch.dtype, device: str) -> WanPipeline:
    """Wan 2.1 1.3B with weights N(0, 0.02); `tiny` shrinks every part."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    width = 64 if tiny else 4096
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=64, num_layers=1,
                                          num_heads=4, dropout_rate=0.0))
    size = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2) if tiny else dict(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=width,
                                            freq_dim=256, cross_attn_norm=True,
                                            qk_norm="rms_norm_across_heads", **size)
        vae = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1) if tiny else AutoencoderKLWan()
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    keep = transformer._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        if not any(k in name for k in keep):
            parameter.data = parameter.data.to(dtype)
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                          unk_token="<unk>", model_max_length=512),
        text_encoder=encoder.to(dtype).eval(), vae=vae, transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random_weights", action="store_true", help="full size, random weights, no Hub")
    parser.add_argument("--tiny", action="store_true", help="a few hundred parameters, for a CPU")
    parser.add_argument("--max_steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--output_dir", default=None, help="kept if given; a temporary folder otherwise")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.tiny:
        parser.error("no GPU was found; --tiny runs the same code on a CPU")

    recipe = yaml.safe_load(RECIPE.read_text())
    settings = {key: value for key, value in recipe.items() if key not in SCRIPT_KEYS}
    settings |= dict(max_steps=arguments.max_steps, save_strategy="no", report_to="none")
    settings["replay_tolerance"] = 1.0  # the difference is printed, not judged
    if arguments.tiny:
        settings |= dict(height=16, width=16, num_frames=9, num_inference_steps=10, use_cpu=True, learning_rate=1e-3,
                         torch_compile_backend="aot_eager")
    with tempfile.TemporaryDirectory() as temporary:
        settings["output_dir"] = arguments.output_dir or temporary
        config = VideoGRPOConfig(**settings)
        if arguments.random_weights or arguments.tiny:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            model = random_wan(arguments.tiny, dtype, "cuda" if cuda and not arguments.tiny else "cpu")
        else:
            model = recipe["model"]
        trainer = VideoGRPOTrainer(
            model=model, reward_funcs=[temporal_smoothness, motion_amount], args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}), peft_config=default_lora_config(recipe["lora_r"]),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.save_model()  # raises if the reloaded adapter gives other latents
        logs = [row for row in trainer.state.log_history if "replay/max_log_prob_error" in row]
        parts = {key: [row[f"seconds/{key}"] for row in logs if f"seconds/{key}" in row]
                 for key in ("text", "rollout", "decode", "rewards", "update", "idle")}
        size = f"{config.num_frames} x {config.height} x {config.width}"
        print(f"videos per step      {config.generation_batch_size} of {size}")
        print(f"replay parity        max |log p(update) - log p(sampling)| = "
              f"{max(row['replay/max_log_prob_error'] for row in logs):.2e}")
        print(f"seconds per step     {seconds / len(logs):.1f} (" + ", ".join(
            f"{name} {sum(values) / len(logs):.1f}" for name, values in parts.items()) + ")")
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else "no GPU"
        print(f"peak memory          {peak}")
        print("adapter reload       equal")


if __name__ == "__main__":
    main()
