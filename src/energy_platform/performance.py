"""The answers. What they mean is written in SQL; here they are fetched."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from energy_platform import database
from energy_platform.errors import MalformedError, NotFoundError, UnprocessableError

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

Bucket = Literal["PT1H", "P1D"]
_BUCKETS: Final[dict[Bucket, timedelta]] = {"PT1H": timedelta(hours=1), "P1D": timedelta(days=1)}

Verdict = Literal["ok", "below_threshold", "above_one", "insufficient_data", "no_meter"]

Row = TypeVar("Row")

RAW_EXPIRED_STATE = "ENR01"  # raised by check_edge() in sql/20_measures.sql


class Performance(msgspec.Struct, rename="camel"):
    """What a vehicle took and what its meters gave in since <= ts < until. Units: kWh, Celsius."""

    vehicle_id: str
    since: datetime
    until: datetime
    total_kwh_consumed_ac: float | None
    total_kwh_delivered_dc: float
    efficiency_ratio: float | None
    average_battery_temp: float | None
    metered_kwh_delivered_dc: float
    ac_readings: int
    dc_readings: int
    ac_coverage: float
    dc_coverage: float
    verdict: Verdict
    suspect_readings: int


class Series(msgspec.Struct, rename="camel"):
    """The same measures for each bucket of a window, the first and the last cut by it."""

    vehicle_id: str
    since: datetime
    until: datetime
    bucket: Bucket
    time_zone: str
    buckets: list[Performance]


class FleetTotals(msgspec.Struct, rename="camel"):
    """Sums over all vehicles; the ratio is that of the sums. Unit: kWh."""

    total_kwh_consumed_ac: float | None
    total_kwh_delivered_dc: float
    metered_kwh_delivered_dc: float
    efficiency_ratio: float | None
    ac_readings: int
    dc_readings: int


class VerdictCounts(msgspec.Struct):
    """How many vehicles have which verdict."""

    ok: int = 0
    below_threshold: int = 0
    above_one: int = 0
    insufficient_data: int = 0
    no_meter: int = 0


class Fleet(msgspec.Struct, rename="camel"):
    """A page of vehicles, worst ratio first; totals and counts are those of the whole fleet."""

    since: datetime
    until: datetime
    vehicles: int
    totals: FleetTotals
    verdicts: VerdictCounts
    items: list[Performance]
    next_cursor: str | None = None


class ChargingSession(msgspec.Struct, rename="camel"):
    """One time that a vehicle charged, at one meter or at none. Units: kWh, Celsius, %."""

    vehicle_id: str
    meter_id: str | None
    started_at: datetime
    ended_at: datetime
    total_kwh_consumed_ac: float | None
    total_kwh_delivered_dc: float
    efficiency_ratio: float | None
    average_battery_temp: float
    battery_temp_min: float
    battery_temp_max: float
    soc_start: float
    soc_end: float
    ac_readings: int
    dc_readings: int
    is_open: bool


class Sessions(msgspec.Struct, rename="camel"):
    """The charging sessions of a vehicle that end in since <= ended_at < until, in order."""

    vehicle_id: str
    since: datetime
    until: datetime
    items: list[ChargingSession]


async def fetch_performance(
    pool: database.Pool, vehicle_id: str, since: datetime, until: datetime
) -> Performance:
    """The performance of one vehicle, exact at this moment.

    Raises: NotFoundError where the vehicle was never declared, assigned or heard;
    UnprocessableError `raw_expired` where an edge cuts an hour whose raw readings are gone.
    """
    parameters = {"vehicle_id": vehicle_id, "since": since, "until": until}
    (performance,) = await _fetch(pool, "fetch_performance", Performance, parameters)
    return performance


async def fetch_series(
    pool: database.Pool,
    vehicle_id: str,
    since: datetime,
    until: datetime,
    bucket: Bucket,
    time_zone: str,
) -> Series:
    """The performance of one vehicle by hours or days of a time zone, in one snapshot.

    Raises: as fetch_performance, and MalformedError for a time zone that is none.
    """
    parameters = {
        "vehicle_id": vehicle_id,
        "since": since,
        "until": until,
        "bucket": _BUCKETS[bucket],
        "time_zone": time_zone,
    }
    try:
        buckets = await _fetch(pool, "fetch_series", Performance, parameters)
    except psycopg.errors.InvalidParameterValue as error:
        raise MalformedError(
            f"timeZone: {error.diag.message_primary}", code="bad_parameter", parameter="timeZone"
        ) from error
    return Series(vehicle_id, since, until, bucket, time_zone, buckets)


async def fetch_fleet(
    pool: database.Pool,
    since: datetime,
    until: datetime,
    verdict: Verdict | None,
    after: tuple[float | None, str] | None,
    limit: int,
) -> Fleet:
    """The performance of every known vehicle, exact and of one snapshot.

    `after` is the ratio and the id of the vehicle that the page begins behind.

    Raises: UnprocessableError `raw_expired` where an edge of any vehicle cuts an hour whose raw
    readings are gone.
    """
    ratio, vehicle_id = after or (None, None)
    parameters = {
        "since": since,
        "until": until,
        "verdict": verdict,
        "after_ratio": ratio,
        "after_id": vehicle_id,
        "limit": limit,
    }

    async def query(connection: AsyncConnection[Any]) -> list[dict[str, Any]]:
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_SQL["fetch_fleet"], parameters)
            return await cursor.fetchall()

    with _raw_expired():
        rows = await database.read(pool, query)
    whole = rows[0]  # there is always one; without a vehicle in it where the page is empty
    totals = {name: whole[f"fleet_{name}"] for name in FleetTotals.__struct_fields__}
    return Fleet(
        since,
        until,
        whole["vehicles"],
        FleetTotals(**totals),
        VerdictCounts(**whole["verdicts"]),
        [
            Performance(**{name: row[name] for name in Performance.__struct_fields__})
            for row in rows
            if row["vehicle_id"] is not None
        ],
    )


async def fetch_sessions(
    pool: database.Pool, vehicle_id: str, since: datetime, until: datetime
) -> Sessions:
    """The charging sessions of one vehicle.

    Raises: NotFoundError where the vehicle was never declared, assigned or heard;
    UnprocessableError `raw_expired` where the raw readings of the window are gone.
    """
    parameters = {"vehicle_id": vehicle_id, "since": since, "until": until}
    rows = await _fetch(pool, "fetch_sessions", ChargingSession, parameters)
    # A known vehicle that did not charge has one row, with nothing in it.
    return Sessions(vehicle_id, since, until, [row for row in rows if row.vehicle_id is not None])


async def _fetch(
    pool: database.Pool, query_name: str, kind: type[Row], parameters: dict[str, Any]
) -> list[Row]:
    """The rows of a query about one vehicle, at least one."""
    with _raw_expired():
        rows = await database.fetch_rows(pool, _SQL[query_name], kind, parameters, keeps_plan=True)
    if not rows:
        raise NotFoundError(
            f"No vehicle {parameters['vehicle_id']!r} was ever declared, assigned or heard.",
            code="unknown_vehicle",
        )
    return rows


@contextmanager
def _raw_expired() -> Iterator[None]:
    try:
        yield
    except psycopg.DatabaseError as error:
        if error.sqlstate != RAW_EXPIRED_STATE:
            raise
        oldest = error.diag.message_detail
        raise UnprocessableError(
            f"{error.diag.message_primary}. The oldest instant that can be cut is {oldest}.",
            code="raw_expired",
            hint=error.diag.message_hint,
            oldest=oldest,
        ) from error
