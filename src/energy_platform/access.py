"""API keys: who may do what, and for which devices.

The secret is shown once and never kept; the database holds its SHA-256. Every service process holds
all keys in memory and reads them again every second or so, so that a revoked key stops within
seconds and a request costs no query.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.rows import class_row

from energy_platform import database
from energy_platform.errors import (
    ForbiddenError,
    NotFoundError,
    SetupError,
    StorageError,
    UnauthorizedError,
)
from energy_platform.readings import DEVICE_ID_PATTERN

SCOPES: Final = ("ingest", "read", "admin")
RELOAD_SECONDS: Final = 1.0
LOOK_AGAIN_SECONDS: Final = 0.1  # at the most so often for keys that are not known
BOOTSTRAP_CHARACTERS_MIN: Final = 32

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))
_log = logging.getLogger("energy_platform.access")


class Key(msgspec.Struct, frozen=True):
    """An API key without its secret. Bound to no device where both bindings are None."""

    key_id: str
    secret_sha256: bytes
    name: str
    scopes: list[str]
    device_ids: list[str] | None = None
    device_prefix: str | None = None
    created_at: datetime | None = None
    revoked_at: datetime | None = None

    def may_send(self, device_id: str) -> bool:
        if self.device_ids is not None:
            return device_id in self.device_ids
        return self.device_prefix is None or device_id.startswith(self.device_prefix)


def make_key(
    name: str,
    scopes: list[str],
    device_ids: list[str] | None = None,
    device_prefix: str | None = None,
    secret: str | None = None,
) -> tuple[Key, str]:
    """A new key and its secret. Raises: SetupError for a scope that is none."""
    for scope in scopes:
        if scope not in SCOPES:
            raise SetupError(f"There is no scope {scope!r}: use {', '.join(SCOPES)}.")
    for device_id in device_ids or ():
        if not re.match(DEVICE_ID_PATTERN, device_id):
            raise SetupError(f"{device_id!r} is no device id: printable ASCII without a space.")
    if device_prefix == "":
        raise SetupError("An empty prefix binds the key to nothing: leave it out.")
    if secret is None:
        secret = f"ek_{secrets.token_urlsafe(32)}"
    elif not re.fullmatch(rf"[!-~]{{{BOOTSTRAP_CHARACTERS_MIN},512}}", secret):
        raise SetupError(
            f"A key given from outside has {BOOTSTRAP_CHARACTERS_MIN} to 512 printable ASCII "
            "characters without a space.",
            hint="for example: openssl rand -hex 32",
        )
    key_id = f"key_{secrets.token_hex(6)}"
    return Key(key_id, _digest(secret), name, scopes, device_ids, device_prefix), secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def add_key(connection: psycopg.Connection[Any], key: Key) -> None:
    connection.execute(_SQL["add_key"], msgspec.structs.asdict(key))


def list_keys(connection: psycopg.Connection[Any]) -> list[Key]:
    with connection.cursor(row_factory=class_row(Key)) as cursor:
        return cursor.execute(_SQL["fetch_keys"]).fetchall()


def revoke_key(connection: psycopg.Connection[Any], key_id: str) -> None:
    """Raises: NotFoundError."""
    if connection.execute(_SQL["revoke_key"], {"key_id": key_id}).fetchone() is None:
        raise NotFoundError(f"There is no key {key_id!r}: `keys list` shows all.")


def bootstrap_key(connection: psycopg.Connection[Any], secret: str) -> bool:
    """Make the first key, with every scope, from a secret given; False if keys exist."""
    if list_keys(connection):
        return False
    key, _ = make_key("bootstrap", list(SCOPES), secret=secret)
    add_key(connection, key)
    return True


class KeyRing:
    """All keys, held in memory and kept fresh.

    `loopback_only` says that the service listens on a loopback address, so that it may run open
    while no key exists.
    """

    def __init__(
        self, pool: database.Pool, *, loopback_only: bool, monotonic: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._loopback_only = loopback_only
        self._monotonic = monotonic
        self._by_digest: dict[bytes, Key] = {}
        self._by_id: dict[str, Key] = {}
        self._tried_at = -LOOK_AGAIN_SECONDS
        self._is_loaded = False
        self._lock = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """No key exists, not even a revoked one, and nobody but this machine can reach us."""
        return self._is_loaded and self._loopback_only and not self._by_id

    async def load(self) -> None:
        async def query(connection: AsyncConnection[Any]) -> list[Key]:
            async with connection.cursor(row_factory=class_row(Key)) as cursor:
                await cursor.execute(_SQL["fetch_keys"])
                return await cursor.fetchall()

        keys = await database.read(self._pool, query)
        self._by_id = {key.key_id: key for key in keys}
        self._by_digest = {key.secret_sha256: key for key in keys if key.revoked_at is None}
        self._is_loaded = True

    async def keep_fresh(self) -> None:
        """Read the keys again, for ever. Those in memory stay good while the database is away."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            try:
                await self.load()
            except StorageError as error:
                _log.warning("keys not reloaded", extra={"error": str(error)})
            except Exception:  # whatever it is, a revoked key must stop
                _log.exception("keys not reloaded")

    async def authorize(self, header: str | None, scope: str) -> Key | None:
        """The key of an Authorization header; None where the service runs open.

        Raises: UnauthorizedError, ForbiddenError; StorageError while keys were never read.
        """
        if not self._is_loaded:
            await self._reload()
            if not self._is_loaded:
                raise StorageError
        if self.is_open:
            return None
        secret = _bearer(header)
        key = self._find(secret)
        if key is None:
            # Perhaps it was made just now: look once, though not for every guess.
            await self._reload()
            key = self._find(secret)
        if key is None:
            raise UnauthorizedError("This API key is not known, or was revoked.")
        if scope not in key.scopes:
            raise ForbiddenError(f"The key {key.name!r} lacks the scope {scope!r}.")
        return key

    def sender(self, key_id: str | None) -> Key | None:
        """The key that sent something earlier. Raises: ForbiddenError if it has no rights now."""
        if key_id is None:
            return None
        key = self._by_id.get(key_id)
        if key is None or key.revoked_at is not None or "ingest" not in key.scopes:
            raise ForbiddenError(f"The key {key_id} may not send readings any more.")
        return key

    def _find(self, secret: str) -> Key | None:
        digest = _digest(secret)
        key = self._by_digest.get(digest)
        return key if key and hmac.compare_digest(key.secret_sha256, digest) else None

    async def _reload(self) -> None:
        async with self._lock:
            if self._monotonic() - self._tried_at < LOOK_AGAIN_SECONDS:
                return  # somebody else has just looked, or found the database away
            try:
                await self.load()
            finally:
                self._tried_at = self._monotonic()


def _bearer(header: str | None) -> str:
    if not header:
        raise UnauthorizedError
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise UnauthorizedError
    return secret.strip()
