"""UnifiedReward and VideoScore2 with a tiny Qwen2.5-VL; names and shapes of weights against the published files."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_judge import config, full_config, model, teach, tokenizer
from tiny_qwen import CHAT, IMAGE, VIDEO
from transformers import Qwen2VLImageProcessorPil

from pisces_rl.rewards import RewardError, RewardPanel, load_reward
from pisces_rl.rewards.scorers.generative_judge import expected_number, load_judge, official_shapes
from pisces_rl.rewards.scorers.qwen2_vl_reward import flat_name, qwen_inputs, qwen_patches, qwen_size
from pisces_rl.rewards.scorers.unified_reward import UnifiedReward
from pisces_rl.rewards.scorers.video_score2 import VideoScore2

PROMPTS = ["a red circle", "two blue squares that move left"]
JUDGES = {"video_score2": VideoScore2, "unified_reward": UnifiedReward}
TEMPLATES = {"video_score2": "Rate $t2v_prompt.", "unified_reward": "Rate [{prompt}]."}
ANSWERS = {
    "video_score2": [
        "é: so\nvisual quality: 4\ntext-to-video alignment: 3\nphysical/common-sense consistency: 5",
        "visual quality: 1\ntext-to-video alignment: 2\nphysical/common-sense consistency: 2",
    ],
    "unified_reward": [
        "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.09\nStyle Score (1-5): 4",
        "Alignment Score (1-5): 1.5\nPhysics Score (1-5): 5.0\nStyle Score (1-5): 3.3",
    ],
}

# of model-0000*-of-00004.safetensors in CodeGoat24/UnifiedReward-qwen-7b, as those of Qwen/Qwen2.5-VL-7B-Instruct
PUBLISHED = {
    "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    "visual.blocks.31.norm1.weight": (1280,),
    "visual.blocks.31.attn.qkv.bias": (3840,),
    "visual.blocks.0.mlp.gate_proj.weight": (3420, 1280),
    "visual.blocks.0.mlp.down_proj.bias": (1280,),
    "visual.merger.ln_q.weight": (1280,),
    "visual.merger.mlp.0.weight": (5120, 5120),
    "visual.merger.mlp.2.weight": (3584, 5120),
    "model.embed_tokens.weight": (152064, 3584),
    "model.layers.27.self_attn.q_proj.weight": (3584, 3584),
    "model.layers.27.self_attn.k_proj.bias": (512,),
    "model.layers.0.mlp.up_proj.weight": (18944, 3584),
    "model.layers.0.post_attention_layernorm.weight": (3584,),
    "model.norm.weight": (3584,),
    "lm_head.weight": (152064, 3584),
}
#: Of UnifiedReward-qwen-7b and -3b, as their pages list them: GB of the weights, files, kB of the index of names.
FILES = {"7B": (4.97 + 4.99 + 4.93 + 1.69, 4, 57.6), "3B": (5.00 + 2.51, 2, 65.4)}


def videos(count=2, frames=3, height=24, width=32):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def judge(name: str, network=None, **options):
    return JUDGES[name](network or model(), tokenizer(), TEMPLATES[name], **options)


@pytest.fixture(scope="module", params=["video_score2", pytest.param("unified_reward", marks=pytest.mark.slow)])
def taught(request):
    """A judge that writes ANSWERS for PROMPTS and the videos."""
    network = model()
    scorer = judge(request.param, network, max_new_tokens=80)
    teach(network, scorer, PROMPTS, videos(), ANSWERS[request.param])
    return scorer


@pytest.mark.parametrize("size", FILES)
def test_names_and_shapes_are_the_published_ones(size):
    """The size of the published index tells which layout its names have, and that the 3B's has no head of words."""
    shapes = official_shapes(full_config(size), flat=True)
    if size == "7B":
        assert {name: shapes[name] for name in PUBLISHED} == PUBLISHED
    gigabytes, files, index = FILES[size]
    total = 2 * sum(map(math.prod, shapes.values()))  # bf16
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.02)
    names = dict.fromkeys(sorted(shapes), f"model-00001-of-0000{files}.safetensors")
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2)
    assert len(text) / 1e3 == pytest.approx(index, abs=0.06)


