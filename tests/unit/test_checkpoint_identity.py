"""The identity of a checkpoint's files: equal for the same tensors however they are packed, cheap, and bounded."""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.errors import ManifestMismatch, SeedError
from vllm_rfork.manifest import checkpoint_identity
from vllm_rfork.manifest.checkpoint_identity import (
    CheckpointFiles,
    CheckpointIdentity,
    Files,
    NoIdentity,
    compare,
    identify,
)
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.vllm_compat import checkpoint_files

SEED = "10.0.0.1:1000:0"


def write(path: Path, tensors: Mapping[str, bytes], dtype: str = "U8", **metadata: str) -> Path:
    """A safetensors file of one-dimensional tensors."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, data in tensors.items():
        header[name] = {"dtype": dtype, "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
    return path


def tensors(layers: int = 3) -> dict[str, bytes]:
    names = [f"model.layers.{n}.{part}.weight" for n in range(layers) for part in ("q_proj", "norm")]
    return {name: bytes([number + 1]) * 10_000 for number, name in enumerate([*names, "model.embed.weight", "lm_head"])}


def identity(*paths: Path, form: str = "", within_s: float = 30.0) -> str:
    return identify(Files(paths, form), deadline=time.monotonic() + within_s)


def test_the_same_tensors_have_one_identity_however_they_are_packed(tmp_path: Path) -> None:
    """Neither the number and names of files, nor their order, paths, times and metadata count."""
    whole = tensors()
    one = write(tmp_path / "a" / "model.safetensors", whole, format="pt")
    os.utime(one, (1, 1))
    names = sorted(whole, reverse=True)
    cut = [
        write(tmp_path / "elsewhere" / f"model-{number}.safetensors", {name: whole[name] for name in part})
        for number, part in enumerate((names[:3], names[3:]))
    ]
    assert identity(one) == identity(*cut) == identity(*reversed(cut))
    assert identity(one).startswith("safetensors-1:")


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("where", [0, 5000])
def test_other_bytes_in_any_tensor_are_another_checkpoint(name: str, where: int, tmp_path: Path) -> None:
    changed = tensors()
    changed[name] = changed[name][:where] + b"\xff" + changed[name][where + 1 :]
    assert identity(write(tmp_path / "a", changed).rename(tmp_path / "a.safetensors")) != identity(
        write(tmp_path / "b.safetensors", tensors())
    )


def test_other_names_types_and_shapes_are_another_checkpoint(tmp_path: Path) -> None:
    same = identity(write(tmp_path / "same.safetensors", tensors()))
    renamed = {name.replace("q_proj", "k_proj"): data for name, data in tensors().items()}
    assert identity(write(tmp_path / "renamed.safetensors", renamed)) != same
    assert identity(write(tmp_path / "typed.safetensors", tensors(), dtype="I8")) != same
    assert identity(write(tmp_path / "shorter.safetensors", {**tensors(), "lm_head": b"\x08" * 9_999})) != same


def test_every_kind_of_tensor_is_sampled_where_there_are_many() -> None:
    names = [f"layers.{n}.experts.{e}.w{w}" for n in range(60) for e in range(32) for w in (1, 2, 3)]
    few = ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
    chosen = checkpoint_identity._chosen([*names, *few])
    assert len(chosen) == checkpoint_identity.MAX_SAMPLED
    assert set(few) < set(chosen)
    assert chosen == checkpoint_identity._chosen([*few, *reversed(names)])


def test_a_checkpoint_of_700_gb_costs_no_more_than_its_headers_and_a_few_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """140 files of 5 GB with 200 tensors each; holes stand for the bytes."""
    paths, headers_nbytes, size = [], 0, 25_000_000
    for number in range(140):
        path = write(tmp_path / f"model-{number}.safetensors", {f"l.{number}.t.{n}": b"" for n in range(200)})
        offsets = [{"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(200)]
        text = json.dumps({f"l.{number}.t.{n}": each for n, each in enumerate(offsets)}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        headers_nbytes += len(text)
        os.truncate(path, 8 + len(text) + 200 * size)
        paths.append(path)
    assert sum(path.stat().st_size for path in paths) > 690e9
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, nbytes: int, offset: int) -> bytes:
        read.append(nbytes)
        return pread(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", counting)
    assert identity(*paths).startswith("safetensors-1:")
    assert sum(read) <= checkpoint_identity.MAX_SAMPLED * 2 * checkpoint_identity.SAMPLE_NBYTES
    assert headers_nbytes < 5e6, "the test is about this"


@pytest.mark.parametrize(
    "content",
    [b"", b"\x05", struct.pack("<Q", 1 << 50), struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2) + b"[]"],
)
def test_what_is_not_safetensors_has_no_identity(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(NoIdentity):
        identity(path)


def test_a_file_that_is_still_being_written_has_no_identity(tmp_path: Path) -> None:
    """Nor one whose last bytes are missing: those that are sampled may all be there."""
    path = write(tmp_path / "model.safetensors", tensors())
    whole = path.stat().st_size
    for size in (whole - 1, whole // 2):
        os.truncate(path, size)
        with pytest.raises(NoIdentity, match="shorter than its header states"):
            identity(path)


def test_reads_that_hang_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, go_on = write(tmp_path / "model.safetensors", tensors()), threading.Event()
    monkeypatch.setattr(checkpoint_identity, "_read_header", lambda path: go_on.wait(60))
    with pytest.raises(NoIdentity, match="not be read in time"):
        identity(path, within_s=0.1)
    go_on.set()


def test_a_load_does_not_wait_for_storage_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_identity, "BOUND_S", 0.1)
    go_on = threading.Event()

    def find() -> dict[str, Files]:
        go_on.wait(60)
        return {}

    hanging = CheckpointIdentity(find)
    assert hanging.wait() is None
    go_on.set()


def test_what_foreign_code_raises_while_files_are_found_fails_no_load() -> None:
    def find() -> dict[str, Files]:
        raise RuntimeError("the hub's library fails")

    assert CheckpointIdentity(find).wait() is None


def test_files_that_a_load_has_downloaded_are_found_for_the_seed(tmp_path: Path) -> None:
    there: list[Path] = []
    files = CheckpointFiles(lambda *sources, **options: {"weights": Files(there)})
    assert files.identity() is None
    there.append(write(tmp_path / "model.safetensors", tensors()))
    assert files.published() == {"weights": identity(*there)}


def test_a_worker_that_forked_publishes_what_it_was_given_and_not_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors())
    for given in ({"weights": "pickle-1:aa"}, None):
        files = CheckpointFiles(lambda *sources, **options: {"weights": Files([path])})
        files.forked_from(given)
        assert files.published() == given


def test_sources_that_a_built_model_names_are_parts_as_well(tmp_path: Path) -> None:
    main, tower = write(tmp_path / "a.safetensors", tensors()), write(tmp_path / "b.safetensors", tensors(1))

    def find(sources: Any = (), *, main_too: Path = main, main: bool = True) -> dict[str, Files]:
        parts = {"weights": Files([main_too])} if main else {}
        return parts | {str(source): Files([tower]) for source in sources}

    files = CheckpointFiles(find)
    files.look_also_at(["audio_tower."])
    files.look_also_at(["audio_tower."])
    assert files.identity() == {"weights": identity(main), "audio_tower.": identity(tower)}


# --- comparing ----------------------------------------------------------------------------------------------------


def test_another_checkpoint_is_refused_with_both_sides_and_another_seed_may_do() -> None:
    with pytest.raises(ManifestMismatch, match=SEED) as raised:
        compare({"weights": "safetensors-1:aa"}, {"weights": "safetensors-1:bb"}, SEED)
    assert "weights safetensors-1:bb on the seed, safetensors-1:aa on this worker" in str(raised.value)
    assert raised.value.retry_elsewhere
    assert raised.value.side == "receiver", "no planner counts it against the seed"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, {"weights": "safetensors-1:aa"}),
        ({"weights": "safetensors-1:aa"}, None),
        ({"weights": "safetensors-1:aa"}, {"audio_tower.": "safetensors-1:bb"}),
        ({"weights": "safetensors-1:aa"}, {"weights": "safetensors-1:aa", "2_Dense": "safetensors-1:bb"}),
    ],
)
def test_what_one_side_lacks_is_not_compared(ours: Any, theirs: Any) -> None:
    compare(ours, theirs, SEED)


def test_another_packaging_is_accepted_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(checkpoint_identity.__name__)
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, checkpoint_identity.__name__):
            compare({"weights": "safetensors-1:aa"}, {"weights": "pickle-1:bb"}, SEED)
    finally:
        logger.removeHandler(caplog.handler)
    assert f"the checkpoint of seed {SEED} is packaged in another way and was not compared" in caplog.text


def manifest(checkpoint: Any) -> Manifest:
    return Manifest(
        seed_key="k", fingerprint="f", epoch="e", layout="checkpoint", engine="memory", endpoint="x", regions=(),
        spans=(), tensors=(), checkpoint=checkpoint,
    )  # fmt: skip


def test_the_manifest_s_field_is_optional_and_bounded() -> None:
    body = encode_manifest(manifest({"weights": "safetensors-1:aa"}))
    assert decode_manifest(body).checkpoint == {"weights": "safetensors-1:aa"}
    older = {name: value for name, value in json.loads(body).items() if name != "checkpoint"}
    assert decode_manifest(json.dumps(older).encode()).checkpoint is None
    for bad in ({"weights": "x" * 201}, {"w" * 201: "x"}, {str(n): "x" for n in range(65)}):
        with pytest.raises(SeedError, match="identity of its checkpoint"):
            decode_manifest(encode_manifest(manifest(bad)))


# --- finding files ------------------------------------------------------------------------------------------------


def parts(folder: Path, load_format: str = "auto", **changes: Any) -> dict[str, list[str]]:
    model = SimpleNamespace(model=str(folder), model_weights="", revision=None, **changes)
    found = checkpoint_files.files_of(model, SimpleNamespace(download_dir=None), load_format)
    return {name: [path.name for path in files.paths] for name, files in found.items()}


def test_files_are_those_that_vllm_would_load(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "old.safetensors", "m.bin", "m.pt", "training_args.bin"):
        (tmp_path / name).touch()
    sharded = "model-rank-0-part-0.safetensors"
    assert parts(tmp_path)["weights"] == ["model-1.safetensors", "model-2.safetensors", "old.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert parts(tmp_path)["weights"] == ["model-1.safetensors", "model-2.safetensors"]
    assert parts(tmp_path, "pt")["weights"] == ["m.pt"]
    assert parts(tmp_path, "npcache")["weights"] == ["m.bin"]
    assert parts(tmp_path, "dummy") == {}
    (tmp_path / sharded).touch()
    assert parts(tmp_path, "sharded_state")["weights"] == [sharded]
    (tmp_path / "consolidated.safetensors").touch()
    assert parts(tmp_path)["weights"] == ["consolidated.safetensors"]
    assert "consolidated.safetensors" not in parts(tmp_path, "hf")["weights"]
    assert parts(tmp_path / "m.pt", "auto")["weights"] == ["m.pt"]


def test_a_download_that_broke_off_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert parts(tmp_path)["weights"] == []


@pytest.mark.parametrize("ending", ["safetensors", "bin", "gguf"])
def test_a_download_whose_index_is_not_there_yet_has_no_files(ending: str, tmp_path: Path) -> None:
    """Else a worker that starts beside the one that downloads takes the part that is there for another checkpoint."""
    names = [f"model-0000{number}-of-00003.{ending}" for number in (1, 2, 3)]
    for name in names[:2]:
        (tmp_path / name).touch()
    assert parts(tmp_path)["weights"] == []
    (tmp_path / names[2]).touch()
    assert parts(tmp_path)["weights"] == names


def test_dense_modules_and_secondary_weights_are_parts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "2_Dense").mkdir()
    for name in ("model.safetensors", "2_Dense/model.safetensors", "sparse_linear.pt"):
        (tmp_path / name).touch()
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}, {"path": "../x"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert parts(tmp_path) == {"weights": ["model.safetensors"], "2_Dense": ["model.safetensors"]}
    source = SimpleNamespace(
        model_or_path=str(tmp_path), revision=None, subfolder=None, prefix="sparse_linear.",
        allow_patterns_overrides=["sparse_linear.pt"],
    )  # fmt: skip
    model = SimpleNamespace(model=str(tmp_path), model_weights="", revision=None)
    found = checkpoint_files.files_of(model, SimpleNamespace(download_dir=None), "auto", [source], main=False)
    assert {name: [path.name for path in files.paths] for name, files in found.items()} == {
        "sparse_linear.": ["sparse_linear.pt"]
    }


def test_a_repository_is_looked_for_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("the network was asked"))
    assert checkpoint_files.local_folder("nobody/has-this-model", None, str(tmp_path)) is None
    assert checkpoint_files.local_folder("s3://bucket/model", None, str(tmp_path)) is None
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    assert checkpoint_files.local_folder("org/name", None, str(tmp_path)) == snapshot


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/draft", "org/draft"),
        ("/cache/hub/models--org--draft/snapshots/0123abc", "org/draft"),
        ("/models/draft", None),
        ("s3://bucket/draft", None),
    ],
)
def test_a_draft_is_known_by_its_repository_wherever_it_lies(model: str, name: str | None) -> None:
    """A fact of the fingerprint: ``model_url`` names the target, and nothing names the draft."""
    draft = SimpleNamespace(model=model, runner_type="draft")
    target = SimpleNamespace(model=model, runner_type="generate")
    config = SimpleNamespace(speculative_config=None)
    assert checkpoint_files.draft_name(config, draft) == name
    assert checkpoint_files.draft_name(config, target) is None
    of_mtp = SimpleNamespace(speculative_config=SimpleNamespace(target_model_config=target, draft_model_config=draft))
    assert checkpoint_files.draft_name(of_mtp, draft) is None, "model_url names it"
