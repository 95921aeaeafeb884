"""Single files of published wheels: the index pip is set up with, and ranges of bytes instead of whole wheels."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60
#: Read at a time; a wheel's table of contents takes one to three.
BLOCK_NBYTES = 1 << 20
_MAX_INDEX_NBYTES = 64 << 20


class ReleaseError(RuntimeError):
    """The index, or a release on it, is not what we need."""


@dataclass(frozen=True)
class Wheel:
    """One file of one release, as the index names it."""

    package: str
    version: str
    file: str
    sha256: str
    url: str


def index_url() -> str:
    """What pip on this machine uses, by its own account."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if configured:
        return configured
    from pip._internal.models.index import PyPI  # pip's default has no public name

    return str(PyPI.simple_url)


def wheels(package: str) -> dict[str, Wheel]:
    """Version → its wheel for x86-64 Linux, of all that are not yanked."""
    request = _request(f"{index_url().rstrip('/')}/{package}/", Accept="application/vnd.pypi.simple.v1+json")
    page = json.loads(_read(request, _MAX_INDEX_NBYTES))
    found: dict[str, Wheel] = {}
    for file in page["files"]:
        name: str = file["filename"]
        if name.endswith("x86_64.whl") and not file.get("yanked"):
            version = name.split("-")[1]
            found[version] = Wheel(package, version, name, file["hashes"]["sha256"], file["url"])
    return found


def _request(url: str, method: str = "GET", **headers: str) -> urllib.request.Request:
    if not url.startswith(("http://", "https://")):
        raise ReleaseError(f"the index says {url.partition(':')[0]}, and this reads http alone")
    return urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - the scheme was just looked at


def _opened(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - only requests made above


def _read(request: urllib.request.Request, most_nbytes: int) -> bytes:
    with _opened(request) as answer:
        if request.has_header("Range") and answer.status != 206:
            raise ReleaseError("the index does not give parts of files")
        data = answer.read(most_nbytes + 1)
    if len(data) > most_nbytes:
        raise ReleaseError(f"the answer is longer than {most_nbytes} bytes")
    return bytes(data)


class RemoteFile(io.RawIOBase):
    """A file on the index, read in blocks of which each is fetched once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._blocks: dict[int, bytes] = {}
        self._position = 0
        with _opened(_request(url, method="HEAD")) as answer:
            self._nbytes = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """At most to the end of a block."""
        if self._position >= self._nbytes:
            return 0
        number, offset = divmod(self._position, BLOCK_NBYTES)
        if number not in self._blocks:
            last = min(self._nbytes, (number + 1) * BLOCK_NBYTES) - 1
            request = _request(self._url, Range=f"bytes={number * BLOCK_NBYTES}-{last}")
            self._blocks[number] = _read(request, BLOCK_NBYTES)
        part = self._blocks[number][offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


class Sources:
    """The Python files of a wheel, by module."""

    def __init__(self, wheel: Wheel) -> None:
        self._archive = zipfile.ZipFile(io.BufferedReader(RemoteFile(wheel.url), BLOCK_NBYTES))
        self._names = set(self._archive.namelist())

    def text(self, module: str) -> str | None:
        """The source of ``module``, a file or a package's ``__init__``; None where there is none. CRC-checked."""
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self._names:
                return self._archive.read(name).decode()
        return None
