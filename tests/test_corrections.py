"""Does a correction change every answer at once, keep what was there, and hold for ever?"""

import contextlib
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from conftest import NOON, Clock, StartService
from energy_platform import access, cli

Db = psycopg.Connection[Any]

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MIDNIGHT = NOON.replace(hour=0)


def iso(ts: datetime) -> str:
    return ts.isoformat().replace("+00:00", "Z")


def meter(ts: datetime, kwh: float, **fields: Any) -> dict[str, Any]:
    return {"meterId": "M", "kwhConsumedAc": kwh, "voltage": 230, "timestamp": iso(ts), **fields}


def vehicle(ts: datetime, kwh: float, **fields: Any) -> dict[str, Any]:
    return {
        "vehicleId": "V", "soc": 50, "kwhDeliveredDc": kwh, "batteryTemp": 20,
        "timestamp": iso(ts), **fields,
    }  # fmt: skip


def post(api: httpx.Client, body: Any) -> dict[str, Any]:
    answer = api.post("/v1/ingest", json=body)
    assert answer.status_code in (200, 207), answer.text
    account: dict[str, Any] = answer.json()
    return account


def correct(api: httpx.Client, status: int = 201, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/corrections", json={"reason": "the sensor was broken", **body})
    assert answer.status_code == status, answer.text
    made: dict[str, Any] = answer.json()
    return made


def totals(api: httpx.Client, **query: Any) -> tuple[float | None, float, int, int]:
    answer = api.get("/v1/analytics/performance/V", params=query).json()
    return (
        answer["totalKwhConsumedAc"], answer["totalKwhDeliveredDc"],
        answer["acReadings"], answer["dcReadings"],
    )  # fmt: skip


@pytest.fixture
def fleet(api: httpx.Client, db: Db) -> httpx.Client:
    """One meter that feeds one vehicle; a reading every 10 minutes for two days, rolled up."""
    since = NOON - 2 * DAY
    api.put("/v1/assignments", json={"meterId": "M", "vehicleId": "V", "since": iso(since)})
    instants = [since + timedelta(minutes=10 * i) for i in range(288)]
    post(api, [meter(ts, 1.0) for ts in instants] + [vehicle(ts, 0.875) for ts in instants])
    for rollup in ("meter_hourly", "vehicle_hourly", "meter_daily", "vehicle_daily"):
        until = MIDNIGHT if rollup.endswith("daily") else NOON - HOUR
        db.execute("CALL refresh_continuous_aggregate(%s, NULL, %s)", (rollup, until))
    return api


def compress(db: Db) -> None:
    for table in ("meter_telemetry_history", "vehicle_telemetry_history"):
        db.execute("SELECT compress_chunk(c) FROM show_chunks(%s::regclass) c", (table,))


@pytest.mark.parametrize("compressed", [False, True], ids=["row store", "columnstore"])
def test_a_voided_reading_is_gone_at_once_and_stays_gone(
    fleet: httpx.Client, db: Db, compressed: bool
) -> None:
    if compressed:
        compress(db)
    assert totals(fleet) == (144.0, 126.0, 144, 144)
    made = correct(fleet, action="void", vehicleId="V", timestamp=iso(MIDNIGHT))
    assert (made["voided"], made["stored"], made["rolledUp"]) == (1, 0, True)
    assert totals(fleet) == (144.0, 125.125, 144, 143)
    # The rollups follow at once, not only what is answered from raw rows.
    hour = "SELECT readings, kwh_sum FROM vehicle_hourly WHERE hour = %s"
    assert db.execute(hour, (MIDNIGHT,)).fetchone() == (5, 4.375)
    # Sent again it is known, and nothing changes.
    assert post(fleet, [vehicle(MIDNIGHT, 0.875)])["duplicate"] == 1
    assert post(fleet, [vehicle(MIDNIGHT, 5.0)])["conflicting"] == 1
    assert totals(fleet) == (144.0, 125.125, 144, 143)


def test_a_range_is_voided_and_the_daily_rollup_follows(fleet: httpx.Client, db: Db) -> None:
    compress(db)
    since = MIDNIGHT - 10 * HOUR
    made = correct(fleet, action="void", meterId="M", since=iso(since), until=iso(since + 5 * HOUR))
    assert (made["voided"], made["rolledUp"]) == (30, True)
    day = "SELECT readings, kwh_sum FROM meter_daily WHERE day = %s"
    assert db.execute(day, (MIDNIGHT - DAY,)).fetchone() == (114, 114.0)
    assert totals(fleet, until=iso(MIDNIGHT)) == (114.0, 126.0, 114, 144)
    everything = [meter(since + timedelta(minutes=10 * i), 1.0) for i in range(30)]
    assert post(fleet, everything)["duplicate"] == 30
    assert totals(fleet, until=iso(MIDNIGHT)) == (114.0, 126.0, 114, 144)


def test_a_replaced_reading_counts_with_its_new_values(fleet: httpx.Client, db: Db) -> None:
    compress(db)
    right = vehicle(MIDNIGHT, 0.375, batteryTemp=25)
    made = correct(
        fleet, action="replace", vehicleId="V", timestamp=iso(MIDNIGHT), readings=[right]
    )
    assert (made["voided"], made["stored"]) == (1, 1)
    assert totals(fleet) == (144.0, 125.5, 144, 144)
    # Both what it was and what it is now are known; anything else contradicts.
    account = post(fleet, [right, vehicle(MIDNIGHT, 0.875), vehicle(MIDNIGHT, 0.5)])
    assert (account["duplicate"], account["conflicting"]) == (2, 1)
    # What was taken out can be put back: a correction of a correction.
    back = vehicle(MIDNIGHT, 0.875)
    correct(fleet, action="replace", vehicleId="V", timestamp=iso(MIDNIGHT), readings=[back])
    assert totals(fleet) == (144.0, 126.0, 144, 144)


def test_a_range_is_replaced_by_other_instants(fleet: httpx.Client) -> None:
    readings = [meter(MIDNIGHT + timedelta(minutes=15 * i), 2.0) for i in range(4)]
    made = correct(
        fleet, action="replace", meterId="M", since=iso(MIDNIGHT), until=iso(MIDNIGHT + HOUR),
        readings=readings,
    )  # fmt: skip
    assert (made["voided"], made["stored"]) == (6, 4)
    assert totals(fleet)[::2] == (146.0, 142)


def test_the_same_again_changes_nothing(fleet: httpx.Client, db: Db) -> None:
    right = [meter(MIDNIGHT, 3.0)]
    for body in (
        {"action": "void", "vehicleId": "V", "timestamp": iso(MIDNIGHT)},
        {"action": "replace", "meterId": "M", "timestamp": iso(MIDNIGHT), "readings": right},
        {"action": "void", "meterId": "M", "since": iso(NOON - HOUR), "until": iso(NOON)},
    ):
        assert correct(fleet, **body)["id"] is not None
        before = totals(fleet)
        again = correct(fleet, 200, **body)
        assert (again["id"], again["voided"], again["stored"]) == (None, 0, 0)
        assert totals(fleet) == before
    assert db.execute("SELECT count(*) FROM correction").fetchone() == (3,)


def test_who_when_why_and_what_it_was_are_kept(fleet: httpx.Client, db: Db, clock: Clock) -> None:
    for number in range(3):
        correct(
            fleet, action="void", meterId="M", reason=f"reason {number}",
            since=iso(MIDNIGHT + number * HOUR), until=iso(MIDNIGHT + (number + 1) * HOUR),
        )  # fmt: skip
    correct(fleet, action="void", vehicleId="V", timestamp=iso(MIDNIGHT))
    page = fleet.get("/v1/corrections", params={"meterId": "M", "limit": 2}).json()
    assert [item["reason"] for item in page["items"]] == ["reason 2", "reason 1"]
    newest = page["items"][0]
    assert newest["madeAt"] == iso(clock())
    assert newest["madeBy"] == "anyone on this machine"
    assert (newest["meterId"], newest["vehicleId"], newest["voided"]) == ("M", None, 6)
    query = {"meterId": "M", "cursor": page["nextCursor"]}
    rest = fleet.get("/v1/corrections", params=query).json()
    assert [item["reason"] for item in rest["items"]] == ["reason 0"]
    assert rest["nextCursor"] is None

    first = fleet.get(f"/v1/corrections/{newest['id']}/readings", params={"limit": 4}).json()
    query = {"limit": 4, "cursor": first["nextCursor"]}
    more = fleet.get(f"/v1/corrections/{newest['id']}/readings", params=query).json()
    readings = first["items"] + more["items"]
    assert [r["timestamp"] for r in readings] == [
        iso(MIDNIGHT + 2 * HOUR + timedelta(minutes=10 * i)) for i in range(6)
    ]
    assert {r["kwhConsumedAc"] for r in readings} == {1.0}
    assert {r["soc"] for r in readings} == {None}
    assert more["nextCursor"] is None
    assert fleet.get("/v1/corrections/99/readings").json()["code"] == "not_found"


def test_the_key_that_made_it_is_named(db: Db, start_service: StartService) -> None:
    key, secret = access.make_key("night shift", ["admin", "ingest"])
    access.add_key(db, key)
    api = start_service()
    api.headers["authorization"] = f"Bearer {secret}"
    post(api, [meter(NOON, 1.0)])
    made = correct(api, action="void", meterId="M", timestamp=iso(NOON))
    assert made["madeBy"] == f"night shift ({key.key_id})"


def test_the_live_row_is_the_newest_reading_that_is_left(fleet: httpx.Client) -> None:
    last = NOON - timedelta(minutes=10)

    def live() -> tuple[str, float]:
        row = fleet.get("/v1/live/meters/M").json()
        return row["timestamp"], row["kwhConsumedAc"]

    correct(fleet, action="void", meterId="M", timestamp=iso(last))
    assert live() == (iso(last - timedelta(minutes=10)), 1.0)
    correct(fleet, action="replace", meterId="M", timestamp=iso(last), readings=[meter(last, 4.0)])
    assert live() == (iso(last), 4.0)
    correct(fleet, action="void", meterId="M", timestamp=iso(MIDNIGHT))
    assert live() == (iso(last), 4.0)
    correct(fleet, action="void", meterId="M", since=iso(NOON - 9 * DAY), until=iso(NOON))
    assert fleet.get("/v1/live/meters/M").status_code == 404
    assert fleet.get("/v1/meters/M").status_code == 200
    post(fleet, [meter(NOON, 7.0)])
    assert live() == (iso(NOON), 7.0)


def test_a_register_steps_over_what_was_voided(api: httpx.Client, db: Db) -> None:
    """Also where the reading that it stepped from is weeks ago, rolled up, and voided."""
    api.put("/v1/vehicles/V", json={"energyKind": "register"})
    long_ago = NOON - 40 * DAY
    shown = {long_ago: 5.0, long_ago + HOUR: 90.0, NOON - HOUR: 100.0}
    post(api, [vehicle(ts, kwh) for ts, kwh in shown.items()])
    db.execute("CALL refresh_continuous_aggregate('vehicle_hourly', NULL, %s)", (NOON - HOUR,))
    assert totals(api)[1] == 10.0
    correct(api, action="void", vehicleId="V", timestamp=iso(long_ago + HOUR))
    assert totals(api)[1] == 95.0
    # The same where the rollup has not followed yet: dirty hours are looked up raw.
    db.execute("DELETE FROM vehicle_telemetry_history WHERE ts = %s", (long_ago,))
    assert totals(api)[1] == 0.0


def test_many_hours_are_left_to_the_next_refresh(fleet: httpx.Client) -> None:
    """The answers are right all the same."""
    made = correct(
        fleet, action="void", meterId="M", since=iso(NOON - 2 * DAY - HOUR), until=iso(NOON - HOUR)
    )
    assert (made["voided"], made["rolledUp"]) == (282, True)
    post(fleet, [meter(NOON - 3 * DAY + i * HOUR + MINUTE, 1.0) for i in range(60)])
    made = correct(
        fleet, action="void", meterId="M", since=iso(NOON - 4 * DAY), until=iso(NOON + HOUR)
    )
    assert (made["voided"], made["rolledUp"]) == (66, False)
    assert totals(fleet)[::2] == (0.0, 0)


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"action": "void", "timestamp": iso(NOON)}, 422, "invalid_body", "meterId or vehicleId"),
    ({"action": "void", "meterId": "M", "vehicleId": "V", "timestamp": iso(NOON)}, 422,
     "invalid_body", "meterId or vehicleId"),
    ({"action": "void", "meterId": "M"}, 422, "invalid_body", "timestamp, or since and until"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON), "since": iso(NOON)}, 422,
     "invalid_body", "timestamp, or since and until"),
    ({"action": "void", "meterId": "M", "since": iso(NOON), "until": iso(NOON)}, 422,
     "empty_window", "after since"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON - 381 * DAY)}, 422, "too_late",
     "late window"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON), "readings": []}, 422,
     "invalid_body", "replace"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON), "readings": []}, 422,
     "invalid_body", "at least one"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON)}, 422, "invalid_body",
     "readings"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON), "readings": [{}]}, 422, "no_id",
     "$.readings[0]"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON),
      "readings": [meter(NOON, -1.0)]}, 422, "out_of_range", "$.readings[0].kwhConsumedAc"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON),
      "readings": [vehicle(NOON, 1.0)]}, 422, "invalid_reading", "not one of meter M"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON),
      "readings": [meter(NOON - HOUR, 1.0)]}, 422, "invalid_reading", "outside"),
    ({"action": "replace", "meterId": "M", "timestamp": iso(NOON),
      "readings": [meter(NOON, 1.0), meter(NOON, 2.0)]}, 422, "invalid_reading",
     "$.readings[1]"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON), "reason": ""}, 422,
     "invalid_body", "reason"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON), "reason": "a\0b"}, 422,
     "invalid_body", "reason"),
    ({"action": "undo", "meterId": "M", "timestamp": iso(NOON)}, 422, "invalid_body", "action"),
    ({"action": "void", "meterId": "M", "timestamp": "2026-02-10T00:00:00"}, 422, "invalid_body",
     "timestamp"),
    ({"action": "void", "meterId": "M", "timestamp": iso(NOON)}, 404, "unknown_reading", "M"),
    ({"action": "void", "meterId": "ghost", "timestamp": iso(NOON)}, 404, "unknown_reading",
     "ghost"),
    ({"action": "replace", "meterId": "ghost", "timestamp": iso(NOON),
      "readings": [meter(NOON, 1.0, meterId="ghost")]}, 404, "unknown_meter", "ghost"),
]  # fmt: skip


