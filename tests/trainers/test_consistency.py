"""The consistency term: its value and its gradient, alone and together with rewards."""

from pathlib import Path

import numpy as np
import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch
from datasets import Dataset, Video
from policy.test_replay_parity import adapted
from tiny_pipelines import CALLS, GUIDANCE

from pisces_rl import ConsistencyDistillation, RewardBackpropTrainer, VideoGRPOTrainer
from pisces_rl.media import load_video, save_video
from pisces_rl.policy import VideoPolicy, adapters_off, default_lora_config, load_lora_state, lora_parameters
from pisces_rl.trainers.auxiliary.consistency import pseudo_huber
from pisces_rl.trainers.base.data.video_data import as_video


class Videos:
    """Four captioned clips of another size than the pipeline's."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {"prompt": f"clip {row}", "video": torch.rand(7, 3, 20, 24, generator=generator)}


def distilled(folder, rewards=None, videos=None, callbacks=None, **settings):
    own = {
        name: settings.pop(f"consistency_{name}")
        for name in ("weight", "guidance", "decay", "batch_size")
        if f"consistency_{name}" in settings
    }
    made = RewardBackpropTrainer(
        tiny_runs.pipeline(),
        rewards,
        backprop.config(folder, **settings),
        tiny_runs.prompts(4),
        callbacks=callbacks,
        peft_config=default_lora_config(4),
        auxiliary_losses=[ConsistencyDistillation(Videos() if videos is None else videos, steps=4, **own)],
    )
    tiny_runs.enliven(made)
    return made


def test_pseudo_huber():
    x, y = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(pseudo_huber(x, y, 4.0), torch.tensor([0.5, 0.0]))  # sqrt(9 + 16) - 4 = 1, over two


def live(family: str, **settings) -> tuple[VideoPolicy, dict, ConsistencyDistillation]:
    """A family's policy with an adapter and a moving average that are not zero and not each other."""
    policy = VideoPolicy(adapted(family), num_inference_steps=3, pipeline_kwargs=CALLS[family] | GUIDANCE[family][1])
    adapter = lora_parameters(dict(policy.denoiser.items()))
    consistency = ConsistencyDistillation(Videos(), steps=4, **settings)
    consistency.begin(policy, adapter, seed=0, image_columns=(), reference=lambda: adapters_off(policy))
    generator = torch.Generator().manual_seed(9)
    for value in consistency.average.average.values():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return policy, adapter, consistency


@pytest.mark.parametrize(
    "family",
    [  # flow, v, epsilon
        "wan",
        "cogvideox",
        pytest.param("animatediff", marks=pytest.mark.slow),
    ],
)
def test_the_loss_by_hand(family):
    """Teacher without the adapter and guided, target under the average, student under the adapter."""
    policy, adapter, consistency = live(family, guidance=3.0, huber_c=0.01)
    predict, seen, done = policy.predict, [], {}
    policy.predict = lambda *a, **k: seen.append((a, k)) or predict(*a, **k)
    for number in range(40):
        seen.clear()
        loss = consistency.loss(number, 2)
        ((clips, rows), first), *others = seen
        step = first["step"]
        if step in done:
            continue
        done[step] = len(others)
        call = {"noise_seeds": first["noise_seeds"], "num_inference_steps": 4}
        with adapters_off(policy):
            teacher = predict(clips, rows, step=step, guidance_scale=3.0, **call)
        target = teacher.following
        if step < 3:
            own = {name: p.detach().clone() for name, p in adapter.items()}
            with torch.no_grad():
                for name, parameter in adapter.items():
                    parameter.copy_(consistency.average.average[name])
            target = predict(clips, rows, step=step + 1, state=teacher.following, **call).clean
            with torch.no_grad():
                for name, parameter in adapter.items():
                    parameter.copy_(own[name])
        student = predict(clips, rows, step=step, state=teacher.state, **call).clean
        assert loss.shape == (2,) and loss.requires_grad
        expected = pseudo_huber(student.view(2, -1), target.view(2, -1), 0.01)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        if len(done) == 4:
            break
    assert done == {0: 2, 1: 2, 2: 2, 3: 1}  # at the last step the target is the teacher's


