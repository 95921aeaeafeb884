"""A real headless Chromium, driven over its DevTools protocol with nothing but aiohttp."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

MISSING = "chromium is needed to test the dashboard (Debian: apt-get install chromium)"
DESKTOP, PHONE = (1280, 900), (360, 740)
_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--mute-audio",
)
_VISIBLE = "(e => e?.checkVisibility() ? e.innerText : '')(document.querySelector({}))"
_DEADLINE_S = 60.0  # on a busy machine; nothing waits for it where all is well


def program() -> str:
    """Where Chromium is."""
    found = shutil.which("chromium")
    assert found, MISSING
    return found


class Chromium:
    """The browser's process; every test opens pages of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [program(), *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # its sandbox refuses to run as root
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.port, self._path = self._until_it_listens()

    def _until_it_listens(self) -> tuple[int, str]:
        file, deadline = self._folder / "DevToolsActivePort", time.monotonic() + _DEADLINE_S
        while not (file.exists() and "\n" in file.read_text()):
            assert self._process.poll() is None, "chromium ended at once"
            assert time.monotonic() < deadline, "chromium does not listen"
            time.sleep(0.02)
        port, path = file.read_text().splitlines()
        return int(port), path

    def stop(self) -> None:
        """End it with everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @contextlib.asynccontextmanager
    async def page(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> AsyncIterator[Page]:
        """A blank page with a memory of its own, ``size`` in CSS pixels; a narrow one is a phone's."""
        async with aiohttp.ClientSession() as session, self._socket(session, self._path) as browser:
            context = await browser.command("Target.createBrowserContext")
            # In a window of its own: a page behind another one is hidden, and rests.
            target = await browser.command("Target.createTarget", url="about:blank", newWindow=True, **context)
            try:
                async with self._socket(session, f"/devtools/page/{target['targetId']}") as page:
                    await page.prepare(size, dark)
                    yield page
            finally:
                await browser.command("Target.disposeBrowserContext", **context)

    @contextlib.asynccontextmanager
    async def _socket(self, session: aiohttp.ClientSession, path: str) -> AsyncIterator[Page]:
        async with session.ws_connect(f"ws://127.0.0.1:{self.port}{path}", max_msg_size=0) as socket:
            page = Page(socket)
            reader = asyncio.create_task(page.read())
            try:
                yield page
            finally:
                reader.cancel()


class Page:
    """One page: goes somewhere, runs JavaScript there, and remembers what it loaded and complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        #: every URL that the page asked for, and every error that it or the browser reported
        self.requests: list[str] = []
        self.errors: list[str] = []

    async def read(self) -> None:
        """Take what the browser says, until it goes away."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["source"] != "network":
                self.errors.append(json.dumps(said["params"]["entry"]))

    async def command(self, method: str, **params: Any) -> Any:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, _DEADLINE_S)
        assert "result" in said, (method, said)
        return said["result"]

    async def prepare(self, size: tuple[int, int], dark: bool) -> None:
        """Listen to what the page does, and give it its size and colours."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.command(f"{domain}.enable")
        width, height = size
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # what moves is painted all the time
        await self.command("Emulation.setEmulatedMedia", features=[scheme, still])

    async def go(self, url: str) -> None:
        """Load ``url``."""
        assert "errorText" not in await self.command("Page.navigate", url=url), url

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    async def until(self, script: str, what: str = "") -> Any:
        """Return the expression's value once it is true."""
        deadline = time.monotonic() + _DEADLINE_S
        while not (value := await self.run(f"document.body && ({script})")):
            assert time.monotonic() < deadline, f"{what or script}; the page says: {await self.text('body')}"
            await asyncio.sleep(0.1)
        return value

    async def text(self, selector: str) -> str:
        """The text that a person sees there; empty where it is hidden."""
        return str(await self.run(_VISIBLE.format(json.dumps(selector))))

    async def shows(self, selector: str, *words: str) -> str:
        """Return the text at ``selector`` once it can be seen and holds all ``words``."""
        text = _VISIBLE.format(json.dumps(selector))
        script = f"(t => {json.dumps(words)}.every(w => t.includes(w)) && (t || ' '))({text})"
        return str(await self.until(script, f"{selector} never showed {words}"))

    async def type(self, selector: str, text: str) -> None:
        """Write ``text`` into a field and press Enter, as a person does."""
        await self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.command("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    async def click(self, selector: str) -> None:
        """Click on what is there."""
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def screenshot(self, path: Path) -> None:
        """The whole page, as far down as it goes."""
        shot = await self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
