"""Fill a database with a fleet that has reported for as long as you say.

    python benchmarks/seed.py --database-url postgresql://postgres@127.0.0.1/energy --devices 1000 --days 90

The question it serves: what is an answer, or a day of ingest, like when there is much behind it?
The database is migrated first, and must hold no readings. It is left as the platform would have left
it by itself: rolled up, the older chunks compressed, the newest reading of each device live. The same
arguments give the same readings. The devices are M-S00001, V-S00001 and so on: no load of the other
benchmarks writes to them.

Rows are stored in the order in which they would have arrived: by time, then by device. Device by
device they would lie close together on disk, and every answer would look better than it is. They are
made where they are stored, by INSERT ... SELECT, a session for meters and one for vehicles. That
was as fast as COPY (0.42 against 0.49 million rows a second with one session each, two cores), and
holds on the embedded engine too, which has one session only.
"""  # noqa: E501

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import psycopg
from tqdm import tqdm

from energy_platform import schema
from energy_platform.database import connect_now
from energy_platform.settings import Settings
from harness import open_database

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
DEFAULT_STEPS = "2:60,30:900,3600"


class Step(NamedTuple):
    """How often devices have reported in the newest `days`; None: before that, too."""

    days: int | None
    interval: timedelta


class Era(NamedTuple):
    """A stretch of time in which every device reports once an interval."""

    since: datetime
    until: datetime
    interval: timedelta


