"""Run coroutines in a separate thread while the caller continues."""

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future

from .thread_settings import with_settings_of_this_thread


class Coroutines:
    """An event loop in a daemon thread, started by the first `start`: a notebook's thread has a running loop already.

        with Coroutines() as coroutines:
            future = coroutines.start(coroutine)
            ...
            value = future.result()

    Coroutines run with the settings and context variables that the creating thread had on construction. Leaving the
    block through an exception cancels unfinished coroutines without waiting for one that blocks its thread.
    """

    def __init__(self):
        self._run = with_settings_of_this_thread(lambda: asyncio.run(self._serve()))
        self._context = contextvars.copy_context()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Coroutines":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)  # asyncio.run then cancels what is left
            if kind is None:
                self._thread.join()

    def start(self, coroutine: Coroutine) -> Future:
        if self._thread is None:
            self._ready = threading.Event()
            self._thread = threading.Thread(target=self._run, name="coroutines", daemon=True)
            self._thread.start()
            self._ready.wait()
        return self._context.run(asyncio.run_coroutine_threadsafe, coroutine, self._loop)

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._ended.wait()