def test_without_an_adapter_student_and_teacher_agree_at_the_last_step(tmp_path):
    made = distilled(tmp_path)
    for parameter in made.adapter.values():
        parameter.data.zero_()
    predict, steps = made.policy.predict, []
    made.policy.predict = lambda *a, step, **k: steps.append(step) or predict(*a, step=step, **k)
    number = 0
    while 3 not in steps:
        loss, number = made.auxiliary_losses[0].loss(number, 2), number + 1
    assert number < 40 and loss.max() < 1e-6


def test_parts_of_a_batch_are_the_batch():
    _, _, consistency = live("wan")
    for number in range(5):
        whole = consistency.loss(number, 4)
        parts = torch.cat([consistency.loss(number, 2, (rank, 2)) for rank in (0, 1)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
        assert len(set(whole.tolist())) == 4


@pytest.mark.slow
def test_distillation_alone_lowers_the_loss(tmp_path):
    made = distilled(tmp_path, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=4)
    with torch.no_grad():
        before = torch.stack([made.auxiliary_losses[0].loss(n, 4).mean() for n in range(1000, 1012)]).mean()
    made.train()
    made.auxiliary_losses[0].average.restart()
    with torch.no_grad():
        after = torch.stack([made.auxiliary_losses[0].loss(n, 4).mean() for n in range(1000, 1012)]).mean()
    assert after < 0.95 * before, (before, after)
    assert len(tiny_runs.logged(made, "consistency_loss")) == 40
    made.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "consistency distillation" in card and "weight 1.0" in card and "2310.04378" in card


@pytest.mark.parametrize("kind", ["backprop", "grpo"])
def test_it_adds_its_gradient(tmp_path, kind):
    gradients = {}
    for weight in (0.0, 2.0):
        seen = tiny_runs.Gradients()
        settings = {"max_steps": 1}
        terms = [ConsistencyDistillation(Videos(), weight, steps=4)] if weight else None
        folder = tmp_path / str(weight)
        if kind == "backprop":
            made = RewardBackpropTrainer(
                tiny_runs.pipeline(),
                backprop.bright,
                backprop.config(folder, **settings),
                tiny_runs.prompts(4),
                callbacks=[seen],
                peft_config=default_lora_config(4),
                auxiliary_losses=terms,
            )
        else:
            made = VideoGRPOTrainer(
                tiny_runs.pipeline(),
                tiny_runs.brightness,
                tiny_runs.config(folder, max_grad_norm=0.0, **settings),
                tiny_runs.prompts(4),
                callbacks=[seen],
                peft_config=default_lora_config(4),
                auxiliary_losses=terms,
            )
        tiny_runs.enliven(made)
        if weight:
            made.auxiliary_losses[0].average.restart()
            count = made.args.per_device_train_batch_size
            loss = 2.0 * made.auxiliary_losses[0].loss(0, count).mean()
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
    average, again = whole.auxiliary_losses[0].average.average, resumed.auxiliary_losses[0].average.average
    assert tiny_runs.largest_difference(average, again) == 0


def test_resuming_a_run_without_the_term_starts_its_average_there(tmp_path):
    backprop.trainer(tmp_path, callbacks=[tiny_runs.StopAt(2)], max_steps=4).train()
    resumed = distilled(tmp_path, backprop.bright, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    saved = distilled(tmp_path / "other", backprop.bright)
    load_lora_state(saved.pipeline, str(tmp_path / "checkpoint-2"))
    at_2 = tiny_runs.weights(saved)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert tiny_runs.largest_difference(resumed.auxiliary_losses[0].average.average, at_2) == 0
    assert resumed.auxiliary_losses[0].average.updates == 0


# --- videos ---


def test_every_form_of_a_video_is_the_same_video(tmp_path):
    path = save_video(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), tmp_path / "clip.mp4")
    expected = load_video(path)
    data = path.read_bytes()
    exact = (expected * 255).round().byte()
    for given in (
        path,
        str(path),
        data,
        {"path": str(path), "bytes": None},
        {"path": "gone.mp4", "bytes": data},
        exact,
        exact.numpy(),
        expected,
        expected.tolist(),
    ):
        torch.testing.assert_close(as_video(given), expected)
    assert len(as_video(data, 3)) == 3
    for wrong, message in (
        (np.zeros((4, 16, 16)), r"expected a path, .* or a tensor \(F, 3, H, W\), got a tensor \(4, 16, 16\)"),
        (None, "got a NoneType"),
        (expected * 255, "must lie in .0, 1.; divide it by 255"),
        (expected - 1, "from -"),
        (torch.full((2, 3, 4, 4), torch.nan), "values from nan"),
        (b"no video", "cannot be read as a video"),
        ({"path": None, "bytes": None}, "got a NoneType"),
        (exact.tolist(), "divide it by 255"),
    ):
        with pytest.raises(ValueError, match=message):
            as_video(wrong)


def test_a_data_set_of_videos(tmp_path):
    """`datasets.Video` columns, of paths and of bytes, without torchcodec; prompts for the rewards from it, too."""
    paths = [str(save_video(torch.rand(6, 3, 16, 16), tmp_path / f"{i}.mp4")) for i in range(4)]
    rows = {"prompt": [f"clip {i}" for i in range(4)], "video": paths}
    from_paths = Dataset.from_dict(rows).cast_column("video", Video())
    from_bytes = Dataset.from_dict(rows | {"video": [{"bytes": Path(p).read_bytes(), "path": None} for p in paths]})
    losses = [
        distilled(tmp_path, videos=data).auxiliary_losses[0].loss(0, 4)
        for data in (Dataset.from_dict(rows), from_paths, from_bytes.cast_column("video", Video()))
    ]
    assert losses[0].isfinite().all()
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    made = RewardBackpropTrainer(
        tiny_runs.pipeline(),
        backprop.bright,
        backprop.config(tmp_path, max_steps=1),
        from_paths,
        peft_config=default_lora_config(4),
        auxiliary_losses=[ConsistencyDistillation(from_paths)],
    )
    made.train()
    assert made.state.global_step == 1


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "video_dataset is empty"),
        (iter([]), "video_dataset is a list_iterator, which has no length"),
        (Dataset.from_dict({"prompt": ["a"], "video": ["b"]}).to_iterable_dataset(), "which has no length"),
        (Dataset.from_dict({"prompt": ["a"]}), r"columns \['prompt'\] but none named `video`"),
        (Dataset.from_dict({"video": ["a"]}), r"columns \['video'\] but none named `prompt`"),
        (Dataset.from_dict({"prompt": ["a", None], "video": ["b", "c"]}), "video_dataset row 1: prompt is None"),
        ([{"prompt": "a"}], "none named `video`"),
        ([{"prompt": 3, "video": "a"}], "row 0: prompt is 3"),
        ({"train": 1}, "video_dataset is a dict whose row 0 cannot be read"),
        (["a"], "row 0 cannot be read"),
    ],
)
def test_bad_data_sets_of_videos(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        distilled(tmp_path, videos=data)


def test_a_prompt_that_is_missing_further_on(tmp_path):
    rows = [Videos()[0], {"prompt": None, "video": torch.rand(7, 3, 20, 24)}]
    with pytest.raises(ValueError, match="video_dataset row 1: prompt is None"):
        distilled(tmp_path, videos=rows).auxiliary_losses[0].loss(0, 8)


def test_the_best_model_without_rewards_is_a_judge_s(tmp_path):
    def made(**settings):
        return RewardBackpropTrainer(
            tiny_runs.pipeline(),
            None,
            backprop.config(
                tmp_path,
                load_best_model_at_end=True,
                max_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
                **settings,
            ),
            tiny_runs.prompts(4),
            eval_dataset=tiny_runs.prompts(2),
            judge_funcs=tiny_runs.brightness,
            peft_config=default_lora_config(4),
            auxiliary_losses=[ConsistencyDistillation(Videos(), steps=4)],
        )

    with pytest.raises(ValueError, match="set metric_for_best_model to a judge, for instance 'judges/NAME/mean'"):
        made()
    best = made(metric_for_best_model="judges/brightness/mean")
    best.train()
    assert best.state.best_metric == max(tiny_runs.logged(best, "eval_judges/brightness/mean")[1:])


def test_bad_settings(tmp_path):
    for settings in (
        {"weight": -1.0},
        {"weight": 0.0},
        {"steps": 1},
        {"decay": 1.0},
        {"batch_size": 0},
        {"batch_size": -1},
    ):
        with pytest.raises(ValueError, match=f"ConsistencyDistillation: .*{next(iter(settings))}="):
            ConsistencyDistillation(Videos(), **settings)
    with pytest.raises(ValueError, match="video_dataset is a NoneType"):
        ConsistencyDistillation(None)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        VideoGRPOTrainer(
            tiny_runs.pipeline(),
            None,
            tiny_runs.config(tmp_path),
            tiny_runs.prompts(),
            auxiliary_losses=[ConsistencyDistillation(Videos())],
        )
