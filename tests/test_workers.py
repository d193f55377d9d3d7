"""Do several processes of the service lose nothing, when one of them dies and when all end?"""

import asyncio
import itertools
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from energy_platform import access, workers
from energy_platform.http.metrics import Metrics, forget_gauges, share_metrics
from running import SECONDS_MAX, Served

Db = psycopg.Connection[Any]

VEHICLES = 3
SENDERS = 6  # two a vehicle, perhaps by different workers

# In one snapshot: vehicles whose live row is not the newest reading of their history.
BEHIND = """
SELECT h.vehicle_id, h.ts, l.ts
FROM (SELECT vehicle_id, max(ts) AS ts FROM vehicle_telemetry_history GROUP BY vehicle_id) h
LEFT JOIN vehicle_live_status l USING (vehicle_id)
WHERE l.ts IS DISTINCT FROM h.ts
"""


JSON = {"content-type": "application/json"}


def vehicle_reading(vehicle_id: str, instant: datetime) -> bytes:
    return msgspec.json.encode(
        {
            "vehicleId": vehicle_id, "soc": 50, "kwhDeliveredDc": 0.001, "batteryTemp": 30,
            "timestamp": instant,
        }
    )  # fmt: skip


class Sender(threading.Thread):
    """Posts single readings over a kept connection until told to stop; resends what got none."""

    def __init__(self, url: str, number: int, first: datetime) -> None:
        super().__init__(daemon=True)
        self.first = first
        self.vehicle_id = f"V-{number % VEHICLES}"
        self.acknowledged: set[datetime] = set()
        self.sent: set[datetime] = set()
        self.statuses: Counter[int] = Counter()
        self._url = url
        self._instants = (
            first + timedelta(milliseconds=count)
            for count in itertools.count(number // VEHICLES, SENDERS // VEHICLES)
        )
        self._stopping = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30, headers=JSON) as client:
            while not self._stopping.is_set():
                instant = next(self._instants)
                self.sent.add(instant)
                body = vehicle_reading(self.vehicle_id, instant)
                while not self._stopping.is_set():
                    try:
                        answer = client.post("/v1/ingest", content=body)
                    except httpx.TransportError:
                        time.sleep(0.01)
                        continue
                    assert answer.status_code in (200, 201, 503)
                    if answer.status_code != 503:
                        self.statuses[answer.status_code] += 1
                        self.acknowledged.add(instant)
                        break

    def finish(self) -> None:
        self._stopping.set()
        self.join(SECONDS_MAX)
        assert not self.is_alive()


def start_senders(url: str) -> list[Sender]:
    first = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=50)
    senders = [Sender(url, number, first) for number in range(SENDERS)]
    for sender in senders:
        sender.start()
    return senders


def await_progress(senders: list[Sender]) -> None:
    """Until every sender had some acknowledgements that it did not have before."""
    wanted = [len(sender.acknowledged) + 5 for sender in senders]
    deadline = time.monotonic() + SECONDS_MAX
    while any(len(s.acknowledged) < n for s, n in zip(senders, wanted, strict=True)):
        assert time.monotonic() < deadline, "no acknowledgement"
        assert all(sender.is_alive() for sender in senders), "a sender saw a wrong answer"
        time.sleep(0.01)


def check_history(db: Db, senders: list[Sender]) -> int:
    """Each acknowledged reading is there exactly once, and nothing that was not sent; how many."""
    held: Counter[tuple[str, datetime]] = Counter(
        db.execute("SELECT vehicle_id, ts FROM vehicle_telemetry_history").fetchall()
    )
    acknowledged = {(s.vehicle_id, instant) for s in senders for instant in s.acknowledged}
    assert acknowledged - held.keys() == set(), "acknowledged, yet missing"
    assert set(held.values()) == {1}, "stored twice"
    assert held.keys() <= {(s.vehicle_id, instant) for s in senders for instant in s.sent}
    assert db.execute(BEHIND).fetchall() == []
    return len(held)


def read_metrics(url: str) -> dict[str, float]:
    """What a scrape by a new connection answers, whichever worker takes it."""
    return read_lines(httpx.get(f"{url}/metrics", timeout=30).text)


