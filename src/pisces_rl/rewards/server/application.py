"""The web application of a reward server; needs starlette."""

import asyncio
import hmac
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pisces_rl
from pisces_rl.rewards.contract import RewardError, compares_videos
from pisces_rl.rewards.panel import RewardPanel

from .identity import columns_of, identity
from .scoring_queue import ScoringQueue, Stopping
from .wire import PROTOCOL, TooLarge, pack_answer, too_large, unpack_request

RETRY_AFTER = 1  # seconds
LONGEST_PAUSE = 60.0  # seconds between two parts of a body, after which the client counts as gone
PROGRESS = 30.0  # seconds between two progress lines on stderr while requests come in


class RewardApplication:
    """The server for the rewards of a panel; `asgi` is its ASGI application.

    Args:
        panel: the rewards, with their names.
        queue: does the scoring.
        limit: largest number of requests in the server at once, including the one being scored.
        max_bytes: limit on a request's body.
        token: required in every request; None: no token.
    """

    def __init__(self, panel: RewardPanel, queue: ScoringQueue, *, limit: int, max_bytes: int, token: str | None):
        self.panels = {name: panel.only([i]) for i, name in enumerate(panel.names)}
        self.queue, self.limit, self.max_bytes = queue, limit, max_bytes
        self.token, self.inside = None if token is None else f"Bearer {token}".encode(), 0
        self.scored = 0  # videos
        self._line_from, self._scored_then, self._latest = time.monotonic(), 0, time.monotonic()
        self.about = {
            name: {"identity": identity(func), "compares_videos": compares_videos(func), "columns": columns_of(func)}
            for name, func in zip(panel.names, panel.funcs)
        }
        self.asgi = Starlette(
            routes=[Route("/health", self.health), Route("/score/{name:path}", self.score, methods=["POST"])],
            exception_handlers={HTTPException: _error_response},
        )

    async def health(self, request: Request) -> Response:
        self._check_token(request)
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "version": pisces_rl.__version__,
                "rewards": self.about,
                "queue": self.inside,
                "scored": self.scored,
                "state": "stopping" if self.queue.stopped else "ready",
                "max_bytes": self.max_bytes,
            }
        )

    async def score(self, request: Request) -> Response:
        self._check_token(request)
        name = request.path_params["name"]
        try:
            if name not in self.panels:
                await self._refuse(request, 404, f"no reward {name!r} here; available: {', '.join(self.panels)}.")
            if self.queue.stopped or self.inside >= self.limit:
                why = "the server is stopping" if self.queue.stopped else f"the queue of {self.limit} requests is full"
                await self._refuse(request, 503, f"{why}; try again.")
            return await self._scored_response(request, name)
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone

    async def _scored_response(self, request: Request, name: str) -> Response:
        if not self.inside and time.monotonic() - self._latest >= PROGRESS:  # do not count idle time in the rate
            self._line_from, self._scored_then = time.monotonic(), self.scored
        self.inside += 1
        try:
            body = await self._body(request)
            try:
                asked = await asyncio.to_thread(unpack_request, body, self.max_bytes)
            except TooLarge as error:
                raise HTTPException(413, str(error)) from error
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            del body
            answer = await self._result_unless_disconnected(request, self.queue.put(self.panels[name], asked))
            self._print_progress(len(asked.prompts))
            return Response(pack_answer(name, self.about[name]["identity"], answer), media_type="application/json")
        except Stopping as error:
            raise _busy("the server is stopping; try again.") from error
        except (RewardError, ValueError) as error:
            raise HTTPException(500, str(error)) from error
        finally:
            self.inside -= 1
            self._latest = time.monotonic()

    def _print_progress(self, videos: int) -> None:
        self.scored += videos
        seconds = time.monotonic() - self._line_from
        if seconds >= PROGRESS:
            rate = (self.scored - self._scored_then) / seconds
            print(
                f"{self.scored} videos scored, {rate:.3g} per second; requests in the server: {self.inside}",
                file=sys.stderr,
                flush=True,
            )
            self._line_from, self._scored_then = time.monotonic(), self.scored

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self.token):
            raise HTTPException(401, "the token is missing or wrong.")

    async def _body(self, request: Request) -> bytes:
        """Read the whole body, even if it is too large: see `_refuse`."""
        parts, size = [], 0
        async for part in _pieces(request):
            size += len(part)
            if size <= self.max_bytes:
                parts.append(part)
            else:
                parts.clear()
        if size > self.max_bytes:
            raise HTTPException(413, too_large(size, self.max_bytes))
        return b"".join(parts)

    async def _refuse(self, request: Request, status: int, why: str) -> None:
        """Read and drop the body, then answer: a client that is cut off while sending would not read the answer."""
        async for _ in _pieces(request):
            pass
        raise _busy(why) if status == 503 else HTTPException(status, why)

    async def _result_unless_disconnected(self, request: Request, future: Future):
        """Return the future's result, or cancel it if the client disconnects before its turn."""
        scored, gone = asyncio.wrap_future(future), asyncio.create_task(request.receive())  # returns on disconnect
        try:
            await asyncio.wait((scored, gone), return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():
                raise ClientDisconnect
            return scored.result()
        finally:
            scored.cancel()
            gone.cancel()


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield a body as it arrives. Raises ClientDisconnect after `LONGEST_PAUSE` without a piece."""
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream, None), LONGEST_PAUSE)
        except asyncio.TimeoutError:
            raise ClientDisconnect from None
        if piece is None:
            return
        yield piece


def _busy(why: str) -> HTTPException:
    return HTTPException(503, why, headers={"Retry-After": str(RETRY_AFTER)})


async def _error_response(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)
