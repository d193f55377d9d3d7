"""The answers. What they mean is written in SQL; here they are fetched."""

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.rows import class_row

from energy_platform import database
from energy_platform.errors import NotFoundError, UnprocessableError

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

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
    verdict: str


async def fetch_performance(
    pool: database.Pool, vehicle_id: str, since: datetime, until: datetime
) -> Performance:
    """The performance of one vehicle, exact at this moment.

    Raises: NotFoundError where the vehicle was never declared, assigned or heard;
    UnprocessableError `raw_expired` where an edge cuts an hour whose raw readings are gone.
    """
    parameters = {"vehicle_id": vehicle_id, "since": since, "until": until}

    async def query(connection: AsyncConnection[Any]) -> Performance | None:
        async with connection.cursor(row_factory=class_row(Performance)) as cursor:
            await cursor.execute(_SQL["fetch_performance"], parameters)
            return await cursor.fetchone()

    try:
        performance = await database.read(pool, query)
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
    if performance is None:
        raise NotFoundError(
            f"No vehicle {vehicle_id!r} was ever declared, assigned or heard.",
            code="unknown_vehicle",
        )
    return performance
