"""A BERT text tower whose last layers attend to video tokens, for tiny-vtm and InternVideo2."""

import copy

from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from pisces_rl.rewards.attention import route
from pisces_rl.rewards.encoders.encoder import Fusion, additive


class CrossAttendingBert(nn.Module):
    """BERT whose layers 0 .. fusion_layer - 1 read the text alone, while the others also attend to video tokens.

    Args:
        config: of the tower; its dropout rates are kept.
        fusion_layer: the first layer that sees the video.
        video_width: width of the video tokens.
    """

    def __init__(self, config: BertConfig, fusion_layer: int, video_width: int):
        super().__init__()
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        crossing = copy.deepcopy(config)
        crossing.is_decoder = crossing.add_cross_attention = True
        self.config, self.fusion_layer = config, fusion_layer
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(config if i < fusion_layer else crossing, i) for i in range(config.num_hidden_layers)
        )
        for layer in self.crossing:
            layer.attention.self.is_causal = False
            attention = layer.crossattention.self
            attention.key = nn.Linear(video_width, config.hidden_size)
            attention.value = nn.Linear(video_width, config.hidden_size)
            route(attention)

    @property
    def crossing(self) -> nn.ModuleList:
        return self.encoder.layer[self.fusion_layer :]

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map token ids (B, N) and their mask to hidden states (B, N, d), before any video."""
        hidden = self.embeddings(tokens)
        attention_mask = additive(mask, hidden.dtype)
        for layer in self.encoder.layer[: self.fusion_layer]:
            hidden = layer(hidden, attention_mask)
        return hidden

    def cross(self, hidden: Tensor, mask: Tensor, video: Tensor, fusion: Fusion | None = None) -> Tensor:
        """Return hidden states (B, N, d) after all layers, given video tokens (B, M, video_width)."""
        attention_mask = additive(mask, hidden.dtype)
        for layer in self.crossing:
            hidden = layer(hidden, attention_mask, encoder_hidden_states=video, fusion=fusion)
        return hidden
