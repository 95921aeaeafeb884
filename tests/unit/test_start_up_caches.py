"""The caches of a start: fetched in the background, installed at the hooks, reported, and passed on."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import pytest

from tests.hanging_names import hanging_names
from tests.unit.cache_seeds import held, offered
from tests.unit.compiling_vllm import Vllm, compiled_forwards
from vllm_rfork.caches import staging
from vllm_rfork.caches.collector import QUIET_S
from vllm_rfork.caches.manifest import LEVELS, Artifact, ArtifactFile, Offer
from vllm_rfork.caches.offered import Offered
from vllm_rfork.caches.safe.startup_plan import CarriedPlan, DeviceMemory, decode_plan, encode_plan
from vllm_rfork.config import parse_config
from vllm_rfork.errors import CacheError, SeedBusy, SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.seeding.manager import SeedManager
from vllm_rfork.startup import collecting, fetch, offers, report
from vllm_rfork.startup import worker_caches as worker_caches_module
from vllm_rfork.startup.arrivals import Arrivals, Body, Missed
from vllm_rfork.startup.settings import ORDER, CacheSettings
from vllm_rfork.startup.worker_caches import WorkerCaches, worker_caches
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, JsonPlace, listen, listener
from vllm_rfork.vllm_compat.start_up.roots import cache_root

SEED = SeedAddress("10.0.0.7", 4711, 0)
CODE = Options(token="t", ca_file="ca.pem", seed_tls="require")
FILES = {"rank_0_0/model": b"compiled", "kernels/a.so": b"\x7fELF" * 100}
PLAN = CarriedPlan(40 << 30, 1 << 30, DeviceMemory(80 << 30, 79 << 30, 72 << 30, 15 << 30), {"world": "1"})


class Trusting(Credentials):
    """Credentials whose files need not exist."""

    def __init__(self, options: Options) -> None:
        super().__init__(Options(token=options.token))
        self.options = options


class FakeSeed:
    """The client of a seed that is in the same process."""

    def __init__(self, offered: Offered | None) -> None:
        self.offered = offered
        self.asked: list[str] = []
        self.listed = threading.Event()
        self.before: Callable[[Artifact], None] = lambda artifact: None
        self.changed: Callable[[bytes], bytes] = lambda piece: piece

    def __call__(self, **arguments: Any) -> FakeSeed:
        return self

    async def offer(self, seed: SeedAddress, seed_key: str) -> Offer | None:
        self.listed.set()
        return None if self.offered is None else self.offered.offer(code=True)

    async def fetch(self, seed: SeedAddress, seed_key: str, artifact: Artifact, sink: Any, *, timeout_s: float) -> None:
        assert self.offered is not None
        self.asked.append(artifact.kind)
        self.before(artifact)
        found = self.offered.find(artifact.kind, artifact.name, code=True)
        assert found is not None
        for piece in found.pieces():
            sink(self.changed(piece))


def settings(level: str = "code", options: Options = CODE, *, seed: bool = True) -> CacheSettings:
    return CacheSettings(level, seed, Trusting(options), 2.0)  # type: ignore[arg-type]


def code_place(root: Path, folder: str, **changed: Any) -> CachePlace:
    given: dict[str, Any] = {"identity": {"torch": "2.11.0", "model_config": "d1"}, "last": "rank_0_0/model"}
    return CachePlace("torch_aot", "rank_0_0", root=root, directory=("aot", folder), **given | changed)


def table_place(root: Path, check: Callable[[bytes], bytes] = bytes) -> JsonPlace:
    return JsonPlace("autotune_table", "rank0", {"flashinfer": "0.6"}, root, ("tables",), "t.json", check)


def plan_place(root: Path) -> JsonPlace:
    return JsonPlace("startup_plan", "rank0", {"world": "1"}, root, ("startup_plan",), "p.json", _checked_plan)


def _checked_plan(body: bytes) -> bytes:
    return encode_plan(decode_plan(body))


def written(place: CachePlace | JsonPlace) -> CachePlace | JsonPlace:
    """``place`` with files in it, as vLLM would have written them."""
    directory = place.root.joinpath(*place.directory)
    files = {place.file: b"{}"} if isinstance(place, JsonPlace) else FILES
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return place


def worker(root: Path, carried: CacheSettings | None = None) -> WorkerCaches:
    return WorkerCaches(carried or settings(), lambda kind: root)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(collecting, "QuietDirectory", Quiet)
    monkeypatch.setattr(fetch, "BUSY_PAUSE_S", 0.0)
    yield
    offers.begin(None, expected=False)
    report.announce(report.CacheResults())


class Quiet:
    """A directory in which nothing happens any more."""

    def __init__(self, root: Path, **arguments: Any) -> None:
        self.root = root

    def look(self) -> bool:
        if not self.root.is_dir():
            raise CacheError(f"{self.root} cannot be read")
        return True


def offered_by(caches: WorkerCaches) -> Offered:
    """The offer of a worker after its warm-up."""
    caches.warm()
    deadline = time.monotonic() + 10
    while (present := offers.current()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return present


def first_seed(root: Path) -> FakeSeed:
    """A worker that has compiled and measured everything itself, as a seed."""
    caches = worker(root)
    caches.explain({"model_config.max_model_len": "8192"})
    caches.produced(written(code_place(root, "seeds-folder")), 12.5)
    caches.produced(written(table_place(root)), 3.0)
    caches.produced(plan_place(root), 2.0, encode_plan(PLAN))
    return FakeSeed(offered_by(caches))


def receiver(
    root: Path, seed: FakeSeed, monkeypatch: pytest.MonkeyPatch, carried: CacheSettings | None = None, wait: bool = True
) -> WorkerCaches:
    """A worker that has fetched what the seed has."""
    monkeypatch.setattr(fetch, "SeedCaches", seed)
    caches = worker(root, carried)
    caches.seed_known(SEED, "key")
    if wait:
        settle(caches)
    return caches


def settle(caches: WorkerCaches) -> None:
    """Wait until nothing more arrives."""
    assert caches._fetch is not None
    assert caches._fetch.wait(10)


def test_a_receiver_installs_under_its_own_name_and_passes_it_on_in_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed = first_seed(tmp_path / "0")
    counted: list[object] = []
    monkeypatch.setattr(metrics, "caches", counted.append)
    for number in (1, 2):
        root = tmp_path / str(number)
        with caplog.at_level(logging.INFO):
            caches = receiver(root, seed, monkeypatch)
            aot, table = code_place(root, f"folder-{number}"), table_place(root)
            assert caches.about_to_read(aot)
            assert caches.about_to_read(table)
            assert caches.about_to_read(plan_place(root))
            caches.produced(plan_place(root), None, encode_plan(PLAN))
            for place, seconds in ((aot, 1.5), (table, None)):
                caches.outcome(place.kind, place.name, used=True, seconds=seconds)
                caches.produced(place, None)
            caches.outcome("startup_plan", "rank0", used=True)
            seed = FakeSeed(offered_by(caches))
        assert {str(path): (root / "aot" / f"folder-{number}" / path).read_bytes() for path in FILES} == FILES
        assert (root / "tables" / "t.json").read_bytes() == b"{}"
        assert "torch_aot used (11.0 s saved)" in caplog.text
        assert "saved about 16.0 s" in caplog.text
        assert report.announced("key") == "torch_aot=hit,autotune_table=hit,startup_plan=hit;saved=16"
        caplog.clear()
    assert list(map(str, counted)) == [report.announced("key")] * 2
    assert seed.offered is not None
    assert {each.artifact.kind: each.artifact.seconds for each in seed.offered.artifacts} == {
        "startup_plan": 2.0,
        "autotune_table": 3.0,
        "torch_aot": 12.5,
    }


def test_a_miss_names_the_fact_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    caches.explain({"model_config.max_model_len": "4096", "cache_config.block_size": "16"})
    place = code_place(tmp_path / "1", "own", identity={"torch": "2.11.0", "model_config": "d2"})
    assert not caches.about_to_read(place)
    assert not (tmp_path / "1" / "aot").exists()
    with caplog.at_level(logging.INFO):
        caches.warm()
    assert "missed torch_aot (identity: max_model_len: 4096 here, 8192 on 1 seed)" in caplog.text
    assert report.announced("key") == "torch_aot=miss:identity"


def test_a_cache_that_is_late_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed, on_its_way = first_seed(tmp_path / "0"), threading.Event()
    began = threading.Event()

    def before(artifact: Artifact) -> None:
        began.set()
        on_its_way.wait(10)

    seed.before = before
    caches = receiver(tmp_path / "1", seed, monkeypatch, wait=False)
    assert began.wait(10)
    assert not caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert not caches.about_to_read(plan_place(tmp_path / "1"))
    with caplog.at_level(logging.INFO):
        caches.warm()  # while the transfer hangs
    on_its_way.set()
    settle(caches)
    assert "missed torch_aot (late), startup_plan (late)" in caplog.text
    assert seed.asked == ["startup_plan"]
    assert not (tmp_path / "1").exists() or os.listdir(tmp_path / "1" / staging.STAGING) == []


def test_a_cache_that_is_asked_for_again_once_it_has_arrived_is_not_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed, on_its_way = first_seed(tmp_path / "0"), threading.Event()
    seed.before = lambda artifact: on_its_way.wait(10)
    caches = receiver(tmp_path / "1", seed, monkeypatch, wait=False)
    place = code_place(tmp_path / "1", "own")
    assert not caches.about_to_read(place)
    on_its_way.set()
    settle(caches)
    assert caches.about_to_read(place)
    with caplog.at_level(logging.INFO):
        caches.warm()
    assert "missed" not in caplog.text


def test_a_kernel_that_was_late_and_then_differs_is_reported_with_the_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, on_its_way = FakeSeed(offered(held("triton", "kernels", {"KEY/a.cubin": b"x"}))), threading.Event()
    seed.before = lambda artifact: on_its_way.wait(10)
    caches = receiver(tmp_path, seed, monkeypatch, wait=False)
    place = CachePlace("triton", "kernels", {"vllm": "0.32.0"}, tmp_path, ())
    assert not caches.about_to_read(place)  # Triton asks with each kernel
    on_its_way.set()
    settle(caches)
    assert not caches.about_to_read(place)
    assert not caches.about_to_read(place)  # it has been taken by now, which says nothing new
    caches.warm()
    assert report.announced("key") == "triton=miss:identity"


def test_a_list_that_is_malformed_is_refused_and_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(FakeSeed):
        async def offer(self, seed: SeedAddress, seed_key: str) -> Offer | None:
            raise CacheError("the seed's list of caches cannot be read")

    caches = receiver(tmp_path, Liar(None), monkeypatch)
    assert not caches.about_to_read(code_place(tmp_path, "own"))
    caches.warm()
    assert report.announced("key") == "torch_aot=miss:refused"


def test_a_seed_that_is_not_ready_is_asked_until_warm_up_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CACHES_PAUSE_S", 60.0)
    seed = FakeSeed(None)
    caches = receiver(tmp_path, seed, monkeypatch, wait=False)
    assert seed.listed.wait(10)
    assert not caches.about_to_read(code_place(tmp_path, "own"))
    caches.warm()
    settle(caches)  # it does not wait for the next question
    assert report.announced("key") == "torch_aot=miss:late"


def test_a_start_is_reported_by_the_seed_of_the_load_that_took_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model is a second seed of the same process, and the planner would count the report twice."""
    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    caches.seed_known(SEED, "key$draft")
    assert caches.about_to_read(code_place(tmp_path / "1", "own"))
    caches.warm()
    assert report.announced("key") == "torch_aot=hit"
    assert report.announced("key$draft") == ""


