"""Run cells of the study, the recipes of recipes/study/ over several seeds, and record the judges' scores of each run.

    python benchmarks/study/run.py --cells grpo_both                # five seeds, one at a time
    python benchmarks/study/run.py --cells grpo_none grpo_both --seeds 0 1 --jobs 2
    python benchmarks/study/run.py --stage A --jobs 14              # every cell of stage A that is not yet recorded
    python benchmarks/study/run.py --all

Each run writes one JSON file to outputs/study/records/, which `table.py` reads. A run with a record is skipped; an
interrupted run resumes from its last checkpoint. Other options are passed to the trainer. If the folder already has
the run with different settings or options, the command fails, so use a separate folder for a dry run:

    python benchmarks/study/run.py --cells grpo_both --seeds 0 --max_steps 2 --eval_prompts 8 --output_dir outputs/dry

The cells map_*, *_quality and *_both read their maps from outputs/study/maps/ in the working directory, regardless
of --output_dir. Fit the maps first:

    python benchmarks/study/maps.py
"""

import argparse
import json
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from recipes import STAGES, cells, settings_of
from transformers import TrainerCallback

from pisces_rl.cli import parse_arguments
from pisces_rl.cli.train_command import TRAINERS
from pisces_rl.cli.training_inputs import ScriptArguments, load_auxiliary_losses, load_datasets, load_rewards
from pisces_rl.policy import VideoPolicy, default_lora_config
from pisces_rl.policy.lora.adapters import adapters_off
from pisces_rl.rewards import load_reward
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.shapemotion import verify
from pisces_rl.trainers.base.run.resume import last_checkpoint
from pisces_rl.trainers.rollouts.losses import kl_to_reference

JUDGE = "tiny-vtm-judge"  # of another seed and width than the encoder that rewards
DIVERSE_PROMPTS, DIVERSE_SAMPLES = 32, 8


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


@torch.no_grad()
def guided(policy, prompts: list[str], batch: int) -> dict[str, float]:
    """`correct` and quality of the pipeline as it is meant to be used: 20 steps under guidance 3."""
    sampler = VideoPolicy(
        policy.pipeline, num_inference_steps=20, pipeline_kwargs=policy.pipeline_kwargs | {"guidance_scale": 3.0}
    )
    found = {"correct": [], "quality": []}
    for start in range(0, len(prompts), batch):
        own = prompts[start : start + batch]
        verdict = verify(sampler.sample(own, noise_seeds=list(range(start, start + len(own)))).videos, own)
        for name, values in found.items():
            values += [float(value) for value in getattr(verdict, name)]
    return {name: sum(values) / len(values) for name, values in found.items()}


class Divergence(TrainerCallback):
    """KL(p || p_ref) of the sampler's stochastic transitions at each evaluation, the same for every trainer.

    Per latent dimension, summed over the steps before the last and averaged over prompts; samples are drawn from p.
    The last of them has the least noise and nearly all of the sum. Goes to kl.json in the run's folder, by step.
    """

    def __init__(self, prompts: list[str]):
        self.prompts = prompts
        self.pipeline = None

    @torch.no_grad()
    def on_evaluate(self, args, state, control, **kwargs):
        policy = VideoPolicy(
            self.pipeline,
            transition="cps",
            noise_level=0.5,
            num_inference_steps=args.num_inference_steps,
            pipeline_kwargs=args.policy_kwargs(),
        )
        steps = list(range(args.num_inference_steps - 1))  # the last one has no noise
        rows = range(len(self.prompts))
        rollout = policy.sample(
            self.prompts, noise_seeds=list(rows), step_seeds=list(rows), steps=steps, output_type="latent"
        )
        scored = ({}, {})
        policy.replay(rollout, rows, lambda step: scored[0].__setitem__(step.index, step), grad=False)
        with adapters_off(policy):
            policy.replay(rollout, rows, lambda step: scored[1].__setitem__(step.index, step), grad=False)
        kl = [
            kl_to_reference(scored[0][i].mean, scored[1][i].mean, scored[0][i].std, rollout.rows_per_video)
            for i in steps
        ]
        path = Path(args.output_dir) / "kl.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(known | {str(state.global_step): float(sum(kl).mean())}), encoding="utf-8")


