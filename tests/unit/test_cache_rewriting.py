"""Indexes with absolute paths: names are kept, the seed's paths are not."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_rfork.caches.installer import install
from vllm_rfork.caches.manifest import Artifact, ArtifactFile
from vllm_rfork.caches.rewriting import MAX_INDEX_NBYTES, split_graph_index, triton_group
from vllm_rfork.caches.staging import Staged
from vllm_rfork.errors import CacheError

HERE = Path("/here/.triton/cache/KEY")
NAMES = {"k.cubin", "k.json"}
GROUP = json.dumps({"child_paths": {name: f"/there/{name}" for name in sorted(NAMES)}}).encode()
INDEX = {
    ((1, 2048), 0, "inductor_standalone"): {"graph_handle": ("g_0", "/there/g_0"), "cache_key": "abc"},
    ((1, 2048), 1, "inductor_standalone"): {"graph_handle": ("g_0", "/there/g_0"), "cache_key": "abc"},
}
KEY, VALUE = next(iter(INDEX.items()))


def test_a_kernels_files_are_found_in_the_new_directory() -> None:
    assert json.loads(triton_group(GROUP, NAMES, HERE)) == {
        "child_paths": {name: f"/here/.triton/cache/KEY/{name}" for name in NAMES}
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"child_paths":{}}',
        b'{"child_paths":["k.json"]}',
        b'{"child_paths":{"k.json":1}}',
        b'{"child_paths":{"missing":"/x"}}',
        b'{"child_paths":{"../k.json":"/x"}}',
        b'{"child_paths":{"k.json":"/x"},"more":1}',
    ],
)
def test_a_list_that_names_other_files_is_refused(body: bytes) -> None:
    with pytest.raises(CacheError):
        triton_group(body, {*NAMES, "../k.json"}, HERE)


def test_graphs_are_found_in_the_new_directory() -> None:
    found = ast.literal_eval(split_graph_index(repr(INDEX).encode(), {"g_0"}, HERE).decode())
    assert list(found) == list(INDEX)
    assert {value["graph_handle"] for value in found.values()} == {("g_0", "/here/.triton/cache/KEY/g_0")}


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {KEY: None},
        {KEY: {**VALUE, "more": 1}},
        {KEY: {**VALUE, "graph_handle": ("g_1", "/there/g_1")}},
        {KEY: {**VALUE, "graph_handle": ("../g_0", "/there/g_0")}},
        {KEY: {**VALUE, "graph_handle": ("g_0",)}},
        {KEY: {**VALUE, "cache_key": "x" * 501}},
        {((1, "2048"), 0, "a"): VALUE},
        {((1, 2), 0, "a b"): VALUE},
        {"key": VALUE},
    ],
)
def test_an_index_of_another_form_is_refused(index: Any) -> None:
    with pytest.raises(CacheError, match="index"):
        split_graph_index(repr(index).encode(), {"g_0"}, HERE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"__import__('os').system('true')",
        b"(" * 10_000,
        b"-" * 100_000 + b"1",
        b" " * (MAX_INDEX_NBYTES + 1),
    ],
)
def test_an_index_that_is_not_a_literal_is_refused(body: bytes) -> None:
    with pytest.raises(CacheError, match="index"):
        split_graph_index(body, {"g_0"}, HERE)


def test_a_rewritten_index_is_installed_in_the_place_of_the_seeds(tmp_path: Path) -> None:
    contents = {"KEY/__grp__k.json": GROUP, "KEY/k.cubin": b"1", "KEY/k.json": b"{}"}
    files = [ArtifactFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents.items()]
    arriving = Staged(tmp_path, Artifact("triton", "t", {"triton": "3.6.0"}, tuple(files)), kept_free_nbytes=0)
    with pytest.raises(CacheError, match="no complete file"):
        arriving.read("KEY/__grp__k.json", 1000)
    arriving.write(b"".join(contents.values()))
    arriving.finish()
    with pytest.raises(CacheError, match="no complete file"):
        arriving.replace("KEY/other", b"")
    with pytest.raises(CacheError, match="larger than"):
        arriving.read("KEY/__grp__k.json", 10)
    group = triton_group(arriving.read("KEY/__grp__k.json", 1000), NAMES, tmp_path / "triton" / "KEY")
    arriving.replace("KEY/__grp__k.json", group)
    install(arriving, ("triton",))
    paths = json.loads((tmp_path / "triton" / "KEY" / "__grp__k.json").read_bytes())["child_paths"]
    assert all(Path(path).exists() for path in paths.values())
    assert (tmp_path / "triton" / "KEY" / "k.json").read_bytes() == b"{}"