def test_a_bad_request_says_what_where_and_how(
    api: httpx.Client, db: Db, subtests: pytest.Subtests
) -> None:
    post(api, [meter(NOON - DAY, 1.0)])
    for body, status, code, words in BAD:
        with subtests.test(str(body)):
            problem = correct(api, status, **body)
            assert problem["code"] == code
            assert words in problem["detail"]
    assert db.execute("SELECT count(*) FROM correction").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM meter_telemetry_history").fetchone() == (1,)


def test_what_a_correction_changed_is_rolled_up_before_retention(
    fleet: httpx.Client, db: Db
) -> None:
    """The gate of retention sees a rollup that raw readings contradict, whatever the count says."""
    unrolled = "SELECT unrolled_hours('meter', %s)"
    assert db.execute(unrolled, (MIDNIGHT,)).fetchone() == (0,)
    where = "WHERE meter_id = 'M' AND ts = %s"
    for change in (
        f"UPDATE meter_telemetry_history SET kwh_consumed_ac = 2 {where}",
        f"DELETE FROM meter_telemetry_history {where}",
    ):
        db.execute(change, (MIDNIGHT - HOUR,))
        assert db.execute(unrolled, (MIDNIGHT,)).fetchone() == (1,)
        db.execute("CALL refresh_continuous_aggregate('meter_hourly', NULL, %s)", (MIDNIGHT,))
        assert db.execute(unrolled, (MIDNIGHT,)).fetchone() == (0,)


