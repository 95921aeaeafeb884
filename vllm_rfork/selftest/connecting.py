"""The connecting side of a self-test between two hosts: reads from the seeds that the other host offers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from vllm_rfork.clients.seed_http import SeedHttp
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.quoting import MAX_MESSAGE, printable
from vllm_rfork.net.client import Answer
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.selftest import offer
from vllm_rfork.selftest.attempts import Attempt, from_elsewhere, in_order
from vllm_rfork.selftest.offer import Offer, Seed
from vllm_rfork.selftest.report import FAILED, Report, report
from vllm_rfork.selftest.roles import Trial

_CALL_S = 30.0


class _Unreachable(Exception):
    """There is no offer; the text says why and what to do."""


def connect(
    address: str, trial: Trial, engines: Sequence[str], credentials: Credentials, *, setting: str, every: bool = False
) -> Report:
    """Read from the serving host at ``address`` (``host:port``) with the first engine of ``engines`` that works.

    Args:
        trial: its engine is replaced by each of ``engines``; its ``nbytes`` bounds the offer.
        setting: the engines as the user named them, for the title.
        every: try them all.
    """
    http = SeedHttp("serving host", credentials)
    title = f"selftest {setting}: {address} -> {trial.device} of this host"
    try:
        found = asyncio.run(_fetch(http, address, trial.nbytes))
    except (SeedError, offer.UnusableOffer, _Unreachable) as error:
        return Report(FAILED, [f"{title}: {error}"])
    title = f"selftest {setting}: {printable(found.device)} of {address} -> {trial.device} of this host"
    seeds = {seed.engine: seed for seed in found.seeds}

    def attempt(bounded: Trial, deadline: float) -> Attempt:
        seed = seeds.get(bounded.engine, Seed(bounded.engine, reason="it was not started with this engine"))
        if seed.published is None:
            return Attempt(bounded.engine, "refused", f"on the serving host: {printable(seed.reason, MAX_MESSAGE)}")
        return from_elsewhere(bounded, seed.published, deadline)

    trials = [replace(trial, engine=engine) for engine in engines]
    attempts = in_order(trials, trial.timeout_s, attempt, every=every)
    made = report(title, attempts, _hints(found, attempts))
    lane = next((each.result.lane for each in attempts if each.result is not None), "")
    try:
        asyncio.run(_tell(http, address, found.client, made.code, lane))
    except SeedError as error:
        made.lines.append(f"the serving host does not know of this end: {error}")
    return made


async def _fetch(http: SeedHttp, address: str, most_nbytes: int) -> Offer:
    answer = await http.get(address, offer.OFFER, timeout_s=_CALL_S, max_body_nbytes=offer.MAX_OFFER_NBYTES)
    if answer.status == 401:
        raise _Unreachable(
            "the serving host refuses the token: set RFORK_TOKEN as in the command that it printed, or RFORK_TOKEN_FILE"
        )
    if answer.status != 200:
        raise _Unreachable(f"the serving host answers {answer}")
    return offer.decode(answer.body, most_nbytes)


async def _tell(http: SeedHttp, address: str, client: str, code: int, lane: str) -> Answer:
    params = {"client": client, "code": str(code), "lane": lane}
    return await http.get(address, offer.DONE, timeout_s=_CALL_S, params=params)


def _hints(found: Offer, attempts: Sequence[Attempt]) -> list[str]:
    """The advantage of RDMA between two hosts that read without it."""
    here = offer.Host.here()
    lanes = [each.result.lane for each in attempts if each.result is not None]
    if not lanes or (here.boot and here.boot == found.host.boot) or any("rdma" in lane for lane in lanes):
        return []
    sides = {"this host": here.rdma_obstacle, "the serving host": found.host.rdma_obstacle}
    obstacles = [f"{name}: {printable(obstacle)}" for name, obstacle in sides.items() if obstacle is not None]
    if obstacles:
        return [f"RDMA; {'; '.join(obstacles)}"]
    return ["RDMA, which both hosts have: install an engine that uses it, such as nixl, on both"]
