"""The writer's statements without a service: how many rows a second they store.

Each connection is a process of its own, and stores transaction after transaction of one size, each
of both kinds. ingest_single.py and ingest_batch.py measure the service against it.
"""

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from energy_platform import database, ingest
from load import STEP, Timeline, order_devices, run_apart

_SQL = database.load_queries(Path(ingest.__file__).with_suffix(".sql"))
RECORD_METERS = _SQL["record_meter_readings"]
RECORD_VEHICLES = _SQL["record_vehicle_readings"]
CONNECT_SECONDS = 1.5  # until all processes are ready to begin together
WARM_UP_TRANSACTIONS = 10  # until the plans are those that are kept


def _store(db: psycopg.Connection[Any], readings: list[tuple[int, datetime]]) -> None:
    """What the writer does of a group in which nothing is refused or doubtful."""
    meters = [reading for reading in readings if reading[0] % 2 == 0]
    vehicles = [reading for reading in readings if reading[0] % 2]
    columns = {
        "received_at": datetime.now(UTC),
        "meter_id": [f"M-{device:05}" for device, _ in meters],
        "meter_ts": [ts for _, ts in meters],
        "kwh_consumed_ac": [device % 7 / 1e4 for device, _ in meters],
        "voltage": [230.5] * len(meters),
        "vehicle_id": [f"V-{device:05}" for device, _ in vehicles],
        "vehicle_ts": [ts for _, ts in vehicles],
        "soc": [75.5] * len(vehicles),
        "kwh_delivered_dc": [device % 7 / 1e4 for device, _ in vehicles],
        "battery_temp": [36.5] * len(vehicles),
    }
    statements = [RECORD_METERS] * bool(meters) + [RECORD_VEHICLES] * bool(vehicles)
    db.execute("\nUNION ALL\n".join(statements), columns)


def _list_readings(devices: list[int], since: datetime) -> Iterator[tuple[int, datetime]]:
    for step in itertools.count():
        for device in devices:
            yield device, since + step * STEP


class Part(NamedTuple):
    """What one connection did."""

    sent: int  # with the warm-up
    rows: int
    seconds: float


def _store_for(
    dsn: str, devices: list[int], size: int, since: datetime, start_at: float, seconds: float
) -> Part:
    readings = _list_readings(devices, since)
    with psycopg.connect(
        database.complete_dsn(dsn, "bare statement"), autocommit=True, prepare_threshold=0
    ) as db:
        db.execute("SET enable_seqscan = off")
        for _ in range(WARM_UP_TRANSACTIONS):
            _store(db, [*itertools.islice(readings, size)])
        time.sleep(max(0, start_at - time.time()))
        rows = 0
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            _store(db, [*itertools.islice(readings, size)])
            rows += size
    return Part(rows + WARM_UP_TRANSACTIONS * size, rows, took)


def run_statement(
    dsn: str, timeline: Timeline, connections: int, size: int, seconds: float
) -> float:
    """Rows a second, of all connections together, in transactions of `size`."""
    order = order_devices(timeline.devices)
    share = timeline.devices // connections
    assert size <= share, "a device comes once in a transaction"
    since, start_at = timeline.since, time.time() + CONNECT_SECONDS
    started = [
        run_apart(
            _store_for, dsn, order[i * share : (i + 1) * share], size, since, start_at, seconds
        )
        for i in range(connections)
    ]
    parts: list[Part] = [future.result() for future in started]
    timeline.move(since, max(part.sent for part in parts) * connections)
    return sum(part.rows / part.seconds for part in parts)
