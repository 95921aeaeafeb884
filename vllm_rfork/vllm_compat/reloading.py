"""``reload_weights`` of a worker: a listener may replace vLLM's read of the model's files by a fork.

Only a call that asks for the files at the model's own path is replaced. One with an iterator, a path, or weights in
kernel format states which weights it wants. Read in vLLM 0.26 and 0.32, whose runners reload the target model only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.checkpoint_identity import Files
from vllm_rfork.vllm_compat import checkpoint_files
from vllm_rfork.vllm_compat.rank_groups import RankGroup, caller_group
from vllm_rfork.vllm_compat.weight_changes import WeightChanges
from vllm_rfork.vllm_compat.worker_calls import MARK, is_vllms

#: The change that lasts while a worker's weights are unmapped.
ASLEEP = "asleep"

#: Caches that vLLM's runners reset after a reload: they contain results of the old weights. LoRA's is newer than 0.26.
_RESETS = ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache")


class OtherSource(ForkError):
    """A reload reads something else than the files of the load."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights that a reload from storage would give a running model.

    Attributes:
        model_config, load_config: vLLM's, as they are now; a call of ``update_config`` may have replaced them.
        ranks: the ranks whose workers are called together.
        gone: the weights in memory have been discarded.
        written: something other than a load may have written to the model.
    """

    model: nn.Module
    model_config: Any
    load_config: Any
    ranks: RankGroup
    gone: bool
    written: bool

    def files(self, fallback_format: str, loaded_from: checkpoint_files.Source) -> dict[str, Files]:
        """The parts' files on this machine now; none if there are none.

        Args:
            loaded_from: the source of the load.

        Raises:
            OtherSource: they are not the only place of the weights, or not the place or format that was loaded.
        """
        if str(self.load_config.load_format).lower() != "rfork":
            raise OtherSource(f"the load format is {self.load_config.load_format} now")
        now = checkpoint_files.source_of(self.model_config, self.load_config)
        if now != loaded_from:
            raise OtherSource(f"the model was loaded from {loaded_from}, and is at {now} now")
        secondary = checkpoint_files.secondary_sources(self.model)
        of_parts = [checkpoint_files.Source(each.model_or_path, each.revision, now.download_dir) for each in secondary]
        for source in (now, *of_parts):
            if (place := checkpoint_files.elsewhere(source)) is not None:
                raise OtherSource(f"the weights of {source.name} are named by {place}, and may be others now")
        return checkpoint_files.files_of(self.model_config, self.load_config, fallback_format, secondary)


class ReloadListener(Protocol):
    """The owner of this process's loaded models."""

    def fork(self, wanted: StoredWeights) -> bool:
        """Fork ``wanted`` into the running model on all ranks; False if all ranks must read storage. Raises nothing."""

    def from_storage(self, wanted: StoredWeights) -> bool:
        """Take note of a reload from storage; True if the model has the weights again with which it was loaded."""


def hook_reload(cls: type, changes: WeightChanges, reloads: ReloadListener) -> None:
    """Let ``reloads`` replace ``cls.reload_weights``, if vLLM or its platform defines the method there first.

    A subclass's method does more than the one that it calls, so only the innermost one is replaced.
    """
    method = vars(cls).get("reload_weights")
    overrides = any("reload_weights" in vars(base) for base in cls.__mro__[1:])
    if isinstance(method, types.FunctionType) and not hasattr(method, MARK) and not overrides and is_vllms(cls):
        setattr(cls, "reload_weights", _forked_or_stored(method, changes, reloads))  # noqa: B010 - as _wrap does


def _forked_or_stored(
    method: Callable[..., Any], changes: WeightChanges, reloads: ReloadListener
) -> Callable[..., Any]:
    @functools.wraps(method)
    def reload_weights(worker: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = None
        if wants_own_files(*args, **kwargs) and not changes.lasts(ASLEEP):
            wanted = _stored_weights(worker, changes)
        if wanted is not None and reloads.fork(wanted):
            for name in _RESETS:
                getattr(worker.model_runner, name, lambda: None)()
            changes.settled(written=False)
            return None
        changes.settled(written=True)  # also if the call fails half-way
        returned = method(worker, *args, **kwargs)
        if wanted is not None and reloads.from_storage(wanted):
            changes.settled(written=False)
        return returned

    return reload_weights


def wants_own_files(weights_iterator: Any = None, weights_path: Any = None, is_checkpoint_format: Any = True) -> bool:
    """True for the arguments of a reload from the files at the model's own path."""
    return weights_iterator is None and weights_path is None and is_checkpoint_format is True


def _stored_weights(worker: Any, changes: WeightChanges) -> StoredWeights | None:
    """The weights that a reload would give; None for a worker that is not like vLLM's."""
    runner, config = worker.model_runner, worker.vllm_config
    if not hasattr(runner, "get_model"):
        return None
    return StoredWeights(
        model=runner.get_model(),
        model_config=getattr(runner, "model_config", config.model_config),
        load_config=getattr(runner, "load_config", config.load_config),
        ranks=caller_group(config),
        gone=changes.gone,
        written=changes.written,
    )
