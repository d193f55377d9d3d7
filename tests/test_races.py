"""Do two that do the same at the same moment leave what one of them alone would have left?"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from typing import Any

import httpx
import msgspec
import psycopg
import pytest
from psycopg.rows import dict_row

from conftest import NOON, Clock, StartService
from energy_platform.ingest import Outcome, Writer
from energy_platform.readings import Batch, MeterReading, VehicleReading
from energy_platform.readings import Reading as AnyReading
from oracle import Reading, World, counter, every, utc

Db = psycopg.Connection[Any]

pytestmark = pytest.mark.server

DEVICES = 150
HOURS = (0, 3, 50)  # on time, late, late by days


def readings_of(writer_number: int, *, agree: bool) -> list[AnyReading]:
    """The same keys for each writer, in an order of its own; values the same, or its own."""
    kwh = 1.0 if agree else float(writer_number)
    readings: list[AnyReading] = []
    for number in range(DEVICES):
        for hours in HOURS:
            ts = NOON - timedelta(hours=hours)
            readings.append(MeterReading(f"M-{number}", kwh, 230, ts))
            readings.append(VehicleReading(f"V-{number}", 50, kwh, 20, ts))
    return readings[::-1] if writer_number % 2 else readings


@pytest.mark.parametrize("agree", [True, False], ids=["same values", "other values"])
@pytest.mark.parametrize("size", [37, 10_000], ids=["small bodies", "one body"])
def test_writers_with_the_same_keys_store_each_exactly_once(
    dsn: str, db: Db, clock: Clock, agree: bool, size: int
) -> None:
    writers = 3
    barrier = Barrier(writers)

    def write(number: int) -> tuple[list[AnyReading], list[Outcome]]:
        """In a thread and a loop of its own, as a service process of its own would."""
        readings = readings_of(number, agree=agree)

        async def inside() -> list[Outcome]:
            async with Writer(dsn, clock=clock, refresh_end=timedelta(hours=1)) as writer:
                bodies = [readings[i : i + size] for i in range(0, len(readings), size)]
                batches = [Batch([msgspec.json.encode(r) for r in b], [*b]) for b in bodies]
                barrier.wait(30)
                outcomes = await asyncio.gather(*(writer.record(batch, 1) for batch in batches))
            return [outcome for body in outcomes for outcome in body]

        return readings, asyncio.run(inside())

    with ThreadPoolExecutor(writers) as pool:
        results = list(pool.map(write, range(writers)))
    keys = 2 * DEVICES * len(HOURS)
    counts = Counter(outcome for _, outcomes in results for outcome in outcomes)
    again = "duplicate" if agree else "conflicting"
    assert counts == {"stored": keys, again: (writers - 1) * keys}
    winners = [
        (reading.device_id, reading.ts, reading.values)
        for readings, outcomes in results
        for reading, outcome in zip(readings, outcomes, strict=True)
        if outcome == "stored"
    ]
    history = [
        (device_id, ts, tuple(values))
        for query in (
            "SELECT meter_id, ts, kwh_consumed_ac, voltage FROM meter_telemetry_history",
            "SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp "
            "FROM vehicle_telemetry_history",
        )
        for device_id, ts, *values in db.execute(query)
    ]
    assert sorted(winners) == sorted(history)
    for kind in ("meter", "vehicle"):
        live = db.execute(f"SELECT count(*), min(ts), max(ts) FROM {kind}_live_status").fetchone()
        assert live == (DEVICES, NOON, NOON)
        assert db.execute(f"SELECT count(*) FROM {kind}").fetchone() == (DEVICES,)
    kept = db.execute("SELECT coalesce(sum(count), 0)::int FROM quarantine").fetchone()
    assert kept == (counts["conflicting"],)


def race(api: httpx.Client, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """PUT assignments at the same moment, each on a connection of its own."""
    barrier = Barrier(len(bodies))

    def put(body: dict[str, Any]) -> httpx.Response:
        with httpx.Client(base_url=api.base_url, timeout=60) as client:
            client.get("/health/live")  # so that the connection is open
            barrier.wait(30)
            return client.put("/v1/assignments", json=body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(put, bodies))


def assignment(meter: str, vehicle: str, **fields: Any) -> dict[str, Any]:
    return {"meterId": meter, "vehicleId": vehicle, "since": "2026-02-10T00:00:00Z", **fields}


@pytest.mark.parametrize("turn", range(5))
def test_assignments_that_overlap_never_both_are_made(api: httpx.Client, db: Db, turn: int) -> None:
    """Each contradicts others by meter, by vehicle or by both, of devices that are known."""
    pairs = [(f"M-{i % 2}", f"V-{i // 2 % 2}") for i in range(8)]
    for meter, vehicle in pairs:
        api.put(f"/v1/meters/{meter}", json={})
        api.put(f"/v1/vehicles/{vehicle}", json={})
    answers = race(
        api,
        [
            assignment(meter, vehicle, since=f"2026-02-10T0{i}:00:00Z")
            for i, (meter, vehicle) in enumerate(pairs)
        ],
    )
    # One pair, or both pairs that share nothing.
    made = [answer.json() for answer in answers if answer.status_code == 201]
    assert len(made) == len({m["meterId"] for m in made}) == len({m["vehicleId"] for m in made})
    assert made
    assert {answer.status_code for answer in answers} == {201, 409}
    assert len(db.execute("SELECT FROM charging_assignment").fetchall()) == len(made)


def test_the_same_assignment_by_many_is_made_once(api: httpx.Client, db: Db) -> None:
    answers = race(api, [assignment("M-1", "V-1")] * 6)
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 5}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_assignments_that_do_not_touch_are_all_made(api: httpx.Client) -> None:
    answers = race(api, [assignment(f"M-{i}", f"V-{i}") for i in range(6)])
    assert [answer.status_code for answer in answers] == [201] * 6


def test_services_that_hear_a_device_first_at_once_register_it_once(
    start_service: StartService, db: Db
) -> None:
    services = [start_service() for _ in range(3)]
    barrier = Barrier(len(services))
    body = msgspec.to_builtins(readings_of(0, agree=True))

    def post(api: httpx.Client) -> httpx.Response:
        barrier.wait(30)
        return api.post("/v1/ingest", json=body)

    with ThreadPoolExecutor(len(services)) as pool:
        answers = list(pool.map(post, services))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(answer.json()["stored"] for answer in answers) == len(body)
    assert sum(answer.json()["duplicate"] for answer in answers) == 2 * len(body)
    assert db.execute("SELECT count(*) FROM meter").fetchone() == (DEVICES,)


def change_store(db: Db, change: str, before: datetime) -> None:
    for table in ("meter_telemetry_history", "vehicle_telemetry_history"):
        if change == "drop":
            db.execute("SELECT drop_chunks(%s::regclass, %s::timestamptz)", (table, before))
        elif change == "decompress":
            db.execute("SELECT decompress_chunk(c) FROM show_chunks(%s::regclass) c", (table,))
        else:
            db.execute("SELECT compress_chunk(c) FROM show_chunks(%s::regclass) c", (table,))


@pytest.mark.parametrize("change", ["compress", "recompress", "decompress", "drop"])
def test_no_row_is_missed_because_its_chunk_is_stored_otherwise(
    dsn: str, db: Db, change: str
) -> None:
    """An answer under way reads by its snapshot, but plans by what chunks have become."""
    world = World(db)
    begin = utc(2026, 2, 1)
    since, until = begin + timedelta(minutes=65), begin + timedelta(hours=30, minutes=5)
    meter, vehicle = world.add_meter("M-1", "register"), world.add_vehicle("V-1")
    world.assign(meter, vehicle, begin)
    world.read_meter(meter, counter(600, begin, 500, 1.0, 1.0))
    world.read_vehicle(vehicle, every(600, begin, 500, 1.0))
    if change == "drop":
        world.refresh()
    elif change != "compress":
        change_store(db, "compress", begin)
        late = begin + timedelta(hours=3, seconds=7)
        world.read_meter(meter, [Reading(late, 19.5)])
        world.read_vehicle(vehicle, [Reading(late, 5.0, 99.0)])
    with (
        psycopg.connect(dsn, autocommit=True) as other,
        other.cursor(row_factory=dict_row) as cursor,
        ThreadPoolExecutor(1) as pool,
    ):
        # Its snapshot is taken; then it waits for a lock, before it looks at any chunk.
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(1)")
            asked = pool.submit(
                cursor.execute,
                "SELECT p.* FROM (SELECT pg_advisory_lock(1) OFFSET 0) w CROSS JOIN LATERAL"
                " (SELECT * FROM vehicle_performance_v1(%s, %s, %s) WHERE w IS NOT NULL) p",
                (vehicle, since, until),
            )
            waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            while not asked.done() and db.execute(waiting).fetchone() is None:
                pass
            with psycopg.connect(dsn, autocommit=True) as third:
                change_store(third, change, begin + timedelta(days=1))
        with pytest.raises(psycopg.errors.SerializationFailure, match="raw chunks were"):
            asked.result(30)
    if change == "drop":
        with pytest.raises(psycopg.DatabaseError, match="past their retention"):
            world.fetch(vehicle, since, until)
    else:
        world.check(vehicle, since, until)


HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
BEGIN = utc(2026, 2, 1)
SINCE, UNTIL = BEGIN + 4 * DAY, BEGIN + 6 * DAY

# The snapshot of the answer is that of the statement, which waits before it looks at any chunk.
HELD_ANSWER = """
SELECT p.total_kwh_consumed_ac
FROM (SELECT pg_advisory_xact_lock_shared(7) OFFSET 0) held
CROSS JOIN LATERAL vehicle_performance_v1(
  CASE WHEN held IS NULL THEN 'none' ELSE 'v' END, %s, %s) p
