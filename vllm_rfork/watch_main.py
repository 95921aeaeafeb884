"""The watcher process: outlives a worker that was killed, and tells the planner so.

vLLM ends its workers with SIGKILL; nothing in a worker runs then, so something beside it has to. This program holds
the read end of a pipe whose other end is in the worker. When the pipe ends, or a pidfd says that the worker is dead
(a child may have inherited the pipe), it sends the requests that it was given and exits.

It is started by :mod:`vllm_rfork.watcher` as ``python -I -S watch_main.py``: no site packages, no environment, and
only the standard library's light half, since one such process idles beside every worker. So it must not import
anything of the package, and knows nothing of the protocol but what a status means. Lines on its standard input:

    {"worker": pid, "timeout_s": s, "pauses_s": [s, ...], "again_after_s": s,           the first line
     "token_file": path, "ca_file": path, "cert_file": path, "key_file": path}          empty where there is none
    {"watch": id, "host": h, "port": p, "tls": bool, "requests": [text, ...]}           the same id replaces
    {"forget": id}
    {"done": true}                                                                      exit, send nothing

Secrets arrive here and nowhere else: arguments and environment can be read by others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

#: The planner has taken the seed back (200), lets it drain (409), or knows neither it nor the call (404, 405).
SETTLED = frozenset({200, 404, 405, 409})
#: The planner is overloaded or away: try again. Any other status is a refusal that will not change.
RETRIED = frozenset({408, 429, *range(500, 600)})
#: Without pidfd the worker is looked at this often, in seconds.
POLL_S = 0.25
#: By then the planner has missed enough heartbeats to know by itself. Also ends what cannot be interrupted: a
#: request that hangs in name resolution.
LONGEST_S = 60.0
_MAX_STATUS_LINE_NBYTES = 4096


class Worker:
    """Whether the worker still lives, by pidfd where the kernel has it, else by its line in ``/proc``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = -1
        self._begun = self._begun_at()
        try:
            self.pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError):  # an old kernel, a sandbox that forbids it, or the worker is dead already
            return

    def gone(self) -> bool:
        """Also true for a process that is dead and waits for its parent, and for another one with its number."""
        begun = self._begun_at()
        return not begun or begun != self._begun

    def _begun_at(self) -> str:
        """When the process began, in clock ticks since boot; empty where it is dead."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]


class Orders:
    """What the worker has said so far."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.watched: dict[str, dict[str, Any]] = {}
        self.context: Any = None
        self.done = False
        self.ended = False
        self._rest = b""

    def read(self) -> None:
        """Take in all that there is on standard input, without waiting."""
        while not self.ended:
            try:
                data = os.read(0, 65536)
            except BlockingIOError:
                return
            self.ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, order: dict[str, Any]) -> None:
        if "worker" in order:
            self.config = order
        elif "watch" in order:
            self.watched[order["watch"]] = order
            if order["tls"] and self.context is None:
                # Now: when it is needed there may be no memory and no file system.
                with contextlib.suppress(OSError, ValueError):
                    self.context = tls_context(self.config)
        elif "forget" in order:
            self.watched.pop(order["forget"], None)
        elif "done" in order:
            self.done = True


