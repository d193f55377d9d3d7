"""What does the door make of measurements as they really were? The files say what they are worth.

One charging session: what the charger reported, and the car's own record of it.
"""

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import Clock, StartService

AHEAD = timedelta(hours=2)


@pytest.fixture
def session(shared_data: Path) -> Path:
    return shared_data / "ev-dc-charge-obd-20230516-01"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return list(csv.DictReader(lines))


def test_a_charger_in_local_time_is_told_so_at_the_door(
    session: Path, start_service: StartService, clock: Clock, db: psycopg.Connection[Any]
) -> None:
    readings: list[dict[str, Any]] = [
        {
            "vehicleId": "EV-1",
            "soc": float(row["soc"]),
            "kwhDeliveredDc": float(row["charged_energy"]) / 1000,
            "batteryTemp": 20,
            "timestamp": row["datetime"].replace(" ", "T"),
        }
        for row in read_rows(session / "2023051601_charger.csv")
    ]
    instants = [datetime.fromisoformat(reading["timestamp"]) for reading in readings]
    assert len(readings) == 367
    # The car's clock is rounded to 10,000 s: it cannot have been past 05:30.
    (rounded,) = {row["timestamp"] for row in read_rows(session / "2023051601_OBD.csv")}
    latest = datetime.fromtimestamp((float(rounded) + 0.000005e12) / 1000, UTC)
    assert latest == datetime(2023, 5, 16, 5, 30, tzinfo=UTC)
    assert min(instants) > latest > max(instants) - AHEAD

    # Sent as they were read, at the true time, each is refused with what is wrong with the clock.
    api = start_service()
    for reading, instant in zip(readings, instants, strict=True):
        clock.now = instant - AHEAD
        answer = api.post("/v1/ingest", json=reading)
        assert answer.status_code == 422
        (error,) = answer.json()["errors"]
        assert (error["code"], error["path"]) == ("in_future", "$.timestamp")
        assert error["detail"].startswith("2 hours ahead of the server")
        assert error["detail"].endswith("a local time sent as UTC?")
    kept = db.execute(
        "SELECT code, device_id, detail LIKE '2 hours ahead of the server%', count(*), sum(count)"
        " FROM quarantine GROUP BY 1, 2, 3"
    ).fetchall()
    assert kept == [("in_future", "EV-1", True, 367, 367)]
    assert db.execute("SELECT count(*) FROM vehicle_telemetry_history").fetchone() == (0,)

    # With the offset that it has, the same clock is right.
    for reading in readings:
        reading["timestamp"] = reading["timestamp"].replace("+00:00", "+02:00")
    answer = api.post("/v1/ingest", json=readings)
    assert (answer.status_code, answer.json()["stored"]) == (200, 367)
