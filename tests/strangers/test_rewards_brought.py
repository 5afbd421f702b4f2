"""Rewards as people bring them: modules, wrappers, names, names that collide, and rewards that write into their input.

Such cases come from issue trackers of trainers that take reward callables, and from what code bases of this field look
like: scorers are modules, decorators count and time, notebooks pass classes and strings.
"""

import asyncio
import functools
import gc
import threading
import warnings

import pytest
import torch
from torch import nn
from trainers.tiny_runs import brightness, logged, prompts, trainer

from pisces_rl import RewardBackpropTrainer, VideoGRPOTrainer
from pisces_rl.ot.costs import squared_cost
from pisces_rl.rewards import RewardError, RewardPanel, RewardTable, compares_videos, exposure, reward_name
from pisces_rl.rewards.contract import is_differentiable
from pisces_rl.trainers.base.run.evaluation import Evaluator
from pisces_rl.trainers.base.setup.checks import check_dataset
from pisces_rl.trainers.base.watch.training_metrics import OWN_NAMES, check_recorded
from pisces_rl.trainers.rollouts.overlap import OverlappedRewards

PROMPTS = ["a red circle", "a blue square"]
VIDEOS = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEAN = VIDEOS.mean((1, 2, 3, 4))


def ask(funcs, **columns) -> RewardTable:
    return RewardPanel(funcs)(list(PROMPTS), VIDEOS.clone(), columns, trainer_state="state")


def two(prompts, videos):
    """Takes two arguments, as most published scorers do."""
    assert len(prompts) == len(videos)
    return videos.mean((1, 2, 3, 4))


class Scorer(nn.Module):
    """A scoring network whose dropout is on until eval() is called."""

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(1)

    def forward(self, prompts, videos):
        return self.norm(self.dropout(videos.mean((1, 2, 3, 4))[:, None]))[:, 0]


class Later(nn.Module):
    async def forward(self, prompts, videos):
        return videos.mean((1, 2, 3, 4))


class Wrapper(nn.Module):
    """What torch.nn.DataParallel and home-made wrappers look like."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


class Scripted(nn.Module):
    def forward(self, prompts: list[str], videos: torch.Tensor) -> torch.Tensor:
        return videos.flatten(1).mean(1)


class Timed:
    """A decorator that is a class."""

    def __init__(self, func):
        self.func, self.calls = func, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.func(*args, **kwargs)


def timed(func):
    def wrapper(*args, **kwargs):
        return func(*args, **kwargs)

    return wrapper


def awaited(func):
    async def wrapper(*args, **kwargs):
        return func(*args, **kwargs)

    return wrapper


def clip(videos, texts):
    """A scorer with its own arguments, which the rewards below call."""
    return [float(video.mean()) * len(text) for video, text in zip(videos, texts)]


class Encoder(nn.Module):
    def forward(self, videos):
        return videos.mean((1, 2, 3, 4))


class OverEncoder(nn.Module):
    """A module that reads from **kwargs, over a network that takes videos."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, **kw):
        return [float(v) * len(p) for v, p in zip(self.encoder(kw["videos"]), kw["prompts"])]


class OverModel:
    def __init__(self, model):
        self.model = model

    def __call__(self, **kw):
        return self.model(kw["videos"], kw["caption"])


def over_clip(model):
    def reward(**kw):
        kw["log_metric"]("weighed", kw.get("weight", [1.0] * 2)[1])
        return model(kw["videos"], kw["caption"])

    return reward


class Methods:
    """Its method and its call are decorated."""

    @timed
    def score(self, prompts, videos):
        return two(prompts, videos)

    __call__ = score


class Decorated(nn.Module):
    @timed
    def forward(self, prompts, videos):
        return two(prompts, videos)


def by_position(prompts, videos, /, **columns):
    return videos.mean((1, 2, 3, 4))


def scaled(prompts, videos, scale):
    return scale * videos.mean((1, 2, 3, 4))


