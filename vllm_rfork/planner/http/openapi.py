"""The planner's calls in OpenAPI 3.1, as it serves them at ``/openapi.json``: plain data, written by hand.

``docs/protocol.md`` is the protocol; this says the same to programs. Tests compare it with the routes and headers that
``api.py`` knows, and with what a running planner answers. Must not import anything but the names on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_rfork import __version__, messages

_Data = dict[str, Any]

_INTEGER_TEXT = r"^[0-9]{1,12}$"
_OWN_ID = {"type": "string", "maxLength": 256}
_LABELS = r"^([A-Za-z0-9_.-]{1,63}=[A-Za-z0-9_.-]{0,63}(,[A-Za-z0-9_.-]{1,63}=[A-Za-z0-9_.-]{0,63}){0,15})?$"
_SEED = r"[A-Za-z0-9._:-]{1,200}:[0-9]{1,5}:[0-9]{1,9}"
#: Printable ASCII that neither begins nor ends with a space, and is not the escaped form of other text.
_TEXT = r"^(?!UTF-8'')[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$"


def _number(maximum: int, minimum: int = 0) -> _Data:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


_SCHEMAS: dict[str, tuple[_Data, str]] = {
    messages.SEED_KEY: (
        {"type": "string", "minLength": 1, "maxLength": messages.MAX_KEY_LENGTH, "pattern": _TEXT},
        "The seed key: workers with equal keys may be paired. Text that is not printable ASCII is escaped (RFC 8187).",
    ),
    messages.SEED_IP: (
        {"type": "string", "minLength": 1, "maxLength": 253, "pattern": r"^[A-Za-z0-9._:-]+$"},
        "Host of the seed's HTTP service; the caller's own unless the planner trusts announced addresses.",
    ),
    messages.SEED_PORT: (_number(65535, 1), "Port of the seed's HTTP service."),
    messages.SEED_RANK: (_number(2**31 - 1), "The seed's tensor-parallel rank; 0 where it is missing."),
    messages.SEED_REFCNT: (_number(2**31 - 1), "Historical: clients send 0, and it is ignored."),
    messages.USER_ID: (
        {"type": "string", "minLength": 1, "maxLength": messages.MAX_HEADER_LENGTH, "pattern": _TEXT},
        "The lease's name; opaque.",
    ),
    messages.LEASE_TTL_SEC: (
        {"type": "number", "exclusiveMinimum": 0},
        "Seconds after which the lease ends unless it is renewed.",
    ),
    messages.FINGERPRINT: (_OWN_ID, "Where both sides state one, only equal ones are paired."),
    messages.WAIT_SEC: (
        {"type": "number", "minimum": 0, "maximum": 86400},
        "Hold the call for up to so many seconds until a seed is free; the planner has a bound of its own.",
    ),
    messages.TICKET: (
        _OWN_ID,
        "The receiver's id of this one question: asked again it keeps its place and its lease. In an answer: the lease "
        "has to be renewed at once.",
    ),
    messages.WAITING: (
        {"type": "string", "maxLength": messages.MAX_HEADER_LENGTH, "pattern": "^position=[0-9]+; bound=[0-9.]+;"},
        "The receiver stands in the queue: ask again at once, with the same ticket.",
    ),
    messages.EXCLUDE: (
        {"type": "string", "maxLength": messages.MAX_HEADER_LENGTH, "pattern": f"^({_SEED}(,{_SEED}){{0,255}})?$"},
        "Seeds that just failed this receiver: ip:port:rank, comma-separated.",
    ),
    messages.INTENT: (_OWN_ID, "Opaque id of a worker that loads the key from storage; in an answer: granted."),
    messages.MISS: ({"type": "string", "enum": list(messages.MISSES)}, "Why there is no seed."),
    messages.OTHER_FINGERPRINTS: (
        {"type": "string", "maxLength": messages.MAX_HEADER_LENGTH},
        "Seeds of the key with other fingerprints: FINGERPRINT;SEEDS;ip:port:rank, comma-separated, at most 4.",
    ),
    messages.INTENT_TTL_SEC: (
        {"type": "number", "minimum": 0, "maximum": 86400},
        "Seconds until the intent is forgotten unless it is sent again; 0 takes it back.",
    ),
    messages.SLOTS: (_number(2**31 - 1, 1), "Leases that this seed carries at once."),
    messages.LABELS: (
        {"type": "string", "maxLength": messages.MAX_HEADER_LENGTH, "pattern": _LABELS},
        "Where the worker stands: host=a,rack=b,zone=c; up to 16.",
    ),
    messages.EPOCH: (_OWN_ID, "The seed's epoch: another epoch is another seed at the same address."),
    messages.STATE: (_OWN_ID, "Id of the planner's memory: given with each announcement, sent back with the next."),
    messages.RESULT: (
        {"type": "string", "enum": [messages.RESULT_OK, messages.RESULT_FAILED]},
        "How the fork went.",
    ),
    messages.NBYTES: (_number(10**16 - 1), "Bytes that were copied."),
    messages.SECONDS: ({"type": "number", "minimum": 0, "maximum": 10**7}, "How long the fork took."),
    messages.CAUSE: (_OWN_ID, "The error class that ended a failed fork."),
    messages.SIDE: (
        {"type": "string", "enum": list(messages.SIDES)},
        "Whose failure it was: a receiver's own counts against no seed.",
    ),
    messages.LANE: ({"type": "string", "maxLength": 64}, "Engine and lane that the bytes took."),
    messages.STREAM: ({"type": "string", "enum": ["1"]}, "The client reads an answer that comes in pieces."),
}

_SEED_NAME = (messages.SEED_IP, messages.SEED_PORT)


def _sent(names: Iterable[str], *, required: bool) -> list[_Data]:
    return [
        {"name": name, "in": "header", "required": required, "description": text, "schema": schema}
        for name in names
        for schema, text in (_SCHEMAS[name],)
    ]


def _answered(*names: str) -> _Data:
    return {
        name: {"required": True, "description": text, "schema": schema}
        for name in names
        for schema, text in (_SCHEMAS[name],)
    }


def _text(description: str, headers: _Data | None = None) -> _Data:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {"description": description, "content": content, **({"headers": headers} if headers else {})}


def _json(description: str, schema: _Data) -> _Data:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_RETRY_AFTER = {
    "Retry-After": {"required": False, "description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}
}
_UNAUTHORIZED = {
    "WWW-Authenticate": {"required": True, "description": "Asks for a bearer token.", "schema": {"type": "string"}}
}
_ALLOW = {"Allow": {"required": True, "description": "The methods that the path takes.", "schema": {"type": "string"}}}
_REFUSALS: dict[str, _Data] = {
    "400": _text("A header is missing or wrong; the text names it."),
    "401": _text("The bearer token is missing or wrong.", _UNAUTHORIZED),
    "403": _text("The caller may not speak for a seed at that address."),
    "404": _text("There is no such seed, or no such lease."),
    "405": _text("The path takes another method.", _ALLOW),
    "409": _text("Still leased: the seed is draining, and is dropped when its last lease ends."),
    "429": _text("A bound on keys, seeds or intents is reached."),
    "503": _text("The planner starts, drains, or cannot reach its state. Ask again.", _RETRY_AFTER),
}


#: What ``add_seed`` and a presence request may carry besides the seed's key and address.
_ANNOUNCED = (
    messages.SEED_RANK,
    messages.SEED_REFCNT,
    messages.FINGERPRINT,
    messages.SLOTS,
    messages.LABELS,
    messages.EPOCH,
    messages.INTENT,
    messages.STATE,
)


def _call(
    name: str,
    summary: str,
    ok: _Data,
    refusals: str,
    *,
    needs: Iterable[str] = (),
    takes: Iterable[str] = (),
    query: Iterable[_Data] = (),
    is_open: bool = False,
) -> _Data:
    codes = [*([] if is_open else ["401"]), *refusals.split()]
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [*_sent(needs, required=True), *_sent(takes, required=False), *query],
        "responses": {"200": ok, **{code: _REFUSALS[code] for code in sorted(codes)}},
        "security": [{}] if is_open else [{"token": []}, {}],
    }


def _paths() -> dict[str, dict[str, _Data]]:
    done = _text("Done.")
    no_seed = _text("No free seed: load from storage. The headers say why, and whether an intent is remembered.")
    told = {**_granted(), **_answered(messages.MISS, messages.OTHER_FINGERPRINTS, messages.WAITING)}
    no_seed["headers"] = {name: {**each, "required": False} for name, each in told.items()}
    lease = _answered(*_SEED_NAME, messages.SEED_RANK, messages.USER_ID, messages.LEASE_TTL_SEC, messages.TICKET)
    lease[messages.TICKET]["required"] = False
    get_seed = _call(
        "getSeed",
        "Lease a seed, wait for one, or be told to load from storage.",
        _text("A lease.", lease),
        "400 429 503",
        needs=[messages.SEED_KEY],
        takes=[
            messages.FINGERPRINT,
            messages.TICKET,
            messages.WAIT_SEC,
            messages.EXCLUDE,
            messages.INTENT,
            messages.LABELS,
        ],
    )
    get_seed["responses"]["404"] = no_seed
    return {
        messages.ADD_SEED: {
            "post": _call(
                "addSeed",
                "Announce a seed; also its heartbeat.",
                _text("Known.", _answered(messages.STATE)),
                "400 403 429 503",
                needs=[messages.SEED_KEY, *_SEED_NAME],
                takes=_ANNOUNCED,
            )
        },
        messages.PRESENCE: {"post": _presence()},
        messages.GET_SEED: {"get": get_seed},
        messages.PUT_SEED: {
            "post": _call(
                "putSeed",
                "Release a lease, and say how the fork went.",
                done,
                "400 404 503",
                needs=[*_SEED_NAME, messages.USER_ID],
                takes=[
                    messages.SEED_RANK,
                    messages.RESULT,
                    messages.NBYTES,
                    messages.SECONDS,
                    messages.CAUSE,
                    messages.SIDE,
                    messages.LANE,
                ],
            )
        },
        messages.RENEW_SEED_LEASE: {
            "post": _call(
                "renewSeedLease",
                "Give a lease its full time again.",
                _text("Renewed.", _answered(messages.LEASE_TTL_SEC)),
                "400 404 503",
                needs=[*_SEED_NAME, messages.USER_ID],
                takes=[messages.SEED_RANK],
            )
        },
        messages.REMOVE_SEED: {
            "post": _call(
                "removeSeed",
                "Withdraw a seed at once.",
                done,
                "400 403 404 409 503",
                needs=[messages.SEED_KEY, *_SEED_NAME],
                takes=[messages.SEED_RANK],
            )
        },
        messages.ADD_INTENT: {
            "post": _call(
                "intent",
                "Announce, renew or take back an intent to load from storage.",
                done,
                "400 429 503",
                needs=[messages.SEED_KEY, messages.INTENT],
                takes=[messages.INTENT_TTL_SEC, messages.FINGERPRINT],
            )
        },
        **_operating_paths(),
    }


def _presence() -> _Data:
    presence = _call(
        "presence",
        "Held while the seed's process lives: 20 s at a time, or, with RFORK-STREAM, some minutes with a line break "
        "every 20 s and a word at the end. A seed whose connection breaks is not granted until it asks again.",
        _text("Ask again, at once."),
        "400 403 409 429 503",
        needs=[messages.SEED_KEY, *_SEED_NAME],
        takes=[*_ANNOUNCED, messages.STREAM],
    )
    presence["responses"]["409"] = _text("The seed is not known: announce it, then ask again.")
    presence["responses"]["429"] = _text("Too many are held: the seed lives by its heartbeats.", _RETRY_AFTER)
    return presence


def _granted() -> _Data:
    granted = {
        "required": True,
        "description": "The intent is remembered.",
        "schema": {"type": "string", "enum": [messages.INTENT_GRANTED]},
    }
    return {messages.INTENT: granted, **_answered(messages.INTENT_TTL_SEC)}


def _operating_paths() -> dict[str, dict[str, _Data]]:
    def status(word: str) -> _Data:
        return {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"type": "string", "enum": [word]}},
        }

    metrics = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    page = {"description": "The page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    overview = _call(
        "dashboardData",
        "What the page shows, a second old at most while few look: of each list as much as a person reads.",
        _json("The fleet, or one key of it.", {"$ref": "#/components/schemas/Overview"}),
        "400 429 503",
        takes=[messages.SEED_KEY],
    )
    overview["responses"]["429"] = _text("Too many people look: ask again later.", _RETRY_AFTER)
    query = [
        {
            "name": "key",
            "in": "query",
            "required": False,
            "description": "Only of this seed key.",
            "schema": {"type": "string", "maxLength": messages.MAX_KEY_LENGTH},
        },
        {
            "name": "limit",
            "in": "query",
            "required": False,
            "description": "Most entries in each list.",
            "schema": {**_number(100_000), "default": 1000},
        },
    ]
    return {
        messages.HEALTHZ: {
            "get": _call("healthz", "The process answers.", _json("It does.", status("ok")), "", is_open=True)
        },
        messages.READYZ: {
            "get": _call(
                "readyz",
                "The planner takes requests and decides: its state can be reached, and no other replica leads.",
                _json("It does.", status("ready")),
                "503",
                is_open=True,
            )
        },
        messages.METRICS: {"get": _call("metrics", "Prometheus's text format.", metrics, "")},
        messages.DEBUG_SNAPSHOT: {
            "get": _call(
                "snapshot",
                "Seeds, leases, the waiting line, intents and past forks. Lease ids are cut short.",
                _json("The state.", {"$ref": "#/components/schemas/Snapshot"}),
                "400 429 503",
                query=query,
            )
        },
        messages.OPENAPI: {"get": _call("openapi", "This description.", _json("It.", {"type": "object"}), "")},
        messages.DASHBOARD: {"get": _call("dashboard", "A page for people, without data.", page, "", is_open=True)},
        messages.DASHBOARD_DATA: {"get": overview},
    }


def _snapshot() -> _Data:
    listed = {"type": "array", "items": {"type": "object"}}
    lists = ("seeds", "leases", "waiting", "intents", "history")
    return {
        "type": "object",
        "required": ["state", "age_s", "policy", "keys", *lists],
        "properties": {
            "state": {"type": "string", "description": "Id of the planner's memory."},
            "age_s": {"type": "number", "minimum": 0},
            "policy": {"type": "string"},
            "keys": {"type": "object", "additionalProperties": {"type": "object"}},
            **dict.fromkeys(lists, listed),
        },
    }


def _overview() -> _Data:
    counted = ("seeds", "draining", "aside", "absent", "slots", "leases", "waiting", "intents")
    counts = {**{name: {"type": "integer", "minimum": 0} for name in counted}, "oldest_wait_s": {"type": "number"}}
    lists = ("seeds", "leases", "waiting", "intents", "history", "causes")
    key = {"type": "object", "required": ["key", *counts], "properties": {"key": {"type": "string"}, **counts}}
    fleet = {**counts, "keys": {"type": "integer", "minimum": 0}}
    return {
        "type": "object",
        "required": ["planner", "key", "state", "age_s", "fleet", "keys", "forks", *lists],
        "properties": {
            "planner": {"type": "object", "description": "Version, settings, and whether it takes requests."},
            "key": {"type": ["string", "null"], "description": "The key that was asked for."},
            "state": {"type": "string", "description": "Id of the planner's memory."},
            "age_s": {"type": "number", "minimum": 0},
            "fleet": {"type": "object", "required": [*fleet], "properties": fleet, "description": "All keys together."},
            "keys": {"type": "array", "items": key, "description": "The most urgent first."},
            "forks": {"type": "object", "description": "Counts over the past forks that are looked back at."},
            **{name: {"type": "array", "items": {"type": "object"}} for name in lists},
        },
    }


def description() -> _Data:
    """The whole description, made anew: the caller may change it."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RFork planner",
            "version": __version__,
            "summary": "Pairs workers that are starting with workers that have the weights.",
            "description": "Arguments travel in headers, hyphens count as underscores in their names, and requests "
            "have no body. docs/protocol.md has the meaning of every call.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": {"Snapshot": _snapshot(), "Overview": _overview()},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Demanded where the planner was started with a token.",
                }
            },
        },
    }
