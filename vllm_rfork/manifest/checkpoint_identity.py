"""A cheap identity of a checkpoint's files: which checkpoint a seed's weights come from, as far as it can be told.

The seed key is a user's word for a checkpoint, and a wrong word makes a fork of wrong weights that every check of bytes
passes. So a seed publishes what its files are, and a receiver that has files compares. Two kinds:

- **safetensors**: all tensors' names, types and shapes, and samples of their bytes. How they are cut into files does
  not matter, nor do file names.
- **pickle** (``.bin``, ``.pt``, ``.gguf``): names and sizes of files, and samples of their bytes.

Identities of different kinds say nothing about each other. Neither paths nor times enter. Reads are bounded whatever
the checkpoint's size: every header, and at most :data:`MAX_SAMPLED` tensors or files of :data:`SAMPLE_NBYTES` twice.
Must not import torch or vLLM.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import queue
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from vllm_rfork.errors import ManifestMismatch
from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

SAFETENSORS, PICKLE = "safetensors-1", "pickle-1"

#: More files than any published checkpoint has; with more, there is no identity.
MAX_FILES = 2000
#: Bytes of all headers together: DeepSeek-V3's 91,000 tensors take 10 MB.
MAX_HEADERS_NBYTES = 64 * 1024 * 1024
#: Tensors, or files, of which bytes are read: a fork of another checkpoint differs nearly everywhere.
MAX_SAMPLED = 64
#: Bytes of one sample; one is at the beginning and one in the middle.
SAMPLE_NBYTES = 4096
#: Threads that read: on network storage each read waits for the network.
READERS = 8
#: Seconds after which a worker goes on without an identity; on local storage it takes milliseconds.
BOUND_S = 5.0


class Files(NamedTuple):
    """Files that are one checkpoint, or one part of it, in a format of its own.

    Attributes:
        form: what tells packagings apart whose names of tensors differ, such as ``sharded``; mostly empty.
        paths: none where the files are not there, or not all of them.
    """

    paths: Sequence[Path]
    form: str = ""


class _Tensor(msgspec.Struct, gc=False):
    """One entry of a safetensors header; offsets count from the header's end. ``__metadata__`` has none of these."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    nbytes: int


_NUMBER = re.compile(r"\d+")


class NoIdentity(Exception):
    """The files have no identity; the reason is the message. The checkpoint may be as good as any."""


def identify(files: Files, *, deadline: float) -> str:
    """``kind:digest`` of ``files``, such as ``safetensors-1:5f0c…`` (32 hexadecimal digits).

    Args:
        deadline: by ``time.monotonic``; looked at between reads.

    Raises:
        NoIdentity: no files, too many, not readable, malformed, or not within the deadline.
    """
    if not files.paths:
        raise NoIdentity("the files are not on this machine")
    if len(files.paths) > MAX_FILES:
        raise NoIdentity(f"{len(files.paths)} files are more than {MAX_FILES}")
    tensors = all(path.suffix == ".safetensors" for path in files.paths)
    kind = "-".join(filter(None, (files.form, SAFETENSORS if tensors else PICKLE)))
    try:
        described, places = (_of_tensors if tensors else _of_files)(files.paths, deadline)
        digest = hashlib.blake2b(msgspec.json.encode(described), digest_size=16)
        for sample in _in_parallel(_sample, places, deadline):
            digest.update(sample)
    except (OSError, ValueError, struct.error, msgspec.MsgspecError) as error:
        raise NoIdentity(f"{type(error).__name__}: {error}") from error
    return f"{kind}:{digest.hexdigest()}"


def _differences(ours: Mapping[str, str] | None, theirs: Mapping[str, str] | None) -> tuple[list[str], list[str]]:
    """What two sides' identities say of each other, part by part.

    Returns:
        Lines for the parts that are different checkpoints, and for those that cannot be compared. A part that one
        side lacks is in neither.
    """
    different: list[str] = []
    incomparable: list[str] = []
    for part, mine in (ours or {}).items():
        other = (theirs or {}).get(part)
        if other is None or other == mine:
            continue
        same_kind = other.partition(":")[0] == mine.partition(":")[0]
        (different if same_kind else incomparable).append(f"{part} {other[:80]} on the seed, {mine} on this worker")
    return different, incomparable


