"""The schema's life: migrate, check, and run the jobs that are due."""

import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import psycopg
import yoyo
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import class_row
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI

from energy_platform import database
from energy_platform.errors import SetupError
from energy_platform.settings import Settings, check_retention

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))
_log = logging.getLogger("energy_platform.schema")

POSTGRES_MIN: Final = 15
TIMESCALEDB_MIN: Final = (2, 23)
POSTGRES_TRIED: Final = 17
TIMESCALEDB_TRIED: Final = (2, 28)
MIGRATE_LOCK: Final = 0x656E65726779  # "energy", as the key of an advisory lock
HOURLY: Final = timedelta(hours=1)
DAILY: Final = timedelta(days=1)


def _schema_folder() -> Path:
    """Where migrations/ and sql/ are: inside an installed package, or beside src/ in a checkout."""
    installed = Path(__file__).parent / "_schema"
    return installed if installed.is_dir() else Path(__file__).parents[2]


# ---- migrate ----------------------------------------------------------------------------------


def migrate(dsn: str, settings: Settings, *, keep_policies: bool = False) -> list[str]:
    """Bring the schema to the newest version; returns the migrations that were applied.

    From zero and from any earlier state. Two migrates at once wait for each other. `keep_policies`
    leaves policies that are there as they are, for a command that does not know all settings.
    Raises: SetupError for a server that will not do, and for settings that would lose data.
    """
    wrong = check_retention(settings)
    if wrong:
        raise SetupError(f"These settings would lose data: {'; '.join(wrong)}.")
    with database.connect_now(dsn, "energy-platform migrate") as connection, _lock(connection):
        check_server(connection)
        recorded = _begin_release(connection)
        before = fetch_objects(connection) if recorded else {}
        applied = _apply_migrations(dsn)
        for path in sorted((_schema_folder() / "sql").glob("*.sql")):
            with connection.transaction():
                connection.execute(path.read_bytes())
        if not _trust_rollup(connection):
            connection.execute(_SQL["distrust_rollup"])
        if not (keep_policies and fetch_job_status(connection)):
            _check_kept(connection, settings)
            connection.execute(_SQL["reconcile_policies"], settings.retention._asdict())
        _finish_release(connection, before, recorded)
    return applied


