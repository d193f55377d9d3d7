"""Does any order, any split and any repetition of what devices send end in the same tables?"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import datetime, timedelta
from itertools import chain
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from conftest import LONG, NOON, Clock, StartService
from energy_platform.errors import OverloadedError, Rejection, StorageError
from energy_platform.ingest import Item, Outcome, Submission, Writer, plan_lanes
from energy_platform.readings import Batch, MeterReading, Reading, VehicleReading

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

Db = psycopg.Connection[Any]


def meter(device_id: str = "M-1", ts: datetime = NOON, kwh: float = 1.0) -> MeterReading:
    return MeterReading(device_id, kwh, 230.0, ts)


def vehicle(device_id: str = "V-1", ts: datetime = NOON, kwh: float = 1.0) -> VehicleReading:
    return VehicleReading(device_id, 50.0, kwh, 20.0, ts)


def batch_of(readings: Iterable[Reading | Rejection]) -> Batch:
    items = list(readings)
    return Batch([msgspec.json.encode(item) for item in items], items)


@contextlib.asynccontextmanager
async def writer_on(dsn: str, clock: Clock, **limits: int) -> AsyncIterator[Writer]:
    async with Writer(dsn, clock=clock, refresh_end=HOUR, **limits) as writer:
        yield writer


async def record(writer: Writer, *readings: Reading | Rejection) -> list[Outcome]:
    return await writer.record(batch_of(readings), 100 * len(readings))


def run(dsn: str, clock: Clock, scenario: Callable[[Writer], Awaitable[Any]], **limits: int) -> Any:
    """Run a scenario with a writer that is open for as long as it takes."""

    async def inside() -> Any:
        async with writer_on(dsn, clock, **limits) as writer:
            return await scenario(writer)

    return asyncio.run(inside())


# ---- The property -----------------------------------------------------------------------------

# Few devices, instants and values, so that collisions are common. The late ones span hours of a
# day and days; two kinds may have the same id.
instants = st.sampled_from(
    [NOON, NOON - timedelta(seconds=1), NOON + timedelta(minutes=4)]
    + [NOON - hours * HOUR for hours in (2, 3, 5, 24, 26, 9 * 24)]
)
devices = st.sampled_from(["A", "B"])
values = st.sampled_from([0.0, 0.1, 14.6])
readings = st.one_of(
    st.builds(meter, devices, instants, values), st.builds(vehicle, devices, instants, values)
)
bodies = st.lists(st.lists(readings, min_size=1, max_size=6), min_size=1, max_size=5)


class Model:
    """First come, first stored; the newest by the device's clock is live. No code of ours."""

    def __init__(self) -> None:
        self.history: dict[tuple[str, str, datetime], tuple[float, ...]] = {}

    def outcome(self, kind: str, device: str, ts: datetime, values: tuple[float, ...]) -> str:
        first = self.history.setdefault((kind, device, ts), values)
        return "stored" if first is values else "duplicate" if first == values else "conflicting"

    def live(self, kind: str) -> dict[str, tuple[Any, ...]]:
        rows = sorted((d, ts, v) for (k, d, ts), v in self.history.items() if k == kind)
        return {device: (ts, *values) for device, ts, values in rows}


_COLUMNS = {
    "meter": "meter_id, ts, kwh_consumed_ac, voltage",
    "vehicle": "vehicle_id, ts, soc, kwh_delivered_dc, battery_temp",
}


def assert_tables(db: Db, model: Model, conflicts: int) -> None:
    for kind, columns in _COLUMNS.items():
        history = db.execute(f"SELECT {columns} FROM {kind}_telemetry_history").fetchall()
        assert {(kind, *row[:2]): row[2:] for row in history} == {
            key: value for key, value in model.history.items() if key[0] == kind
        }
        live = db.execute(f"SELECT {columns} FROM {kind}_live_status").fetchall()
        assert {row[0]: row[1:] for row in live} == model.live(kind)
        registry = db.execute(f"SELECT {kind}_id FROM {kind}").fetchall()
        assert {row[0] for row in registry} == set(model.live(kind))
    kept = db.execute("SELECT coalesce(sum(count), 0)::int FROM quarantine").fetchone()
    assert kept == (conflicts,)


def forget(db: Db) -> None:
    db.execute(
        "TRUNCATE meter_telemetry_history, vehicle_telemetry_history, meter_live_status, "
        "vehicle_live_status, quarantine, charging_assignment, meter, vehicle"
    )


