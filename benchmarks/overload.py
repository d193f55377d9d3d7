"""What happens to a load that cannot be absorbed?

    python benchmarks/overload.py                      # the embedded engine, in a temporary folder
    python benchmarks/overload.py --database-url postgresql://postgres@127.0.0.1/postgres

Clients send their next body as soon as the last is answered; after a 503 they wait a second, as
Retry-After says, or rush on at once, as no device should. What may wait is bounded, so the rest is
refused, and memory stays as it is. Exactly what was acknowledged is stored: the run counts it in
the database, and fails if not.
"""

import sys
import time
from argparse import Namespace
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import psycopg

from harness import (
    Report,
    Service,
    Spread,
    argument_parser,
    fetch_row,
    open_service,
    parse_arguments,
)
from load import Answers, Bodies, Timeline, render_batches, render_now, start_load

DEVICES = 10_000
SAMPLE_SECONDS = 0.1
REFUSED = 503


class Scenario(NamedTuple):
    name: str
    connections: int
    body_readings: int
    settings: dict[str, Any]
    pause_seconds: float = 0  # after a 503

    @property
    def acknowledged(self) -> int:
        """The status that says all of a body is stored."""
        return 201 if self.body_readings == 1 else 200


SCENARIOS = (
    Scenario("single POSTs, default queue", 1000, 1, {}),
    Scenario("single POSTs, a queue of 500, heeding", 2000, 1, {"queue_readings_max": 500}, 1),
    Scenario("single POSTs, a queue of 500, rushing", 2000, 1, {"queue_readings_max": 500}),
    Scenario("bodies of 500, default queue, heeding", 1000, 500, {}, 1),
    Scenario("bodies of 500, default queue, rushing", 1000, 500, {}),
)


def watch_memory(service: Service, load: Future[Answers]) -> int:
    """The most resident memory of the service until the load ends."""
    most = 0
    while not load.done():
        most = max(most, service.usage().service_memory_bytes)
        time.sleep(SAMPLE_SECONDS)
    return most


def count_stored(dsn: str) -> int:
    with psycopg.connect(dsn) as db:
        count: int = fetch_row(
            db,
            "SELECT (SELECT count(*) FROM meter_telemetry_history)"
            " + (SELECT count(*) FROM vehicle_telemetry_history)",
        )[0]
    return count


def run_scenario(report: Report, arguments: Namespace, scenario: Scenario) -> None:
    size = scenario.body_readings
    timeline = Timeline(DEVICES)
    rounds: list[Answers] = []
    memory = []
    with open_service(arguments.database_url, **scenario.settings) as service:
        memory_at_start = service.usage().service_memory_bytes
        for _ in range(arguments.rounds):
            since = timeline.since
            bodies: Bodies = (
                partial(render_now, DEVICES)
                if size == 1
                else partial(render_batches, DEVICES, size, since)
            )
            load = start_load(
                f"{service.url}/v1/ingest",
                bodies,
                scenario.connections,
                seconds=arguments.seconds,
                pause_seconds=scenario.pause_seconds,
            )
            memory.append(watch_memory(service, load))
            answers = load.result()
            timeline.move(since, size * sum(map(len, answers.times.values())))
            if not {*answers.times} <= {scenario.acknowledged, REFUSED}:
                sys.exit(f"{scenario.name}: answers were {[*answers.times]}")
            rounds.append(answers)
        stored = count_stored(service.dsn)
    acknowledged = size * sum(answers.count(scenario.acknowledged) for answers in rounds)
    if acknowledged != stored:
        sys.exit(f"{scenario.name}: {acknowledged} acknowledged, but {stored} stored")
    rate = Spread.of(size * a.count(scenario.acknowledged) / a.seconds for a in rounds)
    share = Spread.of(a.count(REFUSED) / sum(map(len, a.times.values())) for a in rounds)
    p99 = Spread.of(a.percentile_ms(scenario.acknowledged, 99) for a in rounds)
    refused_p99 = Spread.of(a.percentile_ms(REFUSED, 99) for a in rounds)
    report.add_row(
        scenario.name,
        f"{scenario.connections:,}",
        f"{rate:,.0f}",
        f"{1 - share.median:.1%}",
        f"{share:.1%}",
        f"{p99:,.0f}",
        f"{refused_p99:,.0f}" if share.most else "",
        " → ".join(f"{bytes / 2**20:.0f}" for bytes in (memory_at_start, *memory)),
        f"{acknowledged:,} = {stored:,}",
        scenario=scenario.name,
        connections=scenario.connections,
        stored_rate=rate,
        refused_share=share,
        stored_p99_ms=p99,
        refused_p99_ms=refused_p99,
        memory_bytes_at_start=memory_at_start,
        memory_bytes_max_by_round=memory,
        acknowledged=acknowledged,
        stored=stored,
    )


def main() -> None:
    arguments = parse_arguments(argument_parser(__doc__))
    report = Report(__file__, "More than can be absorbed", arguments)
    report.say_shared(arguments)
    report.say(
        "Bodies that are taken (201, of many 200) and refused (503). After a 503, clients wait a "
        "second (heeding) or do not (rushing).\nMemory is the service's, in MB: at the start, then "
        "the most in each round."
    )
    report.open_table(
        "load", "connections", "readings/s stored", "taken", "refused", "p99 ms taken",
        "p99 ms refused", "memory", "acknowledged = stored",
    )  # fmt: skip
    for scenario in SCENARIOS:
        run_scenario(report, arguments, scenario)
    report.write()


if __name__ == "__main__":
    main()