@pytest.mark.server
def test_who_reads_the_audit_holds_nobody(fleet: httpx.Client, dsn: str) -> None:
    """pg_dump and analysts read these tables for as long as they like."""
    with psycopg.connect(dsn) as reader:
        reader.execute("SELECT FROM corrected_meter_reading, meter_live_status")
        correct(fleet, action="void", meterId="M", timestamp=iso(MIDNIGHT))
        assert fleet.put("/v1/meters/M", json={"energyKind": "register"}).status_code == 200
        assert post(fleet, [meter(NOON, 1.0)])["stored"] == 1


@pytest.mark.server
def test_a_voided_reading_does_not_come_back_by_a_race(
    fleet: httpx.Client, db: Db, start_service: StartService
) -> None:
    """While it is voided, others send it again, by a process of their own."""
    instants = [MIDNIGHT + timedelta(minutes=10 * i) for i in range(60)]
    other = start_service()
    stop = threading.Event()
    outcomes: Counter[str] = Counter()

    def send_again() -> None:
        with httpx.Client(base_url=other.base_url, timeout=60) as client:
            while not stop.is_set():
                account = post(client, [meter(ts, 1.0) for ts in instants])
                outcomes.update({k: account[k] for k in ("stored", "duplicate", "conflicting")})

    with ThreadPoolExecutor(2) as pool:
        senders = [pool.submit(send_again) for _ in range(2)]
        for ts in instants:
            correct(fleet, action="void", meterId="M", timestamp=iso(ts))
        stop.set()
        for sender in senders:
            sender.result()
    assert outcomes["stored"] == outcomes["conflicting"] == 0
    assert outcomes["duplicate"] > 0
    left = "SELECT count(*) FROM meter_telemetry_history WHERE ts = ANY (%s)"
    assert db.execute(left, (instants,)).fetchone() == (0,)


