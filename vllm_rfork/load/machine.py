"""One load as a state machine with two sources of weights, a seed and storage.

vLLM stays in charge: its ``BaseModelLoader.load_model`` builds the structure, asks for the weights (:meth:`fill`) and
post-processes, in every version and with every platform's patches. ::

    DESCRIBED ──▶ RESERVING ──────────────▶ READING ──▶ FORKED ──▶ SNAPSHOT
        │             │   └───▶ DUMMIES ───────▲ │          │          ▲
        │             │            │             │          │          │
        │             ├────────────┴─────────────┤          │          │
        │             │ nothing written          │ written  │          │
        │             │                          ▼          │          │
        │             │                       REBUILD ◀─────┘          │
        ▼             ▼                          │                     │
    STORAGE ◀─────────┴──────────────────────────┘                     │
        └──────────────────────────────────────────────────────────────┘

The runtime layout goes by DUMMIES, which vLLM post-processes before READING; the checkpoint layout does not. After a
failed fork the same model is loaded from STORAGE, if nothing was written to it and no other rank depends on it.
Otherwise vLLM builds another one (REBUILD). The load ends in SNAPSHOT: with a publication for ``seeding``, or with the
reason why this worker does not become a seed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn

from vllm_rfork.errors import ForkError, NoSeedAvailable
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load.capture import SeedProspect
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.from_fork import FromFork
from vllm_rfork.load.from_storage import FromStorage
from vllm_rfork.load.metering import LoadMeter, Weights, whole
from vllm_rfork.load.outcome import NotASeed, outcome_of
from vllm_rfork.load.ranks import DUMMIES, FORK, KEPT, SEED, RankVote
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME
from vllm_rfork.messages import SeedAddress
from vllm_rfork.seeding.publication import Publication
from vllm_rfork.vllm_compat import storage_loader
from vllm_rfork.vllm_compat.registries import Registries

logger = worker_logger(__name__)


class Phase(enum.Enum):
    """The phases of a load, in the order of a fork; the diagram is in the module's docstring."""

    DESCRIBED = "described"
    RESERVING = "reserving"
    DUMMIES = "dummies"
    READING = "reading"
    FORKED = "forked"
    REBUILD = "rebuild"
    STORAGE = "storage"
    SNAPSHOT = "snapshot"


#: Every transition there is. Any other is a mistake in this package.
TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.DESCRIBED: frozenset({Phase.RESERVING, Phase.STORAGE}),
    Phase.RESERVING: frozenset({Phase.READING, Phase.DUMMIES, Phase.STORAGE, Phase.REBUILD}),
    Phase.DUMMIES: frozenset({Phase.READING, Phase.STORAGE, Phase.REBUILD}),
    Phase.READING: frozenset({Phase.FORKED, Phase.STORAGE, Phase.REBUILD}),
    Phase.FORKED: frozenset({Phase.SNAPSHOT, Phase.REBUILD}),
    Phase.REBUILD: frozenset({Phase.STORAGE}),
    Phase.STORAGE: frozenset({Phase.SNAPSHOT}),
    Phase.SNAPSHOT: frozenset(),
}

#: The stages on which the ranks of an instance vote, by layout.
STAGES = {CHECKPOINT: (SEED, FORK, KEPT), RUNTIME: (SEED, DUMMIES, FORK)}


class _Rebuild(Exception):
    """The model that vLLM has built cannot be used any more. Raised and caught in this file."""