def check_same(path: Path, settings: dict, extra: list[str]) -> None:
    """That a JSON file of an earlier run is of these settings and options; where it lies may differ."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    found, wanted = (
        {**e["settings"], "output_dir": None, "options": e["extra"]}
        for e in (earlier, {"settings": settings, "extra": extra})
    )
    different = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    if different:
        raise ValueError(
            f"{path} is of a run with other {', '.join(different)}: "
            f"{[found.get(key) for key in different]}, now {[wanted.get(key) for key in different]}. "
            "Remove it (and the run's folder), or pass another --output_dir."
        )


def begin(cell: str, seed: int, output: Path, extra: list[str]) -> dict:
    """The settings of a run, written into its folder; a ValueError where a run of others lies there."""
    settings = settings_of(cell) | {"seed": seed, "output_dir": str(output / f"{cell}_{seed}")}
    ot_map = settings.get("ot_map")
    if ot_map and not Path(ot_map).is_dir():
        raise ValueError(
            f"{cell} needs the map {ot_map}, which is not there: run `python benchmarks/study/maps.py --only "
            f"{Path(ot_map).name}` in this folder first."
        )
    folder = Path(settings["output_dir"])
    path = folder / "settings.json"
    if path.exists():
        check_same(path, settings, extra)
    elif last_checkpoint(folder):
        raise ValueError(f"{folder} holds checkpoints but no settings.json to know them by; remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "extra": extra}), encoding="utf-8")
    return settings


def run(cell: str, seed: int, output: Path, extra: list[str]) -> dict:
    settings = begin(cell, seed, output, extra)
    make_trainer, make_config = TRAINERS[settings.pop("trainer")]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        script, config = parse_arguments(ScriptArguments, make_config, arguments=["--config", file.name, *extra])
    train_dataset, eval_dataset = load_datasets(script, seed)
    held_out = list(eval_dataset["held_out"]["prompt"])
    prompts = list(dict.fromkeys(held_out))[:DIVERSE_PROMPTS]
    encoder = load_encoder(JUDGE, device=config.device)
    divergence = Divergence(prompts)
    trainer = make_trainer(
        model=script.model,
        reward_funcs=load_rewards(script, script.rewards),
        judge_funcs=load_rewards(script, script.judges) + judges(encoder),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=default_lora_config(script.lora_r, script.lora_alpha),
        callbacks=[divergence],
        auxiliary_losses=load_auxiliary_losses(script, config, train_dataset),
    )
    divergence.pipeline = trainer.pipeline
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    seconds = time.perf_counter() - start
    logs = trainer.state.log_history
    return {
        "cell": cell,
        "seed": seed,
        "settings": settings,
        "extra": extra,
        "seconds": seconds,
        "steps": [{k: v for k, v in row.items() if not k.startswith("eval")} for row in logs if "loss" in row],
        "evaluations": [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(config.output_dir).glob("evaluations/step_*.json"))
        ],
        "kl": json.loads((Path(config.output_dir) / "kl.json").read_text(encoding="utf-8")),
        "diversity": diversity(trainer.policy, encoder, prompts),
        "guided": guided(trainer.policy, held_out, config.per_device_eval_batch_size),
    }


def record(cell: str, seed: int, output: Path, extra: list[str], threads: int | None, end: float) -> str:
    """Run a cell, or not if it is recorded or the time is up; what to print."""
    path = output / "records" / f"{cell}_{seed}.json"
    if path.exists():
        settings = {k: v for k, v in settings_of(cell).items() if k != "trainer"} | {"seed": seed}
        check_same(path, settings, extra)
        return f"{cell} seed {seed}: recorded before"
    if time.time() > end:
        return f"{cell} seed {seed}: not begun"
    if threads:
        torch.set_num_threads(threads)
    result = run(cell, seed, output, extra)
    path.with_suffix(".partial").write_text(json.dumps(result), encoding="utf-8")
    path.with_suffix(".partial").rename(path)
    return f"{cell} seed {seed}: {result['seconds']:.0f} s"


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and the rest, which are the trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cells", nargs="+", choices=cells(), metavar="CELL", help="recipes in recipes/study/")
    which.add_argument("--all", action="store_true", help="every cell")
    which.add_argument("--stage", choices=STAGES, help="every cell of this stage")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each a process; 14 fit a GPU of 80 GB")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="begin no run after so many seconds")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    args, extra = parser.parse_known_args(arguments)
    args.cells = args.cells or cells(args.stage or "")
    return args, extra


def main() -> None:
    args, extra = parse()
    (args.output_dir / "records").mkdir(parents=True, exist_ok=True)
    end, threads = time.time() + args.stop_after, 1 if args.jobs > 1 else None
    failed = 0
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        # all cells of one seed before the next: a study that ends early compares like with like
        tasks = [
            pool.submit(record, cell, seed, args.output_dir, extra, threads, end)
            for seed in args.seeds
            for cell in args.cells
        ]
        try:
            for task in as_completed(tasks):
                if error := task.exception():
                    failed += 1
                    traceback.print_exception(error)
                else:
                    print(task.result(), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("interrupted; run the same command again to resume from the last checkpoints.") from None
    if failed:
        raise SystemExit(f"{failed} of {len(tasks)} runs failed.")


if __name__ == "__main__":
    main()
