"""Facts about one call of ``load_model``: who this worker is, and what stands in the way of a fork or a seed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_rfork.config import Settings
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.registry import DEFAULT_ENGINE, engine_order
from vllm_rfork.errors import ConfigError, PlannerError
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load import early
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.checkpoint_identity import CheckpointFiles
from vllm_rfork.manifest.facts import short_facts
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, Layout, ManifestHeader
from vllm_rfork.model import digest
from vllm_rfork.seed_key import WorkerIdentity, build_fingerprint, build_seed_key, seed_key_parts
from vllm_rfork.vllm_compat import checkpoint_files, eligibility, storage_loader
from vllm_rfork.vllm_compat.fingerprint.facts import fingerprint_facts
from vllm_rfork.vllm_compat.rank_groups import RankGroup, is_first_rank, rank_group
from vllm_rfork.vllm_compat.worker_identity import worker_identity

logger = worker_logger(__name__)

#: Device types without the runtime layout: post-processing for the processor hides packed weights in native objects.
NO_RUNTIME = frozenset({"cpu"})

#: Device types on which a seed keeps the loaded tensors beside what post-processing makes of them. Elsewhere, keeping
#: weights twice could fail a start that works without us.
KEEPS_LOADED = frozenset({"cpu"})


@dataclass(frozen=True)
class LoadContext:
    """See the module's docstring.

    Attributes:
        device: with its index, the same for every thread.
        facts: the facts behind the fingerprint, shortened for people.
        layout: the state of the weights that is forked and published; see ``rfork_layout``.
        engine_order: names of this worker's transfer engines, the preferred one first.
        advertise_host: the host under which others reach this worker; None if it is unknown.
        load_config: vLLM's.
        source: the place of the weights.
        shows_progress: this rank shows the progress bar.
        rank_group: the ranks that load this model together.
        files: the checkpoint's files on this machine.
        planner_unreachable: the planner's name could not be resolved in time, so no seed can be requested.
        fork_obstacle: why this worker cannot fork; None if it may.
        seed_obstacle: why this worker must not become a seed; None if it may.
        pool_obstacle: why it becomes none although its model is described, for reloads; see ``reload.py``.
        shared_storages: addresses of storages that models in this process used before this load.
    """

    settings: Settings
    device: torch.device
    identity: WorkerIdentity
    seed_key: str
    fingerprint: str
    facts: Mapping[str, str]
    layout: Layout
    engine_order: tuple[str, ...]
    engine_config: EngineConfig
    advertise_host: str | None
    load_config: Any
    source: checkpoint_files.Source
    shows_progress: bool
    rank_group: RankGroup
    files: CheckpointFiles
    planner_unreachable: PlannerError | None = None
    fork_obstacle: str | None = None
    seed_obstacle: str | None = None
    pool_obstacle: str | None = None
    shared_storages: frozenset[int] = frozenset()

    @property
    def keeps_loaded(self) -> bool:
        """True if a seed keeps the loaded tensors beside the post-processed model."""
        return self.device.type in KEEPS_LOADED

    def open_session(self) -> ForkSession:
        """A fork session for this load; its engines are opened in the background."""
        engines = early.take_engines(self.settings, self.engine_order, self.engine_config)
        return ForkSession(self.settings, self.seed_key, engines, self.facts, checkpoint=self.files.identity)

    def header(self, signature: Mapping[str, str] | None) -> ManifestHeader:
        """The header of this worker's manifests; the seed fills in endpoints, epoch and checkpoint.

        ``signature``: of the model as built; None if it has not been taken.
        """
        return ManifestHeader(
            seed_key=self.seed_key,
            fingerprint=self.fingerprint,
            layout=self.layout,
            built=None if signature is None else dict(signature),
            engine=DEFAULT_ENGINE.get(self.device.type, self.engine_order[0]),
            digest_algorithm=digest.ALGORITHM,
        )


def describe(
    settings: Settings,
    vllm_config: Any,
    model_config: Any,
    storage: Any,
    *,
    shared_storages: frozenset[int] = frozenset(),
    shows_progress: bool = False,
) -> LoadContext:
    """Describe this worker and the model that it is about to load.

    Args:
        storage: the storage loader.
        shows_progress: show a progress bar on the instance's first rank.

    Raises:
        ConfigError: there is no such engine or layout for this device.
    """
    # On the thread that loads: other threads have current devices of their own.
    device = device_backend(storage_loader.target_device(vllm_config)).with_index
    layout = layout_for(settings, device)
    engines = engine_order(settings.rfork_engine, device.type)
    identity = worker_identity(vllm_config, model_config)
    early.await_records()
    facts = worker_facts(settings, vllm_config, model_config, device=device, identity=identity, layout=layout)
    seed_key, fingerprint = _seed_key(settings, identity), build_fingerprint(facts)
    logger.info("seed key %s, fingerprint %s, engine %s", seed_key, fingerprint, ",".join(engines))
    logger.debug("the fingerprint covers %s", facts)
    host, unreachable = early.own_address(settings)
    pool = eligibility.pool_obstacle(vllm_config, device)
    unregistrable = eligibility.registration_obstacle(vllm_config, device)
    find_files = functools.partial(
        checkpoint_files.files_of, model_config, vllm_config.load_config, settings.rfork_fallback_load_format
    )
    return LoadContext(
        settings=settings,
        device=device,
        identity=identity,
        seed_key=seed_key,
        fingerprint=fingerprint,
        facts=short_facts(facts),
        layout=layout,
        engine_order=engines,
        engine_config=early.engine_config(settings, device_backend(device).name, host),
        advertise_host=host,
        load_config=vllm_config.load_config,
        source=checkpoint_files.source_of(model_config, vllm_config.load_config),
        shows_progress=shows_progress and is_first_rank(),
        rank_group=rank_group(vllm_config, model_config),
        files=CheckpointFiles(find_files),
        planner_unreachable=unreachable,
        fork_obstacle=_mapping_obstacle(settings, vllm_config, storage) or pool or unregistrable,
        seed_obstacle=_seed_obstacle(settings, host, unreachable)
        or eligibility.seed_obstacle(vllm_config)
        or unregistrable,
        pool_obstacle=pool,
        shared_storages=shared_storages,
    )


def layout_for(settings: Settings, device: torch.device) -> Layout:
    """The layout that ``rfork_layout`` means on ``device``.

    Raises:
        ConfigError: the layout does not work there.
    """
    if settings.rfork_layout == "auto":
        return CHECKPOINT if device.type in NO_RUNTIME else RUNTIME
    if settings.rfork_layout == RUNTIME and device.type in NO_RUNTIME:
        raise ConfigError(
            "rfork_layout",
            f"runtime does not work on {device.type}: post-processing hides packed weights in native objects",
            "auto or checkpoint",
        )
    return settings.rfork_layout


def worker_facts(
    settings: Settings,
    vllm_config: Any,
    model_config: Any,
    *,
    device: torch.device,
    identity: WorkerIdentity,
    layout: Layout,
) -> dict[str, Any]:
    """The facts that the fingerprint covers."""
    of_configuration = fingerprint_facts(
        vllm_config,
        model_config,
        layout=layout,
        # The same for all engines: a seed offers several, and workers with other lists of engines pair.
        engine=DEFAULT_ENGINE.get(device.type, device.type),
        device=device,
        dummy=settings.rfork_fallback_load_format == "dummy",
        context_rank=identity.context_rank,
    )
    return {
        **of_configuration,
        **seed_key_parts(settings.model_url, settings.model_deploy_strategy_name, identity),
        "draft_model": checkpoint_files.draft_name(vllm_config, model_config),
    }


def _seed_key(settings: Settings, identity: WorkerIdentity) -> str:
    named = (settings.model_url, settings.model_deploy_strategy_name, identity)
    separator = settings.rfork_seed_key_separator
    seed_key = build_seed_key(*named, separator=separator)
    parts = seed_key_parts(*named)
    if ambiguous := [name for name, text in parts.items() if separator in text]:
        # Not refused: existing fleets use such names, and their planners and dashboards have these keys.
        logger.warning(
            "rfork_seed_key_separator %r occurs in %s, so workers with other values may have the same seed key "
            "%s, and only the fingerprint tells them apart; choose a separator that occurs in none of them",
            separator,
            ", ".join(f"{name} {parts[name]!r}" for name in ambiguous),
            seed_key,
        )
    return seed_key


def _mapping_obstacle(settings: Settings, vllm_config: Any, storage: Any) -> str | None:
    if not storage_loader.external_nbytes(storage, vllm_config):
        return None
    # Forked weights would take the memory that the mapping saves.
    return f"{settings.rfork_fallback_load_format} maps the weights from another process"


def _seed_obstacle(settings: Settings, host: str | None, unreachable: PlannerError | None) -> str | None:
    if not settings.rfork_become_seed:
        return "rfork_become_seed is false"
    if host is not None:
        return None
    return (
        "its own address is not known: "
        f"{unreachable or 'there is no route to the planner (set rfork_seed_advertise_host)'}"
    )
