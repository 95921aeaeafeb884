"""Load from callers without a token, on a planner and a seed service: ``python -m bench.strangers``.

Everything runs on the loopback of this machine, bounded in connections and seconds. ``--root`` measures another
checkout with the same load. Prints one line for each kind of load: memory before and at its peak, whether a new caller
is answered meanwhile, and the size of the log.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SNAPSHOT = b"GET /debug/snapshot?limit=100000 HTTP/1.1\r\nHost: x\r\n\r\n"
_SEED = """
import asyncio
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.seed_service import SeedService
async def main():
    made = Manifest(seed_key="k", fingerprint="f", epoch="e", layout="runtime", engine="nixl", endpoint="x",
                    regions=(), spans=(), tensors=())
    service = SeedService(made, bind_host="127.0.0.1")
    await service.start()
    print(f"listens on http://127.0.0.1:{service.port}", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Server:
    """One process under load, its memory and its log."""

    def __init__(self, root: Path, command: list[str], folder: Path) -> None:
        self._log = folder / f"log-{time.monotonic_ns()}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log
            )
        self.port = self._until_it_listens()
        self.mark()

    def mark(self) -> None:
        """Take the present values as those before the load."""
        self.most_mb = self.before_mb = self.rss_mb()
        self.most_kernel_mb = self.kernel_mb()
        self._log_nbytes = self._log.stat().st_size

    def _until_it_listens(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self._log.read_text(errors="replace").splitlines():
                if "listens on http" in line:
                    return int(line.partition("://")[2].partition(":")[2].split()[0])
            time.sleep(0.05)
        raise SystemExit("the server under load did not start:\n" + self._log.read_text(errors="replace"))

    def rss_mb(self) -> float:
        """Resident memory in MB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(x for x in lines if "VmRSS" in x).split()[1]) * 1024 / 1e6

    @staticmethod
    def kernel_mb() -> float:
        """Memory of the kernel for TCP on this machine, in MB."""
        line = next(x for x in Path("/proc/net/sockstat").read_text().splitlines() if x.startswith("TCP:"))
        return int(line.split()[-1]) * resource.getpagesize() / 1e6

    def watch(self, seconds: float) -> None:
        """Keep the load up for ``seconds`` and record the peak memory."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.most_mb = max(self.most_mb, self.rss_mb())
            self.most_kernel_mb = max(self.most_kernel_mb, self.kernel_mb())
            time.sleep(0.1)

    def others_are_answered(self, request: bytes = HEALTH, timeout_s: float = 5.0) -> bool:
        """Return True if a new caller is answered with status 200."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(request)
            return sock.recv(64).startswith(b"HTTP/1.1 200")
        return False

    def end(self, what: str, answered: bool) -> None:
        """Stop the process and print the line."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        log_kb = (self._log.stat().st_size - self._log_nbytes) / 1e3
        print(
            f"{what:56} {self.before_mb:5.0f} -> {self.most_mb:5.0f} MB, kernel {self.most_kernel_mb:5.0f} MB; "
            f"others are answered: {'yes' if answered else 'NO':3}; log {log_kb:8.1f} kB",
            flush=True,
        )


def connect(port: int, count: int, sent: bytes = b"") -> list[socket.socket]:
    """Open connections that have sent ``sent`` and read nothing."""
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(5)
        try:
            sock.connect(("127.0.0.1", port))
            sock.setblocking(False)
            sock.send(sent)
        except OSError:  # refused, or closed already, which is the purpose of the load
            sock.close()
            continue
        socks.append(sock)
    return socks


@contextlib.contextmanager
def held(port: int, count: int, sent: bytes = b"") -> Iterator[None]:
    """Connections as :func:`connect` makes them, for a block."""
    socks = connect(port, count, sent)
    try:
        yield
    finally:
        for each in socks:
            each.close()


class Loads:
    """The loads, on servers of the checkout ``root``."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._folder = folder

    def _planner(self, *flags: str, open_files: int = 0, uvloop: bool = True) -> Server:
        code = "from vllm_rfork.planner.command import planner; planner()"
        if not uvloop:
            code = f"import sys; sys.modules['uvloop'] = None; {code}"
        few = ["prlimit", f"--nofile={open_files}", "--"] if open_files else []
        command = [*few, sys.executable, "-c", code, "--port", "0", "--trust-announced-address", *flags]
        return Server(self._root, command, self._folder)

    def unread(self) -> None:
        """Pipelined answers that nobody reads, on as many connections as the limit permits."""
        server = self._planner("--max-connections", "2000")
        with held(server.port, 2000, PAGE * 500):
            server.watch(40)
            answered = server.others_are_answered()
        server.end("2,000 connections read no answer, limit 2,000", answered)

    def idle(self) -> None:
        """Connections that send nothing, as many as the limit permits."""
        server = self._planner("--max-connections", "2000")
        with held(server.port, 2000):
            server.watch(2)
            answered = server.others_are_answered()
        server.end("2,000 connections send nothing, limit 2,000", answered)

    def snapshots(self) -> None:
        """Large answers that nobody reads."""
        server = self._planner("--stale-after-sec", "3600")
        load = [sys.executable, "-m", "bench.planner_load", "fill", "--port", str(server.port)]
        subprocess.run([*load, "--seeds", "50000", "--keys", "50"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        server.mark()
        with held(server.port, 20, SNAPSHOT):
            server.watch(15)
            answered = server.others_are_answered(timeout_s=20)
        server.end("20 snapshots of 50,000 seeds are not read", answered)

    def handshakes(self) -> None:
        """TLS handshakes that stop after the first bytes."""
        cert, key = self._folder / "cert.pem", self._folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
        subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
        server = self._planner("--tls-cert", str(cert), "--tls-key", str(key), "--max-connections", "1000")
        with held(server.port, 9000, b"\x16\x03\x01"):
            server.watch(3)
            answered = True
        server.end("9,000 TLS handshakes do not go on, limit 1,000", answered)

    def descriptors(self) -> None:
        """More connections than descriptors of the process."""
        for loop in ("uvloop", "asyncio"):
            server = self._planner(open_files=110, uvloop=loop == "uvloop")
            with held(server.port, 300):
                server.watch(10)
                answered = server.others_are_answered()
            server.end(f"300 connections for 10 s, 110 descriptors, {loop}", answered)

    def headers(self) -> None:
        """One request whose headers do not end."""
        server = self._planner()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n")
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline:
                sock.sendall(b"X: y\r\n" * 50_000)
                server.most_mb = max(server.most_mb, server.rss_mb())
        server.end("one connection sends headers for 8 s", server.others_are_answered())

    def seed(self) -> None:
        """Connections to a seed service that send nothing."""
        server = Server(self._root, [sys.executable, "-c", _SEED], self._folder)
        with held(server.port, 65):
            server.watch(1)
            answered = server.others_are_answered(HEALTH.replace(b"/healthz", b"/rfork_fetch_seed"))
        server.end("65 connections to a seed service send nothing", answered)

    def rate(self) -> None:
        """Rate of a legitimate caller with a connection for each call, as workers have."""
        server = self._planner()
        best = 0.0
        for _ in range(5):
            began, calls = time.perf_counter(), 0
            while time.perf_counter() - began < 2:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                connection.close()
                calls += 1
            best = max(best, calls / (time.perf_counter() - began))
        server.end(f"one legitimate caller, {best:.0f} calls/s, each on a connection of its own", True)


def main() -> None:
    """Run the loads named on the command line, or all."""
    names = [name for name, value in vars(Loads).items() if callable(value) and not name.startswith("_")]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loads", nargs="*", choices=[[], *names], help="default: all")
    parser.add_argument("--root", type=Path, default=HERE, help="checkout to measure")
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        loads = Loads(given.root.resolve(), Path(folder))
        for name in given.loads or names:
            getattr(loads, name)()


if __name__ == "__main__":
    main()
