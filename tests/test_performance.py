"""Is the answer of vehicle_performance_v1() the one that a slow, independent computation gives?"""

import itertools
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import LONG
from oracle import Reading, World, counter, every, utc

DAY = utc(2026, 2, 10)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)

# How far the rollups are when the question comes.
ABSENT, FRESH, DIRTY = "absent", "fresh", "dirty"


@pytest.fixture
def world(db: psycopg.Connection[Any]) -> World:
    return World(db)


def test_the_contract_s_own_example(world: World) -> None:
    world.assign(world.add_meter("M-101"), world.add_vehicle("V-201"), DAY)
    world.read_meter("M-101", every(60, DAY, 1440, 14.6 / 1440))
    world.read_vehicle("V-201", every(60, DAY, 1440, 11.2 / 1440, celsius=36.0))
    for refreshed in (False, True):
        if refreshed:
            world.refresh()
        answer = world.check("V-201", DAY, DAY + 24 * HOUR)
        assert answer["total_kwh_consumed_ac"] == pytest.approx(14.6, rel=1e-9)
        assert answer["total_kwh_delivered_dc"] == pytest.approx(11.2, rel=1e-9)
        assert answer["efficiency_ratio"] == pytest.approx(0.7671232876712328, rel=1e-9)
        assert answer["average_battery_temp"] == pytest.approx(36.0, rel=1e-9)
        assert (answer["ac_readings"], answer["dc_readings"]) == (1440, 1440)
        assert (answer["ac_coverage"], answer["dc_coverage"]) == (1.0, 1.0)
        assert answer["verdict"] == "below_threshold"


# ---- verdicts, coverage, nulls --------------------------------------------------------------

# minutes with AC, kWh each; minutes with DC, kWh each; is a meter assigned -> verdict
VERDICTS = [
    (60, 1.0, 60, 0.9, True, "ok"),
    (60, 1.0, 60, 0.84, True, "below_threshold"),
    (60, 1.0, 60, 1.01, True, "above_one"),
    (60, 1.0, 60, 1.0, True, "ok"),
    (60, 0.0, 60, 0.1, True, "above_one"),
    (60, 0.0, 60, 0.0, True, "ok"),
    (54, 1.0, 60, 0.9, True, "ok"),
    (53, 1.0, 60, 0.9, True, "insufficient_data"),
    (60, 1.0, 53, 0.9, True, "insufficient_data"),
    (53, 1.0, 60, 9.9, True, "insufficient_data"),
    (0, 1.0, 60, 0.9, True, "insufficient_data"),
    (60, 1.0, 0, 0.9, True, "insufficient_data"),
    (60, 1.0, 60, 0.9, False, "no_meter"),
    (0, 1.0, 0, 0.9, False, "no_meter"),
]


def test_every_verdict_in_its_order(world: World) -> None:
    for number, (ac, ac_kwh, dc, dc_kwh, assigned, verdict) in enumerate(VERDICTS):
        meter, vehicle = world.add_meter(f"m{number}"), world.add_vehicle(f"v{number}")
        if assigned:
            world.assign(meter, vehicle, DAY)
        world.read_meter(meter, every(60, DAY, ac, ac_kwh))
        world.read_vehicle(vehicle, every(60, DAY, dc, dc_kwh))
        answer = world.check(vehicle, DAY, DAY + HOUR)
        assert answer["verdict"] == verdict, VERDICTS[number]


def test_coverage_counts_what_the_intervals_promise(world: World) -> None:
    # The meter promises a reading each 30 s, for the quarter in which it fed; the vehicle one each
    # 300 s, for the whole hour.
    world.assign(world.add_meter("m", seconds=30), world.add_vehicle("v", seconds=300), DAY,
                 DAY + 15 * MINUTE)  # fmt: skip
    world.read_meter("m", every(60, DAY, 60, 1.0))
    world.read_vehicle("v", every(300, DAY, 6, 1.0))
    answer = world.check("v", DAY, DAY + HOUR)
    assert (answer["ac_readings"], answer["ac_coverage"]) == (15, 0.5)
    assert (answer["dc_readings"], answer["dc_coverage"]) == (6, 0.5)
    # More readings than promised cover no more than all.
    world.add_meter("m", seconds=600)
    world.add_vehicle("v", seconds=3600)
    answer = world.check("v", DAY, DAY + HOUR)
    assert (answer["ac_coverage"], answer["dc_coverage"]) == (1.0, 1.0)

    # Silence is zero, an average of nothing and a missing meter are null.
    world.add_vehicle("silent")
    answer = world.check("silent", DAY, DAY + HOUR)
    assert answer["total_kwh_consumed_ac"] is None
    assert answer["efficiency_ratio"] is None
    assert answer["average_battery_temp"] is None
    assert answer["total_kwh_delivered_dc"] == 0
    assert (answer["ac_coverage"], answer["dc_coverage"]) == (0, 0)
    world.assign(world.add_meter("m-silent"), "silent", DAY)
    answer = world.check("silent", DAY, DAY + HOUR)
    assert answer["total_kwh_consumed_ac"] == 0
    assert answer["efficiency_ratio"] is None


