"""Arguments from YAML and the command line, prompts and rewards by name."""

import importlib
import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from pisces_rl import METHODS, FlowDPOConfig, RewardBackpropConfig, VideoGRPOConfig
from pisces_rl.cli import evaluate_command, load_prompt_dataset, load_reward_function, parse_arguments, train_command
from pisces_rl.cli.arguments import method_of, transport_options
from pisces_rl.cli.evaluate_command import EvaluationArguments
from pisces_rl.cli.train_command import TRAINERS, MethodArguments, with_recipe
from pisces_rl.cli.training_inputs import ScriptArguments, load_rewards
from pisces_rl.rewards import OTAttention, exposure, load_reward
from pisces_rl.shapemotion import shapemotion_reward

ROOT = Path(__file__).parents[1]


@dataclass
class Settings:
    model: str = field(default="tiny-wan", metadata={"help": "Model."})
    rewards: list[str] = field(default_factory=lambda: ["score"], metadata={"help": "Rewards."})
    rank: int | None = field(default=None, metadata={"help": "Rank."})
    scale: float = field(default=1.0, metadata={"help": "Scale."})
    shuffle: bool = field(default=True, metadata={"help": "Shuffle."})
    quiet: bool = field(default=False, metadata={"help": "Quiet."})
    label: str | None = field(default=None, metadata={"help": "Label."})


@dataclass
class Needed:
    folder: str = field(metadata={"help": "Required."})


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def parsed(arguments, *types):
    return parse_arguments(*(types or (Settings,)), arguments=arguments)


def refused(capsys, arguments, *types) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(arguments, *types)
    assert stopped.value.code == 2
    return capsys.readouterr().err.partition("error:")[2]


# --- arguments ---


def test_defaults_and_command_line():
    assert parsed([]) == (Settings(),)
    (settings,) = parsed(["--rewards", "a", "b", "--rank", "8", "--scale=1e-3", "--shuffle", "false", "--quiet"])
    assert settings == Settings(rewards=["a", "b"], rank=8, scale=1e-3, shuffle=False, quiet=True)


def test_yaml(recipe):
    path = recipe("rewards: [a, b]\nrank: 4\nscale: 1e-3\nshuffle: false\nquiet: true\nlabel: null\n")
    (settings,) = parsed(["--config", path])
    assert settings == Settings(rewards=["a", "b"], rank=4, scale=1e-3, shuffle=False, quiet=True)
    assert parsed([f"--config={path}"]) == (settings,)


def test_the_command_line_overrides_the_file(recipe):
    path = recipe("rewards: [a, b]\nrank: 4\nscale: 2\nshuffle: false\n")
    for order in (["--config", path, "--rank", "9"], ["--rank", "9", "--config", path]):
        (settings,) = parsed([*order, "--rewards", "c", "--shuffle", "true"])
        assert settings == Settings(rewards=["c"], rank=9, scale=2.0, shuffle=True)


def test_several_dataclasses_and_required_fields(recipe, capsys):
    path = recipe("folder: here\nrank: 3\n")
    assert parsed(["--config", path], Settings, Needed) == (Settings(rank=3), Needed("here"))
    assert parsed(["--config", path, "--folder", "there"], Settings, Needed)[1] == Needed("there")
    assert "--folder" in refused(capsys, [], Settings, Needed)


@pytest.mark.parametrize(
    "text, types",
    [("1e-3", float), ("5E-4", float), ("1.5e-5", float), ("2e3", float), ("0.001", float), ("7", float)],
)
def test_floats_of_yaml(recipe, text, types):
    """YAML 1.1 reads 1e-3 as a string."""
    (settings,) = parsed(["--config", recipe(f"scale: {text}\n")])
    assert isinstance(settings.scale, (types, int)) and settings.scale == float(text)


def test_text_that_looks_like_a_number_stays_text(recipe):
    (settings,) = parsed(["--config", recipe("label: 1e-3\nmodel: some-e-name\n")])
    assert settings.label == "1e-3" and settings.model == "some-e-name"