class LoadMachine:
    """The state of one load.

    Args:
        session: this worker's fork session; the machine closes it if the load fails.
        storage: vLLM's loader for the fallback format.
        registries: vLLM's, as they were before this load.
        seed_known: called with the seed of the lease, before its weights are read.

    Attributes:
        phase: changed by :meth:`enter` only.
    """

    def __init__(
        self,
        context: LoadContext,
        session: ForkSession,
        storage: Any,
        registries: Registries,
        *,
        seed_known: Callable[[SeedAddress], object] = lambda seed: None,
    ) -> None:
        self.phase = Phase.DESCRIBED
        self._context, self._session, self._storage, self._registries = context, session, storage, registries
        self._prospect = SeedProspect(session, context.seed_obstacle)
        timeout_s = context.settings.rfork_request_timeout_sec
        consensus = Consensus(context.rank_group)
        #: Votes of this load's ranks on other stages: see :meth:`Consensus.decide`.
        self.decide = consensus.decide
        self._vote = RankVote(consensus, STAGES[context.layout], timeout_s)
        session.leases.no_longer_needed = None if self._vote.alone else self._vote.rejection
        self._fork: FromFork | None = FromFork(context, session, self._vote, self._prospect, seed_known)
        self._loaded: FromStorage | None = None
        self._whole: Weights | None = None
        self._meter = LoadMeter(session, ineligible=context.fork_obstacle is not None)

    def enter(self, phase: Phase) -> None:
        """Go on to ``phase``.

        Raises:
            RuntimeError: no transition leads there.
        """
        if phase not in TRANSITIONS[self.phase]:
            raise RuntimeError(f"a load that is {self.phase.value} cannot become {phase.value}")
        logger.debug("load: %s -> %s", self.phase.value, phase.value)
        self.phase = phase

    def run(self, build: Callable[[], nn.Module], load_whole: Callable[[], nn.Module]) -> nn.Module:
        """The loaded and post-processed model.

        Args:
            build: vLLM's own ``load_model``, which calls :meth:`fill` for the weights.
            load_whole: the storage loader's ``load_model``, for formats that replace vLLM's.

        Raises:
            Exception: the fallback loader's own error, or vLLM's about a model with its weights.
        """
        try:
            try:
                return self._first_build(build, load_whole)
            except _Rebuild:
                pass  # outside this handler, nothing refers to the failed model
            return self._second_build(build, load_whole)
        except BaseException as error:
            if self.phase is Phase.STORAGE:
                self._meter.storage_failed()
            self._vote.abandon(error)
            self._session.close()
            raise

    def fill(self, model: nn.Module, model_config: Any) -> None:
        """Fill ``model`` from a seed or from storage, or with dummy weights for a fork to come.

        Raises:
            Exception: the fallback loader's own error.
        """
        fork = self._fork
        if self.phase is Phase.DESCRIBED and fork is not None and self._forked(fork, model, model_config):
            return
        if storage_loader.loads_whole_models(self._storage):
            self._demand_rebuild()
        self.enter(Phase.STORAGE)
        self._fork = None
        self._loaded = FromStorage(self._context, self._session, self._prospect, self._storage)
        self._loaded.fill(model, model_config)

    def outcome(self, model: nn.Module) -> Publication | NotASeed:
        """The end of the load: the publication of ``model``, or the reason why this worker does not become a seed."""
        self.enter(Phase.SNAPSHOT)
        source = self._fork or self._loaded
        self._meter.ended(self._whole if source is None else source.weights)
        snapshot = None
        if source is not None:
            what = "the loaded model cannot be looked at"
            snapshot = self._prospect.requires(what, lambda: source.snapshot(model))
        return outcome_of(self._context, self._session, self._prospect.obstacle, snapshot, model)

    def close(self) -> None:
        """Close the fork session: this worker does not become a seed."""
        self._session.close()

    def _first_build(self, build: Callable[[], nn.Module], load_whole: Callable[[], nn.Module]) -> nn.Module:
        if self._context.fork_obstacle is not None and storage_loader.loads_whole_models(self._storage):
            self._meter.not_eligible()
            return self._load_whole(load_whole)
        try:
            model = build()
        except Exception as error:
            # Some post-processing validates its input, and rejects dummy weights. The seed's state may be the cause
            # as well. If it is neither, the fallback loader will meet the same error, and raise it.
            if self.phase not in (Phase.DUMMIES, Phase.FORKED):
                raise
            what = "what was forked" if self.phase is Phase.FORKED else "the dummy weights"
            self._fall_back(ForkError(f"post-processing failed on {what}: {type(error).__name__}: {error}"))
            self._session.drop_tracebacks(error)
            self._demand_rebuild()
        if self._fork is not None:
            self._finish_fork(self._fork, model)
        return model

    def _finish_fork(self, fork: FromFork, model: nn.Module) -> None:
        """After post-processing: fork over dummy weights, or agree that the fork stays."""
        try:
            if self.phase is Phase.DUMMIES:
                self._read(fork, model)
            elif self.phase is Phase.FORKED:
                fork.keep()
        except ForkError as error:
            self._fall_back(error)
            self._demand_rebuild()

    def _second_build(self, build: Callable[[], nn.Module], load_whole: Callable[[], nn.Module]) -> nn.Module:
        """Build the model again and load it from storage, with nothing left of the first one."""
        self._session.engines.close()
        self._fork = None
        self._registries.restore()
        storage_loader.release_memory(self._context.device)
        return self._load_whole(load_whole) if storage_loader.loads_whole_models(self._storage) else build()

    def _load_whole(self, load_whole: Callable[[], nn.Module]) -> nn.Module:
        self.enter(Phase.STORAGE)
        self._fork = None
        self._prospect.rule_out(
            f"load format {self._context.settings.rfork_fallback_load_format} builds and loads models as a whole, so "
            f"the {self._context.layout} layout cannot be captured"
        )
        model, self._whole = whole(load_whole)
        return model

    def _forked(self, fork: FromFork, model: nn.Module, model_config: Any) -> bool:
        """Fill ``model`` by a fork, or for one; False if storage is next.

        Raises:
            _Rebuild: this model cannot be loaded from storage any more.
        """
        try:
            self.enter(Phase.RESERVING)
            fork.reserve(model)
            if self._context.layout == CHECKPOINT:
                self._read(fork, model)
            else:
                self.enter(Phase.DUMMIES)
                fork.fill_with_dummies(model, model_config)
            return True
        except NoSeedAvailable as reason:
            logger.info("%s: loading from storage", str(reason))  # as text: an error refers to its frames
            self._meter.fell_back(reason)
        except ForkError as error:
            self._fall_back(error)
            written = self._session.has_written or fork.wrote_dummies
            if written or (self.phase is not Phase.RESERVING and not self._vote.alone):
                self._demand_rebuild()
        return False

    def _read(self, fork: FromFork, model: nn.Module) -> None:
        self.enter(Phase.READING)
        fork.read(model)
        self.enter(Phase.FORKED)

    def _fall_back(self, error: ForkError) -> None:
        """Log why there is no fork, and release everything that it used, while the model is still there."""
        session = self._session
        self._meter.fell_back(error)
        logger.warning(
            "falling back to load_format=%s: %s: %s",
            self._context.settings.rfork_fallback_load_format,
            type(error).__name__,
            session.logged.once(error),  # not the error: log records that are kept would keep the model
        )
        self._vote.abandon(error)
        session.seed = None  # its weights are not used
        session.cancel_reservation()
        session.engines.discard()
        session.drop_tracebacks(error)

    def _demand_rebuild(self) -> NoReturn:
        """Leave the model that vLLM has built; :meth:`run` builds another."""
        self.enter(Phase.REBUILD)
        raise _Rebuild from None
