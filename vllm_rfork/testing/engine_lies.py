"""The engine contract: an endpoint that lies is refused, or harmless."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_processes import Processes, WorkerProcess
from vllm_rfork.testing.engine_setup import PAGE, ContractSetup
from vllm_rfork.testing.engine_worker import pattern

#: An endpoint's largest length on the wire, less the rest of a manifest, in bytes.
_LONGEST = 48 << 20
#: Bounds of one attempt, in seconds, and of an attempt with the longest texts, which takes time to look at.
_ATTEMPT_S, _LONGEST_S = 1.0, 10.0
_LOOPBACK = re.compile(r"127\.0\.0\.1:(\d+)|(?<=\"port\":)(\d+)")
#: As other engines write theirs.
_FOREIGN = (
    "memory:1:2:4096:00000000000000000000000000000000",
    '{"v":1,"memory":"DRAM","device":0,"boot":"b","pid":1,"uid":0,"pid_namespace":1,"identity":"AAAAAAAAAAAAAAAAAAAAAA=="'
    ',"identity_at":4096,"rdma":true,"allow_tcp":true,"metadata":"","checksum":""}',
    '{"v":1,"boot":"b","identity":"AAAAAAAAAAAAAAAAAAAAAA==","device":"AA==","page":[4096,4096,"AA=="],'
    '"allocations":[[4096,4096,"AA=="]],"regions":[[4096,4096]]}',
)


class Lies(ContractSetup):
    """No endpoint leads to a write outside the receiver's regions, or does harm to a seed."""

    def test_an_endpoint_that_lies_is_refused_or_harmless(self, processes: Processes) -> None:
        """Of several engines the receiver takes the next one, so each attempt must end as an error in time."""
        seed, receiver = processes.two()
        source, target = seed.alloc(PAGE, seed=7), receiver.alloc(3 * PAGE, seed=5)
        around = pattern(5, 3 * PAGE)
        seed.register([source, PAGE])
        receiver.register([target + PAGE, PAGE])
        true = seed.endpoint()
        lies = {lie: lie for lie in (*_FOREIGN, *_altered(true))}
        for piece in ("x", "[", true):
            lies[f"many times {piece}"] = receiver.call("repeat", piece=piece, nbytes=_LONGEST)
        for about, lie in lies.items():
            timeout_s = _ATTEMPT_S if lie == about else _LONGEST_S
            came = self.attempt(receiver, lie, [target + PAGE, source, PAGE], timeout_s) is None
            found = receiver.peek(target, 0, 3 * PAGE)
            assert found[:PAGE] + found[2 * PAGE :] == around[:PAGE] + around[2 * PAGE :], about
            assert not came or found[PAGE : 2 * PAGE] == pattern(7, PAGE), about
        assert seed.peek(source, 0, PAGE) == pattern(7, PAGE)
        receiver.call("fill", address=target, seed=9)
        receiver.connect(true)
        self.read_after_refusal(receiver, true, target + PAGE, source, PAGE)
        assert receiver.peek(target, PAGE, PAGE) == pattern(7, PAGE)

    def test_the_endpoint_of_another_process_gives_no_access_and_a_strangers_port_no_wait(
        self, processes: Processes
    ) -> None:
        """First the addresses of one seed under another's endpoint, then a port that accepts and never answers.

        Engines whose endpoints contain no port have nothing to try for the latter.
        """
        seed, receiver, source, target, true = self.seed_and_receiver(processes, PAGE)
        other = processes.start()
        others = other.alloc(64 * PAGE, seed=8)
        other.register([others + 32 * PAGE, PAGE])
        foreign = other.endpoint()
        receiver.connect(foreign)
        for address in (source, others, others + 31 * PAGE, others + 33 * PAGE):
            with pytest.raises(EngineError) as caught:
                receiver.read(foreign, [[target, address, PAGE]])
            self.check(caught.value, "read", in_flight=False)
            assert caught.value.retry_elsewhere, "another seed may be right"
        receiver.disconnect(foreign)
        receiver.read(true, [[target, source, PAGE]])
        assert receiver.digest(target) == seed.digest(source)
        receiver.disconnect(true)
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port = str(stranger.getsockname()[1])
            lie = _LOOPBACK.sub(lambda found: found[0].replace(found[1] or found[2], port), true)
            if lie != true:
                may_be_in_flight = self.silent_peer_in_flight
                assert self.attempt(receiver, lie, [target, source, PAGE], _ATTEMPT_S, may_be_in_flight) is not None
        assert receiver.digest(target) == seed.digest(source)
        assert other.call("ping") == "pong"

    def attempt(
        self,
        receiver: WorkerProcess,
        lie: str,
        segment: list[int],
        timeout_s: float,
        may_be_in_flight: bool = False,
    ) -> EngineError | None:
        """Connect and read; the error if that was refused, after which another engine or seed can be tried."""
        failure: EngineError | None = None
        try:
            receiver.call("attempt", endpoint=lie, segment=segment, timeout_s=timeout_s)
        except EngineError as error:
            failure = error
        assert receiver.elapsed_s < 2 * timeout_s + max(self.grace_s, self.dead_peer_s)
        if failure is not None:
            assert failure.operation in ("connect", "read"), failure
            assert may_be_in_flight or not failure.in_flight, failure
            assert failure.in_flight or failure.retry_elsewhere, failure
            assert failure.side != "receiver" or failure.code == "lane", "a bad endpoint comes from the seed"
        return failure


def _altered(true: str) -> Iterator[str]:
    """``true`` cut, repeated, and with each of its numbers changed, a few places at a time."""
    yield from (true[: len(true) // 2], true[1:], true[:-1], true + true, true[::-1], true.swapcase())
    numbers = list(re.finditer(r"\d+", true))
    for found in numbers[:: max(1, len(numbers) // 4)]:
        for other in ("0", str(int(found[0]) + 1), str(1 << 70)):
            yield true[: found.start()] + other + true[found.end() :]
