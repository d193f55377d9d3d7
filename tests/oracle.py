"""What the answers must be, computed slowly from plain lists. Shares no code with the product.

`World` tells the database and the lists the same story; `performance` is the oracle.
"""

import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
from psycopg.rows import dict_row

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


BEGIN_OF_TIME = datetime.min.replace(tzinfo=UTC)


class Reading(NamedTuple):
    """One reading. `celsius` is 0 for a meter, `received_at` None for at once. Units: kWh, %."""

    ts: datetime
    kwh: float
    celsius: float = 0.0
    soc: float = 50.0
    received_at: datetime | None = None


class Device(NamedTuple):
    """What is declared of a meter or a vehicle."""

    kind: str
    interval_seconds: float


class Assignment(NamedTuple):
    """This meter fed this vehicle in since <= ts < until; None: until further notice."""

    meter_id: str
    vehicle_id: str
    since: datetime
    until: datetime | None


class Story:
    """Everything that was ever said, as it would stand in a notebook."""

    def __init__(self) -> None:
        self.meters: dict[str, Device] = {}
        self.vehicles: dict[str, Device] = {}
        self.assignments: list[Assignment] = []
        self.meter_readings: dict[str, dict[datetime, Reading]] = {}
        self.vehicle_readings: dict[str, dict[datetime, Reading]] = {}
        self.flagged: dict[tuple[str, str], set[datetime]] = {}  # suspects, by class and device

    def of_class(
        self, device_class: str
    ) -> tuple[dict[str, Device], dict[str, dict[datetime, Reading]]]:
        if device_class == "meter":
            return self.meters, self.meter_readings
        return self.vehicles, self.vehicle_readings

    def judge(self, device_class: str, device: str, kept: datetime = BEGIN_OF_TIME) -> None:
        """Tell anew which of a device's readings are suspect, after they or it have changed.

        Raw rows from before `kept` are dropped: what only they could tell stays as it was.
        """
        devices, by_device = self.of_class(device_class)
        readings = by_device.get(device, {})
        was = self.flagged.get((device_class, device), set())
        dropped = max((ts for ts in readings if ts < kept), default=None)
        suspects = {ts for ts in was if ts in readings and ts < kept}
        before: Reading | None = None
        for ts in sorted(ts for ts in readings if ts >= kept):
            reading = readings[ts]
            if before is not None:
                has_battery = device_class == "vehicle"
                is_suspect = bool(
                    implausible(reading, before, devices[device], has_battery=has_battery)
                )
            else:
                is_known = dropped is None or hour_of(dropped) + HOUR <= ts - timedelta(days=10)
                is_suspect = not is_known and ts in was
            if is_suspect:
                suspects.add(ts)
            before = reading
        self.flagged[device_class, device] = suspects

    def _count_suspects(
        self, device_class: str, device: str, since: datetime, until: datetime
    ) -> int:
        flagged = self.flagged.get((device_class, device), set())
        return sum(since <= ts < until for ts in flagged)

    def performance(
        self, vehicle_id: str, since: datetime, until: datetime
    ) -> dict[str, Any] | None:
        """The row that vehicle_performance_v1() must give; None for an unknown vehicle."""
        vehicle = self.vehicles.get(vehicle_id)
        if vehicle is None:
            return None
        driven = _steps(self.vehicle_readings.get(vehicle_id, {}), vehicle.kind)
        in_window = [(reading, kwh) for reading, kwh in driven if since <= reading.ts < until]
        ac: Fraction | None = None
        metered = Fraction(0)
        ac_readings = 0
        promised = Fraction(0)
        suspect = self._count_suspects("vehicle", vehicle_id, since, until)
        for assignment in self.assignments:
            if assignment.vehicle_id != vehicle_id:
                continue
            begin = max(since, assignment.since)
            end = until if assignment.until is None else min(until, assignment.until)
            if begin >= end:
                continue
            meter = self.meters[assignment.meter_id]
            fed = _steps(self.meter_readings.get(assignment.meter_id, {}), meter.kind)
            mine = [kwh for reading, kwh in fed if begin <= reading.ts < end]
            ac = (ac or Fraction(0)) + sum(mine, Fraction(0))
            ac_readings += len(mine)
            suspect += self._count_suspects("meter", assignment.meter_id, begin, end)
            promised += _seconds(end - begin) / Fraction(meter.interval_seconds)
            metered += sum(
                (kwh for reading, kwh in in_window if begin <= reading.ts < end), Fraction(0)
            )
        ratio = metered / ac if ac else None
        dc_coverage = min(
            Fraction(1),
            len(in_window) * Fraction(vehicle.interval_seconds) / _seconds(until - since),
        )
        ac_coverage = min(Fraction(1), ac_readings / promised) if promised else Fraction(0)
        celsius = [reading.celsius for reading, _ in in_window]
        return {
            "vehicle_id": vehicle_id,
            "since": since,
            "until": until,
            "total_kwh_consumed_ac": None if ac is None else float(ac),
            "total_kwh_delivered_dc": float(sum((kwh for _, kwh in in_window), Fraction(0))),
            "efficiency_ratio": None if ratio is None else float(ratio),
            "average_battery_temp": math.fsum(celsius) / len(celsius) if celsius else None,
            "metered_kwh_delivered_dc": float(metered),
            "ac_readings": ac_readings,
            "dc_readings": len(in_window),
            "ac_coverage": float(ac_coverage),
            "dc_coverage": float(dc_coverage),
            "verdict": _verdict(ac, metered, ratio, min(ac_coverage, dc_coverage)),
            "suspect_readings": suspect,
        }

    def sessions(self, vehicle_id: str, since: datetime, until: datetime) -> list[dict[str, Any]]:
        """The rows that charging_session_v1() must give: built up reading by reading."""
        vehicle = self.vehicles[vehicle_id]
        pause = timedelta(seconds=max(600.0, 3 * vehicle.interval_seconds))
        driven = _steps(self.vehicle_readings.get(vehicle_id, {}), vehicle.kind)
        found: list[dict[str, Any]] = []
        before: Reading | None = None
        for reading, kwh in driven:
            if kwh > 0:
                meter, begin, end = self._hangs_on(vehicle_id, reading.ts)
                heard = before is not None and reading.ts - before.ts <= pause
                started_at = max(before.ts, begin) if before and heard else reading.ts
                session = found[-1] if found else None
                if (
                    session is None
                    or session["piece"] != (meter, begin, end)
                    or started_at - session["ended_at"] > pause
                ):
                    at_begin = before if before and started_at == before.ts else reading
                    session = {
                        "piece": (meter, begin, end),
                        "meter_id": meter,
                        "started_at": started_at,
                        "first_ts": reading.ts,
                        "soc_start": at_begin.soc,
                    }
                    found.append(session)
                session |= {"ended_at": reading.ts, "soc_end": reading.soc}
            before = reading
        rows = []
        for session in found:
            if since <= session["ended_at"] < until:
                rows.append(self._session_row(vehicle_id, session, driven, until, pause))
        return rows

    def _session_row(
        self,
        vehicle_id: str,
        session: dict[str, Any],
        driven: "list[tuple[Reading, Fraction]]",
        until: datetime,
        pause: timedelta,
    ) -> dict[str, Any]:
        meter, _, end = session["piece"]
        started_at, ended_at = session["started_at"], session["ended_at"]

        def within(ts: datetime) -> bool:
            if started_at == session["first_ts"]:
                return bool(started_at <= ts <= ended_at)
            return bool(started_at < ts <= ended_at)

        mine = [(reading, kwh) for reading, kwh in driven if within(reading.ts)]
        celsius = [reading.celsius for reading, _ in mine]
        dc = sum((kwh for _, kwh in mine), Fraction(0))
        fed: list[Fraction] = []
        if meter is not None:
            steps = _steps(self.meter_readings.get(meter, {}), self.meters[meter].kind)
            fed = [kwh for reading, kwh in steps if within(reading.ts)]
        ac = sum(fed, Fraction(0)) if meter is not None else None
        seen = [r.ts for r, _ in driven if ended_at <= r.ts < min(end, until + 2 * pause)]
        return {
            "vehicle_id": vehicle_id,
            "meter_id": meter,
            "started_at": started_at,
            "ended_at": ended_at,
            "total_kwh_consumed_ac": None if ac is None else float(ac),
            "total_kwh_delivered_dc": float(dc),
            "efficiency_ratio": float(dc / ac) if ac else None,
            "average_battery_temp": math.fsum(celsius) / len(celsius),
            "battery_temp_min": min(celsius),
            "battery_temp_max": max(celsius),
            "soc_start": session["soc_start"],
            "soc_end": session["soc_end"],
            "ac_readings": len(fed),
            "dc_readings": len(mine),
            "is_open": end > until and max(seen) - ended_at <= pause and until - max(seen) <= pause,
        }

    def _hangs_on(self, vehicle_id: str, ts: datetime) -> tuple[str | None, datetime, datetime]:
        """The meter that feeds a vehicle at an instant, or None, and from when until when."""
        begin, end = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
        for a in self.assignments:
            if a.vehicle_id == vehicle_id:
                if a.since <= ts and (a.until is None or ts < a.until):
                    return a.meter_id, a.since, a.until or end
                if a.until is not None and a.until <= ts:
                    begin = max(begin, a.until)
                if a.since > ts:
                    end = min(end, a.since)
        return None, begin, end

    def cut_hours(
        self, vehicle_id: str, since: datetime, until: datetime
    ) -> list[tuple[str, datetime]]:
        """Class and hour, where an edge of the window, or of an assignment in it, cuts an hour in
        which the device has readings: without raw rows that cannot be answered."""
        edges = {("vehicle", vehicle_id, since), ("vehicle", vehicle_id, until)}
        for assignment in self.assignments:
            begin = max(since, assignment.since)
            end = until if assignment.until is None else min(until, assignment.until)
            if assignment.vehicle_id == vehicle_id and begin < end:
                for edge in (begin, end):
                    edges |= {("vehicle", vehicle_id, edge), ("meter", assignment.meter_id, edge)}
        hours = []
        for kind, device, edge in edges:
            hour = edge.replace(minute=0, second=0, microsecond=0)
            readings = self.meter_readings if kind == "meter" else self.vehicle_readings
            if hour != edge and any(hour <= ts < hour + HOUR for ts in readings.get(device, {})):
                hours.append((kind, hour))
        return hours

    def buckets(self, device_class: str, size: timedelta) -> list[dict[str, Any]]:
        """A row for each device and UTC hour or day that has readings, as a refreshed rollup and
        the view of energy on it must have them, by id and time."""
        rows = []
        devices, readings = (
            (self.meters, self.meter_readings)
            if device_class == "meter"
            else (self.vehicles, self.vehicle_readings)
        )
        for device, known in sorted(readings.items()):
            steps = _steps(known, devices[device].kind)
            increases = _steps(known, "register")
            buckets: dict[datetime, list[int]] = {}
            for place, (reading, _) in enumerate(steps):
                since_midnight = reading.ts - reading.ts.replace(hour=0, minute=0, second=0,
                                                                 microsecond=0)  # fmt: skip
                buckets.setdefault(reading.ts - since_midnight % size, []).append(place)
            for since, places in buckets.items():
                first, last = steps[places[0]][0], steps[places[-1]][0]
                row = {
                    "id": device,
                    "since": since,
                    "readings": len(places),
                    "kwh": float(sum((steps[i][1] for i in places), Fraction(0))),
                    "rolled": len(places),
                    "kwh_sum": math.fsum(steps[i][0].kwh for i in places),
                    "kwh_increase": float(sum((increases[i][1] for i in places[1:]), Fraction(0))),
                    "kwh_first": first.kwh,
                    "ts_first": first.ts,
                    "kwh_last": last.kwh,
                    "ts_last": last.ts,
                }
                celsius = [steps[i][0].celsius for i in places]
                if device_class == "vehicle":
                    row["battery_temp_sum"] = math.fsum(celsius)
                    row["battery_temp_min"], row["battery_temp_max"] = min(celsius), max(celsius)
                rows.append(row)
        return rows


