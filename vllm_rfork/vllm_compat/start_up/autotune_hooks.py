"""FlashInfer's autotune table: the fastest variant of each kernel, which vLLM measures while it warms up.

vLLM stores it below ``$VLLM_CACHE_ROOT/flashinfer_autotune_cache``, under a hash of its configuration, and decides with
all ranks whether a stored one is used. vLLM 0.26 stores one for a single rank, 0.30 one for all ranks, which the first
one reads, 0.32 and later one for each rank. 0.33 can also leave storing to FlashInfer (``autotune_v2``); nothing is
carried then. Read in these versions (``model_executor/warmup/kernel_warmup.py``) and in FlashInfer 0.6.14.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rfork.caches.paths import parts_below
from vllm_rfork.caches.safe.autotune_table import MAX_TABLE_NBYTES, checked_table
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.key_factors import key_factors
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, listener

logger = worker_logger(__name__)

KIND = "autotune_table"
#: The function whose result is the final path for this rank, and the older one, whose result some versions complete.
_OF_RANK, _OF_ALL = "resolve_rank_flashinfer_autotune_file", "resolve_flashinfer_autotune_file"
#: A version with this function completes it.
_COMPLETES = "_all_ranks_have_matching_cache"
_MARK = "_rfork_carries_tables"


@dataclass
class _Tuning:
    """The table of the present call of ``flashinfer_autotune``, and its content before that call."""

    place: JsonPlace
    before: bytes | None


class _Tables:
    """The wrappers of both functions, for one process."""

    def __init__(self, resolve: Callable[[Any], Path], tune: Callable[..., Any], *, of_rank: bool, completed: bool):
        self._resolve, self._tune = resolve, tune
        self._of_rank, self._completed = of_rank, completed
        self._tuning: _Tuning | None = None

    def resolving(self) -> Callable[[Any], Path]:
        """The function that computes the path, which lets the listener install a table there."""

        @functools.wraps(self._resolve)
        def resolve(runner: Any) -> Path:
            path = self._resolve(runner)
            with guarded(KIND):
                self._about_to_read(runner, Path(path))
            return path

        return resolve

    def tuning(self) -> Callable[..., Any]:
        """``flashinfer_autotune``, which reports the table afterwards."""

        @functools.wraps(self._tune)
        def tune(runner: Any, *args: Any, **kwargs: Any) -> Any:
            self._tuning, started = None, time.monotonic()
            result = self._tune(runner, *args, **kwargs)
            with guarded(KIND):
                self._report(time.monotonic() - started)
            return result

        return tune

    def _about_to_read(self, runner: Any, path: Path) -> None:
        from vllm.distributed.parallel_state import get_world_group

        parallel_config = runner.vllm_config.parallel_config
        rank, data_rank = get_world_group().rank_in_group, parallel_config.data_parallel_rank
        if self._completed:
            path = path.with_name(f"{path.stem}_dp{data_rank}_rank{rank}{path.suffix}")
        elif not self._of_rank and rank:
            return  # the first rank reads it
        metadata, key = _metadata(), key_factors(runner.vllm_config)  # the key names vLLM's folder
        listener().explain(key.details)
        place = JsonPlace(
            kind=KIND,
            name=f"dp{data_rank}_rank{rank}",
            identity={
                **key.identity,
                **metadata,
                "rank": str(rank),
                "data_rank": str(data_rank),
                "world_size": str(parallel_config.world_size),
            },
            root=_root(),
            directory=parts_below(_root(), path.parent),
            file=path.name,
            check=lambda body: checked_table(body, metadata),
        )
        listener().about_to_read(place)
        self._tuning = _Tuning(place, _content(place))

    def _report(self, seconds: float) -> None:
        if (tuning := self._tuning) is None or (after := _content(tuning.place)) is None:
            return
        place, used = tuning.place, tuning.before == after  # it is written again if anything was tuned
        if tuning.before is not None:
            listener().outcome(KIND, place.name, used=used, seconds=seconds if used else None)
        try:
            place.check(after)
        except CacheError as error:  # an empty table, where no kernel has variants
            logger.debug("caches: the autotune table is not offered: %s", error)
            return
        listener().produced(place, None if used else seconds)


def install() -> None:
    """Carry the tables of this process. Idempotent.

    Raises:
        ImportError, AttributeError: this vLLM stores none.
    """
    from vllm.model_executor.warmup import kernel_warmup
    from vllm.platforms import current_platform

    if hasattr(kernel_warmup.flashinfer_autotune, _MARK) or not current_platform.is_cuda():
        return
    of_rank = hasattr(kernel_warmup, _OF_RANK)
    name = _OF_RANK if of_rank else _OF_ALL
    completed = not of_rank and hasattr(kernel_warmup, _COMPLETES)
    tables = _Tables(
        getattr(kernel_warmup, name), kernel_warmup.flashinfer_autotune, of_rank=of_rank, completed=completed
    )
    setattr(kernel_warmup, name, tables.resolving())
    kernel_warmup.flashinfer_autotune = tables.tuning()
    setattr(kernel_warmup.flashinfer_autotune, _MARK, True)


def _metadata() -> dict[str, str]:
    """The environment that FlashInfer compares with a table's."""
    autotuner = importlib.import_module("flashinfer.autotuner")
    return {str(name): str(value) for name, value in autotuner._collect_metadata().items()}


def _root() -> Path:
    from vllm import envs

    override = getattr(envs, "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR", None)
    return Path(override).expanduser() if override else Path(envs.VLLM_CACHE_ROOT)


def _content(place: JsonPlace) -> bytes | None:
    """The present content; None if there is no table, or one larger than receivers read."""
    try:
        with place.root.joinpath(*place.directory, place.file).open("rb") as file:
            content = file.read(MAX_TABLE_NBYTES + 1)
    except FileNotFoundError:
        return None
    return content if len(content) <= MAX_TABLE_NBYTES else None
