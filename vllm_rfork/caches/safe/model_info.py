"""vLLM's model information: what a model class can do, which vLLM otherwise finds out in a process of its own.

The fields differ between versions of vLLM, so the receiver's own vLLM states them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from vllm_rfork.caches.safe.parsing import parsed
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.quoting import printable

MAX_INFO_NBYTES = 64 * 1024
MAX_TEXTS = 64
_HASH = re.compile(r"[0-9a-f]{32,128}\Z")
_WORD = re.compile(r"[A-Za-z0-9_./-]{0,128}\Z")

#: The content of one field: true or false, a word, words, or one of some words.
FieldKind = Literal["flag", "word", "words"] | frozenset[str]


class _ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hash: str
    modelinfo: dict[str, Any]


def checked_model_info(body: bytes, source_hash: str, fields: Mapping[str, FieldKind]) -> bytes:
    """The model information in ``body``, encoded again by this worker.

    Args:
        source_hash: of the class's source on this machine, as vLLM computes it.
        fields: all fields that this worker's vLLM has.

    Raises:
        CacheError: of another source, or with other fields or contents than this vLLM has.
    """
    info = parsed(body, _ModelInfo, "the seed's model information", MAX_INFO_NBYTES)
    if not _HASH.match(source_hash) or info.hash != source_hash:
        raise CacheError(f"the seed's model information is for source {printable(info.hash)}, here it is {source_hash}")
    if differing := sorted(set(fields) ^ set(info.modelinfo)):
        raise CacheError(f"the seed's model information has other fields: {', '.join(map(printable, differing[:8]))}")
    for name, kind in fields.items():
        if not _fits(info.modelinfo[name], kind):
            raise CacheError(f"the seed's model information has an unacceptable value for {name}")
    return msgspec.json.encode({"hash": source_hash, "modelinfo": {name: info.modelinfo[name] for name in fields}})


def stated_hash(body: bytes) -> str:
    """The hash of the source that the model information in ``body`` is for. vLLM compares it when it reads the file.

    Raises:
        CacheError: it is not model information.
    """
    return parsed(body, _ModelInfo, "the seed's model information", MAX_INFO_NBYTES).hash


def _fits(value: Any, kind: FieldKind) -> bool:
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "words":
        return isinstance(value, list) and len(value) <= MAX_TEXTS and all(_fits(each, "word") for each in value)
    if not isinstance(value, str):
        return False
    return bool(_WORD.match(value)) if kind == "word" else value in kind
