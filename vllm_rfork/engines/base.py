"""The port every transfer engine implements.

One engine object serves one worker process and one role. A seed calls ``open``, ``register``, then hands out
``endpoint``; a receiver calls ``open``, ``register`` for its own memory, ``connect``, ``read`` as often as it
takes, and ``disconnect``; a receiver that becomes a seed keeps the engine and its registrations. Both end with
``close``. Every call is bounded in time. All calls block; the caller runs them off threads that must not wait.

An adapter raises :class:`~vllm_rfork.errors.EngineError` and nothing else, with the foreign error as its cause.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to open.

    Attributes:
        device: ``cpu``, ``cuda:1``, ``npu:0``: the torch device that holds the memory. The index counts as the
            process sees its devices (within ``CUDA_VISIBLE_DEVICES``, ``ASCEND_RT_VISIBLE_DEVICES``), which on
            the second node is not the global rank.
        host: the address under which peers reach this process; IPv4 literal where the engine demands one.
        timeout_s: bound on ``open``, ``register``, ``connect`` and ``close``, in seconds.
        options: the engine's own settings, read from the environment by its adapter's documentation.
    """

    device: str
    host: str = "127.0.0.1"
    timeout_s: float = 30.0
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How large one ``read`` call may be: bytes and items. The caller cuts batches to fit."""

    max_batch_nbytes: int
    max_batch_items: int


class TransferEngine(abc.ABC):
    """See the module's docstring for the order of calls."""

    #: The name in ``rfork_engine`` and in manifests.
    name: ClassVar[str]
    #: torch device types (``cpu``, ``cuda``, ``npu``) whose memory the engine reads and writes.
    device_types: ClassVar[frozenset[str]]
    #: Default bounds for one ``read``; ``rfork_max_batch_bytes`` lowers or raises the first.
    limits: ClassVar[Limits]

    @classmethod
    def self_check(cls) -> str:
        """Load the native parts as ``open`` does; returns what works on this machine, for ``vllm-rfork doctor``.

        Runs in a process of its own, which may crash.

        Raises:
            EngineUnavailable: something is not installed.
            EngineError: something does not work.
        """
        return "its adapter can be imported"

    @abc.abstractmethod
    def open(self, config: EngineConfig) -> None:
        """Start the engine. Raises :class:`EngineUnavailable` where its package is missing."""

    @property
    @abc.abstractmethod
    def endpoint(self) -> str:
        """Opaque text by which a peer's engine of the same name reaches this one.

        Valid after ``register``: for some engines it describes the registered memory.
        """

    @abc.abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Make ``regions`` (disjoint, nbytes > 0) readable by peers and writable by ``read``. All or nothing.

        The caller keeps the memory alive until ``close`` has returned.
        """

    @abc.abstractmethod
    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Reach the peer, and find out within ``timeout_s`` seconds where it cannot be reached."""

    def lane(self, endpoint: str) -> str:
        """The way that bytes from a connected peer take, as ``engine/lane``; the engine's name where it has one lane.

        For log lines and the planner's records: at most 64 printable ASCII characters. Never raises.
        """
        return self.name

    @abc.abstractmethod
    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Copy each segment from the peer's ``remote`` to the own ``local`` address; return when all is there.

        Each segment lies in one registered region on either side; the batch keeps within ``limits``.

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
        """End the engine and every read in it. Idempotent. After it returns, no peer's byte is written any more.

        Raises:
            EngineError: with ``in_flight=True`` where the engine cannot be brought to that state: the caller
                then keeps the buffers for the rest of the process's life.
        """
