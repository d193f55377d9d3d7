"""Does an answer read what it must, and no more, however much history there is?

Counted by the server itself: how many rows of each table a transaction has fetched. A shape that
reads history raw gives the right figures, so only this test can tell.
"""

import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from conftest import LONG
from oracle import Reading, World, counter, utc

BEGIN = utc(2026, 2, 1)
DAYS = 12
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
PER_HOUR = 12


class Read:
    """What one statement read: rows by table, which tables were read from end to end, and which
    were opened at all."""

    def __init__(self, db: psycopg.Connection[Any], query: str, *parameters: object) -> None:
        chunks = name_chunks(db)
        with db.transaction():
            before = self._count(db)
            self.answer = db.execute(query, parameters).fetchall()
            after = self._count(db)
            locked = db.execute(
                "SELECT DISTINCT c.relname::text"
                " FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
                " WHERE c.relkind = 'r' AND coalesce(l.pid, 0) = pg_backend_pid()"
            ).fetchall()
        self.opened = {chunks[table] for (table,) in locked if table in chunks}
        self.rows: dict[str, int] = {}
        self.scanned: set[str] = set()
        for table, (scans, rows, fetched) in after.items():
            scans_before, rows_before, fetched_before = before.get(table, (0, 0, 0))
            name = chunks.get(table, table)
            if scans > scans_before:
                self.scanned.add(name)
            read = rows - rows_before + fetched - fetched_before
            if read:
                self.rows[name] = self.rows.get(name, 0) + read

    @staticmethod
    def _count(db: psycopg.Connection[Any]) -> dict[str, tuple[int, int, int]]:
        rows = db.execute(
            "SELECT relname::text, seq_scan, seq_tup_read, coalesce(idx_tup_fetch, 0)"
            " FROM pg_stat_xact_all_tables"
            " WHERE relname LIKE '\\_hyper\\_%' OR relname LIKE 'compress\\_hyper\\_%'"
        )
        return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def of(self, table: str) -> dict[str, int]:
        """Rows by chunk (MM-DD) of one hypertable or materialization."""
        return {
            name.removeprefix(f"{table} "): count
            for name, count in self.rows.items()
            if name.startswith(f"{table} ")
        }


def name_chunks(db: psycopg.Connection[Any]) -> dict[str, str]:
    """What each chunk's table holds: the day of a hypertable, in rows or in batches of them."""
    return dict(
        db.execute(
            "SELECT t.name, c.hypertable_name || t.kind || to_char("
            "  c.range_start AT TIME ZONE 'UTC', ' MM-DD')"
            " FROM timescaledb_information.chunks c"
            " LEFT JOIN _timescaledb_catalog.compression_settings s"
            "   ON s.relid = format('%I.%I', c.chunk_schema, c.chunk_name)::regclass"
            " LEFT JOIN pg_class p ON p.oid = s.compress_relid,"
            " LATERAL (VALUES (c.chunk_name::text, ''), (p.relname::text, '.batches'))"
            "   AS t (name, kind)"
            " WHERE t.name IS NOT NULL"
        ).fetchall()
    )


@pytest.fixture
def world(db: psycopg.Connection[Any]) -> World:
    """Twelve daily chunks, rolled up until 11:00 of the last day; it is 11:40."""
    world = World(db)
    end = BEGIN + (DAYS - 1) * DAY + 11 * HOUR + timedelta(minutes=40)
    for number, kind in enumerate(("interval", "register")):
        meter = world.add_meter(f"m-{kind}", kind, 300)
        vehicle = world.add_vehicle(f"v-{kind}", kind, 300)
        world.assign(meter, vehicle, BEGIN)
        readings = counter(300, BEGIN, int((end - BEGIN) / timedelta(minutes=5)), number, 0.1)
        world.read_meter(meter, readings)
        world.read_vehicle(vehicle, [Reading(r.ts, r.kwh, 20.0) for r in readings])
    world.refresh(None, end.replace(minute=0))
    db.execute("ANALYZE")
    return world


def materialization(db: psycopg.Connection[Any], rollup: str) -> str:
    row = db.execute(
        "SELECT materialization_hypertable_name::text"
        " FROM timescaledb_information.continuous_aggregates WHERE view_name = %s",
        (rollup,),
    ).fetchone()
    assert row is not None
    return str(row[0])


def read_performance(world: World, vehicle: str, since: datetime, until: datetime) -> Read:
    world.check(vehicle, since, until)  # plans are made, and the answer is right
    # A fleet this small fits on a page, where an index would never be used.
    world.db.execute("SET enable_seqscan = off")
    query = "SELECT * FROM vehicle_performance_v1(%s, %s, %s)"
    return Read(world.db, query, vehicle, since, until)


def test_an_answer_reads_its_edges_raw_and_the_rest_rolled_up(
    db: psycopg.Connection[Any], world: World
) -> None:
    today = BEGIN + (DAYS - 1) * DAY
    tables = [
        (f"{name}_telemetry_history", materialization(db, f"{name}_hourly"))
        for name in ("meter", "vehicle")
    ]
    for kind in ("interval", "register"):
        before = 1 if kind == "register" else 0  # the reading that the first one steps from
        # A day with cut hours: two chunks raw, an hour of each at most.
        until = today + 11 * HOUR + timedelta(minutes=35)
        read = read_performance(world, f"v-{kind}", until - DAY, until)
        for history, rollup in tables:
            raw = read.of(history)
            assert set(raw) == {"02-11", "02-12"}
            # A plan that is not made for the window opens every chunk.
            assert {name for name in read.opened if name.startswith(history)} == {
                f"{history} 02-11", f"{history} 02-12",
            }  # fmt: skip
            assert raw["02-11"] <= PER_HOUR // 2 + before
            assert raw["02-12"] <= PER_HOUR
            assert 23 <= sum(read.of(rollup).values()) <= 2 * 24
        assert read.scanned == set()
        # Whole hours: no raw row.
        read = read_performance(world, f"v-{kind}", BEGIN + HOUR, today)
        for history, rollup in tables:
            assert sum(read.of(history).values()) == before
            hours = (DAYS - 1) * 24 - 1
            assert hours <= sum(read.of(rollup).values()) <= 2 * (hours + 24)
        assert read.scanned == set()

    # A register that was never heard before costs no walk through history.
    world.assign(world.add_meter("m-new", "register"), world.add_vehicle("v-new"), BEGIN)
    world.read_meter("m-new", [Reading(today + 5 * HOUR, 10.0)])
    world.refresh(today, today + 11 * HOUR)
    read = read_performance(world, "v-new", today + 3 * HOUR, today + 8 * HOUR)
    assert read.of("meter_telemetry_history") == {}
    assert sum(read.of(tables[0][1]).values()) <= 3 * 5
    assert read.scanned == set()

    # A late row costs its hour and no more.
    world.read_meter("m-interval", [Reading(BEGIN + 5 * DAY + timedelta(minutes=91), 3.0)])
    read = read_performance(world, "v-interval", BEGIN, today)
    assert read.of("meter_telemetry_history") == {"02-06": PER_HOUR + 1}
    assert read.of("vehicle_telemetry_history") == {}
    assert read.scanned == set()

    # And this test can tell: from raw rows alone come the same figures, and the count shows it.
    db.execute(
        "CREATE OR REPLACE FUNCTION rollup_dirty_hours("
        "  rollup name, since timestamptz, until timestamptz) RETURNS tstzmultirange"
        " LANGUAGE sql STABLE AS $$ SELECT tstzmultirange(tstzrange(NULL, NULL)) $$"
    )
    read = read_performance(world, "v-interval", BEGIN, today)
    assert sum(read.of("meter_telemetry_history").values()) == (DAYS - 1) * 24 * PER_HOUR + 1


# ---- any window, any state of history -----------------------------------------------------------

SEARCHED = (HOUR, DAY, 10 * DAY)  # how far a register looks back for what it steps from
Piece = tuple[datetime, datetime]


class Past(NamedTuple):
    """Six days at a reading a minute, and what the test has done to them."""

    world: World
    end: datetime
    kept: datetime  # raw rows before it are dropped
    rolled: datetime  # where the rollup ends
    dirty: set[tuple[str, datetime]]  # by class and hour

    def pieces(self, kind: str, since: datetime, until: datetime) -> list[Piece]:
        """What of a window only raw rows can answer: head, tail and dirty hours, joined."""
        pieces: list[Piece] = []
        hour = _hour_of(since)
        while hour < until:
            low, high = max(hour, since, self.kept), min(hour + HOUR, until)
            is_whole = (low, high) == (hour, hour + HOUR)
            is_rolled = is_whole and high <= self.rolled and (kind, hour) not in self.dirty
            if low < high and not is_rolled:
                if pieces and pieces[-1][1] == low:
                    low = pieces.pop()[0]
                pieces.append((low, high))
            hour += HOUR
        return pieces


class Allowance(NamedTuple):
    """What an answer may read of one device."""

    rows: int
    batches: int  # of compressed chunks: up to 1,000 rows of one device each
    chunks: set[str]


def allow(past: Past, kind: str, device: str, since: datetime, until: datetime) -> Allowance:
    db = past.world.db
    history = f"{kind}_telemetry_history"
    pieces = past.pieces(kind, since, until)
    rows = _count_rows(db, kind, device, pieces)
    if device.endswith("register"):
        # One row, found in the nearest of the stretches that holds any.
        for reach in SEARCHED:
            before = (since - reach, since)
            if _count_rows(db, kind, device, [before]):
                rows += 1
                break
        pieces = [before, *pieces]
    days = {day for piece in pieces for day in _days_of(*piece)}
    batches = 0
    for table, name in name_chunks(db).items():
        if not name.startswith(f"{history}.batches"):
            continue
        # A batch that two pieces overlap is read for each of them.
        query = sql.SQL(
            "SELECT count(*) FROM {}.{} b, unnest(%s::timestamptz[], %s::timestamptz[]) p (lo, hi)"
            " WHERE {} = %s AND b._ts_meta_min_1 < p.hi AND b._ts_meta_max_1 >= p.lo"
        ).format(
            sql.Identifier("_timescaledb_internal"),
            sql.Identifier(table),
            sql.Identifier("b", f"{kind}_id"),
        )
        batches += _fetch_count(db, query, *_columns(pieces), device)
    chunks = {f"{history}{part} {day:%m-%d}" for day in days for part in ("", ".batches")}
    return Allowance(rows, batches, chunks)


def _count_rows(
    db: psycopg.Connection[Any], kind: str, device: str, pieces: Iterable[Piece]
) -> int:
    query = sql.SQL(
        "SELECT count(*) FROM {} h JOIN unnest(%s::timestamptz[], %s::timestamptz[]) p (lo, hi)"
        " ON h.ts >= p.lo AND h.ts < p.hi WHERE {} = %s"
    ).format(sql.Identifier(f"{kind}_telemetry_history"), sql.Identifier("h", f"{kind}_id"))
    return _fetch_count(db, query, *_columns(pieces), device)


def _fetch_count(db: psycopg.Connection[Any], query: sql.Composed, *parameters: Any) -> int:
    row = db.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])


def _columns(pieces: Iterable[Piece]) -> tuple[list[datetime], list[datetime]]:
    spans = list(pieces)
    return [low for low, _ in spans], [high for _, high in spans]


def _hour_of(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)


def _days_of(since: datetime, until: datetime) -> Iterable[datetime]:
    day = since.replace(hour=0, minute=0, second=0, microsecond=0)
    while day < until:
        yield day
        day += DAY


