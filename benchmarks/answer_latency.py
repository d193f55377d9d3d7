"""How long does an answer take, next to what database and HTTP server can do by themselves?

    python benchmarks/answer_latency.py --database-url postgresql://postgres@127.0.0.1/postgres
    python benchmarks/answer_latency.py --peer http://127.0.0.1:3000/performance/{vehicle}

A fleet is seeded with 90 days in the order of arrival, and random vehicles of it are asked for,
over HTTP by wrk. In the same rounds the function behind the answer is called by pgbench alone,
prepared and with the session's settings of the service, and a bare HTTP server answers next to
nothing: these are the ceilings. A peer is asked the same; its {vehicle} is V-S00001 to the last,
and to fill it is up to you.

Then other windows, series, pages of the fleet, and the pages of the database that an answer
touches, with a reading every 60 s and every 10 s: they are bounded by the hours, not by the rows.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psycopg

from energy_platform.database import complete_dsn
from harness import (
    HERE,
    Process,
    Report,
    Service,
    Spread,
    WrkRun,
    argument_parser,
    fetch_row,
    parse_arguments,
    run_wrk,
)
from seed import DEFAULT_STEPS, Fleet, newest_half_past, open_seeded, parse_steps

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
ANSWER = "/v1/analytics/performance/{vehicle}"
CALL = (
    "SELECT vehicle_id, since, until, total_kwh_consumed_ac, total_kwh_delivered_dc,"
    " efficiency_ratio, average_battery_temp, metered_kwh_delivered_dc, ac_readings, dc_readings,"
    " ac_coverage, dc_coverage, verdict, suspect_readings"
    " FROM vehicle_performance_v1({vehicle}, {since}, {until})"
)


def tell(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- Loads ------------------------------------------------------------------------------------

Load = Callable[[], WrkRun]


class Figures(NamedTuple):
    """Of the rounds of one load: requests a second, and milliseconds."""

    rate: Spread
    p50: Spread
    p99: Spread


def run_in_turn(loads: dict[str, Load], rounds: int) -> dict[str, Figures]:
    """Every load once a round, so that a slow minute of the machine is not one load's alone."""
    runs: dict[str, list[WrkRun]] = {name: [] for name in loads}
    for _ in range(rounds):
        for name, load in loads.items():
            runs[name].append(load())
    return {
        name: Figures(*(Spread.of(getattr(run, key) for run in done) for key in Figures._fields))
        for name, done in runs.items()
    }


def get(url: str, path: str, fleet: Fleet, connections: int, seconds: float) -> Load:
    env = {"PATH_TEMPLATE": path, "VEHICLES": str(fleet.devices)}
    return lambda: run_wrk("vehicle_path.lua", url, connections, seconds, env)


def call_function(dsn: str, fleet: Fleet, since: datetime, clients: int, seconds: float) -> Load:
    """The statement that the service sends, by pgbench; by this process where there is none."""
    run = run_pgbench if shutil.which("pgbench") else run_psycopg
    service_dsn = complete_dsn(dsn, "benchmark")
    return lambda: run(service_dsn, fleet, since, clients, seconds)


