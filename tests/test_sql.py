"""Are the documented SQL names what docs/sql.md says, and nothing more, for those who may read?"""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from oracle import Reading, World, counter, every, utc

DAY = utc(2026, 2, 10)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
MANUAL = Path(__file__).parents[1] / "docs" / "sql.md"

READABLE = {
    "meter_telemetry_history", "vehicle_telemetry_history", "meter_live_status",
    "vehicle_live_status", "meter_hourly", "vehicle_hourly", "meter_daily", "vehicle_daily",
    "meter_energy_hourly_v1", "vehicle_energy_hourly_v1", "meter_energy_daily_v1",
    "vehicle_energy_daily_v1", "correction", "corrected_meter_reading",
    "corrected_vehicle_reading", "suspect_reading", "plausibility_limit", "charging_session_v1",
}  # fmt: skip

# Pure arithmetic that a real-time aggregate evaluates with the rights of the one who asks.
ARITHMETIC = {
    "register_step", "counter_increase", "counter_increase_next", "counter_increase_total",
    "bucket_increase", "bucket_increase_next",
}  # fmt: skip

RELATIONS = """
SELECT c.relname::text FROM pg_class c
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'S')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
"""


def test_the_reader_reads_what_is_documented_and_nothing_else(db: psycopg.Connection[Any]) -> None:
    def allowed(role: str, right: str) -> set[str]:
        privilege = f"has_table_privilege('{role}', c.oid, '{right}')"
        return {row[0] for row in db.execute(f"{RELATIONS} AND c.relkind <> 'S' AND {privilege}")}

    def executable(role: str) -> set[str]:
        return {
            row[0]
            for row in db.execute(
                "SELECT p.proname::text FROM pg_proc p"
                " WHERE p.pronamespace = 'public'::regnamespace"
                " AND has_function_privilege(%s, p.oid, 'EXECUTE')"
                " AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid"
                "                 AND d.deptype = 'e')",
                (role,),
            )
        }

    assert allowed("energy_reader", "SELECT") == READABLE
    for right in ("INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"):
        assert allowed("energy_reader", right) == set()
    assert executable("energy_reader") == ARITHMETIC | {
        "vehicle_performance_v1",
        "vehicle_performance_series_v1",
        "fleet_performance_v1",
        "charging_session_v1",
    }

    histories = {"meter_telemetry_history", "vehicle_telemetry_history"}
    live = {"meter_live_status", "vehicle_live_status"}
    assert allowed("energy_ingest", "INSERT") == {
        *histories, *live, "meter", "vehicle", "quarantine",
    }  # fmt: skip
    assert allowed("energy_ingest", "UPDATE") == live | {"quarantine"}
    for right in ("DELETE", "TRUNCATE"):
        assert allowed("energy_ingest", right) == set()
    assert executable("energy_ingest") == ARITHMETIC | {
        "judge_inserted", "implausible_beyond_limits", "readings_to_judge", "reading_before",
        "declared_device", "implausibilities", "plausible_kwh", "plausible_change",
        "clock_hours_behind", "record_meter_readings", "record_vehicle_readings", "judge_recorded",
        "is_energy_plausible",
    }  # fmt: skip


