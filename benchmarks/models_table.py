"""Write docs/models.md, the list of supported diffusers pipelines, from the results of the replay-parity suite.

    python benchmarks/models_table.py --run                        # runs the suite, then writes docs/models.md
    python benchmarks/models_table.py                              # from the results in outputs/replay_parity
    python benchmarks/models_table.py --output outputs/models.md   # to another file

Each family of tests/tiny_pipelines is a real pipeline of diffusers with tiny random weights. The suite samples it with
a LoRA, replays the rollout whole and in part, with and without guidance, with and without activation checkpointing,
for every transition that fits, and compares the log-probs. This command fails if a family's result is missing or
incomplete, or breaks the rule. Text besides the numbers comes from models_notes.yaml.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "outputs" / "replay_parity"
NOTES = Path(__file__).with_name("models_notes.yaml")
CONDITIONS = {(guided, checkpointed) for guided in (False, True) for checkpointed in (False, True)}
INTRODUCTION = """\
# Models

This page lists the text-to-video pipelines of diffusers that can be trained. No trainer is written for one model: a
pipeline works if it keeps [these rules](grpo.md#what-a-pipeline-must-keep-to-be-a-policy), and otherwise the error
says which rule it breaks. Each row was measured on the pipeline's real classes with tiny random weights, on a CPU in
fp32: add a LoRA, sample videos, and compute the log-probs again with gradients, for the whole batch and for a part of
it, with guidance and without, with activation checkpointing and without, by every transition listed.

- whole, part: the largest |log p(replay) - log p(sampling)| of the whole batch and of one video of it.
- adapters: tensors of the default LoRA; each got a gradient.
- LoRA: `diffusers`: `pipe.load_lora_weights` reads the saved file. `peft`: the pipeline has no LoRA loader, and
  `PeftModel.from_pretrained` reads the file (the model card has the lines).

GRPO, Flash-GRPO and Flow-DPPO need these log-probs ([methods.md](methods.md)). `nft`, `awm`, `rvm` and `flow_dpo`
start the pipeline at any noise level instead, which every family of the table but `ltx2` allows:
`tests/trainers/test_nft_families.py` takes an optimizer step of NFT on each. AWM, RVM and Flow-DPO make the same calls
of the policy and were not run on each family. LTX-2 is rejected once its pipeline is loaded: it denoises audio besides
the video, and the audio's state at a later step is unknown.
"""


def read_results(folder: Path = RESULTS) -> list[dict]:
    """Read rows of the suite; if two files have the same case, the later file wins."""
    found = {}
    for file in sorted(folder.glob("*.json"), key=os.path.getmtime):
        for row in json.loads(file.read_text(encoding="utf-8")):
            found[row["family"], row["transition"], row["guided"], row["checkpointed"]] = row
    return list(found.values())


def complaints(rows: list[dict], families: list[str], tolerance: dict[str, float], notes: dict) -> list[str]:
    """Return the problems that prevent writing the table, one line each."""
    found = []
    for family in families:
        own = [row for row in rows if row["family"] == family]
        if not own:
            found.append(f"{family} has no result: run the suite (--run).")
        for transition in sorted({row["transition"] for row in own}):
            seen = {(row["guided"], row["checkpointed"]) for row in own if row["transition"] == transition}
            if seen != CONDITIONS:
                found.append(f"{family}, {transition}: {len(seen)} of {len(CONDITIONS)} conditions have a result.")
        for row in own:
            allowed = tolerance.get(family, 1e-5)
            if row["whole_batch"] != 0 or not row["slice"] <= allowed or row["with_gradient"] < row["adapter_tensors"]:
                found.append(f"{family} breaks the rule (whole 0, part <= {allowed:g}, all gradients): {row}")
    strangers = sorted(notes["families"].keys() - set(families))
    return found + [f"{NOTES.name} has a note on {name!r}, which is not a family." for name in strangers]


def table(rows: list[dict], families: list[str], notes: dict) -> str:
    lines = [
        INTRODUCTION,
        "Measured with diffusers " + ", ".join(sorted({row["diffusers"] for row in rows})) + ".\n",
        "| family | pipeline | verdict | transitions | whole | part | adapters | LoRA | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in families:
        own = [row for row in rows if row["family"] == family]
        note = notes["families"].get(family, "").strip()
        first = own[0]
        cells = [
            family,
            f"`{first['pipeline']}`",
            "works with a note" if note else "works",
            ", ".join(f"`{name}`" for name in dict.fromkeys(row["transition"] for row in own)),
            f"{max(row['whole_batch'] for row in own):.1g}",
            f"{max(row['slice'] for row in own):.1e}",
            str(first["adapter_tensors"]),
            first["lora_layout"],
            note,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["\n## Rejected\n", "| pipeline | the rule it breaks |", "|---|---|"]
    lines += [f"| `{name}` | {why.strip()} |" for name, why in sorted(notes["refused"].items())]
    lines.append("\nWritten by `python benchmarks/models_table.py --run`.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="delete old results and run the suite first")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    options = parser.parse_args(arguments)
    if options.run:
        for file in RESULTS.glob("*.json"):
            file.unlink()
        suite = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "tests/policy/test_replay_parity.py"]
        subprocess.run([*suite, "-k", "test_replay_equals_sampling"], cwd=ROOT, check=False)
    sys.path.insert(0, str(ROOT / "tests"))
    from policy.test_replay_parity import SLICE_TOLERANCE
    from tiny_pipelines import BUILD

    rows, notes = read_results(), yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    wrong = complaints(rows, list(BUILD), SLICE_TOLERANCE, notes)
    if wrong:
        sys.exit("docs/models.md was not written:\n" + "\n".join(wrong))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table(rows, list(BUILD), notes), encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
