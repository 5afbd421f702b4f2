"""VideoAlign's VideoReward: visual quality, motion quality and text alignment of a video, by Qwen2-VL-2B."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig

from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.frame_scorer import spread
from pisces_rl.rewards.scorers.published_weights import (
    check_config,
    check_names,
    published_folder,
    read_weights,
    shapes_of,
    weights_file,
)
from pisces_rl.rewards.scorers.qwen2_vl_reward import (
    UNUSED,
    Qwen2VLReward,
    QwenScorer,
    empty_shapes,
    flat_name,
    frames_seen,
    load_weights,
    read_constants,
)

MODEL, BASE = "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
WEIGHTS = "checkpoint-*/model.pth"
TEMPLATE = "~/.cache/pisces_rl/video_align_prompt_template.py"
FETCH = (
    f"curl --create-dirs -o {TEMPLATE} https://raw.githubusercontent.com/KwaiVGI/VideoAlign/"
    "3e5ebc600aebc4d28300e9132b0a23ee8e1bc47c/prompt_template.py"
)
DIMENSIONS = ("VQ", "MQ", "TA")
#: The authors' normalisation (`inference_config` of the checkpoint's model_config.json), in the order of DIMENSIONS.
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
SIZES = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "text_config.hidden_size": 1536,
    "text_config.num_hidden_layers": 28,
    "vision_config.embed_dim": 1280,
    "vision_config.depth": 32,
}
#: The checkpoint's LoRA: on all linear layers of the language model; the update is RANK_SCALE B A.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, RANK_SCALE = 64, 128 / 64


class VideoAlign(QwenScorer):
    """The weighted sum of three normalised scores, each read at a special token of the authors' prompt:

        r = sum_k weights_k (w h_k - mean_k) / std_k,   k in VQ, MQ, TA

    h_k is the last hidden state at <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>, w one bias-free linear layer, mean and
    std the authors' constants. Each dimension is recorded as `<name>_VQ` and so on.

    Frames: two per second, at least four and an even number, evenly spaced with first and last, scaled to 128 to 256
    merged patches of 28 x 28 pixels. Source: arXiv 2501.13918, inference.py, vision_process.py and
    prompt_template.py of github.com/KwaiVGI/VideoAlign.

    Args:
        model: the Hub id, a folder or the file of VideoReward's weights: checkpoint-*/model.pth, which is read with
            `weights_only`, or model.safetensors, written by `pisces-rl convert` and preferred; or a Qwen2VLReward.
        base: the Hub id or folder of Qwen2-VL-2B-Instruct, of which only configuration and tokenizer are read; or a
            tokenizer.
        template: the authors' prompt_template.py, which is parsed and never run; or the text itself.
        video_fps: frames per second of the scored videos.
        weights: of VQ, MQ and TA.
        batch_size: videos per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `QwenScorer`.
        name: see `QwenScorer`.

    Raises ValueError if weights or template are missing, if the weights belong to another model, for a video of one
    frame, and for a prompt with one of the model's special tokens.
    """

    special, tokens, media = tuple(f"<|{name}_reward|>" for name in DIMENSIONS), (128, 256), "video"

    def __init__(
        self,
        model: str | Path | Qwen2VLReward = MODEL,
        base: str | Path | PreTrainedTokenizerBase = BASE,
        template: str | Path = TEMPLATE,
        *,
        video_fps: float = 16.0,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        batch_size: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        name: str = "video_align",
        offload: str | torch.device | None = None,
    ):
        if video_fps <= 0 or len(weights) != len(DIMENSIONS):
            raise ValueError(f"video_fps={video_fps}, weights={weights}: expected a number > 0, and 3 weights.")
        if "{text_prompt}" not in str(template):
            (template,) = read_constants(template, ["DETAILED_PROMPT_WITH_SPECIAL_TOKEN"], FETCH)
        if not isinstance(model, Qwen2VLReward):
            folder = published_folder(base, "VideoAlign", ("*.json", "*.txt"))
            config = video_align_config(folder)
            device = first_device(device, offload)
            model = load_video_align(model, config, dtype).to(device)
            base = AutoTokenizer.from_pretrained(folder)
        super().__init__(model, base, str(template), batch_size=batch_size, name=name, offload=offload)
        self.video_fps, self.weights = video_fps, torch.tensor(weights)

    def __call__(
        self, prompts: Sequence[str], videos: Tensor, log_extra: Callable | None = None, **columns: object
    ) -> Tensor:
        """Return (B,) rewards of videos (B, F, 3, H, W) in [0, 1], F at least 2, on their device."""
        self.check(prompts, videos)
        scores = self.scores(prompts, videos)
        if log_extra is not None:
            for name, values in zip(DIMENSIONS, scores.detach().cpu().T):
                log_extra(f"{self.__name__}_{name}", values.tolist())
        return scores @ self.weights.to(scores)

    def scores(self, prompts: Sequence[str], videos: Tensor) -> Tensor:
        """Return (B, 3) normalised scores: VQ, MQ, TA."""
        clips = videos[:, spread(videos.shape[1], frames_seen(videos.shape[1], self.video_fps))]
        outputs = self.outputs(prompts, clips)[..., 0]
        return (outputs - outputs.new_tensor(MEAN)) / outputs.new_tensor(STD)


def head(width: int) -> nn.Module:
    return nn.Linear(width, 1, bias=False)


def video_align_config(folder: Path) -> Qwen2VLConfig:
    """Read Qwen2-VL-2B's configuration; raise a ValueError for another model's folder."""
    check_config(folder, "VideoAlign's base (Qwen2-VL-2B)", "qwen2_vl", SIZES)
    return Qwen2VLConfig.from_pretrained(folder)


def official_shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in the published file: a whole PEFT model, base layers beside LoRA's two matrices."""
    shapes = {}
    for name, shape in empty_shapes(config, lambda: head(config.text_config.hidden_size)).items():
        module, _, kind = f"base_model.model.{flat_name(name)}".rpartition(".")
        if not module.endswith(ADAPTED):
            shapes[f"{module}.{kind}"] = shape
            continue
        shapes[f"{module}.base_layer.{kind}"] = shape
        if kind == "weight":
            shapes[f"{module}.lora_A.default.weight"] = (RANK, shape[1])
            shapes[f"{module}.lora_B.default.weight"] = (shape[0], RANK)
    return shapes


