"""Descriptions of caches: what a receiver accepts from the wire, and what it refuses."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from vllm_rfork.caches import bounds
from vllm_rfork.caches.manifest import (
    LEVELS,
    Artifact,
    ArtifactFile,
    Offer,
    decode_offer,
    encode_offer,
    identity_differences,
    seconds_in_all,
)
from vllm_rfork.errors import CacheError

DIGEST = hashlib.sha256(b"x").hexdigest()


def file(path: str = "rank_0_0/model", nbytes: int = 1, sha256: str = DIGEST) -> ArtifactFile:
    return ArtifactFile(path, nbytes, sha256)


def artifact(*files: ArtifactFile, **changes: Any) -> Artifact:
    whole = Artifact("torch_aot", "rank_0_0", {"torch": "2.11.0"}, files or (file(),), 12.5)
    return msgspec.structs.replace(whole, **changes)


def received(*artifacts: Artifact, **changes: Any) -> Offer:
    """What a receiver makes of an offer that no honest seed could have encoded."""
    return decode_offer(msgspec.json.encode(msgspec.structs.replace(Offer(artifacts), **changes)))


def test_an_offer_survives_the_wire() -> None:
    offer = Offer((artifact(file("a/b.json"), file("c")), artifact(kind="triton", seconds=None)), {"dtype": "bfloat16"})
    assert decode_offer(encode_offer(offer)) == offer
    assert offer.artifacts[0].nbytes == 2
    assert seconds_in_all(offer.artifacts) == 12.5


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../x",
        "a/..",
        ".",
        "a/./b",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "-rf",
        "~/x",
        "a b",
        "é",
        "a/.rfork-staging-0/x",
        "C:x",
        "x" * 201,
        "/".join("d" * 14),
        "/".join(["d" * 190] * 5),
    ],
)
def test_a_path_that_could_leave_its_directory_is_refused(path: str) -> None:
    with pytest.raises(CacheError, match="the path"):
        received(artifact(file(path)))


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b")])
def test_paths_that_exclude_each_other_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(CacheError, match=r"occurs twice|a file and a directory"):
        received(artifact(*map(file, paths)))


@pytest.mark.parametrize(
    "changes",
    [
        {"nbytes": -1},
        {"nbytes": bounds.MAX_FILE_NBYTES + 1},
        {"sha256": ""},
        {"sha256": DIGEST.upper()},
        {"sha256": DIGEST[:-1]},
        {"sha256": DIGEST + "\n"},
    ],
)
def test_an_impossible_size_or_digest_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        received(artifact(file(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ()},
        {"identity": {}},
        {"identity": {"a": "x" * 201}},
        {"identity": {"": "x"}},
        {"identity": {str(number): "x" for number in range(257)}},
        {"name": "../x"},
        {"name": ""},
        {"seconds": -1.0},
        {"seconds": 1e9},
    ],
)
def test_an_impossible_artifact_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        received(artifact(**changes))


def test_more_files_or_bytes_than_the_bounds_are_refused() -> None:
    with pytest.raises(CacheError, match="files, not 1 to"):
        received(artifact(*(file(str(number)) for number in range(bounds.MAX_FILES + 1))))
    large = [file(str(number), bounds.MAX_FILE_NBYTES) for number in range(3)]
    with pytest.raises(CacheError, match="more than"):
        received(artifact(*large))
    two = artifact(*large[:2])
    with pytest.raises(CacheError, match="artifacts, 10 files"):
        received(*(msgspec.structs.replace(two, name=str(number)) for number in range(5)))
    with pytest.raises(CacheError, match="65 artifacts"):
        received(*(artifact(name=str(number)) for number in range(65)))


def test_a_negative_size_of_an_unknown_kind_does_not_hide_the_others() -> None:
    large = artifact(file("0", bounds.MAX_FILE_NBYTES), file("1", bounds.MAX_FILE_NBYTES))
    many = [msgspec.structs.replace(large, name=str(number)) for number in range(5)]
    with pytest.raises(CacheError, match="the bounds are"):
        received(*many, artifact(file("0", -(2**62)), kind="later"))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b'{"artifacts":[{}]}', b"[" * 100_000])
def test_what_is_not_an_offer_is_refused(body: bytes) -> None:
    with pytest.raises(CacheError, match="cannot be read"):
        decode_offer(body)


def test_a_list_of_a_million_files_is_refused_before_it_is_parsed() -> None:
    body = msgspec.json.encode(Offer((artifact(*(file(f"d/{number:07}") for number in range(100_000))),)))
    assert len(body) > bounds.MAX_MANIFEST_NBYTES
    with pytest.raises(CacheError, match="bytes, more than"):
        decode_offer(body)


def test_another_version_is_refused() -> None:
    with pytest.raises(CacheError, match="version 2"):
        received(artifact(), version=2)


@pytest.mark.parametrize("details", [{str(number): "" for number in range(2_001)}, {"": "x"}, {"x": "y" * 201}])
def test_details_beyond_the_bounds_are_refused(details: dict[str, str]) -> None:
    with pytest.raises(CacheError, match=r"facts|too long"):
        received(artifact(), details=details)


def test_unknown_kinds_and_fields_of_newer_seeds_are_skipped() -> None:
    assert received(artifact(kind="later"), artifact()).artifacts == (artifact(),)
    body = encode_offer(Offer((artifact(),))).replace(b'"kind"', b'"later":1,"kind"')
    assert decode_offer(body).artifacts == (artifact(),)


def test_an_artifact_that_is_there_twice_is_refused() -> None:
    with pytest.raises(CacheError, match="twice"):
        received(artifact(), artifact(file("other")))


def test_a_seed_does_not_send_what_a_receiver_would_refuse() -> None:
    with pytest.raises(CacheError):
        encode_offer(Offer((artifact(file("../x")),)))


def test_only_json_caches_are_safe() -> None:
    assert {kind for kind, level in LEVELS.items() if level == "safe"} == {
        "startup_plan",
        "autotune_table",
        "model_info",
    }


def test_differences_of_identity_name_the_fact_on_both_sides() -> None:
    there = artifact(identity={"torch": "2.11.0", "triton": "3.5.1", "cpu\n": "avx"})
    assert identity_differences({"torch": "2.11.0", "triton": "3.6.0"}, there) == [
        "cpu\\n: not set here, avx on the seed",
        "triton: 3.6.0 here, 3.5.1 on the seed",
    ]
    assert identity_differences(there.identity, there) == []