# --- what is called --------------------------------------------------------------------------------------------------


BROUGHT = {
    "async forward": Later(),
    "wrapped module": Wrapper(Scripted()),
    "wrapped async module": Wrapper(Later()),
    "decorated": timed(two),
    "decorated twice": timed(timed(two)),
    "decorated by a class": Timed(two),
    "decorated, async": awaited(two),
    "positional only": by_position,
    "positional only, decorated": timed(by_position),
    "partial": functools.partial(scaled, scale=1.0),
    "partial of decorated": functools.partial(timed(scaled), scale=1.0),
    "partial of a module": functools.partial(Scripted()),
    "bound method": Timed(two).__call__,
    "decorated method": Methods().score,
    "decorated call": Methods(),
    "decorated forward": Decorated(),
    "lambda": lambda prompts, videos: two(prompts, videos),
    "script": torch.jit.script(Scripted()),
    "compiled": torch.compile(Scripted(), backend="eager"),
    "compiled function": torch.compile(two, backend="eager"),
}


@pytest.mark.parametrize("reward", BROUGHT.values(), ids=BROUGHT)
def test_a_reward_gets_what_it_takes(reward):
    """A scorer of two arguments, however it is wrapped, is not given trainer_state, log_extra or the columns."""
    torch.testing.assert_close(ask(reward, color=["r", "b"]).values[:, 0], MEAN)


@pytest.mark.parametrize(
    "reward, name",
    [
        (OverEncoder(), "OverEncoder"),
        (OverModel(clip), "OverModel"),
        (over_clip(clip), "reward"),
        (over_clip(lambda videos, texts: clip(videos, texts)), "reward"),
    ],
    ids=["module", "object", "closure", "closure over a lambda"],
)
def test_a_reward_that_reads_from_kwargs(reward, name):
    """`def reward(**kw)` around a scorer was taken for the scorer: KeyError, or its default in a column's place."""
    assert reward_name(reward) == name
    table = ask(reward, caption=list(PROMPTS), weight=[1.0, 3.0])
    torch.testing.assert_close(table.values[:, 0], MEAN * torch.tensor([float(len(p)) for p in PROMPTS]))
    assert table.metrics == ({"weighed": [3.0]} if name == "reward" else {})


def wrapped_properly(func):
    return functools.wraps(func)(timed(func))


class Held:
    """A reward that holds weights and says all that a reward may say; its wrappers say otherwise."""

    compares_videos, differentiable, offload = True, True, None

    def __call__(self, prompts, videos):
        return two(prompts, videos)


@pytest.mark.parametrize("wrap", [timed, wrapped_properly, Timed, functools.partial, Wrapper])
def test_what_is_set_on_a_wrapper_counts(wrap):
    """`wrapper.compares_videos = True`, `partial.__name__ = "sharp"`: only the wrapped reward was read."""
    held = Scorer() if wrap is Wrapper else Held()
    if wrap is Wrapper:
        held.compares_videos, held.differentiable, held.offload = True, True, None
    reward = wrap(wrap(held))
    assert reward_name(reward) == type(held).__name__ and compares_videos(reward) and is_differentiable(reward)
    RewardPanel(reward).offload("meta")
    assert held.offload == "meta"
    held.offload = None
    reward.compares_videos = reward.differentiable = False
    reward.offload, reward.__name__ = "cpu", "sharp"
    assert RewardPanel(reward).names == ["sharp"] and not compares_videos(reward) and not is_differentiable(reward)
    RewardPanel(reward).offload("meta")
    assert reward.offload == "cpu" and held.offload is None  # the wrapper's word


def test_a_wrapper_is_put_into_evaluation_mode():
    """A wrapper with its own layers stayed in training mode, since only what it wraps was switched."""
    wrapper = Wrapper(Scripted())
    wrapper.dropout = nn.Dropout(0.5)
    RewardPanel([wrapper, wrapped_properly(scorer := Scorer())])
    assert not wrapper.dropout.training and not scorer.training


