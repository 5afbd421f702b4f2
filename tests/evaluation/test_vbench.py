"""VBench: the files that its runner looks for, and its results before and after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import BUILD, quiet

from pisces_rl import command
from pisces_rl.evaluation.vbench import (
    VBENCH,
    VBENCH2,
    compare_results,
    export,
    read_results,
    read_suite,
    write_comparison,
)
from pisces_rl.evaluation.vbench.vbench_export import is_whole_mp4
from pisces_rl.media import load_video
from pisces_rl.policy import save_lora
from pisces_rl.run_files import CARD_MARK, RunFiles, described

STRANGE = 'a "red" apple & 100% of é, half-7'
SUITE = [
    {"prompt_en": STRANGE, "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
    {"prompt_en": "A dog runs", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
]
CALL = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 16}


def suite_file(folder: Path, entries=SUITE) -> Path:
    path = folder / "suite.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


# --- the suite ---


def test_names_and_samples_are_those_of_the_runner(tmp_path):
    """Its loop: f'{prompt}-{i}.mp4' in os.listdir(videos_path)."""
    benchmark, videos = read_suite(suite_file(tmp_path))
    assert benchmark is VBENCH and len(videos) == 5 + 25 + 5
    files = [path for video in videos for path in video.paths]
    assert files == [f"videos/{entry['prompt_en']}-{i}.mp4" for entry, n in zip(SUITE, (5, 25, 5)) for i in range(n)]


def test_flickering_gets_more_samples_only_on_request(tmp_path):
    both = [{"prompt_en": "a still lake", "dimension": ["temporal_flickering", "scene"]}]
    assert len(read_suite(suite_file(tmp_path, both))[1]) == 25
    assert len(read_suite(suite_file(tmp_path, both), ["scene"])[1]) == 5


def test_a_seed_depends_only_on_prompt_and_index(tmp_path):
    _, videos = read_suite(suite_file(tmp_path))
    _, fewer = read_suite(suite_file(tmp_path, SUITE[::-1][:2]), ["subject_consistency"])
    seeds = {video.paths: video.seed for video in videos}
    assert len(set(seeds.values())) == len(videos) and all(0 <= seed < 2**63 for seed in seeds.values())
    assert fewer and all(seeds[video.paths] == video.seed for video in fewer)
    assert {v.seed for v in read_suite(suite_file(tmp_path), seed=1)[1]}.isdisjoint(seeds.values())


def test_vbench2_has_folders_and_short_names(tmp_path):
    story = "x" * 179 + "yz"
    suite = [
        {"prompt_en": story, "dimension": ["Complex_Plot"]},
        {"prompt_en": "a cat", "dimension": ["Diversity"]},
        {"prompt_en": "a man", "dimension": ["Human_Anatomy", "Human_Identity"]},
    ]
    benchmark, videos = read_suite(suite_file(tmp_path, suite))
    assert benchmark is VBENCH2 and len(videos) == 3 + 20 + 3
    assert videos[0].prompt == story and videos[0].paths == (f"videos/Complex_Plot/{'x' * 179}y-0.mp4",)
    assert videos[-1].paths == ("videos/Human_Anatomy/a man-2.mp4", "videos/Human_Identity/a man-2.mp4")
    clash = [suite[0], {"prompt_en": story + "!", "dimension": ["Complex_Plot"]}]
    with pytest.raises(ValueError, match="share the file name"):
        read_suite(suite_file(tmp_path, clash))


@pytest.mark.parametrize(
    "entries, message",
    [
        ([{"prompt_en": "a/b", "dimension": ["color"]}], "no file system can hold"),
        ([{"prompt_en": "é" * 130, "dimension": ["color"]}], "no file system can hold"),
        ([{"prompt_en": "a", "dimension": ["colour"]}], r"VBench has no dimensions \['colour'\]"),
        ([{"prompt_en": "a", "dimension": ["color", "Diversity"]}], "not of both"),
        ([{"prompt_en": " ", "dimension": ["color"]}], "entry 0 must be an object"),
        ([{"prompt": "a"}], "entry 0 must be an object"),
        (["a"], "entry 0"),
        ({}, "must hold a list"),
    ],
)
def test_suites_that_the_runner_could_not_read_are_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_suite(suite_file(tmp_path, entries))


def test_a_missing_file_or_dimension_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_suite(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"dimensions=\['scene'\] have no prompts"):
        read_suite(suite_file(tmp_path), ["scene"])


# --- the export ---


def pipeline():
    return quiet(BUILD["wan"](0))


def exported(folder: Path, suite: Path, **options) -> int:
    settings = {"dimensions": ["color"], "num_inference_steps": 2, "call": CALL, "bf16": False} | options
    return export(pipeline(), suite, folder, **settings)


def frames(folder: Path) -> torch.Tensor:
    return torch.stack([load_video(path) for path in sorted((folder / "videos").iterdir())])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    suite = suite_file(folder)
    assert exported(folder / "out", suite) == 5
    return folder / "out", suite


def test_only_videos_lie_among_the_videos(base):
    """The runner takes the suffix of the first entry of os.listdir for all."""
    folder, _ = base
    assert sorted(os.listdir(folder / "videos")) == [f"{STRANGE}-{i}.mp4" for i in range(5)]
    assert sorted(os.listdir(folder)) == ["export.json", "videos"]
    assert frames(folder).shape == (5, 5, 3, 16, 16)
    seeds = json.loads((folder / "export.json").read_text(encoding="utf-8"))["seeds"]
    assert seeds == {path: v.seed for v in read_suite(base[1], ["color"])[1] for path in v.paths}


def test_the_batch_does_not_change_a_video(base, tmp_path):
    folder, suite = base
    assert exported(tmp_path, suite, batch_size=3) == 5
    difference = (frames(tmp_path) - frames(folder)).abs().max()
    assert difference <= 3 / 255 and (frames(folder)[0] - frames(folder)[1]).abs().max() > 10 / 255


def test_an_interrupted_export_resumes(base, tmp_path):
    folder, suite = base
    assert exported(tmp_path, suite) == 5
    first, second, *others = sorted((tmp_path / "videos").iterdir())
    whole = {path: path.read_bytes() for path in (first, second)}
    first.unlink()
    second.write_bytes(whole[second][:-40])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "7.mp4").write_bytes(b"half")
    times = [path.stat().st_mtime_ns for path in others]
    assert exported(tmp_path, suite) == 2
    assert {path: path.read_bytes() for path in whole} == whole
    assert [path.stat().st_mtime_ns for path in others] == times
    assert exported(tmp_path, suite) == 0 and not (tmp_path / "unfinished").exists()


def test_only_complete_files_count(base, tmp_path):
    data = next((base[0] / "videos").iterdir()).read_bytes()
    path = tmp_path / "a.mp4"
    for length in (0, 4, 8, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert not is_whole_mp4(path), length
    path.write_bytes(data)
    assert is_whole_mp4(path) and not is_whole_mp4(tmp_path / "none.mp4")
    path.write_bytes(bytes(len(data)))
    assert not is_whole_mp4(path)


def test_videos_of_other_settings_are_not_mixed(base, tmp_path):
    folder, suite = base
    with pytest.raises(ValueError, match="seed=0, now 1"):
        exported(folder, suite, seed=1)
    with pytest.raises(ValueError, match="num_inference_steps=2, now 3"):
        exported(folder, suite, num_inference_steps=3)
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="no export.json"):
        exported(tmp_path, suite)
    assert exported(folder, suite, dimensions=["color"]) == 0


def saved_lora(folder: Path, zero: bool) -> Path:
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=zero))
    save_lora(pipe, folder)
    return folder


def test_base_and_trained_start_from_the_same_noise(base, tmp_path):
    """An adapter of zeros changes no pixel; another one changes the video of the same noise a little."""
    folder, suite = base
    assert exported(tmp_path / "zero", suite, adapter=saved_lora(tmp_path / "lora0", True)) == 5
    assert torch.equal(frames(tmp_path / "zero"), frames(folder))
    assert exported(tmp_path / "trained", suite, adapter=saved_lora(tmp_path / "lora1", False)) == 5
    assert not torch.equal(frames(tmp_path / "trained"), frames(folder))
    with pytest.raises(ValueError, match="holds videos with other settings: adapter="):
        exported(tmp_path / "trained", suite)
    with pytest.raises(ValueError, match=r"^adapter=.* holds no adapter"):
        exported(tmp_path / "none", suite, adapter=tmp_path)


def test_components_that_were_trained_whole_are_sampled(base, tmp_path):
    folder, suite = base
    pipe = pipeline()
    pipe.transformer.save_pretrained(tmp_path / "run" / "transformer")
    assert exported(tmp_path / "same", suite, adapter=tmp_path / "run") == 5
    assert torch.equal(frames(tmp_path / "same"), frames(folder))
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    pipe.transformer.save_pretrained(tmp_path / "run" / "transformer")
    assert exported(tmp_path / "other", suite, adapter=tmp_path / "run") == 5
    assert not torch.equal(frames(tmp_path / "other"), frames(folder))


def test_a_pipeline_with_an_adapter_is_not_accepted_as_base(tmp_path):
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapter"):
        export(pipe, suite_file(tmp_path), tmp_path / "out", dimensions=["color"], num_inference_steps=2, call=CALL)


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    suite = suite_file(tmp_path)
    arguments = [
        "vbench",
        "export",
        "--model",
        "tiny-wan",
        "--suite",
        str(suite),
        "--dimensions",
        "color",
        "--num_frames",
        "5",
    ]
    config = str(Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp.yaml")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "pisces_rl.command",
    ]
    done = subprocess.run([*launch, *arguments, "--output_dir", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sampled 3 videos" in done.stdout and "sampled 2 videos" in done.stdout
    command.main([*arguments, "--output_dir", str(tmp_path / "one")])
    assert torch.equal(frames(tmp_path / "two"), frames(tmp_path / "one"))


# --- the results ---

#: VideoCrafter-2.0 on VBench's leaderboard, in percent, and its three totals.
ROW = {
    "subject_consistency": 96.85,
    "background_consistency": 98.22,
    "temporal_flickering": 98.41,
    "motion_smoothness": 97.73,
    "dynamic_degree": 42.50,
    "aesthetic_quality": 63.13,
    "imaging_quality": 67.22,
    "object_class": 92.55,
    "multiple_objects": 40.66,
    "human_action": 95.00,
    "color": 92.92,
    "spatial_relationship": 35.86,
    "scene": 55.29,
    "appearance_style": 25.13,
    "temporal_style": 25.84,
    "overall_consistency": 28.23,
}
TOTALS = {"Quality": 82.20, "Semantic": 73.42, "Total": 80.44}


def videos_of(results: dict[str, list], folder: str = "out/videos") -> list[dict]:
    return [
        {"video_path": f"{folder}/{prompt}-{i}.mp4", "video_results": value}
        for prompt, values in results.items()
        for i, value in enumerate(values)
    ]


def result_files(folder: Path, scores: dict, results: dict | None = None) -> Path:
    """Write one file per dimension, in folders, as `vbench evaluate` does, with the suite next to it."""
    for dimension, score in scores.items():
        place = folder / dimension
        place.mkdir(parents=True)
        content = [score, videos_of((results or {}).get(dimension, {"a": [score], "b": [score]}))]
        (place / f"results_{dimension}_eval_results.json").write_text(json.dumps({dimension: content}))
        (place / f"results_{dimension}_full_info.json").write_text(json.dumps(SUITE))
    return folder


def test_totals_are_those_of_the_leaderboard(tmp_path):
    before = result_files(tmp_path / "before", {d: value / 100 for d, value in ROW.items()})
    comparison = compare_results(before, before)
    for name, percent in TOTALS.items():
        assert round(100 * comparison["totals"][name]["before"], 2) == percent
        assert comparison["totals"][name]["difference"] == 0
    assert comparison["left_out"] == {} and list(comparison["dimensions"]) == VBENCH.dimensions


def test_results_are_paired_by_prompt(tmp_path):
    """More videos on one side, in another order, of another folder; a prompt of one side is in no pair."""
    before = {"color": {"x-1": [0.0, 1.0], "y": [1.0, 1.0], "only": [1.0]}}
    after = {"color": {"y": [1.0], "x-1": [1.0, 1.0, 0.25]}}
    row = compare_results(
        result_files(tmp_path / "b", {"color": 0.8}, before), result_files(tmp_path / "a", {"color": 0.8125}, after)
    )["dimensions"]["color"]
    assert (row["before"], row["after"], row["n"]) == (0.8, 0.8125, 2)
    assert row["difference"] == pytest.approx(0.125) and (row["low"], row["high"]) == (0.0, 0.25)


def test_imaging_quality_is_on_one_scale(tmp_path):
    """The runner divides its mean by 100, not the videos' results; version 0.1.0 divided neither."""
    videos = {"imaging_quality": {"a": [60.0, 70.0], "b": [50.0]}}
    for score in (0.6, 60.0):
        _, results = read_results(result_files(tmp_path / str(score), {"imaging_quality": score}, videos))
        assert results["imaging_quality"].score == pytest.approx(0.6)
        assert results["imaging_quality"].prompts == pytest.approx({"a": 0.65, "b": 0.5})


