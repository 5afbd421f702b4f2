"""HPSv3 with a tiny random Qwen2-VL; names and shapes of its weights against the published ones."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_qwen import IMAGE, config, full_config, model, tokenizer

from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.scorers import hpsv3
from pisces_rl.rewards.scorers.hpsv3 import WEIGHTS, HPSv3, load_hpsv3, official_names
from pisces_rl.rewards.scorers.qwen2_vl_reward import empty_shapes, qwen_patches, qwen_size

TEMPLATE = "text: {text_prompt}\nquality: <|Reward|> END"
PROMPTS = ["a red circle moving left", "a blue square"]

# of HPSv3.safetensors in MizzenAI/HPSv3
PUBLISHED = {
    "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    "visual.blocks.31.mlp.fc2.weight": (1280, 5120),
    "visual.merger.mlp.2.weight": (3584, 5120),
    "model.embed_tokens.weight": (151658, 3584),
    "model.layers.27.self_attn.q_proj.weight": (3584, 3584),
    "model.layers.0.self_attn.k_proj.bias": (512,),
    "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
    "model.norm.weight": (3584,),
    "rm_head.0.weight": (1024, 3584),
    "rm_head.0.bias": (1024,),
    "rm_head.3.weight": (16, 1024),
    "rm_head.3.bias": (16,),
    "rm_head.5.weight": (2, 16),
    "rm_head.5.bias": (2,),
}


def videos(count=2, frames=3, height=60, width=100):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def reward(**options) -> HPSv3:
    return HPSv3(model(hpsv3.head(16)), tokenizer(), TEMPLATE, **options)


def test_names_and_shapes_are_the_published_ones():
    sizes = full_config("7B", 151658)
    names, shapes = official_names(sizes, flat=True), empty_shapes(sizes, lambda: hpsv3.head(3584))
    official = {names[name]: shape for name, shape in shapes.items()}
    assert {name: official[name] for name in PUBLISHED} == PUBLISHED and len(official) == len(names)


def test_the_score_is_the_mean_of_mu_at_the_special_token():
    scorer, clips, parts = reward(frames=2, batch_size=3), videos(), {}
    scores = scorer(PROMPTS, clips, log_extra=parts.__setitem__)
    vision = scorer.model.model.config.vision_config
    size = qwen_size(60, 100, 256 * 64, 256 * 64, factor=8)
    by_hand = []
    for prompt, clip in zip(PROMPTS, clips):
        for frame in clip[[0, 2]]:
            patches, grid = qwen_patches(frame[None, None], size, vision)
            places = patches.shape[1] // 4
            text = f"<|im_start|>user\n<|vision_start|>{IMAGE * places}<|vision_end|>"
            text += f"{TEMPLATE.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
            ids = torch.tensor(scorer.tokenizer(text)["input_ids"])
            hidden = scorer.model.model(
                input_ids=ids[None],
                pixel_values=patches[0],
                image_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=(ids == scorer.tokenizer.convert_tokens_to_ids(IMAGE)).int()[None],
            ).last_hidden_state[0]
            mark = ids.tolist().index(scorer.tokenizer.convert_tokens_to_ids("<|Reward|>"))
            by_hand.append(scorer.model.rm_head(hidden[mark]))
    by_hand = torch.stack(by_hand).view(2, 2, 2).mean(1)
    torch.testing.assert_close(scores, by_hand[:, 0], rtol=1e-4, atol=1e-5)
    assert parts["hpsv3_mu"] == pytest.approx(scores.tolist())
    assert parts["hpsv3_sigma"] == pytest.approx(by_hand[:, 1].tolist(), rel=1e-3)


def test_batch_mates_change_nothing_and_it_is_a_reward():
    scorer, clips = reward(frames=2), videos()
    alone = torch.cat([scorer([prompt], clip[None]) for prompt, clip in zip(PROMPTS, clips)])
    table = RewardPanel(scorer)(PROMPTS, clips, {})
    torch.testing.assert_close(table.values[:, 0], alone, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_the_finite_difference():
    scorer = HPSv3(model(hpsv3.head(16)).double(), tokenizer(), TEMPLATE)
    clip = (0.3 + 0.4 * videos(1, 1).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(PROMPTS[:1], clip).sum(), clip)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (scorer(PROMPTS[:1], clip + step) - scorer(PROMPTS[:1], clip - step)) / 2e-2
    torch.testing.assert_close(slope.item(), gradient.norm().item(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("flat", [True, False])
def test_the_published_file_is_loaded_in_either_layout(tmp_path, flat):
    source = model(hpsv3.head(16))
    names = official_names(config(), flat)
    state = {names[name]: tensor.clone() for name, tensor in source.state_dict().items()}
    save_file(state | {"lm_head.weight": torch.zeros(32, 16)}, tmp_path / WEIGHTS)
    loaded = load_hpsv3(tmp_path, config(vocab_size=99), torch.float32)  # the file's rows count
    expected = HPSv3(source, tokenizer(), TEMPLATE)(PROMPTS, videos())
    torch.testing.assert_close(HPSv3(loaded, tokenizer(), TEMPLATE)(PROMPTS, videos()), expected)
    del state[names["rm_head.3.bias"]]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="does not hold the weights of HPSv3: rm_head.3.bias is missing"):
        load_hpsv3(tmp_path, config(), torch.float32)


def test_what_is_not_here_is_said(tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a different 'qwen2_vl': .* HPSv3's base \(Qwen2-VL-7B\) has"):
        load_reward("hpsv3", model=tmp_path, base=tmp_path, template=TEMPLATE)
    with pytest.raises(ValueError, match="holds no HPSv3.safetensors"):
        load_hpsv3(tmp_path, config(), torch.float32)
    with pytest.raises(
        ValueError, match="there is no .*; fetch the authors' file with `curl .*data_collator_qwen.py`"
    ):
        load_reward("hpsv3", template=tmp_path / "none.py")
    theirs = (
        "INSTRUCTION = 'text: {text_prompt} '\nprompt_with_special_token = 'quality: <|Reward|>'\nraise SystemExit\n"
    )
    (tmp_path / "theirs.py").write_text(theirs)
    scorer = HPSv3(model(hpsv3.head(16)), tokenizer(), tmp_path / "theirs.py")
    assert scorer.template == "text: {text_prompt} quality: <|Reward|>"
    with pytest.raises(ValueError, match="frames=0"):
        reward(frames=0)
