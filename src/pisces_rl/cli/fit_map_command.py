"""`pisces-rl fit-map`: fit a transport map from text embeddings to embeddings of real videos, for the quality reward.

A dataset needs the columns `video` and `caption`. In a .csv or .json file, `video` is a path, absolute or relative to
the file; in other datasets, it holds the videos. Rows with only one of the two make the dataset unpaired. Features
are cached in output_dir/features: an interrupted call resumes there, and a larger max_samples adds to them. Each GPU
decodes and encodes its share. Every map is scored on held-out pairs, which also tell whether transport pays or
the raw cosine is as good. The map that --save names is saved in output_dir with a bank of real-video features.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import torch
from accelerate import PartialState
from datasets import Video as VideoFeature
from datasets import load_dataset
from safetensors.torch import save_file
from torch import Tensor

from pisces_rl.media import load_video
from pisces_rl.ot.maps import EntropicMap, NeuralMap, RegressedMap, ShuffledMap, fit_best
from pisces_rl.ot.maps.fit_best import BASELINES
from pisces_rl.rewards import cache_features
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.features import Video
from pisces_rl.rewards.loading import BANK
from pisces_rl.shapemotion import render_layout, sample_layouts

from . import usage_error
from .arguments import parse_arguments

MAPS = {
    "entropic": EntropicMap,
    "neural": NeuralMap,
    "neural_linear": lambda **shared: NeuralMap(skip="linear", **shared),
    "regressed": lambda seed, **shared: RegressedMap(**shared),
    "shuffled": lambda seed, **shared: ShuffledMap(**shared),
}
FILES = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class FitArguments:
    encoder: str = field(default="tiny-vtm", metadata={"help": "Built-in encoder, folder or Hub id."})
    dataset: str = field(
        default="shapemotion",
        metadata={"help": "shapemotion, a Hub dataset, a folder, or a .csv, .json or .jsonl file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset or of shapemotion."})
    video_column: str = field(default="video", metadata={"help": "Column with the videos or their paths."})
    caption_column: str = field(default="caption", metadata={"help": "Column with the captions."})
    max_samples: int = field(default=8192, metadata={"help": "Maximum number of samples to read."})
    maps: list[str] = field(
        default_factory=lambda: ["entropic"],
        metadata={"choices": list(MAPS), "help": "Maps to fit besides identity, mean_shift and linear."},
    )
    save: str = field(
        default="advised",
        metadata={
            "help": "Map to save: advised (by retrieval on held-out pairs; without pairs, as best), best (smallest "
            "held-out divergence), or the kind of a fitted map."
        },
    )
    bank_size: int = field(
        default=2048, metadata={"help": "Number of real videos whose features are kept for the divergence."}
    )
    batch_size: int = field(default=32, metadata={"help": "Videos encoded at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the held-out pairs and of the maps."})
    output_dir: str = field(default="outputs/ot_map", metadata={"help": "Folder for the map and the cached features."})


def source(args: FitArguments) -> str:
    """Identify the samples, without their number: a larger max_samples extends the same sequence."""
    if args.dataset == "shapemotion":
        return f"shapemotion, split {args.dataset_split}, seed {args.seed}"
    path, columns = Path(args.dataset), f"columns {args.video_column} and {args.caption_column}"
    if path.suffix in FILES:
        return f"{path.resolve()}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}, {columns}"
    return f"{args.dataset}, split {args.dataset_split}, {columns}"


def samples(args: FitArguments, frames: int) -> Iterator[tuple[Video | None, str | None]]:
    """Yield (function that decodes the video, caption) per sample; None if the sample lacks one."""
    if args.dataset == "shapemotion":
        for first in range(0, args.max_samples, 64):
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + first)
            specs, layout = sample_layouts(64, args.dataset_split, generator=generator)
            for row, scene in zip(range(args.max_samples - first), specs.scenes()):
                yield lambda clip=layout[row : row + 1]: render_layout(clip, size=64)[0], scene.prompt()
        return
    path = Path(args.dataset)
    if path.suffix in FILES:
        rows = load_dataset(FILES[path.suffix], data_files=str(path), split="train", streaming=True)
    else:
        rows = load_dataset(args.dataset, split=args.dataset_split, streaming=True)
        if args.video_column in (rows.column_names or ()):
            rows = rows.cast_column(args.video_column, VideoFeature(decode=False))  # PyAV decodes on demand
    for row in rows.take(args.max_samples):
        video, caption = row.get(args.video_column), row.get(args.caption_column)
        if video is None and caption is None:
            raise ValueError(f"dataset: a row has neither {args.video_column!r} nor {args.caption_column!r}: {row}.")
        yield None if video is None else lambda video=video: read_video(video, path.parent, frames), caption


def read_video(video: str | dict, folder: Path, frames: int) -> Tensor:
    """Read a video from a path relative to `folder`, or a dataset's `Video`: its bytes, or a local or Hub path."""
    if isinstance(video, str):
        return load_video(folder / video, frames)
    if video["bytes"] is not None:
        return load_video(video["bytes"], frames)
    with fsspec.open(video["path"]) as file:
        return load_video(file.read(), frames)


def main(arguments: Sequence[str], prog: str | None = None) -> None:
    (args,) = parse_arguments(FitArguments, arguments=arguments, prog=prog)
    state, output = PartialState(), Path(args.output_dir)
    encoder = load_encoder(args.encoder, device=state.device)
    maps = [MAPS[name](seed=args.seed, encoder=encoder.name) for name in args.maps]
    kinds = [*BASELINES, "regressed", *(map_.kind for map_ in maps)]
    if args.save not in ("advised", "best", *kinds):
        usage_error(f"--save {args.save!r} must be advised, best or one of the fitted maps: {', '.join(kinds)}.", prog)
    found = cache_features(
        encoder,
        samples(args, encoder.num_frames),
        output / "features",
        source=source(args),
        batch_size=args.batch_size,
    )
    if not state.is_main_process:
        return
    if "regressed" in (*args.maps, args.save) and not found.paired:
        raise ValueError("maps: regressed needs pairs of a video and a caption, and these samples are not all pairs.")
    text, video = found.text, found.video
    best = fit_best(text, video, maps=maps, paired=found.paired, seed=args.seed, encoder=encoder.name)
    named = (map_ for map_ in best.maps if args.save in ("best", map_.kind))
    saved = best.advised if args.save == "advised" else next(named)
    saved.save(output)
    rows = torch.randperm(len(video), generator=torch.Generator().manual_seed(args.seed))[: args.bank_size]
    save_file({"bank": video[rows].half()}, output / BANK)
    (output / "maps.md").write_text(f"{best}\n\n{best.advice}\n", encoding="utf-8")
    print(f"{best}\n\n{best.advice}\n{len(text)} texts and {len(video)} videos; the {saved.kind} map is in {output}.")
