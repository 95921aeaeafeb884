"""Weights from storage, read by the fallback loader into a model that vLLM has built."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, as_fork_error
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load import capture
from vllm_rfork.load.capture import LoadedSnapshot, SeedProspect
from vllm_rfork.load.context import LoadContext
from vllm_rfork.load.metering import Weights, model_nbytes
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME
from vllm_rfork.metrics.families import STORAGE
from vllm_rfork.model.coverage import TensorSize, check_accounted, tensor_sizes
from vllm_rfork.model.pointers import check_no_addresses, memory_of
from vllm_rfork.model.python_state import check_passed_on
from vllm_rfork.model.snapshot import AsBuilt, Snapshot
from vllm_rfork.model.traversal import walk
from vllm_rfork.model.verification import load_kernels
from vllm_rfork.vllm_compat import ascend
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

logger = worker_logger(__name__)


class FromStorage:
    """One load from storage; see the module's docstring.

    Args:
        loader: vLLM's loader for the fallback format.

    Attributes:
        weights: what was loaded; None before that.
    """

    def __init__(self, context: LoadContext, session: ForkSession, prospect: SeedProspect, loader: Any) -> None:
        self._context, self._session, self._prospect, self._loader = context, session, prospect, loader
        self._built: AsBuilt | None = None
        self._sizes: dict[str, TensorSize] = {}
        self._loaded: LoadedSnapshot | None = None
        self.weights: Weights | None = None

    def fill(self, model: nn.Module, model_config: Any) -> None:
        """Load ``model``, and capture what a seed will need; only the fallback loader's own errors are raised."""
        built = self._built = self._prospect.requires(
            "the built model cannot be looked at", lambda: capture.built_model(self._context, model)
        )
        if built is not None:
            load_kernels(device_backend(self._context.device))
        started = time.perf_counter()
        self._loader.load_weights(model, model_config)
        seconds = time.perf_counter() - started
        if built is not None:
            self._prospect.requires("the loaded model cannot be looked at", lambda: self._capture(model, built))
        nbytes = self._nbytes(model)
        self.weights = Weights(STORAGE, nbytes, seconds)
        logger.info(
            "loaded %d bytes (%.2f GB) from storage in %.2f s (%.2f GB/s), load_format=%s",
            nbytes,
            nbytes / 1e9,
            seconds,
            nbytes / 1e9 / max(seconds, 1e-9),
            self._context.settings.rfork_fallback_load_format,
        )

    def snapshot(self, model: nn.Module) -> Snapshot:
        """The snapshot of ``model``, which has been post-processed.

        Raises:
            ForkError: there is none that a receiver could use.
        """
        if self._context.layout == CHECKPOINT and self._loaded is not None:
            return self._loaded.after_post_processing(model)
        if self._context.layout == RUNTIME and self._built is not None:
            try:
                with as_fork_error("the post-processed model cannot be looked at"):
                    return self._processed(model, self._built)
            except ForkError as error:
                raise ForkError(f"the runtime layout cannot be published: {error}") from error
        raise ForkError("no weights were captured")

    def _nbytes(self, model: nn.Module) -> int:
        if self._loaded is not None:
            return self._loaded.nbytes
        return model_nbytes(model)

    def _capture(self, model: nn.Module, built: AsBuilt) -> None:
        """Remember what storage put into ``model``: a snapshot, or in the runtime layout the sizes of its tensors."""
        context = self._context
        if context.layout == RUNTIME:
            self._sizes = tensor_sizes(walk(model, VLLM_RULES))
            return
        snapshot = Snapshot.loaded(capture.contents(context, model), built, context.header(built.signature))
        if gone := snapshot.state_gone:
            raise ForkError(f"loading replaced {', '.join(gone[:5])} by what cannot be passed on as plain values")
        check_passed_on(snapshot.state)
        self._loaded = LoadedSnapshot(context, self._session, self._digested(model, snapshot))

    def _processed(self, model: nn.Module, built: AsBuilt) -> Snapshot:
        """The snapshot of a post-processed model in which every loaded weight is accounted for."""
        contents = capture.contents(self._context, model)
        if contents.tensors.opaque:
            raise ForkError(f"native objects may hold weights: {', '.join(contents.tensors.opaque[:5])}")
        if unknown := ascend.unknown_class_tensors(model):
            raise ForkError(f"classes hold tensors that may be weights: {', '.join(unknown[:5])}")
        check_accounted(self._sizes, contents.sizes)
        return self._digested(model, Snapshot.loaded(contents, built, self._context.header(built.signature)))

    def _digested(self, model: nn.Module, snapshot: Snapshot) -> Snapshot:
        """``snapshot`` with its digests, once nothing in it is a pointer."""
        tensors = snapshot.tensors
        memory = memory_of(model, tensors, device_backend(self._context.device))
        check_no_addresses(tensors, snapshot.state, memory)
        with self._session.times.stage("digest"):
            return snapshot.digested()
