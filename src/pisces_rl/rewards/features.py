"""Pooled features of many videos and texts, computed once and kept on disk: what maps are fitted on."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from pisces_rl.rewards.encoders.base import VideoTextEncoder

CARD = "features.json"
SHARD = 1024  # samples a file


@torch.no_grad()
def cache_features(
    encoder: VideoTextEncoder, samples: Iterable[tuple[Tensor | None, str | None]], folder: str | Path, *,
    batch_size: int = 32, progress: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Texts' features (n, D) and videos' (m, D), in fp32 on the CPU, from disk as far as they are there.

    The samples are read in order, and only those that are not yet on disk are encoded, so a call that was broken off
    goes on where it was: give it the same samples in the same order. Of several processes (accelerate's) each encodes
    every so many-th sample, and all return all features. If every sample has both, row i of both belong together.

    Args:
        samples: pairs of a video (F, 3, H, W) in [0, 1] or None, and a caption or None.
        folder: for the features of this encoder and these samples. batch_size: videos of one size encoded at once.

    Raises ValueError for a folder of another encoder, and if there is not one text or not one video.
    """
    state, folder = PartialState(), Path(folder)
    card = {"encoder": encoder.name, "processes": state.num_processes, "shard": SHARD}
    with state.main_process_first():
        _claim(folder, card)
    done = len(list(folder.glob(f"{state.process_index}-*.safetensors")))
    own = islice(samples, state.process_index, None, state.num_processes)
    rest = islice(own, done * SHARD, None)
    bar = tqdm(rest, initial=done * SHARD, disable=not (progress and state.is_main_process), desc="features",
               unit="sample")  # fmt: skip
    for number, shard in enumerate(_chunks(bar, SHARD), done):
        path = folder / f"{state.process_index}-{number:05d}.safetensors"
        save_file(_encode(encoder, shard, batch_size, number * SHARD), f"{path}.partial")
        os.replace(f"{path}.partial", path)
    state.wait_for_everyone()
    return load_features(folder)


def load_features(folder: str | Path) -> tuple[Tensor, Tensor]:
    """What `cache_features` left there, in the samples' order."""
    folder = Path(folder)
    processes = json.loads((folder / CARD).read_text())["processes"]
    shards = [(process, load_file(path)) for process in range(processes)
              for path in sorted(folder.glob(f"{process}-*.safetensors"))]  # fmt: skip
    features = []
    for name in ("text", "video"):
        if not any(len(shard[name]) for _, shard in shards):
            raise ValueError(f"samples: {folder} has the features of no {name}.")
        order = torch.cat([shard[f"{name}_rows"] * processes + process for process, shard in shards]).argsort()
        features.append(torch.cat([shard[name] for _, shard in shards])[order])
    return tuple(features)


def _claim(folder: Path, card: dict) -> None:
    if (folder / CARD).is_file():
        found = json.loads((folder / CARD).read_text())
        differ = [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in card.items() if found.get(k) != v]
        if differ:
            raise ValueError(f"folder: {folder} holds features of {', '.join(differ)}; choose another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{CARD}.partial").write_text(json.dumps(card) + "\n")
    os.replace(folder / f"{CARD}.partial", folder / CARD)


def _chunks(samples: Iterable, size: int) -> Iterator[list]:
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield chunk


def _encode(encoder: VideoTextEncoder, shard: list, batch_size: int, first: int) -> dict[str, Tensor]:
    """Features and the rows (of this process) that they belong to; videos of one size go together."""
    out = {}
    texts = [(i, text) for i, (_, text) in enumerate(shard) if text is not None]
    videos = [(i, video) for i, (video, _) in enumerate(shard) if video is not None]
    groups: dict[tuple, list] = {}
    for row, video in videos:
        groups.setdefault(tuple(video.shape), []).append((row, video))
    batches = [batch for group in groups.values() for batch in _chunks(group, batch_size)]
    seen, read = [], []
    for batch in batches:
        pooled = encoder.encode_video(torch.stack([video for _, video in batch])).pooled
        seen += [(row, z) for (row, _), z in zip(batch, pooled)]
    for batch in _chunks(texts, batch_size):
        pooled = encoder.encode_text([text for _, text in batch]).pooled
        read += [(row, z) for (row, _), z in zip(batch, pooled)]
    for name, pairs in (("text", read), ("video", seen)):
        pairs.sort(key=lambda pair: pair[0])
        out[name] = torch.stack([z.float().cpu() for _, z in pairs]) if pairs else torch.zeros(0, encoder.dimension)
        out[f"{name}_rows"] = first + torch.tensor([row for row, _ in pairs], dtype=torch.long)
    return out
