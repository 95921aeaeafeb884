"""The engine contract: an engine refuses what it cannot do, and stays usable."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_processes import Processes, WorkerProcess
from vllm_rfork.testing.engine_setup import PAGE, ContractSetup


class Refusals(ContractSetup):
    """Calls out of order, and memory that is not registered."""

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
        """A bad segment refuses the whole batch; see :meth:`check_refused_batch`."""
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
        self.check_refused_batch(caught.value, receiver, target, local_is_bad=local != 0)

    def check_refused_batch(
        self, error: EngineError, receiver: WorkerProcess, target: int, *, local_is_bad: bool
    ) -> None:
        """Nothing of the batch is written, not even its good segment of 16 bytes at ``target + PAGE``.

        Args:
            target: 8 pages of zeros before the read.
            local_is_bad: the bad segment is outside the receiver's registrations, not outside the seed's.
        """
        self.check(error, "read", in_flight=False)
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
        self.check(caught.value, "read", in_flight=False)
        assert receiver.peek(target, 0, PAGE) == bytes(PAGE)
        self.read_after_refusal(receiver, endpoint, target, source, PAGE)

    def test_memory_nobody_registered_is_refused(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        hidden = seed.alloc(PAGE, seed=8)
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, hidden, PAGE]])
        self.check(caught.value, "read", in_flight=False)
        assert receiver.peek(target, 0, PAGE) == bytes(PAGE)
        self.read_after_refusal(receiver, endpoint, target, source, PAGE)
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

    def test_an_obstacle_is_found_without_an_open_engine(self, processes: Processes) -> None:
        """None for a peer that ``connect`` reaches; an unreadable text is the seed's failure."""
        _, receiver, _, _, endpoint = self.seed_and_receiver(processes, PAGE)
        fresh = processes.start(opened=False)
        assert fresh.lane_obstacle(endpoint) is None
        lies = (
            "",
            "nobody",
            "\x00",
            "{}",
            "[]",
            "null",
            "[" * 1000,
            '{"version": -1}',
            "a:b:c:d:e",
            endpoint[:-1],
            "9" * 9,
        )
        for lie in lies:
            found: EngineError | str | None
            try:
                found = fresh.lane_obstacle(lie)
            except EngineError as error:
                found = error
            if isinstance(found, EngineError):
                self.check(found, "connect")
                assert (found.side, found.retry_elsewhere) == ("seed", True), lie
            else:
                assert found is None or found.strip(), lie
        receiver.call("present_lease", lease="a lease")
        receiver.connect(endpoint)

    def test_calls_before_open_and_reads_without_connect_are_refused(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.disconnect(endpoint)
        receiver.disconnect(endpoint)  # idempotent
        receiver.disconnect("nobody")
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, PAGE]])
        self.check(caught.value, "read", in_flight=False)
        assert receiver.peek(target, 0, PAGE) == bytes(PAGE)
        assert caught.value.side == "receiver"
        fresh = processes.start(opened=False)
        fresh.call("new", name=self.engine)
        address = fresh.alloc(PAGE)
        calls: list[tuple[str, Callable[[], None]]] = [
            ("register", lambda: fresh.register([address, PAGE])),
            ("connect", lambda: fresh.connect(endpoint)),
            ("read", lambda: fresh.read(endpoint, [[address, source, PAGE]])),
        ]
        for operation, call in calls:
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
