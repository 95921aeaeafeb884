"""The protocol on the wire: paths, headers, and their values as planner, seeds and receivers read and write them.

The names in the first block are those of legacy planners and clients and must not change. Those that begin with
``RFORK-`` are this project's and optional for the other side (``docs/protocol.md``).
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_rfork.messages.cache_results import CacheResults as CacheResults
from vllm_rfork.messages.cache_results import parse_cache_results as parse_cache_results
from vllm_rfork.messages.metering import MAX_LABEL_LENGTH as MAX_LABEL_LENGTH
from vllm_rfork.messages.metering import MODEL as MODEL
from vllm_rfork.messages.metering import SERVED as SERVED
from vllm_rfork.messages.metering import STORAGE_SEC as STORAGE_SEC
from vllm_rfork.messages.metering import STRATEGY as STRATEGY
from vllm_rfork.messages.metering import storage_s
from vllm_rfork.messages.values import LABEL as LABEL
from vllm_rfork.messages.values import MAX_HEADER_LENGTH as MAX_HEADER_LENGTH
from vllm_rfork.messages.values import MAX_LABELS as MAX_LABELS
from vllm_rfork.messages.values import BadMessage as BadMessage
from vllm_rfork.messages.values import decode_text as decode_text
from vllm_rfork.messages.values import encode_text as encode_text
from vllm_rfork.messages.values import header as header
from vllm_rfork.messages.values import integer as integer
from vllm_rfork.messages.values import parse_labels as parse_labels
from vllm_rfork.messages.values import required as required
from vllm_rfork.messages.values import seconds as seconds
from vllm_rfork.messages.values import seconds_text as seconds_text

# --- legacy names ------------------------------------------------------------------------------------------------
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
#: Deprecated by legacy clients: optional everywhere, and a missing rank is 0. Older planners require both.
SEED_RANK = "SEED_RANK"
SEED_REFCNT = "SEED_REFCNT"
USER_ID = "USER_ID"
LEASE_TTL_SEC = "LEASE_TTL_SEC"

SEED_HEALTH = "/health_check_with_key"
SEED_INFO = "/get_rfork_transfer_engine_info"
SEED_SHAPE_INFO = "/get_rfork_transfer_engine_shape_info"
SEED_FETCH = "/rfork_fetch_seed"
SEED_KEY_PARAM = "seed_key"

# --- this project's names ----------------------------------------------------------------------------------------
#: Announces or renews the intent of a pending loader: it loads this key from storage and will be a seed soon.
ADD_INTENT = "/rfork_intent"
#: A seed's presence, with the headers of ``add_seed``. The planner answers late; until then the open connection shows
#: that the seed's process lives.
PRESENCE = "/rfork_presence"
#: Last word of a streamed answer to it: call again at once, announce first, or call again after a pause.
PRESENCE_AGAIN, PRESENCE_UNKNOWN, PRESENCE_LATER = "again", "unknown", "later"
#: Planner: 200 while it takes new requests, 503 while it starts, drains or cannot reach its store.
READYZ = "/readyz"
#: Prometheus metrics, of the planner and of a seed service.
METRICS = "/metrics"
#: Planner, for operators, with the headers of ``remove_seed`` and a token: grant a seed to nobody, or undo that; end
#: the quarantine of a seed.
DRAIN = "/rfork_drain"
LIFT = "/rfork_lift"
#: Planner: the OpenAPI description of its calls.
OPENAPI = "/openapi.json"
#: Planner: the dashboard, and its data; with ``SEED_KEY`` the data of that key alone.
DASHBOARD = "/"
DASHBOARD_DATA = "/dashboard.json"
#: The versioned manifest on the seed service.
SEED_MANIFEST = "/rfork_manifest"
#: Its query parameter: the newest manifest version that the receiver reads; the seed answers with that or an older one.
MANIFEST_VERSION_PARAM = "version"
#: The facts behind the seed's fingerprint, for operators: a JSON object of short texts.
SEED_FACTS = "/rfork_facts"
#: The seed's current epoch: ``{"status": "ok", "epoch": "..."}``. Requested again right before reading.
SEED_EPOCH = "/rfork_epoch"
#: The seed's list of caches (``caches/manifest.py``): empty, with ``Retry-After``, until the seed has collected them.
SEED_CACHES = "/rfork_caches"
#: All bytes of one artifact of that list, which the two parameters name.
SEED_CACHE = "/rfork_cache"
CACHE_KIND_PARAM = "kind"
CACHE_NAME_PARAM = "name"
#: Pause in seconds that a seed asks for before it has collected them.
CACHES_PAUSE_S = 2
#: Planner: one serving seed of a key, without a lease, for caches that are needed before a worker exists.
FIND_SEED = "/rfork_find_seed"

#: In both directions: the digest that must be equal before two workers are paired.
FINGERPRINT = "RFORK-FINGERPRINT"
#: ``get_seed``: hold the request for up to this many seconds until a seed is free.
WAIT_SEC = "RFORK-WAIT-SEC"
#: ``get_seed``: the receiver's id of this one question, unique and unguessable. A repeated call with the same ticket
#: keeps its place in the queue and gets the same lease, never a second one. In a 200: the planner supports tickets, and
#: the receiver must renew the lease at once.
TICKET = "RFORK-TICKET"
#: In a 404 for a ticket: the receiver is in the queue (:class:`Waiting`) and calls again at once, with the same ticket.
WAITING = "RFORK-WAITING"
#: ``get_seed``: comma-separated ``ip:port:rank`` of the seeds that just failed this receiver.
EXCLUDE = "RFORK-EXCLUDE"
#: An opaque id of one loading worker: on ``get_seed`` (the planner remembers it if it has no seed), on
#: ``rfork_intent``, and on ``add_seed`` (the intent is fulfilled). In an answer: ``granted``.
INTENT = "RFORK-INTENT"
INTENT_GRANTED = "granted"
#: ``get_seed``, in a 404: why there is no seed, one of ``MISSES``.
MISS = "RFORK-MISS"
#: No seed has the key; or each is in use, is quarantined, has another fingerprint, or failed this receiver before.
MISSES = ("none", "busy", "quarantined", "fingerprint", "excluded")
#: ``get_seed``, in a 404: seeds of the key with other fingerprints; see :func:`other_fingerprints`.
OTHER_FINGERPRINTS = "RFORK-OTHER-FINGERPRINTS"
#: ``rfork_intent``: seconds until the intent is forgotten unless renewed; 0 withdraws it.
INTENT_TTL_SEC = "RFORK-INTENT-TTL-SEC"
#: ``add_seed``: leases that this seed carries at once.
SLOTS = "RFORK-SLOTS"
#: ``add_seed`` and ``get_seed``: topology, ``host=a,rack=b,zone=c``.
LABELS = "RFORK-LABELS"
#: ``add_seed``: the state id of the planner's last answer to this seed, and in every answer the present one. If they
#: differ, the planner has lost its state, and grants the seed only when no forgotten lease can still be valid.
STATE = "RFORK-STATE"
#: Instead of a state id: an announcement of this seed had no answer, so a planner may have granted it all the same.
STATE_UNANSWERED = "unanswered"
#: ``add_seed``: the seed's epoch.
EPOCH = "RFORK-EPOCH"
#: ``put_seed``: the result of the fork, ``ok`` or ``failed``, with the headers below.
RESULT = "RFORK-RESULT"
RESULT_OK = "ok"
RESULT_FAILED = "failed"
NBYTES = "RFORK-NBYTES"
SECONDS = "RFORK-SECONDS"
#: The error class that ended the fork, such as ``VerificationError``.
CAUSE = "RFORK-CAUSE"
#: ``put_seed``, failed: whose failure it was, as far as the receiver knows.
SIDE = "RFORK-SIDE"
SIDES = ("seed", "receiver", "unknown")
#: ``put_seed``: engine and lane that the bytes took, such as ``nixl/rdma``.
LANE = "RFORK-LANE"
#: ``add_seed``: the results of caches at this worker's own start; see :class:`CacheResults`.
CACHES = "RFORK-CACHES"
#: ``rfork_drain``: 1 ends a drain.
UNDO = "RFORK-UNDO"
#: ``add_seed``: the seed that this one's weights were forked from, as ``ip:port:rank``.
PARENT = "RFORK-PARENT"
#: ``add_seed``: the facts in which this worker and seeds of its key with other fingerprints differ, as text for people.
DIFFERS = "RFORK-DIFFERS"
MAX_DIFFERS_LENGTH = 1000
#: Presence: the client reads an answer that comes in pieces, so the planner may keep the request by sending bytes.
STREAM = "RFORK-STREAM"

MAX_KEY_LENGTH = 2048  #: characters of a seed key before encoding; header lines stay under aiohttp's 8190 bytes

#: The longest time in seconds for which a planner holds a question with a ticket.
SLICE_S = 10.0
#: First lifetime in seconds of the intent of a receiver with a ticket, which renews it after a third of that.
TICKET_INTENT_TTL_S = 30.0


@dataclass(frozen=True)
class SeedAddress:
    """A seed's identity for planners: the address of its HTTP service and its tp rank."""

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


