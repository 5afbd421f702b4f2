"""A reward that is computed by a server."""

import asyncio
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx2
from torch import Tensor

import pisces_rl
from pisces_rl.rewards.retrying_client import Failed, RetryingClient, masked, read_settings

from .wire import (
    FRAMES,
    PROTOCOL,
    STATE,
    ScoreAnswer,
    ScoreRequest,
    decoded_bytes,
    is_plain,
    other_protocol,
    pack_request,
    too_large,
    unpack_answer,
)

TOKEN = "PISCES_REWARD_TOKEN"  # environment variable


class RemoteReward:
    """A reward of `pisces-rl serve`, for trainers, panels and `--rewards http://host:port/NAME`.

        reward = RemoteReward("http://gpu7:8000", "video_align")

    With several servers, each scores a part of the batch at the same time. A part larger than a server's --max_mb is
    split into several requests. A reward that compares videos is never split: one server gets the whole batch in one
    request. A failed try is repeated with the next server if: the connection was refused, reset or broken off within
    the answer; no answer came within the time limit; the status is 502, 503 or 504 (`RetryingClient`). Any other
    failure, and the last of these, is a RewardError with rank, url, first prompt and the last error. A failure never
    becomes a value: only the reward itself returns None.

    Args:
        url: of a server, http://host:port, or a list of them. Proxies of the environment are not used.
        name: of the reward on the server.
        token: the content of the server's --token_file; default: the environment variable PISCES_REWARD_TOKEN, if set.
        time_limit: seconds for one try, from connecting to the end of the answer.
        retries: tries after the first one.
        frames: "lossless" sends the fp32 pixels, 12 F H W bytes per video; "mp4" sends H.264 (`mp4_bytes`), which
            changes pixels, and so values.

    Raises:
        ValueError: an argument is wrong; a server does not answer, speaks another version of the protocol, refuses the
            token, or lacks the reward; or servers disagree on the reward's hash.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        name: str,
        *,
        token: str | None = None,
        time_limit: float = 300.0,
        retries: int = 6,
        frames: str = "lossless",
    ):
        urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        if not urls or not all(urlsplit(one).scheme in ("http", "https") and urlsplit(one).hostname for one in urls):
            raise ValueError(f"url={masked(repr(url))}: expected http://host:port, or a list of such urls.")
        if frames not in FRAMES:
            raise ValueError(f"frames={frames!r} must be one of {', '.join(map(repr, FRAMES))}.")
        self.__name__, self.frames = name, frames
        token = os.environ.get(TOKEN) if token is None else token
        self._client = RetryingClient(name, key=token, time_limit=time_limit, retries=retries)
        self.urls = [self._client.without_login(one) for one in urls]
        health = [self._health(one, name) for one in self.urls]
        about = [one["rewards"][name] for one in health]
        for other, theirs in zip(self.urls, about):
            if theirs != about[0]:
                raise ValueError(
                    f"url: {self.urls[0]} and {other} serve different rewards as {name!r}: {about[0]} "
                    f"and {theirs}; serve the same code and weights on each."
                )
        self.identity, self.columns = about[0]["identity"], about[0]["columns"]
        self.compares_videos = about[0]["compares_videos"]
        self.max_bytes = min(one["max_bytes"] for one in health)
        self._first = int(os.environ.get("RANK", 0)) % len(self.urls)  # ranks start at different servers

    async def __call__(
        self,
        prompts: Sequence[str],
        videos: Tensor,
        trainer_state: Any = None,
        log_extra: Callable | None = None,
        log_metric: Callable | None = None,
        **columns: list,
    ) -> list[float | None]:
        videos = videos.detach().cpu()  # in this thread, to stay on its CUDA stream
        if self.columns is None:
            columns = {column: values for column, values in columns.items() if is_plain(list(values))}
        else:
            columns = {column: columns[column] for column in self.columns if column in columns}
        state = None if trainer_state is None else {key: getattr(trainer_state, key) for key in STATE}
        servers = 1 if self.compares_videos else max(1, min(len(self.urls), len(prompts)))
        bounds = [len(prompts) * k // servers for k in range(servers + 1)]
        first, self._first = self._first, (self._first + 1) % len(self.urls)
        request = ScoreRequest(list(prompts), videos, columns, state)
        parts = await asyncio.gather(
            *(
                self._part(first + k, request.rows(start, end))
                for k, (start, end) in enumerate(zip(bounds, bounds[1:]))
            )
        )
        answers: list[ScoreAnswer] = [answer for part in parts for answer in part]
        if log_extra is not None:
            for extra in dict.fromkeys(extra for answer in answers for extra in answer.extras):
                parts_of = (answer.extras.get(extra, [None] * len(answer.values)) for answer in answers)
                log_extra(extra, [value for values in parts_of for value in values])
        if log_metric is not None:
            for answer in answers:
                for metric, values in answer.metrics.items():
                    for value in values:
                        log_metric(metric, value)
        return [value for answer in answers for value in answer.values]

    @property
    def unanswered(self) -> str:
        return self._client.unanswered

    # --- one part of a batch, at one server after another ---

    async def _part(self, place: int, request: ScoreRequest) -> list[ScoreAnswer]:
        """Score a part of a batch, in consecutive requests if it is too large; not if the reward compares videos."""
        count = len(request.prompts)
        asked = f"{count} videos, the first of prompt {request.prompts[0]!r}"
        urls = [self.urls[(place + k) % len(self.urls)] for k in range(len(self.urls))]
        try:
            try:
                body = await asyncio.to_thread(pack_request, request, self.frames)
            except ValueError as error:
                raise Failed(str(error), urls[0]) from error
            size = max(len(body), decoded_bytes(request.videos.shape))
            if size > self.max_bytes and (count == 1 or self.compares_videos):
                raise Failed(too_large(size, self.max_bytes), urls[0])
            if size > self.max_bytes:
                del body
                parts = min(count, -(-size // self.max_bytes))
                bounds = [count * k // parts for k in range(parts + 1)]
                return [
                    answer
                    for start, end in zip(bounds, bounds[1:])
                    for answer in await self._part(place, request.rows(start, end))
                ]
            return [
                await self._client.ask(
                    urls,
                    f"/score/{quote(self.__name__, safe='')}",
                    lambda: body,
                    lambda answer: unpack_answer(answer, self.__name__, self.identity, request.prompts),
                    asked,
                )
            ]
        except Failed as error:
            raise error.as_reward_error(self.__name__, asked) from error

    # --- before a run ---

    def _health(self, url: str, name: str) -> dict:
        try:
            response = self._client.get(url, "/health")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ValueError(
                f"reward {name!r}: no server answers at {url} ({type(error).__name__}: {error}); start "
                "one with `pisces-rl serve`, and use the url that it prints."
            ) from error
        if response.status_code == 401:
            raise ValueError(
                f"reward {name!r}: {url} refuses the token: {self._client.error_in(response)} Set token, "
                f"or the environment variable {TOKEN}, to the content of its --token_file."
            )
        try:
            health = response.raise_for_status().json()
            protocol, rewards = health["protocol"], dict(health["rewards"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"reward {name!r}: {url} is not a reward server of pisces_rl ({error!r}).") from error
        if protocol != PROTOCOL:
            there = f"{url}, pisces_rl {health.get('version')},"
            raise ValueError(other_protocol(there, protocol, f"this pisces_rl {pisces_rl.__version__}"))
        if name not in rewards:
            near = difflib.get_close_matches(name, rewards, n=3)
            advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise ValueError(f"reward {name!r}: {url} has no such reward{advice} Available: {', '.join(rewards)}.")
        return health


def remote_reward(urls: str) -> RemoteReward:
    """Create the reward "http://a:1/NAME", or with several servers "http://a:1/NAME,http://b:2/NAME". Settings follow
    as a query: "http://a:1/NAME?frames=mp4&time_limit=900&retries=20".

    Raises ValueError as `RemoteReward` does, and if the urls name different rewards or a setting is unknown.
    """
    known = {"frames": str, "time_limit": float, "retries": int}
    settings: dict[str, Any] = {}
    servers, names = [], []
    for url in urls.split(","):
        url, _, query = url.strip().partition("?")
        server, _, name = url.rstrip("/").rpartition("/")
        servers.append(server)
        names.append(unquote(name))
        settings |= read_settings(urls, query, known)
    if len(set(names)) > 1 or not all(urlsplit(server).hostname for server in servers):
        raise ValueError(f"reward {masked(urls)!r}: expected http://host:port/NAME, with one NAME for all servers.")
    return RemoteReward(servers, names[0], **settings)
