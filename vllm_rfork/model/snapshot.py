"""A model's contents at one moment, and the snapshot of them that a seed publishes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError, as_fork_error
from vllm_rfork.manifest.pairing import paired_digests
from vllm_rfork.manifest.schema import Manifest, ManifestHeader
from vllm_rfork.model import digest
from vllm_rfork.model.build_signature import build_signature
from vllm_rfork.model.coverage import TensorSize, tensor_sizes
from vllm_rfork.model.python_state import changed_state, gone_state, state_in
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.tensors import TensorInventory, collect, with_inline
from vllm_rfork.model.traversal import walk
from vllm_rfork.model.value_codec import Plain


@dataclass(frozen=True)
class Contents:
    """Everything that one traversal of a model found.

    Attributes:
        tensors: every tensor, with its memory.
        state: every plain value, by name.
        sizes: every tensor's size, by name.
    """

    tensors: TensorInventory
    state: dict[str, Plain]
    sizes: dict[str, TensorSize]

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, rules: ModelRules) -> Contents:
        """Traverse ``model`` once its device has finished all queued work.

        Raises:
            ForkError: something cannot be accounted for, or no engine can keep it registered.
        """
        with as_fork_error("the model's memory cannot be looked at"):
            side = device_backend(device)
            side.synchronize()
            leaves = list(walk(model, rules))
            tensors = collect(leaves, device)
            obstacle = side.registration_obstacle(tensors.regions)
        if obstacle:
            raise ForkError(obstacle)
        return cls(tensors, state_in(leaves), tensor_sizes(leaves))


@dataclass(frozen=True)
class AsBuilt:
    """A model as constructors left it, before anything is loaded.

    Attributes:
        state: its plain values, by name.
        signature: kernels and formats that constructors chose.
    """

    state: dict[str, Plain]
    signature: dict[str, str]

    @classmethod
    def of(
        cls, model: nn.Module, rules: ModelRules, *, kernels: bool, state: dict[str, Plain] | None = None
    ) -> AsBuilt:
        """Describe ``model``, by a traversal of its own unless its ``state`` is given.

        Args:
            kernels: the choice of kernels counts, because post-processed bytes are passed on.

        Raises:
            ForkError: the model cannot be traversed.
        """
        with as_fork_error("the built model cannot be looked at"):
            state = state_in(walk(model, rules)) if state is None else state
            return cls(state, build_signature(model, state, kernels=kernels, rules=rules))


@dataclass(frozen=True)
class Snapshot:
    """The contents of a model that a seed publishes; keeps the tensors' memory alive.

    Attributes:
        header: of the manifest, with the build signature.
        digests: one for each of the tensors' spans, in order.
        state: plain values that loading, and post-processing if there was one, have set.
        state_gone: names that had a plain value in the model as built and have none now.
        built: plain values of the model as built; for reloads, and never published.
    """

    header: ManifestHeader
    tensors: TensorInventory
    digests: tuple[str, ...]
    state: dict[str, Any]
    state_gone: tuple[str, ...]
    built: dict[str, Plain] = field(default_factory=dict)

    @classmethod
    def loaded(cls, contents: Contents, built: AsBuilt, header: ManifestHeader) -> Snapshot:
        """Snapshot of a model that was loaded from storage; not :meth:`digested` yet."""
        state = dict(changed_state(built.state, contents.state))
        return cls(header, contents.tensors, (), state, gone_state(built.state, contents.state), built.state)

    @classmethod
    def forked(
        cls, tensors: TensorInventory, header: ManifestHeader, seed: Manifest, built: AsBuilt | None
    ) -> Snapshot:
        """Snapshot of ``tensors``, which now contain the bytes of ``seed``; its digests and state are passed on."""
        tensors = with_inline(tensors, seed)  # its own inline bytes are those from before the fork
        digests = digests_of(tensors, header, seed)
        state = {} if built is None else built.state
        return cls(header, tensors, digests, dict(seed.state), seed.state_gone, state)

    def digested(self) -> Snapshot:
        """The same with a digest of each span, taken now."""
        return dataclasses.replace(self, digests=tuple(digest.digests(span.data for span in self.tensors.spans)))

    def manifest(self) -> Manifest:
        """The snapshot as plain data."""
        return self.tensors.manifest(self.header, digests=self.digests, state=self.state, state_gone=self.state_gone)


def digests_of(tensors: TensorInventory, header: ManifestHeader, seed: Manifest) -> tuple[str, ...]:
    """The digests in ``seed`` for the spans of ``tensors``, in order; the two have been paired.

    A digest that the seed does not have is empty.
    """
    by_span = paired_digests(tensors.manifest(header), seed)
    return tuple(by_span.get(number, "") for number in range(len(tensors.spans)))
