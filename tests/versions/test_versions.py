"""Every release that is recorded has what we rely on, and the table of that is complete."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.ignored import IGNORED_FIELDS
from tests.versions import uses
from versions import __main__ as command
from versions import releases, table
from versions.check import complaints, number
from versions.source import Module
from vllm_rfork.vllm_compat.ascend import PROCESS_WIDE
from vllm_rfork.vllm_compat.fingerprint import config_fields
from vllm_rfork.vllm_compat.fingerprint.environment import place_of
from vllm_rfork.vllm_compat.worker_calls import HANDS_OUT, LEAVES_WEIGHTS
from vllm_rfork.vllm_compat.worker_hooks import CAPTURES_GRAPHS, CHANGES_WEIGHTS

RECORDS = command.records()
EVERYTHING = (*table.ROWS, *table.ELSEWHERE)
each_release = pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['package']}-{record['version']}")
#: Worker methods that need no withdrawal: they leave weights alone, wait for seeds, or return the model to its worker.
LEAVES = {*CAPTURES_GRAPHS, *HANDS_OUT, *(name for names in LEAVES_WEIGHTS.values() for name in names)}
of_vllm = [record for record in RECORDS if record["package"] == table.VLLM]


# --- the releases ---------------------------------------------------------------------------------------------------


def test_the_doctor_has_the_releases_that_are_recorded() -> None:
    assert json.loads(command.TESTED.read_text()) == command.tested() != {}


@each_release
def test_a_release_has_everything_that_we_rely_on(record: dict[str, Any]) -> None:
    assert complaints(record, EVERYTHING) == []
    assert len(record["sha256"]) == 64


def test_the_releases_span_what_is_promised() -> None:
    there = {(record["package"], record["version"]) for record in RECORDS}
    assert there >= {(package, version) for package, versions in command.RELEASES.items() for version in versions}
    assert max(number(record["version"]) for record in of_vllm) >= (0, 33, 0)


@each_release
def test_every_option_and_variable_of_a_release_has_its_place(record: dict[str, Any]) -> None:
    """What shapes weights, and what does not and why: a new one fails until somebody has said it."""
    for section, names in record["fields"].items():
        left_out = {name for group in IGNORED_FIELDS[section].values() for name in group}
        known = left_out | {*config_fields.BOTH_LAYOUTS.get(section, ()), *config_fields.RUNTIME_ONLY.get(section, ())}
        assert set(names) - known == set(), section
    variables = [name for name in record["environment"] if name.startswith("VLLM_")]
    assert variables
    assert [name for name in variables if place_of(name) == "unknown"] == []


@each_release
def test_every_method_of_a_release_s_workers_withdraws_the_seed_or_is_known_not_to_touch_weights(
    record: dict[str, Any],
) -> None:
    """A method that vLLM adds fails until somebody has read it; one that it renames would silently stop to withdraw."""
    assert not LEAVES & set(CHANGES_WEIGHTS)
    for cls, methods in record["workers"].items():
        assert methods, cls
        assert set(methods) - LEAVES - set(CHANGES_WEIGHTS) == set(), cls


def test_every_worker_method_that_withdraws_the_seed_is_in_a_release() -> None:
    theirs = {name for record in RECORDS for methods in record["workers"].values() for name in methods}
    # Of vLLM before the oldest that is recorded, and of forks of it.
    assert (set(CHANGES_WEIGHTS) | LEAVES) - theirs == {"reinitialize_distributed"}


def test_no_option_is_in_the_tables_that_no_release_has() -> None:
    for section in (*config_fields.SECTIONS, "vllm"):
        theirs = {name for record in of_vllm for name in record["fields"][section]}
        # An InitVar, or a name that only lives in a property, is no field.
        ours = {*config_fields.BOTH_LAYOUTS.get(section, ()), *config_fields.RUNTIME_ONLY.get(section, ())}
        left_out = {name for group in IGNORED_FIELDS[section].values() for name in group}
        assert (ours | left_out) - theirs == set(), section


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_import_and_every_module_named_in_text_is_in_the_table() -> None:
    rows = {row.key for row in EVERYTHING}
    modules = {row.module for row in EVERYTHING}
    used = uses.imports()
    assert len(used) > 10
    # `from vllm.distributed import parallel_state` names a module as well.
    modules |= set(PROCESS_WIDE)  # held to vLLM-Ascend's releases in tests/ascend
    missing = {use for use in used if use not in rows and use.rstrip(":").replace(":", ".") not in modules}
    assert missing == set()


def test_every_attribute_of_vllm_s_objects_is_in_the_table() -> None:
    rows = {(row.symbol.partition(".")[0], row.symbol.partition(".")[2]) for row in EVERYTHING if "." in row.symbol}
    rows |= {(row.module, row.symbol) for row in EVERYTHING}
    used = uses.attributes()
    assert len(used) > 25
    assert used - rows == set()


def test_no_row_is_about_something_that_nobody_uses() -> None:
    text = "\n".join(file.read_text() for file, _ in uses.trees())
    last_names = {row.key: (row.symbol or row.module).rpartition(".")[2] for row in EVERYTHING}
    assert {key for key, name in last_names.items() if name not in text} == set()


# --- the check ------------------------------------------------------------------------------------------------------

LOAD_MODEL = "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model"


def changed(**symbols: Any) -> list[str]:
    record = copy.deepcopy(of_vllm[-1])
    record["symbols"].update(symbols)
    return complaints(record, EVERYTHING)


def test_what_is_gone_renamed_or_wants_more_is_complained_about() -> None:
    there = of_vllm[-1]["symbols"][LOAD_MODEL]
    assert "has no" in changed(**{LOAD_MODEL: None})[0]
    assert "is not a function" in changed(**{LOAD_MODEL: {"kind": "attribute"}})[0]
    renamed = [[name.replace("prefix", "name"), kind] for name, kind in there["params"]]
    assert "does not take prefix" in changed(**{LOAD_MODEL: {**there, "params": renamed}})[0]
    more = [*there["params"], ["plan", "required"]]
    assert "requires plan" in changed(**{LOAD_MODEL: {**there, "params": more}})[0]
    fewer = {"kind": "function", "params": []}
    by_position = "vllm.model_executor.model_loader:get_model_loader"
    assert "gets 1" in changed(**{by_position: fewer})[0]


@pytest.mark.parametrize("name", ["load_weights", "process_weights_after_loading"])
def test_a_flow_in_another_order_is_complained_about(name: str) -> None:
    there = of_vllm[-1]["symbols"][LOAD_MODEL]
    without = [called for called in there["calls"] if called != name]
    assert f"does not call {name}" in changed(**{LOAD_MODEL: {**there, "calls": without}})[0]
    assert "does not call" in changed(**{LOAD_MODEL: {**there, "calls": [name, *without]}})[0]


def test_a_row_that_was_never_looked_for_does_not_pass() -> None:
    row = table.Row("vllm.future", "thing")
    assert "is not recorded" in complaints(of_vllm[0], [row])[0]


def test_since_and_until_bound_what_may_be_absent() -> None:
    def of(version: str, **bounds: str) -> list[str]:
        row = table.Row("m", "s", **bounds)
        return complaints({"package": "vllm", "version": version, "symbols": {"m:s": None}}, [row])

    assert of("0.22.1", since="0.23.0") == []
    assert of("0.23.0rc1", since="0.23.0") != []
    assert of("0.23.0", until="0.23.0") == []
    assert of("0.22.1", until="0.23.0") != []


# --- reading --------------------------------------------------------------------------------------------------------

TEXT = """
from elsewhere import imported as named
try:
    here: int = 1
