"""Is the account of a whole run exact, whatever the service does?

The service here is a small one of the tests' own, with the platform's decoder and a dictionary for
a memory, so that it can also break the contract: forget, be away, take what it must refuse.
"""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import pytest

from energy_platform.errors import Rejection, SetupError, UnreachableError
from energy_platform.readings import (
    Reading,
    TimeLimits,
    decode_array,
    decode_lines,
    decode_single,
)
from energy_platform.simulator import SimulationAccount, SimulationOptions, simulate
from energy_platform.simulator.account import FaultRow
from energy_platform.simulator.client import ATTEMPTS_MAX, Door, decode_answer
from energy_platform.simulator.faults import CUT_HALF, CUT_WHOLE, EXPECTED, PLAIN, VISIT, Body
from energy_platform.simulator.fleet import DAY, create_fleet, to_micros, to_text
from energy_platform.simulator.run import open_bar

START = datetime(2026, 3, 1, 10, 0, tzinfo=UTC)
LATE_WINDOW = timedelta(days=380)


@dataclass
class Service:
    """One HTTP server on loopback. `now` is its clock."""

    now: Callable[[], datetime]
    readings: dict[tuple[str, datetime], Reading] = field(default_factory=dict)
    assignments: list[dict[str, Any]] = field(default_factory=list)
    declared: dict[str, Any] = field(default_factory=dict)
    questions: int = 0
    posted: list[bytes] = field(default_factory=list)
    cut_short: int = 0
    # What it does wrong.
    forgets: Callable[[str, datetime], bool] = lambda device, at: False
    accepts: set[str] = field(default_factory=set)
    answer_first: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    breaks_performance_at: int | None = None
    key: str | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {
                    name.lower(): value
                    for name, value in (line.split(": ", 1) for line in head[1:] if line)
                }
                content = await reader.readexactly(int(headers.get("content-length", "0")))
                status, value, extra = self.answer(method, target, headers, content)
                body = json.dumps(value).encode()
                lines = {"Content-Length": str(len(body)), **extra}
                text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode() + body)
                await writer.drain()
        except asyncio.IncompleteReadError as error:
            self.cut_short += len(error.partial) > 0
        except OSError:
            pass
        finally:
            writer.close()

    def answer(
        self, method: str, target: str, headers: dict[str, str], content: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        address = urlsplit(target)
        query = dict(parse_qsl(address.query))
        path = address.path
        if path == "/health/live":
            return 200, {}, {}
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"code": "unauthorized", "detail": "A valid key is needed."}, {}
        if path == "/v1/ingest":
            self.posted.append(content)
            if self.answer_first:
                status, extra = self.answer_first.pop(0)
                return status, {"code": "queue_full", "detail": "Full."}, extra
            status, value = self.ingest(headers["content-type"], content)
            return status, value, {}
        if path == "/v1/assignments":
            if method == "PUT":
                status = self.assign(json.loads(content))
                return status, {}, {}
            items = [a for a in self.assignments if a["vehicleId"] == query["vehicleId"]]
            first = int(query.get("cursor", "0"))
            more = str(first + 2) if len(items) > first + 2 else None  # small pages, to have some
            return 200, {"items": items[first : first + 2], "nextCursor": more}, {}
        if method == "PUT":
            self.declared[path] = json.loads(content)
            return 201, self.declared[path], {}
        vehicle = path.rsplit("/", 1)[1]
        self.questions += 1
        if self.questions == self.breaks_performance_at:
            return 500, {"code": "internal"}, {}
        until = datetime.fromisoformat(query["until"])
        return 200, self.performance(vehicle, until, int(query["hours"])), {}

    def ingest(self, content_type: str, content: bytes) -> tuple[int, Any]:
        limits = TimeLimits.at(self.now(), LATE_WINDOW)
        if content_type == "application/x-ndjson":
            batch = decode_lines(content, limits, 10_000)
        elif content.startswith(b"["):
            batch = decode_array(content, limits, 10_000)
        else:
            outcome, code = self.take(decode_single(content, limits).readings[0])
            status = {"stored": 201, "duplicate": 200, "conflicting": 409, "rejected": 422}[outcome]
            return status, {"outcome": outcome} if status < 300 else {"code": code}
        counts = dict.fromkeys(("stored", "duplicate", "conflicting", "rejected"), 0)
        errors = []
        for index, reading in enumerate(batch.readings):
            outcome, code = self.take(reading)
            counts[outcome] += 1
            if outcome in ("conflicting", "rejected"):
                errors.append({"index": index, "outcome": outcome, "code": code, "path": "$"})
        value = {
            "received": len(batch.readings),
            **counts,
            "errors": errors[:100],
            "errorsOmitted": max(0, len(errors) - 100),
        }
        return 207 if errors else 200, value

    def take(self, reading: Reading | Rejection) -> tuple[str, str]:
        if isinstance(reading, Rejection):
            taken = reading.code in self.accepts
            return ("stored", "") if taken else ("rejected", reading.code)
        key = (reading.device_id, reading.ts)
        if key in self.readings:
            same = self.readings[key] == reading
            return ("duplicate", "") if same else ("conflicting", "conflicting")
        if not self.forgets(*key):
            self.readings[key] = reading
        return "stored", ""

    def assign(self, value: dict[str, Any]) -> int:
        def span(one: dict[str, Any]) -> tuple[datetime, datetime]:
            far = datetime(9999, 1, 1, tzinfo=UTC)
            until = one["until"]
            return (
                datetime.fromisoformat(one["since"]),
                far if until is None else datetime.fromisoformat(until),
            )

        names = ("meterId", "vehicleId", "since")
        same = [a for a in self.assignments if all(a[n] == value[n] for n in names)]
        begin, end = span(value)
        assert begin < end
        for other in self.assignments:
            if other in same:
                continue
            if other["meterId"] == value["meterId"] or other["vehicleId"] == value["vehicleId"]:
                since, until = span(other)
                if since < end and begin < until:
                    return 409
        if same:
            same[0]["until"] = value["until"]
            return 200
        self.assignments.append(value)
        return 201

    def performance(self, vehicle: str, until: datetime, hours: int) -> dict[str, Any]:
        since = until - timedelta(hours=hours)
        dc = ac = 0
        for device, at in self.readings:
            if not since <= at < until:
                continue
            dc += device == vehicle
            ac += any(
                a["vehicleId"] == vehicle
                and a["meterId"] == device
                and datetime.fromisoformat(a["since"]) <= at
                and (a["until"] is None or at < datetime.fromisoformat(a["until"]))
                for a in self.assignments
            )
        return {
            "vehicleId": vehicle,
            "totalKwhConsumedAc": 1.0,
            "totalKwhDeliveredDc": 0.9,
            "efficiencyRatio": 0.9,
            "averageBatteryTemp": None,
            "acReadings": ac,
            "dcReadings": dc,
            "acCoverage": 1.0,
            "dcCoverage": 1.0,
            "verdict": "ok",
        }


