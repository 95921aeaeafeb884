"""Contract suites for authors of engines, run by pytest. Needs pytest; the package itself never imports this one.

Inherit :class:`EngineContract` in a test file and set ``engine``::

    from vllm_rfork.testing import EngineContract

    class TestMyEngine(EngineContract):
        engine = "mine"  # its name in the entry-point group vllm_rfork.engines

:class:`~vllm_rfork.testing.engine_setup.ContractSetup` lists the other attributes: the device, how long the engine may
take to notice a dead peer, and what it may do differently. The memory engine (``vllm_rfork.engines.memory``) keeps the
contract and fails on request, for tests of whatever uses an engine.
"""

import pytest

# Before they are imported, so that failed assertions show both sides.
pytest.register_assert_rewrite(
    *(f"{__name__}.engine_{part}" for part in ("setup", "transfers", "refusals", "lies", "peers", "closing"))
)

from vllm_rfork.testing.engine_contract import EngineContract  # noqa: E402
from vllm_rfork.testing.engine_processes import Processes, WorkerGone, WorkerProcess  # noqa: E402
from vllm_rfork.testing.engine_setup import MIB, PAGE  # noqa: E402
from vllm_rfork.testing.engine_worker import pattern  # noqa: E402

__all__ = ["MIB", "PAGE", "EngineContract", "Processes", "WorkerGone", "WorkerProcess", "pattern"]
