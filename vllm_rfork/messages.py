"""Every header, path and small body on the wire, and nothing about how they are sent.

The names in the first block are the installed base's and must not change; those that begin with ``RFORK-`` are
this project's, optional for the other side (``docs/protocol.md``). Both planner and clients read this file, and
it is the only module in which they meet. Must not import aiohttp, torch or anything above ``errors``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

# --- the installed base ------------------------------------------------------------------------------------------
ADD_SEED = "/add_seed"
GET_SEED = "/get_seed"
PUT_SEED = "/put_seed"
RENEW_SEED_LEASE = "/renew_seed_lease"
REMOVE_SEED = "/remove_seed"
HEALTHZ = "/healthz"
DEBUG_SNAPSHOT = "/debug/snapshot"

SEED_KEY = "SEED_KEY"
SEED_IP = "SEED_IP"
SEED_PORT = "SEED_PORT"
#: Deprecated in the installed base: optional everywhere, and a missing rank is 0. Older planners demand both.
SEED_RANK = "SEED_RANK"
SEED_REFCNT = "SEED_REFCNT"
USER_ID = "USER_ID"
LEASE_TTL_SEC = "LEASE_TTL_SEC"

SEED_HEALTH = "/health_check_with_key"
SEED_INFO = "/get_rfork_transfer_engine_info"
SEED_SHAPE_INFO = "/get_rfork_transfer_engine_shape_info"
SEED_FETCH = "/rfork_fetch_seed"
SEED_KEY_PARAM = "seed_key"

# --- ours --------------------------------------------------------------------------------------------------------
#: Announces or renews an intent: "I am loading this key from storage and will be a seed soon".
ADD_INTENT = "/rfork_intent"
#: A seed's presence, with the headers of ``add_seed``. The planner answers after a while; until then the open
#: connection shows that the seed's process lives.
PRESENCE = "/rfork_presence"
#: The last word of an answer to it that was streamed: ask again at once, announce first, or ask again after a pause.
PRESENCE_AGAIN, PRESENCE_UNKNOWN, PRESENCE_LATER = "again", "unknown", "later"
#: Planner: 200 while it takes new requests, 503 while it starts, drains or cannot reach its store.
READYZ = "/readyz"
#: Planner: Prometheus metrics.
METRICS = "/metrics"
#: Planner: its calls, described for programs.
OPENAPI = "/openapi.json"
#: Planner: a page for people, and what it shows, with ``SEED_KEY`` of that key alone.
DASHBOARD = "/"
DASHBOARD_DATA = "/dashboard.json"
#: The versioned manifest on the seed service.
SEED_MANIFEST = "/rfork_manifest"
#: Its query parameter: the newest manifest version that the receiver reads; the seed answers in that or an older one.
MANIFEST_VERSION_PARAM = "version"
#: The facts behind the seed's fingerprint, for people: a JSON object of short texts.
SEED_FACTS = "/rfork_facts"
#: The seed's current epoch: ``{"status": "ok", "epoch": "..."}``. Asked again right before reading.
SEED_EPOCH = "/rfork_epoch"

#: Both ways: the digest that must be equal before two workers are paired.
FINGERPRINT = "RFORK-FINGERPRINT"
#: ``get_seed``: hold the request for up to this many seconds until a seed is free.
WAIT_SEC = "RFORK-WAIT-SEC"
#: ``get_seed``: the receiver's id of this one question, unique and unguessable. The same ticket asked again keeps its
#: place in the queue and is given the same lease, never a second one. In a 200: the planner has understood it, and the
#: receiver has to renew the lease at once.
TICKET = "RFORK-TICKET"
#: A 404 for a ticket: ask again with it at once; the receiver stands in the queue (:class:`Waiting`).
WAITING = "RFORK-WAITING"
#: ``get_seed``: comma-separated ``ip:port:rank`` of seeds that just failed this receiver.
EXCLUDE = "RFORK-EXCLUDE"
#: An opaque id of one loading worker: on ``get_seed`` ("remember that I load if you have none"), on
#: ``rfork_intent``, and on ``add_seed`` (the intent is fulfilled). In an answer: ``granted``.
INTENT = "RFORK-INTENT"
INTENT_GRANTED = "granted"
#: ``get_seed``, in a 404: why there is no seed, one of ``MISSES``.
MISS = "RFORK-MISS"
#: no seed has the key; every one is in use; was quarantined; has another fingerprint; failed this receiver before.
MISSES = ("none", "busy", "quarantined", "fingerprint", "excluded")
#: ``get_seed``, in a 404: seeds of the key with other fingerprints; see :func:`other_fingerprints`.
OTHER_FINGERPRINTS = "RFORK-OTHER-FINGERPRINTS"
#: ``rfork_intent``: seconds until the intent is forgotten unless renewed; 0 takes it back.
INTENT_TTL_SEC = "RFORK-INTENT-TTL-SEC"
#: ``add_seed``: leases this seed carries at once.
SLOTS = "RFORK-SLOTS"
#: ``add_seed`` and ``get_seed``: topology, ``host=a,rack=b,zone=c``.
LABELS = "RFORK-LABELS"
#: ``add_seed``: the state id of the planner's last answer to this seed, and in every answer the present one.
#: Where they differ the planner has lost its state, and grants the seed only once no forgotten lease can live.
STATE = "RFORK-STATE"
#: In place of a state id: an announcement of this seed had no answer, so a planner may have granted it all the same.
STATE_UNANSWERED = "unanswered"
#: ``add_seed``: the seed's epoch.
EPOCH = "RFORK-EPOCH"
#: ``put_seed``: how the fork went: ``ok`` or ``failed``, with the three below.
RESULT = "RFORK-RESULT"
RESULT_OK = "ok"
RESULT_FAILED = "failed"
NBYTES = "RFORK-NBYTES"
SECONDS = "RFORK-SECONDS"
#: The error class that ended the fork, such as ``VerificationError``.
CAUSE = "RFORK-CAUSE"
#: ``put_seed``, failed: whose failure it was, as far as the receiver can tell.
SIDE = "RFORK-SIDE"
SIDES = ("seed", "receiver", "unknown")
#: ``put_seed``: engine and lane of the bytes, such as ``nixl/rdma``.
LANE = "RFORK-LANE"
#: Presence: the client reads an answer that comes in pieces, so the planner may keep the request by sending bytes.
STREAM = "RFORK-STREAM"

MAX_KEY_LENGTH = 2048  #: characters of a seed key before encoding; header lines stay under aiohttp's 8190 bytes
MAX_HEADER_LENGTH = 8000

#: The longest time in seconds for which a planner holds a question with a ticket.
SLICE_S = 10.0
#: How long the intent of a receiver with a ticket is remembered at first; it renews it at a third of that.
TICKET_INTENT_TTL_S = 30.0

_CHARSET_PREFIX = "UTF-8''"
_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")


class BadMessage(ValueError):
    """A header is missing or unusable; ``str()`` says which one and why. A planner answers it with 400."""


def encode_text(text: str) -> str:
    """``text`` as a header value: unchanged where it is printable ASCII, else RFC 8187 (``UTF-8''caf%C3%A9``).

    Injective, and the result never holds a line break, so no key can inject a header. Plain keys look on the
    wire as the installed base sends them.
    """
    if _PLAIN.match(text) and not text.startswith(_CHARSET_PREFIX):
        return text
    return _CHARSET_PREFIX + urllib.parse.quote(text, safe="", encoding="utf-8", errors="surrogatepass")


def decode_text(value: str) -> str:
    """The inverse of :func:`encode_text`.

    Raises:
        BadMessage: the escaped form is not UTF-8.
    """
    if not value.startswith(_CHARSET_PREFIX):
        return value
    try:
        return urllib.parse.unquote(value[len(_CHARSET_PREFIX) :], encoding="utf-8", errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise BadMessage(f"not valid UTF-8 in an RFC 8187 value: {value[:80]!r}") from error


def header(headers: Mapping[str, str], name: str) -> str | None:
    """Header ``name`` in either spelling (``SEED_KEY``, ``SEED-KEY``), stripped; None where it is not there.

    nginx drops names with underscores unless told otherwise, so hyphens count as well. ``headers`` must be a
    case-insensitive mapping.
    """
    value = headers.get(name)
    if value is None and "_" in name:
        value = headers.get(name.replace("_", "-"))
    return None if value is None else value.strip()


def required(headers: Mapping[str, str], name: str) -> str:
    """As :func:`header`, for one that must be there and not be empty.

    Raises:
        BadMessage: missing, empty or longer than ``MAX_HEADER_LENGTH``.
    """
    value = header(headers, name)
    if not value:
        raise BadMessage(f"missing header {name}")
    if len(value) > MAX_HEADER_LENGTH:
        raise BadMessage(f"header {name} is longer than {MAX_HEADER_LENGTH} characters")
    return value


#: The one grammar of numbers from outside. Python's own ``int`` and ``float`` accept more: other scripts' digits,
#: ``1_0``, ``+1``, ``-0``, ``1e3``, ``nan``, and numbers so small or so large that a quotient is infinite.
_INTEGER = re.compile(r"(?:0|[1-9][0-9]{0,15})\Z")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,20})?\Z")


def integer(value: str, name: str, *, minimum: int, maximum: int = 2**31 - 1, kind: str = "header") -> int:
    """``value`` as a decimal integer within bounds: ASCII digits, no sign, no leading zero, at most 16 of them.

    ``kind`` is what ``name`` names, for the message: a header or a query parameter.

    Raises:
        BadMessage: anything else; the message names ``name`` and the bounds.
    """
    if not _INTEGER.match(value) or not minimum <= int(value) <= maximum:
        raise BadMessage(f"{kind} {name} must be an integer from {minimum} to {maximum}, got {value[:40]!r}")
    return int(value)


def seconds(value: str, name: str, *, maximum: float) -> float:
    """``value`` as seconds from 0 to ``maximum``: ASCII digits with an optional fraction, no sign, no exponent.

    Raises:
        BadMessage: anything else.
    """
    if not _DECIMAL.match(value) or float(value) > maximum:
        raise BadMessage(f"header {name} must be a number of seconds from 0 to {maximum:g}, got {value[:40]!r}")
    return float(value)


def seconds_text(number: float) -> str:
    """``number`` of seconds (0 or more) as :func:`seconds` reads it, to a thousandth; never 0 for more than 0."""
    text = f"{max(number, 0.001) if number > 0 else 0:.3f}"
    return text.rstrip("0").rstrip(".")


@dataclass(frozen=True)
class SeedAddress:
    """How planners identify a seed: the address of its HTTP service and its tp rank."""

    host: str
    port: int
    rank: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.rank}"

    @property
    def base_url(self) -> str:
        """``http://host:port``, with brackets around an IPv6 literal."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def headers(self) -> dict[str, str]:
        """The three headers that name the seed."""
        return {SEED_IP: encode_text(self.host), SEED_PORT: str(self.port), SEED_RANK: str(self.rank)}


