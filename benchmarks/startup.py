"""How long from the start of the process to the first reading that is acknowledged?

    python benchmarks/startup.py                       # the embedded engine, in a temporary folder
    python benchmarks/startup.py --database-url postgresql://postgres@127.0.0.1/postgres

On a server: `serve` on a migrated database. Without one: `up` in a new folder, where the database
is made and migrated first, and `up` again in the same folder.
"""

import contextlib
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from harness import (
    START_SECONDS_MAX,
    Report,
    Service,
    Spread,
    argument_parser,
    open_database,
    parse_arguments,
)
from load import render_reading

PAUSE_SECONDS = 0.002


class Start(NamedTuple):
    seconds: float
    service_memory_bytes: int
    engine_memory_bytes: int | None


def time_start(service: Service) -> Start:
    """Start it, time its first acknowledgement, and stop it."""
    began = time.perf_counter()
    with contextlib.closing(service):
        service.launch()
        while not post_reading(service.port):
            service.check()
            if time.perf_counter() - began > START_SECONDS_MAX:
                sys.exit(f"the service acknowledges nothing:\n{service.read_log()}")
            time.sleep(PAUSE_SECONDS)
        seconds = time.perf_counter() - began
        service.wait_ready()
        usage = service.usage()
    return Start(seconds, usage.service_memory_bytes, usage.engine_memory_bytes)


def post_reading(port: int) -> bool:
    """Whether it was acknowledged; not, as long as nobody listens."""
    body = render_reading(0, 0.1, datetime.now(UTC).isoformat())
    with contextlib.closing(HTTPConnection("127.0.0.1", port)) as connection:
        try:
            connection.request("POST", "/v1/ingest", body, {"Content-Type": "application/json"})
        except ConnectionRefusedError:
            return False
        answer = connection.getresponse()
        if answer.status != 201:
            sys.exit(f"the first reading was answered by {answer.status}: {answer.read()!r}")
    return True


def start_often(arguments: Namespace) -> Iterator[tuple[str, Start]]:
    if arguments.database_url:
        with open_database(arguments.database_url) as dsn:
            for _ in range(arguments.rounds):
                yield "`serve`, migrated database", time_start(Service(dsn))
        return
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            yield "`up`, new folder", time_start(Service(data_dir=Path(folder)))
            yield "`up`, existing folder", time_start(Service(data_dir=Path(folder)))


def main() -> None:
    arguments = parse_arguments(argument_parser(__doc__))
    report = Report(__file__, "From start to the first reading", arguments)
    report.say(
        f"Median of {arguments.rounds} starts (least–most), the files in the system's cache.\n"
        "Memory is resident, right after the first reading."
    )
    report.open_table("start", "s to the first 201", "MB service", "MB embedded engine")
    starts = defaultdict[str, list[Start]](list)
    for name, start in start_often(arguments):
        starts[name].append(start)
    for name, rounds in starts.items():
        seconds = Spread.of(start.seconds for start in rounds)
        memory = Spread.of(start.service_memory_bytes / 2**20 for start in rounds)
        engines = [start.engine_memory_bytes for start in rounds if start.engine_memory_bytes]
        engine = Spread.of(bytes / 2**20 for bytes in engines) if engines else None
        report.add_row(
            name,
            f"{seconds:.2f}",
            f"{memory:.0f}",
            f"{engine:.0f}" if engine else "",
            start=name,
            seconds=seconds,
            service_memory_mb=memory,
            engine_memory_mb=engine,
        )
    report.write()


if __name__ == "__main__":
    main()
