"""A reward over HTTP: ask a vision-language model behind an OpenAI-compatible endpoint for a score."""

import asyncio
import base64
import difflib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from pisces_rl.media import mp4_bytes
from pisces_rl.rewards.contract import check_inputs, check_pixels
from pisces_rl.rewards.retrying_client import Failed, RetryingClient, TryAgain, masked, read_settings
from pisces_rl.rewards.vlm_judge import PROMPT, read_question, spread_frames, to_image

KEY = "PISCES_VLM_API_KEY"  # environment variable
CHAT = "/chat/completions"
SENT_AS = ("png", "jpeg", "mp4")
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
LONGEST_ANSWER = 16  # tokens, if the digit is read from text
SPACE = " \t\n\u2581\u0120"  # includes the space symbols of SentencePiece and of byte-level BPE
# Strings that models treat as an image placeholder or the end of a turn instead of as text.
CONTROL = re.compile(r"<\|[^\s|<>]+\|>|<(?:/?s|bos|eos|pad|unk|image|video|(?:start|end)_of_turn)>|\[(?:/?INST|IMG)\]")
# One digit, alone or as "4/5" or "4 out of 5", perhaps after "Score:". The answer ends there, or punctuation follows.
DIGIT = re.compile(
    r"\W*(?:(?:score|rating|answer)(?:\s+is)?\W+)?(?P<digit>\d)(?:\s*(?:/|out of)\s*(?P<most>\d+))?(?![.,]?\d)"
    r"\s*(?:$|[^\w\s/-]|\n)",
    re.IGNORECASE,
)


