"""tiny-vtm: the embedded video-text model for ShapeMotion, small enough for a CPU; structured like InternVideo2."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerFast

from pisces_rl.rewards.encoders.bert import CrossAttendingBert
from pisces_rl.rewards.encoders.encoder import (
    Fusion,
    TextFeatures,
    VideoFeatures,
    VideoTextEncoder,
    digest,
    grid,
    tokenize,
)

CARD, WEIGHTS = "config.json", "model.safetensors"


@dataclass
class TinyVTMConfig:
    """Widths and depths. video_patch: (frames, rows, columns) of a token; resolution: side of a square frame."""

    width: int = 192
    heads: int = 6
    video_layers: int = 4
    text_layers: int = 4
    fusion_layer: int = 2
    projection: int = 128
    vocabulary: int = 41
    max_text_tokens: int = 26
    num_frames: int = 17
    resolution: int = 32
    video_patch: tuple[int, int, int] = (4, 8, 8)


class TinyVTM(VideoTextEncoder):
    """A vision transformer over tubelets and a BERT whose last layers attend to its tokens.

    The first frame is repeated until whole tubelets fill the clip (17 frames: 3 more). Texts and videos are compared
    by the cosine of their projected class tokens (`pooled`), and by a matching head on the text's class token.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, config: TinyVTMConfig, tokenizer: PreTrainedTokenizerFast, name: str = "tiny-vtm"):
        super().__init__()
        self.config, self.tokenizer, self.name = config, tokenizer, name
        self.resolution, self.num_frames = (config.resolution, config.resolution), config.num_frames
        self.dimension, self.max_text_tokens = config.projection, config.max_text_tokens
        self.cross_layers, self.cross_heads = range(config.fusion_layer, config.text_layers), config.heads
        frames, rows, columns = config.video_patch
        self.lead = -config.num_frames % frames
        side = config.resolution // rows, config.resolution // columns
        self.grid = ((config.num_frames + self.lead) // frames, *side)
        width = config.width
        self.patch = nn.Linear(3 * frames * rows * columns, width)
        self.time_position = nn.Parameter(torch.randn(self.grid[0], 1, width) * 0.02)
        self.space_position = nn.Parameter(torch.randn(1, side[0] * side[1], width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.video_layers = nn.TransformerEncoder(
            layer, config.video_layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        bert = BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=config.max_text_tokens,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text = CrossAttendingBert(bert, config.fusion_layer, width)
        self.video_projection = nn.Linear(width, config.projection)
        self.text_projection = nn.Linear(width, config.projection)
        self.matching_head = nn.Linear(width, 2)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        return self.encode_prepared(self.padded(self.prepare(videos)))

    def padded(self, videos: Tensor) -> Tensor:
        """Repeat the first frame until whole tubelets fill the clip."""
        return torch.cat([videos[:, :1].expand(-1, self.lead, -1, -1, -1), videos], 1)

    def encode_prepared(self, videos: Tensor) -> VideoFeatures:
        """Encode videos (B, F, 3, H, W) in [-1, 1] whose frames fill the tubelets."""
        frames, rows, columns = self.config.video_patch
        t, h, w = self.grid
        x = videos.reshape(len(videos), t, frames, 3, h, rows, w, columns).permute(0, 1, 4, 6, 2, 3, 5, 7)
        x = self.patch(x.reshape(len(videos), t, h * w, -1).to(self.patch.weight.dtype))
        x = x + self.time_position + self.space_position
        x = torch.cat([self.class_token.expand(len(videos), -1, -1), x.flatten(1, 2)], 1)
        tokens = self.video_layers(x)
        pooled = self.unit(self.video_projection(tokens[:, 0]))
        return VideoFeatures(pooled, tokens, grid(t, h, w, class_tokens=1).to(tokens.device))

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device)
        return self.encode_tokens(tokens, mask, words, pieces)

    def encode_tokens(self, tokens: Tensor, mask: Tensor, words: Tensor, pieces: list[list[str]]) -> TextFeatures:
        hidden = self.text.read(tokens, mask)
        pooled = self.unit(self.text_projection(hidden[:, 0]))
        return TextFeatures(pooled, hidden, mask, words, pieces)

    def match(self, text: TextFeatures, video: VideoFeatures, fusion: Fusion | None = None) -> Tensor:
        hidden = self.text.cross(text.tokens, text.mask, video.tokens, fusion)
        return self.matching_head(hidden[:, 0]).to(self.precision)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16, **card) -> None:
        """Write config.json (with `card`), model.safetensors and the tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.to(dtype).contiguous().cpu() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by the owner only
        self.tokenizer.save_pretrained(folder)
        card = {"model_type": "tiny_vtm", **asdict(self.config), **card}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> "TinyVTM":
        """Load from a folder that `save` wrote, in fp32, frozen. The model's name carries the hash of its weights."""
        folder = Path(folder)
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        known = {k: card[k] for k in TinyVTMConfig.__dataclass_fields__}
        known["video_patch"] = tuple(known["video_patch"])
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = cls(TinyVTMConfig(**known), tokenizer, f"{name or folder.name}@{digest(folder / WEIGHTS)}")
        model.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
        return model.eval().requires_grad_(False)