property_settings = settings(
    max_examples=200 if LONG else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(sent=bodies, repeats=st.lists(st.integers(0, 4), max_size=3))
@property_settings
def test_one_sender_first_come_is_first_stored(
    dsn: str, db: Db, clock: Clock, sent: list[list[Reading]], repeats: list[int]
) -> None:
    """Bodies one after another, some again: each verdict, and each table, is the model's."""
    forget(db)
    model = Model()
    sent = [*sent, *(sent[i % len(sent)] for i in repeats)]
    expected = [[model.outcome(r.kind, r.device_id, r.ts, r.values) for r in body] for body in sent]

    async def scenario(writer: Writer) -> list[list[Outcome]]:
        return [await record(writer, *body) for body in sent]

    assert run(dsn, clock, scenario) == expected
    counts = Counter(outcome for body in expected for outcome in body)
    assert_tables(db, model, counts["conflicting"])


@given(sent=bodies, connections=st.integers(1, 3), data=st.data())
@property_settings
def test_senders_at_once_any_order_any_split_any_repetition(
    dsn: str,
    db: Db,
    clock: Clock,
    sent: list[list[Reading]],
    connections: int,
    data: st.DataObject,
) -> None:
    """No value contradicts another, so the tables depend on the set of readings alone."""
    forget(db)
    agreed: dict[tuple[str, str, datetime], Reading] = {}
    for reading in (r for body in sent for r in body):
        agreed.setdefault((reading.kind, reading.device_id, reading.ts), reading)
    model = Model()
    for key, reading in agreed.items():
        model.outcome(*key, reading.values)
    # Everything at least twice, in any order, in bodies of any size.
    shuffled = data.draw(st.permutations([*agreed.values(), *agreed.values()]))
    size = data.draw(st.integers(1, len(shuffled)))
    split = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]

    async def scenario(writer: Writer) -> list[list[Outcome]]:
        return await asyncio.gather(*(record(writer, *body) for body in split))

    counts = Counter(
        outcome
        for outcomes in run(dsn, clock, scenario, connections=connections)
        for outcome in outcomes
    )
    assert counts == {"stored": len(agreed), "duplicate": len(agreed)}
    assert_tables(db, model, 0)


def test_the_same_holds_through_http(api: httpx.Client, db: Db) -> None:
    readings = [meter(ts=NOON - hours * HOUR, kwh=kwh) for hours in (0, 5, 50) for kwh in (1, 2)]
    model = Model()
    for body in (readings, readings[::-1], readings[:1]):
        expected = Counter(
            model.outcome(r.kind, r.device_id, r.ts, tuple(map(float, r.values))) for r in body
        )
        answer = api.post("/v1/ingest", json=msgspec.to_builtins(body)).json()
        assert answer["received"] == len(body)
        assert {k: answer[k] for k in expected} == expected
        assert sum(answer[k] for k in ("stored", "duplicate", "conflicting", "rejected")) == len(
            body
        )
    assert len(db.execute("SELECT FROM meter_telemetry_history").fetchall()) == 3


def test_live_never_goes_backwards(dsn: str, db: Db, clock: Clock) -> None:
    stamps = [NOON - timedelta(minutes=m) for m in (5, 3, 4, 9 * 24 * 60, 0, 1)]

    async def scenario(writer: Writer) -> list[datetime]:
        seen = []
        for ts in stamps:
            await record(writer, meter(ts=ts))
            (row,) = db.execute("SELECT ts FROM meter_live_status").fetchall()
            seen.append(row[0])
        return seen

    assert run(dsn, clock, scenario) == [max(stamps[: i + 1]) for i in range(len(stamps))]


def test_the_zone_of_an_instant_does_not_matter(dsn: str, db: Db, clock: Clock) -> None:
    elsewhere = meter(ts=NOON.astimezone(ZoneInfo("Asia/Kathmandu")))

    async def scenario(writer: Writer) -> list[Outcome]:
        return await record(writer, meter(), elsewhere) + await record(writer, elsewhere)

    assert run(dsn, clock, scenario) == ["stored", "duplicate", "duplicate"]
    assert db.execute("SELECT ts FROM meter_telemetry_history").fetchall() == [(NOON,)]


# ---- Lanes ------------------------------------------------------------------------------------

offsets = st.integers(-40 * 60, 5).map(lambda minutes: timedelta(minutes=minutes))


async def submission_of(readings: list[Reading]) -> Submission:
    future = asyncio.get_running_loop().create_future()
    return Submission(batch_of(readings), 1, None, True, future)