_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}\Z")


def seed_address(headers: Mapping[str, str]) -> SeedAddress:
    """The seed that the headers name; without a rank, rank 0.

    Raises:
        BadMessage: host or port is missing, the port is not 1 to 65535, the rank is negative, or the host is not a
            host name or an address literal.
    """
    host = required(headers, SEED_IP).strip("[]")
    if not _HOST.match(host):
        raise BadMessage(f"header {SEED_IP} must be a host name or an address, got {host[:80]!r}")
    port = integer(required(headers, SEED_PORT), SEED_PORT, minimum=1, maximum=65535)
    return SeedAddress(host, port, integer(header(headers, SEED_RANK) or "0", SEED_RANK, minimum=0))


#: What inet_aton() reads besides dotted quads: ``127.1``, ``0x7f000001``, ``2130706433``, ``0177.0.0.1``.
_NUMERIC = re.compile(r"(?:0[xX][0-9a-fA-F]+|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]+|[0-9]+)){0,3}\Z")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")


def canonical_host(host: str) -> str:
    """The one spelling of ``host``: ``127.1``, ``0x7f000001`` and ``::ffff:127.0.0.1`` are all ``127.0.0.1``.

    Host names are in lower case, without a dot at the end. Planners identify a seed by its address, and compare it
    with the caller's: two spellings would be two seeds.

    Raises:
        BadMessage: not an address or a host name, an address that no peer can connect to (``0.0.0.0``, multicast),
            or a zone (``%eth0``) behind anything but an IPv6 link-local address.
    """
    literal, percent, zone = host.strip("[]").partition("%")
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        if _NUMERIC.match(literal):
            try:
                address = ipaddress.IPv4Address(socket.inet_aton(literal))
            except OSError as error:
                raise BadMessage(f"header {SEED_IP} is not an address: {host[:80]!r}") from error
        elif percent or ":" in literal or not _HOST.match(literal):
            raise BadMessage(f"header {SEED_IP} must be a host name or an address, got {host[:80]!r}") from None
        else:
            return literal.lower().rstrip(".")
    address = getattr(address, "ipv4_mapped", None) or address
    if percent and not (address.version == 6 and address.is_link_local and _ZONE.match(zone)):
        raise BadMessage(f"header {SEED_IP} has a zone, which only an IPv6 link-local address has: {host[:80]!r}")
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
        raise BadMessage(f"header {SEED_IP} is {address}, which no peer can connect to")
    return f"{address}{percent}{zone}"


