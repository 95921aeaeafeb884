"""Validation of ``--store redis://…`` before a connection is made, and a connection to try it."""

from __future__ import annotations

import asyncio
import urllib.parse

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.store.errors import StoreUnavailable

_ACCEPTS = "redis://:PASSWORD@host:6379/0, rediss:// for TLS, or unix:///path; options after ? as redis-py has them"


def check(url: str) -> None:
    """Accept ``url`` if the Redis client can make a connection of it; none is opened.

    Raises:
        ConfigError: names ``store`` and, the problem, without the URL, which may contain a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        database = parts.path.strip("/")
        if parts.scheme in ("redis", "rediss") and database and not (database.isascii() and database.isdigit()):
            raise ValueError("the path is not a database number")
        pool = redis.asyncio.ConnectionPool.from_url(url)
        "".encode(pool.connection_kwargs.get("encoding", "utf-8"))
        pool.make_connection()  # type: ignore[no-untyped-call]  # the options after ? are checked only here
    except TypeError as error:
        options = ", ".join(sorted(urllib.parse.parse_qs(parts.query))) or "none"
        raise ConfigError("store", f"the Redis client rejects one of its options ({options})", _ACCEPTS) from error
    except (ValueError, LookupError, redis.exceptions.RedisError) as error:
        raise ConfigError("store", f"not a usable Redis URL ({_reason(error, url)})", _ACCEPTS) from error


async def ping(url: str, timeout_s: float) -> None:
    """Connect to Redis and wait for an answer; changes nothing.

    Raises:
        StoreUnavailable: no answer within ``timeout_s`` seconds, or Redis refused, for example the password.
    """
    client = redis.asyncio.Redis.from_url(
        url, protocol=2, socket_connect_timeout=timeout_s, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )
    try:
        await asyncio.wait_for(client.ping(), timeout_s)
    except (redis.exceptions.RedisError, OSError, asyncio.TimeoutError) as error:
        raise StoreUnavailable(_reason(error, url)) from error
    finally:
        await client.aclose()


def _reason(error: Exception, url: str) -> str:
    """Return the text of ``error``, unless it quotes what may be the password."""
    text = str(error)
    password = url.partition("://")[2].rpartition("@")[0].rpartition(":")[2]
    return type(error).__name__ if not text or (password and password in text) else text