def by_hand(scorer, name: str, prompt: str, clip: torch.Tensor, answer: str) -> list[float]:
    """The scores in fp64: one forward pass over chat and answer, digits found in the text, a softmax over them."""
    network, words = scorer.model.double(), scorer.tokenizer
    vision, video = network.config.vision_config, name == "video_score2"
    if video:
        size = qwen_size(24, 32, 128 * 64, 768 * 64, factor=8)
        patches, grid = qwen_patches(clip[[0, 2]][None].double(), size, vision, passes=False)
        grids = [grid]
    else:
        size = qwen_size(24, 32, 4 * 64, 16384 * 64, factor=8)
        patches, grid = qwen_patches(clip[:, None].double(), size, vision)
        grids = [grid] * 3
    pad = VIDEO if video else IMAGE
    text = f"<|vision_start|>{pad * (math.prod(grid) // 4)}<|vision_end|>" * len(grids)
    text = f"<|im_start|>user\n{text}{TEMPLATES[name].replace(scorer.placeholder, prompt)}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    before, after = (words(part)["input_ids"] for part in (text, answer))
    ids = torch.tensor([before + after])
    kind = (ids == words.convert_tokens_to_ids(pad)).int() * (2 if video else 1)
    with torch.no_grad():
        logits = network(
            input_ids=ids,
            mm_token_type_ids=kind,
            **{"pixel_values_videos" if video else "pixel_values": patches.flatten(0, 1)},
            **{"video_grid_thw" if video else "image_grid_thw": torch.tensor(grids)},
        ).logits[0, len(before) - 1 : -1]
    network.float()
    digits = [words(str(d))["input_ids"][0] for d in range(10)]
    scores, place, power = [], 0, None
    while place < len(after):
        if after[place] in digits and power is None and words.decode(after[place - 1]).endswith(": "):
            scores.append(0.0)
            power = 0
        elif after[place] not in digits and words.decode(after[place]) != ".":
            power = None
        if power is not None and after[place] in digits:
            allowed = range(1, 6) if power == 0 else range(10)
            chances = [math.exp(logits[place, digits[d]].item()) for d in allowed]
            scores[-1] += 10**-power * sum(d * c for d, c in zip(allowed, chances)) / sum(chances)
            power += 1
        place += 1
    return scores


def test_the_scores_are_the_expectation_over_the_answers_digits(taught):
    name, parts, clips = taught.__name__, {}, videos()
    rewards = taught(PROMPTS, clips, log_extra=parts.__setitem__)
    found = torch.tensor(list(parts.values())).T
    assert list(parts) == [f"{name}_{dimension}" for dimension in taught.dimensions]
    torch.testing.assert_close(rewards, found.sum(1))
    expected = [by_hand(taught, name, *row) for row in zip(PROMPTS, clips, ANSWERS[name])]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)
    written = [[float(line.split(": ")[-1]) for line in text.split("\n")[-3:]] for text in ANSWERS[name]]
    assert 0.01 < (found - torch.tensor(written)).abs().max() < 2  # not what is written, which is less sure


def test_batch_mates_change_nothing_and_it_is_a_reward(taught):
    clips = videos()
    alone = torch.cat([taught([prompt], clip[None]) for prompt, clip in zip(PROMPTS, clips)])
    table = RewardPanel(taught)(PROMPTS, clips, {})
    torch.testing.assert_close(table.values[:, 0], alone, rtol=1e-4, atol=1e-4)
    taught.weights = torch.tensor([0.0, 1.0, 0.0])
    parts = {}
    only = taught(PROMPTS, clips, log_extra=parts.__setitem__)
    taught.weights = torch.ones(3)
    assert only.tolist() == parts[f"{taught.__name__}_{taught.dimensions[1]}"]


def test_it_waits_on_the_cpu_between_calls(taught, monkeypatch):
    places = []
    monkeypatch.setattr(taught.model, "to", lambda place: places.append(place) or taught.model)
    expected = taught(PROMPTS, videos())
    taught.offload = "cuda"
    assert places == ["cpu"] and taught(PROMPTS, videos()).equal(expected) and places == ["cpu", "cuda", "cpu"]
    taught.offload = None


