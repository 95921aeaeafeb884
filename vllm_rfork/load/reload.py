"""Reloads of a running model's weights by a fork: in place, verified, on all ranks or on none.

``reload_weights`` means the files that are at the model's path now. New files at the same path mean other weights, and
a seed may have the old ones. So this fork needs more certainty than the one of a start: the seed's digests are those of
this worker's own load, and the files here have not changed since then, or there are none and the weights in memory are
gone. In every other case all ranks read storage.

The model cannot be built again, so a fork that fails must leave nothing that storage does not overwrite. Spans that
contain the seed's bytes already are not written: constants that no checkpoint contains are among them. The others are
read into a bounce buffer, where late bytes of a read that was given up do no harm.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, NoSeedAvailable, as_fork_error
from vllm_rfork.fork.session import Destination, ForkSession, reservation_s
from vllm_rfork.load import early, metering
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.ranks import FORK, SEED, RankVote
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.checkpoint_identity import BOUND_S, NoIdentity, identities
from vllm_rfork.manifest.pairing import pair, paired_digests
from vllm_rfork.manifest.schema import RUNTIME, Manifest, ManifestHeader
from vllm_rfork.model import digest
from vllm_rfork.model.bounce import BounceBuffer
from vllm_rfork.model.python_state import is_same, state_in
from vllm_rfork.model.relocation import PublishedSnapshot
from vllm_rfork.model.restore import apply_inline, apply_state, check_inline
from vllm_rfork.model.snapshot import digests_of
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.traversal import walk
from vllm_rfork.model.value_codec import Plain
from vllm_rfork.model.verification import StreamingVerifier, check_algorithm
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline, start_on_thread
from vllm_rfork.vllm_compat import checkpoint_files, storage_loader
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.reloading import OtherSource, StoredWeights

logger = worker_logger(__name__)


class StorageDecides(ForkError):
    """It is not certain that a seed has the weights that storage would give."""


class LoadedModel:
    """One model of this process, as its last load left it.

    Args:
        tensors: its tensors and their manifest; released, so that no memory is kept.
        built: its plain values before it was loaded.
    """

    def __init__(self, context: LoadContext, tensors: PublishedSnapshot, built: Mapping[str, Plain]) -> None:
        self.context, self.tensors = context, tensors
        gone = tensors.manifest.state_gone
        values = {**built, **tensors.manifest.state}
        self.values: Mapping[str, Any] = {name: value for name, value in values.items() if name not in gone}
        self._stamps = start_on_thread(
            lambda: checkpoint_files.stamps_of(context.files.found()), "rfork-checkpoint", delays_exit=False
        )

    def checkpoint(self, wanted: StoredWeights) -> Mapping[str, str]:
        """The checkpoint that a seed must have, so that its weights are what storage would give.

        Raises:
            StorageDecides: no checkpoint is certain.
        """
        try:
            found = call_with_deadline(lambda: self._on_this_machine(wanted), BOUND_S + 1.0, "rfork-checkpoint")
        except OtherSource as error:
            raise StorageDecides(str(error)) from error
        except (NoIdentity, DeadlineExceeded, OSError, ValueError) as error:
            raise StorageDecides(f"the model's files cannot be compared with a seed's: {error}") from error
        mine = self.context.files.published()
        if not mine:
            raise StorageDecides("the checkpoint of this worker's weights has no identity")
        if found and found != mine:
            raise StorageDecides("the files on this machine are of another checkpoint than this worker's weights")
        if not found and not wanted.gone:
            raise StorageDecides("there are no files here that could be compared with a seed's")
        return mine

    def _on_this_machine(self, wanted: StoredWeights) -> dict[str, str]:
        """The identity of each part of the files that storage would read now; empty if there are none.

        Raises:
            StorageDecides: they are not the files of the load.
            NoIdentity: they cannot be identified.
        """
        parts = wanted.files(self.context.settings.rfork_fallback_load_format, self.context.source)
        if checkpoint_files.stamps_of(parts) != self._stamps.result(BOUND_S):
            raise StorageDecides("the model's files have changed since it was loaded")
        if not any(files.paths for files in parts.values()):
            return {}
        return identities(parts, deadline=time.monotonic() + BOUND_S)


class Reloads:
    """The loaded models of this process: ``ReloadListener`` of :mod:`vllm_rfork.vllm_compat.reloading`."""

    def __init__(self) -> None:
        self._context: LoadContext | None = None
        self._loaded: list[LoadedModel] = []

    def load_ended(self, context: LoadContext, tensors: PublishedSnapshot | None, built: Mapping[str, Plain]) -> None:
        """Record the end of a load.

        Args:
            tensors, built: as of :class:`LoadedModel`. None if the model could not be described: then this worker votes
                against every fork.
        """
        if context.layout == RUNTIME and not context.identity.is_draft:
            self._context = context
            self._loaded = [each for each in self._loaded if each.tensors.model is not None]
            if tensors is not None:
                self._loaded.append(LoadedModel(context, tensors, built))

    def fork(self, wanted: StoredWeights) -> bool:
        """Fork ``wanted`` into the running model on all ranks; False if all ranks must read storage."""
        if self._context is None:
            return False
        loaded = self._of(wanted)
        reload = _Reload(self._context if loaded is None else loaded.context, loaded, wanted)
        try:
            try:
                return reload.forked()
            finally:
                reload.close()
        except Exception as error:  # the outermost frame: whatever fails here, vLLM reads storage
            logger.warning("weights are reloaded from storage: %s: %s", type(error).__name__, error, exc_info=True)
            metering.reload_fell_back(error, None)
            return False

    def from_storage(self, wanted: StoredWeights) -> bool:
        """True if the model has the weights again with which it was loaded, by the identity of their files."""
        loaded = self._of(wanted)
        try:
            with as_fork_error("the model's files cannot be looked at"):
                return loaded is not None and bool(loaded.checkpoint(wanted))
        except ForkError as error:
            logger.debug("it is not certain which weights the model has now: %s", error)
            return False

    def _of(self, wanted: StoredWeights) -> LoadedModel | None:
        return next((each for each in reversed(self._loaded) if each.tensors.model is wanted.model), None)


@functools.cache
def reloads() -> Reloads:
    """The models of this process."""
    return Reloads()


class _Reload:
    """One reload on this rank; see the module's docstring."""

    def __init__(self, context: LoadContext, loaded: LoadedModel | None, wanted: StoredWeights) -> None:
        self._context, self._loaded, self._wanted = context, loaded, wanted
        self._settings = context.settings.model_copy(update={"rfork_seed_wait_sec": 0.0, "rfork_become_seed": False})
        self._vote = RankVote(Consensus(wanted.ranks), (SEED, FORK), self._settings.rfork_request_timeout_sec)
        self._session: ForkSession | None = None
        self._failed = False

    def forked(self) -> bool:
        """True if all ranks have forked, False if none of them may keep its weights.

        Raises:
            Exception: unexpected; the other ranks do not wait.
        """
        settings = self._settings
        bound_s = BOUND_S + reservation_s(settings)
        try:
            started = time.perf_counter()
            fork = self._vote.run(SEED, self._reserved, bound_s)
            seed = self._vote.run(FORK, fork.run, settings.rfork_fork_timeout_sec)
            fork.log(seed, time.perf_counter() - started)
            metering.reload_forked(fork.session, fork.read_nbytes, time.perf_counter() - started)
            return True
        except ForkError as error:
            expected = isinstance(error, (NoSeedAvailable, StorageDecides))
            level = logging.INFO if expected else logging.WARNING
            logger.log(level, "weights are reloaded from storage: %s: %s", type(error).__name__, error)
            metering.reload_fell_back(error, None if expected else self._session)
            self._failed = True
            if self._session is not None:
                self._session.drop_tracebacks(error)  # its frames refer to the bounce buffer
            return False
        except BaseException as error:
            self._vote.abandon(error)
            raise

    def close(self) -> None:
        """Release the lease, the engines and the memory that the fork used."""
        if self._session is None:
            return
        self._session.close()
        if self._failed:
            storage_loader.release_memory(self._context.device)
        else:
            device_backend(self._context.device).empty_cache()

    def _reserved(self) -> _Fork:
        """A fork that has a seed with the wanted weights; nothing is written yet.

        Raises:
            StorageDecides: it is not certain which weights are wanted.
            ForkError: there is no such seed, or this worker cannot fork.
        """
        loaded, context, settings = self._loaded, self._context, self._settings
        if loaded is None:
            raise StorageDecides("this worker's model was not described when it was loaded")
        checkpoint = loaded.checkpoint(self._wanted)
        tensors = loaded.tensors.located()
        host, unreachable = early.own_address(settings)  # a process that was restored may be on another host
        if unreachable is not None:
            raise unreachable
        config = early.engine_config(settings, device_backend(context.device).name, host)
        engines = early.take_engines(settings, context.engine_order, config)
        self._session = session = ForkSession(
            settings, context.seed_key, engines, context.facts, checkpoint=lambda: checkpoint
        )
        session.reserve(context.fingerprint)
        session.await_engine()
        seed = session.peek(context.fingerprint)
        fork = _Fork(loaded, self._wanted, checkpoint, tensors, session, seed)
        fork.check(seed)
        return fork


