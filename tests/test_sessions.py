"""Are charging sessions those that an independent walk through the readings finds, and whole?"""

import asyncio
import csv
import gzip
import io
import itertools
import json
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from conftest import LONG, NOON, Clock
from energy_platform import files, schema
from energy_platform.files import ImportOptions
from energy_platform.settings import Settings
from oracle import Reading, World, every, utc

DAY = utc(2026, 2, 10)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
WEEK = timedelta(days=7)


@pytest.fixture
def world(db: psycopg.Connection[Any]) -> World:
    return World(db)


def spans(rows: list[dict[str, Any]]) -> list[tuple[datetime, datetime]]:
    return [(row["started_at"], row["ended_at"]) for row in rows]


def charge(since: datetime, minutes: int, kwh: float = 0.5, soc: float = 20.0) -> list[Reading]:
    """A reading a minute: one of nothing at `since`, then one with energy for each minute."""
    return [
        Reading(since + i * MINUTE, kwh if i else 0.0, 20.0 + i / 10, soc + i)
        for i in range(minutes + 1)
    ]


# ---- what a session is --------------------------------------------------------------------------


def test_a_session_begins_where_its_first_energy_began_to_flow(world: World) -> None:
    world.assign(world.add_meter("m"), world.add_vehicle("v"), DAY - HOUR)
    world.read_vehicle("v", charge(DAY, 30))
    world.read_meter("m", every(60, DAY - 5 * MINUTE, 60, 0.6))
    (session,) = world.check_sessions("v", DAY - HOUR, DAY + 5 * HOUR)
    assert session["vehicle_id"] == "v"
    assert session["meter_id"] == "m"
    assert (session["started_at"], session["ended_at"]) == (DAY, DAY + 30 * MINUTE)
    assert session["total_kwh_delivered_dc"] == pytest.approx(15)
    assert session["total_kwh_consumed_ac"] == pytest.approx(18)  # not what was before and after
    assert (session["ac_readings"], session["dc_readings"]) == (30, 30)
    assert session["efficiency_ratio"] == pytest.approx(15 / 18)
    assert (session["soc_start"], session["soc_end"]) == (20.0, 50.0)
    assert (session["battery_temp_min"], session["battery_temp_max"]) == (20.1, 23.0)
    assert session["average_battery_temp"] == pytest.approx(21.55)
    assert session["is_open"] is False
    # They are the performance of that time, a microsecond later: windows are half open.
    answer = world.check("v", DAY + MICROSECOND, DAY + 30 * MINUTE + MICROSECOND)
    for name in set(answer) & set(session) - {"vehicle_id"}:
        assert session[name] == answer[name], name

    # A reading after a long silence has energy, but nobody knows since when: its own instant, and
    # itself is in the figures, with what the meter read at that very instant.
    lonely = DAY + 8 * HOUR
    world.read_vehicle("v", [Reading(lonely, 7.0, 30.0, 60.0), Reading(lonely + MINUTE, 1.0)])
    world.read_meter("m", [Reading(lonely, 9.0)])
    (session,) = world.check_sessions("v", DAY + 5 * HOUR, DAY + 12 * HOUR)
    assert (session["started_at"], session["ended_at"]) == (lonely, lonely + MINUTE)
    assert session["total_kwh_delivered_dc"] == 8.0
    assert session["total_kwh_consumed_ac"] == 9.0
    assert session["soc_start"] == 60.0


def test_a_pause_belongs_to_a_session_up_to_its_limit(world: World) -> None:
    # Seconds between readings -> the longest pause.
    for seconds, pause in ((60, 10 * MINUTE), (300, 15 * MINUTE), (1, 10 * MINUTE)):
        for extra, count in ((timedelta(0), 1), (MICROSECOND, 2)):
            vehicle = world.add_vehicle(f"v-{seconds}-{count}", seconds=seconds)
            first = DAY + timedelta(seconds=seconds)
            begins = first + pause + extra
            world.read_vehicle(
                vehicle,
                [
                    Reading(DAY, 0.0),
                    Reading(first, 1.0),
                    Reading(begins, 0.0),  # the next one's energy flows from here on
                    Reading(begins + timedelta(seconds=seconds), 1.0),
                ],
            )
            found = world.check_sessions(vehicle, DAY, DAY + 5 * HOUR)
            assert len(found) == count
            assert all(row["meter_id"] is row["total_kwh_consumed_ac"] is None for row in found)
            assert all(row["efficiency_ratio"] is None for row in found)


