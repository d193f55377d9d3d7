"""How many single POSTs a second are stored, and how far is that from what the parts can do?

    python benchmarks/ingest_single.py                 # the embedded engine, in a temporary folder
    python benchmarks/ingest_single.py --database-url postgresql://postgres@127.0.0.1/postgres
    python benchmarks/ingest_single.py --peer http://127.0.0.1:3000/v1/ingest

The ceilings and the peer take the same load as the service, in turn, round by round: the HTTP
server alone (bare_app.py), the writer's statements alone in transactions of the size that the
service's groups had (bare_statement.py), and the least writer that commits before it answers
(bare_writer.py). Then a fleet of 20,000 that reports once a minute, and all of it at once.
"""

import os
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bare_statement import run_statement
from harness import (
    Process,
    Report,
    Service,
    Spread,
    WrkRun,
    argument_parser,
    open_database,
    open_service,
    parse_arguments,
    run_wrk,
)
from load import Timeline, render_now, start_load

CONNECTIONS = (1, 8, 64, 1000)
DEVICES = 10_000  # of single_post.lua
FLEET_DEVICES = 20_000
FLEET_RATE = FLEET_DEVICES / 60
BURST_CONNECTIONS = 64


class Target(NamedTuple):
    """What a load is put on."""

    name: str
    url: str
    timeline: Timeline
    expected: Collection[int]

    def run(self, connections: int, seconds: float) -> WrkRun:
        since = self.timeline.since
        env = {"SINCE": f"{since.timestamp() * 1000:.0f}"}
        run = run_wrk(
            "single_post.lua", self.url, connections, seconds, env, expected=self.expected
        )
        self.timeline.move(since, sum(run.statuses.values()))
        return run


def run_service(
    target: Target, service: Service, connections: int, seconds: float
) -> tuple[WrkRun, float]:
    """Also how many readings the writer's transactions had, in the mean."""
    before = service.metrics()
    run = target.run(connections, seconds)
    after = service.metrics()
    readings, transactions = (
        after[name] - before[name]
        for name in ("energy_transaction_readings_total", "energy_transactions_total")
    )
    return run, readings / transactions


def compare(
    report: Report, arguments: Namespace, service: Service, target: Target, others: list[Target]
) -> None:
    """A table of the service and all that it is measured against, at each number of connections."""
    report.open_table("connections", "what", "a second", "p50 ms", "p99 ms", "service / it")
    for one in (target, *others):
        one.run(64, arguments.seconds)  # warm-up: the devices are registered, the plans made
    for connections in arguments.connections:
        runs = defaultdict[str, list[WrkRun]](list)
        groups = []
        statement_rates = []
        for _ in range(arguments.rounds):
            run, group = run_service(target, service, connections, arguments.seconds)
            runs[target.name].append(run)
            groups.append(group)
            statement_rates.append(
                run_statement(
                    service.dsn, target.timeline, 1, max(1, round(group)), arguments.seconds
                )
            )
            for other in others:
                runs[other.name].append(other.run(connections, arguments.seconds))
        rates = {name: [run.rate for run in of_name] for name, of_name in runs.items()}
        rates["bare statement"] = statement_rates
        for name, of_name in rates.items():
            rate = Spread.of(of_name)
            p50 = Spread.of(run.p50 for run in runs[name]) if runs[name] else None
            p99 = Spread.of(run.p99 for run in runs[name]) if runs[name] else None
            ratio = None
            label = name
            if name == target.name:
                label = f"**{name}**, groups of {Spread.of(groups):.1f}"
            else:
                pairs = zip(rates[target.name], of_name, strict=True)
                ratio = Spread.of(ours / theirs for ours, theirs in pairs)
            report.add_row(
                f"{connections:,}",
                label,
                f"{rate:,.0f}",
                f"{p50:,.2f}" if p50 else "",
                f"{p99:,.2f}" if p99 else "",
                f"{ratio:.2f}" if ratio else "",
                connections=connections,
                what=name,
                rate=rate,
                p50_ms=p50,
                p99_ms=p99,
                service_ratio=ratio,
                group_readings=Spread.of(groups) if name == target.name else None,
            )


