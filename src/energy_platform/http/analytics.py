"""GET /v1/analytics and /v1/live: the answers and the newest readings."""

from litestar import Router, get
from litestar.di import NamedDependency

from energy_platform import fleet, performance
from energy_platform.http.access import require
from energy_platform.http.parameters import (
    Buckets,
    Cursor,
    Hours,
    Limit,
    MeterId,
    Page,
    TimeZone,
    Until,
    VehicleId,
    Verdicts,
    decode_cursor,
    decode_fleet_window,
    decode_path_id,
    decode_time_zone,
    decode_window,
    fleet_page_of,
    page_of,
)
from energy_platform.http.service import Service


@get("/analytics/performance/{vehicle_id:str}", summary="AC, DC and their ratio over a window")
async def get_performance(
    service: NamedDependency[Service], vehicle_id: VehicleId, until: Until = None, hours: Hours = 24
) -> performance.Performance:
    since, end = decode_window(until, hours, service.clock())
    device_id = decode_path_id("vehicleId", vehicle_id)
    return await performance.fetch_performance(service.read_pool, device_id, since, end)


@get("/analytics/performance/{vehicle_id:str}/series", summary="The same by hours or days")
async def get_series(
    service: NamedDependency[Service],
    vehicle_id: VehicleId,
    until: Until = None,
    hours: Hours = 24,
    bucket: Buckets = "PT1H",
    time_zone: TimeZone = "UTC",
) -> performance.Series:
    since, end = decode_window(until, hours, service.clock())
    device_id = decode_path_id("vehicleId", vehicle_id)
    return await performance.fetch_series(
        service.read_pool, device_id, since, end, bucket, decode_time_zone(time_zone)
    )


@get("/analytics/fleet", summary="The same for every vehicle, worst ratio first, with totals")
async def get_fleet(
    service: NamedDependency[Service],
    until: Until = None,
    hours: Hours = 24,
    verdict: Verdicts = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> performance.Fleet:
    since, end, after = decode_fleet_window(until, hours, cursor, service.clock())
    page = await performance.fetch_fleet(service.read_pool, since, end, verdict, after, limit + 1)
    return fleet_page_of(page, limit)


@get("/analytics/sessions/{vehicle_id:str}", summary="When a vehicle charged, and what it took")
async def get_sessions(
    service: NamedDependency[Service], vehicle_id: VehicleId, until: Until = None, hours: Hours = 24
) -> performance.Sessions:
    since, end = decode_window(until, hours, service.clock())
    device_id = decode_path_id("vehicleId", vehicle_id)
    return await performance.fetch_sessions(service.read_pool, device_id, since, end)


@get("/live/vehicles", summary="The newest reading of each vehicle")
async def list_live_vehicles(
    service: NamedDependency[Service], limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.LiveVehicle]:
    rows = await fleet.fetch_live_page(
        service.read_pool, fleet.LiveVehicle, decode_cursor(cursor), limit + 1, service.clock()
    )
    return page_of(rows, limit, "vehicle_id")


@get("/live/meters", summary="The newest reading of each meter")
async def list_live_meters(
    service: NamedDependency[Service], limit: Limit = 100, cursor: Cursor = None
) -> Page[fleet.LiveMeter]:
    rows = await fleet.fetch_live_page(
        service.read_pool, fleet.LiveMeter, decode_cursor(cursor), limit + 1, service.clock()
    )
    return page_of(rows, limit, "meter_id")


@get("/live/vehicles/{vehicle_id:str}", summary="The newest reading of a vehicle")
async def get_live_vehicle(
    service: NamedDependency[Service], vehicle_id: VehicleId
) -> fleet.LiveVehicle:
    device_id = decode_path_id("vehicleId", vehicle_id)
    return await fleet.fetch_live(service.read_pool, fleet.LiveVehicle, device_id, service.clock())


@get("/live/meters/{meter_id:str}", summary="The newest reading of a meter")
async def get_live_meter(service: NamedDependency[Service], meter_id: MeterId) -> fleet.LiveMeter:
    device_id = decode_path_id("meterId", meter_id)
    return await fleet.fetch_live(service.read_pool, fleet.LiveMeter, device_id, service.clock())


router = Router(
    "/v1",
    route_handlers=[
        get_performance,
        get_series,
        get_fleet,
        get_sessions,
        list_live_vehicles,
        list_live_meters,
        get_live_vehicle,
        get_live_meter,
    ],
    guards=[require("read")],
    tags=["analytics"],
)
