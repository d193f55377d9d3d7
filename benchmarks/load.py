"""Readings of a fleet, and loads that wrk cannot make: paced, of a given size, of big bodies.

A load runs in a process of its own, over connections that are kept, and waits for every answer:
what was acknowledged can be counted to the last reading.
"""

import asyncio
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools
import uvloop

# ---- Readings ---------------------------------------------------------------------------------

STEP = timedelta(
    milliseconds=100
)  # from a device's reading to its next; single_post.lua has it too
REACH = timedelta(minutes=48)  # how far back a load begins

Bodies = Callable[[], Iterator[bytes]]


def order_devices(devices: int) -> list[int]:
    """Even numbers are meters, odd ones vehicles; the order has nothing to do with the ids."""
    return [i * 3571 % devices for i in range(1, devices + 1)]


class Timeline:
    """Instants that only go forward, within the last 50 minutes, for loads on one database."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self._until = datetime.min.replace(tzinfo=UTC)

    @property
    def since(self) -> datetime:
        """Where the next load begins."""
        now = datetime.now(UTC).replace(microsecond=0)
        return max(self._until, now - REACH)

    def move(self, since: datetime, readings: float) -> None:
        """A load that began at `since` sent so many, and perhaps some that were not answered."""
        self._until = since + (int(readings / self.devices) + 2) * STEP


def render_reading(device: int, kwh: float, instant: str) -> str:
    if device % 2 == 0:
        return (
            f'{{"meterId":"M-{device:05}","kwhConsumedAc":{kwh:.4f},"voltage":230.5,'
            f'"timestamp":"{instant}"}}'
        )
    return (
        f'{{"vehicleId":"V-{device:05}","soc":75.5,"kwhDeliveredDc":{kwh:.4f},'
        f'"batteryTemp":36.5,"timestamp":"{instant}"}}'
    )


def render_now(devices: int, readings: int | None = None) -> Iterator[bytes]:
    """Bodies of one reading of this very moment, of each device in turn."""
    for device in itertools.islice(itertools.cycle(order_devices(devices)), readings):
        yield render_reading(device, 0.1, datetime.now(UTC).isoformat()).encode()


def tell_instant(instant: datetime) -> bytes:
    """In UTC, ending with Z: not every peer knows offsets."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z").encode()


def render_batches(
    devices: int, size: int, since: datetime, key: str | None = None
) -> Iterator[bytes]:
    """Bodies of many: each of the next `size` devices, and all devices again a step later.

    With `key` a body is an object that holds the array by that name. All but the instants is made
    before the first body is asked for.
    """
    order = order_devices(devices)
    start, end = (f'{{"{key}":['.encode(), b"]}") if key else (b"[", b"]")
    templates = [
        start
        + ",".join(render_reading(d, d % 7 / 1e4, "@") for d in order[i : i + size]).encode()
        + end
        for i in range(0, devices, size)
    ]
    return (
        template.replace(b"@", tell_instant(since + step * STEP))
        for step in itertools.count()
        for template in templates
    )


# ---- The client -------------------------------------------------------------------------------


class Answers(NamedTuple):
    """How long a load took, and the seconds to each answer by its status."""

    seconds: float
    times: dict[int, list[float]]

    def count(self, status: int) -> int:
        return len(self.times.get(status, []))

    def percentile_ms(self, status: int, percent: int) -> float:
        times = self.times.get(status, [])
        if len(times) < 2:
            return 1e3 * sum(times)
        return 1e3 * statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


class _Connection(asyncio.Protocol):
    """A connection that is kept, with one request on it at a time."""

    def __init__(self, host: str, path: str) -> None:
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: "
        ).encode()
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None

    async def post(self, body: bytes) -> int:
        """The status of the answer, once all of it is there."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        return await self._answer

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        assert self._answer is not None
        self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server hung up"))

    def close(self) -> None:
        self._transport.close()


async def _send(
    url: str,
    bodies: Iterator[bytes],
    connections: int,
    seconds: float | None,
    rate: float | None,
    pause_seconds: float,
) -> Answers:
    place = urlsplit(url)
    assert place.hostname
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(connections):
        _, connection = await loop.create_connection(
            lambda: _Connection(place.netloc, place.path), place.hostname, place.port or 80
        )
        opened.append(connection)
    numbered = enumerate(bodies)
    times: dict[int, list[float]] = {}
    began = time.perf_counter()

    async def work(connection: _Connection) -> None:
        while not seconds or time.perf_counter() - began < seconds:
            number, body = next(numbered, (0, b""))
            if not body:
                break
            due = time.perf_counter()
            if rate:
                due, now = began + number / rate, due
                await asyncio.sleep(due - now)
            status = await connection.post(body)
            times.setdefault(status, []).append(time.perf_counter() - due)
            if status == 503 and pause_seconds:
                await asyncio.sleep(pause_seconds)

    await asyncio.gather(*map(work, opened))
    took = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return Answers(took, times)


def _run_load(url: str, bodies: Bodies, *options: Any) -> Answers:
    return uvloop.run(_send(url, bodies(), *options))


def start_load(
    url: str,
    bodies: Bodies,
    connections: int,
    *,
    seconds: float | None = None,
    rate: float | None = None,
    pause_seconds: float = 0,
) -> Future[Answers]:
    """Post bodies over so many connections until they or the seconds end, every answer awaited.

    Each connection posts its next body when the last is answered; or, with a `rate` a second, when
    it is due, and from then on its time counts. `pause_seconds` is how long a connection waits that
    was answered 503. `bodies` is called in the new process, so it must be picklable.
    """
    return run_apart(_run_load, url, bodies, connections, seconds, rate, pause_seconds)


def run_apart(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function in a process of its own: it shares no interpreter with who waits."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future
