"""CLIP and SigLIP over frames: image-text models whose video feature is the mean over frames."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase, SiglipModel

from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder, grid, tokenize

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FrameEncoder(VideoTextEncoder):
    """CLIP or SigLIP. `pooled` is the mean over frames of unit-length image features, scaled to length 1. It cannot
    see motion.

    Args:
        model: a CLIPModel or SiglipModel.
        tokenizer: the model's.
        name: what maps are bound to.
        num_frames: number of frames it sees.
        mean: of its pixels, from its image processor; None: CLIP's, or 0.5 for SigLIP.
        std: of its pixels, from its image processor; None: CLIP's, or 0.5 for SigLIP.
    """

    def __init__(
        self,
        model: CLIPModel | SiglipModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        num_frames: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.name, self.num_frames = model, tokenizer, name, num_frames
        self.crop = isinstance(model, CLIPModel)
        self.mean = mean or (CLIP_MEAN if self.crop else (0.5, 0.5, 0.5))
        self.std = std or (CLIP_STD if self.crop else (0.5, 0.5, 0.5))
        vision, text = model.config.vision_config, model.config.text_config
        self.resolution, self.max_text_tokens = (vision.image_size,) * 2, text.max_position_embeddings
        self.side = vision.image_size // vision.patch_size
        self.dimension = model.config.projection_dim if self.crop else text.projection_size

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        # SigLIP attends to padding: it was trained on texts of one length
        fixed = isinstance(self.model, SiglipModel)
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device, fixed)
        out = self.model.get_text_features(input_ids=tokens, attention_mask=None if fixed else mask.long())
        return TextFeatures(self.unit(out.pooler_output), out.last_hidden_state, mask, words, pieces)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        frames = self.prepare(videos)
        out = self.model.get_image_features(pixel_values=frames.flatten(0, 1).to(self.model.dtype))
        pooled = self.unit(out.pooler_output).unflatten(0, (len(frames), -1)).mean(1)
        tokens = out.last_hidden_state.unflatten(0, (len(frames), -1)).flatten(1, 2)
        return VideoFeatures(F.normalize(pooled, dim=-1), tokens, _positions(self, out.last_hidden_state.shape[1]))


def _positions(encoder: VideoTextEncoder, tokens_of_frame: int) -> Tensor:
    """Return token positions if each frame has its own class tokens."""
    own = grid(1, encoder.side, encoder.side, class_tokens=tokens_of_frame - encoder.side**2)
    frames = own.repeat(encoder.num_frames, 1, 1)
    frames[..., 0] += torch.arange(encoder.num_frames)[:, None]
    return frames.flatten(0, 1).to(encoder.device)
