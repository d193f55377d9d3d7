"""One run: declares the fleet, back-fills it, goes on live, and asks at the end what is held."""

import asyncio
import contextlib
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, TextIO

import msgspec
from tqdm import tqdm

from energy_platform.errors import EnergyError, SetupError, UnreachableError
from energy_platform.simulator.account import (
    Bookkeeper,
    Performance,
    SimulationAccount,
    render_account,
    render_worst,
)
from energy_platform.simulator.assignments import Assignments
from energy_platform.simulator.client import (
    IN_FLIGHT_MAX,
    Door,
    Sender,
    decode_answer,
    for_each,
    problem_of,
)
from energy_platform.simulator.faults import (
    EXPECTED,
    GAP,
    PLAIN,
    UNASSIGNED,
    VISIT,
    Body,
    Entry,
    Packer,
    Slot,
)
from energy_platform.simulator.fleet import (
    HOUR,
    SECOND,
    Device,
    Meter,
    Micros,
    SimulationOptions,
    Vehicle,
    create_fleet,
    to_micros,
    to_text,
)

PUTS_AT_ONCE = 16
QUESTIONS_AT_ONCE = 8
WINDOW_HOURS_MAX = 744
WORST_EVERY_SECONDS = 60.0
WORST_SAMPLE = 500
LOG_EVERY_SECONDS = 10.0


async def simulate(
    options: SimulationOptions,
    *,
    now: Callable[[], datetime],
    out: TextIO,
    stop: asyncio.Event | None = None,
    pause: Callable[[float], Awaitable[None]] | None = None,
) -> SimulationAccount:
    """Declares a fleet, back-fills it, goes on live and ends with an account of every reading.

    `stop` ends the back-fill or the live part early, and the account follows. `pause` waits that
    many seconds, less when stopped. Tables go to `out`, progress to standard error.
    Raises: UnreachableError, SetupError.
    """
    stopped = stop or asyncio.Event()

    async def pause_until_stopped(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), seconds)
        if stopped.is_set():
            # Resending goes on at a bounded pace, so that a stop loses no answer on its way.
            await asyncio.sleep(min(seconds, 0.25))

    pause = pause or pause_until_stopped
    async with contextlib.aclosing(Door(options, pause)) as door:
        await door.reach()
        return await _Run(options, door, now, out, stopped, pause).run()


