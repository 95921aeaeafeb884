"""Request headers of the protocol as the store's plain data. Raises :class:`BadMessage` for headers it cannot use."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from vllm_rfork import messages
from vllm_rfork.messages import BadMessage, CacheResults, header
from vllm_rfork.messages.cache_results import parse_cache_results
from vllm_rfork.net.addresses import canonical
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Announcement, Ask, Outcome
from vllm_rfork.planner.store.errors import UnknownLease
from vllm_rfork.planner.store.key_use import KeyNames

#: Maximum length of the headers that carry free text, in characters.
MAX_ID_LENGTH = 256
MAX_LANE_LENGTH = 64
MAX_EXCLUDED = 256


def seed_key(headers: Mapping[str, str], max_length: int) -> str:
    """Return the seed key, of at most ``max_length`` characters."""
    key = messages.seed_key(headers)
    if len(key) > max_length:
        raise BadMessage(f"header {messages.SEED_KEY} contains a key longer than {max_length} characters")
    return key


def text(headers: Mapping[str, str], name: str, max_length: int = MAX_ID_LENGTH) -> str:
    """Return free text; empty if it is missing."""
    value = messages.decode_text(header(headers, name) or "")
    if len(value) > max_length:
        raise BadMessage(f"header {name} is longer than {max_length} characters")
    return value


def labels(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return the labels of a seed or receiver."""
    try:
        return messages.parse_labels(text(headers, messages.LABELS, messages.MAX_HEADER_LENGTH))
    except BadMessage as error:
        raise BadMessage(f"header {messages.LABELS}: {error}") from error


def seed_address(headers: Mapping[str, str]) -> messages.SeedAddress:
    """Return the seed that the headers name, its host in canonical spelling."""
    return canonical(messages.seed_address(headers))


def user_id(headers: Mapping[str, str]) -> str:
    """Return the lease id.

    Raises:
        UnknownLease: it is not text. Clients of the in-tree RFork that are answered 400 never become a seed.
    """
    value = messages.required(headers, messages.USER_ID)
    try:
        return messages.decode_text(value)
    except BadMessage as error:
        raise UnknownLease("no such lease") from error


def announcement(headers: Mapping[str, str], settings: Settings) -> Announcement:
    """Return what ``add_seed`` and a presence request announce."""
    key, seed = seed_key(headers, settings.max_key_length), seed_address(headers)
    messages.integer(header(headers, messages.SEED_REFCNT) or "0", messages.SEED_REFCNT, minimum=0)
    slots = header(headers, messages.SLOTS)
    return Announcement(
        key=key,
        seed=seed,
        fingerprint=text(headers, messages.FINGERPRINT),
        slots=None if slots is None else messages.integer(slots, messages.SLOTS, minimum=1),
        labels=labels(headers),
        epoch=text(headers, messages.EPOCH),
        intent=text(headers, messages.INTENT),
        known_state=text(headers, messages.STATE),
        caches=_caches(headers),
        names=key_names(headers),
        parent=_parent(headers),
        differs=_shown(headers, messages.DIFFERS, messages.MAX_DIFFERS_LENGTH),
    )


def _parent(headers: Mapping[str, str]) -> str:
    """Return the seed that the header names; empty if it names none. It is for people: a wrong one refuses no seed."""
    try:
        return str(canonical(messages.parse_seed_address(header(headers, messages.PARENT) or "")))
    except BadMessage:
        return ""


def key_names(headers: Mapping[str, str]) -> KeyNames:
    """Return the names of the key; empty ones if they are missing."""
    return KeyNames(*(_shown(headers, each, messages.MAX_LABEL_LENGTH) for each in (messages.MODEL, messages.STRATEGY)))


def _shown(headers: Mapping[str, str], name: str, max_length: int) -> str:
    """Return text for people, cut if it is too long; empty if it is missing or unusable, which refuses no call."""
    try:
        return messages.decode_text(header(headers, name) or "")[:max_length]
    except BadMessage:
        return ""


def _caches(headers: Mapping[str, str]) -> CacheResults | None:
    """Return the results of the seed's own start; None if the header has none that can be read."""
    results = parse_cache_results(header(headers, messages.CACHES) or "")
    return results if results.kinds else None


def ask(request: web.BaseRequest, settings: Settings) -> Ask:
    """Return what ``get_seed`` asks for."""
    headers = request.headers
    ticket, wait = text(headers, messages.TICKET), header(headers, messages.WAIT_SEC)
    if wait is None:
        wait_s = 0.0 if ticket else settings.seed_wait_sec
    else:
        wait_s = min(messages.seconds(wait, messages.WAIT_SEC, maximum=86400.0), settings.max_wait_sec)
    return Ask(
        key=seed_key(headers, settings.max_key_length),
        receiver=request.remote or "local",
        fingerprint=text(headers, messages.FINGERPRINT),
        wait_s=wait_s,
        exclude=_excluded(headers),
        labels=labels(headers),
        intent=text(headers, messages.INTENT),
        ticket=ticket,
        keeps=bool(ticket),
        patient=bool(ticket) and wait is None and settings.default_wait_sec > 0,
        names=key_names(headers),
    )


def _excluded(headers: Mapping[str, str]) -> frozenset[str]:
    names = [each for each in (header(headers, messages.EXCLUDE) or "").split(",") if each.strip()]
    if len(names) > MAX_EXCLUDED:
        raise BadMessage(f"header {messages.EXCLUDE} names more than {MAX_EXCLUDED} seeds")
    return frozenset(str(canonical(messages.parse_seed_address(each))) for each in names)


def outcome(headers: Mapping[str, str]) -> Outcome | None:
    """Return what ``put_seed`` reports; None if it reports nothing."""
    result = header(headers, messages.RESULT)
    if result not in (messages.RESULT_OK, messages.RESULT_FAILED):
        return None  # other words are a later version's: the lease ends as if there were no result
    side = header(headers, messages.SIDE) or ""
    return Outcome(
        result == messages.RESULT_OK,
        messages.integer(header(headers, messages.NBYTES) or "0", messages.NBYTES, minimum=0, maximum=10**16 - 1),
        messages.seconds(header(headers, messages.SECONDS) or "0", messages.SECONDS, maximum=1e7),
        text(headers, messages.CAUSE),
        side if side in messages.SIDES else "",
        text(headers, messages.LANE, MAX_LANE_LENGTH),
    )


def intent_ttl_s(headers: Mapping[str, str], default_s: float) -> float:
    """Return for how long ``rfork_intent`` records an intent, in seconds."""
    ttl = header(headers, messages.INTENT_TTL_SEC)
    ttl_s = default_s if ttl is None else messages.seconds(ttl, messages.INTENT_TTL_SEC, maximum=86400.0)
    return min(ttl_s, 3600.0)