def test_a_session_ends_with_its_assignment(world: World) -> None:
    for meter in ("m1", "m2"):
        world.add_meter(meter)
        world.read_meter(meter, every(60, DAY, 120, 1.0))
    world.add_vehicle("v")
    turn, end = DAY + 20 * MINUTE + 30 * SECOND, DAY + 40 * MINUTE
    world.assign("m1", "v", DAY, turn)
    world.assign("m2", "v", turn, end)
    world.read_vehicle("v", charge(DAY, 60))
    found = world.check_sessions("v", DAY, DAY + 5 * HOUR)
    assert [row["meter_id"] for row in found] == ["m1", "m2", None]
    assert spans(found) == [
        (DAY, DAY + 20 * MINUTE),
        # A reading is never split: 0:21 is the second meter's, and so is all of its energy; but
        # before the assignment no session of it begins.
        (turn, DAY + 39 * MINUTE),
        (end, DAY + 60 * MINUTE),
    ]
    assert sum(row["total_kwh_delivered_dc"] for row in found) == pytest.approx(30)
    assert [row["total_kwh_consumed_ac"] for row in found] == [20.0, 19.0, None]


def test_a_register_charges_where_it_grows(world: World) -> None:
    world.assign(world.add_meter("m", "register"), world.add_vehicle("v", "register", 300), DAY)
    shown = [100.0, 100.0, 101.0, 102.0, 102.0, 0.0, 0.0, 3.0, 3.0]
    world.read_vehicle(
        "v", [Reading(DAY + i * 5 * MINUTE, kwh, 20.0, 10.0 + i) for i, kwh in enumerate(shown)]
    )
    world.read_meter(
        "m", [Reading(DAY + i * 5 * MINUTE + SECOND, 7.0 + 2 * i) for i in range(len(shown))]
    )
    (session,) = world.check_sessions("v", DAY, DAY + 5 * HOUR)
    assert (session["started_at"], session["ended_at"]) == (DAY + 5 * MINUTE, DAY + 35 * MINUTE)
    assert session["total_kwh_delivered_dc"] == 5.0
    # Of the first reading ever nothing is known; of one after a year everything is.
    world.read_vehicle("v", [Reading(DAY - timedelta(days=300), 1.0)])
    (session,) = world.check_sessions("v", DAY, DAY + 5 * HOUR)
    assert (session["started_at"], session["total_kwh_delivered_dc"]) == (DAY, 104.0)


# ---- windows ------------------------------------------------------------------------------------


def test_a_session_is_in_the_window_that_it_ends_in_and_whole(world: World) -> None:
    world.assign(world.add_meter("m", seconds=300), world.add_vehicle("v", seconds=300), DAY)
    # It goes on for 40 days, and is found from its end alone.
    begin, end = DAY, DAY + timedelta(days=40)
    count = int((end - begin) / (5 * MINUTE)) + 1
    world.read_vehicle("v", every(300, begin, count, 0.1))
    world.read_meter("m", every(300, begin, count, 0.12))
    world.read_vehicle("v", every(300, end + 5 * MINUTE, 30, 0.0))
    for refreshed in (False, True):
        if refreshed:
            world.refresh()
        (session,) = world.check_sessions("v", end - MINUTE, end + HOUR)
        assert (session["started_at"], session["ended_at"]) == (begin, end)
        assert session["dc_readings"] == count
    # Its last instant is the end of one window, and the beginning of the next.
    assert world.check_sessions("v", end - HOUR, end) == []
    assert len(world.check_sessions("v", end, end + MICROSECOND)) == 1
    assert world.check_sessions("v", end + MICROSECOND, end + HOUR) == []
    assert world.check_sessions("v", begin - HOUR, begin + 31 * timedelta(days=1)) == []


