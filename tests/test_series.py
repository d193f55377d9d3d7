"""Are the buckets of a series local hours and days, and is each the answer of its own window?"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from conftest import NOON
from oracle import World, counter, differ, every, local_edges, utc

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

# Windows over the days on which clocks change, in zones that differ by halves and quarters of an
# hour, that change by half an hour, and that skip midnight itself.
WINDOWS = [
    ("UTC", utc(2026, 2, 8, 7, 20)),
    ("Europe/Paris", utc(2026, 3, 28, 7, 20)),
    ("Europe/Paris", utc(2025, 10, 25, 7, 20)),
    ("Asia/Kolkata", utc(2026, 2, 8, 7, 20)),
    ("Asia/Kathmandu", utc(2026, 2, 8, 7, 20)),
    ("Australia/Lord_Howe", utc(2026, 4, 4, 7, 20)),
    ("America/Sao_Paulo", utc(2018, 11, 3, 7, 20)),
]


@pytest.fixture
def world(db: psycopg.Connection[Any]) -> World:
    return World(db)


@pytest.mark.parametrize("kind", ["interval", "register"])
@pytest.mark.parametrize(("zone", "start"), WINDOWS, ids=[f"{z} {s:%F}" for z, s in WINDOWS])
def test_buckets_are_those_of_the_wall_clock(
    world: World, zone: str, start: datetime, kind: str
) -> None:
    try:
        wall = ZoneInfo(zone)
    except ZoneInfoNotFoundError:
        pytest.skip("no time zones on this machine: local days are not proved")
    since, until = start + timedelta(seconds=11), start + 3 * DAY + 17 * MINUTE
    meter = world.add_meter("m", kind, 900)
    vehicle = world.add_vehicle("v", kind, 900)
    world.assign(meter, vehicle, start + 20 * HOUR, start + 60 * HOUR)
    readings = counter(900, start - DAY, 480, 7.0, 0.25) if kind == "register" else every(
        900, start - DAY, 480, 0.25
    )  # fmt: skip
    world.read_meter(meter, readings)
    world.read_vehicle(vehicle, readings)
    for refreshed in (False, True):
        if refreshed:
            world.refresh()
        for bucket in (HOUR, DAY):
            with world.db.cursor(row_factory=dict_row) as cursor:
                cursor.execute(
                    "SELECT * FROM vehicle_performance_series_v1('v', %s, %s, %s, %s)",
                    (since, until, bucket, zone),
                )
                rows = cursor.fetchall()
            windows = list(pairwise(local_edges(since, until, bucket, wall)))
            assert [(row["since"], row["until"]) for row in rows] == windows
            for row in rows:
                wanted = world.performance("v", row["since"], row["until"])
                assert not differ(row, wanted), row["since"]


@pytest.fixture
def reported(api: httpx.Client) -> Callable[[str], httpx.Response]:
    """A vehicle with two readings, and a question about its series."""
    for minutes in (90, 30):
        answer = api.post(
            "/v1/ingest",
            json={
                "vehicleId": "V-1",
                "soc": 50,
                "kwhDeliveredDc": 1.5,
                "batteryTemp": 20,
                "timestamp": (NOON - minutes * MINUTE).isoformat(),
            },
        )
        assert answer.status_code == 201
    return lambda query: api.get(f"/v1/analytics/performance/V-1/series?{query}")


def test_series_over_http(reported: Callable[[str], httpx.Response], api: httpx.Client) -> None:
    series = reported("hours=3").json()
    assert {k: v for k, v in series.items() if k != "buckets"} == {
        "vehicleId": "V-1",
        "since": "2026-02-10T09:00:00Z",
        "until": "2026-02-10T12:00:00Z",
        "bucket": "PT1H",
        "timeZone": "UTC",
    }
    assert [b["totalKwhDeliveredDc"] for b in series["buckets"]] == [0, 1.5, 1.5]
    assert [b["since"] for b in series["buckets"]] == [
        f"2026-02-10T{hour:02}:00:00Z" for hour in (9, 10, 11)
    ]
    days = reported("hours=48&bucket=P1D&timeZone=Asia/Kolkata").json()
    assert days["bucket"] == "P1D"
    assert [b["since"] for b in days["buckets"]] == [
        "2026-02-08T12:00:00Z",
        "2026-02-08T18:30:00Z",
        "2026-02-09T18:30:00Z",
    ]
    assert [b["dcReadings"] for b in days["buckets"]] == [0, 0, 2]
    # The whole is the sum of its parts.
    whole = api.get("/v1/analytics/performance/V-1?hours=48").json()
    assert whole["totalKwhDeliveredDc"] == sum(b["totalKwhDeliveredDc"] for b in days["buckets"])
    assert datetime.fromisoformat(whole["until"]) == NOON.astimezone(UTC)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("bucket=PT2H", "bucket"),
        ("timeZone=Europe/Atlantis", "timeZone"),
        ("timeZone=%27", "timeZone"),
        ("hours=745", "hours"),
        ("until=yesterday", "until"),
    ],
)
def test_a_bad_parameter_of_a_series_is_named(
    reported: Callable[[str], httpx.Response], query: str, name: str
) -> None:
    answer = reported(query)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter")
    assert name in answer.json()["detail"]


def test_a_series_of_a_vehicle_never_heard_of_is_404(api: httpx.Client) -> None:
    answer = api.get("/v1/analytics/performance/V-9/series")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_vehicle")
