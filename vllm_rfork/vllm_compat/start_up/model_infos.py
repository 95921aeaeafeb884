"""vLLM's model information: what a model class can do, which vLLM otherwise finds out in a process of its own.

vLLM remembers it in ``$VLLM_CACHE_ROOT/modelinfos``, one file for each class, with a hash of the class's source.
It is needed while the front end makes its configuration, before a worker exists. So the front end takes it from a seed
by itself (:func:`found_by`), and workers offer what they find on their host. Read in vLLM 0.26 and 0.32
(``model_executor/models/registry.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import typing
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm_rfork.caches.installer import install_file, is_there
from vllm_rfork.caches.safe.model_info import FieldKind, checked_model_info, stated_hash
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.key_factors import short_digest
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import JsonPlace, listener
from vllm_rfork.vllm_compat.start_up.warm_up import after_warm_up

logger = worker_logger(__name__)

KIND = "model_info"
#: Classes of one worker, a draft's included. A model names one to three.
MAX_CLASSES = 8
_DIRECTORY = "modelinfos"
_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
_OWN = "vllm_rfork."
_MARK = "_rfork_takes_model_infos"

#: Model information by the name of its artifact and the facts that must be equal, as JSON; None: a seed has none.
Find = Callable[[str, Mapping[str, str]], bytes | None]

_find: ContextVar[Find | None] = ContextVar("vllm_rfork_model_infos", default=None)


def install() -> None:
    """Make every worker of this process offer model information when its warm-up ends. Idempotent."""
    after_warm_up("model information", _MARK, lambda worker: exchange(worker.vllm_config))


def exchange(vllm_config: Any) -> None:
    """Offer the information about this worker's classes that is on this host, and take what is not.

    A front end on another host has its own files, so a worker's host may have none. They help its next start.
    """
    for place in places(vllm_config):
        if is_there(place.root, place.directory, place.file):
            listener().produced(place, None)
        else:
            listener().about_to_read(place)


def places(vllm_config: Any) -> list[JsonPlace]:
    """The files of the classes that vLLM inspects for this configuration: of its model, and of a draft."""
    draft = getattr(getattr(vllm_config, "speculative_config", None), "draft_model_config", None)
    found: dict[str, JsonPlace] = {}
    for model_config in (vllm_config.model_config, draft):
        for entry in _entries(model_config) if model_config is not None else ():
            place = _place(entry, lambda body: checked_model_info(body, stated_hash(body), fields()))
            found[place.name] = place
    return list(found.values())[:MAX_CLASSES]


def _entries(model_config: Any) -> list[Any]:
    """The entries of vLLM's registry that its search for a class of ``model_config`` can end at."""
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    names = {*(getattr(model_config, "architectures", None) or ()), getattr(model_config, "architecture", None)}
    inspected = getattr(getattr(model_config, "_model_info", None), "architecture", None)
    return [
        entry
        for name, entry in ModelRegistry.models.items()
        if isinstance(entry, _LazyRegisteredModel) and (name in names or entry.class_name == inspected)
    ]


def _place(entry: Any, check: Callable[[bytes], bytes]) -> JsonPlace:
    from vllm import envs

    file = str(entry._get_cache_filename())
    return JsonPlace(
        kind=KIND,
        name=file.removesuffix(".json"),
        identity=identity(),
        root=Path(envs.VLLM_CACHE_ROOT),
        directory=(_DIRECTORY,),
        file=file,
        check=check,
    )


def fields() -> dict[str, FieldKind]:
    """The fields of this vLLM's model information."""
    from vllm.model_executor.models.registry import _ModelInfo

    hints = typing.get_type_hints(_ModelInfo)
    return {field.name: _field_kind(hints[field.name]) for field in dataclasses.fields(_ModelInfo)}


def _field_kind(hint: Any) -> FieldKind:
    if hint is bool:
        return "flag"
    if typing.get_origin(hint) is tuple:
        return "words"
    if typing.get_origin(hint) is typing.Literal:
        return frozenset(typing.get_args(hint))
    return "word"


@functools.cache
def identity() -> Mapping[str, str]:
    """Everything besides a class's own source that decides what it can do: its bases are in these packages."""
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    return {
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": type(current_platform).__name__,
        "plugins": _plugins(),
    }


def _plugins() -> str:
    """A digest of the installed plugins, which may register models; without this package's own."""
    found = sorted(
        f"{group}:{entry.name}:{entry.value}:{entry.dist.version if entry.dist else ''}"
        for group in _PLUGIN_GROUPS
        for entry in importlib.metadata.entry_points(group=group)
        if not entry.value.startswith(_OWN)
    )
    return short_digest("\n".join(found))


@contextlib.contextmanager
def found_by(find: Find) -> Iterator[None]:
    """Ask ``find`` for model information that vLLM lacks inside the block, before it starts to inspect a class."""
    with guarded("model information"):
        _hook_registry()
    token = _find.set(find)
    try:
        yield
    finally:
        _find.reset(token)


def _hook_registry() -> None:
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    original = _LazyRegisteredModel._load_modelinfo_from_cache
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _load_modelinfo_from_cache(self: Any, module_hash: str) -> Any:
        found, find = original(self, module_hash), _find.get()
        if found is not None or find is None:
            return found
        with guarded("model information"):
            if _took(self, module_hash, find):
                return original(self, module_hash)
        return None

    setattr(_load_modelinfo_from_cache, _MARK, True)
    _LazyRegisteredModel._load_modelinfo_from_cache = _load_modelinfo_from_cache


def _took(entry: Any, module_hash: str, find: Find) -> bool:
    """Write the file of ``entry`` with what ``find`` returns; False if there is nothing.

    A file of another source is vLLM's to replace: ``find`` is not asked then.

    Raises:
        CacheError: it does not fit this vLLM or this source, or cannot be written.
    """
    place = _place(entry, lambda body: checked_model_info(body, module_hash, fields()))
    if is_there(place.root, place.directory, place.file):
        return False
    body = find(place.name, place.identity)
    return body is not None and install_file(place.root, place.directory, place.file, place.check(body))
