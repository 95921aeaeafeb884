"""Single files of published wheels, read by ranges of bytes from the package index that pip is configured for."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

TIMEOUT_S = 60
#: Bytes that are read at a time; a wheel's directory takes one to three blocks.
BLOCK_NBYTES = 1 << 20
_MAX_INDEX_NBYTES = 64 << 20


class ReleaseError(RuntimeError):
    """The index, or a release on it, cannot be used."""


@dataclass(frozen=True)
class Wheel:
    """One file of one release, as the index names it."""

    package: str
    version: str
    file: str
    sha256: str
    url: str


def index_url() -> str:
    """The index that pip on this machine is configured for."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if configured:
        return configured
    from pip._internal.models.index import PyPI  # pip's default has no public name

    return str(PyPI.simple_url)


def wheels(package: str) -> dict[str, Wheel]:
    """Version → its wheel for x86-64 Linux, of all that are not yanked."""
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked
        _checked(f"{index_url().rstrip('/')}/{package}/"), headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - likewise
        text = answer.read(_MAX_INDEX_NBYTES + 1)
    if len(text) > _MAX_INDEX_NBYTES:
        raise ReleaseError(f"the index's page of {package} is longer than {_MAX_INDEX_NBYTES} bytes")
    found: dict[str, Wheel] = {}
    for file in json.loads(text)["files"]:
        name: str = file["filename"]
        if name.endswith("x86_64.whl") and not file.get("yanked"):
            version = name.split("-")[1]
            found[version] = Wheel(package, version, name, file["hashes"]["sha256"], file["url"])
    return found


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ReleaseError(f"the index has a URL of scheme {url.partition(':')[0]}; only http and https are supported")
    return url


class Sources:
    """The Python files of a wheel, by module."""

    def __init__(self, wheel: Wheel) -> None:
        index = HTTPFileSystem(client_kwargs={"timeout": aiohttp.ClientTimeout(total=TIMEOUT_S)})
        try:
            # Each block is fetched once.
            file = index.open(_checked(wheel.url), block_size=BLOCK_NBYTES, cache_type="blockcache")
            self._archive = zipfile.ZipFile(file)
        except ValueError as error:
            raise ReleaseError(f"the index does not send ranges of {wheel.file}: {error}") from error
        self._names = set(self._archive.namelist())

    def text(self, module: str) -> str | None:
        """The source of ``module``, a file or a package's ``__init__``, verified by its CRC; None if there is none."""
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self._names:
                return self._archive.read(name).decode()
        return None
