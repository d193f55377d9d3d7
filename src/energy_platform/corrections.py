"""Corrections: an administrator voids readings of a device, or replaces them, with a reason.

History holds what is valid; what was there before is kept with its correction, and ingest knows it:
a voided reading that is sent again is a duplicate. It is one transaction, with ingest of the class
held off for as long as it takes; then the hours that changed are rolled up again.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg_pool import PoolTimeout

from energy_platform import database
from energy_platform.errors import NotFoundError, Rejection, UnprocessableError
from energy_platform.readings import (
    METER_COLUMNS,
    VEHICLE_COLUMNS,
    DeviceId,
    Instant,
    Reading,
    TimeLimits,
    decode_reading,
    transpose,
)

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

READINGS_MAX: Final = 100_000  # that one correction takes out or puts in
ROLLED_UP_HOURS_MAX: Final = 48  # at once; of more, the next refresh takes care
REFRESH_ATTEMPTS_MAX: Final = 4  # beside another refresh, which is over soon
REFRESH_PAUSE_SECONDS: Final = 0.5
HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
INSTANT_STEP: Final = timedelta(microseconds=1)

_COLUMNS: Final = {"meter": METER_COLUMNS, "vehicle": VEHICLE_COLUMNS}

REASON_CHARACTERS_MAX: Final = 500


class CorrectionRequest(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """What to correct: of one device, the reading of `timestamp`, or all of since <= ts < until.

    `void` takes them out. `replace` puts `readings` in their place, as they are sent to ingest.
    """

    action: Literal["void", "replace"]
    reason: str
    meter_id: DeviceId | None = None
    vehicle_id: DeviceId | None = None
    timestamp: Instant | None = None
    since: Instant | None = None
    until: Instant | None = None
    readings: list[msgspec.Raw] | None = None


class Correction(msgspec.Struct, rename="camel"):
    """A correction that was made. `id` is null where nothing had to change any more."""

    correction_id: int | None = msgspec.field(name="id")
    action: str
    meter_id: str | None
    vehicle_id: str | None
    since: datetime
    until: datetime
    reason: str
    made_by: str
    made_at: datetime
    voided: int
    stored: int


class MadeCorrection(Correction):
    """With whether the rollups show it already; the answers do in any case."""

    rolled_up: bool


class CorrectedReading(msgspec.Struct, rename="camel"):
    """A reading as it was before a correction; what the other class has is null."""

    ts: datetime = msgspec.field(name="timestamp")
    kwh_consumed_ac: float | None
    voltage: float | None
    soc: float | None
    kwh_delivered_dc: float | None
    battery_temp: float | None
    received_at: datetime


class _Target(msgspec.Struct):
    """A request that is checked: whose readings, of which time, and what comes in their place."""

    device_class: str
    device_id: str
    since: datetime
    until: datetime
    readings: dict[datetime, Reading]


def decode_request(body: bytes) -> CorrectionRequest:
    """A request from JSON. Raises: UnprocessableError that names the field."""
    try:
        return msgspec.json.decode(body, type=CorrectionRequest)
    except msgspec.DecodeError as error:
        raise UnprocessableError(str(error), code="invalid_body") from None


def check_request(request: CorrectionRequest, limits: TimeLimits) -> _Target:
    """Raises: UnprocessableError that says which field is wrong and how to mend it."""
    device_class, device_id = _device_of(request)
    since, until = _range_of(request)
    # PostgreSQL's text would not hold a NUL, and a list of reasons no line feed.
    is_line = not any(character < " " for character in request.reason)
    if not is_line or not 0 < len(request.reason) <= REASON_CHARACTERS_MAX:
        raise UnprocessableError(
            f"reason is one line of 1 to {REASON_CHARACTERS_MAX} characters", code="invalid_body"
        )
    if since < limits.earliest:
        raise UnprocessableError(
            f"The correction reaches behind the late window, which begins at "
            f"{limits.earliest.isoformat()}: what is older is not rolled up again.",
            code="too_late",
        )
    if bool(request.readings) != (request.action == "replace") or request.readings == []:
        raise UnprocessableError(
            "`replace` needs `readings`, at least one, and `void` has none", code="invalid_body"
        )
    readings: dict[datetime, Reading] = {}
    for index, raw in enumerate(request.readings or []):
        reading = _decode_replacement(raw, index, limits)
        where = f"$.readings[{index}]"
        if reading.kind != device_class or reading.device_id != device_id:
            raise _invalid(where, f"the reading is not one of {device_class} {device_id}")
        ts = reading.ts.astimezone(UTC)
        if not since <= ts < until:
            raise _invalid(where, "the reading's timestamp is outside of what is corrected")
        if ts in readings:
            raise _invalid(where, "another reading has the same timestamp")
        readings[ts] = reading
    return _Target(device_class, device_id, since, until, readings)


def _device_of(request: CorrectionRequest) -> tuple[str, str]:
    if request.meter_id is not None and request.vehicle_id is None:
        return "meter", request.meter_id
    if request.vehicle_id is not None and request.meter_id is None:
        return "vehicle", request.vehicle_id
    raise UnprocessableError("either meterId or vehicleId", code="invalid_body")


def _range_of(request: CorrectionRequest) -> tuple[datetime, datetime]:
    try:
        if request.timestamp is not None and request.since is request.until is None:
            ts = request.timestamp.astimezone(UTC)
            return ts, ts + INSTANT_STEP
        if request.timestamp is None and request.since is not None and request.until is not None:
            since, until = request.since.astimezone(UTC), request.until.astimezone(UTC)
            if since >= until:
                raise UnprocessableError("until must be after since", code="empty_window")
            return since, until
    except OverflowError:
        raise UnprocessableError(
            "the instants are outside of the years 1 to 9999 in UTC", code="out_of_range"
        ) from None
    raise UnprocessableError("either timestamp, or since and until", code="invalid_body")


def _decode_replacement(raw: msgspec.Raw, index: int, limits: TimeLimits) -> Reading:
    try:
        reading, _ = decode_reading(raw, limits)
    except RecursionError:
        reading = Rejection("nested_too_deep", "$", "nested too deep")
    if isinstance(reading, Rejection):
        where = f"$.readings[{index}]{reading.path.removeprefix('$')}"
        raise _invalid(where, reading.detail, code=reading.code)
    return reading


def _invalid(where: str, detail: str, *, code: str = "invalid_reading") -> UnprocessableError:
    return UnprocessableError(f"{where}: {detail}", code=code, path=where)


async def correct(
    pool: database.Pool,
    request: CorrectionRequest,
    *,
    made_by: str,
    now: datetime,
    late_window: timedelta,
    refresh_end: timedelta,
) -> MadeCorrection:
    """Make a correction; a repeated one changes nothing and has no id.

    Raises: UnprocessableError; NotFoundError for a device or readings that were never there;
    StorageError.
    """
    target = check_request(request, TimeLimits.at(now, late_window))
    async with database.transaction(pool) as connection:
        voided, stored, correction_id = await _change_history(
            connection, target, request, made_by, now
        )
    changed = sorted({*voided, *stored})
    rolled_up = await _roll_up(pool, target.device_class, changed, now - refresh_end)
    is_meter = target.device_class == "meter"
    return MadeCorrection(
        correction_id=correction_id,
        action=request.action,
        meter_id=target.device_id if is_meter else None,
        vehicle_id=None if is_meter else target.device_id,
        since=target.since,
        until=target.until,
        reason=request.reason,
        made_by=made_by,
        made_at=now,
        voided=len(voided),
        stored=len(stored),
        rolled_up=rolled_up,
    )


async def _change_history(
    connection: AsyncConnection[Any],
    target: _Target,
    request: CorrectionRequest,
    made_by: str,
    now: datetime,
) -> tuple[list[datetime], list[datetime], int | None]:
    """The statements of the transaction; returns what was voided and stored, and the number."""
    kind = target.device_class
    device = {"device_class": kind, "device_id": target.device_id}
    span = {**device, "since": target.since, "until": target.until}
    await connection.execute(_SQL["hold_ingest"], device)
    await connection.execute(_SQL["allow_decompression"])
    cursor = await connection.execute(
        _SQL[f"fetch_{kind}_range"], {**span, "limit": READINGS_MAX + 1}
    )
    current = {ts.astimezone(UTC): tuple(values) for ts, *values in await cursor.fetchall()}
    if max(len(current), len(target.readings)) > READINGS_MAX:
        raise UnprocessableError(
            f"One correction takes out or puts in {READINGS_MAX} readings at most.",
            code="too_many_readings",
            hint="correct shorter ranges one after the other",
        )
    wanted = target.readings
    gone = [ts for ts in current if ts not in wanted or wanted[ts].values != current[ts]]
    new = {ts: wanted[ts] for ts in wanted if ts not in current or ts in gone}
    if not gone and not new:
        if not current and not await _is_corrected(connection, kind, span):
            raise NotFoundError(
                f"No reading of {kind} {target.device_id!r} is stored there.",
                code="unknown_reading",
            )
        return [], [], None
    if new and not current:
        await _check_known(connection, kind, target.device_id)
    cursor = await connection.execute(
        _SQL["add_correction"],
        {
            **span,
            "action": request.action,
            "reason": request.reason,
            "made_by": made_by,
            "made_at": now,
            "voided": len(gone),
            "stored": len(new),
        },
    )
    row = await cursor.fetchone()
    assert row is not None
    (correction_id,) = row
    if gone:
        bounds = {"ts": gone, "ts_min": min(gone), "ts_max": max(gone)}
        await connection.execute(
            _SQL[f"void_{kind}_readings"], {**device, **bounds, "correction_id": correction_id}
        )
    if new:
        columns = transpose(new.values(), _COLUMNS[kind])
        await connection.execute(_SQL[f"store_{kind}_readings"], {**columns, "received_at": now})
    changed = [*gone, *new]
    await connection.execute(
        _SQL["follow_history"], {**device, "since": min(changed), "until": max(changed)}
    )
    return gone, list(new), correction_id


async def _is_corrected(connection: AsyncConnection[Any], kind: str, span: dict[str, Any]) -> bool:
    cursor = await connection.execute(_SQL[f"is_{kind}_corrected"], span)
    row = await cursor.fetchone()
    return bool(row and row[0])


async def _check_known(connection: AsyncConnection[Any], kind: str, device_id: str) -> None:
    cursor = await connection.execute(_SQL["is_known"], {"device_id": device_id, "kind": kind})
    row = await cursor.fetchone()
    if not (row and row[0]):
        raise NotFoundError(
            f"No {kind} {device_id!r} is known here.",
            code=f"unknown_{kind}",
            hint="its first readings go to ingest",
        )


# ---- The rollups follow -------------------------------------------------------------------------


async def _roll_up(
    pool: database.Pool, kind: str, changed: Sequence[datetime], rolled_until: datetime
) -> bool:
    """Refresh the hours and days that changed, as far as they are rolled up at all.

    Whether all of them are done: of many hours, or beside a refresh that is running, they are left
    to the next refresh. Answers do not need it.
    """
    hours = {_floor(ts, HOUR) for ts in changed if _floor(ts, HOUR) + HOUR <= rolled_until}
    if len(hours) > ROLLED_UP_HOURS_MAX:
        return False
    days = {_floor(hour, DAY) for hour in hours if _floor(hour, DAY) + DAY <= rolled_until}
    pieces = [(f"{kind}_hourly", since, until) for since, until in _runs(hours, HOUR)]
    pieces += [(f"{kind}_daily", since, until) for since, until in _runs(days, DAY)]
    for attempt in range(REFRESH_ATTEMPTS_MAX):
        try:
            async with pool.connection() as connection:
                for rollup, since, until in pieces:
                    await connection.execute(
                        _SQL["refresh_rollup"], {"rollup": rollup, "since": since, "until": until}
                    )
            return True
        except (psycopg.Error, PoolTimeout):  # whatever it is, the correction is made
            if attempt < REFRESH_ATTEMPTS_MAX - 1:
                await asyncio.sleep(REFRESH_PAUSE_SECONDS)
    return False


def _floor(ts: datetime, step: timedelta) -> datetime:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return ts - (ts - epoch) % step


def _runs(begins: set[datetime], step: timedelta) -> list[tuple[datetime, datetime]]:
    """Buckets that follow one another, as one window each."""
    runs: list[tuple[datetime, datetime]] = []
    for begin in sorted(begins):
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], begin + step)
        else:
            runs.append((begin, begin + step))
    return runs


# ---- What was corrected -------------------------------------------------------------------------


async def fetch_corrections(
    pool: database.Pool,
    meter_id: str | None,
    vehicle_id: str | None,
    before: int | None,
    limit: int,
) -> list[Correction]:
    """A page of corrections, newest first."""
    parameters = {
        "meter_id": meter_id,
        "vehicle_id": vehicle_id,
        "before": before,
        "limit": limit,
    }
    return await database.fetch_rows(pool, _SQL["fetch_corrections"], Correction, parameters)


async def fetch_corrected_readings(
    pool: database.Pool, correction_id: int, after: datetime | None, limit: int
) -> list[CorrectedReading]:
    """A page of what a correction took out, by time. Raises: NotFoundError."""
    parameters = {"correction_id": correction_id, "after": after, "limit": limit}
    query = _SQL["fetch_corrected_readings"]
    rows = await database.fetch_rows(pool, query, CorrectedReading, parameters)
    if not rows and after is None:
        newest = await fetch_corrections(pool, None, None, correction_id + 1, 1)
        if not newest or newest[0].correction_id != correction_id:
            raise NotFoundError(f"There is no correction {correction_id}.")
    return rows
