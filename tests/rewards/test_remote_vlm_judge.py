"""A vision-language judge over HTTP: against `transformers serve`, which gives no log-probabilities, and against an
app of the same protocol that computes them with the same tiny model."""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import torch
from PIL import Image
from served_app import ServedApp, free_port, garbage, half, reset, stall, status
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tiny_llava import WORDS, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
import tiny_runs

from pisces_rl.media import load_video, mp4_bytes
from pisces_rl.rewards import RemoteVLMJudge, RewardError, RewardPanel, load_reward, remote_vlm_judge, retrying_client
from pisces_rl.rewards.vlm_judge import PROMPT, VLMJudge, spread_frames, to_image

PROMPTS = ["a red circle", "a blue square", "a red red red circle square"]
VIDEOS = torch.rand(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DIGITS = [WORDS.index(digit) for digit in "12345"]
MODEL, LANGUAGE_MODEL, KEY = "tests/tiny-llava", "tests/tiny-llama", "sk-a-word"


@pytest.fixture(scope="module")
def local():
    """The local judge. Its model prefers digits, and ends an answer with one."""
    model, processor = tiny_llava()
    model.lm_head.weight.data[DIGITS] *= 20
    model.generation_config.eos_token_id = DIGITS
    return VLMJudge(model, processor, frames=4)


def inputs(judge, images, text):
    """Of the judge's model, as `transformers serve` makes them."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    text = judge.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return judge.processor(text=text, images=images or None, return_tensors="pt")


class Endpoint(ServedApp):
    """The protocol with log-probabilities of a judge's model, and faults like those of `served_app`."""

    def __init__(self, judge, key=None, sees=True, wait=0.0):
        self.judge, self.key, self.sees, self.wait = judge, key, sees, wait
        self.deeds, self.requests, self.times, self.inside, self.most = [], [], [], 0, 0
        super().__init__(Route("/v1/models", self.list), Route("/v1/chat/completions", self.chat, methods=["POST"]))
        self.url += "/v1"

    def refused(self, request):
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            message = f"Incorrect API key provided: {request.headers.get('authorization')}."
            return JSONResponse({"error": {"message": message, "code": 401}}, 401)

    async def list(self, request):
        return self.refused(request) or JSONResponse({"object": "list", "data": [{"id": MODEL}]})

    async def chat(self, request):
        if refused := self.refused(request):
            return refused
        self.times.append(time.monotonic())
        asked = json.loads(await request.body())
        self.requests.append(asked)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(self.wait)
            answer = self.answer(asked)
            deed = self.deeds.pop(0) if self.deeds else None
            if deed is None or isinstance(deed, dict):
                answer["choices"][0] |= deed or {}
                return Response(json.dumps(answer), media_type="application/json")
            return await deed(self, json.dumps(answer))
        finally:
            self.inside -= 1

    @torch.no_grad()
    def answer(self, asked):
        *parts, text = asked["messages"][0]["content"]
        given = inputs(self.judge, self.images(parts) if self.sees else [], text["text"])
        log_probs = self.judge.model(**given).logits[0, -1].float().log_softmax(-1)
        top = log_probs.topk(min(asked.get("top_logprobs") or 1, len(WORDS)))
        listed = [{"token": WORDS[i], "logprob": log} for i, log in zip(top.indices.tolist(), top.values.tolist())]
        choice = {"index": 0, "message": {"role": "assistant", "content": listed[0]["token"]}}
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": [listed[0] | {"top_logprobs": listed}]}
        return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": given.input_ids.shape[1]}}

    def images(self, parts):
        images = []
        for part in parts:
            kind, _, data = part[part["type"]]["url"].partition(";base64,")
            data = base64.b64decode(data)
            if kind == "data:video/mp4":
                images += [to_image(frame) for frame in (load_video(data) * 255).round().byte()]
            else:
                images.append(Image.open(io.BytesIO(data)))
        return images

    def reward(self, **settings):
        reward = RemoteVLMJudge(self.url, MODEL, **{"frames": 4} | settings)
        self.requests.clear(), self.times.clear()
        self.most = 0
        return reward


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retrying_client, "LONGEST_WAIT", 0.01)
    monkeypatch.delenv(remote_vlm_judge.KEY, raising=False)


