"""LLaVA at a tiny size, random weights, with a processor of a word tokenizer and a chat template."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}<user> {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = "<pad> <unk> <image> <user> <assistant> a red blue circle square 1 2 3 4 5".split()


def tiny_llava(words: Sequence[str] = ()) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and its processor; it knows `WORDS` and further words."""
    known = WORDS + sorted({*words} - {*WORDS})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=LlamaConfig(vocab_size=len(known), pad_token_id=0, **sizes),
        image_token_index=2,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor
