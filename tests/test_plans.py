"""Does an answer read what it must, and no more, however much history there is?

Counted by the server itself: how many rows of each table a transaction has fetched. A shape that
reads history raw gives the right figures, so only this test can tell.
"""

from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

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
        chunks = dict(
            db.execute(
                "SELECT chunk_name::text, hypertable_name || ' ' || to_char("
                "  range_start AT TIME ZONE 'UTC', 'MM-DD') FROM timescaledb_information.chunks"
            ).fetchall()
        )
        with db.transaction():
            before = self._count(db)
            self.answer = db.execute(query, parameters).fetchall()
            after = self._count(db)
            locked = db.execute(
                "SELECT DISTINCT c.relname::text"
                " FROM pg_locks l JOIN pg_class c ON c.oid = l.relation WHERE c.relkind = 'r'"
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
