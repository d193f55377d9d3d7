"""An acknowledged reading survives kill -9, of the service and of the engine, under load."""

import itertools
import random
import threading
import time
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import psycopg
import pytest

from conftest import LONG
from energy_platform.embedded import running_dsn
from running import Platform

ROUNDS = 20 if LONG else 4
SENDERS = 4
READY_SECONDS_MAX = 60.0


class Sender(threading.Thread):
    """Posts small bodies until told to stop; keeps what was acknowledged. Resends what was not."""

    def __init__(self, number: int, platform: Platform, start: datetime) -> None:
        super().__init__(daemon=True)
        self.vehicle_id = f"V-{number}"
        self.acknowledged: set[datetime] = set()
        self.sent: set[datetime] = set()
        self._platform = platform
        self._start = start
        self._stopping = threading.Event()

    def run(self) -> None:
        sizes = random.Random(self.vehicle_id)
        counter = itertools.count()
        with httpx.Client(timeout=30) as client:
            while not self._stopping.is_set():
                # Some bodies hold one reading, some many.
                instants = [
                    self._start + timedelta(milliseconds=next(counter))
                    for _ in range(sizes.choice([1, 1, 1, 20]))
                ]
                self.sent.update(instants)
                self._send(client, instants)

    def _send(self, client: httpx.Client, instants: list[datetime]) -> None:
        body = msgspec.json.encode(
            [
                {
                    "vehicleId": self.vehicle_id, "soc": 50, "kwhDeliveredDc": 1,
                    "batteryTemp": 30, "timestamp": instant,
                }
                for instant in instants
            ]
        )  # fmt: skip
        while not self._stopping.is_set():
            try:
                answer = client.post(
                    f"{self._platform.url}/v1/ingest",
                    content=body,
                    headers={"content-type": "application/json"},
                )
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if answer.status_code == 200:
                account = answer.json()
                assert account["stored"] + account["duplicate"] == len(instants)
                self.acknowledged.update(instants)
                return
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            time.sleep(0.02)

    def finish(self) -> None:
        self._stopping.set()
        self.join(60)
        assert not self.is_alive()


def _await_progress(senders: list[Sender]) -> None:
    """Until every sender had an acknowledgement that it did not have before."""
    before = [len(sender.acknowledged) for sender in senders]
    deadline = time.monotonic() + READY_SECONDS_MAX
    while any(len(s.acknowledged) <= n for s, n in zip(senders, before, strict=True)):
        assert time.monotonic() < deadline, "no acknowledgement: the service did not recover"
        assert all(sender.is_alive() for sender in senders), "a sender saw a wrong answer"
        time.sleep(0.02)


def test_kill_9_of_service_and_engine_loses_and_doubles_nothing(platform: Platform) -> None:
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=50)
    senders = [Sender(number, platform, start) for number in range(SENDERS)]
    for sender in senders:
        sender.start()
    moments = random.Random(1)
    for round_number in range(ROUNDS):
        _await_progress(senders)
        time.sleep(moments.uniform(0, 0.3))  # so that the kill hits any moment of a commit
        if round_number % 2:
            platform.kill_engine()
        else:
            platform.kill_service()
            platform.start()
        _await_progress(senders)
    for sender in senders:
        sender.finish()

    dsn = running_dsn(platform.data_dir, database="energy_db")
    # Autocommit: an open transaction would keep the one engine from everybody else.
    with psycopg.connect(dsn, autocommit=True, options="-c timezone=UTC") as connection:
        for sender in senders:
            rows = connection.execute(
                "SELECT ts FROM vehicle_telemetry_history WHERE vehicle_id = %s",
                (sender.vehicle_id,),
            ).fetchall()
            held = [row[0] for row in rows]
            assert sender.acknowledged - set(held) == set(), "acknowledged, yet missing"
            assert len(held) == len(set(held)), "stored twice"
            assert set(held) <= sender.sent
            answer = httpx.get(
                f"{platform.url}/v1/analytics/performance/{sender.vehicle_id}"
            ).json()
            assert answer["dcReadings"] == len(held)
            assert answer["totalKwhDeliveredDc"] == pytest.approx(len(held), rel=1e-9)
            live = httpx.get(f"{platform.url}/v1/live/vehicles/{sender.vehicle_id}").json()
            assert datetime.fromisoformat(live["timestamp"]) == max(held)
