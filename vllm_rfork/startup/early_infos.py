"""Model information for vLLM's front end, which needs it before a worker exists.

A worker gets caches from the seed of its fork. The front end has no lease and no fingerprint yet, so it asks the
planner for any seed of the key that its first worker will have. One second is the bound of all of it: with an empty
answer, or none, vLLM inspects the classes as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from vllm_rfork.caches.manifest import Artifact, identity_differences
from vllm_rfork.clients.planner import PlannerClient
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.config import Settings, parse_config
from vllm_rfork.errors import PlannerError, RForkError, SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.within import within
from vllm_rfork.seed_key import build_seed_key
from vllm_rfork.startup.arrivals import Body
from vllm_rfork.threads.daemons import DaemonThreads
from vllm_rfork.threads.deadline import call_with_deadline
from vllm_rfork.vllm_compat.early_settings import first_ranks
from vllm_rfork.vllm_compat.start_up import model_infos
from vllm_rfork.vllm_compat.start_up.guard import guarded

logger = worker_logger(__name__)

#: Bound of everything that a front end does for model information, in seconds.
BOUND_S = 1.0
#: Rest of the bound in which what was interrupted ends, in seconds.
_ENDING_S = 0.05


def while_configuring(engine_args: Any, extra: Mapping[str, Any]) -> AbstractContextManager[object]:
    """Inside the block, vLLM's front end takes model information from a seed, unless ``rfork_caches`` is off.

    Args:
        engine_args: vLLM's, from which the first worker's rank is known.
        extra: the loader's extra config, which has been validated.
    """
    with guarded("model information"):
        settings = parse_config(extra).settings
        if settings.rfork_caches != "off" and not settings.missing:
            named = (settings.model_url, settings.model_deploy_strategy_name)
            separator = settings.rfork_seed_key_separator
            ranks = first_ranks(engine_args)
            keys = tuple(build_seed_key(*named, identity, separator=separator) for identity in ranks)
            return model_infos.found_by(_of_process(settings, keys).find)
    return contextlib.nullcontext()


@functools.lru_cache(maxsize=4)
def _of_process(settings: Settings, seed_keys: tuple[str, ...]) -> EarlyInfos:
    """The one attempt of this process for these settings: configurations may be made several times."""
    return EarlyInfos(settings, seed_keys)


@dataclass(frozen=True)
class _Found:
    """Artifacts with their bytes, by name."""

    seed: SeedAddress
    artifacts: Mapping[str, tuple[Artifact, bytes]]
    seconds: float


class EarlyInfos:
    """The model information of one seed, fetched once, when vLLM first lacks some.

    Args:
        seed_keys: the keys that the first worker may have; the first one that has a seed counts.
    """

    def __init__(self, settings: Settings, seed_keys: Sequence[str]) -> None:
        self._settings, self._seed_keys = settings, tuple(seed_keys)
        self._lock = threading.Lock()
        self._found: _Found | None = None
        self._asked = False

    def find(self, name: str, identity: Mapping[str, str]) -> bytes | None:
        """The seed's model information called ``name``; None, with one INFO line, if there is none for ``identity``.

        Takes at most :data:`BOUND_S` seconds the first time. The caller checks the content.
        """
        with self._lock:
            if not self._asked:
                self._asked = True
                self._found = self._fetched()
        if self._found is None:
            return None
        seed = self._found.seed
        artifact, body = self._found.artifacts.get(name, (None, b""))
        if artifact is None:
            logger.info("caches: seed %s has no model information of %s, so vLLM inspects the class", seed, name)
        elif differences := identity_differences(identity, artifact):
            logger.info("caches: the model information of seed %s does not fit: %s", seed, "; ".join(differences))
        else:
            logger.info("caches: model_info %s from seed %s after %.2f s", name, seed, self._found.seconds)
            return body
        return None

    def _fetched(self) -> _Found | None:
        try:
            return call_with_deadline(
                lambda: asyncio.run(within(self._fetch(), BOUND_S - _ENDING_S)),
                BOUND_S,
                "rfork-model-infos",
                delays_exit=False,
            )
        except (TimeoutError, asyncio.TimeoutError):
            reason = f"nothing arrived within {BOUND_S:g} s"
        except RForkError as error:
            reason = str(error)
        logger.info("caches: no model information from a seed, so vLLM inspects model classes: %s", reason)
        return None

    async def _fetch(self) -> _Found:
        """Raises PlannerError, SeedError or CacheError."""
        started = time.monotonic()
        asyncio.get_running_loop().set_default_executor(DaemonThreads("rfork-model-infos-io"))
        timeout_s = min(BOUND_S, self._settings.rfork_request_timeout_sec)
        credentials = Credentials.of(self._settings)
        planner = PlannerClient(
            self._settings.rfork_scheduler_url, request_timeout_s=timeout_s, credentials=credentials
        )
        caches = SeedCaches(request_timeout_s=timeout_s, credentials=credentials)
        for seed_key in self._seed_keys:
            if (seed := await planner.find_seed(seed_key)) is None:
                continue
            offer = await caches.offer(seed, seed_key)
            if offer is None:
                raise SeedError(f"seed {seed} has not collected its caches yet")
            wanted = [each for each in offer.artifacts if each.kind == model_infos.KIND][: model_infos.MAX_CLASSES]
            bodies = {each.name: (each, await _body(caches, seed, seed_key, each, timeout_s)) for each in wanted}
            return _Found(seed, bodies, time.monotonic() - started)
        raise PlannerError(f"the planner has no seed of key {' or '.join(map(repr, self._seed_keys))}")


async def _body(caches: SeedCaches, seed: SeedAddress, seed_key: str, artifact: Artifact, timeout_s: float) -> bytes:
    """The verified bytes of the one file of ``artifact``. Raises CacheError, SeedError."""
    received = Body(artifact)
    await caches.fetch(seed, seed_key, artifact, received.write, timeout_s=timeout_s)
    received.finish()
    return bytes(received.content)