def test_true_and_false_are_numbers(tmp_path):
    videos = {"dynamic_degree": {"a": [True, False], "b": [True]}}
    _, results = read_results(result_files(tmp_path, {"dynamic_degree": 2 / 3}, videos))
    assert results["dynamic_degree"].prompts == {"a": 0.5, "b": 1.0}


def test_an_interval_of_a_total_counts_a_prompt_once(tmp_path):
    """Opposite changes of the same prompts in two dimensions cancel in each resample; independent ones would not."""
    values = np.linspace(-0.1, 0.1, 8)
    before = {d: {f"p{i}": [0.5] for i in range(8)} for d in VBENCH2.dimensions}
    after = {d: {f"p{i}": [0.5] for i in range(8)} for d in VBENCH2.dimensions}
    after["Composition"] = {f"p{i}": [0.5 + v] for i, v in enumerate(values)}
    after["Diversity"] = {f"p{i}": [0.5 - v] for i, v in enumerate(values)}
    scores = dict.fromkeys(VBENCH2.dimensions, 0.5)
    comparison = compare_results(
        result_files(tmp_path / "b", scores, before), result_files(tmp_path / "a", scores, after)
    )
    row, dimension = comparison["totals"]["Creativity"], comparison["dimensions"]["Composition"]
    assert dimension["low"] < -0.02 and dimension["high"] > 0.02
    assert row["n"] == 8 and abs(row["low"]) < 1e-12 and abs(row["high"]) < 1e-12
    after["Diversity"] = after["Composition"]
    comparison = compare_results(tmp_path / "b", result_files(tmp_path / "c", scores, after))
    row = comparison["totals"]["Creativity"]  # the mean of two equal dimensions
    assert (row["low"], row["high"]) == pytest.approx((dimension["low"], dimension["high"]), abs=0.01)
    assert comparison["totals"]["Total"]["high"] == pytest.approx(row["high"] / 5)


