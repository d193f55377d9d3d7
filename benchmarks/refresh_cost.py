"""What readings that are late by hours cost the refresh, with the late lane and without it.

    python benchmarks/refresh_cost.py                  # the embedded engine, in a temporary folder
    python benchmarks/refresh_cost.py --database-url postgresql://postgres@127.0.0.1/postgres

The real Writer stores simulated days in which some devices are always late, each late reading as a
body of its own between the live ones; the real refreshes run as they fall due, by a clock that the
simulation moves. The rows are counted, not timed: what a refresh writes carries its transaction,
and the `readings` in it are the raw rows that were aggregated. They must be those of the hours that
were dirty before, by the fleet's own count. Only the seconds depend on the machine.

On a server the run makes a database of its own, and drops it.
"""

import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg

from energy_platform import ingest, schema
from energy_platform.readings import Batch, MeterReading, Reading, VehicleReading
from energy_platform.settings import Settings
from harness import Report, argument_parser, fetch_row, open_database, parse_arguments

HOUR = timedelta(hours=1)
QUARTER = timedelta(minutes=15)
BEGIN = datetime(2026, 2, 10, tzinfo=UTC)
DELAY_HOURS_MAX = 12
BODY_READINGS = 100  # of those on time

# ---- Fleets: which instants the late device number i reports at an instant --------------------

Send = Callable[[int, datetime, timedelta], Iterable[datetime]]


def send_none(number: int, at: datetime, interval: timedelta) -> Iterable[datetime]:
    return [at]


def send_same(number: int, at: datetime, interval: timedelta) -> Iterable[datetime]:
    return [at - 6 * HOUR]


def send_spread(number: int, at: datetime, interval: timedelta) -> Iterable[datetime]:
    return [at - _choose_hours(number)]


