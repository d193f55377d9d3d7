"""Do the jobs keep their promises: rolled up before it is dropped, and answers right throughout?

Policies look at the server's own clock, so here the data is laid around it; nothing waits.
"""

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from energy_platform import schema
from energy_platform.errors import SetupError
from energy_platform.settings import Settings, load_settings
from oracle import Reading, World, counter

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
DEFAULTS = load_settings("migrate", {})
REFRESH = "policy_refresh_continuous_aggregate"
ROLLUPS = ("meter_hourly", "vehicle_hourly", "meter_daily", "vehicle_daily")

# Raw rows for four days: what a test of retention can lay around the server's clock.
SHORT = Settings(
    late_window=DAY,
    refresh_start=2 * DAY,
    raw_retention=4 * DAY,
    hourly_retention=30 * DAY,
    columnstore_after=DAY,
)


@pytest.fixture
def now(db: psycopg.Connection[Any]) -> datetime:
    """The server's own time."""
    row = db.execute("SELECT now()").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at.astimezone(UTC)


@pytest.fixture
def world(db: psycopg.Connection[Any], now: datetime) -> World:
    """A register and an interval pair, with readings of the last eight days."""
    world = World(db)
    for kind in ("register", "interval"):
        meter = world.add_meter(f"m-{kind}", kind, 1800)
        vehicle = world.add_vehicle(f"v-{kind}", kind, 1800)
        world.assign(meter, vehicle, _midnight(now) - 8 * DAY)
        readings = counter(1800, _midnight(now) - 8 * DAY + HOUR / 4, 8 * 48, 5.0, 0.5)
        world.read_meter(meter, readings)
        world.read_vehicle(vehicle, [Reading(r.ts, r.kwh * 0.9, 21.0) for r in readings])
    return world


def _midnight(at: datetime) -> datetime:
    return at.replace(hour=0, minute=0, second=0, microsecond=0)


def check(world: World, now: datetime) -> None:
    for kind in ("register", "interval"):
        for since, until in ((9, -1), (6, 3), (4, 1), (2, 0)):
            world.check(f"v-{kind}", _midnight(now) - since * DAY, _midnight(now) - until * DAY)


def run(db: psycopg.Connection[Any], at: datetime, **options: Any) -> list[str]:
    return [job.job_name for job in schema.run_due_jobs(db, lambda: at, **options)]


def count_raw(db: psycopg.Connection[Any], before: datetime) -> int:
    row = db.execute(
        "SELECT (SELECT count(*) FROM meter_telemetry_history WHERE ts < %(t)s)"
        " + (SELECT count(*) FROM vehicle_telemetry_history WHERE ts < %(t)s)",
        {"t": before},
    ).fetchone()
    assert row is not None
    return int(row[0])


def held(db: psycopg.Connection[Any]) -> set[str]:
    db.execute("CALL hold_retention(0, '{}')")
    return {
        job.relation or ""
        for job in schema.fetch_job_status(db)
        if job.job == "policy_retention" and not job.scheduled
    }


def record_success(db: psycopg.Connection[Any], at: datetime) -> None:
    db.execute(
        "INSERT INTO job_run (job_id, job_name, started_at, finished_at, succeeded)"
        " SELECT job_id, job, %(at)s, %(at)s, true FROM job_status",
        {"at": at},
    )


EVERYTHING = {
    "meter_telemetry_history", "vehicle_telemetry_history", "meter_hourly", "vehicle_hourly",
}  # fmt: skip


# ---- what there is ------------------------------------------------------------------------------


def fetch_policies(db: psycopg.Connection[Any]) -> dict[tuple[str, str], tuple[int, Any, Any]]:
    return {
        (job, relation or ""): (job_id, every, config)
        for job, relation, job_id, every, config in db.execute(
            "SELECT s.job::text, s.relation, s.job_id, s.schedule_interval,"
            " j.config - ARRAY['hypertable_id', 'mat_hypertable_id']"
            " FROM job_status s JOIN timescaledb_information.jobs j USING (job_id)"
        )
    }


