"""Pooled features of many videos and texts, computed once and kept on disk: what maps are fitted on."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from pisces_rl.rewards.encoders.encoder import VideoTextEncoder
from pisces_rl.whole_files import atomically, write_json

CARD = "features.json"
SHARD = 1024  # samples a file

Video = Tensor | Callable[[], Tensor]  # (F, 3, H, W) in [0, 1], or what decodes it


@dataclass
class Features:
    """text (n, D), video (m, D), in fp32 on the CPU; text_rows (n,), video_rows (m,): numbers of their samples."""

    text: Tensor
    video: Tensor
    text_rows: Tensor
    video_rows: Tensor

    @property
    def paired(self) -> bool:
        """Every sample had both, so that row i of both belong together."""
        return torch.equal(self.text_rows, self.video_rows)


@torch.no_grad()
def cache_features(
    encoder: VideoTextEncoder,
    samples: Iterable[tuple[Video | None, str | None]],
    folder: str | Path,
    *,
    source: str,
    batch_size: int = 32,
    progress: bool = True,
) -> Features:
    """The samples' features, from disk as far as they are there.

    The samples are read in order, and only those that are not yet on disk are decoded and encoded, so a call that was
    broken off goes on where it was, and more samples of the same source add to what is there: give them in the same
    order; fewer leave it there. Of several processes (accelerate's) each encodes every so many-th sample, and all
    return all features.

    Args:
        samples: pairs of a video (F, 3, H, W) in [0, 1], a function that returns it, or None, and a caption or None.
        folder: for the features of this encoder and this source.
        source: what the samples are and how they were drawn.
        batch_size: videos of one size encoded at once.

    Raises ValueError for a folder of another encoder or source, and if there is not one text or not one video.
    """
    state, folder = PartialState(), Path(folder)
    card = {"encoder": encoder.name, "source": source, "processes": state.num_processes, "shard": SHARD}
    with state.main_process_first():
        _claim(folder, card)
    count = 0

    def rows() -> Iterator[tuple[int, Video | None, str | None]]:
        nonlocal count
        for row, (video, text) in enumerate(samples):
            count = row + 1
            yield row, video, text

    own = islice(rows(), state.process_index, None, state.num_processes)
    hidden = not (progress and state.is_main_process)
    for number, shard in enumerate(_chunks(own, SHARD)):
        path = folder / f"{state.process_index}-{number:05d}.safetensors"
        if _samples_in(path) < len(shard):
            tensors = _encode(encoder, shard, batch_size, hidden)
            data = save(tensors, metadata={"samples": str(len(shard))})
            atomically(path, lambda file, data=data: file.write(data))
    state.wait_for_everyone()
    return load_features(folder, count)


def load_features(folder: str | Path, samples: float = math.inf) -> Features:
    """What `cache_features` left there of the first so many samples, in their order."""
    folder = Path(folder)
    processes = json.loads((folder / CARD).read_text(encoding="utf-8"))["processes"]
    files = [path for process in range(processes) for path in sorted(folder.glob(f"{process}-*.safetensors"))]
    shards = [load_file(path) for path in files]
    found = {}
    for name in ("text", "video"):
        if not any((shard[f"{name}_rows"] < samples).any() for shard in shards):
            raise ValueError(f"samples: {folder} has the features of no {name}.")
        rows, order = torch.cat([shard[f"{name}_rows"] for shard in shards]).sort()
        kept = int((rows < samples).sum())
        found |= {name: torch.cat([shard[name] for shard in shards])[order[:kept]], f"{name}_rows": rows[:kept]}
    return Features(**found)


def _claim(folder: Path, card: dict) -> None:
    if (folder / CARD).is_file():
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
        differ = [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in card.items() if found.get(k) != v]
        if differ:
            raise ValueError(f"folder: {folder} holds features of {', '.join(differ)}; choose another folder.")
        return
    write_json(folder / CARD, card)


def _samples_in(path: Path) -> int:
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as shard:
        return int(shard.metadata()["samples"])


def _chunks(samples: Iterable, size: int) -> Iterator[list]:
    samples = iter(samples)
    while chunk := list(islice(samples, size)):
        yield chunk


def _encode(encoder: VideoTextEncoder, shard: list, batch_size: int, hidden: bool) -> dict[str, Tensor]:
    """Features of rows, videos and texts, and the rows that they belong to."""
    texts = [(row, text) for row, _, text in shard if text is not None]
    encode = {"text": encoder.encode_text, "video": lambda videos: encoder.encode_video(torch.stack(videos))}
    out = {}
    for name, batches in (("text", _chunks(texts, batch_size)), ("video", _videos(shard, batch_size, hidden))):
        rows, features = [], [torch.zeros(0, encoder.dimension)]
        for batch in batches:
            rows += [row for row, _ in batch]
            features.append(encode[name]([value for _, value in batch]).pooled.float().cpu())
        out |= {name: torch.cat(features), f"{name}_rows": torch.tensor(rows, dtype=torch.long)}
    return out


def _videos(shard: list, batch_size: int, hidden: bool) -> Iterator[list[tuple[int, Tensor]]]:
    """Batches of rows and videos of one size, each decoded when its turn comes; at most two batches wait in all."""
    groups: dict[tuple, list] = {}
    title = f"features from sample {shard[0][0]}"
    for row, video, _ in tqdm(shard, desc=title, unit="sample", leave=False, disable=hidden):
        if video is None:
            continue
        video = video if isinstance(video, Tensor) else video()
        group = groups.setdefault(tuple(video.shape), [])
        group.append((row, video))
        if len(group) == batch_size or sum(map(len, groups.values())) == 2 * batch_size:
            yield groups.pop(max(groups, key=lambda size: len(groups[size])))
    yield from groups.values()
