"""Sees to it that a seed is withdrawn when its worker is killed: the worker's side of the watcher process.

One watcher per worker process and planner, shared by target and draft. The process (``watch_main.py``) is started
with the first seed and ends with the last one; it is no child of the worker's, in a session of its own, and reads
its orders from a pipe, so it survives SIGKILL, ``killpg``, and a kill of all of the worker's children.

Two things it cannot do. Where the worker's container dies with its process 1, the kernel takes the watcher along;
and a planner of the installed base may have no call to withdraw a seed. In both cases the planner finds out by
itself, when heartbeats have been missing for a minute.

Must not import aiohttp, torch or vLLM, nor need an event loop: it works while the process is going down.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rfork import messages
from vllm_rfork.credentials import Credentials, Options
from vllm_rfork.errors import SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.worker_log import worker_logger

logger = worker_logger(__name__)

_MAIN = Path(__file__).resolve().with_name("watch_main.py")
#: Pauses in seconds before each further attempt: a planner's restart fits in between, and after some seconds
#: more a planner that cannot be reached has noticed the missing heartbeats by itself.
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
#: One attempt takes no longer, so that a hanging planner does not use up all the time there is.
_MAX_ATTEMPT_S = 5.0
#: A beat may have been under way when the worker died: withdraw once more when it must have arrived.
_AGAIN_AFTER_S = 1.0
_ORDER_TIMEOUT_S = 5.0
#: What an interpreter and TLS may need of the environment; nothing else is handed on.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "LANG", "LC_ALL", "TZ")


@dataclass(frozen=True)
class _Process:
    """A running watcher. ``status_fd`` ends when it has exited: until then ``pid`` can be no other process's."""

    pid: int
    orders_fd: int
    status_fd: int

    def send(self, order: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            OSError: the watcher is gone, or takes nothing for ``_ORDER_TIMEOUT_S`` seconds.
        """
        rest = memoryview(json.dumps(order).encode() + b"\n")
        deadline = time.monotonic() + _ORDER_TIMEOUT_S
        while rest:
            if not _ready(self.orders_fd, select.POLLOUT, deadline):
                raise TimeoutError("the watcher takes no orders")
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self.orders_fd, rest) :]

    def end(self, timeout_s: float) -> None:
        """Close the pipes once the process has exited; kill it where it does not within ``timeout_s`` seconds."""
        self.close_orders()
        deadline = time.monotonic() + timeout_s
        if not self._wait_for_exit(deadline):
            os.kill(self.pid, signal.SIGKILL)
            self._wait_for_exit(time.monotonic() + 1.0)
        os.close(self.status_fd)

    def close_orders(self) -> None:
        """Let the watcher see the end of its pipe."""
        with contextlib.suppress(OSError):
            os.close(self.orders_fd)

    def _wait_for_exit(self, deadline: float) -> bool:
        while _ready(self.status_fd, select.POLLIN, deadline):
            if not os.read(self.status_fd, 4096):
                return True
        return False


class Watcher:
    """Orders to the watcher process. Safe to use from any thread; made by :meth:`start`."""

    def __init__(
        self,
        planner_url: str,
        token: str | None,
        request_timeout_s: float,
        *,
        credentials: Credentials | None = None,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        credentials = credentials or Credentials(Options(token=token or ""))
        options = credentials.options
        self._planner = _Planner.parse(planner_url, credentials.token or None)
        self._config = {
            "timeout_s": min(request_timeout_s, _MAX_ATTEMPT_S),
            "pauses_s": list(pauses_s),
            "again_after_s": _AGAIN_AFTER_S,
            # It looks at the files when it needs them: they may have been renewed by then.
            "token_file": options.token_file,
            "ca_file": options.ca_file,
            "cert_file": options.cert_file,
            "key_file": options.key_file,
        }
        self._start_timeout_s = max(10.0, request_timeout_s)
        self._lock = threading.Lock()
        self._watched: dict[str, dict[str, Any]] = {}
        self._process: _Process | None = None
        _watchers.add(self)

    @classmethod
    def start(
        cls,
        planner_url: str,
        token: str | None,
        request_timeout_s: float,
        *,
        credentials: Credentials | None = None,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> Watcher:
        """Start a watcher that withdraws from the planner at ``planner_url``.

        Args:
            token: sent as ``Authorization: Bearer``.
            request_timeout_s: bound of one attempt in seconds, at most 5; also of the start, at least 10.
            credentials: token and TLS, in place of ``token``.
            pauses_s: seconds before each further attempt.

        Raises:
            SeedError: the process could not be started.
        """
        watcher = cls(planner_url, token, request_timeout_s, credentials=credentials, pauses_s=pauses_s)
        with watcher._lock:
            watcher._process = watcher._started()
        return watcher

    @property
    def pid(self) -> int | None:
        """Number of the watcher process; None where there is none."""
        process = self._process
        return None if process is None else process.pid

    def watch(self, seed_key: str, seed: SeedAddress, *, epoch: str = "") -> None:
        """From now on, withdraw ``seed`` when this process dies. To be called before the seed is announced.

        Args:
            epoch: travels along, so that a planner that knows it leaves a successor on the same port alone.

        Raises:
            SeedError: there is no watcher, and none could be started.
        """
        order = {"watch": _id(seed_key, seed), **self._planner.order(seed_key, seed, epoch)}
        with self._lock:
            self._watched[order["watch"]] = order
            try:
                self._send(order)
            except SeedError:
                del self._watched[order["watch"]]
                raise

    def forget(self, seed_key: str, seed: SeedAddress) -> None:
        """Withdraw ``seed`` no more: it has been. With the last seed the process ends. Unknown seeds are ignored."""
        with self._lock:
            order = self._watched.pop(_id(seed_key, seed), None)
            if order is None or self._process is None:
                return
            if self._watched:
                self._send({"forget": order["watch"]})
            else:
                self._end(_ORDER_TIMEOUT_S)

    def close(self, timeout_s: float = _ORDER_TIMEOUT_S) -> None:
        """End the process without withdrawing anything; afterwards neither it nor its pipes are there.

        It is killed where it does not end within ``timeout_s`` seconds. Closing twice does nothing.
        """
        with self._lock:
            self._watched.clear()
            self._end(timeout_s)

    def _end(self, timeout_s: float) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):  # it is gone already
                process.send({"done": True})
            process.end(timeout_s)

    def _send(self, order: Mapping[str, Any]) -> None:
        """Send ``order``; where the watcher is gone, start another one and tell it everything."""
        if self._process is not None:
            try:
                self._process.send(order)
            except OSError as error:
                logger.warning("the watcher process %d is gone (%s); starting another one", self._process.pid, error)
                self._process.end(0.0)
                self._process = None
            else:
                return
        self._process = self._started()
        try:
            for each in self._watched.values():
                self._process.send(each)
        except OSError as error:
            raise SeedError(f"the watcher process takes no orders: {error}", retry_elsewhere=False) from error

    def _started(self) -> _Process:
        """A new process that has said that it is ready and has its configuration."""
        orders_in, orders_out = os.pipe()
        status_in, status_out = os.pipe()
        try:
            pid = _spawn(orders_in, status_out, status_in, self._start_timeout_s)
            os.set_blocking(orders_out, False)
            process = _Process(pid, orders_out, status_in)
            process.send({"worker": os.getpid(), **self._config})
        except BaseException as error:
            os.close(orders_out)
            os.close(status_in)
            if isinstance(error, (OSError, subprocess.SubprocessError, ValueError)):
                raise SeedError(f"the watcher process cannot be started: {error}", retry_elsewhere=False) from error
            raise
        logger.debug("watcher process %d started", pid)
        return process

    def abandon(self) -> None:
        """Called in a forked child: the seeds and their watcher are the parent's, and so is the pipe."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        self._watched = {}
        if process is not None:
            process.close_orders()
            with contextlib.suppress(OSError):
                os.close(process.status_fd)


def _spawn(orders_in: int, status_out: int, status_in: int, timeout_s: float) -> int:
    """Start ``watch_main.py`` on the two ends, which are closed here, and return its number when it is ready.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: it did not start or did not get ready.
    """
    deadline = time.monotonic() + timeout_s
    try:
        if not sys.executable:
            raise ValueError("this Python does not know its own executable")
        first = subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
            [sys.executable, "-I", "-S", str(_MAIN)],
            stdin=orders_in,
            stdout=status_out,
            stderr=status_out,
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
        )
    finally:
        os.close(orders_in)
        os.close(status_out)
    said = b""
    try:
        while b"\n" not in said or not said.startswith(b"ready "):
            if not _ready(status_in, select.POLLIN, deadline):
                raise TimeoutError(f"it was not ready within {timeout_s:g} s")
            data = os.read(status_in, 4096)
            if not data or len(said) > 65536:
                raise ValueError(f"it ended at once and said {said[-500:].decode(errors='replace')!r}")
            said += data
        first.wait(max(0.0, deadline - time.monotonic()))  # it forks and ends; the watcher is its child
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)  # it leads its session, so this reaches its child as well
        first.wait()
        raise
    return int(said.split()[1])