def test_policies_are_those_of_the_design(db: psycopg.Connection[Any]) -> None:
    found = {key: policy[1:] for key, policy in fetch_policies(db).items()}
    wanted: dict[tuple[str, str], tuple[Any, Any]] = {
        ("hold_retention", ""): (HOUR / 4, {}),
        ("sweep_expired", ""): (HOUR, {"drop_after": "30 days", "bytes_max": 10 * 2**30}),
    }
    for device_class in ("meter", "vehicle"):
        hourly, daily = f"{device_class}_hourly", f"{device_class}_daily"
        history = f"{device_class}_telemetry_history"
        wanted |= {
            (REFRESH, hourly): (HOUR, {"start_offset": "390 days", "end_offset": "01:00:00"}),
            (REFRESH, daily): (HOUR, {"start_offset": "392 days", "end_offset": "1 day"}),
            ("policy_compression", history): (6 * HOUR, {"compress_after": "3 days"}),
            ("policy_retention", history): (DAY, {"drop_after": "400 days"}),
            ("policy_retention", hourly): (DAY, {"drop_after": "1095 days"}),
        }
    assert found == wanted
    # Retention waits until every refresh has gone well.
    assert held(db) == EVERYTHING


def test_policies_follow_the_settings_and_are_left_alone(
    dsn: str, db: psycopg.Connection[Any]
) -> None:
    before = fetch_policies(db)
    schema.migrate(dsn, DEFAULTS)
    assert fetch_policies(db) == before
    changed = Settings(
        columnstore_after=timedelta(days=2, hours=12),
        quarantine_retention=timedelta(days=7),
        refresh_every=timedelta(minutes=5),
        chunk=timedelta(hours=6),
    )
    schema.migrate(dsn, changed)
    after = fetch_policies(db)
    moved = {
        ("policy_compression", "meter_telemetry_history"),
        ("policy_compression", "vehicle_telemetry_history"),
        (REFRESH, "meter_hourly"), (REFRESH, "vehicle_hourly"), ("sweep_expired", ""),
    }  # fmt: skip
    assert {key for key in before if before[key] != after[key]} == moved
    schema.migrate(dsn, changed)
    assert fetch_policies(db) == after
    assert after["policy_compression", "meter_telemetry_history"][2] == {
        "compress_after": "2 days 12:00:00"
    }
    assert after[REFRESH, "meter_hourly"][1] == timedelta(minutes=5)
    assert after["sweep_expired", ""][2] == {"drop_after": "7 days", "bytes_max": 10 * 2**30}
    chunk = db.execute(
        "SELECT DISTINCT time_interval FROM timescaledb_information.dimensions"
        " WHERE hypertable_name IN ('meter_telemetry_history', 'vehicle_telemetry_history')"
    ).fetchall()
    assert chunk == [(timedelta(hours=6),)]


# ---- the service runs them ----------------------------------------------------------------------


