"""GET /v1/analytics and /v1/live: the answers and the newest readings."""

from typing import Annotated

from litestar import Router, get
from litestar.params import Parameter

from energy_platform import fleet, performance
from energy_platform.http.access import require
from energy_platform.http.parameters import (
    Cursor,
    Hours,
    Limit,
    Page,
    Until,
    decode_cursor,
    decode_id,
    decode_window,
    page_of,
)
from energy_platform.http.service import Service

VehicleId = Annotated[str, Parameter(description="id of the vehicle")]
MeterId = Annotated[str, Parameter(description="id of the meter")]


@get("/analytics/performance/{vehicle_id:str}", summary="AC, DC and their ratio over a window")
async def get_performance(
    service: Service, vehicle_id: VehicleId, until: Until = None, hours: Hours = 24
) -> performance.Performance:
    since, end = decode_window(until, hours, service.clock())
    device_id = decode_id("vehicleId", vehicle_id)
    return await performance.fetch_performance(service.read_pool, device_id, since, end)


@get("/live/vehicles", summary="The newest reading of each vehicle")
async def list_live_vehicles(
    service: Service, limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.LiveVehicle]:
    rows = await fleet.fetch_live_page(
        service.read_pool, "vehicle", decode_cursor(cursor), limit + 1, service.clock()
    )
    return page_of(rows, limit, "vehicle_id")


@get("/live/meters", summary="The newest reading of each meter")
async def list_live_meters(
    service: Service, limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.LiveMeter]:
    rows = await fleet.fetch_live_page(
        service.read_pool, "meter", decode_cursor(cursor), limit + 1, service.clock()
    )
    return page_of(rows, limit, "meter_id")


@get("/live/vehicles/{vehicle_id:str}", summary="The newest reading of a vehicle")
async def get_live_vehicle(service: Service, vehicle_id: VehicleId) -> fleet.LiveVehicle:
    device_id = decode_id("vehicleId", vehicle_id)
    return await fleet.fetch_live(service.read_pool, "vehicle", device_id, service.clock())


@get("/live/meters/{meter_id:str}", summary="The newest reading of a meter")
async def get_live_meter(service: Service, meter_id: MeterId) -> fleet.LiveMeter:
    device_id = decode_id("meterId", meter_id)
    return await fleet.fetch_live(service.read_pool, "meter", device_id, service.clock())


router = Router(
    "/v1",
    route_handlers=[
        get_performance,
        list_live_vehicles,
        list_live_meters,
        get_live_vehicle,
        get_live_meter,
    ],
    guards=[require("read")],
    tags=["analytics"],
)
