"""A worker's values: the same in memory and in files, bounded, and harmless if a directory is not as it should be."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.fork.stage_times import STAGES
from vllm_rfork.messages import CacheResults
from vllm_rfork.messages.lanes import LANES, OTHER
from vllm_rfork.metrics import families, files, front_end, worker
from vllm_rfork.metrics.files import ValueFiles
from vllm_rfork.metrics.front_end import OWN_DIRECTORY, VLLMS_DIRECTORY
from vllm_rfork.metrics.values import Values
from vllm_rfork.seed_service import MAX_METRICS_NBYTES


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has reported nothing, without a directory."""
    for variable in (OWN_DIRECTORY, VLLMS_DIRECTORY):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(worker._Present, "process", None)
    monkeypatch.setattr(worker._Present, "failed", False)
    yield
    if worker._Present.process is not None:
        worker._Present.process.close()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(OWN_DIRECTORY, str(tmp_path))
    return tmp_path


def report_everything() -> None:
    """Every series that a worker can have."""
    worker.started(version="0.1.0", vllm_version="0.32.0+cpu", torch_version="2.13.0+cpu", device="cpu")
    lanes = [*(lane for of_engine in LANES.values() for lane in of_engine), *(f"{name}/new" for name in LANES), "new"]
    for source, lane in itertools.product((families.SEED, families.MEMORY, families.STORAGE), ["", *lanes]):
        worker.loaded(source, nbytes=70_000_000_000, seconds=3.25, lane=lane)
        worker.load_failed(source, lane)
    for reason in (*families.REASONS, "another"):
        worker.fell_back(reason)
    for stage in (*STAGES, OTHER):
        worker.stage_ended(stage, 0.125)
    for kind, result in itertools.product(
        (*LEVELS, "new"), ("hit", "none", "late", "trust", "identity", "refused", "")
    ):
        worker.caches(CacheResults({kind: result}, 1.5))
    worker.served(3, 10**15)
    worker.saved(12.5)
    worker.seed_state("serving")


def samples(metrics: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found: list[Metric] = list(metrics)
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for metric in found for each in metric.samples}


def test_the_files_contain_what_the_page_shows(directory: Path) -> None:
    """With every series that there can be: they fit into a file and into an answer of the seed service."""
    report_everything()
    shown = samples(worker._process().values.collect())
    assert samples(MultiProcessCollector(None, str(directory)).collect()) == shown
    assert len(shown) > 300
    assert shown["rfork_stage_seconds_bucket", (("le", "0.25"), ("stage", "read"))] == 1.0
    assert shown["rfork_stage_seconds_bucket", (("le", "0.1"), ("stage", "read"))] == 0.0
    assert shown["rfork_stage_seconds_count", (("stage", "read"),)] == 1.0
    assert {path.stat().st_size for path in directory.iterdir()} == {files.FILE_NBYTES}, "no file has grown"
    assert 10_000 < len(worker.page()) < MAX_METRICS_NBYTES / 2


def test_labels_are_from_closed_lists() -> None:
    report_everything()
    before = samples(worker._process().values.collect()).keys()
    worker.loaded("seed", nbytes=1, seconds=1, lane="10.0.0.1/secret")
    worker.fell_back("/models/secret")
    worker.caches(CacheResults({"secret": "secret"}))
    assert samples(worker._process().values.collect()).keys() == before


def test_series_of_alerts_begin_at_zero_and_exactly_one_state_is_one() -> None:
    shown = samples(worker._process().values.collect())
    assert {labels[0][1] for name, labels in shown if name == "rfork_fallbacks_total"} == families.REASONS
    failed = (("engine", "none"), ("lane", "none"), ("outcome", "failed"))
    for source in ("seed", "storage"):
        assert shown["rfork_loads_total", (*failed, ("source", source))] == 0.0
    for state in families.SEED_STATES:
        worker.seed_state(state)
        shown = samples(worker._process().values.collect())
        assert {each: shown["rfork_seed_state", (("state", each),)] for each in families.SEED_STATES} == {
            each: float(each == state) for each in families.SEED_STATES
        }


