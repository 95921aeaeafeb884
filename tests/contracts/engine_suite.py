"""The contract of the engine port, as tests that every adapter inherits.

A subclass in ``test_engine_<name>.py`` sets the class attributes of :class:`EngineContract` and nothing else; its name
begins with ``Test``. Each test runs its seeds and receivers in processes of their own (``engine_worker.py``), because
they get killed, stopped and, with some engines, crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.contracts.engine_worker import as_json, pattern
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096
MIB = 1 << 20
Pairs = Sequence[Sequence[int]]


class WorkerGone(Exception):
    """The process died instead of answering."""


class Remote:
    """A worker process; every call has a deadline, and a worker that misses it is killed."""

    def __init__(self, suite: EngineContract) -> None:
        self.suite = suite
        self.elapsed_s = 0.0
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "PYTHONPATH": path, **suite.environment()}
        self.process = subprocess.Popen(
            [suite.python(), "-m", "tests.contracts.engine_worker", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours
        self._buffer = b""

    # -- talking -------------------------------------------------------------------------------------------------

    def send(self, op: str, **args: Any) -> None:
        try:
            self._socket.sendall(json.dumps({"op": op, "args": args}).encode() + b"\n")
        except OSError as error:
            raise WorkerGone(f"{op}: exit status {self.process.wait(60)}") from error

    def message(self, deadline_s: float) -> dict[str, Any]:
        end = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.process.kill()
                pytest.fail(f"the worker did not answer within {deadline_s} s")
            try:
                got = self._socket.recv(1 << 20)
            except ConnectionResetError:
                got = b""
            if not got:
                raise WorkerGone(f"exit status {self.process.wait(60)}")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def result(self, deadline_s: float = 60.0) -> Any:
        message = self.message(deadline_s)
        self.elapsed_s = message.get("elapsed_s", 0.0)
        if "engine_error" in message:
            raise EngineError(**message["engine_error"])
        assert "other_error" not in message, f"something else than EngineError came out: {message['other_error']}"
        return message["result"]

    def call(self, op: str, deadline_s: float = 60.0, **args: Any) -> Any:
        self.send(op, **args)
        return self.result(deadline_s)

    # -- the port, and memory ------------------------------------------------------------------------------------

    def alloc(self, nbytes: int, seed: int = 0) -> int:
        address: int = self.call("alloc", device=self.suite.device, nbytes=nbytes, seed=seed)
        return address

    def open(self) -> None:
        self.call("new", name=self.suite.engine)
        self.call("open", config=as_json(self.suite.config()))

    def register(self, *regions: Sequence[int]) -> None:
        self.call("register", regions=regions)

    def endpoint(self) -> str:
        text: str = self.call("endpoint")
        return text

    def connect(self, endpoint: str, timeout_s: float = 10.0) -> None:
        self.call("connect", endpoint=endpoint, timeout_s=timeout_s)

    def disconnect(self, endpoint: str) -> None:
        self.call("disconnect", endpoint=endpoint)

    def read(self, endpoint: str, segments: Pairs, timeout_s: float = 30.0) -> None:
        self.call("read", endpoint=endpoint, segments=segments, timeout_s=timeout_s)

    def connect_and_read(self, endpoint: str, segments: Pairs) -> None:
        self.connect(endpoint, timeout_s=5.0)
        self.read(endpoint, segments, timeout_s=5.0)

    def digest(self, address: int, offset: int = 0, nbytes: int = -1) -> str:
        text: str = self.call("digest", address=address, offset=offset, nbytes=nbytes)
        return text

    def peek(self, address: int, offset: int, nbytes: int) -> bytes:
        return bytes.fromhex(self.call("peek", address=address, offset=offset, nbytes=nbytes))

    @property
    def registered_nbytes(self) -> int:
        nbytes: int = self.call("registered_nbytes")
        return nbytes

    def close(self) -> None:
        self.call("close")

    # -- the process ---------------------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def end(self) -> None:
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)


class Processes:
    """Starts workers for one test and ends them after it."""

    def __init__(self, suite: EngineContract) -> None:
        self._suite = suite
        self._started: list[Remote] = []

    def start(self, *, opened: bool = True) -> Remote:
        worker = Remote(self._suite)
        self._started.append(worker)
        if opened:
            worker.open()
        return worker

    def two(self) -> tuple[Remote, Remote]:
        seed, receiver = self.start(opened=False), self.start(opened=False)
        seed.open()
        receiver.open()
        return seed, receiver

    def end(self) -> None:
        for worker in self._started:
            worker.end()


class EngineContract:
    """Inherit, set ``engine``, and the rest where the defaults do not fit."""

    #: The name in the engine table.
    engine: ClassVar[str]
    device: ClassVar[str] = "cpu"
    #: How long past its ``timeout_s`` a call may take to give up, in seconds.
    grace_s: ClassVar[float] = 5.0
    #: How long an engine may take to notice a dead peer, in seconds.
    dead_peer_s: ClassVar[float] = 15.0
    #: Whether a seed's memory stays readable after its process was killed, through mappings that were open.
    memory_outlives_its_process: ClassVar[bool] = False
    #: Whether ``close`` may say, after a read that overran, that the memory is never the caller's again.
    close_may_keep_memory: ClassVar[bool] = False
    #: Bytes of the one large segment.
    large_nbytes: ClassVar[int] = 64 * MIB

    def environment(self) -> Mapping[str, str]:
        """Environment of the worker processes, beside the test's own."""
        return {}

    def python(self) -> str:
        """The interpreter of the worker processes."""
        return sys.executable

    def config(self) -> EngineConfig:
        return EngineConfig(device=self.device, host="127.0.0.1", timeout_s=20.0)

    @pytest.fixture
    def processes(self) -> Iterator[Processes]:
        started = Processes(self)
        yield started
        started.end()

    def seed_and_receiver(self, processes: Processes, nbytes: int) -> tuple[Remote, Remote, int, int, str]:
        """Two workers, each with one registered buffer of ``nbytes``, connected."""
        seed, receiver = processes.two()
        source, target = seed.alloc(nbytes, seed=7), receiver.alloc(nbytes)
        seed.register([source, nbytes])
        receiver.register([target, nbytes])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        return seed, receiver, source, target, endpoint

    # -- bytes ---------------------------------------------------------------------------------------------------

    def test_the_whole_order_of_calls(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        assert receiver.digest(target) == seed.digest(source)
        receiver.disconnect(endpoint)
        assert (receiver.registered_nbytes, seed.registered_nbytes) == (MIB, MIB)
        receiver.close()
        seed.close()
        assert (receiver.registered_nbytes, seed.registered_nbytes) == (0, 0)

    def test_many_small_segments_and_nothing_beside_them(self, processes: Processes) -> None:
        """Unaligned addresses and odd lengths; the bytes between the segments keep their old contents."""
        nbytes, count, length, step = MIB, 500, 333, 2000
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        receiver.call("fill", address=target, seed=9)
        segments = [[target + 3 + i * step, source + 5 + i * step, length] for i in range(count)]
        receiver.read(endpoint, segments)
        expected, origin = bytearray(pattern(9, nbytes)), pattern(7, nbytes)
        for local, remote, taken in segments:
            expected[local - target : local - target + taken] = origin[remote - source : remote - source + taken]
        assert receiver.peek(target, 0, nbytes) == bytes(expected)
        assert seed.peek(source, 0, nbytes) == origin, "a read must not change the seed"

    def test_one_large_segment(self, processes: Processes) -> None:
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        receiver.read(endpoint, [[target, source, nbytes]])
        assert receiver.digest(target) == seed.digest(source)

    def test_single_bytes(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.read(endpoint, [[target + PAGE - 1, source, 1], [target, source + PAGE - 1, 1]])
        origin = pattern(7, PAGE)
        assert receiver.peek(target, 0, PAGE) == origin[-1:] + bytes(PAGE - 2) + origin[:1]

    def test_adjacent_and_unaligned_regions(self, processes: Processes) -> None:
        """Regions that touch, at odd addresses, are registrations of their own and each can be read."""
        seed, receiver = processes.two()
        source, target = seed.alloc(3 * PAGE, seed=7), receiver.alloc(3 * PAGE)
        cuts = [1, PAGE - 1, PAGE + 7, 3 * PAGE]
        lengths = [after - before for before, after in itertools.pairwise(cuts)]
        seed.register(*[[source + cut, n] for cut, n in zip(cuts, lengths, strict=False)])
        receiver.register(*[[target + cut, n] for cut, n in zip(cuts, lengths, strict=False)])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        receiver.read(endpoint, [[target + c, source + c, n] for c, n in zip(cuts, lengths, strict=False)])
        assert receiver.peek(target, 0, 3 * PAGE) == b"\0" + pattern(7, 3 * PAGE)[1:]

    def test_two_thousand_regions(self, processes: Processes) -> None:
        seed, receiver = processes.two()
        count, step, length = 2000, 2048, 1000
        source, target = seed.alloc(count * step, seed=7), receiver.alloc(count * step)
        seed.register(*[[source + i * step, length] for i in range(count)])
        receiver.register(*[[target + i * step, length] for i in range(count)])
        assert receiver.registered_nbytes == count * length
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        order = [(i * 7) % count for i in range(count)]
        receiver.read(endpoint, [[target + i * step, source + i * step, length] for i in order])
        origin, got = pattern(7, count * step), receiver.peek(target, 0, count * step)
        assert all(got[i * step : i * step + length] == origin[i * step : i * step + length] for i in range(count))

    def test_reads_see_the_bytes_of_the_moment(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        for number in (11, 12):
            seed.call("fill", address=source, seed=number)
            receiver.read(endpoint, [[target, source, MIB]])
            assert receiver.peek(target, 0, MIB) == pattern(number, MIB)

    def test_two_receivers_of_one_seed(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, 8 * MIB)
        other = processes.start()
        other_target = other.alloc(8 * MIB)
        other.register([other_target, 8 * MIB])
        other.connect(endpoint)
        for worker, address in ((receiver, target), (other, other_target)):
            worker.send("read", endpoint=endpoint, segments=[[address, source, 8 * MIB]], timeout_s=30.0)
        receiver.result()
        other.result()
        assert receiver.digest(target) == other.digest(other_target) == seed.digest(source)

    def test_a_receiver_becomes_a_seed_and_its_seed_may_go(self, processes: Processes) -> None:
        seed, middle, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        middle.read(endpoint, [[target, source, MIB]])
        middle.disconnect(endpoint)
        seed.kill()
        last = processes.start()
        address = last.alloc(MIB)
        last.register([address, MIB])
        second = middle.endpoint()
        last.connect(second)
        last.read(second, [[address, target, MIB]])
        assert last.peek(address, 0, MIB) == pattern(7, MIB)

    def test_calls_may_come_from_any_thread(self, processes: Processes) -> None:
        """A loader registers here, connects there, and reads in a thread that it starts for the purpose."""
        seed, receiver = processes.two()
        source, target = seed.alloc(MIB, seed=7), receiver.alloc(MIB)
        seed.register([source, MIB])
        endpoint = seed.endpoint()
        read = {"op": "read", "args": {"endpoint": endpoint, "segments": [[target, source, MIB]], "timeout_s": 20.0}}
        calls = [
            {"op": "register", "args": {"regions": [[target, MIB]]}},
            {"op": "connect", "args": {"endpoint": endpoint, "timeout_s": 10.0}},
            read,
            read,
        ]
        receiver.call("in_threads", calls=calls)
        assert receiver.digest(target) == seed.digest(source)
        receiver.call("in_threads", calls=[{"op": "close", "args": {}}])
        assert receiver.registered_nbytes == 0

    # -- refusals ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("local", "remote", "nbytes"),
        [
            pytest.param(0, 1, 2 * PAGE, id="beyond the remote end"),
            pytest.param(0, -1, 10, id="before the remote start"),
            pytest.param(0, 4 * PAGE, 10, id="nowhere near the remote region"),
            pytest.param(1, 0, 2 * PAGE, id="beyond the local end"),
            pytest.param(4 * PAGE, 0, 10, id="outside every local region"),
        ],
    )
    def test_a_read_outside_a_registration_is_refused(
        self, processes: Processes, local: int, remote: int, nbytes: int
    ) -> None:
        """Nothing of the batch is written, not even of its good segments."""
        seed, receiver = processes.two()
        source, target = seed.alloc(8 * PAGE, seed=7), receiver.alloc(8 * PAGE)
        seed.register([source + PAGE, 2 * PAGE])
        receiver.register([target + PAGE, 2 * PAGE])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        good = [target + PAGE, source + PAGE, 16]
        bad = [target + PAGE + local, source + PAGE + remote, nbytes]
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [good, bad])
        self.check(caught.value, "read", mutated=False)
        assert receiver.peek(target, 0, 8 * PAGE) == bytes(8 * PAGE)

    def test_a_read_across_two_adjacent_registrations_is_refused(self, processes: Processes) -> None:
        seed, receiver = processes.two()
        source, target = seed.alloc(4 * PAGE, seed=7), receiver.alloc(4 * PAGE)
        seed.register([source, PAGE], [source + PAGE, PAGE])
        receiver.register([target, 4 * PAGE])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source + PAGE // 2, PAGE]])
        self.check(caught.value, "read", mutated=False)
        receiver.read(endpoint, [[target, source, PAGE]])

    def test_memory_nobody_registered_is_refused(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        hidden = seed.alloc(PAGE, seed=8)
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, hidden, PAGE]])
        self.check(caught.value, "read", mutated=False)
        receiver.read(endpoint, [[target, source, PAGE]])
        assert receiver.digest(target) == seed.digest(source), "a refusal must leave the engine usable"

    def test_overlapping_registrations_are_refused_whole(self, processes: Processes) -> None:
        seed = processes.start()
        source = seed.alloc(8 * PAGE, seed=7)
        seed.register([source, PAGE])
        for regions in (
            [[source + 2 * PAGE, PAGE], [source + PAGE - 1, 10]],
            [[source, PAGE]],
            [[source + 4 * PAGE, PAGE], [source + 4 * PAGE, PAGE]],
        ):
            with pytest.raises(EngineError) as caught:
                seed.register(*regions)
            self.check(caught.value, "register")
            assert caught.value.side == "receiver", "which means the process that registers"
            assert seed.registered_nbytes == PAGE

    def test_registering_nothing_is_nothing(self, processes: Processes) -> None:
        seed = processes.start()
        seed.register()
        assert seed.registered_nbytes == 0

    def test_calls_before_open_and_reads_without_connect_are_refused(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.disconnect(endpoint)
        receiver.disconnect(endpoint)  # idempotent
        receiver.disconnect("nobody")
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, PAGE]])
        self.check(caught.value, "read", mutated=False)
        assert caught.value.side == "receiver"
        fresh = processes.start(opened=False)
        fresh.call("new", name=self.engine)
        address = fresh.alloc(PAGE)
        for operation, call in (
            ("register", lambda: fresh.register([address, PAGE])),
            ("connect", lambda: fresh.connect(endpoint)),
            ("read", lambda: fresh.read(endpoint, [[address, source, PAGE]])),
        ):
            with pytest.raises(EngineError) as caught:
                call()
            self.check(caught.value, operation)
            assert caught.value.side == "receiver"

    @pytest.mark.parametrize("text", ["", "nonsense", "127.0.0.1", "memory:1:2:3:4", "é" * 50, "127.0.0.1:1"])
    def test_an_endpoint_that_leads_nowhere_is_refused(self, processes: Processes, text: str) -> None:
        receiver = processes.start()
        with pytest.raises(EngineError) as caught:
            receiver.connect(text, timeout_s=3.0)
        self.check(caught.value, "connect")
        assert caught.value.side != "receiver", "a bad endpoint comes from the seed"
        assert receiver.elapsed_s < 3.0 + self.grace_s

    # -- peers that die, stop and go -----------------------------------------------------------------------------

    def test_a_peer_that_died_before_is_an_error(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.disconnect(endpoint)
        seed.kill()
        with pytest.raises(EngineError) as caught:
            receiver.connect_and_read(endpoint, [[target, source, MIB]])
        assert caught.value.side != "receiver"
        assert receiver.elapsed_s < self.dead_peer_s

    def test_a_peer_that_died_after_connecting_is_an_error(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        seed.kill()
        if self.memory_outlives_its_process:
            receiver.call("fill", address=target, seed=9)
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=10.0)
            assert receiver.peek(target, 0, MIB) == pattern(7, MIB)
            self.still_good(processes, receiver, target, MIB)
            return
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=10.0)
        self.check(caught.value, "read")
        assert receiver.elapsed_s < self.dead_peer_s
        self.still_good(processes, receiver, target, MIB, closed=caught.value.in_flight)

    def test_a_peer_killed_in_the_middle_of_a_read_is_an_error(self, processes: Processes) -> None:
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        outlives = self.memory_outlives_its_process
        loop = {"endpoint": endpoint, "segments": [[target, source, nbytes]], "timeout_s": 10.0}
        receiver.send("read_loop", **loop, seconds=3.0 if outlives else 60.0)
        assert receiver.message(60.0) == {"event": "reading"}
        seed.kill()
        if outlives:
            assert receiver.result(60.0) > 1
            assert receiver.digest(target) == hashlib.blake2b(pattern(7, nbytes)).hexdigest()
            self.still_good(processes, receiver, target, nbytes)
            return
        with pytest.raises(EngineError) as caught:
            receiver.result(self.dead_peer_s + 10.0)
        self.check(caught.value, "read")
        self.still_good(processes, receiver, target, nbytes, closed=caught.value.in_flight)

    def test_a_receiver_killed_in_the_middle_of_a_read_leaves_its_seed_alive(self, processes: Processes) -> None:
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        for number in (signal.SIGKILL, signal.SIGTERM):
            receiver.send(
                "read_loop", endpoint=endpoint, segments=[[target, source, nbytes]], timeout_s=10.0, seconds=60.0
            )
            assert receiver.message(60.0) == {"event": "reading"}
            receiver.signal(number)
            receiver.process.wait(60)
            receiver = processes.start()
            target = receiver.alloc(nbytes)
            receiver.register([target, nbytes])
            assert seed.call("ping") == "pong"
            receiver.connect(endpoint)
            receiver.read(endpoint, [[target, source, nbytes]])
            assert receiver.digest(target) == seed.digest(source)
        assert seed.process.poll() is None

    def test_a_stopped_peer_never_holds_a_read_past_its_bound(self, processes: Processes) -> None:
        """Either the bytes are there (one-sided engines need no help from the peer) or it is an error in time."""
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        digest = seed.digest(source)
        receiver.call("fill", address=target, seed=9)
        seed.signal(signal.SIGSTOP)
        try:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=2.0)
        except EngineError as error:
            self.check(error, "read")
            self.nothing_arrives_after_close(processes, seed, receiver, source, target, MIB)
        else:
            assert receiver.digest(target) == digest
        finally:
            seed.signal(signal.SIGCONT)
        assert receiver.elapsed_s < 2.0 + max(self.grace_s, self.dead_peer_s)

    def test_a_stopped_peer_never_holds_connect_past_its_bound(self, processes: Processes) -> None:
        seed, receiver = processes.two()
        source, target = seed.alloc(MIB, seed=7), receiver.alloc(MIB)
        seed.register([source, MIB])
        receiver.register([target, MIB])
        endpoint = seed.endpoint()
        seed.signal(signal.SIGSTOP)
        try:
            receiver.connect(endpoint, timeout_s=2.0)
        except EngineError as error:
            self.check(error, "connect")
        finally:
            seed.signal(signal.SIGCONT)
        assert receiver.elapsed_s < 2.0 + max(self.grace_s, self.dead_peer_s)

    def test_a_read_that_runs_out_of_time_writes_nothing_after_close(self, processes: Processes) -> None:
        """The bound is far too short for the bytes; whatever the read says, after close the memory is the caller's."""
        nbytes = self.large_nbytes
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, nbytes)
        try:
            receiver.read(endpoint, [[target, source, nbytes]], timeout_s=0.001)
        except EngineError as error:
            self.check(error, "read")
        assert receiver.elapsed_s < self.grace_s
        self.nothing_arrives_after_close(processes, seed, receiver, source, target, nbytes)

    def check_kept(self, error: EngineError) -> None:
        """The engine may keep the memory, and says so as the port wants it said."""
        self.check(error, "close")
        assert error.in_flight
        assert self.close_may_keep_memory, error

    def nothing_arrives_after_close(
        self, processes: Processes, seed: Remote, receiver: Remote, source: int, target: int, nbytes: int
    ) -> None:
        """Close, write over the target, let the seed go on, and look when the seed has been through its work.

        The port lets ``close`` say that it cannot take the memory back (``in_flight``): then the caller keeps it for
        good, and there is nothing to look at.
        """
        try:
            receiver.close()
        except EngineError as error:
            self.check_kept(error)
            return
        receiver.call("fill", address=target, seed=21)
        seed.signal(signal.SIGCONT)
        self.fence(processes, seed, source, nbytes)
        assert receiver.digest(target) == hashlib.blake2b(pattern(21, nbytes)).hexdigest()
        assert receiver.registered_nbytes == 0

    def fence(self, processes: Processes, seed: Remote, source: int, nbytes: int) -> None:
        """Another receiver's whole read: what the seed still owed to an earlier one is out by then."""
        assert seed.call("ping") == "pong"
        other = processes.start()
        address = other.alloc(nbytes)
        other.register([address, nbytes])
        endpoint = seed.endpoint()
        other.connect(endpoint)
        other.read(endpoint, [[address, source, nbytes]])

    # -- the end -------------------------------------------------------------------------------------------------

    def test_close_is_idempotent_and_leaves_nothing_registered(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.read(endpoint, [[target, source, PAGE]])
        assert seed.registered_nbytes == PAGE
        for worker in (receiver, seed):
            worker.close()
            worker.close()
            assert worker.registered_nbytes == 0

    def test_close_before_open_is_nothing(self, processes: Processes) -> None:
        fresh = processes.start(opened=False)
        fresh.call("new", name=self.engine)
        fresh.close()
        assert fresh.registered_nbytes == 0

    def test_close_after_a_failed_read(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        with pytest.raises(EngineError):
            receiver.read(endpoint, [[target, source, 2 * PAGE]])
        receiver.close()
        assert receiver.registered_nbytes == 0
        assert seed.call("ping") == "pong"

    def test_a_closed_seed_cannot_be_reached_any_more(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.disconnect(endpoint)
        seed.close()
        with pytest.raises(EngineError):
            receiver.connect_and_read(endpoint, [[target, source, PAGE]])

    def test_an_engine_opens_again_after_close(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        for worker in (seed, receiver):
            worker.close()
            worker.call("open", config=as_json(self.config()))
        seed.register([source, PAGE])
        receiver.register([target, PAGE])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        receiver.read(endpoint, [[target, source, PAGE]])
        assert receiver.digest(target) == seed.digest(source)

    def test_opening_twice_is_refused(self, processes: Processes) -> None:
        seed = processes.start()
        with pytest.raises(EngineError) as caught:
            seed.call("open", config=as_json(self.config()))
        self.check(caught.value, "open")

    # -- helpers -------------------------------------------------------------------------------------------------

    def check(self, error: EngineError, operation: str, *, mutated: bool | None = None) -> None:
        assert (error.engine, error.operation) == (self.engine, operation), error
        assert error.text
        if mutated is not None:
            assert error.mutated is mutated
            assert not error.in_flight

    def still_good(
        self, processes: Processes, receiver: Remote, target: int, nbytes: int, *, closed: bool = False
    ) -> None:
        """After one peer's death the receiver forks from another one, through a new engine where it has to."""
        if closed:
            receiver.close()
            receiver.call("open", config=as_json(self.config()))
            receiver.register([target, nbytes])
        other = processes.start()
        source = other.alloc(nbytes, seed=31)
        other.register([source, nbytes])
        endpoint = other.endpoint()
        receiver.connect(endpoint)
        receiver.read(endpoint, [[target, source, nbytes]])
        assert receiver.digest(target) == other.digest(source)
