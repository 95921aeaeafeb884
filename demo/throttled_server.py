"""`vllm serve` with one more load format: vLLM's default loader at the speed of network storage.

`python -m demo.throttled_server serve MODEL ...` takes the arguments of `vllm`. vLLM's other processes are spawned, and
so import this module again as their main module: the format is known in each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from demo.throttle import FORMAT, RATE, throttled


@register_model_loader(FORMAT)
class ThrottledLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The loader of the format ``auto``, which waits after each tensor for its rate."""

    def __init__(self, load_config: Any) -> None:
        self._mb_per_s = float(load_config.model_loader_extra_config[RATE])
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """The tensors of the checkpoint, throttled."""
        return throttled(super().get_all_weights(model_config, model), self._mb_per_s)


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
