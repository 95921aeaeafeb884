"""The front end's part: a directory for the values of workers, and a collector for vLLM's ``/metrics``."""

from __future__ import annotations

import atexit
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.metrics.files import is_stale

logger = worker_logger(__name__)

#: The directory that vLLM makes if it runs several API servers, or that a user has set. Their ``/metrics`` then shows
#: all files in it, this package's included.
VLLMS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
#: The directory that the front end makes otherwise. Its processes inherit the variable.
OWN_DIRECTORY = "RFORK_METRICS_DIR"


def directory() -> Path | None:
    """The directory for the values of this process; None if there is none on this host."""
    for variable in (VLLMS_DIRECTORY, OWN_DIRECTORY):
        if (named := os.environ.get(variable)) and os.path.isdir(named):
            return Path(named)
    return None


def show_workers() -> None:
    """Show the metrics of the workers that this process will start. Idempotent; a failure is logged once."""
    if _Shown.tried or os.environ.get(VLLMS_DIRECTORY):
        return
    _Shown.tried = True
    made = None
    try:
        made = Path(tempfile.mkdtemp(prefix="rfork-metrics-"))
        REGISTRY.register(_Workers(made))
    except Exception as error:  # noqa: BLE001 - a start without metrics is a start
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        logger.warning(
            "/metrics shows no rfork_ metrics because of %s: %s; set TMPDIR to a directory that can be written to",
            type(error).__name__,
            error,
        )
        return
    os.environ[OWN_DIRECTORY] = str(made)
    atexit.register(_remove, made, os.getpid())


class _Shown:
    tried = False


class _Workers(Collector):
    """The values in the files of one directory, merged; processes that have ended count in counters alone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._failed = False

    def describe(self) -> Iterable[Metric]:
        """Return no names: without this method, the registry would collect to find out."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics; none, and a WARNING once, if the files cannot be read."""
        files = [name for name in glob.glob(f"{glob.escape(str(self._directory))}/*.db") if not is_stale(name)]
        try:
            return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - vLLM's own metrics are on the same page
            if not self._failed:
                logger.warning("rfork_ metrics cannot be read from %s: %s", self._directory, error)
            self._failed = True
            return []


def _remove(made: Path, owner: int) -> None:
    """Remove the directory at the end of the process that made it, not at that of a forked one."""
    if os.getpid() == owner:
        shutil.rmtree(made, ignore_errors=True)
