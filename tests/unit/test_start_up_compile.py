"""Hooks on vLLM's compiled code, against stand-ins with the signatures of two releases."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.compiling_vllm import Config, Vllm, compiled_forwards, config
from vllm_rfork.caches.collector import Collected, collect
from vllm_rfork.caches.manifest import check_artifact, identity_differences
from vllm_rfork.caches.staging import Staged
from vllm_rfork.startup.worker_caches import _install_files
from vllm_rfork.vllm_compat.start_up import compile_hooks, device_facts, split_graphs
from vllm_rfork.vllm_compat.start_up.listener import CachePlace, listen

RELEASES = ["0.26.0", "0.32.0"]


class Carrier:
    """A listener whose seed is another one of its kind in this process.

    Attributes:
        outcomes: kind → used.
        seconds: kind → the stated time to produce it.
        differences: kind → the facts in which the seed differs.
    """

    def __init__(self, seed: Carrier | None = None) -> None:
        self._seed = seed
        self._places: dict[str, CachePlace] = {}
        self.offered: dict[str, Collected] = {}
        self.outcomes: dict[str, bool] = {}
        self.seconds: dict[str, float | None] = {}
        self.differences: dict[str, list[str]] = {}
        self.details: Mapping[str, str] = {}

    def explain(self, details: Mapping[str, str]) -> None:
        self.details = details

    def about_to_read(self, place: CachePlace) -> bool:
        theirs = self._seed.offered.get(place.kind) if self._seed else None
        if theirs is None:
            return False
        assert theirs.artifact.name == place.name
        self.differences[place.kind] = identity_differences(place.identity, theirs.artifact)
        if self.differences[place.kind]:
            return False
        staged = Staged(place.root, theirs.artifact, kept_free_nbytes=0)
        for piece in theirs.pieces():
            staged.write(piece)
        staged.finish()
        return _install_files(place, staged) > 0

    def outcome(
        self, kind: str, name: str, *, used: bool, seconds: float | None = None, reason: str | None = None
    ) -> None:
        self.outcomes[kind] = used

    def produced(self, place: CachePlace, seconds: float | None, body: bytes | None = None) -> None:
        self._places[place.kind], self.seconds[place.kind] = place, seconds

    def collect(self) -> Carrier:
        for kind, place in self._places.items():
            self.offered[kind] = collect(
                place.root.joinpath(*place.directory),
                kind=kind,
                name=place.name,
                identity=dict(place.identity),
                only=place.only or (lambda parts: True),
            )
        return self


@pytest.fixture(autouse=True)
def nothing_listens() -> Iterator[None]:
    yield
    listen(None)


@pytest.fixture(params=RELEASES)
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Vllm:
    stand_in = Vllm(request.param, monkeypatch)
    for _ in range(2):
        compile_hooks.install()
        split_graphs.install()
    return stand_in


def started(vllm: Vllm, root: Path, vllm_config: Config, seed: Carrier | None = None) -> tuple[Any, Carrier]:
    """The model and the listener of one start."""
    carrier = Carrier(seed)
    listen(carrier)  # type: ignore[arg-type]
    return vllm.start(root, vllm_config), carrier


@pytest.fixture
def seed(vllm: Vllm, tmp_path: Path) -> Carrier:
    model, carrier = started(vllm, tmp_path / "seed", config("/models/a"))
    assert model.compiled_by_itself
    return carrier.collect()


def test_a_seeds_code_is_loaded_under_another_path_and_root(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    assert seed.outcomes == {"torch_aot": False, "inductor": False, "split_graph": False}
    assert set(seed.offered) == {"torch_aot", "inductor", "split_graph"}
    model, carrier = started(vllm, tmp_path / "receiver", config("/models/b"), seed)
    assert not model.compiled_by_itself
    assert carrier.differences == {"torch_aot": [], "inductor": [], "split_graph": []}
    assert carrier.outcomes == {"torch_aot": True, "inductor": True, "split_graph": True}
    # A receiver passes on what it has received.
    assert set(carrier.collect().offered) == set(seed.offered)
    assert set(carrier.seconds.values()) == {None}


def test_a_seed_states_how_long_it_compiled(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(compile_hooks.time, "monotonic", lambda: float(next(now)))
    _, carrier = started(vllm, tmp_path / "seed", config("/models/a"))
    # Each look at the clock is 10 s after the one before. The graphs have an artifact of their own.
    assert carrier.seconds == {"torch_aot": 20.0, "inductor": None, "split_graph": 10.0}


def test_code_of_a_worker_that_differs_is_not_installed(
    vllm: Vllm, seed: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, carrier = started(vllm, tmp_path / "longer", config("/models/a", max_model_len=128), seed)
    assert model.compiled_by_itself
    assert [text.partition(":")[0] for text in carrier.differences["torch_aot"]] == ["config", "model_config"]
    assert carrier.outcomes["torch_aot"] is False

    monkeypatch.setattr(device_facts, "_compiler", lambda: "g++ 15")
    device_facts.device_facts.cache_clear()
    model, carrier = started(vllm, tmp_path / "newer", config("/models/a"), seed)
    device_facts.device_facts.cache_clear()
    assert model.compiled_by_itself
    assert [text.partition(":")[0] for text in carrier.differences["inductor"]] == ["compiler"]


def test_graphs_of_other_sources_are_not_installed(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are installed under the receiver's name for its own sources, so vLLM would not notice."""
    for side in ("here", "there", "elsewhere"):
        (tmp_path / side / "package").mkdir(parents=True)
        (tmp_path / side / "package" / "model.py").write_text("x = 2" if side == "elsewhere" else "x = 1")
        monkeypatch.syspath_prepend(str(tmp_path / side))

    def sources(side: str) -> Config:
        return config("/models/a", {str(tmp_path / side / "package" / "model.py"), "<string>"})

    seed = started(vllm, tmp_path / "seed", sources("here"))[1].collect()
    _, same = started(vllm, tmp_path / "same", sources("there"), seed)
    assert same.outcomes["split_graph"] is True
    _, carrier = started(vllm, tmp_path / "other", sources("elsewhere"), seed)
    assert [text.partition(":")[0] for text in carrier.differences["split_graph"]] == ["code.files"]
    assert carrier.outcomes["split_graph"] is False


