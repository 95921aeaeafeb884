"""``--load-format rfork``: load a model from a seed or from storage, then publish it as a seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_rfork.config import Settings, parse_config
from vllm_rfork.errors import ConfigError
from vllm_rfork.load import early, metering
from vllm_rfork.load.context import describe
from vllm_rfork.load.machine import LoadMachine
from vllm_rfork.load.outcome import NotASeed
from vllm_rfork.load.reload import reloads
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages.lanes import OTHER
from vllm_rfork.metrics.families import DISABLED
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.seeding.manager import manager
from vllm_rfork.startup.settings import CacheSettings
from vllm_rfork.startup.worker_caches import WorkerCaches, no_caches, worker_caches
from vllm_rfork.vllm_compat import storage_loader
from vllm_rfork.vllm_compat.fallback_format import fallback_shown
from vllm_rfork.vllm_compat.registries import Registries
from vllm_rfork.vllm_compat.start_up import install_hooks, plan_hooks
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.telemetry import begin_metrics
from vllm_rfork.vllm_compat.worker_hooks import withdraw_before_changes

logger = worker_logger(__name__)


class RForkModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not there when types are checked
    """vLLM's loader for the format ``rfork``. Constructing it reads settings and does nothing else.

    Raises:
        ConfigError: a setting is wrong; the start fails and the message names the field.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._config = parse_config(load_config.model_loader_extra_config)
        storage_loader.check_format(self._config.settings.rfork_fallback_load_format)

    # Calls from outside :meth:`load_model` go to the storage loader, so that downloads and reloads work as without us.

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes that the fallback format maps from another process; a worker that finds some does not fork."""
        return storage_loader.external_nbytes(self._storage(), vllm_config)

    def download_model(self, model_config: Any) -> None:
        """Download the model as the fallback format would."""
        self._storage().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load ``model`` from storage."""
        self._storage().load_weights(model, model_config)

    def __getattr__(self, name: str) -> Any:
        # vLLM checks with hasattr whether reloading is possible; it is, if the storage loader can do it.
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
        """The model that the fallback loader would have produced, forked if a seed has it.

        Args:
            vllm_config, model_config, prefix: as vLLM passes them; a draft model comes with its own model_config.

        Raises:
            Exception: the fallback loader's own error, if that loader fails too.
        """
        # Models and post-processing read the format as well, and must see the one that the weights come from.
        with fallback_shown(vllm_config.load_config, self.load_config.load_format), early.discarded_at_end():
            begin_metrics(vllm_config)
            storage = self._storage(vllm_config, model_config)
            arguments = {"vllm_config": vllm_config, "model_config": model_config, "prefix": prefix}
            load_whole = partial(storage.load_model, **arguments)
            machine = self._machine(storage, vllm_config, model_config)
            if machine is None:
                return metering.without_fork(load_whole, DISABLED if self._config.settings.missing else OTHER)
            build = _Build(self.load_config, machine.fill)
            model: nn.Module = machine.run(partial(build.load_model, **arguments), load_whole)
            _become_seed(machine, model)
            return model

    def _machine(self, storage: Any, vllm_config: Any, model_config: Any) -> LoadMachine | None:
        """The machine of this load; None, with one WARNING, if this worker cannot take part in forking at all."""
        settings = self._config.settings
        if settings.missing:
            logger.warning(
                "%s not set, so there is nothing to match seeds by: loading with load_format=%s, not a seed",
                ", ".join(settings.missing),
                settings.rfork_fallback_load_format,
            )
            return None
        try:
            registries = Registries.capture(vllm_config)
            context = describe(
                settings,
                vllm_config,
                model_config,
                storage,
                shared_storages=registries.storages(),
                shows_progress=self.load_config.use_tqdm_on_load,
            )
            session = context.open_session()
            caches = _caches_of(settings, session.credentials)
            if caches is None:
                return LoadMachine(context, session, storage, registries)
            machine = LoadMachine(
                context,
                session,
                storage,
                registries,
                seed_known=partial(caches.seed_known, seed_key=context.seed_key),
            )
            caches.vote = caches.vote or machine.decide
            return machine
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - looking at configurations and devices runs third-party code
            logger.warning(
                "falling back to load_format=%s, not a seed: this worker cannot be described: %s: %s",
                settings.rfork_fallback_load_format,
                type(error).__name__,
                error,
            )
            return None


def _caches_of(settings: Settings, credentials: Credentials) -> WorkerCaches | None:
    """The caches of this start, with their hooks on vLLM; None if there are none, or they failed: the fork goes on."""
    with guarded("every cache"):
        carried = CacheSettings.of(settings, credentials)
        if carried is not None:
            install_hooks(carried.level)
            return worker_caches(carried)
        plan_hooks.disable()
        no_caches()
    return None


class _Build(BaseModelLoader):  # type: ignore[misc]
    """vLLM's own ``load_model``, with ``fill`` in the place of a read from storage."""

    def __init__(self, load_config: Any, fill: Callable[[nn.Module, Any], None]) -> None:
        super().__init__(load_config)
        self._fill = fill

    def download_model(self, model_config: Any) -> None:
        """Not used by ``load_model``."""
        raise NotImplementedError

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Called by ``load_model`` on the model that it has built."""
        self._fill(model, model_config)


def _become_seed(machine: LoadMachine, model: nn.Module) -> None:
    """Publish the loaded model. It is complete by now: what fails here costs the seed, not the start."""
    try:
        generation = manager().generation
        outcome = machine.outcome(model)
        withdraw_before_changes(manager(), reloads())
        if isinstance(outcome, NotASeed):
            logger.log(outcome.level, "this worker is not a seed: %s", outcome.reason)
            machine.close()
            return
        manager().publish(outcome, generation)
    except Exception as error:  # noqa: BLE001 - looking at a model runs third-party code
        logger.warning("this worker is not a seed: %s: %s", type(error).__name__, error)
        machine.close()
