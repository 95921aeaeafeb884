"""The engine contract: every byte arrives, and no other changes."""

from __future__ import annotations

import itertools

from vllm_rfork.testing.engine_processes import Processes
from vllm_rfork.testing.engine_setup import MIB, PAGE, ContractSetup
from vllm_rfork.testing.engine_worker import pattern


class Transfers(ContractSetup):
    """Reads of all sizes and shapes, between two or more processes."""

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