#: A host name or an address literal.
HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}\Z")


def seed_address(headers: Mapping[str, str]) -> SeedAddress:
    """The seed that the headers name; its rank is 0 if they have none.

    Raises:
        BadMessage: host or port is missing, the port is not 1 to 65535, the rank is negative, or the host is not a
            host name or an address literal.
    """
    host = required(headers, SEED_IP).strip("[]")
    if not HOST.match(host):
        raise BadMessage(f"header {SEED_IP} must be a host name or an address, got {host[:80]!r}")
    port = integer(required(headers, SEED_PORT), SEED_PORT, minimum=1, maximum=65535)
    return SeedAddress(host, port, integer(header(headers, SEED_RANK) or "0", SEED_RANK, minimum=0))


def parse_seed_address(text: str) -> SeedAddress:
    """The inverse of ``str(SeedAddress)``; the host may contain colons.

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
        raise BadMessage(f"header {SEED_KEY} contains a key longer than {MAX_KEY_LENGTH} characters")
    return key


#: Most fingerprints in one answer.
MAX_OTHERS = 4


@dataclass(frozen=True)
class OtherSeeds:
    """Seeds of a key with one fingerprint that is not the receiver's: their number, and one of them."""

    fingerprint: str
    seeds: int
    example: SeedAddress

    def __str__(self) -> str:
        # A fingerprint is any text that a seed sent, including bytes that are not UTF-8.
        quoted = urllib.parse.quote(self.fingerprint, safe="", errors="surrogatepass")
        return f"{quoted};{self.seeds};{self.example}"