def _dead(artifact: Artifact) -> None:
    raise SeedError("seed 10.0.0.7:4711:0 is gone")


def _changed(piece: bytes) -> bytes:
    return bytes([piece[0] ^ 1]) + piece[1:]


@pytest.mark.parametrize(
    ("before", "changed", "reason"),
    [
        (_dead, bytes, "late"),
        (lambda artifact: None, _changed, "refused"),
        (lambda artifact: None, lambda piece: piece + b"more", "refused"),
        (lambda artifact: None, lambda piece: piece[:-1], "refused"),
    ],
    ids=["dead", "wrong-hash", "too-long", "too-short"],
)
def test_what_arrives_wrong_is_not_used(
    before: Callable[[Artifact], None],
    changed: Callable[[bytes], bytes],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed = first_seed(tmp_path / "0")
    seed.before, seed.changed = before, changed
    caches = receiver(tmp_path / "1", seed, monkeypatch)
    assert not caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert not caches.about_to_read(table_place(tmp_path / "1"))
    assert not caches.about_to_read(plan_place(tmp_path / "1"))
    caches.warm()
    assert set(report.announced("key").partition(";")[0].split(",")) == {
        f"{kind}=miss:{reason}" for kind in ("torch_aot", "autotune_table", "startup_plan")
    }
    assert not list((tmp_path / "1").rglob("*.json"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_directory_that_takes_no_files_costs_the_cache(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed = first_seed(tmp_path / "0")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "1").mkdir()
    monkeypatch.setattr(os, "mkdir", refuse)
    caches = receiver(tmp_path / "1", seed, monkeypatch)
    assert not caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert not caches.about_to_read(table_place(tmp_path / "1"))
    with caplog.at_level(logging.INFO):
        caches.warm()
    assert f"refused: no place for torch_aot rank_0_0 in {tmp_path / '1'}: {os.strerror(number)}" in caplog.text


def test_code_is_taken_only_from_a_seed_that_proves_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed = first_seed(tmp_path / "0")
    with caplog.at_level(logging.INFO):
        caches = receiver(tmp_path / "1", seed, monkeypatch, settings(options=Options(token="t")))
    assert caplog.text.count("caches of code are not taken: set rfork_seed_tls to require") == 1
    assert not caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert caches.about_to_read(table_place(tmp_path / "1"))
    assert seed.asked == ["startup_plan", "autotune_table"]
    caches.warm()
    assert "torch_aot=miss:trust" in report.announced("key")


def test_code_is_offered_only_by_a_seed_that_demands_proof(tmp_path: Path) -> None:
    caches = worker(tmp_path, settings(options=Options(seed_tls="require", ca_file="ca.pem")))
    caches.produced(written(code_place(tmp_path, "own")), 1.0)
    caches.produced(written(table_place(tmp_path)), 1.0)
    assert [each.artifact.kind for each in offered_by(caches).artifacts] == ["autotune_table"]


def test_a_json_cache_that_fails_its_schema_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(body: bytes) -> bytes:
        raise CacheError("the table has a wildcard")

    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    assert not caches.about_to_read(table_place(tmp_path / "1", check))
    assert not (tmp_path / "1" / "tables").exists()


def test_a_cache_of_this_host_stays_and_is_not_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = receiver(tmp_path / "1", FakeSeed(Offered((), {})), monkeypatch)
    own = code_place(tmp_path / "1", "own")
    written(own)
    (tmp_path / "1" / "aot" / "own" / "rank_0_0" / "model").write_bytes(b"mine")
    assert not caches.about_to_read(own)
    caches.outcome("torch_aot", "rank_0_0", used=True)
    caches.warm()
    assert (tmp_path / "1" / "aot" / "own" / "rank_0_0" / "model").read_bytes() == b"mine"
    assert report.announced("key") == ""


def test_indexes_are_rewritten_with_the_receivers_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, Set[str], Path]] = []

    def rewrite(content: bytes, names: Set[str], directory: Path) -> bytes:
        seen.append((content, names, directory))
        return b"rewritten"

    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    assert caches.about_to_read(code_place(tmp_path / "1", "own", rewrite={"*.so": rewrite}))
    base = tmp_path / "1" / "aot" / "own"
    assert seen == [(FILES["kernels/a.so"], set(), base / "kernels")]
    assert (base / "kernels" / "a.so").read_bytes() == b"rewritten"


def test_a_file_that_does_not_belong_in_such_a_cache_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = receiver(tmp_path / "receiver", first_seed(tmp_path / "seed"), monkeypatch)
    place = code_place(tmp_path / "receiver", "own", only=lambda parts: parts == ("rank_0_0", "model"))
    assert not caches.about_to_read(place)
    assert not (tmp_path / "receiver" / "aot").exists()
    caches.warm()
    assert report.announced("key").startswith("torch_aot=miss:refused")


def test_after_warm_up_nothing_is_installed_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    caches.warm()
    assert not caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert not caches.about_to_read(plan_place(tmp_path / "1"))
    assert os.listdir(tmp_path / "1" / staging.STAGING) == []


def test_a_forked_child_that_exits_leaves_its_parents_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = receiver(tmp_path, FakeSeed(offered(held("torch_aot", "rank_0_0", {"model": b"x"}))), monkeypatch)
    child = os.fork()
    if child == 0:
        caches._arrivals.close()  # as atexit does in a child that ends by sys.exit()
        os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in (tmp_path / staging.STAGING).rglob("*") if path.is_file()] == ["0"]
    caches.warm()


