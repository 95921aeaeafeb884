"""Observe models while vLLM loads them: digests of every tensor, and every plain value, independent of the plugin.

The digests are SHA-256 over the elements, not the arithmetic that the plugin verifies with. What is looked at is
what ``vllm_rfork.model.traversal`` reaches; that the walk reaches enough is what equal answers show.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Load:
    """One model that vLLM loaded.

    Attributes:
        architecture: the class of the model.
        before: digest by tensor name at the moment when post-processing begins.
        after: the same when :meth:`finish` is called.
        state: every plain value by name, then.
        tensors, nbytes: how many tensors and bytes the model holds before post-processing, aliases once.
    """

    architecture: str
    before: dict[str, str]
    tensors: int
    nbytes: int
    after: dict[str, str] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)


class Watch:
    """The loads observed by :func:`watching`, oldest first."""

    def __init__(self) -> None:
        self._loads: list[tuple[weakref.ref[Any], Load]] = []
        self.storage_s = 0.0

    def begin(self, model: Any) -> None:
        """Digest ``model`` as post-processing begins."""
        tensors = {
            (tensor.data_ptr(), tensor.numel() * tensor.element_size())
            for tensor in (*model.parameters(), *model.buffers())
        }
        nbytes = sum(size for _, size in tensors)
        load = Load(type(model).__name__, digests_of(model), len(tensors), nbytes)
        # No reference from here may keep a model alive that the loader gives up.
        self._loads.append((weakref.ref(model), load))

    def finish(self) -> list[Load]:
        """Digest every model that still exists, and return the loads; models that a loader discarded are omitted."""
        loads = []
        for reference, load in self._loads:
            model = reference()
            if model is not None:
                load.after = digests_of(model)
                load.state = state_of(model)
                loads.append(load)
        return loads


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch every load of this process: vLLM's own ``load_model`` calls post-processing, whatever the loader.

    Also adds up the seconds that reading storage took, in ``storage_s``.
    """
    from vllm.model_executor.model_loader import base_loader, default_loader

    watch = Watch()
    process = base_loader.process_weights_after_loading
    read = default_loader.DefaultModelLoader.load_weights

    def looking(model: Any, *args: Any, **kwargs: Any) -> Any:
        watch.begin(model)
        return process(model, *args, **kwargs)

    def timing(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return read(self, *args, **kwargs)
        finally:
            watch.storage_s += time.perf_counter() - started

    base_loader.process_weights_after_loading = looking
    default_loader.DefaultModelLoader.load_weights = timing
    try:
        yield watch
    finally:
        base_loader.process_weights_after_loading = process
        default_loader.DefaultModelLoader.load_weights = read


def digests_of(model: Any) -> dict[str, str]:
    """SHA-256 over dtype, shape and elements of every tensor that the walk finds, by name.

    Handles of packed weights are left out: addresses inside a process, which differ from load to load.
    """
    import torch

    from vllm_rfork.model.traversal import walk
    from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

    def digest(tensor: Any) -> str:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw.tobytes()).hexdigest()

    found = {
        leaf.name: leaf.value
        for leaf in walk(model, VLLM_RULES)
        if isinstance(leaf.value, torch.Tensor) and not leaf.name.endswith("handler_tensor")
    }
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(found, pool.map(digest, found.values()), strict=True))


def state_of(model: Any) -> dict[str, Any]:
    """Every plain value that the walk finds, by name."""
    import torch

    from vllm_rfork.model.traversal import walk
    from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

    return {leaf.name: leaf.value for leaf in walk(model, VLLM_RULES) if not isinstance(leaf.value, torch.Tensor)}
