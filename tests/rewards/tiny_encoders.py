"""Every encoder at a tiny size, of the real classes, with random weights and a word tokenizer."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    ModernBertConfig,
    PeVideoConfig,
    PeVideoModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    VideoPrismClipModel,
    VideoPrismConfig,
    ViTConfig,
    XCLIPConfig,
    XCLIPModel,
)

from pisces_rl.rewards.encoders import TinyVTM, TinyVTMConfig
from pisces_rl.rewards.encoders.blip import BlipEncoder
from pisces_rl.rewards.encoders.frames import FrameEncoder
from pisces_rl.rewards.encoders.internvideo2 import InternVideo2, InternVideo2Config
from pisces_rl.rewards.encoders.pe_video import PEVideoEncoder
from pisces_rl.rewards.encoders.videoprism import VideoPrismEncoder
from pisces_rl.rewards.encoders.xclip import XCLIPEncoder

WORDS = "<pad> <cls> </s> <unk> a red green blue circle square cross moving left right on black two squares".split()
LENGTH = 12
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
TEXT = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=len(WORDS),
    max_position_embeddings=LENGTH,
    projection_dim=10,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<cls> $A </s>", special_tokens=[("<cls>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        cls_token="<cls>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def tiny_vtm():
    config = TinyVTMConfig(
        width=16,
        heads=2,
        video_layers=1,
        text_layers=3,
        fusion_layer=1,
        projection=10,
        vocabulary=len(WORDS),
        max_text_tokens=LENGTH,
        num_frames=5,
        resolution=16,
        video_patch=(2, 8, 8),
    )
    return TinyVTM(config, tokenizer())


def internvideo2():
    config = InternVideo2Config(
        width=16,
        depth=2,
        heads=2,
        hidden=24,
        pooled_width=12,
        projection=10,
        num_frames=3,
        resolution=16,
        patch=8,
        text_width=16,
        text_layers=3,
        text_heads=2,
        text_hidden=24,
        fusion_layer=1,
        vocabulary=len(WORDS),
        max_text_tokens=LENGTH,
    )
    return InternVideo2(config, tokenizer())


def clip():
    return FrameEncoder(
        CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)),
        tokenizer(),
        "clip",
        num_frames=3,
    )


def siglip():
    text = TEXT | {"projection_size": 16}
    return FrameEncoder(
        SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), tokenizer(), "siglip", num_frames=3
    )


def xclip():
    vision = VISION | dict(
        num_frames=3, mit_hidden_size=10, mit_intermediate_size=16, mit_num_hidden_layers=1, mit_num_attention_heads=2
    )
    return XCLIPEncoder(
        XCLIPModel(XCLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=10)), tokenizer(), "xclip"
    )


def videoprism():
    vision = dict(
        image_size=16,
        num_frames=3,
        tubelet_size=(1, 8, 8),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
    )
    text = {k: v for k, v in TEXT.items() if k != "projection_dim"}
    config = VideoPrismConfig(text_config=text, vision_config=vision)
    return VideoPrismEncoder(VideoPrismClipModel(config), tokenizer(), "videoprism")


def pe_video():
    frame = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=10,
    )
    video = dict(
        vision_config=frame,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    text = ModernBertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        max_position_embeddings=32,
    )
    from transformers import PeVideoEncoderConfig

    model = PeVideoModel(PeVideoConfig(text_config=text, video_config=PeVideoEncoderConfig(**video)))
    return PEVideoEncoder(model, tokenizer(), "pe_video", num_frames=3, resolution=16, max_text_tokens=LENGTH)


def blip():
    text = TEXT | {"encoder_hidden_size": 16, "is_decoder": True}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=10)
    return BlipEncoder(BlipForImageTextRetrieval(config), tokenizer(), "blip", num_frames=3)


ENCODERS = {f.__name__: f for f in (tiny_vtm, internvideo2, clip, siglip, xclip, videoprism, pe_video, blip)}
MATCHERS = ("tiny_vtm", "internvideo2", "blip")


def build(name: str, dtype: torch.dtype = torch.float32):
    """A frozen encoder whose weights are large enough for its outputs to differ."""
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval().requires_grad_(False)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
        elif name == "internvideo2":
            parameter.fill_(0.5)
    return encoder.to(dtype)
