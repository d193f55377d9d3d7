"""Does the simulated fleet behave like a real one, and are its bodies and sums what they should be?

What is pure, each part by itself; whole runs are in test_simulator_run.
"""

import json
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from energy_platform.errors import Rejection
from energy_platform.readings import TimeLimits, decode_reading
from energy_platform.simulator import SimulationAccount, SimulationOptions
from energy_platform.simulator.account import (
    Answer,
    AnswerError,
    Bookkeeper,
    Performance,
    render_account,
    render_worst,
)
from energy_platform.simulator.faults import (
    EXPECTED,
    GAP,
    LATE,
    PLAIN,
    RESET,
    VISIT,
    Body,
    Packer,
    impossible_readings,
    other_values,
)
from energy_platform.simulator.fleet import (
    COUNTER_EPOCH_SECONDS,
    DAY,
    HOUR,
    SECOND,
    Device,
    Fleet,
    create_fleet,
    to_micros,
    to_text,
)
from energy_platform.simulator.run import windows

START = datetime(2026, 3, 1, 10, 0, tzinfo=UTC)
SINCE = to_micros(START)
MINUTE = 60 * SECOND
LATE_WINDOW = timedelta(days=380)


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
        (begin,) = vehicle.visits(SINCE, SINCE + DAY)
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
    limits = TimeLimits.at(START + timedelta(hours=1), LATE_WINDOW)
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
    assert to_micros(START + timedelta(microseconds=1)) == SINCE + 1