def other_fingerprints_text(others: Iterable[OtherSeeds]) -> str:
    """The value of ``OTHER_FINGERPRINTS``, without entries that do not fit into a header: operators read it."""
    text = ""
    for each in others:
        longer = f"{text}, {each}" if text else str(each)
        text = longer if len(longer) <= MAX_HEADER_LENGTH else text
    return text


def other_fingerprints(headers: Mapping[str, str]) -> list[OtherSeeds]:
    """The value of ``OTHER_FINGERPRINTS``, parsed: ``<fingerprint>;<seeds>;<ip:port:rank>, ...``.

    The fingerprint is percent-encoded. Unreadable entries are skipped: operators read it, no decision depends on it.
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


@dataclass(frozen=True)
class Lease:
    """The planner's permission for one receiver to read one seed.

    ``ttl_s`` is None if the lease never expires (older planners). An ``unconfirmed`` lease ends in a few seconds unless
    it is renewed at once. ``storage_s``: a load of the key from storage takes so long, as far as the planner knows.
    """

    seed: SeedAddress
    user_id: str
    ttl_s: float | None
    unconfirmed: bool = False
    storage_s: float | None = None

    def headers(self) -> dict[str, str]:
        """The headers of ``put_seed`` and ``renew_seed_lease``."""
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
        storage_s=storage_s(headers),
    )


#: Reasons for a wait, as planners send them, and their meaning for the log.
WAIT_REASONS: Mapping[str, str] = {
    "busy": "every seed of its key is in use",
    "loading": "another worker loads the weights from storage and will be a seed",
    "restarted": "the planner has restarted and does not grant earlier seeds yet",
}


@dataclass(frozen=True)
class Waiting:
    """A receiver's place in the queue.

    Attributes:
        position: from 1.
        bound_s: the planner's present bound of the whole wait, in seconds from its start.
        expected_s: the expected rest of the wait in seconds, if it is known.
        reason: a key of :data:`WAIT_REASONS`; newer planners may send others.
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
    """The inverse of ``str(Waiting)``; unknown fields are ignored.

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