"""


@pytest.mark.parametrize(
    ("kind", "last_before", "moved_day", "is_refused"),
    [
        ("interval", 20 * HOUR, 5, True),  # in the window
        ("interval", 20 * HOUR, 3, False),
        ("interval", 20 * HOUR, 9, False),
        ("register", 20 * HOUR, 3, True),  # holds what the window's first reading steps from
        ("register", 20 * HOUR, 2, False),
        ("register", 15 * DAY, 2, True),  # what it steps from was sought everywhere
    ],
)
def test_an_answer_is_refused_if_a_chunk_that_it_needs_moves_meanwhile(
    dsn: str,
    db: Db,
    kind: str,
    last_before: timedelta,
    moved_day: int,
    is_refused: bool,
) -> None:
    world = World(db)
    meter, vehicle = world.add_meter("m", kind, 3600), world.add_vehicle("v")
    world.assign(meter, vehicle, BEGIN - 20 * DAY)
    instants = [SINCE - last_before, *(SINCE + hour * HOUR for hour in range(48))]
    world.read_meter(meter, [Reading(ts, 10.0 + n) for n, ts in enumerate(instants)])
    days = [BEGIN + day * DAY for day in range(11)]  # each has a chunk
    world.read_meter(world.add_meter("other"), [Reading(ts, 1.0) for ts in days])
    world.refresh(None, SINCE)
    world.check(vehicle, SINCE, UNTIL)

    def ask() -> float:
        with psycopg.connect(dsn, options="-c timezone=UTC") as session:
            row = session.execute(HELD_ANSWER, (SINCE, UNTIL)).fetchone()
            assert row is not None
            return float(row[0])

    (before,) = db.execute(
        "SELECT total_kwh_consumed_ac FROM vehicle_performance_v1('v', %s, %s)", (SINCE, UNTIL)
    ).fetchall()
    with ThreadPoolExecutor(1) as pool:
        db.execute("SELECT pg_advisory_lock(7)")
        answer = pool.submit(ask)
        waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while db.execute(waiting).fetchone() is None:
            assert not answer.done()
        moved = BEGIN + moved_day * DAY
        db.execute(
            "SELECT compress_chunk(c) FROM show_chunks('meter_telemetry_history',"
            " newer_than => %s::timestamptz, older_than => %s::timestamptz) c",
            (moved, moved + DAY),
        )
        db.execute("SELECT pg_advisory_unlock(7)")
        if is_refused:
            with pytest.raises(psycopg.errors.SerializationFailure):
                answer.result()
        else:
            assert answer.result() == before[0]