def _check_kept(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """Refuse to drop, for want of a setting, what an earlier start was told to keep.

    Raises: SetupError where a retention becomes shorter by default, and what is there is older.
    """
    given = {
        "raw": (settings.raw_retention, settings.retention.raw_retention),
        "hourly": (settings.hourly_retention, settings.retention.hourly_retention),
    }
    for kind, (wish, retention) in given.items():
        if wish is not None:
            continue
        parameters = {"kind": kind, "retention": retention}
        row = connection.execute(_SQL["fetch_kept"], parameters).fetchone()
        if row is None:
            continue
        kept, oldest = row
        before = f"ENERGY_HOURLY_RETENTION=P{kept.days}D"
        if kind == "raw":
            before = f"ENERGY_LATE_WINDOW as before (P{(kept - timedelta(days=20)).days}D)"
        raise SetupError(
            f"There are {kind} data since {oldest:%Y-%m-%d}, kept for {kept.days} days so far; "
            f"with these settings those older than {retention.days} days would be dropped.",
            hint=f"set {before}, or ENERGY_{kind.upper()}_RETENTION=P{retention.days}D to let them "
            "go",
        )


def _trust_rollup(connection: psycopg.Connection[Any]) -> bool:
    """Whether answers may use the rollup: probed once for each version of TimescaleDB."""
    trusted = fetch_trusted(connection)
    if trusted is None:
        trusted = probe_rollup(connection)
        connection.execute(_SQL["add_probe"], {"trusted": trusted})
    if not trusted:
        _log.warning("rollup not trusted")
    return trusted


def probe_rollup(connection: psycopg.Connection[Any]) -> bool:
    """Whether this TimescaleDB's book-keeping marks a late row until it is refreshed.

    On a scratch hypertable, because it takes commits.
    """
    connection.execute(_SQL["drop_probe"])  # of a migrate that was killed
    try:
        connection.execute(_SQL["create_probe"])
        connection.execute(_SQL["refresh_probe"])
        seen = [connection.execute(_SQL["fetch_probe_dirty"]).fetchone()]
        connection.execute(_SQL["add_late_probe_row"])
        seen.append(connection.execute(_SQL["fetch_probe_dirty"]).fetchone())
        connection.execute(_SQL["refresh_probe"])
        seen.append(connection.execute(_SQL["fetch_probe_dirty"]).fetchone())
        return seen == [(False, False), (True, False), (False, False)]
    finally:
        connection.execute(_SQL["drop_probe"])


def fetch_trusted(connection: psycopg.Connection[Any]) -> bool | None:
    """What the probe of this version of TimescaleDB found; None: it was never probed."""
    row = connection.execute(_SQL["fetch_probe"]).fetchone()
    return None if row is None else bool(row[0])


@contextlib.contextmanager
def _lock(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute("SELECT pg_advisory_lock(%s)", (MIGRATE_LOCK,))
    try:
        yield
    finally:
        connection.execute("SELECT pg_advisory_unlock(%s)", (MIGRATE_LOCK,))


def check_server(connection: psycopg.Connection[Any]) -> None:
    """Create the extensions where they are missing. Raises: SetupError, in one sentence."""
    row = connection.execute(_SQL["fetch_server"]).fetchone()
    assert row is not None
    server_version, available, installed = row
    if server_version < POSTGRES_MIN * 10_000:
        raise SetupError(
            f"PostgreSQL {server_version // 10_000} is too old: {POSTGRES_MIN} or newer is needed."
        )
    if available is None:
        raise SetupError(
            "This server has no TimescaleDB: install TimescaleDB Community "
            f"{_dotted(TIMESCALEDB_MIN)} or newer and load it by shared_preload_libraries."
        )
    if _minor(installed or available) < TIMESCALEDB_MIN:
        raise SetupError(
            f"TimescaleDB {installed or available} is too old: {_dotted(TIMESCALEDB_MIN)} or newer "
            "is needed (ALTER EXTENSION timescaledb UPDATE, once the newer one is installed)."
        )
    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        connection.execute("CREATE EXTENSION IF NOT EXISTS btree_gist")
    except psycopg.Error as error:
        raise SetupError(f"The extensions cannot be created: {str(error).strip()}.") from error
    row = connection.execute("SELECT current_setting('timescaledb.license', true)").fetchone()
    if row is not None and row[0] == "apache":
        raise SetupError(
            "This TimescaleDB is the Apache edition, which has no continuous aggregates, no "
            "columnstore and no policies: the Community edition is needed (timescaledb.license = "
            "'timescale')."
        )


def fetch_untried(connection: psycopg.Connection[Any]) -> list[tuple[str, str, str]]:
    """What of the server is newer than what was tried: its name, its version, the newest tried."""
    row = connection.execute(_SQL["fetch_server"]).fetchone()
    assert row is not None
    server_version, _, installed = row
    untried = []
    if server_version // 10_000 > POSTGRES_TRIED:
        untried.append(("PostgreSQL", str(server_version // 10_000), str(POSTGRES_TRIED)))
    if _minor(installed) > TIMESCALEDB_TRIED:
        untried.append(("TimescaleDB", installed, _dotted(TIMESCALEDB_TRIED)))
    return untried


def _minor(version: str) -> tuple[int, ...]:
    """2.23 of 2.23.0-dev."""
    return tuple(int(part) for part in version.split("-")[0].split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _apply_migrations(dsn: str) -> list[str]:
    parameters = {key: value for key, value in conninfo_to_dict(dsn).items() if value is not None}
    name = parameters.pop("dbname", None)
    uri = DatabaseURI("postgresql+psycopg", None, None, None, None, name, parameters)
    backend = PostgresqlPsycopgBackend(uri, yoyo.migrations.default_migration_table)
    backend.init_database()
    try:
        # yoyo's lock is a row, which a kill -9 leaves behind. We hold the advisory lock, or on the
        # embedded engine the folder: nobody else can be migrating.
        backend.break_lock()
        migrations = yoyo.read_migrations(str(_schema_folder() / "migrations"))
        # yoyo prints what a SELECT of a migration returns.
        with backend.lock(), contextlib.redirect_stdout(io.StringIO()):
            outstanding = backend.to_apply(migrations)
            backend.apply_migrations(outstanding)
            return [migration.id for migration in outstanding]
    finally:
        backend.connection.close()


# ---- what there is ----------------------------------------------------------------------------

# Kind and name of each object of the schema, with its definition.
Objects = dict[tuple[str, str], str]


_PRINTED: Final = {"query": _SQL["fetch_objects"]}


class Release(msgspec.Struct):
    """The release that was applied last."""

    checksum: str
    is_whole: bool
    is_printed_alike: bool

    @property
    def is_comparable(self) -> bool:
        """Whether what it recorded can be compared with what there is now."""
        return self.is_whole and self.is_printed_alike


def compute_checksum() -> str:
    """What tells this release of migrations/ and sql/ from others."""
    digest = hashlib.sha256()
    for path in sorted(_schema_folder().glob("*/*.sql")):
        if path.parent.name in ("migrations", "sql"):
            digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def list_routines() -> set[str]:
    """The names of the functions that every migrate makes again."""
    files = (_schema_folder() / "sql").glob("*.sql")
    made = re.compile(r"^CREATE OR REPLACE (?:FUNCTION|PROCEDURE) (\w+)", re.M)
    return {name for path in files for name in made.findall(path.read_text("utf-8"))}


def fetch_release(connection: psycopg.Connection[Any]) -> Release | None:
    with connection.cursor(row_factory=class_row(Release)) as cursor:
        return cursor.execute(_SQL["fetch_release"], _PRINTED).fetchone()


def is_applied(connection: psycopg.Connection[Any]) -> bool:
    """Whether this release was ever migrated to here, to the end."""
    found = connection.execute(_SQL["fetch_is_applied"], {"checksum": compute_checksum()})
    return found.fetchone() is not None


def fetch_objects(connection: psycopg.Connection[Any]) -> Objects:
    """Everything that is in our schema now."""
    with connection.transaction(force_rollback=True):  # which undoes print_alike
        connection.execute(_SQL["print_alike"])
        rows = connection.execute(_SQL["fetch_objects"]).fetchall()
    return {(kind, name): definition for kind, name, definition in rows}


def fetch_recorded(connection: psycopg.Connection[Any]) -> Objects:
    """What the last migrate left."""
    rows = connection.execute(_SQL["fetch_recorded"]).fetchall()
    return {(kind, name): definition for kind, name, definition in rows}


def _begin_release(connection: psycopg.Connection[Any]) -> Objects:
    """What earlier migrates left; empty where that is no measure of what there is now.

    Until _finish_release another release than the last counts as not applied.
    """
    try:
        last = fetch_release(connection)
    except psycopg.errors.UndefinedTable:
        return {}
    if last is None or not last.is_comparable:
        return {}
    if last.checksum != (checksum := compute_checksum()):
        connection.execute(_SQL["add_release"], {"checksum": checksum, **_PRINTED})
    return fetch_recorded(connection)


def _finish_release(
    connection: psycopg.Connection[Any], before: Objects, recorded: Objects
) -> None:
    """Record what this migrate left.

    What it did not touch stays on record as it was: a change by hand does not become right by
    having been there when a migrate came by. Grants to everyone are never on record.
    """
    after = fetch_objects(connection)
    kept = {key for key in recorded.keys() | before.keys() if before.get(key) == after.get(key)}
    objects = {key: text for key, text in after.items() if key not in kept and _is_made(*key)}
    objects |= {key: text for key, text in recorded.items() if key in kept}
    columns = {
        "kinds": [kind for kind, _ in objects],
        "names": [name for _, name in objects],
        "definitions": list(objects.values()),
    }
    release = {"checksum": compute_checksum()}
    with connection.transaction():
        connection.execute(_SQL["record_objects"], columns)
        connection.execute(_SQL["add_release"], {**release, **_PRINTED})
        connection.execute(_SQL["finish_release"], release)


def _is_made(kind: str, name: str) -> bool:
    """Whether it is sql/60_roles.sql that a grant is there by, rather than a hand."""
    is_reset = " ON public." in name or " ON ROUTINE " in name
    return kind != "grant" or (is_reset and not name.endswith(" TO PUBLIC"))


def list_migrations() -> set[str]:
    """The ids of the migrations that this version of the program brings."""
    return {path.stem for path in (_schema_folder() / "migrations").glob("*.sql")}


def missing_migrations(connection: psycopg.Connection[Any]) -> set[str]:
    """Which migrations the database does not have yet."""
    try:
        applied = {row[0] for row in connection.execute(_SQL["fetch_applied"])}
    except psycopg.errors.UndefinedTable:
        applied = set()
    return list_migrations() - applied


async def check_ready(pool: database.Pool) -> dict[str, str]:
    """What `/health/ready` says of database, schema and jobs: "ok" or what is wrong.

    Raises: StorageError.
    """

    async def query(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
        try:
            cursor = await connection.execute(_SQL["fetch_applied"])
            missing = list_migrations() - {row[0] for row in await cursor.fetchall()}
        except psycopg.errors.UndefinedTable:
            missing = list_migrations()
        if not missing:
            release = {"checksum": compute_checksum()}
            cursor = await connection.execute(_SQL["fetch_is_applied"], release)
            missing = set() if await cursor.fetchone() is not None else {"sql/ of this release"}
        if missing:
            return {"database": "ok", "schema": f"needs migrate: {', '.join(sorted(missing))}"}
        async with connection.cursor(row_factory=class_row(JobStatus)) as jobs:
            await jobs.execute(_SQL["fetch_job_status"])
            failing = [job.title for job in await jobs.fetchall() if job.last_ok is False]
        return {
            "database": "ok",
            "schema": "ok",
            "jobs": f"failing: {', '.join(failing)}" if failing else "ok",
        }

    return await database.read(pool, query)


# ---- jobs -------------------------------------------------------------------------------------


class JobStatus(msgspec.Struct):
    """A policy and its last run, by whoever ran it."""

    job_id: int
    job: str
    relation: str | None
    schedule_interval: timedelta
    scheduled: bool
    last_started: datetime | None
    last_succeeded: datetime | None
    last_ok: bool | None
    last_error: str | None

    @property
    def title(self) -> str:
        return f"{self.job} {self.relation}" if self.relation else self.job


class JobRun(msgspec.Struct):
    """One run of a job by this process."""

    job_id: int
    job_name: str
    started_at: datetime
    finished_at: datetime
    succeeded: bool
    error: str | None = None


def fetch_job_status(connection: psycopg.Connection[Any]) -> list[JobStatus]:
    with connection.cursor(row_factory=class_row(JobStatus)) as cursor:
        return cursor.execute(_SQL["fetch_job_status"]).fetchall()


def run_due_jobs(
    connection: psycopg.Connection[Any],
    clock: Callable[[], datetime],
    *,
    run_all: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[JobRun]:
    """Run the jobs that are due, for an engine that has no background workers.

    In this order: hourly, daily, columnstore, retention. A failure is recorded and logged, and does
    not keep the others from running. `connection` is in autocommit mode; between two steps other
    clients of the one engine have their turn.
    """
    runs = []
    due = connection.execute(_SQL["fetch_due_jobs"], {"all": run_all, "now": clock()}).fetchall()
    for job_id, job, relation, end_offset in due:
        if stop():
            break
        if job == "policy_retention" and not _may_drop(connection, job_id):
            continue
        started_at = clock()
        error = None
        try:
            if job == "policy_refresh_continuous_aggregate":
                if not _refresh_dirty(connection, relation, end_offset, started_at, stop):
                    break  # not finished, so not recorded: retention relies on what is
            else:
                connection.execute("CALL run_job(%s)", (job_id,))
        except psycopg.DatabaseError as failure:
            if database.is_unavailable(failure):
                raise
            error = str(failure).strip()
        name = f"{job} {relation}" if relation else job
        run = JobRun(job_id, name, started_at, clock(), error is None, error)
        connection.execute(_SQL["add_job_run"], msgspec.structs.asdict(run))
        _log_run(run)
        runs.append(run)
    return runs


def _may_drop(connection: psycopg.Connection[Any], job_id: int) -> bool:
    """Whether a retention job may run: it is held back while a refresh is late or failing."""
    connection.execute("CALL hold_retention(0, '{}')")
    row = connection.execute(_SQL["fetch_job_scheduled"], {"job_id": job_id}).fetchone()
    return bool(row and row[0])


def _refresh_dirty(
    connection: psycopg.Connection[Any],
    rollup: str,
    end_offset: str,
    now: datetime,
    stop: Callable[[], bool],
) -> bool:
    """Refresh what is dirty, a chunk a call: one call over a year would block every client.

    Returns whether all of it was done before `stop`.
    """
    pieces = connection.execute(
        _SQL["fetch_dirty_pieces"],
        {
            "rollup": rollup,
            "bucket": DAILY if rollup.endswith("_daily") else HOURLY,
            "end_offset": end_offset,
            "now": now,
        },
    ).fetchall()
    for since, until in pieces:
        if stop():
            return False
        connection.execute(
            "CALL refresh_continuous_aggregate(%s::regclass, %s::timestamptz, %s::timestamptz)",
            (rollup, since, until),
        )
    return True


def vacuum(connection: psycopg.Connection[Any]) -> None:
    """What autovacuum does on a server, for the tables whose rows change."""
    connection.execute(_SQL["vacuum"])


def _log_run(run: JobRun) -> None:
    seconds = (run.finished_at - run.started_at).total_seconds()
    extra = {"job": run.job_name, "job_id": run.job_id, "seconds": seconds, "error": run.error}
    if run.succeeded:
        _log.info("job ran", extra=extra)
    else:
        _log.error("job failed", extra=extra)
