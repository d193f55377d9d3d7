"""Does the simulated fleet behave like a real one, and is the account of a run exact?

The service here is a small one of the tests' own, with the platform's decoder and a dictionary for
a memory, so that it can also break the contract: forget, be away, take what it must refuse.
"""

import asyncio
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from energy_platform.errors import Rejection, SetupError, UnreachableError
from energy_platform.progress import Progress
from energy_platform.readings import (
    Reading,
    TimeLimits,
    decode_array,
    decode_lines,
    decode_reading,
    decode_single,
)
from energy_platform.simulator import (
    ATTEMPTS_MAX,
    COUNTER_EPOCH_SECONDS,
    CUT_HALF,
    CUT_WHOLE,
    DAY,
    EXPECTED,
    GAP,
    HOUR,
    LATE,
    PLAIN,
    RESET,
    SECOND,
    VISIT,
    Answer,
    AnswerError,
    Body,
    Bookkeeper,
    Device,
    FaultRow,
    Fleet,
    Packer,
    Performance,
    SimulationAccount,
    SimulationOptions,
    create_fleet,
    impossible_readings,
    other_values,
    render_account,
    render_worst,
    simulate,
    to_datetime,
    to_micros,
    to_text,
    visits_of,
    windows,
)

START = datetime(2026, 3, 1, 10, 0, tzinfo=UTC)
SINCE = to_micros(START)
MINUTE = 60 * SECOND


def options_of(**more: Any) -> SimulationOptions:
    return SimulationOptions(**{"url": "http://127.0.0.1:1", "meters": 20, "vehicles": 20, **more})


def energy(line: bytes) -> float:
    reading = json.loads(line)
    return float(reading.get("kwhConsumedAc", reading.get("kwhDeliveredDc")))


def day_of(device: Device, since: int = SINCE) -> list[float]:
    """The day's energy of each reading, as sent."""
    return [energy(device.line(at)) for at in device.instants(since, since + DAY)]


# --- The fleet


def test_the_same_seed_gives_the_same_bytes() -> None:
    def lines(fleet: Fleet) -> list[bytes]:
        return [device.line(at) for at, device in fleet.due(SINCE, SINCE + HOUR)]

    first = lines(create_fleet(options_of(faults=True)))
    assert first == lines(create_fleet(options_of(faults=True)))
    assert first != lines(create_fleet(options_of(faults=True, seed=2)))


def test_a_reading_depends_neither_on_the_start_nor_on_the_size_of_the_fleet() -> None:
    small = create_fleet(options_of())
    large = create_fleet(options_of(meters=50, vehicles=50))
    by_id = {device.id: device for device in large.devices}
    late_start = [d.line(at) for at, d in small.due(SINCE + HOUR + 17, SINCE + 2 * HOUR)]
    whole = [by_id[d.id].line(at) for at, d in small.due(SINCE, SINCE + 2 * HOUR)]
    assert whole[-len(late_start) :] == late_start


