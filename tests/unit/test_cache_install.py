"""Reception and installation of caches, with hostile bytes, hostile directories, full disks and rivals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.caches import host_lock, staging
from vllm_rfork.caches.directories import new_file, opened_root
from vllm_rfork.caches.installer import Installed, install, install_file, is_there
from vllm_rfork.caches.manifest import Artifact, ArtifactFile
from vllm_rfork.caches.paths import parts_below
from vllm_rfork.caches.staging import STAGING, Staged, remove_abandoned
from vllm_rfork.errors import CacheError

CONTENTS = {"rank_0_0/model": b"pickle", "inductor_cache/ab/x.so": b"\x7fELF" * 1000, "empty": b"", "z": b"last"}
TARGET = ("torch_compile_cache", "torch_aot_compile", "f" * 64)


def artifact(contents: dict[str, bytes] = CONTENTS) -> Artifact:
    files = [ArtifactFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents.items()]
    return Artifact("torch_aot", "rank_0_0", {"torch": "2.11.0"}, tuple(files))


def staged(root: Path, contents: dict[str, bytes] = CONTENTS, **options: Any) -> Staged:
    """An artifact that has arrived as a whole."""
    arrived = Staged(root, artifact(contents), **{"kept_free_nbytes": 0, **options})
    arrived.write(b"".join(contents.values()))
    arrived.finish()
    return arrived


def present(root: Path) -> dict[str, bytes]:
    """The files below the target."""
    base = root.joinpath(*TARGET)
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def leftovers(root: Path) -> list[str]:
    return os.listdir(root / STAGING)


def test_what_was_sent_is_installed(tmp_path: Path) -> None:
    assert install(staged(tmp_path / "new root"), TARGET, last="rank_0_0/model") == Installed(4, 0)
    assert present(tmp_path / "new root") == CONTENTS
    assert leftovers(tmp_path / "new root") == []


def test_files_are_complete_once_the_disk_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        if len(synced) == len(CONTENTS):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)
    arriving.write(b"".join(CONTENTS.values()))
    with pytest.raises(CacheError, match="cannot be written"):
        arriving.finish()
    assert not arriving.complete
    assert len(synced) == len(CONTENTS)
    arriving.discard()


@pytest.mark.parametrize("size", [1, 3, 4096])
def test_pieces_may_end_anywhere(tmp_path: Path, size: int) -> None:
    body = b"".join(CONTENTS.values())
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)
    for start in range(0, len(body), size):
        arriving.write(body[start : start + size])
    arriving.finish()
    install(arriving, TARGET)
    assert present(tmp_path) == CONTENTS


def test_empty_files_at_the_end_arrive_without_a_byte(tmp_path: Path) -> None:
    contents = {"a": b"1", "b": b"", "c": b""}
    install(staged(tmp_path, contents), TARGET)
    assert present(tmp_path) == contents


def test_a_wrong_byte_is_refused(tmp_path: Path) -> None:
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)
    with pytest.raises(CacheError, match="SHA-256"):
        arriving.write(b"Pickle" + b"".join(CONTENTS.values())[6:])
    arriving.discard()
    assert leftovers(tmp_path) == []


def test_a_byte_too_many_is_refused(tmp_path: Path) -> None:
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)
    with pytest.raises(CacheError, match="more than its"):
        arriving.write(b"".join(CONTENTS.values()) + b"x")
    arriving.discard()


def test_a_byte_too_few_is_refused_and_not_installed(tmp_path: Path) -> None:
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)
    arriving.write(b"".join(CONTENTS.values())[:-1])
    with pytest.raises(CacheError, match="broke off in 'z' after 3 of 4 bytes"):
        arriving.finish()
    with pytest.raises(CacheError, match="not complete"):
        install(arriving, TARGET)
    assert present(tmp_path) == {}
    assert leftovers(tmp_path) == []


def test_an_artifact_with_a_bad_path_is_not_received(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="acceptable name"):
        Staged(tmp_path, artifact({"../outside": b""}), kept_free_nbytes=0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path.joinpath(*TARGET, "z")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert install(staged(tmp_path), TARGET) == Installed(3, 1)
    assert mine.read_bytes() == b"mine"


def _other(path: Path) -> None:
    path.write_bytes(b"mine")


def _longer(path: Path) -> None:
    path.write_bytes(CONTENTS["z"] + b"mine")


@pytest.mark.parametrize("make", [_other, _longer, os.mkfifo, os.mkdir])
def test_an_existing_file_with_other_bytes_keeps_the_cache_from_being_read(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """A start that ended too early may have left it, and names of vLLM's graphs say nothing about their content."""
    mine = tmp_path.joinpath(*TARGET, "z")
    mine.parent.mkdir(parents=True)
    make(mine)
    before = os.lstat(mine)
    with pytest.raises(CacheError, match="'z' is there already, with other bytes"):
        install(staged(tmp_path), TARGET, last="rank_0_0/model")
    assert [path for path in mine.parent.rglob("*") if not path.is_dir() or path == mine] == [mine]
    after = os.lstat(mine)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def test_an_existing_file_with_the_same_bytes_is_part_of_the_cache(tmp_path: Path) -> None:
    mine = tmp_path.joinpath(*TARGET, "z")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(CONTENTS["z"])
    assert install(staged(tmp_path), TARGET, last="rank_0_0/model") == Installed(3, 1)
    assert present(tmp_path) == CONTENTS


