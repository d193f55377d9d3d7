"""Do files come in by the rules of the HTTP door, and out again as they were?

What the sums should be is computed here from the files themselves, by a few lines that share no
code with the platform. The files are years old, so the late window is set wider.
"""

import asyncio
import csv
import gzip
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from conftest import NOON, Clock, StartService
from energy_platform import cli, files, schema
from energy_platform.errors import SetupError, UnprocessableError
from energy_platform.files import ImportOptions
from energy_platform.files.exporter import PAGE_READINGS
from energy_platform.files.importer import LINE_BYTES_MAX
from energy_platform.settings import Settings

OLD = Settings(late_window=timedelta(days=9000))
PARIS = "Europe/Paris"
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
Db = psycopg.Connection[Any]
ImportFile = Callable[..., files.Account]


@pytest.fixture
def import_file(dsn: str, clock: Clock) -> ImportFile:
    """What the command does, with the test's clock; options by name."""

    def run(path: Path, settings: Settings = OLD, **given: Any) -> files.Account:
        options = ImportOptions(late_window=settings.late_window, **given)
        with files.open_source(path, options) as source:
            files.prepare_database(dsn, settings)
            return asyncio.run(
                files.import_source(source, options, dsn, clock=clock, out=io.StringIO())
            )

    return run


@pytest.fixture
def keeps_old(dsn: str) -> None:
    """The database keeps what is years old."""
    schema.migrate(dsn, OLD)


def counts(account: files.Account) -> dict[str, int]:
    return {outcome: count for outcome, count in account.outcomes.items() if count}