class Clock:
    """Stands still but for pauses, of which it keeps a list."""

    def __init__(self) -> None:
        self.at = START
        self.pauses: list[float] = []

    def now(self) -> datetime:
        return self.at

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.at += timedelta(seconds=seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[str]:
    """The address at which the service answers."""
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0)
        await server.wait_closed()


def run(
    service: Service, clock: Clock, stop_after: float | None = None, **more: Any
) -> tuple[SimulationAccount, str]:
    """A whole simulation against the service; `stop_after` sets the stop event at that time."""
    defaults: dict[str, Any] = {
        "meters": 4,
        "vehicles": 4,
        "batch": 200,
        "backfill": timedelta(hours=2),
        "duration": timedelta(0),
    }
    out = io.StringIO()

    async def go() -> SimulationAccount:
        stop = asyncio.Event()
        limit = None if stop_after is None else START + timedelta(seconds=stop_after)

        async def pause(seconds: float) -> None:
            await clock.pause(seconds)
            if limit is not None and clock.at >= limit:
                stop.set()

        async with serving(service) as url:
            options = SimulationOptions(url=url, **{**defaults, **more})
            return await simulate(options, now=clock.now, out=out, stop=stop, pause=pause)

    account = asyncio.run(go())
    assert account.sent == (
        account.stored + account.duplicate + account.conflicting + account.rejected + account.failed
    )
    return account, out.getvalue()


def row(account: SimulationAccount, fault: str) -> FaultRow:
    return next(row for row in account.faults if row.fault == fault)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Service:
    return Service(clock.now)


