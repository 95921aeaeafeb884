"""The receiver's side: a connection to one seed, and the group of the two."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_rfork.engines.collective import channel, messages
from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.endpoint import NAME, Endpoint
from vllm_rfork.engines.collective.group import RECEIVER, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Join, Joined, Read, Refusal, Sending, Sent
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.errors import EngineError, Side
from vllm_rfork.manifest.segments import Segment

#: How much longer than the seed a receiver waits, so that the seed's refusal arrives, in seconds.
_ANSWER_S = 1.0
#: The side that failed when a seed refuses, by code.
_SIDES: dict[str, Side] = {"address": "seed", "lane": "receiver"}


class Peer:
    """A connected seed. Used by one thread at a time, but for :meth:`abort`.

    Args:
        lease: the planner's lease, for the seed; may be empty.

    Raises:
        EngineError: it cannot be reached before ``deadline``, or refuses.
    """

    def __init__(self, endpoint: Endpoint, backend: Backend, lease: str, deadline: float) -> None:
        self._channel: Channel | None = None
        self._group: Group | None = None
        with self._failures("connect"):
            self._channel = channel.connect(endpoint.host, endpoint.port, endpoint.secret, deadline)
            left_s = deadline - time.monotonic()
            join = Join(messages.VERSION, backend.name, lease, messages.bounded_s(left_s))
            messages.send(self._channel, join, deadline)
            messages.receive(self._channel, Joined, deadline)
            self._group = backend.create(RECEIVER, self._channel, deadline)

    @property
    def usable(self) -> bool:
        """False after a failure: the group is closed, and the seed has to be connected again."""
        return self._group is not None

    def read(self, segments: Sequence[Segment], deadline: float) -> None:
        """Request and receive the bytes of ``segments``.

        Raises:
            EngineError: the seed refused and stays connected, or the group is gone.
        """
        with self._failures("read"):
            if self._channel is None or self._group is None:
                raise Lost("the seed is not connected any more")
            # A seed that is stopped between two batches is noticed by these bounds alone.
            bound_s = messages.batch_bound_s(sum(each.nbytes for each in segments))
            deadline = min(deadline, time.monotonic() + bound_s + _ANSWER_S)
            left_s = messages.bounded_s(min(bound_s, deadline - time.monotonic()))
            request = Read([(each.remote, each.nbytes) for each in segments], left_s)
            messages.send(self._channel, request, deadline)
            messages.receive(self._channel, Sending, deadline)
            self._group.receive([Piece(each.local, each.nbytes) for each in segments], deadline)
            messages.receive(self._channel, Sent, min(deadline, time.monotonic() + messages.MESSAGE_S))

    def abort(self) -> None:
        """Make a call in another thread fail soon."""
        if (opened := self._channel) is not None:
            opened.interrupt()
        if (group := self._group) is not None:
            group.abort()

    def close(self) -> None:
        """Leave the seed. Idempotent.

        Raises:
            EngineError: bytes may still arrive (``in_flight``).
        """
        try:
            self._close()
        except GroupFailed as error:
            raise EngineError(NAME, "close", str(error), code="timeout", in_flight=error.in_flight) from error

    def _close(self) -> None:
        opened, self._channel = self._channel, None
        if opened is not None:
            opened.close()
        if self._group is not None:
            self._group.close()  # if this fails, the group stays, and so does its in_flight
            self._group = None

    @contextmanager
    def _failures(self, operation: str) -> Iterator[None]:
        """Close the group after any failure but a refused read, and raise the failure as an EngineError."""
        try:
            yield
        except Refusal as error:
            if operation == "connect":
                self._close()
            raise EngineError(
                NAME,
                operation,
                f"the seed refused: {error}",
                code=error.code,
                retry_elsewhere=True,
                side=_SIDES.get(error.code, "unknown"),
            ) from error
        except Exception as error:  # whatever failed: no byte may arrive later
            known = isinstance(error, (Lost, GroupFailed))
            in_flight = getattr(error, "in_flight", False)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            try:
                self._close()
            except GroupFailed as stuck:
                in_flight, text = in_flight or stuck.in_flight, f"{text}; {stuck}"
            raise EngineError(
                NAME,
                operation,
                text,
                code="timeout" if getattr(error, "late", False) else "",
                retry_elsewhere=not in_flight,
                in_flight=in_flight,
                side="unknown",
            ) from error