def test_a_module_is_put_into_evaluation_mode():
    """`reward_funcs=Scorer()`: dropout is off, batch statistics stay, the name is the class's."""
    scorer = Scorer()
    table = ask([scorer])
    torch.testing.assert_close(table.values[:, 0], MEAN / (1 + scorer.norm.eps) ** 0.5)
    assert not scorer.training and scorer.norm.num_batches_tracked == 0
    assert [reward_name(r) for r in (scorer, torch.compile(scorer), Wrapper(scorer), timed(two), Timed(two))] == [
        "Scorer",
        "Scorer",
        "Scorer",
        "two",
        "two",
    ]
    assert reward_name(torch.jit.script(Scripted())) == "Scripted"
    assert reward_name(wrapped_properly(lambda prompts: [0.0])) == "lambda"


def test_a_list_of_modules_is_several_rewards():
    """`reward_funcs=nn.ModuleList([...])`, which is itself a module and callable."""
    assert RewardPanel(nn.ModuleList([Scorer(), Scripted()])).names == ["Scorer", "Scripted"]


def test_a_type_error_inside_a_reward_is_not_hidden():
    """A wrapper's arguments are read before the call, so no call is made twice and no error is misread."""
    calls = []

    def broken(prompts, videos):
        calls.append(1)
        return None + 1

    with pytest.raises(RewardError, match="reward 'broken' raised TypeError: unsupported operand"):
        ask(timed(broken))
    assert calls == [1]


def test_the_error_for_a_wrapper_that_hides_its_arguments_names_the_fix():
    """It says that it takes anything by name, and passes it on to a function that does not."""

    def passes_on(prompts, videos, **kwargs):
        return two(prompts, videos, **kwargs)

    with pytest.raises(RewardError, match=r"unexpected keyword argument .* functools.wraps .* add \*\*columns"):
        ask(passes_on)


@pytest.mark.parametrize(
    "reward, message",
    [
        (Scorer, "reward Scorer is a class; pass an instance of it"),
        (nn.Module(), "has no forward"),
        (nn.ModuleDict({"a": Scorer()}), "is a ModuleDict; pass a list"),
        ({"a": two}, "is a dict; pass a list"),
        ([two, 3], "reward 3 is not callable"),
        (max, "does not say which arguments it takes"),
    ],
    ids=["class", "no-forward", "module-dict", "dict", "number", "builtin"],
)
def test_what_cannot_be_a_reward(reward, message):
    """Refused before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        RewardPanel(reward)


def test_names_that_collide_after_numbering():
    """Two lambdas become lambda_0 and lambda_1, and a third reward has that name already."""

    def third(prompts):
        return [0.0] * len(prompts)

    third.__name__ = "lambda_1"
    with pytest.raises(ValueError, match="logged under the same name"):
        RewardPanel([lambda prompts: [0.0], lambda prompts: [1.0], third])


# --- by name ---------------------------------------------------------------------------------------------------------


def test_names_work_as_on_the_command_line(tmp_path):
    """`reward_funcs="ot_quality"` said: reward 'o' is not callable."""
    (tmp_path / "mine.py").write_text("def score(prompts, videos):\n    return [7.0] * len(prompts)\n")
    assert RewardPanel("exposure").funcs == [exposure]
    panel = RewardPanel(["ot_quality", "shapemotion_reward", f"{tmp_path}/mine.py:score", two])
    assert panel.names == ["ot_quality", "shapemotion_reward", "score", "two"]
    with pytest.raises(ValueError, match="'ot_qualty' is unknown; did you mean 'ot_quality'.*Known: .*motion_amount"):
        RewardPanel(["ot_quality", "ot_qualty"])
    with pytest.raises(ValueError, match="'o' is unknown"):
        VideoGRPOTrainer("no-such-model", "o", None, prompts(8))


# --- names that collide ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompts", "videos", "trainer_state", "log_extra", "log_metric"])
def test_columns_that_would_never_reach_a_reward(column):
    """A dataset has a column `videos`; the reward was given the sampled ones, without a word."""
    data = prompts(8, **{column: ["x"] * 8})
    for kind in (VideoGRPOTrainer, RewardBackpropTrainer):
        with pytest.raises(ValueError, match=rf"train_dataset has columns \['{column}'\], but the trainer passes"):
            kind("no-such-model", two, None, data)
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\] has columns"):
        check_dataset("eval_dataset", {"a": data}, several=True)
    with pytest.raises(ValueError, match="rename"):
        ask(two, **{column: ["x"] * 2})


def recording(name, value=1.0, scalar=True):
    def reward(prompts, videos, log_extra, log_metric):
        if scalar:
            log_metric(name, value)
        else:
            log_extra(name, [value] * len(prompts))
        return [0.0] * len(prompts)

    return reward


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "reward",
        "rewards/x/mean",
        "loss",
        "kl",
        "seconds/rollout",
        "eval_reward",
        "epoch",
        "learning_rate",
        "grad_norm",
        "judges/x",
    ],
)
def test_a_reward_may_not_record_the_trainers_metrics(name, scalar):
    """log_metric("reward", ...) replaced the trainer's and drove load_best_model_at_end."""
    with pytest.raises(RewardError, match=f"reward 'reward' records '{name}', which is the name of a trainer metric"):
        check_recorded(ask(recording(name, scalar=scalar)))


