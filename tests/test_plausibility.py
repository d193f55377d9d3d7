"""Is what cannot be recognised and named: refused over a hard limit, flagged over a soft one?"""

import asyncio
import itertools
import random
from datetime import datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest

from conftest import NOON, Clock
from energy_platform.ingest import Writer
from energy_platform.readings import Batch, MeterReading
from oracle import Device, Reading, implausible

Db = psycopg.Connection[Any]

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
BEGIN = NOON - 2 * HOUR


def iso(ts: datetime) -> str:
    return ts.isoformat()


def meter(ts: datetime, kwh: float) -> dict[str, Any]:
    return {"meterId": "M", "kwhConsumedAc": kwh, "voltage": 230, "timestamp": iso(ts)}


def vehicle(ts: datetime, kwh: float, soc: float = 50, temp: float = 20) -> dict[str, Any]:
    return {
        "vehicleId": "V", "soc": soc, "kwhDeliveredDc": kwh, "batteryTemp": temp,
        "timestamp": iso(ts),
    }  # fmt: skip


def post(api: httpx.Client, *readings: dict[str, Any]) -> dict[str, Any]:
    account: dict[str, Any] = api.post("/v1/ingest", json=list(readings)).json()
    return account


def flags(db: Db) -> list[tuple[datetime, str]]:
    return db.execute("SELECT ts, code FROM suspect_reading ORDER BY ts, code").fetchall()


@pytest.fixture(autouse=True)
def on_time(clock: Clock) -> None:
    """Readings are as fresh as they can be, so that no clock seems to be off."""
    clock.now = BEGIN + 10 * MINUTE


def test_each_implausibility_has_its_name(api: httpx.Client, db: Db) -> None:
    """One after the other, so that each is judged by the live row."""
    api.put("/v1/meters/M", json={"energyKind": "register"})
    plain = [vehicle(BEGIN, 0.1), meter(BEGIN, 100.0)]
    told = [
        (meter(BEGIN + MINUTE, 100.2), None),
        (meter(BEGIN + 2 * MINUTE, 110.0), "power"),
        (meter(BEGIN + 3 * MINUTE, 110_000.0), "register_step unit_mixup"),  # Wh from here on
        (meter(BEGIN + 4 * MINUTE, 110_117.0), "unit_mixup"),
        (meter(BEGIN + 5 * MINUTE, 0.0), None),  # a reset
        (meter(BEGIN + 6 * MINUTE, 0.1), None),
        (vehicle(BEGIN + MINUTE, 0.117), None),
        (vehicle(BEGIN + 2 * MINUTE, 117.0), "unit_mixup"),
        (vehicle(BEGIN + 3 * MINUTE, 10.0), "power"),
        (vehicle(BEGIN + 4 * MINUTE, 0.1, soc=80), "soc_rate"),
        (vehicle(BEGIN + 5 * MINUTE, 0.1, soc=80, temp=30), "temperature_rate"),
        (vehicle(BEGIN + 6 * MINUTE, 0.1, soc=80, temp=30), None),
    ]
    assert post(api, *plain)["stored"] == 2
    for reading, _ in told:
        assert post(api, reading)["stored"] == 1
    codes = {
        (device, ts): codes
        for device, ts, codes in db.execute(
            "SELECT device_id, ts, string_agg(code, ' ' ORDER BY code) FROM suspect_reading"
            " GROUP BY 1, 2"
        )
    }
    for reading, code in told:
        key = (reading.get("meterId", "V"), datetime.fromisoformat(reading["timestamp"]))
        assert codes.get(key) == code, reading
    listed = api.get("/v1/suspects", params={"code": "unit_mixup", "vehicleId": "V"}).json()
    (named,) = listed["items"]
    assert named["vehicleId"] == "V"
    assert "117 after 0.117 kWh, 1.0 minutes later" in named["detail"]
    assert "Wh?" in named["detail"]


def test_the_answer_says_how_many_are_suspect(api: httpx.Client, db: Db) -> None:
    since = BEGIN + 2 * MINUTE
    api.put(
        "/v1/assignments",
        json={"meterId": "M", "vehicleId": "V", "since": iso(since), "until": None},
    )
    post(api, *(meter(BEGIN + i * MINUTE, 100.0 if i in (1, 3) else 0.1) for i in range(6)))
    post(api, *(vehicle(BEGIN + i * MINUTE, 0.1, soc=50 + 40 * (i == 4)) for i in range(6)))
    answer = api.get("/v1/analytics/performance/V").json()
    # The meter's first spike fed nobody; the vehicle's charge jumps up and down again.
    assert answer["suspectReadings"] == 1 + 2
    assert answer["totalKwhConsumedAc"] == pytest.approx(100.3)  # they are in the figures
    series = api.get("/v1/analytics/performance/V/series").json()["buckets"]
    assert sum(bucket["suspectReadings"] for bucket in series) == 3
    with db.transaction():
        db.execute("SET LOCAL ROLE energy_reader")
        row = db.execute(
            "SELECT suspect_readings FROM vehicle_performance_v1('V', %s, %s)", (BEGIN, NOON)
        ).fetchone()
    assert row == (3,)