def test_the_last_session_is_open_until_something_says_otherwise(world: World) -> None:
    world.assign(world.add_meter("m"), world.add_vehicle("v"), DAY)
    end = DAY + 30 * MINUTE
    world.read_vehicle("v", charge(DAY, 30))

    def is_open(until: datetime) -> bool:
        (session,) = world.check_sessions("v", DAY - HOUR, until)
        return bool(session["is_open"])

    assert is_open(end + MINUTE)
    assert is_open(end + 10 * MINUTE)
    assert not is_open(end + 10 * MINUTE + MICROSECOND)  # silence
    world.read_vehicle("v", every(60, end + MINUTE, 10, 0.0))
    assert is_open(end + 10 * MINUTE)
    assert is_open(end + 20 * MINUTE)  # the next reading may speak of the time since 0:40
    world.read_vehicle("v", [Reading(end + 11 * MINUTE, 0.0)])
    assert not is_open(end + 11 * MINUTE)  # it stands
    assert not is_open(end + 2 * MINUTE)  # known now also of then
    # The end of an assignment is an end.
    world.add_vehicle("w")
    world.add_meter("n")
    world.assign("n", "w", DAY, end + 2 * MINUTE)
    world.read_vehicle("w", charge(DAY, 30))
    (session,) = world.check_sessions("w", DAY, end + MINUTE)
    assert session["is_open"]
    (session,) = world.check_sessions("w", DAY, end + 2 * MINUTE)
    assert not session["is_open"]


@pytest.mark.parametrize("seed", range(60 if LONG else 8))
def test_any_story_has_the_oracle_s_sessions(world: World, seed: int) -> None:
    dice = random.Random(seed)
    end = DAY
    kinds = ("interval", "register")
    vehicles = [world.add_vehicle(f"v{i}", kinds[i % 2], dice.choice([60, 400])) for i in range(2)]
    meters = [world.add_meter(f"m{i}", dice.choice(kinds), 60) for i in range(2)]
    for vehicle in vehicles:
        at, shown, told = DAY, dice.choice([0.0, 50.0]), []
        while at < DAY + 20 * HOUR:
            # A stretch that charges or does not, of steps that lie around the limits of a pause.
            charges, step = dice.random() < 0.5, dice.choice([60, 300, 599, 600, 601, 1200, 5000])
            for _ in range(dice.choice([1, 2, 10])):
                at += timedelta(seconds=step, microseconds=dice.choice([0, 0, 1]))
                kwh = dice.choice([0.25, 1.0]) if charges else 0.0
                shown = 0.0 if dice.random() < 0.05 else shown + kwh
                told.append(
                    Reading(
                        at,
                        shown if vehicle == "v1" else kwh,
                        dice.uniform(-9, 40),
                        float(dice.randrange(101)),
                    )
                )
        late = [reading for reading in told if dice.random() < 0.1]
        world.read_vehicle(vehicle, [reading for reading in told if reading not in late])
        if dice.random() < 0.7:
            world.refresh(None, DAY + dice.choice([9, 24]) * HOUR)
        world.read_vehicle(vehicle, late)
        end = max(end, at)
    for meter in meters:
        world.read_meter(
            meter, [Reading(DAY + i * 150 * SECOND, dice.random()) for i in range(500)]
        )
    edges = sorted(DAY + dice.randrange(20 * 60) * MINUTE for _ in range(5))
    for since, until in itertools.pairwise([*edges, None]):
        assert since is not None
        if since == until:
            continue
        for meter, vehicle in zip(dice.sample(meters, 2), vehicles, strict=True):
            if dice.random() < 0.8:
                world.assign(meter, vehicle, since, until)
    for vehicle in vehicles:
        whole = world.check_sessions(vehicle, DAY - HOUR, end + HOUR)
        assert whole
        # Windows that touch share out the sessions among them.
        cuts = sorted({DAY - HOUR, end + HOUR, *(row["ended_at"] for row in whole[::3])})
        cuts += [DAY + dice.randrange(20 * 3600) * SECOND for _ in range(6)]
        parts = [
            session
            for since, until in itertools.pairwise(sorted(set(cuts)))
            for session in world.check_sessions(vehicle, since, until)
        ]
        assert spans(parts) == spans(whole)
        # And what they are worth is what the vehicle took.
        answer = world.check(vehicle, DAY - HOUR, end + HOUR)
        assert sum(row["total_kwh_delivered_dc"] for row in whole) == pytest.approx(
            answer["total_kwh_delivered_dc"], abs=1e-9
        )


