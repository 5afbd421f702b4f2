"""Rewards over HTTP: the same numbers as in the process, to the bit; a failure is retried or ends the run."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from PIL import Image
from served_app import ServedApp, free_port, garbage, half, reset, stall, status
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
import tiny_runs
from tiny_runs import largest_difference, logged, trainer, weights

import pisces_rl
from pisces_rl import command
from pisces_rl.media import load_video, mp4_bytes
from pisces_rl.rewards import RemoteReward, RewardError, RewardPanel, load_reward, retrying_client
from pisces_rl.rewards.server import application, remote, wire
from pisces_rl.rewards.server.identity import columns_of, identity
from pisces_rl.rewards.server.scoring_queue import ScoringQueue, Stopping

PROMPTS = ["first", "second", "third"]
VIDEOS = torch.rand(3, 4, 3, 10, 7, generator=torch.Generator().manual_seed(0))
COLUMNS = {"number": [0, 1, 2], "note": [{"a": [1.5, None]}, "ö", True]}
TOKEN = "a-word"
PLACED = "placed, good?"
REWARDS = """
import time
from pathlib import Path

GO = Path(__file__).with_name("go")


def brightness(prompts, videos, **columns):
    return 1000 * (videos.double() - 0.5).mean(dim=(1, 2, 3, 4))


def recorded(prompts, videos, number, note, trainer_state, log_extra, log_metric):
    log_extra("note", note)
    log_extra("odd", [float("nan"), None, "x"][:len(prompts)])
    log_metric("largest", max(number))
    log_metric("step", trainer_state.global_step)
    return [None if n == 1 else float(video.mean()) + n for n, video in zip(number, videos)]


def nan(prompts):
    return [float("nan")] * len(prompts)


def waits(prompts):
    GO.with_name("begun").touch()
    while not GO.exists():
        time.sleep(0.01)
    return [1.0] * len(prompts)


class Placed:
    __name__, device = "placed, good?", None

    def to(self, device):
        self.device = device

    def __call__(self, prompts):
        return [float(self.device == "cpu")] * len(prompts)