def _inline(manifest: Manifest) -> dict[str, bytes | None]:
    return {entry.name: entry.inline for entry in manifest.tensors}


def _equal(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(is_same(value, theirs[name]) for name, value in mine.items())


@dataclass
class _Fork:
    """A fork into one running model, from its reservation on.

    Attributes:
        checkpoint: the one that a seed must have.
        tensors: the model's, where they are now.
        seed: the reserved seed's manifest.
        read_nbytes: bytes that were not the seed's before the fork.
    """

    loaded: LoadedModel
    wanted: StoredWeights
    checkpoint: Mapping[str, str]
    tensors: TensorInventory
    session: ForkSession
    seed: Manifest
    read_nbytes: int = 0

    @property
    def header(self) -> ManifestHeader:
        """The header of this worker's manifests."""
        return self.loaded.tensors.manifest.header

    def check(self, seed: Manifest) -> None:
        """Check that ``seed`` has the weights with which this worker was loaded, byte for byte.

        Raises:
            StorageDecides: something differs.
            ForkError: the two cannot be compared.
        """
        if seed.checkpoint != self.checkpoint:
            raise StorageDecides(f"the seed's weights are of checkpoint {seed.checkpoint}, not {self.checkpoint}")
        check_algorithm(seed, "use equal versions")
        local, mine = self.tensors.manifest(self.header), self.loaded.tensors.manifest
        pair(local, seed)
        if paired_digests(local, mine) != paired_digests(local, seed) or _inline(mine) != _inline(seed):
            raise StorageDecides("the seed's tensors have other bytes than those that this worker has loaded")
        if not _equal(mine.state, seed.state) or set(mine.state_gone) != set(seed.state_gone):
            raise StorageDecides("loading has set other Python values on the seed than on this worker")

    def run(self) -> Manifest:
        """Read what differs from the seed's bytes, and verify everything; returns the manifest of the seed.

        Raises:
            ForkError: the model may contain a part of the seed's bytes.
        """
        missing = self._missing()
        if not missing:
            self.session.cancel_reservation()
            sink = _Sink(self)
            try:
                sink.accept(self.seed)
            finally:
                sink.close()
            return self.seed
        tensors = self.tensors
        self.read_nbytes = sum(tensors.spans[number].nbytes for number in missing)
        others = (span.address for number, span in enumerate(tensors.spans) if number not in missing)
        destination = Destination(
            tensors.manifest(self.header),
            lambda: _Sink(self),
            tensors,
            lambda nbytes: None,
            untouched=frozenset(others),
            landing=BounceBuffer(tensors, self.loaded.context.device, self.read_nbytes),
        )
        return self.session.run(destination)

    def _missing(self) -> set[int]:
        """The numbers of the spans that do not contain the seed's bytes."""
        device_backend(self.loaded.context.device).synchronize()
        found = digest.digests(span.data for span in self.tensors.spans)
        expected = digests_of(self.tensors, self.header, self.seed)
        return {number for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)) if mine != theirs}

    def drifted(self) -> dict[str, Any]:
        """The seed's Python values where something else may have set others since the load.

        Raises:
            StorageDecides: there are values that were not set by loading.
        """
        if not self.wanted.written:
            return {}
        now = state_in(walk(self.wanted.model, VLLM_RULES))
        state, values = self.loaded.tensors.manifest.state, self.loaded.values
        found = [name for name, value in values.items() if name not in now or not is_same(now[name], value)]
        if unknown := [name for name in found if name not in state]:
            raise StorageDecides(f"Python values have changed since the load: {', '.join(unknown[:5])}")
        return {name: state[name] for name in found}

    def log(self, seed: Manifest, seconds: float) -> None:
        """Log a fork that all ranks keep."""
        session = self.session
        if not self.read_nbytes:
            logger.info("weights are reloaded: all %d bytes are the seed's already (%.2f s)", seed.nbytes, seconds)
            return
        logger.info(
            "forked %d of %d bytes into the running model in %.2f s from seed %s, engine=%s lane=%s (%s)",
            self.read_nbytes,
            seed.nbytes,
            seconds,
            session.seed,
            session.engine,
            session.lane,
            session.times,
        )