def test_a_series_that_does_not_fit_is_in_memory_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows on a full disk would end the process when it is written to."""
    monkeypatch.setattr(files, "FILE_NBYTES", 8192)
    report_everything()
    there = samples(MultiProcessCollector(None, str(directory)).collect())
    assert {path.stat().st_size for path in directory.iterdir()} == {8192}
    loads = {key: value for key, value in samples(worker._process().values.collect()).items() if "_loads_" in key[0]}
    assert 5 < len(there.keys() & loads.keys()) < len(loads)
    assert all(there[key] == loads[key] for key in there.keys() & loads.keys())


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("obstacle", ["full", "read-only"])
def test_a_metric_never_fails_a_start(
    obstacle: str, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING, nothing left on the disk that a reader could fail on, and the seed service's page."""
    if obstacle == "full":
        monkeypatch.setattr(files.os, "posix_fallocate", no_space)
    else:
        monkeypatch.setenv(OWN_DIRECTORY, "/proc/self/fdinfo")  # nobody can make a file there, root included
    report_everything()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "which its seed service still shows" in caplog.text
    assert list(directory.iterdir()) == []
    assert b"rfork_served_forks_total 3.0" in worker.page()


def test_a_file_that_cannot_be_written_any_more_costs_one_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker.fell_back("busy")
    monkeypatch.setattr(ValueFiles, "write", no_space)
    report_everything()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert b'rfork_fallbacks_total{reason="busy"} 2.0' in worker.page()


def test_a_report_that_fails_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Values, "add", no_space)
    worker.served(1, 1)
    worker.fell_back("busy")
    assert [record.message for record in caplog.records] == [
        "RFork: metrics are incomplete because of OSError: [Errno 28] No space left on device"
    ]


def test_a_directory_that_is_not_there_is_another_hosts(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray copies the environment to other hosts."""
    monkeypatch.setenv(OWN_DIRECTORY, str(directory / "elsewhere"))
    report_everything()
    assert caplog.records == []


def test_vllms_own_directory_is_preferred(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllms = tmp_path_factory.mktemp("vllm")
    monkeypatch.setenv(VLLMS_DIRECTORY, str(vllms))
    monkeypatch.setattr(front_end._Shown, "tried", False)  # a test of vLLM may have been here before
    worker.fell_back("busy")
    assert list(directory.iterdir()) == []
    assert len(list(vllms.iterdir())) == 4
    front_end.show_workers()
    assert not front_end._Shown.tried, "vLLM's collector reads that directory"


def test_an_earlier_processs_file_of_the_same_number_is_emptied(directory: Path) -> None:
    worker.fell_back("busy")
    worker._process().close()
    worker._Present.process = None
    worker.fell_back("busy")
    shown = samples(MultiProcessCollector(None, str(directory)).collect())
    assert shown["rfork_fallbacks_total", (("reason", "busy"),)] == 1.0


def test_names_and_texts_are_as_prometheus_wants_them() -> None:
    report_everything()
    page = worker.page().decode()
    for family in families.FAMILIES:
        assert f"# TYPE {family.name} {family.kind}" in page
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.help[0].isupper() or family.help[0].isdigit()
        assert not family.help.endswith(".")
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is missing (Debian: apt-get install prometheus)"
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


#: The parent's locks are held while it forks, as another thread could hold them.
FORKS = """
import os, signal
from vllm_rfork.metrics import worker

worker.served(1, 1)
with worker._Present.lock, worker._Present.process.values._lock:
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends a child that waits
        worker.served(2, 2)
        os._exit(0 if b"rfork_served_forks_total 2.0" in worker.page() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True)


def test_a_fork_that_took_longer_than_storage_saves_nothing() -> None:
    worker.saved(2.0)
    worker.saved(-1.0)
    assert b"rfork_saved_seconds_total 2.0" in worker.page()


def test_gauges_of_ended_workers_are_removed_by_the_next_one(directory: Path) -> None:
    """vLLM's collector shows every file of its directory, and this package's names are not those that it removes."""
    gone, alive = 2**30, os.getppid()
    kept = [f"gauge_livesum_rfork-{alive}.db", f"gauge_livesum_{gone}.db", f"counter_rfork-{gone}.db"]
    for name in (*kept, f"gauge_livesum_rfork-{gone}.db"):
        (directory / name).touch()
    worker.seed_state("serving")
    found = {path.name for path in directory.iterdir()}
    assert found - {path for path in found if f"rfork-{os.getpid()}" in path} == set(kept)
