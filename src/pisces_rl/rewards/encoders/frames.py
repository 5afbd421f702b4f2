"""CLIP and SigLIP over frames: image-text models, a video's feature is the mean of its frames'."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase, SiglipModel

from pisces_rl.rewards.encoders.base import TextFeatures, VideoFeatures, VideoTextEncoder, grid, tokenize


class FrameEncoder(VideoTextEncoder):
    """pooled: the mean over frames of the image features, each of length 1, brought to length 1. It cannot see motion.

    Args:
        model: a CLIPModel or SiglipModel. tokenizer: its own. name: what maps are bound to.
        num_frames: how many frames it looks at. mean, std: of its pixels, from its image processor.
    """

    def __init__(
        self, model: CLIPModel | SiglipModel, tokenizer: PreTrainedTokenizerBase, name: str, *, num_frames: int = 8,
        mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5),
    ):  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.name, self.num_frames = model, tokenizer, name, num_frames
        self.mean, self.std, self.crop = mean, std, isinstance(model, CLIPModel)
        vision, text = model.config.vision_config, model.config.text_config
        self.resolution, self.max_text_tokens = (vision.image_size,) * 2, text.max_position_embeddings
        self.side = vision.image_size // vision.patch_size
        self.dimension = model.config.projection_dim if self.crop else text.projection_size

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        # SigLIP reads padding: it was trained on texts of one length
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
    """Positions where each frame brings its own class tokens."""
    own = grid(1, encoder.side, encoder.side, class_tokens=tokens_of_frame - encoder.side**2)
    frames = own.repeat(encoder.num_frames, 1, 1)
    frames[..., 0] += torch.arange(encoder.num_frames)[:, None]
    return frames.flatten(0, 1).to(encoder.device)
