"""Two processes, random bytes, one forks from the other, digests compared.

The parent starts a seed and a receiver and only watches: a native engine that hangs hangs in a child, which the parent
ends at the deadline. The children run this module; they speak JSON lines over a socket of their own, since native
libraries write to standard output as they please. Must not import torch (:mod:`.buffers` does, for devices).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.selftest.buffers import Buffer

GOOD, WRONG_BYTES, FAILED, TOO_LATE = 0, 1, 3, 4
#: What the command's exit status means; 2 is click's, for wrong usage.
CODES = {GOOD: "the bytes are right", WRONG_BYTES: "bytes are wrong", FAILED: "the engine failed", TOO_LATE: "too late"}
_MIB = 1 << 20
_END_S = 5.0
_PIECE = 16 * _MIB


@dataclass(frozen=True)
class Plan:
    """What to test; ``timeout_s`` bounds the whole run, in seconds."""

    engine: str
    device: str = "cpu"
    seed_device: str = "cpu"
    nbytes: int = 256 * _MIB
    host: str = "127.0.0.1"
    timeout_s: float = 120.0
    corrupt: bool = False


@dataclass(frozen=True)
class Outcome:
    """The exit status (:data:`CODES`) and what to print."""

    code: int
    lines: list[str]


class _ChildFailed(Exception):
    """A child said what went wrong, or died without a word."""


class _Deadline(Exception):
    """The run's time is up."""


def buffer_sizes(nbytes: int) -> list[int]:
    """Lengths that add up to ``nbytes``: a quarter in one piece, then pieces of 1 MiB, then odd small ones."""
    sizes: list[int] = []
    left = nbytes
    for odd in (1, 7, 333, 4097, 65_537):
        if left > 2 * odd:
            sizes.append(odd)
            left -= odd
    large = left // 4
    if large:
        sizes.append(large)
        left -= large
    while left:
        sizes.append(min(left, _MIB))
        left -= sizes[-1]
    return sizes[::-1]


# -- the parent ------------------------------------------------------------------------------------------------------


class _Child:
    """One child process and the socket to it."""

    def __init__(self, role: str, plan: Plan) -> None:
        self.role = role
        self._socket, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self.process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            [
                sys.executable,
                "-m",
                "vllm_rfork.selftest.processes",
                role,
                str(theirs.fileno()),
                json.dumps(asdict(plan)),
            ],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        """One message to the child; a dead child is noticed by :meth:`receive`."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _ChildFailed(f"the {self.role} is gone: {error}") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The child's next message."""
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._socket], [], [], max(0.0, left))
            if not ready:
                raise _Deadline(f"the {self.role} was not done in time")
            try:
                got = self._socket.recv(_MIB)
            except ConnectionError:
                got = b""
            if not got:
                raise _ChildFailed(f"the {self.role} ended with status {self.process.wait(_END_S)} without a word")
            self._received += got
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise _ChildFailed(f"the {self.role} failed: {message['error']}")
        return message

    def end(self) -> None:
        """Let the child go, and make sure that it went."""
        self._socket.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_END_S)


def run(plan: Plan) -> Outcome:
    """Run ``plan`` and say how it went; returns within about ``plan.timeout_s`` seconds whatever happens."""
    deadline = time.monotonic() + plan.timeout_s
    children: list[_Child] = []
    try:
        seed = _Child("seed", plan)
        children.append(seed)
        receiver = _Child("receiver", plan)
        children.append(receiver)
        receiver.send(seed.receive(deadline))
        result = receiver.receive(deadline)
    except _ChildFailed as error:
        return Outcome(FAILED, [f"selftest {plan.engine} on {plan.device}: {error}"])
    except _Deadline as error:
        return Outcome(TOO_LATE, [f"selftest {plan.engine} on {plan.device}: {error} ({plan.timeout_s:g} s)"])
    finally:
        for child in reversed(children):
            child.end()
    return _report(plan, result)


def _report(plan: Plan, result: dict[str, Any]) -> Outcome:
    wrong: list[int] = result["wrong"]
    count, nbytes = result["count"], result["nbytes"]
    lines = [f"selftest {plan.engine}: {count} buffers, {nbytes} bytes, {plan.seed_device} -> {plan.device}"]
    for name, seconds in result["seconds"].items():
        speed = f"  {nbytes / seconds / 1e9:7.2f} GB/s" if name in _MOVES and seconds > 0 else ""
        lines.append(f"  {name:<28}{seconds:9.4f} s{speed}")
    if wrong:
        shown = ", ".join(map(str, wrong[:10]))
        lines.append(f"FAILED: {len(wrong)} of {count} buffers hold other bytes than the seed's digests say: {shown}")
        return Outcome(WRONG_BYTES, lines)
    lines.append("every digest is right")
    return Outcome(GOOD, lines)


# -- the children ----------------------------------------------------------------------------------------------------

#: Stages that move all bytes, and so have a speed.
_MOVES = ("read into fresh memory", "read again", "memcpy beside it")


