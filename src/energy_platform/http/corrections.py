"""POST and GET /v1/corrections: what was voided or replaced, why, and what was there before."""

from typing import Annotated, Any

from litestar import Request, Response, Router, get, post
from litestar.di import NamedDependency
from litestar.params import PathParameter, QueryParameter

from energy_platform import corrections
from energy_platform.http.access import require
from energy_platform.http.parameters import (
    Cursor,
    Limit,
    Page,
    decode_body,
    decode_id,
    decode_instant_cursor,
    decode_number_cursor,
    page_of,
)
from energy_platform.http.service import Service

CorrectionId = Annotated[int, PathParameter(ge=1, lt=2**62, description="id of the correction")]


@post("/corrections", summary="Void or replace a reading, or a device's readings of some time")
async def post_correction(
    service: NamedDependency[Service], request: Request[Any, Any, Any]
) -> Response[corrections.MadeCorrection]:
    wanted = await decode_body(request, corrections.CorrectionRequest)
    key = request.state.key
    made = await corrections.correct(
        service.write_pool,
        wanted,
        made_by=f"{key.name} ({key.key_id})" if key else "anyone on this machine",
        now=service.clock(),
        late_window=service.late_window,
        refresh_end=service.refresh_end,
    )
    return Response(made, status_code=200 if made.correction_id is None else 201)


@get("/corrections", summary="What was corrected, newest first")
async def list_corrections(
    service: NamedDependency[Service],
    vehicle_id: Annotated[str | None, QueryParameter(name="vehicleId")] = None,
    meter_id: Annotated[str | None, QueryParameter(name="meterId")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[corrections.Correction]:
    rows = await corrections.fetch_corrections(
        service.read_pool,
        decode_id("meterId", meter_id) if meter_id is not None else None,
        decode_id("vehicleId", vehicle_id) if vehicle_id is not None else None,
        decode_number_cursor(cursor),
        limit + 1,
    )
    return page_of(rows, limit, "correction_id")


@get("/corrections/{correction_id:int}/readings", summary="The readings that it took out")
async def list_corrected_readings(
    service: NamedDependency[Service],
    correction_id: CorrectionId,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[corrections.CorrectedReading]:
    rows = await corrections.fetch_corrected_readings(
        service.read_pool, correction_id, decode_instant_cursor(cursor), limit + 1
    )
    return page_of(rows, limit, "ts")


router = Router(
    "/v1",
    route_handlers=[post_correction, list_corrections, list_corrected_readings],
    guards=[require("admin")],
    tags=["corrections"],
)
