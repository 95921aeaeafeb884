"""The result of a load for ``seeding``: a publication, or the reason why this worker does not become a seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError
from vllm_rfork.load import plan as plans
from vllm_rfork.load.plan import LoadPlan
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model import digest
from vllm_rfork.model.relocation import Vouched
from vllm_rfork.model.tensors import Collection, names_in
from vllm_rfork.net.advertise import listen_host
from vllm_rfork.seeding.publication import Publication, PublishedTensors, SeedConfig, seed_ports
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES


@dataclass(frozen=True)
class NotASeed:
    """``reason``: for the log. ``level``: INFO if it was asked for, WARNING otherwise."""

    reason: str
    level: int


def outcome_of(plan: LoadPlan, model: nn.Module) -> Publication | NotASeed:
    """The publication of what ``plan`` has captured of ``model``, or the reason why there is none."""
    if plan.no_seed_reason or plan.collection is None:
        level = logging.INFO if not plan.settings.rfork_become_seed else logging.WARNING
        return NotASeed(plan.attempt.logged.once(plan.no_seed_reason or "no weights were captured"), level)
    keeps = plan.device.type in plans.KEEPS_LOADED
    manifest = plan.seed_manifest()
    vouched = Vouched.of(manifest, plan.collection, model, keeps=keeps, rules=VLLM_RULES)
    return Publication(
        role="draft" if plan.identity.is_draft else "target",
        config=_seed_config(plan),
        tensors=CapturedTensors(plan.device, manifest, plan.collection, plan.digests, vouched),
        engine=plan.attempt.engine,
        intent=plan.attempt.intent,
        checkpoint=plan.files.published,
        set_device=device_backend(plan.device).set_current,
        captures_graphs=plan.device.type != "cpu",
        logged=plan.attempt.logged,
    )


def _seed_config(plan: LoadPlan) -> SeedConfig:
    settings, attempt = plan.settings, plan.attempt
    port, *other_ports = seed_ports(settings, plan.identity)
    return SeedConfig(
        planner_url=settings.rfork_scheduler_url,
        credentials=attempt.credentials,
        bind_host=listen_host(settings.rfork_seed_bind_host, plan.advertise_host),
        advertise_host=plan.advertise_host,
        port=port,
        other_ports=tuple(other_ports),
        rank=plan.identity.tp_rank,
        request_timeout_s=settings.rfork_request_timeout_sec,
        ready_timeout_s=settings.rfork_seed_timeout_sec,
        heartbeat_interval_s=settings.rfork_heartbeat_interval_sec,
        labels=attempt.labels,
        slots=settings.rfork_seed_slots or None,
        facts=attempt.facts,
    )


class CapturedTensors:
    """:class:`~vllm_rfork.seeding.publication.PublishedTensors` that a load has captured.

    Args:
        manifest: gives header and state.
    """

    def __init__(
        self,
        device: torch.device,
        manifest: Manifest,
        collection: Collection,
        digests: Sequence[str],
        vouched: Vouched,
    ) -> None:
        self._device, self._digests, self._vouched = device, digests, vouched
        self._collection: Collection | None = collection
        self.manifest = collection.manifest(
            manifest.header, digests=digests, state=manifest.state, state_gone=manifest.state_gone
        )

    @property
    def keep(self) -> Any:
        """See the protocol."""
        return self._collection

    @property
    def recoverable(self) -> bool:
        """See the protocol."""
        return self._vouched.kept is None and not self._vouched.hopeless

    def recheck(self) -> None:
        """Prove that nothing has written to the memory since it was captured; version counters miss some writes.

        Raises:
            ForkError: names the tensors that changed.
        """
        if self._collection is None:
            raise ForkError("the tensors have been released")
        device_backend(self._device).synchronize()
        found = digest.digests(span.data for span in self._collection.spans)
        wrong = digest.differing(dict(enumerate(found)), dict(enumerate(self._digests)))
        if wrong:
            raise ForkError(
                f"{len(wrong)} tensors of the {self.manifest.layout} layout have been written to since they were "
                f"captured: {names_in(self._collection, wrong)}"
            )

    def relocate(self) -> PublishedTensors:
        """See the protocol."""
        return CapturedTensors(self._device, self.manifest, *self._vouched.again(), self._vouched)

    def release(self) -> None:
        """See the protocol."""
        self._collection = None