def _fill(buffers: Sequence[Buffer]) -> None:
    """Random bytes, of which no two pieces of 16 MiB and no two buffers hold the same: one that lands in the wrong
    place is seen. The system's own random source would take seconds for each GB."""
    pool = os.urandom(_PIECE + len(buffers))
    for number, buffer in enumerate(buffers):
        for offset in range(0, buffer.nbytes, _PIECE):
            taken = min(_PIECE, buffer.nbytes - offset)
            unique = os.urandom(min(taken, 64))
            buffer.write(offset, pool[number : number + taken - len(unique)] + unique)


def _digests(buffers: Sequence[Buffer]) -> list[str]:
    """One digest per buffer, with as many threads as cores: hashing is slower than moving."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_digest, buffers))


def _digest(buffer: Buffer) -> str:
    digest = hashlib.blake2b()
    for offset in range(0, buffer.nbytes, _PIECE):
        digest.update(buffer.read(offset, min(_PIECE, buffer.nbytes - offset)))
    return digest.hexdigest()


def _opened(plan: Plan, device: str) -> TransferEngine:
    engine = engine_class(plan.engine)()
    engine.open(EngineConfig(device=device, host=plan.host, timeout_s=plan.timeout_s))
    return engine


def _seed(plan: Plan, parent: _Parent) -> None:
    engine = _opened(plan, plan.seed_device)
    buffers = [Buffer(plan.seed_device, nbytes) for nbytes in buffer_sizes(plan.nbytes)]
    _fill(buffers)
    offer = [[buffer.address, buffer.nbytes, digest] for buffer, digest in zip(buffers, _digests(buffers), strict=True)]
    engine.register([Region(buffer.address, buffer.nbytes) for buffer in buffers])
    if plan.corrupt:
        middle = buffers[len(buffers) // 2]
        middle.write(middle.nbytes // 2, bytes([middle.read(middle.nbytes // 2, 1)[0] ^ 1]))
    parent.send({"endpoint": engine.endpoint, "buffers": offer})
    parent.receive()  # the parent lets go when the receiver is done
    engine.close()


def _receiver(plan: Plan, parent: _Parent) -> None:
    stages = _Stages()
    with stages.timed("engine open"):
        engine = _opened(plan, plan.device)
    offer = parent.receive()
    if not offer:
        return
    buffers = [Buffer(plan.device, nbytes) for _, nbytes, _ in offer["buffers"]]
    with stages.timed("register"):
        engine.register([Region(buffer.address, buffer.nbytes) for buffer in buffers])
    with stages.timed("connect"):
        engine.connect(offer["endpoint"], plan.timeout_s)
    pairs = list(zip(buffers, offer["buffers"], strict=True))
    segments = [Segment(mine.address, theirs[0], mine.nbytes) for mine, theirs in pairs]
    with stages.timed(_MOVES[0]):
        _read(engine, offer["endpoint"], segments, plan)
    wrong = [
        number
        for number, (mine, theirs) in enumerate(zip(_digests(buffers), offer["buffers"], strict=True))
        if mine != theirs[2]
    ]
    with stages.timed(_MOVES[1]):
        _read(engine, offer["endpoint"], segments, plan)
    if plan.device == "cpu":
        copies = [Buffer("cpu", buffer.nbytes) for buffer in buffers]
        for copy in copies:
            ctypes.memset(copy.address, 1, copy.nbytes)
        with stages.timed(_MOVES[2]):
            for copy, buffer in zip(copies, buffers, strict=True):
                ctypes.memmove(copy.address, buffer.address, buffer.nbytes)
    engine.disconnect(offer["endpoint"])
    engine.close()
    nbytes = sum(segment.nbytes for segment in segments)
    parent.send({"wrong": wrong, "count": len(buffers), "nbytes": nbytes, "seconds": stages.seconds})


def _read(engine: TransferEngine, endpoint: str, segments: Sequence[Segment], plan: Plan) -> None:
    limits = engine.limits
    for batch in batches(segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items):
        engine.read(endpoint, batch, plan.timeout_s)


class _Stages:
    """Seconds by stage, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


class _Parent:
    """A child's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """One message."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The parent's next message; empty when it has left."""
        line = self._stream.readline()
        message: dict[str, Any] = json.loads(line) if line else {}
        return message


def _child(role: str, descriptor: int, plan: Plan) -> int:
    # The parent may close its end at any time, which ends the child and is no error of its own.
    with suppress(BrokenPipeError, ConnectionResetError), socket.socket(fileno=descriptor) as connection:
        parent = _Parent(connection)
        try:
            {"seed": _seed, "receiver": _receiver}[role](plan, parent)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 - the process's edge: whatever it was, the parent reports it
            parent.send({"error": f"{type(error).__name__}: {error}"})
            return FAILED
    return GOOD


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], int(sys.argv[2]), Plan(**json.loads(sys.argv[3]))))
