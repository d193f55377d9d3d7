"""How many readings a second are stored when they come in bodies of many?

    python benchmarks/ingest_batch.py                  # the embedded engine, in a temporary folder
    python benchmarks/ingest_batch.py --database-url postgresql://postgres@127.0.0.1/postgres
    python benchmarks/ingest_batch.py --peer-batch-url http://127.0.0.1:3000/v1/ingest/batch \\
        --peer-batch-key readings                      # for bodies such as {"readings":[...]}

Clients are connections that post their next body when the last is answered. In turn with them the
writer's statements run alone, each body a transaction, on as many connections as the writer uses.
"""

import sys
from argparse import Namespace
from functools import partial

from bare_statement import run_statement
from energy_platform.settings import Settings
from harness import Report, Service, Spread, argument_parser, open_service, parse_arguments
from load import Answers, Timeline, render_batches, start_load

SIZES = (100, 500, 1000, 5000)
CLIENTS = (1, 2, 4)
DEVICES = 20_000  # of which the most clients have the largest bodies at once


def post_batches(
    url: str, timeline: Timeline, size: int, clients: int, seconds: float, key: str | None = None
) -> Answers:
    """Those of the service must say that all of a body was stored; a peer may refuse some."""
    since = timeline.since
    bodies = partial(render_batches, timeline.devices, size, since, key)
    answers = start_load(url, bodies, clients, seconds=seconds).result()
    timeline.move(since, size * sum(map(len, answers.times.values())))
    return answers


def count_rate(answers: Answers, size: int) -> float:
    """Readings a second that were taken."""
    taken = sum(len(times) for status, times in answers.times.items() if 200 <= status < 300)
    return size * taken / answers.seconds


def compare(report: Report, arguments: Namespace, service: Service) -> None:
    columns = ["body", "clients", "service", "p99 ms", "bare statement", "service / statement"]
    if arguments.peer_batch_url:
        columns += ["peer", "service / peer"]
    report.open_table(*columns)
    url = f"{service.url}/v1/ingest"
    timeline, peer_timeline = Timeline(DEVICES), Timeline(DEVICES)
    post_batches(url, timeline, 1000, 2, arguments.seconds)  # warm-up
    for size in arguments.sizes:
        for clients in CLIENTS:
            rates, times, statement_rates, peer_rates = [], [], [], []
            for _ in range(arguments.rounds):
                answers = post_batches(url, timeline, size, clients, arguments.seconds)
                if [*answers.times] != [200]:
                    sys.exit(f"{url} was to store all, but answered {[*answers.times]}")
                rates.append(count_rate(answers, size))
                times.append(answers.percentile_ms(200, 99))
                statement_rates.append(
                    run_statement(
                        service.dsn,
                        timeline,
                        min(clients, Settings().writer_connections),
                        size,
                        arguments.seconds,
                    )
                )
                if arguments.peer_batch_url:
                    peer_answers = post_batches(
                        arguments.peer_batch_url,
                        peer_timeline,
                        size,
                        clients,
                        arguments.seconds,
                        arguments.peer_batch_key,
                    )
                    peer_rates.append(count_rate(peer_answers, size))
            figures = {
                "rate": Spread.of(rates),
                "p99_ms": Spread.of(times),
                "statement_rate": Spread.of(statement_rates),
                "statement_ratio": _compare(rates, statement_rates),
            }
            if peer_rates:
                figures["peer_rate"] = Spread.of(peer_rates)
                figures["peer_ratio"] = _compare(rates, peer_rates)
            cells = [
                format(figure, ".2f" if name.endswith("ratio") else ",.0f")
                for name, figure in figures.items()
            ]
            report.add_row(f"{size:,}", str(clients), *cells, size=size, clients=clients, **figures)


def _compare(ours: list[float], theirs: list[float]) -> Spread:
    return Spread.of(a / b if b else float("inf") for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[*SIZES], help="only these bodies; no result"
    )
    parser.add_argument("--peer-batch-url", metavar="URL", help="where a peer takes many readings")
    parser.add_argument(
        "--peer-batch-key", metavar="NAME", help='its bodies are {"NAME":[...]}, not arrays'
    )
    arguments = parse_arguments(parser)
    report = Report(__file__, "Bodies of many readings", arguments)
    report.say_shared(arguments)
    report.say(
        f"Readings a second. {DEVICES // 2:,} meters and {DEVICES // 2:,} vehicles, both in every "
        "body, each instant once, in the order of time.\n"
        "The bare statement stores each body as a transaction, on as many connections as the "
        f"service's writer has for so many clients, at most {Settings().writer_connections}."
    )
    with open_service(arguments.database_url) as service:
        compare(report, arguments, service)
    if arguments.sizes == [*SIZES]:  # a part is not a result
        report.write()


if __name__ == "__main__":
    main()
