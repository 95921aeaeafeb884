"""Groups of two over HCCL, for Ascend memory. Not seen on hardware.

HCCL is called directly, like NCCL: ``ProcessGroupHCCL`` of torch_npu has the same watchdog. Three things differ from
NCCL: creating a communicator blocks, so it gets a thread with a deadline; there is no abort of a communicator, so the
stream is aborted, with a call that CANN has from 8.0 on; and transfers are queued one by one.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from vllm_rfork.engines.collective import device_group
from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import Backend, Group, GroupFailed
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.native_library import ASCEND_RUNTIME, typed_library
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline

_ID_NBYTES = 4108
_INT8 = 0
_POINTER = ctypes.c_void_p
_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64
_HCCL: dict[str, tuple[Any, ...]] = {
    "HcclGetRootInfo": (_POINTER,),
    "HcclCommInitRootInfo": (_U32, _POINTER, _U32, ctypes.POINTER(_POINTER)),
    "HcclGetCommAsyncError": (_POINTER, ctypes.POINTER(ctypes.c_int)),
    "HcclSend": (_POINTER, _U64, ctypes.c_int, _U32, _POINTER, _POINTER),
    "HcclRecv": (_POINTER, _U64, ctypes.c_int, _U32, _POINTER, _POINTER),
    "HcclCommDestroy": (_POINTER,),
}
_ACL: dict[str, tuple[Any, ...]] = {
    "aclrtSetDevice": (ctypes.c_int32,),
    "aclrtCreateStream": (ctypes.POINTER(_POINTER),),
    "aclrtStreamQuery": (_POINTER, ctypes.POINTER(ctypes.c_int)),
    "aclrtStreamAbort": (_POINTER,),
    "aclrtDestroyStream": (_POINTER,),
}


class _Calls:
    """The functions of a C library, which return 0 or an error.

    Raises:
        OSError: the library is missing, or lacks a function.
    """

    def __init__(self, library: str, signatures: dict[str, tuple[Any, ...]]) -> None:
        self._library = typed_library(library, signatures)

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises GroupFailed."""
        if code := getattr(self._library, name)(*arguments):
            raise GroupFailed(f"{name} failed: {code}")


class Ascend:
    """One NPU, through the runtime ``libascendcl.so``."""

    def __init__(self, index: int) -> None:
        self._acl = _Calls(ASCEND_RUNTIME, _ACL)
        self._index = index

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device this thread's, for good: the engine's threads have no other."""
        self._acl("aclrtSetDevice", self._index)
        yield

    def new_stream(self) -> Any:
        """A stream of its own. The runtime has no lower priority than the default."""
        stream = _POINTER()
        self._acl("aclrtCreateStream", ctypes.byref(stream))
        return stream

    def is_idle(self, stream: Any) -> bool:
        """Return True if the stream has nothing to do. Raises GroupFailed."""
        status = ctypes.c_int()
        self._acl("aclrtStreamQuery", stream, ctypes.byref(status))
        return status.value == 0

    def abort_stream(self, stream: Any) -> None:
        """Drop what is queued. Raises GroupFailed."""
        self._acl("aclrtStreamAbort", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream that is idle. Raises GroupFailed."""
        self._acl("aclrtDestroyStream", stream)


class Hccl:
    """The library ``libhccl.so``, on one NPU."""

    def __init__(self, ascend: Ascend) -> None:
        self._hccl = _Calls("libhccl.so", _HCCL)
        self._ascend = ascend

    @property
    def id_nbytes(self) -> int:
        """Length of ``HcclRootInfo``."""
        return _ID_NBYTES

    def unique_id(self) -> bytes:
        """The identity of a new group; this process listens for its other member."""
        root = ctypes.create_string_buffer(_ID_NBYTES)
        self._hccl("HcclGetRootInfo", root)
        return root.raw

    def communicator(self, unique: bytes, rank: int, deadline: float) -> Any:
        """A communicator of two. HCCL ends a creation that was given up after ``HCCL_CONNECT_TIMEOUT``."""
        root = ctypes.create_string_buffer(unique, _ID_NBYTES)
        made = _POINTER()

        def make() -> None:
            with self._ascend.current():
                self._hccl("HcclCommInitRootInfo", 2, root, rank, ctypes.byref(made))

        try:
            call_with_deadline(make, max(0.0, deadline - time.monotonic()), "rfork-hccl-create")
        except DeadlineExceeded as error:
            raise GroupFailed("HCCL creates no group in time", late=True) from error
        return made

    def is_ready(self, communicator: Any) -> bool:
        """True, since no call is asynchronous. Raises GroupFailed if the peer failed."""
        state = ctypes.c_int()
        self._hccl("HcclGetCommAsyncError", communicator, ctypes.byref(state))
        if state.value:
            raise GroupFailed(f"HCCL: a transfer failed: {state.value}")
        return True

    def queue(self, *, sends: bool, pieces: Sequence[Piece], peer: int, communicator: Any, stream: Any) -> None:
        """Queue transfers one by one. Raises GroupFailed."""
        name = "HcclSend" if sends else "HcclRecv"
        for address, nbytes in pieces:
            self._hccl(name, address, nbytes, _INT8, peer, communicator, stream)

    def abort(self, communicator: Any, stream: Any) -> None:
        """Drop what is queued, then destroy the communicator. Raises GroupFailed."""
        if not self._ascend.is_idle(stream):
            self._ascend.abort_stream(stream)
        self._hccl("HcclCommDestroy", communicator)


class HcclBackend(Backend):
    """HCCL and the runtime on one NPU."""

    name: ClassVar[str] = "hccl"
    captures: ClassVar[bool] = True

    def __init__(self, index: int) -> None:
        importlib.import_module("torch_npu")  # it loads CANN's libraries
        self._ascend = Ascend(index)
        self._hccl = Hccl(self._ascend)

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """Create a communicator, on a thread with a deadline."""
        return device_group.create(self._hccl, self._ascend, rank, channel, deadline)

    def close(self) -> None:
        """The device's context belongs to torch_npu."""
