"""What Prometheus scrapes. Routes are labelled by their template, never by a path with an id."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from energy_platform.ingest import OUTCOMES, Writer

CONTENT_TYPE: Final = "text/plain; version=0.0.4"  # Litestar adds the charset
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


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

    def watch_writer(self, writer: Callable[[], Writer | None]) -> None:
        self.registry.register(_WriterCollector(writer))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _WriterCollector(Collector):
    """The writer's own counts, read when they are asked for."""

    def __init__(self, writer: Callable[[], Writer | None]) -> None:
        self._writer = writer

    def collect(self):  # type: ignore[no-untyped-def]
        writer = self._writer()
        if writer is None:
            return
        yield GaugeMetricFamily(
            "energy_queue_readings", "Readings waiting for the writer", writer.queued_readings
        )
        yield GaugeMetricFamily(
            "energy_queue_bytes", "Bytes of bodies waiting for the writer", writer.queued_bytes
        )
        yield CounterMetricFamily(
            "energy_transactions", "Committed transactions of the writer", writer.transactions
        )
        yield CounterMetricFamily(
            "energy_transaction_readings",
            "Readings settled in those transactions",
            writer.transaction_readings,
        )
