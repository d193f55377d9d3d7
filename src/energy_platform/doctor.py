"""What is unsafe, late or changed by hand in a running system, each with reason and mend."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import psycopg

from energy_platform import database, schema
from energy_platform.errors import SetupError
from energy_platform.settings import Settings, check_retention

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))
_REFRESH: Final = "policy_refresh_continuous_aggregate"
_RETENTION: Final = "policy_retention"
_NAMED_MAX: Final = 5  # devices that a finding names
_HOUR: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)

MIGRATE: Final = "energy-platform migrate"
JOBS: Final = "energy-platform jobs"
ALL_JOBS: Final = "energy-platform jobs --all"


class Finding(NamedTuple):
    """One thing that is wrong, or with severity `remark` one that is only worth knowing."""

    part: str
    subject: str
    problem: str
    mend: str
    severity: Literal["fault", "remark"] = "fault"


Check = Callable[[psycopg.Connection[Any], Settings, datetime], Iterator[Finding]]


def examine(
    connection: psycopg.Connection[Any], settings: Settings, now: datetime
) -> list[Finding]:
    """All findings; empty where nothing is wrong."""
    try:
        schema.check_server(connection)
    except SetupError as error:
        return [Finding("Server", "server", str(error), error.hint or "use one that is supported")]
    findings = [
        Finding("Settings", "retention", problem, "change the setting")
        for problem in check_retention(settings)
    ]
    missing = schema.missing_migrations(connection)
    if missing:
        lacks = f"lacks {', '.join(sorted(missing))}"
        return [*findings, Finding("Schema", "migrations", lacks, MIGRATE)]
    for check in _CHECKS:
        try:
            with connection.transaction():
                findings += check(connection, settings, now)
        except psycopg.ProgrammingError as error:  # a name that it needs is not there
            part = check.__name__.removeprefix("_check_").capitalize()
            problem = f"cannot be examined: {str(error).partition(chr(10))[0]}"
            findings.append(Finding(part, "all of it", problem, "mend the schema, then look again"))
    return findings


# ---- Server and schema --------------------------------------------------------------------------


def _check_server(
    connection: psycopg.Connection[Any], _settings: Settings, _now: datetime
) -> Iterator[Finding]:
    for name, version, tried in schema.fetch_untried(connection):
        yield Finding(
            "Server",
            name,
            f"{version} is newer than what was tried, {tried}",
            "nothing needs to be done; look at the release notes of the next energy-platform",
            "remark",
        )
    trusted = schema.fetch_trusted(connection)
    if trusted is None:
        yield Finding("Server", "TimescaleDB", "was updated and not probed since", MIGRATE)
    elif not trusted:
        yield Finding(
            "Server",
            "TimescaleDB",
            "keeps its books in a way we do not know: answers come from raw rows, slowly",
            f"use a version that is supported, then {MIGRATE}",
        )


def _check_schema(
    connection: psycopg.Connection[Any], _settings: Settings, _now: datetime
) -> Iterator[Finding]:
    """What is otherwise than the last migrate left it, by name."""
    release = schema.fetch_release(connection)
    if release is None or not release.is_whole:
        yield Finding("Schema", "migrate", "was cut off before its end", MIGRATE)
        return
    if release.checksum != schema.compute_checksum():
        problem = "the database was migrated by another release than this one"
        yield Finding("Schema", "sql/", problem, MIGRATE)
    if not release.is_printed_alike:
        problem = (
            "were recorded by another version of PostgreSQL, TimescaleDB or energy-platform, so "
            "that they cannot be compared"
        )
        yield Finding("Schema", "definitions", problem, MIGRATE)
        return
    live, recorded = schema.fetch_objects(connection), schema.fetch_recorded(connection)
    odd = {name for _, name in live.keys() ^ recorded.keys()}
    for kind, name in sorted(live.keys() | recorded.keys()):
        was, now = recorded.get((kind, name)), live.get((kind, name))
        if was == now or odd & _owners(kind, name):
            continue
        if was is None and kind in ("comment", "grant"):
            continue  # a comment does no harm; a grant is for _check_grants
        if was is None:
            problem, mend = "is unknown", _drop(kind, name)
        elif now is None:
            problem, mend = "is missing", _make(kind, name, was, recorded)
        else:
            problem, mend = "was changed", _change(kind, name, was, now)
            if kind == "column":
                problem = f"is {now}, was {was}"
        yield Finding("Schema", f"{kind} {name}", problem, mend)


def _owners(kind: str, name: str) -> set[str]:
    """What has this part: where that is missing or unknown itself, its parts go without saying."""
    if kind == "grant":
        return {re.sub(r".* ON (ROUTINE )?public\.(.*) TO \w+", r"\2", name)}
    if kind == "comment":
        name = name.partition(" ")[2]
        return {name, name.partition(".")[0]}
    is_part = kind in ("column", "constraint", "index", "trigger")
    return {name.partition(".")[0]} if is_part else set()


def _drop(kind: str, name: str) -> str:
    table, _, part = name.partition(".")
    match kind:
        case "column" | "constraint":
            return _psql(f"ALTER TABLE public.{table} DROP {kind.upper()} {part}")
        case "index":
            return _psql(f"DROP INDEX public.{part}")
        case "trigger":
            return _psql(f"DROP TRIGGER {part} ON public.{table}")
        case "function" | "procedure" | "aggregate":
            return _psql(f"DROP ROUTINE public.{name}")
        case "continuous aggregate":
            return _psql(f"DROP MATERIALIZED VIEW public.{name}")
    statement = f"{kind.upper()} public.{name}"
    return f"{_psql(f'DROP {statement}')}, or ALTER {statement} SET SCHEMA to one that is yours"


def _make(kind: str, name: str, was: str, recorded: schema.Objects) -> str:
    table, _, part = name.partition(".")
    match kind:
        case "column" if ("type", table) in recorded:
            return _psql(f"ALTER TYPE public.{table} ADD ATTRIBUTE {part} {was}")
        case "column":
            return _psql(f"ALTER TABLE public.{table} ADD COLUMN {part} {was}")
        case "constraint" | "index":
            return _psql(was)
        case "continuous aggregate":
            return (
                f"run its statement in migrations/ again, then {MIGRATE} and {ALL_JOBS}; what had "
                "been dropped of its raw readings is only in a backup"
            )
        case "table" | "type" | "aggregate":
            return f"restore it from a backup, or run its statement in migrations/, then {MIGRATE}"
    return _make_again(kind, name)


def _change(kind: str, name: str, was: str, now: str) -> str:
    table, _, part = name.partition(".")
    match kind:
        case "column":
            clauses = ", ".join(_alter_column(part, was, now))
            return _psql(f"ALTER TABLE public.{table} {clauses}")
        case "constraint":
            return _psql(f"ALTER TABLE public.{table} DROP CONSTRAINT {part}; {was}")
        case "index":
            return _psql(f"DROP INDEX public.{part}; {was}")
        case "table":
            clauses = ", ".join(sorted(set(was.split(", ")) - set(now.split(", "))))
            return _psql(f"ALTER TABLE public.{name} {clauses}")
        case "continuous aggregate":
            return _psql(
                f"ALTER MATERIALIZED VIEW public.{name} SET (timescaledb.materialized_only = false)"
            )
        case "view":
            return f"{MIGRATE}; where that fails, DROP VIEW public.{name} first"
    return _make_again(kind, name)


def _make_again(kind: str, name: str) -> str:
    if kind in ("function", "procedure") and name.partition("(")[0] not in schema.list_routines():
        where = f"kind = '{kind}' AND name = '{name}'"
        return _psql(f"SELECT definition FROM schema_fingerprint WHERE {where} \\gexec")
    return MIGRATE


_COLUMN = re.compile(
    r"(?P<type>.*?)(?: GENERATED AS IDENTITY)?(?P<needed> NOT NULL)?(?: DEFAULT (?P<default>.*))?",
    re.DOTALL,
)


def _alter_column(name: str, was: str, now: str) -> Iterator[str]:
    wanted, found = _COLUMN.fullmatch(was), _COLUMN.fullmatch(now)
    assert wanted is not None
    assert found is not None
    if wanted["type"] != found["type"]:
        yield f"ALTER {name} TYPE {wanted['type']} USING {name}::{wanted['type']}"
    if wanted["needed"] != found["needed"]:
        yield f"ALTER {name} {'SET' if wanted['needed'] else 'DROP'} NOT NULL"
    if wanted["default"] != found["default"]:
        default = wanted["default"]
        yield f"ALTER {name} {f'SET DEFAULT {default}' if default else 'DROP DEFAULT'}"


def _psql(statement: str) -> str:
    return f"in psql: {statement}"


# ---- Grants -------------------------------------------------------------------------------------


def _check_grants(
    connection: psycopg.Connection[Any], _settings: Settings, _now: datetime
) -> Iterator[Finding]:
    """What everyone, the reader or ingest may do beyond what sql/60_roles.sql grants."""
    recorded = schema.fetch_recorded(connection)
    wide: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, name in sorted(schema.fetch_objects(connection).keys() - recorded.keys()):
        if kind != "grant":
            continue
        grant, _, role = name.rpartition(" TO ")
        privilege, _, on = grant.partition(" ON ")
        if (privilege, on.partition(" ")[0]) not in (("USAGE", "SCHEMA"), ("CONNECT", "DATABASE")):
            wide[role, on].append(privilege)
    for (role, on), privileges in wide.items():
        may = ", ".join(privileges)
        yield Finding(
            "Grants", role, f"may {may} on {on}", _psql(f"REVOKE {may} ON {on} FROM {role}")
        )
    for role, attribute in connection.execute(_SQL["fetch_role_attributes"]):
        yield Finding("Grants", role, f"is {attribute}", _psql(f"ALTER ROLE {role} NO{attribute}"))
    for role, granted in connection.execute(_SQL["fetch_memberships"]):
        yield Finding(
            "Grants", role, f"is a member of {granted}", _psql(f"REVOKE {granted} FROM {role}")
        )


# ---- Policies and jobs --------------------------------------------------------------------------


def _check_policies(
    connection: psycopg.Connection[Any], settings: Settings, _now: datetime
) -> Iterator[Finding]:
    """The policies as they are in the database: safe, there, as set, and switched on."""
    unsafe = dict(_find_unsafe(connection, settings))
    for title, problem in unsafe.items():
        yield Finding("Policies", title, problem, MIGRATE)
    policies = connection.execute(_SQL["fetch_policies"], settings.retention._asdict()).fetchall()
    for title, wanted, wanted_every, job_id, config, every, scheduled in policies:
        if job_id is None:
            yield Finding("Policies", title, "is missing", MIGRATE)
            continue
        if wanted is None:
            delete = _psql(f"SELECT delete_job({job_id})")
            yield Finding("Policies", title, f"is none of ours: {config}", delete)
            continue
        different = [
            f"{key} is {config.get(key, 'not set')}, by the settings {value}"
            for key, value in wanted.items()
            if config.get(key) != value
        ]
        if every != wanted_every:
            different.append(f"runs every {_span(every)}, by the settings {_span(wanted_every)}")
        if different and title not in unsafe:
            yield Finding("Policies", title, "; ".join(different), _AS_SET)
        if not scheduled and not title.startswith(_RETENTION):
            switch_on = _psql(f"SELECT alter_job({job_id}, scheduled => true)")
            yield Finding("Policies", title, "is switched off", switch_on)


_AS_SET: Final = f"{MIGRATE}, or give doctor the settings that the service has"


def _find_unsafe(
    connection: psycopg.Connection[Any], settings: Settings
) -> Iterator[tuple[str, str]]:
    """Policies that lose data, with the reason: check_retention() for what there is."""
    for class_, chunk, raw, hourly, hourly_start, daily_start in connection.execute(
        _SQL["fetch_spans"]
    ):
        history = f"{class_}_telemetry_history"
        if chunk is not None and chunk != settings.chunk:
            wish = f"chunks are {_span(chunk)} wide, by the settings {_span(settings.chunk)}"
            yield history, wish
        if hourly_start is not None and hourly_start < settings.late_window + _HOUR:
            yield (
                f"{_REFRESH} {class_}_hourly",
                f"reaches {_span(hourly_start)} back, but readings may be "
                f"{_span(settings.late_window)} late: those would never be rolled up",
            )
        if raw and hourly_start and chunk and raw < hourly_start + chunk:
            yield (
                f"{_RETENTION} {history}",
                f"drops raw readings after {_span(raw)}, but the refresh of {class_}_hourly "
                f"reaches {_span(hourly_start)} back and a chunk is {_span(chunk)}: it would erase "
                "what is rolled up",
            )
        if hourly and daily_start and hourly < daily_start + _DAY:
            yield (
                f"{_RETENTION} {class_}_hourly",
                f"drops hours after {_span(hourly)}, but the refresh of {class_}_daily reaches "
                f"{_span(daily_start)} back: it would erase days",
            )
        elif hourly and raw and hourly <= raw:
            yield (
                f"{_RETENTION} {class_}_hourly",
                f"drops hours after {_span(hourly)}, raw readings after {_span(raw)}: nothing "
                "that can be cut by the hour would be left",
            )


def _check_jobs(
    connection: psycopg.Connection[Any], _settings: Settings, now: datetime
) -> Iterator[Finding]:
    jobs = schema.fetch_job_status(connection)
    held = sorted(job.title for job in jobs if job.job == _RETENTION and not job.scheduled)
    running = [job for job in jobs if job.scheduled]  # the others are the policies' matter
    if running and all(job.last_started is None for job in running):
        yield Finding("Jobs", "no job", "has ever run", _NO_WORKERS)
        return
    has_stale = False
    for job in running:
        if job.last_ok is False:
            problem = f"failed at {job.last_started:%F %H:%M}Z: {job.last_error}"
            mend = f"mend that, then {ALL_JOBS}"
        elif job.last_started is None:
            problem, mend = "has never run", JOBS
        elif now - job.last_started > 3 * job.schedule_interval:
            problem = (
                f"last ran {job.last_started:%F %H:%M}Z, {_span(now - job.last_started)} ago; "
                f"it is due every {_span(job.schedule_interval)}"
            )
            mend = _NO_WORKERS
        else:
            continue
        has_stale |= job.job in (_REFRESH, "hold_retention")
        yield Finding("Jobs", job.title, problem, mend)
    if held and not has_stale:
        row = connection.execute(_SQL["fetch_unrolled"], {"now": now}).fetchone()
        assert row is not None
        reason = f"what would be dropped is not rolled up ({row[0]} device hours)"
        if not row[0]:
            reason = "hold_retention has not let go of them yet"
        yield Finding("Jobs", ", ".join(held), f"held back: {reason}", ALL_JOBS)


_NO_WORKERS: Final = (
    f"{JOBS}; if it comes again, the service (embedded) or TimescaleDB's background workers "
    "(timescaledb.max_background_workers) do not run"
)


# ---- Rollups and storage ------------------------------------------------------------------------


def _check_rollups(
    connection: psycopg.Connection[Any], _settings: Settings, now: datetime
) -> Iterator[Finding]:
    for rollup, until in connection.execute(_SQL["fetch_ahead"], {"now": now}):
        bucket = "1 day" if rollup.endswith("_daily") else "1 hour"
        yield Finding(
            "Rollups",
            rollup,
            f"counts as rolled up until {until}, which is ahead: it was refreshed beyond now, and "
            "what comes in until then shows in it only after later refreshes",
            _psql(
                "UPDATE _timescaledb_catalog.continuous_aggs_watermark SET watermark = "
                f"_timescaledb_functions.to_unix_microseconds(date_bin('{bucket}', now(), 'epoch'))"
                f" WHERE mat_hypertable_id = hypertable_number('{rollup}')"
            ),
        )


def _check_storage(
    connection: psycopg.Connection[Any], settings: Settings, now: datetime
) -> Iterator[Finding]:
    after = settings.retention.columnstore_after
    parameters = {"now": now, "columnstore_after": after}
    for history, chunks, oldest in connection.execute(_SQL["fetch_row_chunks"], parameters):
        yield Finding(
            "Storage",
            history,
            f"{chunks} chunks are not compressed though older than {_span(after)}, the oldest of "
            f"{oldest:%F}",
            ALL_JOBS,
        )


# ---- Fleet --------------------------------------------------------------------------------------


class _Stamp(msgspec.Struct):
    timestamp: datetime


def _check_fleet(
    connection: psycopg.Connection[Any], _settings: Settings, now: datetime
) -> Iterator[Finding]:
    skewed = connection.execute(_SQL["fetch_skewed"], {"now": now}).fetchall()
    if skewed:
        named = [f"{device_id} by {hours} h" for device_id, hours in skewed]
        yield Finding(
            "Fleet",
            _count(len(skewed), "device"),
            f"behind by whole hours: {_name(named)}",
            "they send local time as if it were UTC: set the time zone or the offset they send",
        )
    ahead = [
        (_skew(payload, first_seen), device_id, readings)
        for device_id, readings, payload, first_seen in connection.execute(
            _SQL["fetch_in_future"], {"now": now}
        )
    ]
    if ahead:
        ahead.sort(key=lambda device: (-device[0], device[1]))
        named = [
            f"{device_id}{f' by {_span(skew)}' if skew else ''} ({_count(readings, 'reading')})"
            for skew, device_id, readings in ahead
        ]
        yield Finding(
            "Fleet",
            _count(len(ahead), "device"),
            f"refused as in_future within a day, ahead: {_name(named)}",
            "set their clocks, or the offset they send",
        )
    for class_, heard, silent, retired, longest, longest_since in connection.execute(
        _SQL["fetch_silent"], {"now": now}
    ):
        if silent:
            named = [
                f"{device_id} for {_span(now - since)}"
                for device_id, since in zip(longest, longest_since, strict=True)
            ]
            yield Finding(
                "Fleet",
                f"{silent} of {heard} {class_}",
                f"silent: {_name(named, silent)}",
                "look at the device and its gateway; GET /v1/quarantine?deviceId= shows whether it "
                "sends what is no reading",
            )
        if retired:
            yield Finding(
                "Fleet",
                f"{retired} of {heard} {class_}",
                "silent for over 30 days, so taken for retired",
                "nothing needs to be done",
                "remark",
            )


def _skew(payload: bytes, seen_at: datetime) -> timedelta:
    """How far ahead of its arrival a reading says it was made; 0 where it cannot be told."""
    try:
        return msgspec.json.decode(payload, type=_Stamp).timestamp - seen_at
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):  # a payload that is cut
        return timedelta(0)


_CHECKS: Final[tuple[Check, ...]] = (
    _check_server,
    _check_schema,
    _check_grants,
    _check_policies,
    _check_jobs,
    _check_rollups,
    _check_storage,
    _check_fleet,
)


# ---- Words --------------------------------------------------------------------------------------


def _name(named: list[str], count: int | None = None) -> str:
    """The first few, and how many there are besides."""
    more = (len(named) if count is None else count) - len(named[:_NAMED_MAX])
    return ", ".join(named[:_NAMED_MAX]) + (f" and {more} more" if more else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _span(span: timedelta) -> str:
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (timedelta(minutes=1), "min")):
        if span >= unit:
            return f"{round(span / unit, 1):g} {name}"
    return f"{span.total_seconds():g} s"