def test_sessions_need_raw_readings(world: World, api: httpx.Client) -> None:
    # One runs from 23:00 to 1:00, over the day whose raw readings are dropped, and one later.
    world.assign(world.add_meter("m"), world.add_vehicle("v"), DAY - 2 * WEEK)
    world.add_vehicle("late")
    midnight = DAY - WEEK
    for begin, minutes in ((midnight - HOUR, 120), (midnight + 5 * HOUR, 30)):
        world.read_vehicle("v", charge(begin, minutes))
        world.read_meter("m", every(60, begin, minutes + 1, 0.6))
    world.read_vehicle("late", charge(midnight + 2 * HOUR, 30))
    world.refresh()
    before = world.check_sessions("v", midnight - 2 * HOUR, midnight + 9 * HOUR)
    assert len(before) == 2
    for table in ("meter", "vehicle"):
        world.db.execute(
            f"SELECT drop_chunks('{table}_telemetry_history', %s::timestamptz)", (midnight,)
        )

    def refused(since: datetime) -> datetime:
        with pytest.raises(psycopg.DatabaseError) as error:
            world.check_sessions("v", since, midnight + 9 * HOUR)
        assert error.value.sqlstate == "ENR01"
        assert error.value.diag.message_detail is not None
        return datetime.fromisoformat(error.value.diag.message_detail)

    assert refused(midnight - 30 * MINUTE) == midnight  # the window itself
    oldest = refused(midnight)  # where the session began is not known any more
    assert oldest == midnight + HOUR + MICROSECOND
    assert world.check_sessions("v", oldest, midnight + 9 * HOUR) == before[1:]
    # Who has nothing there may ask.
    assert len(world.check_sessions("late", midnight - 30 * MINUTE, midnight + 9 * HOUR)) == 1

    answer = api.get(
        "/v1/analytics/sessions/v", params={"until": (midnight + 9 * HOUR).isoformat(), "hours": 9}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "raw_expired")
    assert datetime.fromisoformat(answer.json()["oldest"]) == oldest
    assert "begin the window" in answer.json()["detail"]


def test_the_arguments_of_the_function(world: World) -> None:
    assert world.db.execute(
        "SELECT * FROM charging_session_v1('nobody', %s, %s)", (DAY, DAY + HOUR)
    ).fetchall() == []  # fmt: skip
    world.add_vehicle("v")
    assert world.check_sessions("v", DAY, DAY + HOUR) == []
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="since must be before"):
        world.db.execute("SELECT * FROM charging_session_v1('v', %s, %s)", (DAY, DAY))