@pytest.mark.parametrize(
    "line, name",
    [
        ("rank: eight", "rank"),
        ("rank: 2.5", "rank"),
        ("shuffle: perhaps", "shuffle"),
        ("scale: [1, 2]", "scale"),
        ("rank: true", "rank"),
    ],
)
def test_values_of_the_wrong_type_in_yaml(recipe, capsys, line, name):
    assert name in refused(capsys, ["--config", recipe(line + "\n")])


def test_empty_lists_and_a_bare_no(recipe, tmp_path):
    """YAML 1.1 reads a bare no as false."""
    path = recipe(f"rewards: []\noutput_dir: {tmp_path}\nsave_strategy: no\neval_strategy: no\nuse_cpu: yes\n")
    settings, config = parsed(["--config", path], Settings, VideoGRPOConfig)
    assert settings.rewards == [] and config.save_strategy == "no" and config.eval_strategy == "no" and config.use_cpu


def test_help_lists_each_option_once(capsys):
    """HfArgumentParser also accepts every name with hyphens."""
    with pytest.raises(SystemExit):
        parse_arguments(VideoGRPOConfig, arguments=["--help"])
    printed = capsys.readouterr().out
    assert "  --num_generations NUM_GENERATIONS" in printed and "--num-generations" not in printed
    (config,) = parse_arguments(VideoGRPOConfig, arguments=["--num-generations", "4", "--use_cpu"])
    assert config.num_generations == 4


@pytest.mark.parametrize(
    "arguments, wrong, near",
    [
        (["--rewrds", "a"], "--rewrds", "--rewards"),
        (["--rank=3", "--scal=2"], "--scal=2", "--scale"),
        (["--qiet"], "--qiet", "--quiet"),
        (["--no-such-thing", "1"], "--no-such-thing", None),
    ],
)
def test_an_unknown_argument_names_the_nearest(capsys, arguments, wrong, near):
    message = refused(capsys, arguments)
    assert f"unknown argument {wrong!r}" in message and "did you mean" in message
    assert near is None or f"did you mean {near!r}" in message


def test_an_abbreviation_of_config_is_not_silently_dropped(recipe, capsys):
    assert "unknown argument" in refused(capsys, ["--conf", recipe("rank: 4\n")])


def test_an_unknown_key_names_the_nearest(recipe, capsys):
    message = refused(capsys, ["--config", recipe("num_generatons: 8\n")], VideoGRPOConfig)
    assert "unknown key 'num_generatons'" in message and "did you mean 'num_generations'" in message


def test_bad_files(recipe, tmp_path, capsys):
    assert "no such file" in refused(capsys, ["--config", str(tmp_path / "none.yaml")])
    assert "is not YAML" in refused(capsys, ["--config", recipe("a: [1\nb: }")])
    assert "must hold `name: value` lines" in refused(capsys, ["--config", recipe("- a\n- b\n")])
    assert "expected one argument" in refused(capsys, ["--config"])
    assert parsed(["--config", recipe("")]) == (Settings(),)
    assert parsed(["--config", recipe("# a comment only\n")]) == (Settings(),)


def test_the_trainers_config(recipe, tmp_path):
    path = recipe(
        f"output_dir: {tmp_path}\nsde_window_range: [0, 5]\nsde_window_size: 2\nlearning_rate: 1e-3\n"
        "reward_weights: [1, 0.5]\npipeline_kwargs: {max_sequence_length: 24}\nuse_cpu: true\nshuffle_dataset: false\n"
        "scale_rewards: batch\nreport_to: none\nguidance_scale: 1\n"
    )
    settings, config = parsed(
        ["--config", path, "--learning_rate", "2e-3", "--num_inference_steps", "8"], Settings, VideoGRPOConfig
    )
    assert config.learning_rate == 2e-3 and config.num_inference_steps == 8 and config.sde_window_range == [0, 5]
    assert config.pipeline_kwargs == {"max_sequence_length": 24} and config.reward_weights == [1, 0.5]
    assert config.shuffle_dataset is False and config.scale_rewards == "batch"
    config = parsed(
        [
            "--output_dir",
            str(tmp_path),
            "--pipeline_kwargs",
            '{"max_sequence_length": 3}',
            "--use_cpu",
            "--sde_window_range",
            "1",
            "4",
        ],
        VideoGRPOConfig,
    )[0]
    assert config.pipeline_kwargs == {"max_sequence_length": 3} and config.sde_window_range == [1, 4]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_the_recipes_parse(path):
    method = method_of(["--config", str(path)], TRAINERS) if "method:" in path.read_text() else None
    kind = RewardBackpropConfig if "examples/backprop_t2v.py" in path.read_text() else VideoGRPOConfig
    kinds = (MethodArguments, METHODS[method][1]) if method else (ScriptArguments, kind)
    script, config = parsed(["--config", str(path), "--use_cpu"], *kinds)
    assert config.num_inference_steps >= 2 and script.model