class Fleet(NamedTuple):
    """What to fill a database with. A device is the same in a fleet of any size."""

    devices: int  # meters, and as many vehicles; each meter feeds one vehicle
    days: int  # whole UTC days before the one in which `until` is
    until: datetime
    steps: Sequence[Step]

    @property
    def since(self) -> datetime:
        return self.until.replace(hour=0, minute=0, second=0, microsecond=0) - self.days * DAY

    def eras(self) -> list[Era]:
        """Oldest first; each begins at midnight."""
        edges = [self.until]
        intervals = []
        for step in self.steps:
            begin = self.since if step.days is None else self.until - step.days * DAY
            begin = begin.replace(hour=0, minute=0, second=0, microsecond=0)
            edges.append(max(self.since, min(begin, edges[-1])))
            intervals.append(step.interval)
        edges[-1] = self.since
        pairs = zip(pairwise(edges), intervals, strict=True)
        eras = [Era(since, until, interval) for (until, since), interval in pairs]
        return [era for era in reversed(eras) if era.since < era.until]

    def readings(self) -> int:
        """Of both classes."""
        return sum(2 * self.devices * -(-(e.until - e.since) // e.interval) for e in self.eras())


# ---- What devices are like --------------------------------------------------------------------

# A vehicle plugs in once a day, charges at full power to 80 % and at 40 % of it to the end, and
# drives for the rest of the day. All of it is in closed form over the seconds since it plugged in,
# and a day ends in the state in which the next begins: no reading depends on another one.
CREATE_DEVICES = """
CREATE TEMPORARY TABLE IF NOT EXISTS seed_device AS
SELECT number, power_kw, capacity_kwh, efficiency, ambient, plug_in, phase,
       'M-S' || lpad(number::text, 5, '0') AS meter_id,
       'V-S' || lpad(number::text, 5, '0') AS vehicle_id,
       number %% 10 = 3 AS meter_is_register,
       number %% 10 = 7 AS vehicle_is_register,
       arrival_soc,
       (80 - arrival_soc) / 100 * capacity_kwh / power_kw * 3600 AS full_seconds,
       0.15 * capacity_kwh / (0.4 * power_kw) * 3600 AS slow_seconds
FROM generate_series(1, %(devices)s) AS number,
LATERAL (SELECT
  -- Fractions that look like chance: 0 to 1, by the golden ratio and by other irrational numbers.
  number * 0.6180339887 - floor(number * 0.6180339887) AS a,
  number * 0.7548776662 - floor(number * 0.7548776662) AS b,
  number * 0.5698402910 - floor(number * 0.5698402910) AS c) AS f,
LATERAL (SELECT
  (ARRAY[7.4, 11, 7.4, 11, 22])[1 + number %% 5]::float8 AS power_kw,
  (ARRAY[40, 52, 64, 77])[1 + number / 5 %% 4]::float8 AS capacity_kwh,
  (CASE WHEN number %% 33 = 5 THEN 0.70 + 0.13 * b ELSE 0.89 + 0.05 * b END)::float8 AS efficiency,
  (12 + 4 * c)::float8 AS ambient,
  floor(86400 * a)::float8 AS plug_in,
  (20 + 40 * b)::float8 AS arrival_soc,
  floor(60000 * c) * INTERVAL '1 ms' AS phase) AS d
"""

DECLARE_DEVICES = """
INSERT INTO meter (meter_id, energy_kind)
SELECT meter_id, CASE WHEN meter_is_register THEN 'register' ELSE 'interval' END
FROM seed_device;

INSERT INTO vehicle (vehicle_id, energy_kind)
SELECT vehicle_id, CASE WHEN vehicle_is_register THEN 'register' ELSE 'interval' END
FROM seed_device;

INSERT INTO charging_assignment (meter_id, vehicle_id, during)
SELECT meter_id, vehicle_id, tstzrange('2020-01-01Z', NULL) FROM seed_device ORDER BY number
"""

# The energy that has flowed into the battery since 2024, at an instant in seconds; a piece of it is
# what a reading of an interval device shows.
_KWH_AT = """(floor(({at} - plug_in - 1704067200) / 86400)
    * (power_kw * full_seconds + 0.4 * power_kw * slow_seconds)
  + power_kw * least({after}, full_seconds)
  + 0.4 * power_kw * least(greatest({after} - full_seconds, 0), slow_seconds)) / 3600"""

# What all devices did in a piece of time, in the order of time.
_READINGS = f"""
SELECT r.*, kwh_until - kwh_before AS kwh,
       (hashint8(number * 1000003::bigint + floor(seconds)::bigint) & 4095) / 4096.0::float8
         AS noise
FROM (
  SELECT *, {_KWH_AT.format(at="seconds", after="after")} AS kwh_until,
         {_KWH_AT.format(at="(seconds - step)", after="before")} AS kwh_before
  FROM (
    SELECT *, seconds - plug_in - 86400 * floor((seconds - plug_in) / 86400) AS after,
           seconds - step - plug_in - 86400 * floor((seconds - step - plug_in) / 86400) AS before
    FROM (
      SELECT d.*, tick + d.phase * least(1, step / 60) AS ts, step,
             extract(epoch FROM tick + d.phase * least(1, step / 60))::float8 AS seconds
      FROM generate_series(%(since)s::timestamptz, %(until)s::timestamptz - INTERVAL '1 us',
                           %(interval)s) AS tick,
           (VALUES (extract(epoch FROM %(interval)s::interval)::float8)) AS s (step),
           seed_device d
      ORDER BY tick, d.phase, d.number
      OFFSET 0
    ) t
    WHERE ts < %(until)s
    OFFSET 0
  ) u
  OFFSET 0
) r
"""

_RECEIVED_AT = "ts + (40 + 1900 * noise * noise) * INTERVAL '1 ms'"

# Values have the digits that devices send. A meter has a standby of 6 W.
MAKE_READINGS = {
    "meter": f"""
SELECT meter_id, ts,
       round(1e6 * CASE WHEN meter_is_register
                        THEN kwh_until / efficiency + 0.006 * (seconds - 1704067200) / 3600
                        ELSE kwh / efficiency + 0.006 * step / 3600 END) / 1e6,
       round(10 * (228 + 4 * noise)) / 10,
       {_RECEIVED_AT}
FROM ({_READINGS}) m""",
    "vehicle": f"""
SELECT vehicle_id, ts,
       round(100 * CASE
         WHEN after <= full_seconds THEN arrival_soc + (80 - arrival_soc) * after / full_seconds
         WHEN after <= full_seconds + slow_seconds
           THEN 80 + 15 * (after - full_seconds) / slow_seconds
         ELSE arrival_soc + (95 - arrival_soc) * (86400 - after)
                            / (86400 - full_seconds - slow_seconds) END) / 100,
       round(1e6 * CASE WHEN vehicle_is_register THEN kwh_until ELSE kwh END) / 1e6,
       round(100 * (ambient + 6 * sin((seconds / 86400 - 0.375) * 6.283185307)
         + power_kw * CASE WHEN after <= full_seconds THEN least(1, after / 3000)
                           ELSE greatest(0, 1 - (after - full_seconds) / 9000) END
         + 0.5 * noise)) / 100,
       {_RECEIVED_AT}
FROM ({_READINGS}) v""",
}

# The newest reading of each device. Sought in the newest interval only.
FILL_LIVE = {
    name: f"""
INSERT INTO {name}_live_status
SELECT DISTINCT ON ({name}_id) *, ts - %(interval)s
FROM {name}_telemetry_history WHERE ts >= %(until)s - 2 * %(interval)s
ORDER BY {name}_id, ts DESC"""
    for name in MAKE_READINGS
}


# ---- The run ----------------------------------------------------------------------------------


def seed(dsn: str, fleet: Fleet) -> None:
    """Raises: SystemExit where there are readings already."""
    said = print if not sys.stderr.isatty() else tqdm.write
    began = time.monotonic()

    def say(text: str) -> None:
        said(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr)

    schema.migrate(dsn, Settings(), keep_policies=True)
    with connect_now(dsn, "seed") as db:
        if db.execute("SELECT FROM meter_telemetry_history LIMIT 1").fetchone():
            sys.exit("There are readings in this database already: give a fresh one.")
        # Jobs that start by themselves would work on what is half there.
        db.execute("SELECT _timescaledb_functions.stop_background_workers()")
        try:
            _fill(dsn, db, fleet, say)
            run_jobs(db, fleet.until)
            say("rolled up and compressed")
        finally:
            db.execute("SELECT _timescaledb_functions.start_background_workers()")
        db.execute("VACUUM (ANALYZE)")
    say("done")


def _fill(dsn: str, db: psycopg.Connection[Any], fleet: Fleet, say: Any) -> None:
    eras = fleet.eras()
    for era in eras:
        say(f"{era.since:%Y-%m-%d} to {era.until:%Y-%m-%d %H:%M}: every {era.interval}")
    create_devices(db, fleet.devices)
    db.execute(DECLARE_DEVICES)
    with tqdm(total=fleet.readings(), unit=" readings", unit_scale=True, mininterval=1) as bar:

        def fill_history(name: str) -> None:
            with connect_now(dsn, f"seed {name}") as session:
                create_devices(session, fleet.devices)
                for era in eras:
                    for since, until in _days(era):
                        piece = {"since": since, "until": until, "interval": era.interval}
                        done = session.execute(
                            f"INSERT INTO {name}_telemetry_history {MAKE_READINGS[name]}", piece
                        )
                        bar.update(done.rowcount)
                session.execute(FILL_LIVE[name], {"until": fleet.until, "interval": era.interval})

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill_history, MAKE_READINGS))


