"""A reward that a server computes."""

import asyncio
import difflib
import itertools
import json
import math
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from urllib.parse import parse_qsl, urlsplit

import httpx2
from torch import Tensor
from torch.distributed import get_rank, is_available, is_initialized

import pisces_rl
from pisces_rl.rewards.contract import RewardError

from .wire import (
    FRAMES,
    PROTOCOL,
    STATE,
    ScoreAnswer,
    ScoreRequest,
    other_protocol,
    pack_request,
    too_large,
    unpack_answer,
)

TOKEN = "PISCES_REWARD_TOKEN"  # environment variable
CONNECT = 10.0  # seconds to connect, and to answer about a server's health
PIECE = 2**20  # bytes
LONGEST_WAIT = 30.0  # seconds between two tries, unless the server asks for more
MAY_BE_TRIED_AGAIN = (502, 503, 504)


class RemoteReward:
    """A reward of `pisces-rl serve`, for trainers, panels and `--rewards http://host:port/NAME`.

        reward = RemoteReward("http://gpu7:8000", "video_align")

    Of several servers each gets a part of the batch, at the same time, unless the reward compares videos: then one
    gets all. A try that failed is made again, with the next server, after min(2^k / 2, 30) s times a random factor
    from .5 to 1.5, or after what the server's Retry-After says, if: the connection was refused, reset or broken off
    within the answer; no answer came within the time limit; the status is 502, 503 or 504. Anything else, and the last
    of them, is a RewardError with rank, url, first prompt and the last error. A failure is never a value: None comes
    from the reward alone.

    Args:
        url: of a server, http://host:port, or a list of them. Proxies of the environment are not used.
        name: of the reward there.
        token: what the server's --token_file holds; unset: the environment variable PISCES_REWARD_TOKEN, if any.
        time_limit: seconds of one try, from connecting to the whole answer.
        retries: tries after the first one.
        frames: "lossless" sends the fp32 pixels, 12 F H W bytes a video; "mp4" sends H.264 (`mp4_bytes`), which
            changes pixels, and so values.

    Raises:
        ValueError: an argument is wrong; a server does not answer, is of another version of the protocol, refuses the
            token, or has no such reward; servers disagree on the reward's hash.
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
        self.urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        if not self.urls or not all(urlsplit(one).scheme in ("http", "https") and urlsplit(one).hostname
                                    for one in self.urls):  # fmt: skip
            raise ValueError(f"url={url!r}: expected http://host:port, or a list of such.")
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit={time_limit!r} must be a positive number of seconds.")
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries={retries!r} must be a whole number, 0 or more.")
        if frames not in FRAMES:
            raise ValueError(f"frames={frames!r} must be one of {', '.join(map(repr, FRAMES))}.")
        self.__name__, self.time_limit, self.retries, self.frames = name, time_limit, retries, frames
        token = os.environ.get(TOKEN) if token is None else token
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        health = [self._health(one, name) for one in self.urls]
        about = [one["rewards"][name] for one in health]
        for other, theirs in zip(self.urls, about):
            if theirs != about[0]:
                raise ValueError(f"url: {self.urls[0]} and {other} serve different rewards as {name!r}: {about[0]} "
                                 f"and {theirs}; serve the same code and weights on each.")  # fmt: skip
        self.identity, self.columns = about[0]["identity"], about[0]["columns"]
        self.compares_videos = about[0]["compares_videos"]
        self.max_bytes = min(one["max_bytes"] for one in health)
        self._random = random.Random()  # the run's random numbers stay as they are
        self._first, self._process, self._lock = 0, None, threading.Lock()

    async def __call__(
        self,
        prompts: Sequence[str],
        videos: Tensor,
        trainer_state=None,
        log_extra: Callable | None = None,
        log_metric: Callable | None = None,
        **columns: list,
    ) -> list[float | None]:
        videos = videos.detach().cpu()  # here, on the stream of this thread
        if self.columns is not None:
            columns = {column: columns[column] for column in self.columns if column in columns}
        state = None if trainer_state is None else {key: getattr(trainer_state, key) for key in STATE}
        servers = 1 if self.compares_videos else max(1, min(len(self.urls), len(prompts)))
        bounds = [len(prompts) * k // servers for k in range(servers + 1)]
        first, self._first = self._first, (self._first + 1) % len(self.urls)
        answers: list[ScoreAnswer] = await asyncio.gather(*(
            self._part(first + k, ScoreRequest(list(prompts[start:end]), videos[start:end],
                                               {column: own[start:end] for column, own in columns.items()}, state))
            for k, (start, end) in enumerate(zip(bounds, bounds[1:]))
        ))  # fmt: skip
        for extra in dict.fromkeys(extra for answer in answers for extra in answer.extras) if log_extra else ():
            log_extra(extra, [value for answer in answers
                              for value in answer.extras.get(extra, [None] * len(answer.values))])  # fmt: skip
        for answer in answers if log_metric else ():
            for metric, values in answer.metrics.items():
                for value in values:
                    log_metric(metric, value)
        return [value for answer in answers for value in answer.values]

    # --- one part of a batch, at one server after another ---

    async def _part(self, place: int, request: ScoreRequest) -> ScoreAnswer:
        try:
            body = await asyncio.to_thread(pack_request, request, self.frames)
            if len(body) > self.max_bytes:
                raise _Final(too_large(len(body), self.max_bytes))
        except (ValueError, _Final) as error:
            raise self._failed(self.urls[place % len(self.urls)], request, str(error)) from error
        for attempt in itertools.count():
            url = self.urls[(place + attempt) % len(self.urls)]
            try:
                response = await self._in_own_loop(self._post(url, body))
                try:
                    return unpack_answer(response, self.__name__, self.identity, request.prompts)
                except ValueError as error:
                    raise _Final(str(error)) from error
            except _Final as error:
                raise self._failed(url, request, str(error)) from error
            except _TryAgain as error:
                if attempt == self.retries:
                    tries = f"{attempt + 1} tries, the last: " if attempt else ""
                    raise self._failed(url, request, f"{tries}{error}") from error
                backoff = min(0.5 * 2**attempt, LONGEST_WAIT) * self._random.uniform(0.5, 1.5)
                await asyncio.sleep(max(backoff, min(error.retry_after, self.time_limit)))

    async def _post(self, url: str, body: bytes) -> bytes:
        """The body of an answer with status 200.

        Raises _TryAgain, or _Final for what another try would not change."""
        post = self._client.post(f"{url}/score/{self.__name__}", content=_pieces(body),
                                 headers=self._headers | {"Content-Length": str(len(body))})  # fmt: skip
        try:
            response = await asyncio.wait_for(post, self.time_limit)
        except asyncio.TimeoutError as error:
            raise _TryAgain(f"no answer within {self.time_limit:g} s (time_limit).") from error
        except httpx2.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}.") from error
        except httpx2.HTTPError as error:
            raise _Final(f"{type(error).__name__}: {error}.") from error
        if response.status_code == 200:
            return response.content
        said = f"status {response.status_code}: {_error_in(response)}"
        if response.status_code in MAY_BE_TRIED_AGAIN:
            raise _TryAgain(said, _seconds(response.headers.get("retry-after")))
        raise _Final(said)

    def _failed(self, url: str, request: ScoreRequest, why: str) -> RewardError:
        rank = get_rank() if is_available() and is_initialized() else 0
        return RewardError(
            f"reward {self.__name__!r} of {url} failed on rank {rank} for {len(request.prompts)} videos, the first of "
            f"prompt {request.prompts[0]!r}: {why} Nothing is lost: see to the server, and resume from the last "
            "checkpoint."
        )

    # --- connections: kept in an event loop of this reward, since a panel's ends with each call ---

    async def _in_own_loop(self, coroutine: Coroutine):
        with self._lock:
            if self._process != os.getpid():  # a fork has no threads
                self._client = httpx2.AsyncClient(
                    timeout=httpx2.Timeout(None, connect=min(CONNECT, self.time_limit)),
                    limits=httpx2.Limits(keepalive_expiry=60),
                    trust_env=False,
                )
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name=f"remote {self.__name__}", daemon=True).start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    # --- before a run ---

    def _health(self, url: str, name: str) -> dict:
        try:
            response = httpx2.get(f"{url}/health", headers=self._headers, timeout=CONNECT, trust_env=False)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ValueError(f"reward {name!r}: no server answers at {url} ({type(error).__name__}: {error}); start "
                             "one with `pisces-rl serve`, and take the url that it prints.") from error  # fmt: skip
        if response.status_code == 401:
            raise ValueError(f"reward {name!r}: {url} refuses the token: {_error_in(response)} Set token, or the "
                             f"environment variable {TOKEN}, to what its --token_file holds.")  # fmt: skip
        try:
            health = response.raise_for_status().json()
            protocol, rewards = health["protocol"], dict(health["rewards"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"reward {name!r}: {url} is no reward server of pisces_rl ({error!r}).") from error
        if protocol != PROTOCOL:
            there = f"{url}, pisces_rl {health.get('version')},"
            raise ValueError(other_protocol(there, protocol, f"this pisces_rl {pisces_rl.__version__}"))
        if name not in rewards:
            near = difflib.get_close_matches(name, rewards, n=3)
            advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise ValueError(f"reward {name!r}: {url} has none of that name{advice} There: {', '.join(rewards)}.")
        return health


def remote_reward(urls: str) -> RemoteReward:
    """The reward "http://a:1/NAME", or of several servers "http://a:1/NAME,http://b:2/NAME". Settings follow as a
    query: "http://a:1/NAME?frames=mp4&time_limit=900&retries=20".

    Raises ValueError: see `RemoteReward`; the urls name different rewards, or another setting.
    """
    known = {"frames": str, "time_limit": float, "retries": int}
    servers, names, settings = [], [], {}
    for url in urls.split(","):
        url, _, query = url.strip().partition("?")
        server, _, name = url.rstrip("/").rpartition("/")
        servers.append(server)
        names.append(name)
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in known:
                raise ValueError(f"reward {urls!r}: unknown setting {key!r}; there are {', '.join(known)}.")
            settings[key] = known[key](value)
    if len(set(names)) > 1 or not all(urlsplit(server).hostname for server in servers):
        raise ValueError(f"reward {urls!r}: expected http://host:port/NAME, of several servers with one NAME.")
    return RemoteReward(servers, names[0], **settings)


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    """A large body at once would be copied into the socket's buffer."""
    for start in range(0, len(body), PIECE):
        yield memoryview(body)[start : start + PIECE]


class _Final(Exception):
    """Another try would fail alike."""


class _TryAgain(Exception):
    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


def _error_in(response: httpx2.Response) -> str:
    try:
        return str(json.loads(response.content)["error"])
    except (ValueError, KeyError, TypeError):
        return repr(response.text[:200])


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After; a date, which servers of rewards do not send, is 0."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
