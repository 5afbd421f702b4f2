"""The program `pisces-rl`: its help, its errors and exit statuses, and each subcommand once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pisces_rl import command
from pisces_rl.cli import env_command, help_table
from pisces_rl.cli.completion_command import script, words_of_help

ROOT = Path(__file__).parents[1]
TINY = [
    "--use_cpu",
    "--max_steps",
    "1",
    "--height",
    "32",
    "--width",
    "32",
    "--num_frames",
    "5",
    "--guidance_scale",
    "1",
    "--num_inference_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--num_generations",
    "4",
    "--gradient_accumulation_steps",
    "2",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--eval_prompts",
    "0",
    "--pipeline_kwargs",
    '{"max_sequence_length": 24}',
    "--model",
    "tiny-wan",
    "--rewards",
    "exposure",
]


def stopped(capsys, *arguments: str) -> tuple[object, str]:
    """Exit status and what was printed of a call that ends the program; a status that is a text is printed, too."""
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    printed = "".join(capsys.readouterr())
    return (1, printed + ended.value.code) if isinstance(ended.value.code, str) else (ended.value.code, printed)


# --- help and wrong command lines ---


def test_help_and_completion_import_nothing_heavy():
    calls = [
        [],
        *([name, "--help"] for name in command.COMMANDS),
        *(["train", "--method", name, "-h"] for name in help_table.methods("train")),
        ["train", "--config", str(ROOT / "recipes" / "wan21_1.3b_nft.yaml"), "--num_processes", "2", "--help"],
        ["completion", "bash"],
    ]
    code = (
        "import sys\nfrom pisces_rl.command import main\n"
        f"for arguments in {calls}:\n"
        "    try:\n        main(arguments)\n    except SystemExit as ended:\n        assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'diffusers', 'transformers', 'trl', 'peft', 'accelerate', 'datasets'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize("asked", [["train", "--help"], ["estimate"]])
@pytest.mark.parametrize(
    "text, told",
    [("- a\n", "must hold `name: value` lines"), ("a: [\n", "is not YAML"), ("method: 3\n", "--method '3' must")],
)
def test_a_recipe_that_names_no_method_readably_is_a_usage_error(tmp_path, capsys, text, told, asked):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        command.main([*asked, "--config", str(tmp_path / "r.yaml")])
    assert ended.value.code == 2 and told in capsys.readouterr().err


def pinned_versions() -> dict[str, str]:
    """The versions in constraints.txt of the packages that define inherited settings."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {name: pins[name] for name in help_table.INHERITED}


with_pinned_versions = pytest.mark.skipif(
    any(help_table.installed(name) != pin for name, pin in pinned_versions().items()),
    reason="other versions of transformers and trl have other settings",
)


@with_pinned_versions
def test_the_table_of_options_is_current():
    run = "run `make help-table`, or python -m pisces_rl.cli.help_table"
    assert help_table.TABLE.read_text(encoding="utf-8") == help_table.generate(), f"the table is stale; {run}"


