"""Qwen2-VL with a reward head at a tiny size, random weights and a word tokenizer."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from pisces_rl.rewards.scorers.qwen2_vl_reward import Qwen2VLReward

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO]
WORDS = "a red blue circle square moving left quality: motion: text: END user assistant".split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 32  # of the embedding, more than there are tokens


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*CONTROL, *WORDS])}, unk_token="END"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=CONTROL[0], additional_special_tokens=CONTROL)
    tokens.chat_template = CHAT
    return tokens


def config(**text) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=ROWS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        | text,
        vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4),
        image_token_id=CONTROL.index(IMAGE),
        video_token_id=CONTROL.index(VIDEO),
        vision_start_token_id=3,
        vision_end_token_id=4,
    )


def model(head: torch.nn.Module, **text) -> Qwen2VLReward:
    torch.manual_seed(0)
    return Qwen2VLReward(config(**text), head)


def full_config(size: str, rows: int) -> Qwen2VLConfig:
    """Qwen2-VL-2B or 7B, from the published config.json, with an embedding of this many rows."""
    text = {
        "2B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2),
        "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4),
    }[size]
    vision = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, hidden_size=text["hidden_size"])
    return Qwen2VLConfig(text_config=text | {"num_hidden_layers": 28, "vocab_size": rows}, vision_config=vision)
