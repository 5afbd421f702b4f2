"""Rewards that overlap with the rollout: the same numbers and errors as one after the other, and real overlap."""

import asyncio
import threading
import time

import pytest
import tiny_runs
import torch
from tiny_runs import brightness, config, largest_difference, logged, prompts, redness, trainer, weights

from pisces_rl.ot import BankDivergence
from pisces_rl.policy import PolicyError
from pisces_rl.rewards import RewardError, RewardPanel, compares_videos, load_reward
from pisces_rl.rewards.encoders.load_encoder import shared_encoder
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.trainers.rollouts.overlap import OverlappedRewards

CPU = torch.device("cpu")
PROMPTS = [f"clip {i}" for i in range(7)]
VIDEOS = torch.rand(7, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NUMBERS = [float(i) for i in range(7)]
PARTS = [slice(0, 3), slice(3, 6), slice(6, 7)]


def numbered(prompts, videos, number, log_extra, log_metric, **columns):
    """Uses a column, records, and does not apply everywhere."""
    log_extra("seen", number)
    log_metric("largest", max(number))
    return [None if n == 2 else n + float(v.mean()) for n, v in zip(number, videos)]


class Order:
    """Which prompts each call was given."""

    def __init__(self, compares: bool = False):
        self.compares_videos, self.calls = compares, []
        self.__name__ = "all_together" if compares else "each"

    def __call__(self, prompts, videos, **columns):
        self.calls.append((list(prompts), videos.clone(), threading.current_thread() is threading.main_thread()))
        return (videos - videos.mean()).mean(dim=(1, 2, 3, 4))


def overlapped(panel: RewardPanel, **settings):
    with OverlappedRewards(panel, CPU, **settings) as rewards:
        for part in PARTS:
            rewards.submit(PROMPTS[part], VIDEOS[part], {"number": NUMBERS[part]})
        return rewards.table(PROMPTS, VIDEOS, {"number": NUMBERS})


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_parts_in_turn():
    panel = RewardPanel([numbered, brightness])
    table = overlapped(panel)
    parts = [panel(PROMPTS[p], VIDEOS[p], {"number": NUMBERS[p]}) for p in PARTS]
    assert torch.equal(table.values.nan_to_num(-1), torch.cat([part.values for part in parts]).nan_to_num(-1))
    assert table.values[:, 0].isnan().tolist() == [i == 2 for i in range(7)]
    assert table.extras == {"seen": NUMBERS} and table.metrics == {"largest": [2.0, 5.0, 6.0]}
    assert table.seconds.keys() == {"numbered", "brightness"}
    whole = panel(PROMPTS, VIDEOS, {"number": NUMBERS})  # neither reward looks at other videos
    assert torch.equal(table.values.nan_to_num(-1), whole.values.nan_to_num(-1)) and table.extras == whole.extras


def test_parts_come_in_order_and_who_compares_sees_all():
    """Also in the order of the columns, with a reward of each kind between."""
    each, all_together = Order(), Order(compares=True)
    table = overlapped(RewardPanel([brightness, all_together, each]))
    assert [call[0] for call in each.calls] == [PROMPTS[p] for p in PARTS]
    for (_, videos, in_main), part in zip(each.calls, PARTS):
        assert torch.equal(videos, VIDEOS[part]) and not in_main
    ((seen, videos, in_main),) = all_together.calls
    assert seen == PROMPTS and torch.equal(videos, VIDEOS) and in_main
    whole = RewardPanel([brightness, all_together])(PROMPTS, VIDEOS, {})
    assert torch.equal(table.values[:, :2], whole.values)
    assert table.seconds.keys() == {"brightness", "all_together", "each"}


def test_an_extra_that_a_part_lacks_is_none():
    def sometimes(prompts, videos, log_extra, **columns):
        if len(prompts) == 3:
            log_extra("rank", [1, 2, 3])
        return [0.0] * len(prompts)

    assert overlapped(RewardPanel(sometimes)).extras == {"rank": [1, 2, 3, 1, 2, 3, None]}


def test_async_rewards():
    async def remote(prompts, videos, **columns):
        await asyncio.sleep(0.01)
        return videos.mean(dim=(1, 2, 3, 4))

    panel = RewardPanel([remote, brightness])
    assert torch.equal(overlapped(panel).values, panel(PROMPTS, VIDEOS, {}).values)


def test_the_shipped_rewards_differ_by_rounding_at_most():
    """Their encoder has another batch size in parts."""
    panel = RewardPanel([load_reward("ot_quality"), load_reward("ot_semantic")])
    videos = torch.rand(32, 8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    names = [f"a {color} circle" for color in ("red", "blue", "green", "yellow")] * 8
    whole = panel(names, videos, {}).values
    for size in (16, 5):
        with OverlappedRewards(panel, CPU) as rewards:
            for start in range(0, 32, size):
                rewards.submit(names[start : start + size], videos[start : start + size], {})
            values = rewards.table(names, videos, {}).values
        torch.testing.assert_close(values, whole, rtol=1e-4, atol=1e-4)


def test_the_divergence_compares_videos():
    encoder = shared_encoder("tiny-vtm")
    bank = BankDivergence(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), blur=1.0)
    assert compares_videos(OTQualityReward(encoder, bank=bank, divergence_weight=1.0))
    assert not compares_videos(OTQualityReward(encoder)) and not compares_videos(brightness)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_names_its_reward_and_stops_the_rollout():
    def breaks(prompts, videos, **columns):
        if "clip 3" in prompts:
            raise ZeroDivisionError("no frames")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="reward 'breaks' raised ZeroDivisionError: no frames"):
        overlapped(RewardPanel([brightness, breaks]))
    rewards = OverlappedRewards(RewardPanel(breaks), CPU)
    with pytest.raises(RewardError, match="'breaks'"), rewards:  # before the rest of the rollout is sampled
        rewards.submit(PROMPTS[3:6], VIDEOS[3:6], {})
        for _ in range(500):
            time.sleep(0.01)
            rewards.submit(PROMPTS[:3], VIDEOS[:3], {})
    with rewards:  # the next rollout starts clean
        rewards.submit(PROMPTS[:3], VIDEOS[:3], {})
        assert rewards.table(PROMPTS[:3], VIDEOS[:3], {}).values.tolist() == [[0.0]] * 3


