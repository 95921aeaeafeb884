"""The result of a load for ``seeding``: a publication, or the reason why this worker does not become a seed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.reload import reloads
from vllm_rfork.model.relocation import PublishedSnapshot
from vllm_rfork.model.snapshot import Snapshot
from vllm_rfork.net.advertise import listen_host
from vllm_rfork.seeding.publication import Publication, SeedConfig, seed_ports
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES


@dataclass(frozen=True)
class NotASeed:
    """``reason``: for the log. ``level``: INFO if it was asked for, WARNING otherwise."""

    reason: str
    level: int


def outcome_of(
    context: LoadContext, session: ForkSession, obstacle: str | None, snapshot: Snapshot | None, model: nn.Module
) -> Publication | NotASeed:
    """The publication of ``snapshot``, which is ``model``'s, or the reason why there is none."""
    host, obstacle = context.advertise_host, obstacle or context.pool_obstacle
    tensors = None
    if snapshot is not None:
        tensors = PublishedSnapshot.of(snapshot, context.device, model, VLLM_RULES, keeps=context.keeps_loaded)
    reloads().load_ended(context, tensors, {} if snapshot is None else snapshot.built)
    if obstacle is not None or tensors is None or host is None:
        if tensors is not None:
            tensors.release()
        level = logging.WARNING if context.settings.rfork_become_seed else logging.INFO
        return NotASeed(session.logged.once(obstacle or "no weights were captured"), level)
    return Publication(
        role="draft" if context.identity.is_draft else "target",
        config=_seed_config(context, session, host),
        tensors=tensors,
        engines=session.engines,
        intent=session.intent,
        checkpoint=context.files.published,
        set_device=device_backend(context.device).set_current,
        captures_graphs=context.device.type != "cpu",
        logged=session.logged,
    )


def _seed_config(context: LoadContext, session: ForkSession, host: str) -> SeedConfig:
    settings = context.settings
    port, *other_ports = seed_ports(settings, context.identity)
    return SeedConfig(
        planner_url=settings.rfork_scheduler_url,
        credentials=session.credentials,
        bind_host=listen_host(settings.rfork_seed_bind_host, host),
        advertise_host=host,
        port=port,
        other_ports=tuple(other_ports),
        rank=context.identity.tp_rank,
        request_timeout_s=settings.rfork_request_timeout_sec,
        ready_timeout_s=settings.rfork_seed_timeout_sec,
        heartbeat_interval_s=settings.rfork_heartbeat_interval_sec,
        labels=session.labels,
        slots=settings.rfork_seed_slots or None,
        facts=session.facts,
        model=settings.model_url,
        strategy=settings.model_deploy_strategy_name,
        parent="" if session.seed is None else str(session.seed),
        differs=session.others.known,
    )
