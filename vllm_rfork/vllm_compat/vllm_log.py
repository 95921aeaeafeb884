"""Connects this package's log to vLLM's."""

from __future__ import annotations

import logging


def log_through_vllm() -> None:
    """Make this package's loggers children of vLLM's, so that its lines look and go like vLLM's.

    vLLM configures its logger after plugins have been loaded, and again when its arguments are known, so handlers
    cannot be copied here; a parent is asked at the time of each line.
    """
    ours = logging.getLogger("vllm_rfork")
    ours.parent = logging.getLogger("vllm")
    ours.setLevel(logging.NOTSET)  # drops cached answers of isEnabledFor
