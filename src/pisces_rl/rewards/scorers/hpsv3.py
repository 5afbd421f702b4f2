"""HPSv3: human preference between images for a prompt, by Qwen2-VL-7B, as a score with uncertainty."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig

from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.frame_scorer import spread
from pisces_rl.rewards.scorers.published_weights import check_config, check_names, published_folder, stored_shapes
from pisces_rl.rewards.scorers.qwen2_vl_reward import (
    PROMPT,
    UNUSED,
    Qwen2VLReward,
    QwenScorer,
    empty_shapes,
    flat_name,
    load_weights,
    read_constants,
)

MODEL, BASE, WEIGHTS = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct", "HPSv3.safetensors"
TEMPLATE = "~/.cache/pisces_rl/hpsv3_data_collator_qwen.py"
FETCH = (
    f"curl --create-dirs -o {TEMPLATE} "
    "https://raw.githubusercontent.com/MizzenAI/HPSv3/HEAD/hpsv3/dataset/data_collator_qwen.py"
)
SIZES = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "text_config.hidden_size": 3584,
    "text_config.num_hidden_layers": 28,
    "vision_config.embed_dim": 1280,
    "vision_config.depth": 32,
}


class HPSv3(QwenScorer):
    """The mean over frames of mu, where (mu, sigma) = head(h) describes an image's score as a normal distribution.

    h is the last hidden state at <|Reward|> in the authors' prompt. The authors' score is mu; the means of both over
    frames are recorded as `<name>_mu` and `<name>_sigma`, with sigma as the head outputs it. The authors score images:
    a one-frame video has the score of that image.

    A frame is scaled to about 256 merged patches of 28 x 28 pixels, keeping its aspect ratio. Source: arXiv
    2508.03789, inference.py, train.py and config/HPSv3_7B.yaml of github.com/MizzenAI/HPSv3.

    Args:
        model: the Hub id or folder of HPSv3, with HPSv3.safetensors; or a Qwen2VLReward.
        base: the Hub id or folder of Qwen2-VL-7B-Instruct, of which only configuration and tokenizer are read; or a
            tokenizer.
        template: the authors' data_collator_qwen.py, which is parsed and never run; or the text itself.
        frames: frames to score per video, evenly spaced, first and last included.
        batch_size: frames per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `QwenScorer`.
        name: see `QwenScorer`.

    Raises ValueError if weights or template are missing, if the weights belong to another model, and for a prompt with
    one of the model's special tokens.
    """

    special, tokens, media = ("<|Reward|>",), (256, 256), "image"

    def __init__(
        self,
        model: str | Path | Qwen2VLReward = MODEL,
        base: str | Path | PreTrainedTokenizerBase = BASE,
        template: str | Path = TEMPLATE,
        *,
        frames: int = 4,
        batch_size: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        name: str = "hpsv3",
        offload: str | torch.device | None = None,
    ):
        if frames < 1:
            raise ValueError(f"frames={frames}: expected at least 1.")
        if PROMPT not in str(template):
            template = "".join(read_constants(template, ["INSTRUCTION", "prompt_with_special_token"], FETCH))
        if not isinstance(model, Qwen2VLReward):
            folder = published_folder(base, "HPSv3", ("*.json", "*.txt"))
            check_config(folder, "HPSv3's base (Qwen2-VL-7B)", "qwen2_vl", SIZES)
            device = first_device(device, offload)
            weights = published_folder(model, "HPSv3", ("*.json", WEIGHTS))
            model = load_hpsv3(weights, Qwen2VLConfig.from_pretrained(folder), dtype).to(device)
            base = AutoTokenizer.from_pretrained(folder)
        super().__init__(model, base, str(template), batch_size=batch_size, name=name, offload=offload)
        self.frames = frames

    def __call__(
        self, prompts: Sequence[str], videos: Tensor, log_extra: Callable | None = None, **columns: object
    ) -> Tensor:
        """Return (B,) rewards of videos (B, F, 3, H, W) in [0, 1], on their device."""
        self.check(prompts, videos)
        frames = videos[:, spread(videos.shape[1], self.frames)]
        repeated = [prompt for prompt in prompts for _ in range(frames.shape[1])]
        scores = self.outputs(repeated, frames.flatten(0, 1)[:, None])[:, 0].unflatten(0, frames.shape[:2]).mean(1)
        if log_extra is not None:
            for name, values in zip(("mu", "sigma"), scores.detach().cpu().T):
                log_extra(f"{self.__name__}_{name}", values.tolist())
        return scores[:, 0]


def head(width: int) -> nn.Module:
    """Return three linear layers, rm_head.0, 3 and 5 of the checkpoint."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def official_names(config: Qwen2VLConfig, flat: bool) -> dict[str, str]:
    """Return the published name of each weight; `flat`: in the layout of transformers before 4.52."""
    own = empty_shapes(config, lambda: head(config.text_config.hidden_size))
    return {name: flat_name(name) if flat else name for name in own}


def load_hpsv3(folder: Path, config: Qwen2VLConfig, dtype: torch.dtype) -> Qwen2VLReward:
    """Load the model from a folder's HPSv3.safetensors, in either layout, after checking names and shapes."""
    found = stored_shapes(folder, "HPSv3", WEIGHTS)
    flat = any(name.startswith("visual.") for name in found)
    names = official_names(config, flat)
    words = names["model.language_model.embed_tokens.weight"]
    if words in found:  # the checkpoint's vocabulary size, not the base model's
        config.text_config.vocab_size = found[words][0]
    shapes = empty_shapes(config, lambda: head(config.text_config.hidden_size))
    expected = {names[name]: shape for name, shape in shapes.items()}
    check_names(found, expected, folder / WEIGHTS, "HPSv3", UNUSED)
    with safe_open(folder / WEIGHTS, "pt") as file:
        state = {name: file.get_tensor(name) for name in expected}
    return load_weights(state, names, config, lambda: head(config.text_config.hidden_size), dtype)
