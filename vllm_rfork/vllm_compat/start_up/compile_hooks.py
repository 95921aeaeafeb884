"""Hook on vLLM's compiled forward (AOT) and on the kernels that Inductor compiled for it.

``_try_load_aot_compiled_fn(model, path)`` gets the final path, inside the first forward, and is looked up in its module
for each call. ``save_aot_compiled_function`` of the model's class follows a compilation. Read in vLLM 0.18 to 0.33.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_rfork.caches.collector import listing
from vllm_rfork.caches.paths import Parts, parts_below
from vllm_rfork.caches.rewriting import triton_group
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.start_up import split_graphs
from vllm_rfork.vllm_compat.start_up.compiled_identity import artifact_name, function_text, take_identity
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, listener

logger = worker_logger(__name__)

_WHAT = "the compiled forward"
_MARK = "_rfork_carries_caches"
#: The one file of a compiled forward.
_FILE = "model"
#: Ends of names of compiled kernels: for processors, CUDA and ROCm.
_OBJECTS = (".so", ".cubin", ".hsaco")


@dataclass
class _Forward:
    """One compiled forward of this process, between the attempt to load it and the end of its compilation.

    Attributes:
        kernels: the compiled files of Inductor before that attempt.
    """

    aot: CachePlace
    inductor: CachePlace
    started: float
    split_graphs_s: float
    kernels: frozenset[Parts] = field(default=frozenset())

    @classmethod
    def of(cls, model: Any, path: str) -> _Forward:
        """Describe the caches of ``model``, whose compiled forward vLLM is about to look for at ``path``.

        Raises:
            CacheError: it is not below vLLM's cache root.
            Exception: whatever vLLM raises when it computes its key.
        """
        from vllm import envs

        root, folder = Path(envs.VLLM_CACHE_ROOT), Path(path).parent
        function = function_text(model.forward)
        identity = take_identity(model.vllm_config, function)
        tag = getattr(model, "_compile_tag", "") or type(model).__name__
        digest = hashlib.sha256(function.encode()).hexdigest()[:12]
        name = artifact_name(folder.name, digest, tag, model.forward.__qualname__)
        directory = parts_below(root, folder)
        aot = CachePlace("torch_aot", name, identity, root, directory, last=_FILE, only=lambda parts: parts == (_FILE,))
        inductor = CachePlace(
            "inductor",
            name,
            identity,
            root,
            (*directory[:-1], "inductor_cache"),
            rewrite={"__grp__*.json": triton_group},
        )
        return cls(aot, inductor, time.monotonic(), split_graphs.compile_s())

    def install_caches(self) -> None:
        """Install what the seed has of it."""
        from vllm import envs

        if envs.VLLM_FORCE_AOT_LOAD:  # vLLM ends if it cannot load the file, so it must be one that the user chose
            logger.info("caches: no compiled forward is installed, because VLLM_FORCE_AOT_LOAD is set")
        else:
            listener().about_to_read(self.inductor)
            listener().about_to_read(self.aot)
        self.kernels = self._kernels()

    def loaded(self, *, used: bool, seconds: float) -> None:
        """Report the result of the attempt to load it."""
        listener().outcome(self.aot.kind, self.aot.name, used=used, seconds=seconds)
        # A forward that does not find its kernels compiles them, and is loaded nevertheless.
        found = used and self._kernels() == self.kernels
        reason = "kernels were compiled again" if used and not found else None
        listener().outcome(self.inductor.kind, self.inductor.name, used=found, reason=reason)
        if used:
            self._produced(None)

    def _kernels(self) -> frozenset[Parts]:
        directory = self.inductor.root.joinpath(*self.inductor.directory)
        files = listing(directory) if directory.is_dir() else {}
        return frozenset(parts for parts in files if parts[-1].endswith(_OBJECTS))

    def saved(self) -> None:
        """Report that vLLM has compiled it and saved the file."""
        # The graphs are an artifact of their own, with their own time.
        graphs_s = split_graphs.compile_s() - self.split_graphs_s
        self._produced(max(0.0, time.monotonic() - self.started - graphs_s))

    def _produced(self, seconds: float | None) -> None:
        listener().produced(self.aot, seconds)
        listener().produced(self.inductor, None)  # its kernels were compiled in the same time


#: Path of a compiled forward → the one that vLLM is compiling now.
_compiling: dict[str, _Forward] = {}


def install() -> None:
    """Install the hook. Idempotent.

    Raises:
        ImportError: this vLLM has no such module.
        AttributeError: or no such function.
    """
    from vllm.compilation import decorators

    original = decorators._try_load_aot_compiled_fn
    if not hasattr(original, _MARK):
        decorators._try_load_aot_compiled_fn = _carrying(original)


def _carrying(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(original)
    def try_load(model: Any, path: str) -> Any:
        forward = None
        with guarded(_WHAT):
            forward = _Forward.of(model, path)
            forward.install_caches()
        started = time.monotonic()
        loaded = original(model, path)
        if loaded is None:
            with guarded(_WHAT):
                split_graphs.forward_failed()
        if forward is not None:
            with guarded(_WHAT):
                forward.loaded(used=loaded is not None, seconds=time.monotonic() - started)
                if loaded is None:
                    _await_save(type(model), path, forward)
        return loaded

    setattr(try_load, _MARK, True)
    return try_load


def _await_save(cls: Any, path: str, forward: _Forward) -> None:
    """Take the time until vLLM has saved the forward that it compiles now."""
    original = cls.save_aot_compiled_function
    if not hasattr(original, _MARK):

        @functools.wraps(original)
        def save(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            with guarded(_WHAT):
                saved = _compiling.pop(self._aot_compilation_path, None)
                if saved is not None and Path(self._aot_compilation_path).exists():  # vLLM only logs a failure
                    saved.saved()
            return result

        setattr(save, _MARK, True)
        cls.save_aot_compiled_function = save
    forward.started = time.monotonic()
    _compiling[path] = forward