def read_video_align(path: Path, config: Qwen2VLConfig) -> dict[str, Tensor]:
    """Read the weights of a file under their published names and check names and shapes. Sets the vocabulary size in
    `config` to the file's."""
    state = read_weights(path)
    words = "base_model.model.model.embed_tokens.weight"
    if words in state:  # the checkpoint's vocabulary size, not the base model's
        config.text_config.vocab_size = len(state[words])
    unused = tuple(f"base_model.model.{name}" for name in UNUSED)
    check_names(shapes_of(state), official_shapes(config), path, "VideoAlign", unused)
    return state


def load_video_align(source: str | Path, config: Qwen2VLConfig, dtype: torch.dtype) -> Qwen2VLReward:
    """Load the model from a file, folder or Hub id of VideoReward's weights, after checking names and shapes. LoRA is
    merged into the layers."""
    state = read_video_align(weights_file(source, "VideoAlign", WEIGHTS), config)
    merged, names = {}, {}
    for name in empty_shapes(config, lambda: head(config.text_config.hidden_size)):
        official = f"base_model.model.{flat_name(name)}"
        module, _, kind = official.rpartition(".")
        names[name] = official
        if not module.endswith(ADAPTED):
            merged[official] = state[official]
            continue
        merged[official] = state[f"{module}.base_layer.{kind}"]
        if kind == "weight":
            down, up = (state[f"{module}.lora_{side}.default.weight"].float() for side in "AB")
            merged[official] = (merged[official].float() + RANK_SCALE * up @ down).to(merged[official].dtype)
    return load_weights(merged, names, config, lambda: head(config.text_config.hidden_size), dtype)
