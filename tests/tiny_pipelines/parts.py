"""The parts of the tiny pipelines that are code; families.yaml names them as it names classes."""

import torch
from diffusers import Kandinsky5Transformer3DModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def byte_tokenizer(max_length=16, bos=False, chat_template=None):
    """A tokenizer with one token per byte and no vocabulary file."""
    vocab = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", "<s>"])}
    for ch in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[ch] = len(vocab)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tmpl = "<s> $A </s>" if bos else "$A </s>"
    tok.post_processor = processors.TemplateProcessing(single=tmpl, special_tokens=[("</s>", 1), ("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=max_length,
        chat_template=chat_template,
    )


def kandinsky5_transformer(**config):
    """A Kandinsky 5 transformer whose modulations are not 0, as they are at first: its blocks would do nothing."""
    transformer = Kandinsky5Transformer3DModel(**config)
    for name, parameter in transformer.named_parameters():
        if "modulation.out_layer" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return transformer


def qwen_vl_language_model(**config):
    """The language model of a Qwen2.5-VL."""
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval().model.language_model


class NoGuardrail(torch.nn.Module):
    """Replaces Cosmos' guardrail, a large model from a separate package, and lets everything pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def picture(seed: int, size: int = 24) -> Image.Image:
    """Return a random RGB picture."""
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def quiet(pipe):
    """Freeze the pipeline's models, put them in eval mode and hide its progress bars."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
