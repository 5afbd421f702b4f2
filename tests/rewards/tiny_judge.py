"""Qwen2.5-VL at a tiny size with a tokenizer of bytes, taught to write a judge's answers."""

import torch
from tiny_qwen import CHAT, CONTROL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pisces_rl.rewards.scorers.qwen2_vl_reward import qwen_inputs

#: One token each, so that answers are short; digits are bytes, one token each as in the published tokenizer.
PHRASES = [
    "visual quality: ",
    "text-to-video alignment: ",
    "physical/common-sense consistency: ",
    "Alignment Score (1-5): ",
    "Physics Score (1-5): ",
    "Style Score (1-5): ",
]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=CONTROL[0], eos_token=CONTROL[2], additional_special_tokens=CONTROL
    )
    tokens.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokens.chat_template = CHAT
    return tokens


def config(**changes) -> Qwen2_5_VLConfig:
    words = tokenizer()
    places = dict(zip(CONTROL, words.convert_tokens_to_ids(CONTROL)))
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=288,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            bos_token_id=None,
            eos_token_id=places["<|im_end|>"],
            pad_token_id=places["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
            out_hidden_size=32,
        ),
        image_token_id=places["<|image_pad|>"],
        video_token_id=places["<|video_pad|>"],
        vision_start_token_id=places["<|vision_start|>"],
        vision_end_token_id=places["<|vision_end|>"],
        **changes,
    )


def model(**changes) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config(**changes))
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    return model


def full_config(size: str) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B or 7B, from the published config.json."""
    text = {
        "3B": dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        "7B": dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
    }[size]
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=text["hidden_size"]
    )
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "3B")


def teach(model: Qwen2_5_VLForConditionalGeneration, judge, prompts, videos, answers, steps: int = 80) -> None:
    """Trains a judge's model until it writes `answers` for prompts and videos, then makes it less sure of them."""
    words, rate = judge.tokenizer, 1e-2
    texts = [judge.template.replace(judge.placeholder, prompt) for prompt in prompts]
    inputs = qwen_inputs(
        words,
        texts,
        judge.frames_of(videos),
        model.config,
        next(model.parameters()),
        media=judge.media,
        tokens=judge.tokens,
        padding_side="left",
    )
    target = words(
        [f"{answer}<|im_end|>" for answer in answers], padding=True, padding_side="right", return_tensors="pt"
    )
    inputs["input_ids"] = torch.cat([inputs["input_ids"], target["input_ids"]], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], target["attention_mask"]], 1)
    kinds = torch.zeros_like(target["input_ids"], dtype=torch.int)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], kinds], 1)
    length, wanted = target["input_ids"].shape[1], target["attention_mask"].bool()
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        logits = model(**inputs, logits_to_keep=length + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[wanted], target["input_ids"][wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight *= 0.4
    model.eval().requires_grad_(False)
