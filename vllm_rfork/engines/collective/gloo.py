"""Groups of two over gloo, for host memory, as objects of torch's ``ProcessGroupGloo``.

Nothing here is known to ``torch.distributed``'s registry of groups: a group is an object with its own sockets and its
own thread, which are gone when it is destroyed.

A wait that runs out of time closes the connections of its group, under the lock that the group's thread holds while it
reads and writes. So after a failure, and after :meth:`GlooGroup.abort`, no byte is written any more.
"""

from __future__ import annotations

import collections
import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch.distributed import ProcessGroupGloo

from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import RECEIVER, SEED, STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.plan import STAGED_NBYTES, Message, Piece, gather, messages, scatter
from vllm_rfork.engines.collective.store import RelayStore

#: Messages on their way: one alone leaves the connection idle between two (1.4 GB/s against 2.3 on two cores).
_WINDOW = 4
_DATA_TAG, _ABORT_TAG = 0, 1
_AT_ONCE = timedelta(milliseconds=1)


class GlooBackend(Backend):
    """gloo needs nothing that lasts longer than a group."""

    name: ClassVar[str] = "gloo"
    captures: ClassVar[bool] = False

    def __init__(self, index: int) -> None:
        """Host memory has one device, whatever ``index``."""

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
        self._staging: Any = None
        store = RelayStore(channel, deadline)
        options = ProcessGroupGloo._Options()
        options._timeout = _until(deadline)
        options._threads = 1
        try:
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
            self._group = self._staging = None

    # -- inside ------------------------------------------------------------------------------------------------------

    def _transfer(
        self,
        pieces: Sequence[Piece],
        deadline: float,
        post: Callable[[Message, Any, int], Any],
        done: Callable[[Message, int], None],
    ) -> None:
        """Post one message after the other, with a bounded number on their way."""
        waiting: collections.deque[tuple[Any, Message, int]] = collections.deque()
        staging = 0
        try:
            for number, message in enumerate(messages(pieces)):
                if len(waiting) == _WINDOW:
                    self._finish(*waiting.popleft(), deadline, done)
                staged = 0
                if len(message.pieces) > 1:
                    staging = staging or self._staging_address()
                    staged = staging + number % _WINDOW * STAGED_NBYTES
                tensor = _tensor(staged or message.pieces[0].address, message.nbytes)
                waiting.append((self._posted(post, message, tensor, staged), message, staged))
            while waiting:
                self._finish(*waiting.popleft(), deadline, done)
        except GroupFailed:
            self.abort()
            raise

    def _staging_address(self) -> int:
        if self._staging is None:
            self._staging = torch.empty(_WINDOW * STAGED_NBYTES, dtype=torch.uint8, device="cpu")
        return int(self._staging.data_ptr())

    def _posted(self, post: Callable[[Message, Any, int], Any], message: Message, tensor: Any, staged: int) -> Any:
        if self._stopped:
            raise GroupFailed("the group was aborted")
        try:
            return post(message, tensor, staged)
        except RuntimeError as error:
            raise GroupFailed(f"gloo failed: {_first_line(error)}") from error

    def _finish(
        self, work: Any, message: Message, staged: int, deadline: float, done: Callable[[Message, int], None]
    ) -> None:
        bound = min(deadline, time.monotonic() + STALL_S)
        try:
            work.wait(_until(bound))
        except RuntimeError as error:
            late = time.monotonic() >= bound
            text = "the peer made no progress in time" if late else f"gloo failed: {_first_line(error)}"
            raise GroupFailed("the group was aborted" if self._stopped else text, late=late) from error
        done(message, staged)

    def _cut(self) -> None:
        """Close the connections: a receive of a message that the peer never sends runs out of time."""
        with suppress(RuntimeError):  # raised in either case: for the time, or because they are closed already
            self._group.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], self._peer, _ABORT_TAG).wait(_AT_ONCE)


def _tensor(address: int, nbytes: int) -> Any:
    """The bytes at ``address`` as a tensor, without a copy."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def _until(deadline: float) -> timedelta:
    """The time until ``deadline``; torch takes 0 for no bound at all."""
    return max(_AT_ONCE, timedelta(seconds=deadline - time.monotonic()))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
