"""The least that commits before it answers: readings join a queue, and are stored as groups.

No limits, no outcomes, no plausibility, no keys, no failure, no rollups: history and live rows by
one statement a kind, on plain hypertables that it makes in an empty database. ingest_single.py
starts it; the service's ratio to it is the price of all the rest.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection

from bare_app import (
    MeterReading,
    Receive,
    Send,
    VehicleReading,
    receive_reading,
    send_stored,
    serve,
)

DSN = os.environ["ENERGY_DATABASE_URL"]

TABLES = """
CREATE EXTENSION IF NOT EXISTS timescaledb;
CREATE TABLE meter_history (
  meter_id text, ts timestamptz, kwh_consumed_ac float8 NOT NULL, voltage float8 NOT NULL,
  PRIMARY KEY (meter_id, ts));
CREATE TABLE vehicle_history (
  vehicle_id text, ts timestamptz, soc float8 NOT NULL, kwh_delivered_dc float8 NOT NULL,
  battery_temp float8 NOT NULL, PRIMARY KEY (vehicle_id, ts));
SELECT create_hypertable('meter_history', by_range('ts', INTERVAL '1 day'),
                         create_default_indexes => false);
SELECT create_hypertable('vehicle_history', by_range('ts', INTERVAL '1 day'),
                         create_default_indexes => false);
CREATE TABLE meter_live (
  meter_id text PRIMARY KEY, ts timestamptz, kwh_consumed_ac float8, voltage float8)
  WITH (fillfactor = 50);
CREATE TABLE vehicle_live (
  vehicle_id text PRIMARY KEY, ts timestamptz, soc float8, kwh_delivered_dc float8,
  battery_temp float8) WITH (fillfactor = 50);
"""

INSERT_METERS: LiteralString = """
WITH added AS (
  INSERT INTO meter_history
  SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::float8[], %s::float8[])
  ON CONFLICT DO NOTHING RETURNING *
)
INSERT INTO meter_live AS live SELECT DISTINCT ON (meter_id) * FROM added ORDER BY meter_id, ts DESC
ON CONFLICT (meter_id) DO UPDATE
SET ts = excluded.ts, kwh_consumed_ac = excluded.kwh_consumed_ac, voltage = excluded.voltage
WHERE live.ts < excluded.ts
"""

INSERT_VEHICLES: LiteralString = """
WITH added AS (
  INSERT INTO vehicle_history
  SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::float8[], %s::float8[], %s::float8[])
  ON CONFLICT DO NOTHING RETURNING *
)
INSERT INTO vehicle_live AS live
SELECT DISTINCT ON (vehicle_id) * FROM added ORDER BY vehicle_id, ts DESC
ON CONFLICT (vehicle_id) DO UPDATE
SET ts = excluded.ts, soc = excluded.soc, kwh_delivered_dc = excluded.kwh_delivered_dc,
    battery_temp = excluded.battery_temp
WHERE live.ts < excluded.ts
"""

Waiting = tuple[MeterReading | VehicleReading, "asyncio.Future[None]"]

_queue: list[Waiting] = []
_wake = asyncio.Event()


async def write() -> None:
    """Take all that is queued, commit it, answer it; for ever."""
    connection = await AsyncConnection.connect(DSN, autocommit=True, prepare_threshold=0)
    while True:
        await _wake.wait()
        _wake.clear()
        group = _queue[:]
        _queue.clear()
        await store(connection, [reading for reading, _ in group])
        for _, done in group:
            if not done.done():  # else the client is gone
                done.set_result(None)


async def store(
    connection: AsyncConnection[Any], readings: Sequence[MeterReading | VehicleReading]
) -> None:
    meters = [
        (r.meter_id, r.timestamp, r.kwh_consumed_ac, r.voltage)
        for r in readings
        if isinstance(r, MeterReading)
    ]
    vehicles = [
        (r.vehicle_id, r.timestamp, r.soc, r.kwh_delivered_dc, r.battery_temp)
        for r in readings
        if isinstance(r, VehicleReading)
    ]
    async with connection.transaction():
        if meters:
            await connection.execute(INSERT_METERS, [*map(list, zip(*meters, strict=True))])
        if vehicles:
            await connection.execute(INSERT_VEHICLES, [*map(list, zip(*vehicles, strict=True))])


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        writer = asyncio.create_task(write())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        writer.cancel()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["method"] == "POST":
        done = asyncio.get_running_loop().create_future()
        _queue.append((await receive_reading(receive), done))
        _wake.set()
        await done
    await send_stored(send)


if __name__ == "__main__":
    with psycopg.connect(DSN, autocommit=True) as db:
        db.execute(TABLES)
    serve(app)
