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
    make_page,
)
from energy_platform.http.service import Service

Code = Annotated[
    str | None, QueryParameter(pattern=quarantine.CODE_PATTERN, description="only this code")
]
DeviceId = Annotated[
    str | None, QueryParameter(name="deviceId", description="only this meter or vehicle")
]


@get(
    "/quarantine",
    summary="What was not a reading, newest first",
    description=(
        "A page ends early, with a nextCursor, where its payloads reach "
        f"{quarantine.PAGE_PAYLOAD_BYTES_MAX >> 20} MiB."
    ),
)
async def list_quarantine(
    service: NamedDependency[Service],
    code: Code = None,
    device_id: DeviceId = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[quarantine.EntryAnswer]:
    entries, more = await quarantine.fetch_quarantine(
        service.read_pool, code, _decode_device(device_id), decode_number_cursor(cursor), limit
    )
    return make_page([quarantine.EntryAnswer.of(entry) for entry in entries], "id", more=more)


@get("/quarantine/counts", summary="How much was not a reading, by code and by device")
async def count_quarantine(
    service: NamedDependency[Service], code: Code = None, device_id: DeviceId = None
) -> quarantine.Counts:
    return await quarantine.count_quarantine(service.read_pool, code, _decode_device(device_id))


def _decode_device(device_id: str | None) -> str | None:
    return decode_id("deviceId", device_id) if device_id is not None else None


@post(
    "/quarantine/replay",
    summary="Run entries through ingest again",
    status_code=200,
)
async def replay_quarantine(
    service: NamedDependency[Service], request: Request[Any, Any, Any]
) -> quarantine.ReplayAccount:
    wanted = await decode_body(request, quarantine.ReplayRequest)
    if (wanted.ids is None) == (wanted.code is None and wanted.device_id is None):
        raise UnprocessableError(
            "either ids, or code, deviceId or both of these", code="invalid_body"
        )
    if service.writer is None:
        raise StorageError("This process serves analytics only: replay where ingest is served.")
    return await quarantine.replay(service.write_pool, wanted, request.app.state.ingest.replay)


router = Router(
    "/v1",
    route_handlers=[list_quarantine, count_quarantine, replay_quarantine],
    guards=[require("admin")],
    tags=["quarantine"],
)