@pytest.mark.parametrize("name", JUDGES)
def test_an_answer_without_scores_is_an_error_that_quotes_it(name):
    scorer = judge(name, max_new_tokens=5)
    message = (
        rf"reward '{name}': the answer for prompt 'a red circle' does not give .* after max_new_tokens=5 with '.+'"
    )
    with pytest.raises(RewardError, match=message):
        scorer(PROMPTS[:1], videos(1))


@pytest.mark.parametrize(
    ("name", "answer", "scores"),
    [
        (
            "video_score2",
            "VISUAL QUALITY: 3;\ntext-to-video alignment:  4,\nphysical/common-sense consistency: 1",
            [3, 4, 1],
        ),
        (
            "video_score2",
            "I judge visual quality: crisp → good. visual quality: 5, text-to-video alignment: 2 é "
            "physical/common-sense consistency: 4.5",
            [5, 2, 4],
        ),
        ("video_score2", "visual quality: 6\ntext-to-video alignment: 4\nphysical/common-sense consistency: 1", None),
        ("video_score2", "visual quality: 15\ntext-to-video alignment: 4\nphysical/common-sense consistency: 1", None),
        ("video_score2", "visual quality: 1\ntext-to-video alignment: 4", None),
        ("unified_reward", "Alignment Score (1-5): 4.25\nPhysics Score (1-5): 1.\nStyle Score (1-5): 3", [4.25, 1, 3]),
        ("unified_reward", "Alignment Score (1-5): 0.9\nPhysics Score (1-5): 1.0\nStyle Score (1-5): 3.0", None),
        ("unified_reward", "Alignment Score (1-5): X\nPhysics Score (1-5): Y\nStyle Score (1-5): Z", None),
        ("unified_reward", "", None),
    ],
)
def test_scores_are_found_in_answers(name, answer, scores):
    """With logits that are sure of each digit, the scores are those written."""
    scorer = judge(name)
    ids = scorer.tokenizer(answer)["input_ids"] if answer else []
    logits = torch.stack([100.0 * (torch.tensor(scorer.digits) == i) for i in ids]) if ids else torch.zeros(0, 10)
    ids += [scorer.tokenizer.eos_token_id, 5, 6]
    if scores is None:
        with pytest.raises(RewardError, match="does not give .*it ends with "):
            scorer.read("a", ids, logits)
    else:
        assert scorer.read("a", ids, logits).tolist() == pytest.approx(scores, abs=1e-6)


def test_expected_number_is_that_of_independent_digits():
    """Against all numbers d.dd, each with the product of its digits' probabilities, in fp64."""
    logits = 2 * torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    chances = [row.double().softmax(0) for row in (logits[0, 1:6], logits[1], logits[2])]
    expected = sum(
        (a + 1 + b / 10 + c / 100) * float(chances[0][a] * chances[1][b] * chances[2][c])
        for a in range(5)
        for b in range(10)
        for c in range(10)
    )
    assert expected_number(logits).item() == pytest.approx(expected, abs=1e-5)
    single = float(chances[0] @ torch.arange(1.0, 6).double())
    assert expected_number(logits[:1]).item() == pytest.approx(single, abs=1e-5)