def test_the_arguments_of_the_function(world: World) -> None:
    # An unknown vehicle has no row.
    world.add_meter("V-1")
    assert world.fetch("V-1", DAY, DAY + HOUR) is None
    # Arguments can be named.
    world.add_vehicle("v")
    row = world.db.execute(
        "SELECT verdict FROM vehicle_performance_v1(until => %s, since => %s, vehicle_id => 'v')",
        (DAY + HOUR, DAY),
    ).fetchone()
    assert row == ("no_meter",)
    # A window has a length and two ends.
    instants: list[Any] = [DAY, DAY + HOUR, None, "infinity", "-infinity"]
    for since, until in itertools.product(instants, instants):
        if (since, until) != (DAY, DAY + HOUR):
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="since must be before"):
                world.fetch("v", since, until)


# ---- assignments ------------------------------------------------------------------------------


def test_unmetered_charging_keeps_the_ratio_honest(world: World) -> None:
    world.assign(world.add_meter("m"), world.add_vehicle("v"), DAY, DAY + 12 * HOUR)
    world.read_meter("m", every(60, DAY, 1440, 0.01))
    world.read_vehicle("v", every(60, DAY, 1440, 0.009))
    for refreshed in (False, True):
        if refreshed:
            world.refresh()
        answer = world.check("v", DAY, DAY + 24 * HOUR)
        assert answer["total_kwh_delivered_dc"] == pytest.approx(12.96)
        assert answer["metered_kwh_delivered_dc"] == pytest.approx(6.48)
        assert answer["efficiency_ratio"] == pytest.approx(0.9)
        assert answer["ac_coverage"] == 1.0
        assert answer["verdict"] == "ok"


def test_a_meter_counts_only_while_it_fed_the_vehicle(world: World) -> None:
    # m1: v1, then v2 from an odd minute on, then v1 again; m2 takes over v1 at the same instant.
    turn, back = DAY + 5 * HOUR + 7 * MINUTE, DAY + 9 * HOUR + 33.5 * MINUTE
    for kinds in itertools.product(("interval", "register"), repeat=2):
        name = f"{kinds[0]}-{kinds[1]}-"
        m1, m2 = world.add_meter(name + "m1", kinds[0]), world.add_meter(name + "m2", kinds[0])
        v1, v2 = world.add_vehicle(name + "v1", kinds[1]), world.add_vehicle(name + "v2", kinds[1])
        world.assign(m1, v1, DAY, turn)
        world.assign(m2, v1, turn, back)
        world.assign(m1, v2, turn, back)
        world.assign(m1, v1, back)
        for number, device in enumerate((m1, m2)):
            world.read_meter(device, counter(60, DAY - HOUR, 900, 100 * number, 0.5))
        for device in (v1, v2):
            world.read_vehicle(device, counter(60, DAY - HOUR, 900, 10, 0.45))
        for refreshed in (False, True):
            if refreshed:
                world.refresh()
            for v in (v1, v2):
                for since, until in (
                    (DAY, DAY + 14 * HOUR),
                    (DAY - 90 * MINUTE, DAY + 12.25 * HOUR),
                    (turn, back),
                    (turn - MINUTE, turn),
                    (turn, turn + MINUTE),
                    (back - 1 * HOUR, back + timedelta(microseconds=1)),
                ):
                    world.check(v, since, until)


# ---- registers --------------------------------------------------------------------------------

GAPS = [
    timedelta(minutes=30), timedelta(hours=1), timedelta(hours=7), timedelta(days=1),
    timedelta(days=3), timedelta(days=11), timedelta(days=20), timedelta(days=365),
]  # fmt: skip