def compare(ours: Mapping[str, str] | None, theirs: Mapping[str, str] | None, seed: str) -> None:
    """Compare the identities of both sides' files where both have one.

    Args:
        ours, theirs: by part; None where a side has no files, or its generation publishes no identity.
        seed: ``ip:port:rank``, for the message.

    Raises:
        ManifestMismatch: the seed's weights are of another checkpoint. Another seed may have the right one.
    """
    different, incomparable = _differences(ours, theirs)
    if incomparable:
        logger.info(
            "the checkpoint of seed %s is packaged in another way and was not compared: %s",
            seed,
            "; ".join(incomparable),
        )
    if different:
        raise ManifestMismatch(
            different,
            summary=f"seed {seed} and this worker have different checkpoints under one seed key; set another model_url "
            "or model_deploy_strategy_name for one of them",
            retry_elsewhere=True,
        )


class CheckpointIdentity:
    """The identity of one load's files, part by part, worked out on a thread of its own beside the start.

    Args:
        find: the parts' files by name; runs on that thread and may block.
    """

    def __init__(self, find: Callable[[], Mapping[str, Files]]) -> None:
        self._find = find
        self._done = threading.Event()
        self._found: dict[str, str] = {}
        self._started = time.monotonic()
        threading.Thread(target=self._run, name="rfork-checkpoint", daemon=True).start()

    def wait(self) -> dict[str, str] | None:
        """The identity by part; None where there is none by :data:`BOUND_S` after the beginning."""
        if not self._done.wait(max(0.0, self._started + BOUND_S - time.monotonic())):
            logger.info(
                "the checkpoint's files were not looked at within %g s: their identity is not compared", BOUND_S
            )
            return None
        return dict(self._found) or None

    def _run(self) -> None:
        found: dict[str, str] = {}
        try:
            for part, files in self._find().items():
                try:
                    found[part] = identify(files, deadline=self._started + BOUND_S)
                except NoIdentity as reason:
                    logger.debug("the checkpoint's %s have no identity: %s", part, str(reason))
        except Exception as error:  # noqa: BLE001 - finding files runs foreign code; a load must not fail for it
            logger.info(
                "the checkpoint's files were not found (%s: %s), and are not compared", type(error).__name__, error
            )
        seconds = time.monotonic() - self._started
        if found:
            logger.info(
                "the checkpoint is %s (%.3f s)", ", ".join(f"{part} {each}" for part, each in found.items()), seconds
            )
        self._found = found
        self._done.set()


class CheckpointFiles:
    """The files of one load, and the identity of those that the weights in memory come from.

    Args:
        find: the parts' files; its arguments are sources of weights beside the main ones, as vLLM names them, and
            ``main=False`` for those alone.
    """

    def __init__(self, find: Callable[..., Mapping[str, Files]]) -> None:
        self._find = find
        self._secondary: list[Any] = []
        self._identities = [CheckpointIdentity(find)]
        self._received: tuple[dict[str, str] | None] | None = None

    def look_also_at(self, sources: Sequence[Any]) -> None:
        """A built model may name towers and heads with files of their own."""
        if sources and not self._secondary:
            named = self._secondary = list(sources)
            self._identities.append(CheckpointIdentity(lambda: self._find(named, main=False)))

    def identity(self) -> dict[str, str] | None:
        """What this worker's own files are, by part; None without files. May wait for storage, within a bound."""
        found = [each.wait() or {} for each in self._identities]
        return {part: text for each in found for part, text in each.items()} or None

    def forked_from(self, identity: dict[str, str] | None) -> None:
        """From now on the weights are the seed's, whatever lies on this machine."""
        self._received = (identity,)

    def published(self) -> dict[str, str] | None:
        """For a seed: what it was given if it forked, else what its files are, looked at again if there were none."""
        if self._received is not None:
            return self._received[0]
        found = self.identity()
        if found is None:  # loading may have downloaded them
            self._identities = [CheckpointIdentity(lambda: self._find(self._secondary))]
            found = self.identity()
        return found