def canonical(seed: SeedAddress) -> SeedAddress:
    """``seed`` with its host in the one spelling of :func:`canonical_host`. Raises BadMessage as that does."""
    return replace(seed, host=canonical_host(seed.host))


def parse_seed_address(text: str) -> SeedAddress:
    """The inverse of ``str(SeedAddress)``; the host may hold colons.

    Raises:
        BadMessage: not of the form ``ip:port:rank``.
    """
    host, _, tail = text.strip().rpartition(":")
    host, _, port = host.rpartition(":")
    if not tail:
        raise BadMessage(f"a seed must look like ip:port:rank, got {text[:80]!r}")
    return seed_address({SEED_IP: host, SEED_PORT: port, SEED_RANK: tail})


def seed_key(headers: Mapping[str, str]) -> str:
    """The decoded seed key.

    Raises:
        BadMessage: missing, not decodable, or longer than ``MAX_KEY_LENGTH`` characters.
    """
    key = decode_text(required(headers, SEED_KEY))
    if len(key) > MAX_KEY_LENGTH:
        raise BadMessage(f"header {SEED_KEY} holds a key longer than {MAX_KEY_LENGTH} characters")
    return key


#: Fingerprints that one answer names.
MAX_OTHERS = 4


@dataclass(frozen=True)
class OtherSeeds:
    """Seeds of a key that share one fingerprint, which is not the receiver's: how many, and one of them."""

    fingerprint: str
    seeds: int
    example: SeedAddress

    def __str__(self) -> str:
        # A fingerprint is whatever the seed's caller sent, bytes that are not UTF-8 included.
        quoted = urllib.parse.quote(self.fingerprint, safe="", errors="surrogatepass")
        return f"{quoted};{self.seeds};{self.example}"