# --- Whole runs

FULL_DAY: dict[str, Any] = {
    "meters": 20,
    "vehicles": 20,
    "faults": True,
    "backfill": timedelta(hours=24),
    "interval": 300.0,
    "batch": 100,
}


def test_a_plain_run_stores_everything_and_loses_nothing(service: Service, clock: Clock) -> None:
    account, text = run(service, clock)
    assert account.sent == account.stored == account.checked == len(service.readings) == 8 * 120
    assert (account.lost, account.also_held, account.exit_status) == (0, 0, 0)
    assert [row.fault for row in account.faults] == [PLAIN]
    assert len(service.assignments) == 4
    assert "The worst of 4 vehicles" in text
    assert "as expected" in text


def test_every_injected_fault_ends_as_it_should(service: Service, clock: Clock) -> None:
    account, text = run(service, clock, **FULL_DAY)
    assert (account.lost, account.failed, account.also_held) == (0, 0, 0), text
    assert account.exit_status == 0, text
    assert {row.fault for row in account.faults} >= set(EXPECTED)
    for fault in account.faults:
        assert fault.injected > 0, fault
        assert fault.as_expected == fault.injected, fault
        assert not fault.otherwise, fault
    assert row(account, "impossible: in the future").codes == ("in_future",)
    assert account.checked == len(service.readings)


def test_a_second_run_over_the_same_hours_changes_nothing(service: Service, clock: Clock) -> None:
    run(service, clock, **FULL_DAY)
    readings = dict(service.readings)
    ledger = [dict(piece) for piece in service.assignments]
    account, text = run(service, clock, **FULL_DAY)
    assert service.readings == readings
    assert sorted(map(str, service.assignments)) == sorted(map(str, ledger))
    assert account.stored == 0
    assert (account.lost, account.exit_status) == (0, 0), text


def test_a_later_run_goes_on_where_the_first_one_ended(service: Service, clock: Clock) -> None:
    run(service, clock, **FULL_DAY)
    clock.at += timedelta(hours=5, microseconds=123_456)
    account, text = run(service, clock, **FULL_DAY)
    assert account.stored > 0
    assert account.duplicate > 0
    assert (account.lost, account.exit_status) == (0, 0), text


def test_an_earlier_start_than_the_known_assignment_fills_the_time_before(
    service: Service, clock: Clock
) -> None:
    run(service, clock)
    account, _ = run(service, clock, backfill=timedelta(hours=5))
    assert account.exit_status == 0
    assert len(service.assignments) == 8


# A small fleet with one vehicle that visits another charger.
SIX: dict[str, Any] = {"meters": 6, "vehicles": 6, "faults": True, "interval": 300.0}


def visit_of_six() -> datetime:
    fleet = create_fleet(SimulationOptions(url="", **SIX))
    (visitor,) = (vehicle for vehicle in fleet.vehicles if vehicle.guest_meter is not None)
    (begin,) = visitor.visits(to_micros(START), to_micros(START) + DAY)
    return datetime.fromisoformat(to_text(begin))


VISIT_BEGINS = visit_of_six()


@pytest.mark.parametrize(
    ("since_visit", "backfill", "visits"),
    [
        (timedelta(minutes=-1), timedelta(hours=2), 1),
        (timedelta(0), timedelta(hours=2), 1),
        (timedelta(minutes=30), timedelta(hours=2), 1),
        (timedelta(minutes=30), timedelta(0), 1),
        (timedelta(minutes=60), timedelta(hours=2), 0),
    ],
)
def test_a_visit_that_is_on_when_the_run_starts_counts_once(
    service: Service,
    clock: Clock,
    since_visit: timedelta,
    backfill: timedelta,
    visits: int,
) -> None:
    clock.at = VISIT_BEGINS + since_visit + backfill
    account, text = run(service, clock, **SIX, backfill=backfill, duration=timedelta(minutes=10))
    assert (account.lost, account.exit_status) == (0, 0), text
    assert row(account, VISIT).injected == row(account, VISIT).as_expected == visits
    guests = [piece for piece in service.assignments if "GUEST" in piece["meterId"]]
    assert len(guests) == visits


