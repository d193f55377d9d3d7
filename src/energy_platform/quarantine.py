"""What was not a reading, and its replay after a fix."""

import base64
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from psycopg import AsyncConnection
from psycopg.rows import class_row

from energy_platform import database

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

REPLAY_BATCH = 1_000
REPLAY_ERRORS_MAX = 100

CODE_PATTERN = r"^[a-z0-9_]{1,64}\Z"
Code = Annotated[str, msgspec.Meta(pattern=CODE_PATTERN)]
EntryId = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Entry(msgspec.Struct):
    """A row of the quarantine, the payload as it came (its first 64 KiB)."""

    quarantine_id: int
    code: str
    path: str
    detail: str
    device_id: str | None
    count: int
    first_seen: datetime
    last_seen: datetime
    payload: bytes
    payload_bytes: int
    key_id: str | None

    @property
    def is_whole(self) -> bool:
        return len(self.payload) == self.payload_bytes


class EntryAnswer(msgspec.Struct, rename="camel"):
    """The same for HTTP: payload as text where it is text, and always in base64."""

    id: int
    code: str
    path: str
    detail: str
    device_id: str | None
    count: int
    first_seen: datetime
    last_seen: datetime
    payload: str | None
    payload_base64: str
    payload_bytes: int

    @classmethod
    def of(cls, entry: Entry) -> "EntryAnswer":
        try:
            text: str | None = entry.payload.decode()
        except UnicodeDecodeError:
            text = None
        return cls(
            id=entry.quarantine_id,
            code=entry.code,
            path=entry.path,
            detail=entry.detail,
            device_id=entry.device_id,
            count=entry.count,
            first_seen=entry.first_seen,
            last_seen=entry.last_seen,
            payload=text,
            payload_base64=base64.b64encode(entry.payload).decode(),
            payload_bytes=entry.payload_bytes,
        )


class ReplayRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which entries to run through ingest again: these, or all of a code."""

    ids: list[EntryId] | None = None
    code: Code | None = None


class Verdict(msgspec.Struct):
    """What became of one replayed entry."""

    outcome: str
    code: str = ""
    path: str = ""
    detail: str = ""


class ReplayError(msgspec.Struct):
    id: int
    outcome: str
    code: str
    path: str
    detail: str


class ReplayAccount(msgspec.Struct, rename="camel"):
    """received = stored + duplicate + conflicting + rejected. The last two stay in quarantine."""

    received: int = 0
    stored: int = 0
    duplicate: int = 0
    conflicting: int = 0
    rejected: int = 0
    errors: list[ReplayError] = msgspec.field(default_factory=list)
    errors_omitted: int = 0


async def fetch_quarantine(
    pool: database.Pool,
    code: str | None,
    device_id: str | None,
    before: int | None,
    limit: int,
) -> list[Entry]:
    """A page of entries, newest first."""
    parameters = {"code": code, "device_id": device_id, "before": before, "limit": limit}
    return await _fetch(pool, "fetch_quarantine", parameters)


async def replay(
    pool: database.Pool,
    request: ReplayRequest,
    record: Callable[[list[Entry]], Awaitable[list[Verdict]]],
) -> ReplayAccount:
    """Run entries through `record` again; what is now stored or duplicate leaves."""
    account = ReplayAccount()
    after = 0
    while True:
        parameters = {
            "ids": request.ids,
            "code": request.code,
            "after": after,
            "limit": REPLAY_BATCH,
        }
        entries = await _fetch(pool, "fetch_for_replay", parameters)
        if not entries:
            return account
        after = entries[-1].quarantine_id
        verdicts = await record(entries)
        settled = []
        for entry, verdict in zip(entries, verdicts, strict=True):
            account.received += 1
            setattr(account, verdict.outcome, getattr(account, verdict.outcome) + 1)
            if verdict.outcome in ("stored", "duplicate"):
                settled.append(entry.quarantine_id)
            elif len(account.errors) < REPLAY_ERRORS_MAX:
                account.errors.append(
                    ReplayError(
                        entry.quarantine_id,
                        verdict.outcome,
                        verdict.code,
                        verdict.path,
                        verdict.detail,
                    )
                )
            else:
                account.errors_omitted += 1
        async with database.transaction(pool) as connection:
            await connection.execute(_SQL["delete_replayed"], {"ids": settled})


async def _fetch(pool: database.Pool, query_name: str, parameters: dict[str, Any]) -> list[Entry]:
    async def query(connection: AsyncConnection[Any]) -> list[Entry]:
        async with connection.cursor(row_factory=class_row(Entry)) as cursor:
            await cursor.execute(_SQL[query_name], parameters)
            return await cursor.fetchall()

    return await database.read(pool, query)