@with_pinned_versions
@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_help_is_that_of_the_real_parsers(monkeypatch, width):
    """If this fails for all widths and the table is current, help depends on more than the table stores."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setitem(help_table._table(), "versions", {})  # without the line on other versions
    for key, make in help_table.real_parsers().items():
        real = make(prog=f"pisces-rl {key.split()[0]}")
        assert help_table.listed_parser(*key.split(), prog=real.prog).format_help() == real.format_help(), key


def test_help_follows_the_method_and_the_recipe(capsys, tmp_path):
    (tmp_path / "nft.yaml").write_text("method: nft\nlearning_rate: null\n")
    _, grpo = stopped(capsys, "train", "--method", "grpo", "--help")
    _, nft = stopped(capsys, "train", "--config", str(tmp_path / "nft.yaml"), "--help")
    assert "  --epsilon EPSILON" in grpo and "  --epsilon EPSILON" not in nft
    assert nft.split("\n  --learning_rate ")[1].split("\n  --")[0].endswith("(default: None)")
    (tmp_path / "nft.yaml").write_text("method: nft\nepsilon: 0.1\n")
    status, printed = stopped(capsys, "train", "--config", str(tmp_path / "nft.yaml"), "--help")
    assert status == 2 and "unknown key 'epsilon': it is a setting of methods grpo" in printed


def test_help_says_which_versions_its_inherited_settings_are_of(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(help_table._table(), "versions", {"trl": "1.0.0", "no_such_package": "2.0"})
    _, printed = stopped(capsys, "train", "--help")
    found = f"trl 1.0.0 (installed: {help_table.installed('trl')}) and no_such_package 2.0 (installed: not installed)"
    assert printed.endswith(f"\n\nInherited settings are those of {found}; a few may differ.\n")
    assert "Inherited" not in stopped(capsys, "evaluate", "--help")[1]


def test_help_names_every_subcommand(capsys):
    _, printed = stopped(capsys, "--help")
    for name, (purpose, _, _) in command.COMMANDS.items():
        assert f"    {name} " in printed.replace("\n", " \n") and purpose in printed


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_subcommand_the_help_is_shown(capsys, arguments):
    status, printed = stopped(capsys, *arguments)
    assert not status and "Exit status" in printed


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_subcommand_has_a_help(capsys, name):
    status, printed = stopped(capsys, name, "--help")
    assert not status and printed.startswith(f"usage: pisces-rl {name} ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "invalid choice: 'trian'; did you mean train"),
        (["--tracebak", "train"], "did you mean --traceback"),
        (["vbench", "reed"], "invalid choice: 'reed'; did you mean read"),
        (["serve", "--rewards", "exposure", "--port", "99999"], "argument --port: 99999 must be 0 to 65535"),
        (["serve", "--rewards", "exposure", "--max_batch", "0"], "argument --max_batch: 0 must be at least 1"),
        (["serve", "--rewards", "exposure", "--prot", "1"], "unrecognized arguments: --prot 1; did you mean --port"),
        (
            ["train", "--method", "grpo", "--model", "tiny-wan", "--learning_rat", "1"],
            "did you mean '--learning_rate'",
        ),
        (
            ["train", "--method", "nft", "--model", "tiny-wan", "--epsilon", "0.1"],
            "unknown argument '--epsilon': it is a setting of methods grpo, flash_grpo, flow_dppo, awm.",
        ),
        (["train", "--model", "tiny-wan", "learning_rate", "0.1"], "did you mean '--learning_rate'"),
        (["evaluate", "--reward", "exposure"], "did you mean '--rewards'"),
        (["sample", "--model", "tiny-wan", "--output", "out"], "one of the arguments --prompt --prompts is required"),
        (["sample", "--model", "a", "--output", "b", "--prompt", "c", "--batch_size", "0"], "0 must be at least 1"),
        (["train", "--method", "ntf"], "pisces-rl train: error: --method 'ntf' must be one of grpo"),
        (["train", "--method", "ntf"], "did you mean 'nft'"),
        (["train", "--train", "ful"], "argument --train: invalid choice: 'ful'"),
        (
            ["train", "--accelerate_config", "dpp"],
            "--accelerate_config dpp: no such file, and it is none of ddp, deeps",
        ),
        (["estimate", "--sharding", "fsdp2"], "--num_processes 1: fsdp2 needs at least 2 GPUs"),
        (["fit-map", "--maps", "cubic"], "invalid choice: 'cubic'"),
        (["export", "run", "out", "--format", "merged"], "error: --format merged needs --model, the base model."),
    ],
)
def test_an_invalid_command_line_exits_with_2_and_names_the_nearest_words(capsys, arguments, message):
    status, printed = stopped(capsys, *arguments)
    assert status == 2 and message in printed and len(printed.splitlines()) < 30


# --- errors ---


def test_a_runtime_error_exits_with_1_and_shows_its_traceback_on_request(capsys, monkeypatch, tmp_path):
    arguments = [
        "sample",
        "--model",
        "tiny-wan",
        "--prompts",
        str(tmp_path / "missing.txt"),
        "--output",
        str(tmp_path),
    ]
    status, printed = stopped(capsys, *arguments)
    assert status == 1 and printed.startswith("pisces-rl sample: ") and "missing.txt" in printed
    with pytest.raises(ValueError, match="missing.txt"):
        command.main(["--traceback", *arguments])
    monkeypatch.setenv(command.TRACEBACK, "1")
    with pytest.raises(ValueError, match="missing.txt"):
        command.main(arguments)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (KeyboardInterrupt(), 130, "pisces-rl env: interrupted\n"),
        (
            OSError("no space left"),
            1,
            "pisces-rl env: no space left\n(pisces-rl --traceback ... shows where this OSError",
        ),
    ],
)
def test_ctrl_c_and_errors_of_others(capsys, monkeypatch, error, status, message):
    def fails():
        raise error

    monkeypatch.setattr(env_command, "environment", fails)
    got, printed = stopped(capsys, "env")
    assert got == status and printed.startswith(message)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(env_command, "environment", lambda: {}["gone"])
    with pytest.raises(KeyError):
        command.main(["env"])


# --- the subcommands ---


def test_env_prints_the_versions(capsys):
    command.main(["env"])
    printed = capsys.readouterr().out
    for name in ("pisces_rl: 0", "torch: 2", "diffusers: 0", "trl: 1", "GPUs: ", "platform: ", "geomloss: "):
        assert f"- {name}" in printed


@pytest.mark.slow
def test_train_and_sample(tmp_path):
    """Run the program itself; also with a stderr that is not a terminal."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "pisces_rl"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*program, "train", "--method", "grpo", *TINY, "--output_dir", str(run)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1 of 1: reward" in done.stderr
    for noise in ("it/s", "step/s", "pin_memory", "accelerator"):
        assert noise not in done.stderr + done.stdout
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    command.main(
        [
            "sample",
            "--model",
            "tiny-wan",
            "--adapter",
            str(run),
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--output",
            str(tmp_path / "out"),
            "--num_frames",
            "5",
            "--num_inference_steps",
            "2",
        ]
    )
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names == {"before_after.png", *(f"{part}/00{i}.mp4" for part in ("before", "after") for i in (0, 1))}


