"""Weights from a seed, in either layout.

In the checkpoint layout a fork takes place where the fallback loader would read storage. In the runtime layout vLLM
post-processes dummy weights first, and the fork overwrites what it makes of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.fork.progress import forking_progress
from vllm_rfork.fork.session import Destination, ForkSession, reservation_s
from vllm_rfork.load import capture
from vllm_rfork.load.capture import LoadedSnapshot, SeedProspect
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.metering import Weights
from vllm_rfork.load.ranks import DUMMIES, FORK, KEPT, SEED, RankVote
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.pairing import built_differences
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, Manifest, ManifestHeader
from vllm_rfork.messages import SeedAddress
from vllm_rfork.metrics import families as metrics
from vllm_rfork.model.restore import restore
from vllm_rfork.model.snapshot import AsBuilt, Snapshot, digests_of
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.value_codec import Plain
from vllm_rfork.model.verification import StreamingVerifier, check_algorithm, load_kernels, spans_to_check
from vllm_rfork.vllm_compat import ascend, dummy_weights
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

logger = worker_logger(__name__)


class FromFork:
    """One fork by one rank; see the module's docstring.

    Args:
        seed_known: called with the seed of the lease; returns at once and raises nothing.

    Attributes:
        wrote_dummies: dummy weights may have been written to the model.
        weights: what was forked; None before that.
    """

    def __init__(
        self,
        context: LoadContext,
        session: ForkSession,
        vote: RankVote,
        prospect: SeedProspect,
        seed_known: Callable[[SeedAddress], object] = lambda seed: None,
    ) -> None:
        self.wrote_dummies = False
        self._seed_known = seed_known
        self._context, self._session, self._vote, self._prospect = context, session, vote, prospect
        self._tensors: TensorInventory | None = None
        self._built: AsBuilt | None = None
        self._promised: Manifest | None = None
        self._checks = ascend.PostponedChecks()
        self._forked: Snapshot | LoadedSnapshot | None = None
        self._checkpoint: dict[str, str] | None = None  # the seed's
        self.weights: Weights | None = None

    def reserve(self, model: nn.Module) -> None:
        """Take a lease before ``model`` is touched; in the runtime layout also get the seed's manifest.

        Raises:
            NoSeedAvailable: the planner has no seed.
            ForkError: this worker cannot fork, or another rank cannot.
        """
        settings = self._context.settings
        # Without a wait of its own the planner decides, and no wait goes on beyond the bound of a fork.
        wait_s = settings.rfork_seed_wait_sec
        bound_s = settings.rfork_fork_timeout_sec if wait_s is None else wait_s
        bound_s += reservation_s(settings)
        self._vote.run(SEED, lambda: self._reserve(model, bound_s), bound_s)

    def _reserve(self, model: nn.Module, bound_s: float) -> None:
        context = self._context
        if context.planner_unreachable is not None:
            raise context.planner_unreachable
        if context.fork_obstacle is not None:
            raise ForkError(context.fork_obstacle)
        self._vote.take_turn(bound_s)
        self._seed_known(self._session.reserve(context.fingerprint))
        self._vote.end_turn()
        if context.settings.rfork_verify != "off":
            load_kernels(device_backend(context.device))
        if context.layout == CHECKPOINT:
            # Not before there is a lease: a load from storage needs neither an engine nor this look at the model.
            self._session.await_engine()
            contents = capture.contents(context, model)
            self._tensors = contents.tensors
            self._built = capture.built_model(context, model, contents.state)
        else:
            # Now, because post-processing is next: ranks make communicators for experts in it, together, and a rank
            # that failed before it would leave the others waiting in theirs. Engines may still be opening: what
            # follows on the device takes its time, and they are not needed before the read.
            self._promised = self._session.peek(context.fingerprint)

    def fill_with_dummies(self, model: nn.Module, model_config: Any) -> None:
        """Fill ``model`` with dummy weights, so that post-processing gives it the structure of the seed's.

        Raises:
            ForkError: the model was built in another way than the seed's, or takes no dummies, here or on another rank.
        """
        timeout_s = self._context.settings.rfork_fork_timeout_sec
        self._vote.run(DUMMIES, lambda: self._fill_with_dummies(model, model_config), timeout_s)

    def _fill_with_dummies(self, model: nn.Module, model_config: Any) -> None:
        promised, self._promised = self._promised, None
        if promised is None:
            raise ForkError("no seed is reserved")
        self._built = capture.built_model(self._context, model)
        if differences := list(built_differences(self._built.signature, promised.built)):
            raise ManifestMismatch(differences)  # pairing would raise it as well, but after post-processing
        self.wrote_dummies = True
        dummy_weights.fill_with_dummies(model, model_config, self._context.load_config)
        dummy_weights.tie_dummies(model, {entry.name: entry.span for entry in promised.tensors})
        self._checks = ascend.postpone_checks(model)

    def read(self, model: nn.Module) -> None:
        """Read a seed's bytes into ``model`` and give it the seed's state, on all ranks.

        Raises:
            ForkError: no seed's could be read, here or on another rank.
        """
        started = time.perf_counter()
        context, session = self._context, self._session
        tensors, seed = self._vote.run(FORK, lambda: self._read(model), context.settings.rfork_fork_timeout_sec)
        self._tensors = None
        self._forked = self._prospect.requires(
            "what was forked cannot be passed on", lambda: self._capture(tensors, seed)
        )
        if self._forked is None:
            session.engines.close_if_registered()  # nothing keeps the memory that post-processing replaces
        seconds = time.perf_counter() - started
        self.weights = Weights(metrics.SEED, seed.nbytes, seconds)
        logger.info(
            "forked %d bytes (%.2f GB) in %.2f s (%.2f GB/s) from seed %s, engine=%s layout=%s lane=%s (%s)",
            seed.nbytes,
            seed.nbytes / 1e9,
            seconds,
            seed.nbytes / 1e9 / max(seconds, 1e-9),
            session.seed,
            session.engine,
            context.layout,
            session.lane,
            session.times,
        )

    def keep(self) -> None:
        """Keep the fork, if post-processing accepted it on every rank; a fork after post-processing is kept already.

        Raises:
            ForkError: it did not on another rank; all ranks build their models again.
        """
        if self._context.layout == CHECKPOINT:
            self._vote.run(KEPT, lambda: None, self._context.settings.rfork_fork_timeout_sec)

    def snapshot(self, model: nn.Module) -> Snapshot:
        """The snapshot of ``model``, which has been post-processed.

        Raises:
            ForkError: post-processing replaced tensors.
        """
        if self._forked is None:
            raise ForkError("no weights were captured")
        # Not before the end of the load: a fork that is given up is followed by weights from this machine's files.
        self._context.files.forked_from(self._checkpoint)
        return self._forked.after_post_processing(model) if isinstance(self._forked, LoadedSnapshot) else self._forked

    def _header(self) -> ManifestHeader:
        return self._context.header(None if self._built is None else self._built.signature)

    def _read(self, model: nn.Module) -> tuple[TensorInventory, Manifest]:
        context = self._context
        tensors = self._tensors or capture.contents(context, model).tensors
        header = self._header()
        built = self._built.state if context.layout == RUNTIME and self._built is not None else None
        with forking_progress(tensors.nbytes, shown=context.shows_progress) as progress:
            destination = Destination(
                tensors.manifest(header),
                lambda: _Arrival(context, self._session, model, tensors, header, built=built, settle=self._checks.run),
                tensors,
                progress,
                untouched=_shared_spans(tensors, context.shared_storages),
            )
            return tensors, self._session.run(destination)

    def _capture(self, tensors: TensorInventory, seed: Manifest) -> Snapshot | LoadedSnapshot:
        """The snapshot that this worker will publish: the seed's digests and state are passed on."""
        snapshot = Snapshot.forked(tensors, self._header(), seed, self._built)
        self._checkpoint = seed.checkpoint
        if self._context.layout == RUNTIME:
            return snapshot  # nothing replaces the tensors any more
        return LoadedSnapshot(self._context, self._session, snapshot)


