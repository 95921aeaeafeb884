"""The dashboard as people see it: planner processes, a real Chromium, and a fleet that comes and goes over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest

from tests.planner import browser, test_api
from tests.planner.browser import DESKTOP, PHONE, Chromium, Page
from tests.planner.processes import PlannerUnderTest, call
from tests.planner.redis_server import RedisServer
from vllm_rfork.messages import encode_text

TOKEN = "a-token-that-nobody-may-see"
KEY = "/models/q$prod$kv_both$0$0"
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u202eevil\"'&amp;"
#: True where nothing is wider than the window.
FITS = "document.documentElement.scrollWidth <= {0} && innerWidth === {0}"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    started = Chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.stop()


@contextlib.contextmanager
def planner(*flags: str, port: int = 0) -> Iterator[PlannerUnderTest]:
    process = PlannerUnderTest(*flags, port=port).until_ready()
    try:
        yield process
    finally:
        process.kill()


class Workers:
    """Those who speak to the planner in the test's name."""

    def __init__(self, url: str, session: aiohttp.ClientSession, token: str = "") -> None:
        self.url = url
        self.session = session
        self.authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._waiting: list[asyncio.Task[tuple[int, dict[str, str]]]] = []

    async def tell(self, method: str, path: str, key: str = "", **headers: str) -> dict[str, str]:
        sent = {**self.authorization, **headers} | ({"SEED_KEY": encode_text(key)} if key else {})
        status, answer = await call(self.session, method, self.url + path, **sent)
        assert status == 200, (status, path)
        return answer

    async def announce(self, key: str, port: int, **headers: str) -> None:
        seed = {"SEED_IP": "127.0.0.1", "SEED_PORT": str(port), "SEED_RANK": "0", "SEED_REFCNT": "0"}
        await self.tell("POST", "/add_seed", key, **seed, **{"RFORK-SLOTS": "1", **headers})

    async def lease(self, key: str, **headers: str) -> dict[str, str]:
        answer = await self.tell("GET", "/get_seed", key, **headers)
        return {name: answer[name] for name in ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")}

    async def end(self, lease: dict[str, str], result: str = "ok", **told: str) -> None:
        await self.tell("POST", "/put_seed", **lease, **{"RFORK-RESULT": result}, **told)

    def wait(self, key: str) -> None:
        headers = {**self.authorization, "SEED_KEY": encode_text(key), "RFORK-WAIT-SEC": "60"}
        task = asyncio.create_task(call(self.session, "GET", self.url + "/get_seed", **headers))
        self._waiting.append(task)

    async def leave(self) -> None:
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def workers(url: str, token: str = "") -> AsyncIterator[Workers]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        some = Workers(url, session, token)
        try:
            yield some
        finally:
            await some.leave()


def complains_of_nothing(page: Page, url: str) -> bool:
    """It asked its own planner alone, and neither it nor the browser found fault."""
    assert page.errors == []
    assert {each.split("#")[0].split("?")[0] for each in page.requests if not each.startswith("data:")} <= {
        f"{url}/",
        f"{url}/dashboard.json",
    }
    return True


@pytest.mark.parametrize(
    ("store", "sizes"),
    [("memory", [DESKTOP, PHONE]), pytest.param("redis", [DESKTOP], marks=pytest.mark.long)],
)
async def test_a_fleet_comes_into_view_without_a_reload(
    chromium: Chromium, store: str, sizes: list[tuple[int, int]], request: pytest.FixtureRequest
) -> None:
    flags = ["--failures-before-backoff", "1", "--backoff-sec", "300"]
    if store == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        flags += ["--store", server.url, "--redis-prefix", "dashboard"]
    with planner(*flags) as process:
        async with workers(process.url) as fleet, contextlib.AsyncExitStack() as stack:
            pages = [(await stack.enter_async_context(chromium.page(size)), size[0]) for size in sizes]
            for page, width in pages:
                await page.go(process.url + "/")
                await page.shows("#live", "live")
                await page.shows("#seeds", "There are no seeds")
                await page.until(FITS.format(width))
                await page.run("window.before = 1")

            await fleet.announce(KEY, 5000, **{"RFORK-LABELS": "host=h7,rack=r2"})
            await fleet.announce("other$key", 5001)
            held = await fleet.lease(KEY)
            await fleet.tell("POST", "/rfork_intent", "a$third", **{"RFORK-INTENT": "worker-9"})
            fleet.wait(KEY)
            for page, _ in pages:
                await page.shows("#waiting", "1 of 1", "1 m 00 s", KEY)
                await page.shows("#keys", KEY, "other$key", "a$third", "1 / 1")
                await page.shows("#seeds", "127.0.0.1:5000:0", "host=h7 rack=r2", "busy", "free")
                await page.shows("#leases", "127.0.0.1:5000:0", KEY)
                await page.shows("#intents", "worker-9", "a$third")
                assert "2" in await page.text("#tile-seeds")
                assert await page.run("document.title") == "1 waiting · RFork planner"

            await fleet.end(held, **{"RFORK-NBYTES": "15000000000", "RFORK-SECONDS": "1.25"})
            failed = await fleet.lease("other$key")
            await fleet.end(failed, "failed", **{"RFORK-CAUSE": "EngineError"})
            for page, width in pages:
                await page.shows("#causes", "EngineError", "127.0.0.1:5001:0")
                await page.shows("#history", "15 GB", "1.25 s", "12.0", "failed")
                await page.shows("#seeds", "quarantined for", "EngineError (127.0.0.1)")
                await page.shows("#waiting", "No receiver waits")
                await page.until(FITS.format(width))
                assert await page.run("window.before") == 1, "it was reloaded"
                assert complains_of_nothing(page, process.url)


async def test_ages_go_on_and_a_key_can_be_looked_at_alone(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(PHONE) as page:
            for number in range(130):
                await fleet.announce(f"key-{number:03d}-" + "x" * 120, 5000 + number)
            key = "the$only one äöü"
            await fleet.announce(key, 6000)
            held = await fleet.lease(key)
            await page.go(process.url)
            await page.shows("#keys", key, "Show 94 more", "100 of 131 models are listed")
            await page.shows("#seeds", "of 131 are listed, those in trouble first")
            age = "document.querySelector('#leases [data-zero]').textContent"
            first = await page.run(age)
            await page.until(f"{age} !== {first!r}", "the lease's age stands still")
            await page.click("#keys .more button")
            assert await page.run("document.querySelectorAll('#keys tbody tr').length") == 100
            await page.until(FITS.format(PHONE[0]), "long keys make it scroll sideways")

            await page.type("#filter", "key-127-" + "x" * 120)  # one that is not listed
            await page.shows("#chosen", "key-127")
            await page.shows("#leases", "No receiver forks")
            await page.shows("#tile-seeds", "1")
            assert await page.run("document.querySelectorAll('#seeds tbody tr').length") == 1

            await page.click("#chosen a")
            await page.until("document.querySelector('#chosen').hidden")
            await page.go(f"{process.url}/#key={quote(key)}")
            await page.shows("#chosen", key)
            await page.shows("#leases", held["SEED_PORT"])
            assert complains_of_nothing(page, process.url)


async def test_enter_opens_the_key_that_is_meant_and_never_an_empty_one(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(DESKTOP) as page:
            for number, key in enumerate(("/models/qwen$prod", "/models/qwen$test", "/models/llama$prod")):
                await fleet.announce(key, 5000 + number)
            await page.go(process.url)
            await page.shows("#keys", "/models/qwen$prod")

            await page.type("#filter", "qwen")  # a part of two
            await page.shows("#hint", "2 keys contain this")
            assert await page.run("location.hash") == ""
            await page.type("#filter", "$t")  # now a part of one
            await page.shows("#chosen-key", "/models/qwen$test")
            await page.shows("#tile-seeds", "1")

            await page.click("#chosen a")
            await page.until("document.querySelector('#chosen').hidden")
            await page.type("#filter", "mistral")  # of none, and all keys are listed
            await page.shows("#keys", "no key contains this text")
            assert await page.run("location.hash") == ""

            await page.go(f"{process.url}/#key={quote('/models/new')}")  # from a bookmark, say
            await page.shows("#unknown", "does not know this key")
            assert not await page.text("#tiles"), "zeros would read as a key that has nothing"
            await fleet.announce("/models/new", 6000)
            await page.shows("#tile-seeds", "1")
            assert not await page.text("#unknown")
            assert complains_of_nothing(page, process.url)


async def test_no_number_is_shown_twice_and_one_is_no_plural(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(DESKTOP) as page:
            await fleet.announce(KEY, 5000, **{"RFORK-SLOTS": "4"})
            lease = await fleet.lease(KEY)
            await fleet.end(lease, **{"RFORK-NBYTES": "15000000000"})  # by the lease's time
            own = {"RFORK-NBYTES": "15000000000", "RFORK-SECONDS": "1.25", "RFORK-LANE": "nixl/rdma"}
            worker = {"RFORK-INTENT": "worker-7"}
            await fleet.end(await fleet.lease(KEY, **worker), **own)
            early = {"RFORK-CAUSE": "EngineError", "RFORK-LANE": "cuda_ipc"}  # connected, and no byte arrived
            await fleet.end(await fleet.lease(KEY), "failed", **early)
            await fleet.lease(KEY)
            await page.go(process.url)
            await page.shows("#tile-leases", "1", "4 slots, 25 % in use; longest for")
            assert await page.run("[...document.querySelectorAll('#tiles dt')].map((e) => e.textContent).join()") == (
                "Seeds,Forking now,Waiting,Loading from storage,Hit rate,Last forks, median"
            )
            await page.shows("#history", "of the lease", "≥", "1.25 s", "12.0", "nixl/rdma", "cuda_ipc")
            await page.shows("#tile-forks", "12.0 GB/s")
            caches = "torch_aot=hit,triton=miss:late,startup_plan=hit;saved=38.2"
            await fleet.announce(KEY, 5001, **worker, **{"RFORK-CACHES": caches})
            await page.shows("#history", "2 hits, 1 missed", "saved 38 s")
            await page.until("!/\\b1 (seeds|slots|keys|forks|receivers|leases)\\b/.test(document.body.innerText)")
            assert complains_of_nothing(page, process.url)


async def test_what_others_chose_is_text_and_nothing_else(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(DESKTOP) as page:
            await fleet.announce(HOSTILE, 5000)
            held = await fleet.lease(HOSTILE)
            await fleet.end(held, "failed", **{"RFORK-CAUSE": encode_text(HOSTILE)})
            await fleet.lease(HOSTILE)
            fleet.wait(HOSTILE)
            await fleet.tell("POST", "/rfork_intent", HOSTILE, **{"RFORK-INTENT": encode_text(HOSTILE)})
            await page.go(f"{process.url}/#key={quote(HOSTILE)}")
            shown = HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
            for place in ("#chosen", "#keys", "#seeds", "#leases", "#waiting", "#intents", "#history", "#causes"):
                await page.shows(place, shown)
            assert await page.run("document.querySelectorAll('img').length") == 0
            assert await page.run("document.querySelectorAll('script').length") == 1
            assert await page.run("window.hacked === undefined")
            assert complains_of_nothing(page, process.url)
            command_key = "it's; $(touch x) `x` # a\\b"
            for number in range(2):
                await fleet.announce(command_key, 6000 + number, **{"RFORK-FINGERPRINT": f"print{number}"})
            await page.go(f"{process.url}/?;$(x)#key={quote(command_key)}")
            words = shlex.split(await page.shows("#command", "touch x"), comments=True)
            expected = ["vllm-rfork", "explain", "--url", process.url, "--key", command_key, "--worker"]
            assert words == [*expected, "127.0.0.1:6000"]
            # Even a page that went wrong could not run it: the browser refuses to parse text as HTML here.
            refused = "(() => { try { document.body.innerHTML = 'x'; return 'parsed' } catch (e) { return e.name } })()"
            assert await page.run(refused) == "TypeError"


async def test_without_the_token_nothing_is_shown_and_it_is_kept_in_the_tab_alone(chromium: Chromium) -> None:
    async with test_api.planner({"RFORK_TOKEN": TOKEN}) as client:
        process = client.planner
        async with workers(process.url, TOKEN) as fleet, chromium.page(PHONE) as page:
            await fleet.announce(KEY, 5000)
            await page.go(process.url)
            await page.shows("#login", "requires a token")
            assert not await page.text("#board")
            await page.until(FITS.format(PHONE[0]))
            await page.type("#token", "wrong")
            await page.shows("#trouble", "rejected this token")
            assert KEY not in await page.text("body")
            await page.type("#token", TOKEN)
            await page.shows("#keys", KEY)
            assert await page.text("#login") == ""
            await page.command("Page.reload")
            await page.shows("#keys", KEY)
            assert (
                await page.run("[document.cookie, localStorage.length, location.href].join()") == f",0,{process.url}/"
            )
            assert not [each for each in page.requests if TOKEN in each]
            assert TOKEN not in await page.run("document.documentElement.outerHTML")
            await page.click("#forget")
            await page.shows("#login", "requires a token")
            assert await page.run("sessionStorage.length") == 0
            assert KEY not in await page.run("document.documentElement.outerHTML")
            assert page.errors == []


async def test_operators_drain_a_seed_by_two_presses_and_undo_it(chromium: Chromium) -> None:
    async with test_api.planner({"RFORK_TOKEN": TOKEN}) as client:
        process = client.planner
        async with workers(process.url, TOKEN) as fleet, chromium.page(DESKTOP) as page:
            await fleet.announce(KEY, 5000, **{"RFORK-EPOCH": "e"})
            await page.go(process.url)
            await page.shows("#login", "requires a token")
            await page.type("#token", TOKEN)
            await page.shows("#seeds button.act", "Drain")
            await page.click("#seeds button.act")
            await page.shows("#seeds button.act", "Drain: sure?")
            assert (await process.store.totals())[KEY].draining == 0, "one press is not enough"
            await page.click("#seeds button.act")
            await page.shows("#seeds", "drained", "by an operator", "Undo drain")
            assert (await process.store.totals())[KEY].draining == 1
            for _ in range(2):
                await page.click("#seeds button.act")
            await page.shows("#seeds", "free")
            assert (await process.store.totals())[KEY].draining == 0
            assert page.errors == []


async def test_an_empty_fleet_shows_how_to_connect_and_every_term_has_help(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(PHONE) as page:
            await page.go(process.url)
            lines = await page.shows("#welcome-lines", "vllm serve MODEL --load-format rfork")
            assert f"RFORK_SCHEDULER_URL={process.url}" in lines
            assert len(lines.splitlines()) == 3
            await page.until(FITS.format(PHONE[0]))
            labels = {"RFORK-LABELS": "pod=pod-7,host=node-1", "RFORK-MODEL": "m", "RFORK-STRATEGY": "s"}
            for port, parent in ((5000, ""), (5001, "127.0.0.1:5000:0")):
                own = {"RFORK-FINGERPRINT": f"print{port}", "RFORK-DIFFERS": "dtype: float16 here"}
                await fleet.announce(KEY, port, **labels, **own, **({"RFORK-PARENT": parent} if parent else {}))
            await page.shows("#keys", "m", "s · 1 rank")
            assert not await page.text("#welcome")
            assert not await page.text("#seeds button.act"), "no token, no action"
            await page.shows("#fingerprints", "print5000", "dtype: float16 here", "never paired")
            command = await page.shows("#command", "vllm-rfork explain")
            assert command == f"vllm-rfork explain --url {process.url} --key '{KEY}' --worker 127.0.0.1:5000"
            words = (
                "[...document.querySelectorAll('section:not(#welcome) > h2, th, #tiles dt')].filter(e => e.textContent)"
            )
            explained = "e => (e.querySelector('.term')?.click(), document.querySelector('#help').textContent)"
            helps = await page.run(f"{words}.map({explained})")
            assert len(helps) > 50
            assert all(len(each) > 20 for each in helps), helps
            assert await page.run(f"{words}.every(e => e.querySelector('.term'))")
            await page.click("#seeds h2 .term")
            await page.shows("#help", "Worker ranks that hold final weights")
            await page.click("#terms")
            await page.shows("#glossary", "Slots in use", "Fork tree")
            await page.run("document.querySelector('#glossary').close()")

            await page.click("#keys a")
            await page.shows("#chosen", "Only the model", "m · s")
            await page.shows("#tree", "pod-7", "127.0.0.1:5001:0", "1 below")
            await page.shows("#keys", "Keys", KEY)
            assert complains_of_nothing(page, process.url)


async def test_a_search_shows_what_contains_the_text_and_nothing_else(chromium: Chromium) -> None:
    async with test_api.planner() as client:
        process = client.planner
        async with workers(process.url) as fleet, chromium.page(DESKTOP) as page:
            for number in range(120):
                await fleet.announce(f"key-{number:03d}", 5000 + number, **{"RFORK-LABELS": f"pod=pod-{number:03d}"})
            await page.go(process.url)
            await page.shows("#seeds", "100 of 120 are listed")
            await page.run("document.querySelector('#filter').focus()")
            await page.command("Input.insertText", text="POD-117")
            await page.until("document.querySelectorAll('#seeds tbody tr').length === 1")
            await page.shows("#seeds", "pod=pod-117")
            await page.shows("#keys", "key-117")
            assert not await page.text("#waiting")
            assert complains_of_nothing(page, process.url)


async def test_a_planner_that_goes_away_is_said_and_comes_back_by_itself(chromium: Chromium) -> None:
    with planner() as process:
        async with workers(process.url) as fleet, chromium.page(DESKTOP) as page:
            await fleet.announce(KEY, 5000)
            await page.go(process.url)
            await page.shows("#seeds", "127.0.0.1:5000:0")
            await page.run("window.before = 1")
            process.kill()
            await page.shows("#trouble", "The planner does not answer", "The data below is", "Trying again")
            await page.shows("#live", "no answer")
            assert KEY in await page.text("#keys"), "the last state stays readable"
            with planner(port=process.port) as again:
                await page.shows("#notice", "return with their next heartbeat")
                await page.shows("#seeds", "There are no seeds")
                await page.shows("#live", "live")
                assert await page.text("#trouble") == ""
                await fleet.announce(KEY, 5000)
                await page.shows("#seeds", "127.0.0.1:5000:0")
                assert await page.run("window.before") == 1
                assert complains_of_nothing(page, again.url)


def test_a_machine_without_chromium_is_told_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        browser.program()
