"""Pictures of the dashboard with small and large fleets: ``python -m tests.planner.screenshots FOLDER [SIZE ...]``.

Each fleet is shown at desktop and phone width: all of it, one model, one key, and a search.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from tests.planner.browser import DESKTOP, Chromium, Page
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.settings import settings_from
from vllm_rfork.planner.store.base import Announcement, Ask, Granted, Outcome
from vllm_rfork.planner.store.key_use import KeyNames
from vllm_rfork.planner.store.memory import MemoryStore

TOKEN = "token-of-the-screenshots"
PHONE = (390, 844)
SIZES = (0, 3, 300, 5000)
MODELS = ("deepseek-v4-flash", "qwen4-235b-a22b-instruct", "llama-5-70b", "gemma-4-27b-it")
CAUSES = ("EngineError", "SeedError", "VerificationError")
USUAL, OTHER = "3f2a8c6d0f2b4a7e91c05d7788ab10fe", "b1946ac92492d2347c6235b4d2611184"
DIFFERS = "options.model.dtype: float16 here, bfloat16 on 61 seeds; vllm: 0.25.1 here, 0.26.0 there"


class Clock:
    """The real time, and how far it was moved."""

    def __init__(self) -> None:
        self.moved_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.moved_s


class Builder:
    """Makes a fleet whose seeds were forked from each other, with some of everything that can happen."""

    def __init__(self, size: int) -> None:
        self.clock = Clock()
        self._size = size
        self._ranks = 1 if size < 10 else 8
        self._random = random.Random(size)
        rules = settings_from(
            {"failures_before_backoff": 2, "backoff_sec": 300, "lease_ttl_sec": 900, "stale_after_sec": 900}
        )
        self.store = MemoryStore(rules.rules(), self.clock)

    def key(self, number: int) -> tuple[str, KeyNames]:
        """Return the key of a seed, and its names."""
        model = MODELS[number // self._ranks % len(MODELS)]
        return f"/models/{model}$prod$kv_both$0${number % self._ranks}", KeyNames(f"/models/{model}", "prod")

    def _seed(self, number: int) -> Announcement:
        key, names = self.key(number)
        first = self._ranks * len(MODELS)
        odd = self._size > 10 and number % 97 == 5
        return Announcement(
            key=key,
            seed=SeedAddress(f"10.{20 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}", 31001, number % 8),
            names=names,
            fingerprint=OTHER if odd else USUAL,
            differs=DIFFERS if odd else "",
            slots=4,
            epoch=f"epoch{number}",
            labels={"host": f"gpu-node-{number // 8:04d}", "pod": f"{names.model[8:14]}-{number:05d}-x7k2p"},
            parent=str(self._seed(self._random.randrange(number % first, number, first)).seed)
            if number >= first
            else "",
            intent=f"loader{number}" if number < first else "",
        )

    async def build(self) -> None:
        """Load, announce, fork, fail, wait and drain."""
        if not self._size:
            return
        first = min(self._size, self._ranks * len(MODELS))
        for number in range(first):
            key, names = self.key(number)
            await self.store.acquire(Ask(key=key, receiver="10.9.0.1", intent=f"loader{number}", names=names))
        self.clock.moved_s += 28
        for number in range(self._size):
            await self.store.announce(self._seed(number))
        for number in range(min(220, 4 * self._size)):
            await self._fork(number)
        for number in range(min(60, self._size // 3)):
            await self._lease(1000 + number, self._random.randrange(self._size))
        await self._queue()
        if self._size > 10:
            drained, absent = self._seed(17), self._seed(25)
            await self.store.drain(drained.key, drained.seed, undo=False)
            await self.store.leave(absent.seed, await self.store.attend(absent, held=True), answered=False)
        self.clock.moved_s += 2
        for number in range(self._size):
            if number % 50:
                await self.store.announce(self._seed(number))

    async def _lease(self, number: int, near: int) -> Granted | None:
        key, names = self.key(near)
        granted = await self.store.acquire(
            Ask(
                key=key,
                receiver=f"10.77.{number // 250}.{number % 250 + 1}",
                labels={"host": f"gpu-node-{900 + number % 64:04d}", "pod": f"{names.model[8:14]}-{number:05d}-m4q8z"},
                intent=f"w{number}",
                fingerprint=USUAL,
                names=names,
            )
        )
        return granted if isinstance(granted, Granted) else None

    async def _fork(self, number: int) -> None:
        failed = number % 23 == 7
        lease = await self._lease(number, 0 if failed else self._random.randrange(self._size))
        if lease is None:
            return
        self.clock.moved_s += self._random.uniform(0.5, 1.5) * (120 / min(220, 4 * self._size))
        lane = self._random.choice(["cuda_ipc", "nixl/rdma", "nixl/rdma", "nixl/tcp"])
        outcome = Outcome(True, nbytes=15_200_000_000, duration_s=self._random.uniform(0.2, 1.6), lane=lane)
        if failed:
            outcome = Outcome(False, cause=CAUSES[number % 3], side="seed", lane=lane)
        await self.store.release(lease.seed, lease.user_id, outcome)

    async def _queue(self) -> None:
        """Fill the slots of one key, and let receivers wait for it and for a worker that loads."""
        number = 2000
        while await self._lease(number, 0) is not None:
            number += 1
        new = ("/models/new-model$prod$kv_both$0$0", KeyNames("/models/new-model", "prod"))
        for number in range(min(24, 2 + self._size // 10)):
            key, names = new if number % 3 == 2 else self.key(0)
            if number % 3 == 2:
                labels = {"pod": f"new-{number}-abcde", "host": "gpu-node-0700"}
                ask = Ask(
                    key=key, receiver="10.9.9.9", intent=f"n{number}", names=names, labels=labels, fingerprint=USUAL
                )
                await self.store.acquire(ask)
            labels = {"host": f"gpu-node-{number:04d}", "pod": f"scale-out-{number:03d}-q9w8e"}
            receiver, ticket = f"10.88.0.{number + 1}", f"t{number}"
            await self.store.acquire(
                Ask(
                    key=key, receiver=receiver, wait_s=120, ticket=ticket, labels=labels, names=names, fingerprint=USUAL
                )
            )


async def take(page: Page, path: Path) -> None:
    """One picture of the whole page."""
    await page.screenshot(path)
    print(path)


async def pictures(chromium: Chromium, folder: Path, size: int) -> None:
    """All pictures of a fleet of ``size`` seeds."""
    builder = Builder(size)
    await builder.build()
    settings = settings_from({"port": 0})
    tokens = Tokens(None, {"RFORK_TOKEN": TOKEN})
    async with PlannerProcess(settings, store=builder.store, tokens=tokens).running() as process:
        model = f"#model={quote(f'/models/{MODELS[0]}', safe='')}&strategy=prod"
        views = {
            "fleet": ("", ""),
            "model": (model, "Only the model"),
            "key": (f"#key={quote(builder.key(0)[0], safe='')}", "Only the key"),
        }
        for window in (DESKTOP, PHONE):
            async with chromium.page(window) as page:
                await page.go(process.url)
                await page.shows("#login", "requires a token")
                await page.type("#token", TOKEN)
                await page.shows("#live", "live")
                for name, (address, shown) in views.items():
                    await page.run(f"location.hash = {address!r}")
                    await page.shows("#chosen" if shown else "#seeds", shown)
                    await take(page, folder / f"{size}-seeds-{name}-{window[0]}.png")
                    if not size:
                        break
                if size > 10:
                    await page.run("location.hash = ''")
                    await page.until("document.querySelector('#chosen').hidden")
                    await page.run("document.querySelector('#filter').focus()")
                    await page.command("Input.insertText", text="scale-out-00")
                    await page.until("!document.querySelector('#seeds tbody').rows.length")
                    await take(page, folder / f"{size}-seeds-search-{window[0]}.png")


async def main(folder: Path, sizes: list[int]) -> None:
    """Write all pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        chromium = Chromium(Path(profile))
        try:
            for size in sizes:
                await pictures(chromium, folder, size)
        finally:
            chromium.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]] or list(SIZES)))