@given(bodies=st.lists(st.lists(st.builds(lambda o: meter(ts=NOON + o), offsets), max_size=9)))
def test_lanes_hold_each_reading_once_and_late_ones_by_runs_of_hours(
    bodies: list[list[Reading]],
) -> None:
    late_before = NOON - HOUR

    async def plan() -> list[list[Any]]:
        return list(plan_lanes([await submission_of(body) for body in bodies], late_before))

    lanes = asyncio.run(plan())
    stamps = [[item.reading.ts for item in lane] for lane in lanes]
    assert all(stamps)
    assert Counter(chain.from_iterable(stamps)) == Counter(r.ts for body in bodies for r in body)
    for lane in stamps:
        assert len({ts >= late_before for ts in lane}) == 1
        if lane[0] < late_before:
            for day in {ts.date() for ts in lane}:
                hours = {ts.hour for ts in lane if ts.date() == day}
                assert len(hours) == max(hours) - min(hours) + 1  # neighbours


def test_late_readings_mark_their_hours_and_no_more(
    dsn: str, db: Db, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lanes are for: a marked hour is aggregated again for the whole fleet."""
    day = [meter("M-0", NOON - n * HOUR) for n in range(12)]
    db.execute("SELECT delete_job(job_id) FROM job_status")  # a worker of a server may come by

    def marked(late: tuple[int, ...], second: int) -> set[int]:
        def one(hours: int) -> MeterReading:
            return meter("M-1", NOON - hours * HOUR + timedelta(seconds=second))

        async def scenario(writer: Writer) -> None:
            await record(writer, *day)
            db.execute(
                "CALL refresh_continuous_aggregate('meter_hourly', NULL, %s)", (NOON - HOUR,)
            )
            await asyncio.gather(*(record(writer, one(hours)) for hours in (0, *late, 0)))

        run(dsn, clock, scenario)
        row = db.execute(
            "SELECT array_agg(extract(hour FROM %(noon)s::timestamptz - hour)::int) FROM unnest("
            " rollup_dirty_hours('meter_hourly', %(noon)s - INTERVAL '12 h', %(noon)s)) r,"
            " generate_series(lower(r), upper(r) - INTERVAL '1 us', '1 h') hour"
            " WHERE hour < %(noon)s - INTERVAL '1 h'",
            {"noon": NOON},
        ).fetchone()
        assert row is not None
        return set(row[0] or ())

    assert marked((9, 5, 4), 1) == {9, 5, 4}
    assert marked((), 2) == set()
    # And this test can tell: in one transaction they mark all from the oldest on.
    monkeypatch.setattr("energy_platform.ingest.plan_lanes", plan_one_lane)
    assert marked((9, 5, 4), 3) == set(range(2, 10))


def plan_one_lane(submissions: list[Submission], _: datetime) -> list[list[Item]]:
    return [[Item(s, n, reading) for s in submissions for n, reading in enumerate(s.readings)]]


def test_a_rejection_is_on_time() -> None:
    async def plan() -> int:
        bodies = [await submission_of([meter(), meter(ts=NOON - DAY)])]
        bodies[0].readings[0] = Rejection("x", "$", "")
        return [len(lane) for lane in plan_lanes(bodies, NOON - HOUR)].count(1)

    assert asyncio.run(plan()) == 2


# ---- What goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(5))
def test_a_reading_that_the_database_refuses_costs_itself_alone(
    api: httpx.Client, db: Db, place: int
) -> None:
    db.execute("ALTER TABLE meter_telemetry_history ADD CHECK (meter_id <> 'M-refused')")
    body = [meter(f"M-{i}") for i in range(4)]
    body.insert(place, meter("M-refused"))
    answer = api.post("/v1/ingest", json=msgspec.to_builtins([*body, vehicle()]))
    assert answer.status_code == 207
    account = answer.json()
    assert (account["received"], account["stored"], account["rejected"]) == (6, 5, 1)
    (error,) = account["errors"]
    assert (error["index"], error["code"]) == (place, "refused")
    kept = db.execute("SELECT code, device_id, count FROM quarantine").fetchall()
    assert kept == [("refused", "M-refused", 1)]
    single = api.post("/v1/ingest", json=msgspec.to_builtins(meter("M-refused")))
    assert (single.status_code, single.json()["code"]) == (422, "refused")


@pytest.mark.server
def test_a_full_queue_is_503_and_an_empty_one_takes_any_body(
    dsn: str, db: Db, clock: Clock
) -> None:
    """A lock holds the writer up; what comes meanwhile waits in the queue, or is refused."""

    async def scenario(writer: Writer) -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as locker:
            await locker.execute("LOCK TABLE meter_telemetry_history IN EXCLUSIVE MODE")
            first = asyncio.create_task(record(writer, *[meter()] * 9))  # over the limit
            await someone_waits(db)
            second = asyncio.create_task(record(writer, *[meter()] * 9))
            await asyncio.sleep(0)
            assert writer.queued_readings == 9
            with pytest.raises(OverloadedError):
                await record(writer, meter())
            await locker.rollback()
        assert await first == ["stored"] + ["duplicate"] * 8
        assert await second == ["duplicate"] * 9
        assert await record(writer, meter()) == ["duplicate"]

    run(dsn, clock, scenario, queue_readings_max=5)


@pytest.mark.server
def test_a_full_queue_is_503_with_retry_after(
    start_service: StartService, dsn: str, db: Db
) -> None:
    api = start_service(queue_readings_max=1)

    async def send_all(locker: Db) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=api.base_url, timeout=60) as client:
            bodies = [msgspec.to_builtins(meter(f"M-{i}")) for i in range(8)]
            tasks = [asyncio.create_task(client.post("/v1/ingest", json=body)) for body in bodies]
            # One is being written, and one waits if it came after that was begun: the others, six
            # at least, are answered while the lock is held.
            for number, answered in enumerate(asyncio.as_completed(tasks), 1):
                assert (await answered).status_code == 503
                if number == 6:
                    break
            locker.rollback()
            return await asyncio.gather(*tasks)

    with psycopg.connect(dsn) as locker:
        locker.execute("LOCK TABLE meter_telemetry_history IN EXCLUSIVE MODE")
        answers = asyncio.run(send_all(locker))
    counts = Counter(answer.status_code for answer in answers)
    assert counts in ({503: 6, 201: 2}, {503: 7, 201: 1})
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["code"] == "queue_full"
    assert len(db.execute("SELECT FROM meter_telemetry_history").fetchall()) == counts[201]


def test_stopping_writes_what_is_queued(dsn: str, db: Db, clock: Clock) -> None:
    async def scenario() -> list[list[Outcome]]:
        writer = Writer(dsn, clock=clock, refresh_end=HOUR, connections=2)
        async with writer:
            tasks = [asyncio.create_task(record(writer, meter(f"M-{i}"))) for i in range(20)]
            await asyncio.sleep(0)  # each is queued, none is written
            assert writer.queued_readings == 20
        with pytest.raises(OverloadedError):
            await record(writer, meter())
        return await asyncio.gather(*tasks)

    assert asyncio.run(scenario()) == [["stored"]] * 20
    assert len(db.execute("SELECT FROM meter_telemetry_history").fetchall()) == 20


def test_a_database_that_is_not_there_is_a_storage_error(clock: Clock) -> None:
    async def scenario(writer: Writer) -> None:
        for _ in range(2):
            with pytest.raises(StorageError):
                await record(writer, meter(), meter(ts=NOON - DAY))

    run("host=127.0.0.1 port=1", clock, scenario)


async def someone_waits(db: Db) -> None:
    query = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock'"
    )
    while not db.execute(query).fetchall():  # noqa: ASYNC110 (the event is the server's)
        await asyncio.sleep(0)


def end_writer(db: Db) -> int:
    rows = db.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'energy-platform writer'"
    )
    return len(rows.fetchall())


@pytest.mark.server
def test_a_lost_connection_neither_loses_nor_doubles(dsn: str, db: Db, clock: Clock) -> None:
    """The server ends the writer's connection, idle and in the middle of a transaction."""

    async def scenario(writer: Writer) -> None:
        assert await record(writer, meter("M-0")) == ["stored"]
        assert end_writer(db) == 1
        clock.advance(seconds=1)
        assert await record(writer, meter("M-0"), meter("M-1")) == ["duplicate", "stored"]
        async with await psycopg.AsyncConnection.connect(dsn) as locker:
            await locker.execute("LOCK TABLE vehicle_live_status IN EXCLUSIVE MODE")
            held = asyncio.create_task(record(writer, meter("M-2"), vehicle("V-2")))
            await someone_waits(db)
            assert end_writer(db) == 1
            await locker.rollback()
        assert await held == ["stored", "stored"]
        assert await record(writer, meter("M-2"), vehicle("V-2")) == ["duplicate"] * 2

    run(dsn, clock, scenario)
    rows = db.execute("SELECT meter_id FROM meter_telemetry_history ORDER BY 1").fetchall()
    assert rows == [("M-0",), ("M-1",), ("M-2",)]


def test_what_cannot_be_quarantined_costs_itself_alone(dsn: str, db: Db, clock: Clock) -> None:
    """The readings beside it are committed by then, and are stored, not known already."""
    db.execute("ALTER TABLE quarantine ADD CHECK (code <> 'x')")

    async def scenario(writer: Writer) -> None:
        bodies = [meter("M-1")], [Rejection("x", "$", "")], [meter("M-1", kwh=2)], [vehicle()]
        outcomes = await asyncio.gather(
            *(record(writer, *body) for body in bodies), return_exceptions=True
        )
        assert isinstance(outcomes.pop(1), StorageError)
        assert outcomes == [["stored"], ["conflicting"], ["stored"]]
        assert writer.transactions > 1

    run(dsn, clock, scenario)


def test_history_that_was_filled_by_other_ways_is_caught_up_with(
    dsn: str, db: Db, clock: Clock
) -> None:
    """Live rows are behind it, so that what is there already seems to be new at first."""
    later = NOON + timedelta(minutes=1)
    db.execute("INSERT INTO meter_telemetry_history VALUES ('M', %s, 1, 230, %s)", (later, later))
    db.execute(
        "INSERT INTO vehicle_telemetry_history VALUES ('V', %s, 50, 1, 20, %s)", (later, later)
    )

    async def scenario(writer: Writer) -> None:
        outcomes = await record(
            writer,
            meter("M", later),
            meter("M", later, 2),
            meter("M", NOON),
            vehicle("V", later, 2),
            vehicle("V", later + timedelta(minutes=1)),
            meter("M-2"),
        )
        assert outcomes == [
            "duplicate", "conflicting", "stored", "conflicting", "stored", "stored"
        ]  # fmt: skip

    run(dsn, clock, scenario)
    live = db.execute("SELECT meter_id, ts, kwh_consumed_ac FROM meter_live_status ORDER BY 1")
    assert live.fetchall() == [("M", later, 1), ("M-2", NOON, 1)]
    live = db.execute("SELECT vehicle_id, ts, kwh_delivered_dc FROM vehicle_live_status")
    assert live.fetchall() == [("V", later + timedelta(minutes=1), 1)]
    assert db.execute("SELECT meter_id FROM meter ORDER BY 1").fetchall() == [("M",), ("M-2",)]
    assert db.execute("SELECT count(*) FROM quarantine").fetchone() == (2,)


@pytest.mark.server
def test_a_commit_whose_answer_is_lost_is_told_from_a_duplicate(
    dsn: str, db: Db, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks right after the commit: what this very body stored is `stored`."""
    from energy_platform import ingest

    real = ingest._record
    calls = 0

    async def record_(connection: Any, *rest: Any) -> Any:
        nonlocal calls
        lost = await real(connection, *rest)
        calls += 1
        if calls == 2:
            await asyncio.to_thread(end_writer, db)
            await connection.execute("SELECT")
        return lost

    monkeypatch.setattr(ingest, "_record", record_)

    async def scenario(writer: Writer) -> None:
        assert await record(writer, meter("M-0")) == ["stored"]
        clock.advance(seconds=1)
        outcomes = await record(writer, meter("M-0"), meter("M-1"), meter("M-1", kwh=2))
        assert outcomes == ["duplicate", "stored", "conflicting"]

    run(dsn, clock, scenario)
    assert calls == 3
    assert db.execute("SELECT count FROM quarantine").fetchall() == [(1,)]


@pytest.mark.server
def test_the_service_answers_503_while_the_database_is_away_and_recovers(
    api: httpx.Client, db: Db, dsn: str
) -> None:
    body = msgspec.to_builtins([meter(), vehicle()])
    assert api.post("/v1/ingest", json=body[:1]).status_code == 200
    name = db.info.dbname
    with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as outside:
        outside.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        outside.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = %s AND application_name LIKE 'energy-platform%%'",
            [name],
        )
        try:
            answer = api.post("/v1/ingest", json=body)
            read = api.get("/v1/live/meters")
        finally:
            outside.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert (read.status_code, read.json()["code"]) == (503, "database_unavailable")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "database_unavailable"
    answer = api.post("/v1/ingest", json=body)
    assert (answer.status_code, answer.json()["stored"], answer.json()["duplicate"]) == (200, 1, 1)
    assert api.get("/v1/live/meters").status_code == 200
