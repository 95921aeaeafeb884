"""Base URLs of planners."""

from __future__ import annotations

import ipaddress
import re

#: Addresses of one planner: its replicas, or what stands before them.
MAX_PLANNER_URLS = 8

_NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f\\]|\s")
#: Optionally a user and a password; a name or an address, IPv6 in brackets; optionally a port.
_AUTHORITY = re.compile(r"(?:[^\[\]@]*@)?(?P<host>\[[^\[\]]+\]|[^:\[\]]+)(:(?P<port>[0-9]{1,5}))?\Z")
#: RFC 1123, and the underscore, which container runtimes use in names.
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\Z")


def base_url(value: str) -> str:
    """A planner's base URL, without spaces around it and slashes at its end; an empty text is returned unchanged.

    It consists of ``http://`` or ``https://``, optionally a user and a password, a host, and optionally a port from 1
    to 65535 and a path.

    Raises:
        ValueError: not such a URL. The text does not quote the URL, which may contain a password.
    """
    value = value.strip()
    if not value:
        return value
    if not value.lower().startswith(("http://", "https://")):
        raise ValueError("not an http:// or https:// URL")
    if _NOT_IN_URLS.search(value):
        raise ValueError("spaces and control characters are not allowed in a URL")
    if "?" in value or "#" in value:
        raise ValueError("a base URL has no query and no fragment")
    match = _AUTHORITY.match(value.partition("://")[2].partition("/")[0])
    if match is None or (match["port"] is not None and not 1 <= int(match["port"]) <= 65535):
        raise ValueError("after :// there must be a host, and optionally a port from 1 to 65535")
    _check_host(match["host"].strip("[]"), bracketed=match["host"].startswith("["))
    return value.rstrip("/")


def planner_urls(value: str) -> str:
    """The base URLs of a planner's replicas, separated by commas, each as :func:`base_url` returns it.

    Raises:
        ValueError: one of them is unusable, there are more than ``MAX_PLANNER_URLS``, or there is nothing between two
            commas. A comma in a password must be written ``%2C``.
    """
    if "," not in value:
        return base_url(value)
    urls: dict[str, None] = {}
    for number, text in enumerate(value.split(","), start=1):
        try:
            url = base_url(text)
        except ValueError as error:
            raise ValueError(f"URL number {number}: {error}") from error
        if not url:
            raise ValueError(f"URL number {number} is empty")
        urls[url] = None
    if len(urls) > MAX_PLANNER_URLS:
        raise ValueError(f"{len(urls)} URLs")
    return ",".join(urls)


def _check_host(host: str, *, bracketed: bool) -> None:
    """Raise ValueError if ``host`` is neither a name nor a literal address, without brackets."""
    if bracketed:
        ipaddress.IPv6Address(host)  # its error is a ValueError that names the address
        return
    try:
        labels = host.removesuffix(".").encode("idna").decode("ascii").split(".")
    except UnicodeError as error:
        raise ValueError("the host is not a name or an address") from error
    if not all(_HOST_LABEL.match(label) for label in labels):
        raise ValueError("the host is not a name or an address")
    if labels[-1].isdigit():  # a top-level domain never is, so it is an address
        ipaddress.IPv4Address(host)