def local_edges(
    since: datetime, until: datetime, bucket: timedelta, zone: ZoneInfo
) -> list[datetime]:
    """Where buckets begin and end: by walking minute by minute and looking at the wall clock."""

    def label(at: datetime) -> object:
        local = at.astimezone(zone)
        return local.date() if bucket == DAY else (local.date(), local.hour, local.utcoffset())

    edges = [since]
    at = since.replace(second=0, microsecond=0) + MINUTE
    while at < until:
        if label(at) != label(at - MINUTE):
            edges.append(at)
        at += MINUTE
    return [*edges, until]


def hour_of(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)


def _steps(readings: dict[datetime, Reading], kind: str) -> list[tuple[Reading, Fraction]]:
    """Each reading, by ts, with the energy that it speaks of."""
    steps = []
    previous: Fraction | None = None
    for ts in sorted(readings):
        value = Fraction(readings[ts].kwh)
        if kind == "interval":
            step = value
        elif previous is None:
            step = Fraction(0)
        else:
            step = value - previous if value >= previous else value
        steps.append((readings[ts], step))
        previous = value
    return steps


def implausible(
    reading: Reading, before: Reading, device: Device, *, has_battery: bool
) -> set[str]:
    """Why a reading is suspect under the limits that a new database has."""
    span = reading.ts - before.ts
    if span > timedelta(days=10):
        return set()
    seconds = span.total_seconds()
    energy = reading.kwh
    if device.kind == "register" and before.kwh <= reading.kwh:
        energy = reading.kwh - before.kwh
    faults = set()
    if energy > 500 * max(seconds, device.interval_seconds) / 3600 + 0.1:
        faults.add("power")
    if device.kind == "register" and energy > 1000:
        faults.add("register_step")
    if has_battery and abs(reading.celsius - before.celsius) > 1 + 5 * seconds / 60:
        faults.add("temperature_rate")
    if has_battery and abs(reading.soc - before.soc) > 1 + 15 * seconds / 60:
        faults.add("soc_rate")
    late = (reading.received_at or reading.ts) - reading.ts
    drift = late - ((before.received_at or before.ts) - before.ts)
    hours = round(late / HOUR)
    is_whole = 1 <= hours <= 14 and abs(late - hours * HOUR) <= timedelta(minutes=2)
    if is_whole and abs(drift) <= span / 2:
        faults.add("clock_offset")
    return faults


