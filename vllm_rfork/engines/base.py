"""The port that every transfer engine implements.

One engine object serves one worker process and one role. A seed calls ``open``, ``register``, then publishes
``endpoint``. A receiver calls ``lane_obstacle`` of the class, then ``open``, ``register`` for its own memory,
``present_lease``, ``connect``, ``read`` as often as needed, and ``disconnect``. A receiver that becomes a seed keeps
the engine and its registrations. Both end with ``close``. Every call blocks and is bounded in time.

A worker may have several engines with the same regions. If ``lane_obstacle`` or ``connect`` refuses one engine's lane,
the receiver tries the next engine, before any byte moves.

An adapter raises :class:`~vllm_rfork.errors.EngineError` and nothing else, with the foreign error as its cause.
``vllm_rfork.testing`` contains the contract as tests.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

#: The place of a peer: in this container (the same namespaces), in another container of this host, or on another host.
Place = Literal["container", "host", "elsewhere"]


@dataclass(frozen=True)
class EngineConfig:
    """The arguments of :meth:`TransferEngine.open`.

    Attributes:
        device: the torch device of the memory: ``cpu``, ``cuda:1``, ``npu:0``. The index counts the visible devices
            of the process (``CUDA_VISIBLE_DEVICES``, ``ASCEND_RT_VISIBLE_DEVICES``); it is not the global rank.
        host: the address under which peers reach this process; an IPv4 literal if the engine requires one.
        timeout_s: bound on ``open``, ``register``, ``connect`` and ``close``, in seconds.
        options: the engine's own settings; see the adapter's documentation.
    """

    device: str
    host: str = "127.0.0.1"
    timeout_s: float = 30.0
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The largest ``read`` call, in bytes and items. The caller splits its batches accordingly.

    Attributes:
        max_batch_nbytes: the engine's choice, without ``rfork_max_batch_bytes``.
        largest_batch_nbytes: up to which that setting may raise it; None if it may only lower it.
    """

    max_batch_nbytes: int
    max_batch_items: int
    largest_batch_nbytes: int | None = None

    def batch_nbytes(self, wanted: int | None) -> int:
        """The largest batch in bytes for ``rfork_max_batch_bytes=wanted``; None if it is not set."""
        return min(wanted or self.max_batch_nbytes, self.largest_batch_nbytes or self.max_batch_nbytes)


class TransferEngine(abc.ABC):
    """A transfer engine; the module's docstring describes the order of calls."""

    #: The name in ``rfork_engine`` and in manifests.
    name: ClassVar[str]
    #: torch device types (``cpu``, ``cuda``, ``npu``) whose memory the engine reads and writes.
    device_types: ClassVar[frozenset[str]]
    #: The bounds of one ``read`` on any lane.
    limits: ClassVar[Limits]
    #: ``open`` and ``register`` take milliseconds, so a worker opens the engine whether it will be needed or not.
    opens_quickly: ClassVar[bool] = False

    @classmethod
    def self_check(cls) -> str:
        """Load the native parts as ``open`` does; returns what works on this machine, for ``vllm-rfork doctor``.

        Runs in a process of its own, which may crash.

        Raises:
            EngineUnavailable: something is not installed.
            EngineError: something does not work.
        """
        return "its adapter can be imported"

    @classmethod  # noqa: B027 - only large libraries are worth it
    def preload(cls) -> None:
        """Load native libraries that ``open`` will need, without touching a device.

        A worker calls it in the background before vLLM has set its device up. ``open`` works without it.

        Raises:
            EngineError: something is missing or does not work; ``open`` raises it again.
        """

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """The lane to a peer at ``place`` that has the hardware and the settings of this machine.

        For ``vllm-rfork doctor``, which calls it where ``self_check`` has succeeded. Opens no engine.

        Raises:
            EngineError: no lane leads there; the text contains the reason and, if there is one, the remedy.
        """
        return cls.name

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        """The reason, found without opening the engine, why no lane leads to ``endpoint``, and the remedy if any.

        None if only ``connect`` can tell. Returns within milliseconds.

        Args:
            endpoint: a seed's, for an engine of this name; untrusted.
            config: what :meth:`open` would get.

        Raises:
            EngineError: the endpoint is unreadable, or its engine is gone (``side="seed"``).
        """
        return None

    @abc.abstractmethod
    def open(self, config: EngineConfig) -> None:
        """Start the engine.

        Raises:
            EngineUnavailable: its package, or a library that it needs, is missing.
        """

    @property
    @abc.abstractmethod
    def endpoint(self) -> str:
        """The text with which a peer's engine of the same name reaches this one; opaque to everyone else.

        Valid after ``register``: for some engines it describes the registered memory.
        """

    @abc.abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make ``regions`` (disjoint, nbytes > 0) readable by peers and writable by ``read``: all of them or none.

        The caller keeps the memory alive until ``close`` has returned.
        """

    def present_lease(self, lease: str) -> None:  # noqa: B027 - one-sided engines need no lease
        """Take the id of the lease under which the next ``connect`` is made; two-sided engines send it to the seed."""

    @abc.abstractmethod
    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Connect to a peer.

        Raises:
            EngineError: it cannot be reached within ``timeout_s`` seconds; with the code ``lane`` if the engine has no
                path to it, or only one that is refused. The text contains the remedy.
        """

    def lane(self, endpoint: str) -> str:
        """The path of the bytes from a connected peer, as ``engine/lane``; the engine's name if it has only one.

        For log lines and the planner's records: at most 64 printable ASCII characters. Never raises.
        """
        return self.name

    def limits_for(self, endpoint: str) -> Limits:
        """The bounds of one ``read`` from a connected peer; ``limits`` unless its lane has others. Never raises."""
        return self.limits

    @abc.abstractmethod
    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Copy each segment from its ``remote`` address in the peer to its ``local`` one; return when all have arrived.

        Each segment is in one registered region on either side, and the batch is within ``limits_for(endpoint)``.

        Raises:
            EngineError: with ``in_flight=True`` if bytes may still arrive; then only ``close`` releases the buffers.
        """

    @abc.abstractmethod
    def disconnect(self, endpoint: str) -> None:
        """Forget the peer. Idempotent; unknown peers are ignored."""

    @property
    @abc.abstractmethod
    def registered_nbytes(self) -> int:
        """Bytes registered now; 0 after ``close``."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the engine and every read in it. Idempotent. No byte of a peer is written after it has returned.

        Raises:
            EngineError: with ``in_flight=True`` if the engine cannot ensure that; the caller then keeps the buffers
                until the process ends.
        """
