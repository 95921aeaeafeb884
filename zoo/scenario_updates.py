"""Weight updates for ``python -m zoo.events`` by vLLM's own weight transfer, with a folder as the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

#: The name of the backend, for vLLM's ``weight_transfer_config``.
BACKEND = "zoo-folder"


def register_updates() -> None:
    """Register :data:`BACKEND` with vLLM: updates that read the weights of a folder, under the checkpoint's names.

    vLLM's own backends need a trainer's process. To 0.24 the worker prepares and finishes the model, and a backend
    brings weights; later the backend does all of it.
    """
    from vllm.distributed.weight_transfer import base, factory

    @dataclasses.dataclass
    class InitInfo(base.WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not there when types are checked
        pass

    @dataclasses.dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):  # type: ignore[misc]
        folder: str = ""

    class FolderEngine(base.WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        # No device context, as in vLLM's own backends: in one, vLLM would put small tensors of the host on the device.

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

        def receive_weights(self, update_info: Any, load_weights: Any = None) -> None:
            load = self.model.load_weights if load_weights is None else load_weights
            load(_weights_in(Path(update_info.folder)))

        def shutdown(self) -> None:
            pass

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            raise NotImplementedError

    factory.WeightTransferEngineFactory.register_engine(BACKEND, FolderEngine)


def _weights_in(folder: Path) -> list[tuple[str, Any]]:
    from safetensors.torch import load_file

    return [pair for file in sorted(folder.glob("*.safetensors")) for pair in load_file(file).items()]