def measure_fleet(report: Report, arguments: Namespace, service: Service, url: str) -> None:
    """What a fleet of 20,000 costs that reports once a minute."""
    seconds = 5 if arguments.quick else 30
    before = service.usage()
    answers = start_load(
        url,
        partial(render_now, FLEET_DEVICES, int(FLEET_RATE * seconds)),
        BURST_CONNECTIONS,
        rate=FLEET_RATE,
    ).result()
    after = service.usage()
    _require_stored(answers.times)
    whole = (os.cpu_count() or 1) * answers.seconds
    service_share = (after.service_cpu_seconds - before.service_cpu_seconds) / whole
    database_share = None
    if after.database_cpu_seconds is not None and before.database_cpu_seconds is not None:
        database_share = (after.database_cpu_seconds - before.database_cpu_seconds) / whole
    report.say(
        f"\n{FLEET_DEVICES:,} devices that report once a minute, as single POSTs for {seconds} s, "
        "due at even distances. CPU is a part of all cores; the database's is of all processes of "
        "the server."
    )
    report.open_table("what", "a second", "p50 ms", "p99 ms", "CPU service", "CPU database")
    report.add_row(
        "a fleet of 20,000",
        f"{answers.count(201) / answers.seconds:,.0f}",
        f"{answers.percentile_ms(201, 50):.1f}",
        f"{answers.percentile_ms(201, 99):.1f}",
        f"{service_share:.1%}",
        "not measured: another machine" if database_share is None else f"{database_share:.1%}",
        what="fleet",
        rate=answers.count(201) / answers.seconds,
        p50_ms=answers.percentile_ms(201, 50),
        p99_ms=answers.percentile_ms(201, 99),
        service_cpu_share=service_share,
        database_cpu_share=database_share,
    )


def measure_burst(report: Report, arguments: Namespace, url: str) -> None:
    """How long it takes until all of them are answered when they report at once."""
    runs = []
    for _ in range(arguments.rounds):
        bodies = partial(render_now, FLEET_DEVICES, FLEET_DEVICES)
        answers = start_load(url, bodies, BURST_CONNECTIONS).result()
        _require_stored(answers.times)
        runs.append(answers)
    seconds = Spread.of(run.seconds for run in runs)
    p99 = Spread.of(run.percentile_ms(201, 99) for run in runs)
    report.say(f"\nAll {FLEET_DEVICES:,} at once, over {BURST_CONNECTIONS} connections.")
    report.open_table("what", "s until all are stored", "p99 ms")
    report.add_row(
        "a burst of 20,000",
        f"{seconds:.2f}",
        f"{p99:.1f}",
        what="burst",
        seconds=seconds,
        p99_ms=p99,
    )


def _require_stored(times: dict[int, list[float]]) -> None:
    if {*times} != {201}:
        sys.exit(f"201 was expected, but: { {status: len(t) for status, t in times.items()} }")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[*CONNECTIONS], help="only these; no result"
    )
    arguments = parse_arguments(parser)
    server = arguments.database_url
    report = Report(__file__, "Single POSTs, stored before they are answered", arguments)
    report.say_shared(arguments)
    report.say(
        f"wrk with one thread; {DEVICES // 2:,} meters and {DEVICES // 2:,} vehicles in turn, "
        "each instant once, in the order of time.\n"
        "The bare statement has the transaction size of the service's groups in that round, on one "
        "connection."
    )
    here = Path(__file__).parent
    with (
        open_database(server, migrate=False) as bare_dsn,
        Process([sys.executable, str(here / "bare_app.py")]) as bare_app,
        Process(
            [sys.executable, str(here / "bare_writer.py")], ENERGY_DATABASE_URL=bare_dsn
        ) as bare_writer,
        open_service(server) as service,
    ):
        target = Target("service", f"{service.url}/v1/ingest", Timeline(DEVICES), {201})
        others = [
            Target(name, f"{process.url}/v1/ingest", Timeline(DEVICES), {201})
            for name, process in (("bare server", bare_app), ("bare writer", bare_writer))
        ]
        if arguments.peer:
            others.append(Target("peer", arguments.peer, Timeline(DEVICES), range(200, 300)))
        compare(report, arguments, service, target, others)
        measure_fleet(report, arguments, service, target.url)
        measure_burst(report, arguments, target.url)
    if arguments.connections == [*CONNECTIONS]:  # a part is not a result
        report.write()


if __name__ == "__main__":
    main()