@pytest.mark.server
def test_a_correction_beside_refreshes_is_told_as_made(fleet: httpx.Client, dsn: str) -> None:
    """Another refresh may be in the way of ours; what is committed is never called lost."""
    stop = threading.Event()

    def refresh() -> None:
        call = "CALL refresh_continuous_aggregate(%s, NULL, NULL)"
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.is_set():
                for rollup in ("vehicle_hourly", "vehicle_daily"):
                    with contextlib.suppress(psycopg.Error):  # ours may be in its way, too
                        connection.execute(call, (rollup,))

    with ThreadPoolExecutor(1) as pool:
        refresher = pool.submit(refresh)
        try:
            for i in range(60):
                ts = iso(MIDNIGHT + timedelta(minutes=10 * i))
                assert correct(fleet, action="void", vehicleId="V", timestamp=ts)["voided"] == 1
        finally:
            stop.set()
        refresher.result()


def test_the_command_line_corrects_too(
    dsn: str, db: Db, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the wall clock, as its user does."""
    monkeypatch.setenv("ENERGY_DATABASE_URL", dsn)
    ts = datetime.now(UTC).replace(microsecond=0) - HOUR
    db.execute("INSERT INTO meter VALUES ('M')")
    db.execute("INSERT INTO meter_telemetry_history VALUES ('M', %s, 1, 230, %s)", (ts, ts))
    right = tmp_path / "right.ndjson"
    right.write_text(json.dumps(meter(ts, 5.0)) + "\n\n")
    which = ["--meter", "M", "--at", iso(ts), "--reason", "read off by hand"]
    assert cli.main(["correct", "replace", str(right), *which]) == cli.DONE
    assert "1 readings taken out, 1 put in" in capsys.readouterr().out
    assert cli.main(["correct", "replace", str(right), *which]) == cli.DONE
    assert "Nothing had to change" in capsys.readouterr().out
    assert db.execute("SELECT kwh_consumed_ac FROM meter_telemetry_history").fetchone() == (5.0,)
    (made_by, reason) = db.execute("SELECT made_by, reason FROM correction").fetchone() or ("", "")
    assert made_by.startswith("command line (")
    assert reason == "read off by hand"
    assert cli.main(["correct", "void", *which[:4]]) == cli.WRONG_USE
    assert "--reason" in capsys.readouterr().err
    assert cli.main(["correct", "void", *which[2:]]) == cli.WRONG_USE
    assert "meterId or vehicleId" in capsys.readouterr().err
    right.write_text("\n{")
    assert cli.main(["correct", "replace", str(right), *which]) == cli.WRONG_USE
    assert "Line 2 is no JSON" in capsys.readouterr().err
    window = ["--since", iso(ts - HOUR), "--until", iso(ts + HOUR), "--reason", "broken"]
    assert cli.main(["correct", "void", "--meter", "M", *window]) == cli.DONE
    assert db.execute("SELECT count(*) FROM meter_telemetry_history").fetchone() == (0,)
