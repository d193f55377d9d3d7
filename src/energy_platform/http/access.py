"""Scopes at the HTTP border, and who may talk to a service that runs open."""

import functools
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

Guard = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]


_PROXY_HEADERS = frozenset(
    (
        b"forwarded",
        b"via",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-real-ip",
    )
)


def require(scope: str) -> Guard:
    """A guard that asks for an API key with this scope; handlers find it as `request.state.key`."""

    async def guard(
        connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler
    ) -> None:
        keys = connection.app.state.service.keys
        header = connection.headers.get("authorization")
        connection.state.key = await keys.authorize(header, scope)

    return guard


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local_request(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether Host and Origin name this machine.

    A page of another site that a browser on this machine shows cannot pass for a local client, not
    even by a DNS name that it points to 127.0.0.1. Nor is what came through a proxy local.
    """
    for name, value in headers:
        if name in _PROXY_HEADERS:
            return False
        if name == b"host" and not _is_local(b"//" + value):
            return False
        if name == b"origin" and not _is_local(value):
            return False
    return True


@functools.lru_cache(maxsize=1024)  # clients name the same few hosts again and again
def _is_local(address: bytes) -> bool:
    try:
        host = urlsplit(address.decode("latin-1")).hostname
    except ValueError:
        return False
    return host is not None and is_loopback(host)
