"""Groups of two over gloo, for host memory, as objects of torch's ``ProcessGroupGloo``.

Nothing here is known to ``torch.distributed``'s registry of groups: a group is an object with its own sockets and its
own thread, which are gone when it is destroyed.

A wait that runs out of time closes the connections of its group, under the lock that the group's thread holds while it
reads and writes. So after a failure, and after :meth:`GlooGroup.abort`, no byte is written any more.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import ipaddress
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar

from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import RECEIVER, SEED, STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.plan import STAGED_NBYTES, Message, Piece, gather, messages, scatter

#: Bytes and messages on their way: one message alone leaves the connection idle after it (1.4 GB/s, not 2.3).
_WINDOW_NBYTES = 64 * 1024 * 1024
_WINDOW = 64
#: Staging buffers of a group.
_SLOTS = 4
_DATA_TAG = 0
_AT_ONCE = timedelta(milliseconds=1)
#: Lengths in gloo's description of a process: of a host name at most, of an address (``sockaddr_storage`` and a
#: number), and of the identifiers of two connections.
_MAX_HOST_NAME, _ADDRESS_NBYTES, _NUMBERS_NBYTES = 255, 136, 16


class GlooBackend(Backend):
    """gloo needs nothing that lasts longer than a group."""

    name: ClassVar[str] = "gloo"
    captures: ClassVar[bool] = False

    def __init__(self, index: int) -> None:
        from torch.distributed import ProcessGroupGloo  # noqa: F401 - fails here if torch lacks it

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """Connect over the addresses of the control connection."""
        return GlooGroup(rank, channel, deadline)

    def close(self) -> None:
        """Nothing is open."""


class GlooGroup(Group):
    """See the module's docstring."""

    def __init__(self, rank: int, channel: Channel, deadline: float) -> None:
        self._peer = SEED if rank == RECEIVER else RECEIVER
        self._stopped = False
        self._lock = threading.Lock()  # of the two attributes below
        from torch.distributed import ProcessGroupGloo

        from vllm_rfork.engines.collective.store import RelayStore

        store = RelayStore(channel, deadline, published_problem)
        options = ProcessGroupGloo._Options()
        options._timeout = _until(deadline)
        options._threads = 1
        try:
            self._staging = _bytes(_SLOTS * STAGED_NBYTES)  # its pages come with use
            options._devices = [ProcessGroupGloo.create_device(hostname=channel.local_host)]
            self._group: Any = ProcessGroupGloo(store, rank, 2, options)
        except Exception as error:
            if store.lost is not None:
                raise store.lost from error
            raise GroupFailed(f"gloo creates no group: {_first_line(error)}") from error

    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Send directly, or through the staging buffers."""

        def post(message: Message, tensor: Any, staged: int) -> Any:
            if staged:
                gather(message.pieces, staged)
            return self._group.send([tensor], self._peer, _DATA_TAG)

        self._transfer(pieces, deadline, post, lambda message, staged: None)

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Receive directly, or through the staging buffers."""

        def arrived(message: Message, staged: int) -> None:
            if staged:
                scatter(staged, message.pieces)

        self._transfer(
            pieces, deadline, lambda _, tensor, __: self._group.recv([tensor], self._peer, _DATA_TAG), arrived
        )

    def abort(self) -> None:
        """Let a wait run out of time, which closes the connections."""
        with self._lock:
            self._stopped = True
            if self._group is not None:
                self._cut()

    def close(self) -> None:
        """Close the connections, then destroy the group and its thread."""
        self.abort()
        with self._lock:
            self._group = None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _transfer(
        self,
        pieces: Sequence[Piece],
        deadline: float,
        post: Callable[[Message, Any, int], Any],
        done: Callable[[Message, int], None],
    ) -> None:
        """Post one message after the other, with bounded numbers and bytes on their way."""
        waiting: collections.deque[tuple[Any, Message, int]] = collections.deque()
        free = [self._staging.data_ptr() + number * STAGED_NBYTES for number in range(_SLOTS)]
        nbytes = 0

        def finish_oldest() -> int:
            work, message, staged = waiting.popleft()
            self._finish(work, deadline)
            done(message, staged)
            free.extend([staged] if staged else [])
            return message.nbytes

        try:
            for message in messages(pieces):
                short = len(message.pieces) > 1
                while waiting and (
                    len(waiting) == _WINDOW or nbytes + message.nbytes > _WINDOW_NBYTES or (short and not free)
                ):
                    nbytes -= finish_oldest()
                staged = free.pop() if short else 0
                tensor = _tensor(staged or message.pieces[0].address, message.nbytes)
                waiting.append((self._posted(post, message, tensor, staged), message, staged))
                nbytes += message.nbytes
            while waiting:
                finish_oldest()
        except GroupFailed:
            self.abort()
            raise

    def _posted(self, post: Callable[[Message, Any, int], Any], message: Message, tensor: Any, staged: int) -> Any:
        if self._stopped:
            raise GroupFailed("the group was aborted")
        try:
            return post(message, tensor, staged)
        except RuntimeError as error:
            raise GroupFailed(f"gloo failed: {_first_line(error)}") from error

    def _finish(self, work: Any, deadline: float) -> None:
        """Wait for a message."""
        bound = min(deadline, time.monotonic() + STALL_S)
        try:
            work.wait(_until(bound))
        except RuntimeError as error:
            late = time.monotonic() >= bound
            text = "the peer made no progress in time" if late else f"gloo failed: {_first_line(error)}"
            raise GroupFailed("the group was aborted" if self._stopped else text, late=late) from error

    def _cut(self) -> None:
        """Close the connections: a receive of a message that the peer cannot send runs out of time.

        The peer does not know the tag. gloo ends the process on a message that is longer than expected.
        """
        tag = 1 + secrets.randbelow(2**30)
        with suppress(RuntimeError):  # raised in either case: for the time, or because they are closed already
            self._group.recv([_bytes(1)], self._peer, tag).wait(_AT_ONCE)


def published_problem(value: bytes, host: str) -> str | None:
    """The reason why gloo must not read ``value``, which it would without any check of lengths.

    It consists of a host name and an address with their lengths, and two numbers. The address must be ``host``: a group
    connects to the other end of its control connection only.
    """
    length, at = struct.Struct("<Q"), 0
    if len(value) > length.size:
        at = length.size + length.unpack_from(value)[0]
    if not 0 < at <= length.size + _MAX_HOST_NAME or len(value) != at + length.size + _ADDRESS_NBYTES + _NUMBERS_NBYTES:
        return f"{len(value)} bytes of a form that is not known"
    if length.unpack_from(value, at)[0] != _ADDRESS_NBYTES:
        return "an address of a length that is not known"
    at += length.size
    family = struct.unpack_from("=H", value, at)[0]
    places = {int(socket.AF_INET): (4, 4), int(socket.AF_INET6): (8, 16)}
    if family not in places:
        return f"an address of family {family}"
    start, nbytes = places[family]
    address = ipaddress.ip_address(value[at + start : at + start + nbytes])
    return None if address == ipaddress.ip_address(host.partition("%")[0]) else f"the address {address}"


def _bytes(nbytes: int) -> Any:
    """New host memory as a tensor. Raises RuntimeError if there is none."""
    torch = importlib.import_module("torch")
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _tensor(address: int, nbytes: int) -> Any:
    """The bytes at ``address`` as a tensor, without a copy."""
    torch = importlib.import_module("torch")
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def _until(deadline: float) -> timedelta:
    """The time until ``deadline``; torch takes 0 for no bound at all."""
    return max(_AT_ONCE, timedelta(seconds=deadline - time.monotonic()))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
