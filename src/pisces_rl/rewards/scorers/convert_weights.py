"""`pisces-rl convert`: convert weights that are published as a pickle to safetensors, once, under the same names."""

import argparse
import difflib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pisces_rl.whole_files import atomically

if TYPE_CHECKING:
    from torch import Tensor

#: Rewards whose weights are published as a pickle, and the argument of `load_reward` that takes the file.
PICKLED = {"aesthetic": "head", "image_reward": "model", "video_align": "model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", metavar="NAME", help=f"Reward: {', '.join(PICKLED)}.")
    parser.add_argument("file", metavar="FILE", type=Path, help="Its published pickle.")
    parser.add_argument("--output", type=Path, help="A .safetensors file; default: where the reward looks for it.")
    parser.add_argument("--base", help="For video_align: Hub id or folder of Qwen2-VL-2B-Instruct; default: its id.")


def convert_weights(
    reward: str, file: str | Path, output: str | Path | None = None, *, base: str | Path | None = None
) -> Path:
    """Read a pickle with `weights_only`, check names and shapes as the scorer does, and write all its tensors to a
    safetensors file, under the same names and in the same precision. The file is written atomically.

    Args:
        reward: one of `PICKLED`.
        file: the published pickle.
        output: the file to write; default: where the reward looks for it, which is beside the pickle, or for
            "aesthetic" in ~/.cache/pisces_rl.
        base: for "video_align": folder or Hub id of Qwen2-VL-2B-Instruct, of which config.json is read.

    Returns:
        The path of the file written.

    Raises:
        ValueError: the reward is unknown; the file is missing, is not a pickle of tensors, or holds another model's
            weights; the output exists already or is not a .safetensors file.
    """
    if reward not in PICKLED:
        near = difflib.get_close_matches(reward, PICKLED, n=3)
        advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(
            f"reward {reward!r} has no weights that are published as a pickle{advice} These have: "
            f"{', '.join(PICKLED)}."
        )
    file = Path(file).expanduser()
    if not file.is_file():
        raise ValueError(f"file: there is no {file}; pass the published pickle.")
    if file.suffix == ".safetensors":
        raise ValueError(f"file: {file} is a safetensors file already; pass the published pickle.")
    output = _default_output(reward, file) if output is None else Path(output).expanduser()
    if output.suffix != ".safetensors":
        raise ValueError(f"output: {output} must be a file that ends with .safetensors.")
    if output.exists():
        raise ValueError(f"output: {output} exists already; remove it, or choose another with --output.")
    from safetensors.torch import save  # here, so that --help does not import torch

    state = _read(reward, file, base)
    data = save(_without_shared_memory(state), {"format": "pt"})
    return atomically(output, lambda target: target.write(data))


def _default_output(reward: str, file: Path) -> Path:
    if reward != "aesthetic":
        return file.with_suffix(".safetensors")
    from pisces_rl.rewards.scorers.aesthetic_predictor import HEAD

    return HEAD.expanduser()


def _read(reward: str, file: Path, base: str | Path | None) -> dict[str, "Tensor"]:
    """Return the tensors of a pickle after the scorer has checked them."""
    if reward == "aesthetic":
        from pisces_rl.rewards.scorers.aesthetic_predictor import read_head

        return read_head(file)
    if reward == "image_reward":
        from pisces_rl.rewards.scorers import image_reward

        return image_reward.read_image_reward(file, image_reward.VISION, image_reward.TEXT)
    from pisces_rl.rewards.scorers import video_align
    from pisces_rl.rewards.scorers.published_weights import published_folder

    folder = published_folder(base or video_align.BASE, "VideoAlign", ("config.json",))
    return video_align.read_video_align(file, video_align.video_align_config(folder))


def _without_shared_memory(state: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return contiguous tensors that do not share memory, as safetensors requires."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    return {
        name: tensor.clone() if owners[tensor.untyped_storage().data_ptr()] > 1 else tensor.contiguous()
        for name, tensor in state.items()
    }


def main(args: argparse.Namespace) -> None:
    written = convert_weights(args.reward, args.file, args.output, base=args.base)
    print(f'wrote {written}: load_reward("{args.reward}", {PICKLED[args.reward]}="{written}")')