def test_train_and_sample_in_this_process(tmp_path, capsys):
    command.main(["train", "--method", "grpo", *TINY, "--output_dir", str(tmp_path / "run")])
    assert "step 1 of 1: reward" in capsys.readouterr().err
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    command.main(
        [
            "sample",
            "--model",
            "tiny-wan",
            "--prompt",
            "a red circle",
            "--output",
            str(tmp_path / "out"),
            "--num_frames",
            "5",
            "--num_inference_steps",
            "1",
        ]
    )
    assert capsys.readouterr().out.endswith(f"1 prompts: {tmp_path / 'out'}; {tmp_path / 'out' / 'before.png'}\n")
    assert (tmp_path / "out" / "before" / "000.mp4").is_file() and not (tmp_path / "out" / "after").exists()


def test_options_are_split_between_accelerates_launcher_and_the_command(monkeypatch):
    given = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", given.append)
    command.main(["train", "--method", "nft", "--accelerate_config", "ddp", "--num_processes=2", "--seed", "1"])
    command.main(["fit-map", "--num_processes", "4"])
    args, fit = given
    assert (args.config_file, args.num_processes) == (str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), 2)
    assert args.module and args.training_script == "pisces_rl"
    assert args.training_script_args == ["train", "--method", "nft", "--seed", "1"]
    assert (fit.config_file, fit.num_processes, fit.training_script_args) == (None, 4, ["fit-map"])


@pytest.mark.slow
def test_two_processes_train(tmp_path):
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pisces_rl",
            "train",
            "--method",
            "grpo",
            "--accelerate_config",
            str(config),
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            *TINY,
            "--output_dir",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "example, own",
    [
        ("train_t2v", "--num_generations"),
        ("estimate_memory", "--gpu_gib"),
        ("evaluate_rewards", "--ot_map"),
        ("fit_ot_map", "--bank_size"),
        ("export_adapter", "--format"),
    ],
)
@pytest.mark.slow
def test_the_examples_are_thin_callers(example, own):
    path = ROOT / "examples" / f"{example}.py"
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {path.name} ") and own in done.stdout
    assert len(path.read_text().split('"""')[2].splitlines()) < 25


# --- completion ---


def test_completion_reads_options_and_choices_from_the_help():
    assert words_of_help(command.main, ["export"])["--dtype"] == {"bf16", "fp16", "fp32"}
    assert words_of_help(command.main, ["completion"])["completion"] == {"bash", "zsh"}
    train = words_of_help(command.main, ["train"])
    assert {"grpo", "nft"} < train["--method"] and train["--ot_solver"] == {"native", "geomloss"}
    assert "--learning_rate" in train and "--learning-rate" not in train and not train["--config"]


@pytest.mark.parametrize(
    "line, offered",
    [
        ("se", ["serve"]),
        ("train --m", ["--method"]),
        ("train --method g", ["grpo"]),
        ("train --method = g", ["grpo"]),  # as bash splits --method=g
        ("train --method =", ["grpo", "nft"]),
        ("train --method=g", ["--method=grpo"]),  # as zsh passes it
        ("train --config recipe.yaml --rewards cosine ot_", ["ot_quality"]),
        ("train --config ''", []),  # bash then offers files
        ("completion z", ["zsh"]),
    ],
)
def test_completion_offers_subcommands_options_and_values(tmp_path, line, offered):
    rewards = {"cosine", "ot_quality"}
    train = {"--method": {"grpo", "nft"}, "--rewards": rewards, "--config": set()}
    (tmp_path / "c.sh").write_text(
        script({"serve": {"--port": set()}, "train": train, "completion": {"completion": {"zsh"}}})
    )
    code = (
        f"source {tmp_path / 'c.sh'}; COMP_WORDS=(pisces-rl {line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_pisces_rl; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered
