"""What a worker has vouched for, and whether it can again after a change.

A seed comes back by content: every tensor that it once vouched for must be there again, of the same kind and in the
same alias structure, with the bytes whose digests it gave then. These are what a default load makes for its seed key,
whatever has happened in between. This module finds the tensors; ``LoadPlan.recheck`` digests them.

While a seed is withdrawn nothing here keeps accelerator memory: the model is held weakly and looked at anew. On CPU
the loaded tensors are not the model's any more (post-processing packs copies of them), so they stay, as they did
before, until the worker can or cannot vouch for them.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.manifest.pairing import pair, paired_digests
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.tensors import Collection, account
from vllm_rfork.model.traversal import walk

#: The words of a mismatch between two workers, and what they mean between two moments of one.
_WORDS = (("only the seed has it", "is gone"), (" on the seed", " then"), (" on the receiver", " now"))


@dataclass
class Vouched:
    """See the module's docstring.

    Attributes:
        manifest: as offered first, with digests, without endpoint and epoch.
        kept: the tensors themselves, where the seed keeps them beside the model; else None.
        hopeless: there is no coming back.
    """

    manifest: Manifest
    device: torch.device
    kept: Collection | None
    model: weakref.ReferenceType[nn.Module]
    rules: ModelRules
    hopeless: bool = False

    @classmethod
    def of(
        cls, manifest: Manifest, collection: Collection, model: nn.Module, *, keeps: bool, rules: ModelRules
    ) -> Vouched:
        """What ``collection`` holds now; ``keeps``: hold it until it is known whether it can be vouched for again."""
        device = collection.spans[0].data.device if collection.spans else torch.device("cpu")
        return cls(manifest, device, collection if keeps else None, weakref.ref(model), rules)

    def again(self) -> tuple[Collection, list[str]]:
        """The same tensors as they stand now, and the digests that their spans must have.

        Tensors that the model has got since, caches for instance, are none of the seed's. To be called where nothing
        changes the model meanwhile; reads no weights.

        Raises:
            ForkError: the model or a tensor is gone, or is not what it was; lists all of it.
        """
        collection = self.kept or self._found()
        now = collection.manifest(self.manifest.header)
        if self.kept is None:
            self._compare(now)
        digests = paired_digests(now, self.manifest)
        return collection, [digests[number] for number in range(len(collection.spans))]

    def forget(self) -> None:
        """Keep nothing any more; there is no coming back."""
        self.kept, self.hopeless = None, True

    def _found(self) -> Collection:
        model = self.model()
        if model is None:
            self.hopeless = True
            raise ForkError("the model is not there any more")
        device_backend(self.device).synchronize()
        names = {entry.name for entry in self.manifest.tensors}
        wrapped = f".{self.rules.wrapped_layer}."
        leaves = []
        for leaf in walk(model, self.rules):
            name = leaf.name if leaf.name in names else leaf.name.replace(wrapped, ".")
            if name in names and isinstance(leaf.value, torch.Tensor):
                leaves.append(dataclasses.replace(leaf, name=name))
        return account(leaves, self.device)

    def _compare(self, now: Manifest) -> None:
        try:
            pair(now, self.manifest)
        except ManifestMismatch as mismatch:
            first = "; ".join(mismatch.differences[:5])
            for theirs, ours in _WORDS:
                first = first.replace(theirs, ours)
            text = f"{len(mismatch.differences)} tensors are not what they were when it was a seed: {first}"
            raise ForkError(text) from mismatch
        vouched = {entry.name: entry.inline for entry in self.manifest.tensors}
        if changed := [entry.name for entry in now.tensors if entry.inline != vouched[entry.name]]:
            raise ForkError(f"{len(changed)} small tensors have other bytes: {', '.join(changed[:5])}")
