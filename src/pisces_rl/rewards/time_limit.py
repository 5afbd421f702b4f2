"""A limit on the time that a call may take, which ends the process where the call cannot be interrupted."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

from .contract import RewardError

GRACE = 10.0  # seconds that an interrupted call has to end


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """A RewardError with the message where the block takes longer than that; 0: no limit.

    The main thread is interrupted, as by Ctrl-C. A call that does not end by that (it waits inside C code, or for a
    thread of its own) cannot be left, so after GRACE seconds the process ends, with the message on stderr: the other
    ranks would wait for it.
    """
    if not seconds:
        yield
        return
    guarded, lock, ended, late = threading.get_ident(), threading.Lock(), threading.Event(), False

    def expire() -> None:
        nonlocal late
        with lock:
            if ended.is_set():
                return
            late = True
            stack = "".join(traceback.format_stack(sys._current_frames().get(guarded))[-6:])
            print(f"{message} It is here:\n{stack}", file=sys.stderr, flush=True)
            if guarded == threading.main_thread().ident:
                if sys.platform == "win32":
                    _thread.interrupt_main()
                else:  # a signal wakes what waits for a lock, which interrupt_main leaves asleep
                    signal.pthread_kill(guarded, signal.SIGINT)
        if not ended.wait(GRACE):
            print(f"{message} It cannot be interrupted, so this process ends.", file=sys.stderr, flush=True)
            os._exit(1)

    in_main = threading.current_thread() is threading.main_thread()
    ignored = in_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:  # by a shell that started the process in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:  # expire may hold it, and interrupt this wait in the place of the block
                ended.set()
    except KeyboardInterrupt:
        if not late:
            raise
    finally:
        ended.set()
        timer.cancel()
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if late:
        raise RewardError(message)