def test_an_error_of_the_sampler_is_raised_as_it_is():
    rewards = OverlappedRewards(RewardPanel(brightness), CPU)
    with pytest.raises(PolicyError, match="of the sampler"), rewards:
        rewards.submit(PROMPTS, VIDEOS, {})
        raise PolicyError("of the sampler")
    assert not rewards.thread.is_alive()


def test_an_error_in_a_run(tmp_path):
    def breaks(prompts, videos, trainer_state, **columns):
        return brightness(prompts, videos) if trainer_state.global_step < 1 else [float("nan")] * len(prompts)

    made = trainer(tmp_path, breaks, rollout_batch_size=2, overlap_rewards=True)
    with pytest.raises(RewardError, match="reward 'breaks' returned nan for sample 0"):
        made.train()
    assert made.state.global_step == 1


def test_an_interrupt_does_not_wait_for_a_reward(tmp_path):
    """Ctrl-C while the second part is sampled and the first one's reward hangs."""
    hanging, release = threading.Event(), threading.Event()

    def hangs(prompts, videos, **columns):
        hanging.set()
        release.wait(60)
        return brightness(prompts, videos)

    made = trainer(tmp_path, hangs, rollout_batch_size=2, overlap_rewards=True)

    def interrupt(*_):
        if hanging.wait(0.2):
            raise KeyboardInterrupt

    made.pipeline.transformer.register_forward_pre_hook(interrupt)
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert time.perf_counter() - begin < 30
    release.set()
    made.overlapped.thread.join(30)
    assert not made.overlapped.thread.is_alive() and made.overlapped.error is None


@pytest.mark.parametrize("size", [None, 4, 9])
def test_nothing_to_overlap(tmp_path, size):
    with pytest.raises(ValueError, match=f"rollout_batch_size={size} does not split .* of 4 videos"):
        config(tmp_path, overlap_rewards=True, rollout_batch_size=size)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same(tmp_path):
    """Equal up to the rounding of a mean over the pixels of three videos instead of eight."""
    data = prompts(3, number=[1.0, 2.0, 3.0])
    results = []
    for overlap in (False, True):
        made = trainer(
            tmp_path / str(overlap),
            [numbered, redness],
            data,
            alive=True,
            rollout_batch_size=3,
            per_device_train_batch_size=8,
            max_steps=3,
            overlap_rewards=overlap,
            trace_steps=3,
        )
        before = weights(made)
        made.train()
        results.append((weights(made), [logged(made, name) for name in ("reward", "reward_std", "loss", "seen/mean")]))
    assert largest_difference(before, results[0][0]) > 1e-3
    assert largest_difference(results[0][0], results[1][0]) < 1e-4
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)
    parts = made.timeline.parts()
    assert "beside/rewards/redness" in parts and "rewards/redness" not in parts


def test_scoring_and_sampling_meet(tmp_path):
    """A reward of the first part waits until the denoiser works on the next; without overlap it would wait forever."""
    calls, met = [], []

    def waits(prompts, videos, **columns):
        # calls of the first part: the thread may begin when the next part is sampled already
        seen = len(calls) if met else made.args.num_inference_steps
        if not len(met) % 2:
            limit = time.perf_counter() + 30
            while len(calls) == seen and time.perf_counter() < limit:
                time.sleep(0.001)
        met.append(len(calls) > seen)
        return brightness(prompts, videos)

    made = trainer(tmp_path, waits, rollout_batch_size=2, overlap_rewards=True, max_steps=1)
    made.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    made.train()
    assert len(met) == 2 and met[0]
    assert largest_difference(weights(made), weights(trainer(tmp_path / "new"))) > 0


def test_the_attention_kernel_does_not_come_and_go():
    """Torch keeps it for all threads: a reward must not have it only while the denoiser happens to run."""

    def flags(prompts, videos, log_extra, **columns):
        time.sleep(0.01)
        log_extra("flash", [float(torch.backends.cuda.flash_sdp_enabled())] * len(prompts))
        return [0.0] * len(prompts)

    assert torch.backends.cuda.flash_sdp_enabled()
    assert set(overlapped(RewardPanel(flags), attention="math").extras["flash"]) == {0.0}
    assert torch.backends.cuda.flash_sdp_enabled()
    assert set(overlapped(RewardPanel(flags)).extras["flash"]) == {1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_stream_waits_for_the_videos():
    device = torch.device("cuda")
    panel, streams = RewardPanel([tiny_runs.brightness, redness]), []

    def stream(prompts, videos, **columns):
        streams.append(torch.cuda.current_stream(device))
        return [0.0] * len(prompts)

    with OverlappedRewards(RewardPanel([*panel.funcs, stream]), device) as rewards:
        videos = torch.zeros(7, 5, 3, 16, 16, device=device)
        for part in PARTS:
            torch.cuda._sleep(100_000_000)
            videos[part] = VIDEOS[part].to(device)
            rewards.submit(PROMPTS[part], videos[part], {})
        values = rewards.table(PROMPTS, videos, {}).values
    torch.testing.assert_close(values[:, :2], panel(PROMPTS, videos, {}).values)
    assert len(streams) == 3 and torch.cuda.current_stream(device) not in streams