def test_a_register_steps_from_its_last_reading_however_long_ago(world: World) -> None:
    for number, gap in enumerate(GAPS):
        meter = world.add_meter(f"m{number}", "register")
        vehicle = world.add_vehicle(f"v{number}", "register")
        world.assign(meter, vehicle, DAY)
        before = DAY - gap + timedelta(seconds=7)
        world.read_meter(meter, [Reading(before - HOUR, 3.0), Reading(before, 5.0)])
        world.read_vehicle(vehicle, [Reading(before - HOUR, 3.0), Reading(before, 5.0)])
        world.read_meter(meter, counter(60, DAY + 5 * MINUTE, 100, 8.0, 1.0))
        world.read_vehicle(vehicle, counter(60, DAY + 5 * MINUTE, 100, 7.0, 1.0))

    def check() -> None:
        for number in range(len(GAPS)):
            answer = world.check(f"v{number}", DAY, DAY + 3 * HOUR)
            assert answer["total_kwh_consumed_ac"] == pytest.approx(3 + 99)
            assert answer["total_kwh_delivered_dc"] == pytest.approx(2 + 99)
            world.check(f"v{number}", DAY + 20 * MINUTE, DAY + 3 * HOUR)

    check()
    world.refresh()
    check()
    # A reading that came late, years and days ago, is the one to step from: the rollup does not
    # know it yet.
    for number, gap in enumerate(GAPS):
        late = DAY - gap + timedelta(seconds=9)
        world.read_meter(f"m{number}", [Reading(late, 5.0), Reading(late - 3 * HOUR, 4.0)])
        world.read_vehicle(f"v{number}", [Reading(late, 5.0), Reading(late - 3 * HOUR, 4.0)])
    check()
    # ... and with the raw rows gone it is the rollup alone that knows.
    world.refresh()
    for table in ("meter", "vehicle"):
        world.db.execute(
            f"SELECT drop_chunks('{table}_telemetry_history', %s::timestamptz)", (DAY,)
        )
    check()


def test_a_first_reading_adds_nothing_and_a_fall_is_a_reset(world: World) -> None:
    world.assign(world.add_meter("m", "register"), world.add_vehicle("v", "register"), DAY)
    shown = [100.0, 101.0, 0.5, 0.5, 2.0, 1.5, 7.0]
    for spread in (MINUTE, 25 * MINUTE, 3 * HOUR):  # inside an hour, across, and far apart
        device = f"{spread}".replace(" ", "")
        meter = world.add_meter(f"m{device}", "register")
        vehicle = world.add_vehicle(f"v{device}", "register")
        world.assign(meter, vehicle, DAY)
        readings = [Reading(DAY + spread * i, kwh) for i, kwh in enumerate(shown)]
        random.Random(1).shuffle(readings)
        for reading in readings:
            world.read_meter(meter, [reading])
            world.read_vehicle(vehicle, [reading])
        for refreshed in (False, True):
            if refreshed:
                world.refresh()
            answer = world.check(vehicle, DAY, DAY + 24 * HOUR)
            assert answer["total_kwh_consumed_ac"] == pytest.approx(1 + 0.5 + 1.5 + 1.5 + 5.5)


def test_a_kind_that_was_declared_wrong_is_put_right_for_the_past(world: World) -> None:
    world.assign(world.add_meter("m"), world.add_vehicle("v"), DAY)
    world.read_meter("m", counter(60, DAY - HOUR, 300, 10.0, 1.0))
    world.read_vehicle("v", counter(60, DAY - HOUR, 300, 20.0, 0.9))
    world.refresh()
    world.check("v", DAY, DAY + 4 * HOUR)
    world.add_meter("m", "register")
    world.check("v", DAY, DAY + 4 * HOUR)
    world.add_vehicle("v", "register")
    answer = world.check("v", DAY, DAY + 4 * HOUR)
    assert answer["efficiency_ratio"] == pytest.approx(0.9)


# ---- windows and rollups ------------------------------------------------------------------------


def test_a_month_with_late_rows_everywhere(world: World) -> None:
    for kind in ("interval", "register"):
        m, v = world.add_meter(f"m-{kind}", kind, 3600), world.add_vehicle(f"v-{kind}", kind, 3600)
        world.assign(m, v, DAY - 2 * HOUR)
        world.read_meter(m, counter(1200, DAY, 31 * 72, 5.0, 0.1))
        world.read_vehicle(v, counter(1200, DAY, 31 * 72, 7.0, 0.09, celsius=-4.0))
    world.refresh(None, DAY + timedelta(days=30))
    random_ = random.Random(4)
    for kind in ("interval", "register"):
        for _ in range(6):
            late = DAY + timedelta(minutes=random_.randrange(31 * 1440), seconds=1)
            world.read_meter(f"m-{kind}", [Reading(late, random_.random() * 200)])
            world.read_vehicle(f"v-{kind}", [Reading(late, random_.random() * 200, 80.0)])
        world.check(f"v-{kind}", DAY, DAY + timedelta(days=31))
        world.check(f"v-{kind}", DAY + 7 * MINUTE, DAY + timedelta(days=31, minutes=-3))


