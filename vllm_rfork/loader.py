"""``--load-format rfork``: fork or fall back, then become a seed.

vLLM's own ``BaseModelLoader.load_model`` stays in charge: it builds the structure, calls :meth:`load_weights`, and
post-processes, in every version and with every platform's patches. In the ``checkpoint`` layout forking happens
inside ``load_weights``, where the default loader would read storage; in the ``runtime`` layout ``load_weights``
reserves a seed and puts dummy weights in, and the fork goes over what post-processing made of them. Whether a
:class:`~vllm_rfork.errors.ForkError` ends in a load from storage is decided here alone: others catch one to add to it,
to try another seed, or to say why there is no seed, and pass it on or log it.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_rfork.config import parse_config
from vllm_rfork.errors import ConfigError, ForkError, NoSeedAvailable
from vllm_rfork.fork.progress import forking_progress
from vllm_rfork.fork.session import Destination
from vllm_rfork.load.outcome import NotASeed, outcome_of
from vllm_rfork.load.plan import LoadPlan
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model.tensors import Collection
from vllm_rfork.seeding.manager import manager
from vllm_rfork.vllm_compat import storage_loader
from vllm_rfork.vllm_compat.fallback_format import fallback_shown
from vllm_rfork.vllm_compat.registries import Registries
from vllm_rfork.vllm_compat.worker_hooks import withdraw_before_changes

logger = worker_logger(__name__)


class _StartOver(Exception):
    """The structure that was built cannot be used any more. Control flow inside this file, never seen outside."""


class RForkModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not there when types are checked
    """vLLM's loader for the format ``rfork``. Constructing it reads settings and does nothing else.

    Raises:
        ConfigError: a setting is wrong; the start fails and the message names the field.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._config = parse_config(load_config.model_loader_extra_config)
        storage_loader.check_format(self._config.settings.rfork_fallback_load_format)
        self._loading = threading.local()

    # What others may call on a loader is the storage loader's, so that downloads and reloads work as without us.

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes that the fallback format maps from another process; a worker that finds some does not fork."""
        return storage_loader.external_nbytes(self._storage(), vllm_config)

    def download_model(self, model_config: Any) -> None:
        """Download the model as the fallback format would."""
        self._storage().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill ``model``: inside :meth:`load_model` by a fork or from storage, from outside always from storage."""
        plan: LoadPlan | None = getattr(self._loading, "plan", None)
        if plan is None:
            self._storage().load_weights(model, model_config)
        else:
            self._fill(plan, model, model_config)

    def __getattr__(self, name: str) -> Any:
        # vLLM asks with hasattr whether reloading is possible; it is where the storage loader can do it.
        if name == "get_all_weights":
            return self._storage().get_all_weights
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _storage(self, vllm_config: Any = None, model_config: Any = None) -> Any:
        settings = self._config.settings
        return storage_loader.storage_loader(
            self.load_config,
            settings.rfork_fallback_load_format,
            self._config.passed_through,
            vllm_config=vllm_config,
            model_config=model_config,
        )

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model that the fallback loader would have produced, forked where a seed has it.

        Args:
            vllm_config, model_config, prefix: as vLLM passes them; a draft model comes with its own model_config.

        Raises:
            Exception: the fallback loader's own error, where it fails too.
        """
        # Models and post-processing look at the format as well, and see the one that the weights come from.
        with fallback_shown(vllm_config.load_config, self.load_config.load_format):
            return self._load_model(vllm_config, model_config, prefix)

    def _load_model(self, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        storage = self._storage(vllm_config, model_config)
        settings = self._config.settings
        if settings.missing:
            logger.warning(
                "%s not set, so there is nothing to match seeds by: loading with load_format=%s, not a seed",
                ", ".join(settings.missing),
                settings.rfork_fallback_load_format,
            )
            return storage.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        try:
            registries = Registries.capture(vllm_config)
            plan = LoadPlan.make(settings, vllm_config, model_config, rank_shows=self.load_config.use_tqdm_on_load)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - looking at configurations and devices runs code that is not ours
            logger.warning(
                "falling back to load_format=%s, not a seed: this worker cannot be described: %s: %s",
                settings.rfork_fallback_load_format,
                type(error).__name__,
                error,
            )
            return storage.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        plan.shared_storages = registries.storages()
        if storage_loader.external_nbytes(storage, vllm_config):
            # Forked weights would take the memory that they save.
            plan.no_fork_reason = f"{settings.rfork_fallback_load_format} maps the weights from another process"
        try:
            try:
                model = self._build(plan, storage, vllm_config, model_config, prefix)
                if plan.holds_dummies:
                    self._fork_over(plan, model)
            except _StartOver:
                # Outside the handler's frame the failed model has no references left.
                model = None
            if model is None:
                plan.attempt.engine.close()
                plan.forget_fork()
                registries.restore()
                storage_loader.release_memory(plan.device)
                model = self._build(plan, storage, vllm_config, model_config, prefix)
        except BaseException as error:
            plan.tell_others(error)
            plan.attempt.close()
            raise
        self._become_seed(plan, model)
        return model

    @staticmethod
    def _become_seed(plan: LoadPlan, model: nn.Module) -> None:
        """Publish what was loaded. The model is complete by now: what fails here costs the seed, not the start."""
        try:
            generation = manager().generation
            plan.settle(model)
            outcome = outcome_of(plan, model)
            if isinstance(outcome, NotASeed):
                logger.log(outcome.level, "this worker is not a seed: %s", outcome.reason)
                plan.attempt.close()
                return
            withdraw_before_changes(manager())
            manager().publish(outcome, generation)
        except Exception as error:  # noqa: BLE001 - looking at a model runs code that is not ours
            logger.warning("this worker is not a seed: %s: %s", type(error).__name__, error)
            plan.attempt.close()

    def _build(self, plan: LoadPlan, storage: Any, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        if (not plan.may_fork or plan.no_fork_reason) and storage_loader.loads_whole_models(storage):
            plan.refuse_to_seed(
                f"load format {plan.settings.rfork_fallback_load_format} builds and loads models as a whole, so the "
                f"{plan.layout} layout cannot be captured"
            )
            return storage.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        self._loading.plan, self._loading.storage = plan, storage
        try:
            model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if plan.holds_fork:
                plan.keep_fork()
        except Exception as error:
            if isinstance(error, _StartOver) or not (plan.holds_dummies or plan.holds_fork):
                raise
            # Some post-processing validates what it is given, and no dummy is good enough for it. Of what was forked
            # the seed's state may be why; if it is not, the fallback loader meets the same error, and raises it.
            what = "what was forked" if plan.holds_fork else "the dummy weights"
            reason = f"post-processing failed on {what}: {type(error).__name__}: {error}"
            self._fell_back(plan, error if isinstance(error, ForkError) else ForkError(reason, mutated=True))
            raise _StartOver from None
        finally:
            self._loading.plan = self._loading.storage = None
        return model

    def _fill(self, plan: LoadPlan, model: nn.Module, model_config: Any) -> None:
        """Bring the checkpoint's bytes into ``model``, by a fork if possible, or dummies for a fork to come."""
        if plan.may_fork:
            try:
                collection = plan.prepare(model)
                if collection is None:
                    plan.fill_with_dummies(model, model_config)
                else:
                    self._fork(plan, model, collection)
                return
            except NoSeedAvailable as reason:
                logger.info("%s: loading from storage", str(reason))  # as below: an error keeps its frames
            except ForkError as error:
                self._fell_back(plan, error)
                if error.mutated:
                    raise _StartOver from None
        storage = self._loading.storage
        if storage_loader.loads_whole_models(storage):
            raise _StartOver
        plan.state_before(model)
        started = time.perf_counter()
        storage.load_weights(model, model_config)
        seconds = time.perf_counter() - started
        plan.capture_loaded(model)
        nbytes = plan.nbytes_of(model)
        logger.info(
            "loaded %d bytes (%.2f GB) from storage in %.2f s (%.2f GB/s), load_format=%s",
            nbytes,
            nbytes / 1e9,
            seconds,
            nbytes / 1e9 / max(seconds, 1e-9),
            plan.settings.rfork_fallback_load_format,
        )

    @staticmethod
    def _fell_back(plan: LoadPlan, error: ForkError) -> None:
        """Say why there is no fork, and let go of everything that was for it while the model is still here."""
        logger.warning(
            "falling back to load_format=%s: %s: %s",
            plan.settings.rfork_fallback_load_format,
            type(error).__name__,
            plan.attempt.logged.once(error),  # not the error: log records that are kept would keep the model
        )
        plan.tell_others(error)
        plan.attempt.cancel_reservation()
        plan.attempt.engine.discard()
        plan.attempt.drop_tracebacks(error)

    def _fork_over(self, plan: LoadPlan, model: nn.Module) -> None:
        """Fork into the structure that post-processing has made of dummy weights."""
        try:
            self._fork(plan, model, None)
        except ForkError as error:
            self._fell_back(plan, error)
            raise _StartOver from None
        plan.holds_dummies = False

    def _fork(self, plan: LoadPlan, model: nn.Module, prepared: Collection | None) -> None:
        """Fork into ``prepared``, or into the model as it stands now."""
        started = time.perf_counter()
        collection, remote = plan.agreed_fork(lambda: self._read(plan, model, prepared or plan.collect_empty(model)))
        plan.capture_forked(collection, remote)
        if plan.no_seed_reason:
            plan.attempt.engine.close_if_registered()  # nobody will keep for it what post-processing replaces
        seconds = time.perf_counter() - started
        logger.info(
            "forked %d bytes (%.2f GB) in %.2f s (%.2f GB/s) from seed %s, engine=%s layout=%s lane=%s (%s)",
            remote.nbytes,
            remote.nbytes / 1e9,
            seconds,
            remote.nbytes / 1e9 / max(seconds, 1e-9),
            plan.attempt.seed,
            plan.attempt.engine.name,
            plan.layout,
            plan.attempt.lane,
            plan.attempt.times,
        )

    @staticmethod
    def _read(plan: LoadPlan, model: nn.Module, collection: Collection) -> tuple[Collection, Manifest]:
        local = collection.manifest(plan.manifest_header())
        with forking_progress(collection.nbytes, shown=plan.shows_progress) as progress:
            remote = plan.attempt.run(
                Destination(
                    local,
                    lambda: plan.incoming(model, collection),
                    collection,
                    progress,
                    untouched=plan.shared_spans(collection),
                )
            )
        return collection, remote