def test_what_vllm_refuses_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    assert caches.about_to_read(code_place(tmp_path / "1", "own"))
    caches.outcome("torch_aot", "rank_0_0", used=False)
    with caplog.at_level(logging.INFO):
        caches.warm()
    assert "nothing was used; missed torch_aot (refused: vLLM did not use it)" in caplog.text
    assert report.announced("key") == "torch_aot=miss:refused"


@pytest.mark.parametrize(("text", "seconds"), [(None, 12.5), (b"-1", None), (b"a while", None), (b"nan", None)])
def test_a_later_start_of_the_same_host_still_states_the_time(
    text: bytes | None, seconds: float | None, tmp_path: Path
) -> None:
    place = written(code_place(tmp_path, "own"))
    note = tmp_path / "aot" / "own" / ".rfork-seconds-torch_aot"
    for reported in (12.5, None):
        caches = worker(tmp_path)
        caches.produced(place, reported)
        (offered,) = offered_by(caches).artifacts
        assert {file.path for file in offered.artifact.files} == set(FILES)
        if text is not None:
            note.write_bytes(text)
    assert offered.artifact.seconds == seconds


def test_a_directory_that_stays_noisy_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        (tmp_path / "aot" / "noisy" / "kernels" / f"{now[0]}.o").write_bytes(b"")

    collection = collecting.Collection(settings(), clock=lambda: now[0], sleep=sleep)
    collection.add(written(code_place(tmp_path, "noisy")), None, None)
    collection.add(written(CachePlace("triton", "rank0", {"triton": "3"}, tmp_path, ("triton",))), None, None)
    with caplog.at_level(logging.INFO):
        offered = collection.collected()
    assert offered is not None
    assert [each.artifact.kind for each in offered.artifacts] == ["triton"]
    assert "was still changing after 120 s" in caplog.text
    assert now[0] >= QUIET_S