def send_bursts(number: int, at: datetime, interval: timedelta) -> Iterable[datetime]:
    away = _choose_hours(number)
    if (at - BEGIN - number * interval) % away:
        return []
    return [at - i * interval for i in range(away // interval)]


def _choose_hours(number: int) -> timedelta:
    """1, 6, 11, 4 ...: twelve devices have each of 1 to 12, and a few are far apart."""
    return (1 + 5 * number % DELAY_HOURS_MAX) * HOUR


class Scenario(NamedTuple):
    fleet: str
    send: Send
    has_lane: bool
    refresh_every: timedelta


SCENARIOS = [
    Scenario(fleet, send, has_lane, every)
    for fleet, send in (
        ("none is late", send_none),
        ("all late by 6 h", send_same),
        ("late by 1 to 12 h, each its own", send_spread),
        ("away for 1 to 12 h, then a burst", send_bursts),
    )
    for every in (QUARTER, HOUR)
    for has_lane in (False, True)
    if has_lane or send is not send_none
]


class Fleet:
    """Devices, every other one a meter; the first `late` of them report as the scenario says."""

    def __init__(self, devices: int, late: int, interval: timedelta, send: Send) -> None:
        self._devices = devices
        self._late = late
        self._interval = interval
        self._send = send
        self.rows: Counter[tuple[str, datetime]] = Counter()  # by class and hour

    async def post(self, writer: ingest.Writer, at: datetime) -> None:
        """All that is due at an instant, in one group of the writer."""
        late = [
            _read(number, ts)
            for number in range(self._late)
            for ts in self._send(number, at, self._interval)
            if ts >= BEGIN
        ]
        live = [_read(number, at) for number in range(self._late, self._devices)]
        bodies = [live[i : i + BODY_READINGS] for i in range(0, len(live), BODY_READINGS)]
        for i, reading in enumerate(late):
            bodies.insert(2 * i % len(bodies), [reading])
        await asyncio.gather(
            *(writer.record(Batch([b""] * len(body), [*body]), 100) for body in bodies)
        )
        self.rows.update((reading.kind, _hour_of(reading.ts)) for reading in live + late)


def _read(number: int, ts: datetime) -> Reading:
    if number % 2:
        return MeterReading(f"M-{number}", 0.1, 230.0, ts)
    return VehicleReading(f"V-{number}", 50.0, 0.09, 25.0, ts)


def _hour_of(instant: datetime) -> datetime:
    return instant.replace(minute=0, second=0, microsecond=0)


def plan_one_lane(
    submissions: Iterable[ingest.Submission], late_before: datetime
) -> list[list[ingest.Item]]:
    """The writer without the late lane: a group is one transaction."""
    return [
        [
            ingest.Item(submission, position, reading)
            for submission in submissions
            for position, reading in enumerate(submission.readings)
        ]
    ]


# ---- The run ----------------------------------------------------------------------------------


class Refresh(NamedTuple):
    """What the due refreshes of both classes did at an instant."""

    rows: int  # raw rows aggregated
    hours: float  # mean of the two classes
    seconds: float


def refresh(db: psycopg.Connection[Any], fleet: Fleet, now: datetime) -> Refresh | None:
    """Run what is due. None: nothing was."""
    rolled_until = _hour_of(now - Settings().refresh_end)
    dirty = [
        (kind, hour.astimezone(UTC))
        for kind in ("meter", "vehicle")
        for (hour,) in db.execute(
            "SELECT generate_series(lower(r), upper(r) - INTERVAL '1 us', '1 hour')"
            " FROM unnest(rollup_dirty_hours(%s, %s, %s)) r",
            (f"{kind}_hourly", BEGIN, rolled_until),
        )
        if hour < rolled_until
    ]
    (transaction,) = fetch_row(db, "SELECT pg_current_xact_id()::text::bigint")
    began = time.perf_counter()
    runs = schema.run_due_jobs(db, lambda: now)
    seconds = time.perf_counter() - began
    if not runs:
        return None
    assert all(run.succeeded for run in runs), [run.error for run in runs]
    rows = hours = 0
    for (table,) in db.execute(
        "SELECT format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name)"
        " FROM timescaledb_information.continuous_aggregates WHERE view_name LIKE '%_hourly'"
    ).fetchall():
        written = fetch_row(
            db,
            "SELECT coalesce(sum(readings), 0)::bigint, count(DISTINCT hour)"
            f" FROM {table} WHERE xmin::text::bigint > {transaction}",
        )
        rows += written[0]
        hours += written[1]
    assert rows == sum(fleet.rows[key] for key in dirty), "the dirty hours, all and only"
    return Refresh(rows, hours / 2, seconds)


async def simulate(
    dsn: str, fleet: Fleet, scenario: Scenario, interval: timedelta, hours: int
) -> list[Refresh]:
    """The refreshes of the last `hours`; before them time passes as long as the longest delay."""
    settings = Settings(refresh_every=scenario.refresh_every)
    ingest.plan_lanes = PLAN_LANES if scenario.has_lane else plan_one_lane
    refreshes = []
    now = BEGIN
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        # Workers of a server would run the refreshes as well, by another clock.
        db.execute("SELECT _timescaledb_functions.stop_background_workers()")
        schema.migrate(dsn, settings)
        db.execute(
            "SELECT delete_job(job_id) FROM job_status WHERE NOT"
            " coalesce(job LIKE 'policy_refresh%' AND relation LIKE '%_hourly', false)"
        )
        async with ingest.Writer(
            dsn, clock=lambda: now, refresh_end=settings.refresh_end
        ) as writer:
            while now < BEGIN + (DELAY_HOURS_MAX + hours) * HOUR:
                await fleet.post(writer, now)
                now += interval
                done = refresh(db, fleet, now)
                if done and now > BEGIN + DELAY_HOURS_MAX * HOUR:
                    refreshes.append(done)
    return refreshes


PLAN_LANES = ingest.plan_lanes


# ---- The table --------------------------------------------------------------------------------

COLUMNS = (
    "fleet", "late lane", "refresh every", "rows, median", "p95", "max", "of a day", "hours",
    "times", "s, median", "s, max",
)  # fmt: skip


def add_row(
    report: Report, scenario: Scenario, refreshes: list[Refresh], day_rows: float, hours: int
) -> None:
    rows = [run.rows for run in refreshes]
    seconds = [run.seconds for run in refreshes]
    f = {
        "fleet": scenario.fleet,
        "has_lane": scenario.has_lane,
        "refresh_every_minutes": scenario.refresh_every // timedelta(minutes=1),
        "refreshes": len(rows),
        "rows_median": statistics.median(rows),
        "rows_p95": statistics.quantiles(rows, n=20, method="inclusive")[-1],
        "rows_max": max(rows),
        "day_share_median": statistics.median(rows) / day_rows,
        "hours_median": statistics.median(run.hours for run in refreshes),
        "times_over": sum(rows) / (day_rows * hours / 24),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
    }
    report.add_row(
        scenario.fleet,
        "yes" if scenario.has_lane else "no",
        f"{f['refresh_every_minutes']} min",
        f"{f['rows_median']:,.0f}",
        f"{f['rows_p95']:,.0f}",
        f"{f['rows_max']:,}",
        f"{f['day_share_median']:.0%}",
        f"{f['hours_median']:g}",
        f"{f['times_over']:.1f}",
        f"{f['seconds_median']:.3f}",
        f"{f['seconds_max']:.3f}",
        **f,
    )


def main() -> None:
    parser = argument_parser(__doc__, is_timed=False)
    parser.add_argument("--devices", type=int, help="default: 1000; on the embedded engine 200")
    parser.add_argument("--late-percent", type=float, default=2)
    parser.add_argument("--interval", type=float, default=300, help="seconds, from reading to next")
    parser.add_argument("--hours", type=int, help="default: 24 (quick: 4)")
    parser.add_argument("--fleet", default="", help="only the fleets with this in their name")
    arguments = parse_arguments(parser)
    server = arguments.database_url
    arguments.devices = arguments.devices or (1000 if server else 200)
    arguments.hours = arguments.hours or (4 if arguments.quick else 24)
    arguments.late = round(arguments.devices * arguments.late_percent / 100)
    interval = timedelta(seconds=arguments.interval)
    if QUARTER % interval:
        sys.exit("--interval must divide 15 minutes, or no refresh falls due on time")
    day_rows = arguments.devices * (24 * HOUR / interval)

    report = Report(__file__, "What late readings cost the refresh", arguments)
    if not server:
        report.say("The engine ran without fsync, on which only the seconds depend.")
    report.say(
        f"{arguments.devices:,} devices, half of them meters, a reading every "
        f"{arguments.interval:g} s; {arguments.late} of them are late; "
        f"{arguments.hours} h counted after {DELAY_HOURS_MAX} h of warm-up.\n\n"
        "Raw rows aggregated per refresh (median, p95, max), the median as a part of the fleet's "
        "day and in\nhours, and how many times each row was aggregated in all. 1.0 is once, the "
        "least there can be."
    )
    report.open_table(*COLUMNS)
    scenarios = [scenario for scenario in SCENARIOS if arguments.fleet in scenario.fleet]
    for scenario in scenarios[-2:] if arguments.quick else scenarios:
        with open_database(server, migrate=False, fsync=False) as dsn:
            fleet = Fleet(arguments.devices, arguments.late, interval, scenario.send)
            refreshes = asyncio.run(simulate(dsn, fleet, scenario, interval, arguments.hours))
        add_row(report, scenario, refreshes, day_rows, arguments.hours)
    if not arguments.fleet:  # a part is not a result
        report.write()


if __name__ == "__main__":
    main()