@pytest.mark.parametrize("size", [(56, 84), (100, 60), (240, 416)])
def test_images_are_preprocessed_as_by_the_models_processor(size):
    """Columns are scaled first; Pillow 13 takes rows first where that is less work, which shows where noise clips."""
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=16384 * 28**2)
    clip = (videos(1, 3, *size) * 255).round().byte()
    theirs = processor(list(clip[0]), return_tensors="pt")
    vision = full_config("7B").vision_config
    network = config()
    network.vision_config = vision
    ours = qwen_inputs(
        tokenizer(), ["a"], clip / 255, network, torch.zeros(1), media="image", tokens=UnifiedReward.tokens
    )
    assert ours["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() <= 2 / 255 / 0.26
    places = (ours["input_ids"] == network.image_token_id).sum()
    assert places == theirs["image_grid_thw"].prod(1).sum() // 4


@pytest.mark.parametrize(("frames", "fps", "seen"), [(81, 16, 10), (93, 16, 10), (9, 16, 4), (3, 16, 2), (49, 8, 12)])
def test_frames_of_video_score2(frames, fps, seen):
    shown = judge("video_score2", video_fps=fps).frames_of(torch.arange(frames)[None])
    assert shown.shape[1] == seen and shown[0, [0, -1]].tolist() == [0, frames - 1]


def test_frames_of_unified_reward():
    scorer = judge("unified_reward")
    assert scorer.frames_of(torch.arange(81)[None]).tolist() == [[0, 10, 20, 30, 40, 50, 60, 70]]
    assert scorer.frames_of(torch.arange(3)[None]).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flat", [True, False])
def test_published_folders_are_loaded_in_either_layout(tmp_path, flat, tied):
    source = model(tie_word_embeddings=tied)
    source.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    state = {
        flat_name(k) if flat else k: v.clone()
        for k, v in source.state_dict().items()
        if k != "lm_head.weight" or not tied
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(load_judge.__globals__["SIZES"], "7B", {"hidden_size": 32, "num_hidden_layers": 2})
        loaded, words = load_judge(tmp_path, "VideoScore2", ("7B",), torch.float32, "cpu")
        assert words.chat_template == CHAT
        for name, tensor in source.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
        name = flat_name("model.visual.merger.ln_q.weight") if flat else "model.visual.merger.ln_q.weight"
        del state[name]
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"does not hold the weights of VideoScore2: {name} is missing"):
            load_judge(tmp_path, "VideoScore2", ("7B",), torch.float32, "cpu")
    assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "size"),
    [("video_score2", r"VideoScore2 \(Qwen2.5-VL-7B"), ("unified_reward", r"UnifiedReward 2.0 \(Qwen2.5-VL-7B")],
)
def test_what_is_not_here_is_said(tmp_path, name, size):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"is a different 'qwen2_5_vl': .* {size}"):
        load_reward(name, model=tmp_path, template=TEMPLATES[name])
    with pytest.raises(ValueError, match=f"`hf download {JUDGES[name].__init__.__defaults__[0]}`"):
        load_reward(name, template=TEMPLATES[name])
    with pytest.raises(ValueError, match=r"there is no .*; fetch the authors' file with `curl .*\.py`"):
        load_reward(name, template=tmp_path / "none.py")


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("video_score2", 'def main():\n    VS2_QUERY_TEMPLATE = Template("""Rate $t2v_prompt.""")\nraise SystemExit'),
        ("unified_reward", 'problem = (\n    "Ra"\n    f"te [{prompt}]."\n)\nraise SystemExit\n'),
    ],
)
def test_the_authors_question_is_read_from_their_file(tmp_path, name, theirs):
    (tmp_path / "theirs.py").write_text(theirs)
    assert JUDGES[name](model(), tokenizer(), tmp_path / "theirs.py").template == TEMPLATES[name]
    (tmp_path / "theirs.py").write_text("other = 1\nproblem = 3")
    with pytest.raises(ValueError, match="does not assign"):
        JUDGES[name](model(), tokenizer(), tmp_path / "theirs.py")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("video_score2", {"video_fps": 0}, "video_fps=0"),
        ("video_score2", {"weights": (1, 1)}, r"expected 3 weights \(visual_quality"),
        ("unified_reward", {"frames": 0}, "frames=0"),
        ("unified_reward", {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        judge(name, **options)


def test_bad_inputs_are_named():
    scorer = judge("video_score2")
    with pytest.raises(ValueError, match=r"'a <\|video_pad\|>' contains '<\|video_pad\|>', a special token of video"):
        scorer(["a <|video_pad|>"], videos(1))
    with pytest.raises(ValueError, match="needs at least 2 frames, got 1"):
        scorer(["a"], videos(1, 1))
    with pytest.raises(ValueError, match="video 0 has values"):
        scorer(["a"], videos(1) * 255)
