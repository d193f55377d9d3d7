"""Everything at once, on connections of their own: writers, readers, refreshes, a changing fleet.

What a reader may be told is not one answer: a body that is on its way may be in it or not. So each
writer says when it begins and when it knows the commit, and likewise who changes the fleet. A
reader's answer must be the oracle's for some choice among what was on its way while it asked: all
that was known before, nothing twice, nothing that was never sent. Energies are powers of two, so no
two sets of readings add up to the same, and sums are exact.
"""

import asyncio
import itertools
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from conftest import Clock
from energy_platform import database, fleet
from energy_platform.errors import StorageError
from energy_platform.ingest import Writer
from energy_platform.readings import TimeLimits, decode_array
from lifecycle import DAY, HOUR, MINUTE, ROLLUPS, TICK, Said, WrongAnswer
from oracle import Assignment, Device, Reading, Story, differ, hour_of

SLOTS = 48  # readings of a device: as many as a float8 can add up without loss
UNCERTAIN_MAX = 10  # readings on their way that concern one answer; else it is not judged
ENERGIES = ("total_kwh_consumed_ac", "total_kwh_delivered_dc", "metered_kwh_delivered_dc")


@dataclass(frozen=True)
class Trio:
    """What is declared of a vehicle and its two meters, and when each fed it."""

    vehicle: Device
    meters: tuple[Device, Device]
    assignments: tuple[Assignment, ...]


@dataclass(eq=False)
class Question:
    """What may or may not be in the answer: bodies and changes on their way while it is asked."""

    vehicle_id: str
    bodies: set[int]
    trios: list[Trio]


