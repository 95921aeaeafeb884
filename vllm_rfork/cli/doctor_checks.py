"""The doctor's checks of the planner and of what engines need from this host; each returns findings."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import subprocess
import sys

from vllm_rfork.cli.findings import FAIL, NOTE, OK, Finding
from vllm_rfork.cli.machine import Machine
from vllm_rfork.cli.planner_api import TOKEN_VARIABLE, URL_VARIABLE, ask, credentials
from vllm_rfork.config import planner_urls
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import DEBUG_SNAPSHOT, HEALTHZ, READYZ
from vllm_rfork.net.client import without_credentials

_CMA_TIMEOUT_S = 20.0
UNWIND = "libunwind.so.8"
_READY = "planner ready"

_HOLDER = """
import ctypes, sys
secret = ctypes.create_string_buffer(b"cross-memory attach works", 32)
print(ctypes.addressof(secret), flush=True)
sys.stdin.read()
"""
_READER = """
import ctypes, sys
from vllm_rfork.engines.process_memory import read_process
got = ctypes.create_string_buffer(32)
try:
    read_process(int(sys.argv[1]), ctypes.addressof(got), int(sys.argv[2]), 32)
except OSError as error:
    sys.exit(f"{error.strerror} (errno {error.errno})")
sys.exit(None if got.value == b"cross-memory attach works" else "other bytes arrived")
"""


def planner(urls: str | None, timeout_s: float) -> list[Finding]:
    """Check that the planner answers, is ready and admits this caller; each replica by itself if there are several."""
    if not urls:
        return [Finding("planner", NOTE, "no URL given", f"use --url http://host:1223, or set {URL_VARIABLE}")]
    try:
        replicas = planner_urls(urls).split(",")
    except ValueError as error:
        return [Finding("planner", FAIL, f"unusable URL: {error}", "use a base URL such as http://planner:1223")]
    if len(replicas) == 1:
        return _replica(replicas[0], timeout_s)
    found = [_replica(url, timeout_s) for url in replicas]
    leads = any(each.check == _READY and each.state == OK for findings in found for each in findings)
    return [
        dataclasses.replace(each, check=f"{each.check} {without_credentials(url)}")
        for url, findings in zip(replicas, found, strict=True)
        for each in (_beside_a_leader(findings) if leads else findings)
    ]


def _replica(url: str, timeout_s: float) -> list[Finding]:
    try:
        health = ask(url, HEALTHZ, timeout_s=timeout_s)
        ready = ask(url, READYZ, timeout_s=timeout_s)
        inside = ask(url, DEBUG_SNAPSHOT, timeout_s=timeout_s, params={"limit": "0"})
    except PlannerError as error:
        advice = "start it (vllm-rfork planner --host 0.0.0.0), or check address, DNS, firewall and TLS trust"
        return [Finding("planner", FAIL, str(error), advice)]
    return [_health(health.status), _readiness(ready.status, ready.text), _admission(inside.status)]


def _beside_a_leader(findings: list[Finding]) -> list[Finding]:
    """The findings of one replica of several: only one of them leads, and the others answer 503."""
    for each in findings:
        if each.check == _READY and each.found.startswith("503"):
            return [
                findings[0],
                dataclasses.replace(each, state=OK, found="another replica leads", advice=""),
            ]
    return findings


def _health(status: int) -> Finding:
    if status == 200:
        return Finding("planner", OK, f"answers {HEALTHZ}")
    if status == 404:
        return Finding("planner", NOTE, f"has no {HEALTHZ}", "an older planner, unless the URL is another service's")
    return Finding(
        "planner", FAIL, f"{HEALTHZ} answers {status}", "see the log of the planner, and of a proxy before it"
    )


def _readiness(status: int, text: str) -> Finding:
    if status == 200:
        return Finding(_READY, OK, "takes requests, and its store answers")
    if status == 404:
        return Finding(_READY, NOTE, f"has no {READYZ}", "a third-party planner; nothing to do")
    advice = (
        "wait for its start or drain to end; with --store redis://, check that Redis answers and which replica leads"
    )
    return Finding(_READY, FAIL, f"{status}: {text}", advice)


def _admission(status: int) -> Finding:
    has_token = bool(credentials().token)
    if status in {401, 403}:
        advice = f"set {TOKEN_VARIABLE}, or RFORK_TOKEN_FILE, to a token that the planner accepts"
        return Finding("planner token", FAIL, "refused" if has_token else "required, and none is set", advice)
    if status == 200 and has_token:
        return Finding("planner token", OK, "accepted")
    if status == 200:
        return Finding(
            "planner token", NOTE, "not required: every host that reaches the planner may use it", "see SECURITY.md"
        )
    if status in {404, 405}:
        advice = "a third-party planner; nothing to do"
    else:
        advice = "see the planner's log and check its store, then run this again"
    return Finding("planner token", NOTE, f"unknown: {DEBUG_SNAPSHOT} answers {status}", advice)


def is_worker_host() -> bool:
    """Check if vLLM is installed, so that workers may start on this host; does not import it."""
    return importlib.util.find_spec("vllm") is not None


def libunwind(*, wanted: bool) -> Finding:
    """Check for the library that the YuanRong wheels need and do not contain."""
    try:
        ctypes.CDLL(UNWIND)
    except OSError:
        advice = "for engine yuanrong, on Debian and Ubuntu: apt-get install libunwind8"
        return Finding("libunwind8", FAIL if wanted else NOTE, f"{UNWIND} cannot be loaded", advice)
    return Finding("libunwind8", OK, f"{UNWIND} can be loaded")


def cross_memory_attach() -> Finding:
    """Check that one process may read another's memory, as engine nixl does between CPU workers of one machine.

    Tried between two children of this process: the kernel's rule for a parent and its child is milder.
    """
    check = "cross-memory attach"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=pipe, stdout=pipe, text=True) as holder:  # noqa: S603
        try:
            assert holder.stdout is not None  # noqa: S101 - for the type checker; it is a pipe
            address = holder.stdout.readline().strip()
            reader = subprocess.run(  # noqa: S603 - this very Python, and a constant
                [sys.executable, "-c", _READER, str(holder.pid), address],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_CMA_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return Finding(check, FAIL, f"did not end within {_CMA_TIMEOUT_S:g} s", "run this again")
        finally:
            holder.kill()
    if reader.returncode == 0:
        return Finding(check, OK, "process_vm_readv works between two processes of this user")
    said = (reader.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(check, NOTE, f"process_vm_readv: {said}", _cma_advice())


def _cma_advice() -> str:
    """Ways to allow it, given this machine's kernel setting."""
    try:
        scope = Machine().ptrace_scope()
    except OSError:
        scope = None
    if scope not in {None, "0"}:
        allow = f"kernel.yama.ptrace_scope is {scope}: set it to 0, or give the workers CAP_SYS_PTRACE"
    else:
        allow = "let the container's seccomp profile pass process_vm_readv, or give it CAP_SYS_PTRACE"
    return (
        f"CPU workers of one machine need it with engine nixl (GPUs, RDMA do not): {allow}; one user, one pid namespace"
    )
