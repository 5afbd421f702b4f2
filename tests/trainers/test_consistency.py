"""The consistency term: its value, its gradient, alone and beside rewards."""

import numpy as np
import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch

from pisces_rl import RewardBackpropTrainer, VideoGRPOTrainer
from pisces_rl.media import save_video
from pisces_rl.policy import default_lora_config
from pisces_rl.trainers.consistency import pseudo_huber


class Videos:
    """Four captioned clips of another size than the pipeline's."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {"prompt": f"clip {row}", "video": torch.rand(7, 3, 20, 24, generator=generator)}


def distilled(folder, rewards=None, videos=None, callbacks=None, **settings):
    settings = {"consistency_weight": 1.0, "consistency_steps": 4} | settings
    made = RewardBackpropTrainer(
        tiny_runs.pipeline(), rewards, backprop.config(folder, **settings), tiny_runs.prompts(4), callbacks=callbacks,
        peft_config=default_lora_config(4), video_dataset=Videos() if videos is None else videos,
    )
    tiny_runs.enliven(made)
    return made


def test_pseudo_huber():
    x, y = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(pseudo_huber(x, y, 4.0), torch.tensor([0.5, 0.0]))  # sqrt(9 + 16) - 4 = 1, over two


def test_the_loss_by_hand(tmp_path):
    made = distilled(tmp_path)
    consistency, policy = made.consistency, made.policy
    seen = []
    predict = policy.predict
    policy.predict = lambda *a, **k: seen.append(k) or predict(*a, **k)
    by_step = {}
    for number in range(40):
        seen.clear()
        loss = consistency.loss(number, 2)
        assert loss.shape == (2,) and loss.requires_grad and (loss >= 0).all()
        by_step[seen[0]["step"]] = loss
        assert len(seen) == (2 if seen[0]["step"] == 3 else 3)
        torch.testing.assert_close(consistency.loss(number, 2), loss)
        if len(by_step) == 4:
            break
    assert set(by_step) == {0, 1, 2, 3}
    for parameter in made.adapter.values():  # no adapter: at the last step student and teacher agree
        parameter.data.zero_()
    number = next(n for n in range(40) if _step_of(consistency, n, seen) == 3)
    assert consistency.loss(number, 2).max() < 1e-6


def _step_of(consistency, number: int, seen: list) -> int:
    seen.clear()
    consistency.loss(number, 1)
    return seen[0]["step"]


def test_distillation_alone_lowers_the_loss(tmp_path):
    made = distilled(tmp_path, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=4)
    with torch.no_grad():
        before = torch.stack([made.consistency.loss(n, 4).mean() for n in range(1000, 1012)]).mean()
    made.train()
    made.consistency.average.restart()
    with torch.no_grad():
        after = torch.stack([made.consistency.loss(n, 4).mean() for n in range(1000, 1012)]).mean()
    assert after < 0.95 * before, (before, after)
    assert len(tiny_runs.logged(made, "consistency_loss")) == 40
    made.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "consistency distillation" in card and "weight 1.0" in card


@pytest.mark.parametrize("kind", ["backprop", "grpo"])
def test_it_adds_its_gradient(tmp_path, kind):
    gradients = {}
    for weight in (0.0, 2.0):
        seen = tiny_runs.Gradients()
        settings = {"consistency_weight": weight, "consistency_steps": 4, "max_steps": 1}
        videos = Videos() if weight else None
        folder = tmp_path / str(weight)
        if kind == "backprop":
            made = RewardBackpropTrainer(
                tiny_runs.pipeline(), backprop.bright, backprop.config(folder, **settings), tiny_runs.prompts(4),
                callbacks=[seen], peft_config=default_lora_config(4), video_dataset=videos,
            )
        else:
            made = VideoGRPOTrainer(
                tiny_runs.pipeline(), tiny_runs.brightness, tiny_runs.config(folder, max_grad_norm=0.0, **settings),
                tiny_runs.prompts(4), callbacks=[seen], peft_config=default_lora_config(4), video_dataset=videos,
            )
        tiny_runs.enliven(made)
        if weight:
            made.consistency.average.restart()
            count = made.args.per_device_train_batch_size
            loss = 2.0 * made.consistency.loss(0, count).mean()
            own = torch.autograd.grad(loss, list(made.adapter.values()))
        made.train()
        gradients[weight] = list(seen.steps[0].values())
    for with_it, without, alone in zip(gradients[2.0], gradients[0.0], own, strict=True):
        torch.testing.assert_close(with_it - without, alone, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = dict(max_steps=4, rewards=backprop.bright, ema_decay=0.5)
    whole = distilled(tmp_path / "whole", **settings)
    whole.train()
    distilled(tmp_path / "cut", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    resumed = distilled(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert tiny_runs.largest_difference(tiny_runs.weights(whole), tiny_runs.weights(resumed)) == 0
    average, again = whole.consistency.average.average, resumed.consistency.average.average
    assert tiny_runs.largest_difference(average, again) == 0


def test_videos_from_files_and_bytes(tmp_path):
    video = torch.rand(6, 3, 16, 16)
    path = save_video(video, tmp_path / "clip.mp4")
    rows = [{"prompt": "a", "video": v} for v in (str(path), path, (video * 255).byte().numpy(), video.tolist())]
    losses = distilled(tmp_path, videos=rows).consistency.loss(0, 4)
    assert losses.isfinite().all()
    with pytest.raises(ValueError, match=r"video: expected a path or a tensor \(F, 3, H, W\)"):
        distilled(tmp_path, videos=[{"prompt": "a", "video": np.zeros((4, 16, 16))}]).consistency.loss(0, 1)


def test_bad_settings(tmp_path):
    for settings in ({"consistency_weight": -1.0}, {"consistency_steps": 1}, {"consistency_decay": 1.0}):
        with pytest.raises(ValueError, match="consistency_"):
            backprop.config(tmp_path, **settings)
    with pytest.raises(ValueError, match="the consistency term needs both"):
        backprop.trainer(tmp_path, consistency_weight=1.0)
    with pytest.raises(ValueError, match="the consistency term needs both"):
        distilled(tmp_path, backprop.bright, consistency_weight=0.0)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        VideoGRPOTrainer(
            tiny_runs.pipeline(), None, tiny_runs.config(tmp_path, consistency_weight=1.0), tiny_runs.prompts(),
            video_dataset=Videos(),
        )