def other_fingerprints_text(others: Iterable[OtherSeeds]) -> str:
    """The value of ``OTHER_FINGERPRINTS``. Entries that do not fit into a header are left out: they are for people."""
    text = ""
    for each in others:
        longer = f"{text}, {each}" if text else str(each)
        text = longer if len(longer) <= MAX_HEADER_LENGTH else text
    return text


def other_fingerprints(headers: Mapping[str, str]) -> list[OtherSeeds]:
    """What ``OTHER_FINGERPRINTS`` names: ``<fingerprint>;<seeds>;<ip:port:rank>, ...``; empty where it is missing.

    The fingerprint is percent-encoded. For people alone, so an entry that cannot be read is left out.
    """
    found = []
    for entry in (header(headers, OTHER_FINGERPRINTS) or "").split(",")[:MAX_OTHERS]:
        parts = entry.strip().split(";")
        if len(parts) != 3:
            continue
        try:
            seeds = integer(parts[1], OTHER_FINGERPRINTS, minimum=1)
            found.append(OtherSeeds(urllib.parse.unquote(parts[0]), seeds, parse_seed_address(parts[2])))
        except BadMessage:
            continue
    return found


#: A label's name, and its value.
LABEL = re.compile(r"[A-Za-z0-9_.-]{1,63}\Z")
MAX_LABELS = 16


