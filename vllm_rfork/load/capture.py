"""Captures of a model, for a fork or for the seed that this worker may become."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vllm_rfork.errors import ForkError, as_fork_error
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load.context import LoadContext
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import CHECKPOINT, RUNTIME
from vllm_rfork.model.snapshot import AsBuilt, Contents, Snapshot, digests_of
from vllm_rfork.model.tensors import with_inline
from vllm_rfork.model.value_codec import Plain
from vllm_rfork.vllm_compat import checkpoint_files, eligibility
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES

T = TypeVar("T")


class SeedProspect:
    """The prospect of a seed at the end of a load. The first obstacle is kept, and logged in the seed's place.

    Args:
        obstacle: one that is known from the start.
    """

    def __init__(self, session: ForkSession, obstacle: str | None) -> None:
        self.obstacle: str | None = None
        self._session = session
        if obstacle is not None:
            self.rule_out(obstacle)

    def rule_out(self, obstacle: str) -> None:
        """This worker will not be a seed because of ``obstacle``: no receiver should wait for it."""
        if self.obstacle is None:
            self.obstacle = obstacle
        self._session.intent.withdraw()

    def requires(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of ``action``, without which there is no seed; None if the seed is ruled out.

        Args:
            what: ``action`` failed, for the message about a third-party error.
        """
        if self.obstacle is not None:
            return None
        try:
            with as_fork_error(what):
                return action()
        except ForkError as error:
            self.rule_out(str(error))
            return None


class LoadedSnapshot:
    """A snapshot in the checkpoint layout, until vLLM has post-processed the model.

    On CPU the tensors are kept beside what post-processing makes of them. Elsewhere that would cost device memory, so
    only the manifest is kept, and the tensors must still be there afterwards.
    """

    def __init__(self, context: LoadContext, session: ForkSession, snapshot: Snapshot) -> None:
        self._context = context
        self._manifest = snapshot.manifest()
        self._kept = snapshot if context.keeps_loaded else None
        if self._kept is None:
            # Post-processing may free this memory, so no registration of the fork may outlive it.
            session.engines.close_if_registered()

    @property
    def nbytes(self) -> int:
        """Bytes in all spans."""
        return self._manifest.nbytes

    def after_post_processing(self, model: nn.Module) -> Snapshot:
        """The same tensors in the post-processed ``model``.

        Raises:
            ForkError: post-processing replaced some that were not kept.
        """
        if self._kept is not None:
            return self._kept
        header = self._manifest.header
        try:
            tensors = Contents.of(model, self._context.device, VLLM_RULES).tensors
            pair(tensors.manifest(header), self._manifest)
        except ForkError as error:
            raise ForkError(
                f"post-processing replaced tensors of the {self._context.layout} layout, and keeping both would take "
                f"device memory: {error}"
            ) from error
        return Snapshot(
            header,
            with_inline(tensors, self._manifest),
            digests_of(tensors, header, self._manifest),
            self._manifest.state,
            self._manifest.state_gone,
        )


def built_model(context: LoadContext, model: nn.Module, state: dict[str, Plain] | None = None) -> AsBuilt:
    """Describe ``model`` as it was built; see :meth:`AsBuilt.of`.

    Raises:
        ForkError: it cannot be looked at.
    """
    with as_fork_error("the built model cannot be looked at"):
        context.files.look_also_at(checkpoint_files.secondary_sources(model))
        return AsBuilt.of(model, VLLM_RULES, kernels=context.layout == RUNTIME, state=state)


def contents(context: LoadContext, model: nn.Module) -> Contents:
    """The contents of ``model``, which is in this load's layout now.

    Raises:
        ForkError: this model never is in that layout, or cannot be looked at.
    """
    if context.layout == CHECKPOINT and eligibility.quantizes_online(model):
        raise ForkError("weights are quantized while they are loaded, so the checkpoint layout never stands in memory")
    return Contents.of(model, context.device, VLLM_RULES)