def _of_tensors(paths: Sequence[Path], deadline: float) -> tuple[list[object], list[_Place]]:
    headers = list(_in_parallel(_read_header, paths, deadline))
    sizes = list(_in_parallel(_size, paths, deadline))
    tensors: dict[str, tuple[_Tensor, Path, int]] = {}
    total_nbytes = 0
    for path, (start, text), size in zip(paths, headers, sizes, strict=True):
        total_nbytes += len(text)
        if total_nbytes > MAX_HEADERS_NBYTES:
            raise NoIdentity(f"headers are larger than {MAX_HEADERS_NBYTES} bytes")
        entries = msgspec.json.decode(text, type=dict[str, _Tensor])
        entries.pop("__metadata__", None)
        if size < start + max((entry.data_offsets[1] for entry in entries.values()), default=0):
            raise NoIdentity(f"{path.name} is shorter than its header says: it may still be written")
        tensors.update((name, (entry, path, start)) for name, entry in entries.items())
        _check(deadline)
    described: list[object] = [(name, tensors[name][0].dtype, tensors[name][0].shape) for name in sorted(tensors)]
    chosen = [tensors[name] for name in _chosen(tensors)]
    return described, [
        _Place(path, start + entry.data_offsets[0], entry.data_offsets[1] - entry.data_offsets[0])
        for entry, path, start in chosen
    ]


def _of_files(paths: Sequence[Path], deadline: float) -> tuple[list[object], list[_Place]]:
    _check(deadline)
    places = {path.name: _Place(path, 0, path.stat().st_size) for path in paths}
    described: list[object] = [[name, place.nbytes] for name, place in sorted(places.items())]
    return described, [places[name] for name in _chosen(places)]


def _chosen(names: Iterable[str]) -> list[str]:
    """At most :data:`MAX_SAMPLED` of ``names``: of each kind in turn, where names that differ in numbers are one kind.

    The same names give the same choice, whatever their order.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    ordered = [heapq.nsmallest(MAX_SAMPLED, kinds[kind], key=_spread) for kind in sorted(kinds, key=_spread)]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
    return list(itertools.islice((name for name in rounds if name is not None), MAX_SAMPLED))


def _spread(name: str) -> tuple[int, str]:
    """An order that has nothing to do with what names mean, the same everywhere."""
    return zlib.crc32(name.encode()), name


def _read_header(path: Path) -> tuple[int, bytes]:
    """Where a safetensors file's data begin, and its header's JSON."""
    with path.open("rb", buffering=0) as file:
        (nbytes,) = struct.unpack("<Q", file.read(8))
        if nbytes > MAX_HEADERS_NBYTES:
            raise NoIdentity(f"the header of {path.name} says that it has {nbytes} bytes")
        text = b""
        while len(text) < nbytes:
            piece = file.read(nbytes - len(text))
            if not piece:
                raise NoIdentity(f"{path.name} ends in its header")
            text += piece
        return 8 + nbytes, text


def _size(path: Path) -> int:
    return path.stat().st_size


def _sample(place: _Place) -> bytes:
    """The place's first bytes and those in its middle."""
    descriptor = os.open(place.path, os.O_RDONLY)
    try:
        return b"".join(
            os.pread(descriptor, min(SAMPLE_NBYTES, place.nbytes - offset), place.offset + offset)
            for offset in (0, place.nbytes // 2)
        )
    finally:
        os.close(descriptor)


def _in_parallel(function: Callable[[T], R], items: Sequence[T], deadline: float) -> list[R]:
    """``function`` of each item, in order, on threads that keep no process alive: storage may hang.

    Raises:
        NoIdentity: not within the deadline.
        Exception: the first that ``function`` raised.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        todo.put(number)
    answers: queue.SimpleQueue[tuple[int, R | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while time.monotonic() < deadline:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put((number, function(items[number])))
            except Exception as error:  # noqa: BLE001 - raised again below
                answers.put((number, error))

    for _ in range(min(READERS, len(items))):
        threading.Thread(target=work, name="rfork-checkpoint-read", daemon=True).start()
    found: dict[int, R] = {}
    for _ in items:
        try:
            number, answer = answers.get(timeout=max(0.001, deadline - time.monotonic()))
        except queue.Empty:
            raise NoIdentity("the files could not be read in time") from None
        if isinstance(answer, Exception):
            raise answer
        found[number] = answer
    return [found[number] for number in range(len(items))]


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise NoIdentity("the files could not be read in time")