def test_vbench2_leaves_invalid_videos_out(tmp_path):
    scores = dict.fromkeys(VBENCH2.dimensions, 0.5) | {"Mechanics": 1.0}
    videos = {"Mechanics": {"a": [1, -1], "b": [-1, -1]}}
    folder = result_files(tmp_path, scores, videos)
    benchmark, results = read_results(folder)
    assert benchmark is VBENCH2 and results["Mechanics"].prompts == {"a": 1.0}
    totals = compare_results(folder, folder)["totals"]
    assert totals["Physics"]["before"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert totals["Total"]["before"] == pytest.approx((4 * 0.5 + 0.625) / 5)


def test_a_total_without_a_dimension_is_left_out(tmp_path):
    folder = result_files(tmp_path, {d: ROW[d] / 100 for d in ROW if d != "scene"}, {"color": {}})
    comparison = compare_results(folder, folder)
    assert list(comparison["totals"]) == ["Quality"] and comparison["left_out"] == {
        "Semantic": ["scene"],
        "Total": ["scene"],
    }
    color = comparison["dimensions"]["color"]
    assert color["n"] == 0 and color["difference"] is None and color["before"] == 0.9292


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a VBench result file"),
        ('{"color": 1}', "must be"),
        ('{"color": [NaN, []]}', "the mean of 'color' is nan"),
        ('{"colour": [1, []]}', "VBench has no dimensions"),
        ('{"color": [1, [{"video_path": "a-0.mp4", "video_results": [1, 2]}]]}', "must be"),
    ],
)
def test_broken_result_files_are_refused(tmp_path, content, message):
    (tmp_path / "x_eval_results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_ambiguous_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*_eval_results.json"):
        read_results(tmp_path)
    color = result_files(tmp_path / "a", {"color": 0.5})
    (color / "older_eval_results.json").write_text(json.dumps({"color": [0.4, []]}))
    with pytest.raises(ValueError, match="remove the older one"):
        read_results(color)
    scene, other = (result_files(tmp_path / d, {d: 0.5}) for d in ("scene", "Diversity"))
    with pytest.raises(ValueError, match="no dimension is in both"):
        compare_results(scene, result_files(tmp_path / "d", {"color": 0.5}))
    with pytest.raises(ValueError, match="of VBench, after=.* of VBench-2.0"):
        compare_results(scene, other)


