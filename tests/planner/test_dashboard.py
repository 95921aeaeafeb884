"""The dashboard's two calls: an open page that cannot be made to run anything else, and data that costs little."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import itertools
import json
import re
from importlib import resources
from typing import Any

import pytest

from tests.planner.test_api import SECRET, SEED, bearer, planner
from vllm_rfork import messages
from vllm_rfork.planner.http import dashboard
from vllm_rfork.planner.http.dashboard import OverviewCache, RateLimited, View
from vllm_rfork.planner.store.errors import StoreUnavailable

# --- the calls -------------------------------------------------------------------------------------------------------


async def test_the_page_is_open_and_its_data_is_not() -> None:
    async with planner({"RFORK_TOKEN": SECRET}) as client:
        await client.add(SEED_KEY="the-fleets-key", **bearer(SECRET))
        status, headers, page = await client.call("GET", "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "the-fleets-key" not in page
        for wrong in ({}, bearer("wrong")):
            status, _, text = await client.call("GET", "/dashboard.json", **wrong)
            assert (status, "the-fleets-key" in text) == (401, False)
        status, headers, text = await client.call("GET", "/dashboard.json", **bearer(SECRET))
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert [each["key"] for each in json.loads(text)["keys"]] == ["the-fleets-key"]
        assert SECRET not in page + text


async def test_the_policy_lets_the_page_run_its_own_texts_and_reach_its_own_planner_alone() -> None:
    async with planner() as client:
        _, headers, page = await client.call("GET", "/")
    rules = dict(each.strip().partition(" ")[::2] for each in headers["Content-Security-Policy"].split(";"))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(text) > 1000
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (rules["default-src"], rules["connect-src"], rules["img-src"]) == ("'none'", "'self'", "data:")
    assert (rules["frame-ancestors"], rules["base-uri"], rules["form-action"]) == ("'none'", "'none'", "'none'")
    assert "'script'" in rules["require-trusted-types-for"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_the_page_has_no_assets_of_others_and_writes_no_html_from_data() -> None:
    folder = resources.files("vllm_rfork.planner.http") / "page"
    texts = {each.name: each.read_text(encoding="utf-8") for each in folder.iterdir()}
    scripts = {"elements.js", "help.js", "columns.js", "script.js", "asking.js"}
    assert set(texts) == {"index.html", "style.css"} | scripts
    everything = "".join(texts.values()).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\(", everything)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage",
        "".join(texts[name] for name in scripts),
    )
    assert not re.search(r"\son[a-z]+=|\sstyle=", texts["index.html"])


@pytest.mark.parametrize(
    ("path", "accepted"), [("/", "gzip"), ("/", ""), ("/dashboard.json", "gzip, br"), ("/dashboard.json", "")]
)
async def test_answers_are_compressed_for_those_who_take_it(path: str, accepted: str) -> None:
    async with planner() as client:
        url = client.planner.url + path
        async with client.session.get(url, headers={"Accept-Encoding": accepted or "identity"}) as answer:
            assert answer.headers.get("Content-Encoding", "") == accepted.partition(",")[0]
            assert answer.headers["Vary"] == "Accept-Encoding"
            assert (await answer.text())[0] in "<{"


async def test_one_key_can_be_asked_for_and_a_bad_one_is_refused() -> None:
    async with planner(max_key_length=20) as client:
        await client.add(5000, SEED_KEY="one")
        await client.add(5001, SEED_KEY=messages.encode_text("zwölf\n"))
        for key in ("one", "zwölf\n"):
            _, _, text = await client.call("GET", "/dashboard.json", SEED_KEY=messages.encode_text(key))
            shown = json.loads(text)
            assert (shown["key"], [each["key"] for each in shown["seeds"]]) == (key, [key])
        for bad in ("", " ", "x" * 21, "UTF-8''%FF"):
            assert await client.status("GET", "/dashboard.json", SEED_KEY=bad) == 400
        assert await client.status("POST", "/dashboard.json") == 405


async def test_it_says_what_the_planner_is_and_that_it_drains() -> None:
    async with planner(policy="nearest", lease_ttl_sec=30) as client:
        said = json.loads((await client.call("GET", "/dashboard.json"))[2])["planner"]
        assert {name: said[name] for name in ("store", "policy", "ready", "lease_ttl_s")} == {
            **{"store": "memory", "policy": "nearest", "ready": True, "lease_ttl_s": 30},
        }
        client.planner.api.ready = False
        assert await client.status("GET", "/dashboard.json", SEED_KEY="another view") == 200
        said = json.loads((await client.call("GET", "/dashboard.json", SEED_KEY="a third"))[2])["planner"]
        assert said["ready"] is False


async def test_a_store_that_is_away_is_503_and_a_crowd_is_429(monkeypatch: pytest.MonkeyPatch) -> None:
    async with planner() as client:

        async def away(**_: Any) -> Any:
            raise StoreUnavailable("Redis is not reachable")

        monkeypatch.setattr(client.planner.store, "overview", away)
        status, headers, text = await client.call("GET", "/dashboard.json")
        assert (status, headers["Retry-After"], "Redis" in text) == (503, "1", True)
        answers = await asyncio.gather(*(client.call("GET", "/dashboard.json") for _ in range(100)))
        crowded = [headers for status, headers, _ in answers if status == 429]
        assert len(crowded) >= 100 - 2 * dashboard.ANSWERS_PER_S
        assert crowded[0]["Retry-After"] == "5"
        assert await client.add() == 200, "everybody else is served"


async def test_what_receivers_report_is_shown() -> None:
    async with planner(slots=1) as client:
        await client.add()
        lease = await client.lease()
        waiting = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **{"RFORK-WAIT-SEC": "30"}))
        await client.waiting(1)
        shown = json.loads((await client.call("GET", "/dashboard.json"))[2])
        assert [(each["seed"], each["receiver"]) for each in shown["leases"]] == [("127.0.0.1:5000:0", "127.0.0.1")]
        assert [(each["place"], each["receiver"]) for each in shown["waiting"]] == [(1, "127.0.0.1")]
        told = {"RFORK-RESULT": "ok", "RFORK-NBYTES": "3000000000", "RFORK-SECONDS": "1.5"}
        assert await client.status("POST", "/put_seed", **lease, **told) == 200
        next_lease = (await asyncio.wait_for(waiting, 30))[1]
        told = {"RFORK-RESULT": "failed", "RFORK-CAUSE": "VerificationError"}
        await client.status("POST", "/put_seed", **SEED, USER_ID=next_lease["USER_ID"], **told)
        shown = json.loads((await client.call("GET", "/dashboard.json", SEED_KEY="k"))[2])
        assert [(each["result"], each["gb_per_s"], each["cause"]) for each in shown["history"]] == [
            ("failed", None, "VerificationError"),
            ("ok", 2.0, ""),
        ]
        assert [each["cause"] for each in shown["causes"]] == ["VerificationError"]


# --- the cache -------------------------------------------------------------------------------------------------------


class Kitchen:
    """Makes overviews when told to, each in ``cost_s``; time passes in it and in sleep alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cost_s = 0.0
        self.made: list[tuple[float, str | None]] = []
        self.failing = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.overviews = OverviewCache(self.make, lambda: self.now, self.sleep)

    async def make(self, view: View) -> bytes:
        await self.gate.wait()
        self.made.append((self.now, view.key))
        self.now += self.cost_s
        if self.failing:
            raise StoreUnavailable("away")
        return f"{view.key} {len(self.made)}".encode()

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def ask(self, key: str | None = None) -> str:
        return gzip.decompress(await self.overviews.get(View(key))).decode()


