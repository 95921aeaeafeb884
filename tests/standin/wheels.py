"""The YuanRong wheels, one environment each, and the proof that they are the published files, unmodified.

The two distributions bring the same import package, so no environment has both. Used is, for each of them: the
interpreter that runs the tests, or ``.venv-datasystem``, where the set-up has installed it; else a folder under
``build/`` that pip fills once.
"""

from __future__ import annotations

import base64
import csv
import ctypes
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Prints where a distribution lies for the interpreter that runs it, or nothing.
_LOCATE = """
import importlib.metadata as m, sys
try:
    d = m.distribution(sys.argv[1])
except m.PackageNotFoundError:
    sys.exit(0)
if d.version == sys.argv[2]:
    print(d.locate_file(""))
"""


class ModifiedWheel(Exception):
    """A file is not the published one."""


@dataclass(frozen=True)
class Wheel:
    """One distribution; ``sha256`` pins, by path in it, the native files that make the engine (3.11, x86_64)."""

    distribution: str
    version: str
    sha256: Mapping[str, str]
    #: Folder of an environment that may have it, beside that of the running interpreter.
    venv: str = ""

    @property
    def folder(self) -> Path:
        return ROOT / "build" / f"{self.distribution.removeprefix('open')}-{self.version}"


WHEELS = {
    "transfer-engine": Wheel(
        "openyuanrong-transfer-engine",
        "0.1.0",
        {
            "yr/datasystem/_transfer_engine.cpython-311-x86_64-linux-gnu.so": (
                "1ee66ecf7033c725432e6e952a49e9fd59bc8e3f9f3b349267287fc1e4dd6c34"
            ),
            "yr/datasystem/libp2ptransfer.so": "92a1402ca218c722a13b7a50095a7606b1e5e325cecdd5bb44d34bf5e47ee9f9",
        },
    ),
    "datasystem": Wheel(
        "openyuanrong-datasystem",
        "0.8.1",
        {
            "yr/datasystem/_transfer_engine.cpython-311-x86_64-linux-gnu.so": (
                "11b01ac987e1befc86c6961f87f07dfde98449a719d8aa807739a4d1d7a25c40"
            ),
            "yr/datasystem/lib/libp2p_transfer.so": "121ad45b0cc77d9b663688360a34d8f0963619c1e9a59ac40222c1c15b215857",
            "yr/datasystem/lib/libglog.so.2": "873de0d278eb4603815163841371781a6cfb971b80698723a8762c5fbad176a2",
        },
        venv=".venv-datasystem",
    ),
}


@dataclass(frozen=True)
class Installed:
    """Where a wheel lies, and how to run with it: ``python`` under ``environment``."""

    wheel: Wheel
    site: Path
    python: str
    environment: Mapping[str, str] = field(default_factory=dict)


def installed(name: str) -> Installed:
    """The wheel called ``name`` in :data:`WHEELS`, installed where it was not, and verified.

    Raises:
        RuntimeError: a library of the system is missing, or pip fails; says what to do.
        ModifiedWheel: a file is not the published one.
    """
    wheel = WHEELS[name]
    need_libunwind()
    found = _in_an_environment(wheel) or _in_a_folder(wheel)
    verify(found)
    return found


def need_libunwind() -> None:
    """Raise where the library is missing that neither wheel brings."""
    try:
        ctypes.CDLL("libunwind.so.8")
    except OSError as error:
        raise RuntimeError("YuanRong's wheels need libunwind.so.8 (Debian: apt-get install libunwind8)") from error


def _in_an_environment(wheel: Wheel) -> Installed | None:
    interpreters = [Path(sys.executable)]
    if wheel.venv:
        interpreters.append(ROOT / wheel.venv / "bin" / "python")
    for python in interpreters:
        if python.exists():
            command = [str(python), "-c", _LOCATE, wheel.distribution, wheel.version]
            site = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
            if site:
                return Installed(wheel, Path(site), str(python))
    return None


def _in_a_folder(wheel: Wheel) -> Installed:
    if not wheel.folder.exists():
        wheel.folder.parent.mkdir(exist_ok=True)
        # Filled beside its place and then moved there: an interrupted pip leaves nothing that looks complete.
        with tempfile.TemporaryDirectory(dir=wheel.folder.parent) as scratch:
            target = Path(scratch) / "site"
            needs = [f"{wheel.distribution}=={wheel.version}", f"msgspec=={importlib.metadata.version('msgspec')}"]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
            command = [*pip, "--target", str(target), *needs]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                raise RuntimeError(f"pip cannot install {needs[0]}:\n{done.stderr}")
            shutil.move(target, wheel.folder)
    # The interpreter behind the virtual environment: the environment's own packages would shadow the folder's.
    return Installed(wheel, wheel.folder, os.path.realpath(sys.executable), {"PYTHONPATH": str(wheel.folder)})


def verify(found: Installed) -> None:
    """Compare every file of the distribution with its RECORD, and the native ones with the pins.

    Raises:
        ModifiedWheel: one differs, is missing, or is not in the RECORD.
    """
    wheel = found.wheel
    record = found.site / f"{wheel.distribution.replace('-', '_')}-{wheel.version}.dist-info" / "RECORD"
    recorded: dict[str, str] = {}
    with record.open(newline="", encoding="utf-8") as lines:
        for path, digest, _ in csv.reader(lines):
            if digest.startswith("sha256="):
                padded = digest.removeprefix("sha256=") + "="
                recorded[path] = base64.urlsafe_b64decode(padded).hex()
    for path, digest in wheel.sha256.items():
        if recorded.get(path) != digest:
            raise ModifiedWheel(f"{wheel.distribution}: RECORD does not have the pinned sha256 of {path}")
    for path, digest in recorded.items():
        if not path.startswith("yr/"):
            continue
        file = found.site / path
        if not file.is_file() or _sha256(file) != digest:
            raise ModifiedWheel(f"{wheel.distribution}: {path} is not the published file")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:] or WHEELS:
        got = installed(name)
        print(json.dumps({"python": got.python, "environment": dict(got.environment), "site": str(got.site)}))
