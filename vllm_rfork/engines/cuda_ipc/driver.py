"""The CUDA driver's calls that the adapter needs, as Python functions over integers.

``libcuda.so.1`` comes with the GPU's driver, so no package is needed. All calls use the device's primary context, like
torch. Every failure is an :class:`EngineError` with the driver's own name for it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_rfork.engines.native_library import CUDA_DRIVER, typed_library
from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable

NAME = "cuda_ipc"
HANDLE_NBYTES = 64
UUID_NBYTES = 16
_NOT_READY = 600
_NON_BLOCKING_STREAM = 1
_LAZY_PEER_ACCESS = 1
#: The allocation of the handle no longer exists, or never did.
_SEEDS_FAILURES = frozenset({"CUDA_ERROR_INVALID_HANDLE", "CUDA_ERROR_INVALID_VALUE"})


class _Handle(ctypes.Structure):
    """``CUipcMemHandle``, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_NBYTES),)


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``: the order of accesses to the sources; hints for managed memory; flags."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    )


_POINTER = ctypes.c_void_p
_ADDRESS = ctypes.c_uint64
#: C name → types of its arguments. ``CUdeviceptr`` is an unsigned 64-bit integer, handles of objects are pointers.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetUuid": (_POINTER, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_POINTER), ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_POINTER),),
    "cuMemAlloc_v2": (ctypes.POINTER(_ADDRESS), ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemAllocHost_v2": (ctypes.POINTER(_POINTER), ctypes.c_size_t),
    "cuMemFreeHost": (_POINTER,),
    "cuMemGetAddressRange_v2": (ctypes.POINTER(_ADDRESS), ctypes.POINTER(ctypes.c_size_t), _ADDRESS),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, ctypes.c_size_t, _POINTER),
    "cuMemcpyHtoD_v2": (_ADDRESS, _POINTER, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (_POINTER, _ADDRESS, ctypes.c_size_t),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_ADDRESS), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuStreamCreate": (ctypes.POINTER(_POINTER), ctypes.c_uint),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamQuery": (_POINTER,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}
#: Copies many ranges in one call. CUDA 12.8 added it; the driver of CUDA 13 exports this form as well.
_COPY_BATCH = "cuMemcpyBatchAsync"
_COPY_BATCH_SIGNATURE = (
    _POINTER,
    _POINTER,
    _POINTER,
    ctypes.c_size_t,
    ctypes.POINTER(_CopyAttributes),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    _POINTER,
)
_IN_STREAM_ORDER = 1


def _library() -> Any:
    """The driver's library with its functions typed.

    Raises:
        EngineUnavailable: it is missing, or lacks a function.
    """
    try:
        return typed_library(CUDA_DRIVER, _SIGNATURES)
    except OSError as error:
        raise EngineUnavailable(NAME, f"the CUDA driver cannot be loaded: {error}", hint=install_hint(NAME)) from error