def test_the_view_asks_for_one_vehicle_if_one_is_named(world: World) -> None:
    row = world.db.execute("SELECT now()").fetchone()
    assert row is not None
    now = row[0]
    for number in range(20):
        world.read_vehicle(world.add_vehicle(f"v{number:02}"), charge(now - 3 * HOUR, 20))
    assert world.db.execute(
        "SELECT vehicle_id, started_at, ended_at FROM charging_session_v1 ORDER BY 1"
    ).fetchall() == [
        (f"v{number:02}", now - 3 * HOUR, now - 3 * HOUR + 20 * MINUTE) for number in range(20)
    ]

    def calls(condition: str) -> int:
        row = world.db.execute(
            f"EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM charging_session_v1 {condition}"
        ).fetchone()
        assert row is not None
        nodes = [row[0][0]["Plan"]]
        for node in nodes:
            nodes += node.get("Plans", [])
        (scan,) = [node for node in nodes if node.get("Function Name") == "charging_session_v1"]
        return int(scan["Actual Loops"])

    assert calls("WHERE vehicle_id = 'v07'") == 1
    assert calls("WHERE vehicle_id IN ('v07', 'v08') AND ended_at > now() - INTERVAL '1 day'") == 2
    assert calls("") == 20


# ---- over HTTP ----------------------------------------------------------------------------------


def test_sessions_over_http(api: httpx.Client, world: World, clock: Clock) -> None:
    begin = NOON - 3 * HOUR
    world.assign(world.add_meter("M-1"), world.add_vehicle("V-1"), begin - HOUR)
    world.read_vehicle("V-1", charge(begin, 30))
    world.read_meter("M-1", every(60, begin + MINUTE, 30, 1.0))
    world.read_vehicle("V-1", charge(NOON - 10 * MINUTE, 9))
    answer = api.get("/v1/analytics/sessions/V-1")
    assert answer.status_code == 200
    found = answer.json()
    assert {name: value for name, value in found.items() if name != "items"} == {
        "vehicleId": "V-1",
        "since": "2026-02-09T12:00:00Z",
        "until": "2026-02-10T12:00:00Z",
    }
    assert found["items"][0] == {
        "vehicleId": "V-1",
        "meterId": "M-1",
        "startedAt": "2026-02-10T09:00:00Z",
        "endedAt": "2026-02-10T09:30:00Z",
        "totalKwhConsumedAc": 30.0,
        "totalKwhDeliveredDc": 15.0,
        "efficiencyRatio": 0.5,
        "averageBatteryTemp": pytest.approx(21.55),
        "batteryTempMin": 20.1,
        "batteryTempMax": 23.0,
        "socStart": 20.0,
        "socEnd": 50.0,
        "acReadings": 30,
        "dcReadings": 30,
        "isOpen": False,
    }
    assert [item["isOpen"] for item in found["items"]] == [False, True]
    clock.advance(minutes=30)
    again = api.get("/v1/analytics/sessions/V-1?hours=1").json()
    assert [item["isOpen"] for item in again["items"]] == [False]
    ended = api.get("/v1/analytics/sessions/V-1?hours=744&until=2026-02-10T09:30:00Z").json()
    assert ended["items"] == []


def test_a_vehicle_without_sessions_and_one_never_heard_of(api: httpx.Client, world: World) -> None:
    world.add_vehicle("V-1")
    assert api.get("/v1/analytics/sessions/V-1").json()["items"] == []
    answer = api.get("/v1/analytics/sessions/V-2")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_vehicle")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("V-1?hours=0", "hours"),
        ("V-1?hours=745", "hours"),
        ("V-1?until=tomorrow", "until"),
        ("V%20-1", "vehicleId"),
    ],
)
def test_a_bad_parameter_is_named(api: httpx.Client, path: str, name: str) -> None:
    answer = api.get(f"/v1/analytics/sessions/{path}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter")
    assert name in answer.json()["detail"]


# ---- real measurements --------------------------------------------------------------------------


