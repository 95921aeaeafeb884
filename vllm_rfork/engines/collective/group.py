"""The port of a group of two, and the libraries that implement it by torch device type."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Sequence
from typing import ClassVar

from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.plan import Piece

#: The seed's rank and the receiver's. The receiver is the first: NCCL's and HCCL's first rank owns the listening
#: thread of a group, which does not end if the second one never connects.
RECEIVER, SEED = 0, 1
#: A message that makes no progress ends its group after this time, in seconds.
STALL_S = 5.0


class GroupFailed(Exception):
    """A group is of no use any more.

    Attributes:
        in_flight: bytes of it may still arrive, or be read.
        late: a bound in time has passed.
        unfinished: the group was given up while its library created it, and the library keeps what it had taken.
    """

    def __init__(self, text: str, *, in_flight: bool = False, late: bool = False) -> None:
        super().__init__(text)
        self.in_flight = in_flight
        self.late = late
        self.unfinished = False


class Group(abc.ABC):
    """Two processes that transfer bytes from the second to the first. One thread at a time, but for :meth:`abort`.

    After a failure only :meth:`close` is left.
    """

    @abc.abstractmethod
    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Send the bytes of ``pieces``, in order; return when the memory may change again.

        Raises:
            GroupFailed: with ``in_flight`` if the library may still read the memory.
        """

    @abc.abstractmethod
    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Receive the bytes of ``pieces``, in order; return when all have arrived.

        Raises:
            GroupFailed: with ``in_flight`` if bytes may still arrive.
        """

    @abc.abstractmethod
    def abort(self) -> None:
        """Make a call in another thread fail soon, and every later one at once. Idempotent; returns at once."""

    @abc.abstractmethod
    def close(self) -> None:
        """Destroy the group; afterwards nothing reads or writes memory for it. Idempotent.

        Raises:
            GroupFailed: with ``in_flight`` if that cannot be ensured.
        """


class Backend(abc.ABC):
    """The library of one open engine, on the device with the number ``index``.

    Raises:
        ImportError, OSError: its library, or torch, is not installed.
        GroupFailed: there is no such device.
    """

    #: ``tcp``, ``nccl`` or ``hccl``: both sides must have the same.
    name: ClassVar[str]
    #: Graphs are captured on its devices, and its calls would end in them.
    captures: ClassVar[bool]

    @abc.abstractmethod
    def __init__(self, index: int) -> None: ...

    @abc.abstractmethod
    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """Create this side of a group; the other side does the same at the other end of ``channel``.

        Raises:
            GroupFailed: it cannot be created, or not in time.
            Lost: the other side is gone.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the library holds. All groups are closed."""


#: torch device type → module and class of its backend.
_BACKENDS: dict[str, tuple[str, str]] = {
    "cpu": ("tcp", "TcpBackend"),
    "cuda": ("nccl", "NcclBackend"),
    "npu": ("hccl", "HcclBackend"),
}


def backend_class(device_type: str) -> type[Backend]:
    """The backend for a torch device type.

    Raises:
        KeyError: there is none.
        ImportError: torch, or the device's part of it, is not installed.
    """
    module, name = _BACKENDS[device_type]
    cls: type[Backend] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return cls


#: torch device type → the lane's name.
LANES: dict[str, str] = {device_type: module for device_type, (module, _) in _BACKENDS.items()}
