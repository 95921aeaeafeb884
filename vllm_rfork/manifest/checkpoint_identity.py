"""A cheap identity of a checkpoint's files.

Users declare by the seed key which checkpoint a worker has. If that is wrong, a fork brings wrong weights, and every
verification of bytes succeeds. So a seed publishes the identity of its files, and a receiver that has files compares
it with its own. Two kinds:

- **safetensors**: names, types and shapes of all tensors, and samples of their bytes. Their division into files and the
  names of the files do not matter.
- **pickle** (``.bin``, ``.pt``, ``.gguf``): names and sizes of files, and samples of their bytes.

Identities of different kinds cannot be compared. Paths and times do not enter. Reads are bounded for any size of
checkpoint: every header, and two samples of :data:`SAMPLE_NBYTES` from at most :data:`MAX_SAMPLED` tensors or files.
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

#: More files than any published checkpoint has; a checkpoint with more has no identity.
MAX_FILES = 2000
#: Bytes of all headers together: DeepSeek-V3's 91,000 tensors take 10 MB.
MAX_HEADERS_NBYTES = 64 * 1024 * 1024
#: Sampled tensors or files: another checkpoint of the same shape differs nearly everywhere.
MAX_SAMPLED = 64
#: Bytes of one sample; one is taken at the beginning and one in the middle.
SAMPLE_NBYTES = 4096
#: Reading threads: on network storage each read waits for the network.
READERS = 8
#: Seconds after which a worker goes on without an identity; on local storage it takes milliseconds.
BOUND_S = 5.0


class Files(NamedTuple):
    """The files of one checkpoint, or of one part of it.

    Attributes:
        form: a packaging with its own names of tensors, such as ``sharded``; usually empty.
        paths: empty unless all files are on this machine.
    """

    paths: Sequence[Path]
    form: str = ""


class _Tensor(msgspec.Struct, gc=False):
    """One entry of a safetensors header; offsets count from the header's end. ``__metadata__`` has no such fields."""

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
    """The files have no identity; the text is the reason. The checkpoint may still be good."""


def identify(files: Files, *, deadline: float) -> str:
    """``kind:digest`` of ``files``, such as ``safetensors-1:5f0c…`` (32 hexadecimal digits).

    Args:
        deadline: by ``time.monotonic``; checked between reads.

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


def identities(parts: Mapping[str, Files], *, deadline: float) -> dict[str, str]:
    """The identity of every one of ``parts``, by name.

    Raises:
        NoIdentity: one of them has none; see :func:`identify`.
    """
    found = {}
    for part, files in parts.items():
        try:
            found[part] = identify(files, deadline=deadline)
        except NoIdentity as reason:
            raise NoIdentity(f"{part}: {reason}") from reason
    return found


def _differences(ours: Mapping[str, str] | None, theirs: Mapping[str, str] | None) -> tuple[list[str], list[str]]:
    """Compare two sides' identities, part by part.

    Returns:
        Lines for the parts with different checkpoints, and for those that cannot be compared. A part that one side
        lacks is in neither.
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
    """Compare the identities of both sides' files, if both have one.

    Args:
        ours, theirs: by part; None if a side has no files, or is of a version that publishes no identity.
        seed: ``ip:port:rank``, for the message.

    Raises:
        ManifestMismatch: the seed's weights come from another checkpoint. Another seed may have the right one.
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
    """The identity of one load's files, part by part, computed on a thread of its own.

    Args:
        find: returns the parts' files by name; runs on that thread and may block.
    """

    def __init__(self, find: Callable[[], Mapping[str, Files]]) -> None:
        self._find = find
        self._done = threading.Event()
        self._found: dict[str, str] = {}
        self._started = time.monotonic()
        threading.Thread(target=self._run, name="rfork-checkpoint", daemon=True).start()

    def wait(self) -> dict[str, str] | None:
        """The identity by part, if there is one within :data:`BOUND_S` seconds of the construction."""
        if not self._done.wait(max(0.0, self._started + BOUND_S - time.monotonic())):
            logger.info(
                "the checkpoint's files could not be read within %g s, so their identity is not compared", BOUND_S
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
    """The files of one load, and the identity of the checkpoint that the weights in memory come from.

    Args:
        find: returns the parts' files. Its arguments are secondary sources of weights, as vLLM names them, and
            ``main=False`` for those only.
    """

    def __init__(self, find: Callable[..., Mapping[str, Files]]) -> None:
        self._find = find
        self._secondary: list[Any] = []
        self._identities = [CheckpointIdentity(find)]
        self._received: tuple[dict[str, str] | None] | None = None

    def look_also_at(self, sources: Sequence[Any]) -> None:
        """Add the secondary sources of the built model: towers and heads with files of their own."""
        if sources and not self._secondary:
            named = self._secondary = list(sources)
            self._identities.append(CheckpointIdentity(lambda: self._find(named, main=False)))

    def found(self) -> Mapping[str, Files]:
        """The parts' files, looked for now."""
        return self._find(self._secondary)

    def identity(self) -> dict[str, str] | None:
        """The identity of this worker's files by part, if it has files. May wait for storage, within a bound."""
        found = [each.wait() or {} for each in self._identities]
        return {part: text for each in found for part, text in each.items()} or None

    def forked_from(self, identity: dict[str, str] | None) -> None:
        """Record that the weights came from a seed, whatever files this machine has."""
        self._received = (identity,)

    def published(self) -> dict[str, str] | None:
        """The identity that this worker publishes as a seed: the forked one, or else that of its files."""
        if self._received is not None:
            return self._received[0]
        found = self.identity()
        if found is None:  # loading may have downloaded the files since
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
            raise NoIdentity(f"{path.name} is shorter than its header states; it may still be written")
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
    """At most :data:`MAX_SAMPLED` of ``names``, from each kind in turn; names that differ only in numbers are one kind.

    The choice does not depend on the order of ``names``.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    ordered = [heapq.nsmallest(MAX_SAMPLED, kinds[kind], key=_spread) for kind in sorted(kinds, key=_spread)]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
    return list(itertools.islice((name for name in rounds if name is not None), MAX_SAMPLED))


def _spread(name: str) -> tuple[int, str]:
    """A sort key that is unrelated to the names' meaning and the same everywhere."""
    return zlib.crc32(name.encode()), name


def _read_header(path: Path) -> tuple[int, bytes]:
    """Offset of a safetensors file's data, and its header's JSON."""
    with path.open("rb", buffering=0) as file:
        (nbytes,) = struct.unpack("<Q", file.read(8))
        if nbytes > MAX_HEADERS_NBYTES:
            raise NoIdentity(f"the header of {path.name} claims {nbytes} bytes")
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
    """The first bytes of a place, and those in its middle."""
    descriptor = os.open(place.path, os.O_RDONLY)
    try:
        return b"".join(
            os.pread(descriptor, min(SAMPLE_NBYTES, place.nbytes - offset), place.offset + offset)
            for offset in (0, place.nbytes // 2)
        )
    finally:
        os.close(descriptor)


def _in_parallel(function: Callable[[T], R], items: Sequence[T], deadline: float) -> list[R]:
    """Apply ``function`` to each item, in order, on daemon threads: storage may hang.

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