def create_devices(db: psycopg.Connection[Any], devices: int) -> None:
    """Make ready, for this session, what MAKE_READINGS needs."""
    # A piece is sorted in memory, and nothing is compiled for it.
    db.execute("SET work_mem = '256MB'; SET jit = off")
    db.execute(CREATE_DEVICES, {"devices": devices})


def _days(era: Era) -> Iterator[tuple[datetime, datetime]]:
    """Pieces of an hour to a day, with not too many readings for one sort."""
    span = DAY if era.interval >= timedelta(minutes=5) else HOUR
    since = era.since
    while since < era.until:
        yield since, min(since + span, era.until)
        since += span


def run_jobs(db: psycopg.Connection[Any], now: datetime) -> None:
    """What the platform's jobs would have done by now: refresh, compress, drop what is too old."""
    for run in schema.run_due_jobs(db, lambda: now, run_all=True):
        if not run.succeeded:
            sys.exit(f"{run.job_name} failed: {run.error}")


@contextlib.contextmanager
def open_seeded(server: str | None, fleet: Fleet) -> Iterator[str]:
    """A new database with this fleet in it, in which nothing starts by itself any more."""
    with open_database(server) as dsn:
        seed(dsn, fleet)
        with connect_now(dsn, "benchmark") as db:
            db.execute("SELECT _timescaledb_functions.stop_background_workers()")
        yield dsn


def newest_half_past() -> datetime:
    """A window that ends here has half an hour raw at its beginning and an hour and a half at its
    end: the same work whatever the clock shows."""
    hour = (datetime.now(UTC) - HOUR / 2).replace(minute=0, second=0, microsecond=0)
    return hour + HOUR / 2


def parse_steps(text: str) -> list[Step]:
    """`2:60,30:900,3600`: every minute in the newest 2 days, every 15 in 30, each hour before."""
    steps = []
    for part in text.split(","):
        days, _, seconds = part.rpartition(":")
        steps.append(Step(int(days) if days else None, timedelta(seconds=float(seconds))))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database-url", default=os.environ.get("ENERGY_DATABASE_URL"))
    parser.add_argument("--devices", type=int, default=1000, help="meters, and as many vehicles")
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument(
        "--steps", default=DEFAULT_STEPS,
        help="DAYS:SECONDS of the newest days, the next ..., and SECONDS before; "
        "default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--until", type=datetime.fromisoformat, help="default: the newest half past"
    )
    arguments = parser.parse_args()
    if not arguments.database_url:
        parser.error("--database-url is needed, or ENERGY_DATABASE_URL")
    until = arguments.until or newest_half_past()
    seed(
        arguments.database_url,
        Fleet(arguments.devices, arguments.days, until, parse_steps(arguments.steps)),
    )


if __name__ == "__main__":
    main()