def test_a_worker_that_shuts_down_collects_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    waiting = threading.Event()

    class Noisy(Quiet):
        def look(self) -> bool:
            waiting.set()
            return False

    collecting.QuietDirectory = Noisy  # type: ignore[assignment,misc]  # undone by the fixture
    caches = worker(tmp_path)
    caches.produced(written(code_place(tmp_path, "own")), 1.0)
    with caplog.at_level(logging.INFO):
        caches.warm()
        assert waiting.wait(10)
        (thread,) = (each for each in threading.enumerate() if each.name == "rfork-caches-offer")
        SeedManager().withdraw("the worker shuts down", last=True)
        shutil.rmtree(tmp_path / "aot")
        thread.join(10)
    assert not thread.is_alive()
    assert offers.current() is None
    assert caplog.text == ""


def test_a_worker_that_is_not_a_seed_collects_nothing(tmp_path: Path) -> None:
    caches = worker(tmp_path, settings(seed=False))
    caches.produced(written(table_place(tmp_path)), 1.0)
    caches.warm()
    assert offers.current() is None


def test_all_models_of_a_start_share_its_caches_and_another_start_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_caches_module, "cache_root", lambda kind: tmp_path)
    monkeypatch.setattr(worker_caches_module._Slot, "present", None)
    target = worker_caches(settings())
    assert worker_caches(settings()) is target
    assert listener() is target
    source = offers.source()
    another_offer = offered_by(target)
    another = worker_caches(settings(seed=False))
    assert another is not target
    assert source is not None
    assert source() is None
    offers.replace(target, another_offer)  # which was late
    assert source() is None
    assert offers.source() is None  # it is not a seed, so no receiver asks again
    another.warm()
    listen(None)