HALF_DAYS = 5
minutes = st.integers(0, HALF_DAYS * 720 - 1)
instants = minutes.map(lambda minute: DAY + minute * MINUTE) | st.builds(
    lambda hour, microseconds: DAY + hour * HOUR + timedelta(microseconds=microseconds),
    st.integers(0, HALF_DAYS * 12 - 1),
    st.sampled_from([-1, 0, 1, 1_800_000_000]),
)


def read_late(ts: datetime, kwh: float, celsius: float, soc: float, late: timedelta) -> Reading:
    return Reading(ts, kwh, celsius, soc, ts + late)


# Clocks that are right, that are off by whole hours, or nearly so.
lateness = st.sampled_from([0, 1, 59, 60, 61, 120, 125, 840, 900]).map(
    lambda minutes: timedelta(minutes=minutes)
)
soc = st.sampled_from([50.0, 51.0, 70.0, 0.0])
kinds = st.sampled_from(["interval", "register"])
kwh = st.sampled_from([0.0, 1.0, 1e9]) | st.floats(0, 1000, allow_subnormal=False)
celsius = st.floats(-60, 150, allow_subnormal=False)
readings = st.lists(
    st.tuples(st.builds(read_late, instants, kwh, celsius, soc, lateness), st.booleans()),
    max_size=30,
)
matches = st.sampled_from(
    [(None, None), ("m1", None), (None, "m1"), ("m1", "m2"), ("m2", "m1"), ("m2", None)]
)
numbers = itertools.count()


@settings(
    max_examples=1000 if LONG else 60,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    declared=st.lists(kinds, min_size=4, max_size=4),
    intervals=st.lists(st.sampled_from([1.0, 60.0, 7.5, 3600.0]), min_size=4, max_size=4),
    told=st.lists(readings, min_size=4, max_size=4),
    cuts=st.lists(st.tuples(instants, matches), max_size=5, unique_by=lambda cut: cut[0]),
    windows=st.lists(st.tuples(instants, instants), min_size=3, max_size=5),
    state=st.sampled_from([ABSENT, FRESH, DIRTY]),
)
def test_any_story_has_the_oracle_s_answer(
    world: World,
    declared: list[str],
    intervals: list[float],
    told: list[list[tuple[Reading, bool]]],
    cuts: list[tuple[datetime, tuple[str | None, str | None]]],
    windows: list[tuple[datetime, datetime]],
    state: str,
) -> None:
    names = {name: f"{name}-{next(numbers)}" for name in ("m1", "m2", "v1", "v2")}
    tell: list[Callable[[list[Reading]], None]] = []
    for (name, device), kind, seconds in zip(names.items(), declared, intervals, strict=True):
        add, read = (
            (world.add_meter, world.read_meter) if name[0] == "m"
            else (world.add_vehicle, world.read_vehicle)
        )  # fmt: skip
        add(device, kind, seconds)
        tell.append(lambda rows, read=read, device=device: read(device, rows))  # type: ignore[misc]
    ordered: list[tuple[datetime | None, tuple[str | None, str | None]]] = [
        *sorted(cuts, key=lambda cut: cut[0]), (None, (None, None)),
    ]  # fmt: skip
    for (since, meters), (until, _) in itertools.pairwise(ordered):
        assert since is not None
        for vehicle, meter in zip(("v1", "v2"), meters, strict=True):
            if meter is not None:
                world.assign(names[meter], names[vehicle], since, until)
    for say, rows in zip(tell, told, strict=True):
        say([reading for reading, late in rows if not late or state != DIRTY])
    if state != ABSENT:
        world.refresh(DAY - HOUR, DAY + timedelta(days=3))
    for say, rows in zip(tell, told, strict=True):
        say([reading for reading, late in rows if late])
    for one, other in windows:
        if one != other:
            for vehicle in ("v1", "v2"):
                world.check(names[vehicle], min(one, other), max(one, other))


@pytest.mark.parametrize(
    ("ac", "dc", "ratio", "verdict"),
    [
        (5e-324, 1e9, None, "above_one"),
        (1e-310, 1.0, None, "above_one"),
        (1e9, 5e-324, 0.0, "below_threshold"),
        (5e-324, 5e-324, 1.0, "ok"),
    ],
)
def test_a_ratio_that_no_float_can_hold(
    db: psycopg.Connection[Any], ac: float, dc: float, ratio: float | None, verdict: str
) -> None:
    world = World(db)
    world.assign(world.add_meter("m", seconds=3600), world.add_vehicle("v", seconds=3600), DAY)
    world.read_meter("m", [Reading(DAY, ac)])
    world.read_vehicle("v", [Reading(DAY, dc, 20.0)])
    answer = world.fetch("v", DAY, DAY + HOUR)
    assert answer is not None
    assert (answer["efficiency_ratio"], answer["verdict"]) == (ratio, verdict)
