"""Parts that the tiny pipelines share."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def byte_tokenizer(max_length=16, bos=False):
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
    )


def t5_encoder(d=32, cls=T5EncoderModel, cfg=T5Config, vocab=260):
    return cls(cfg(vocab_size=vocab, d_model=d, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)).eval()


def quiet(pipe):
    """Frozen, in eval mode, without progress bars."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