def make_past(db: psycopg.Connection[Any], choose: random.Random) -> Past:
    db.execute("SET enable_seqscan = off")  # before a plan is kept
    world = World(db)
    end = BEGIN + 5 * DAY + 11 * HOUR + timedelta(minutes=40)
    rolled = end.replace(minute=0)
    for number, kind in enumerate(("interval", "register")):
        meter, vehicle = world.add_meter(f"m-{kind}", kind), world.add_vehicle(f"v-{kind}", kind)
        world.assign(meter, vehicle, BEGIN)
        readings = counter(60, BEGIN, int((end - BEGIN) / timedelta(minutes=1)), number, 0.1)
        world.read_meter(meter, readings)
        world.read_vehicle(vehicle, [Reading(r.ts, r.kwh, 20.0) for r in readings])
    world.refresh(None, rolled)
    kept = BEGIN + choose.choice((0, 0, 1, 2)) * DAY
    compressed = choose.sample(range(5), 3)
    for kind in ("meter", "vehicle"):
        history = f"{kind}_telemetry_history"
        db.execute("SELECT drop_chunks(%s::regclass, %s::timestamptz)", (history, kept))
        for day in (BEGIN + number * DAY for number in compressed):
            db.execute(
                "SELECT compress_chunk(c) FROM show_chunks(%s::regclass,"
                " newer_than => %s::timestamptz, older_than => %s::timestamptz) c",
                (history, day, day + DAY),
            )
    # Dropping a chunk marks the first hour of the next one, too.
    dirty = {(kind, kept) for kind in ("meter", "vehicle") if kept > BEGIN}
    for number in range(choose.randrange(8)):
        span = (rolled - kept) // timedelta(seconds=1)
        at = kept + timedelta(seconds=choose.randrange(span), microseconds=number + 1)
        # Whoever's row it is, it marks the hour for all of its class.
        kind = choose.choice(("meter", "vehicle"))
        if kind == "meter":
            world.read_meter("m-interval", [Reading(at, 3.0)])
        else:
            world.read_vehicle("v-interval", [Reading(at, 3.0, 20.0)])
        dirty.add((kind, _hour_of(at)))
    db.execute("ANALYZE")
    return Past(world, end, kept, rolled, dirty)


def choose_window(past: Past, choose: random.Random) -> Piece:
    """Cut anywhere where raw rows are, at whole hours where they are dropped."""
    minutes = (past.end - BEGIN) // timedelta(minutes=1)
    length = choose.choice((90, 26 * 60, minutes))
    low = choose.randrange(minutes)
    edges = [BEGIN + timedelta(minutes=n) for n in (low, low + 1 + choose.randrange(length))]
    if choose.random() < 0.3:
        edges[1] = _hour_of(edges[1])
    since, until = (_hour_of(edge) if edge < past.kept else edge for edge in edges)
    return (since, until) if since < until else (since, since + HOUR)


def check_reads(past: Past, name: str, since: datetime, until: datetime) -> None:
    read = read_performance(past.world, f"v-{name}", since, until)
    told = f"{name} {since} .. {until}, kept since {past.kept}, dirty {sorted(past.dirty)}"
    for kind in ("meter", "vehicle"):
        history = f"{kind}_telemetry_history"
        allowed = allow(past, kind, f"{kind[0]}-{name}", since, until)
        assert sum(read.of(history).values()) <= allowed.rows, told
        assert sum(read.of(f"{history}.batches").values()) <= allowed.batches, told
        assert {table for table in read.opened if table.startswith(history)} <= allowed.chunks, told
    assert read.scanned == set(), told


@pytest.mark.parametrize("seed", range(30 if LONG else 3))
def test_no_answer_reads_more_raw_rows_than_head_tail_and_dirty_hours_hold(
    db: psycopg.Connection[Any], seed: int
) -> None:
    choose = random.Random(seed)
    past = make_past(db, choose)
    for _ in range(25):
        check_reads(past, choose.choice(("interval", "register")), *choose_window(past, choose))

    # And this test can tell: a plan for any window opens chunks that this one has no use for, and
    # without the rollup every hour is read raw.
    day = past.kept + DAY, past.kept + 2 * DAY
    check_reads(past, "interval", *day)
    db.execute(
        "ALTER FUNCTION raw_measures(text, text, text, timestamptz, timestamptz)"
        " SET plan_cache_mode = force_generic_plan"
    )
    with pytest.raises(AssertionError, match="kept since"):
        check_reads(past, "interval", day[0] + HOUR / 2, day[1])
    db.execute(
        "CREATE OR REPLACE FUNCTION rollup_dirty_hours("
        "  rollup name, since timestamptz, until timestamptz) RETURNS tstzmultirange"
        " LANGUAGE sql STABLE AS $$ SELECT tstzmultirange(tstzrange(NULL, NULL)) $$"
    )
    db.execute(
        "ALTER FUNCTION raw_measures(text, text, text, timestamptz, timestamptz)"
        " SET plan_cache_mode = force_custom_plan"
    )
    with pytest.raises(AssertionError, match="kept since"):
        check_reads(past, "interval", *day)