def test_the_fast_charger_s_file_is_one_session(
    shared_data: Path, dsn: str, db: psycopg.Connection[Any], clock: Clock
) -> None:
    path = shared_data / "ev-dc-charge-obd-20230516-01" / "2023051601_charger.csv"
    keeps_old = Settings(late_window=timedelta(days=9000))
    schema.migrate(dsn, keeps_old)
    options = ImportOptions(
        late_window=keeps_old.late_window, vehicle="EV-1", fill={"batteryTemp": 20.0}
    )
    with files.open_source(path, options) as source:
        files.prepare_database(dsn, keeps_old)
        asyncio.run(files.import_source(source, options, dsn, clock=clock, out=io.StringIO()))
    with path.open() as lines:
        rows = list(csv.reader(lines))[1:]
    told = [(datetime.fromisoformat(row[0]), float(row[5]) / 1000, float(row[3])) for row in rows]
    grown = [later[0] for one, later in itertools.pairwise(told) if later[1] > one[1]]

    def ask(until: datetime) -> list[tuple[Any, ...]]:
        return db.execute(
            "SELECT started_at, ended_at, total_kwh_delivered_dc, soc_start, soc_end, meter_id,"
            "       dc_readings, is_open"
            " FROM charging_session_v1('EV-1', %s, %s)",
            (until - HOUR, until),
        ).fetchall()

    # Its gaps of 92 and 481 seconds are shorter than ten minutes, and the energy that flowed in
    # them is in it.
    last = grown[-1]
    readings = sum(told[0][0] < ts <= last for ts, *_ in told)
    whole = (told[0][0], last, pytest.approx(2.07349, abs=1e-5), 30, 33, None, readings)
    assert ask(utc(2023, 5, 16, 7, 30)) == [(*whole, False)]
    assert ask(told[-1][0] + SECOND) == [(*whole, True)]
    assert ask(last) == []  # it goes on


def test_a_month_of_plug_ins_at_caltech_is_found_again(shared_data: Path, world: World) -> None:
    """Real arrivals, departures and AC energy. Each station is a meter, what it fed a vehicle of
    its name that took nine tenths; power is that of the file's name, or what the energy needs."""
    path = next((shared_data / "acn-caltech-2019-03").glob("*.json.gz"))
    with gzip.open(path) as packed:
        told = json.load(packed)
    if isinstance(told, str):
        told = json.loads(told)
    period = 5 * MINUTE
    month = utc(2019, 3, 1, 8)  # midnight in Los Angeles
    visits: dict[str, list[tuple[datetime, datetime, float]]] = {}
    for entry in told["context_dict"].values():
        if entry["class"].endswith(".EV"):
            ev = entry["attributes"]
            arrival, departure = (month + ev[name] * period for name in ("_arrival", "_departure"))
            visits.setdefault(ev["_station_id"], []).append(
                (arrival, departure, ev["_requested_energy"])
            )
    assert sum(map(len, visits.values())) == 954
    found = 0
    for station, plugged in sorted(visits.items()):
        world.add_meter(station, seconds=300)
        world.add_vehicle(station, seconds=300)
        wanted = []
        ac: list[Reading] = []
        dc: list[Reading] = []
        for arrival, departure, kwh in sorted(plugged):
            # Readings at 0:00, 4:59, 9:59: the last is still the visit's, not the next one's.
            world.assign(station, station, arrival, departure)
            count = int((departure - arrival) / period)
            charging = min(count, -int(-kwh // 0.55))
            for i in range(count + 1):
                ts = arrival + i * period - (SECOND if i else 0 * SECOND)
                flown = kwh / charging if 0 < i <= charging else 0.0
                ac.append(Reading(ts, flown))
                dc.append(Reading(ts, flown * 0.9))
            wanted.append((arrival, arrival + charging * period - SECOND, kwh))
        world.read_meter(station, ac)
        world.read_vehicle(station, dc)
        rows = world.db.execute(
            "SELECT started_at, ended_at, total_kwh_consumed_ac, efficiency_ratio"
            " FROM charging_session_v1(%s, %s, %s)",
            (station, month, month + 32 * timedelta(days=1)),
        ).fetchall()
        assert [row[:3] for row in rows] == [
            (start, end, pytest.approx(kwh, rel=1e-9)) for start, end, kwh in wanted
        ]
        assert [row[3] for row in rows] == pytest.approx([0.9] * len(rows))
        found += len(rows)
    assert found == 954
