"""What Prometheus scrapes. Routes are labelled by their template, never by a path with an id.

Where several workers serve, a scrape is answered for all of them by the one that takes it. Each
keeps its metrics in files that the others read; what it counted before an answer was sent is there,
however it ends.
"""

import asyncio
import os
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)

from energy_platform.ingest import OUTCOMES, Writer

CONTENT_TYPE: Final = "text/plain; version=0.0.4"  # Litestar adds the charset
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WRITER_SECONDS: Final = 1.0  # the writer's own counts are this old at most

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the library's own name


def share_metrics(folder: str, worker: int) -> None:
    """Keep what this process will count in files of this folder, by the number of the worker.

    The next worker of that number goes on with them, so that no count is lost and their number does
    not grow. It must be called before `Metrics` are made.
    """
    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


def forget_gauges(folder: str, worker: int) -> None:
    """What is no count ends with the worker."""
    multiprocess.mark_process_dead(worker, folder)  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one service process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        readings = Counter(
            "energy_readings",
            "Readings by what became of them",
            ["outcome"],
            registry=self.registry,
        )
        self.readings = {outcome: readings.labels(outcome) for outcome in OUTCOMES}
        self.unknown_fields = Counter(
            "energy_unknown_fields", "Fields of readings not known here", registry=self.registry
        )
        self._requests = Counter(
            "energy_http_requests",
            "Requests by route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "energy_http_request_seconds",
            "Time to answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_readings = Gauge(
            "energy_queue_readings",
            "Readings waiting for the writer",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.queue_bytes = Gauge(
            "energy_queue_bytes",
            "Bytes of bodies waiting for the writer",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.transactions = Counter(
            "energy_transactions", "Committed transactions of the writer", registry=self.registry
        )
        self.transaction_readings = Counter(
            "energy_transaction_readings",
            "Readings settled in those transactions",
            registry=self.registry,
        )
        self._writer: Writer | None = None
        self._noted = (0, 0)  # transactions and their readings
        self._of_request: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        found = self._of_request.get((method, route, status))
        if found is None:
            found = self._requests.labels(method, route, status), self._seconds.labels(route)
            self._of_request[method, route, status] = found
        counter, histogram = found
        counter.inc()
        histogram.observe(seconds)

    async def follow(self, writer: Writer) -> None:
        """Take over the writer's own counts every second, for ever, and at each scrape."""
        self._writer = writer
        while True:
            self._note(writer)
            await asyncio.sleep(WRITER_SECONDS)

    def _note(self, writer: Writer) -> None:
        self.queue_readings.set(writer.queued_readings)
        self.queue_bytes.set(writer.queued_bytes)
        transactions, readings = self._noted
        self._noted = (writer.transactions, writer.transaction_readings)
        self.transactions.inc(self._noted[0] - transactions)
        self.transaction_readings.inc(self._noted[1] - readings)

    def render(self) -> bytes:
        if self._writer is not None:
            self._note(self._writer)
        if _FOLDER not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)
