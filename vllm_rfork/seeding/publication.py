"""Data that a load hands over so that its worker can become a seed.

The types here name no tensor, model or device: memory is an opaque object that is kept alive, and everything that needs
torch is a method or a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_rfork.config import Settings
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.intent import Intent
from vllm_rfork.logs.worker import LoggedTexts
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.seed_key import WorkerIdentity

#: ``rfork_seed_port_base`` and the 255 ports after it: 16 ranks with a draft each, for 8 instances on one host.
PORTS_OF_INSTANCE = 32
INSTANCES_OF_HOST = 8
_LAST_PORT = 65535


@dataclass(frozen=True)
class SeedConfig:
    """Addresses, limits and times of one seed; all times in seconds.

    ``port`` 0 means random; ``other_ports`` are tried in order if it is in use. ``slots`` None leaves the number to
    the planner. ``model`` and ``strategy`` are behind the seed key. ``parent`` is the seed that the weights were forked
    from, and ``differs`` returns the differences to seeds of the key with other fingerprints; both for people.
    """

    planner_url: str
    credentials: Credentials
    bind_host: str
    advertise_host: str
    port: int
    rank: int
    request_timeout_s: float
    ready_timeout_s: float
    heartbeat_interval_s: float
    labels: str = ""
    slots: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    other_ports: tuple[int, ...] = ()
    model: str = ""
    strategy: str = ""
    parent: str = ""
    differs: Callable[[], str] = str


class PublishedTensors(Protocol):
    """The tensors of one layout, where they are in memory now, and the digests that they must have."""

    @property
    def manifest(self) -> Manifest:
        """Regions, spans, tensors and digests; without endpoint and epoch."""

    @property
    def keep(self) -> Any:
        """An object that keeps the memory alive; None after :meth:`release`."""

    @property
    def recoverable(self) -> bool:
        """False if a failed return is final: memory would be kept for another one, or the model is gone."""

    def recheck(self) -> None:
        """Digest the bytes again.

        Raises:
            ForkError: they are not the bytes of the manifest any more; names the tensors.
        """

    def relocate(self) -> PublishedTensors:
        """Find the same tensors after a change; they may be at other addresses. Reads no weights.

        Call it while nothing changes the model.

        Raises:
            ForkError: a tensor is gone, or has another kind, shape or alias.
        """

    def release(self) -> None:
        """Drop :attr:`keep`; :meth:`relocate` finds the tensors again."""


@dataclass(frozen=True)
class Publication:
    """One loaded model to publish: how its seed is reached, its tensors, and this worker's engines.

    Attributes:
        role: ``target`` or ``draft``.
        checkpoint: returns the identity of the checkpoint files, None if unknown; may wait for storage.
        set_device: makes the model's device the current one of the calling thread.
        captures_graphs: graphs may be captured on this device, and the work of other threads would disturb that.
        logged: the long texts that the load has logged already.
    """

    role: str
    config: SeedConfig
    tensors: PublishedTensors
    engines: EngineSet
    intent: Intent
    checkpoint: Callable[[], dict[str, str] | None]
    set_device: Callable[[], None]
    captures_graphs: bool
    logged: LoggedTexts = field(default_factory=LoggedTexts)


def seed_ports(settings: Settings, identity: WorkerIdentity) -> list[int]:
    """The seed service's ports in the order in which they are tried; 0 for a random one.

    Each local rank and role of an instance has its own port; further instances on the host, whose local ranks begin at
    0 as well, move up by ``PORTS_OF_INSTANCE``.
    """
    base = settings.rfork_seed_port_base
    if not base:
        return [0]
    first = base + 2 * identity.local_rank + int(identity.is_draft)
    ports = [first + PORTS_OF_INSTANCE * number for number in range(INSTANCES_OF_HOST)]
    return [first] + [port for port in ports[1:] if port <= _LAST_PORT]
