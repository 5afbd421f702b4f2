"""Evaluating rewards: one that is right, one that knows nothing, one that sees its batch; and the script."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rewards.tiny_encoders import build

from pisces_rl.cli import evaluate_command
from pisces_rl.evaluation import CleanClips, evaluate_reward, plan_inside_objects
from pisces_rl.media import load_video, save_video
from pisces_rl.rewards import RewardError, load_reward
from pisces_rl.rewards.encoders.encoder import grid
from pisces_rl.rewards.ot_attention import Drawing, OTAttention
from pisces_rl.shapemotion import SCENE_CORRUPTIONS, lay_out, parse, render_layout, shapemotion_alignment
from pisces_rl.shapemotion.specs import SceneSpecs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips():
    return CleanClips.shapemotion(n=20)


@pytest.mark.slow
def test_the_verifier_ranks_what_it_verifies(clips):
    report = evaluate_reward(lambda prompts, videos: shapemotion_alignment(prompts=prompts, videos=videos), clips)
    for name in SCENE_CORRUPTIONS:
        if name in report.accuracy:
            assert report.accuracy[name].value > 0.95, name
    assert report.alignment == {} and report.milliseconds > 0
    assert "| wrong_color | 1 [1, 1] |" in str(report)


def test_a_constant_knows_nothing_and_a_batch_mean_is_caught(clips):
    constant = evaluate_reward(lambda prompts, videos: torch.zeros(len(prompts)), clips)
    assert {value.value for value in constant.accuracy.values()} == {0.5}
    assert set(constant.falls.values()) == {(0, 0, 0)} and constant.invariance == {"batch-mates": 0, "padding": 0}
    shared = evaluate_reward(lambda prompts, videos: videos.mean().expand(len(prompts)), clips)
    assert shared.invariance["batch-mates"] > 1e-4


@pytest.mark.slow
def test_the_embedded_rewards():
    clips = CleanClips.shapemotion(n=40)
    report = evaluate_reward(load_reward("ot_quality"), clips)
    assert report.accuracy["wrong_color"].value > 0.9 and report.falls["uniform_noise"].value > 0.8
    assert max(report.invariance.values()) < 1e-5
    assert 0 < report.alignment["recall@10"].value <= 1 and "mutual-kNN (10)" in report.alignment
    shares = plan_inside_objects(load_reward("ot_semantic"), clips)
    assert list(shares) == ["one object", "its own of two", "the other of two"]
    for share in shares.values():
        assert list(share) == ["plan", "attention", "fused", "tokens"] and 0 < share["tokens"].value < 0.5
    own, other = (shares[where]["attention"].value for where in ("its own of two", "the other of two"))
    assert own > other and shares["one object"]["attention"].value > 0.5
    with pytest.raises(ValueError, match="reward with plans"):
        plan_inside_objects(load_reward("matching"), clips)


def test_the_words_of_each_object_are_looked_for_on_its_own_tokens():
    """Words that look at the pixels of a color: the other words of the prompt do not count."""
    scene = parse("two large red squares above a green circle on a gray background")
    layout = lay_out(SceneSpecs.from_scenes([scene]), torch.Generator().manual_seed(0))
    clips = CleanClips([scene.prompt()], render_layout(layout, size=64), [scene], layout)
    positions = torch.cat([torch.full((1, 3), torch.nan), grid(17, 64, 64)])
    r, g, _ = clips.videos[0].transpose(0, 1)
    pixels = {"red": r - g > 0.3, "green": g - r > 0.3, "all": torch.ones_like(r, dtype=torch.bool)}

    def draw(prompts, videos):
        pieces = ["[CLS]", *prompts[0].split()]
        seen = torch.stack([pixels[looks.get(piece, "all")].flatten() for piece in pieces])
        weights = torch.nn.functional.pad(seen.float(), (1, 0), value=1.0)[None, None]
        return [pieces], positions, [Drawing(0, weights, weights, weights)]

    whole = SimpleNamespace(sample=lambda x: x, padded=lambda x: x)
    reward = SimpleNamespace(attention=OTAttention(), draw=draw, encoder=whole)
    looks = {"red": "red", "squares": "red", "green": "green", "circle": "green"}
    shares = plan_inside_objects(reward, clips)
    assert list(shares) == ["its own of two", "the other of two"]
    assert shares["its own of two"]["plan"].value == 1 and shares["the other of two"]["plan"].value == 0
    looks = {"red": "green", "squares": "green", "green": "green", "circle": "green"}
    shares = plan_inside_objects(reward, clips)
    assert shares["its own of two"]["plan"].value == shares["the other of two"]["plan"].value == 0.5


def test_tokens_are_of_the_frames_that_the_encoder_cuts_them_from():
    """tiny-vtm's tubelets: the first frame four times, then four frames each."""
    scene = parse("a small red circle moving right quickly on a gray background")
    layout = lay_out(SceneSpecs.from_scenes([scene]), torch.Generator().manual_seed(0))
    clips = CleanClips([scene.prompt()], render_layout(layout, size=64), [scene], layout)
    r, g, _ = clips.videos[0].transpose(0, 1)
    frames = (r - g > 0.3)[[0, 0, 0, *range(17)]]
    tokens = frames.reshape(5, 4, 4, 16, 4, 16).any(5).any(3).any(1)
    found = plan_inside_objects(load_reward("ot_semantic"), clips)["one object"]["tokens"].value
    assert found == pytest.approx(float(tokens.float().mean()))