async def test_all_who_look_share_one_overview_a_second() -> None:
    kitchen = Kitchen()
    assert await asyncio.gather(*(kitchen.ask() for _ in range(30))) == ["None 1"] * 30
    kitchen.now += dashboard.FRESH_S * 0.9
    assert await kitchen.ask() == "None 1"
    kitchen.now += dashboard.FRESH_S * 0.2
    assert await kitchen.ask() == "None 2"


async def test_overviews_take_a_small_part_of_the_time_whatever_one_costs() -> None:
    kitchen = Kitchen()
    kitchen.cost_s = 0.3
    for key in ("a", "b", "c", "a", "b"):
        await kitchen.ask(key)
    starts = [at for at, _ in kitchen.made]
    assert [later - earlier for earlier, later in itertools.pairwise(starts)] == pytest.approx(
        [0.3 * (1 + dashboard.COOLDOWN_FACTOR)] * 4
    )
    kitchen.cost_s = 60.0
    await kitchen.ask("d")
    resting_from = kitchen.now
    await kitchen.ask("e")
    assert kitchen.made[-1][0] - resting_from == dashboard.MAX_COOLDOWN_S


async def test_who_goes_away_takes_it_from_nobody() -> None:
    kitchen = Kitchen()
    kitchen.gate.clear()
    first, second = (asyncio.create_task(kitchen.ask()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    kitchen.gate.set()
    assert await second == "None 1"
    assert first.cancelled()


async def test_a_failure_is_told_to_all_and_is_not_remembered() -> None:
    kitchen = Kitchen()
    kitchen.failing = True
    results = await asyncio.gather(*(kitchen.ask() for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in results] == [StoreUnavailable] * 3
    assert len(kitchen.made) == 1
    kitchen.failing = False
    assert await kitchen.ask() == "None 2"


async def test_views_and_answers_are_bounded() -> None:
    kitchen = Kitchen()
    kitchen.gate.clear()
    tasks = [asyncio.create_task(kitchen.ask(f"k{number}")) for number in range(dashboard.MAX_VIEWS)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited, match="keys"):
        await kitchen.ask("one more")
    kitchen.gate.set()
    await asyncio.gather(*tasks)
    kitchen.now += 10
    for number in range(20):
        await kitchen.ask(f"other{number}")
    assert len(kitchen.overviews._answers) == dashboard.MAX_VIEWS
    kitchen.now += 1
    crowd = await asyncio.gather(*(kitchen.ask("other19") for _ in range(50)), return_exceptions=True)
    assert next(str(each) for each in crowd if isinstance(each, RateLimited)).startswith("too many callers")
    assert sum(isinstance(each, str) for each in crowd) == dashboard.ANSWERS_PER_S
    kitchen.now += 0.5
    await kitchen.ask("other19")