def _seconds(span: timedelta) -> Fraction:
    return Fraction(span // timedelta(microseconds=1), 1_000_000)


def _verdict(
    ac: Fraction | None, metered: Fraction, ratio: Fraction | None, coverage: Fraction
) -> str:
    if ac is None:
        return "no_meter"
    if coverage < Fraction(9, 10):
        return "insufficient_data"
    if ac == 0 and metered > 0:
        return "above_one"
    if ratio is not None and ratio > 1:
        return "above_one"
    if ratio is not None and ratio < Fraction(85, 100):
        return "below_threshold"
    return "ok"


class World(Story):
    """The same story, told to the database as well."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.db = db

    def add_meter(self, meter_id: str, kind: str = "interval", seconds: float = 60) -> str:
        self.meters[meter_id] = Device(kind, seconds)
        self._declare("meter", meter_id, kind, seconds)
        return meter_id

    def add_vehicle(self, vehicle_id: str, kind: str = "interval", seconds: float = 60) -> str:
        self.vehicles[vehicle_id] = Device(kind, seconds)
        self._declare("vehicle", vehicle_id, kind, seconds)
        return vehicle_id

    def _declare(self, table: str, device: str, kind: str, seconds: float) -> None:
        self.db.execute(
            f"INSERT INTO {table} VALUES (%s, %s, %s)"
            f" ON CONFLICT ({table}_id) DO UPDATE SET energy_kind = excluded.energy_kind,"
            " reporting_interval = excluded.reporting_interval",
            (device, kind, timedelta(seconds=seconds)),
        )
        self.db.execute("SELECT judge_range(%s, %s, '-infinity', 'infinity')", (table, device))
        self.judge(table, device)

    def assign(
        self, meter_id: str, vehicle_id: str, since: datetime, until: datetime | None = None
    ) -> None:
        self.assignments.append(Assignment(meter_id, vehicle_id, since, until))
        self.db.execute(
            "INSERT INTO charging_assignment (meter_id, vehicle_id, during)"
            " VALUES (%s, %s, tstzrange(%s, %s))",
            (meter_id, vehicle_id, since, until),
        )

    def read_meter(self, meter_id: str, readings: Iterable[Reading]) -> None:
        """Store readings in one transaction; of one instant the first stays."""
        known = self.meter_readings.setdefault(meter_id, {})
        new = _first_of_each(readings, known)
        self.db.execute(
            "INSERT INTO meter_telemetry_history"
            " SELECT %s, ts, kwh, 230, at"
            " FROM unnest(%s::timestamptz[], %s::float8[], %s::timestamptz[]) r(ts, kwh, at)"
            " ON CONFLICT DO NOTHING",
            (meter_id, [r.ts for r in new], [r.kwh for r in new],
             [r.received_at or r.ts for r in new]),
        )  # fmt: skip
        self._judge("meter", meter_id, new)

    def read_vehicle(self, vehicle_id: str, readings: Iterable[Reading]) -> None:
        """The same for a vehicle."""
        known = self.vehicle_readings.setdefault(vehicle_id, {})
        new = _first_of_each(readings, known)
        self.db.execute(
            "INSERT INTO vehicle_telemetry_history SELECT %s, ts, soc, kwh, celsius, at"
            " FROM unnest(%s::timestamptz[], %s::float8[], %s::float8[], %s::float8[],"
            "             %s::timestamptz[]) r(ts, soc, kwh, celsius, at)"
            " ON CONFLICT DO NOTHING",
            (vehicle_id, [r.ts for r in new], [r.soc for r in new], [r.kwh for r in new],
             [r.celsius for r in new], [r.received_at or r.ts for r in new]),
        )  # fmt: skip
        self._judge("vehicle", vehicle_id, new)

    def _judge(self, device_class: str, device: str, new: list[Reading]) -> None:
        """Have the new readings judged, as the writer does."""
        self.judge(device_class, device)
        if new:
            self.db.execute(
                "SELECT judge_inserted(%s, array_fill(%s::text, ARRAY[%s]), %s)",
                (device_class, device, len(new), [r.ts for r in new]),
            )

    def refresh(self, since: datetime | None = None, until: datetime | None = None) -> None:
        """Roll up both classes by the hour; None: without end."""
        for rollup in ("meter_hourly", "vehicle_hourly"):
            self.refresh_one(rollup, since, until)

    def refresh_one(self, rollup: str, since: datetime | None, until: datetime | None) -> None:
        self.db.execute(
            "CALL refresh_continuous_aggregate(%s::regclass, %s::timestamptz, %s::timestamptz)",
            (rollup, since, until),
        )

    def fetch(self, vehicle_id: str, since: datetime, until: datetime) -> dict[str, Any] | None:
        with self.db.cursor(row_factory=dict_row) as cursor:
            cursor.execute(
                "SELECT * FROM vehicle_performance_v1(%s, %s, %s)", (vehicle_id, since, until)
            )
            rows = cursor.fetchall()
        assert len(rows) <= 1
        return rows[0] if rows else None

    def check(self, vehicle_id: str, since: datetime, until: datetime) -> dict[str, Any]:
        """Hold the answer against the oracle; returns it."""
        answer = self.fetch(vehicle_id, since, until)
        expected = self.performance(vehicle_id, since, until)
        difference = differ(answer, expected)
        assert not difference, f"{vehicle_id} {since} .. {until}: {'; '.join(difference)}"
        assert answer is not None
        return answer

    def fetch_fleet(self, since: datetime, until: datetime) -> dict[str, dict[str, Any]]:
        with self.db.cursor(row_factory=dict_row) as cursor:
            cursor.execute("SELECT * FROM fleet_performance_v1(%s, %s)", (since, until))
            rows = cursor.fetchall()
        fleet = {row["vehicle_id"]: row for row in rows}
        assert len(rows) == len(fleet)
        return fleet

    def check_fleet(self, since: datetime, until: datetime) -> dict[str, dict[str, Any]]:
        """Hold every vehicle's row of the fleet against the oracle and the answer for it alone."""
        fleet = self.fetch_fleet(since, until)
        assert set(fleet) == set(self.vehicles)
        for vehicle_id, row in fleet.items():
            for expected in (
                self.performance(vehicle_id, since, until),
                self.fetch(vehicle_id, since, until),
            ):
                difference = differ(row, expected)
                assert not difference, f"{vehicle_id} {since} .. {until}: {'; '.join(difference)}"
        return fleet

    def check_sessions(
        self, vehicle_id: str, since: datetime, until: datetime
    ) -> list[dict[str, Any]]:
        """Hold the sessions against the oracle; returns them."""
        with self.db.cursor(row_factory=dict_row) as cursor:
            cursor.execute(
                "SELECT * FROM charging_session_v1(%s, %s, %s)", (vehicle_id, since, until)
            )
            found = cursor.fetchall()
        wanted = self.sessions(vehicle_id, since, until)
        told = f"{vehicle_id} {since} .. {until}"
        assert [row["started_at"] for row in found] == [row["started_at"] for row in wanted], told
        for row, expected in zip(found, wanted, strict=True):
            difference = differ(row, expected)
            assert not difference, f"{told} {row['started_at']}: {'; '.join(difference)}"
        return found


def _first_of_each(readings: Iterable[Reading], known: dict[datetime, Reading]) -> list[Reading]:
    new = []
    for reading in readings:
        if reading.ts not in known:
            known[reading.ts] = reading
            new.append(reading)
    return new


def differ(answer: dict[str, Any] | None, expected: dict[str, Any] | None) -> list[str]:
    """What is not the same, figures to 1e-9 relative; a verdict may fall either way at a limit."""
    if answer is None or expected is None:
        return [] if answer is expected else [f"{answer} instead of {expected}"]
    assert list(answer) == list(expected)
    wrong = []
    for name, wanted in expected.items():
        given = answer[name]
        if isinstance(wanted, float) and isinstance(given, float):
            same = math.isclose(given, wanted, rel_tol=1e-9, abs_tol=1e-9 if "temp" in name else 0)
        elif name == "verdict":
            same = given == wanted or _at_a_limit(expected)
        else:
            same = given == wanted
        if not same:
            wrong.append(f"{name} is {given}, not {wanted}")
    return wrong


def _at_a_limit(expected: dict[str, Any]) -> bool:
    ratio = expected["efficiency_ratio"]
    return any(
        math.isclose(value, limit, rel_tol=1e-9)
        for value, limit in (
            (1.0 if ratio is None else ratio, 1.0),
            (0.0 if ratio is None else ratio, 0.85),
            (expected["ac_coverage"], 0.9),
            (expected["dc_coverage"], 0.9),
        )
    )


def every(
    seconds: float,
    since: datetime,
    count: int,
    kwh: float,
    celsius: float = 20.0,
) -> list[Reading]:
    """`count` readings of the same kWh, one each `seconds`, from `since` on."""
    return [Reading(since + timedelta(seconds=seconds * i), kwh, celsius) for i in range(count)]


def counter(
    seconds: float, since: datetime, count: int, start: float, step: float, celsius: float = 20.0
) -> list[Reading]:
    """A register that begins at `start` and grows by `step`."""
    return [
        Reading(since + timedelta(seconds=seconds * i), start + step * i, celsius)
        for i in range(count)
    ]


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]