def test_rewards_that_take_little_are_async_or_abstain(clips):
    def brightness(videos):
        return videos.mean((1, 2, 3, 4))

    async def later(videos):
        return brightness(videos)

    def sometimes(prompts, videos):
        return [None if "red" in prompt else float(brightness(x)) for prompt, x in zip(prompts, videos[:, None])]

    def never(prompts):
        return [None] * len(prompts)

    few = CleanClips(clips.prompts[:12], clips.videos[:12])
    rows = [row for row, prompt in enumerate(few.prompts) if "red" not in prompt]
    judged = CleanClips([few.prompts[row] for row in rows], few.videos[rows])
    plain, waited, abstains = (evaluate_reward(reward, few) for reward in (brightness, later, sometimes))
    expected = evaluate_reward(brightness, judged)
    assert 0 < len(rows) < 12 and waited.accuracy == plain.accuracy
    assert plain.peak_mib is None and "peak" not in str(plain) and "nan" not in str(abstains)
    for name in ("frozen", "blur"):  # those that are drawn differ with the number of clips
        assert abstains.accuracy[name] == expected.accuracy[name] and abstains.falls[name] == expected.falls[name]
        assert abstains.curves[name] == pytest.approx(expected.curves[name])
    assert abstains.invariance == plain.invariance
    with pytest.raises(ValueError, match="reward: 'never' returned None for every clip"):
        evaluate_reward(never, few)


def write_clips(folder, sizes):
    rows = []
    for i, size in enumerate(sizes):
        video = torch.rand(17, 3, *size, generator=torch.Generator().manual_seed(i))
        save_video(video, folder / f"{i}.mp4", min_size=0)
        rows.append({"video": f"{i}.mp4", "caption": ["a red circle", "a blue square", "two green crosses"][i]})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "clips.jsonl")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The module of `pisces-rl evaluate`, in this process; `run(*options)`."""

    def run(*options):
        evaluate_command.main(["--output_dir", str(tmp_path / "out"), *options])
        return (tmp_path / "out" / "rewards.md").read_text()

    monkeypatch.setattr(evaluate_command, "run", run, raising=False)
    return evaluate_command


def test_the_script_on_files(script, tmp_path):
    table = script.run(
        "--dataset",
        write_clips(tmp_path, [(32, 32)] * 3),
        "--n",
        "9",
        "--rewards",
        "ot_semantic",
        "--ot_attention",
        '{"plan": "balanced"}',
    )
    assert "| another clip |" in table
    assert (tmp_path / "out" / "plans.png").stat().st_size > 1000
    assert (tmp_path / "out" / "strength.png").stat().st_size > 1000


def test_the_script_asks_the_rewards_that_an_encoder_has(script, tmp_path, capsys, monkeypatch):
    clip = build("clip")
    clip.model.save_pretrained(tmp_path / "clip"), clip.tokenizer.save_pretrained(tmp_path / "clip")
    options = ["--encoder", str(tmp_path / "clip"), "--dataset", write_clips(tmp_path, [(16, 16), (16, 24)])]
    table = script.run(*options)
    assert table.startswith("## cosine\n") and table.count("##") == 1
    told = capsys.readouterr().out
    assert "ot_semantic is skipped: matcher: clip@" in told and "ot_quality is skipped: ot_map: no map is" in told
    monkeypatch.setattr(script, "read_clips", lambda *args: pytest.fail("clips were read"))
    for wrong, message in (
        (["--rewards", "cosine", "matching"], "no matching head"),
        (["--ot_attention", '{"plan": "exact"}'], "plan='exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            script.run(*options, *wrong)


def test_what_the_script_measured_is_kept_if_a_later_reward_fails(script, tmp_path):
    (tmp_path / "own.py").write_text("def fails(prompts, videos):\n    raise OSError('gone')\n")
    rewards = ["cosine", f"{tmp_path}/own.py:fails"]
    with pytest.raises(RewardError, match="gone"):
        script.run("--dataset", write_clips(tmp_path, [(16, 16)] * 2), "--rewards", *rewards)
    assert (tmp_path / "out" / "rewards.md").read_text().startswith("## cosine\n")


def test_the_script_does_not_stretch_clips(script, tmp_path):
    def read(sizes):
        return script.read_clips(script.EvaluationArguments(dataset=write_clips(tmp_path, sizes)), 5, (8, 8)).videos

    whole = read([(16, 32)] * 2)
    assert whole.shape == (2, 5, 3, 16, 32)
    assert torch.equal(whole[1], load_video(tmp_path / "1.mp4", 5))
    mixed = read([(8, 16), (16, 8)])
    assert mixed.shape == (2, 5, 3, 8, 8)
    assert torch.equal(mixed[0], load_video(tmp_path / "0.mp4", 5)[..., 4:12])
