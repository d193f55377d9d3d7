"""What a device can do, and the readings that say otherwise. The rules are written in SQL."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import psycopg
from psycopg.rows import class_row

from energy_platform import database
from energy_platform.errors import NotFoundError, UnprocessableError

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))

Limit = Annotated[float, msgspec.Meta(ge=0, le=1e12)] | msgspec.UnsetType | None


_BATTERY_LIMITS = ("temp_rate_soft", "temp_rate_hard", "soc_rate_soft", "soc_rate_hard")


class LimitsRequest(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """Limits to set; null takes one away, and what is left out stays."""

    power_kw_soft: Limit = msgspec.UNSET
    power_kw_hard: Limit = msgspec.UNSET
    step_kwh_soft: Limit = msgspec.UNSET
    step_kwh_hard: Limit = msgspec.UNSET
    temp_rate_soft: Limit = msgspec.UNSET
    temp_rate_hard: Limit = msgspec.UNSET
    soc_rate_soft: Limit = msgspec.UNSET
    soc_rate_hard: Limit = msgspec.UNSET


class Limits(msgspec.Struct, rename="camel"):
    """The limits of a class; null: none. Units: kW, kWh, degrees Celsius and percent a minute."""

    device_class: str
    power_kw_soft: float | None
    power_kw_hard: float | None
    step_kwh_soft: float | None
    step_kwh_hard: float | None
    temp_rate_soft: float | None
    temp_rate_hard: float | None
    soc_rate_soft: float | None
    soc_rate_hard: float | None


class SuspectReading(msgspec.Struct, rename="camel"):
    """A reading that is stored, and is not plausible after the one before it."""

    suspect_id: int = msgspec.field(name="id")
    meter_id: str | None
    vehicle_id: str | None
    ts: datetime = msgspec.field(name="timestamp")
    code: str
    detail: str


async def fetch_limits(pool: database.Pool) -> list[Limits]:
    """The limits of both classes."""
    return await database.fetch_rows(pool, _SQL["fetch_limits"], Limits, {})


async def put_limits(pool: database.Pool, device_class: str, request: LimitsRequest) -> Limits:
    """Change the limits of `meter` or `vehicle`, for the readings that come from now on.

    Raises: NotFoundError for another class; UnprocessableError for a soft limit over its hard one.
    """
    if device_class == "meter" and any(
        getattr(request, name) is not msgspec.UNSET for name in _BATTERY_LIMITS
    ):
        raise UnprocessableError("a meter has no battery to limit", code="invalid_body")
    given = {
        name: value
        for name, value in msgspec.structs.asdict(request).items()
        if value is not msgspec.UNSET
    }
    parameters = {name: given.get(name) for name in request.__struct_fields__}
    try:
        async with (
            database.transaction(pool) as connection,
            connection.cursor(row_factory=class_row(Limits)) as cursor,
        ):
            await cursor.execute(
                _SQL["put_limits"],
                {**parameters, "device_class": device_class, "given": list(given)},
            )
            limits = await cursor.fetchone()
    except psycopg.errors.CheckViolation as error:
        raise UnprocessableError(
            "a soft limit may not be over its hard one", code="out_of_range"
        ) from error
    if limits is None:
        raise NotFoundError("Limits are set for `meter` or `vehicle`.")
    return limits


async def fetch_suspects(
    pool: database.Pool,
    meter_id: str | None,
    vehicle_id: str | None,
    code: str | None,
    before: int | None,
    limit: int,
) -> list[SuspectReading]:
    """A page of suspect readings, those flagged last first."""
    parameters = {
        "meter_id": meter_id,
        "vehicle_id": vehicle_id,
        "code": code,
        "before": before,
        "limit": limit,
    }
    return await database.fetch_rows(pool, _SQL["fetch_suspects"], SuspectReading, parameters)
