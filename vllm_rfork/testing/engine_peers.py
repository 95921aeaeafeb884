"""The engine contract: peers that die, stop or leave, during a read and before one."""

from __future__ import annotations

import hashlib
import signal

import pytest

from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_processes import Processes
from vllm_rfork.testing.engine_setup import MIB, ContractSetup
from vllm_rfork.testing.engine_worker import pattern


class Peers(ContractSetup):
    """An error in time, and a seed that survives its receivers."""

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