class _Arrival:
    """:class:`~vllm_rfork.fork.session.Sink` of one seed: verifies what arrives, then gives the model its state.

    Args:
        built: plain values of the model as built, in the runtime layout; None in the checkpoint layout.
        settle: called when the state is set, see :func:`~vllm_rfork.model.restore.restore`.
    """

    def __init__(
        self,
        context: LoadContext,
        session: ForkSession,
        model: nn.Module,
        tensors: TensorInventory,
        header: ManifestHeader,
        *,
        built: dict[str, Plain] | None,
        settle: Callable[[], None],
    ) -> None:
        self._session, self._model, self._tensors, self._header = session, model, tensors, header
        self._built, self._settle = built, settle
        settings = context.settings
        numbers = spans_to_check(tensors, settings.rfork_verify)
        self._check = StreamingVerifier(
            tensors, numbers, device_backend(context.device), settings.rfork_fork_timeout_sec
        )
        self.arrived, self.close = self._check.arrived, self._check.close

    def accept(self, manifest: Manifest) -> None:
        """Verify the bytes that have arrived, and give the rest of the model the seed's state.

        Raises:
            VerificationError: a digest differs.
            ForkError: the state cannot be made equal, or the fork's time is over.
        """
        session = self._session
        if self._check.numbers:
            with session.times.stage("verify"):
                check_algorithm(manifest, "use equal versions, or set rfork_verify=off")
                expected = dict(enumerate(digests_of(self._tensors, self._header, manifest)))
                self._check.finish(expected, session.left_s())
        with session.times.stage("state"):
            restore(
                self._model,
                self._tensors,
                manifest,
                VLLM_RULES,
                built=self._built,
                in_time=self._in_time,
                settle=self._settle,
            )
            self._in_time()

    def _in_time(self) -> None:
        """Raise ForkError if the fork has no time left."""
        self._session.left_s()


def _shared_spans(tensors: TensorInventory, storages: frozenset[int]) -> frozenset[int]:
    """Addresses of the spans that an earlier model uses too: a fork that fails must not have written there."""
    return frozenset(span.address for span in tensors.spans if span.data.untyped_storage().data_ptr() in storages)
