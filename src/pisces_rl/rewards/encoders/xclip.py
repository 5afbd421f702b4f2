"""X-CLIP: CLIP with attention across frames."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase, XCLIPModel

from pisces_rl.rewards.encoders.encoder import TextFeatures, VideoFeatures, VideoTextEncoder, tokenize
from pisces_rl.rewards.encoders.frames import _positions


class XCLIPEncoder(VideoTextEncoder):
    """X-CLIP. `pooled` is the projection of each tower. X-CLIP's score also lets the video modify the text's feature
    (its prompt generator); that part is left out, since a map between the two spaces needs them independent.

    Args:
        model: an XCLIPModel.
        tokenizer: the model's.
        name: what maps are bound to.
        mean: of its pixels.
        std: of its pixels.
    """

    crop = True

    def __init__(
        self,
        model: XCLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        self.model, self.tokenizer, self.name, self.mean, self.std = model, tokenizer, name, mean, std
        vision = model.config.vision_config
        self.resolution, self.num_frames = (vision.image_size,) * 2, vision.num_frames
        self.side, self.dimension = vision.image_size // vision.patch_size, model.config.projection_dim
        self.max_text_tokens = model.config.text_config.max_position_embeddings

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        tokens, mask, words, pieces = tokenize(self.tokenizer, prompts, self.max_text_tokens, self.device)
        out = self.model.get_text_features(input_ids=tokens, attention_mask=mask.long())
        return TextFeatures(self.unit(out.pooler_output), out.last_hidden_state, mask, words, pieces)

    def encode_video(self, videos: Tensor) -> VideoFeatures:
        frames = self.prepare(videos)
        out = self.model.get_video_features(pixel_values=frames.to(self.model.dtype))
        tokens = out.last_hidden_state
        positions = _positions(self, tokens.shape[1])
        tokens = tokens.unflatten(0, (len(frames), -1)).flatten(1, 2)
        return VideoFeatures(self.unit(out.pooler_output), tokens, positions)
