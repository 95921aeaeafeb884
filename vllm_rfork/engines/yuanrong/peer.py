"""A seed's YuanRong engine: its endpoint, a probe, and the relay. Everything here releases the GIL while it waits."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from vllm_rfork.engines.yuanrong import relay
from vllm_rfork.engines.yuanrong.native import NAME
from vllm_rfork.errors import EngineError

_MAGIC = b"TERP"
_QUERY_CONNECTION_READY = 2
_ANSWER_NBYTES = 9  # magic, method, length of what follows


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """The parts of ``host:port``, the form that legacy workers exchange.

    Raises:
        EngineError: it is something else.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or ":" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise EngineError(
            NAME, "connect", f"{endpoint[:100]!r} is not an endpoint of this engine (host:port)", side="seed"
        )
    return host, int(port)


def free_port(address: str) -> int:
    """A port of ``address`` that was free a moment ago; the engine does not accept 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as attempt:
        attempt.bind((address, 0))
        port: int = attempt.getsockname()[1]
        return port


def probe(address: tuple[str, int], timeout_s: float, operation: str, *, converse: bool) -> None:
    """Check that an engine answers at ``address`` within ``timeout_s`` seconds.

    The kernel accepts connections even for a stopped process. So with ``converse``, the probe asks in the engine's
    control protocol whether a connection that was never requested is ready: the engine keeps no state for it and
    answers from a native thread within a millisecond. Without ``converse``, the TCP connection suffices.

    Raises:
        EngineError: no process listens, none answers, or the answer is not an engine's.
    """
    deadline = time.monotonic() + timeout_s
    shown = f"{address[0]}:{address[1]}"
    got = b""
    try:
        with socket.create_connection(address, max(timeout_s, 1e-3)) as connection:
            if not converse:
                return
            connection.sendall(_question(connection.getsockname()[1]))
            while len(got) < _ANSWER_NBYTES:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError("it accepts connections but does not answer")
                connection.settimeout(left_s)
                piece = connection.recv(_ANSWER_NBYTES - len(got))
                if not piece:
                    break
                got += piece
    except (OSError, UnicodeError) as error:
        code = "timeout" if isinstance(error, TimeoutError) else ""
        raise EngineError(
            NAME,
            operation,
            f"no engine answers at {shown} within {timeout_s:g} s: {error}",
            code=code,
            retry_elsewhere=True,
            side="unknown",
        ) from error
    if not got.startswith(_MAGIC):
        raise EngineError(
            NAME, operation, f"the service at {shown} is not a YuanRong engine", retry_elsewhere=True, side="seed"
        )


def _question(port: int) -> bytes:
    """A QueryConnReady: requester's host, port and device, owner's device (-1: unknown)."""
    host = b"127.0.0.1"
    body = struct.pack(">I", len(host)) + host + struct.pack(">Iii", port, 0, -1)
    return _MAGIC + bytes([_QUERY_CONNECTION_READY]) + struct.pack(">I", len(body)) + body


class Relay:
    """The relay process for one peer (:mod:`.relay`); ``stop`` ends it.

    Raises:
        EngineError: it does not start within ``timeout_s`` seconds.
    """

    def __init__(self, address: tuple[str, int], bound_s: float, timeout_s: float) -> None:
        script = Path(relay.__file__)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own script; the peer's address is two arguments
                [sys.executable, "-I", "-S", str(script), address[0], str(address[1]), f"{bound_s:.3f}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise EngineError(
                NAME, "connect", f"the relay process cannot be started: {error}", side="receiver"
            ) from error
        try:
            self.target = f"127.0.0.1:{self._read_port(timeout_s)}"
        except EngineError:
            self.stop()
            raise

    def _read_port(self, timeout_s: float) -> int:
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line.strip().isdigit():
            raise EngineError(
                NAME, "connect", f"the relay process did not start within {timeout_s:g} s", side="receiver"
            )
        return int(line)

    def stop(self) -> None:
        """End the process and reap it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