placed = Placed()
"""


class Serving:
    """A real server in a separate process."""

    def __init__(self, folder: Path, *options: str, port: int = 0, token: str | None = TOKEN):
        self.file, self.folder = folder / "rewards_of_server.py", folder
        self.file.write_text(REWARDS, encoding="utf-8")
        names = [f"{self.file}:{name}" for name in ("brightness", "recorded", "nan", "waits", "placed")]
        if token is not None:
            (folder / "token").write_text(token + "\n", encoding="utf-8")
            options = (*options, "--token-file", str(folder / "token"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pisces_rl.command", "serve", "--port", str(port), "--rewards", *names, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        word, first, *_, self.last = self.process.stdout.readline().split()
        self.url = first.rsplit("/", 1)[0]
        assert word == "serving" and first.endswith("/brightness")

    def reward(self, name: str, **settings) -> RemoteReward:
        return RemoteReward(self.url, name, **{"token": TOKEN} | settings)

    def post(self, name: str, body: bytes, token: str = TOKEN) -> httpx2.Response:
        return httpx2.post(
            f"{self.url}/score/{name}",
            content=body,
            trust_env=False,
            timeout=60,
            headers={"Authorization": f"Bearer {token}"},
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    serving = Serving(tmp_path_factory.mktemp("served"), "--queue", "2", "--max_mb", "1")
    yield serving
    serving.end()


class Faulty(ServedApp):
    """A server in this process that does to each request what the next of its deeds says, and then answers well."""

    def __init__(self, *deeds, identity="1234", health=None, compares_videos=False, columns=None):
        self.deeds, self.requests, self.identity = list(deeds), [], identity
        about = {"identity": identity, "compares_videos": compares_videos, "columns": columns}
        self.about = {
            "protocol": wire.PROTOCOL,
            "version": "0",
            "state": "ready",
            "queue": 0,
            "max_bytes": 2**30,
            "rewards": {"bright": about},
        } | (health or {})
        super().__init__(Route("/health", self.health), Route("/score/bright", self.score, methods=["POST"]))

    async def health(self, request):
        self.authorization = request.headers.get("authorization")
        return JSONResponse(self.about)

    async def score(self, request):
        self.authorization = request.headers.get("authorization")
        asked = wire.unpack_request(await request.body())
        self.requests.append(asked)
        answer = {
            "protocol": wire.PROTOCOL,
            "reward": "bright",
            "identity": self.identity,
            "extras": {},
            "values": tiny_runs.brightness(asked.prompts, asked.videos).tolist(),
            "metrics": {},
        }
        deed = self.deeds.pop(0) if self.deeds else {}
        if isinstance(deed, dict):
            return Response(json.dumps(answer | deed), media_type="application/json")
        return await deed(self, json.dumps(answer))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retrying_client, "LONGEST_WAIT", 0.01)


def ask(reward, *others, columns=None, state=None):
    return RewardPanel([reward, *others])(PROMPTS, VIDEOS, columns or {}, state)


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_is_the_same_to_the_bit(server, tmp_path, overlap):
    settings = {"overlap_rewards": overlap, "rollout_batch_size": 2} if overlap else {}
    runs = []
    for name, reward in (("inside", tiny_runs.brightness), ("remote", server.reward("brightness"))):
        made = trainer(tmp_path / name, reward, alive=True, **settings)
        before = weights(made)
        made.train()
        runs.append((weights(made), [logged(made, key) for key in ("reward", "reward_std", "loss")]))
    assert largest_difference(before, runs[0][0]) > 1e-3
    assert largest_difference(runs[0][0], runs[1][0]) == 0 and runs[0][1] == runs[1][1]
    assert logged(made, "seconds/rewards/brightness")[0] > 0
    if not overlap:
        assert made.timeline.parts()["rewards/brightness"] > 0


def test_what_a_reward_records_and_does_not_apply_to(server):
    class State:
        global_step, max_steps, epoch = 7, 9, 0.5

    local = load_reward(f"{server.file}:recorded")
    there, here = (
        ask(reward, columns=COLUMNS | {"image": [object()] * 3}, state=State)
        for reward in (server.reward("recorded"), local)
    )
    assert torch.equal(there.values.nan_to_num(-1), here.values.nan_to_num(-1))
    assert there.values[:, 0].isnan().tolist() == [False, True, False] and repr(there.extras) == repr(here.extras)
    assert there.metrics == here.metrics == {"largest": [2.0], "step": [7.0]}
    assert there.recorded_by.keys() == here.recorded_by.keys() and there.seconds["recorded"] > 0


def test_rewards_work_on_the_servers_device_under_any_name(server, monkeypatch):
    monkeypatch.setenv(remote.TOKEN, TOKEN)
    panel = RewardPanel(server.last)  # as it was printed
    assert panel.names == [PLACED] and panel(PROMPTS, VIDEOS, {}).values.tolist() == [[1.0]] * 3


def test_uint8_frames_and_mp4(server, monkeypatch):
    body = wire.pack_request(wire.ScoreRequest(PROMPTS, (VIDEOS * 255).round().byte(), {}, None))
    values = wire.unpack_answer(
        server.post("brightness", body).content, "brightness", server.reward("brightness").identity, PROMPTS
    ).values
    assert values == tiny_runs.brightness(PROMPTS, (VIDEOS * 255).round().byte().float() / 255).float().tolist()
    with_mp4 = torch.stack([load_video(mp4_bytes(video, min_size=0))[..., :10, :7] for video in VIDEOS])
    monkeypatch.setenv(remote.TOKEN, TOKEN)
    table = ask(load_reward(f"{server.url}/brightness?frames=mp4"))
    assert torch.equal(table.values[:, 0], tiny_runs.brightness(PROMPTS, with_mp4).float())


def test_several_servers_get_parts_at_the_same_time():
    """Each part waits for the other to arrive."""
    arrived = []

    async def meet(faulty, answer):
        arrived.append(1)
        for _ in range(2000):
            if len(arrived) == 2:
                return Response(answer)
            await asyncio.sleep(0.01)
        raise TimeoutError

    with Faulty(meet) as a, Faulty(meet) as b:
        panel = RewardPanel(f"{a.url}/bright,{b.url}/bright?retries=1")
        assert panel.names == ["bright"]
        values = panel(PROMPTS, VIDEOS, {"x": [1, 2, 3]}).values[:, 0]
        assert torch.equal(values, tiny_runs.brightness(PROMPTS, VIDEOS).float())
        seen = [request.prompts for one in (a, b) for request in one.requests]
        assert seen == [PROMPTS[:1], PROMPTS[1:]] and b.requests[0].columns == {"x": [2, 3]}
        a.deeds, b.deeds = [status(503)], []  # the other one takes over
        assert torch.equal(panel(PROMPTS, VIDEOS, {}).values[:, 0], values)


@pytest.mark.parametrize("frames", wire.FRAMES)
def test_a_batch_over_the_limit_goes_in_several_requests(frames):
    values = []
    for limit, parts in ((2**30, [3]), (8000, [1, 2])):  # a video of 3360 bytes, and a head
        with Faulty(health={"max_bytes": limit}) as faulty:
            values.append(RewardPanel(RemoteReward(faulty.url, "bright", frames=frames))(PROMPTS, VIDEOS, {}).values)
            assert [len(request.prompts) for request in faulty.requests] == parts
    assert torch.equal(*values)
    with Faulty(health={"max_bytes": 3000}) as faulty, pytest.raises(RewardError, match="raise its --max_mb"):
        ask(RemoteReward(faulty.url, "bright"))
    with Faulty(health={"max_bytes": 8000}, compares_videos=True) as faulty, pytest.raises(RewardError, match="_mb"):
        ask(RemoteReward(faulty.url, "bright"))


def test_mp4_files_are_not_decoded_beyond_what_a_request_says():
    black = wire.ScoreRequest(["x"], torch.zeros(1, 30, 3, 64, 65), {}, None)
    packed = wire.pack_request(black, "mp4")
    assert len(packed) < 10_000 and torch.equal(wire.unpack_request(packed).videos, black.videos)
    with pytest.raises(wire.TooLarge, match="has 1497600 bytes, but this server accepts 1000000"):
        wire.unpack_request(packed, 1_000_000)
    for size, why in (
        (b"[2, 64, 65]", "frame 3 of 64 x 66; expected 2 frames"),
        (b"[30, 2, 65]", "frame 1 of 64 x 66"),
        (b"[99, 64, 65]", "30 frames of 64 x 66; expected 99"),
    ):
        with pytest.raises(ValueError, match=why):
            wire.unpack_request(packed.replace(b"[30, 64, 65]", size.ljust(12)), 1e9)


def test_who_compares_videos_gets_all():
    with Faulty(compares_videos=True) as a, Faulty(compares_videos=True) as b:
        reward = RemoteReward([a.url, b.url], "bright")
        ask(reward)
        ask(reward)
        assert reward.compares_videos and [len(one.requests[0].prompts) for one in (a, b)] == [3, 3]


# --- what may be tried again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "deed",
    [status(502), status(503), status(504), half, reset, stall],
    ids=["502", "503", "504", "half", "reset", "stall"],
)
def test_tried_again(deed):
    with Faulty(deed, *[] if deed is stall else [deed]) as faulty:
        table = ask(RemoteReward(faulty.url, "bright", retries=2, time_limit=2.0 if deed is stall else 60.0))
        assert len(faulty.requests) == 3 or deed is stall and len(faulty.requests) > 1
        assert torch.equal(table.values[:, 0], tiny_runs.brightness(PROMPTS, VIDEOS).float())


def test_retry_after_is_honoured():
    with Faulty(status(503, Retry_After="1")) as faulty:
        start = time.perf_counter()
        ask(RemoteReward(faulty.url, "bright"))
        assert time.perf_counter() - start >= 1


@pytest.mark.parametrize(
    "deed, why",
    [
        (status(503), "2 tries, the last: status 503: this is 503."),
        (half, "2 tries, the last: RemoteProtocolError"),
        (stall, "2 tries, the last: no answer within 0.5 s"),
    ],
    ids=["503", "half", "stall"],
)
def test_the_last_try_is_an_error(deed, why):
    with Faulty(deed, deed, deed) as faulty:
        reward = RemoteReward(faulty.url, "bright", retries=1, time_limit=0.5 if deed is stall else 60.0)
        with pytest.raises(RewardError, match=f"'bright' of {faulty.url} failed on rank 0 .* prompt 'first': {why}"):
            ask(reward)
        assert len(faulty.requests) == 2


@pytest.mark.parametrize("time_limit, why", [(0.4, "no answer within 0.4 s"), (60.0, "no answer yet")])
def test_a_reward_timeout_names_url_prompt_and_the_last_failure(time_limit, why):
    with Faulty(*[stall] * 9) as faulty:
        panel = RewardPanel(RemoteReward(faulty.url, "bright", time_limit=time_limit), timeout=1.5)
        with pytest.raises(
            RewardError,
            match=rf"'bright' did not return within 1.5 s \(reward_timeout\).* It asked "
            f"for 3 videos, .* 'first'; .* last failure: {faulty.url}: {why}",
        ):
            panel(PROMPTS, VIDEOS, {})


def test_a_login_in_a_url_is_sent_and_not_shown():
    async def refuse(faulty, answer):
        return JSONResponse({"error": f"hunter@2 and {faulty.authorization} are wrong."}, 401)

    with Faulty({}, refuse) as faulty:
        reward = load_reward(faulty.url.replace("//", "//me:hunter%402@") + "/bright")
        ask(reward)
        sent = faulty.authorization
        assert sent == "Basic " + base64.b64encode(b"me:hunter@2").decode()
        with pytest.raises(RewardError, match=f"of {faulty.url} failed .* status 401") as error:
            ask(reward)
        assert "hunter" not in str(error.value) and sent[6:] not in str(error.value)
    for name in (
        f"http://me:hunter2@127.0.0.1:{free_port()}/bright",
        "http://me:hunter2@a/b?colour=1",
        "http://me:hunter2@a/b,http://a/c",
        "vlm+http://me:hunter2@127.0.0.1:9/v1?model=a",
        "vlm+http://me:hunter2@127.0.0.1:9/v1",
        "vlm+http://me:hunter2@127.0.0.1:9/v1?fps=x",
    ):
        with pytest.raises(ValueError) as error:
            load_reward(name)
        assert "hunter2" not in str(error.value)


def test_a_dead_server_is_an_error():
    with Faulty() as faulty:
        reward = RemoteReward(faulty.url, "bright", retries=1)
        ask(reward)
    with pytest.raises(RewardError, match="2 tries, the last: ConnectError"):
        ask(reward)


# --- what may not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "deed, why",
    [
        (status(500), "status 500: this is 500."),
        (status(400), "status 400"),
        (status(401), "status 401"),
        (status(404), "status 404"),
        (status(413), "status 413"),
        (garbage, "not JSON of a reward server"),
        ({"values": [1.0]}, "1 values for 3 videos"),
        ({"values": None}, "None values"),
        ({"values": [1.0, float("nan"), 1.0]}, "nan for video 1, prompt 'second'"),
        ({"values": [1.0, 1.0, float("inf")]}, "inf for video 2"),
        ({"values": [1.0, "2", 1.0]}, "'2' for video 1"),
        ({"values": [True, 1.0, 1.0]}, "True for video 0"),
        ({"protocol": 2}, "version 2 of the protocol, this client 1"),
        ({"reward": "dark"}, "is from reward 'dark'"),
        ({"identity": "5678"}, "weights have changed"),
        ({"extras": {"x": [1]}}, "extras are not lists of 3"),
        ({"metrics": {"x": "1"}}, "metrics are not lists"),
    ],
)
def test_an_error_fails_without_a_retry(deed, why):
    with Faulty(deed) as faulty, pytest.raises(RewardError, match="'bright' of .* prompt 'first': .*" + why):
        ask(RemoteReward(faulty.url, "bright"))
    assert len(faulty.requests) == 1


def test_a_busy_server_is_retried_until_the_time_limit():
    """Its Retry-After shows that it is alive: such tries do not count as `retries`; `time_limit` ends them."""
    busy = status(503, Retry_After="0")
    with Faulty(*[busy] * 3) as faulty:
        ask(RemoteReward(faulty.url, "bright", retries=0))
        assert len(faulty.requests) == 4
    busy = status(503, Retry_After="9")
    with Faulty(*[busy] * 9) as faulty, pytest.raises(RewardError, match="2 tries, the last: status 503"):
        ask(RemoteReward(faulty.url, "bright", retries=0, time_limit=0.5))


def test_processes_begin_at_different_servers(monkeypatch):
    with Faulty() as a, Faulty() as b:
        monkeypatch.setenv("RANK", "1")
        RewardPanel(RemoteReward([a.url, b.url], "bright"))(PROMPTS[:1], VIDEOS[:1], {})
        assert not a.requests and len(b.requests) == 1


def test_a_run_ends_with_the_weights_of_its_last_step(tmp_path):
    with Faulty({}, status(500)) as faulty:
        made = trainer(tmp_path / "a", RemoteReward(faulty.url, "bright"), alive=True)
        with pytest.raises(RewardError, match="status 500"):
            made.train()
    inside = trainer(tmp_path / "b", tiny_runs.brightness, alive=True, max_steps=1)
    inside.train()
    assert made.state.global_step == 1 and largest_difference(weights(made), weights(inside)) == 0


def test_a_server_with_other_weights_is_reported_on_resume(tmp_path, capsys):
    with Faulty() as faulty:
        trainer(tmp_path, RemoteReward(faulty.url, "bright"), max_steps=1, save_strategy="steps", save_steps=1).train()
    capsys.readouterr()
    for weights_of, told in (("1234", False), ("5678", True)):
        with Faulty(identity=weights_of) as faulty:
            made = trainer(tmp_path, RemoteReward(faulty.url, "bright"), max_steps=2)
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        said = " ".join(capsys.readouterr().out.split())
        change = "remote reward 'bright' 1234 until step 1, then 5678"
        assert (change in said) == told and (change in str(made._identity["changes"])) == told


def test_what_json_does_not_carry_is_an_error_where_a_reward_names_it():
    columns = {"image": [Image.new("RGB", (2, 2))] * 3, "size": [(1, 2)] * 3, "number": [1, 2, 3]}
    with Faulty() as faulty:  # takes **columns
        ask(RemoteReward(faulty.url, "bright"), columns=columns)
        assert faulty.requests[0].columns == {"number": [1, 2, 3]}
    with Faulty(columns=["image"]) as faulty, pytest.raises(RewardError, match="column 'image', which the reward nam"):
        ask(RemoteReward(faulty.url, "bright"), columns=columns)
    assert not faulty.requests


# --- before a run ----------------------------------------------------------------------------------------------------


def test_a_wrong_url_name_or_token(server):
    port = free_port()
    for make, why in (
        (lambda: load_reward(f"http://127.0.0.1:{port}/bright"), "no server answers at .*`pisces-rl serve`"),
        (lambda: server.reward("brightnes"), "did you mean 'brightness'"),
        (lambda: server.reward("brightness", token="another"), "refuses the token"),
        (lambda: load_reward(f"{server.url}/a,{server.url}/b"), "with one NAME"),
        (lambda: load_reward(f"{server.url}/a?colour=1"), "unknown setting 'colour'"),
        (lambda: load_reward("http://h:1/a?time_limit=5m"), "reward 'http://h:1/a.*: time_limit='5m' cannot be read"),
        (lambda: RemoteReward("gpu7:8000", "a"), "expected http://host:port"),
        (lambda: server.reward("brightness", frames="gif"), "frames='gif' must be one of"),
        (lambda: server.reward("brightness", retries=-1), "retries=-1"),
        (lambda: server.reward("brightness", time_limit=0), "time_limit=0"),
    ):
        with pytest.raises(ValueError, match=why):
            make()


def test_other_servers():
    with (
        Faulty(health={"protocol": 9, "version": "7.0"}) as other,
        pytest.raises(
            ValueError,
            match=(
                "pisces_rl 7.0, speaks version 9 of the protocol, "
                rf"this pisces_rl {pisces_rl.__version__} {wire.PROTOCOL}"
            ),
        ),
    ):
        RemoteReward(other.url, "bright")
    with Faulty() as a, Faulty(identity="5678") as b, pytest.raises(ValueError, match="serve different rewards"):
        RemoteReward([a.url, b.url], "bright")
    with Faulty(health={"rewards": None}) as other, pytest.raises(ValueError, match="is not a reward server"):
        RemoteReward(other.url, "bright")


# --- the server ------------------------------------------------------------------------------------------------------


def body(count: int = 1, size: int = 8) -> bytes:
    return wire.pack_request(wire.ScoreRequest(["x"] * count, torch.zeros(count, 1, 3, size, size), {}, None))


def test_what_a_server_refuses(server):
    for name, data, token, code, why in (
        ("brightness", body(), "another", 401, "token is missing or wrong"),
        ("dark", body(), TOKEN, 404, "available: bri"),
        ("brightness", body(size=512), TOKEN, 413, "raise its --max_mb"),
        ("brightness", b"x", TOKEN, 400, "not a safetensors"),
        ("brightness", wire.save({"request": torch.zeros(3)}), TOKEN, 400, "not a safetensors file with a JSON"),
        ("brightness", body().replace(b'"protocol": 1', b'"protocol": 9'), TOKEN, 400, "client speaks version 9"),
        ("brightness", body().replace(b'"x"', b"123"), TOKEN, 400, "expected a list of strings"),
        ("nan", body(), TOKEN, 500, "returned nan for sample 0"),
        ("recorded", body(), TOKEN, 500, "missing 2 required"),
    ):
        response = server.post(name, data, token)
        assert response.status_code == code and why in response.json()["error"], (name, code, response.text)
    with pytest.raises(RewardError, match="raise its --max_mb"):
        RewardPanel(server.reward("brightness"))(["x"], torch.zeros(1, 1, 3, 512, 512), {})
    health = httpx2.get(f"{server.url}/health", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).json()
    assert health["state"] == "ready" and health["queue"] == 0 <= health["scored"]
    assert health["version"] == pisces_rl.__version__
    assert list(health["rewards"]) == ["brightness", "recorded", "nan", "waits", PLACED]


def test_identity_and_columns():
    def made(scale):
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(layer.weight, scale)
        torch.nn.init.zeros_(layer.bias)

        def reward(prompts, videos, colour):
            return layer(videos)

        return reward

    assert identity(made(1.0)) == identity(made(1.0)) != identity(made(2.0))
    assert columns_of(made(1.0)) == ["colour"] and columns_of(tiny_runs.brightness) is None


def test_requests_that_wait_together_are_scored_together():
    calls, begun, go = [], threading.Event(), threading.Event()

    def reward(prompts, number, log_extra):
        calls.append(list(prompts))
        begun.set()
        assert go.wait(20)
        if "bad" in prompts:
            raise ValueError("a bad one")
        log_extra("seen", number)
        return [float(n) for n in number]

    def request(*names, size=4):
        return wire.ScoreRequest(
            list(names), torch.zeros(len(names), 1, 3, size, size), {"number": list(range(len(names)))}, None
        )

    queue, panel = ScoringQueue(4), RewardPanel(reward)
    first = queue.put(panel, request("a"))
    assert begun.wait(20)
    b, c, other, d, bad, gone = (
        queue.put(panel, request(*names, size=size))
        for names, size in ((("b",), 4), (("c", "c"), 4), (("big",), 8), (("d",), 4), (("bad",), 4), (("gone",), 4))
    )
    gone.cancel()
    go.set()
    assert [f.result(20).values for f in (first, b, c, other, d)] == [[0.0], [0.0], [0.0, 1.0], [0.0], [0.0]]
    assert c.result().extras == {"seen": [0, 1]}
    with pytest.raises(RewardError, match="a bad one"):
        bad.result(20)
    assert calls == [["a"], ["b", "c", "c", "d"], ["big"], ["bad"]]
    begun.clear(), go.clear()
    together = RewardPanel(reward)
    running = queue.put(together, request("a"))
    assert begun.wait(20)
    good, bad = queue.put(together, request("b")), queue.put(together, request("bad"))
    go.set()
    assert running.result(20).values == good.result(20).values == [0.0]  # scored again without the bad one
    with pytest.raises(RewardError, match="a bad one"):
        bad.result(20)
    queue.stop()
    with pytest.raises(Stopping):
        queue.put(panel, request("late")).result(20)
    queue.thread.join(20)
    assert not queue.thread.is_alive()


@pytest.mark.parametrize("name", ["brightness", "unknown"])
def test_an_upload_that_stops_frees_its_place(monkeypatch, name):
    """A client whose network is cut says nothing more."""
    monkeypatch.setattr(application, "LONGEST_PAUSE", 0.1)
    queue = ScoringQueue(4)
    panel = RewardPanel(tiny_runs.brightness)
    served = application.RewardApplication(panel, queue, limit=1, max_bytes=100, token=None)
    parts, sent = [{"type": "http.request", "body": b"half", "more_body": True}], []

    async def receive():
        return parts.pop() if parts else await asyncio.sleep(20)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/score/{name}", "headers": [], "query_string": b""}
    asyncio.run(served.asgi(scope, receive, send))
    assert sent[0]["status"] == 499 and served.inside == 0
    queue.stop()


def test_progress_is_reported(monkeypatch, capsys):
    queue, now = ScoringQueue(4), [1000.0]
    monkeypatch.setattr(application, "time", SimpleNamespace(monotonic=lambda: now[0]))
    served = application.RewardApplication(
        RewardPanel(tiny_runs.brightness), queue, limit=1, max_bytes=10**6, token=None
    )
    scope = {"type": "http", "method": "POST", "path": "/score/brightness", "headers": [], "query_string": b""}

    def post(count):
        parts = [{"type": "http.request", "body": body(count)}]

        async def receive():
            return parts.pop() if parts else await asyncio.sleep(60)

        async def send(message):
            pass

        asyncio.run(served.asgi(scope, receive, send))

    for pause, count in ((0, 2), (20, 4), (20, 2), (20, 1), (100, 1), (20, 1), (20, 4)):
        now[0] += pause
        post(count)
    assert capsys.readouterr().err.splitlines() == [
        "8 videos scored, 0.2 per second; requests in the server: 1",
        "15 videos scored, 0.15 per second; requests in the server: 1",
    ]
    assert served.scored == 15
    queue.stop()


@pytest.mark.parametrize(
    "options, why",
    [
        (["--host", "0.0.0.0"], "pass a --token_file"),
        (["--token_file", "nowhere"], "cannot be read"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(options, why):
    with pytest.raises(SystemExit, match=why):
        command.main(["serve", "--rewards", "no_such_module:reward", *options])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"needs starlette and uvicorn: pip install 'pisces_rl\[server\]'"):
        command.main(["serve", "--rewards", "no_such_module:reward"])


def test_a_reward_without_its_package_and_a_name_with_a_slash(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(SystemExit, match=r"serve: reward 'ocr' reads text .* pip install 'pisces_rl\[ocr\]'"):
        command.main(["serve", "--rewards", "ocr"])
    (tmp_path / "slashed.py").write_text("def reward(prompts): ...\n\nreward.__name__ = 'a/b'\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="serve: reward 'a/b': the name of a served reward .* may not contain '/'"):
        command.main(["serve", "--rewards", f"{tmp_path / 'slashed.py'}:reward"])


def test_a_full_queue_and_a_signal(server):
    """The last one: it stops the server."""
    answers = {}
    threads = [threading.Thread(target=lambda k=k: answers.update({k: server.post("waits", body(k))})) for k in (1, 2)]
    threads[0].start()
    until(lambda: (server.folder / "begun").exists())
    threads[1].start()
    until(
        lambda: (
            httpx2.get(f"{server.url}/health", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).json()[
                "queue"
            ]
            == 2
        )
    )
    full = server.post("brightness", body())
    assert full.status_code == 503 and full.headers["retry-after"] == "1" and "queue of 2" in full.json()["error"]
    server.process.send_signal(signal.SIGTERM)
    threads[1].join(20)  # has not been begun with
    assert answers[2].status_code == 503 and "stopping" in answers[2].json()["error"] and server.process.poll() is None
    (server.folder / "go").touch()
    threads[0].join(20)
    assert answers[1].status_code == 200 and answers[1].json()["values"] == [1.0]
    assert server.process.wait(20) == 0


def until(condition) -> None:
    limit = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < limit
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(tmp_path):
    """In the middle of a run; its weights equal those of a run without the interruption."""
    first = Serving(tmp_path, token=None)
    port = int(first.url.rsplit(":", 1)[1])
    started = []

    class Kill(tiny_runs.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                first.end()
                threading.Thread(target=lambda: started.append(Serving(tmp_path, port=port, token=None))).start()

    made = trainer(
        tmp_path / "a", f"{first.url}/brightness?retries=100000", alive=True, max_steps=3, callbacks=[Kill()]
    )
    made.train()
    inside = trainer(tmp_path / "b", tiny_runs.brightness, alive=True, max_steps=3)
    inside.train()
    assert largest_difference(weights(made), weights(inside)) == 0
    with contextlib.closing(started[0].process.stdout):
        started[0].process.send_signal(signal.SIGINT)
        assert started[0].process.wait(20) == 0
