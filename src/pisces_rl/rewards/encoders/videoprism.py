"""VideoPrism's text-video model."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase, VideoPrismClipModel

from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder, grid, tokenize


class VideoPrismEncoder(VideoTextEncoder):
    """VideoPrism. Frames are 288 x 288 in [0, 1], as published.

    Args:
        model: a VideoPrismClipModel.
        tokenizer: the model's.
        name: what maps are bound to.
    """

    def __init__(self, model: VideoPrismClipModel, tokenizer: PreTrainedTokenizerBase, name: str):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        vision, text = model.config.vision_config, model.config.text_config
        size = vision.image_size
        self.resolution = (size, size) if isinstance(size, int) else tuple(size)
        self.num_frames, self.dimension = vision.num_frames, vision.hidden_size
        self.max_text_tokens = text.max_position_embeddings
        self.tubelet = tuple(vision.tubelet_size)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device, fixed=True)
        out = self.model.get_text_features(input_ids=tokens, attention_mask=mask.long())
        pooled = self.unit(out.pooler_output)
        return TextFeatures(pooled, out.last_hidden_state[:, : mask.shape[1]], mask, words, pieces)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        out = self.model.get_video_features(self.prepare(videos).to(self.model.dtype))
        pooled = self.unit(out.pooler_output.flatten(1))
        t, h, w = self.tubelet
        places = grid(self.num_frames // t, self.resolution[0] // h, self.resolution[1] // w)
        return VideoFeatures(pooled, out.last_hidden_state, places.to(self.device))
