"""A planner with a token, and certificates for the workers: what the level ``code`` of ``rfork_caches`` needs."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.authority import Authority
from zoo.planner import ROOT, eventually, free_port

HOST = "127.0.0.1"


class Fleet:
    """The planner of all starts, with its files in ``folder``; :meth:`stop` ends it.

    Attributes:
        token: of planner and workers, for ``RFORK_TOKEN``.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        authority = Authority(folder / "tls")
        self._ca = authority.file
        self._certificate, self._key = authority.issue("worker", names=(HOST, "localhost"))
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        environment = {**os.environ, "RFORK_TOKEN": self.token}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (folder / "planner.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_rfork.cli.main", "planner", "--port", str(port)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._is_up, "the planner answers", 60)

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"the planner ended with status {self._process.returncode}; see planner.log")
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):  # noqa: S310 - its own URL
                return True
        except (urllib.error.URLError, OSError):
            return False

    def options(self, model_url: str, caches: str, engine: str) -> dict[str, Any]:
        """``model_loader_extra_config`` of a worker; ``caches`` and ``engine`` are options of that name."""
        return {
            "model_url": model_url,
            "model_deploy_strategy_name": "bench",
            "rfork_scheduler_url": self.url,
            "rfork_engine": engine,
            "rfork_caches": caches,
            "rfork_tls_ca_file": str(self._ca),
            "rfork_tls_cert_file": str(self._certificate),
            "rfork_tls_key_file": str(self._key),
            "rfork_seed_tls": "require",
            "rfork_seed_advertise_host": HOST,
        }

    def stop(self) -> None:
        """End the planner."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
