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

from vllm_rfork.model.traversal import Plain
from vllm_rfork.vllm_compat.model_rules import is_scratch_object

#: Words of an attribute's name and why its value does not count, whatever it is.
LEFT_OUT = {
    word: reason
    for reason, words in {
        "where a process runs and whom it talks to": (
            "addr address addresses host hostname ip port ports url uri endpoint pid ppid tid uid uuid id ids "
            "rank ranks device devices gpu gpus npu numa node cpu cpus core cores thread threads sm sms"
        ),
        "how text and media become inputs": "tokenizer processor video videos pruning pruned",
        "where files lie": "path paths dir dirs file files filename folder root",
        "handles, addresses and counters": (
            "handle handles ptr pointer fd stream event count counter nonce hash version"
        ),
        "times and random numbers": "time times timestamp created started now seed random generator",
        "sized by requests, caches and batches": (
            "max batch batched seqs seq token tokens request requests budget chunk chunked cache cached caches kv "
            "memory mem utilization workspace scratch buffer buffers spec speculative"
        ),
        "graphs, adapters and observation": (
            "compile compiled compilation eager graph graphs cudagraph capture captured guards bytecode lora loras "
            "adapter adapters nvtx trace tracing profile profiling profiler debug log logger logging stats metrics "
            "verbose warm warmed warmup jit autotune autotuned tuned tuning initialized"
        ),
    }.items()
    for word in words.split()
}
#: The same for whole names.
LEFT_OUT_NAMES = {
    "block_size": "of the KV cache",
    "kernel_block_size": "of the KV cache",
    "prefix": "a name of the module, which the value's own name has",
    "layer_name": "a name of the module, which the value's own name has",
}
#: In the checkpoint layout, where receivers post-process for themselves: which kernel will be used.
KERNEL_WORDS = {
    word: "chosen with the kernel"
    for words in (
        "use uses used enable enabled support supports supported direct opaque custom backend impl implementation",
        "allow allows eligible capable gemm rocm cuda cublas kernel kernels attn attention fused fuse",
        "quant quantized quantization scale scales method format dtype",
    )
    for word in words.split()
}

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
_PACKAGES = ("vllm", "vllm_ascend")
#: How deep helpers' classes are looked for: a quantization method's kernel is two steps from its layer.
_DEPTH = 2


def marks_of(model: Any, state: Mapping[str, Plain], *, kernels: bool) -> dict[str, str]:
    """What counts of how ``model`` was built: name → value or digest; layers that only differ by number are one name.

    Args:
        model: a module, not loaded yet.
        state: its plain values.
        kernels: whether the choice of kernels counts: where post-processed bytes are passed on.
    """
    modules = {name for name, _ in model.named_modules()}
    host = socket.gethostname()
    found = ((name, _text(name, value, host)) for name, value in state.items())
    counted = {name: text for name, text in found if text and _counts(name) and (kernels or _structural(name, modules))}
    if kernels:
        counted.update(_classes(model))
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


def _counts(name: str) -> bool:
    names = {_own_name(name), *_KEY.findall(name.removesuffix(_MEMBER).rpartition("].")[2])}
    return names.isdisjoint(LEFT_OUT_NAMES) and LEFT_OUT.keys().isdisjoint(set().union(*map(_words, names)))


def _structural(name: str, modules: set[str]) -> bool:
    """Whether this is a plain value of a registered module's own that tells no kernel."""
    own = _own_name(name)
    return (
        not name.endswith(_MEMBER)
        and _IN_CONTAINER.sub("", name).rpartition(".")[0] in modules
        and KERNEL_WORDS.keys().isdisjoint(_words(own))
    )


def _own_name(name: str) -> str:
    """The attribute's name, without those of what it is in and the places in it."""
    return _IN_CONTAINER.sub("", name).removesuffix(_MEMBER).rpartition(".")[2]


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


def _classes(model: Any) -> Iterator[tuple[str, str]]:
    """Classes of vLLM's helpers, which are kernels and what chooses them, near each module."""
    for name, module in model.named_modules():
        yield from _helpers(module, name, _DEPTH)


def _helpers(holder: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    for key, value in sorted(getattr(holder, "__dict__", {}).items()):
        kind = type(value)
        if kind.__module__.partition(".")[0] not in _PACKAGES or hasattr(value, "named_modules"):
            continue
        if not _counts(key) or kind.__name__.endswith("Config") or hasattr(kind, "__members__"):
            continue
        if is_scratch_object(value):
            continue
        name = f"{prefix}.{key}" if prefix else key
        yield f"{name}{_CLASS}", kind.__qualname__
        if depth > 1:
            yield from _helpers(value, name, depth - 1)