def test_roles_bite(db: psycopg.Connection[Any]) -> None:
    world = World(db)
    world.assign(world.add_meter("m", "register"), world.add_vehicle("v", "register"), DAY)
    world.read_meter("m", counter(60, DAY, 200, 5.0, 1.0))
    world.read_vehicle("v", counter(60, DAY, 200, 5.0, 0.9))
    world.refresh(DAY, DAY + 2 * HOUR)
    denied = psycopg.errors.InsufficientPrivilege

    db.execute("SET ROLE energy_reader")
    world.check("v", DAY, DAY + 3 * HOUR)  # through tables that the reader cannot see
    for name in READABLE:
        db.execute(f"SELECT * FROM {name}").fetchall()
    for statement in (
        "SELECT * FROM quarantine", "SELECT * FROM api_key", "SELECT * FROM charging_assignment",
        "SELECT * FROM meter", "SELECT * FROM job_status",
        "SELECT * FROM vehicle_hourly_materialized", "SELECT * FROM rollup_probe",
        "SELECT register_before('meter', 'm', now())", "CALL sweep_expired(0, '{}')",
        "SELECT reconcile_policy('meter', 'policy_retention', '{}')",
        "DELETE FROM vehicle_telemetry_history", "UPDATE meter_live_status SET voltage = 0",
        "INSERT INTO meter (meter_id) VALUES ('x')", "CREATE TABLE public.mine (id int)",
        "TRUNCATE meter_telemetry_history", "DROP VIEW meter_energy_hourly_v1",
    ):  # fmt: skip
        with pytest.raises(denied):
            db.execute(statement)

    db.execute("SET ROLE energy_ingest")
    world.read_meter("m", [Reading(DAY + 40 * HOUR, 900.0)])  # in a chunk that it makes
    world.read_vehicle("v", [Reading(DAY + 40 * HOUR, 900.0)])
    for statement in (
        "UPDATE meter_telemetry_history SET kwh_consumed_ac = 0",
        "DELETE FROM meter_telemetry_history",
        "UPDATE vehicle_telemetry_history SET ts = ts",
        "DELETE FROM vehicle_telemetry_history",
        "TRUNCATE vehicle_telemetry_history",
        "SELECT drop_chunks('meter_telemetry_history', now())",
        "DELETE FROM meter_live_status", "DELETE FROM quarantine",
        "UPDATE meter SET energy_kind = 'interval'", "DELETE FROM charging_assignment",
        "UPDATE api_key SET scopes = '{admin}'", "INSERT INTO charging_assignment VALUES (DEFAULT)",
        "SELECT * FROM vehicle_performance_v1('v', now() - INTERVAL '1 hour', now())",
    ):  # fmt: skip
        with pytest.raises(denied):
            db.execute(statement)
    db.execute("RESET ROLE")
    world.check("v", DAY, DAY + 48 * HOUR)


def test_aggregates_show_new_data_at_once_and_late_data_after_a_refresh(
    db: psycopg.Connection[Any],
) -> None:
    world = World(db)
    world.add_vehicle("v")
    world.read_vehicle("v", every(60, DAY, 180, 1.0, celsius=30.0))

    def hours(table: str = "vehicle_hourly", bucket: str = "hour") -> list[tuple[Any, ...]]:
        return db.execute(
            f"SELECT {bucket}, readings, kwh_sum, battery_temp_sum, battery_temp_min,"
            f" battery_temp_max FROM {table} WHERE vehicle_id = 'v' ORDER BY 1"
        ).fetchall()

    def whole(hour: int) -> tuple[Any, ...]:
        return (DAY + hour * HOUR, 60, 60.0, 1800.0, 30.0, 30.0)

    assert hours() == [whole(0), whole(1), whole(2)]
    assert hours("vehicle_daily", "day") == [(DAY, 180, 180.0, 5400.0, 30.0, 30.0)]
    world.refresh(DAY, DAY + 2 * HOUR)
    assert hours() == [whole(0), whole(1), whole(2)]
    # New data behind the rollup's end: at once.
    world.read_vehicle("v", [Reading(DAY + 3 * HOUR, 5.0, 40.0)])
    assert hours()[3] == (DAY + 3 * HOUR, 1, 5.0, 40.0, 40.0, 40.0)
    # Late data: after the next refresh, in the day as well.
    world.read_vehicle("v", [Reading(DAY + 90 * MINUTE + timedelta(seconds=1), 7.0, -10.0)])
    assert hours()[1] == whole(1)
    world.refresh(DAY, DAY + 2 * HOUR)
    assert hours()[1] == (DAY + HOUR, 61, 67.0, 1790.0, -10.0, 30.0)
    assert hours("vehicle_daily", "day") == [(DAY, 182, 192.0, 5430.0, -10.0, 40.0)]
    world.refresh_one("vehicle_daily", DAY, DAY + 24 * HOUR)
    assert hours("vehicle_daily", "day") == [(DAY, 182, 192.0, 5430.0, -10.0, 40.0)]


