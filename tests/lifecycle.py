"""The life of a platform, as a state machine: anything may happen, in any order, in any era.

Each step is done to the product by its own doors (the decoder and the writer, the ledger, the jobs)
and told to the oracle; then the answers are compared. `Stage` is one database on which one example
after the other begins as on a new one. `TOURS` are lives in which every rule happens and that stand
on every edge; Hypothesis finds the others.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import hypothesis
import msgspec
import psycopg
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.rows import dict_row

from conftest import Clock
from energy_platform import corrections, database, fleet, schema
from energy_platform.errors import ConflictError, NotFoundError, UnprocessableError
from energy_platform.ingest import OUTCOMES, Writer
from energy_platform.readings import AHEAD_MAX, TimeLimits, decode_array
from oracle import (
    BEGIN_OF_TIME,
    Assignment,
    Device,
    Reading,
    Story,
    differ,
    hour_of,
    local_edges,
    utc,
)

TICK = timedelta(microseconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

CLASSES = ("meter", "vehicle")
ROLLUPS = ("meter_hourly", "vehicle_hourly", "meter_daily", "vehicle_daily")
METERS = ("m-1s", "m-15min", "m-unheard")
VEHICLES = ("v-15min", "v-1min", "v-unheard")


class Era(NamedTuple):
    """When a life is lived. Its second day is the one that is special."""

    begin: datetime
    zone: str
    late_window: timedelta = 500 * DAY
    chunk: timedelta = DAY


ERAS = {
    "turn of the century": Era(utc(1999, 12, 31), "Europe/Paris", 1500 * DAY),
    "leap day 2000": Era(utc(2000, 2, 28), "America/New_York", chunk=6 * HOUR),
    "leap day 2024": Era(utc(2024, 2, 28), "Europe/Paris", 4 * DAY),
    "summer time in New York": Era(utc(2026, 3, 7), "America/New_York", 2 * DAY),
    "summer time in Paris": Era(utc(2026, 3, 28), "Europe/Paris"),
    "winter time in Paris": Era(utc(2025, 10, 25), "Europe/Paris", chunk=6 * HOUR),
    "winter time in New York": Era(utc(2026, 10, 31), "America/New_York"),
    "leap day 2096": Era(utc(2096, 2, 28), "Europe/Paris", chunk=2 * HOUR),
    "end of 2099": Era(utc(2099, 12, 30), "America/New_York"),
}


class WrongAnswer(AssertionError):
    """The product says something else than the oracle."""


Key = tuple[str, datetime]


class Said(NamedTuple):
    """One reading as a device says it; `extra` is the voltage, or charge and temperature."""

    device_class: str
    device_id: str
    ts: datetime
    kwh: float
    extra: tuple[float, ...]

    @property
    def key(self) -> Key:
        return self.device_id, self.ts

    @property
    def values(self) -> tuple[float, ...]:
        return self.kwh, *self.extra

    def as_json(self, zone: ZoneInfo | None) -> dict[str, Any]:
        """Stamped in UTC or by the clocks of a zone: the same instant."""
        fields = (
            ("meterId", "kwhConsumedAc", "voltage")
            if self.device_class == "meter"
            else ("vehicleId", "kwhDeliveredDc", "soc", "batteryTemp")
        )
        body = dict(zip(fields, (self.device_id, *self.values), strict=True))
        return {**body, "timestamp": self.ts.astimezone(zone or UTC).isoformat()}


@dataclass
class Tally:
    """What was done and asked, over all lives on a stage."""

    lives: int = 0
    steps: int = 0
    answers: int = 0
    readings: Counter[str] = field(default_factory=Counter)
    steps_until_wrong: int | None = None

    def as_counts(self) -> dict[str, int]:
        counts = {"lives": self.lives, "steps": self.steps, "answers": self.answers}
        return {**counts, **self.readings}


def stop_workers(db: psycopg.Connection[Any]) -> None:
    """TimescaleDB's own workers look at the real clock, which is in another era."""
    with suppress(psycopg.Error):  # the embedded engine has none
        db.execute("SELECT _timescaledb_functions.stop_background_workers()")


class Stage:
    """One database for many lives. `reset` puts back its rows and TimescaleDB's own books."""

    BOOKS = (
        "continuous_aggs_invalidation_threshold",
        "continuous_aggs_hypertable_invalidation_log",
        "continuous_aggs_materialization_invalidation_log",
        "continuous_aggs_materialization_ranges",
        "continuous_aggs_watermark",
    )

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.db = self.connect()
        self.tally = Tally()
        stop_workers(self.db)
        # By the real clock all that happens here is past its retention, or far from it.
        self.db.execute(
            "SELECT alter_job(job_id, config => jsonb_set(config, '{drop_after}', '\"200 years\"'))"
            " FROM job_status JOIN timescaledb_information.jobs USING (job_id)"
            " WHERE job = 'policy_retention' AND relation LIKE '%_hourly'"
        )
        self.db.execute("CREATE SCHEMA stage")
        for book in self.BOOKS:
            self.db.execute(f"CREATE TABLE stage.{book} AS TABLE _timescaledb_catalog.{book}")

    def connect(self) -> psycopg.Connection[Any]:
        """In UTC; compiling a query takes longer than running it on so few rows."""
        return psycopg.connect(self.dsn, autocommit=True, options="-c timezone=UTC -c jit=off")

    def reset(self) -> None:
        """Everything that a life leaves behind, but for what migrate made."""
        self.db.execute(
            "TRUNCATE meter_telemetry_history, vehicle_telemetry_history, meter_live_status,"
            " vehicle_live_status, charging_assignment, meter, vehicle, quarantine, job_run,"
            " correction, corrected_meter_reading, corrected_vehicle_reading, suspect_reading"
            " RESTART IDENTITY"
        )
        for rollup in reversed(ROLLUPS):
            # TRUNCATE of an aggregate by its view now and then reads freed memory in 2.23.
            self.db.execute(
                "SELECT drop_chunks(%s::regclass, newer_than => '1900-01-01'::timestamptz)",
                (rollup,),
            )
        with self.db.transaction():
            for book in self.BOOKS:
                self.db.execute(f"DELETE FROM _timescaledb_catalog.{book}")
                self.db.execute(f"INSERT INTO _timescaledb_catalog.{book} TABLE stage.{book}")
            self.db.execute(
                "SELECT alter_job(job_id, scheduled => false) FROM job_status"
                " WHERE job = 'policy_retention' AND scheduled"
            )

    def close(self) -> None:
        self.db.close()