def test_raw_rows_are_dropped_and_answers_stay(
    dsn: str,
    db: psycopg.Connection[Any],
    world: World,
    now: datetime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "energy_platform")
    schema.migrate(dsn, SHORT)
    check(world, now)
    assert run(db, now) == [
        *[f"{REFRESH} {name}" for name in ROLLUPS],
        "policy_compression meter_telemetry_history",
        "policy_compression vehicle_telemetry_history",
        "hold_retention",
        *[f"policy_retention {name}" for name in _in_order_of_jobs(db)],
        "sweep_expired",
    ]  # fmt: skip
    check(world, now)
    # Every run is on record, in the log and in the table.
    assert db.execute("SELECT count(*) FROM job_run WHERE succeeded").fetchone() == (12,)
    logged = [record for record in caplog.records if record.getMessage() == "job ran"]
    assert len(logged) == 12
    assert logged[0].__dict__["job"] == f"{REFRESH} meter_hourly"
    # Raw rows past four days are gone, and only those; the rollups hold all.
    assert count_raw(db, now - 5 * DAY) == 0
    assert count_raw(db, now + DAY) >= 4 * 4 * 48
    for rollup, bucket in (("meter_hourly", "hour"), ("vehicle_daily", "day")):
        row = db.execute(f"SELECT sum(readings)::int, min({bucket}) FROM {rollup}").fetchone()
        assert row == (2 * 8 * 48, _midnight(now) - 8 * DAY)
    # What is a day old is in the columnstore.
    assert _compressed(db) >= 4
    # Nothing is due at once; soon the gate is, and when an hour has passed what rolls it up.
    assert run(db, now) == []
    assert run(db, now + timedelta(minutes=15)) == ["hold_retention"]
    assert run(db, now + HOUR) == [
        *[f"{REFRESH} {name}" for name in ROLLUPS],
        "hold_retention",
        "sweep_expired",
    ]
    check(world, now)
    # A late row of the compressed past is refreshed, and its rollup is kept with the next.
    late = _midnight(now) - 2 * DAY + timedelta(minutes=5)
    for kind in ("register", "interval"):
        world.read_meter(f"m-{kind}", [Reading(late, 7.0)])
        world.read_vehicle(f"v-{kind}", [Reading(late, 6.0, 90.0)])
    check(world, now)
    run(db, now + 2 * HOUR)
    check(world, now)
    assert db.execute(
        "SELECT readings FROM meter_hourly_materialized"
        " WHERE meter_id = 'm-register' AND hour = %s",
        (late.replace(minute=0),),
    ).fetchone() == (3,)


def _in_order_of_jobs(db: psycopg.Connection[Any]) -> list[str]:
    return [
        row[0]
        for row in db.execute(
            "SELECT relation FROM job_status WHERE job = 'policy_retention' ORDER BY job_id"
        )
    ]


