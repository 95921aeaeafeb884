"""Preparations for a load, from the moment when the worker knows its configuration.

They are its address, the records of installed packages, and its engines.

To open an engine takes up to two seconds, most of them for native libraries. An engine for a device may create a
context there, so it is opened after vLLM has chosen the device and measured its free memory. Before that, only its
libraries are loaded. Engines for host memory are opened at once.

A load takes the engines if it needs the same ones. Otherwise they are closed: by the end of the load, or after
:data:`EXPIRES_S` seconds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_rfork.config import Settings, parse_config
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.registry import AUTO, engine_class, engine_order
from vllm_rfork.errors import PlannerError
from vllm_rfork.fork.engine_set import EngineSet, opened_first
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.net.advertise import advertise_host
from vllm_rfork.threads.deadline import start_on_thread
from vllm_rfork.vllm_compat.fingerprint import installed

logger = worker_logger(__name__)

#: How long prepared engines wait for a load, in seconds.
EXPIRES_S = 600.0
#: How long a load waits for engines that are being created; opening them is not part of that.
_CREATION_S = 0.5
#: How long a load waits for records that are being read ahead; then it reads them itself.
_RECORDS_S = 5.0
#: Device types without a context, and without memory that vLLM measures.
_OPENED_AT_ONCE = frozenset({"cpu"})

Address = tuple[str | None, PlannerError | None]
"""A worker's advertised host, None if it is unknown; and the error if that took all of the allowed time."""


class _Preparation:
    """The preparations of one worker."""

    def __init__(self, settings: Settings, order: Sequence[str]) -> None:
        self.settings = settings
        self.order = tuple(order)
        self.address = start_on_thread(lambda: _address(settings), "rfork-address")
        self.records = start_on_thread(installed.read_ahead, "rfork-records")
        self._engines: concurrent.futures.Future[EngineSet] | None = None
        self._timer = threading.Timer(EXPIRES_S, discard)
        self._timer.daemon = True
        self._timer.start()

    def load_libraries(self) -> None:
        """Load the libraries of the engines that will be opened first, in the background."""
        start_on_thread(lambda: _preload(self.order), "rfork-preload")

    def open(self, device: str) -> None:
        """Begin to open engines for ``device``, in the background."""
        if self._engines is None:
            self._engines = start_on_thread(lambda: self._opening(device), "rfork-early")

    def _opening(self, device: str) -> EngineSet:
        host, _ = self.address.result()
        engines = _engine_set(self.settings, self.order, engine_config(self.settings, device, host))
        engines.start_opening()
        return engines

    def take(self, order: Sequence[str], config: EngineConfig) -> EngineSet | None:
        """The engines if they are these; None, and they are closed, if not."""
        self._timer.cancel()
        if self._engines is not None:
            with contextlib.suppress(Exception):  # opening them again reports why
                engines = self._engines.result(_CREATION_S)
                if (engines.order, engines.config) == (tuple(order), config):
                    return engines
        self.close()
        return None

    def close(self) -> None:
        """Close the engines, those that are still being opened as soon as they are open."""
        self._timer.cancel()
        if self._engines is not None:
            self._engines.add_done_callback(_close)


_lock = threading.Lock()
_preparation: _Preparation | None = None


def configured(options: Mapping[str, Any], device_type: str) -> None:
    """Prepare the load of a worker whose ``options`` and torch device type are known.

    Raises:
        ConfigError: a setting is wrong; the load reports it.
    """
    settings = parse_config(options).settings
    if settings.missing:
        return
    preparation = _Preparation(settings, engine_order(settings.rfork_engine, device_type))
    if (before := _replace(preparation)) is not None:  # of another worker in this process, which loaded nothing
        before.close()
    if device_type in _OPENED_AT_ONCE:
        preparation.open(device_type)
    else:
        preparation.load_libraries()


def device_ready(device: torch.device) -> None:
    """Begin to open the engines of a worker whose ``device`` is set up. Called on its thread, which has that device."""
    if _preparation is not None:
        _preparation.open(device_backend(device).name)


def own_address(settings: Settings) -> Address:
    """This worker's address, which may have been determined already."""
    preparation = _preparation
    if preparation is not None and preparation.settings == settings:
        return preparation.address.result()  # bounded as below
    return _address(settings)


def await_records() -> None:
    """Wait until the records of installed packages have been read ahead, if that has begun."""
    preparation = _preparation
    if preparation is not None:
        with contextlib.suppress(Exception):  # describing the worker reads them again, and reports why
            preparation.records.result(_RECORDS_S)


def take_engines(settings: Settings, order: Sequence[str], config: EngineConfig) -> EngineSet:
    """The engines of a load: the prepared ones, or new ones."""
    preparation = _replace(None)
    prepared = None if preparation is None else preparation.take(order, config)
    return prepared or _engine_set(settings, order, config)


def discard() -> None:
    """Close what was prepared and not taken. Idempotent."""
    if (preparation := _replace(None)) is not None:
        preparation.close()


@contextlib.contextmanager
def discarded_at_end() -> Iterator[None]:
    """:func:`discard` at the end of a load, which may have taken nothing."""
    try:
        yield
    finally:
        discard()


def engine_config(settings: Settings, device: str, host: str | None) -> EngineConfig:
    """The configuration of this worker's engines; a worker without an address can still read from others."""
    return EngineConfig(device=device, host=host or "127.0.0.1", timeout_s=settings.rfork_seed_timeout_sec)


def _engine_set(settings: Settings, order: Sequence[str], config: EngineConfig) -> EngineSet:
    return EngineSet(order, config, named=settings.rfork_engine != AUTO)


def _replace(preparation: _Preparation | None) -> _Preparation | None:
    """Make ``preparation`` the present one; returns the one before."""
    global _preparation
    with _lock:
        before, _preparation = _preparation, preparation
        return before


def _address(settings: Settings) -> Address:
    try:
        return advertise_host(settings), None
    except TimeoutError as error:
        # A call to the planner would resolve the same name again.
        return None, PlannerError(str(error))


def _preload(order: Sequence[str]) -> None:
    for name in opened_first(order):
        try:
            engine_class(name).preload()
        except Exception as error:  # noqa: BLE001 - opening the engine reports it
            logger.debug("the libraries of engine %s were not loaded early: %s", name, error)


def _close(engines: concurrent.futures.Future[EngineSet]) -> None:
    with contextlib.suppress(Exception):
        engines.result().close()