class RemoteVLMJudge:
    """`VLMJudge` with its model on a server: vLLM, SGLang, `transformers serve` or a hosted endpoint.

        judge = RemoteVLMJudge("http://gpu7:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct")

        r = sum_q w_q (E_q - k_min) / (k_max - k_min) / sum_q w_q,   E_q = sum_k k p_q(k) / sum_k p_q(k)

    in [0, 1], over questions q and digits k among `scores`; p_q(k) is the probability of the answer's first token,
    ignoring white space, from the endpoint's log-probabilities. A digit that is not among the `top_logprobs` likeliest
    tokens counts as 0. With logprobs=False, E_q is the digit in the text of a greedy answer. Each question's score is
    recorded as NAME_QUESTION, where QUESTION is the name of its file, and the metric NAME_logprobs is 1 or 0.

    A failed try is repeated as in `RetryingClient`, for the statuses 408, 429, 500, 502, 503 and 504, and for an
    answer without a digit, since answers may vary with the server's batch. Any other failure, and the last of these,
    is a RewardError with rank, url, prompt and the last error. A failure never becomes a value.

    Args:
        url: of the endpoint, http://host:port/v1.
        model: its id on the endpoint.
        question: file with the text to ask, with {prompt} where the video's prompt goes; or a list of such files.
        weights: of the questions; default: all 1.
        scores: the possible answers, ascending digits.
        frames: per video, evenly spaced; all frames if there are fewer.
        send: frames as "png" or "jpeg" images, or as one "mp4" video.
        quality: of JPEG, 1 to 100.
        fps: of the mp4.
        logprobs: "required", or False to read the digit from text.
        top_logprobs: number of log-probabilities to request per token.
        max_concurrency: largest number of concurrent requests per process.
        requests_per_minute: requests started per minute and process, retries included.
        time_limit: seconds for one try.
        retries: tries after the first one.
        name: under which it is logged.
        api_key: default: the environment variable PISCES_VLM_API_KEY, if set. It is never written anywhere.
        extra_body: more fields for each request, such as {"chat_template_kwargs": {"enable_thinking": False}}.

    Raises:
        ValueError: an argument is wrong; no endpoint answers at the url, or it refuses the key, lacks the model, gives
            no log-probabilities, or accepts no such images or video. On a call: whatever `VLMJudge` refuses, and a
            prompt with what looks like a special token (`<|im_end|>`, `<image>`), since the model's are unknown here.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str | Path | Sequence[str | Path] = PROMPT,
        weights: Sequence[float] | None = None,
        scores: Sequence[int] = (1, 2, 3, 4, 5),
        frames: int = 8,
        send: str = "png",
        quality: int = 90,
        fps: float = 8,
        logprobs: str | bool = "required",
        top_logprobs: int = 20,
        max_concurrency: int = 16,
        requests_per_minute: float | None = None,
        time_limit: float = 300.0,
        retries: int = 6,
        api_key: str | None = None,
        extra_body: Mapping | None = None,
        name: str = "vlm_judge",
    ):
        self.model, self.__name__ = model, name
        if not re.match(r"https?://[^/?]+[^?]*$", url):
            raise ValueError(f"url={masked(url)!r}: expected http://host:port/v1.")
        files: Sequence[Any] = question if isinstance(question, (list, tuple)) else [question]
        self.questions = {Path(str(file)).stem: read_question(file) for file in files}
        if not files or len(self.questions) < len(files):
            raise ValueError(f"question={[str(file) for file in files]}: expected files with different names.")
        self.weights = [1.0] * len(files) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(files) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights={weights!r}: expected a positive number for each of {len(files)} questions.")
        self.scores = list(scores)
        if len(self.scores) < 2 or self.scores != sorted(set(scores) & set(range(10))):
            raise ValueError(f"scores={tuple(scores)}: expected two or more ascending digits.")
        for argument, value in {"frames": frames, "quality": quality, "top_logprobs": top_logprobs}.items():
            if not isinstance(value, int) or value < 1 or argument == "quality" and value > 100:
                raise ValueError(f"{argument}={value!r} must be a whole number, 1 or more; quality at most 100.")
        if send not in SENT_AS:
            raise ValueError(f"send={send!r} must be one of {', '.join(map(repr, SENT_AS))}.")
        if logprobs not in ("required", False):
            raise ValueError(f"logprobs={logprobs!r} must be 'required', or False to read the digit from the text.")
        if not isinstance(extra_body or {}, Mapping):
            raise ValueError(f"extra_body={extra_body!r} must be a dictionary.")
        self.frames, self.send, self.quality, self.fps = frames, send, quality, fps
        self.logprobs, self.top_logprobs, self.extra_body = bool(logprobs), top_logprobs, dict(extra_body or {})
        self._client = RetryingClient(
            name,
            key=os.environ.get(KEY) if api_key is None else api_key,
            time_limit=time_limit,
            retries=retries,
            try_again=TRY_AGAIN,
            max_concurrency=max_concurrency,
            requests_per_minute=requests_per_minute,
            media_type="application/json",
        )
        self.url = self._client.without_login(url.rstrip("/"))
        self._check_model()
        self._check_answers()

    async def __call__(
        self,
        prompts: Sequence[str],
        videos: Tensor,
        log_extra: Callable | None = None,
        log_metric: Callable | None = None,
    ) -> list[float]:
        check_inputs(prompts, videos)
        check_pixels(videos)
        for prompt in prompts:
            if held := CONTROL.search(prompt):
                raise ValueError(f"prompts: {prompt!r} contains {held[0]!r}, a token of chat models; remove it.")
        clips = spread_frames(videos.detach(), self.frames)  # in this thread, to stay on its CUDA stream
        rows = await asyncio.gather(*(self._video(prompt, clip) for prompt, clip in zip(prompts, clips)))
        if log_extra is not None:
            for question, values in zip(self.questions, zip(*rows)):
                log_extra(f"{self.__name__}_{question}", list(values))
        if log_metric is not None:
            log_metric(f"{self.__name__}_logprobs", float(self.logprobs))
        return [sum(w * r for w, r in zip(self.weights, row)) / sum(self.weights) for row in rows]

    @property
    def unanswered(self) -> str:
        return self._client.unanswered

    async def _video(self, prompt: str, clip: Tensor) -> list[float]:
        """Return the score of each question."""
        shown = await asyncio.to_thread(self._encoded_frames, clip)
        return await asyncio.gather(*(self._ask(prompt, name, shown) for name in self.questions))

    async def _ask(self, prompt: str, question: str, shown: list[dict]) -> float:
        text = self.questions[question].replace("{prompt}", prompt)
        asked = f"model {self.model!r}, prompt {prompt!r}, question {question!r}"
        try:
            return await self._client.ask([self.url], CHAT, lambda: self._body(shown, text), self._score, asked)
        except Failed as error:
            raise error.as_reward_error(self.__name__, asked) from error

    # --- a request ---

    def _encoded_frames(self, clip: Tensor) -> list[dict]:
        """Encode frames (f, 3, H, W), bytes, as parts of a chat message."""
        if self.send == "mp4":
            return [_part("video", "mp4", mp4_bytes(clip.float() / 255, self.fps, min_size=0))]
        parts = []
        for frame in clip:
            file = io.BytesIO()
            to_image(frame).save(file, self.send, quality=self.quality)
            parts.append(_part("image", self.send, file.getvalue()))
        return parts

    def _body(self, shown: list[dict], text: str) -> bytes:
        asked = {
            "model": self.model,
            "temperature": 0.0,
            "max_tokens": 1 if self.logprobs else LONGEST_ANSWER,
            "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
        }
        more = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.logprobs else {}
        return json.dumps(asked | more | self.extra_body).encode()

    # --- its answer ---

    def _score(self, body: bytes) -> float:
        choice = _choice(body)
        expected = self._expected(choice) if self.logprobs else self._digit(choice["message"].get("content"))
        return (expected - self.scores[0]) / (self.scores[-1] - self.scores[0])

    def _expected(self, choice: dict) -> float:
        try:
            first = [
                (str(one["token"]), float(one["logprob"])) for one in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            first = []
        if not first:
            raise ValueError("the answer contains no log-probabilities.")
        logs: dict[str, list[float]] = {str(score): [] for score in self.scores}
        for token, log in first:
            if not log < 0.01:  # also catches NaN
                raise ValueError(f"the answer gives {log} as the log-probability of {token!r}.")
            logs.get(token.strip(SPACE), []).append(log)
        largest = max((log for own in logs.values() for log in own), default=-math.inf)
        if largest == -math.inf:
            raise TryAgain(
                f"none of {self.scores} is among the {len(first)} likeliest first tokens of the answer: "
                f"{', '.join(repr(token) for token, _ in first[:5])}, ..."
            )
        shares = {score: sum(math.exp(log - largest) for log in own) for score, own in logs.items()}
        return sum(int(score) * share for score, share in shares.items()) / sum(shares.values())

    def _digit(self, text: str | None) -> int:
        found = DIGIT.match(text) if isinstance(text, str) else None
        if not found or int(found["digit"]) not in self.scores or found["most"] not in (None, str(self.scores[-1])):
            raise TryAgain(f"the answer {text!r} is not one of {self.scores}.")
        return int(found["digit"])

    # --- before a run ---

    def _check_model(self) -> None:
        try:
            response = self._client.get(self.url, "/models")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._endpoint_error(
                f"no server answers ({type(error).__name__}: {error}); check that it runs."
            ) from error
        if response.status_code in (401, 403):
            raise self._endpoint_error(
                f"it refuses the key: {self._client.error_in(response)} Set api_key, or the environment "
                f"variable {KEY}."
            )
        try:
            listed = [one["id"] for one in response.raise_for_status().json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise self._endpoint_error(
                f"not an OpenAI-compatible endpoint (GET {self.url}/models: {error!r}); expected http://host:port/v1."
            ) from error
        if listed and self.model not in listed:  # `transformers serve` lists nothing for a folder
            near = difflib.get_close_matches(self.model, listed, n=3)
            advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise self._endpoint_error(f"it has no such model{advice} Available: {', '.join(listed)}.")

    def _check_answers(self) -> None:
        """Ask about as many gray frames as a video has, and once without frames: a server that drops what its model
        cannot see counts the same number of prompt tokens both times."""
        shown = self._encoded_frames(torch.full((self.frames, 3, 64, 64), 128, dtype=torch.uint8))
        what = "video" if self.send == "mp4" else "images"
        text = f"Answer with the digit {self.scores[0]} and nothing else."
        try:
            seen = self._try(shown, text)
        except Failed as error:
            text_alone = error.status is not None and self._answers_text(text)
            why = f"it answers text, but not with {len(shown)} {what}" if text_alone else "it does not answer"
            more = " Lower top_logprobs, or set logprobs=False." * (self.logprobs and "logprob" in str(error))
            raise self._endpoint_error(f"{why}: {error}{more}") from error
        if self.logprobs:
            try:
                self._expected(seen[0])
            except TryAgain:
                pass  # an answer without a digit for gray frames says nothing about videos
            except ValueError as error:
                raise self._endpoint_error(
                    f"{error} Use a server that returns them (vLLM, SGLang), or set logprobs=False, "
                    "which reads the digit from the text."
                ) from error
        if seen[1] is not None and seen[1] == self._try([], text)[1]:
            raise self._endpoint_error(
                f"it ignores {what}: the prompt has as many tokens with them as without. Serve a "
                f"model that accepts them{', or send images' * (self.send == 'mp4')}."
            )

    def _try(self, shown: list[dict], text: str) -> tuple[dict, int | None]:
        """Return a choice, and the prompt's number of tokens if the server reports it."""
        return self._client.ask_before_a_run(
            self.url,
            CHAT,
            self._body(shown, text),
            lambda body: (_choice(body), (json.loads(body).get("usage") or {}).get("prompt_tokens")),
        )

    def _answers_text(self, text: str) -> bool:
        try:
            return bool(self._try([], text))
        except Failed:
            return False

    def _endpoint_error(self, why: str) -> ValueError:
        return ValueError(f"reward {self.__name__!r}, model {self.model!r} of {self.url}: {why}")