# ---- what a step is told ------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
EDGES = (
    0 * DAY,
    TICK,
    -TICK,
    timedelta(seconds=1),
    17.25 * MINUTE,
    30 * MINUTE - TICK,
    45 * MINUTE,
)
# Since the era began: whole hours, and what lies just beside them.
INSTANTS = st.builds(lambda hours, edge: hours * HOUR + edge, st.integers(-30, 96),
                     st.sampled_from(EDGES))  # fmt: skip
SPANS = st.sampled_from([None, HOUR, 90 * MINUTE, 3 * HOUR + TICK, DAY, 2 * DAY])
DEVICES = st.sampled_from(METERS + VEHICLES)
KINDS = st.sampled_from(["interval", "register", None])
SECONDS = st.sampled_from([1, 60, 900, None])


def class_of(device_id: str) -> str:
    return "meter" if device_id in METERS else "vehicle"


def midnight_of(at: datetime) -> datetime:
    return at.replace(hour=0, minute=0, second=0, microsecond=0)


class Life(RuleBasedStateMachine):
    """One life of the platform. A subclass says on which stage and in which era."""

    stage: Stage
    era: Era
    questions = 5  # after each step

    def __init__(self) -> None:
        super().__init__()
        self.stage.reset()
        self.stage.tally.lives += 1
        self.story = Story()
        self.heard: dict[Key, list[tuple[float, ...]]] = {}  # all that is known under a key
        self.valid: dict[Key, tuple[float, ...]] = {}  # and what counts
        self.live: dict[str, datetime] = {}  # the newest that counts, of each device
        self.ids: dict[Assignment, int] = {}
        self.clock = Clock(self.era.begin + 3 * DAY)
        self.kept = dict.fromkeys(CLASSES, BEGIN_OF_TIME)  # raw, since when
        self.counters: dict[str, float] = {}
        self.runner = asyncio.Runner()
        self.open()

    def wrong(self, what: str) -> WrongAnswer:
        if self.stage.tally.steps_until_wrong is None:
            self.stage.tally.steps_until_wrong = self.stage.tally.steps
        return WrongAnswer(what)

    # ---- the product, opened and closed ---------------------------------------------------------

    def open(self) -> None:
        dsn = self.stage.dsn
        self.db = self.stage.connect()
        self.pool = database.open_pool(dsn, name="tests", connections_max=1)
        self.writer = Writer(dsn, clock=self.clock, refresh_end=HOUR)
        self.runner.run(self.pool.open())
        self.runner.run(self.writer.__aenter__())

    def close(self) -> None:
        self.runner.run(self.writer.__aexit__())
        self.runner.run(self.pool.close())
        self.db.close()

    def teardown(self) -> None:
        self.close()
        self.runner.close()

    # ---- readings -------------------------------------------------------------------------------

    @property
    def limits(self) -> TimeLimits:
        """No reading is taken where raw rows are dropped: settings that would are refused."""
        now = self.clock()
        late_window = min(self.era.late_window, now - max(self.kept.values()))
        return TimeLimits.at(now, late_window)

    def post(self, readings: list[Said], zone: ZoneInfo | None = None) -> None:
        """Send one body; each outcome must be what the notebook says."""
        body = msgspec.json.encode([said.as_json(zone) for said in readings])
        expected = [self.tell(said) for said in readings]
        for device in {said.device_id for said in readings}:
            self.judge(device)
        batch = decode_array(body, self.limits, 10_000)
        outcomes = self.runner.run(self.writer.record(batch, len(body)))
        for said, outcome, wanted in zip(readings, outcomes, expected, strict=True):
            if outcome != wanted:
                raise self.wrong(f"{said} is {outcome}, not {wanted}")
        account = Counter(outcomes)
        if sum(account[outcome] for outcome in OUTCOMES) != len(readings):
            raise self.wrong(f"{len(readings)} received, but {account}")
        self.stage.tally.readings += account

    def tell(self, said: Said) -> str:
        """Tell the notebook; returns the outcome. What was once heard is known for ever."""
        latest = self.clock() + AHEAD_MAX
        if not self.limits.earliest <= said.ts <= latest:
            return "rejected"
        known = self.heard.get(said.key)
        if known is not None:
            return "duplicate" if said.values in known else "conflicting"
        self.keep(said)
        return "stored"

    def judge(self, device: str) -> None:
        device_class = class_of(device)
        self.story.judge(device_class, device, self.kept[device_class])

    def keep(self, said: Said) -> None:
        """From now on the reading counts."""
        self.heard.setdefault(said.key, []).append(said.values)
        self.valid[said.key] = said.values
        devices, readings = self.story.of_class(said.device_class)
        devices.setdefault(said.device_id, Device("interval", 60))
        soc, celsius = said.extra if said.device_class == "vehicle" else (0.0, 0.0)
        readings.setdefault(said.device_id, {})[said.ts] = Reading(
            said.ts, said.kwh, celsius, soc, self.clock()
        )
        self.live[said.device_id] = max(said.ts, self.live.get(said.device_id, said.ts))

    def say(self, rng: random.Random, device_id: str, ts: datetime) -> Said:
        """What this device would say: a register grows, stands still, is reset."""
        device_class = class_of(device_id)
        devices, _ = self.story.of_class(device_class)
        kwh = rng.choice([0.0, 0.125, 0.5, 7.25, 100.375])
        if device_id in devices and devices[device_id].kind == "register":
            if rng.random() < 0.06:
                self.counters[device_id] = 0.0
            kwh += self.counters.get(device_id, 5000.0)
            self.counters[device_id] = kwh
        extra = (230.0,) if device_class == "meter" else (50.0, rng.randrange(-240, 600) / 4)
        return Said(device_class, device_id, ts, kwh, extra)

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        """Three days of history: runs and single readings, on and beside every kind of edge."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        for device_class in CLASSES:
            self.db.execute("SELECT set_chunk_time_interval(%s::regclass, %s)",
                            (f"{device_class}_telemetry_history", self.era.chunk))  # fmt: skip
        self._declare("m-1s", "interval", 1)
        self._declare("m-15min", "register", 900)
        self._declare("v-15min", "interval", 900)
        self._declare("v-1min", "register", 60)
        cut, whole, end = 35.5 * HOUR, 54 * HOUR, 60.75 * HOUR + timedelta(seconds=30.5)
        self._assign("m-1s", "v-15min", 0 * DAY, None)
        self._assign("m-15min", "v-1min", cut, whole)
        self._assign("m-unheard", "v-1min", whole, end)
        edges = [edge + tick for edge in (cut, whole, end) for tick in (-TICK, 0 * DAY, TICK)]
        single = [h * HOUR + 11 * MINUTE for h in (-20, 3, 26, 40, 44)]  # hours with one reading
        for device in METERS + VEHICLES:
            ats = {*edges, *single}
            for hour in rng.sample(range(72), 4):
                ats |= {hour * HOUR + tick for tick in (-TICK, 0 * DAY, TICK)}
            gap = timedelta(seconds=1) if device == "m-1s" else 15 * MINUTE
            for start in (30 * HOUR - 8 * gap, 58 * HOUR - 8 * gap):
                ats |= {start + i * gap for i in range(16)}
            # A register's counter goes by the device's clock, what arrives by none.
            said = [self.say(rng, device, self.era.begin + at) for at in sorted(ats)]
            rng.shuffle(said)
            for body in (said[::2], said[1::2]):
                self.post(body, ZoneInfo(self.era.zone))
        for vehicle, bucket in (("v-15min", HOUR), ("v-1min", DAY)):
            self._ask_series(vehicle, 19 * HOUR + TICK, 32 * HOUR, bucket)
        self.check(rng)

    @rule(seed=SEEDS, span=st.sampled_from([5 * MINUTE, HOUR, 7 * HOUR, 30 * HOUR]))
    def arrive(self, seed: int, span: timedelta) -> None:
        """A stretch of readings on time, in order or not, at every device's own pace."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        since = self.clock()
        self.clock.now += span
        said = []
        for device in METERS + VEHICLES:
            count = rng.choice([1, 2, 8])
            ats = sorted({since + span * rng.randrange(1, 1000) / 1000 for _ in range(count)})
            said += [self.say(rng, device, at.replace(microsecond=0)) for at in ats]
        if rng.random() < 0.5:
            rng.shuffle(said)
        half = rng.randrange(len(said))
        for body in (said[:half], said[half:]):
            self.post(body)
        self.check(rng, *(r.ts for r in said))

    @precondition(lambda self: self.clock() < self.era.begin + 300 * DAY)
    @rule(seed=SEEDS, days=st.sampled_from([1, 12, 45, 410]))
    def fall_silent(self, seed: int, days: int) -> None:
        """Nothing for a long time, then one device again: what does its register step from?"""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        self.clock.now += days * DAY
        said = [self.say(rng, rng.choice(METERS + VEHICLES), self.clock())]
        self.post(said)
        self.check(rng, self.clock())

    @rule(
        seed=SEEDS,
        device=DEVICES,
        at=INSTANTS,
        gap=st.sampled_from([TICK, timedelta(seconds=1), 15 * MINUTE, HOUR, 20 * HOUR]),
        count=st.sampled_from([1, 2, 6]),
    )
    def arrive_late(
        self, seed: int, device: str, at: timedelta, gap: timedelta, count: int
    ) -> None:
        """A burst of one device, minutes or days late; newest first."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        ats = [self.era.begin + at + i * gap for i in range(count)]
        self.post([self.say(rng, device, at) for at in reversed(ats)])
        self.check(rng, *ats)

    @rule(seed=SEEDS, at=INSTANTS)
    def stand_on_an_edge(self, seed: int, at: timedelta) -> None:
        """Every device, exactly on an hour and a microsecond beside it."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        hour = hour_of(self.era.begin + at)
        ats = [hour - TICK, hour, hour + TICK]
        self.post([self.say(rng, device, at) for device in METERS + VEHICLES for at in ats])
        self.check(rng, *ats)

    @rule(seed=SEEDS)
    def repeat(self, seed: int) -> None:
        """What was sent before, as it was and with other values; and what nobody may send."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        body = []
        keys = sorted(self.heard)
        for key in rng.sample(keys, min(6, len(keys))):
            device, ts = key
            kwh, *extra = rng.choice(self.heard[key])
            same = Said(class_of(device), device, ts, kwh, tuple(extra))
            other = same._replace(kwh=kwh + 0.125)
            also_other = same._replace(extra=(extra[0] + 1, *extra[1:]))
            body += [same, rng.choice([same, other, also_other])]
        device = rng.choice(METERS + VEHICLES)
        newest = max(ts for _, ts in keys) if keys else self.clock()
        new = self.say(rng, device, min(newest + TICK, self.clock()))
        body += [new, new, new._replace(kwh=new.kwh + 0.125)]
        body.append(new._replace(ts=self.clock() + AHEAD_MAX + TICK))
        body.append(new._replace(ts=self.limits.earliest - TICK))
        if rng.random() < 0.5:
            rng.shuffle(body)
        self.post(body)
        self.check(rng, *(r.ts for r in body))

    # ---- corrections ----------------------------------------------------------------------------

    @rule(
        seed=SEEDS, device=DEVICES, at=INSTANTS, span=st.sampled_from([TICK, HOUR, 5 * HOUR, DAY]),
        action=st.sampled_from(["void", "replace"]), again=st.booleans(),
    )  # fmt: skip
    def correct(
        self, seed: int, device: str, at: timedelta, span: timedelta, action: str, again: bool
    ) -> None:
        """Readings of a device are taken out, or others put in their place; perhaps told twice."""
        rng = random.Random(seed)
        self.stage.tally.steps += 1
        since = self.era.begin + at
        mine = [ts for name, ts in sorted(self.valid) if name == device]
        if mine and rng.random() < 0.7:
            since = rng.choice(mine)
        until = since + span
        found = {ts: self.valid[device, ts] for ts in mine if since <= ts < until}
        said = []
        if action == "replace":
            ats = {
                *rng.sample(sorted(found), len(found) // 2),
                since + rng.randrange(span // TICK) * TICK,
            }
            said = [self.say(rng, device, at) for at in sorted(ats)]
            if found and rng.random() < 0.5:  # some stay as they are
                ts, (kwh, *extra) = rng.choice(sorted(found.items()))
                said = [s for s in said if s.ts != ts]
                said.append(Said(class_of(device), device, ts, kwh, tuple(extra)))
        self._correct(action, device, since, until, found, said)
        if again:
            left = {ts: self.valid[device, ts] for name, ts in self.valid
                    if name == device and since <= ts < until}  # fmt: skip
            self._correct(action, device, since, until, left, said)
        # What was taken out is sent again, and stays out.
        self.post([
            Said(class_of(device), device, ts, kwh, tuple(extra))
            for ts, (kwh, *extra) in sorted(found.items())[:3]
        ])  # fmt: skip
        self.check(rng, since, until, *found)

    def _correct(
        self,
        action: Any,
        device: str,
        since: datetime,
        until: datetime,
        found: dict[datetime, tuple[float, ...]],
        said: list[Said],
    ) -> None:
        """Have it corrected, or be refused as it must be."""
        device_class = class_of(device)
        wanted = {s.ts: s.values for s in said}
        gone = [ts for ts in found if found[ts] != wanted.get(ts)]
        new = [s for s in said if found.get(s.ts) != s.values]
        was_heard = any(name == device and since <= ts < until for name, ts in self.heard)
        is_known = device in self.story.of_class(device_class)[0]
        refusal: type[Exception] | None = None
        if since < self.limits.earliest or any(s.ts > self.clock() + AHEAD_MAX for s in said):
            refusal = UnprocessableError
        elif (not gone and not new and not was_heard) or (new and not found and not is_known):
            refusal = NotFoundError
        request = corrections.CorrectionRequest(
            action=action,
            reason="the story wants it",
            **{f"{device_class}_id": device},  # type: ignore[arg-type]
            since=since,
            until=until,
            readings=[msgspec.Raw(msgspec.json.encode(s.as_json(None))) for s in said]
            if action == "replace"
            else None,
        )
        now = self.clock()
        try:
            made = self.runner.run(
                corrections.correct(
                    self.pool, request, made_by="a test", now=now,
                    late_window=now - self.limits.earliest, refresh_end=HOUR,
                )
            )  # fmt: skip
        except (UnprocessableError, NotFoundError) as error:
            if refusal is not type(error):
                raise self.wrong(f"correct {device} {since} .. {until}: {error!r}") from error
            return
        if refusal or (made.voided, made.stored) != (len(gone), len(new)):
            raise self.wrong(f"correct {device} {since} .. {until}: {made}, not {gone}, {new}")
        readings = self.story.of_class(device_class)[1].setdefault(device, {})
        for ts in gone:
            del readings[ts], self.valid[device, ts]
        for reading in new:
            self.keep(reading)
        self.judge(device)
        # The live row is the newest raw reading, unless it is newer than all that was corrected.
        changed = [*gone, *(s.ts for s in new)]
        if changed and self.live.get(device, max(changed)) <= max(changed):
            left = [ts for ts in readings if ts >= self.kept[device_class]]
            if left:
                self.live[device] = max(left)
            else:
                self.live.pop(device, None)

    # ---- the fleet ------------------------------------------------------------------------------

    @rule(seed=SEEDS, device=DEVICES, kind=KINDS, seconds=SECONDS)
    def declare(self, seed: int, device: str, kind: str | None, seconds: int | None) -> None:
        """A device turns out to be something else, for its whole past."""
        self.stage.tally.steps += 1
        self._declare(device, kind, seconds)
        self.check(random.Random(seed))

    def _declare(self, device: str, kind: Any, seconds: int | None) -> None:
        device_class = class_of(device)
        devices, _ = self.story.of_class(device_class)
        was = devices.get(device, Device("interval", 60))
        devices[device] = Device(kind or was.kind, seconds or was.interval_seconds)
        struct: Any = fleet.Meter if device_class == "meter" else fleet.Vehicle
        declaration = fleet.Declaration(
            kind or msgspec.UNSET, timedelta(seconds=seconds) if seconds else msgspec.UNSET
        )
        self.runner.run(fleet.put_device(self.pool, struct, device, declaration))
        self.judge(device)

    @rule(
        seed=SEEDS, meter=st.sampled_from(METERS), vehicle=st.sampled_from(VEHICLES),
        since=INSTANTS, span=SPANS,
    )  # fmt: skip
    def assign(
        self, seed: int, meter: str, vehicle: str, since: timedelta, span: timedelta | None
    ) -> None:
        self.stage.tally.steps += 1
        touched = self._assign(meter, vehicle, since, since + span if span else None)
        self.check(random.Random(seed), *touched)

    @rule(seed=SEEDS, number=st.integers(0, 4), span=SPANS)
    def move_end(self, seed: int, number: int, span: timedelta | None) -> None:
        """An assignment ends at another time, or not yet."""
        self.stage.tally.steps += 1
        touched: list[datetime] = []
        if self.story.assignments:
            was = self.story.assignments[number % len(self.story.assignments)]
            since = was.since - self.era.begin
            touched = self._assign(
                was.meter_id, was.vehicle_id, since, since + span if span else None
            )
        self.check(random.Random(seed), *touched)

    def _assign(
        self, meter: str, vehicle: str, since: timedelta, until: timedelta | None
    ) -> list[datetime]:
        """Write the ledger, or be refused as it must be; returns the instants at stake."""
        begin = self.era.begin
        new = Assignment(meter, vehicle, begin + since, None if until is None else begin + until)
        others = [a for a in self.story.assignments if a[:3] != new[:3]]
        replaced = [a for a in self.story.assignments if a[:3] == new[:3]]
        refused = any(
            (a.meter_id == meter or a.vehicle_id == vehicle)
            and (a.until is None or new.since < a.until)
            and (new.until is None or a.since < new.until)
            for a in others
        )
        try:
            assignment, made = self.runner.run(
                fleet.put_assignment(self.pool, fleet.AssignmentRequest(*new))
            )
        except ConflictError:
            if not refused:
                raise self.wrong(f"{new} is refused, but overlaps with none") from None
        else:
            if refused or made != (not replaced):
                raise self.wrong(f"{new} is taken: overlap {refused}, made {made}")
            self.story.assignments = [*others, new]
            self.story.meters.setdefault(meter, Device("interval", 60))
            self.story.vehicles.setdefault(vehicle, Device("interval", 60))
            self.ids[new] = assignment.assignment_id
        return [at for a in (new, *replaced) for at in (a.since, a.until) if at is not None]

    @rule(seed=SEEDS, number=st.integers(0, 4))
    def unassign(self, seed: int, number: int) -> None:
        self.stage.tally.steps += 1
        touched: list[datetime] = []
        if self.story.assignments:
            gone = self.story.assignments.pop(number % len(self.story.assignments))
            self.runner.run(fleet.delete_assignment(self.pool, self.ids[gone]))
            touched = [at for at in (gone.since, gone.until) if at is not None]
        self.check(random.Random(seed), *touched)

    # ---- what goes on underneath ----------------------------------------------------------------

    @rule(seed=SEEDS, rollup=st.sampled_from(ROLLUPS), since=INSTANTS, span=SPANS)
    def refresh(self, seed: int, rollup: str, since: timedelta, span: timedelta | None) -> None:
        """Any window of any rollup, whole buckets or not."""
        self.stage.tally.steps += 1
        begin = self.era.begin + since
        until = begin + span if span else None
        self._refresh(rollup, begin, until)
        self.check(random.Random(seed), begin, until or begin)

    @rule(seed=SEEDS)
    def refresh_all(self, seed: int) -> None:
        self.stage.tally.steps += 1
        for rollup in ROLLUPS:
            self._refresh(rollup, None, None)
        self.check(random.Random(seed))

    def _refresh(self, rollup: str, since: datetime | None, until: datetime | None) -> None:
        """But not where raw rows are dropped: that would erase what is left of them."""
        device_class, size = rollup.split("_")
        kept = self.kept[device_class]
        if size == "hourly" and kept.year > 1:
            since = max(since or kept, kept)
            if until is not None and until <= since:
                return
        bucket = HOUR if size == "hourly" else DAY
        try:
            self.db.execute(
                "CALL refresh_continuous_aggregate(%s::regclass, %s::timestamptz, %s::timestamptz)",
                (rollup, since, until),
            )
        except psycopg.errors.InvalidParameterValue as error:  # no whole bucket is in it
            if since is None or until is None or until - since >= 2 * bucket:
                raise self.wrong(f"{rollup} {since} .. {until}: {error}") from error

    @rule(
        seed=SEEDS, device_class=st.sampled_from(CLASSES), number=st.integers(0, 9),
        function=st.sampled_from(["compress", "decompress"]),
    )  # fmt: skip
    def change_store(self, seed: int, device_class: str, number: int, function: str) -> None:
        """A chunk becomes columns, or rows again."""
        self.stage.tally.steps += 1
        chunks = [
            row[0]
            for row in self.db.execute(
                "SELECT c::text FROM show_chunks(%s::regclass) c ORDER BY 1",
                (f"{device_class}_telemetry_history",),
            )
        ]
        if chunks:
            guard = "if_not_compressed" if function == "compress" else "if_compressed"
            self.db.execute(
                f"SELECT {function}_chunk(%s::regclass, {guard} => true)",
                (chunks[number % len(chunks)],),
            )
        self.check(random.Random(seed))

    @rule(seed=SEEDS, run_all=st.booleans())
    def run_jobs(self, seed: int, run_all: bool) -> None:
        """Those that are due, by the era's clock."""
        self.stage.tally.steps += 1
        for run in schema.run_due_jobs(self.db, self.clock, run_all=run_all):
            if not run.succeeded:
                raise self.wrong(f"{run.job_name} failed: {run.error}")
        self.check(random.Random(seed))

    @rule(seed=SEEDS, number=st.integers(0, 9))
    def run_policy(self, seed: int, number: int) -> None:
        """One by the real clock, as TimescaleDB's workers would run it; but not retention.

        Settings that let a policy refresh what is dropped are refused.
        """
        self.stage.tally.steps += 1
        erasing = {f"{c}_hourly" for c, kept in self.kept.items() if kept.year > 1}
        jobs = [
            job
            for job in schema.fetch_job_status(self.db)
            if job.job != "policy_retention" and job.relation not in erasing
        ]
        self.db.execute("CALL run_job(%s)", (jobs[number % len(jobs)].job_id,))
        self.check(random.Random(seed))

    @rule(
        seed=SEEDS, device_class=st.sampled_from(CLASSES), days=st.sampled_from([1, 2]),
        rolled=st.booleans(),
    )  # fmt: skip
    def drop(self, seed: int, device_class: str, days: int, rolled: bool) -> None:
        """Retention: what the gate allows, mostly because it was just rolled up."""
        self.stage.tally.steps += 1
        _, readings = self.story.of_class(device_class)
        kept = self.kept[device_class]
        raw = [ts for known in readings.values() for ts in known if ts >= kept]
        until = midnight_of(min(raw, default=self.era.begin)) + days * DAY
        if until <= self.era.begin + 2 * DAY:
            if rolled:
                self._refresh(f"{device_class}_hourly", None, until)
            # A refresh may leave an hour of its window dirty (2.28.3): then the gate waits.
            unrolled = self.db.execute(
                "SELECT unrolled_hours(%s, %s)", (device_class, until)
            ).fetchone()
            if unrolled == (0,):
                self.db.execute(
                    "SELECT drop_chunks(%s::regclass, %s::timestamptz)",
                    (f"{device_class}_telemetry_history", until),
                )
                self.kept[device_class] = until
        self.check(random.Random(seed), until)

    @rule(seed=SEEDS)
    def restart(self, seed: int) -> None:
        self.stage.tally.steps += 1
        self.close()
        self.open()
        self.check(random.Random(seed))

    # ---- questions ------------------------------------------------------------------------------

    @rule()
    def pause(self) -> None:
        """Nothing. The first life that Hypothesis tries is made of its simplest rule alone."""

    @rule(seed=SEEDS)
    def ask(self, seed: int) -> None:
        """Nothing happens, but for questions."""
        self.stage.tally.steps += 1
        self.check(random.Random(seed))

    @rule(
        seed=SEEDS, vehicle=st.sampled_from(VEHICLES), since=INSTANTS,
        span=st.sampled_from([3 * HOUR + TICK, 2 * DAY]), bucket=st.sampled_from([HOUR, DAY]),
    )  # fmt: skip
    def ask_series(
        self, seed: int, vehicle: str, since: timedelta, span: timedelta, bucket: timedelta
    ) -> None:
        """By the hour or by the local day: the buckets of the clocks, each with its own answer."""
        self.stage.tally.steps += 1
        self._ask_series(vehicle, since, span, bucket)
        self.check(random.Random(seed))

    def _ask_series(
        self, vehicle: str, since: timedelta, span: timedelta, bucket: timedelta
    ) -> None:
        begin, end = self.era.begin + since, self.era.begin + since + span
        edges = local_edges(begin, end, bucket, ZoneInfo(self.era.zone))
        lost = any(self.lost_hours(vehicle, *window) for window in pairwise(edges))
        refused = None
        try:
            rows = self.fetch(
                "SELECT * FROM vehicle_performance_series_v1(%s, %s, %s, %s, %s)",
                (vehicle, begin, end, bucket, self.era.zone),
            )
        except psycopg.DatabaseError as error:
            refused = error
        if (refused is not None) != lost:
            raise self.wrong(f"series {vehicle} {begin} .. {end} by {bucket}: {refused!r}")
        if refused is None and vehicle in self.story.vehicles:
            windows = list(pairwise(edges))
            if [(row["since"], row["until"]) for row in rows] != windows:
                raise self.wrong(f"series {begin} .. {end} by {bucket} is cut otherwise")
            for row, window in zip(rows, windows, strict=True):
                self.compare(row, vehicle, *window)

    @rule(seed=SEEDS)
    def ask_rollups(self, seed: int) -> None:
        """Once refreshed, the aggregates and the energy views agree with the notebook."""
        self.stage.tally.steps += 1
        for rollup in ROLLUPS:
            self._refresh(rollup, None, None)
        for rollup in ROLLUPS:
            device_class, size = rollup.split("_")
            bucket = "hour" if size == "hourly" else "day"
            view = f"{device_class}_energy_{size}_v1"
            extra = "" if device_class == "meter" else (
                ", r.battery_temp_sum, v.battery_temp_min, v.battery_temp_max"
            )  # fmt: skip
            rows = self.fetch(
                f"SELECT v.{device_class}_id AS id, v.{bucket} AS since, v.readings, v.kwh,"
                f" r.readings AS rolled, r.kwh_sum, r.kwh_increase, r.kwh_first, r.ts_first,"
                f" r.kwh_last, r.ts_last{extra}"
                f" FROM {view} v FULL JOIN {rollup} r USING ({device_class}_id, {bucket})"
                " ORDER BY 1, 2"
            )
            wanted = self.story.buckets(device_class, HOUR if size == "hourly" else DAY)
            if [(r["id"], r["since"]) for r in rows] != [(w["id"], w["since"]) for w in wanted]:
                raise self.wrong(f"{view} has other buckets than the notebook")
            for row, right in zip(rows, wanted, strict=True):
                self.stage.tally.answers += 1
                difference = differ(row, right)
                if difference:
                    raise self.wrong(f"{view} {right['id']} {right['since']}: {difference}")
        self.check(random.Random(seed))

    def check(self, rng: random.Random, *touched: datetime) -> None:
        """After every step: the live rows, and what a few windows answer."""
        self.check_live()
        pool = [ts for _, ts in rng.sample(sorted(self.heard), min(4, len(self.heard)))]
        for assignment in self.story.assignments:
            pool += [at for at in (assignment.since, assignment.until) if at is not None]
        pool += [at for at in self.kept.values() if at.year > 1]
        some = list(touched) or pool
        for number in range(self.questions if self.heard else 0):
            at = rng.choice(some if number % 2 else pool)
            vehicle = rng.choice(VEHICLES)
            since, until = rng.choice(SHAPES)(rng, at, rng.choice(pool))
            self.question(vehicle, since, until)
            if number == 0:
                self.question_fleet(since, until)

    def check_live(self) -> None:
        for device_class, columns in (
            ("meter", "kwh_consumed_ac, voltage"),
            ("vehicle", "kwh_delivered_dc, soc, battery_temp"),
        ):
            rows = self.db.execute(f"SELECT {device_class}_id, ts, {columns}"
                                   f" FROM {device_class}_live_status")  # fmt: skip
            live = {device: (ts, *values) for device, ts, *values in rows}
            wanted = {
                device: (ts, *self.valid[device, ts])
                for device, ts in self.live.items()
                if class_of(device) == device_class
            }
            if live != wanted:
                raise self.wrong(f"live {live}, not {wanted}")

    def lost_hours(self, vehicle: str, since: datetime, until: datetime) -> bool:
        return any(
            hour < self.kept[device_class]
            for device_class, hour in self.story.cut_hours(vehicle, since, until)
        )

    def question(self, vehicle: str, since: datetime, until: datetime) -> None:
        """Hold one answer against the oracle; what cannot be answered must be refused."""
        lost = self.lost_hours(vehicle, since, until)
        try:
            rows = self.fetch(
                "SELECT * FROM vehicle_performance_v1(%s, %s, %s)", (vehicle, since, until)
            )
        except psycopg.DatabaseError as error:
            if error.sqlstate != "ENR01" or not lost:
                raise self.wrong(f"{vehicle} {since} .. {until}: {error!r}") from error
            self.stage.tally.answers += 1
            oldest = datetime.fromisoformat(error.diag.message_detail or "")
            if oldest < max(self.kept.values()):
                raise self.wrong(f"{oldest} is said to be kept, of {self.kept}") from error
            self.question(vehicle, oldest + MINUTE, oldest + 13 * HOUR)
            return
        if lost:
            raise self.wrong(f"{vehicle} {since} .. {until} is answered, but raw rows are gone")
        self.compare(rows[0] if rows else None, vehicle, since, until)

    def question_fleet(self, since: datetime, until: datetime) -> None:
        """The same of all vehicles at once."""
        lost = any(self.lost_hours(vehicle, since, until) for vehicle in self.story.vehicles)
        try:
            rows = self.fetch("SELECT * FROM fleet_performance_v1(%s, %s)", (since, until))
        except psycopg.DatabaseError as error:
            if error.sqlstate != "ENR01" or not lost:
                raise self.wrong(f"fleet {since} .. {until}: {error!r}") from error
            return
        if lost:
            raise self.wrong(f"fleet {since} .. {until} is answered, but raw rows are gone")
        by_vehicle = {row["vehicle_id"]: row for row in rows}
        if by_vehicle.keys() != self.story.vehicles.keys():
            raise self.wrong(f"the fleet is {sorted(by_vehicle)}")
        for vehicle, row in by_vehicle.items():
            self.compare(row, vehicle, since, until)

    def compare(
        self, row: dict[str, Any] | None, vehicle: str, since: datetime, until: datetime
    ) -> None:
        self.stage.tally.answers += 1
        difference = differ(row, self.story.performance(vehicle, since, until))
        if difference:
            raise self.wrong(f"{vehicle} {since} .. {until}: {'; '.join(difference)}")

    def fetch(self, query: str, parameters: Any = None) -> list[dict[str, Any]]:
        with self.db.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), parameters).fetchall()