def test_the_fleet_reads_its_edges_raw_and_the_rest_rolled_up(
    db: psycopg.Connection[Any], world: World
) -> None:
    today = BEGIN + (DAYS - 1) * DAY
    rollups = {
        f"{name}_telemetry_history": materialization(db, f"{name}_hourly")
        for name in ("meter", "vehicle")
    }
    devices = 2  # of each class, one of them a register

    def read_fleet(since: datetime, until: datetime) -> Read:
        world.check_fleet(since, until)
        db.execute("SET enable_seqscan = off")
        read = Read(db, "SELECT * FROM fleet_performance_v1(%s, %s)", since, until)
        assert read.scanned == set()
        return read

    # A day with cut hours. The register is looked for in the hour that the window begins in, and in
    # the one before that.
    until = today + 11 * HOUR + timedelta(minutes=35)
    read = read_fleet(until - DAY, until)
    for history, rollup in rollups.items():
        assert read.of(history) == {"02-11": 5 + PER_HOUR, "02-12": devices * 7}
        assert {name for name in read.opened if name.startswith(history)} == {
            f"{history} 02-11", f"{history} 02-12",
        }  # fmt: skip
        hours = devices * 23 + 1
        assert hours <= sum(read.of(rollup).values()) <= 2 * (hours + 3 * devices)

    # Whole hours: no raw row, however long the window is.
    for since in (BEGIN + HOUR, today - DAY):
        read = read_fleet(since, today + 11 * HOUR)
        hours = devices * int((today + 11 * HOUR - since) / HOUR) + 1
        for history, rollup in rollups.items():
            assert read.of(history) == {}
            assert hours <= sum(read.of(rollup).values()) <= 2 * (hours + 3 * devices)

    # An assignment that ends inside an hour costs this hour of its two devices.
    db.execute(
        "UPDATE charging_assignment SET during = tstzrange(lower(during), %s)"
        " WHERE meter_id = 'm-interval'",
        (today - timedelta(minutes=40),),
    )
    world.assignments[0] = world.assignments[0]._replace(until=today - timedelta(minutes=40))
    read = read_fleet(today - DAY, today)
    assert read.of("meter_telemetry_history") == {"02-11": 4}
    assert read.of("vehicle_telemetry_history") == {"02-11": PER_HOUR}

    # A late row costs its hour for every device of its class, and no more.
    world.read_meter("m-interval", [Reading(BEGIN + 5 * DAY + timedelta(minutes=91), 3.0)])
    read = read_fleet(BEGIN, today - DAY)
    assert read.of("meter_telemetry_history") == {"02-06": devices * PER_HOUR + 1}
    assert read.of("vehicle_telemetry_history") == {}

    # A register that has been silent for days is found in the rollup.
    world.assign(world.add_meter("m-new", "register"), world.add_vehicle("v-new"), BEGIN)
    world.read_meter("m-new", [Reading(BEGIN, 1.0), Reading(today + 5 * HOUR, 10.0)])
    world.refresh(None, today + 11 * HOUR)
    read = read_fleet(today + 3 * HOUR, today + 8 * HOUR)
    assert read.of("meter_telemetry_history") == {}


def test_sessions_are_looked_for_in_their_window_and_not_far_behind_it(
    db: psycopg.Connection[Any], world: World
) -> None:
    today = BEGIN + (DAYS - 1) * DAY
    for kind, idle in (("interval", 0.0), ("register", 7.0)):
        vehicle = world.add_vehicle(f"parked-{kind}", kind, 300)
        world.read_vehicle(vehicle, counter(300, BEGIN, (DAYS - 1) * 24 * PER_HOUR, idle, 0.0))
        world.read_vehicle(vehicle, counter(300, today, 10 * PER_HOUR, idle + 0.1, 0.1))
        world.check_sessions(vehicle, today, today + DAY)
        db.execute("SET enable_seqscan = off")
        query = "SELECT * FROM charging_session_v1(%s, %s, %s)"
        read = Read(db, query, vehicle, today, today + DAY)
        history = read.of("vehicle_telemetry_history")
        # An hour and a half behind the window, in which nothing charged, and as much again for the
        # reading before; what lies within is read for the session and for its figures.
        assert set(history) == {"02-11", "02-12"}
        assert history["02-11"] <= 4 * PER_HOUR
        assert history["02-12"] <= 4 * 10 * PER_HOUR
        assert read.scanned == set()
        assert len(read.answer) == 1