def test_live_begins_where_the_backfill_ends_and_the_visits_go_on(
    service: Service, clock: Clock
) -> None:
    clock.at = VISIT_BEGINS - timedelta(minutes=30)
    hours: dict[str, Any] = {"backfill": timedelta(hours=1), "duration": timedelta(hours=2)}
    account, text = run(service, clock, **SIX, **hours)
    assert (account.lost, account.exit_status) == (0, 0), text
    by_device: dict[str, list[datetime]] = {}
    for device, at in sorted(service.readings):
        by_device.setdefault(device, []).append(at)
    steady = 0
    for instants in by_device.values():
        steps = {b - a for a, b in pairwise(instants)}
        steady += steps == {timedelta(minutes=5)}
    assert steady >= len(by_device) - 2  # two devices have a gap
    assert row(account, VISIT).as_expected == 1


def test_an_unusual_interval_and_registers_are_declared(service: Service, clock: Clock) -> None:
    run(service, clock, interval=30.0, backfill=timedelta(minutes=5))
    assert len(service.declared) == 8
    assert {value["reportingInterval"] for value in service.declared.values()} == {"PT30S"}
    service.declared.clear()
    run(service, clock, meters=40, vehicles=40, backfill=timedelta(minutes=5))
    assert {value["energyKind"] for value in service.declared.values()} == {"register"}
    assert 1 <= len(service.declared) <= 20


def test_acknowledged_readings_that_are_gone_are_lost(service: Service, clock: Clock) -> None:
    def forgets(device: str, at: datetime) -> bool:
        return device in ("V-00002", "M-00003") and at.minute == 7

    service.forgets = forgets
    account, text = run(service, clock)
    assert account.stored == 960
    assert (account.lost, account.exit_status) == (4, 1)
    assert "lost" in text


def test_readings_of_meters_that_feed_nobody_are_looked_for_too(
    service: Service, clock: Clock
) -> None:
    account, _ = run(service, clock, meters=6, vehicles=2)
    assert (account.lost, account.checked, account.exit_status) == (0, 960, 0)

    clock.at += timedelta(days=2)
    service.forgets = lambda device, at: device == "M-00006" and at.minute == 7
    service.readings.clear()
    account, _ = run(service, clock, meters=6, vehicles=2)
    assert (account.lost, account.exit_status) == (2, 1)


def test_an_outcome_that_should_not_be_shows_in_its_row(service: Service, clock: Clock) -> None:
    service.accepts = {"out_of_range"}
    account, text = run(
        service, clock, meters=20, vehicles=20, faults=True, backfill=timedelta(hours=6)
    )
    wrong = {row.fault for row in account.faults if row.otherwise}
    assert {"impossible: negative energy", "impossible: soc 140"} <= wrong
    assert account.exit_status == 1
    assert "stored" in text


def test_after_503_the_same_bytes_come_again_when_asked(service: Service, clock: Clock) -> None:
    service.answer_first = [(503, {"Retry-After": "7"}), (503, {}), (503, {"Retry-After": "junk"})]
    account, text = run(service, clock, batch=9_000)
    assert len(service.posted) == 4
    assert len(set(service.posted)) == 1
    assert clock.pauses == [7.0, 1.0, 1.0]
    assert (account.stored, account.resent, account.lost, account.exit_status) == (960, 3, 0, 0)
    assert "sent again" in text


def test_a_body_that_is_never_answered_is_failed_and_not_forgotten(
    service: Service, clock: Clock
) -> None:
    service.answer_first = [(503, {"Retry-After": "1"})] * ATTEMPTS_MAX
    account, text = run(service, clock, batch=9_000)
    assert (account.failed, account.stored, account.lost, account.exit_status) == (960, 0, 0, 1)
    assert row(account, PLAIN).otherwise == {"failed": 960}
    assert "queue_full" in text


def test_a_service_that_stays_away_ends_the_run_with_its_account(
    service: Service, clock: Clock
) -> None:
    service.answer_first = [(503, {"Retry-After": "1"})] * 10_000
    account, _ = run(service, clock, batch=10, backfill=timedelta(hours=24), duration=None)
    assert 0 < account.failed == account.sent < 8 * 1440
    assert account.exit_status == 1


def test_what_cannot_be_looked_for_is_not_called_held(service: Service, clock: Clock) -> None:
    service.breaks_performance_at = 8
    account, text = run(service, clock)
    assert account.stored == 960
    assert account.exit_status == 1
    assert "lost is not known: V-0000" in text


