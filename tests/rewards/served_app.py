"""A Starlette app served by a thread of this process, and what a server can do to a request."""

import asyncio
import socket
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Server(uvicorn.Server):
    """Ends within a hundredth of a second and waits for no connection; uvicorn takes two tenths."""

    async def main_loop(self):
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets=None):
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)


class ServedApp:
    """with ServedApp(Route(...)) as served: ... served.url"""

    def __init__(self, *routes: Route):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), lifespan="off", log_level="critical", ws="none", timeout_graceful_shutdown=0
        )
        self.uvicorn = Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.uvicorn.should_exit = True
        self.thread.join(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# --- deeds: (server, a good answer's text) -> what it answers instead ---


def status(code: int, **headers):
    async def deed(served, answer):
        return JSONResponse(
            {"error": f"this is {code}."}, code, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return deed


async def half(served, answer):
    return Response(answer[:20], headers={"Content-Length": str(len(answer))}, media_type="application/json")


async def reset(served, answer):
    for connection in list(served.uvicorn.server_state.connections):
        connection.transport.abort()
    return Response(answer)


async def stall(served, answer):
    await asyncio.sleep(60)
    return Response(answer)


async def garbage(served, answer):
    return Response("<html>")