def run_pgbench(dsn: str, fleet: Fleet, since: datetime, clients: int, seconds: float) -> WrkRun:
    script = (
        f"\\set number random(1, {fleet.devices})\n"
        + CALL.format(
            vehicle="'V-S' || lpad((:number)::text, 5, '0')",
            since=f"'{tell(since)}'::timestamptz",
            until=f"'{tell(fleet.until)}'::timestamptz",
        )
        + ";\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "answer.sql").write_text(script)
        finished = subprocess.run(
            ["pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", "1",
             "-T", f"{seconds:g}", "-l", "-f", "answer.sql", dsn],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if finished.returncode:
            sys.exit(f"pgbench failed: {finished.stderr}")
        logs = [path.read_text() for path in Path(folder).glob("pgbench_log.*")]
    times = [int(line.split()[2]) / 1e3 for log in logs for line in log.splitlines()]
    return summarize(times, seconds)


def run_psycopg(dsn: str, fleet: Fleet, since: datetime, clients: int, seconds: float) -> WrkRun:
    query = CALL.format(vehicle="%s", since="%s", until="%s")

    def work(client: int) -> list[float]:
        times = []
        with psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as db:
            number = client
            while time.monotonic() < stop:
                number = (number * 7919 + 17) % fleet.devices
                began = time.perf_counter()
                db.execute(query, (f"V-S{number + 1:05}", since, fleet.until)).fetchall()
                times.append(1e3 * (time.perf_counter() - began))
        return times

    stop = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        return summarize([t for times in pool.map(work, range(clients)) for t in times], seconds)


def summarize(times: Sequence[float], seconds: float) -> WrkRun:
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return WrkRun(len(times) / seconds, percentiles[49], percentiles[98], {})


# ---- The tables -------------------------------------------------------------------------------


def measure_ceilings(
    dsn: str, service: Service, fleet: Fleet, arguments: argparse.Namespace, report: Report
) -> None:
    since, seconds = fleet.until - DAY, arguments.seconds
    path = f"{ANSWER}?hours=24&until={tell(fleet.until)}"
    with Process([sys.executable, str(HERE / "bare_app.py")]) as bare:
        loads = {}
        for c in (1, 64):
            loads[f"the service, c{c}"] = get(service.url, path, fleet, c, seconds)
            loads[f"bare HTTP server, c{c}"] = get(bare.url, path, fleet, c, seconds)
        for c in (1, 8, 16):
            name = f"the function alone, {c} client{'s' if c > 1 else ''}"
            loads[name] = call_function(dsn, fleet, since, c, seconds)
        if arguments.peer:
            place = urlsplit(arguments.peer.replace("{", "%7B").replace("}", "%7D"))
            origin = f"{place.scheme}://{place.netloc}"
            peer_path = arguments.peer.removeprefix(origin)
            for c in (1, 64):
                loads[f"the peer, c{c}"] = get(origin, peer_path, fleet, c, seconds)
        done = run_in_turn(loads, arguments.rounds)
    report.say("\n## A vehicle's last 24 hours, and the ceilings")
    report.open_table("24 h", "req/s", "p50 ms", "p99 ms", "rate / the service's")
    for name, figures in done.items():
        base = done["the service, c64" if has_many_clients(name) else "the service, c1"]
        ratio = figures.rate.median / base.rate.median
        tell_row(report, name, figures, f"{ratio:.2f}", ratio=ratio)


def has_many_clients(name: str) -> bool:
    return not name.endswith((", c1", ", 1 client"))


def tell_row(report: Report, name: str, figures: Figures, *cells: str, **more: object) -> None:
    report.add_row(
        name, f"{figures.rate:,.0f}", f"{figures.p50:.2f}", f"{figures.p99:.2f}", *cells,
        load=name, **figures._asdict(), **more,
    )  # fmt: skip


def measure_windows(
    service: Service, fleet: Fleet, arguments: argparse.Namespace, report: Report
) -> None:
    until = f"until={tell(fleet.until)}"
    paths = {
        f"{title}, c{c}": (f"{ANSWER}{suffix}", c)
        for title, suffix, connections in (
            ("1 h", f"?hours=1&{until}", (1, 64)),
            ("24 h", f"?hours=24&{until}", (1, 64)),
            ("7 d", f"?hours=168&{until}", (1, 64)),
            ("744 h", f"?hours=744&{until}", (1, 64)),
            ("series, 24 h by hours", f"/series?hours=24&{until}", (1, 8)),
            ("series, 744 h by days", f"/series?hours=744&bucket=P1D&{until}", (1, 8)),
            ("series, 744 h by hours", f"/series?hours=744&{until}", (1,)),
        )
        for c in connections
    }
    loads = {
        name: get(service.url, path, fleet, c, arguments.seconds)
        for name, (path, c) in paths.items()
    }
    report.say("\n## Other windows, and series")
    report.open_table("window", "req/s", "p50 ms", "p99 ms")
    for name, figures in run_in_turn(loads, arguments.rounds).items():
        tell_row(report, name, figures)


def measure_fleet(
    service: Service, fleet: Fleet, arguments: argparse.Namespace, report: Report
) -> None:
    until = f"hours=24&until={tell(fleet.until)}"
    loads = {
        f"{fleet.devices:,} vehicles, page of {limit}, c1": get(
            service.url, f"/v1/analytics/fleet?{until}&limit={limit}", fleet, 1, arguments.seconds
        )
        for limit in (50, 1000)
    }
    for name, figures in run_in_turn(loads, arguments.rounds).items():
        tell_row(report, name, figures)


BUFFER_HEAD = ("window", "reading every", "rows in it", "buffers touched", "raw rows alone")


def measure_buffers(dsn: str, fleet: Fleet, report: Report) -> None:
    """How many pages an answer touches, and how many its rows would."""
    interval = fleet.steps[0].interval
    rolled = fleet.until - HOUR * 1.5  # the seed ends at half past, and its rollup an hour before
    windows = {
        "1 h, cut": (fleet.until - HOUR, fleet.until),
        "24 h, cut": (fleet.until - DAY, fleet.until),
        "48 h, cut": (fleet.until - 2 * DAY, fleet.until),
        "24 h, whole hours": (rolled - DAY, rolled),
        "48 h, whole hours": (rolled - 2 * DAY, rolled),
    }
    with psycopg.connect(complete_dsn(dsn, "benchmark"), autocommit=True) as db:
        for title, (since, until) in windows.items():
            answers, raws = [], []
            for number in range(1, 21):
                vehicle = f"'V-S{number:05}'"
                call = CALL.format(
                    vehicle=vehicle, since=f"'{tell(since)}'", until=f"'{tell(until)}'"
                )
                answers.append(count_buffers(db, call))
                raws.append(sum(
                    count_buffers(
                        db,
                        f"SELECT sum({kwh}) FROM {name}_telemetry_history WHERE {name}_id ="
                        f" '{name[0].upper()}-S{number:05}' AND ts >= '{tell(since)}'"
                        f" AND ts < '{tell(until)}'",
                    )
                    for name, kwh in (("meter", "kwh_consumed_ac"), ("vehicle", "kwh_delivered_dc"))
                ))  # fmt: skip
            rows = 2 * ((until - since) // interval)
            touched, raw = statistics.mean(answers), statistics.mean(raws)
            report.add_row(
                title, f"{interval.total_seconds():g} s", f"{rows:,}", f"{touched:,.0f}",
                f"{raw:,.0f}", window=title, interval=interval.total_seconds(), rows=rows,
                buffers=touched, raw_buffers=raw,
            )  # fmt: skip


def count_buffers(db: psycopg.Connection[Any], query: str) -> int:
    """Shared pages that a statement touches, those of its functions too, once it is warm."""
    for _ in range(2):
        (plan,) = fetch_row(db, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")
    node = plan[0]["Plan"]
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--devices", type=int, help="vehicles; default: 1000; embedded, quick 100")
    parser.add_argument("--fleet", type=int, help="default: 10,000; embedded 1000, quick 0")
    parser.add_argument("--days", type=int, help="default: 90; quick 10")
    arguments = parse_arguments(parser)
    quick, server = arguments.quick, arguments.database_url
    usual = 1000 if server else 100
    devices = arguments.devices or (100 if quick else usual)
    large = 0 if quick else 10 * usual
    large = large if arguments.fleet is None else arguments.fleet
    days = arguments.days or (10 if quick else 90)
    until = newest_half_past()

    report = Report(__file__, "How long an answer takes", arguments)
    report.say(f"{devices:,} + {devices:,} devices, {days} days in daily chunks.")
    report.say_shared(arguments)
    fleet = Fleet(devices, days, until, parse_steps(DEFAULT_STEPS))
    with open_seeded(server, fleet) as dsn, Service(dsn) as service:
        measure_ceilings(dsn, service, fleet, arguments, report)
        measure_windows(service, fleet, arguments, report)
        report.say("\n## Pages of the fleet, 24 h")
        report.open_table("fleet", "req/s", "p50 ms", "p99 ms")
        measure_fleet(service, fleet, arguments, report)
    if large:
        # The night is young, so that there are not too many readings; the edges are a minute apart.
        early = until.replace(hour=2)
        fleet = Fleet(large, 1, min(early, until), parse_steps("0:60,900"))
        with open_seeded(server, fleet) as dsn, Service(dsn) as service:
            measure_fleet(service, fleet, arguments, report)
    report.say("\n## Pages of the database, 8 KiB each, that an answer touches")
    report.open_table(*BUFFER_HEAD)
    for seconds in (60, 10):
        fleet = Fleet(20 if quick else 100, 2, until, parse_steps(f"{seconds}"))
        with open_seeded(server, fleet) as dsn:
            measure_buffers(dsn, fleet, report)
    report.write()


if __name__ == "__main__":
    main()
