"""Build signature: the choices of a model's constructors, as short texts that seed and receiver compare before a read.

Constructors choose kernels and formats, and the result of post-processing depends on that choice: with another kernel
the halves of a fused matrix change places, and every name, shape and digest still agrees. The fingerprint covers what
is known to decide the choice; the signature compares the choice itself.

It must not differ between workers that may be paired. So rules ignore what belongs to a process or a host, what is
sized by serving options that shape no weights, and values that could be addresses or times. A value that only one side
has is not a difference: graphs, adapters and the like add values.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.value_codec import Plain

#: Integers from here on may be addresses, times, identifiers or sizes of memory.
LARGEST_INT = 1 << 24
#: The same for floats, of times.
LARGEST_FLOAT = 1e9
#: Values of up to this many characters are kept as they are; longer ones become a digest.
MAX_SHOWN = 40
MAX_TEXT = 64

_MEMBER, _CLASS = ".<member>", ".<class>"
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.+-]*", re.ASCII)
_LIKE_A_HASH = re.compile(r"(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}")
_NUMBER = re.compile(r"(?<=\[)\d+(?=\])|(?<![^.])\d+(?![^.\[])")
_KEY = re.compile(r"\[([^\]]*)\]")
_IN_CONTAINER = re.compile(r"\[[^\]]*\]")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
#: Levels of helper objects whose classes count: a quantization method's kernel is two steps from its layer.
_DEPTH = 2


def build_signature(model: Any, state: Mapping[str, Plain], *, kernels: bool, rules: ModelRules) -> dict[str, str]:
    """Name → value or digest of what constructors chose; names that differ only by a number are one name with ``*``.

    Args:
        model: a module before anything is loaded into it.
        state: its plain values, by name.
        kernels: include the choice of kernels, because post-processed bytes are passed on.
        rules: what to ignore, and which classes are the framework's.
    """
    modules = {name for name, _ in model.named_modules()}
    host = socket.gethostname()
    found = ((name, _text(name, value, host)) for name, value in state.items())
    counted = {
        name: text
        for name, text in found
        if text is not None and not _ignored(name, rules) and (kernels or _structural(name, modules, rules))
    }
    if kernels:
        counted.update(_classes(model, rules))
    groups: dict[str, dict[str, str]] = {}
    for name, text in counted.items():
        groups.setdefault(_NUMBER.sub("*", name), {})[name] = text
    return {pattern: _common(members) for pattern, members in sorted(groups.items())}


def _common(members: dict[str, str]) -> str:
    """The members' common value, or a digest of which member has which value."""
    texts = set(members.values())
    if len(texts) == 1 and len(text := min(texts)) <= MAX_SHOWN:
        return text
    text = "\n".join(f"{name}={text}" for name, text in sorted(members.items())) if len(texts) > 1 else min(texts)
    return "#" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _text(name: str, value: Plain, host: str) -> str | None:
    """``value`` as text; None if a value of its kind does not count."""
    if type(value) is bool:
        return str(value)
    if type(value) is int:
        return str(value) if abs(value) < LARGEST_INT else None
    if type(value) is float:
        # Six digits: the last digits of a computed number are not a choice.
        return f"{value:.6g}" if math.isfinite(value) and abs(value) < LARGEST_FLOAT else None
    if type(value) is not str or (name.endswith(">") and not name.endswith(_MEMBER)):
        return None
    if len(value) > MAX_TEXT or value == host or _LIKE_A_HASH.search(value):
        return None
    return value if _IDENTIFIER.fullmatch(value) else None


def _ignored(name: str, rules: ModelRules) -> bool:
    names = {_own_name(name), *_KEY.findall(name.removesuffix(_MEMBER).rpartition("].")[2])}
    return rules.ignores(names, set().union(*map(_words, names)))


def _structural(name: str, modules: set[str], rules: ModelRules) -> bool:
    """True if this is a registered module's own attribute that does not say which kernel is used."""
    own = _own_name(name)
    return (
        not name.endswith(_MEMBER)
        and _IN_CONTAINER.sub("", name).rpartition(".")[0] in modules
        and rules.kernel_words.isdisjoint(_words(own))
    )


def _own_name(name: str) -> str:
    """The attribute's name, without its path and indices."""
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