def ask(*rewards, prompts=PROMPTS, videos=VIDEOS):
    return RewardPanel(list(rewards))(prompts, videos, {})


def close(values, expected):
    values, expected = torch.as_tensor(values, dtype=torch.float32), torch.as_tensor(expected)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


# --- the same scores as the local judge ------------------------------------------------------------------------------


def test_scores_are_those_of_the_local_judge(local):
    expected = local(PROMPTS, VIDEOS)
    assert len(set(expected)) == 3 and max(expected) - min(expected) > 1e-3
    with Endpoint(local) as endpoint:
        table = ask(endpoint.reward())
        close(table.values[:, 0], expected)
        close(table.extras["vlm_judge_video_alignment"], expected)
        assert table.metrics["vlm_judge_logprobs"] == [1.0]
        assert [len(one["messages"][0]["content"]) for one in endpoint.requests] == [5, 5, 5]
        close(ask(f"vlm+{endpoint.url}?model={MODEL}&frames=4").values[:, 0], expected)


def test_what_is_sent(local):
    """JPEG as PIL writes it at that quality, mp4 as `mp4_bytes` writes it; a short video sends all its frames."""
    with Endpoint(local) as endpoint:
        frames = spread_frames(VIDEOS, 4)
        clips = [load_video(mp4_bytes(clip.float() / 255, 8, min_size=0)) for clip in frames]
        close(ask(endpoint.reward(send="mp4")).values[:, 0], local(PROMPTS, torch.stack(clips)))
        parts = [[part["type"] for part in one["messages"][0]["content"]] for one in endpoint.requests]
        assert parts == [["video_url", "text"]] * 3
        lossy = ask(endpoint.reward(send="jpeg", quality=10)).values[:, 0]
        assert all(
            part["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
            for one in endpoint.requests
            for part in one["messages"][0]["content"][:-1]
        )
        assert 0 < (lossy - torch.tensor(local(PROMPTS, VIDEOS))).abs().max() < 0.2
        close(ask(endpoint.reward(frames=99), videos=VIDEOS[:, :3]).values[:, 0], local(PROMPTS, VIDEOS[:, :3]))


def test_several_questions(local, tmp_path):
    files = [tmp_path / f"{name}.txt" for name in ("blue", "round")]
    for file, word in zip(files, ("blue", "circle circle circle")):
        file.write_text(f"{word} {{prompt}}", encoding="utf-8")
    blue, round_ = (
        torch.tensor(VLMJudge(local.model, local.processor, question=file, frames=4)(PROMPTS, VIDEOS))
        for file in files
    )
    assert (blue - round_).abs().min() > 1e-4
    with Endpoint(local) as endpoint:
        table = ask(endpoint.reward(question=files, name="mllm"))
        close(table.values[:, 0], (blue + round_) / 2)
        close(table.extras["mllm_blue"], blue), close(table.extras["mllm_round"], round_)
        name = f"vlm+{endpoint.url}?model={MODEL}&frames=4&question={files[0]}&question={files[1]}&weights=1,3"
        close(ask(name).values[:, 0], (blue + 3 * round_) / 4)


def test_two_judges_of_one_name_and_question(local):
    with Endpoint(local) as endpoint:
        table = ask(endpoint.reward(), endpoint.reward(frames=1))
    names = ["vlm_judge_0_video_alignment", "vlm_judge_1_video_alignment"]
    assert sorted(table.extras) == names and list(table.metrics) == ["vlm_judge_0_logprobs", "vlm_judge_1_logprobs"]
    close(table.values, torch.tensor([table.extras[name] for name in names]).T)
    assert (table.values[:, 0] - table.values[:, 1]).abs().min() > 1e-6


def test_extra_fields_and_the_key_are_sent(local, monkeypatch):
    with Endpoint(local, key=KEY) as endpoint:
        ask(endpoint.reward(api_key=KEY, extra_body={"seed": 3}))
        assert [(one["seed"], one["temperature"], one["max_tokens"]) for one in endpoint.requests] == [(3, 0, 1)] * 3
        monkeypatch.setenv(remote_vlm_judge.KEY, f"{KEY}\n")
        ask(endpoint.reward())


def test_it_runs_together_with_synchronous_rewards(local):
    with Endpoint(local) as endpoint:

        def waits(prompts):
            limit = time.monotonic() + 20
            while len(endpoint.requests) < 3:
                assert time.monotonic() < limit
                time.sleep(0.01)
            return [0.0] * len(prompts)

        assert ask(waits, endpoint.reward()).values.isfinite().all()


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_that_of_the_local_judge(local, tmp_path, overlap):
    settings = {"overlap_rewards": overlap, "rollout_batch_size": 2} if overlap else {}
    with Endpoint(local) as endpoint:
        runs = [
            tiny_runs.trainer(tmp_path / name, reward, alive=True, **settings)
            for name, reward in (("remote", endpoint.reward()), ("inside", local))
        ]
        for made in runs:
            made.train()
    remote, inside = (tiny_runs.logged(made, "reward") for made in runs)
    assert len(remote) > 1 and remote == pytest.approx(inside, abs=1e-5)
    assert tiny_runs.logged(runs[0], "seconds/rewards/vlm_judge")[0] > 0


# --- the digit in a text ---------------------------------------------------------------------------------------------


def test_a_digit_in_a_text(local):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward(logprobs=False, retries=1)
        for text in ("4", " 4\n", "**4**", "Score: 4", "Rating is 4.", "4/5", "4 out of 5", "4: one thing", "4\n\nIt"):
            endpoint.deeds = [{"message": {"content": text}}]
            table = ask(reward, prompts=PROMPTS[:1], videos=VIDEOS[:1])
            assert table.values.item() == 0.75 and table.metrics["vlm_judge_logprobs"] == [0.0], text
        for text in ("4/10", "4.5", "45", "3 objects are", "3-year-old", "7", "good", "", None, "From 1 to 5: 4"):
            endpoint.deeds = [{"message": {"content": text}}] * 2
            why = f"2 tries, the last: the answer {text!r} is not one of"
            with pytest.raises(RewardError, match=re.escape(why)):
                ask(reward, prompts=PROMPTS[:1], videos=VIDEOS[:1])


def logprobs(*pairs):
    top = [{"token": token, "logprob": log} for token, log in pairs]
    return {"logprobs": {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": top}]}}


def test_tokens_with_space_count_and_others_do_not(local):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward()
        others = ("40", -0.1), ("٤", -0.1), ("1", -9999.0)
        endpoint.deeds = [logprobs(("4", -1.0), ("\u25812", -1.0), (" 2", -2.0), *others)]
        a, b = torch.tensor([-1.0, -2.0]).exp()
        expected = ((4 * a + 2 * (a + b)) / (2 * a + b) - 1) / 4
        close(ask(reward, prompts=PROMPTS[:1], videos=VIDEOS[:1]).values[0], expected[None])


# --- what may be tried again, and what not ---------------------------------------------------------------------------

no_digit = logprobs(("yes", -0.1), ("no", -3.0))


@pytest.mark.parametrize(
    "deed",
    [status(429), status(500), half, reset, stall, no_digit],
    ids=["429", "500", "half", "reset", "stall", "no_digit"],
)
def test_tried_again(local, deed):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward(retries=2, time_limit=1.0 if deed is stall else 60.0)
        endpoint.deeds = [deed]
        close(ask(reward).values[:, 0], local(PROMPTS, VIDEOS))
        assert len(endpoint.requests) > 3 and not endpoint.deeds


@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_retry_after_is_honoured(local, retry_after):
    with Endpoint(local) as endpoint:
        reward, start = endpoint.reward(), time.time()
        if retry_after == "date":
            retry_after = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(start + 2))
        endpoint.deeds = [status(429, Retry_After=retry_after)]
        ask(reward)
        assert time.time() - start > 0.99


@pytest.mark.parametrize(
    "deed, why",
    [
        (status(429), "2 tries, the last: status 429: this is 429."),
        (status(400), "status 400: this is 400."),
        (half, "2 tries, the last: RemoteProtocolError"),
        (stall, "2 tries, the last: no answer within 0.5 s .time_limit"),
        (garbage, "the answer is not a chat completion .*<html>"),
        ({"message": None}, "the answer is not a chat completion"),
        ({"logprobs": None}, "the answer contains no log-probabilities"),
        (logprobs(("1", None)), "the answer contains no log-probabilities"),
        (logprobs(("4", float("nan"))), "the answer gives nan as the log-probability of '4'"),
        (logprobs(("4", 1.0)), "the answer gives 1.0 as the log-probability"),
        (logprobs(("1", -float("inf"))), "2 tries, the last: none of .* is among the 1 likeliest first tokens"),
        (no_digit, r"2 tries, the last: none of \[1, 2, 3, 4, 5\] is among the 2 likeliest .* answer: 'yes', 'no'"),
    ],
)
def test_an_error_names_rank_url_prompt_and_the_last_failure(local, deed, why):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward(retries=1, time_limit=0.5 if deed is stall else 60.0)
        endpoint.deeds = [deed] * 2
        asked = f"model '{MODEL}', prompt 'a red circle', question 'video_alignment'"
        with pytest.raises(RewardError, match=f"'vlm_judge' of {endpoint.url} failed on rank 0 for {asked}: {why}"):
            ask(reward, prompts=PROMPTS[:1], videos=VIDEOS[:1])


def test_a_reward_timeout_names_url_prompt_and_the_last_failure(local):
    with Endpoint(local) as endpoint:
        panel = RewardPanel(endpoint.reward(time_limit=0.4, max_concurrency=1), timeout=1.5)
        endpoint.deeds = [stall] * 9
        with pytest.raises(
            RewardError,
            match=rf"\(reward_timeout\).* It asked for model .*, prompt '{PROMPTS[0]}', "
            f".* last failure: {endpoint.url}: no answer within 0.4 s",
        ):
            panel(PROMPTS, VIDEOS, {})


def test_a_server_that_is_gone_is_an_error(local):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward(retries=1)
    with pytest.raises(RewardError, match="2 tries, the last: ConnectError"):
        ask(reward)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_limits_are_honoured(local):
    with Endpoint(local, wait=0.02) as endpoint:
        ask(endpoint.reward(max_concurrency=2), prompts=PROMPTS * 3, videos=VIDEOS.repeat(3, 1, 1, 1, 1))
        assert endpoint.most == 2
        ask(endpoint.reward(), prompts=PROMPTS * 3, videos=VIDEOS.repeat(3, 1, 1, 1, 1))
        assert endpoint.most > 2
        reward = endpoint.reward(requests_per_minute=600)
        endpoint.deeds = [status(500)]
        ask(reward)
        gaps = [b - a for a, b in zip(endpoint.times, endpoint.times[1:])]
        assert len(gaps) == 3 and sum(gaps) > 0.25  # a try that is made again counts


# --- before a run ----------------------------------------------------------------------------------------------------


async def without_logprobs(served, answer):
    answer = json.loads(answer)
    del answer["choices"][0]["logprobs"]
    return JSONResponse(answer)


def test_what_is_wrong_is_found_before_a_run(local):
    with Endpoint(local, key=KEY) as closed, Endpoint(local) as plain, Endpoint(local, sees=False) as blind:

        def judge(url=plain.url, model=MODEL, **settings):
            return RemoteVLMJudge(url, model, **{"retries": 0} | settings)

        for make, deeds, why in (
            (lambda: judge(f"http://127.0.0.1:{free_port()}/v1"), [], "no server answers .ConnectError"),
            (lambda: judge(closed.url), [], "it refuses the key: .* Set api_key, or the environment"),
            (lambda: judge(closed.url, api_key="sk-wrong"), [], r"key: Incorrect API key provided: Bearer \*\*\*"),
            (lambda: judge(api_key="sk-wrong\u2026"), [], "characters that a header cannot carry"),
            (lambda: judge(model="tests/tiny-lava"), [], "no such model; did you mean 'tests/tiny-llava'"),
            (
                lambda: judge(plain.url[:-3]),
                [],
                "not an OpenAI-compatible endpoint .*404.*; expected http://host:port/v1",
            ),
            (lambda: judge(), [without_logprobs], "contains no log-probabilities. Use .* or set logprobs=False"),
            (lambda: judge(), [status(400)], "it answers text, but not with 8 images: status 400"),
            (lambda: judge(), [status(400)] * 2, "it does not answer: status 400"),
            (lambda: judge(), [garbage] * 2, "it does not answer: the answer is not a chat completion"),
            (lambda: judge(blind.url), [], "it ignores images: the prompt has as many tokens with them as without"),
            (lambda: judge(blind.url, send="mp4"), [], "it ignores video: .* or send images"),
        ):
            plain.deeds = deeds
            with pytest.raises(ValueError, match=why) as error:
                make()
            assert "sk-wrong" not in str(error.value)


def test_a_dead_url_is_found_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="'vlm_judge', model 'a' of .*: no server answers"):
        tiny_runs.trainer(tmp_path, f"vlm+http://127.0.0.1:{free_port()}/v1?model=a", model="no/such-pipeline")


@pytest.mark.parametrize(
    "name, why",
    [
        ("vlm+http://127.0.0.1:9/v1", "expected vlm.http://host:port/v1.model=ID"),
        ("vlm+http://127.0.0.1:9/v1?model=a&colour=1", "unknown setting 'colour'; available: model, question"),
        (
            "vlm+http://127.0.0.1:9/v1?model=a&api_key=sk-wrong",
            "'api_key'; .* environment variable PISCES_VLM_API_KEY",
        ),
        ("vlm+http://127.0.0.1:9/v1?model=a&frames=many", "frames='many' cannot be read"),
        ("vlm+http:///v1?model=a", "expected http://host:port/v1"),
        ("vlm+http://127.0.0.1:9/v1?model=a&frames=0", "frames=0 must be"),
        ("vlm+http://127.0.0.1:9/v1?model=a&send=gif", "send='gif' must be one of 'png', 'jpeg', 'mp4'"),
        ("vlm+http://127.0.0.1:9/v1?model=a&quality=101", "quality=101 must be"),
        ("vlm+http://127.0.0.1:9/v1?model=a&logprobs=maybe", "logprobs='maybe' must be 'required', or False"),
        ("vlm+http://127.0.0.1:9/v1?model=a&scores=1,10", "scores=.1, 10.: expected two or more ascending digits"),
        ("vlm+http://127.0.0.1:9/v1?model=a&weights=1,2", "weights=.*: expected a positive number for each of 1"),
        ("vlm+http://127.0.0.1:9/v1?model=a&max_concurrency=0", "max_concurrency=0"),
        ("vlm+http://127.0.0.1:9/v1?model=a&requests_per_minute=0", "requests_per_minute=0"),
        ("vlm+http://127.0.0.1:9/v1?model=a&retries=-1", "retries=-1"),
        (
            "vlm+http://127.0.0.1:9/v1?model=a&time_limit=5m",
            "reward 'http://127.0.0.1:9/v1': time_limit='5m' cannot be",
        ),
        ("vlm+http://127.0.0.1:9/v1?model=a&time_limit=nan", "time_limit=nan"),
        ("vlm+http://127.0.0.1:9/v1?model=a&extra_body=[1]", "extra_body=.1. must be"),
        (
            f"vlm+http://127.0.0.1:9/v1?model=a&question={PROMPT}&question={PROMPT}",
            "expected files with different names",
        ),
    ],
)
def test_wrong_settings(name, why):
    with pytest.raises(ValueError, match=why) as error:
        load_reward(name)
    assert "sk-wrong" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "change", "error", "message"),
    [
        ("abc", lambda x: x, TypeError, "prompts: expected a list of strings"),
        (PROMPTS[:2], lambda x: x, ValueError, "2 prompts for 3 videos"),
        (PROMPTS, lambda x: x * 255, ValueError, "video 0 has values from"),
        (PROMPTS, lambda x: x.index_fill(0, torch.tensor(1), torch.nan), ValueError, "video 1 has values from nan"),
        (
            ["a", "a <image> b", "a"],
            lambda x: x,
            ValueError,
            "'a <image> b' contains '<image>', a token of chat models",
        ),
        (["a", "a", "<|im_end|>"], lambda x: x, ValueError, "contains '<|im_end|>'"),
    ],
)
def test_bad_inputs_are_named(local, prompts, change, error, message):
    with Endpoint(local) as endpoint:
        reward = endpoint.reward()
        with pytest.raises(error, match=message.replace("|", r"\|")):
            asyncio.run(reward(prompts, change(VIDEOS)))
        assert not endpoint.requests