class _Run:
    """The state of one simulation."""

    def __init__(
        self,
        options: SimulationOptions,
        door: Door,
        now: Callable[[], datetime],
        out: TextIO,
        stopped: asyncio.Event,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        self.options = options
        self.door = door
        self.now = now
        self.out = out
        self.stopped = stopped
        self.pause = pause
        self.fleet = create_fleet(options)
        self.books = Bookkeeper()
        self.sender = Sender(door, self.books, give_up=stopped.set)
        self.caught_up = to_micros(now())
        start = self.caught_up - options.backfill // timedelta(microseconds=1)
        self.start = start - start % SECOND
        self.position = self.start
        self.assignments = Assignments(door, self.start)
        readings = len(self.fleet.devices) * (self.caught_up - self.start) // self.fleet.interval
        self.backfill_readings = readings
        # About eight rounds of the eight kinds over the back-fill of any fleet.
        spoil_every = max(1, readings // options.batch // 64) if readings else 10
        self.packer = Packer(
            self.fleet,
            batch=options.batch,
            spoil_every=spoil_every if options.faults else 0,
            seed=options.seed,
            slot=self.assignments.slot,
        )

    async def run(self) -> SimulationAccount:
        options = self.options
        self.say(
            f"{len(self.fleet.meters):,} meters and {options.vehicles:,} vehicles, a reading each "
            f"every {options.interval:g} s, from {to_text(self.start)}, to {options.url}"
        )
        repeats_a_run = await self.has_been_here()
        await self.declare()
        try:
            await self.backfill()
            await self.show_worst()
            if not self.stopped.is_set() and options.duration != timedelta(0):
                await self.live()
        except UnreachableError as error:
            self.stopped.set()
            self.say(f"The run ends early: {error}")
        for course in self.packer.finish():
            await self.sender.submit(course)
        await self.sender.drain()
        account = self.books.account
        try:
            await self.check()
        except EnergyError as error:
            account.not_checked = str(error)
        account.resent = self.door.resent
        wanted = set(EXPECTED) if options.faults else {PLAIN}
        repeated = repeats_a_run or self.door.unanswered > 0
        account.faults = self.books.rows(wanted, repeated=repeated)
        self.say(render_account(account))
        return account

    def say(self, text: str) -> None:
        tqdm.write(text, file=self.out)  # above a bar that is on the same terminal
        self.out.flush()

    async def has_been_here(self) -> bool:
        """Whether an earlier run has sent of these hours; every fleet has the first vehicle."""
        if not self.fleet.vehicles:
            return True
        for since, hours in windows(self.start, self.caught_up):
            answer = await self.performance(self.fleet.vehicles[0], since + hours * HOUR, hours)
            if answer is not None and answer.dc_readings > 0:
                return True
        return False

    async def declare(self) -> None:
        """Tells the service of every device that is not as it would assume, and who hangs where."""
        interval = f"PT{self.options.interval:.6f}".rstrip("0").rstrip(".") + "S"

        async def declare_device(device: Device) -> None:
            kind = "register" if device.is_register else "interval"
            value = {"energyKind": kind, "reportingInterval": interval}
            response = await self.door.put(device.path + device.id, value)
            if response.status_code not in (200, 201):
                raise SetupError(f"{device.id} was not declared: {problem_of(response)}")
            bar.update()

        async def assign_vehicle(vehicle: Vehicle) -> None:
            await self.assignments.assign_home(vehicle)
            bar.update()

        unusual = [d for d in self.fleet.devices if d.is_register or d.interval != 60 * SECOND]
        at_home = [vehicle for vehicle in self.fleet.vehicles if vehicle.meter is not None]
        total = len(unusual) + len(at_home)
        with open_bar("declare", total, "devices") as bar:
            await for_each(unusual, PUTS_AT_ONCE, declare_device)
            await for_each(at_home, PUTS_AT_ONCE, assign_vehicle)
        self.say(f"{len(unusual):,} devices declared, {len(at_home):,} vehicles assigned")

    async def backfill(self) -> None:
        with open_bar("back-fill", self.backfill_readings, "readings") as bar:
            self.sender.bar = bar
            await self.send_until(self.caught_up)
            await self.sender.drain()
            if not self.stopped.is_set():
                # Gaps are never sent, and some bursts come later.
                bar.total = bar.n

    async def live(self) -> None:
        """Sends each reading when it is due, gathered by the second, from the back-fill on."""
        begun = self.now()
        worst_shown = begun
        with open_bar("live", None, "readings") as bar:
            self.sender.bar = bar
            while not self.stopped.is_set():
                now = self.now()
                if self.options.duration is not None and now - begun >= self.options.duration:
                    break
                await self.send_until(to_micros(now))
                watched = self.options.watch or self.out.isatty()
                if watched and (now - worst_shown).total_seconds() >= WORST_EVERY_SECONDS:
                    worst_shown = now
                    await self.show_worst()
                await self.pause(1.0)
            await self.sender.drain()

    async def send_until(self, until: Micros) -> None:
        """Sends all that is due before `until`; when stopped it ends at the end of a body."""
        await self.assignments.book_visits(self.fleet.vehicles, until)
        for course in self.packer.pack(self.position, until, to_micros(self.now())):
            await self.sender.submit(course)
            if self.stopped.is_set():
                break
        self.position = self.packer.reached or self.position

    async def check(self) -> None:
        """Asks what the service holds of this run and compares that with what it acknowledged."""
        books = self.books
        held: dict[Slot, int] = {}

        async def count(vehicle: Vehicle) -> None:
            dc, ac = 0, 0
            for since, hours in windows(self.start, self.position):
                answer = await self.performance(vehicle, since + hours * HOUR, hours)
                if answer is not None:
                    dc += answer.dc_readings
                    ac += answer.ac_readings
            held[f"dc {vehicle.id}"] = dc
            held[f"ac {vehicle.id}"] = ac
            bar.update()

        vehicles = self.fleet.vehicles
        with open_bar("check", len(vehicles), "vehicles") as bar:
            await for_each(vehicles, QUESTIONS_AT_ONCE, count)
        if books.acknowledged[UNASSIGNED]:
            held[UNASSIGNED] = await self.resend_unassigned()

        account = books.account
        account.checked = books.acknowledged.total()
        for slot in held.keys() | books.acknowledged.keys():
            difference = held.get(slot, 0) - books.acknowledged[slot]
            account.lost += max(0, -difference)
            account.also_held += max(0, difference)
        for slot, count_not_sent in self.packer.not_sent.items():
            surplus = held.get(slot, 0) - books.acknowledged[slot]
            filled = min(count_not_sent, max(0, surplus))
            books.note(GAP, "held all the same", filled)
            books.note(GAP, "not held", count_not_sent - filled)
        for vehicle, begin in self.assignments.visits:
            books.note(VISIT, await self.assignments.visit_outcome(vehicle, begin))

    async def resend_unassigned(self) -> int:
        """How many readings of meters that fed nobody the service still holds.

        No figure counts them, so they are sent once more: what it holds comes back as duplicate.
        """
        held = 0

        async def resend(meter: Meter) -> None:
            nonlocal held
            lines: list[Entry] = [
                (meter.line(at), None, PLAIN)
                for at in meter.instants(self.start, self.position)
                if self.assignments.slot(meter, at) == UNASSIGNED and not meter.in_gap(at)
            ]
            for begin in range(0, len(lines), self.options.batch):
                body = Body(lines[begin : begin + self.options.batch])
                answer = decode_answer(body, await self.door.post(body))
                held += answer.duplicate if answer is not None else 0

        await for_each(self.fleet.meters, IN_FLIGHT_MAX, resend)
        return held

    async def performance(self, vehicle: Vehicle, until: Micros, hours: int) -> Performance | None:
        """The service's answer; None for a vehicle that it has never heard of."""
        path = f"/v1/analytics/performance/{vehicle.id}"
        response = await self.door.get(path, until=to_text(until), hours=hours)
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise SetupError(f"{vehicle.id}: {problem_of(response)}")
        return msgspec.json.decode(response.content, type=Performance)

    async def show_worst(self) -> None:
        """Prints the vehicles with the lowest ratio of the last day, or of the run so far."""
        vehicles = self.fleet.vehicles
        if not vehicles:
            return
        if len(vehicles) > WORST_SAMPLE:
            vehicles = random.Random(self.options.seed).sample(vehicles, WORST_SAMPLE)
        hours = min(24, max(1, (self.position - self.start) // HOUR))
        until = self.position - self.position % SECOND
        rows: list[Performance] = []

        async def ask(vehicle: Vehicle) -> None:
            row = await self.performance(vehicle, until, hours)
            if row is not None:
                rows.append(row)

        await for_each(vehicles, QUESTIONS_AT_ONCE, ask)
        title = f"The worst of {len(vehicles):,} vehicles"
        if len(vehicles) < len(self.fleet.vehicles):
            title += f" (a sample of {len(self.fleet.vehicles):,})"
        title += f", {hours} h up to {to_text(until)}"
        self.say(f"\n{title}\n{render_worst(rows)}\n")


def open_bar(title: str, total: int | None, unit: str) -> "tqdm[Any]":
    """A progress bar on standard error; where that is no terminal, a line every 10 s."""
    if sys.stderr.isatty():
        return tqdm(desc=title, total=total, unit=f" {unit}", dynamic_ncols=True)
    return tqdm(
        desc=title,
        total=total,
        unit=f" {unit}",
        mininterval=LOG_EVERY_SECONDS,
        bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}, {rate_fmt}]\n",
    )


def windows(since: Micros, until: Micros) -> Iterator[tuple[Micros, int]]:
    """Cuts the time into windows of whole hours that one question may span, the last one longer."""
    hours_left = max(1, -(-(until - since) // HOUR))
    while hours_left > 0:
        hours = min(WINDOW_HOURS_MAX, hours_left)
        yield since, hours
        since += hours * HOUR
        hours_left -= hours