def test_no_secret_is_in_what_a_seed_offers(seed: Carrier) -> None:
    offered = [each.artifact for each in seed.offered.values()]
    for artifact in offered:
        check_artifact(artifact)
    assert "hidden" not in f"{offered}{seed.details}"
    # vLLM writes its whole environment beside the graphs.
    assert [file.path for file in seed.offered["split_graph"].artifact.files] == [
        "artifact_compile_range_1_2048_subgraph_0",
        "vllm_compile_cache.py",
    ]
    assert [file.path for file in seed.offered["torch_aot"].artifact.files] == ["model"]


def test_a_forward_that_vllm_cannot_load_is_not_reported_as_used(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    vllm.loads = False
    model, carrier = started(vllm, tmp_path / "receiver", config("/models/b"), seed)
    assert model.compiled_by_itself
    # It was not for its graphs, which stay, and it has compiled its own.
    assert carrier.outcomes == {"torch_aot": False, "inductor": False, "split_graph": True}
    assert carrier.seconds["torch_aot"] is not None


def test_a_graph_that_vllm_cannot_load_does_not_end_the_start(vllm: Vllm, tmp_path: Path) -> None:
    """vLLM compiles a forward that it cannot load, but ends if it cannot load a graph of it."""
    _, carrier = started(vllm, tmp_path / "seed", config("/models/a"))
    (graph,) = (tmp_path / "seed").rglob("artifact_*")
    graph.write_text("broken")
    model, receiver = started(vllm, tmp_path / "receiver", config("/models/b"), carrier.collect())
    assert model.compiled_by_itself
    assert receiver.outcomes == {"torch_aot": False, "inductor": False, "split_graph": False}
    again, _ = started(vllm, tmp_path / "receiver", config("/models/b"))
    assert not again.compiled_by_itself


def test_an_index_never_names_a_graph_that_is_not_the_seeds(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    """A start that ended before it wrote the index has left a graph of the same name in the same folder."""
    root = tmp_path / "receiver"
    started(vllm, root, config("/models/b"))
    (index,) = root.rglob("vllm_compile_cache.py")
    index.unlink()
    index.with_name("artifact_compile_range_1_2048_subgraph_0").write_bytes(b"")
    for model in root.rglob("rank_0_0/model"):
        model.unlink()
    seed.offered.pop("torch_aot")  # late
    model, carrier = started(vllm, root, config("/models/b"), seed)
    assert model.compiled_by_itself
    assert carrier.outcomes["split_graph"] is False


@pytest.fixture
def unloadable(vllm: Vllm, tmp_path: Path) -> Carrier:
    """A seed of graphs only, which vLLM cannot load."""
    vllm.envs.VLLM_USE_AOT_COMPILE = False
    _, carrier = started(vllm, tmp_path / "seed", config("/models/a"))
    (graph,) = (tmp_path / "seed").rglob("artifact_*")
    graph.write_text("broken")
    offered = carrier.collect().offered
    carrier.offered = {"split_graph": offered["split_graph"]}
    return carrier


def test_a_restart_after_graphs_that_cannot_be_loaded_compiles(
    vllm: Vllm, unloadable: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        started(vllm, tmp_path / "receiver", config("/models/b"), unloadable)
    for name, empty in (("_unproven", []), ("_failed", set())):  # those of another process
        monkeypatch.setattr(split_graphs, name, empty)
    with caplog.at_level(logging.INFO):
        model, _ = started(vllm, tmp_path / "receiver", config("/models/b"), unloadable)
    assert model.compiled_by_itself
    assert "the process that had installed them ended before vLLM had loaded them" in caplog.text
    assert not list((tmp_path / "receiver").rglob(".rfork-unproven"))
    for model_file in (tmp_path / "receiver").rglob("rank_0_0/model"):
        model_file.unlink()
    _, carrier = started(vllm, tmp_path / "receiver", config("/models/b"))
    assert carrier.outcomes["split_graph"] is True


def test_graphs_that_vllm_has_loaded_stay(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    for carrier in (seed, None):
        model, _ = started(vllm, tmp_path / "receiver", config("/models/b"), carrier)
        assert not model.compiled_by_itself
        assert not list(tmp_path.rglob(".rfork-unproven"))


def test_graphs_that_another_process_is_loading_stay(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    for each in (seed, None):
        started(vllm, tmp_path / "receiver", config("/models/b"), each)
    (index,) = (tmp_path / "receiver").rglob(split_graphs.INDEX)
    code = (
        "import sys; from pathlib import Path; from vllm_rfork.caches.unproven import Unproven\n"
        "Unproven(Path(sys.argv[1])).begin(); print('begun', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, index], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout is not None
        assert other.stdout.readline()
        _, beside = started(vllm, tmp_path / "receiver", config("/models/b"))
        assert beside.outcomes["split_graph"] is True
        other.kill()
    _, after = started(vllm, tmp_path / "receiver", config("/models/b"))
    assert after.outcomes["split_graph"] is False
    assert not index.with_name(".rfork-unproven").exists()


def test_kernels_that_were_compiled_again_are_not_reported_as_used(vllm: Vllm, seed: Carrier, tmp_path: Path) -> None:
    vllm.builds_kernels = True
    model, carrier = started(vllm, tmp_path / "receiver", config("/models/b"), seed)
    assert not model.compiled_by_itself
    assert (carrier.outcomes["torch_aot"], carrier.outcomes["inductor"]) == (True, False)


def test_a_forward_that_could_not_be_saved_is_not_offered(vllm: Vllm, tmp_path: Path) -> None:
    vllm.saves = False
    _, carrier = started(vllm, tmp_path / "seed", config("/models/a"))
    assert set(carrier.seconds) == {"split_graph"}


def test_nothing_is_installed_for_an_operator_who_forces_a_file(
    vllm: Vllm, seed: Carrier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM ends if that file cannot be loaded."""
    vllm.envs.VLLM_FORCE_AOT_LOAD = True
    with caplog.at_level(logging.INFO), pytest.raises(FileNotFoundError):
        started(vllm, tmp_path / "receiver", config("/models/b"), seed)
    assert "because VLLM_FORCE_AOT_LOAD is set" in caplog.text


def test_a_forward_that_contains_its_graphs_has_no_artifact_of_them(vllm: Vllm, tmp_path: Path) -> None:
    vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT = True
    seed = started(vllm, tmp_path / "seed", config("/models/a"))[1].collect()
    assert set(seed.offered) == set(seed.outcomes) == {"torch_aot", "inductor"}
    model, carrier = started(vllm, tmp_path / "receiver", config("/models/b"), seed)
    assert not model.compiled_by_itself
    assert set(carrier.outcomes) == {"torch_aot", "inductor"}


def test_whatever_fails_in_a_hook_vllm_compiles_as_usual(
    vllm: Vllm, seed: Carrier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = config("/models/b")
    broken.load_config = None  # the device cannot be found
    model, carrier = started(vllm, tmp_path / "receiver", broken, seed)
    assert model.compiled_by_itself
    assert carrier.outcomes == {}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all(re.search("was left to vLLM because of AttributeError", text) for text in warnings)


def test_a_release_without_the_functions_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Vllm("0.17.0", monkeypatch)
    del stand_in.decorators._try_load_aot_compiled_fn
    del stand_in.backends.CompilerManager.save_to_file
    call = stand_in.backends.VllmBackend.__call__
    for hook in (compile_hooks, split_graphs):
        with pytest.raises(AttributeError):
            hook.install()
    assert stand_in.backends.VllmBackend.__call__ is call


def test_facts_of_a_host_differ_where_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(**changes: Any) -> dict[str, str]:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(device_facts, name, value)
            device_facts.device_facts.cache_clear()
            found = device_facts.device_facts(torch.device(changes.get("_device", "cpu")))
        device_facts.device_facts.cache_clear()
        return found

    own = facts()
    assert facts() == own
    assert all(0 < len(value) <= 200 for value in own.values())

    def changed(**changes: Any) -> list[str]:
        return sorted(name for name, value in facts(**changes).items() if own.get(name) != value)

    assert changed(_instructions=lambda: "others") == ["cpu"]
    assert changed(sys=types.SimpleNamespace(implementation=types.SimpleNamespace(cache_tag="cpython-314"))) == [
        "python"
    ]
    assert changed(platform=types.SimpleNamespace(machine=lambda: "arm64", libc_ver=lambda: ("glibc", "2.36"))) == [
        "machine"
    ]
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert changed() == ["torch"]


def test_the_name_of_a_gpu_and_its_toolkit_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device_facts.device_facts.cache_clear()
    found = device_facts.device_facts(torch.device("cuda:0"))
    device_facts.device_facts.cache_clear()
    expected = {"device": "cuda", "capability": "9.0", "device_name": "NVIDIA H200", "toolkit": "cuda 13.0"}
    assert {name: found[name] for name in expected} == expected


def test_code_for_another_device_index_differs(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor writes ``device='cuda:1'`` into code, and vLLM's folders are named by the rank in all nodes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device_facts.device_facts.cache_clear()
    at: list[Config] = []
    for _ in range(2):
        at.append(config("/models/a"))
        at[-1].device_config = types.SimpleNamespace(device="cuda")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    seed = started(vllm, tmp_path / "first", at[0])[1].collect()
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    model, carrier = started(vllm, tmp_path / "second", at[1], seed)
    device_facts.device_facts.cache_clear()
    assert model.compiled_by_itself
    assert [text.partition(":")[0] for text in carrier.differences["torch_aot"]] == ["device_index"]
    assert device_facts.execution_facts(torch.device("cuda:3")) == {"device_index": "3"}


def test_code_for_another_number_of_threads_differs(
    vllm: Vllm, seed: Carrier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor writes ``num_threads(N)`` into kernels for processors, and splits reductions by that number."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1_000)
    model, carrier = started(vllm, tmp_path / "receiver", config("/models/a"), seed)
    assert model.compiled_by_itself
    assert [text.partition(":")[0] for text in carrier.differences["inductor"]] == ["threads"]


def test_a_target_and_its_draft_of_one_class_name_have_caches_of_their_own(vllm: Vllm, tmp_path: Path) -> None:
    target, draft = compiled_forwards(vllm, tmp_path / "seed")
    assert target.directory != draft.directory  # to vLLM they are two
    assert target.name != draft.name  # a seed offers both
    assert set(target.identity.items()) ^ set(draft.identity.items()) == {
        ("code.forward", f"None:LlamaModel.forward:{line}") for line in (352, 182)
    }
    elsewhere = compiled_forwards(vllm, tmp_path / "receiver")[0]
    assert (elsewhere.name, elsewhere.identity) == (target.name, target.identity)


def test_flags_of_a_processor_that_are_no_instructions_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(device_facts, "Path", lambda _: info)

    def digest(line: str) -> str:
        info.write_text(f"processor : 0\n{line}\n")
        return device_facts._instructions()

    assert digest("flags : fpu avx2 constant_tsc") == digest("flags : avx2 hypervisor")
    assert digest("flags : avx2 amx_bf16") != digest("flags : avx2")
    assert digest("Features : asimd sve") != digest("Features : asimd")