def parse_labels(text: str) -> dict[str, str]:
    """Topology labels ``host=a,rack=b`` as a mapping; empty values are left out.

    Raises:
        BadMessage: not of that form, or more than ``MAX_LABELS`` of them; names and values match :data:`LABEL`.
    """
    labels: dict[str, str] = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        name, separator, value = pair.partition("=")
        name, value = name.strip(), value.strip()
        if not separator or not LABEL.match(name) or (value and not LABEL.match(value)):
            raise BadMessage(f"labels must look like host=a,rack=b, got {pair[:80]!r}")
        if value:
            labels[name] = value
    if len(labels) > MAX_LABELS:
        raise BadMessage(f"more than {MAX_LABELS} labels")
    return labels


@dataclass(frozen=True)
class Lease:
    """The planner's permission for one receiver to read one seed.

    ``ttl_s`` is None where the planner's leases never expire (older planners): nothing to renew. ``unconfirmed``: the
    planner takes the lease back in a few seconds unless it is renewed at once.
    """

    seed: SeedAddress
    user_id: str
    ttl_s: float | None
    unconfirmed: bool = False

    def headers(self) -> dict[str, str]:
        """What ``put_seed`` and ``renew_seed_lease`` carry."""
        return {**self.seed.headers(), USER_ID: encode_text(self.user_id)}


def lease_from_answer(headers: Mapping[str, str]) -> Lease:
    """The lease in the headers of a ``get_seed`` answer.

    Raises:
        BadMessage: a header is missing or unusable.
    """
    ttl = header(headers, LEASE_TTL_SEC)
    return Lease(
        seed=seed_address(headers),
        user_id=decode_text(required(headers, USER_ID)),
        ttl_s=None if ttl is None else seconds(ttl, LEASE_TTL_SEC, maximum=86400.0) or None,
        unconfirmed=header(headers, TICKET) is not None,
    )


#: What a receiver waits for, as a planner says it, and the same for people.
WAIT_REASONS: Mapping[str, str] = {
    "busy": "every seed of its key is in use",
    "loading": "another worker loads the weights from storage and will be a seed",
    "restarted": "the planner has restarted and does not grant earlier seeds yet",
}


@dataclass(frozen=True)
class Waiting:
    """A receiver's place in the queue, as the planner states it.

    Attributes:
        position: from 1.
        bound_s: the longest wait in all, in seconds from its start, as far as is known now.
        expected_s: the expected wait from now on in seconds; None: not known.
        reason: a key of :data:`WAIT_REASONS`; newer planners may have others.
    """

    position: int
    bound_s: float
    expected_s: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        expected = "" if self.expected_s is None else f"; expected={seconds_text(self.expected_s)}"
        return f"position={self.position}; bound={seconds_text(self.bound_s)}{expected}; reason={self.reason}"


_WORD = re.compile(r"[a-z_-]{1,32}\Z")


def parse_waiting(text: str) -> Waiting:
    """The inverse of ``str(Waiting)``; fields that are not known are ignored.

    Raises:
        BadMessage: a field is missing or unusable.
    """
    pairs = (each.partition("=") for each in text[:MAX_HEADER_LENGTH].split(";"))
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    reason = fields.get("reason", "")
    return Waiting(
        position=integer(fields.get("position", ""), WAITING, minimum=1, maximum=10**9),
        bound_s=seconds(fields.get("bound", ""), WAITING, maximum=86400.0),
        expected_s=seconds(fields["expected"], WAITING, maximum=1e9) if "expected" in fields else None,
        reason=reason if _WORD.match(reason) else "",
    )
