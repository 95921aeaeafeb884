"""What one call of ``load_model`` has decided and gathered: identity, layout, and what a seed will need.

A plan lives from the beginning of a load until the worker has become a seed. It holds no thread; the engine's
opening thread belongs to the attempt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from vllm_rfork.config import Settings
from vllm_rfork.devices.registry import device_backend
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.registry import engine_for_device
from vllm_rfork.errors import ConfigError, ForkError, ManifestMismatch, PlannerError, VerificationError
from vllm_rfork.fork.session import MAX_SEEDS, ForkSession
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.checkpoint_identity import CheckpointFiles
from vllm_rfork.manifest.facts import short_facts
from vllm_rfork.manifest.pairing import built_differences, pair, paired_digests
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME, Manifest, ManifestHeader
from vllm_rfork.model import digest
from vllm_rfork.model.build_signature import build_signature
from vllm_rfork.model.coverage import TensorSize, check_accounted, tensor_sizes
from vllm_rfork.model.pointers import check_no_addresses, memory_of
from vllm_rfork.model.python_state import (
    apply_state,
    changed_state,
    check_passed_on,
    gone_state,
    match_state,
    state_in,
)
from vllm_rfork.model.tensors import Collection, account, apply_inline, check_inline, with_inline
from vllm_rfork.model.traversal import Leaf, walk
from vllm_rfork.model.value_codec import Plain
from vllm_rfork.model.verification import StreamingVerifier, get_ready, spans_to_check
from vllm_rfork.net.advertise import advertise_host
from vllm_rfork.seed_key import WorkerIdentity, build_fingerprint, build_seed_key, seed_key_parts
from vllm_rfork.vllm_compat import ascend, checkpoint_files, storage_loader
from vllm_rfork.vllm_compat.agreement import Agreement
from vllm_rfork.vllm_compat.fingerprint.facts import fingerprint_facts
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.worker_identity import worker_identity

logger = worker_logger(__name__)

T = TypeVar("T")

#: What the ranks of one instance agree on: that each has a seed, that each holds dummies (in the runtime layout, before
#: post-processing, where ranks may wait for each other), and that each has forked.
SEED_STAGE, DUMMY_STAGE, FORK_STAGE = "seed", "dummies", "fork"
#: In the checkpoint layout, also that each has post-processed what it forked: vLLM's code meets the seed's state there.
KEPT_STAGE = "kept"

#: Device types on which the runtime layout cannot work: post-processing for the processor hides packed weights in
#: native objects.
NO_RUNTIME = frozenset({"cpu"})

#: Device types on which a seed keeps the loaded tensors beside what post-processing makes of them. Elsewhere memory
#: is what a deployment is sized by, and keeping weights twice could fail a start that works without us.
KEEPS_LOADED = frozenset({"cpu"})


@dataclass
class LoadPlan:
    """See the module's docstring.

    Attributes:
        files: the checkpoint's files on this machine.
        may_fork: false once an attempt has failed in a way that made the model unusable.
        no_fork_reason: why this worker's memory cannot be written to by an engine; empty where it can.
        holds_dummies: the model was filled with dummy weights, and no fork has replaced them yet.
        holds_fork: the model was forked before its post-processing, which has not ended yet.
        no_seed_reason: why this worker must not become a seed; empty where it may.
        unreachable: the planner's name could not be looked up in time: there is nobody to ask for a seed.
        shared_storages: where the memory lies that other models of this process use already.
        built: the Python-side state as built, before anything was loaded.
        marks: what of it, and of the classes that were chosen, must be as it was on the seed; None: not looked at yet.
        collection, digests, state, state_gone: the layout, captured for the seed; the collection keeps it alive.
    """

    settings: Settings
    device: torch.device
    identity: WorkerIdentity
    seed_key: str
    fingerprint: str
    layout: str
    attempt: ForkSession
    advertise_host: str
    load_config: Any
    shows_progress: bool
    agreement: Agreement
    files: CheckpointFiles
    may_fork: bool = True
    no_fork_reason: str = ""
    holds_dummies: bool = False
    holds_fork: bool = False
    no_seed_reason: str = ""
    unreachable: PlannerError | None = None
    shared_storages: frozenset[int] = frozenset()
    built: dict[str, Plain] = field(default_factory=dict)
    marks: dict[str, str] | None = None
    collection: Collection | None = None
    digests: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    state_gone: tuple[str, ...] = ()
    _owes_word_on: str = ""
    _promised: Manifest | None = None
    _loaded: Manifest | None = None
    _weights: dict[str, TensorSize] = field(default_factory=dict)
    _checks: ascend.PostponedChecks = field(default_factory=ascend.PostponedChecks)

    @classmethod
    def make(cls, settings: Settings, vllm_config: Any, model_config: Any, *, rank_shows: bool) -> LoadPlan:
        """Work out who this worker is, and begin to open its engine.

        Raises:
            ConfigError: there is no such engine or layout for this device.
        """
        # Here, on the thread that loads: the seed's and the digests' threads have other devices of their own.
        device = device_backend(storage_loader.target_device(vllm_config)).with_index
        side = device_backend(device)
        layout = layout_for(settings, device)
        engine_name = settings.rfork_engine if settings.rfork_engine != "auto" else engine_for_device(device.type)
        identity = worker_identity(vllm_config, model_config)
        named = (settings.model_url, settings.model_deploy_strategy_name, identity)
        separator = settings.rfork_seed_key_separator
        seed_key = build_seed_key(*named, separator=separator)
        parts = seed_key_parts(*named)
        if ambiguous := [name for name, text in parts.items() if separator in text]:
            # Not refused: existing fleets use such names, and their planners and dashboards know these keys.
            logger.warning(
                "rfork_seed_key_separator %r occurs in %s, so workers with other values may have the same seed key "
                "%s, and only the fingerprint tells them apart; choose a separator that occurs in none of them",
                separator,
                ", ".join(f"{name} {parts[name]!r}" for name in ambiguous),
                seed_key,
            )
        facts = {
            **fingerprint_facts(
                vllm_config,
                model_config,
                layout=layout,
                engine=engine_name,
                device=device,
                dummy=settings.rfork_fallback_load_format == "dummy",
                context_rank=identity.context_rank,
            ),
            **parts,
            "draft_model": checkpoint_files.draft_name(vllm_config, model_config),
        }
        files = CheckpointFiles(
            functools.partial(
                checkpoint_files.files_of,
                model_config,
                vllm_config.load_config,
                settings.rfork_fallback_load_format,
            )
        )
        unreachable = None
        try:
            host = advertise_host(settings)
        except TimeoutError as error:
            # The whole bound has been used up, and a call to the planner would look the name up again.
            host, unreachable = "", PlannerError(str(error))
        # Without an address of its own a worker can still read from others.
        config = EngineConfig(device=side.name, host=host or "127.0.0.1", timeout_s=settings.rfork_seed_timeout_sec)
        plan = cls(
            settings=settings,
            device=device,
            identity=identity,
            seed_key=seed_key,
            fingerprint=build_fingerprint(facts),
            layout=layout,
            attempt=ForkSession(settings, seed_key, engine_name, config, short_facts(facts), checkpoint=files.identity),
            files=files,
            advertise_host=host,
            load_config=vllm_config.load_config,
            agreement=Agreement.of(vllm_config, model_config),
            shows_progress=rank_shows and storage_loader.is_first_rank(),
            no_seed_reason="" if settings.rfork_become_seed else "rfork_become_seed is false",
            unreachable=unreachable,
        )
        logger.info("seed key %s, fingerprint %s, engine %s", seed_key, plan.fingerprint, engine_name)
        logger.debug("the fingerprint covers %s", facts)
        if not host:
            reason = unreachable or "there is no route to the planner (set rfork_seed_advertise_host)"
            plan.refuse_to_seed(f"its own address is not known: {reason}")
        if reason := storage_loader.never_a_seed(vllm_config):
            plan.refuse_to_seed(reason)
        if reason := storage_loader.unregistrable(vllm_config, device):
            plan.no_fork_reason = reason
            plan.refuse_to_seed(reason)
        elif side.has_copy_engine and settings.rfork_verify != "off":
            get_ready(side)
        return plan

    def refuse_to_seed(self, reason: str) -> None:
        """Remember why this worker will not be a seed; said once, when it would have become one."""
        if not self.no_seed_reason:
            self.no_seed_reason = reason
        self.attempt.intent.withdraw()

    def manifest_header(self) -> ManifestHeader:
        """The header of every manifest of this worker; the seed fills in endpoint, epoch and checkpoint."""
        return ManifestHeader(
            seed_key=self.seed_key,
            fingerprint=self.fingerprint,
            layout=self.layout,
            built=self.marks,
            engine=self.attempt.engine.name,
            digest_algorithm=digest.ALGORITHM,
        )

    def collect_empty(self, model: nn.Module) -> Collection:
        """The structure that a fork fills: as built, or as post-processed from dummy weights.

        Raises:
            ForkError: this model cannot be forked in this layout.
        """
        self._check_layout(model)
        return self._collect(model)

    def _collect(self, model: nn.Module) -> Collection:
        """What stands in ``model`` when its device has done all that was queued.

        Raises:
            ForkError: something cannot be accounted for, or no engine can keep it registered.
        """
        return self._collect_with_leaves(model)[0]

    def _collect_with_leaves(self, model: nn.Module) -> tuple[Collection, list[Leaf]]:
        """As :meth:`_collect`, and the walk that it comes from: a walk through a large model takes a while."""
        with _whatever_is_raised("the model's memory cannot be looked at"):
            side = device_backend(self.device)
            side.synchronize()
            leaves = list(walk(model, VLLM_RULES))
            collection = account(leaves, self.device)
            reason = side.registration_obstacle(collection.regions)
        if reason:
            raise ForkError(reason)
        return collection, leaves

    def shared_spans(self, collection: Collection) -> frozenset[int]:
        """Addresses of the spans that an earlier model uses too: a fork that goes wrong must not write there."""
        return frozenset(
            span.address for span in collection.spans if span.data.untyped_storage().data_ptr() in self.shared_storages
        )

    def _check_layout(self, model: nn.Module) -> None:
        if self.layout == CHECKPOINT and storage_loader.quantizes_online(model):
            raise ForkError(
                "weights are quantized while they are loaded, so the checkpoint layout never stands in memory"
            )

    def incoming(self, model: nn.Module, collection: Collection) -> _Incoming:
        """What takes the bytes of one seed into ``collection``, and makes the rest of ``model`` what the seed's was."""
        numbers = spans_to_check(collection, self.settings.rfork_verify)
        side = device_backend(self.device)
        return _Incoming(
            self, model, StreamingVerifier(collection, numbers, side, self.settings.rfork_fork_timeout_sec)
        )

    def accept(self, model: nn.Module, check: StreamingVerifier, manifest: Manifest) -> None:
        """Prove that the bytes are the seed's, and make the rest of the model what the seed's was.

        Raises:
            VerificationError: a digest differs.
            ForkError: Python-side state cannot be made equal, or not in the time that a fork may take.
        """
        collection = check.collection
        if check.numbers:
            with self.attempt.times.stage("verify"):
                if manifest.digest_algorithm != digest.ALGORITHM:
                    raise VerificationError(
                        f"the seed's digests are {manifest.digest_algorithm or 'missing'}, this worker checks "
                        f"{digest.ALGORITHM}; equal versions, or rfork_verify=off, would pair them"
                    )
                check.finish(self._digests_of(manifest, collection), self.attempt.left_s())
        with self.attempt.times.stage("state"):
            apply_inline(collection, manifest)
            if self.layout == RUNTIME:
                match_state(model, self.built, manifest.state, manifest.state_gone, self._in_time, rules=VLLM_RULES)
                self._checks.run()
            else:
                apply_state(model, manifest.state, self._in_time, rules=VLLM_RULES)
            check_inline(collection, manifest)
            self._in_time()

    def _in_time(self) -> None:
        """Raise ForkError where the fork has no time left."""
        self.attempt.left_s()

    def prepare(self, model: nn.Module) -> Collection | None:
        """What must be there before the model is touched: a lease, and the spans to fill or the seed's manifest.

        Raises:
            NoSeedAvailable, ForkError: there is nothing to fork from, or another rank of this instance has nothing.
        """

        def prepared() -> Collection | None:
            if self.unreachable is not None:
                raise self.unreachable
            if self.no_fork_reason:
                raise ForkError(self.no_fork_reason)
            collection = None
            if self.layout == CHECKPOINT:
                collection = self.collect_empty(model)
                with _whatever_is_raised("the built model cannot be looked at"):
                    self._look_at_built(model)
            # One rank after the other: each holds its lease until all have one, and instances that start together would
            # else hold the seeds that others wait for, until all of them give up.
            if reason := self.agreement.turn(SEED_STAGE, bound_s):
                raise ForkError(reason)
            self.attempt.reserve(self.fingerprint)
            self.agreement.pass_on(SEED_STAGE)
            if self.layout == RUNTIME:
                # Now, since post-processing is next: ranks make communicators for experts in it, together, and one
                # that turned back before it would leave the others in theirs.
                self._promised = self.attempt.peek(self.fingerprint)
            return collection

        settings = self.settings
        # Without a wait of its own the planner decides, and no wait goes on beyond the bound of a fork.
        wait_s = settings.rfork_seed_wait_sec
        bound_s = settings.rfork_fork_timeout_sec if wait_s is None else wait_s
        bound_s += settings.rfork_seed_timeout_sec + (1 + MAX_SEEDS) * settings.rfork_request_timeout_sec
        collection = self._agreed(SEED_STAGE, prepared, bound_s)
        self._owes_word_on = DUMMY_STAGE if self.layout == RUNTIME else FORK_STAGE
        return collection

    def agreed_fork(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, if it and the other ranks' succeed; all ranks of an instance fork or none does.

        Raises:
            ForkError: it failed here, or on another rank.
        """
        result = self._agreed(FORK_STAGE, action, self.settings.rfork_fork_timeout_sec)
        if self.layout == CHECKPOINT:
            self.holds_fork = True
            self._owes_word_on = KEPT_STAGE
        return result

    def keep_fork(self) -> None:
        """Post-processing accepted what was forked, here and on the other ranks.

        Raises:
            ForkError: not on another rank; all of them build their models again.
        """
        self._agreed(KEPT_STAGE, lambda: None, self.settings.rfork_fork_timeout_sec)
        self.holds_fork = False

    def forget_fork(self) -> None:
        """Let go of everything that was forked: the model is built again. Call when the engine has been closed."""
        self.may_fork, self.holds_dummies, self.holds_fork = False, False, False
        self.collection, self._loaded, self._promised = None, None, None
        self.digests, self.state, self.state_gone = [], {}, ()

    def tell_others(self, error: BaseException) -> None:
        """Tell the other ranks that there will be no fork here, where they are owed a word. Idempotent."""
        if stage := self._owes_word_on:
            self._owes_word_on = ""
            reason = f"{type(error).__name__}: {error}"
            self.agreement.reach(stage, reason, self.settings.rfork_request_timeout_sec)

    def _agreed(self, stage: str, action: Callable[[], T], bound_s: float) -> T:
        """What ``action`` returns where every rank's succeeds.

        After a common no either all ranks build their models again or none does, whether this one has written or not:
        constructors may make process groups, together, and a rank that built alone would wait there for the others.
        """
        written = stage != SEED_STAGE
        # A rank that waits for a seed is told when another has said no.
        self.attempt.leases.no_longer_needed = None if self.agreement.alone else partial(self.agreement.refused, stage)
        try:
            # Whatever it is: an error that goes its own way would be told to no other rank.
            with _whatever_is_raised("this worker cannot fork"):
                result = action()
        except ForkError as error:
            self._owes_word_on = ""
            self.agreement.reach(stage, f"{type(error).__name__}: {error}", bound_s)
            error.mutated = error.mutated or (written and not self.agreement.alone)
            raise
        self._owes_word_on = ""
        if reason := self.agreement.reach(stage, "", bound_s):
            raise ForkError(f"not every rank of this instance could fork ({stage}): {reason}", mutated=written)
        return result

    def fill_with_dummies(self, model: nn.Module, model_config: Any) -> None:
        """Put valid weights that mean nothing into ``model``, for post-processing to give it the seed's structure.

        Raises:
            ForkError: no seed was asked, the model cannot be looked at, or it takes no dummies, here or on another
                rank; from the first write on ``mutated``.
        """

        def filled() -> None:
            promised, self._promised = self._promised, None
            if promised is None:
                raise ForkError("no seed has said yet what it holds")
            self._look_at_built(model)
            if differences := list(built_differences(self.marks, promised.built)):
                raise ManifestMismatch(differences)  # as pairing would, after post-processing
            self.holds_dummies = True
            storage_loader.fill_with_dummies(model, model_config, self.load_config)
            storage_loader.tie_dummies(model, {entry.name: entry.span for entry in promised.tensors})
            self._checks = ascend.postpone_checks(model)

        self._agreed(DUMMY_STAGE, filled, self.settings.rfork_fork_timeout_sec)
        self._owes_word_on = FORK_STAGE

    def state_before(self, model: nn.Module) -> None:
        """Remember the Python-side state before loading, so that what loading changes can be told."""
        if self.no_seed_reason:
            return
        try:
            with _whatever_is_raised("the built model cannot be looked at"):
                self._look_at_built(model)
        except ForkError as error:
            self.refuse_to_seed(str(error))

    def _look_at_built(self, model: nn.Module) -> None:
        """Remember ``model`` as it was built: before anything is loaded into it."""
        self.files.look_also_at(checkpoint_files.secondary_sources(model))
        self.built = state_in(walk(model, VLLM_RULES))
        self.marks = build_signature(model, self.built, kernels=self.layout == RUNTIME, rules=VLLM_RULES)

    def capture_loaded(self, model: nn.Module) -> None:
        """Remember what storage put into ``model``: references to the tensors, their digests, the changed state."""
        if self.no_seed_reason:
            return
        if self.layout == RUNTIME:
            try:
                with _whatever_is_raised("the loaded weights cannot be looked at"):
                    self._weights = tensor_sizes(walk(model, VLLM_RULES))
            except ForkError as error:
                self.refuse_to_seed(str(error))
            return
        try:
            with _whatever_is_raised("the loaded model cannot be looked at"):
                collection = self._capture_checkpoint(model)
        except ForkError as error:
            self.refuse_to_seed(str(error))
            return
        self._keep(collection)

    def _capture_checkpoint(self, model: nn.Module) -> Collection:
        self._check_layout(model)
        collection, leaves = self._collect_with_leaves(model)
        after = state_in(leaves)
        if gone := gone_state(self.built, after):
            raise ForkError(f"loading replaced {', '.join(gone[:5])} by what cannot be passed on as plain values")
        self.state = dict(changed_state(self.built, after))
        check_passed_on(self.state)
        check_no_addresses(collection, self.state, memory_of(model, collection, device_backend(self.device)))
        self.digests = self._digests(collection)
        return collection

    def capture_forked(self, collection: Collection, remote: Manifest) -> None:
        """Remember what a fork put there, with the seed's digests: what is passed on is vouched for by the first."""
        if self.no_seed_reason:
            return
        try:
            with _whatever_is_raised("what was forked cannot be passed on"):
                self.digests = list(self._digests_of(remote, collection).values())
                collection = with_inline(collection, remote)  # its own are what stood there before the fork
        except ForkError as error:
            self.refuse_to_seed(str(error))
            return
        self.state, self.state_gone = dict(remote.state), remote.state_gone
        self.files.forked_from(remote.checkpoint)
        if self.layout == RUNTIME:
            self.collection = collection  # it stands; nothing replaces it any more
        else:
            self._keep(collection)

    def _keep(self, collection: Collection) -> None:
        """Keep the loaded tensors, or, where that would cost device memory, only what they were."""
        if self.device.type in KEEPS_LOADED:
            self.collection = collection
            return
        self._loaded = collection.manifest(self.manifest_header(), digests=self.digests)
        # Post-processing may free this memory, so no registration of the fork may outlive it.
        self.attempt.engine.close_if_registered()

    def settle(self, model: nn.Module) -> None:
        """After post-processing: capture the runtime layout, or see whether all that was loaded is still there.

        Where something cannot be vouched for, this worker will not be a seed; the reason says which.
        """
        if self.no_seed_reason or self.collection is not None:
            return
        if self.layout == RUNTIME:
            self._capture_runtime(model)
        elif self._loaded is not None:
            self._find_loaded(model, self._loaded)

    def _capture_runtime(self, model: nn.Module) -> None:
        """Remember the post-processed model that was loaded from storage, if every weight in it is accounted for."""
        try:
            with _whatever_is_raised("the post-processed model cannot be looked at"):
                collection, leaves = self._collect_with_leaves(model)
                if collection.opaque:
                    raise ForkError(f"native objects may hold weights: {', '.join(collection.opaque[:5])}")
                if unknown := ascend.unknown_class_tensors(model):
                    raise ForkError(f"classes hold tensors that may be weights: {', '.join(unknown[:5])}")
                check_accounted(self._weights, tensor_sizes(leaves))
                after = state_in(leaves)
                state = changed_state(self.built, after)
                check_no_addresses(collection, state, memory_of(model, collection, device_backend(self.device)))
                self.digests = self._digests(collection)
        except ForkError as error:
            self.refuse_to_seed(f"the {self.layout} layout cannot be vouched for: {error}")
            return
        self.state, self.state_gone = dict(state), gone_state(self.built, after)
        self.collection = collection

    def _digests(self, collection: Collection) -> list[str]:
        with self.attempt.times.stage("digest"):
            return digest.digests(span.data for span in collection.spans)

    def _find_loaded(self, model: nn.Module, loaded: Manifest) -> None:
        try:
            collection = self._collect(model)
            pair(collection.manifest(self.manifest_header()), loaded)
        except ForkError as error:
            self.refuse_to_seed(
                f"post-processing replaced tensors of the {self.layout} layout, and keeping both would take device "
                f"memory: {error}"
            )
            return
        self.digests = list(self._digests_of(loaded, collection).values())
        self.collection = with_inline(collection, loaded)

    def _digests_of(self, manifest: Manifest, collection: Collection) -> dict[int, str]:
        """What ``manifest`` says of each span of ``collection``, by span number in order; the two have been paired."""
        return dict(sorted(paired_digests(collection.manifest(self.manifest_header()), manifest).items()))

    def nbytes_of(self, model: nn.Module) -> int:
        """Bytes of weights that ``model`` holds."""
        if self.collection is not None:
            return self.collection.nbytes
        if self._loaded is not None:
            return self._loaded.nbytes
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def seed_manifest(self) -> Manifest:
        """What this worker offers.

        Raises:
            ForkError: nothing was captured.
        """
        if self.collection is None:
            raise ForkError("no weights were captured")
        return self.collection.manifest(
            self.manifest_header(), digests=self.digests, state=self.state, state_gone=self.state_gone
        )


class _Incoming:
    """:class:`~vllm_rfork.fork.session.Sink` of one seed's bytes."""

    def __init__(self, plan: LoadPlan, model: nn.Module, check: StreamingVerifier) -> None:
        self._plan, self._model, self._check = plan, model, check
        self.arrived, self.close = check.arrived, check.close

    def accept(self, manifest: Manifest) -> None:
        """See :meth:`LoadPlan.accept`."""
        self._plan.accept(self._model, self._check, manifest)


@contextlib.contextmanager
def _whatever_is_raised(what: str) -> Iterator[None]:
    """Turn foreign errors, an allocator's for instance, into a ForkError: a model that loads must not fail for us."""
    try:
        yield
    except ForkError:
        raise
    except Exception as error:
        raise ForkError(f"{what}: {type(error).__name__}: {error}") from error


def layout_for(settings: Settings, device: torch.device) -> str:
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