@pytest.mark.parametrize("cell", sorted(p.stem for p in (ROOT / "recipes" / "study").glob("*.yaml")))
def test_the_recipes_of_the_study_parse(cell, monkeypatch, recipe):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    run = importlib.import_module("run")
    if cell == "shared":
        assert set(run.cells()) == {cell for stage in run.STAGES for cell in run.cells(stage)}
        assert len(run.cells("A")) == 8
        return
    settings = run.settings_of(cell)
    _, config = run.TRAINERS[settings.pop("trainer")]
    script, config = parsed(["--config", recipe(yaml.safe_dump(settings)), "--use_cpu"], run.ScriptArguments, config)
    assert (script.rewards or script.consistency_weight) and config.max_steps >= 1 and config.eval_steps
    assert not script.ot_attention or OTAttention(**json.loads(script.ot_attention))


def test_the_study_separates_its_arguments_from_the_trainers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    run = importlib.import_module("run")
    args, extra = run.parse(["--stage", "A", "--jobs", "3", "--max_steps", "2"])
    assert len(args.cells) == 8 and extra == ["--max_steps", "2"]
    args, extra = run.parse(["--cells", "base", "--num_sample_videos", "0", "--seeds", "1"])
    assert (args.cells, args.seeds, extra) == (["base"], [1], ["--num_sample_videos", "0"])
    with pytest.raises(SystemExit):
        run.parse(["--cells", "grpo_bth"])


@pytest.mark.parametrize("example", ["grpo_t2v", "backprop_t2v"])
def test_the_examples_have_a_default_recipe(monkeypatch, example):
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module(example)

    def arguments(*given):
        return with_recipe(given, script.RECIPE)

    assert arguments("--seed", "1") == ["--config", str(script.RECIPE), "--seed", "1"]
    assert script.RECIPE.is_file()
    for given in (["--model=a"], ["--model", "a"], ["--config", "b.yaml"], ["--help"]):
        assert arguments(*given) == given


