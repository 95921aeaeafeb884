"""Each stand-in exports what its engine resolves and nothing else, and is rebuilt; a touched wheel is found out."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.standin import build, wheels
from vllm_rfork.engines.collective import cuda, nccl_library
from vllm_rfork.engines.cuda_ipc import driver

EXPORTED = {
    build.ACL: {
        "aclrtSetDevice",
        "aclrtGetCurrentContext",
        "aclrtCreateStream",
        "aclrtDestroyStream",
        "aclrtSynchronizeStream",
        "aclrtCreateEvent",
        "aclrtDestroyEvent",
        "aclrtRecordEvent",
        "aclrtSynchronizeEvent",
        "aclrtSynchronizeEventWithTimeout",
    },
    build.P2P: {
        "P2PGetRootInfo",
        "P2PCommInitRootInfo",
        "P2PCommDestroy",
        "P2PSend",
        "P2PRecv",
        "P2PGetCommAsyncError",
    },
    # Of the CUDA driver: what engines/cuda_ipc and engines/collective call, and the stand-in for NCCL.
    build.CUDA: {*driver._SIGNATURES, driver._COPY_BATCH, *cuda._SIGNATURES, "cuLaunchHostFunc"},
    build.NCCL: {*nccl_library._SIGNATURES, "ncclGetErrorString"},
}


@pytest.mark.parametrize("library", sorted(EXPORTED))
def test_exactly_the_symbols_that_the_engine_resolves_are_exported(library: str) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(build.build() / library)], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == EXPORTED[library]


def test_it_is_built_once_and_again_when_a_source_changes(tmp_path: Path) -> None:
    sources, out = tmp_path / "standin", tmp_path / "out"
    shutil.copytree(Path(build.__file__).parent, sources)
    make = ["make", "-C", str(sources), f"OUT={out}"]
    subprocess.run(make, capture_output=True, check=True, timeout=500)
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == set(EXPORTED)
    asked = [*make, "--question"]
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 0
    newer = (out / build.ACL).stat().st_mtime_ns + 10**9
    os.utime(sources / "src" / "stream.hpp", ns=(newer, newer))
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 1


def published(folder: Path, contents: bytes) -> wheels.Installed:
    """A distribution with one native file, as pip leaves it."""
    digest = hashlib.sha256(contents)
    path = "yr/engine.so"
    wheel = wheels.Wheel("some-engine", "1.0", {path: digest.hexdigest()})
    info = folder / "some_engine-1.0.dist-info"
    info.mkdir(parents=True)
    encoded = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"{path},sha256={encoded},{len(contents)}\nsome_engine-1.0.dist-info/RECORD,,\n")
    (folder / "yr").mkdir()
    (folder / path).write_bytes(contents)
    return wheels.Installed(wheel, folder, "python")


def test_the_published_wheel_is_accepted(tmp_path: Path) -> None:
    wheels.verify(published(tmp_path, b"native code"))


def test_a_changed_file_is_found_out(tmp_path: Path) -> None:
    found = published(tmp_path, b"native code")
    (tmp_path / "yr/engine.so").write_bytes(b"native Code")
    with pytest.raises(wheels.ModifiedWheel, match=r"engine\.so"):
        wheels.verify(found)


def test_a_changed_record_does_not_hide_it(tmp_path: Path) -> None:
    """Whoever changes the file can change RECORD as well; the pins are ours."""
    ours = published(tmp_path / "ours", b"native code")
    theirs = published(tmp_path / "theirs", b"native Code")
    with pytest.raises(wheels.ModifiedWheel, match="pinned"):
        wheels.verify(wheels.Installed(ours.wheel, theirs.site, "python"))


def test_a_missing_file_is_found_out(tmp_path: Path) -> None:
    found = published(tmp_path, b"native code")
    (tmp_path / "yr/engine.so").unlink()
    with pytest.raises(wheels.ModifiedWheel, match=r"engine\.so"):
        wheels.verify(found)