def wait(orders: Orders) -> None:
    """Return when the worker is dead, has closed the pipe, or has said that it is done."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    worker: Worker | None = None
    while not (orders.done or orders.ended):
        watched_by_number = worker is not None and worker.pidfd < 0
        ready = dict(poll.poll(POLL_S * 1000 if watched_by_number else None))
        if worker is not None and (worker.pidfd in ready or (watched_by_number and worker.gone())):
            orders.read()  # what it said last
            return
        orders.read()
        if worker is None and orders.config:
            worker = Worker(orders.config["worker"])
            if worker.pidfd >= 0:
                poll.register(worker.pidfd, select.POLLIN)


def equipped(orders: Orders) -> dict[str, Any]:
    """The configuration with ``token`` and ``tls``, from files as they are now, or as they were when there were any."""
    config = {**orders.config, "token": "", "tls": orders.context}
    if path := config.get("token_file"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            config["token"] = next(filter(None, (line.strip() for line in file.read(65536).splitlines())), "")
    if orders.context is not None:
        with contextlib.suppress(OSError, ValueError):
            config["tls"] = tls_context(config)
    return config


def authorized(request: str, token: str) -> str:
    """``request`` with ``token`` in place of the one that it was made with."""
    if not token or not token.isprintable():
        return request
    lines = [line for line in request.split("\r\n") if not line.lower().startswith("authorization:")]
    return "\r\n".join([lines[0], f"Authorization: Bearer {token}", *lines[1:]])


def tls_context(config: dict[str, Any]) -> Any:
    """What https needs.

    Raises:
        OSError, ValueError: a file cannot be used.
    """
    import ssl

    context = ssl.create_default_context(cafile=config.get("ca_file") or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file := config.get("cert_file"):
        context.load_cert_chain(cert_file, config.get("key_file") or None, password=b"")
    return context


def withdraw_all(orders: Orders) -> None:
    """Send every watched seed's request at once; return when all are settled or given up."""
    config = equipped(orders)
    threads = [
        threading.Thread(target=withdraw, args=(order, config), daemon=True) for order in orders.watched.values()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONGEST_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def withdraw(order: dict[str, Any], config: dict[str, Any]) -> None:
    """Send one seed's request until it is settled, a few times at most, and then once more.

    Once more, since a beat may have been under way when the worker died and be handled after the withdrawal.
    """
    if settle(order, config):
        time.sleep(config["again_after_s"])
        settle(order, config)


def settle(order: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the planner has settled the matter; there is nobody to tell why it has not."""
    for pause_s in [*config["pauses_s"], None]:
        status = 400
        for request in order["requests"]:  # the spellings of the header names: a 400 asks for the next one
            try:
                tls = (config.get("tls") or tls_context(config)) if order["tls"] else None
                text = authorized(request, config.get("token", ""))
                status = post(order["host"], order["port"], tls, text, config["timeout_s"])
            except (OSError, ValueError):
                status = 503
            if status != 400:
                break
        if status in SETTLED:
            return True
        if status not in RETRIED or pause_s is None:
            return False
        time.sleep(pause_s)
    return False


def post(host: str, port: int, tls: Any, request: str, timeout_s: float) -> int:
    """Send ``request`` as it is, through ``tls`` where it is an SSL context, and return the answer's status.

    Raises:
        OSError: no connection, or no answer within ``timeout_s`` seconds.
        ValueError: the answer is not HTTP.
    """
    deadline = time.monotonic() + timeout_s
    with socket.create_connection((host, port), timeout_s) as connection:
        stream: socket.socket = connection
        if tls:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            stream = tls.wrap_socket(connection, server_hostname=host)
        with stream:
            stream.sendall(request.encode())
            answer = b""
            while b"\n" not in answer and len(answer) < _MAX_STATUS_LINE_NBYTES:
                stream.settimeout(max(0.001, deadline - time.monotonic()))
                data = stream.recv(_MAX_STATUS_LINE_NBYTES)
                if not data:
                    break
                answer += data
    protocol, _, rest = answer.partition(b" ")
    if not protocol.startswith(b"HTTP/"):
        raise ValueError("not an HTTP answer")
    return int(rest[:3])


def main() -> None:
    """Detach, watch, and withdraw."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        # Whoever ends the worker this way ends it with us watching; then this process ends by itself.
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if os.fork():
        os._exit(0)  # the worker's child ends here, so that no walk over the worker's children finds this process
    os.set_blocking(0, False)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write("rfork-watcher")  # the name that ps and top show
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    sys.stdout.write(f"ready {os.getpid()}\n")
    sys.stdout.flush()
    orders = Orders()
    wait(orders)
    if not orders.done and orders.watched:
        withdraw_all(orders)
    os._exit(0)


if __name__ == "__main__":
    main()
