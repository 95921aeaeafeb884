"""The CUDA driver's calls that groups over NCCL need: the device's context, one stream for each group, its state.

All calls use the device's primary context, like torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_rfork.engines.collective.group import GroupFailed
from vllm_rfork.engines.native_library import CUDA_DRIVER, typed_library

_NOT_READY = 600
_NON_BLOCKING_STREAM = 1
_RELAXED_CAPTURE = 2
_POINTER = ctypes.c_void_p
_INT = ctypes.POINTER(ctypes.c_int)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_INT, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_POINTER), ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_POINTER),),
    "cuCtxGetStreamPriorityRange": (_INT, _INT),
    "cuThreadExchangeStreamCaptureMode": (_INT,),
    "cuStreamCreateWithPriority": (ctypes.POINTER(_POINTER), ctypes.c_uint, ctypes.c_int),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamQuery": (_POINTER,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class Cuda:
    """One device. Calls may come from any thread.

    Args:
        index: the device's number within ``CUDA_VISIBLE_DEVICES``.

    Raises:
        OSError: there is no driver, or it lacks a function.
        GroupFailed: there is no such device.
    """

    def __init__(self, index: int) -> None:
        self._library = typed_library(CUDA_DRIVER, _SIGNATURES)
        self._device = ctypes.c_int()
        self._context = _POINTER()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on this thread for the block, and its calls harmless for captures in others.

        Captures are excluded by the capture gate already, but for those that nothing announces.
        """
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # `mode` is the previous one now
            try:
                yield
            finally:
                self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(_POINTER()))

    def new_stream(self) -> Any:
        """A stream of the lowest priority that does not synchronize with the default stream."""
        stream, least, greatest = _POINTER(), ctypes.c_int(), ctypes.c_int()
        self._call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self._call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING_STREAM, least)
        return stream

    def is_idle(self, stream: Any) -> bool:
        """Return True if the stream has nothing to do.

        Raises:
            GroupFailed: the device failed.
        """
        code = self._library.cuStreamQuery(stream)
        if code in (0, _NOT_READY):
            return bool(code == 0)
        raise self._error("the stream", code)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream that is idle."""
        self._call("cuStreamDestroy_v2", stream)

    def release(self) -> None:
        """Release the context; the object cannot be used afterwards."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._error(name, code)

    def _error(self, name: str, code: int) -> GroupFailed:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(code, ctypes.byref(text)) or text.value is None:
            return GroupFailed(f"{name} failed: CUDA error {code}")
        return GroupFailed(f"{name} failed: {text.value.decode('ascii', 'replace')}")