def remote_vlm_judge(name: str) -> RemoteVLMJudge:
    """Create the judge of "vlm+http://host:port/v1?model=ID". Settings of `RemoteVLMJudge` may follow:
    "&frames=4&send=jpeg"; several questions as "&question=a.txt&question=b.txt&weights=1,2"; "&scores=0,1";
    "&logprobs=false"; `extra_body` as JSON.

    Raises ValueError as `RemoteVLMJudge` does, and for a missing model or an unknown setting. The key is not a
    setting, because names are logged.
    """
    known: dict[str, Callable[[str], object]] = {
        "model": str,
        "question": str,
        "weights": _numbers,
        "scores": _numbers,
        "frames": int,
        "send": str,
        "quality": int,
        "fps": float,
        "logprobs": lambda text: text.lower() != "false" and text,
        "top_logprobs": int,
        "max_concurrency": int,
        "requests_per_minute": float,
        "time_limit": float,
        "retries": int,
        "extra_body": json.loads,
        "name": str,
    }
    url, _, query = name.removeprefix("vlm+").partition("?")
    settings: dict = {}
    advice = f" Put the key into the environment variable {KEY}."
    for key, value in read_settings(url, query, known, lambda key: advice * ("key" in key)):
        settings[key] = [*settings.get(key, []), value] if key == "question" else value
    if not settings.get("model"):
        raise ValueError(f"reward {masked(name)!r}: expected vlm+http://host:port/v1?model=ID.")
    return RemoteVLMJudge(url, **settings)


def _numbers(text: str) -> list[float]:
    return json.loads(f"[{text}]")


def _part(kind: str, form: str, data: bytes) -> dict:
    url = f"data:{kind}/{form};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _choice(body: bytes) -> dict:
    """Return the first choice of a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is not a chat completion ({error!r}): {body[:200]!r}.") from error
    return choice
