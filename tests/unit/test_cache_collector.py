"""Collection of caches on a seed: by content, bounded, and only when nobody writes any more."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from vllm_rfork.caches import bounds
from vllm_rfork.caches.collector import Collected, QuietDirectory, collect, listing
from vllm_rfork.caches.manifest import Offer, decode_offer, encode_offer
from vllm_rfork.errors import CacheError

CONTENTS = {"rank_0_0/model": b"pickle", "b/c.json": b"{}", "a": b"", "large": b"x" * (3 * 1024 * 1024 + 1)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, data in CONTENTS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def collected(root: Path) -> Collected:
    return collect(root, kind="torch_aot", name="rank_0_0", identity={"torch": "2.11.0"}, seconds=3.5)


def test_files_are_described_by_their_content_and_read_in_that_order(root: Path) -> None:
    found = collected(root)
    assert [file.path for file in found.artifact.files] == ["a", "b/c.json", "large", "rank_0_0/model"]
    for file in found.artifact.files:
        assert file.sha256 == hashlib.sha256(CONTENTS[file.path]).hexdigest()
    pieces = list(found.pieces())
    assert b"".join(pieces) == b"".join(CONTENTS[file.path] for file in found.artifact.files)
    assert max(map(len, pieces)) <= bounds.PIECE_NBYTES
    assert decode_offer(encode_offer(Offer((found.artifact,)))).artifacts == (found.artifact,)


def test_temporary_files_and_locks_are_left_out(root: Path) -> None:
    for path in (
        "model.123.tmp",
        "locks/x",
        "b/lock",
        "tmp.pid_1_2/x",
        "x.lock",
        ".rfork-staging-0/x",
        "__pycache__/x",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"?")
    assert {file.path for file in collected(root).artifact.files} == set(CONTENTS)


def test_files_of_other_processes_are_left_out(root: Path) -> None:
    found = collect(root, kind="triton", name="t", identity={"a": "b"}, only=lambda parts: parts[0] == "b")
    assert [file.path for file in found.artifact.files] == ["b/c.json"]


def test_directories_of_other_processes_may_contain_anything_and_are_never_quiet(root: Path) -> None:
    now = [0.0]
    quiet = QuietDirectory(root, 3.0, only=lambda parts: parts[0] == "b", clock=lambda: now[0])
    assert not quiet.look()
    (root / "other").mkdir()
    (root / "other" / "link").symlink_to("/")
    (root / "not in the grammar!").touch()
    now[0] = 3.1
    assert quiet.look()
    found = collect(root, kind="triton", name="t", identity={"a": "b"}, only=lambda parts: parts[0] == "b")
    assert [file.path for file in found.artifact.files] == ["b/c.json"]


@pytest.mark.parametrize("special", ["link to a file", "link to a directory", "dangling link", "pipe"])
def test_what_is_not_a_regular_file_is_not_offered(root: Path, special: str) -> None:
    if special == "pipe":
        os.mkfifo(root / "pipe")
    else:
        target = {"link to a file": "/etc/passwd", "link to a directory": "/etc", "dangling link": "/nowhere"}[special]
        (root / "link").symlink_to(target)
    with pytest.raises(CacheError, match="not a regular file"):
        collected(root)


def test_a_name_that_a_receiver_would_refuse_is_not_offered(root: Path) -> None:
    (root / "with space").touch()
    with pytest.raises(CacheError, match="acceptable name"):
        collected(root)


def test_a_directory_with_very_many_names_is_left_early(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ENTRIES", 3)
    with pytest.raises(CacheError, match="more than 3 names"):
        listing(root)


@pytest.mark.parametrize("vanishing", ["a", "b"])
def test_what_vanishes_while_a_compiler_works_is_a_change_and_not_the_end(root: Path, vanishing: str) -> None:
    """A file between its name and its status, and a directory between its name and its entries."""
    quiet = QuietDirectory(root, 0.0)
    assert not quiet.look()

    def only(parts: tuple[str, ...]) -> bool:
        if parts == (vanishing,):
            path = root / vanishing
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True

    assert ("large",) in listing(root, only=only)
    assert not quiet.look()
    assert quiet.look()


def test_more_than_an_artifact_may_have_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ARTIFACT_NBYTES", 1024)
    with pytest.raises(CacheError, match="4 files and"):
        collected(root)
    monkeypatch.setattr(bounds, "MAX_FILES", 3)
    with pytest.raises(CacheError, match="4 files and"):
        collected(root)


@pytest.mark.parametrize("missing", ["directory", "files"])
def test_there_is_nothing_to_offer(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CacheError):
        collected(tmp_path / "nowhere" if missing == "directory" else tmp_path)


def change(root: Path, how: str) -> None:
    model = root / "rank_0_0" / "model"
    if how == "removed":
        model.unlink()
    elif how == "rewritten":
        model.write_bytes(b"PICKLE")
        os.utime(model, ns=(1, 1))
    elif how == "replaced":
        (root / "new").write_bytes(b"pickle")
        (root / "new").replace(model)
    elif how == "a link":
        model.rename(root / "moved")
        model.symlink_to(root / "moved")
    else:
        with model.open("ab") as file:
            file.write(b"!")


@pytest.mark.parametrize("how", ["removed", "rewritten", "replaced", "a link", "longer"])
def test_a_file_that_has_changed_since_is_not_sent(root: Path, how: str) -> None:
    found = collected(root)
    change(root, how)
    with pytest.raises(CacheError, match=r"has changed|cannot be read"):
        b"".join(found.pieces())


def test_a_directory_is_quiet_when_nothing_changes_for_long_enough(root: Path) -> None:
    now = [0.0]
    quiet = QuietDirectory(root, 3.0, clock=lambda: now[0])
    assert not quiet.look()
    now[0] = 2.9
    assert not quiet.look()
    (root / "new").touch()
    now[0] = 3.1
    assert not quiet.look()
    now[0] = 6.0
    assert not quiet.look()
    now[0] = 6.2
    assert quiet.look()
    change(root, "longer")
    assert not quiet.look()
