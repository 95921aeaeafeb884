"""The engine contract: close ends everything, at any moment."""

from __future__ import annotations

import pytest

from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_processes import Processes
from vllm_rfork.testing.engine_setup import PAGE, ContractSetup
from vllm_rfork.testing.engine_worker import as_json


class Closing(ContractSetup):
    """After close, nothing is registered and nothing more is written."""

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