def test_arrival_order_and_bodies_do_not_matter(
    api: httpx.Client, db: Db, subtests: pytest.Subtests
) -> None:
    """The flags are those of the oracle, in any order and any split."""
    random_ = random.Random(7)
    names = itertools.count()
    for kind in ("interval", "register"):
        for _ in range(8):
            name = f"V-{next(names)}"
            api.put(f"/v1/vehicles/{name}", json={"energyKind": kind})
            readings = [
                Reading(
                    BEGIN + timedelta(seconds=random_.choice([30, 60, 61]) * i),
                    random_.choice([0.1, 0.2, 5.0, 9.0, 100.0, 2000.0]),
                    random_.choice([20.0, 22.0, 40.0]),
                    random_.choice([50.0, 55.0, 90.0]),
                )
                for i in range(10)
            ]
            readings = list({r.ts: r for r in readings}.values())
            sent = random_.sample(readings, len(readings))
            while sent:
                size = random_.randint(1, 4)
                post(api, *(
                    vehicle(r.ts, r.kwh, r.soc, r.celsius) | {"vehicleId": name}
                    for r in sent[:size]
                ))  # fmt: skip
                sent = sent[size:]
            readings.sort()
            expected = {
                (ts.ts, code)
                for before, ts in itertools.pairwise(readings)
                for code in implausible(ts, before, Device(kind, 60), has_battery=True)
            }
            found = {
                (ts, code.replace("unit_mixup", "power"))
                for ts, code in db.execute(
                    "SELECT ts, code FROM suspect_reading WHERE device_id = %s", (name,)
                )
            }
            with subtests.test(name):
                assert found == expected


def test_what_breaks_a_hard_limit_is_quarantined(api: httpx.Client, db: Db) -> None:
    answer = api.put("/v1/limits/meter", json={"powerKwHard": 1000})
    assert answer.json()["powerKwHard"] == 1000
    assert answer.json()["powerKwSoft"] == 500
    assert post(api, meter(BEGIN, 5.0))["stored"] == 1
    # Alone: 18 kWh in a minute are 1,080 kW.
    single = api.post("/v1/ingest", json=meter(BEGIN + MINUTE, 18.0))
    assert (single.status_code, single.json()["code"]) == (422, "implausible_power")
    assert "1000 kW" in single.json()["detail"]
    live = api.get("/v1/live/meters/M").json()
    assert (live["kwhConsumedAc"], datetime.fromisoformat(live["timestamp"])) == (5.0, BEGIN)
    # Among others it costs itself alone, however it is repeated.
    bad, good, soft = (meter(BEGIN + i * MINUTE, kwh) for i, kwh in ((2, 60.0), (3, 0.2), (4, 9.0)))
    account = post(api, bad, good, soft, bad, {**bad, "kwhConsumedAc": 0.1})
    assert (account["stored"], account["rejected"], account["conflicting"]) == (3, 2, 0)
    assert [error["index"] for error in account["errors"]] == [0, 3]
    assert flags(db) == [(BEGIN + 4 * MINUTE, "power")]
    entries = api.get("/v1/quarantine", params={"code": "implausible_power"}).json()["items"]
    assert sorted(entry["count"] for entry in entries) == [1, 2]
    # After a mend of the limit they are let in.
    assert api.put("/v1/limits/meter", json={"powerKwHard": None}).json()["powerKwHard"] is None
    replay = api.post("/v1/quarantine/replay", json={"code": "implausible_power"}).json()
    assert (replay["received"], replay["stored"], replay["conflicting"]) == (2, 1, 1)
    assert [ts for ts, _ in flags(db)] == [BEGIN + i * MINUTE for i in (1, 4)]


