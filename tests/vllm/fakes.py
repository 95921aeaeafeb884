"""Planners and seeds that misbehave, on their own threads: sockets for invalid HTTP, aiohttp for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from aiohttp import ClientSession, web

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@contextlib.contextmanager
def http_server(handler: Handler) -> Iterator[str]:
    """Serve ``handler`` on a free port, and yield the base URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[web.ServerRunner, int]:
        runner = web.ServerRunner(web.Server(handler))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


@contextlib.contextmanager
def silent_server(asked: list[bytes] | None = None) -> Iterator[str]:
    """Accept connections and never answer; append the beginning of each request to ``asked``."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    connection = held.enter_context(listener.accept()[0])
                    if asked is not None:
                        asked.append(connection.recv(65536))

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)  # ends accept
        thread.join(60)


@contextlib.contextmanager
def answering(raw: bytes) -> Iterator[str]:
    """Answer every connection with ``raw``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError), listener.accept()[0] as connection:
                    connection.settimeout(2)
                    with contextlib.suppress(OSError):
                        connection.recv(65536)
                        connection.sendall(raw)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join(60)


def planner_that_grants(seed: str, log: list[str], **changed: str) -> Handler:
    """A planner that grants ``seed`` (``ip:port:rank``) to every caller, and logs the path of each call."""
    host, port, rank = seed.rsplit(":", 2)
    granted = {"SEED_IP": host, "SEED_PORT": port, "SEED_RANK": rank, "USER_ID": "u1", "LEASE_TTL_SEC": "60"}
    granted.update(changed)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        log.append(request.path)
        return web.Response(headers=granted if request.path == "/get_seed" else {})

    return handle


def seed_in_between(seed: str, change: Callable[[str, Any], Any]) -> Handler:
    """A seed service that forwards requests to the real ``seed`` and changes the answers by ``change(path, json)``.

    ``change`` returns JSON data, bytes, or a response of its own.
    """
    host, port, _ = seed.rsplit(":", 2)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        import json

        async with ClientSession() as session:
            url = f"http://{host}:{port}{request.path}"
            headers = {k: v for k, v in request.headers.items() if k.upper().startswith("RFORK")}
            async with session.get(url, params=dict(request.query), headers=headers) as answer:
                body = await answer.read()
                if answer.status != 200:
                    return web.Response(status=answer.status, body=body)
        changed = change(request.path, json.loads(body) if body else None)
        if isinstance(changed, web.StreamResponse):
            return changed
        return web.Response(body=changed if isinstance(changed, bytes) else json.dumps(changed).encode())

    return handle