Window = tuple[datetime, datetime]


def _between(rng: random.Random, at: datetime, other: datetime) -> Window:
    since, until = sorted((at, other))
    return since, until if since < until else since + TICK


# The shapes of windows that are asked about, given an instant and another one.
SHAPES: tuple[Callable[[random.Random, datetime, datetime], Window], ...] = (
    lambda rng, at, other: (at, at + TICK),
    lambda rng, at, other: (at - TICK, at),
    lambda rng, at, other: (hour_of(at), hour_of(at) + HOUR),
    lambda rng, at, other: (at - 90 * MINUTE, at),
    lambda rng, at, other: (at + rng.choice([0 * DAY, TICK]), at + rng.choice(EDGES) + HOUR),
    lambda rng, at, other: (midnight_of(at), midnight_of(at) + rng.choice([1, 2]) * DAY),
    lambda rng, at, other: (at - rng.choice([1, 30]) * DAY, at + DAY),
    _between,
    _between,
)


# ---- lives --------------------------------------------------------------------------------------


def _at(hours: float, edge: timedelta = 0 * DAY) -> timedelta:
    return hours * HOUR + edge


Steps = list[tuple[str, dict[str, Any]]]

# Lives in which every rule happens: what each planted bug needs to show, by construction.
TOURS: dict[str, tuple[str, Steps]] = {
    "late rows": (
        "winter time in New York",
        [
            ("begin", {}),
            ("ask", {}),
            # Rolled up in part, then as a whole; late rows into what is rolled up.
            ("refresh", {"rollup": "meter_hourly", "since": _at(20.25), "span": DAY}),
            ("refresh", {"rollup": "vehicle_hourly", "since": _at(31), "span": 3 * HOUR + TICK}),
            ("refresh_all", {}),
            ("ask", {}),
            ("stand_on_an_edge", {"at": _at(40)}),
            ("arrive_late", {"device": "m-15min", "at": _at(41.75), "gap": TICK, "count": 2}),
            ("arrive_late", {"device": "v-1min", "at": _at(37), "gap": HOUR, "count": 6}),
            # A refresh elsewhere takes note of late rows, but leaves them dirty.
            ("refresh", {"rollup": "meter_hourly", "since": _at(1), "span": 3 * HOUR + TICK}),
            ("refresh", {"rollup": "vehicle_hourly", "since": _at(1), "span": 3 * HOUR + TICK}),
            ("ask", {}),
            ("refresh", {"rollup": "meter_hourly", "since": _at(38), "span": 3 * HOUR + TICK}),
            ("repeat", {}),
            ("arrive", {"span": 7 * HOUR}),
            ("repeat", {}),
            # A refresh beyond all that has arrived, and then it arrives.
            ("refresh", {"rollup": "meter_hourly", "since": _at(70), "span": 2 * DAY}),
            ("arrive", {"span": 7 * HOUR}),
            ("ask_rollups", {}),
            ("ask_series", {"vehicle": "v-1min", "since": _at(23.25), "span": 2 * DAY,
                            "bucket": HOUR}),
            ("ask_series", {"vehicle": "v-15min", "since": _at(-3), "span": 2 * DAY,
                            "bucket": DAY}),
        ],
    ),
    "another fleet": (
        "leap day 2024",
        [
            ("begin", {}),
            ("refresh_all", {}),
            ("change_store", {"device_class": "vehicle", "number": 1, "function": "compress"}),
            ("arrive_late", {"device": "v-15min", "at": _at(4.2), "gap": 15 * MINUTE, "count": 6}),
            ("change_store", {"device_class": "vehicle", "number": 1, "function": "decompress"}),
            ("move_end", {"number": 0, "span": 2 * DAY}),
            ("assign", {"meter": "m-1s", "vehicle": "v-unheard", "since": _at(48), "span": DAY}),
            ("assign", {"meter": "m-1s", "vehicle": "v-15min", "since": _at(70), "span": None}),
            ("declare", {"device": "v-15min", "kind": "register", "seconds": None}),
            ("declare", {"device": "m-1s", "kind": "register", "seconds": 900}),
            ("declare", {"device": "m-15min", "kind": "interval", "seconds": None}),
            ("unassign", {"number": 1}),
            ("assign", {"meter": "m-15min", "vehicle": "v-1min", "since": _at(30), "span": DAY}),
            ("declare", {"device": "m-15min", "kind": "register", "seconds": None}),
            ("correct", {"device": "m-15min", "at": _at(36), "span": 5 * HOUR, "action": "void",
                         "again": True}),
            ("change_store", {"device_class": "meter", "number": 1, "function": "compress"}),
            ("correct", {"device": "m-1s", "at": _at(30), "span": HOUR, "action": "replace",
                         "again": True}),
            ("correct", {"device": "v-1min", "at": _at(57), "span": 5 * HOUR, "action": "void",
                         "again": False}),
            ("repeat", {}),
            ("restart", {}),
            ("run_jobs", {"run_all": False}),
            *[("run_policy", {"number": number}) for number in range(8)],
            ("ask_rollups", {}),
        ],
    ),
    "retention": (
        "leap day 2000",
        [
            ("begin", {}),
            # The gate keeps what is not rolled up.
            ("drop", {"device_class": "vehicle", "days": 1, "rolled": False}),
            ("refresh_all", {}),
            ("arrive_late", {"device": "v-1min", "at": _at(-22.3), "gap": 15 * MINUTE,
                             "count": 2}),
            ("drop", {"device_class": "vehicle", "days": 1, "rolled": False}),
            ("drop", {"device_class": "vehicle", "days": 2, "rolled": True}),
            ("drop", {"device_class": "meter", "days": 1, "rolled": True}),
            ("ask", {}),
            ("drop", {"device_class": "meter", "days": 2, "rolled": True}),
            ("ask", {}),
            ("ask_series", {"vehicle": "v-1min", "since": _at(1), "span": DAY, "bucket": HOUR}),
            ("arrive", {"span": 7 * HOUR}),
            ("run_jobs", {"run_all": True}),
            ("ask_rollups", {}),
        ],
    ),
    "silence": (
        "leap day 2096",
        [
            ("begin", {}),
            ("fall_silent", {"days": 12}),
            ("arrive", {"span": HOUR}),
            ("refresh_all", {}),
            ("fall_silent", {"days": 45}),
            ("arrive", {"span": 30 * HOUR}),
            ("refresh_all", {}),
            ("fall_silent", {"days": 410}),
            ("arrive", {"span": 5 * MINUTE}),
            ("run_jobs", {"run_all": True}),
            ("repeat", {}),
            ("ask_rollups", {}),
        ],
    ),
}  # fmt: skip


def tour(stage: Stage, name: str, era: str | None = None) -> None:
    """Live a tour, in its own era or another. What goes wrong says after which steps."""
    its_era, steps = TOURS[name]
    settled = {"stage": stage, "era": ERAS[era or its_era], "questions": 12}
    life: Life = type("Tour", (Life,), settled)()
    told = []
    try:
        for number, (rule_name, arguments) in enumerate(steps):
            told.append(f"{rule_name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})")
            getattr(life, rule_name)(seed=number, **arguments)
    except Exception as error:
        error.add_note(f"{name} in {era or its_era}, after " + "\n  ".join(told))
        raise
    finally:
        life.teardown()


def explore(
    stage: Stage, era: Era, *, seed: int, examples: int, steps: int, phases: Iterable[Phase]
) -> None:
    """Let Hypothesis live other lives; the same seed gives the same ones."""
    machine = hypothesis.seed(seed)(type("AnyLife", (Life,), {"stage": stage, "era": era}))
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=tuple(phases),
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
