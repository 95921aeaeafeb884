"""The start-up plan of one worker's start: found on this host or at a seed, and offered to others.

Beside vLLM's file lies a record with everything that the plan follows from, so that a later start on this host can
compare it. A file of vLLM's without such a record is left alone, and not used unless the user enabled plans.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_rfork.caches.directories import as_cache_error
from vllm_rfork.caches.installer import install_file, is_there
from vllm_rfork.caches.safe.startup_plan import (
    MAX_PLAN_NBYTES,
    CarriedPlan,
    DeviceMemory,
    decode_plan,
    encode_plan,
    fit_obstacle,
)
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, listener
from vllm_rfork.vllm_compat.start_up.plan_memory import device_memory, plan_settings, worker_obstacle
from vllm_rfork.vllm_compat.startup_plan_file import plan_file

logger = worker_logger(__name__)

KIND = "startup_plan"
_DIRECTORY = ("startup_plan",)
#: The record of a seed's plan while a start uses it that has not captured its graphs yet.
_UNPROVEN = b"{}"


class StartUpPlan:
    """See the module's docstring. Made at the entrance of ``determine_available_memory``.

    Args:
        fingerprint: vLLM's, for the plan of this worker.
        memory, settings: of this worker.
        worker_obstacle: the reason why a plan cannot be this worker's, besides memory and settings.

    Attributes:
        applied: the plan whose file vLLM has been given; None before, and if there is none.
        recorded: there is a plan of an earlier start on this host with a record.
        fitting_nbytes: bytes for the KV cache that fit, at most those of ``applied``.
        graphs_nbytes: taken by this worker's graphs, once they are captured.
        seconds: that the measurement of graphs took, which a plan saves; None if there was none.
    """

    def __init__(
        self,
        *,
        root: Path,
        rank: int,
        fingerprint: str,
        memory: DeviceMemory,
        settings: dict[str, str],
        worker_obstacle: Callable[[CarriedPlan], str | None] = lambda plan: None,
    ) -> None:
        self._root, self._rank, self._fingerprint = root, rank, fingerprint
        self._worker_obstacle = worker_obstacle
        self.memory, self._settings = memory, settings
        self._file, self._record_file = f"startup_plan_{fingerprint}.json", f"rfork_{fingerprint}.json"
        self.applied: CarriedPlan | None = None
        self.recorded = False
        self.fitting_nbytes = self.graphs_nbytes = 0
        self.seconds: float | None = None

    @classmethod
    def of(cls, worker: Any) -> StartUpPlan:
        """The plan of ``worker``'s start; takes note of what the worker measures later.

        Raises:
            Exception: whatever vLLM raises when it computes its keys.
        """
        from vllm import envs
        from vllm.v1.worker import startup_plan

        fingerprint = startup_plan.compute_plan_fingerprint(
            worker.vllm_config, worker.rank, worker.parallel_config.world_size
        )
        plan = cls(
            root=Path(envs.VLLM_CACHE_ROOT),
            rank=worker.rank,
            fingerprint=fingerprint,
            memory=device_memory(worker),
            settings=plan_settings(worker),
            worker_obstacle=functools.partial(worker_obstacle, worker),
        )
        _observe(worker.model_runner, "profile_cudagraph_memory", plan._graphs_measured)
        _observe(worker.model_runner, "capture_model", plan._graphs_captured)
        return plan

    def obstacle(self) -> str | None:
        """The reason why there is no right plan; None if there is one in vLLM's file, which is :attr:`applied` then.

        Raises:
            CacheError: a file cannot be read or written.
        """
        content = self._recorded()
        self.recorded = content is not None
        if content == _UNPROVEN:
            return "the last start with a seed's plan did not end its warm-up"
        if content is not None:
            record = decode_plan(content)
            if self._obstacle(record) is None:
                self._replace(self._file, self._vllms(record))
                self.applied = record
                return None
            self._remove(self._file)
            self._remove(self._record_file)
        elif is_there(self._root, _DIRECTORY, self._file):
            return "the plan of an earlier start on this host does not state what it follows from"
        if not listener().about_to_read(self._place(self._adopted)):
            self.applied = None
            return "there is no plan of an earlier start or of a seed that fits"
        return None

    def _obstacle(self, plan: CarriedPlan) -> str | None:
        return fit_obstacle(plan, self.memory, self._settings) or self._worker_obstacle(plan)

    def fitted(self, cache_config: Any, value: int) -> int:
        """Let the KV cache have :attr:`fitting_nbytes`, and offer the plan to others as it is.

        Args:
            value: vLLM's result for the applied plan, which is less where other processes get a part.

        Returns:
            The result in its place.
        """
        plan = self.applied
        if plan is None:
            raise ValueError("no plan has been applied")
        reserved_nbytes = plan.cache_nbytes - value
        if self.fitting_nbytes < plan.cache_nbytes:
            logger.warning(
                "caches: the start-up plan has %d bytes for the KV cache, and %d fit on this device",
                plan.cache_nbytes,
                self.fitting_nbytes,
            )
        cache_config.kv_cache_memory_bytes = self.fitting_nbytes
        with guarded(KIND):  # vLLM has applied the plan, whatever becomes of its record
            place = self._place(_checked)
            listener().outcome(KIND, place.name, used=True, seconds=None)
            listener().produced(place, None, encode_plan(plan))
            if not plan.graphs_nbytes:  # no graphs follow, for which memory could be missing
                self._prove()
        return self.fitting_nbytes - reserved_nbytes

    def measured(self, cache_nbytes: int, *, keep: bool) -> None:
        """Offer what this worker has measured.

        Args:
            keep: write it for later starts on this host as well.

        Raises:
            CacheError: the numbers are impossible, or a file cannot be written.
        """
        plan = CarriedPlan(int(cache_nbytes), self.graphs_nbytes, self.memory, self._settings)
        body = encode_plan(plan)
        decode_plan(body)
        listener().produced(self._place(_checked), self.seconds, body)
        if keep and self._obstacle(plan) is None:
            # vLLM has written its own file under the fingerprint of this moment, which may be another one.
            self._replace(self._file, self._vllms(plan))
            self._replace(self._record_file, body)

    def _adopted(self, body: bytes) -> bytes:
        """vLLM's file for a seed's plan. Raises CacheError if that does not fit this worker."""
        plan = decode_plan(body)
        if (obstacle := self._obstacle(plan)) is not None:
            raise CacheError(f"the seed's start-up plan does not fit: {obstacle}")
        content = self._vllms(plan)
        self._replace(self._record_file, _UNPROVEN)
        self.applied = plan
        return content

    def _vllms(self, plan: CarriedPlan) -> bytes:
        return plan_file(plan, self._fingerprint, self.memory, self._settings)

    def _place(self, check: Callable[[bytes], bytes]) -> JsonPlace:
        return JsonPlace(KIND, f"rank{self._rank}", self._settings, self._root, _DIRECTORY, self._file, check)

    def _recorded(self) -> bytes | None:
        """The content of the record; None if there is none. Raises CacheError if it cannot be read."""
        path = self._root.joinpath(*_DIRECTORY, self._record_file)
        with as_cache_error(f"{path} cannot be read"):
            try:
                with path.open("rb") as file:
                    return file.read(MAX_PLAN_NBYTES + 1)
            except FileNotFoundError:
                return None

    def _replace(self, name: str, content: bytes) -> None:
        self._remove(name)
        install_file(self._root, _DIRECTORY, name, content)

    def _remove(self, name: str) -> None:
        with as_cache_error(f"{name} cannot be removed from {self._root.joinpath(*_DIRECTORY)}"):
            self._root.joinpath(*_DIRECTORY, name).unlink(missing_ok=True)

    def _graphs_measured(self, result: Any, seconds: float) -> None:
        self.seconds = seconds

    def _graphs_captured(self, result: Any, seconds: float) -> None:
        self.graphs_nbytes = max(0, int(result or 0))
        self._prove()

    def _prove(self) -> None:
        """Let later starts on this host use the applied plan: this one had the memory for it."""
        if self.applied is not None:
            self._replace(self._record_file, encode_plan(self.applied))


def _checked(body: bytes) -> bytes:
    return encode_plan(decode_plan(body))


def _observe(runner: Any, name: str, then: Callable[[Any, float], None]) -> None:
    """Call ``then`` with the result and the seconds of the next call of ``runner.<name>``, if it has such a method."""
    original = getattr(runner, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def once(*args: Any, **kwargs: Any) -> Any:
        vars(runner).pop(name, None)
        started = time.monotonic()
        result = original(*args, **kwargs)
        with guarded(KIND):
            then(result, time.monotonic() - started)
        return result

    setattr(runner, name, once)
