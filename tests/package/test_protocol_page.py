"""docs/protocol.md is enough to write the other side from: every name, number and algorithm on it is the code's."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import msgspec
import pytest
import torch

from vllm_rfork import messages
from vllm_rfork.caches import bounds
from vllm_rfork.caches.manifest import OFFER_VERSION, Artifact, decode_offer
from vllm_rfork.engines.nixl.peer import Endpoint
from vllm_rfork.engines.registry import ENGINES
from vllm_rfork.manifest.codec import MAX_MANIFEST_NBYTES, decode_manifest
from vllm_rfork.manifest.schema import Manifest, TensorEntry
from vllm_rfork.messages import metering
from vllm_rfork.messages.cache_results import MAX_LENGTH as MAX_RESULTS_LENGTH
from vllm_rfork.model import digest
from vllm_rfork.net.server import Bounds
from vllm_rfork.planner.http import request_headers
from vllm_rfork.seed_service import MAX_METRICS_NBYTES, MAX_SENDING, MAX_SENDING_SMALL, SMALL_NBYTES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def constants(pattern: str) -> set[str]:
    names = {**vars(messages), **vars(metering)}
    values = {value for name, value in names.items() if name.isupper() and isinstance(value, str)}
    return {value for value in values if re.fullmatch(pattern, value)}


def test_every_header_and_every_path_is_on_the_page() -> None:
    headers = constants(r"RFORK-[A-Z-]+|[A-Z]+_[A-Z_]+")
    assert len(headers) > 15
    for header in headers:
        short = header.removeprefix("RFORK")  # "`RFORK-INTENT`, `-EPOCH`" names both
        assert header in PAGE or f"`{short}`" in PAGE, header
    paths = constants(r"/[\w./]*")
    assert len(paths) > 12
    for path in paths:
        assert path in PAGE or f"`{path.removeprefix('/')}`" in PAGE, path


def test_no_header_on_the_page_is_unknown() -> None:
    assert set(re.findall(r"RFORK-[A-Z]+(?:-[A-Z]+)*", PAGE)) <= constants(r"RFORK-[A-Z-]+")


def test_bounds_are_the_codes() -> None:
    assert f"at most {messages.MAX_HEADER_LENGTH} characters long" in PAGE.replace("is at most", "at most")
    assert f"at most {messages.MAX_KEY_LENGTH}" in PAGE
    assert f"at most {MAX_MANIFEST_NBYTES >> 20} MiB" in PAGE
    assert f"at most {MAX_METRICS_NBYTES >> 10} KiB" in PAGE
    assert f"up to {metering.MAX_LABEL_LENGTH} characters each" in PAGE
    assert f"At most {request_headers.MAX_EXCLUDED}" in PAGE
    assert f"at most {request_headers.MAX_ID_LENGTH} characters" in PAGE
    assert Bounds().max_line_nbytes > 3 * messages.MAX_KEY_LENGTH


def test_the_bounds_of_caches_are_the_codes() -> None:
    section = re.sub(r"\s+", " ", PAGE.split("### Seed service: caches")[1].split("\n### ")[0])
    for text in (
        f"at most {bounds.MAX_MANIFEST_NBYTES >> 20} MiB:",
        f"more than {bounds.MAX_ARTIFACTS} artifacts, {bounds.MAX_OFFER_FILES:,} files or "
        f"{bounds.MAX_OFFER_NBYTES >> 30} GiB,",
        f"more than {bounds.MAX_FILES:,} files, {bounds.MAX_ARTIFACT_NBYTES >> 20} MiB, or "
        f"{bounds.MAX_FILE_NBYTES >> 20} MiB in one file",
        f"deeper than {bounds.MAX_DEPTH} directories",
        f"`Retry-After: {messages.CACHES_PAUSE_S}`",
        f"At most {('none', 'one', 'two', 'three', 'four')[MAX_SENDING]} are answered at once, "
        f"and beside them {MAX_SENDING_SMALL} of at most {SMALL_NBYTES >> 10} KiB;",
    ):
        assert text in section, text
    assert "up to 400 characters" in PAGE
    assert MAX_RESULTS_LENGTH == 400


def test_the_artifact_on_the_page_is_one_and_every_field_is_explained() -> None:
    section = PAGE.split("### Seed service: caches")[1].split("\n### ")[0]
    example = json.loads(section.split("```")[1].replace("…", "0" * 48))
    offer = decode_offer(msgspec.json.encode({"version": OFFER_VERSION, "artifacts": [example], "details": {}}))
    assert json.loads(msgspec.json.encode(offer.artifacts[0])) == example
    for name in (*Artifact.__struct_fields__, "details"):
        assert f"| `{name}` |" in section, name


def test_the_manifest_on_the_page_is_one_and_every_field_is_explained() -> None:
    example = PAGE.split("```json")[1].split("```")[0]
    found = decode_manifest(example.encode())
    assert set(json.loads(example)) == set(Manifest.__struct_fields__)
    assert found.digest_algorithm == digest.ALGORITHM
    for name in (*Manifest.__struct_fields__, *(set(TensorEntry.__struct_fields__) - {"name"})):
        assert f"`{name}`" in PAGE, name
    inline = msgspec.json.encode(TensorEntry("t", "int8", (1,), (1,), -1, inline=b"\x07"))
    assert json.loads(inline)["inline"] == "Bw==", "the page says base64"


def test_every_engine_has_its_endpoint_described() -> None:
    section = PAGE.split("### Endpoints")[1].split("###")[0]
    assert set(re.findall(r"^`(\w+)`:|\. `(\w+)`:", section, re.MULTILINE)) == {
        (name, "") if section.lstrip().startswith(f"`{name}`") else ("", name) for name in ENGINES
    }
    for field in Endpoint.__struct_fields__:
        assert f'"{field}"' in section, field


@pytest.mark.parametrize("nbytes", [1, 8, 16312, 16312 * 3 + 5, 16312 * 128, 16312 * 130 + 17])
def test_the_digest_can_be_computed_from_the_page(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    assert f"### The digest `{digest.ALGORITHM}`" in PAGE
    assert digest.digest(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == digest_by_the_page(data)


def digest_by_the_page(data: bytes) -> str:
    columns, modulus = 2039, 1 << 64
    weights, state = [], 0
    for _ in range(columns):
        state = (state + 0x9E3779B97F4A7C15) % modulus
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % modulus
        weights.append((mixed ^ (mixed >> 31)) | 1)

    def words(row: bytes) -> list[int]:
        return memoryview(row.ljust(8 * columns, b"\0")).cast("q").tolist()

    whole = len(data) // (8 * columns)
    rows = [words(data[8 * columns * number : 8 * columns * (number + 1)]) for number in range(whole)]
    summed = [[sum(column) for column in zip(*rows[at : at + 128], strict=True)] for at in range(0, whole, 128)]
    if rest := data[8 * columns * whole :]:
        summed.append(words(rest))
    hashed = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16, person=b"rfork-digest-2\0\0")
    for row in summed:
        signed = [(word + modulus // 2) % modulus - modulus // 2 for word in row]
        for halves in (signed, [word >> 32 for word in signed]):
            total = sum(word * weight for word, weight in zip(halves, weights, strict=True)) % modulus
            hashed.update(total.to_bytes(8, "little"))
    return hashed.hexdigest()
