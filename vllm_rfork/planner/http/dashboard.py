"""The dashboard: its page, and a cache of the data that the page shows.

The page is public and contains nothing about the fleet; the data is the store's overview, for callers with the token.
All callers that ask for the same share one overview. It is made at most once a second, and takes only a small part of
the planner's time, however many people look.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from vllm_rfork.planner.store.key_use import KeyNames

#: Entries of each list on the page.
LIMIT = 100
#: The page asks again after this many seconds.
EVERY_S = 1.0
#: An overview is reused for this many seconds.
FRESH_S = 1.0
#: The pause after an overview, as a multiple of the time that it took.
COOLDOWN_FACTOR = 20.0
#: The longest such pause, in seconds.
MAX_COOLDOWN_S = 10.0
#: Answers a second to all callers together; more are refused.
ANSWERS_PER_S = 40.0
#: Views that are cached.
MAX_VIEWS = 16

_FOLDER = "page"
#: In this order: each uses what the earlier ones define.
_SCRIPTS = ("elements.js", "help.js", "columns.js", "script.js", "asking.js")


class View(NamedTuple):
    """The part of the fleet that a page shows: all of it, one ``key``, one model, or what contains ``find``."""

    key: str | None = None
    names: KeyNames | None = None
    find: str = ""


class RateLimited(Exception):
    """Too many callers ask. HTTP 429."""


@dataclass(frozen=True)
class Page:
    """The page, compressed, and the headers that go with it."""

    body: bytes
    headers: Mapping[str, str]


def load_page() -> Page:
    """The page from the package's own files, with its style and script in it.

    The policy lets the page load nothing, use exactly this style and script, and connect to its own planner only.
    ``require-trusted-types-for`` makes the browser refuse data that is about to be parsed as HTML.
    """
    folder = resources.files(__package__).joinpath(_FOLDER)
    html, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("index.html", "style.css", *_SCRIPTS)
    )
    script = f'"use strict";\n{{\n{"".join(scripts)}}}\n'
    body = html.replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(style)}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return Page(
        gzip.compress(body.encode("utf-8"), mtime=0),
        {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Encoding": "gzip",
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
        },
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


class OverviewCache:
    """One overview of each view, shared by all who ask for it.

    Args:
        make: one overview, encoded.
        clock: seconds that never go backwards.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        make: Callable[[View], Awaitable[bytes]],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._make = make
        self._clock = clock
        self._sleep = sleep
        self._answers: OrderedDict[View, tuple[float, bytes]] = OrderedDict()
        self._making: dict[View, asyncio.Task[bytes]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._pause_until = 0.0
        self._allowance = ANSWERS_PER_S
        self._counted_at = clock()

    async def get(self, view: View) -> bytes:
        """Return the overview, compressed; not older than it takes to make one and to pause after it.

        Raises:
            RateLimited: too many callers ask, or for too many different views.
            StoreUnavailable: the store is unavailable.
        """
        self._count()
        known = self._answers.get(view)
        if known is not None and self._clock() - known[0] < FRESH_S:
            return known[1]
        task = self._making.get(view)
        if task is None:
            if len(self._making) >= MAX_VIEWS:
                raise RateLimited("too many different keys or searches are asked for")
            task = self._making[view] = asyncio.get_running_loop().create_task(self._make_one(view))
            task.add_done_callback(lambda done: self._made(view, done))
        # A caller that hangs up must not cancel it for the others.
        return await asyncio.shield(task)

    def _made(self, view: View, done: asyncio.Task[bytes]) -> None:
        del self._making[view]
        if not done.cancelled():
            done.exception()  # fetched, even if everybody who waited has hung up

    async def _make_one(self, view: View) -> bytes:
        async with self._one_at_a_time:
            await self._sleep(max(0.0, min(self._pause_until - self._clock(), MAX_COOLDOWN_S)))
            started_at = self._clock()
            try:
                body = gzip.compress(await self._make(view), 3)
            finally:
                ended_at = self._clock()
                self._pause_until = ended_at + COOLDOWN_FACTOR * (ended_at - started_at)
        self._answers[view] = (ended_at, body)
        self._answers.move_to_end(view)
        while len(self._answers) > MAX_VIEWS:
            self._answers.popitem(last=False)
        return body

    def _count(self) -> None:
        now = self._clock()
        self._allowance = min(ANSWERS_PER_S, self._allowance + (now - self._counted_at) * ANSWERS_PER_S)
        self._counted_at = now
        if self._allowance < 1:
            raise RateLimited("too many callers ask for the dashboard")
        self._allowance -= 1