class Driver:
    """The driver on one device, in its primary context. Calls may come from any thread.

    Args:
        index: the device's number within ``CUDA_VISIBLE_DEVICES``.

    Raises:
        EngineUnavailable: there is no driver.
        EngineError: there is no such device.
    """

    def __init__(self, index: int) -> None:
        self._library = _library()
        self._copy_batch = getattr(self._library, _COPY_BATCH, None)
        if self._copy_batch is not None:
            self._copy_batch.argtypes, self._copy_batch.restype = _COPY_BATCH_SIGNATURE, ctypes.c_int
        self._device = ctypes.c_int()
        self._context = _POINTER()
        self._call("open", "cuInit", 0)
        self._call("open", "cuDeviceGet", ctypes.byref(self._device), index)
        self._call("open", "cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def _call(self, operation: str, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._error(operation, name, code)

    def _error(self, operation: str, name: str, code: int) -> EngineError:
        """The error of a failed call; an invalid handle is the seed's failure."""
        text = self._error_name(code)
        return EngineError(
            NAME,
            operation,
            f"{name} failed",
            code=text,
            retry_elsewhere=operation == "connect",
            side="seed" if text in _SEEDS_FAILURES else None,
        )

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(code, ctypes.byref(text)) or text.value is None:
            return f"CUDA error {code}"
        return text.value.decode("ascii", "replace")

    @contextmanager
    def current(self, operation: str) -> Iterator[None]:
        """Make the context current on the calling thread for the block, and restore the previous one afterwards."""
        self._call(operation, "cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(_POINTER()))

    def release(self) -> None:
        """Release the primary context; the object cannot be used afterwards."""
        self._call("close", "cuDevicePrimaryCtxRelease_v2", self._device)

    def uuid(self) -> bytes:
        """The device's UUID (16 bytes), the same in every process and container."""
        uuid = (ctypes.c_ubyte * UUID_NBYTES)()
        self._call("open", "cuDeviceGetUuid", ctypes.byref(uuid), self._device)
        return bytes(uuid)

    # --- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """The address of new device memory, an allocation of its own."""
        address = _ADDRESS()
        self._call("open", "cuMemAlloc_v2", ctypes.byref(address), nbytes)
        return int(address.value)

    def free(self, address: int) -> None:
        """Free memory of :meth:`allocate`."""
        self._call("close", "cuMemFree_v2", address)

    def allocate_host(self, nbytes: int) -> int:
        """The address of new page-locked host memory."""
        address = _POINTER()
        self._call("open", "cuMemAllocHost_v2", ctypes.byref(address), nbytes)
        return int(address.value or 0)

    def free_host(self, address: int) -> None:
        """Free memory of :meth:`allocate_host`."""
        self._call("close", "cuMemFreeHost", address)

    def allocation_of(self, address: int, operation: str = "register") -> tuple[int, int]:
        """Base address and length in bytes of the allocation that contains ``address``, opened ones included."""
        base, nbytes = _ADDRESS(), ctypes.c_size_t()
        self._call(operation, "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), address)
        return int(base.value), int(nbytes.value)

    def write(self, address: int, data: bytes, operation: str = "open") -> None:
        """Copy ``data`` to the device; returns when it is there."""
        self._call(operation, "cuMemcpyHtoD_v2", address, data, len(data))

    def fetch(self, address: int, nbytes: int) -> bytes:
        """Copy ``nbytes`` from the device."""
        into = ctypes.create_string_buffer(nbytes)
        self._call("read", "cuMemcpyDtoH_v2", into, address, nbytes)
        return into.raw

    # --- other processes' memory --------------------------------------------------------------------------------------

    def export(self, base: int) -> bytes:
        """The handle with which other processes open the allocation at ``base``."""
        handle = _Handle()
        self._call("register", "cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.reserved)

    def open_handle(self, handle: bytes) -> int:
        """Map another process's allocation; returns its address in this one. Each opening needs a closing.

        Raises:
            EngineError: its process has ended or freed it, or this process has no access to that device.
        """
        address = _ADDRESS()
        passed = _Handle((ctypes.c_ubyte * HANDLE_NBYTES).from_buffer_copy(handle))
        self._call("connect", "cuIpcOpenMemHandle_v2", ctypes.byref(address), passed, _LAZY_PEER_ACCESS)
        return int(address.value)

    def close_handle(self, address: int) -> None:
        """Unmap what :meth:`open_handle` returned."""
        self._call("close", "cuIpcCloseMemHandle", address)

    # --- copies -------------------------------------------------------------------------------------------------------

    def new_stream(self) -> Any:
        """A stream that does not synchronize with the default stream."""
        stream = _POINTER()
        self._call("open", "cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING_STREAM)
        return stream

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream, which must be empty."""
        self._call("close", "cuStreamDestroy_v2", stream)

    def copy(self, stream: Any, to: int, source: int, nbytes: int) -> None:
        """Queue a copy between any two addresses, of devices or of the host."""
        self._call("read", "cuMemcpyAsync", to, source, nbytes, stream)

    def copy_all(self, stream: Any, copies: Sequence[tuple[int, int, int]]) -> None:
        """Queue copies, each a destination, a source and a number of bytes, which may run in any order.

        One call of the driver queues all of them if it has one for that and accepts the memory.

        Raises:
            EngineError: the driver refused one; those before it are queued.
        """
        if len(copies) > 1 and self._queue_batch(stream, copies):
            return
        for to, source, nbytes in copies:
            self.copy(stream, to, source, nbytes)

    def _queue_batch(self, stream: Any, copies: Sequence[tuple[int, int, int]]) -> bool:
        """Return True if the driver took the batch; one that refuses it does not get another."""
        if self._copy_batch is None:
            return False
        columns = [array("Q", column) for column in zip(*copies, strict=True)]
        attributes, first, failed = _CopyAttributes(source_order=_IN_STREAM_ORDER), ctypes.c_size_t(), ctypes.c_size_t()
        code = self._copy_batch(
            *(column.buffer_info()[0] for column in columns),
            len(copies),
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            ctypes.byref(failed),
            stream,
        )
        if code:
            self._copy_batch = None
        return bool(code == 0)

    def is_idle(self, stream: Any) -> bool:
        """Return True if every copy of the stream is done.

        Raises:
            EngineError: one of them failed.
        """
        code = self._library.cuStreamQuery(stream)
        if code in (0, _NOT_READY):
            return bool(code == 0)
        raise self._error("read", "a copy", code)
