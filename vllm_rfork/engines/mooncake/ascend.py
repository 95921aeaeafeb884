"""The Ascend device of the calling thread, which Mooncake's Ascend transport expects to be set.

Not seen on hardware.
"""

from __future__ import annotations

import ctypes

from vllm_rfork.engines.mooncake.endpoint import NAME
from vllm_rfork.engines.native_library import ascend_runtime
from vllm_rfork.errors import EngineError


def use_device(device: str) -> None:
    """Select ``device`` for the calling thread if it is an NPU (``npu:0``); other devices need nothing.

    Raises:
        EngineUnavailable: there is no Ascend runtime.
        EngineError: it refused.
    """
    kind, _, index = device.partition(":")
    if kind != "npu":
        return
    code = ascend_runtime(NAME).aclrtSetDevice(ctypes.c_int32(int(index or 0)))
    if code != 0:
        raise EngineError(NAME, "open", f"aclrtSetDevice({index or 0}) failed", code=f"acl {code}", side="receiver")
