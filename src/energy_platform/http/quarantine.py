"""GET /v1/quarantine and its replay."""

from typing import Annotated, Any

from litestar import Request, Router, get, post
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from energy_platform import quarantine
from energy_platform.errors import StorageError, UnprocessableError
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


@get("/quarantine", summary="What was not a reading, newest first")
async def list_quarantine(
    service: NamedDependency[Service],
    code: Annotated[
        str | None, QueryParameter(pattern=quarantine.CODE_PATTERN, description="only this code")
    ] = None,
    device_id: Annotated[str | None, QueryParameter(name="deviceId")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[quarantine.EntryAnswer]:
    entries = await quarantine.fetch_quarantine(
        service.read_pool,
        code,
        decode_id("deviceId", device_id) if device_id is not None else None,
        decode_number_cursor(cursor),
        limit + 1,
    )
    return page_of([quarantine.EntryAnswer.of(entry) for entry in entries], limit, "id")


@post(
    "/quarantine/replay",
    summary="Run entries through ingest again",
    status_code=200,
)
async def replay_quarantine(
    service: NamedDependency[Service], request: Request[Any, Any, Any]
) -> quarantine.ReplayAccount:
    wanted = await decode_body(request, quarantine.ReplayRequest)
    if (wanted.ids is None) == (wanted.code is None):
        raise UnprocessableError("either ids or code", code="invalid_body")
    if service.writer is None:
        raise StorageError("This process serves analytics only: replay where ingest is served.")
    return await quarantine.replay(service.write_pool, wanted, request.app.state.ingest.replay)


router = Router(
    "/v1",
    route_handlers=[list_quarantine, replay_quarantine],
    guards=[require("admin")],
    tags=["quarantine"],
)