def test_increases_and_energy_are_right_across_buckets_and_resets(
    db: psycopg.Connection[Any],
) -> None:
    world = World(db)
    # Two days of a register that falls now and then, with silent hours; and the same as intervals.
    shown = [10.0, 12.0, 15.0, 3.0, 4.0, 4.0, 9.0, 1.0, 6.0, 20.0, 2.0]
    instants = [
        DAY + HOUR * hours
        for hours in (0.5, 0.75, 1.25, 1.5, 5.0, 7.9, 20.0, 23.99, 24.0, 30.0, 47.0)
    ]
    readings = [Reading(ts, kwh, 20.0) for ts, kwh in zip(instants, shown, strict=True)]
    steps = [0, 2, 3, 3, 1, 0, 5, 1, 5, 14, 2]
    for kind in ("register", "interval"):
        world.read_meter(world.add_meter(kind, kind), readings)
        world.read_vehicle(world.add_vehicle(kind, kind), readings)

    def expected(amounts: list[float], bucket: timedelta) -> dict[datetime, float]:
        energy: dict[datetime, float] = {}
        for ts, amount in zip(instants, amounts, strict=True):
            begin = DAY + (ts - DAY) // bucket * bucket
            energy[begin] = energy.get(begin, 0.0) + amount
        return energy

    def check() -> None:
        for device_class in ("meter", "vehicle"):
            for view, column, bucket in (("hourly", "hour", HOUR), ("daily", "day", 24 * HOUR)):
                for kind, amounts in (("register", steps), ("interval", shown)):
                    found = dict(
                        db.execute(
                            f"SELECT {column}, kwh"
                            f" FROM {device_class}_energy_{view}_v1 WHERE {device_class}_id = %s",
                            (kind,),
                        ).fetchall()
                    )
                    assert found == pytest.approx(expected(list(amounts), bucket))
            # What a register grew by inside a bucket, without the step into it.
            assert db.execute(
                f"SELECT kwh_increase, kwh_first, ts_first, kwh_last, ts_last"
                f" FROM {device_class}_daily WHERE {device_class}_id = 'register' ORDER BY day"
            ).fetchall() == [
                (15.0, 10.0, instants[0], 1.0, instants[7]),
                (16.0, 6.0, instants[8], 2.0, instants[10]),
            ]
            assert db.execute(
                f"SELECT kwh_increase FROM {device_class}_hourly"
                f" WHERE {device_class}_id = 'register' ORDER BY hour LIMIT 2"
            ).fetchall() == [(2.0,), (3.0,)]

    check()
    world.refresh(DAY, DAY + 24 * HOUR)
    check()
    for device_class in ("meter", "vehicle"):
        world.refresh_one(f"{device_class}_daily", DAY, DAY + 24 * HOUR)
    check()
    world.refresh()
    check()
    assert (
        db.execute(
            "SELECT battery_temp_average, battery_temp_min, battery_temp_max"
            " FROM vehicle_energy_daily_v1 WHERE vehicle_id = 'register'"
        ).fetchall()
        == [(20.0, 20.0, 20.0)] * 2
    )


def test_every_statement_of_the_manual_runs_as_the_reader(db: psycopg.Connection[Any]) -> None:
    row = db.execute("SELECT now()").fetchone()
    assert row is not None
    now = row[0]
    world = World(db)
    world.assign(world.add_meter("M-101"), world.add_vehicle("V-201"), now - 48 * HOUR)
    world.read_meter("M-101", every(60, now - 2 * HOUR, 120, 0.1))
    world.read_vehicle("V-201", every(60, now - 2 * HOUR, 120, 0.08, celsius=50.0))
    for device_class, columns in (
        ("meter", "meter_id, ts, kwh_consumed_ac, voltage, received_at"),
        ("vehicle", "vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at"),
    ):
        db.execute(
            f"INSERT INTO {device_class}_live_status SELECT {columns}"
            f" FROM {device_class}_telemetry_history ORDER BY ts DESC LIMIT 1"
        )
    # A reading that cannot be, corrected to one that cannot be either.
    world.read_vehicle("V-201", [Reading(now - HOUR + MINUTE / 2, 500.0)])
    db.execute(
        "WITH c AS (INSERT INTO correction (device_class, device_id, during, action, reason,"
        "                                   made_by, made_at, voided, stored)"
        "           VALUES ('vehicle', 'V-201', tstzrange(now(), NULL), 'void', 'why',"
        "                   'who', now(), 1, 0)"
        "           RETURNING correction_id)"
        " INSERT INTO corrected_vehicle_reading SELECT 'V-201', now(), 1, 1, 1, now(), c.* FROM c"
    )
    text = MANUAL.read_text("utf-8")
    statements = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    assert len(statements) >= 8
    db.execute("SET ROLE energy_reader")
    empty = [statement for statement in statements if not db.execute(statement).fetchall()]
    assert [s for s in empty if "silent_for" not in s and "verdict IN" not in s] == []
    # The names of the manual are those that the reader has.
    named = set(re.findall(r"`(\w+)`", text.split("## Names")[1].split("The aggregates hold")[0]))
    assert named >= READABLE
