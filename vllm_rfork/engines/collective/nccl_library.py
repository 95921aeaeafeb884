"""NCCL's calls that groups of two need, by ctypes.

torch's ``ProcessGroupNCCL`` is not used: its watchdog ends the whole process when an operation fails or runs out of
time, unless environment variables that all groups of the process share say otherwise
(``TORCH_NCCL_ASYNC_ERROR_HANDLING``, the heartbeat monitor). A seed must survive its receivers. NCCL itself does all
that is needed: communicators that never block their caller, errors on request, and abort.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

from vllm_rfork.engines.collective.group import GroupFailed
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.native_library import typed_library

LIBRARY = "libnccl.so.2"
ID_NBYTES = 128
#: Thread blocks of a kernel: two H200 transfer more than any network with them, and 128 others stay free.
MAX_CTAS = 4
_IN_PROGRESS = 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_MAGIC = 0xCAFEBEEF
#: The configuration below is that of this version; later ones know it, and use defaults for their newer fields.
_CONFIG_VERSION = 21800
_POINTER = ctypes.c_void_p


class UniqueId(ctypes.Structure):
    """``ncclUniqueId``, which is passed by value."""

    _fields_ = (("internal", ctypes.c_ubyte * ID_NBYTES),)


class _Config(ctypes.Structure):
    """``ncclConfig_t`` of NCCL 2.18."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRankConfig": (
        ctypes.POINTER(_POINTER),
        ctypes.c_int,
        UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ),
    "ncclCommGetAsyncError": (_POINTER, ctypes.POINTER(ctypes.c_int)),
    "ncclCommAbort": (_POINTER,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _POINTER, _POINTER),
    "ncclRecv": (_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _POINTER, _POINTER),
}


class Nccl:
    """The library that torch has loaded.

    Raises:
        ImportError: torch is not installed.
        OSError: the library is missing, lacks a call, or is older than 2.18.
    """

    def __init__(self) -> None:
        importlib.import_module("torch")  # it loads its own NCCL, which must be the process's only one
        self._library = typed_library(LIBRARY, _SIGNATURES)
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self._library.ncclGetVersion(ctypes.byref(version))
        self.version = version.value
        if self.version < _CONFIG_VERSION:
            raise OSError(f"{LIBRARY} has version {self.version}, and {_CONFIG_VERSION} is needed")

    def unique_id(self) -> bytes:
        """The identity of a new group; this process listens for its other member."""
        unique = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique))
        return bytes(unique.internal)

    @property
    def id_nbytes(self) -> int:
        """Length of a group's identity."""
        return ID_NBYTES

    def communicator(self, unique: bytes, rank: int, deadline: float) -> Any:
        """A communicator of two that is still being created; every call on it returns at once."""
        config = _Config(
            size=ctypes.sizeof(_Config),
            magic=_MAGIC,
            version=_CONFIG_VERSION,
            blocking=0,
            cga_cluster_size=_UNDEFINED,
            min_ctas=1,
            max_ctas=MAX_CTAS,
            net_name=None,
            split_share=_UNDEFINED,
        )
        communicator = _POINTER()
        passed = UniqueId((ctypes.c_ubyte * ID_NBYTES).from_buffer_copy(unique))
        self._call("ncclCommInitRankConfig", ctypes.byref(communicator), 2, passed, rank, ctypes.byref(config))
        return communicator

    def is_ready(self, communicator: Any) -> bool:
        """Return True if the communicator's last call has done its work.

        Raises:
            GroupFailed: it failed, or the peer did.
        """
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", communicator, ctypes.byref(state))
        if state.value not in (0, _IN_PROGRESS):
            raise self._error("a transfer", state.value)
        return state.value == 0

    def queue(self, *, sends: bool, pieces: Sequence[Piece], peer: int, communicator: Any, stream: Any) -> None:
        """Queue transfers as one group of calls. Raises GroupFailed."""
        name = "ncclSend" if sends else "ncclRecv"
        self._call("ncclGroupStart")
        try:
            for address, nbytes in pieces:
                self._call(name, address, nbytes, _UINT8, peer, communicator, stream)
        finally:
            self._call("ncclGroupEnd")

    def abort(self, communicator: Any, stream: Any) -> None:
        """Tell the kernels to end, and destroy the communicator. Raises GroupFailed."""
        self._call("ncclCommAbort", communicator)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library; it may still be in progress afterwards.

        Raises:
            GroupFailed: it failed.
        """
        code = getattr(self._library, name)(*arguments)
        if code not in (0, _IN_PROGRESS):
            raise self._error(name, code)

    def _error(self, what: str, code: int) -> GroupFailed:
        text = self._library.ncclGetErrorString(code) or b"no description"
        return GroupFailed(f"NCCL: {what} failed: {text.decode('ascii', 'replace')} ({code})")