def test_a_user_without_a_home_still_has_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    Vllm("0.26.0", monkeypatch).envs.__dict__["VLLM_CACHE_ROOT"] = str(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(worker_caches_module._Slot, "present", None)
    worker_caches(settings("safe"))
    listen(None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert cache_root("triton") == tmp_path


def test_without_caches_no_receiver_is_kept_asking() -> None:
    assert CacheSettings.of(parse_config({"rfork_caches": "off"}, {}).settings, Trusting(CODE)) is None


def test_every_kind_has_its_turn() -> None:
    assert sorted(ORDER) == sorted(LEVELS)


def test_votes_are_those_of_the_load(tmp_path: Path) -> None:
    caches = worker(tmp_path)
    assert caches.agree("plan", None) == "no load of this worker votes"
    caches.vote = lambda stage, obstacle, bound_s: f"{stage} {obstacle} {bound_s:g}"
    assert caches.agree("plan", "no plan") == "plan no plan 10"


@pytest.mark.parametrize(("error", "refusals"), [(SeedError, 2), (SeedBusy, 20)])
def test_a_seed_that_is_busy_is_asked_again(
    error: type[SeedError],
    refusals: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seed, left = first_seed(tmp_path / "0"), [1] * refusals

    def busy(artifact: Artifact) -> None:
        if artifact.kind == "torch_aot" and left:
            left.pop()
            raise error("seed 10.0.0.7:4711:0 refused it: HTTP 503")

    seed.before = busy
    with caplog.at_level(logging.INFO):
        caches = receiver(tmp_path / "1", seed, monkeypatch)
    assert caches.about_to_read(code_place(tmp_path / "1", "own"))
    assert seed.asked.count("torch_aot") == refusals + 1
    assert caplog.text.count("did not arrive") <= 2
    caches.warm()


def test_a_seed_that_stays_busy_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = first_seed(tmp_path / "0")

    def busy(artifact: Artifact) -> None:
        raise SeedBusy("seed 10.0.0.7:4711:0 refused it: HTTP 503")

    seed.before = busy
    monkeypatch.setattr(fetch, "SeedCaches", seed)
    transfer = fetch.Fetch(settings(), SEED, "key", Arrivals(), lambda kind: tmp_path / "1", bound_s=0.2)
    transfer.start()
    assert transfer.wait(5)
    transfer.stop()
    assert set(seed.asked) == {"startup_plan"}


def test_a_transfer_that_hangs_ends_with_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()

    class Hanging(FakeSeed):
        async def fetch(self, *arguments: Any, **options: Any) -> None:
            began.set()
            await asyncio.Event().wait()

    seed = Hanging(offered(held("torch_aot", "rank_0_0", {"model": b"x"})))
    caches = receiver(tmp_path, seed, monkeypatch, wait=False)
    assert began.wait(10)
    caches.warm()
    settle(caches)
    assert os.listdir(tmp_path / staging.STAGING) == []


def test_a_name_that_does_not_resolve_delays_neither_the_end_of_a_transfer_nor_the_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hanging_names(monkeypatch) as names:
        caches = worker(tmp_path, settings("safe", Options()))
        caches.seed_known(SeedAddress("seed.invalid", 4711, 0), "key")
        assert names.asked.wait(10)
        caches.warm()
        settle(caches)
        joined = names.joined_at_exit()
    assert not joined, "Python waits for them when it exits"


@pytest.mark.parametrize(
    ("kind", "nbytes"), [("startup_plan", 65536), ("model_info", 65536), ("autotune_table", 2**24), ("triton", 0)]
)
def test_json_is_bounded_by_its_kind(kind: str, nbytes: int) -> None:
    def artifact(size: int) -> Artifact:
        return Artifact(kind, "x", {"a": "b"}, (ArtifactFile("x.json", size, "0" * 64),))

    Body(artifact(nbytes))
    with pytest.raises(CacheError, match=f"at most {nbytes} bytes"):
        Body(artifact(nbytes + 1))


def test_json_is_bounded_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [held("autotune_table", f"rank{number}", {"t.json": b"{}" * 10}) for number in range(3)]
    seed = FakeSeed(offered(*tables, held("torch_aot", "rank_0_0", {"model": b"x" * 50})))
    monkeypatch.setattr(fetch, "MAX_JSON_NBYTES", 40)
    caches = receiver(tmp_path, seed, monkeypatch)
    assert seed.asked == ["autotune_table", "autotune_table", "torch_aot"]
    with pytest.raises(Missed, match="refused: the seed has more than 40 bytes of JSON"):
        caches._arrivals.take(("autotune_table", "rank2"))
    caches.warm()


def test_an_artifact_that_never_arrives_does_not_keep_the_others_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = first_seed(tmp_path / "0")
    seed.before = lambda artifact: _dead(artifact) if artifact.kind == "startup_plan" else None
    caches = receiver(tmp_path / "1", seed, monkeypatch)
    assert not caches.about_to_read(plan_place(tmp_path / "1"))
    assert caches.about_to_read(table_place(tmp_path / "1"))
    caches.warm()


@pytest.mark.parametrize("asked", [0, 1])
def test_a_receiver_gets_the_code_of_its_target_or_its_draft_and_never_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    vllm = Vllm("0.26.0", monkeypatch)
    seed = worker(tmp_path / "seed")
    for number, place in enumerate(compiled_forwards(vllm, tmp_path / "seed")):
        directory = place.root.joinpath(*place.directory)
        directory.mkdir(parents=True)
        (directory / "model").write_bytes(b"forward %d" % number)
        seed.produced(place, 1.0)
    caches = receiver(tmp_path / "receiver", FakeSeed(offered_by(seed)), monkeypatch)
    place = compiled_forwards(vllm, tmp_path / "receiver")[asked]
    assert caches.about_to_read(place)
    assert place.root.joinpath(*place.directory, "model").read_bytes() == b"forward %d" % asked


def test_what_is_never_asked_for_is_removed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "KEPT_S", 0.0)
    caches = receiver(tmp_path / "1", first_seed(tmp_path / "0"), monkeypatch)
    assert caches._fetch is not None
    caches._fetch._thread.join(10)
    assert os.listdir(tmp_path / "1" / staging.STAGING) == []