def close_to(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def history(db: Db, kind: str = "meter") -> list[tuple[Any, ...]]:
    if kind == "meter":
        query = sql.SQL("SELECT meter_id, ts, kwh_consumed_ac, voltage FROM {} ORDER BY 1, 2")
    else:
        query = sql.SQL(
            "SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp FROM {} ORDER BY 1, 2"
        )
    return db.execute(query.format(sql.Identifier(f"{kind}_telemetry_history"))).fetchall()


def ask_sql(db: Db, vehicle: str, since: datetime, until: datetime) -> tuple[Any, ...]:
    """Total AC, total DC, AC readings, DC readings."""
    row = db.execute(
        "SELECT total_kwh_consumed_ac, total_kwh_delivered_dc, ac_readings, dc_readings "
        "FROM vehicle_performance_v1(%s, %s, %s)",
        (vehicle, since, until),
    ).fetchone()
    assert row is not None
    return tuple(row)


def ask_http(api: httpx.Client, vehicle: str, until: datetime, hours: int) -> dict[str, Any]:
    answer = api.get(
        f"/v1/analytics/performance/{vehicle}", params={"until": until.isoformat(), "hours": hours}
    )
    answer.raise_for_status()
    return dict(answer.json())


# ---- The household file -------------------------------------------------------------------------


@pytest.fixture
def household(shared_data: Path) -> Path:
    return shared_data / "uci-household-2006-12" / "household_power_consumption.txt"


def household_kwh(path: Path) -> dict[datetime, float]:
    """The energy of each good minute, by its instant: winter in Paris is an hour ahead of UTC."""
    minutes = {}
    for line in path.read_text().splitlines()[1:]:
        cells = line.split(";")
        if len(cells) == 9 and cells[2] != "?":
            local = datetime.strptime(f"{cells[0]} {cells[1]} +0100", "%d/%m/%Y %H:%M:%S %z")
            minutes[local.astimezone(UTC)] = float(cells[2]) / 60
    return minutes


def sums_by(minutes: dict[datetime, float], start: Callable[[datetime], datetime]) -> Any:
    pieces: dict[datetime, list[float]] = defaultdict(list)
    for instant, kwh in minutes.items():
        pieces[start(instant)].append(kwh)
    return {piece: (math.fsum(values), len(values)) for piece, values in pieces.items()}


def hour_of(instant: datetime) -> datetime:
    return instant.replace(minute=0)


def local_day_of(instant: datetime) -> datetime:
    return (instant + HOUR).replace(hour=0, minute=0) - HOUR


@pytest.mark.usefixtures("keeps_old")
def test_the_household_sums_by_hour_and_local_day_are_those_of_the_file(
    household: Path, import_file: ImportFile, start_service: StartService, db: Db, dsn: str
) -> None:
    account = import_file(household, meter="M-1", vehicle="V-1", time_zone=PARIS)
    assert counts(account) == {"stored": 40_959, "rejected": 5}
    assert account.is_whole

    minutes = household_kwh(household)
    hours, days = sums_by(minutes, hour_of), sums_by(minutes, local_day_of)
    assert len(minutes) == 40_959
    assert len(days) == 30
    assert math.fsum(minutes.values()) == pytest.approx(1176.114, abs=5e-4)
    assert "1,176.114 kWh AC" in files.render_account(account)

    def check_sql() -> None:
        for hour, (kwh, readings) in hours.items():
            answer = ask_sql(db, "V-1", hour, hour + HOUR)
            assert answer == (close_to(kwh), 0, readings, 0), hour
        for day, (kwh, readings) in days.items():
            answer = ask_sql(db, "V-1", day, day + 24 * HOUR)
            assert answer == (close_to(kwh), 0, readings, 0), day

    check_sql()
    api = start_service(late_window=OLD.late_window)
    for day, (kwh, readings) in days.items():
        answer = ask_http(api, "V-1", day + 24 * HOUR, 24)
        assert answer["totalKwhConsumedAc"] == close_to(kwh), day
        assert answer["acReadings"] == readings
    first_day = min(days)
    for hour in (h for h in hours if first_day <= h < first_day + 72 * HOUR):
        answer = ask_http(api, "V-1", hour + HOUR, 1)
        assert answer["totalKwhConsumedAc"] == close_to(hours[hour][0]), hour
    whole = ask_http(api, "V-1", max(minutes) + MINUTE, 744)
    assert whole["totalKwhConsumedAc"] == close_to(math.fsum(minutes.values()))
    # Four minutes have no values, and the assignment begins a minute before the first reading.
    assert whole["acCoverage"] == close_to(40_959 / (40_963 + 1))

    # The nightly jobs roll the old data up and drop none of it.
    runs = schema.run_due_jobs(db, lambda: datetime.now(UTC), run_all=True)
    assert all(run.succeeded for run in runs), [run.error for run in runs]
    assert len(history(db)) == 40_959
    check_sql()


@pytest.mark.usefixtures("keeps_old")
def test_what_is_no_reading_in_the_household_file_is_in_quarantine_with_its_line(
    household: Path, import_file: ImportFile, db: Db
) -> None:
    account = import_file(household, meter="M-1", time_zone=PARIS)
    lines = household.read_bytes().split(b"\n")
    expected = {
        f"{household.name}:{number}": line.rstrip(b"\r")
        for number, line in enumerate(lines, 1)
        if number > 1 and line and (b"?" in line or line.count(b";") != 8)
    }
    assert len(expected) == 5
    rows = db.execute("SELECT detail, payload FROM quarantine").fetchall()
    assert {detail.rsplit(": ", 1)[0]: payload for detail, payload in rows} == expected
    assert account.codes == {"missing_field": 4, "wrong_columns": 1}
    summary = files.render_account(account)
    assert f"{household.name}:6841: kwhConsumedAc is required" in summary
    assert "40,964 = 40,959 stored + 0 duplicate + 0 conflicting + 5 rejected" in summary


@pytest.mark.usefixtures("keeps_old")
def test_the_same_file_again_is_all_duplicates_and_changes_nothing(
    household: Path, import_file: ImportFile, db: Db
) -> None:
    given = {"meter": "M-1", "vehicle": "V-1", "time_zone": PARIS}
    first = import_file(household, **given)
    before = history(db), db.execute("SELECT * FROM charging_assignment").fetchall()
    second = import_file(household, **given)
    assert counts(second) == {"duplicate": 40_959, "rejected": 5}
    assert second.is_whole
    assert before == (history(db), db.execute("SELECT * FROM charging_assignment").fetchall())
    assert [first.first, first.last] == [second.first, second.last]
    assert db.execute("SELECT count(*), min(count) FROM quarantine").fetchone() == (5, 2)


# ---- The charging file --------------------------------------------------------------------------


@pytest.fixture
def charger(shared_data: Path) -> Path:
    return shared_data / "ev-dc-charge-obd-20230516-01" / "2023051601_charger.csv"


@pytest.mark.usefixtures("keeps_old")
def test_the_charger_is_a_register_with_the_clock_and_gaps_of_the_file(
    charger: Path, import_file: ImportFile, start_service: StartService, db: Db
) -> None:
    account = import_file(charger, vehicle="EV-1", fill={"batteryTemp": 20.0})
    with charger.open() as lines:
        rows = list(csv.reader(lines))[1:]
    expected = [
        (datetime.fromisoformat(row[0]), float(row[3]), float(row[5]) / 1000) for row in rows
    ]
    assert counts(account) == {"stored": 367}
    stored = history(db, "vehicle")
    assert [(ts, soc, kwh) for _, ts, soc, kwh, _ in stored] == expected
    assert {temperature for *_, temperature in stored} == {20.0}
    steps = [(later[1] - earlier[1]).total_seconds() for earlier, later in pairwise(stored)]
    assert sorted(steps)[-3:] == [0.1, 92.0, 481.2]

    declared = db.execute("SELECT energy_kind, reporting_interval FROM vehicle").fetchall()
    assert declared == [("register", timedelta(seconds=0.1))]
    since, until = expected[0][0], expected[-1][0] + timedelta(seconds=0.1)
    assert ask_sql(db, "EV-1", since, until) == (None, close_to(2.073490234), 0, 367)
    # A window that begins in a gap has the step over the gap: 242.8 and 1,785.8 Wh.
    for (ts, _, kwh), (later_ts, _, later_kwh) in pairwise(expected):
        if later_ts - ts > MINUTE:
            over_gap = ask_sql(db, "EV-1", ts + timedelta(seconds=1), later_ts + MINUTE / 600)
            assert over_gap == (None, close_to(later_kwh - kwh), 0, 1)

    api = start_service(late_window=OLD.late_window)
    answer = ask_http(api, "EV-1", datetime(2023, 5, 16, 7, 10, tzinfo=UTC), 1)
    assert answer["totalKwhDeliveredDc"] == close_to(2.073490234)
    assert answer["averageBatteryTemp"] == 20.0
    assert answer["verdict"] == "no_meter"
    summary = files.render_account(account)
    assert "batteryTemp=20 in 367 lines: your value, not measured" in summary
    assert "2.073 kWh DC" in summary
    assert "EV-1: register" in summary
    # Its two clocks agree, so nothing is said of them.
    assert account.clock_gap == timedelta(0)
    assert "clock" not in summary


def test_the_charger_needs_a_temperature_of_the_callers(
    charger: Path, import_file: ImportFile
) -> None:
    with pytest.raises(SetupError, match="no battery temperature"):
        import_file(charger, vehicle="EV-1")
    with pytest.raises(SetupError, match="names no vehicle"):
        import_file(charger, fill={"batteryTemp": 20.0})


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([7200, 7200.7, 7199.1], "2:00:00 ahead of `timestamp`"),
        ([-20700, -20700], "5:45:00 behind `timestamp`"),
        ([0, 0.4], None),
        ([7200, 0], None),  # not constant
        ([7230, 7230], None),  # no time zone
        ([7200, 7230], None),
        ([72000, 72000], None),
        ([], None),
    ],
)
@pytest.mark.usefixtures("keeps_old")
def test_two_clocks_of_a_line_that_differ_by_a_time_zone_are_named(
    gaps: list[float], said: str | None, tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    start = datetime(2023, 5, 16, 7, tzinfo=UTC)
    rows = [
        f"{start + n * MINUTE},50,{n},{(start + n * MINUTE).timestamp() - gap}"
        for n, gap in enumerate(gaps)
    ]
    # These have one clock only, or none that can be read.
    odd = [
        f"{start - n * MINUTE},50,0,{text}" for n, text in enumerate(("", "x", "1e99", "nan"), 1)
    ]
    path = tmp_path / "charger.csv"
    path.write_text("\n".join(["datetime,soc,charged_energy,timestamp", *rows, *odd, ""]))
    account = import_file(path, vehicle="V", fill={"batteryTemp": 20.0})
    assert counts(account) == {"stored": len(gaps) + len(odd)}
    summary = files.render_account(account)
    assert ("`datetime` was taken" in summary) == (said is not None)
    assert said is None or said in summary
    # What was taken is what is said.
    assert (start in {row[1] for row in history(db, "vehicle")}) == bool(gaps)


# ---- Local time ---------------------------------------------------------------------------------

HOUSEHOLD_HEADER = (
    "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;"
    "Sub_metering_1;Sub_metering_2;Sub_metering_3"
)


def write_household(path: Path, local_times: list[datetime]) -> Path:
    rows = [
        f"{at.day}/{at.month}/{at.year};{at:%H:%M:%S};{1 + at.minute / 100};0;230;4;0;0;0"
        for at in local_times
    ]
    path.write_text("\n".join([HOUSEHOLD_HEADER, *rows, ""]))
    return path


def naive(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.usefixtures("keeps_old")
def test_a_local_day_of_25_hours_is_told_apart_by_the_order_of_its_lines(
    tmp_path: Path, import_file: ImportFile, db: Db, start_service: StartService
) -> None:
    midnight = naive("2007-10-28T00:00")
    local = [midnight + n * MINUTE for n in range(180)]
    local += [midnight + n * MINUTE for n in range(120, 24 * 60)]
    account = import_file(
        write_household(tmp_path / "autumn.txt", local), meter="M", vehicle="V", time_zone=PARIS
    )
    assert counts(account) == {"stored": 25 * 60}
    assert account.repeated == 120
    start = datetime(2007, 10, 27, 22, tzinfo=UTC)
    assert [row[1] for row in history(db)] == [start + n * MINUTE for n in range(1500)]
    assert "120 lines in a repeated hour" in files.render_account(account)
    expected = math.fsum((1 + at.minute / 100) / 60 for at in local)
    answer = ask_http(start_service(late_window=OLD.late_window), "V", start + 25 * HOUR, 25)
    assert answer["totalKwhConsumedAc"] == close_to(expected)
    assert answer["acCoverage"] == 1.0


@pytest.mark.usefixtures("keeps_old")
def test_times_that_the_clocks_went_over_are_no_readings(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    midnight = naive("2007-03-25T00:00")
    local = [midnight + n * MINUTE for n in range(24 * 60)]
    path = write_household(tmp_path / "spring.txt", local)
    account = import_file(path, meter="M", time_zone=PARIS)
    assert counts(account) == {"stored": 23 * 60, "rejected": 60}
    assert account.codes == {"nonexistent_time": 60}
    assert account.is_whole  # they are kept in quarantine; no reading is lost
    start = datetime(2007, 3, 24, 23, tzinfo=UTC)
    assert [row[1] for row in history(db)] == [start + n * MINUTE for n in range(23 * 60)]
    row = db.execute("SELECT detail, device_id FROM quarantine ORDER BY detail LIMIT 1").fetchone()
    assert row == (
        "spring.txt:122: 2007-03-25 02:00:00 in Europe/Paris does not exist: "
        "the clocks went forward over it",
        "M",
    )


# ---- Formats ------------------------------------------------------------------------------------

METER_ROWS = [
    {"meterId": "M-1", "kwhConsumedAc": 0.1 + n, "voltage": 230.5,
     "timestamp": f"2026-02-10T0{n}:00:00.25+01:00"}
    for n in range(3)
]  # fmt: skip
VEHICLE_ROWS = [
    {"vehicleId": "V,1", "soc": 50, "kwhDeliveredDc": n / 3, "batteryTemp": -4.5,
     "timestamp": f"2026-02-10T0{n}:00:00Z"}
    for n in range(3)
]  # fmt: skip


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_table(rows: list[dict[str, Any]], delimiter: str, line_end: str = "\n") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, delimiter=delimiter, lineterminator=line_end)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def test_our_own_formats_come_in_as_they_are(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    rows = METER_ROWS + VEHICLE_ROWS
    contents = [
        as_lines(rows),
        as_lines(rows).replace(b"\n", b"\r\n\r\n"),
        as_table(rows, ","),
        b"\xef\xbb\xbf" + as_table(rows, ";", "\r\n").rstrip(),
    ]
    # Two members, as `cat a.gz b.gz` makes them.
    contents += [
        gzip.compress(c[: len(c) // 2]) + gzip.compress(c[len(c) // 2 :]) for c in contents
    ]
    path = tmp_path / "some.data"
    for n, content in enumerate(contents):
        path.write_bytes(content)
        account = import_file(path, Settings())
        # A duplicate has the very same values.
        assert counts(account) == {"duplicate" if n else "stored": 6}, n
        assert "/performance/V%2C1?" in files.render_account(account)
    hours = [NOON.replace(hour=n) for n in range(3)]
    quarter = timedelta(seconds=0.25)
    assert history(db) == [("M-1", hours[n] - HOUR + quarter, 0.1 + n, 230.5) for n in range(3)]
    assert history(db, "vehicle") == [("V,1", hours[n], 50.0, n / 3, -4.5) for n in range(3)]


def test_an_export_comes_in_again_as_it_was(
    tmp_path: Path, import_file: ImportFile, db: Db, dsn: str
) -> None:
    path = tmp_path / "fleet.ndjson"
    many = [
        {**METER_ROWS[0], "kwhConsumedAc": n / 7,
         "timestamp": (NOON - n * timedelta(seconds=1, microseconds=1)).isoformat()}
        for n in range(2 * PAGE_READINGS + 1)
    ]  # fmt: skip
    path.write_bytes(as_lines(many + VEHICLE_ROWS))
    import_file(path, Settings())
    before = history(db), history(db, "vehicle")
    exported = []
    for kind, device_id, name in [("meter", "M-1", "m.ndjson.gz"), ("vehicle", "V,1", "v.ndjson")]:
        exported.append(tmp_path / name)
        export = files.export_history(
            dsn, kind, device_id, None, None, exported[-1],  # type: ignore[arg-type]
            stdout=io.BytesIO(), out=io.StringIO(),
        )  # fmt: skip
        assert export.readings == len(many if kind == "meter" else VEHICLE_ROWS)
    db.execute("TRUNCATE meter_telemetry_history, vehicle_telemetry_history")
    for path in exported:
        assert import_file(path, Settings()).is_whole
    assert before == (history(db), history(db, "vehicle"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fleet.ndjson", "m.ndjson.gz", "v.ndjson"]


def test_an_export_is_a_half_open_window_of_a_known_device(
    tmp_path: Path, import_file: ImportFile, db: Db, dsn: str
) -> None:
    path = tmp_path / "v.ndjson"
    path.write_bytes(as_lines(VEHICLE_ROWS))
    import_file(path, Settings())
    db.execute("UPDATE vehicle SET energy_kind = 'register'")
    out = io.BytesIO()

    def export(device_id: str, since: datetime | None, until: datetime | None) -> files.Export:
        return files.export_history(
            dsn, "vehicle", device_id, since, until, None, stdout=out, out=io.StringIO()
        )

    result = export("V,1", NOON.replace(hour=1), NOON.replace(hour=2))
    assert json.loads(out.getvalue()) == {**VEHICLE_ROWS[1], "timestamp": "2026-02-10T01:00:00Z"}
    assert "register" in files.render_export(result)
    with pytest.raises(SetupError, match="No vehicle 'V-9'"):
        export("V-9", None, None)
    with pytest.raises(SetupError, match="no UTC offset"):
        export("V,1", naive("2026-02-10"), None)
    with pytest.raises(SetupError, match="after --since"):
        export("V,1", NOON, NOON)


# What a file may hold besides readings; each must cost itself alone, as at the HTTP door.
NASTY = [
    b'{"meterId":"M-1","kwhConsumedAc":NaN,"voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":1e999,"voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":-1,"voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":"1","voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":1,"voltage":1,"timestamp":"2026-02-10T00:00:00"}',
    b'{"meterId":"M-1","kwhConsumedAc":1,"voltage":1,"timestamp":"2026-02-11T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":1,"voltage":1,"timestamp":"2024-02-11T00:00:00Z"}',
    b'{"meterId":"M-1","kwhConsumedAc":1,"voltage":1,"timestamp":"0001-01-01T00:00:00+14:00"}',
    b'{"meterId":"M\\u0000","kwhConsumedAc":1,"voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M\xff","kwhConsumedAc":1,"voltage":1,"timestamp":"2026-02-10T00:00:00Z"}',
    b'{"meterId":"M-1","vehicleId":"V-1"}',
    b"{}",
    b"[1,2]",
    b"null",
    b"{broken",
    b"\x00\x01\x02",
    b"[" * 5000,
    b'{"meterId":' + b"[" * 5000 + b"}",
]


@pytest.mark.parametrize("fill", [{}, {"batteryTemp": 20.0}], ids=["as-is", "set"])
def test_a_file_is_judged_as_the_same_body_over_http(
    fill: dict[str, float], tmp_path: Path, import_file: ImportFile, api: httpx.Client, db: Db
) -> None:
    good = as_lines(METER_ROWS).splitlines()
    lines = [*good, *NASTY, good[0], good[1].replace(b"230.5", b"231")]
    answer = api.post(
        "/v1/ingest",
        content=b"\n".join(lines),
        headers={"content-type": "application/x-ndjson"},
    ).json()
    query = "SELECT code, path, device_id, payload FROM quarantine ORDER BY 1, 2, 4"
    over_http = db.execute(query).fetchall()
    db.execute("TRUNCATE quarantine, meter_telemetry_history")
    path = tmp_path / "body.ndjson"
    path.write_bytes(b"\n".join(lines))
    account = import_file(path, Settings(), fill=fill)
    assert counts(account) == {
        outcome: answer[outcome] for outcome in ("stored", "duplicate", "conflicting", "rejected")
    }
    assert db.execute(query).fetchall() == over_http
    assert not account.is_whole
    summary = files.render_account(account)
    assert "body.ndjson:5: " in summary
    assert "too late" in summary
    assert "ENERGY_LATE_WINDOW=P800D" in summary


def test_a_conflicting_line_is_named(tmp_path: Path, import_file: ImportFile) -> None:
    path = tmp_path / "two.csv"
    path.write_bytes(as_table([METER_ROWS[0], {**METER_ROWS[0], "voltage": 9}], ","))
    account = import_file(path, Settings())
    assert counts(account) == {"stored": 1, "conflicting": 1}
    assert "two.csv:3: M-1 has other values stored" in files.render_account(account)


def test_cells_that_are_no_values_are_named(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    path = tmp_path / "table.csv"
    header = b"timestamp,meterId,vehicleId,kwhConsumedAc,voltage,note"
    path.write_bytes(
        b"\n".join(
            [
                header,
                b"2026-02-10T00:00:00Z,M-1,,1.5,230,",
                b"2026-02-10T00:01:00Z,M-1,,,230,",
                b"2026-02-10T00:02:00Z,M-1,,nan,230,",
                b"2026-02-10T00:03:00Z,M-1,,1_0,230,",
                b'2026-02-10T00:04:00Z,M-1,,"1,5",230,',
                b"10/2/2026 00:05,M-1,,1,230,",
                b"2026-02-10T00:06:00Z,M-1,,1,230",
                b"2026-02-10T00:07:00Z,M-1,V-1,1,230,",
                b"2026-02-10T00:08:00Z,M\xe9,,1,230,",
                b'2026-02-10T00:09:00Z,"M-1,,1,230,',
                b"2026-02-10T00:10:00Z,M-1,,1," + b"9" * LINE_BYTES_MAX,
                b"2026-02-10T00:11:00Z,M-1,, 1.5 ,230,x",
            ]
        )
    )
    account = import_file(path, Settings())
    assert counts(account) == {"stored": 2, "rejected": 10}
    rows = db.execute("SELECT detail, code, path FROM quarantine ORDER BY quarantine_id").fetchall()
    found = {int(detail.split(":")[1]): (code, path) for detail, code, path in rows}
    assert found == {
        3: ("missing_field", "$.kwhConsumedAc"),
        4: ("wrong_type", "$.kwhConsumedAc"),
        5: ("wrong_type", "$.kwhConsumedAc"),
        6: ("wrong_type", "$.kwhConsumedAc"),
        7: ("bad_timestamp", "$.timestamp"),
        8: ("wrong_columns", "$"),
        9: ("both_ids", "$"),
        10: ("bad_utf8", "$"),
        11: ("wrong_columns", "$"),
        12: ("line_too_long", "$"),
    }


def test_set_fills_what_is_missing_and_nothing_else(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    rows = [*METER_ROWS[:1], *VEHICLE_ROWS]
    del rows[1]["batteryTemp"]
    try:
        (tmp_path / "a.ndjson").write_bytes(as_lines(rows))
        (tmp_path / "b.csv").write_bytes(as_table(rows, ","))
    finally:
        rows[1]["batteryTemp"] = -4.5
    fill = files.decode_fill(["batteryTemp=21.5", "voltage=1"])
    account = import_file(tmp_path / "a.ndjson", Settings(), fill=fill)
    assert counts(account) == {"stored": 4}
    assert account.filled == {"batteryTemp": 1}
    assert [row[-1] for row in history(db, "vehicle")] == [21.5, -4.5, -4.5]
    assert [row[-1] for row in history(db)] == [230.5]
    assert counts(import_file(tmp_path / "b.csv", Settings(), fill=fill)) == {"duplicate": 4}


def test_a_file_cut_in_its_compression_gives_what_is_left_of_it(
    tmp_path: Path, import_file: ImportFile
) -> None:
    rows = [{**METER_ROWS[0], "timestamp": (NOON - n * MINUTE).isoformat()} for n in range(2000)]
    packed = gzip.compress(as_lines(rows))
    path = tmp_path / "cut.ndjson.gz"
    path.write_bytes(packed[: len(packed) // 2])
    account = import_file(path, Settings())
    assert 0 < account.outcomes["stored"] < 2000
    assert not account.is_whole
    assert "ends too early" in files.render_account(account)


# ---- Late windows, kinds and assignments --------------------------------------------------------


def old_file(path: Path, days: int, readings: int = 3) -> Path:
    start = NOON - timedelta(days=days)
    rows = [
        {**METER_ROWS[0], "timestamp": (start + n * MINUTE).isoformat()} for n in range(readings)
    ]
    path.write_bytes(as_lines(rows))
    return path


def test_a_forgotten_late_window_stops_the_import_before_it_fills_the_quarantine(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    with pytest.raises(SetupError, match="older than the late window") as caught:
        import_file(old_file(tmp_path / "old.ndjson", 2000), Settings())
    assert caught.value.hint
    assert "ENERGY_LATE_WINDOW=P2100D" in caught.value.hint
    assert db.execute("SELECT count(*) FROM quarantine").fetchone() == (0,)


def test_a_database_that_would_drop_the_readings_soon_refuses_them(
    tmp_path: Path, import_file: ImportFile, dsn: str, db: Db
) -> None:
    path = old_file(tmp_path / "old.ndjson", 2000)
    with pytest.raises(SetupError, match="would soon be dropped") as caught:
        import_file(path, OLD)
    assert caught.value.hint
    assert "ENERGY_LATE_WINDOW=P9000D" in caught.value.hint
    schema.migrate(dsn, OLD)
    account = import_file(path, OLD)
    assert counts(account) == {"stored": 3}
    assert "ENERGY_LATE_WINDOW=P9000D set for `up`" in files.render_account(account)


def test_an_empty_database_is_migrated_with_the_late_window_of_the_import(
    tmp_path: Path, db: Db, dsn: str
) -> None:
    db.execute("CREATE DATABASE files_from_zero")
    fresh = psycopg.conninfo.make_conninfo(dsn, dbname="files_from_zero")
    try:
        files.prepare_database(fresh, OLD)
        files.prepare_database(fresh, OLD)
    finally:
        db.execute("DROP DATABASE files_from_zero WITH (FORCE)")


@pytest.mark.usefixtures("keeps_old")
def test_a_register_does_not_come_into_a_device_of_another_kind(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    path = tmp_path / "charge.csv"
    path.write_text("datetime,soc,charged_energy\n2026-02-10T00:00:00Z,1,5\n")
    fill = {"batteryTemp": 20.0}
    # Known by an assignment only: its kind was never anyone's choice.
    db.execute("INSERT INTO vehicle (vehicle_id) VALUES ('V-1')")
    assert counts(import_file(path, vehicle="V-1", fill=fill)) == {"stored": 1}
    db.execute("UPDATE vehicle SET energy_kind = 'interval'")
    with pytest.raises(UnprocessableError, match="readings of kind interval"):
        import_file(path, vehicle="V-1", fill=fill)
    db.execute("UPDATE vehicle SET energy_kind = 'register', reporting_interval = '7 s'")
    assert import_file(path, vehicle="V-1", fill=fill).declared is None
    assert db.execute("SELECT reporting_interval FROM vehicle").fetchone() == (
        timedelta(seconds=7),
    )


def assignments(db: Db) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT meter_id, vehicle_id, lower(during), upper(during) FROM charging_assignment"
    ).fetchall()


def test_the_assignment_is_made_once_and_never_against_another(
    tmp_path: Path, import_file: ImportFile, db: Db
) -> None:
    path = old_file(tmp_path / "m.ndjson", 2)
    begin = NOON - timedelta(days=2) - MINUTE
    pair = {"meter": "M-1", "vehicle": "V-1"}
    account = import_file(path, Settings(), **pair)
    assert assignments(db) == [("M-1", "V-1", begin, None)]
    assert account.is_whole

    # Somebody ends it; the file again does not open it again.
    db.execute("UPDATE charging_assignment SET during = tstzrange(%s, %s)", (begin, NOON))
    assert "as it was before" in files.render_account(import_file(path, Settings(), **pair))
    assert assignments(db) == [("M-1", "V-1", begin, NOON)]

    other = import_file(path, Settings(), meter="M-1", vehicle="V-2")
    assert not other.is_whole
    assert counts(other) == {"duplicate": 3}
    assert "NOT MADE: M-1 feeds V-2" in files.render_account(other)
    assert assignments(db) == [("M-1", "V-1", begin, NOON)]

    given = import_file(path, Settings(), meter="M-1", vehicle="V-2", since=NOON, until=NOON + HOUR)
    assert given.is_whole
    assert ("M-1", "V-2", NOON, NOON + HOUR) in assignments(db)


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture
def on_test_database(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENERGY_DATABASE_URL", dsn)


@pytest.mark.usefixtures("on_test_database")
def test_the_commands_say_what_they_did(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.csv"
    now = datetime.now(UTC).replace(microsecond=0)
    rows = [{**METER_ROWS[0], "timestamp": (now - n * MINUTE).isoformat()} for n in range(3)]
    path.write_bytes(as_table(rows, ","))
    command = ["import", str(path), "--meter", "M-1", "--vehicle", "V-1"]

    assert cli.main(command) == cli.DONE
    out, err = capfd.readouterr()
    assert "received    3 = 3 stored + 0 duplicate + 0 conflicting + 0 rejected" in out
    assert "/v1/analytics/performance/V-1?until=" in out
    assert err == ""

    monkeypatch.setenv("ENERGY_PROGRESS", "true")
    assert cli.main(command) == cli.DONE
    out, err = capfd.readouterr()
    assert "3 duplicate" in out
    assert "m.csv: 100%" in err

    assert cli.main(["import", str(path), "--meter", "M-1"]) == cli.WRONG_USE
    assert "names its devices itself" in capfd.readouterr().err
    path.write_bytes(as_table([{**rows[0], "voltage": 1}], ","))
    assert cli.main(["import", str(path)]) == cli.FOUND_WRONG
    assert "1 conflicting" in capfd.readouterr().out

    assert cli.main(["export", "--meter", "M-1", "--since", now.isoformat()]) == cli.DONE
    out, err = capfd.readouterr()
    assert json.loads(out) == {**rows[0], "timestamp": now.isoformat().replace("+00:00", "Z")}
    assert "1 readings of M-1 written" in err
    assert cli.main(["export"]) == cli.WRONG_USE
    missing = str(tmp_path / "no" / "folder.gz")
    assert cli.main(["export", "--meter", "M-1", missing]) == cli.WRONG_USE
    assert "cannot be written: No such file" in capfd.readouterr().err


def test_a_database_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENERGY_DATABASE_URL", "postgresql://nobody@127.0.0.1:9/none")
    path = old_file(tmp_path / "m.ndjson", 2)
    assert cli.main(["import", str(path)]) == cli.NOT_REACHABLE
    assert "cannot be reached" in capsys.readouterr().err