def test_after_what_is_refused_the_next_is_judged_by_the_last_good_one(
    api: httpx.Client, db: Db
) -> None:
    """A plateau that a register jumps to is refused as a whole, and the way back is no reset."""
    api.put("/v1/vehicles/V", json={"energyKind": "register"})
    api.put("/v1/limits/vehicle", json={"stepKwhSoft": 100, "stepKwhHard": 100, "powerKwSoft": 90})
    shown = [10.0, 10.1, 5000.0, 5000.1, 5000.2, 10.2, 10.3]
    account = post(api, *(vehicle(BEGIN + i * MINUTE, kwh) for i, kwh in enumerate(shown)))
    assert (account["stored"], account["rejected"]) == (4, 3)
    assert {error["code"] for error in account["errors"]} == {"implausible_register_step"}
    answer = api.get("/v1/analytics/performance/V").json()
    assert answer["totalKwhDeliveredDc"] == pytest.approx(0.3)
    assert flags(db) == []


@pytest.mark.parametrize(
    ("limit", "reading", "code"),
    [
        ("socRateHard", vehicle(BEGIN + MINUTE, 0.1, soc=95), "implausible_soc_rate"),
        ("tempRateHard", vehicle(BEGIN + MINUTE, 0.1, temp=90), "implausible_temperature_rate"),
    ],
)
def test_rates_have_hard_limits_too(
    api: httpx.Client, limit: str, reading: dict[str, Any], code: str
) -> None:
    api.put("/v1/limits/vehicle", json={limit: 20})
    post(api, vehicle(BEGIN, 0.1))
    assert api.post("/v1/ingest", json=reading).json()["code"] == code