class _Sink:
    """:class:`~vllm_rfork.fork.session.Sink` of one seed: verifies every span of the model, those not read too."""

    def __init__(self, fork: _Fork) -> None:
        self._fork = fork
        context = fork.loaded.context
        self._check = StreamingVerifier(
            fork.tensors,
            range(len(fork.tensors.spans)),
            device_backend(context.device),
            context.settings.rfork_fork_timeout_sec,
        )
        self.arrived, self.close = self._check.arrived, self._check.close

    def accept(self, manifest: Manifest) -> None:
        """Verify the bytes, then give small tensors and Python values the seed's.

        Raises:
            VerificationError: a digest differs.
            ForkError: the seed has other weights than those that are wanted, or the fork's time is over.
        """
        fork = self._fork
        fork.check(manifest)
        with fork.session.times.stage("verify"):
            expected = dict(enumerate(digests_of(fork.tensors, fork.header, manifest)))
            self._check.finish(expected, fork.session.left_s())
        with fork.session.times.stage("state"):
            apply_inline(fork.tensors, manifest)
            apply_state(fork.loaded.tensors.model, fork.drifted(), self._in_time, fork.loaded.values, rules=VLLM_RULES)
            check_inline(fork.tensors, manifest)

    def _in_time(self) -> None:
        """Raise ForkError if the fork has no time left."""
        self._fork.session.left_s()