def test_nothing_is_installed_beside_a_cache_that_is_read_already(tmp_path: Path) -> None:
    model = tmp_path.joinpath(*TARGET, "rank_0_0", "model")
    model.parent.mkdir(parents=True)
    model.write_bytes(b"mine")
    assert is_there(tmp_path, TARGET, "rank_0_0/model")
    assert install(staged(tmp_path), TARGET, last="rank_0_0/model") == Installed(0, 4)
    assert present(tmp_path) == {"rank_0_0/model": b"mine"}


def test_a_cache_is_read_only_when_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda *names, **options: (order.append(names[1]), link(*names, **options))[1])
    install(staged(tmp_path), TARGET, last="rank_0_0/model")
    assert order[-1] == "model"
    assert len(order) == 4


def test_an_artifact_without_its_last_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="lacks 'model'"):
        install(staged(tmp_path), TARGET, last="model")
    assert present(tmp_path) == {}


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_link_in_the_way_is_not_followed(tmp_path: Path, depth: int) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    way = (*TARGET, "rank_0_0")[:depth]
    root.joinpath(*way[:-1]).mkdir(parents=True)
    root.joinpath(*way).symlink_to(outside)
    with pytest.raises(CacheError, match="cannot be installed"):
        install(staged(root), TARGET)
    assert list(outside.iterdir()) == []


def test_a_link_that_appears_meanwhile_is_not_followed_and_what_was_installed_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    link = os.link

    def linking(*names: Any, **options: Any) -> None:
        link(*names, **options)
        if names[1] == "model":
            root.joinpath(*TARGET, "inductor_cache").symlink_to(outside)

    monkeypatch.setattr(os, "link", linking)
    with pytest.raises(CacheError, match="cannot be installed"):
        install(staged(root), TARGET)
    assert list(outside.iterdir()) == []
    assert present(root) == {}
    assert leftovers(root) == []


