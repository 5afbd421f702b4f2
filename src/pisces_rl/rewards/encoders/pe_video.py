"""PE-Video, the video-text part of Perception Encoder Audio-Visual."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PeVideoModel, PreTrainedTokenizerBase

from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder, tokenize


class PEVideoEncoder(VideoTextEncoder):
    """PE-Video. Its video tokens are whole frames, so they have a time but no place in the frame (row and column 0).

    Args:
        model: a PeVideoModel.
        tokenizer: the model's.
        name: what maps are bound to.
        num_frames: number of frames it sees.
        resolution: side of a frame.
        max_text_tokens: longer prompts are cut.
        mean: of its pixels, from its processor.
        std: of its pixels, from its processor.
    """

    def __init__(
        self,
        model: PeVideoModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        num_frames: int = 16,
        resolution: int = 336,
        max_text_tokens: int = 512,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.num_frames, self.resolution, self.mean, self.std = num_frames, (resolution, resolution), mean, std
        self.dimension, self.max_text_tokens = model.config.text_config.hidden_size, max_text_tokens

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device)
        out = self.model.text_model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
        hidden = out.hidden_states[-1]
        pooled = self.unit(self.model.text_video_head(hidden[:, 0]))
        return TextFeatures(pooled, hidden, mask, words, pieces)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        out = self.model.video_encoder(self.prepare(videos).to(self.model.dtype))
        pooled = self.unit(self.model.video_head(out.pooler_output))
        frames = torch.arange(self.num_frames, dtype=torch.float32, device=self.device)
        places = torch.stack([frames, torch.zeros_like(frames), torch.zeros_like(frames)], 1)
        return VideoFeatures(pooled, out.last_hidden_state, places)
