"""One cell of the study: a recipe of recipes/study/ over seeds, and what the judges say of each run.

    python benchmarks/study/run.py grpo_both                        # five seeds, one after the other
    python benchmarks/study/run.py grpo_none grpo_both --seeds 0 1
    python benchmarks/study/run.py --all                            # every cell that is not yet recorded

Each run leaves one JSON file in outputs/study/records/; a run that has one is skipped, and one that was broken off
goes on from its last checkpoint. `table.py` beside this file reads them. Further options go to the trainer, for
instance --max_steps 2 --eval_prompts 8 for a dry run.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from grpo_t2v import ScriptArguments, load_datasets, load_rewards, load_videos

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer, VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.cli import parse_arguments
from pisces_rl.policy import default_lora_config
from pisces_rl.rewards import load_reward
from pisces_rl.rewards.encoders import load_encoder

RECIPES = Path(__file__).parents[2] / "recipes" / "study"
TRAINERS = {"grpo": (VideoGRPOConfig, VideoGRPOTrainer), "backprop": (RewardBackpropConfig, RewardBackpropTrainer)}
JUDGE = "tiny-vtm-judge"  # of another seed and width than the encoder that rewards
DIVERSE_PROMPTS, DIVERSE_SAMPLES = 32, 8


def settings_of(cell: str) -> dict:
    """The shared settings of all cells, with the cell's own over them."""
    path = RECIPES / f"{cell}.yaml"
    if not path.is_file():
        raise SystemExit(f"no cell {cell!r}; there are {', '.join(cells())}.")
    return yaml.safe_load((RECIPES / "shared.yaml").read_text()) | yaml.safe_load(path.read_text())


def cells() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "shared")


def judges(encoder) -> list:
    loaded = [load_reward(name, encoder=encoder) for name in ("cosine", "matching")]
    for reward in loaded:
        reward.__name__ = f"judge_{reward.__name__}"
    return loaded


@torch.no_grad()
def diversity(policy, encoder, prompts: list[str]) -> dict[str, float]:
    """Of the samples of one prompt: the mean distance of their features, and the Vendi score (arXiv 2210.02410), which
    is the number of effectively different ones; means over prompts, on the judge's unit features."""
    distances, effective = [], []
    for row, prompt in enumerate(prompts):
        seeds = [10_000 + row * DIVERSE_SAMPLES + i for i in range(DIVERSE_SAMPLES)]
        videos = policy.sample([prompt] * DIVERSE_SAMPLES, noise_seeds=seeds).videos
        z = encoder.encode_video(videos).pooled.double().cpu()
        pairs = torch.pdist(z)
        distances.append(float(pairs.mean()))
        eigenvalues = torch.linalg.eigvalsh(z @ z.T / len(z)).clamp_min(1e-12)
        effective.append(float((-(eigenvalues * eigenvalues.log()).sum()).exp()))
    return {"distance": sum(distances) / len(distances), "vendi": sum(effective) / len(effective)}


def run(cell: str, seed: int, output: Path, extra: list[str]) -> dict:
    settings = settings_of(cell)
    kind = settings.pop("trainer")
    settings |= {"seed": seed, "output_dir": str(output / f"{cell}_{seed}")}
    make_config, make_trainer = TRAINERS[kind]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        script, config = parse_arguments(ScriptArguments, make_config, arguments=["--config", file.name, *extra])
    train_dataset, eval_dataset = load_datasets(script, seed)
    encoder = load_encoder(JUDGE, device=config.device)
    trainer = make_trainer(
        model=script.model, reward_funcs=load_rewards(script, script.rewards),
        judge_funcs=load_rewards(script, script.judges) + judges(encoder), args=config, train_dataset=train_dataset,
        eval_dataset=eval_dataset, peft_config=default_lora_config(script.lora_r, script.lora_alpha),
        video_dataset=load_videos(script, config, train_dataset),
    )  # fmt: skip
    start = time.perf_counter()
    begun = any(Path(config.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun or None)
    seconds = time.perf_counter() - start
    prompts = list(dict.fromkeys(eval_dataset["held_out"]["prompt"]))[:DIVERSE_PROMPTS]
    logs = trainer.state.log_history
    return {
        "cell": cell, "seed": seed, "settings": settings, "seconds": seconds,
        "steps": [{k: v for k, v in row.items() if not k.startswith("eval")} for row in logs if "loss" in row],
        "evaluations": [
            json.loads(path.read_text()) for path in sorted(Path(config.output_dir).glob("evaluations/step_*.json"))
        ],
        "diversity": diversity(trainer.policy, encoder, prompts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="names of recipes in recipes/study/")
    parser.add_argument("--all", action="store_true", help="every cell")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    args, extra = parser.parse_known_args()
    chosen = cells() if args.all else args.cells
    if not chosen:
        parser.error(f"name a cell, or --all; there are {', '.join(cells())}.")
    records = args.output_dir / "records"
    records.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:  # all cells of one seed before the next: a study that ends early compares like with like
        for cell in chosen:
            path = records / f"{cell}_{seed}.json"
            if path.exists():
                continue
            record = run(cell, seed, args.output_dir, extra)
            path.with_suffix(".partial").write_text(json.dumps(record))
            path.with_suffix(".partial").rename(path)
            print(f"{cell} seed {seed}: {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
