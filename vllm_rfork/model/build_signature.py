"""How a model was built, as short texts that a seed and a receiver compare before a byte moves.

Constructors choose kernels and formats, and what post-processing makes of the weights follows from the choice: with
another kernel the halves of a fused matrix change places, and every name, shape and digest still agrees. Fingerprints
cover what decides the choice as far as it is known; this compares the choice itself.

Workers that may be paired must never be told apart by it, so much is left out, by rule: what is a process's or a host's
own, what is sized by serving options that shape no weights, and what a value's kind does not tell apart from an address
or a time. A value that one side does not have is no difference: graphs, adapters and the like add theirs. Looks at
names and plain values only; must not change anything.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.traversal import Plain

#: Integers from here on may be addresses, times, identifiers or sizes of memory.
LARGEST_INT = 1 << 24
#: The same for floats, of times.
LARGEST_FLOAT = 1e9
#: Values up to this long are told as they are, in characters; others by a digest.
MAX_TOLD = 40
MAX_TEXT = 64

_MEMBER, _CLASS = ".<member>", ".<class>"
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.+-]*", re.ASCII)
_LIKE_A_HASH = re.compile(r"(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}")
_NUMBER = re.compile(r"(?<=\[)\d+(?=\])|(?<![^.])\d+(?![^.\[])")
_KEY = re.compile(r"\[([^\]]*)\]")
_IN_CONTAINER = re.compile(r"\[[^\]]*\]")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: How deep helpers' classes are looked for: a quantization method's kernel is two steps from its layer.
_DEPTH = 2


def build_signature(model: Any, state: Mapping[str, Plain], *, kernels: bool, rules: ModelRules) -> dict[str, str]:
    """What counts of how ``model`` was built: name → value or digest; layers that only differ by number are one name.

    Args:
        model: a module, not loaded yet.
        state: its plain values.
        kernels: whether the choice of kernels counts: where post-processed bytes are passed on.
    """
    modules = {name for name, _ in model.named_modules()}
    host = socket.gethostname()
    found = ((name, _text(name, value, host)) for name, value in state.items())
    counted = {
        name: text
        for name, text in found
        if text and not _ignored(name, rules) and (kernels or _structural(name, modules, rules))
    }
    if kernels:
        counted.update(_classes(model, rules))
    groups: dict[str, dict[str, str]] = {}
    for name, text in counted.items():
        groups.setdefault(_NUMBER.sub("*", name), {})[name] = text
    return {pattern: _mark(members) for pattern, members in sorted(groups.items())}


def _mark(members: dict[str, str]) -> str:
    """One text for all; where they differ among themselves, which has which counts too."""
    texts = set(members.values())
    if len(texts) == 1 and len(text := min(texts)) <= MAX_TOLD:
        return text
    told = "\n".join(f"{name}={text}" for name, text in sorted(members.items())) if len(texts) > 1 else min(texts)
    return "#" + hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _text(name: str, value: Plain, host: str) -> str:
    """``value`` as text, empty where a value of its kind does not count."""
    if type(value) is bool:
        return str(value)
    if type(value) is int:
        return str(value) if abs(value) < LARGEST_INT else ""
    if type(value) is float:
        # Six digits: the last ones of a computed number are not a choice.
        return f"{value:.6g}" if math.isfinite(value) and abs(value) < LARGEST_FLOAT else ""
    if type(value) is not str or (name.endswith(">") and not name.endswith(_MEMBER)):
        return ""
    if len(value) > MAX_TEXT or value == host or _LIKE_A_HASH.search(value):
        return ""
    return value if _IDENTIFIER.fullmatch(value) else ""


def _ignored(name: str, rules: ModelRules) -> bool:
    names = {_own_name(name), *_KEY.findall(name.removesuffix(_MEMBER).rpartition("].")[2])}
    return rules.ignores(names, set().union(*map(_words, names)))


def _structural(name: str, modules: set[str], rules: ModelRules) -> bool:
    """Whether this is a plain value of a registered module's own that tells no kernel."""
    own = _own_name(name)
    return (
        not name.endswith(_MEMBER)
        and _IN_CONTAINER.sub("", name).rpartition(".")[0] in modules
        and rules.kernel_words.isdisjoint(_words(own))
    )


def _own_name(name: str) -> str:
    """The attribute's name, without those of what it is in and the places in it."""
    return _IN_CONTAINER.sub("", name).removesuffix(_MEMBER).rpartition(".")[2]


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


def _classes(model: Any, rules: ModelRules) -> Iterator[tuple[str, str]]:
    """Classes of the framework's helpers near each module: kernels and what chooses them."""
    for name, module in model.named_modules():
        yield from _helpers(module, name, _DEPTH, rules)


def _helpers(holder: Any, prefix: str, depth: int, rules: ModelRules) -> Iterator[tuple[str, str]]:
    for key, value in sorted(getattr(holder, "__dict__", {}).items()):
        kind = type(value)
        if not rules.is_helper(kind) or hasattr(value, "named_modules"):
            continue
        if _ignored(key, rules) or kind.__name__.endswith("Config") or hasattr(kind, "__members__"):
            continue
        if rules.is_scratch_object(value):
            continue
        name = f"{prefix}.{key}" if prefix else key
        yield f"{name}{_CLASS}", kind.__qualname__
        if depth > 1:
            yield from _helpers(value, name, depth - 1, rules)
