"""The files that vLLM would load a model from, if they are on this machine. Downloads nothing.

Patterns are those of vLLM's loaders (read in 0.32: ``DefaultModelLoader._prepare_weights``, ``ShardedStateLoader``).
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_rfork.manifest.checkpoint_identity import Files
from vllm_rfork.vllm_compat.worker_identity import is_draft

#: Name of a checkpoint's main part; other parts are named after their folders or files.
WEIGHTS = "weights"

#: Formats whose weights are not files of the model's folder.
NOT_FILES = frozenset({"dummy", "tensorizer"})

_SHARDED = ("model-rank-*-part-*.safetensors", "model-pp-*-tp-*-part-*.safetensors")
_PATTERNS: Mapping[str, tuple[str, ...]] = {"pt": ("*.pt",), "npcache": ("*.bin",), "gguf": ("*.gguf",)}
_ANY = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: Files of training, which vLLM skips, too.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
#: One file of several.
_SHARD = re.compile(r"-[0-9]+-of-(?P<all>[0-9]+)(?=\.)")
#: A folder in a hub's cache, with the repository's name in its path.
_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/?$")
#: A revision of a hub's repository that never changes.
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(NamedTuple):
    """The place that a configuration names for a model's weights.

    Attributes:
        name: a path, a repository of a hub, or a URL.
        revision: of the repository; None for the newest.
        download_dir: of downloads; None for the hub's own.
    """

    name: str
    revision: str | None
    download_dir: str | None

    def __str__(self) -> str:
        more = {"revision": self.revision, "download_dir": self.download_dir}
        return " ".join([self.name, *(f"{name}={value}" for name, value in more.items() if value is not None)])


def files_of(
    model_config: Any, load_config: Any, load_format: str, secondary: Sequence[Any] = (), *, main: bool = True
) -> dict[str, Files]:
    """The parts of a model's checkpoint and their files.

    Args:
        load_format: the fallback's.
        secondary: :func:`secondary_sources` of the built model.
        main: False for the secondary parts only.
    """
    if load_format in NOT_FILES:
        return {}
    folder = local_folder(*source_of(model_config, load_config)) if main else None
    parts: dict[str, Files] = {}
    if folder is not None:
        parts[WEIGHTS] = weight_files(folder, load_format)
        for module in _dense_modules(folder):
            parts[module] = weight_files(folder / module, "auto")
    for source in secondary:
        place = local_folder(source.model_or_path, source.revision, load_config.download_dir)
        if place is None:
            continue
        if getattr(source, "subfolder", None):
            place /= source.subfolder
        patterns = tuple(source.allow_patterns_overrides or ())
        parts[str(source.prefix or source.subfolder or "secondary")] = (
            Files(_matching(place, patterns)) if patterns else weight_files(place, "auto")
        )
    return parts


def source_of(model_config: Any, load_config: Any) -> Source:
    """The place of a model's main part."""
    name = getattr(model_config, "model_weights", "") or model_config.model
    return Source(name, model_config.revision, load_config.download_dir)


def elsewhere(source: Source) -> str | None:
    """The place outside this machine that may have other weights of ``source`` by now; None if there is none.

    vLLM looks for a newer commit in every load from a hub, unless it is offline; ModelScope's as well.
    """
    if "://" in source.name:
        return "a URL"
    if os.path.exists(source.name) or os.path.isabs(source.name) or _COMMIT.fullmatch(source.revision or ""):
        return None
    from huggingface_hub import constants

    return None if constants.HF_HUB_OFFLINE else "a hub's repository without a commit"


def stamps_of(parts: Mapping[str, Files]) -> frozenset[tuple[str, str, int, int, int, int]]:
    """Part, path, size, two times in ns and inode of each file: others mean that files were changed.

    The times are those of the last change of the content, which a writer can set, and of the inode, which it cannot.

    Raises:
        OSError: a file cannot be looked at.
    """
    found = set()
    for part, files in parts.items():
        for path in files.paths:
            status = path.stat()
            found.add((part, str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return frozenset(found)


def secondary_sources(model: Any) -> list[Any]:
    """The sources of a built model's towers and heads that have files of their own, as :func:`files_of` takes them."""
    return list(getattr(model, "secondary_weights", None) or ())


def draft_name(vllm_config: Any, model_config: Any) -> str | None:
    """The repository of a draft or EAGLE model; None for a target, and for a folder that does not name one.

    ``model_url`` names the target and its MTP layers. Drafts in folders are compared by their files.
    """
    if not is_draft(vllm_config, model_config):
        return None
    name = str(model_config.model)
    target = getattr(getattr(vllm_config, "speculative_config", None), "target_model_config", None)
    if target is not None and target.model == name:
        return None
    if found := _SNAPSHOT.search(name):
        return f"{found['owner']}/{found['name']}"
    return None if os.path.isabs(name) or os.path.exists(name) or "://" in name else name


def local_folder(name: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The local folder of a model, given as a path or as a repository of a hub; None if there is none."""
    if os.path.exists(name):
        return Path(name)
    if os.path.isabs(name) or "://" in name:
        return None
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() == "true":  # as vLLM reads it
        hub: Any = importlib.import_module("modelscope.hub.snapshot_download")
        found = hub.snapshot_download(model_id=name, cache_dir=download_dir, local_files_only=True, revision=revision)
        return Path(found)
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def weight_files(folder: Path, load_format: str) -> Files:
    """The weight files in ``folder`` for a load format; none if an index names missing files."""
    if folder.is_file():
        return Files([folder])
    if load_format in ("sharded_state", "runai_streamer_sharded"):
        return Files(_matching(folder, _SHARDED), "sharded")
    consolidated = _matching(folder, ("consolidated*.safetensors",))
    if load_format == "mistral" or (load_format == "auto" and consolidated):
        return Files(consolidated, "mistral")
    for pattern in _PATTERNS.get(load_format, _ANY):
        found = [path for path in _matching(folder, (pattern,)) if path not in consolidated]
        if found:
            return Files(_by_index(folder, found))
    return Files([])


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    names = sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
    return [
        folder / name
        for name in names
        if name not in _NOT_WEIGHTS and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _by_index(folder: Path, found: list[Path]) -> list[Path]:
    """The files that the checkpoint's index names; none if one is missing, as during a download.

    A download may write the index last, so without an index the numbers in the names decide.
    """
    index = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
    path = folder / index.get(found[0].suffix, "")
    if not path.is_file():
        return found if _all_of_them(found) else []
    named = {str(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
    there = [file for file in found if file.name in named]
    return there if len(there) == len(named) else []


def _all_of_them(files: Sequence[Path]) -> bool:
    """True unless a file is missing whose existence other names imply, as ``model-00001-of-00004`` does."""
    there: Counter[tuple[str, str]] = Counter()
    for file in files:
        if found := _SHARD.search(file.name):
            there[file.name[: found.start()], found["all"]] += 1
    return all(count >= int(number) for (_, number), count in there.items())


def _dense_modules(folder: Path) -> list[str]:
    """Folders of a Sentence-Transformers model's modules, which vLLM loads as projections after the model."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = json.loads(path.read_bytes())
    listed = modules.get("modules", []) if isinstance(modules, dict) else modules
    names = [str(module.get("path") or "") for module in listed if isinstance(module, dict)]
    return [name for name in names if name and ".." not in name and not os.path.isabs(name)]
