"""C libraries that engines call through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_rfork.errors import EngineUnavailable

CUDA_DRIVER = "libcuda.so.1"
ASCEND_RUNTIME = "libascendcl.so"


def typed_library(name: str, signatures: Mapping[str, Sequence[Any]]) -> Any:
    """The library called ``name``, with the argument types of its functions, all of which return a C int.

    Raises:
        OSError: it is missing, or lacks a function.
    """
    library = ctypes.CDLL(name)
    try:
        for function_name, types in signatures.items():
            function = getattr(library, function_name)
            function.argtypes, function.restype = types, ctypes.c_int
    except AttributeError as error:
        raise OSError(f"{name} is too old: {error}") from error
    return library


def ascend_runtime(engine: str) -> Any:
    """CANN's runtime, for the engine called ``engine``.

    Raises:
        EngineUnavailable: the loader does not find it.
    """
    try:
        return ctypes.CDLL(ASCEND_RUNTIME)
    except OSError as error:
        raise EngineUnavailable(
            engine,
            f"the Ascend runtime cannot be loaded: {error}",
            hint=f"source CANN's set_env.sh before the start, so that {ASCEND_RUNTIME} is on the loader's path",
        ) from error