# --- the report ---


def run_folder(folder: Path) -> Path:
    files = RunFiles(folder)
    folder.mkdir()
    files.begin()
    files.claim("report.md", "README.md")
    (folder / "report.md").write_text("| dataset | score |\n", encoding="utf-8")
    card = f"# A LoRA\n\ntrained {CARD_MARK}.\n\n## Training\n\n| setting | value |\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def test_a_run_shows_the_comparison_once(tmp_path):
    run = run_folder(tmp_path / "run")
    report, card = ((run / name).read_text(encoding="utf-8") for name in ("report.md", "README.md"))
    before = result_files(tmp_path / "before", {"color": 0.5})
    write_comparison(compare_results(before, before), run)
    after = result_files(tmp_path / "after", {"color": 0.75})
    write_comparison(compare_results(before, after), run)
    section = "| color | 0.5000 | 0.7500 | 2 | +0.2500 [+0.2500, +0.2500] |"
    for name, old in (("report.md", report), ("README.md", card)):
        text = (run / name).read_text(encoding="utf-8")
        assert text.count("## VBench\n") == 1 and text.count("| color |") == 1 and section in text
        begin, end = text.index("<!-- VBench -->"), text.index("<!-- end of VBench -->\n")
        assert "".join((text[:begin] + text[end + len("<!-- end of VBench -->\n") :]).split()) == "".join(old.split())
    assert (run / "README.md").read_text(encoding="utf-8").index("## VBench") < card.index("## Training") + 60
    assert {"vbench/report.json", "vbench/report.md"} <= set(described(run))
    assert json.loads((run / "vbench" / "report.json").read_text())["dimensions"]["color"]["after"] == 0.75
    assert sorted(os.listdir(run)) == ["README.md", "report.md", "run_files.json", "vbench"]


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    """A README that no run has listed is the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text(f"mine, {CARD_MARK}")
    before = result_files(tmp_path / "before", {"color": 0.5})
    write_comparison(compare_results(before, before), tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == f"mine, {CARD_MARK}"
    assert sorted(os.listdir(tmp_path / "mine")) == ["README.md", "vbench"]


# --- the command ---


def test_the_command_reads(tmp_path, capsys):
    before, after = (result_files(tmp_path / n, {"color": v}) for n, v in (("before", 0.5), ("after", 0.75)))
    command.main(["vbench", "read", "--before", str(before), "--after", str(after), "--output_dir", str(tmp_path)])
    assert "| color | 0.5000 | 0.7500 | 2 | +0.2500" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pisces-rl vbench: results="):
        command.main(
            [
                "vbench",
                "read",
                "--before",
                str(tmp_path / "vbench"),
                "--after",
                str(after),
                "--output_dir",
                str(tmp_path),
            ]
        )


def test_the_command_exports(tmp_path, capsys):
    arguments = [
        "vbench",
        "export",
        "--model",
        "tiny-wan",
        "--suite",
        str(suite_file(tmp_path)),
        "--dimensions",
        "color",
        "--num_frames",
        "5",
        "--num_inference_steps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command.main(arguments)
    assert "sampled 5 videos" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "export.json").read_text())
    assert settings["call"]["num_frames"] == 5 and settings["call"]["height"] == 64  # its own default
    with pytest.raises(SystemExit, match="pisces-rl vbench: dimensions="):
        command.main([*arguments, "--dimensions", "scene"])


def test_the_script_runs_every_dimension_once_and_the_comparison_reads_what_it_leaves(tmp_path):
    """In place of VBench's own commands stand two of the same arguments, which write a file of its name and form."""
    environment, clone, base = tmp_path / "env", tmp_path / "VBench", tmp_path / "base"
    for folder in (environment / "bin", clone / "vbench", base / "videos"):
        folder.mkdir(parents=True)
    (clone / "vbench" / "VBench_full_info.json").write_text("[]")
    runner = environment / "bin" / "vbench"
    result = {"DIMENSION": [0.5, [{"video_path": "a cat-0.mp4", "video_results": 0.5}]]}
    runner.write_text(f"""#!/usr/bin/env bash
while [ $# -gt 0 ]; do
  case $1 in --output_path) out=$2;; --dimension) dimension=$2;; --videos_path) videos=$2;; esac
  shift
done
echo "$dimension $videos" >> {tmp_path}/log
mkdir -p "$out"
echo '{json.dumps(result)}' | sed "s/DIMENSION/$dimension/" > "$out/x_eval_results.json"
""")
    python = environment / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nmkdir -p "${@: -1}/filtered_videos"\n')
    for file in (runner, python):
        file.chmod(0o755)
    script = [str(Path(__file__).parents[2] / "examples" / "run_vbench.sh"), str(environment), str(clone), str(base)]
    only = os.environ | {"DIMENSIONS": "color temporal_flickering"}
    for _ in range(2):
        subprocess.run(script, env=only, check=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"color {base}/videos",
        f"temporal_flickering {base}/static/filtered_videos",
    ]
    assert set(read_results(base / "results")[1]) == {"color", "temporal_flickering"}
    wrong = subprocess.run([*script[:3], str(tmp_path)], capture_output=True, text=True)
    assert wrong.returncode == 2 and "vbench export" in wrong.stderr
