"""Devices, the ledger of which meter fed which vehicle, and the newest reading of each device."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import psycopg

from energy_platform import database
from energy_platform.errors import ConflictError, NotFoundError, UnprocessableError
from energy_platform.readings import DeviceId, Instant

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

INTERVAL_MAX = timedelta(days=31)


class Declaration(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """What kind of energy a device reports, and how often it promises to.

    What is left out stays as it is; a device not known before is `interval`, 60 s.
    """

    energy_kind: Literal["interval", "register"] | msgspec.UnsetType = msgspec.UNSET
    reporting_interval: timedelta | msgspec.UnsetType = msgspec.UNSET


class Meter(msgspec.Struct, rename="camel"):
    meter_id: str
    energy_kind: str
    reporting_interval: timedelta


class Vehicle(msgspec.Struct, rename="camel"):
    vehicle_id: str
    energy_kind: str
    reporting_interval: timedelta


class LiveMeter(msgspec.Struct, rename="camel"):
    """The newest reading of a meter by its own clock. Units: kWh, V, s."""

    meter_id: str
    ts: datetime = msgspec.field(name="timestamp")
    kwh_consumed_ac: float
    voltage: float
    received_at: datetime
    stale_seconds: float


class LiveVehicle(msgspec.Struct, rename="camel"):
    """The newest reading of a vehicle by its own clock. Units: %, kWh, Celsius, s."""

    vehicle_id: str
    ts: datetime = msgspec.field(name="timestamp")
    soc: float
    kwh_delivered_dc: float
    battery_temp: float
    received_at: datetime
    stale_seconds: float


class AssignmentRequest(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """This meter fed this vehicle in since <= ts < until; null: until further notice.

    Left out, `until` stays as it is; of a new assignment it is null.
    """

    meter_id: DeviceId
    vehicle_id: DeviceId
    since: Instant
    until: Annotated[datetime, msgspec.Meta(tz=True)] | msgspec.UnsetType | None = msgspec.UNSET


class Assignment(msgspec.Struct, rename="camel"):
    assignment_id: int = msgspec.field(name="id")
    meter_id: str
    vehicle_id: str
    since: datetime
    until: datetime | None


Device = TypeVar("Device", Meter, Vehicle)
Live = TypeVar("Live", LiveMeter, LiveVehicle)

_NOUN: dict[type[Any], str] = {
    Meter: "meter",
    Vehicle: "vehicle",
    LiveMeter: "meter",
    LiveVehicle: "vehicle",
}


async def put_device(
    pool: database.Pool, kind: type[Device], device_id: str, declaration: Declaration
) -> tuple[Device, bool]:
    """Declare a device, for its whole past at once; also whether it was not known before."""
    interval = declaration.reporting_interval
    if interval is not msgspec.UNSET and not timedelta(0) < interval <= INTERVAL_MAX:
        raise UnprocessableError(
            f"reportingInterval must be over 0 and at most {INTERVAL_MAX.days} days",
            code="out_of_range",
        )
    parameters = {
        "device_id": device_id,
        "energy_kind": declaration.energy_kind or None,
        "reporting_interval": interval or None,
    }
    noun = _NOUN[kind]
    device = {"device_class": noun, "device_id": device_id}
    async with database.transaction(pool) as connection:
        # What is judged by the old declaration is committed before the new one is.
        await connection.execute(_SQL["hold_ingest"], device)
        cursor = await connection.execute(_SQL[f"changes_{noun}"], parameters)
        is_changed = await cursor.fetchone() is not None
        cursor = await connection.execute(_SQL[f"put_{noun}"], parameters)
        row = await cursor.fetchone()
    assert row is not None
    energy_kind, reporting_interval, made = row
    if is_changed:
        await _judge_again(pool, device)
    return kind(device_id, energy_kind, reporting_interval), made


async def _judge_again(pool: database.Pool, device: dict[str, Any]) -> None:
    """What is plausible for a device may be otherwise now: judge its past, a chunk at a time."""
    async with pool.connection() as connection:
        cursor = await connection.execute(_SQL["fetch_raw_chunks"], device)
        chunks = await cursor.fetchall()
    for since, until in chunks:
        async with database.transaction(pool) as connection:
            await connection.execute(_SQL["hold_device"], device)
            await connection.execute(
                _SQL["judge_range"], {**device, "since": since, "until": until}
            )


async def fetch_devices(
    pool: database.Pool, kind: type[Device], after: str | None, limit: int
) -> list[Device]:
    """A page of the registry, in the order of ids."""
    parameters = {"device_id": None, "after": after, "limit": limit}
    return await database.fetch_rows(pool, _SQL[f"fetch_{_NOUN[kind]}s"], kind, parameters)


async def fetch_device(pool: database.Pool, kind: type[Device], device_id: str) -> Device:
    """One device of the registry. Raises: NotFoundError."""
    parameters = {"device_id": device_id, "after": None, "limit": 1}
    rows = await database.fetch_rows(pool, _SQL[f"fetch_{_NOUN[kind]}s"], kind, parameters)
    if not rows:
        raise _unknown(_NOUN[kind], device_id)
    return rows[0]


async def fetch_live_page(
    pool: database.Pool, kind: type[Live], after: str | None, limit: int, now: datetime
) -> list[Live]:
    """The newest reading of a page of devices, in the order of ids."""
    parameters = {"device_id": None, "after": after, "limit": limit, "now": now}
    return await database.fetch_rows(pool, _SQL[f"fetch_live_{_NOUN[kind]}s"], kind, parameters)


async def fetch_live(pool: database.Pool, kind: type[Live], device_id: str, now: datetime) -> Live:
    """The newest reading of one device. Raises: NotFoundError where none is stored."""
    parameters = {"device_id": device_id, "after": None, "limit": 1, "now": now}
    rows = await database.fetch_rows(pool, _SQL[f"fetch_live_{_NOUN[kind]}s"], kind, parameters)
    if not rows:
        noun = _NOUN[kind]
        raise NotFoundError(
            f"No reading of {noun} {device_id!r} is stored here.", code=f"unknown_{noun}"
        )
    return rows[0]


async def put_assignment(
    pool: database.Pool, request: AssignmentRequest
) -> tuple[Assignment, bool]:
    """Write the ledger; also whether the entry is new.

    The same meter, vehicle and `since` again replaces `until`, so a repeated PUT is safe.
    Raises: ConflictError, naming the assignment that overlaps; UnprocessableError.
    """
    keeps_until = request.until is msgspec.UNSET
    until = request.until or None
    if until is not None and until <= request.since:
        raise UnprocessableError("until must be after since", code="empty_window")
    parameters = {
        **msgspec.structs.asdict(request),
        "since": _in_utc("since", request.since),
        "until": until and _in_utc("until", until),
        "keeps_until": keeps_until,
    }
    while True:
        try:
            async with database.transaction(pool) as connection:
                await connection.execute(_SQL["lock_ledger"])
                await connection.execute(_SQL["register_meter"], parameters)
                await connection.execute(_SQL["register_vehicle"], parameters)
                cursor = await connection.execute(_SQL["end_assignment"], parameters)
                row = await cursor.fetchone()
                made = row is None
                if row is None:
                    cursor = await connection.execute(_SQL["add_assignment"], parameters)
                    row = await cursor.fetchone()
        except psycopg.errors.ExclusionViolation as error:
            overlapping = await database.fetch_rows(
                pool, _SQL["fetch_overlapping"], Assignment, parameters
            )
            if not overlapping:
                continue  # the other one is gone again, or was this very assignment
            (other,) = overlapping
            raise ConflictError(
                f"The assignment overlaps with assignment {other.assignment_id}: meter "
                f"{other.meter_id} fed vehicle {other.vehicle_id} since {_words(other.since)} "
                f"until {_words(other.until)}.",
                code="assignment_overlap",
                hint="end that one first by a PUT with its since and an until",
                overlapping=other,
            ) from error
        assert row is not None
        assignment_id, until = row
        return Assignment(
            assignment_id, request.meter_id, request.vehicle_id, parameters["since"], until
        ), made


async def fetch_assignments(
    pool: database.Pool,
    vehicle_id: str | None,
    meter_id: str | None,
    after: int | None,
    limit: int,
) -> list[Assignment]:
    """A page of the ledger, in the order of ids."""
    parameters = {
        "vehicle_id": vehicle_id,
        "meter_id": meter_id,
        "after": after,
        "limit": limit,
    }
    return await database.fetch_rows(pool, _SQL["fetch_assignments"], Assignment, parameters)


async def delete_assignment(pool: database.Pool, assignment_id: int) -> None:
    """Take an entry out of the ledger: past answers change at once. Raises: NotFoundError."""
    async with database.transaction(pool) as connection:
        cursor = await connection.execute(
            _SQL["delete_assignment"], {"assignment_id": assignment_id}
        )
        if await cursor.fetchone() is None:
            raise NotFoundError(f"There is no assignment {assignment_id}.")


def _unknown(noun: str, device_id: str) -> NotFoundError:
    return NotFoundError(f"No {noun} {device_id!r} is known here.", code=f"unknown_{noun}")


def _in_utc(name: str, instant: datetime) -> datetime:
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise UnprocessableError(
            f"{name} is outside of the years 1 to 9999 in UTC", code="out_of_range"
        ) from None


def _words(instant: datetime | None) -> str:
    return "further notice" if instant is None else instant.isoformat()