def test_an_answer_that_is_no_account_of_the_body_is_a_failure(
    service: Service, clock: Clock
) -> None:
    service.answer_first = [(500, {})]
    account, _ = run(service, clock, batch=500)
    assert (account.failed, account.stored, account.exit_status) == (500, 460, 1)


def test_a_key_is_sent_and_a_missing_one_ends_the_run(service: Service, clock: Clock) -> None:
    service.key = "secret"
    account, _ = run(service, clock, key="secret", faults=True)
    assert account.exit_status == 0
    assert row(account, CUT_HALF).otherwise == {}
    assert row(account, CUT_WHOLE).otherwise == {}
    with pytest.raises(SetupError, match="401 unauthorized"):
        run(service, clock)


def test_nothing_at_the_address_is_said_at_once(clock: Clock) -> None:
    nobody = SimulationOptions(url="http://127.0.0.1:1", meters=20, vehicles=20)
    with pytest.raises(UnreachableError, match=r"no service answers at http://127\.0\.0\.1:1"):
        asyncio.run(simulate(nobody, now=clock.now, out=io.StringIO(), pause=clock.pause))
    assert clock.pauses == []


@pytest.mark.parametrize("cut", ["half", "whole"])
def test_a_body_that_was_cut_is_posted_again_as_it_was(
    service: Service, clock: Clock, cut: Literal["half", "whole"]
) -> None:
    fleet = create_fleet(SimulationOptions(url="", meters=5, vehicles=5))
    since = to_micros(START - timedelta(hours=1))
    lines = [device.line(at) for at, device in fleet.due(since, to_micros(START))]
    body = Body([(line, "", PLAIN) for line in lines], cut=cut)

    async def post() -> tuple[int, int]:
        async with serving(service) as url:
            async with aclosing(Door(SimulationOptions(url=url), clock.pause)) as door:
                answer = decode_answer(body, await door.post(body))
            assert answer is not None
            assert door.resent == 0
            return answer.stored, answer.duplicate

    stored, duplicate = asyncio.run(post())
    assert stored + duplicate == len(lines) == len(service.readings)
    if cut == "half":
        assert (service.cut_short, service.posted) == (1, [body.encode()])
        assert duplicate == 0
    else:
        assert (service.cut_short, service.posted) == (0, [body.encode()] * 2)
        assert stored == 0


def test_a_stop_ends_with_the_account_of_what_was_sent(service: Service, clock: Clock) -> None:
    # The pause after the first 503 brings the stop.
    service.answer_first = [(503, {"Retry-After": "5"})]
    account, _ = run(
        service, clock, stop_after=5, batch=50, backfill=timedelta(hours=24), duration=None
    )
    assert 0 < account.sent < 8 * 1440
    assert account.sent == account.stored == len(service.readings)
    assert (account.lost, account.also_held, account.exit_status) == (0, 0, 0)


def test_the_worst_vehicles_are_shown_every_minute_of_live(service: Service, clock: Clock) -> None:
    _, text = run(
        service, clock, watch=True, backfill=timedelta(hours=1), duration=timedelta(minutes=3)
    )
    assert text.count("The worst of 4 vehicles") == 3


# --- Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_stays_on_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with open_bar("back-fill", 1000, "readings") as bar:
        bar.update(100)
        bar.update(400)
    assert "back-fill:  50%" in terminal.getvalue()
    assert "500/1000 [" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1


def test_progress_is_lines_of_standard_error_elsewhere(
    service: Service, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    account, text = run(service, clock, backfill=timedelta(hours=1), duration=timedelta(minutes=1))
    out, err = capsys.readouterr()
    assert out == ""
    assert "back-fill:" not in text
    last: dict[str, tuple[int, str]] = {}
    for line in filter(None, err.splitlines()):
        found = re.fullmatch(r"(\S+): (\d+)/(\d+|\?) (\w+) \[.*\]", line)
        assert found, line
        last[f"{found[1]} {found[4]}"] = int(found[2]), found[3]
    assert list(last) == [
        "declare devices",
        "back-fill readings",
        "live readings",
        "check vehicles",
    ]
    assert last["check vehicles"] == (4, "4")
    assert last["live readings"][1] == "?"
    assert last["back-fill readings"][0] + last["live readings"][0] == account.sent