@dataclass
class Storm:
    """The shared notebook of all who take part. One event loop, so it needs no lock."""

    dsn: str
    begin: datetime
    seed: int
    vehicles: int
    repeats: float = 0.2  # of readings that are sent again, perhaps by another writer
    flying: set[int] = field(default_factory=set)  # bodies that began and are not known to be in
    sent: dict[str, dict[datetime, tuple[Reading, list[int]]]] = field(default_factory=dict)
    trios: dict[str, list[Trio]] = field(default_factory=dict)  # the last, and one on its way
    questions: list[Question] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.clock = Clock(self.begin + 3 * DAY)
        self.pool = database.open_pool(self.dsn, name="tests", connections_max=8)

    async def run(self, writers: int = 3, readers: int = 2) -> None:
        """Until every reading is in; then all is quiet, and each answer is the one there is."""
        async with self.pool:
            for number in range(self.vehicles):
                await self.found(f"V-{self.seed}-{number}")
            readings = self.plan_readings()
            busy = [
                asyncio.create_task(work)
                for work in (
                    self.refresh(),
                    self.change_stores(),
                    self.change_fleet(),
                    *(self.read(number) for number in range(readers)),
                )
            ]
            try:
                await asyncio.gather(
                    *(self.write(readings[number::writers]) for number in range(writers))
                )
            finally:
                self.is_over = True
                await asyncio.gather(*busy)
            for vehicle_id in self.trios:
                for since, until in ((-DAY, 4 * DAY), (9 * HOUR, DAY), (DAY, 2 * DAY + TICK)):
                    await self.ask(vehicle_id, self.begin + since, self.begin + until)

    async def connect(self) -> AsyncConnection[Any]:
        return await AsyncConnection.connect(
            self.dsn, autocommit=True, options="-c timezone=UTC -c jit=off"
        )

    # ---- the fleet ------------------------------------------------------------------------------

    async def found(self, vehicle_id: str) -> None:
        """A vehicle that hung on one meter, and then on another."""
        first, second = f"{vehicle_id}-m1", f"{vehicle_id}-m2"
        assignments = (
            Assignment(first, vehicle_id, self.begin, self.begin + 30 * HOUR),
            Assignment(second, vehicle_id, self.begin + 40.25 * HOUR, None),
        )
        kinds = [self.random.choice(["interval", "register"]) for _ in range(3)]
        trio = Trio(Device(kinds[0], 60), (Device(kinds[1], 60), Device(kinds[2], 1)), assignments)
        self.trios[vehicle_id] = [trio]
        await self.declare(fleet.Vehicle, vehicle_id, trio.vehicle)
        for meter_id, device, assignment in zip(
            (first, second), trio.meters, assignments, strict=True
        ):
            await self.declare(fleet.Meter, meter_id, device)
            await fleet.put_assignment(self.pool, fleet.AssignmentRequest(*assignment))

    async def declare(self, struct: Any, device_id: str, device: Device) -> None:
        kind: Any = device.kind
        declaration = fleet.Declaration(kind, timedelta(seconds=device.interval_seconds))
        while True:
            with suppress(StorageError):  # it waits five seconds for ingest, which may be held up
                await fleet.put_device(self.pool, struct, device_id, declaration)
                return

    async def change_fleet(self) -> None:
        """One change after the other, each a transaction: an end moves, a kind is another."""
        while not self.is_over:
            vehicle_id = self.random.choice(list(self.trios))
            (trio,) = self.trios[vehicle_id]
            first, second = trio.assignments
            kind = self.random.choice(["interval", "register"])
            moved = self.begin + self.random.choice([20 * HOUR, 30.5 * HOUR, 40.25 * HOUR])
            change: Any
            match self.random.randrange(4):
                case 0:
                    device = trio.vehicle._replace(kind=kind)
                    new = Trio(device, trio.meters, trio.assignments)
                    change = self.declare(fleet.Vehicle, vehicle_id, device)
                case 1:
                    device = trio.meters[0]._replace(kind=kind)
                    new = Trio(trio.vehicle, (device, trio.meters[1]), trio.assignments)
                    change = self.declare(fleet.Meter, first.meter_id, device)
                case _:
                    first = first._replace(until=moved)
                    new = Trio(trio.vehicle, trio.meters, (first, second))
                    change = fleet.put_assignment(self.pool, fleet.AssignmentRequest(*first))
            self.trios[vehicle_id].append(new)
            for question in self.questions:
                if question.vehicle_id == vehicle_id:
                    question.trios.append(new)
            await change
            self.trios[vehicle_id] = [new]
            self.counts["changes"] += 1
            await asyncio.sleep(0.005)

    # ---- readings -------------------------------------------------------------------------------

    def plan_readings(self) -> list[Said]:
        """All that will be sent, in no order, some of it twice."""
        readings = []
        for vehicle_id in self.trios:
            exponents = list(range(SLOTS))
            if self.random.random() < 0.5:  # else a register has no reset
                self.random.shuffle(exponents)
            for slot, exponent in enumerate(exponents):
                at = self.begin + slot * 1.5 * HOUR
                at += self.random.choice([-TICK, 0 * DAY, TICK, 7 * MINUTE, 29.5 * MINUTE])
                kwh = 2.0 ** (exponent - SLOTS // 2)
                celsius = self.random.randrange(-200, 400) / 4
                readings.append(Said("vehicle", vehicle_id, at, kwh, (50.0, celsius)))
                for meter in ("m1", "m2"):
                    readings.append(Said("meter", f"{vehicle_id}-{meter}", at, kwh, (230.0,)))
        readings += [said for said in readings if self.random.random() < self.repeats]
        self.random.shuffle(readings)
        return readings

    async def write(self, readings: list[Said]) -> None:
        """Send them in bodies of one to three, on a connection of its own."""
        async with Writer(self.dsn, clock=self.clock, refresh_end=HOUR) as writer:
            limits = TimeLimits.at(self.clock(), 30 * DAY)
            while readings:
                count = self.random.choice([1, 1, 3])
                some, readings = readings[:count], readings[count:]
                body = msgspec.json.encode([said.as_json(None) for said in some])
                number = self.take_off(some)
                outcomes = await writer.record(decode_array(body, limits, 100), len(body))
                self.flying.remove(number)
                self.counts.update(outcomes)
                if not {*outcomes} <= {"stored", "duplicate"}:
                    raise WrongAnswer(f"{some} are {outcomes}")

    def take_off(self, some: list[Said]) -> int:
        self.counts["bodies"] += 1
        number = self.counts["bodies"]
        self.flying.add(number)
        for question in self.questions:
            question.bodies.add(number)
        for said in some:
            celsius = said.extra[1] if said.device_class == "vehicle" else 0.0
            reading = Reading(said.ts, said.kwh, celsius)
            known = self.sent.setdefault(said.device_id, {})
            known.setdefault(said.ts, (reading, []))[1].append(number)
        return number

    # ---- what goes on underneath ----------------------------------------------------------------

    async def refresh(self) -> None:
        """Any window of any rollup, again and again; now and then one is cut off."""
        async with await self.connect() as connection:
            while not self.is_over:
                rollup = self.random.choice(ROLLUPS)
                since = self.begin + self.random.randrange(-3, 60) * HOUR
                until = since + self.random.choice([3 * HOUR, 2 * DAY + TICK, 5 * DAY])
                patience = self.random.choice([0, 0, 0, 2, 5])
                try:
                    await connection.execute(f"SET statement_timeout = {patience}")
                    await connection.execute(
                        "CALL refresh_continuous_aggregate(%s::regclass, %s::timestamptz,"
                        " %s::timestamptz)",
                        (rollup, since, until),
                    )
                    self.counts["refreshes"] += 1
                except psycopg.errors.QueryCanceled:
                    self.counts["refreshes cut off"] += 1
                except psycopg.errors.InvalidParameterValue:
                    pass  # no whole day is in it

    async def change_stores(self) -> None:
        """A chunk becomes columns, or rows again; rarely, because it keeps writers waiting."""
        async with await self.connect() as connection:
            while not self.is_over:
                await asyncio.sleep(0.3)
                table = self.random.choice(["meter", "vehicle"]) + "_telemetry_history"
                function, guard = self.random.choice(
                    [("compress", "if_not_compressed"), ("decompress", "if_compressed")]
                )
                cursor = await connection.execute(
                    "SELECT show_chunks(%s::regclass)::text", (table,)
                )
                chunks = [row[0] for row in await cursor.fetchall()]
                if not chunks:
                    continue
                try:
                    await connection.execute(
                        f"SELECT {function}_chunk(%s::regclass, {guard} => true)",
                        (self.random.choice(chunks),),
                    )
                    self.counts["stores changed"] += 1
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    self.counts["deadlocks"] += 1

    # ---- questions ------------------------------------------------------------------------------

    async def read(self, number: int) -> None:
        rng = random.Random(self.seed * 100 + number)
        while not self.is_over:
            at = self.begin + rng.randrange(72 * 60) * MINUTE
            since, until = rng.choice(
                [
                    (self.begin - DAY, self.begin + 4 * DAY),
                    (hour_of(at), hour_of(at) + 6 * HOUR),
                    (at, at + 20 * HOUR),
                    (at - 9 * HOUR + TICK, at + 31 * DAY),
                ]
            )
            await self.ask(rng.choice(list(self.trios)), since, until)

    async def ask(self, vehicle_id: str, since: datetime, until: datetime) -> None:
        """As the service does: what is refused for the moment is asked again."""

        async def query(connection: AsyncConnection[Any]) -> dict[str, Any]:
            self.counts["questions"] += 1
            async with connection.cursor(row_factory=dict_row) as cursor:
                await cursor.execute(
                    "SELECT * FROM vehicle_performance_v1(%s, %s, %s)", (vehicle_id, since, until)
                )
                (row,) = await cursor.fetchall()
                return row

        question = Question(vehicle_id, {*self.flying}, [*self.trios[vehicle_id]])
        self.questions.append(question)
        while True:
            try:
                answer = await database.read(self.pool, query)
                break
            except psycopg.errors.SerializationFailure:
                self.counts["answers refused"] += 1
        self.questions.remove(question)
        devices = [vehicle_id, f"{vehicle_id}-m1", f"{vehicle_id}-m2"]
        certain: dict[str, dict[datetime, Reading]] = {device: {} for device in devices}
        uncertain = []
        for device in devices:
            for ts, (reading, bodies) in self.sent.get(device, {}).items():
                if question.bodies.issuperset(bodies):
                    uncertain.append((device, reading))
                else:
                    certain[device][ts] = reading
        if len(uncertain) > UNCERTAIN_MAX:
            self.counts["answers not judged"] += 1
            return
        self.counts["answers"] += 1
        self.counts["answers with a choice"] += bool(uncertain or len(question.trios) > 1)
        nearest: list[str] = []
        for trio in question.trios:
            for some in itertools.product([False, True], repeat=len(uncertain)):
                story = _story(vehicle_id, trio, certain)
                for (device, reading), is_in in zip(uncertain, some, strict=True):
                    if is_in:
                        readings = (
                            story.vehicle_readings if device == vehicle_id else story.meter_readings
                        )
                        readings[device] = {**readings[device], reading.ts: reading}
                expected = story.performance(vehicle_id, since, until)
                assert expected is not None
                # Flags follow a declaration in transactions of their own.
                expected["suspect_readings"] = answer["suspect_readings"]
                wrong = differ(answer, expected)
                wrong += [f"{e} is inexact" for e in ENERGIES if answer[e] != expected[e]]
                if not wrong:
                    return
                nearest = min(wrong, nearest or wrong, key=len)
        self.counts["wrong"] += 1
        raise WrongAnswer(
            f"{vehicle_id} {since} .. {until}: {'; '.join(nearest)}; on their way: {uncertain}"
        )


def _story(vehicle_id: str, trio: Trio, readings: dict[str, dict[datetime, Reading]]) -> Story:
    story = Story()
    meters = [assignment.meter_id for assignment in trio.assignments]
    story.vehicles = {vehicle_id: trio.vehicle}
    story.meters = dict(zip(meters, trio.meters, strict=True))
    story.assignments = [*trio.assignments]
    story.vehicle_readings = {vehicle_id: readings[vehicle_id]}
    story.meter_readings = {meter: readings[meter] for meter in meters}
    return story
