"""HTTP requests for a reward: retry what may succeed; name rank, url and prompt in what fails for good."""

import asyncio
import base64
import contextlib
import email.utils
import functools
import itertools
import json
import math
import os
import random
import re
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

import httpx2
from torch.distributed import get_rank, is_available, is_initialized

from pisces_rl.rewards.contract import RewardError

T = TypeVar("T")
CONNECT = 10.0  # seconds to connect, and to answer a request made before a run
PIECE = 2**20  # bytes
LONGEST_WAIT = 30.0  # seconds between two tries, unless the server asks for more
CREDENTIALS = re.compile(r"(?<=://)([^/?#\s,]*)@")


class TryAgain(Exception):
    """Another try may succeed after `retry_after` seconds; None: the server does not say when."""

    def __init__(self, message: str, retry_after: float | None = None, status: int | None = None):
        super().__init__(message)
        self.retry_after, self.status = retry_after, status


class Failed(Exception):
    """No further try is made: it would fail too, or this was the last. `url`: the server asked last; `status`: that of
    its answer, if any."""

    def __init__(self, message: str, url: str = "", status: int | None = None):
        super().__init__(message)
        self.url, self.status = url, status

    def as_reward_error(self, name: str, asked: str) -> RewardError:
        rank = get_rank() if is_available() and is_initialized() else 0
        return RewardError(
            f"reward {name!r} of {self.url} failed on rank {rank} for {asked}: {self} Nothing is lost: check the "
            "server, and resume from the last checkpoint."
        )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read the trusted certificates once: each client and each request without one would take 0.05 s for it."""
    return httpx2.create_ssl_context(trust_env=False)


class RetryingClient:
    """A client that posts from an event loop in its thread, so that connections outlive a panel's loop for each call.

    A failed try is repeated after min(2^k / 2, 30) s times a random factor from .5 to 1.5, or after the server's
    Retry-After (at most `time_limit`), if: the connection was refused, reset or broken off within the answer; no
    answer came within the time limit; the status is one of `try_again`; or the reader of the answer raises `TryAgain`.
    A server that sends Retry-After is alive and busy: such waits, up to `time_limit` in total, do not count as
    `retries`.

    Args:
        name: of the thread.
        key: sent as "Authorization: Bearer KEY". Proxies of the environment are not used.
        time_limit: seconds for one try, from connecting to the end of the answer.
        retries: tries after the first one.
        try_again: statuses that are retried.
        max_concurrency: largest number of concurrent tries in this process; default: no limit.
        requests_per_minute: tries started per minute by this process, evenly spaced; default: no limit.
        media_type: of the request body.

    Attributes:
        unanswered: a sentence on the latest cancelled `ask`: url, what was asked and its last failure.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        name: str,
        *,
        key: str | None,
        time_limit: float,
        retries: int,
        try_again: Sequence[int] = (502, 503, 504),
        max_concurrency: int | None = None,
        requests_per_minute: float | None = None,
        media_type: str = "application/octet-stream",
    ):
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit={time_limit!r} must be a positive number of seconds.")
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries={retries!r} must be a whole number, 0 or more.")
        if max_concurrency is not None and (not isinstance(max_concurrency, int) or max_concurrency < 1):
            raise ValueError(f"max_concurrency={max_concurrency!r} must be a whole number, 1 or more.")
        if requests_per_minute is not None and not 0 < requests_per_minute < math.inf:
            raise ValueError(f"requests_per_minute={requests_per_minute!r} must be a positive number.")
        self._key = (key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("the key (token) contains characters that a header cannot carry.")
        self._secrets, self._logins = [self._key] if self._key else [], {}
        self._sent = {"Content-Type": media_type}
        self.name, self.time_limit, self.retries = name, time_limit, retries
        self.try_again, self.max_concurrency = try_again, max_concurrency
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._random = random.Random()  # leaves the run's random state alone
        self._process, self._lock, self.unanswered = None, threading.Lock(), ""

    def without_login(self, url: str) -> str:
        """Return the url without USER:PASSWORD@, so that messages may show it. Requests to it send these as basic
        authentication instead of the key."""
        if found := CREDENTIALS.search(url):
            url, login = url.replace(found[0], "", 1), unquote(found[1])
            self._logins[url] = f"Basic {base64.b64encode(login.encode()).decode()}"
            self._secrets += [login, self._logins[url].removeprefix("Basic "), login.partition(":")[2] or login]
        return url

    def _headers(self, url: str) -> dict[str, str]:
        sent = self._logins.get(url, f"Bearer {self._key}" if self._key else "")
        return {"Authorization": sent} if sent else {}

    def get(self, url: str, path: str) -> httpx2.Response:
        """Send one GET request without retries, for a check before a run."""
        return httpx2.get(
            url + path, headers=self._headers(url), timeout=CONNECT, trust_env=False, verify=_certificates()
        )

    def error_in(self, response: httpx2.Response) -> str:
        """Return a server's error text without secrets: its "error" (a sentence or OpenAI's {"message": ...}), or
        FastAPI's "detail"."""
        try:
            answer = json.loads(response.content)
            error = next(answer[key] for key in ("error", "detail", "message") if key in answer)
            message = str(error["message"] if isinstance(error, dict) and "message" in error else error)
        except (ValueError, TypeError, StopIteration):
            message = repr(response.text[:200])
        for secret in self._secrets:
            message = message.replace(secret, "***")
        return message

    async def ask(
        self, urls: Sequence[str], path: str, body: Callable[[], bytes], read: Callable[[bytes], T], asked: str
    ) -> T:
        """POST body() to urls[0] + path, on failure to the next url and so on, cyclically; return `read` of the first
        answer with status 200.

        Raises `Failed`, also if `read` raises ValueError. `asked` describes the request, for `unanswered`.
        """
        failures, self.unanswered = [f"{urls[0]}: no answer yet."], ""
        try:
            return await asyncio.wrap_future(self._start(self._ask(urls, path, body, read, failures)))
        except asyncio.CancelledError:  # keep the first of several concurrent requests
            self.unanswered = self.unanswered or f"It asked for {asked}; the last failure: {failures[-1]}"
            raise

    def ask_before_a_run(self, url: str, path: str, body: bytes, read: Callable[[bytes], T]) -> T:
        """Run `ask` and wait for it."""
        return self._start(self._ask([url], path, lambda: body, read, [])).result()

    def _start(self, coroutine: Coroutine) -> Future:
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._client = httpx2.AsyncClient(
                    timeout=httpx2.Timeout(None, connect=min(CONNECT, self.time_limit)),
                    limits=httpx2.Limits(keepalive_expiry=60),
                    trust_env=False,
                    verify=_certificates(),
                )
                self._free = asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else None
                self._next = 0.0  # when the next try may start, on the loop's clock
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name=f"remote {self.name}", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _ask(
        self,
        urls: Sequence[str],
        path: str,
        body: Callable[[], bytes],
        read: Callable[[bytes], T],
        failures: list[str],
    ) -> T:
        tries, patience = 0, self.time_limit
        for attempt in itertools.count():
            url = urls[attempt % len(urls)]
            try:
                async with self._free or contextlib.nullcontext():
                    await self._wait_for_turn()
                    response = await self._post(url, path, body())
                return read(response)
            except ValueError as error:
                raise Failed(str(error), url) from error
            except TryAgain as error:
                failures.append(f"{url}: {error}")
                busy = error.retry_after is not None and patience > 0
                if not busy and tries == self.retries:
                    many = f"{attempt + 1} tries, the last: " if attempt else ""
                    raise Failed(f"{many}{error}", url, error.status) from error
                wait = min(0.5 * 2**tries, LONGEST_WAIT) * self._random.uniform(0.5, 1.5)
                wait = max(wait, min(error.retry_after or 0.0, self.time_limit))
                tries, patience = (tries, patience - wait) if busy else (tries + 1, patience)
                await asyncio.sleep(wait)

    async def _wait_for_turn(self) -> None:
        now = self._loop.time()
        start = max(now, self._next)
        self._next = start + self._interval
        await asyncio.sleep(start - now)

    async def _post(self, url: str, path: str, body: bytes) -> bytes:
        """Return the body of an answer with status 200.

        Raises TryAgain, or Failed if another try would not help."""
        headers = self._headers(url) | self._sent | {"Content-Length": str(len(body))}
        post = self._client.post(url + path, content=_body_pieces(body), headers=headers)
        try:
            response = await asyncio.wait_for(post, self.time_limit)
        except asyncio.TimeoutError as error:
            raise TryAgain(f"no answer within {self.time_limit:g} s (time_limit).") from error
        except httpx2.TransportError as error:
            raise TryAgain(f"{type(error).__name__}: {error}.") from error
        except httpx2.HTTPError as error:
            raise Failed(f"{type(error).__name__}: {error}.", url) from error
        if response.status_code == 200:
            return response.content
        message = f"status {response.status_code}: {self.error_in(response)}"
        if response.status_code in self.try_again:
            raise TryAgain(message, _seconds(response.headers.get("retry-after")), response.status_code)
        raise Failed(message, url, response.status_code)


def masked(text: str) -> str:
    """Replace the credentials before the @ of urls in a text with ***."""
    return CREDENTIALS.sub("***@", text)


def read_settings(
    reward: str, query: str, known: Mapping[str, Callable[[str], object]], advice: Callable[[str], str] | None = None
) -> list[tuple[str, object]]:
    """Parse the settings in a url's query, each with its function in `known`. `advice` adds to the error for an
    unknown setting.

    Raises ValueError naming the reward and the setting.
    """
    settings = []
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            more = advice(key) if advice else ""
            raise ValueError(
                f"reward {masked(reward)!r}: unknown setting {key!r}; available: {', '.join(known)}.{more}"
            )
        try:
            settings.append((key, known[key](text)))
        except ValueError as error:
            raise ValueError(f"reward {masked(reward)!r}: {key}={text!r} cannot be read: {error}.") from error
    return settings


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds in a Retry-After (a number or a date); 0 if it is unreadable, None without one."""
    if retry_after is None:
        return None
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


async def _body_pieces(body: bytes) -> AsyncIterator[memoryview]:
    """Yield a body in pieces: sent at once, a large one would be copied into the socket's buffer."""
    for start in range(0, len(body), PIECE):
        yield memoryview(body)[start : start + PIECE]
