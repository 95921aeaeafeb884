"""Hook on vLLM's cache of split graphs, which a compiled forward needs beside it before torch 2.12.

``VllmBackend.__call__`` computes the folder and clears the list of traced files. Then ``CompilerManager`` reads its
index in ``initialize_cache``, loads or compiles the graphs, and writes the index in ``save_to_file``. Read in vLLM 0.18
to 0.33.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rfork.caches.paths import Parts, parts_below
from vllm_rfork.caches.rewriting import split_graph_index
from vllm_rfork.caches.unproven import Unproven
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.key_factors import short_digest
from vllm_rfork.vllm_compat.start_up.compiled_identity import artifact_name, latest_identity, take_identity
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, listener

logger = worker_logger(__name__)

_WHAT = "the cache of split graphs"
_MARK = "_rfork_carries_caches"
INDEX = "vllm_compile_cache.py"
#: vLLM's names for compiled graphs. Beside them lie a description of the environment, which may contain secrets, and
#: sources for readers.
GRAPH = "artifact_"


@dataclass
class _Graphs:
    """The split graphs of one compiler manager, between reading its index and writing it."""

    place: CachePlace
    mark: Unproven
    started: float

    @classmethod
    def of(cls, folder: Path, identity: dict[str, str]) -> _Graphs:
        """Describe the graphs in ``folder``, which is ``<key>/rank_<rank>_<data parallel index>/<component>``.

        Raises:
            CacheError: it is not below vLLM's cache root.
        """
        from vllm import envs

        root = Path(envs.VLLM_CACHE_ROOT)
        place = CachePlace(
            "split_graph",
            artifact_name(folder.parent.name, folder.name),
            identity,
            root,
            parts_below(root, folder),
            last=INDEX,
            rewrite={INDEX: split_graph_index},
            only=_is_graph,
        )
        return cls(place, Unproven(folder / INDEX), time.monotonic())

    @property
    def index(self) -> Path:
        """The file that makes vLLM load them."""
        return self.place.root.joinpath(*self.place.directory, INDEX)

    def install(self) -> None:
        """Install what the seed has of them, unless they have failed before. Raises OSError."""
        if self.mark.remove_left():
            _failed.add(self.index)
            text = "the process that had installed them ended before vLLM had loaded them"
            logger.info("caches: the graphs of %s were removed: %s", self.place.name, text)
        if self.index in _failed or self.index.exists():
            return
        self.mark.begin()
        if listener().about_to_read(self.place):
            _unproven.append(self)
        else:
            self.mark.end()

    def remove_index(self) -> None:
        """Remove the index that was installed, and with it the graphs from what vLLM loads. Raises OSError."""
        _failed.add(self.index)
        self.index.unlink(missing_ok=True)
        self.mark.end()
        text = "vLLM could not load the forward with them"
        logger.info("caches: the graphs of %s were removed again: %s", self.place.name, text)
        listener().outcome(self.place.kind, self.place.name, used=False, reason=text)

    def done(self, manager: Any) -> None:
        """Report what became of them, after vLLM has written the index."""
        seconds = time.monotonic() - self.started
        compiled = bool(manager.is_cache_updated)  # at least one of them
        used = bool(manager.cache) and not compiled
        listener().outcome(self.place.kind, self.place.name, used=used, seconds=seconds)
        if compiled:
            _Spent.seconds += seconds
        if self.index.exists():
            listener().produced(self.place, seconds if compiled else None)


def _is_graph(parts: Parts) -> bool:
    return len(parts) == 1 and (parts[0] == INDEX or parts[0].startswith(GRAPH))


#: The identity of a manager's graphs, from the entrance of the backend on, and then the graphs.
_identities: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()
_graphs: weakref.WeakKeyDictionary[Any, _Graphs] = weakref.WeakKeyDictionary()
#: Those with an installed index that vLLM has not loaded all graphs of, and the indexes of those that failed.
_unproven: list[_Graphs] = []
_failed: set[Path] = set()


class _Spent:
    seconds = 0.0


def compile_s() -> float:
    """Seconds that this process has spent on compiling split graphs."""
    return _Spent.seconds


def forward_failed() -> None:
    """Remove what was installed and has not been loaded, after a compiled forward could not be loaded.

    vLLM compiles then, and ends if the index names a graph that it cannot load.

    Raises:
        OSError: an index cannot be removed.
    """
    while _unproven:
        _unproven.pop().remove_index()


def install() -> None:
    """Install the hook. Idempotent.

    Raises:
        ImportError: this vLLM has no such module.
        AttributeError: or no such class or method.
    """
    from vllm.compilation.backends import CompilerManager, VllmBackend

    originals = (VllmBackend.__call__, CompilerManager.initialize_cache, CompilerManager.save_to_file)
    if hasattr(originals[0], _MARK):
        return
    call, initialize_cache, save_to_file = originals
    VllmBackend.__call__ = _marked(_noting_identity(call))
    CompilerManager.initialize_cache = _carrying(initialize_cache)
    CompilerManager.save_to_file = _reporting(save_to_file)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, _MARK, True)
    return function


def _noting_identity(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with guarded(_WHAT):
            _note_identity(self)
        return original(self, *args, **kwargs)

    return call


def _note_identity(backend: Any) -> None:
    from vllm import envs

    if envs.VLLM_USE_MEGA_AOT_ARTIFACT:
        return  # the compiled forward contains its graphs, and vLLM writes no index
    known = latest_identity() if envs.VLLM_USE_AOT_COMPILE else None
    identity = take_identity(backend.vllm_config) if known is None else known
    # The graphs are installed under the name that this worker computes, so vLLM's comparison of sources, which is part
    # of the name, says nothing about the seed's.
    sources = sources_digest(backend.compilation_config.traced_files)
    _identities[backend.compiler_manager] = {**identity, "code.files": sources}


def _carrying(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def initialize_cache(self: Any, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
        with guarded(_WHAT):
            identity = _identities.pop(self, None)
            if identity is not None and not disable_cache:
                graphs = _graphs[self] = _Graphs.of(Path(cache_dir), identity)
                graphs.install()
        original(self, cache_dir, disable_cache, prefix)

    return initialize_cache


def _reporting(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_to_file(self: Any) -> None:
        original(self)
        with guarded(_WHAT):
            graphs = _graphs.pop(self, None)
            if graphs is not None:
                while _unproven:
                    _unproven.pop().mark.end()
                graphs.done(self)

    return save_to_file


def sources_digest(files: Iterable[str]) -> str:
    """A digest of source files: the names by which Python finds them, and their content.

    Raises:
        OSError: a file cannot be read.
    """
    entries = sorted(
        f"{_importable(file)} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
        for file in files
        if os.path.isfile(file)  # others were generated: <string>, <frozen ...>; vLLM leaves them out as well
    )
    return short_digest("\n".join(entries))


def _importable(file: str) -> str:
    """The path of ``file`` below the deepest entry of ``sys.path`` that contains it: equal for other install paths."""
    entries = [entry.rstrip(os.sep) + os.sep for entry in sys.path if entry]
    return file[max((len(entry) for entry in entries if file.startswith(entry)), default=0) :]
