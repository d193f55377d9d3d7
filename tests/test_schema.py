"""Does the schema arrive at the same place from everywhere, and refuse what it must refuse?"""

import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from conftest import LONG
from energy_platform import doctor, schema
from energy_platform.errors import SetupError
from energy_platform.settings import Settings, load_settings
from oracle import World, counter

DEFAULTS = load_settings("migrate", {})
NOW = datetime(2026, 2, 10, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)

# Everything that a migration or a file of sql/ makes, as text. Numbers that TimescaleDB gives
# (materialization 3 or 5, job 1003) are not part of what a schema is.
DUMP = r"""
SELECT 'column ' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
       || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
       || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
       || coalesce(' COLLATE ' || l.collname, '')
       || coalesce(' -- ' || col_description(c.oid, a.attnum), '')
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'c')
  AND c.relname NOT LIKE '%yoyo%'
UNION ALL
SELECT 'relation ' || c.relkind::text || ' ' || c.relname || ' ' || coalesce(c.relacl::text, '')
       || coalesce(c.reloptions::text, '') || coalesce(' -- ' || obj_description(c.oid), '')
FROM pg_class c
WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE '%yoyo%'
UNION ALL
SELECT 'view ' || c.relname || ' ' || regexp_replace(
         pg_get_viewdef(c.oid), '_materialized_hypertable_\d+|cagg_watermark\(\d+\)', 'N', 'g')
FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
UNION ALL
SELECT 'constraint ' || c.conrelid::regclass || ' ' || c.conname || pg_get_constraintdef(c.oid)
FROM pg_constraint c WHERE c.connamespace = 'public'::regnamespace
  AND c.conrelid::regclass::text NOT LIKE '%yoyo%'
UNION ALL
SELECT 'index ' || i.indexdef FROM pg_indexes i
WHERE i.schemaname = 'public' AND i.tablename NOT LIKE '%yoyo%'
UNION ALL
SELECT 'function ' || p.oid::regprocedure || md5(p.prosrc) || p.provolatile::text || p.prosecdef
       || coalesce(p.proconfig::text, '') || coalesce(p.proacl::text, '')
       || coalesce(' -- ' || obj_description(p.oid), '')
FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'job ' || j.proc_name || ' ' || coalesce(j.hypertable_name, '') || ' ' || j.schedule_interval
       || ' ' || (j.config - ARRAY['hypertable_id', 'mat_hypertable_id'])::text
FROM timescaledb_information.jobs j WHERE j.job_id >= 1000
UNION ALL
SELECT 'dimension ' || d.hypertable_name || ' ' || d.time_interval
FROM timescaledb_information.dimensions d WHERE d.hypertable_schema = 'public'
"""


def dump(dsn: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return sorted(row[0] for row in connection.execute(DUMP))


@pytest.fixture
def make_database(dsn: str) -> Iterator[Callable[[], str]]:
    """Empty databases beside the test's own; they are gone afterwards."""
    made: list[str] = []

    def make() -> str:
        name = f"{conninfo_to_dict(dsn)['dbname']}_{len(made)}"
        with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name))
            )
        made.append(name)
        return make_conninfo(dsn, dbname=name)

    yield make
    with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as connection:
        for name in made:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


