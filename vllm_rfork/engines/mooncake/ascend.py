"""The Ascend device of the calling thread, which Mooncake's Ascend transport expects to be set.

Not seen on hardware.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from vllm_rfork.engines.mooncake.endpoint import NAME
from vllm_rfork.errors import EngineError, EngineUnavailable


@functools.cache
def _runtime() -> Any:
    try:
        return ctypes.CDLL("libascendcl.so")
    except OSError as error:
        raise EngineUnavailable(
            NAME,
            f"the Ascend runtime cannot be loaded: {error}",
            hint="source CANN's set_env.sh before the start, so that libascendcl.so is on the loader's path",
        ) from error


def use_device(device: str) -> None:
    """Select ``device`` for the calling thread if it is an NPU (``npu:0``); other devices need nothing.

    Raises:
        EngineUnavailable: there is no Ascend runtime.
        EngineError: it refused.
    """
    kind, _, index = device.partition(":")
    if kind != "npu":
        return
    code = _runtime().aclrtSetDevice(ctypes.c_int32(int(index or 0)))
    if code != 0:
        raise EngineError(NAME, "open", f"aclrtSetDevice({index or 0}) failed", code=f"acl {code}", side="receiver")