@pytest.mark.parametrize("cut", [1, MINUTE, HOUR // 3, HOUR - 1])
def test_neighbouring_windows_neither_repeat_nor_skip_a_reading(cut: int) -> None:
    fleet = create_fleet(options_of())
    whole = list(fleet.due(SINCE, SINCE + HOUR))
    assert len(whole) == 40 * 60
    assert [at for at, _ in whole] == sorted(at for at, _ in whole)
    parts = [*fleet.due(SINCE, SINCE + cut), *fleet.due(SINCE + cut, SINCE + HOUR)]
    assert parts == whole


def test_the_meter_shows_what_the_vehicle_gets_plus_the_losses() -> None:
    fleet = create_fleet(options_of(meters=60, vehicles=60))
    for vehicle in fleet.vehicles:
        meter = vehicle.meter
        assert meter is not None
        vehicle.is_register = meter.is_register = False
        delivered, consumed = sum(day_of(vehicle)), sum(day_of(meter))
        # Of a whole day the window's edges cancel out; sent figures are rounded to 1 mWh.
        assert delivered == pytest.approx(vehicle.day_kwh, abs=2e-3)
        standby = meter.standby_kw * 24
        assert (consumed - standby) * vehicle.efficiency == pytest.approx(delivered, abs=2e-3)


def test_healthy_vehicles_are_above_the_threshold_and_ill_ones_below() -> None:
    fleet = create_fleet(options_of(meters=400, vehicles=400))
    ill = [vehicle for vehicle in fleet.vehicles if vehicle.is_ill]
    assert 4 <= len(ill) <= 24
    for vehicle in fleet.vehicles:
        assert vehicle.meter is not None
        consumed = vehicle.day_kwh / vehicle.efficiency + vehicle.meter.standby_kw * 24
        ratio = vehicle.day_kwh / consumed
        assert ratio < 0.85 if vehicle.is_ill else 0.85 < ratio < 0.95


@pytest.mark.parametrize("kind", ["vehicles", "meters"])
def test_the_steps_of_a_register_are_the_energy_of_the_intervals(kind: str) -> None:
    fleet = create_fleet(options_of())
    device: Device = getattr(fleet, kind)[3]
    device.is_register = False
    by_interval = day_of(device)
    device.is_register = True
    counters = day_of(device)
    steps = [after - before for before, after in pairwise(counters)]
    assert min(steps) >= 0
    assert steps == pytest.approx(by_interval[1:], abs=2e-6)
    assert counters[0] > 100


def test_charging_is_constant_to_eighty_percent_and_then_tapers() -> None:
    vehicle = next(
        v for v in create_fleet(options_of()).vehicles if v.charged_after > v.taper_from + 3600
    )
    day = to_micros(datetime(2026, 3, 2, tzinfo=UTC)) / SECOND + vehicle.plug_in

    def power_at_soc(low: float, high: float) -> list[float]:
        seconds = [day + minute * 60 for minute in range(round(vehicle.charged_after / 60))]
        return [vehicle.power(at) for at in seconds if low < vehicle.soc(at) < high]

    assert set(power_at_soc(0, 79.9)) == {vehicle.power_kw}
    tapered = power_at_soc(80.1, 100)
    assert tapered == sorted(tapered, reverse=True)
    assert tapered[-1] < 0.5 * vehicle.power_kw
    # Power is the slope of the energy.
    at = day + vehicle.taper_from + 1800
    slope = (vehicle.counter(at + 1) - vehicle.counter(at - 1)) / 2 * 3600
    assert slope == pytest.approx(vehicle.power(at), rel=1e-4)


def test_state_of_charge_and_temperature_stay_in_range_and_do_not_jump() -> None:
    for vehicle in create_fleet(options_of(vehicles=60)).vehicles:
        lines = [json.loads(vehicle.line(at)) for at in vehicle.instants(SINCE, SINCE + DAY)]
        charges = [line["soc"] for line in lines]
        assert min(charges) >= 15
        assert max(charges) <= 100
        jumps = [abs(b - a) for a, b in pairwise(charges)]
        assert max(jumps) < 1.5
        temperatures = [line["batteryTemp"] for line in lines]
        assert min(temperatures) > -5
        assert max(temperatures) < 70
        smooth = [vehicle.battery_temp(SINCE / SECOND + 60 * minute) for minute in range(1440)]
        assert max(abs(b - a) for a, b in pairwise(smooth)) < 1.5


def test_the_voltage_stays_near_230() -> None:
    for meter in create_fleet(options_of()).meters:
        for at in meter.instants(SINCE, SINCE + DAY):
            assert 220 < json.loads(meter.line(at))["voltage"] < 240


def test_the_battery_warms_with_a_lag_and_cools_after_charging() -> None:
    vehicle = create_fleet(options_of()).vehicles[0]
    begin = SINCE / SECOND + DAY / SECOND * 2
    plugged = begin + (vehicle.plug_in - begin) % 86_400

    def rise(after: float) -> float:
        at = plugged + after
        return (
            vehicle.battery_temp(at)
            - vehicle.ambient
            - 6.0 * math.sin((at / 86_400 - 0.375) * 2 * math.pi)
        )

    assert rise(0) == pytest.approx(0, abs=0.5)
    assert rise(600) < 0.4 * rise(vehicle.taper_from)
    assert rise(vehicle.charged_after + 3600) < rise(vehicle.charged_after)


def test_a_visit_moves_energy_to_the_other_charger_and_loses_none() -> None:
    fleet = create_fleet(options_of(meters=50, vehicles=50, faults=True))
    visitors = [vehicle for vehicle in fleet.vehicles if vehicle.guest_meter is not None]
    assert visitors
    for vehicle in visitors:
        home, guest = vehicle.meter, vehicle.guest_meter
        assert home is not None
        assert guest is not None
        (begin,) = visits_of(vehicle, SINCE, SINCE + DAY, first=0)
        inside, outside = (begin + 5 * MINUTE) / SECOND, (begin + 65 * MINUTE) / SECOND
        assert vehicle.power(inside) > 0
        standby = home.standby_kw * 60 / 3600
        assert home.counter(inside + 60) - home.counter(inside) == pytest.approx(standby, rel=1e-3)
        gained = guest.counter(inside + 60) - guest.counter(inside)
        assert gained == pytest.approx(
            (vehicle.counter(inside + 60) - vehicle.counter(inside)) / vehicle.efficiency
            + guest.standby_kw * 60 / 3600
        )
        assert guest.counter(outside + 60) - guest.counter(outside) < 0.0003
        both = home.counter(outside) + guest.counter(outside)
        idle = (home.standby_kw + guest.standby_kw) * (outside - COUNTER_EPOCH_SECONDS) / 3600
        assert both - idle == pytest.approx(vehicle.counter(outside) / vehicle.efficiency)


def test_a_register_falls_once_a_day_where_it_was_reset() -> None:
    fleet = create_fleet(options_of(meters=100, vehicles=100, faults=True))
    reset = [device for device in fleet.devices if device.reset_at is not None]
    assert reset
    for device in reset:
        assert device.is_register
        instants = device.instants(SINCE, SINCE + DAY)
        shown = [energy(device.line(at)) for at in instants]
        falls = {instants[i] for i in range(1, len(shown)) if shown[i] < shown[i - 1]}
        marked = {at for at in instants[1:] if device.just_reset(at)}
        assert len(falls) == 1
        assert falls == marked


def test_a_visit_that_is_on_when_the_run_starts_counts() -> None:
    fleet = create_fleet(options_of(meters=50, vehicles=50, faults=True))
    vehicle = next(v for v in fleet.vehicles if v.guest_meter is not None)
    (begin,) = visits_of(vehicle, SINCE, SINCE + DAY, first=0)
    middle = begin + HOUR // 2
    assert list(visits_of(vehicle, middle, middle + HOUR, first=middle)) == [begin]
    assert list(visits_of(vehicle, middle, middle + HOUR, first=SINCE)) == []
    assert list(visits_of(vehicle, begin + HOUR, begin + 2 * HOUR, first=begin + HOUR)) == []


# --- Packing


def pack(options: SimulationOptions, hours: int, spoil_every: int) -> tuple[Packer, list[Body]]:
    packer = Packer(
        create_fleet(options),
        batch=options.batch,
        spoil_every=spoil_every,
        seed=options.seed,
        slot=lambda device, at: device.id,
    )
    until = SINCE + hours * HOUR
    courses = [*packer.pack(SINCE, until, until), *packer.finish()]
    return packer, [body for course in courses for body in course]


def test_without_faults_every_reading_is_sent_once_and_in_order() -> None:
    options = options_of(batch=700)
    packer, bodies = pack(options, 2, 0)
    fleet = create_fleet(options)
    expected = [device.line(at) for at, device in fleet.due(SINCE, SINCE + 2 * HOUR)]
    assert [line for body in bodies for line, _, _ in body.entries] == expected
    assert {fault for body in bodies for _, _, fault in body.entries} == {PLAIN}
    assert max(len(body.entries) for body in bodies) == 700
    assert not packer.not_sent


def test_with_faults_every_reading_is_sent_or_a_gap_and_every_kind_occurs() -> None:
    options = options_of(meters=60, vehicles=60, batch=500, faults=True)
    packer, bodies = pack(options, 24, 10)
    again = [body.encode() for body in pack(options, 24, 10)[1]]
    assert [body.encode() for body in bodies] == again

    due = sum(1 for _ in create_fleet(options).due(SINCE, SINCE + 24 * HOUR))
    counted = [line for body in bodies for line, slot, _ in body.entries if slot is not None]
    assert len(counted) == len(set(counted))
    assert len(counted) + packer.not_sent.total() == due
    assert packer.not_sent.total() >= 2 * 29
    faults = Counter(fault for body in bodies for _, _, fault in body.entries)
    assert set(faults) >= set(EXPECTED) - {GAP, VISIT}
    assert sum(1 for fault in faults if fault.startswith("impossible")) == 9


def test_a_late_burst_comes_after_the_readings_of_the_hours_it_was_held_back() -> None:
    options = options_of(meters=60, vehicles=60, faults=True)
    _, bodies = pack(options, 30, 0)
    newest = 0.0
    bursts = 0
    for body in bodies:
        stamps = [
            datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
            for line, _, _ in body.entries
        ]
        if body.entries[0][2] == LATE:
            bursts += 1
            assert len({json.loads(line).get("meterId") for line, _, _ in body.entries}) == 1
            assert newest - min(stamps) > 3600 * (len(stamps) / 60 - 0.2)
        newest = max(newest, *stamps)
    assert bursts >= 2


def test_other_values_keep_the_device_and_instant() -> None:
    for device in (create_fleet(options_of()).meters[0], create_fleet(options_of()).vehicles[0]):
        line = device.line(SINCE)
        was, now = json.loads(line), json.loads(other_values(line))
        assert was != now
        for name in ("meterId", "vehicleId", "timestamp"):
            assert was.get(name) == now.get(name)


def test_every_impossible_reading_is_refused() -> None:
    now = SINCE + HOUR
    limits = TimeLimits.at(to_datetime(now), LATE_WINDOW)
    fleet = create_fleet(options_of())
    for device in (fleet.meters[0], fleet.vehicles[0]):
        assert not isinstance(decode_reading(device.line(SINCE), limits)[0], Rejection)
        spoilt = impossible_readings(device.line(SINCE), now)
        codes = [
            reading.code
            for reading, _ in (decode_reading(line, limits) for line, _ in spoilt)
            if isinstance(reading, Rejection)
        ]
        assert codes == [
            "out_of_range",
            "wrong_type",
            "no_offset",
            "in_future",
            "too_late",
            "both_ids",
            "wrong_type",
            "out_of_range",
            "not_finite",
        ]


# --- A service that keeps the contract in memory, and can be told to break it


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
        except (asyncio.IncompleteReadError, OSError):
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
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        options = SimulationOptions(url=f"http://127.0.0.1:{port}", **{**defaults, **more})
        stop = asyncio.Event()
        limit = None if stop_after is None else START + timedelta(seconds=stop_after)

        async def pause(seconds: float) -> None:
            await clock.pause(seconds)
            if limit is not None and clock.at >= limit:
                stop.set()

        try:
            return await simulate(
                options, now=clock.now, out=out, progress_out=io.StringIO(), stop=stop, pause=pause
            )
        finally:
            server.close()
            await asyncio.sleep(0)
            await server.wait_closed()

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


def test_live_begins_where_the_backfill_ends_and_the_visits_go_on(
    service: Service, clock: Clock
) -> None:
    size: dict[str, Any] = {"meters": 6, "vehicles": 6, "faults": True, "interval": 300.0}
    fleet = create_fleet(options_of(**size))
    visitor = next(vehicle for vehicle in fleet.vehicles if vehicle.guest_meter is not None)
    (visit,) = visits_of(visitor, SINCE, SINCE + DAY, first=0)
    clock.at = to_datetime(visit) - timedelta(minutes=30)
    size |= {"backfill": timedelta(hours=1), "duration": timedelta(hours=2)}
    account, text = run(service, clock, **size)
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
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(UnreachableError, match=r"no service answers at http://127\.0\.0\.1:1"):
        asyncio.run(
            simulate(
                options_of(),
                now=clock.now,
                out=io.StringIO(),
                progress_out=io.StringIO(),
                pause=clock.pause,
                transport=httpx.MockTransport(refuse),
            )
        )


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


# --- The account


def test_outcomes_are_given_to_the_lines_they_belong_to() -> None:
    books = Bookkeeper()
    entries = [(b"", "a", PLAIN), (b"", None, "bad"), (b"", "b", RESET), (b"", "c", PLAIN)]
    body = Body([*entries])
    errors = [AnswerError(1, "rejected", "out_of_range"), AnswerError(3, "conflicting", "c")]
    books.record(body, Answer(4, 2, 0, 1, 1, errors))
    assert books.acknowledged == {"a": 1, "b": 1}
    rows = {row.fault: row for row in books.rows(set())}
    assert rows[PLAIN].otherwise == {"conflicting": 1}
    assert rows[RESET].as_expected == 1
    assert rows["bad"].codes == ("out_of_range",)


def test_lines_whose_errors_are_left_out_of_the_answer_count_for_nobody() -> None:
    books = Bookkeeper()
    books.record(
        Body([(b"", "a", PLAIN)] * 3),
        Answer(3, 1, 0, 0, 2, [AnswerError(0, "rejected", "x")], errors_omitted=1),
    )
    assert not books.acknowledged
    assert books.rows(set())[0].otherwise == {"rejected": 1, "unlisted": 2}


def test_windows_cover_the_run_in_whole_hours() -> None:
    assert list(windows(0, HOUR + 1)) == [(0, 2)]
    assert list(windows(0, 1)) == [(0, 1)]
    assert list(windows(0, 800 * HOUR)) == [(0, 744), (744 * HOUR, 56)]


def test_the_worst_ratio_stands_first_and_columns_are_aligned() -> None:
    def performance(vehicle: str, ratio: float | None, dc: float = 1.5) -> Performance:
        return Performance(vehicle, None, dc, ratio, 21.04, 10, 10, 0.5, 1.0, "ok")

    table = render_worst(
        [
            performance("V-1", None),
            performance("V-2", 0.9),
            performance("V-3", 0.7),
            performance("V-0", 0.0, dc=0.0),
        ]
    )
    lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["vehicle", "V-3", "V-2", "V-0", "V-1"]
    assert lines[1].split() == ["V-3", "0.700", "-", "1.50", "21.0", "50%", "ok"]
    assert len({line.index("%") for line in lines[1:]}) == 1


def test_the_account_names_what_failed() -> None:
    account = SimulationAccount(sent=5, failed=5, reasons={"503 queue_full": 5})
    assert "5 failed: 503 queue_full" in render_account(account)


@pytest.mark.parametrize(
    "wrong",
    [
        {"meters": 0, "vehicles": 0},
        {"meters": -1},
        {"interval": 0},
        {"batch": 0},
        {"batch": 9_001},
        {"backfill": timedelta(hours=-1)},
    ],
)
def test_senseless_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        options_of(**wrong)


def test_instants_are_written_with_as_many_digits_as_they_have() -> None:
    assert to_text(SINCE) == "2026-03-01T10:00:00.000Z"
    assert to_text(SINCE + 1) == "2026-03-01T10:00:00.000001Z"
    assert to_datetime(SINCE + 1) == START + timedelta(microseconds=1)


# --- Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_stays_on_one_line_of_a_terminal() -> None:
    seconds = [0.0]
    out = Terminal()
    with Progress("back-fill", 1000, out=out, clock=lambda: seconds[0]) as progress:
        progress.advance(100)
        assert out.getvalue() == ""
        seconds[0] = 2.0
        progress.advance(400)
    shown = out.getvalue()
    assert "[############------------]  50%  500 of 1,000 readings  250/s  0:00:02 left" in shown
    assert shown.count("\n") == 1


def test_progress_is_a_line_every_ten_seconds_elsewhere() -> None:
    seconds = [0.0]
    out = io.StringIO()
    progress = Progress("live", None, out=out, unit="rows", clock=lambda: seconds[0])
    for _ in range(25):
        seconds[0] += 1.0
        progress.advance(10)
    progress.clear()
    assert out.getvalue() == "live  100 rows  10/s\nlive  200 rows  10/s\n"
    progress.close()
    assert out.getvalue().splitlines()[-1] == "live  250 rows  10/s"
