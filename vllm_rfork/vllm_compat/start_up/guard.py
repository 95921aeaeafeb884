"""The outermost frame of every hook on a start: whatever fails inside, vLLM goes on as without this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn an exception into one WARNING that names ``what``, its type and its text."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a cache never fails a start, and hooks meet third-party code
        logger.warning("caches: %s was left to vLLM because of %s: %s", what, type(error).__name__, error)