def _compressed(db: psycopg.Connection[Any]) -> int:
    row = db.execute(
        "SELECT count(*) FROM timescaledb_information.chunks"
        " WHERE hypertable_schema = 'public' AND is_compressed"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_retention_is_held_while_a_refresh_fails(
    dsn: str,
    db: psycopg.Connection[Any],
    world: World,
    now: datetime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    schema.migrate(dsn, SHORT)
    # A sum that leaves float8: the refresh fails, and cannot be talked out of it.
    db.execute(
        "INSERT INTO meter_telemetry_history SELECT 'broken', %s + i * INTERVAL '1 minute', 1e308,"
        " 230, now() FROM generate_series(1, 2) i",
        (_midnight(now) - DAY,),
    )
    before = count_raw(db, now)
    names = run(db, now)
    assert not [name for name in names if name.startswith("policy_retention")]
    assert f"{REFRESH} vehicle_hourly" in names  # one failure does not keep the others from running
    assert "sweep_expired" in names
    failed = [job for job in schema.fetch_job_status(db) if job.last_ok is False]
    assert [job.title for job in failed] == [f"{REFRESH} meter_hourly"]
    assert "out of range" in (failed[0].last_error or "")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == ["job failed"]
    assert held(db) == EVERYTHING
    assert count_raw(db, now) == before
    # Mended, the next run drops.
    db.execute("DELETE FROM meter_telemetry_history WHERE meter_id = 'broken'")
    run(db, now, run_all=True)
    assert held(db) == set()
    assert count_raw(db, now - 5 * DAY) == 0
    check(world, now)


def test_retention_is_held_while_a_refresh_is_late_but_not_while_it_runs(
    db: psycopg.Connection[Any], now: datetime
) -> None:
    """What TimescaleDB's own workers write, on a server: a run that is on its way is no failure."""

    def work(finished: datetime | None, succeeded: datetime | None, success: bool) -> None:
        db.execute("DELETE FROM _timescaledb_internal.bgw_job_stat")
        db.execute(
            "INSERT INTO _timescaledb_internal.bgw_job_stat"
            " (job_id, last_start, last_finish, next_start, last_successful_finish,"
            "  last_run_success, total_runs, total_duration, total_duration_failures,"
            "  total_successes, total_failures, total_crashes, consecutive_failures,"
            "  consecutive_crashes, flags)"
            " SELECT job_id, %s, coalesce(%s::timestamptz, '-infinity'), '-infinity',"
            "  coalesce(%s::timestamptz, '-infinity'), %s, 2, '1 s', '0', 1, 0, 0, 0, 0, 0"
            " FROM job_status",
            (now, finished, succeeded, success),
        )

    work(now, now, True)
    assert held(db) == set()
    work(None, now - 15 * timedelta(minutes=1), False)  # running
    assert held(db) == set()
    assert {job.last_ok for job in schema.fetch_job_status(db)} == {None}
    work(None, None, False)  # running for the first time
    assert held(db) == EVERYTHING
    work(now, now - 15 * timedelta(minutes=1), False)  # failed
    assert held(db) == EVERYTHING
    work(None, now - 5 * HOUR, False)  # running for too long
    assert held(db) == EVERYTHING

    # The same where the service runs them.
    db.execute("DELETE FROM _timescaledb_internal.bgw_job_stat")
    record_success(db, now - 5 * HOUR)  # late
    assert held(db) == EVERYTHING
    record_success(db, now - HOUR / 2)
    assert held(db) == set()


def test_retention_is_held_while_old_rows_are_not_rolled_up(
    dsn: str, db: psycopg.Connection[Any], world: World, now: datetime
) -> None:
    """After an outage, late rows may be older than a refresh reaches."""
    schema.migrate(dsn, SHORT)
    world.refresh(now - 2 * DAY, now)
    record_success(db, now)
    assert held(db) == EVERYTHING
    world.refresh()
    assert held(db) == set()
    # Dropping a chunk marks an hour of the next one dirty; that alone holds nothing.
    for table in ("meter", "vehicle"):
        db.execute(
            f"SELECT drop_chunks('{table}_telemetry_history', %s::timestamptz)",
            (_midnight(now) - 7 * DAY,),
        )
    assert held(db) == set()
    world.read_vehicle("v-interval", [Reading(_midnight(now) - 6 * DAY, 1.0, 20.0)])
    assert held(db) == EVERYTHING
    # The service's own run reaches it.
    run(db, now, run_all=True)
    assert held(db) == set()
    assert count_raw(db, now - 5 * DAY) == 0
    check(world, now)


def test_late_rows_are_refreshed_a_chunk_a_call(
    db: psycopg.Connection[Any], world: World, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, datetime, datetime]] = []

    class Recorder:
        def execute(self, query: Any, parameters: Any = None) -> Any:
            if "refresh_continuous_aggregate(" in str(query):
                calls.append(parameters)
            return db.execute(query, parameters)

    def refresh(stop: Callable[[], bool] = lambda: False) -> list[tuple[str, datetime, datetime]]:
        calls.clear()
        schema._refresh_dirty(Recorder(), "meter_hourly", "01:00:00", now, stop)  # type: ignore[arg-type]
        return calls

    midnight = _midnight(now)
    assert len(refresh()) == 8
    for _, since, until in calls:
        assert _midnight(since) == _midnight(until - timedelta(microseconds=1))
    # Rolled up, there is nothing to do, but for what the hour that runs brings.
    assert refresh() == [] or calls[0][1] >= midnight - HOUR
    # Three late rows in two chunks: two calls, each no wider than it must be.
    five, two = midnight - 5 * DAY, midnight - 2 * DAY
    for at in (five + 3.5 * HOUR, five + 6.1 * HOUR, two):
        world.read_meter("m-interval", [Reading(at + timedelta(seconds=1), 1.0)])
    assert refresh()[:2] == [
        ("meter_hourly", five + 3 * HOUR, five + 7 * HOUR),
        ("meter_hourly", two, two + HOUR),
    ]
    check(world, now)
    assert refresh() == [] or calls[0][1] >= midnight - HOUR


def test_a_run_that_was_stopped_is_not_on_record(
    db: psycopg.Connection[Any], world: World, now: datetime
) -> None:
    """Retention relies on recorded runs, so half a refresh is none."""
    answers = iter([False, False, False])
    assert run(db, now, stop=lambda: next(answers, True)) == []
    assert db.execute("SELECT count(*) FROM job_run").fetchone() == (0,)
    assert held(db) == EVERYTHING
    assert db.execute("SELECT count(*) > 0 FROM meter_hourly_materialized").fetchone() == (True,)
    check(world, now)


def test_expired_quarantine_is_swept(db: psycopg.Connection[Any], now: datetime) -> None:
    for age in (1, 29, 31, 400):
        db.execute(
            "INSERT INTO quarantine (fingerprint, payload, payload_bytes, code, path, detail,"
            " first_seen, last_seen) VALUES (%s, '{}', 2, 'not_json', '', '', %s, %s)",
            (str(age).encode(), now - 500 * DAY, now - age * DAY),
        )
    record_success(db, now - 91 * DAY)
    run(db, now)
    left = {row[0] for row in db.execute("SELECT fingerprint FROM quarantine")}
    assert left == {b"1", b"29"}
    assert db.execute(
        "SELECT count(*) FROM job_run WHERE started_at < %s", (now - 90 * DAY,)
    ).fetchone() == (0,)


def test_quarantine_over_its_bound_loses_what_was_seen_longest_ago(
    dsn: str, db: psycopg.Connection[Any], now: datetime
) -> None:
    def left() -> list[int]:
        schema.run_due_jobs(db, lambda: now, run_all=True)
        return [
            int(row[0])
            for row in db.execute(
                "SELECT extract(epoch FROM %s - last_seen) / 3600 FROM quarantine ORDER BY 1",
                (now,),
            )
        ]

    for age in range(1, 101):  # random bytes: they do not shrink on disk
        db.execute(
            "INSERT INTO quarantine (fingerprint, payload, payload_bytes, code, path, detail,"
            " first_seen, last_seen) VALUES (%s, %s, 65536, 'not_json', '', '', %s, %s)",
            (str(age).encode(), random.Random(age).randbytes(65_536), now, now - age * HOUR),
        )
    assert left() == list(range(1, 101))
    schema.migrate(dsn, Settings(quarantine_bytes_max=40 * 66_036))
    assert left() == list(range(1, 41))
    # What is free inside of the table is no reason to delete more.
    assert left() == list(range(1, 41))


def test_old_readings_are_not_let_go_for_want_of_a_setting(
    dsn: str, db: psycopg.Connection[Any], now: datetime
) -> None:
    """A later start without the late window of the first would drop what was imported."""
    old = Settings(late_window=9000 * DAY)
    schema.migrate(dsn, old)
    schema.migrate(dsn, Settings())  # nothing is that old yet
    schema.migrate(dsn, old)
    db.execute(
        "INSERT INTO meter_telemetry_history VALUES ('M-1', %s, 1, 230, %s)",
        (now - 3000 * DAY, now),
    )
    with pytest.raises(SetupError, match="would be dropped") as refused:
        schema.migrate(dsn, Settings())
    assert refused.value.hint is not None
    assert "ENERGY_LATE_WINDOW as before (P9000D)" in refused.value.hint
    schema.migrate(dsn, old)
    schema.migrate(dsn, Settings(raw_retention=400 * DAY))  # said in so many words


def test_what_autovacuum_would_do_can_be_done(db: psycopg.Connection[Any]) -> None:
    schema.vacuum(db)
    assert db.execute(
        "SELECT reltuples >= 0 FROM pg_class WHERE relname = 'meter_live_status'"
    ).fetchone() == (True,)