except ImportError:
    def fallback(a, /, b=1, *rest, c, d=2, **more): ...
if here:
    class Base:
        def first(self): self.second(); third()
        def second(self): inner()
class Thing(Base):
    shared: ClassVar[int] = 0
    given: InitVar[int]
    field: str
    other: int = 1
    def __init__(self): self.held = 1
    @property
    def seen(self): return 1
mapping = {"b": 1, "a": 2}
"""


def test_definitions_are_found_wherever_they_stand() -> None:
    module = Module(TEXT)
    assert module.describe("named") == {"kind": "import"}
    assert module.describe("fallback") == {
        "kind": "function",
        "params": [
            ["a", "required"], ["b", "default"], ["rest", "*"],
            ["c", "required keyword"], ["d", "default"], ["more", "**"],
        ],
    }  # fmt: skip
    assert module.describe("gone") is None
    assert module.describe("here.gone") is None
    assert module.describe("Thing.gone") is None
    assert module.describe("Thing.held") == {"kind": "attribute"}
    assert module.describe("Thing.seen") == {"kind": "attribute"}
    inherited = module.describe("Thing.first")
    assert inherited is not None
    assert inherited["calls"] == ["second", "inner", "third"]
    assert module.fields("Thing") == ["field", "other"]
    assert module.keys("mapping") == ["a", "b"]


class Index(BaseHTTPRequestHandler):
    """One package with one wheel, larger than what anybody should read of it."""

    wheel: ClassVar[bytes] = b""
    sent: ClassVar[list[int]] = []
    ranges: ClassVar[bool] = True

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        names = {
            "vllm-1.0-cp38-abi3-manylinux_x86_64.whl": False,
            "vllm-1.1-x86_64.whl": True,
            "vllm-1.0.tar.gz": False,
        }
        files = [
            {"filename": name, "url": f"http://127.0.0.1:{port}/{name}", "hashes": {"sha256": "0" * 64}, "yanked": gone}
            for name, gone in names.items()
        ]
        body = json.dumps({"files": files}).encode() if self.path.endswith("/vllm/") else self.wheel
        first, last = 0, len(body) - 1
        asked = self.headers.get("Range")
        if asked and self.ranges:
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            last = min(last, len(body) - 1)
        self.send_response(206 if asked and self.ranges else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "GET":
            self.sent.append(last - first + 1)
            with contextlib.suppress(ConnectionError):  # who is given too much hangs up
                self.wfile.write(body[first : last + 1])

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    file = tmp_path / "wheel.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("native.so", bytes(10 * releases.BLOCK_NBYTES))
        archive.writestr("package/module.py", "x = 1")
        archive.writestr("package/__init__.py", "y = 2")
    monkeypatch.setattr(Index, "wheel", file.read_bytes())
    monkeypatch.setattr(Index, "sent", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr(releases, "index_url", lambda: f"http://127.0.0.1:{server.server_address[1]}/simple/")
    yield Index
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_of_a_wheel_are_read_without_the_wheel(index: type[Index]) -> None:
    wheels = releases.wheels("vllm")
    assert set(wheels) == {"1.0"}  # the other one is yanked
    sources = releases.Sources(wheels["1.0"])
    assert sources.text("package.module") == "x = 1"
    assert sources.text("package") == "y = 2"
    assert sources.text("package.gone") is None
    assert sum(index.sent) <= 3 * releases.BLOCK_NBYTES


def test_an_index_that_gives_whole_files_alone_is_refused(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ranges", False)
    with pytest.raises(releases.ReleaseError, match="does not send ranges"):
        releases.Sources(releases.wheels("vllm")["1.0"])


def test_other_schemes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "index_url", lambda: "file:///etc")
    with pytest.raises(releases.ReleaseError, match="only http and https"):
        releases.wheels("vllm")
