"""`pisces-rl serve`: serve rewards on this machine to trainers elsewhere."""

import argparse
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

INSTALL = "pisces-rl serve needs starlette and uvicorn: pip install 'pisces_rl[server]'"


def _number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: an integer from `low` to `high`. (getaddrinfo would take a port modulo 2^16.)"""

    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{value} must be at least {low}" if high is None else f"{value} must be {low} to {high}"
            )
        return value

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rewards",
        nargs="+",
        required=True,
        metavar="NAME",
        help="Known names (an unknown one lists them), file.py:function or package.module:function.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; non-loopback needs a token.")
    parser.add_argument("--port", type=_number(0, 65535), default=0, help="0 picks a free port and prints it.")
    parser.add_argument("--token_file", "--token-file", type=Path, help="File with the token that requests must send.")
    parser.add_argument("--device", help="Where rewards compute; default: cuda if available, else cpu.")
    parser.add_argument(
        "--max_batch",
        type=_number(1),
        default=16,
        help="Largest number of videos when waiting requests are merged; a request is never split.",
    )
    parser.add_argument("--queue", type=_number(1), default=16, help="Requests in the server at once; others get 503.")
    parser.add_argument(
        "--max_mb", type=_number(1), default=2048, help="Limit in MiB per request; larger ones get 413."
    )


def main(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT. When ready, print one line, `serving URL URL ...`, with the URL of each reward.
    Raises ValueError for a wrong argument before any reward is loaded."""
    token = None if args.token_file is None else _token(args.token_file)
    if token is None and not _is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} can be reached from other machines: pass a --token_file, or leave the "
            "host at 127.0.0.1."
        )
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"{INSTALL} ({error})") from error
    listener = _listener(args.host, args.port)  # fail before minutes of loading; clients cannot connect yet

    import torch

    from pisces_rl.rewards.functions import load_function
    from pisces_rl.rewards.panel import RewardPanel

    from .application import RewardApplication
    from .scoring_queue import ScoringQueue

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    queue = ScoringQueue(args.max_batch)
    panel = RewardPanel(
        [
            load_function(name) if ":" in name and "://" not in name else name  # avoids importing transformers
            for name in args.rewards
        ],
        device=device,
    )
    if slashed := [name for name in panel.names if "/" in name]:
        raise ValueError(
            f"reward {slashed[0]!r}: the name of a served reward is part of a url and may not contain '/'; give the "
            "reward another name (__name__)."
        )
    application = RewardApplication(panel, queue, limit=args.queue, max_bytes=args.max_mb << 20, token=token)
    host, port = listener.getsockname()[:2]
    host = socket.gethostname() if ipaddress.ip_address(host).is_unspecified else f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            urls = (f"http://{host}:{port}/{quote(name, safe='')}" for name in application.about)
            print("serving", *urls, flush=True)

        def handle_exit(self, sig, frame) -> None:
            super().handle_exit(sig, frame)
            threading.Thread(target=queue.stop).start()  # the main thread may hold the queue's lock

    for kind in (signal.SIGTERM, signal.SIGINT):  # uvicorn re-raises the signal once it has stopped
        signal.signal(kind, lambda *_: None)
    # Clients keep connections for a minute, so keep them longer here.
    config = uvicorn.Config(
        application.asgi, lifespan="off", log_level="warning", access_log=False, ws="none", timeout_keep_alive=75
    )
    Server(config).run(sockets=[listener])


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file {path} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"--token_file {path} must contain one word of printable ASCII.")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be used: {error}") from error
    return listener
