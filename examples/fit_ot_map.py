"""Fit a transport map from text embeddings to embeddings of real videos, for the quality reward.

    python examples/fit_ot_map.py                              # ShapeMotion for tiny-vtm, a minute on two cores
    accelerate launch examples/fit_ot_map.py --encoder ./internvideo2 --dataset clips.jsonl --output_dir outputs/map \
        --maps entropic neural

A data set has the columns `video` (a path, beside the file or absolute) and `caption`; rows with only one of them make
it unpaired. Features are cached in output_dir/features, so a call that was broken off goes on where it was, and a
larger max_samples adds to them; each GPU decodes and encodes its share. Every map is scored on pairs that it was not
fitted on; the best one is saved in output_dir, with a bank of real videos' features for the divergence:

    load_reward("ot_quality", encoder="./internvideo2", ot_map="outputs/map")
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from safetensors.torch import save_file

from pisces_rl.cli import parse_arguments
from pisces_rl.media import load_video
from pisces_rl.ot.maps import EntropicMap, NeuralMap, fit_best
from pisces_rl.rewards import cache_features
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.features import Video
from pisces_rl.rewards.loading import BANK
from pisces_rl.shapemotion import render_layout, sample_layouts

MAPS = {
    "entropic": EntropicMap,
    "neural": NeuralMap,
    "neural_linear": lambda **shared: NeuralMap(skip="linear", **shared),
}
FILES = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class FitArguments:
    encoder: str = field(default="tiny-vtm", metadata={"help": "Embedded encoder, folder or Hub id."})
    dataset: str = field(
        default="shapemotion", metadata={"help": "shapemotion, a Hub data set, or a .csv, .json or .jsonl file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set, or of shapemotion."})
    video_column: str = field(default="video", metadata={"help": "Column with the videos' paths."})
    caption_column: str = field(default="caption", metadata={"help": "Column with the captions."})
    max_samples: int = field(default=8192, metadata={"help": "Samples that are read, at most."})
    maps: list[str] = field(default_factory=lambda: ["entropic"], metadata={
        "help": f"Besides identity, mean_shift and linear: {', '.join(MAPS)}."})  # fmt: skip
    bank_size: int = field(default=2048, metadata={"help": "Real videos whose features are kept for the divergence."})
    batch_size: int = field(default=32, metadata={"help": "Videos encoded at once."})
    seed: int = field(default=0, metadata={"help": "Of the held-out pairs and of the maps."})
    output_dir: str = field(default="outputs/ot_map", metadata={"help": "Folder of the map and of cached features."})


def source(args: FitArguments) -> str:
    """What tells the samples from others, but for their number: more of them begin with the same ones."""
    if args.dataset == "shapemotion":
        return f"shapemotion, split {args.dataset_split}, seed {args.seed}"
    path, columns = Path(args.dataset), f"columns {args.video_column} and {args.caption_column}"
    if path.suffix in FILES:
        return f"{path.resolve()}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}, {columns}"
    return f"{args.dataset}, split {args.dataset_split}, {columns}"


def samples(args: FitArguments, frames: int) -> Iterator[tuple[Video | None, str | None]]:
    """Videos, as functions that decode one, and captions."""
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
    for row in rows.take(args.max_samples):
        video, caption = row.get(args.video_column), row.get(args.caption_column)
        if video is None and caption is None:
            raise ValueError(f"dataset: a row has neither {args.video_column!r} nor {args.caption_column!r}: {row}.")
        yield None if video is None else lambda file=path.parent / video: load_video(file, frames), caption


def main() -> None:
    (args,) = parse_arguments(FitArguments)
    unknown = set(args.maps) - set(MAPS)
    if unknown:
        raise ValueError(f"maps: {', '.join(sorted(unknown))}: expected some of {', '.join(MAPS)}.")
    state, output = PartialState(), Path(args.output_dir)
    encoder = load_encoder(args.encoder, device=state.device)
    found = cache_features(encoder, samples(args, encoder.num_frames), output / "features", source=source(args),
                           batch_size=args.batch_size)  # fmt: skip
    if not state.is_main_process:
        return
    shared = {"encoder": encoder.name}
    maps = [MAPS[name](seed=args.seed, **shared) for name in args.maps]
    text, video = found.text, found.video
    best = fit_best(text, video, maps=maps, paired=found.paired, seed=args.seed, **shared)
    best.map.save(output)
    rows = torch.randperm(len(video), generator=torch.Generator().manual_seed(args.seed))[: args.bank_size]
    save_file({"bank": video[rows].half()}, output / BANK)
    (output / "maps.md").write_text(f"{best}\n")
    print(f"{best}\n{len(text)} texts and {len(video)} videos; the {best.map.kind} map is in {output}.")


if __name__ == "__main__":
    main()
