"""Compute pooled features of many videos and texts once and cache them on disk, for fitting maps."""

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
SHARD = 1024  # samples per file

Video = Tensor | Callable[[], Tensor]  # (F, 3, H, W) in [0, 1], or a function that decodes it


@dataclass
class Features:
    """text (n, D), video (m, D), fp32 on the CPU; text_rows (n,), video_rows (m,): the samples' numbers."""

    text: Tensor
    video: Tensor
    text_rows: Tensor
    video_rows: Tensor

    @property
    def paired(self) -> bool:
        """Whether every sample had both a text and a video, so that row i of both belong together."""
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
    """Return the samples' features, reading from disk what is already there.

    Samples are read in order, and only those not yet on disk are decoded and encoded. So an interrupted call resumes
    where it stopped, and a call with more samples of the same source adds to the folder; pass them in the same order.
    A call with fewer samples leaves the rest in place. Several processes (accelerate's) encode every n-th sample each,
    and all return all features.

    Args:
        encoder: the encoder.
        samples: pairs of a video (F, 3, H, W) in [0, 1], a function that returns it, or None, and a caption or None.
        folder: for the features of this encoder and this source.
        source: what the samples are and how they were drawn.
        batch_size: videos of equal size encoded at once.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: the folder belongs to another encoder or source, or there is no text or no video at all.
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
    """Load what `cache_features` stored for the first `samples` samples, in order."""
    folder = Path(folder)
    processes = json.loads((folder / CARD).read_text(encoding="utf-8"))["processes"]
    files = [path for process in range(processes) for path in sorted(folder.glob(f"{process}-*.safetensors"))]
    shards = [load_file(path) for path in files]
    found: dict[str, Tensor] = {}
    for name in ("text", "video"):
        if not any((shard[f"{name}_rows"] < samples).any() for shard in shards):
            raise ValueError(f"samples: {folder} holds no {name} features.")
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
    """Encode a shard; return features of texts and videos, and the rows that they belong to."""
    texts = [(row, text) for row, _, text in shard if text is not None]
    encode: dict[str, Callable] = {
        "text": encoder.encode_text,
        "video": lambda videos: encoder.encode_video(torch.stack(videos)),
    }
    out: dict[str, Tensor] = {}
    for name, batches in (("text", _chunks(texts, batch_size)), ("video", _videos(shard, batch_size, hidden))):
        rows, features = [], [torch.zeros(0, encoder.dimension)]
        for batch in batches:
            rows += [row for row, _ in batch]
            features.append(encode[name]([value for _, value in batch]).pooled.float().cpu())
        out |= {name: torch.cat(features), f"{name}_rows": torch.tensor(rows, dtype=torch.long)}
    return out


def _videos(shard: list, batch_size: int, hidden: bool) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield batches of rows and videos of equal size, decoding each video when needed; at most two batches wait."""
    groups: dict[tuple, list] = {}
    title = f"features from sample {shard[0][0]}"
    for row, video, _ in tqdm(shard, desc=title, unit="sample", leave=False, disable=hidden or None):
        if video is None:
            continue
        video = video if isinstance(video, Tensor) else video()
        group = groups.setdefault(tuple(video.shape), [])
        group.append((row, video))
        if len(group) == batch_size or sum(map(len, groups.values())) == 2 * batch_size:
            yield groups.pop(max(groups, key=lambda size: len(groups[size])))
    yield from groups.values()
