"""The contract of the engine port, as tests that every adapter inherits."""

from __future__ import annotations

from vllm_rfork.testing.engine_closing import Closing
from vllm_rfork.testing.engine_lies import Lies
from vllm_rfork.testing.engine_peers import Peers
from vllm_rfork.testing.engine_refusals import Refusals
from vllm_rfork.testing.engine_transfers import Transfers


class EngineContract(Transfers, Refusals, Lies, Peers, Closing):
    """The whole contract; see the package's docstring for how to run it on an engine.

    Each test runs its seeds and receivers in processes of their own, because they are killed, stopped and, with some
    engines, crash.
    """
