"""A guard for a defect of vLLM: on CPU a compiled forward from the cache is never used, and is compiled again.

vLLM 0.32 and 0.33 call ``finalize_loading`` of what torch has loaded, and on CPU that is a function without it. With
this guard the same artifact is used, so that tests on CPU see what happens on GPUs.
"""

from __future__ import annotations

from typing import Any


class _Loaded:
    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def finalize_loading(self, config: Any) -> None:
        """Nothing is left to do on CPU."""


def install() -> None:
    """Guard this process; torch and vLLM are imported."""
    import torch

    load = torch.compiler.load_compiled_function

    def guarded(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        artifacts = loaded._artifacts
        if not hasattr(artifacts.compiled_fn, "finalize_loading"):
            artifacts.compiled_fn = _Loaded(artifacts.compiled_fn)
        return loaded

    torch.compiler.load_compiled_function = guarded