def test_a_run_stops_at_the_first_call(tmp_path):
    """In training and in evaluation."""
    made = trainer(tmp_path / "a", recording("reward"), max_steps=1)
    with pytest.raises(RewardError, match="records 'reward'"):
        made.train()
    made = trainer(tmp_path / "b", recording("reward", scalar=False), eval_dataset=prompts(1), max_steps=1)
    with pytest.raises(RewardError, match="records 'reward'"):
        made.evaluate()


def test_every_metric_of_a_run_is_a_reserved_name(tmp_path):
    """What the trainers log tomorrow must not be a name that a reward may take."""
    made = trainer(tmp_path, [brightness, two], beta=0.1, max_steps=1)
    made.train()
    names = {name for row in made.state.log_history for name in row if not name.startswith(("train_", "eval_"))}
    assert {name.split("/")[0] for name in names} <= OWN_NAMES


def test_two_rewards_of_one_recorded_name():
    """The second's values replaced the first's; equal values under one name are not a collision."""

    def other(prompts, log_extra, log_metric):
        return recording("x", 2.0)(prompts, None, log_extra, log_metric)

    for first, second in ((recording("x"), other), (recording("x", scalar=False), other)):
        with pytest.raises(RewardError, match="rewards 'reward' and 'other' both record 'x', with different values"):
            ask([first, second])
    assert ask([recording("x", 2.0), other]).metrics == {"x": [2.0]}
    with pytest.raises(RewardError, match="'x' for each sample, and its mean is logged as 'x/mean'"):
        check_recorded(ask([recording("x", scalar=False), recording("x/mean")]))


def test_the_advice_for_a_collision_is_allowed():
    """For a function called `reward` it was 'reward/loss', whose first part is reserved, too."""

    def other(prompts, log_extra, log_metric):
        return recording("x", 2.0)(prompts, None, log_extra, log_metric)

    for first in ("loss", "rewards/x/mean", "eval_reward"):
        with pytest.raises(RewardError, match=f"for instance 'my_{first}'"):
            check_recorded(ask(recording(first)))
        check_recorded(ask(recording(f"my_{first}")))
    with pytest.raises(RewardError, match="for instance 'my_x'"):
        ask([recording("x"), other])


