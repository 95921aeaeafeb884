"""Triton's own cache of kernels, carried between two directories."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cache_seeds import held
from tests.unit.test_start_up_compile import Carrier
from vllm_rfork.caches.staging import Staged
from vllm_rfork.errors import CacheError
from vllm_rfork.startup.worker_caches import _install_files
from vllm_rfork.vllm_compat.start_up import device_facts, triton_cache
from vllm_rfork.vllm_compat.start_up.listener import listen

GROUP = "kernel.json"
KEY, NEXT, EARLY, FOREIGN = (
    base64.b32encode(hashlib.sha256(name).digest()).decode().rstrip("=") for name in (b"k", b"n", b"e", b"f")
)


class Start:
    """One start of a process with Triton's directory at ``root``, as far as its cache goes."""

    def __init__(self, root: Path, seed: Carrier | None, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.carrier = Carrier(seed)
        patch.setenv("TRITON_CACHE_DIR", str(root))
        module = importlib.import_module("triton.runtime.cache")
        patch.setattr(module.FileCacheManager, "__init__", ORIGINAL)
        listen(self.carrier)  # type: ignore[arg-type]
        for _ in range(2):
            triton_cache.install()
        self.manager = module.FileCacheManager

    def kernel(self, key: str) -> dict[str, str]:
        """The files of a kernel as Triton finds them, or compiled now."""
        manager = self.manager(key)
        found = manager.get_group(GROUP)
        if found is None:
            found = {name: manager.put(f"code of {name}", name) for name in (GROUP, "kernel.cubin")}
            manager.put_group(GROUP, found)
        return dict(found)


ORIGINAL: Any = importlib.import_module("triton.runtime.cache").FileCacheManager.__init__


@pytest.fixture(autouse=True)
def nothing_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = importlib.import_module("triton.runtime.cache")
    yield
    module.FileCacheManager.__init__ = ORIGINAL
    listen(None)


def test_triton_finds_a_seeds_kernels_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Start(tmp_path / "seed", None, monkeypatch)
    first.kernel(FOREIGN)
    first = Start(tmp_path / "seed", None, monkeypatch)
    compiled = first.kernel(KEY)
    offered = first.carrier.collect().offered["triton"].artifact
    # Kernels of other processes stay where they are.
    assert {file.path for file in offered.files} == {f"{KEY}/{name}" for name in (*compiled, f"__grp__{GROUP}")}

    second = Start(tmp_path / "receiver", first.carrier, monkeypatch)
    before = set(second.root.glob("**/*"))
    found = second.manager(KEY).get_group(GROUP)
    assert before == set()
    assert found == {name: str(second.root / KEY / name) for name in compiled}
    assert Path(found["kernel.cubin"]).read_text() == "code of kernel.cubin"
    assert second.carrier.seconds == {"triton": None}


def test_kernels_are_installed_as_soon_as_they_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Start(tmp_path / "seed", None, monkeypatch)
    first.kernel(KEY)
    first.kernel(NEXT)
    second = Start(tmp_path / "receiver", Carrier(), monkeypatch)
    second.kernel(EARLY)
    second.carrier._seed = first.carrier.collect()
    second.manager(KEY)
    assert second.manager(NEXT).get_group(GROUP) is not None
    asked = []
    monkeypatch.setattr(second.carrier, "about_to_read", asked.append)
    second.manager(NEXT)
    assert asked == []


def test_kernels_of_another_host_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Start(tmp_path / "seed", None, monkeypatch)
    first.kernel(KEY)
    seed = first.carrier.collect()
    monkeypatch.setattr(triton_cache, "device_facts", lambda device: {**device_facts.device_facts(device), "libc": "0"})
    second = Start(tmp_path / "receiver", seed, monkeypatch)
    assert second.manager(KEY).get_group(GROUP) is None
    assert len(second.carrier.differences["triton"]) == 1


def test_kernels_in_inductors_directory_belong_to_its_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(tmp_path / "triton", None, monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "inductor"))
    start.kernel(KEY)
    assert start.carrier.seconds == {}


def test_a_second_start_of_a_process_takes_and_offers_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Start(tmp_path / "seed", None, monkeypatch)
    first.kernel(KEY)
    second = Start(tmp_path / "receiver", None, monkeypatch)
    second.kernel(NEXT)
    for looked in (True, False):  # a kernel that the process has loaded is not looked up again
        later = Carrier(first.carrier.collect())
        listen(later)  # type: ignore[arg-type]
        triton_cache.install()
        if looked:
            assert second.manager(KEY).get_group(GROUP) is not None
        offered = later.collect().offered["triton"].artifact
        assert {file.path.partition("/")[0] for file in offered.files} == {KEY, NEXT}


@pytest.mark.parametrize("path", ["torch_compile_cache/model", f"{KEY}/below/kernel.cubin", "kernel.cubin", "key/a"])
def test_a_seeds_kernels_stay_in_folders_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Triton's root may be shared with other caches, whose files the seed could name."""
    start = Start(tmp_path, None, monkeypatch)
    start.kernel(KEY)
    place = start.carrier.collect()._places["triton"]
    for own, installed in ((f"{NEXT}/kernel.cubin", True), (path, False)):
        made = held("triton", place.name, {own: b"of the seed's choice"})
        staged = Staged(tmp_path, made.artifact, kept_free_nbytes=0)
        staged.write(b"".join(made.pieces()))
        staged.finish()
        with contextlib.nullcontext() if installed else pytest.raises(CacheError, match="does not belong in"):
            _install_files(place, staged)
        staged.discard()
        assert (tmp_path / own).exists() is installed


def test_an_error_is_logged_once_and_triton_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(place: object) -> bool:
        raise RuntimeError("broken")

    start = Start(tmp_path, None, monkeypatch)
    monkeypatch.setattr(start.carrier, "about_to_read", broken)
    assert start.kernel(KEY)
    assert start.kernel(NEXT)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "RFork: caches: Triton's cache was left to vLLM because of RuntimeError: broken"
    ]


def test_without_triton_there_is_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton")
    with pytest.raises(ImportError, match="is not imported"):
        triton_cache.install()