@dataclass(frozen=True)
class _Planner:
    """Where requests go and what is the same in all of them."""

    host: str
    port: int
    tls: bool
    path: str
    common: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, url: str, token: str | None) -> _Planner:
        """The planner at ``url``.

        Raises:
            SeedError: not an ``http`` or ``https`` address.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port, tls = parts.hostname, parts.port, parts.scheme == "https"
        except ValueError as error:
            raise SeedError(f"the planner's address cannot be read: {error}", retry_elsewhere=False) from error
        if not host or parts.scheme not in ("http", "https"):
            raise SeedError("the planner's address must begin with http:// or https://", retry_elsewhere=False)
        authority = f"[{host}]" if ":" in host else host.encode("idna").decode()
        if token is not None and not token.isprintable():
            raise SeedError("the planner's token holds characters that no header may hold", retry_elsewhere=False)
        common = [("Host", authority if port is None else f"{authority}:{port}")]
        if token is not None:
            common.append(("Authorization", f"Bearer {token}"))
        elif parts.username is not None:
            given = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
            common.append(("Authorization", "Basic " + base64.b64encode(given.encode()).decode()))
        path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@") + messages.REMOVE_SEED
        return cls(host, port or (443 if tls else 80), tls, path, tuple(common))

    def order(self, seed_key: str, seed: SeedAddress, epoch: str) -> dict[str, Any]:
        """The withdrawal of ``seed`` as the watcher sends it, in both spellings of the header names."""
        headers = {messages.SEED_KEY: messages.encode_text(seed_key), **seed.headers()}
        if epoch:
            headers[messages.EPOCH] = messages.encode_text(epoch)
        spellings = [headers, {name.replace("_", "-"): value for name, value in headers.items()}]
        return {"host": self.host, "port": self.port, "tls": self.tls, "requests": [*map(self._request, spellings)]}

    def _request(self, headers: Mapping[str, str]) -> str:
        lines = [f"POST {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*self.common, *headers.items())]
        lines += ["Content-Length: 0", "Connection: close", "", ""]
        return "\r\n".join(lines)


def _id(seed_key: str, seed: SeedAddress) -> str:
    return f"{seed} {seed_key}"


def _ready(fd: int, event: int, deadline: float) -> bool:
    """Whether ``fd`` is ready, has ended or has failed before ``deadline``. Unlike select(), for any number."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def _abandon_in_child() -> None:
    """A child that kept the pipe open would hide its parent's death."""
    for watcher in list(_watchers):
        watcher.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)
