"""BLIP with its matching head, over frames."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval, PreTrainedTokenizerBase

from pisces_rl.rewards.attention import fused_attention
from pisces_rl.rewards.encoders.encoder import (
    Fusion,
    TextFeatures,
    VideoFeatures,
    VideoTextEncoder,
    additive,
    tokenize,
)
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD, _positions


class BlipEncoder(VideoTextEncoder):
    """BLIP. `pooled` is as in `FrameEncoder`. To match, the text tower attends to the tokens of all frames at once, as
    BLIP does without training on videos (arXiv 2201.12086, section 5.6). Every text layer attends to the video.

    Args:
        model: a BlipForImageTextRetrieval.
        tokenizer: the model's.
        name: what maps are bound to.
        num_frames: number of frames it sees.
        mean: of its pixels.
        std: of its pixels.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        num_frames: int = 8,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        super().__init__()
        self.model, self.tokenizer, self.name, self.num_frames = model, tokenizer, name, num_frames
        self.mean, self.std = mean, std
        vision, text = model.config.vision_config, model.config.text_config
        self.resolution, self.side = (vision.image_size,) * 2, vision.image_size // vision.patch_size
        self.dimension, self.max_text_tokens = model.config.image_text_hidden_size, text.max_position_embeddings
        self.cross_layers, self.cross_heads = range(text.num_hidden_layers), text.num_attention_heads
        for layer in model.text_encoder.encoder.layer:
            layer.crossattention.self = _CrossAttention(layer.crossattention.self)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device)
        hidden = self.model.text_encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        pooled = self.unit(self.model.text_proj(hidden[:, 0]))
        # the matching pass reads the text again from its embeddings, now attending to the video
        return TextFeatures(pooled, self.model.text_encoder.embeddings(input_ids=tokens), mask, words, pieces)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        frames = self.prepare(videos)
        out = self.model.vision_model(pixel_values=frames.flatten(0, 1).to(self.model.dtype)).last_hidden_state
        pooled = self.unit(self.model.vision_proj(out[:, 0])).unflatten(0, (len(frames), -1))
        tokens = out.unflatten(0, (len(frames), -1)).flatten(1, 2)
        return VideoFeatures(F.normalize(pooled.mean(1), dim=-1), tokens, _positions(self, out.shape[1]))

    def match(self, text: TextFeatures, video: VideoFeatures, fusion: Fusion | None = None) -> Tensor:
        hidden, mask = text.tokens, additive(text.mask, text.tokens.dtype)
        for layer in self.model.text_encoder.encoder.layer:
            layer.crossattention.self.fusion = fusion
            hidden = layer(hidden, encoder_hidden_states=video.tokens, attention_mask=mask)
            layer.crossattention.self.fusion = None
        return self.model.itm_head(hidden[:, 0]).to(self.precision)


class _CrossAttention(nn.Module):
    """BLIP's cross-attention, which does not use transformers' attention interface, through `fused_attention`."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.query, self.key, self.value = own.query, own.key, own.value
        self.heads, self.layer_idx, self.fusion = own.num_attention_heads, own.layer_idx, None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        inputs = (self.query(hidden_states), self.key(encoder_hidden_states), self.value(encoder_hidden_states))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in inputs)
        return fused_attention(self, q, k, v, None, fusion=self.fusion)[0].flatten(2), None
