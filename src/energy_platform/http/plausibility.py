"""/v1/limits and /v1/suspects: what devices can do, and the readings that say otherwise."""

from typing import Annotated, Any, Literal

from litestar import Request, Router, get, put
from litestar.di import NamedDependency
from litestar.params import PathParameter, QueryParameter

from energy_platform import plausibility
from energy_platform.http.access import require
from energy_platform.http.parameters import (
    Cursor,
    Limit,
    Page,
    decode_body,
    decode_id,
    decode_number_cursor,
    page_of,
)
from energy_platform.http.service import Service


@get("/limits", summary="What devices can do, by class", guards=[require("read")])
async def list_limits(service: NamedDependency[Service]) -> list[plausibility.Limits]:
    return await plausibility.fetch_limits(service.read_pool)


@put(
    "/limits/{device_class:str}",
    summary="Set limits: over a hard one a reading is rejected, over a soft one flagged",
    guards=[require("admin")],
)
async def put_limits(
    service: NamedDependency[Service],
    request: Request[Any, Any, Any],
    device_class: Annotated[
        Literal["meter", "vehicle"], PathParameter(description="whose limits they are")
    ],
) -> plausibility.Limits:
    wanted = await decode_body(request, plausibility.LimitsRequest)
    return await plausibility.put_limits(service.write_pool, device_class, wanted)


@get(
    "/suspects",
    summary="Stored readings that are not plausible, those flagged last first",
    guards=[require("read")],
)
async def list_suspects(
    service: NamedDependency[Service],
    vehicle_id: Annotated[str | None, QueryParameter(name="vehicleId")] = None,
    meter_id: Annotated[str | None, QueryParameter(name="meterId")] = None,
    code: Annotated[str | None, QueryParameter(description="only this code")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[plausibility.SuspectReading]:
    rows = await plausibility.fetch_suspects(
        service.read_pool,
        decode_id("meterId", meter_id) if meter_id is not None else None,
        decode_id("vehicleId", vehicle_id) if vehicle_id is not None else None,
        decode_id("code", code) if code is not None else None,
        decode_number_cursor(cursor),
        limit + 1,
    )
    return page_of(rows, limit, "suspect_id")


router = Router(
    "/v1", route_handlers=[list_limits, put_limits, list_suspects], tags=["plausibility"]
)