def read_lines(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def await_answer_of(served: Served, pid: int) -> None:
    """Ask by new connections until this worker has answered one."""
    deadline = time.monotonic() + SECONDS_MAX
    while not served.logged("request", pid=pid):
        assert time.monotonic() < deadline, f"worker {pid} never answered"
        httpx.get(f"{served.url}/health/live", timeout=30)


def await_refused(port: int) -> None:
    """Until nobody listens there."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), SECONDS_MAX).close()
        except ConnectionError:
            return
        assert time.monotonic() < deadline, "somebody still listens"
        time.sleep(0.01)


@pytest.fixture
def served(dsn: str) -> Iterator[Served]:
    with Served(dsn, "--workers", "2") as running:
        running.await_logged("worker serves", 2)
        yield running


def test_kill_9_of_a_worker_loses_and_doubles_nothing(served: Served, db: Db) -> None:
    first = [line["worker_pid"] for line in served.logged("worker serves")]
    senders = start_senders(served.url)
    moments = random.Random(1)
    for number, pid in enumerate(first, 1):
        await_progress(senders)
        time.sleep(moments.uniform(0, 0.1))  # so that the kill hits any moment of a commit
        os.kill(pid, signal.SIGKILL)
        served.await_logged("worker died", 1, worker_pid=pid, exit_status=-signal.SIGKILL)
        await_progress(senders)  # the other one answers meanwhile
        assert db.execute(BEHIND).fetchall() == []
        served.await_logged("worker serves", 2 + number)
    for line in served.logged("worker serves")[2:]:
        await_answer_of(served, line["worker_pid"])
    await_progress(senders)
    for sender in senders:
        sender.finish()

    held = check_history(db, senders)
    # What was acknowledged was counted before, by a worker that may be dead since.
    scrapes = [read_metrics(served.url) for _ in range(6)]
    statuses = sum((sender.statuses for sender in senders), Counter[int]())
    for metrics in scrapes:
        stored = metrics['energy_readings_total{outcome="stored"}']
        assert statuses[201] <= stored <= held
        assert metrics['energy_readings_total{outcome="duplicate"}'] >= statuses[200]
        assert {n: v for n, v in metrics.items() if n.startswith("energy_readings")} == {
            n: v for n, v in scrapes[0].items() if n.startswith("energy_readings")
        }
    deadline = time.monotonic() + SECONDS_MAX  # a gauge of another worker is a second old
    while read_metrics(served.url)["energy_queue_readings"]:
        assert time.monotonic() < deadline, "a dead worker's queue is still told"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_workers_once_they_have_answered(
    served: Served, db: Db, number: signal.Signals
) -> None:
    senders = start_senders(served.url)
    await_progress(senders)
    with socket.create_connection(("127.0.0.1", served.port), SECONDS_MAX) as half:
        instant = senders[0].first - timedelta(seconds=1)
        body = vehicle_reading(senders[0].vehicle_id, instant)
        half.sendall(
            b"POST /v1/ingest HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        assert half.recv(1_000).startswith(b"HTTP/1.1 100")  # a worker waits for the body
        served.process.send_signal(number)
        await_refused(served.port)
        half.sendall(body)
        assert half.recv(1_000).startswith(b"HTTP/1.1 201")
        senders[0].sent.add(instant)
        senders[0].acknowledged.add(instant)
    assert served.process.wait(SECONDS_MAX) == 0
    for sender in senders:
        sender.finish()
    check_history(db, senders)
    assert not [line for line in served.lines if line["level"] == "ERROR"]
    assert served.messages == []


def test_workers_end_when_the_process_that_watches_them_is_killed(served: Served, db: Db) -> None:
    senders = start_senders(served.url)
    await_progress(senders)
    served.process.kill()
    served.process.wait()
    served.await_end()
    await_refused(served.port)
    for sender in senders:
        sender.finish()
    check_history(db, senders)


def test_a_second_service_does_not_join_in(served: Served, dsn: str) -> None:
    for options in (["--workers", "2"], []):
        with Served(dsn, *options, "--port", str(served.port)) as second:
            assert second.process.wait(SECONDS_MAX) == 2
    await_answer_of(served, served.logged("worker serves")[0]["worker_pid"])


def test_workers_that_cannot_start_end_the_service_with_a_reason(dsn: str) -> None:
    with Served(dsn, "--workers", "2", "--read-url", "nonsense") as served:
        assert served.process.wait(SECONDS_MAX) == 2
        served.await_logged("worker did not start", 1)
        assert "before it could serve, and no other serves" in "".join(served.messages)


def test_a_revoked_key_stops_at_every_worker(dsn: str, db: Db) -> None:
    key, secret = access.make_key("gateway", ["read"])
    access.add_key(db, key)
    header = {"authorization": f"Bearer {secret}"}
    with Served(dsn, "--workers", "2") as served:
        pids = {line["worker_pid"] for line in served.await_logged("worker serves", 2)}

        def await_status(status: int) -> None:
            deadline = time.monotonic() + SECONDS_MAX
            while not pids <= {line["pid"] for line in served.logged("request", status=status)}:
                assert time.monotonic() < deadline, f"not every worker answered {status}"
                httpx.get(f"{served.url}/v1/live/vehicles", headers=header, timeout=30)

        await_status(200)
        access.revoke_key(db, key.key_id)
        await_status(401)


def count_and_scrape(folder: str, number: int, queued: int, path: Path) -> None:
    """A worker that counts three readings and has some in its queue, and what it would answer."""
    share_metrics(folder, number)
    metrics = Metrics()
    metrics.readings["stored"].inc(3)
    metrics.queue_readings.set(queued)
    path.write_bytes(metrics.render())


def test_a_dead_workers_counts_stay_and_its_gauges_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    spawn = multiprocessing.get_context("spawn")

    def run(number: int, queued: int) -> list[float]:
        path = tmp_path / "answer"
        worker = spawn.Process(target=count_and_scrape, args=(str(folder), number, queued, path))
        worker.start()
        worker.join(SECONDS_MAX)
        found = read_lines(path.read_text("utf-8"))
        return [found['energy_readings_total{outcome="stored"}'], found["energy_queue_readings"]]

    assert run(0, queued=5) == [3, 5]
    assert run(1, queued=2) == [6, 7]
    forget_gauges(str(folder), 0)
    assert run(1, queued=1) == [9, 1]  # the next one in the place of the second
    assert run(0, queued=4) == [12, 5]
    assert len(list(folder.iterdir())) <= 6


# ---- Workers that do nothing but what the test wants -------------------------------------------


def talk_until_told(folder: Path, _number: int, line: workers.Line) -> None:
    """Serve; say it once more where the test wants silence, then stay without a word."""
    is_told = False
    while not is_told and line.say_alive():
        time.sleep(0.01)
        is_told = (folder / "silence").exists()
    if is_told:
        line.say_alive()
        time.sleep(SECONDS_MAX)


def fail_thrice(folder: Path, number: int, line: workers.Line) -> None:
    """Number 0 serves. Number 1 fails three times before it does, once number 0 is known to."""
    if number == 1:
        while not (folder / "go").exists():
            time.sleep(0.01)
        tries = len(list(folder.glob("try*")))
        if tries < 3:
            (folder / f"try{tries}").touch()
            raise SystemExit(7)
    while line.say_alive():
        time.sleep(0.01)


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of workers."""
    caplog.set_level(logging.INFO, "energy_platform.workers")
    return lambda: [record.getMessage() for record in caplog.records]


async def await_event(events: Callable[[], list[str]], event: str, count: int) -> None:
    for _ in range(int(SECONDS_MAX / 0.01)):
        if events().count(event) >= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not {count} times: {event}")


def test_a_worker_that_says_nothing_is_replaced(
    tmp_path: Path, events: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = tmp_path / "silence"

    def forget(_number: int) -> None:
        monkeypatch.setattr(workers, "SILENT_SECONDS_MAX", SECONDS_MAX)
        silence.unlink(missing_ok=True)

    async def scenario() -> None:
        kept = workers.Workers(partial(talk_until_told, tmp_path), 1, forget)
        keeping = asyncio.create_task(kept.keep())
        await await_event(events, "worker serves", 1)
        monkeypatch.setattr(workers, "SILENT_SECONDS_MAX", 0.2)
        silence.touch()
        await await_event(events, "worker serves", 2)
        signal.raise_signal(signal.SIGTERM)
        await keeping

    asyncio.run(scenario())
    assert events() == ["worker serves", "worker is silent", "worker died", "worker serves"]


def test_a_worker_that_cannot_start_is_tried_again_while_another_serves(
    tmp_path: Path, events: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PAUSE_SECONDS_MAX", 0.01)

    async def scenario() -> None:
        kept = workers.Workers(partial(fail_thrice, tmp_path), 2, lambda _: None)
        keeping = asyncio.create_task(kept.keep())
        await await_event(events, "worker serves", 1)
        (tmp_path / "go").touch()
        await await_event(events, "worker serves", 2)
        signal.raise_signal(signal.SIGTERM)
        await keeping

    asyncio.run(scenario())
    assert events() == ["worker serves", *["worker did not start"] * 3, "worker serves"]