@pytest.mark.parametrize("scalar", [True, False])
def test_two_rewards_that_record_nan(scalar):
    """NaN under one name is the same value."""

    def other(prompts, log_extra, log_metric):
        return recording("x", float("nan"), scalar)(prompts, None, log_extra, log_metric)

    ask([recording("x", float("nan"), scalar), other])
    with pytest.raises(RewardError, match="different values"):
        ask([recording("x", 1.0, scalar), other])


def test_a_judge_of_the_same_recorded_name():
    """In an evaluation a judge's metrics replaced those of a reward."""

    def judge(prompts, log_metric):
        log_metric("x", 2.0)
        return [0.0] * len(prompts)

    def evaluated(judge):
        panels = RewardPanel(recording("x")), RewardPanel(judge)
        evaluator = Evaluator(None, *panels, torch.ones(1), [], None, None, None)
        return evaluator._score(list(PROMPTS), VIDEOS, {}, None)[1]

    with pytest.raises(RewardError, match="'reward' and 'judge' both record 'x'"):
        evaluated(judge)
    assert evaluated(recording("y")) == {"x": [1.0], "y": [1.0]}


def test_a_score_per_sample_may_be_called_row(tmp_path):
    """It replaced the row's index, by which the evaluation sorts."""
    made = trainer(tmp_path, recording("row", scalar=False), eval_dataset=prompts(2), max_steps=1)
    assert made.evaluate()["eval_row/mean"] == 1.0


# --- rewards that write into what they are given ---------------------------------------------------------------------


def in_place(prompts, videos):
    return videos.mul_(255).mean((1, 2, 3, 4))


def through_data(prompts, videos):
    videos.data[:, 0] = 0
    return [0.0] * len(prompts)


def through_numpy(prompts, videos):
    frames = videos.detach().numpy()
    frames[:] = frames[..., ::-1].copy()  # mirrored: the same pixels in another order
    return [0.0] * len(prompts)


async def in_place_later(prompts, videos):
    videos.clamp_(0.2, 0.8)
    return [0.0] * len(prompts)


@pytest.mark.parametrize("reward", [in_place, through_data, through_numpy, in_place_later], ids=lambda r: r.__name__)
def test_a_reward_that_writes_into_the_videos_is_named(reward):
    """The next reward saw 255 times the brightness, and the saved samples were white."""
    with pytest.raises(RewardError, match=f"reward .*'{reward.__name__}' wrote into `videos`"):
        ask([reward, two])
    beside = OverlappedRewards(RewardPanel(reward), torch.device("cpu"))
    with beside as rewards, pytest.raises(RewardError, match="wrote"):
        rewards.submit(list(PROMPTS), VIDEOS.clone(), {})
        rewards.table(list(PROMPTS), VIDEOS.clone(), {})


def test_writing_into_the_videos_under_a_gradient():
    """The same for rewards that are followed by their gradient."""

    def reward(prompts, videos):
        videos.data.mul_(255)
        return videos.mean((1, 2, 3, 4))

    reward.differentiable = True
    with pytest.raises(RewardError, match="wrote into `videos`"):
        RewardPanel(reward).with_gradients(list(PROMPTS), VIDEOS.clone(), {})


def test_no_copy_of_the_videos():
    """Every reward is given the same memory."""
    seen = []
    videos = VIDEOS.clone()
    keeps = [lambda prompts, videos: seen.append(videos.data_ptr()) or [0.0] * 2 for _ in range(3)]
    RewardPanel(keeps)(list(PROMPTS), videos, {})
    assert seen == [videos.data_ptr()] * 3


def test_a_reward_may_change_its_lists():
    """One that sorts the prompts or pops from a column changes nothing for the next."""

    def rude(prompts, videos, words, log_extra):
        prompts.sort()
        words[0].pop()
        del words[1]["a"]
        return [0.0, 0.0]

    def sees(prompts, videos, words):
        assert prompts == PROMPTS and words == [["x"], {"a": 1}]
        return [0.0, 0.0]

    ask([rude, sees, rude, sees], words=[["x"], {"a": 1}])