@pytest.mark.parametrize(
    "method, rewards, message",
    [
        ("nft", True, "no-such-folder"),
        ("grpo", True, "no-such-folder"),
        ("flow_dpo", False, "no-such-folder"),
        ("flow_dpo", True, "reward_funcs is given, but train_dataset holds pairs"),
    ],
)
def test_only_flow_dpo_takes_pairs_for_rewards(tmp_path, method, rewards, message):
    """What the trainer says last before it would load a model; without rewards it would have said so before."""
    for name in ("good.mp4", "bad.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a circle", "chosen": "good.mp4", "rejected": "bad.mp4"}\n' * 8)
    (tmp_path / "my.py").write_text("def score(prompts, videos, **columns):\n    return [0.0] * len(prompts)\n")
    arguments = [
        "--method",
        method,
        "--model",
        str(tmp_path / "no-such-folder"),
        "--use_cpu",
        "--dataset",
        str(tmp_path / "pairs.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--num_generations",
        "2",
        *(["--rewards", f"{tmp_path}/my.py:score"] if rewards else []),
    ]
    with pytest.raises(ValueError, match=message):
        train_command.main(arguments)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "no-such-folder"),
        (["--rollout_batch_size", "2"], "rollout_batch_size=2, but train_dataset holds pairs"),
        (
            ["--multi_objective_aggregation=normalize_then_sum"],
            "multi_objective_aggregation='normalize_then_sum', but",
        ),
    ],
)
def test_rollout_settings_of_a_recipe_are_ignored_with_pairs(tmp_path, given, message):
    for name in ("good.mp4", "bad.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a circle", "chosen": "good.mp4", "rejected": "bad.mp4"}\n' * 8)
    arguments = [
        "--config",
        str(ROOT / "recipes" / "wan21_1.3b_flow_dpo.yaml"),
        "--use_cpu",
        "--model",
        str(tmp_path / "no-such-folder"),
        "--dataset",
        str(tmp_path / "pairs.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--num_generations",
        "2",
        *given,
    ]
    with pytest.raises(ValueError, match=message):
        train_command.main(arguments)


def test_the_settings_of_rewards_reach_them():
    script = ScriptArguments(divergence_weight=0.5, ot_attention='{"plan": "balanced"}', ot_solver="geomloss")
    quality, semantic, plain = load_rewards(script, ["ot_quality", "ot_semantic", "cosine"])
    assert quality.divergence_weight == 0.5 and plain.divergence_weight == 0
    assert semantic.attention == OTAttention(plan="balanced", solver="geomloss")
    assert quality.bank.settings["solver"] == "geomloss"
    (quality,) = load_rewards(ScriptArguments(ot_solver="geomloss"), ["ot_quality?divergence_weight=0.5"])
    assert quality.bank.settings["solver"] == "geomloss"
    with pytest.raises(ValueError, match="solver='sinkhorn': expected one of native, geomloss"):
        load_rewards(ScriptArguments(ot_solver="sinkhorn"), ["cosine"])


@pytest.mark.parametrize(
    ("settings", "names", "refused"),
    [
        ({"ot_attention": '{"plan": "partial"}'}, ["ot_quality", "matching"], "--ot_attention:"),
        ({"ot_map": "outputs/map"}, ["cosine", "ot_semantic"], "--ot_map:"),
        ({"ot_map": "outputs/map"}, ["ot_quality?ot_map=outputs/other"], "--ot_map:"),
        ({"ot_map": ""}, ["cosine"], "--ot_map:"),
        ({"divergence_weight": 0.5, "ot_map": "map"}, ["cosine"], "--ot_map, --divergence_weight:"),
        ({"ot_solver": "geomloss"}, ["ot_quality", "matching"], "--ot_solver:"),
        ({"ot_solver": "geomloss"}, ["ot_quality?divergence_weight=0"], "--ot_solver:"),
        ({"ot_solver": "geomloss"}, ["ot_semantic?solver=native"], "--ot_solver:"),
    ],
)
def test_a_setting_that_no_reward_reads_is_rejected(settings, names, refused):
    with pytest.raises(ValueError, match=f"{refused} no reward or judge reads this"):
        load_rewards(ScriptArguments(rewards=names, **settings), names)
    judged = ScriptArguments(rewards=names, judges=["ot_quality", "ot_semantic"], **settings)
    assert set(transport_options(judged, names + judged.judges)[names[0]]) <= {"divergence_weight"}
    if "divergence_weight" not in settings:
        with pytest.raises(ValueError, match=f"{refused} no reward or judge reads this"):
            evaluate_command.load_rewards(EvaluationArguments(rewards=names, **settings))


@pytest.mark.parametrize("text", ["{bad", "[1]", "null", ""])
def test_attention_that_is_no_object_is_named(text):
    with pytest.raises(ValueError, match="--ot_attention: "):
        load_rewards(ScriptArguments(ot_attention=text), ["ot_semantic"])


def test_pairs_drop_what_only_a_recipes_rewards_read():
    script = ScriptArguments(rewards=["ot_semantic"], judges=["ot_quality"], ot_map="map", ot_attention="{}")
    pairs = Dataset.from_dict({"prompt": ["a circle"], "chosen": ["a.mp4"], "rejected": ["b.mp4"]})
    train_command.fit_pairs("flow_dpo", script, FlowDPOConfig(output_dir="unused", use_cpu=True), pairs, [])
    assert (script.rewards, script.ot_map, script.ot_attention) == ([], "map", None)


def test_rewards_by_name():
    reward = load_reward_function("ot_semantic", encoder="tiny-vtm")
    assert reward.__name__ == "ot_semantic"
    with pytest.raises(ValueError, match="reward 'ot_semantik' is unknown; did you mean 'ot_semantic'"):
        load_reward_function("ot_semantik")


@pytest.mark.parametrize(
    "example, own", [("grpo_t2v", ("--num_generations", "--sde_window_size")), ("backprop_t2v", ("--backprop_steps",))]
)
def test_help_of_the_examples(monkeypatch, capsys, example, own):
    path = str(ROOT / "examples" / f"{example}.py")
    monkeypatch.syspath_prepend(ROOT / "examples")  # where Python would look first
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert not ended.value.code
    printed = capsys.readouterr().out
    for name in ("--config", "--model", "--dataset", "--rewards", *own):
        assert name in printed


# --- prompts ---


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  zwei gr\u00fcne Quadrate  \n", encoding="utf-8")
    assert load_prompt_dataset(str(path))["prompt"][:] == ["a red circle", "zwei gr\u00fcne Quadrate"]


def test_csv_and_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,colour\n"a circle, red",red\na square,blue\n')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a circle", "n": 1}\n{"prompt": "a square", "n": 2}\n')
    (tmp_path / "a.json").write_text('[{"caption": "a circle"}]')
    data = load_prompt_dataset(str(tmp_path / "a.csv"))
    assert data["prompt"][:] == ["a circle, red", "a square"] and data["colour"][:] == ["red", "blue"]
    assert load_prompt_dataset(str(tmp_path / "a.jsonl"))["n"][:] == [1, 2]
    assert load_prompt_dataset(str(tmp_path / "a.json"), column="caption")["prompt"][:] == ["a circle"]