def test_limits_are_checked(api: httpx.Client) -> None:
    for body, status, code in (
        ({"powerKwSoft": 10, "powerKwHard": 5}, 422, "out_of_range"),
        ({"powerKwSoft": -1}, 422, "invalid_body"),
        ({"powerKwHard": "5"}, 422, "invalid_body"),
        ({"speed": 5}, 422, "invalid_body"),
        ({"socRateSoft": 5}, 422, "invalid_body"),
    ):
        answer = api.put("/v1/limits/meter", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert api.put("/v1/limits/train", json={}).status_code == 400
    by_class = {limits["deviceClass"]: limits for limits in api.get("/v1/limits").json()}
    assert by_class["meter"]["powerKwSoft"] == 500
    assert by_class["vehicle"]["socRateSoft"] == 15


def test_a_clock_that_is_whole_hours_behind_is_named(
    api: httpx.Client, db: Db, clock: Clock
) -> None:
    """Two readings at the pace of the clock tell; what a device had kept back does not."""
    for minute in range(3):
        clock.now = NOON + minute * MINUTE + timedelta(seconds=3 * minute)
        post(api, vehicle(clock.now - 2 * HOUR, 0.1))
    assert [code for _, code in flags(db)] == ["clock_offset"] * 2
    (_, named) = api.get("/v1/suspects").json()["items"]
    assert "2 hours behind" in named["detail"]
    kept = [meter(clock.now - 3 * HOUR + i * MINUTE, 0.1) for i in range(170)]
    post(api, *kept[:100])
    for reading in kept[100:]:
        post(api, reading)
    assert {code for _, code in flags(db)} == {"clock_offset"}
    assert db.execute("SELECT count(*) FROM suspect_reading").fetchone() == (2,)


def test_a_declaration_judges_the_past_anew(api: httpx.Client, db: Db) -> None:
    """A register that was heard before it was declared seemed to be a power station."""
    post(api, *(meter(BEGIN + i * MINUTE, 20_000.0 + 0.1 * i) for i in range(6)))
    assert len(flags(db)) == 5
    api.put("/v1/meters/M", json={"energyKind": "register"})
    assert flags(db) == []
    api.put("/v1/meters/M", json={"energyKind": "interval", "reportingInterval": "PT600S"})
    assert len(flags(db)) == 5


def test_a_correction_judges_what_follows_anew(api: httpx.Client, db: Db) -> None:
    post(api, *(vehicle(BEGIN + i * MINUTE, 0.1, temp=60 if i == 2 else 20) for i in range(5)))
    assert [ts for ts, _ in flags(db)] == [BEGIN + 2 * MINUTE, BEGIN + 3 * MINUTE]
    answer = api.post(
        "/v1/corrections",
        json={"action": "void", "vehicleId": "V", "timestamp": iso(BEGIN + 2 * MINUTE),
              "reason": "a bad sensor"},
    )  # fmt: skip
    assert answer.status_code == 201
    assert flags(db) == []


def test_a_register_that_repeats_its_value_and_clock_is_a_duplicate(api: httpx.Client) -> None:
    api.put("/v1/meters/M", json={"energyKind": "register"})
    post(api, meter(BEGIN, 7.0), meter(BEGIN + MINUTE, 7.5))
    account = post(api, *[meter(BEGIN + MINUTE, 7.5)] * 12)
    assert (account["stored"], account["duplicate"]) == (0, 12)


def test_a_step_is_judged_after_a_long_gap_and_without_other_limits(
    api: httpx.Client, db: Db, clock: Clock
) -> None:
    api.put("/v1/meters/M", json={"energyKind": "register"})
    post(api, meter(BEGIN - 3 * HOUR, 100.0))
    post(api, meter(BEGIN, 1400.0))  # 433 kW, but 1,300 kWh in one step
    assert [code for _, code in flags(db)] == ["register_step"]
    api.put("/v1/limits/meter", json={"powerKwSoft": None, "stepKwhHard": 2000})
    account = post(api, meter(BEGIN + MINUTE, 900_000.0), meter(BEGIN + 2 * MINUTE, 1400.5))
    assert [error["code"] for error in account["errors"]] == ["implausible_register_step"]
    assert account["stored"] == 1


def test_late_readings_that_are_refused_leave_the_columnstore_alone(
    api: httpx.Client, db: Db
) -> None:
    """A body of many is taken, whatever is refused of it, and however the past is stored."""
    devices = [f"M-{i}" for i in range(40)]
    then = BEGIN - 8 * 24 * HOUR
    for minute in range(3):
        post(api, *({**meter(then + minute * MINUTE, 0.1), "meterId": d} for d in devices))
    db.execute("SELECT compress_chunk(c) FROM show_chunks('meter_telemetry_history') c")
    api.put("/v1/limits/meter", json={"powerKwHard": 500})
    late = [{**meter(then + MINUTE / 2, 50.0), "meterId": d} for d in devices]
    good = [{**meter(then + MINUTE / 3, 0.2), "meterId": d} for d in devices]
    account = post(api, *late, *good)
    assert (account["stored"], account["rejected"]) == (40, 40)


def test_flags_are_swept_with_the_rollups_that_they_speak_of(db: Db) -> None:
    for age, number in (("1200 days", 1), ("100 days", 2)):
        db.execute(
            "INSERT INTO suspect_reading (device_class, device_id, ts, code, detail)"
            " VALUES ('meter', %s, now() - %s::interval, 'power', '')",
            (f"M-{number}", age),
        )
    job = db.execute("SELECT job_id FROM job_status WHERE job = 'sweep_expired'").fetchone()
    db.execute("CALL run_job(%s)", job)
    assert db.execute("SELECT device_id FROM suspect_reading").fetchall() == [("M-2",)]


def test_a_declaration_leaves_what_only_dropped_rows_could_tell(api: httpx.Client, db: Db) -> None:
    long_ago = NOON - 300 * 24 * HOUR
    post(api, *(meter(long_ago + i * MINUTE, 100.0) for i in range(4)), meter(BEGIN, 0.1))
    assert len(flags(db)) == 3
    db.execute("CALL refresh_continuous_aggregate('meter_hourly', NULL, %s)", (BEGIN,))
    db.execute("SELECT drop_chunks('meter_telemetry_history', %s::timestamptz)", (BEGIN - HOUR,))
    api.put("/v1/meters/M", json={"energyKind": "register"})
    assert len(flags(db)) == 3


@pytest.mark.server
def test_writers_at_the_same_moment_flag_as_one(dsn: str, db: Db) -> None:
    """One waits for the other's live row, and judges by what it finds then."""

    def reading(minute: int, kwh: float) -> MeterReading:
        return MeterReading("M", kwh, 230, NOON + minute * MINUTE)

    async def race() -> None:
        now = NOON + HOUR / 2
        async with (
            Writer(dsn, clock=lambda: now, refresh_end=HOUR) as one,
            Writer(dsn, clock=lambda: now, refresh_end=HOUR) as other,
        ):
            await one.record(Batch([b"{}"], [reading(0, 0.1)]), 1)
            blocker = await psycopg.AsyncConnection.connect(dsn)
            await blocker.execute("SELECT FROM meter_live_status FOR UPDATE")
            bodies = [(one, reading(18, 0.1)), (other, reading(19, 12.0))]
            tasks = []
            for writer, said in bodies:  # both have their snapshot, and wait
                tasks.append(asyncio.create_task(writer.record(Batch([b"{}"], [said]), 1)))
                await wait_for_waiting(len(tasks))
            await blocker.rollback()
            await blocker.close()
            await asyncio.gather(*tasks)

    async def wait_for_waiting(count: int) -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        query += " AND datname = current_database()"
        while db.execute(query).fetchone() != (count,):  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.01)

    asyncio.run(race())
    assert [ts for ts, _ in flags(db)] == [NOON + 19 * MINUTE]
