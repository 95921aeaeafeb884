"""Headers survive any text, and nothing that is not a message passes for one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from multidict import CIMultiDict

from vllm_rfork import errors, messages
from vllm_rfork.manifest.codec import decode_manifest
from vllm_rfork.messages import BadMessage, Lease, SeedAddress
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.messages.metering import Served, parse_served
from vllm_rfork.net import addresses

AWKWARD = [
    "café$prod",
    "模型$部署",
    "two\r\nX-Injected: yes",
    "tab\there",
    " leading and trailing ",
    "",
    "UTF-8''already%20escaped",
    "percent %41 stays",
    "null\x00byte",
    "lone surrogate \udcff",
    "😀" * 50,
    'quotes " and \\ and ,;=',
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_the_header(text: str) -> None:
    assert messages.decode_text(messages.encode_text(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_an_encoded_text_is_one_printable_ascii_line(text: str) -> None:
    value = messages.encode_text(text)
    assert value.isascii()
    assert value.isprintable()
    assert value == value.strip()


def test_two_texts_never_share_an_encoding() -> None:
    assert len({messages.encode_text(text) for text in AWKWARD}) == len(AWKWARD)


@pytest.mark.parametrize(
    "key", ["/models/q$prod$kv_both$0$0", "/models/dsv4$decode$kv_consumer$0$pp1$3$ep5$draft", "a b"]
)
def test_a_plain_key_looks_as_the_installed_base_sends_it(key: str) -> None:
    assert messages.encode_text(key) == key


def test_an_escape_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(BadMessage, match="UTF-8"):
        messages.decode_text("UTF-8''%FF%FE%80x")


@pytest.mark.parametrize("spelling", ["SEED_KEY", "seed_key", "SEED-KEY", "seed-key", "Seed-Key"])
def test_both_spellings_of_a_name_are_read(spelling: str) -> None:
    assert messages.seed_key(CIMultiDict({spelling: " k$0 "})) == "k$0"


@pytest.mark.parametrize(
    ("headers", "names"),
    [
        ({}, "SEED_IP"),
        ({"SEED_IP": "10.0.0.1"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "0", "SEED_RANK": "0"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "65536", "SEED_RANK": "0"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "8e3", "SEED_RANK": "0"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "٣", "SEED_RANK": "0"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "9" * 5000, "SEED_RANK": "0"}, "SEED_PORT"),
        ({"SEED_IP": "10.0.0.1", "SEED_PORT": "80", "SEED_RANK": "-1"}, "SEED_RANK"),
        ({"SEED_IP": "10.0.0.1/evil?x=", "SEED_PORT": "80", "SEED_RANK": "0"}, "SEED_IP"),
        ({"SEED_IP": "user@host", "SEED_PORT": "80", "SEED_RANK": "0"}, "SEED_IP"),
        ({"SEED_IP": "x" * 9000, "SEED_PORT": "80", "SEED_RANK": "0"}, "SEED_IP"),
    ],
)
def test_a_bad_seed_address_is_refused_and_the_header_named(headers: dict[str, str], names: str) -> None:
    with pytest.raises(BadMessage, match=names):
        messages.seed_address(CIMultiDict(headers))


@pytest.mark.parametrize("host", ["10.0.0.1", "node-7.example", "fe80::1%eth0", "::1"])
def test_an_address_survives_headers_and_text(host: str) -> None:
    seed = SeedAddress(host, 8080, 3)
    assert messages.seed_address(CIMultiDict(seed.headers())) == seed
    assert messages.parse_seed_address(str(seed)) == seed


def test_an_ipv6_literal_gets_brackets_in_a_url() -> None:
    assert SeedAddress("::1", 80, 0).base_url == "http://[::1]:80"


def test_a_key_that_is_too_long_is_refused() -> None:
    with pytest.raises(BadMessage, match="longer"):
        messages.seed_key(CIMultiDict({"SEED_KEY": "k" * (messages.MAX_KEY_LENGTH + 1)}))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon", "", "1e9"])
def test_seconds_are_finite_and_bounded(value: str) -> None:
    with pytest.raises(BadMessage, match="X-SEC"):
        messages.seconds(value, "X-SEC", maximum=100)


#: What ``int`` or ``float`` accept and the grammar does not.
NOT_NUMBERS = [
    "１",
    "١",
    "1_0",
    "+1",
    "-0",
    "-1",
    " 1",
    "1 ",
    "1\n",
    "01",
    "0x1",
    "1e1",
    "",
    "inf",
    "nan",
    "²",
    "1.",
    ".5",
]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, "1.0", "11", "9" * 17])
def test_integers_have_one_spelling(value: str) -> None:
    with pytest.raises(BadMessage, match="X-N"):
        messages.integer(value, "X-N", minimum=0, maximum=10)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, "5e-324", "1.5e1", "1.1_1", "1,5", "1" * 10, "0." + "1" * 21])
def test_seconds_have_one_spelling(value: str) -> None:
    with pytest.raises(BadMessage, match="X-SEC"):
        messages.seconds(value, "X-SEC", maximum=1e9)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (60, "60"), (0.1, "0.1"), (1e-9, "0.001"), (86400.0, "86400"), (1e7, "10000000"), (1.0625, "1.062")],
)
def test_seconds_are_written_as_they_are_read(number: float, text: str) -> None:
    assert messages.seconds_text(number) == text
    assert messages.seconds(text, "X-SEC", maximum=1e9) == pytest.approx(number, abs=1e-3)


ANSWER = {"SEED_IP": "10.0.0.1", "SEED_PORT": "80", "SEED_RANK": "2", "USER_ID": "u1"}


@pytest.mark.parametrize(
    ("extra", "ttl_s"), [({}, None), ({"LEASE_TTL_SEC": "60"}, 60.0), ({"LEASE-TTL-SEC": "0"}, None)]
)
def test_a_lease_is_read_from_an_answer(extra: dict[str, str], ttl_s: float | None) -> None:
    lease = messages.lease_from_answer(CIMultiDict({**ANSWER, **extra}))
    assert lease == Lease(SeedAddress("10.0.0.1", 80, 2), "u1", ttl_s)
    assert lease.headers() == ANSWER


def test_a_missing_rank_is_0_but_not_in_a_text() -> None:
    """Newer peers leave it out of headers; where one text names a seed it is never missing."""
    assert messages.seed_address(CIMultiDict({"SEED_IP": "10.0.0.1", "SEED_PORT": "80"})).rank == 0
    headers = {name: value for name, value in ANSWER.items() if name != "SEED_RANK"}
    assert messages.lease_from_answer(CIMultiDict(headers)).seed == SeedAddress("10.0.0.1", 80, 0)
    for text in ("10.0.0.1:80", "10.0.0.1:80:"):
        with pytest.raises(BadMessage):
            messages.parse_seed_address(text)


@pytest.mark.parametrize("missing", [name for name in ANSWER if name != "SEED_RANK"])
def test_a_lease_needs_the_other_three_headers(missing: str) -> None:
    headers = {name: value for name, value in ANSWER.items() if name != missing}
    with pytest.raises(BadMessage, match=missing):
        messages.lease_from_answer(CIMultiDict(headers))


@pytest.mark.parametrize("served", [Served(0, 0), Served(3, 70_000_000_000), Served(10**16 - 1, 10**16 - 1)])
def test_served_totals_survive_the_header(served: Served) -> None:
    assert parse_served(str(served)) == served


@pytest.mark.parametrize("text", ["", "1", "1,", ",1", "-1,2", "1,2,3", "1e3,1", "1.5,2", f"1,{'9' * 17}", "nan,1"])
def test_other_texts_are_not_served_totals(text: str) -> None:
    with pytest.raises(BadMessage, match="RFORK-SERVED"):
        parse_served(text)


def test_causes_are_classes_of_errors_that_may_end_a_fork() -> None:
    assert all(issubclass(getattr(errors, cause), errors.RForkError) for cause in CAUSES)


PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_everything_on_the_wire_is_in_the_protocols_description() -> None:
    names = {
        value
        for name, value in vars(messages).items()
        if name.isupper() and isinstance(value, str) and (value.startswith("/") or re.fullmatch("[A-Z_-]+", value))
    }
    assert len(names) > 30
    assert {name for name in names if name not in PROTOCOL} == set()


def test_the_manifest_in_the_protocols_description_is_one() -> None:
    example = re.search(r"```json\n(.*?)```", PROTOCOL, re.DOTALL)
    assert example is not None
    manifest = decode_manifest(example[1].encode())
    assert [tensor.name for tensor in manifest.tensors] == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("host", "spelling"),
    [
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::FFFF:7f00:1", "127.0.0.1"),
        ("[2001:DB8:0::1]", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("Node-7.Example.", "node-7.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("dead.beef", "dead.beef"),
    ],
)
def test_a_host_has_one_spelling(host: str, spelling: str) -> None:
    assert addresses.canonical_host(host) == spelling
    assert addresses.canonical_host(spelling) == spelling
    assert addresses.canonical(SeedAddress(host, 1, 0)) == SeedAddress(spelling, 1, 0)


@pytest.mark.parametrize(
    "host", ["own%junk", "127.0.0.1%eth0", "2001:db8::1%eth0", "fe80::1%", "0.0.0.0", "::", "0", "224.0.0.1", "ff02::1",
             "255.255.255.255", "256.0.0.1", "1.2.3.4.5:6", "a:b", "", "0x100000000"]
)  # fmt: skip
def test_what_nobody_can_connect_to_is_refused(host: str) -> None:
    with pytest.raises(BadMessage, match="SEED_IP"):
        addresses.canonical_host(host)
