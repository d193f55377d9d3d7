"""Devices and assignments: PUT, GET and DELETE under /v1/meters, /v1/vehicles, /v1/assignments."""

from typing import Annotated, Any, TypeVar

from litestar import Request, Response, Router, delete, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from energy_platform import fleet
from energy_platform.http.access import require
from energy_platform.http.parameters import (
    Cursor,
    Limit,
    MeterId,
    Page,
    VehicleId,
    decode_body,
    decode_cursor,
    decode_id,
    decode_number_cursor,
    decode_path_id,
    page_of,
)
from energy_platform.http.service import Service

T = TypeVar("T")


def _made(content: T, made: bool) -> Response[T]:
    return Response(content, status_code=201 if made else 200)


@put(
    "/meters/{meter_id:str}",
    summary="Declare a meter",
    guards=[require("admin")],
)
async def put_meter(
    service: NamedDependency[Service], request: Request[Any, Any, Any], meter_id: MeterId
) -> Response[fleet.Meter]:
    declaration = await decode_body(request, fleet.Declaration)
    device_id = decode_path_id("meterId", meter_id)
    return _made(*await fleet.put_device(service.write_pool, fleet.Meter, device_id, declaration))


@put(
    "/vehicles/{vehicle_id:str}",
    summary="Declare a vehicle",
    guards=[require("admin")],
)
async def put_vehicle(
    service: NamedDependency[Service], request: Request[Any, Any, Any], vehicle_id: VehicleId
) -> Response[fleet.Vehicle]:
    declaration = await decode_body(request, fleet.Declaration)
    device_id = decode_path_id("vehicleId", vehicle_id)
    return _made(*await fleet.put_device(service.write_pool, fleet.Vehicle, device_id, declaration))


@get("/meters/{meter_id:str}", summary="A meter", guards=[require("read")])
async def get_meter(service: NamedDependency[Service], meter_id: MeterId) -> fleet.Meter:
    device_id = decode_path_id("meterId", meter_id)
    return await fleet.fetch_device(service.read_pool, fleet.Meter, device_id)


@get("/vehicles/{vehicle_id:str}", summary="A vehicle", guards=[require("read")])
async def get_vehicle(service: NamedDependency[Service], vehicle_id: VehicleId) -> fleet.Vehicle:
    return await fleet.fetch_device(
        service.read_pool, fleet.Vehicle, decode_path_id("vehicleId", vehicle_id)
    )


@get("/meters", summary="All meters", guards=[require("read")])
async def list_meters(
    service: NamedDependency[Service], limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.Meter]:
    rows = await fleet.fetch_devices(
        service.read_pool, fleet.Meter, decode_cursor(cursor), limit + 1
    )
    return page_of(rows, limit, "meter_id")


@get("/vehicles", summary="All vehicles", guards=[require("read")])
async def list_vehicles(
    service: NamedDependency[Service], limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.Vehicle]:
    rows = await fleet.fetch_devices(
        service.read_pool, fleet.Vehicle, decode_cursor(cursor), limit + 1
    )
    return page_of(rows, limit, "vehicle_id")


@put(
    "/assignments",
    summary="Say which meter fed which vehicle, and when",
    guards=[require("admin")],
)
async def put_assignment(
    service: NamedDependency[Service], request: Request[Any, Any, Any]
) -> Response[fleet.Assignment]:
    assignment = await decode_body(request, fleet.AssignmentRequest)
    return _made(*await fleet.put_assignment(service.write_pool, assignment))


@get("/assignments", summary="The ledger", guards=[require("read")])
async def list_assignments(
    service: NamedDependency[Service],
    vehicle_id: Annotated[str | None, QueryParameter(name="vehicleId")] = None,
    meter_id: Annotated[str | None, QueryParameter(name="meterId")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Page[fleet.Assignment]:
    rows = await fleet.fetch_assignments(
        service.read_pool,
        decode_id("vehicleId", vehicle_id) if vehicle_id is not None else None,
        decode_id("meterId", meter_id) if meter_id is not None else None,
        decode_number_cursor(cursor),
        limit + 1,
    )
    return page_of(rows, limit, "assignment_id")


@delete(
    "/assignments/{assignment_id:int}",
    summary="Take an entry out of the ledger",
    guards=[require("admin")],
)
async def delete_assignment(
    service: NamedDependency[Service], assignment_id: FromPath[int]
) -> None:
    await fleet.delete_assignment(service.write_pool, assignment_id)


router = Router(
    "/v1",
    route_handlers=[
        put_meter,
        put_vehicle,
        get_meter,
        get_vehicle,
        list_meters,
        list_vehicles,
        put_assignment,
        list_assignments,
        delete_assignment,
    ],
    tags=["fleet"],
)