def test_every_earlier_state_becomes_the_newest(
    dsn: str,
    make_database: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = dump(dsn)
    newest = schema._schema_folder()
    migrations = sorted((newest / "migrations").glob("*.sql"))
    older = tmp_path / "older"
    shutil.copytree(newest / "sql", older / "sql")
    states = range(1, len(migrations))
    for applied in states if LONG else (states[0], states[len(states) // 2], states[-1]):
        earlier = make_database()
        shutil.rmtree(older / "migrations", ignore_errors=True)
        (older / "migrations").mkdir()
        for path in migrations[:applied]:
            shutil.copy(path, older / "migrations")
        with psycopg.connect(earlier, autocommit=True) as connection:
            schema.check_server(connection)
        with monkeypatch.context() as patch:
            patch.setattr(schema, "_schema_folder", lambda: older)
            assert schema._apply_migrations(earlier) == [path.stem for path in migrations[:applied]]
        assert schema.migrate(earlier, DEFAULTS) == [path.stem for path in migrations[applied:]]
        assert dump(earlier) == wanted


def test_migrating_again_changes_nothing(dsn: str, db: psycopg.Connection[Any]) -> None:
    before = dump(dsn)
    jobs = "SELECT job_id, next_start, scheduled FROM timescaledb_information.jobs ORDER BY job_id"
    jobs_before = db.execute(jobs).fetchall()
    assert schema.migrate(dsn, DEFAULTS) == []
    assert dump(dsn) == before
    assert db.execute(jobs).fetchall() == jobs_before


@pytest.mark.server  # on the embedded engine the folder's lock keeps others out
def test_migrates_at_once_wait_for_each_other(make_database: Callable[[], str]) -> None:
    empty = make_database()
    applied: list[list[str]] = []
    failed: list[BaseException] = []

    def migrate() -> None:
        try:
            applied.append(schema.migrate(empty, DEFAULTS))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert sorted(map(len, applied)) == [0, 0, len(schema.list_migrations())]


def test_everything_says_what_it_is(db: psycopg.Connection[Any]) -> None:
    silent = db.execute(r"""
        SELECT c.relname::text FROM pg_class c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'c')
          AND c.relname NOT LIKE '%yoyo%'
          AND coalesce(obj_description(c.oid, 'pg_class'),
                       obj_description(c.reltype, 'pg_type')) IS NULL
        UNION ALL
        SELECT c.relname || '.' || a.attname FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'c')
          AND c.relname NOT LIKE '%yoyo%' AND col_description(c.oid, a.attnum) IS NULL
        UNION ALL
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND obj_description(p.oid) IS NULL
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        """).fetchall()
    assert silent == []


# ---- servers that will not do -------------------------------------------------------------------


class FakeServer:
    """A connection that gives the rows of another server."""

    def __init__(self, *rows: tuple[Any, ...], refuses: str | None = None) -> None:
        self.rows = list(rows)
        self.refuses = refuses

    def execute(self, query: str, *_: object) -> "FakeServer":
        if query.startswith("CREATE EXTENSION") and self.refuses:
            raise psycopg.errors.InsufficientPrivilege(self.refuses)
        return self

    def fetchone(self) -> tuple[Any, ...] | None:
        return self.rows.pop(0)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (FakeServer((140_010, "2.28.0", None)), "PostgreSQL 14 is too old: 15 or newer"),
        (FakeServer((170_005, None, None)), "no TimescaleDB: install TimescaleDB Community"),
        (FakeServer((170_005, "2.22.1", None)), "TimescaleDB 2.22.1 is too old: 2.23"),
        (FakeServer((170_005, "2.28.0", "2.9.3")), "TimescaleDB 2.9.3 is too old: 2.23"),
        (FakeServer((170_005, "2.28.0", None), ("apache",)), "is the Apache edition"),
        (
            FakeServer((170_005, "2.28.0", None), refuses="permission denied"),
            "extensions cannot be created: permission denied",
        ),
    ],
)
def test_a_server_that_will_not_do_is_refused(server: FakeServer, message: str) -> None:
    with pytest.raises(SetupError) as raised:
        schema.check_server(cast(psycopg.Connection[Any], server))
    assert message in str(raised.value)


@pytest.mark.parametrize("version", [(170_005, "2.23.0-dev", None), (150_000, "2.23.0", "3.0.0")])
def test_a_newer_server_is_taken(version: tuple[Any, ...]) -> None:
    schema.check_server(cast(psycopg.Connection[Any], FakeServer(version, ("timescale",))))


# ---- settings -----------------------------------------------------------------------------------


def days(count: float) -> timedelta:
    return timedelta(days=count)


UNSAFE: list[tuple[dict[str, Any], str]] = [
    ({"chunk": timedelta(minutes=90)}, "chunk must be whole hours"),
    ({"refresh_end": timedelta(minutes=59)}, "refresh_end must be at least"),
    ({"refresh_start": days(380)}, "refresh_start must be over the late window"),
    ({"raw_retention": days(390)}, "raw_retention must be at least refresh_start"),
    ({"hourly_retention": days(400)}, "hourly_retention must be"),
    # The daily refresh would reach hours that are dropped.
    (
        {"chunk": timedelta(hours=1), "raw_retention": days(391), "hourly_retention": days(392)},
        "hourly_retention must be",
    ),
]


def test_settings_that_would_lose_data_are_refused(dsn: str) -> None:
    before = dump(dsn)
    for settings, reason in UNSAFE:
        with pytest.raises(SetupError, match="would lose data") as raised:
            schema.migrate(dsn, Settings(**settings))
        assert reason in str(raised.value)
    assert dump(dsn) == before


# ---- book-keeping that cannot be relied on ------------------------------------------------------


def test_a_version_is_probed_once_and_distrusted_where_it_fails(
    dsn: str, db: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def problems() -> set[str]:
        found = doctor.examine(db, DEFAULTS, NOW)
        return {finding.problem for finding in found if finding.subject == "TimescaleDB"}

    def clean_hours() -> bool:
        row = db.execute(
            "SELECT isempty(rollup_dirty_hours('meter_hourly', %s, %s) * %s::tstzmultirange)",
            (NOW, NOW + 2 * HOUR, f"{{[{NOW}, {NOW + 2 * HOUR})}}"),
        ).fetchone()
        assert row is not None
        return bool(row[0])

    world = World(db)
    world.assign(world.add_meter("m", "register"), world.add_vehicle("v"), NOW)
    world.read_meter("m", counter(60, NOW, 300, 10.0, 1.0))
    world.read_vehicle("v", counter(60, NOW, 300, 10.0, 1.0))
    world.refresh(NOW, NOW + 4 * HOUR)
    assert clean_hours()
    assert db.execute("SELECT trusted FROM rollup_probe").fetchall() == [(True,)]
    assert problems() == set()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "probe_rollup", lambda _: pytest.fail("it was probed already"))
        schema.migrate(dsn, DEFAULTS)
    # Another version: probed again, and this one fails.
    db.execute("UPDATE rollup_probe SET timescaledb_version = '2.0.0'")
    assert problems() == {"was updated and not probed since"}
    with monkeypatch.context() as patch:
        patch.setattr(schema, "probe_rollup", lambda _: False)
        schema.migrate(dsn, DEFAULTS)
    assert problems() == {
        "keeps its books in a way we do not know: answers come from raw rows, slowly"
    }
    assert not clean_hours()
    world.check("v", NOW, NOW + 5 * HOUR)
    # Dropped hours have only the rollup.
    db.execute("DELETE FROM rollup_probe WHERE NOT trusted")
    schema.migrate(dsn, DEFAULTS)
    assert clean_hours()

    # Tables that are not there any more: the same, found out by the answer itself.
    db.execute(
        "CREATE OR REPLACE FUNCTION rollup_dirty_ranges("
        "  rollup name, since timestamptz, until timestamptz)"
        " RETURNS TABLE (lowest timestamptz, highest timestamptz) LANGUAGE plpgsql STABLE AS"
        " $$ BEGIN RETURN QUERY SELECT now(), now() FROM _timescaledb_catalog.gone; END $$"
    )
    assert not clean_hours()
    world.check("v", NOW, NOW + 5 * HOUR)


# ---- what runs on an older schema ---------------------------------------------------------------


def test_pending_migrations_are_not_ready(api: httpx.Client, db: psycopg.Connection[Any]) -> None:
    assert api.get("/health/ready").status_code == 200
    db.execute("DELETE FROM _yoyo_migration WHERE migration_id LIKE '0008%'")
    answer = api.get("/health/ready")
    assert answer.status_code == 503
    assert "0008" in answer.text
    db.execute("DROP TABLE _yoyo_migration")
    assert api.get("/health/ready").status_code == 503
