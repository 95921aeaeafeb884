"""The tensors that a seed publishes, and a search for them after the model has changed.

A seed returns by content. Every tensor that was published must be there again, of the same kind and in the same alias
structure, with the bytes of its first digest. A default load makes these bytes for the seed key, whatever has happened
in between.

While a seed is suspended, no accelerator memory is kept: the model is referenced weakly and traversed again. On CPU the
loaded tensors are not the model's any more (post-processing packs copies of them), so they are kept until the seed
returns or cannot return.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model import digest
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.snapshot import Snapshot, digests_of
from vllm_rfork.model.tensors import TensorInventory, collect, names_in
from vllm_rfork.model.traversal import walk

#: A mismatch between two workers, in the words for two moments of one worker.
_WORDS = (("only the seed has it", "is gone"), (" on the seed", " then"), (" on the receiver", " now"))


@dataclass(frozen=True)
class _Origin:
    """``kept``: the snapshot, if it is kept beside the model; a failed return is final then."""

    device: torch.device
    rules: ModelRules
    model: weakref.ReferenceType[nn.Module]
    kept: Snapshot | None


class PublishedSnapshot:
    """A snapshot that a seed publishes: ``PublishedTensors`` of :mod:`vllm_rfork.seeding.publication`."""

    def __init__(self, snapshot: Snapshot, origin: _Origin) -> None:
        self.manifest: Manifest = snapshot.manifest()
        self._snapshot: Snapshot | None = snapshot
        self._origin = origin

    @classmethod
    def of(
        cls, snapshot: Snapshot, device: torch.device, model: nn.Module, rules: ModelRules, *, keeps: bool
    ) -> PublishedSnapshot:
        """Publish ``snapshot`` of ``model``; ``keeps``: keep its memory beside the model even after :meth:`release`."""
        return cls(snapshot, _Origin(device, rules, weakref.ref(model), snapshot if keeps else None))

    @property
    def keep(self) -> Any:
        """The object that keeps the memory alive; None after :meth:`release`."""
        return None if self._snapshot is None else self._snapshot.tensors

    @property
    def model(self) -> nn.Module | None:
        """The model, while it is there."""
        return self._origin.model()

    @property
    def recoverable(self) -> bool:
        """True if :meth:`relocate` may succeed after a failed return."""
        return self._origin.kept is None and self._origin.model() is not None

    def release(self) -> None:
        """Drop :attr:`keep`."""
        self._snapshot = None

    def recheck(self) -> None:
        """Digest the bytes again: version counters miss some writes.

        Raises:
            ForkError: names the tensors that have been written to since the snapshot.
        """
        if self._snapshot is None:
            raise ForkError("the tensors have been released")
        tensors = self._snapshot.tensors
        device_backend(self._origin.device).synchronize()
        found = digest.digests(span.data for span in tensors.spans)
        wrong = digest.differing(dict(enumerate(found)), dict(enumerate(self._snapshot.digests)))
        if wrong:
            raise ForkError(
                f"since they were captured, {len(wrong)} tensors of the {self.manifest.layout} layout have been "
                f"written to: {names_in(tensors, wrong)}"
            )

    def relocate(self) -> PublishedSnapshot:
        """The same tensors where they are now, with the digests that they must have. Reads no weights.

        Tensors that the model has gained since, such as caches, are not published. Call this while nothing changes
        the model.

        Raises:
            ForkError: the model or a tensor is gone or different; lists all differences.
        """
        origin = self._origin
        if origin.kept is not None:
            return PublishedSnapshot(origin.kept, origin)
        tensors = self.located()
        published = {entry.name: entry.inline for entry in self.manifest.tensors}
        if changed := [entry.name for entry in tensors.entries if entry.inline != published[entry.name]]:
            raise ForkError(f"{len(changed)} small tensors have other bytes: {', '.join(changed[:5])}")
        header = self.manifest.header
        digests = digests_of(tensors, header, self.manifest)
        found = Snapshot(header, tensors, digests, self.manifest.state, self.manifest.state_gone)
        return PublishedSnapshot(found, origin)

    def located(self) -> TensorInventory:
        """The model's own tensors where they are now, whatever they contain. Reads no weights.

        Call this while nothing changes the model.

        Raises:
            ForkError: the model or a tensor is gone or different; lists all differences.
        """
        model = self.model
        if model is None:
            raise ForkError("the model is not there any more")
        tensors = self._find(model)
        self._compare(tensors.manifest(self.manifest.header))
        return tensors

    def _find(self, model: nn.Module) -> TensorInventory:
        device_backend(self._origin.device).synchronize()
        names = {entry.name for entry in self.manifest.tensors}
        wrapped = f".{self._origin.rules.wrapped_layer}."
        leaves = []
        for leaf in walk(model, self._origin.rules):
            name = leaf.name if leaf.name in names else leaf.name.replace(wrapped, ".")
            if name in names and isinstance(leaf.value, torch.Tensor):
                leaves.append(dataclasses.replace(leaf, name=name))
        return collect(leaves, self._origin.device)

    def _compare(self, now: Manifest) -> None:
        try:
            pair(now, self.manifest)
        except ManifestMismatch as mismatch:
            first = "; ".join(mismatch.differences[:5])
            for theirs, ours in _WORDS:
                first = first.replace(theirs, ours)
            text = f"{len(mismatch.differences)} tensors are not what they were when they were captured: {first}"
            raise ForkError(text) from mismatch
