"""InternVideo2 stage 2, the video-text model of the PISCES paper, written so that its official weights load by name.

Architecture and weight names follow the public code (arXiv 2403.15377, OpenGVLab/InternVideo): a vision transformer
with one token per patch and frame, and a BERT-large whose layers from 19 on attend to these tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from pisces_rl.ot.costs import as_float
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
#: Pre-training weights that are not used here: teachers' decoders, the word-prediction head, image positions.
UNUSED = (
    "vision_encoder.clip_decoder.",
    "vision_encoder.final_clip_decoder.",
    "vision_encoder.clip_pos_embed",
    "vision_encoder.clip_img_pos_embed",
    "vision_encoder.img_pos_embed",
    "text_encoder.cls.",
    "text_encoder.bert.embeddings.position_ids",
    "clip_teacher.",
)


@dataclass
class InternVideo2Config:
    """Sizes of the 1B model. `num_frames` may differ from the checkpoint's: temporal positions are interpolated."""

    width: int = 1408
    depth: int = 40
    heads: int = 16
    hidden: int = 6144
    pooled_width: int = 768
    projection: int = 512
    num_frames: int = 8
    resolution: int = 224
    patch: int = 14
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    text_hidden: int = 4096
    fusion_layer: int = 19
    vocabulary: int = 30522
    max_text_tokens: int = 40


class InternVideo2(VideoTextEncoder):
    """A model that compares texts and videos by the cosine of projections, and by a matching head on the text's [CLS].

    Args:
        config: sizes.
        tokenizer: BERT's (uncased).
        name: what maps are bound to.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self, config: InternVideo2Config, tokenizer: PreTrainedTokenizerBase, name: str = "internvideo2-stage2-1b"
    ):
        super().__init__()
        self.config, self.tokenizer, self.name = config, tokenizer, name
        self.resolution, self.num_frames = (config.resolution, config.resolution), config.num_frames
        self.dimension, self.max_text_tokens = config.projection, config.max_text_tokens
        self.cross_layers, self.cross_heads = range(config.fusion_layer, config.text_layers), config.text_heads
        self.vision_encoder = _Vision(config)
        bert = BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.text_encoder = nn.Module()
        self.text_encoder.bert = CrossAttendingBert(bert, config.fusion_layer, config.width)
        self.vision_proj = nn.Linear(config.pooled_width, config.projection)
        self.text_proj = nn.Linear(config.text_width, config.projection)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        tokens, pooled = self.vision_encoder(self.prepare(videos).to(self.itm_head.weight.dtype))
        side = self.config.resolution // self.config.patch
        places = grid(self.num_frames, side, side, class_tokens=1).to(tokens.device)
        return VideoFeatures(self.unit(self.vision_proj(pooled)), tokens, places)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device)
        hidden = self.text_encoder.bert.read(tokens, mask)
        pooled = self.unit(self.text_proj(hidden[:, 0]))
        return TextFeatures(pooled, hidden, mask, words, pieces)

    def match(self, text: TextFeatures, video: VideoFeatures, fusion: Fusion | None = None) -> Tensor:
        hidden = self.text_encoder.bert.cross(text.tokens, text.mask, video.tokens, fusion)
        return self.itm_head(hidden[:, 0]).to(self.precision)

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Load weights under their official names. All weights of this model must be there, and no unknown ones.

        Raises ValueError naming what is missing, unknown or of another shape.
        """
        state = {k: v for k, v in state.items() if not k.startswith(UNUSED)}
        own = self.state_dict()
        key = "vision_encoder.pos_embed"
        if key in state:
            patches = (self.config.resolution // self.config.patch) ** 2
            state[key] = _positions_for(state[key], own[key].shape[1], patches)
        wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
        wrong += [
            f"{k} has shape {tuple(v.shape)}, not {tuple(own[k].shape)}"
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"state: not the weights of this model: {'; '.join(wrong[:5])}{more}.")
        self.load_state_dict(state)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json, model.safetensors and the tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.to(dtype).contiguous().cpu() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by the owner only
        self.tokenizer.save_pretrained(folder)
        card = {"model_type": "internvideo2", "name": self.name.split("@")[0], **asdict(self.config)}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, tokenizer: PreTrainedTokenizerBase, dtype=torch.float32) -> "InternVideo2":
        """Load from a folder that `save` wrote, frozen. The model's name carries the hash of its weights."""
        folder = Path(folder)
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        config = InternVideo2Config(**{k: card[k] for k in InternVideo2Config.__dataclass_fields__})
        with torch.device("meta"):
            model = cls(config, tokenizer, f"{card['name']}@{digest(folder / WEIGHTS)}")
        state = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
        model.load_state_dict(state, assign=True)
        embeddings = model.text_encoder.bert.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embeddings.num_embeddings)[None]
        embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)
        return model.eval().requires_grad_(False)


def _positions_for(positions: Tensor, count: int, patches: int) -> Tensor:
    """Return positions (1, 1 + t patches, D) for `count` tokens, linearly interpolated in time."""
    if positions.shape[1] == count or (positions.shape[1] - 1) % patches or (count - 1) % patches:
        return positions
    first, rest = positions[:, :1], positions[0, 1:].unflatten(0, (-1, patches))
    rest = F.interpolate(rest.flatten(1).T[None].float(), (count - 1) // patches, mode="linear", align_corners=False)
    return torch.cat([first, rest[0].T.reshape(1, count - 1, -1).to(first)], 1)


class _Vision(nn.Module):
    """Map (B, F, 3, H, W) to tokens (B, 1 + F patches, width) and their pooling (B, pooled_width)."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        side = config.resolution // config.patch
        self.patch_embed = nn.Module()
        size = (1, config.patch, config.patch)
        self.patch_embed.proj = nn.Conv3d(3, config.width, size, size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_frames * side**2, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.clip_projector = _Pooling(config)

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed.proj(videos.transpose(1, 2)).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x, self.clip_projector(x)


class _Block(nn.Module):
    """Pre-norm attention and MLP with a learned scale per channel, queries and keys normalised."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(config.width, 1e-6) for _ in range(2))
        self.attn = _Attention(config.width, config.heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)
        self.ls1, self.ls2 = _Scale(config.width), _Scale(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return (as_float(x) * as_float(self.gamma)).to(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width, 1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (_split(z, self.heads) for z in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Pooling(nn.Module):
    """Attention pooling with the tokens' mean as the query."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.cross_attn = nn.Module()
        for name in "qkv":
            setattr(self.cross_attn, name, nn.Linear(width, width, bias=False))
            setattr(self.cross_attn, f"{name}_bias", nn.Parameter(torch.zeros(width)))
        self.cross_attn.proj = nn.Linear(width, config.pooled_width)

    def forward(self, x: Tensor) -> Tensor:
        inputs = {"q": self.norm1_q(x.mean(1, keepdim=True)), "k": self.norm1_k(x), "v": self.norm1_v(x)}
        layers = self.cross_attn
        q, k, v = (
            _split(getattr(layers, name)(z) + getattr(layers, f"{name}_bias"), self.heads)
            for name, z in inputs.items()
        )
        return layers.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
