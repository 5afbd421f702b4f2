"""A time limit on a call, which ends the process if the call cannot be interrupted."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

from .contract import RewardError

GRACE = 10.0  # seconds for an interrupted call to end


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise a RewardError with `message` if the block takes longer than `seconds`; 0: no limit.

    The main thread is interrupted as by Ctrl-C. If that does not end the call (it waits inside C code, or runs in
    another thread), the process prints the message to stderr and exits after GRACE seconds, since other ranks would
    wait for it forever.
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
            print(f"{message} Its stack:\n{stack}", file=sys.stderr, flush=True)
            if guarded == threading.main_thread().ident:
                if sys.platform == "win32":
                    _thread.interrupt_main()
                else:  # unlike interrupt_main, a signal also wakes a thread that waits for a lock
                    signal.pthread_kill(guarded, signal.SIGINT)
        if not ended.wait(GRACE):
            print(f"{message} It cannot be interrupted, so this process ends.", file=sys.stderr, flush=True)
            os._exit(1)

    in_main = threading.current_thread() is threading.main_thread()
    ignored = in_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:  # a shell that starts a process in the background makes it ignore SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:  # expire may hold the lock, and interrupt this wait instead of the block
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