# --- transformers serve ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve(local, tmp_path_factory):
    """The url of `transformers serve`, which finds a tiny LLaVA and a tiny Llama in a cache of the Hub."""
    cache = tmp_path_factory.mktemp("hub")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            pad_token_id=0,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    words = local.processor.tokenizer.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", chat_template="{{ messages[0].content }}"
    )
    for name, model, processor in ((MODEL, local.model, local.processor), (LANGUAGE_MODEL, llama, tokenizer)):
        folder, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit, encoding="utf-8")
        model.save_pretrained(folder / "snapshots" / commit)
        processor.save_pretrained(folder / "snapshots" / commit)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--port", str(port)],
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 120
    while True:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
            break
        except httpx2.HTTPError:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(20)


@pytest.mark.slow
def test_transformers_serve(serve, local, monkeypatch):
    """It reads image data URLs and answers greedily. Missing features are reported before a run."""
    monkeypatch.setattr(retrying_client, "LONGEST_WAIT", 0.5)  # uvicorn closes a connection shortly after a status 500
    expected = []
    for prompt, clip in zip(PROMPTS, spread_frames(VIDEOS, 4)):
        given = inputs(local, [to_image(frame) for frame in clip], PROMPT.read_text().replace("{prompt}", prompt))
        answer = local.model.generate(**given, do_sample=False, max_new_tokens=16)[0, given.input_ids.shape[1] :]
        expected.append((int(local.processor.decode(answer, skip_special_tokens=True)) - 1) / 4)
    table = ask(f"vlm+{serve}?model={MODEL}&frames=4&logprobs=false")
    assert table.values[:, 0].tolist() == expected and table.metrics["vlm_judge_logprobs"] == [0.0]
    for settings, why in (
        ({}, "contains no log-probabilities. Use a server that returns them .* or set logprobs=False"),
        ({"model": "tests/tiny-lava"}, "no such model; did you mean 'tests/tiny-llava'"),
        (
            {
                "model": LANGUAGE_MODEL,
                "logprobs": False,
            },
            "it ignores images",
        ),
        ({"send": "mp4", "logprobs": False, "retries": 1}, "it answers text, but not with 1 video: .*status 500"),
    ):
        with pytest.raises(ValueError, match=why):
            RemoteVLMJudge(serve, **{"model": MODEL} | settings)
