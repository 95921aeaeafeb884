"""The doctor's check of the announced address.

``VLLM_HOST_IP`` often names an address of the data network while the planner is reached over another one. A planner
that accepts only the caller's own address then answers 403, and the worker never becomes a seed.
"""

from __future__ import annotations

import os

from vllm_rfork.cli.findings import FAIL, NOTE, OK, Finding
from vllm_rfork.cli.planner_api import ask
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import REMOVE_SEED, SEED_KEY, SEED_REFCNT, SeedAddress
from vllm_rfork.net.advertise import is_loopback, is_unspecified

#: Not a worker's key. The address is checked first, and withdrawing a seed that does not exist changes nothing.
_NO_KEY = "vllm-rfork doctor"
_HOST_VARIABLE = "VLLM_HOST_IP"


def announced_address(url: str | None, timeout_s: float) -> list[Finding]:
    """The planner's reaction to ``VLLM_HOST_IP`` from this host; nothing if the variable is not set."""
    host = os.environ.get(_HOST_VARIABLE, "").strip()
    check = "announced address"
    if not host or not url:
        return []
    if is_unspecified(host) or is_loopback(host):
        advice = f"set {_HOST_VARIABLE}, or rfork_seed_advertise_host, to an address that other workers reach"
        return [Finding(check, NOTE, f"{_HOST_VARIABLE} is {host}: no other host can connect to it", advice)]
    headers = {SEED_KEY: _NO_KEY, SEED_REFCNT: "0", **SeedAddress(host, 1, 0).headers()}
    try:
        answer = ask(url, REMOVE_SEED, timeout_s=timeout_s, method="POST", headers=headers)
    except PlannerError as error:
        return [Finding(check, NOTE, f"unknown: {error}", "see the planner's findings above")]
    if answer.status == 403:
        advice = (
            "give the planner and the workers a token, or set rfork_seed_advertise_host to the address of this host "
            "that the planner sees"
        )
        return [Finding(check, FAIL, f"{_HOST_VARIABLE} is {host}, and the planner answers 403: {answer.text}", advice)]
    if answer.status in {401, 405} or answer.status >= 500:
        return [Finding(check, NOTE, f"unknown: {REMOVE_SEED} answers {answer}", "see the planner's findings above")]
    return [Finding(check, OK, f"{_HOST_VARIABLE} ({host}) may be announced from here")]
