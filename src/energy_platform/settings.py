"""Every setting, in one struct: each option of the command line is also ENERGY_<OPTION>.

A typo or a bad value stops the start with its name. A command reads its own settings only, so a bad
value for another command does not stop it.
"""

import difflib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from energy_platform.errors import SetupError

PREFIX = "ENERGY_"
DATABASE_NAME = "energy_db"

_DATABASE = "up serve migrate doctor jobs dsn import export correct keys"
_SERVICE = "up serve"
_SCHEMA = "up serve migrate doctor"


def _meta(
    commands: str, description: str, *, name: str | None = None, **limits: Any
) -> msgspec.Meta:
    """`commands` read the setting; `name` is its option where the field's name is not."""
    return msgspec.Meta(
        description=description,
        extra={"commands": frozenset(commands.split()), "name": name},
        **limits,
    )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings with their defaults. Durations are ISO 8601, such as PT15M or P400D."""

    # Where the data is
    database_url: Annotated[
        str | None,
        _meta(
            _DATABASE,
            "TimescaleDB server to use instead of the embedded engine (libpq string or URL)",
        ),
    ] = None
    read_url: Annotated[
        str | None, _meta(_SERVICE, "read replica for analytics; default: the database itself")
    ] = None
    data_dir: Annotated[
        str,
        _meta(
            "up migrate doctor jobs dsn import export correct keys", "folder of the embedded engine"
        ),
    ] = "energy-data"
    embedded_fsync: Annotated[
        bool,
        _meta(
            "up migrate jobs import export correct keys",
            "flush every commit of the embedded engine to disk",
        ),
    ] = True
    dsn_role: Annotated[
        Literal["owner", "ingest", "reader"], _meta("dsn", "role to connect as", name="role")
    ] = "owner"

    # The HTTP service
    host: Annotated[str, _meta(_SERVICE, "address to listen on")] = "127.0.0.1"
    port: Annotated[
        int, _meta(_SERVICE, "port to listen on; 0 takes a free one", ge=0, le=65535)
    ] = 8080
    serve_role: Annotated[
        Literal["all", "ingest", "analytics"], _meta("serve", "route groups to serve", name="role")
    ] = "all"
    workers: Annotated[int, _meta("serve", "service processes", ge=1, le=64)] = 1
    writer_connections: Annotated[
        int, _meta(_SERVICE, "connections that each process writes with at most", ge=1, le=16)
    ] = 2
    reader_connections: Annotated[
        int, _meta(_SERVICE, "connections that each process reads with", ge=1, le=100)
    ] = 8
    queue_readings_max: Annotated[
        int, _meta(_SERVICE, "readings that may wait for the writer, then 503", ge=1)
    ] = 100_000
    queue_bytes_max: Annotated[
        int, _meta(_SERVICE, "bytes of bodies that may wait for the writer, then 503", ge=1)
    ] = 64 * 2**20
    body_bytes_max: Annotated[
        int, _meta(_SERVICE, "size of a body after decompression, then 413", ge=16 * 2**20)
    ] = 16 * 2**20
    body_readings_max: Annotated[
        int, _meta(_SERVICE, "readings in a body, then 413", ge=10_000)
    ] = 50_000
    bootstrap_key: Annotated[
        str | None,
        _meta("up serve migrate", "secret of the first API key, made where there is none yet"),
    ] = None
    demo: Annotated[bool, _meta("up", "also run a simulated fleet against the service")] = False

    # What is kept, and for how long
    late_window: Annotated[
        timedelta,
        _meta(
            "up serve migrate doctor import correct",
            "how old a reading may be; older ones are too_late",
        ),
    ] = timedelta(days=380)
    chunk: Annotated[timedelta, _meta(_SCHEMA, "time span of a chunk, in whole hours")] = timedelta(
        days=1
    )
    columnstore_after: Annotated[
        timedelta, _meta(_SCHEMA, "age at which chunks are compressed")
    ] = timedelta(days=3)
    refresh_start: Annotated[
        timedelta | None,
        _meta(
            _SCHEMA, "how far back the hourly rollup is refreshed; default: late window + 10 days"
        ),
    ] = None
    refresh_end: Annotated[
        timedelta, _meta(f"{_SCHEMA} correct", "age at which an hour is rolled up")
    ] = timedelta(hours=1)
    refresh_every: Annotated[
        timedelta, _meta(_SCHEMA, "how often the hourly rollup is refreshed")
    ] = timedelta(hours=1)  # as often as there is a new hour; more often only repeats late ones
    raw_retention: Annotated[
        timedelta | None,
        _meta(_SCHEMA, "age at which raw readings are dropped; default: late window + 20 days"),
    ] = None
    hourly_retention: Annotated[
        timedelta | None,
        _meta(
            _SCHEMA,
            "age at which hourly rollups are dropped; default: 3 years, or a year after raw",
        ),
    ] = None
    quarantine_retention: Annotated[
        timedelta, _meta(_SCHEMA, "how long quarantine is kept after it was last seen")
    ] = timedelta(days=30)
    quarantine_bytes_max: Annotated[
        int,
        _meta(_SCHEMA, "bytes that quarantine may take; what was last seen longest ago goes", ge=1),
    ] = 10 * 2**30

    # Clients of a running service
    url: Annotated[str, _meta("simulate", "base address of the service")] = "http://127.0.0.1:8080"
    key: Annotated[str | None, _meta("simulate", "API key to send")] = None
    meters: Annotated[int, _meta("simulate", "how many meters", ge=1)] = 200
    vehicles: Annotated[int, _meta("simulate", "how many vehicles", ge=1)] = 200
    interval: Annotated[
        float, _meta("simulate", "seconds between two readings of a device", gt=0)
    ] = 60.0
    backfill: Annotated[timedelta, _meta("simulate", "history to send first")] = timedelta(hours=24)
    duration: Annotated[
        timedelta | None, _meta("simulate", "how long to go on live; default: until stopped")
    ] = None
    faults: Annotated[bool, _meta("simulate", "also send what goes wrong in the field")] = False
    seed: Annotated[int, _meta("simulate", "of the random numbers")] = 1
    batch: Annotated[int, _meta("simulate", "readings in a body", ge=1, le=9_000)] = 1_000
    watch: Annotated[bool, _meta("simulate", "show the worst vehicles again every minute")] = False

    # Files in and out
    meter: Annotated[
        str | None,
        _meta(
            "import export correct",
            "whose history it is; import: also the meter that fed --vehicle",
        ),
    ] = None
    vehicle: Annotated[
        str | None,
        _meta(
            "import export correct",
            "whose history it is; import: also the vehicle that --meter fed",
        ),
    ] = None
    time_zone: Annotated[
        str | None, _meta("import", "IANA zone of a file in local time, such as Europe/Paris")
    ] = None
    since: Annotated[
        datetime | None,
        _meta(
            "import export correct",
            "first instant of the assignment, of what is exported, or corrected",
        ),
    ] = None
    until: Annotated[
        datetime | None,
        _meta(
            "import export correct",
            "end of the assignment, of what is exported, or corrected; default: open",
        ),
    ] = None
    at: Annotated[datetime | None, _meta("correct", "instant of the one reading to correct")] = None
    reason: Annotated[str | None, _meta("correct", "why, for those who ask later")] = None
    progress: Annotated[
        bool, _meta("import export", "show progress even where stderr is no terminal")
    ] = False

    # The tests
    test_database_url: Annotated[
        str | None, _meta("test", "server to run the tests on instead of the embedded engine")
    ] = None
    test_profile: Annotated[str, _meta("test", "quick or long")] = "quick"

    @property
    def retention(self) -> "Retention":
        refresh_start = self.refresh_start or self.late_window + timedelta(days=10)
        raw = self.raw_retention or self.late_window + timedelta(days=20)
        hourly = self.hourly_retention or max(timedelta(days=3 * 365), raw + timedelta(days=365))
        return Retention(
            chunk=self.chunk,
            columnstore_after=self.columnstore_after,
            raw_retention=raw,
            hourly_retention=hourly,
            refresh_start=refresh_start,
            refresh_end=self.refresh_end,
            refresh_every=self.refresh_every,
            quarantine_retention=self.quarantine_retention,
            quarantine_bytes_max=self.quarantine_bytes_max,
        )


class Retention(NamedTuple):
    """The arguments of reconcile_policies() in sql/50_policies.sql."""

    chunk: timedelta
    columnstore_after: timedelta
    raw_retention: timedelta
    hourly_retention: timedelta
    refresh_start: timedelta
    refresh_end: timedelta
    refresh_every: timedelta
    quarantine_retention: timedelta
    quarantine_bytes_max: int


def check_retention(settings: Settings) -> list[str]:
    """What is unsafe in how long things are kept, each with its reason; empty if nothing is."""
    retention = settings.retention
    hour = timedelta(hours=1)
    wrong = [
        f"{name} must be over 0"
        for name, span in {**retention._asdict(), "late_window": settings.late_window}.items()
        if isinstance(span, timedelta) and span <= timedelta(0)
    ]
    if retention.chunk < hour or retention.chunk % hour:
        wrong.append("chunk must be whole hours: an hour of the rollup may not span two chunks")
    if retention.refresh_end < hour:
        wrong.append("refresh_end must be at least PT1H: the hour that is running is not rolled up")
    if retention.refresh_start < settings.late_window + hour:
        wrong.append(
            "refresh_start must be over the late window, or late readings that are accepted never "
            "reach the rollup"
        )
    if retention.raw_retention < retention.refresh_start + retention.chunk:
        wrong.append(
            "raw_retention must be at least refresh_start and a chunk, or a refresh that reaches "
            "dropped chunks erases their rollup"
        )
    if retention.hourly_retention < retention.refresh_start + timedelta(days=3):
        wrong.append(
            "hourly_retention must be at least refresh_start and 3 days, or a refresh that reaches "
            "dropped hours erases their daily rollup"
        )
    if retention.hourly_retention <= retention.raw_retention:
        wrong.append(
            "hourly_retention must be over raw_retention, or nothing is left of what is dropped"
        )
    return wrong


class Option(NamedTuple):
    """One setting as the command line and the environment know it."""

    field: str
    name: str
    type: Any
    default: Any
    description: str
    commands: frozenset[str]

    @property
    def environment_name(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _list_options() -> tuple[Option, ...]:
    hints = get_type_hints(Settings, include_extras=True)
    options = []
    for field in msgspec.structs.fields(Settings):
        assert get_origin(hints[field.name]) is Annotated
        kind, *metas = get_args(hints[field.name])
        meta = next(meta for meta in metas if meta.extra is not None)
        options.append(
            Option(
                field.name,
                meta.extra["name"] or field.name,
                Annotated[kind, meta] if kind in (int, float) else kind,
                field.default,
                meta.description,
                meta.extra["commands"],
            )
        )
    return tuple(options)


OPTIONS = _list_options()


def load_settings(
    command: str, environment: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a command: what the command line gives, else the environment, else defaults.

    Raises: SetupError that names the setting and, for an unknown one, the nearest known.
    """
    known = {option.environment_name for option in OPTIONS}
    for name in environment:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`energy-platform --help` shows all"
            raise SetupError(f"There is no setting {name}.", hint=hint)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if command not in option.commands:
            continue
        if given and given.get(option.field) is not None:
            source, value = option.flag, given[option.field]
        elif environment.get(option.environment_name):
            source, value = option.environment_name, environment[option.environment_name]
        else:
            continue
        try:
            converted = msgspec.convert(value, option.type, strict=False)
            if isinstance(converted, timedelta) and converted < timedelta(0):
                raise msgspec.ValidationError("a duration is not negative")
            values[option.field] = converted
        except msgspec.ValidationError as error:
            example = "a duration is ISO 8601: PT15M, PT24H, P400D"
            raise SetupError(
                f"{source}={value!r} is not possible: {error}.",
                hint=example if "duration" in str(error) else None,
            ) from None
    return Settings(**values)
