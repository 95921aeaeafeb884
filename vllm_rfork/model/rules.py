"""Facts about a framework's models, as an argument of whatever looks at a model.

Names of classes, attributes and packages say what is not a weight: scratch memory, the process's settings, counters.
This package contains no such name of vLLM's; :mod:`vllm_rfork.vllm_compat.model_rules` fills the rules in.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Packages whose objects contain machinery and no weights; torch's containers of weights are modules.
_LIBRARIES = sys.stdlib_module_names | {"numpy", "torch", "torch_npu"}


@dataclass(frozen=True)
class ModelRules:
    """Names with a meaning in one framework's models; where a rule maps a name to a text, the text is the reason.

    Classes are given by name, without their module, and include derived classes unless stated otherwise.

    Attributes:
        placeholders: exact classes of modules that stand for a layer which is not loaded.
        foreign_packages: top-level packages whose objects contain no weights, besides torch and the standard library.
        wrapped_layer: attribute under which a layer is kept by another that takes its place, such as an adapter's.
        process_wide: prefixes of module paths whose objects belong to the process and not to one model.
        scratch_buffers: attributes that serving overwrites before it reads them, of any holder.
        scratch_of_class: the same for (class of the holder, attribute).
        scratch_if_flag: the same for (flag, attribute), where the holder's own attribute ``flag`` is True.
        scratch_objects: classes whose objects contain nothing but scratch memory.
        helper_packages: top-level packages whose classes choose kernels and formats.
        ignored_words: words in an attribute's name whose value does not count in a build signature.
        ignored_names: whole names of attributes, likewise.
        kernel_words: words in an attribute's name whose value says which kernel will be used.
    """

    placeholders: frozenset[str] = frozenset()
    foreign_packages: frozenset[str] = frozenset()
    wrapped_layer: str = ""
    process_wide: tuple[str, ...] = ()
    scratch_buffers: Mapping[str, str] = field(default_factory=dict)
    scratch_of_class: Mapping[tuple[str, str], str] = field(default_factory=dict)
    scratch_if_flag: Mapping[tuple[str, str], str] = field(default_factory=dict)
    scratch_objects: Mapping[str, str] = field(default_factory=dict)
    helper_packages: frozenset[str] = frozenset()
    ignored_words: Mapping[str, str] = field(default_factory=dict)
    ignored_names: Mapping[str, str] = field(default_factory=dict)
    kernel_words: frozenset[str] = frozenset()

    def is_placeholder(self, module: object) -> bool:
        """True if ``module`` stands for a layer that is not loaded here."""
        return type(module).__name__ in self.placeholders

    def is_scratch(self, holder: object, key: object) -> bool:
        """True if attribute ``key`` of ``holder`` is scratch memory."""
        if key in self.scratch_buffers:
            return True
        if key not in self._scratch_somewhere:
            return False
        return any((kind.__name__, key) in self.scratch_of_class for kind in type(holder).__mro__) or any(
            name == key and vars(holder).get(flag) is True for flag, name in self.scratch_if_flag
        )

    def is_scratch_object(self, value: object) -> bool:
        """True if ``value`` contains nothing but scratch memory."""
        return any(kind.__name__ in self.scratch_objects for kind in type(value).__mro__)

    def is_foreign(self, value: object) -> bool:
        """True if ``value`` is a library's or the process's, so that none of the model's weights lie in it."""
        module = type(value).__module__ or ""
        package = module.partition(".")[0]
        return package in _LIBRARIES or package in self.foreign_packages or module.startswith(self.process_wide)

    def is_helper(self, kind: type) -> bool:
        """True if ``kind`` is one of the framework's own classes."""
        return kind.__module__.partition(".")[0] in self.helper_packages

    def ignores(self, names: Iterable[str], words: Iterable[str]) -> bool:
        """True if a value does not count in a build signature, because of its names or the words in them."""
        return not (self.ignored_names.keys().isdisjoint(names) and self.ignored_words.keys().isdisjoint(words))

    @functools.cached_property
    def _scratch_somewhere(self) -> frozenset[Any]:
        return frozenset(name for _, name in (*self.scratch_of_class, *self.scratch_if_flag))