def test_a_column_of_nested_lists_costs_nothing():
    """A picture stored as lists of lists was copied pixel by pixel, for each reward and call."""
    picture = [[[0, 1, 2]] * 4] * 4
    seen = []
    ask(lambda prompts, pictures: seen.append(pictures) or [0.0, 0.0], pictures=[picture, picture])
    assert seen[0][0] is not picture and seen[0][0][1] is picture[1]


def test_a_reward_that_fails_while_an_async_one_runs():
    """The other was left with the warning "coroutine was never awaited"."""

    def broken(prompts):
        raise KeyError("x")

    async def later(prompts):
        await asyncio.sleep(0)
        return [0.0, 0.0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RewardError, match="'broken' raised KeyError"):
            ask([later, broken])
        gc.collect()
    assert not [str(w.message) for w in caught if "never awaited" in str(w.message)]
    assert ask([later, two]).values[:, 1].tolist() == MEAN.tolist()


# --- overlapping with the rollout ------------------------------------------------------------------------------------


def settings_of_a_call() -> tuple[list[dict], list]:
    """What each of two rewards sees, an async one among them, and the rewards."""
    seen = [{}, {}]

    def look(found: dict, prompts):
        found.update(
            autocast=torch.is_autocast_enabled("cpu"),
            device=torch.get_default_device().type,
            grad=torch.is_grad_enabled(),
            threads=torch.get_num_threads(),
            dtype=torch.get_default_dtype(),
            flash=torch.backends.cuda.flash_sdp_enabled(),
        )
        return [0.0] * len(prompts)

    def reward(prompts, videos):
        return look(seen[0], prompts)

    async def later(prompts, videos):
        return look(seen[1], prompts)

    return seen, [reward, later]


def test_a_reward_sees_the_same_settings_with_overlap():
    """A new thread lacks the default device and the autocast of the training thread."""
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        (alone, rewards), (beside, others) = settings_of_a_call(), settings_of_a_call()
        RewardPanel(rewards)(list(PROMPTS), VIDEOS, {})
        with OverlappedRewards(RewardPanel(others), torch.device("cpu")) as overlapped:
            overlapped.submit(list(PROMPTS), VIDEOS, {})
            overlapped.table(list(PROMPTS), VIDEOS, {})
    assert alone[0] == alone[1] == beside[0] == beside[1]
    assert alone[0]["autocast"] and alone[0]["device"] == "meta"


def test_exact_costs_change_no_setting_of_the_denoiser():
    """A cost in a reward's thread switched TF32 off for the thread that samples, now and then."""
    backend, x = torch.backends.mkldnn.matmul, torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    expected, before, seen, done = squared_cost(x, x), backend.fp32_precision, set(), threading.Event()
    try:
        backend.fp32_precision = "bf16"
        thread = threading.Thread(target=lambda: [squared_cost(x, x) for _ in range(300)] and done.set())
        thread.start()
        while not done.is_set():
            seen.add(backend.fp32_precision)
        thread.join()
        cost = squared_cost(x, x)
    finally:
        backend.fp32_precision = before
    assert seen == {"bf16"}
    torch.testing.assert_close(cost, expected, rtol=1e-5, atol=1e-4)


def test_the_attention_kernel_of_a_reward_is_the_same_with_and_without_overlap(tmp_path):
    """Beside the rollout it was the denoiser's, after it torch's choice."""

    def flash(prompts, videos, log_metric):
        log_metric("flash", float(torch.backends.cuda.flash_sdp_enabled()))
        return [0.0] * len(prompts)

    for overlap in (False, True):
        made = trainer(
            tmp_path / str(overlap),
            flash,
            max_steps=1,
            attention_kernel="math",
            rollout_batch_size=2,
            overlap_rewards=overlap,
        )
        made.train()
        assert logged(made, "flash") == [0.0]