def test_image_paths_are_looked_up_next_to_the_file(tmp_path):
    (tmp_path / "fox.png").write_text("")
    rows = [{"prompt": "a fox", "image": "fox.png"}, {"prompt": "a far fox", "image": "far/fox.png"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a fox", "image": 3, "last_image": "fox.png"}))
    assert load_prompt_dataset(str(tmp_path / "a.jsonl"))["image"][:] == [str(tmp_path / "fox.png"), "far/fox.png"]
    data = load_prompt_dataset(str(tmp_path / "b.jsonl"), images=["image", "last_image"])
    assert data["image"][:] == [3] and data["last_image"][:] == [str(tmp_path / "fox.png")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "no such file"),
        ("none.csv", None, "no such file"),
        ("empty.txt", "", "holds no prompt"),
        ("blank.txt", "\n \n", "holds no prompt"),
        ("empty.csv", "", "holds no prompt"),
        ("empty.jsonl", "", "holds no prompt"),
        ("head.csv", "prompt\n", "holds no prompt"),
        ("other.csv", "text\na circle\n", "none named 'prompt'"),
        ("broken.jsonl", '{"prompt": "a"\n[oops', "could not be read"),
        ("folder", None, "a dataset that could be loaded"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompt_dataset(str(path))
    assert str(path) in str(caught.value)


# --- rewards by name ---


def test_known_files_and_modules(tmp_path):
    assert load_reward("exposure") is exposure and load_reward("shapemotion_reward") is shapemotion_reward
    (tmp_path / "mine.py").write_text("def f(prompts, **k):\n    return [7.0] * len(prompts)\n\nx = 3\n")
    assert load_reward(f"{tmp_path}/mine.py:f")(["a"]) == [7.0]
    assert load_reward("pisces_rl.rewards:exposure") is exposure


@pytest.mark.parametrize(
    "name, message",
    [
        ("exposur", "did you mean 'exposure'"),
        ("nowhere.py:f", "no file 'nowhere.py'"),
        ("pisces_rl.rewards:exposur", "has no function 'exposur'"),
        ("no_such_package:f", "no module 'no_such_package'"),
        ("pisces_rl.rewards:__name__", "has no function"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(name)
    assert repr(name) in str(caught.value)


def test_an_error_inside_the_users_file_shows_itself(tmp_path):
    (tmp_path / "mine.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_reward(f"{tmp_path}/mine.py:f")
