"""What was not a reading, and its replay after a fix."""

import base64
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from psycopg import AsyncConnection
from psycopg.rows import namedtuple_row

from energy_platform import database
from energy_platform.readings import DEVICE_ID_PATTERN

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

REPLAY_BATCH = 1_000
REPLAY_ERRORS_MAX = 100
PAGE_PAYLOAD_BYTES_MAX = 8 * 2**20  # of a page or a batch: an entry alone may have 64 KiB
DEVICES_COUNTED_MAX = 100

CODE_PATTERN = r"^[a-z0-9_]{1,64}\Z"
Code = Annotated[str, msgspec.Meta(pattern=CODE_PATTERN)]
DeviceId = Annotated[str, msgspec.Meta(pattern=DEVICE_ID_PATTERN)]
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
    of_entries: int

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


class CodeCount(msgspec.Struct, rename="camel"):
    """What is in quarantine for one reason."""

    code: str
    entries: int
    readings: int
    first_seen: datetime
    last_seen: datetime


class DeviceCount(msgspec.Struct, rename="camel"):
    """What is in quarantine of one device; null: of none that can be told."""

    device_id: str | None
    entries: int
    readings: int
    codes: list[str]
    last_seen: datetime


class Counts(msgspec.Struct, rename="camel"):
    """total entries, which are so many readings: the same bytes for the same reason are one entry.

    Most readings first; of devices the first 100.
    """

    total: int
    readings: int
    by_code: list[CodeCount]
    by_device: list[DeviceCount]
    devices_omitted: int


class ReplayRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename="camel"):
    """Which entries to run through ingest again: these, or all of a code, a device, or both."""

    ids: list[EntryId] | None = None
    code: Code | None = None
    device_id: DeviceId | None = None


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


class Became(msgspec.Struct, rename="camel"):
    """How many entries of one code came to one outcome, with which code where they were refused."""

    was_code: str
    outcome: str
    code: str | None
    entries: int


class ReplayAccount(msgspec.Struct, rename="camel"):
    """received = stored + duplicate + conflicting + rejected. The last two stay in quarantine.

    `became` sums all of them up, `errors` lists the first 100 that stay.
    """

    received: int = 0
    stored: int = 0
    duplicate: int = 0
    conflicting: int = 0
    rejected: int = 0
    became: list[Became] = msgspec.field(default_factory=list)
    errors: list[ReplayError] = msgspec.field(default_factory=list)
    errors_omitted: int = 0


async def fetch_quarantine(
    pool: database.Pool,
    code: str | None,
    device_id: str | None,
    before: int | None,
    limit: int,
) -> tuple[list[Entry], bool]:
    """A page of entries, newest first, and whether there are more.

    It is shorter than `limit` where the payloads reach PAGE_PAYLOAD_BYTES_MAX.
    """
    parameters = {"code": code, "device_id": device_id, "before": before, "limit": limit + 1}
    entries = await _fetch(pool, "fetch_quarantine", parameters)
    page = entries[:limit]
    return page, bool(page) and len(page) < page[0].of_entries


async def count_quarantine(pool: database.Pool, code: str | None, device_id: str | None) -> Counts:
    """What is in quarantine, by code and by device."""
    parameters = {"code": code, "device_id": device_id, "devices_max": DEVICES_COUNTED_MAX}

    async def query(connection: AsyncConnection[Any]) -> list[Any]:
        async with connection.cursor(row_factory=namedtuple_row) as cursor:
            await cursor.execute(_SQL["count_quarantine"], parameters)
            return await cursor.fetchall()

    rows = await database.read(pool, query)
    of_device = [row for row in rows if row.part == "device"]
    (of_all,) = (row for row in rows if row.part == "all")
    return Counts(
        total=of_all.entries,
        readings=of_all.readings,
        by_code=[
            CodeCount(row.code, row.entries, row.readings, row.first_seen, row.last_seen)
            for row in rows
            if row.part == "code"
        ],
        by_device=[
            DeviceCount(row.device_id, row.entries, row.readings, row.codes, row.last_seen)
            for row in of_device
        ],
        devices_omitted=of_device[0].parts - len(of_device) if of_device else 0,
    )


async def replay(
    pool: database.Pool,
    request: ReplayRequest,
    record: Callable[[list[Entry]], Awaitable[list[Verdict]]],
) -> ReplayAccount:
    """Run entries through `record` again; what is now stored or duplicate leaves."""
    account = ReplayAccount()
    became: Counter[tuple[str, str, str | None]] = Counter()
    after = 0
    while True:
        parameters = {
            "ids": request.ids,
            "code": request.code,
            "device_id": request.device_id,
            "after": after,
            "limit": REPLAY_BATCH,
        }
        entries = await _fetch(pool, "fetch_for_replay", parameters)
        if not entries:
            account.became = [Became(*key, count) for key, count in became.items()]
            account.became.sort(key=lambda one: (-one.entries, one.was_code, one.outcome))
            return account
        after = entries[-1].quarantine_id
        verdicts = await record(entries)
        settled = []
        for entry, verdict in zip(entries, verdicts, strict=True):
            account.received += 1
            became[entry.code, verdict.outcome, verdict.code or None] += 1
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
    bounded = {**parameters, "bytes_max": PAGE_PAYLOAD_BYTES_MAX}
    return await database.fetch_rows(pool, _SQL[query_name], Entry, bounded)