def test_a_dangling_link_with_the_name_of_a_file_stays(tmp_path: Path) -> None:
    """Creating the file through the link would write outside."""
    outside = tmp_path / "outside"
    base = tmp_path / "root"
    base.joinpath(*TARGET).mkdir(parents=True)
    base.joinpath(*TARGET, "z").symlink_to(outside)
    assert install(staged(base), TARGET) == Installed(3, 1)
    assert not outside.exists()


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    """Operators point ~/.cache at another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    install(staged(tmp_path / "root"), TARGET)
    assert present(tmp_path / "disk") == CONTENTS


def test_a_disk_without_room_is_noticed_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="left to others"):
        Staged(tmp_path, artifact(), kept_free_nbytes=2**60)
    assert not (tmp_path / STAGING).exists()


def test_of_two_receivers_with_room_for_one_one_gives_up_and_the_other_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found room before the first byte."""

    def fstatvfs(descriptor: int) -> SimpleNamespace:
        taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        return SimpleNamespace(f_frsize=1, f_bavail=100_000 - taken)

    monkeypatch.setattr(os, "fstatvfs", fstatvfs)
    monkeypatch.setattr(staging, "_LOOKED_AFTER_NBYTES", 100)
    contents = {"large": b"x" * 10_000}
    first, second = (Staged(tmp_path, artifact(contents), kept_free_nbytes=85_000) for _ in range(2))
    for _ in range(50):
        first.write(b"x" * 100)
        second.write(b"x" * 100)
    first.write(b"x" * 100)
    with pytest.raises(CacheError, match="left to others"):
        second.write(b"x" * 100)
    second.discard()
    first.write(b"x" * 4_900)
    first.finish()
    assert install(first, TARGET) == Installed(1, 0)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arriving = Staged(tmp_path, artifact(), kept_free_nbytes=0)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CacheError, match="No space left on device"):
        arriving.write(b"".join(CONTENTS.values()))
    arriving.discard()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_may_not_be_written_is_an_error_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Root may write anywhere, so the system call is replaced."""

    def refused(*names: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(CacheError, match=os.strerror(code)):
        Staged(tmp_path, artifact(), kept_free_nbytes=0)


def test_a_root_that_is_a_file_is_an_error_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(CacheError):
        Staged(tmp_path / "root", artifact(), kept_free_nbytes=0)
    with pytest.raises(CacheError):
        is_there(tmp_path / "root", TARGET, "model")
    assert not is_there(tmp_path / "nowhere", TARGET, "model")


def test_a_file_system_without_hard_links_is_an_error_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*names: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    arrived = staged(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(CacheError, match="not permitted"):
        install(arrived, TARGET)
    assert leftovers(tmp_path) == []


def test_a_staging_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING).chmod(0o777)
    with pytest.raises(CacheError, match="other users may write"):
        Staged(tmp_path, artifact(), kept_free_nbytes=0)


def test_staged_bytes_are_private(tmp_path: Path) -> None:
    arrived = staged(tmp_path)
    assert (tmp_path / STAGING).stat().st_mode & 0o077 == 0
    arrived.discard()
    arrived.discard()
    with pytest.raises(CacheError, match="discarded"):
        install(arrived, TARGET)


def test_a_staging_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / STAGING).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="no place"):
        Staged(tmp_path / "root", artifact(), kept_free_nbytes=0)


def install_once(root: Path, barrier: Any, results: Any) -> None:
    arrived = staged(root)
    barrier.wait(30)
    results.put(install(arrived, TARGET, last="rank_0_0/model", lock_timeout_s=30.0))


def test_of_two_ranks_that_install_at_once_one_installs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=install_once, args=(tmp_path, barrier, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found = sorted((results.get(timeout=60) for _ in ranks), key=lambda each: each.new)
    for rank in ranks:
        rank.join(30)
    assert found == [Installed(0, 4), Installed(4, 0)]
    assert present(tmp_path) == CONTENTS
    assert leftovers(tmp_path) == []


def test_an_installation_waits_for_another_and_no_longer_than_its_bound(tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        root = os.open(tmp_path, os.O_RDONLY)
        with host_lock.host_lock(root, 1.0):
            held.set()
            done.wait(30)
        os.close(root)

    rival = threading.Thread(target=hold)
    rival.start()
    try:
        assert held.wait(30)
        with pytest.raises(CacheError, match="another process installs"):
            install(staged(tmp_path), TARGET, lock_timeout_s=0.0)
        assert present(tmp_path) == {}
    finally:
        done.set()
        rival.join(30)
    install(staged(tmp_path), TARGET, lock_timeout_s=0.0)


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    arrived = staged(root)
    monkeypatch.setattr(host_lock.socket, "gethostname", lambda: "host/../x")
    (root / f".rfork-lock-{os.geteuid()}-host_.._x").symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match="cannot be installed"):
        install(arrived, TARGET)
    assert not (tmp_path / "outside").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_two_users_of_one_root_do_not_keep_each_other_out() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # below tmp_path another user may not go
        Path(name).chmod(0o1777)
        root = os.open(name, os.O_RDONLY)
        with host_lock.host_lock(root, 0.0):
            pass
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.setuid(65534)
                with host_lock.host_lock(root, 0.0):
                    status = 0
            os._exit(status)
        os.close(root)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folders_of_dead_processes_go_and_others_stay(tmp_path: Path) -> None:
    old, young = Staged(tmp_path, artifact(), kept_free_nbytes=0), Staged(tmp_path, artifact(), kept_free_nbytes=0)
    old.write(b"pick")
    long_ago = time.time() - 2 * staging.ABANDONED_S
    (folder,) = [path for path in (tmp_path / STAGING).iterdir() if list(path.iterdir())]
    os.utime(folder, (long_ago, long_ago))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / STAGING / "link").symlink_to(tmp_path / "outside")
    assert remove_abandoned(tmp_path) == 1
    assert len(leftovers(tmp_path)) == 2
    assert (tmp_path / "outside" / "file").exists()
    assert remove_abandoned(tmp_path / "nowhere") == 0
    old.discard()
    young.discard()


def test_a_json_cache_is_written_once(tmp_path: Path) -> None:
    assert install_file(tmp_path / "root", ("startup_plan",), "startup_plan_0.json", b"{}")
    assert not install_file(tmp_path / "root", ("startup_plan",), "startup_plan_0.json", b"other")
    directory = tmp_path / "root" / "startup_plan"
    assert [(path.name, path.read_bytes()) for path in directory.iterdir()] == [("startup_plan_0.json", b"{}")]


def test_a_json_cache_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "startup_plan").symlink_to(tmp_path / "outside")
    with pytest.raises(CacheError, match="cannot be written"):
        install_file(tmp_path, ("startup_plan",), "plan.json", b"{}")
    with pytest.raises(CacheError, match="acceptable name"):
        install_file(tmp_path, (), "..", b"{}")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_directory_of_vllms_is_named_relative_to_its_root(tmp_path: Path) -> None:
    assert parts_below(tmp_path, tmp_path.joinpath(*TARGET)) == TARGET
    with pytest.raises(CacheError, match="not below"):
        parts_below(tmp_path / "root", tmp_path / "other")
    with pytest.raises(CacheError, match="acceptable name"):
        parts_below(tmp_path, tmp_path / "a" / ".." / ".." / "b")


def test_indexes_appear_after_the_files_that_they_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"KEY/__grp__a": b"index", "KEY/a": b"1", "KEY/b": b"2", "z": b"3"}
    order: list[str] = []
    link = os.link

    def noting(source: str, name: str, **options: Any) -> None:
        order.append(name)
        link(source, name, **options)

    monkeypatch.setattr(os, "link", noting)
    install(staged(tmp_path, contents), TARGET, last="KEY/a", indexes=["__grp__*"])
    assert order == ["b", "z", "__grp__a", "a"]


def test_a_new_file_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with opened_root(tmp_path) as top:
        for name in ("there", "link"):
            with pytest.raises(FileExistsError):
                new_file(name, top)
    assert (tmp_path / "there").read_text() == "content"
    assert not (tmp_path / "elsewhere").exists()
