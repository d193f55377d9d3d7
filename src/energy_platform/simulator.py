"""A fleet that behaves, and misbehaves, like a real one, and posts to a running service.

Three parts, each tested by itself:

- the fleet (`create_fleet`, `Fleet.due`): pure. A device's reading is a function of the seed, the
  device and the instant, so a second run over the same hours sends the same bytes.
- the packer (`Packer`): pure. Gathers readings into bodies, and with faults spoils some of them;
  every line carries the name of its fault, and `EXPECTED` says what should become of it.
- the run (`simulate`): sends, keeps the account and asks the service at the end what it holds.

A run over hours that another fleet (other seed, interval or faults) has filled tells the service
other values of the same instants: they come out `conflicting`, as they should.
"""

import asyncio
import contextlib
import math
import random
import ssl
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, TextIO, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from energy_platform.errors import EnergyError, SetupError, UnreachableError
from energy_platform.progress import Progress

# Instants are whole microseconds since 1970 in here: exact, and quick to compare.
Micros = int

SECOND: Micros = 1_000_000
HOUR: Micros = 3600 * SECOND
DAY_SECONDS = 86_400.0
DAY: Micros = 86_400 * SECOND

# Registers count from here (2024-01-01), so that they show what a device of some years shows.
COUNTER_EPOCH_SECONDS = 1_704_067_200.0
COUNTER_EPOCH_DAY = 19_723

IN_FLIGHT_MAX = 4
PUTS_AT_ONCE = 16
QUESTIONS_AT_ONCE = 8
ATTEMPTS_MAX = 20
PAUSE_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 60.0
WINDOW_HOURS_MAX = 744
PAGE_MAX = 1000
WORST_EVERY_SECONDS = 60.0
WORST_ROWS = 10
WORST_SAMPLE = 500
BATCH_MAX = 9_000  # a service takes 10,000 in a body; faults are added to some


class SimulationOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What to simulate, and where to post it."""

    url: str
    key: str | None = None
    meters: int = 200
    vehicles: int = 200
    interval: float = 60.0
    """Seconds between two readings of a device."""
    backfill: timedelta = timedelta(hours=24)
    duration: timedelta | None = None
    """How long to go on live after the back-fill; None is until stopped."""
    faults: bool = False
    seed: int = 1
    batch: int = 1000
    """Readings in a body, at most."""
    watch: bool = False
    """Shows the worst vehicles again and again, also where the output is no terminal."""

    def __post_init__(self) -> None:
        if self.meters < 0 or self.vehicles < 0 or self.meters + self.vehicles == 0:
            raise ValueError("a fleet needs a meter or a vehicle")
        if self.interval < 0.001:
            raise ValueError("interval is at least 0.001 seconds")
        if self.backfill < timedelta(0):
            raise ValueError("backfill is not negative")
        if not 1 <= self.batch <= BATCH_MAX:
            raise ValueError(f"batch is 1 to {BATCH_MAX:,} readings")


# --- The fleet --------------------------------------------------------------------------------


CONSTANT_UNTIL_SOC = 80.0
TAPER_ENDS_AFTER = 4.0  # time constants; the charger then stops at 2 % of its power
THERMAL_SECONDS = 2880.0
VISIT_AFTER_SECONDS = 900.0  # since plugging in
VISIT_SECONDS = 3600.0
NOISE_SIZE = 4096

_noise_source = random.Random("noise")
NOISE = tuple(_noise_source.gauss(0.0, 1.0) for _ in range(NOISE_SIZE))


def to_micros(at: datetime) -> Micros:
    """The instant as whole microseconds since 1970."""
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def to_text(at: Micros) -> str:
    """The instant in RFC 3339, to the microsecond only where it has some."""
    second, rest = divmod(at, SECOND)
    if rest % 1000:
        return f"{_second_text(second)}.{rest:06d}Z"
    return f"{_second_text(second)}.{rest // 1000:03d}Z"


@lru_cache(maxsize=16)
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class Device:
    """What meters and vehicles share: an id, a place in the interval, and a counter of energy."""

    path: str

    def __init__(self, identifier: str, interval: Micros, source: random.Random) -> None:
        self.id = identifier
        self.interval = interval
        self.phase: Micros = source.randrange(max(1, interval // 1000)) * 1000
        self.is_register = source.random() < 0.1
        self.noise_offset = source.randrange(NOISE_SIZE)
        # Faults, in seconds of the UTC day, the same every day; see `plan_faults`.
        self.reset_at: float | None = None
        self.gap: tuple[float, float] | None = None
        self.held_back: tuple[float, float] | None = None

    def counter(self, at: float) -> float:
        """Energy that has flowed since the epoch. Unit: kWh; `at` in seconds since 1970."""
        raise NotImplementedError

    def line(self, at: Micros) -> bytes:
        """The device's reading of that instant as JSON."""
        raise NotImplementedError

    def kwh(self, at: Micros) -> float:
        """What the reading shows: the counter of a register, else the energy of one interval."""
        seconds = at / SECOND
        if not self.is_register:
            step = self.counter(seconds) - self.counter((at - self.interval) / SECOND)
            return max(0.0, step)  # The last bit of a difference may be below zero.
        if self.reset_at is None:
            return self.counter(seconds)
        return self.counter(seconds) - self.counter(seconds - self._since_reset(seconds))

    def just_reset(self, at: Micros) -> bool:
        """Whether this is the first reading after a register reset."""
        if self.reset_at is None:
            return False
        return self._since_reset(at / SECOND) < self.interval / SECOND

    def _since_reset(self, seconds: float) -> float:
        assert self.reset_at is not None
        return (seconds - self.reset_at) % DAY_SECONDS

    def instants(self, since: Micros, until: Micros) -> range:
        """The device's own instants in the window; they do not depend on where the run starts."""
        first = since + (self.phase - since) % self.interval
        return range(first, until, self.interval)

    def noise(self, at: Micros, stride: int) -> float:
        """A standard normal number that belongs to this device and instant."""
        number = at // self.interval
        return NOISE[(self.noise_offset + number * stride) % NOISE_SIZE]


class Vehicle(Device):
    """Plugs in once a day: constant power to 80 %, then a taper; drives for the rest of the day.

    Everything is in closed form over `after`, the seconds since the last plugging in, and a day
    ends in the state in which the next begins. So no reading depends on the one before.
    """

    path = "/v1/vehicles/"

    def __init__(self, identifier: str, interval: Micros, source: random.Random) -> None:
        super().__init__(identifier, interval, source)
        at_night = source.random() < 0.8
        plug_in_hour = source.uniform(16.5, 22.5) if at_night else source.uniform(8.0, 12.0)
        self.plug_in = float(round(plug_in_hour * 60) * 60)
        self.plugged_seconds = source.uniform(8.0, 11.0) * 3600
        self.power_kw = source.choices((3.7, 7.4, 11.0, 22.0), weights=(1, 5, 5, 1))[0]
        self.capacity_kwh = source.choice((40.0, 52.0, 64.0, 77.0, 82.0))
        self.arrival_soc = source.uniform(20.0, 60.0)
        self.is_ill = source.random() < 0.03
        self.efficiency = source.uniform(0.70, 0.83) if self.is_ill else source.uniform(0.89, 0.94)
        self.ambient = source.gauss(14.0, 1.5)
        self.degrees_per_kw = source.uniform(0.8, 1.1) * (1.5 if self.is_ill else 1.0)
        self.meter: Meter | None = None
        self.guest_meter: Meter | None = None

        constant_kwh = (CONSTANT_UNTIL_SOC - self.arrival_soc) / 100 * self.capacity_kwh
        rest_kwh = (100.0 - CONSTANT_UNTIL_SOC) / 100 * self.capacity_kwh
        self.taper_from = constant_kwh / self.power_kw * 3600
        # This time constant makes the whole exponential fill just the rest of the battery.
        self.taper_seconds = rest_kwh / self.power_kw * 3600
        self.charged_after = min(
            self.plugged_seconds, self.taper_from + TAPER_ENDS_AFTER * self.taper_seconds
        )
        self.day_kwh = self._session_kwh(self.charged_after)
        self.left_soc = self.arrival_soc + 100 * self.day_kwh / self.capacity_kwh
        self.rise_at_taper = self._rise(min(self.taper_from, self.charged_after))
        self.rise_at_end = self._rise(self.charged_after)
        self.visit_kwh = self._visited_kwh(DAY_SECONDS)

    def power(self, at: float) -> float:
        """Charging power into the battery. Unit: kW; `at` in seconds since 1970."""
        after = (at - self.plug_in) % DAY_SECONDS
        if after >= self.charged_after:
            return 0.0
        if after <= self.taper_from:
            return self.power_kw
        return self.power_kw * math.exp((self.taper_from - after) / self.taper_seconds)

    def counter(self, at: float) -> float:
        day, after = divmod(at - self.plug_in, DAY_SECONDS)
        return (day - COUNTER_EPOCH_DAY) * self.day_kwh + self._charged_kwh(after)

    def visited_counter(self, at: float) -> float:
        """The part of the counter that flowed at the guest meter."""
        day, after = divmod(at - self.plug_in, DAY_SECONDS)
        return (day - COUNTER_EPOCH_DAY) * self.visit_kwh + self._visited_kwh(after)

    def soc(self, at: float) -> float:
        """State of charge. Unit: %; `at` in seconds since 1970."""
        after = (at - self.plug_in) % DAY_SECONDS
        if after <= self.plugged_seconds:
            return self.arrival_soc + 100 * self._charged_kwh(after) / self.capacity_kwh
        driven = (after - self.plugged_seconds) / (DAY_SECONDS - self.plugged_seconds)
        return self.left_soc + (self.arrival_soc - self.left_soc) * driven

    def battery_temp(self, at: float) -> float:
        """Ambient temperature and what charging adds to it, with a lag. Unit: degrees Celsius."""
        after = (at - self.plug_in) % DAY_SECONDS
        daily = 6.0 * math.sin((at / DAY_SECONDS - 0.375) * 2 * math.pi)
        return self.ambient + daily + self._rise(after)

    def line(self, at: Micros) -> bytes:
        seconds = at / SECOND
        temperature = self.battery_temp(seconds) + 0.15 * self.noise(at, 7919)
        return (
            f'{{"vehicleId":"{self.id}","soc":{self.soc(seconds):.2f},'
            f'"kwhDeliveredDc":{self.kwh(at):.6f},"batteryTemp":{temperature:.2f},'
            f'"timestamp":"{to_text(at)}"}}'
        ).encode()

    def _charged_kwh(self, after: float) -> float:
        return self.day_kwh if after >= self.charged_after else self._session_kwh(after)

    def _session_kwh(self, after: float) -> float:
        if after <= self.taper_from:
            return self.power_kw * after / 3600
        full = self.power_kw * self.taper_seconds / 3600
        tapered = full * -math.expm1((self.taper_from - after) / self.taper_seconds)
        return self.power_kw * self.taper_from / 3600 + tapered

    def _visited_kwh(self, after: float) -> float:
        begun = VISIT_AFTER_SECONDS
        inside = min(max(after, begun), begun + VISIT_SECONDS)
        return self._charged_kwh(inside) - self._charged_kwh(begun)

    def _rise(self, after: float) -> float:
        """Solves d(rise)/dt = (degrees_per_kw * power - rise) / THERMAL_SECONDS piece by piece."""
        peak = self.degrees_per_kw * self.power_kw
        if after <= min(self.taper_from, self.charged_after):
            return peak * -math.expm1(-after / THERMAL_SECONDS)
        if after <= self.charged_after:
            since = after - self.taper_from
            cooled = math.exp(-since / THERMAL_SECONDS)
            tapered = math.exp(-since / self.taper_seconds)
            share = self.taper_seconds / (self.taper_seconds - THERMAL_SECONDS)
            return self.rise_at_taper * cooled + peak * share * (tapered - cooled)
        since = after - self.charged_after
        return self.rise_at_end * math.exp(-since / THERMAL_SECONDS)


class Meter(Device):
    """Shows what the vehicle at its plug draws, losses included, and its own standby."""

    path = "/v1/meters/"

    def __init__(self, identifier: str, interval: Micros, source: random.Random) -> None:
        super().__init__(identifier, interval, source)
        self.standby_kw = source.uniform(0.004, 0.010)
        self.vehicle: Vehicle | None = None
        self.is_guest_meter = False

    def counter(self, at: float) -> float:
        standby = self.standby_kw * (at - COUNTER_EPOCH_SECONDS) / 3600
        if self.vehicle is None:
            return standby
        return standby + self._delivered(self.vehicle, at) / self.vehicle.efficiency

    def line(self, at: Micros) -> bytes:
        load = 0.0 if self.vehicle is None else self.vehicle.power(at / SECOND)
        voltage = 230.0 + 1.2 * self.noise(at, 104_729) - 0.12 * load
        return (
            f'{{"meterId":"{self.id}","kwhConsumedAc":{self.kwh(at):.6f},'
            f'"voltage":{voltage:.1f},"timestamp":"{to_text(at)}"}}'
        ).encode()

    def _delivered(self, vehicle: Vehicle, at: float) -> float:
        if self.is_guest_meter:
            return vehicle.visited_counter(at)
        if vehicle.guest_meter is None:
            return vehicle.counter(at)
        return vehicle.counter(at) - vehicle.visited_counter(at)


class Fleet:
    """Every device of the simulation, in the order in which they report within an interval."""

    def __init__(self, meters: list[Meter], vehicles: list[Vehicle], interval: Micros) -> None:
        self.meters = meters
        self.vehicles = vehicles
        self.interval = interval
        self.devices: list[Device] = sorted([*meters, *vehicles], key=lambda d: (d.phase, d.id))
        self._phases = [device.phase for device in self.devices]

    def due(self, since: Micros, until: Micros) -> Iterator[tuple[Micros, Device]]:
        """Who reports when, with since <= instant < until, in the order of time."""
        number = since // self.interval
        position = bisect_left(self._phases, since - number * self.interval)
        while True:
            begin = number * self.interval
            for device in self.devices[position:]:
                if begin + device.phase >= until:
                    return
                yield begin + device.phase, device
            if begin + self.interval >= until:
                return
            number += 1
            position = 0


def create_fleet(options: SimulationOptions) -> Fleet:
    """The fleet of these options. A device is the same in a fleet of any size."""
    interval = round(options.interval * SECOND)
    meters = [
        Meter(f"M-{number:05d}", interval, random.Random(f"{options.seed} meter {number}"))
        for number in range(1, options.meters + 1)
    ]
    vehicles = [
        Vehicle(f"V-{number:05d}", interval, random.Random(f"{options.seed} vehicle {number}"))
        for number in range(1, options.vehicles + 1)
    ]
    for meter, vehicle in zip(meters, vehicles, strict=False):
        meter.vehicle = vehicle
        vehicle.meter = meter
    if options.faults:
        meters += plan_faults(meters, vehicles, options.seed, interval)
    return Fleet(meters, vehicles, interval)


# --- Faults -----------------------------------------------------------------------------------


PLAIN = "none: a plain reading"
LATE = "late burst"
REPEAT = "repeated body"
REPEAT_ONE = "repeated reading"
CONFLICT = "repeat with other values"
CONFLICT_ONE = "one repeat with other values"
RESET = "register reset"
SHUFFLED = "out of order"
CUT_HALF = "connection cut half way"
CUT_WHOLE = "connection cut before the answer"
GAP = "gap"
VISIT = "car at another charger"


EXPECTED: dict[str, frozenset[str]] = {
    PLAIN: frozenset({"stored"}),
    LATE: frozenset({"stored"}),
    SHUFFLED: frozenset({"stored"}),
    RESET: frozenset({"stored"}),
    CUT_HALF: frozenset({"stored", "duplicate"}),
    CUT_WHOLE: frozenset({"stored", "duplicate"}),
    REPEAT: frozenset({"duplicate"}),
    REPEAT_ONE: frozenset({"duplicate"}),
    CONFLICT: frozenset({"conflicting"}),
    CONFLICT_ONE: frozenset({"conflicting"}),
    GAP: frozenset({"not held"}),
    VISIT: frozenset({"moved"}),
}
REJECTED = frozenset({"rejected"})

HOLD_BACK_SECONDS = 3 * 3600.0
GAP_SECONDS = 1800.0
CONFLICTS_IN_A_BODY = 20


def plan_faults(
    meters: list[Meter], vehicles: list[Vehicle], seed: int, interval: Micros
) -> list[Meter]:
    """Gives one device in fifty each fault that belongs to a device; returns the guest meters.

    The times are of the day, not of the run, so that a second run tells the same story.
    """
    source = random.Random(f"{seed} faults")
    for fleet in (list(meters), list(vehicles)):
        count = _afflicted(len(fleet))
        source.shuffle(fleet)
        registers = [device for device in fleet if device.is_register][:count]
        for device in registers:
            device.reset_at = source.randrange(86_400) + 0.5
        others = [device for device in fleet if device not in registers]
        for device in others[:count]:
            begin = source.uniform(0.0, DAY_SECONDS)
            device.held_back = (begin, HOLD_BACK_SECONDS)
        for device in others[count : 2 * count]:
            device.gap = (source.uniform(0.0, DAY_SECONDS), GAP_SECONDS)

    at_home = [vehicle for vehicle in vehicles if vehicle.meter is not None]
    guest_meters = []
    for number, vehicle in enumerate(source.sample(at_home, _afflicted(len(at_home))), start=1):
        meter = Meter(f"M-GUEST-{number:02d}", interval, random.Random(f"{seed} guest {number}"))
        meter.is_guest_meter = True
        meter.vehicle = vehicle
        vehicle.guest_meter = meter
        guest_meters.append(meter)
    return guest_meters


def _afflicted(count: int) -> int:
    return min(count, max(1, min(20, count // 50)))


def _inside(window: tuple[float, float], at: Micros) -> float | None:
    """Seconds since the window began, when `at` lies in its occurrence of the day."""
    begin, length = window
    since = (at / SECOND - begin) % DAY_SECONDS
    return since if since < length else None


def impossible_readings(line: bytes, now: Micros) -> list[tuple[bytes, str]]:
    """One reading spoilt in each way that a service must refuse, with the name of the fault."""
    reading = msgspec.json.decode(line)
    energy = "kwhConsumedAc" if "meterId" in reading else "kwhDeliveredDc"
    naive = reading["timestamp"].removesuffix("Z")
    vehicle = {
        "vehicleId": "V-00001",
        "kwhDeliveredDc": 0.1,
        "batteryTemp": 20.0,
        "timestamp": reading["timestamp"],
    }
    spoilt: list[tuple[dict[str, Any], str]] = [
        ({energy: -0.5}, "negative energy"),
        ({energy: "0.1"}, "energy as text"),
        ({"timestamp": naive}, "time without an offset"),
        ({"timestamp": to_text(now + HOUR)}, "in the future"),
        ({"timestamp": to_text(now - 400 * DAY)}, "over a year late"),
        ({"meterId": "M-00001", "vehicleId": "V-00001"}, "both ids"),
        ({"timestamp": None}, "no time"),
    ]
    encoded = [
        (msgspec.json.encode({**reading, **change}), f"impossible: {name}")
        for change, name in spoilt
    ]
    encoded.append((msgspec.json.encode({**vehicle, "soc": 140.0}), "impossible: soc 140"))
    # No JSON encoder writes this, but gateways do.
    not_a_number = msgspec.json.encode({**reading, energy: 0}).replace(
        f'"{energy}":0'.encode(), f'"{energy}":NaN'.encode()
    )
    encoded.append((not_a_number, "impossible: NaN"))
    return encoded


def other_values(line: bytes) -> bytes:
    """The same device and instant with another measurement."""
    reading = msgspec.json.decode(line)
    measure = "voltage" if "meterId" in reading else "batteryTemp"
    reading[measure] = round(reading[measure] + 3.5, 2)
    return msgspec.json.encode(reading)


# --- Packing ----------------------------------------------------------------------------------


Slot = str | None
"""Whose count an acknowledged reading raises when the service is asked what it holds.

`dc V-00001` and `ac V-00001` are the vehicle's own readings and those of the meters assigned to it;
`UNASSIGNED` are readings of a meter while it feeds nobody; None is for lines that add nothing.
"""
UNASSIGNED = "unassigned"

Entry = tuple[bytes, Slot, str]
"""A line of a body, its slot and the name of its fault."""


class Body(msgspec.Struct):
    """What one request carries. Entries that the answer does not list share one outcome."""

    entries: list[Entry]
    form: Literal["ndjson", "array", "one"] = "ndjson"
    cut: Literal["half", "whole"] | None = None

    def encode(self) -> bytes:
        lines = [line for line, _, _ in self.entries]
        if self.form == "array":
            return b"[" + b",".join(lines) + b"]"
        return b"\n".join(lines)

    @property
    def content_type(self) -> str:
        return "application/x-ndjson" if self.form == "ndjson" else "application/json"


Course = list[Body]
"""Bodies that must be sent one after the other: a repeat comes after what it repeats."""


class Packer:
    """Gathers readings into bodies, and spoils some of them when faults are wanted.

    `slot` tells whose count a reading of that device and instant raises. `spoil_every` is the
    number of bodies to each spoilt one, 0 for none.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        batch: int,
        spoil_every: int,
        seed: int,
        slot: Callable[[Device, Micros], Slot],
    ) -> None:
        self.fleet = fleet
        self.not_sent: Counter[Slot] = Counter()
        self.reached: Micros | None = None
        """All that is due before this instant has been given out, or is held back."""
        self._batch = batch
        self._spoil_every = spoil_every
        self._source = random.Random(f"{seed} bodies")
        self._slot = slot
        self._bodies = 0
        self._spoilt = 0
        self._held: dict[Device, list[Entry]] = {}
        self._release_at: dict[Device, Micros] = {}

    def pack(self, since: Micros, until: Micros, now: Micros) -> Iterator[Course]:
        """The courses of all readings with since <= instant < until; `now` is the wall clock."""
        entries: list[Entry] = []
        for at, device in self.fleet.due(since, until):
            slot = self._slot(device, at)
            if device.gap is not None and _inside(device.gap, at) is not None:
                self.not_sent[slot] += 1
                continue
            if device.held_back is not None:
                waited = _inside(device.held_back, at)
                if waited is not None:
                    self._hold(device, at, waited, (device.line(at), slot, LATE))
                    continue
            fault = RESET if device.reset_at is not None and device.just_reset(at) else PLAIN
            entries.append((device.line(at), slot, fault))
            if len(entries) == self._batch:
                self.reached = at + 1
                yield from self._courses(entries, now)
                yield from self._bursts(at)
                entries = []
        self.reached = until
        if entries:
            yield from self._courses(entries, now)
        yield from self._bursts(until)

    def finish(self) -> Iterator[Course]:
        """What is still held back when the run ends."""
        yield from self._bursts(None)

    def _hold(self, device: Device, at: Micros, waited: float, entry: Entry) -> None:
        self._held.setdefault(device, []).append(entry)
        self._release_at[device] = at + round((HOLD_BACK_SECONDS - waited) * SECOND)

    def _bursts(self, until: Micros | None) -> Iterator[Course]:
        ready = [d for d in self._held if until is None or self._release_at[d] <= until]
        for device in ready:
            entries = self._held.pop(device)
            for begin in range(0, len(entries), self._batch):
                yield [Body(entries[begin : begin + self._batch], form="array")]

    def _courses(self, entries: list[Entry], now: Micros) -> Iterator[Course]:
        self._bodies += 1
        if not self._spoil_every or self._bodies % self._spoil_every:
            yield [Body(entries)]
            return
        kind = self._spoilt % 8
        self._spoilt += 1
        if kind >= 6 and any(fault == RESET for _, _, fault in entries):
            # After a cut nobody knows whether a line is new, and a reset must be.
            kind = 5
        yield self._spoil(kind, entries, now)

    def _spoil(self, kind: int, entries: list[Entry], now: Micros) -> Course:
        match kind:
            case 0:
                return [Body(entries), Body([(line, None, REPEAT) for line, _, _ in entries])]
            case 1:
                line = self._source.choice(entries)[0]
                return [Body(entries), Body([(line, None, REPEAT_ONE)], form="one")]
            case 2:
                chosen = self._source.sample(entries, min(CONFLICTS_IN_A_BODY, len(entries)))
                others: list[Entry] = [(other_values(entry[0]), None, CONFLICT) for entry in chosen]
                return [Body(entries), Body(others)]
            case 3:
                line = self._source.choice(entries)[0]
                other = (other_values(line), None, CONFLICT_ONE)
                return [Body(entries), Body([other], form="one")]
            case 4:
                # Among good neighbours: one bad reading never costs a good one.
                mixed = list(entries)
                for bad, fault in impossible_readings(self._source.choice(entries)[0], now):
                    mixed.insert(self._source.randrange(len(mixed) + 1), (bad, None, fault))
                return [Body(mixed, form="array")]
            case 5:
                shuffled = self._named(entries, SHUFFLED)
                self._source.shuffle(shuffled)
                return [Body(shuffled)]
            case 6:
                return [Body(self._named(entries, CUT_HALF), cut="half")]
            case _:
                return [Body(self._named(entries, CUT_WHOLE), cut="whole")]

    @staticmethod
    def _named(entries: list[Entry], name: str) -> list[Entry]:
        return [(line, slot, name if fault == PLAIN else fault) for line, slot, fault in entries]


# --- The account ------------------------------------------------------------------------------


class AnswerError(msgspec.Struct, rename="camel"):
    index: int
    outcome: Literal["conflicting", "rejected"] = "rejected"
    code: str = ""


class Answer(msgspec.Struct, rename="camel"):
    """What the service says about a body of many."""

    received: int
    stored: int
    duplicate: int
    conflicting: int
    rejected: int
    errors: list[AnswerError] = []
    errors_omitted: int = 0

    def adds_up(self, size: int) -> bool:
        counted = self.stored + self.duplicate + self.conflicting + self.rejected
        listed = len(self.errors) + self.errors_omitted
        return self.received == counted == size and listed == self.conflicting + self.rejected


class FaultRow(msgspec.Struct, frozen=True):
    """What became of one kind of fault."""

    fault: str
    injected: int
    expected: str
    as_expected: int
    otherwise: dict[str, int]
    codes: tuple[str, ...] = ()


class SimulationAccount(msgspec.Struct):
    """Everything that was sent and what became of it: sent is the sum of the five below it."""

    sent: int = 0
    stored: int = 0
    duplicate: int = 0
    conflicting: int = 0
    rejected: int = 0
    failed: int = 0
    """Never answered, or answered with something that is no account of the readings."""
    resent: int = 0
    """Requests that were repeated after a 503 or a broken connection; not part of `sent`."""
    checked: int = 0
    """Acknowledged readings that were looked for at the end."""
    lost: int = 0
    """Acknowledged readings that the service does not hold."""
    also_held: int = 0
    """Readings in the window of the run that this run has no acknowledgement for."""
    faults: list[FaultRow] = []
    reasons: dict[str, int] = {}
    """Why readings failed."""
    not_checked: str | None = None
    """Why nothing could be looked for at the end; None when it was."""

    @property
    def exit_status(self) -> int:
        wrong = self.lost or self.not_checked or any(row.otherwise for row in self.faults)
        return 1 if wrong else 0


class Ledger:
    """Which meter feeds which vehicle when, as the service has it."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[Micros, float, str]]] = defaultdict(list)

    def replace(self, vehicle: str, pieces: Iterable["Assignment"]) -> None:
        """Puts these in the place of all that was known of the vehicle."""
        for meter, known in self._pieces.items():
            self._pieces[meter] = [piece for piece in known if piece[2] != vehicle]
        self.add(pieces)

    def add(self, pieces: Iterable["Assignment"]) -> None:
        for piece in pieces:
            until = math.inf if piece.until is None else to_micros(piece.until)
            known = (to_micros(piece.since), until, piece.vehicle_id)
            self._pieces[piece.meter_id].append(known)

    def slot(self, device: Device, at: Micros) -> Slot:
        if isinstance(device, Vehicle):
            return f"dc {device.id}"
        for since, until, vehicle in self._pieces.get(device.id, ()):
            if since <= at < until:
                return f"ac {vehicle}"
        return UNASSIGNED


class Assignment(msgspec.Struct, rename="camel"):
    meter_id: str
    vehicle_id: str
    since: datetime
    until: datetime | None = None


class AssignmentPage(msgspec.Struct, rename="camel"):
    items: list[Assignment]
    next_cursor: str | None = None


class Bookkeeper:
    """Adds up the answers."""

    def __init__(self) -> None:
        self.account = SimulationAccount()
        self.acknowledged: Counter[Slot] = Counter()
        self._tally: dict[str, Counter[str]] = defaultdict(Counter)
        self._codes: dict[str, Counter[str]] = defaultdict(Counter)

    def note(self, fault: str, outcome: str, count: int = 1) -> None:
        """Counts what became of a fault that is not a line of a body."""
        self._tally[fault][outcome] += count

    def record_failure(self, body: Body, reason: str) -> None:
        size = len(body.entries)
        self.account.sent += size
        self.account.failed += size
        self.account.reasons[reason] = self.account.reasons.get(reason, 0) + size
        for _, _, fault in body.entries:
            self._tally[fault]["failed"] += 1

    def record(self, body: Body, answer: Answer) -> None:
        account = self.account
        account.sent += len(body.entries)
        account.stored += answer.stored
        account.duplicate += answer.duplicate
        account.conflicting += answer.conflicting
        account.rejected += answer.rejected
        outcomes = self._outcomes(body, answer)
        for (_, slot, fault), outcome in zip(body.entries, outcomes, strict=True):
            self._tally[fault][outcome] += 1
            if slot is not None and outcome in ("stored", "duplicate"):
                self.acknowledged[slot] += 1
        for error in answer.errors:
            self._codes[body.entries[error.index][2]][error.code] += 1

    def rows(self, wanted: set[str], *, repeated: bool = False) -> list[FaultRow]:
        """A row a fault, and for those in `wanted` also when there was none.

        `repeated` says that the service may have stored readings of this run before: then a
        duplicate is as good as stored.
        """
        names = list(EXPECTED)
        names += sorted(name for name in self._tally if name not in EXPECTED)
        rows = []
        for name in names:
            tally = +self._tally[name]
            if not tally and name not in wanted:
                continue
            expected = EXPECTED.get(name, REJECTED)
            accepted = expected
            if repeated and "stored" in expected:
                accepted = expected | {"duplicate"}
            right = sum(count for outcome, count in tally.items() if outcome in accepted)
            wrong = {outcome: count for outcome, count in tally.items() if outcome not in accepted}
            codes = tuple(code for code, _ in self._codes[name].most_common() if code)
            text = " or ".join(sorted(accepted, reverse=True))
            rows.append(FaultRow(name, tally.total(), text, right, wrong, codes))
        return rows

    @staticmethod
    def _outcomes(body: Body, answer: Answer) -> list[str]:
        size = len(body.entries)
        if answer.errors_omitted:
            # The counts are right, but nobody can say any more which line is which.
            outcomes = ["unlisted"] * size
        elif not answer.errors:
            return ["stored"] * answer.stored + ["duplicate"] * answer.duplicate
        else:
            # Fewer stored than unlisted happens only where an earlier run has sent some of them.
            unlisted = iter(["stored"] * answer.stored + ["duplicate"] * answer.duplicate)
            listed = {error.index for error in answer.errors}
            outcomes = ["" if index in listed else next(unlisted) for index in range(size)]
        for error in answer.errors:
            outcomes[error.index] = error.outcome
        return outcomes


# --- Talking to the service -------------------------------------------------------------------


Item = TypeVar("Item")


async def for_each(
    items: Iterable[Item], at_once: int, act: Callable[[Item], Awaitable[None]]
) -> None:
    """Acts on every item, some at a time. The first error stops it and is raised as it is."""
    remaining = iter(items)

    async def work() -> None:
        for item in remaining:
            await act(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Door:
    """One HTTP client to the service, that resends what was not answered."""

    def __init__(
        self,
        options: SimulationOptions,
        *,
        pause: Callable[[float], Awaitable[None]],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.resent = 0
        self.unanswered = 0
        self._base = options.url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        self._pause = pause
        host = urlsplit(self._base).hostname
        self._client = httpx.AsyncClient(
            base_url=self._base,
            headers=self._headers,
            timeout=ANSWER_SECONDS_MAX,
            transport=transport,
            # A proxy of the environment cannot reach the loopback address of this machine.
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def reach(self) -> None:
        """Raises: UnreachableError when nothing answers at the address."""
        try:
            await self._client.get("/health/live")
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise UnreachableError(f"no service answers at {self._base}: {error}") from error

    async def post(self, body: Body) -> httpx.Response:
        content = body.encode()
        headers = {"Content-Type": body.content_type}
        if body.cut is not None:
            await self._post_and_cut(content, headers, whole=body.cut == "whole")
        return await self.request("POST", "/v1/ingest", content=content, headers=headers)

    async def put(self, path: str, value: dict[str, Any]) -> httpx.Response:
        content = msgspec.json.encode(value)
        headers = {"Content-Type": "application/json"}
        return await self.request("PUT", path, content=content, headers=headers)

    async def get(self, path: str, **query: str | int) -> httpx.Response:
        return await self.request("GET", path, params=query)

    async def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Sends, and sends again the same bytes while the service is away, which is always safe.

        Raises: UnreachableError after ATTEMPTS_MAX; SetupError on 401 and 403.
        """
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                response = await self._client.request(method, path, **more)
            except httpx.TransportError as error:
                self.unanswered += 1
                reason = f"no answer: {type(error).__name__}"
                delay = min(5.0, 0.25 * 2**attempt)
            else:
                if response.status_code in (401, 403):
                    raise SetupError(f"{method} {path}: {problem_of(response)}")
                if response.status_code not in (502, 503, 504):
                    return response
                reason = problem_of(response)
                delay = retry_after_seconds(response)
            if attempt < ATTEMPTS_MAX:
                self.resent += 1
                await self._pause(delay)
        raise UnreachableError(f"{method} {path}: {reason}")

    async def _post_and_cut(self, content: bytes, headers: dict[str, str], *, whole: bool) -> None:
        """Begins the same request on a connection of its own and hangs up before the answer."""
        address = urlsplit(self._base)
        secure = address.scheme == "https"
        port = address.port or (443 if secure else 80)
        lines = {
            "Host": address.netloc,
            "Content-Length": str(len(content)),
            **self._headers,
            **headers,
        }
        head = f"POST {address.path}/v1/ingest HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        sent = content if whole else content[: len(content) // 2]
        # Whatever goes wrong here is what this fault is for.
        with contextlib.suppress(OSError):
            tls = ssl.create_default_context() if secure else None
            _, writer = await asyncio.open_connection(address.hostname, port, ssl=tls)
            writer.write(head.encode() + b"\r\n" + sent)
            await writer.drain()
            writer.close()
            await writer.wait_closed()


def retry_after_seconds(response: httpx.Response) -> float:
    """How long the service asks to wait, within reason."""
    try:
        seconds = float(response.headers.get("Retry-After", "1"))
    except ValueError:
        seconds = 1.0
    return min(max(seconds, 0.05), PAUSE_SECONDS_MAX)


def problem_of(response: httpx.Response) -> str:
    """The status, code and detail of a problem answer, in one line."""
    try:
        problem = msgspec.json.decode(response.content)
        words = [str(problem[name]) for name in ("code", "detail") if problem.get(name)]
    except (msgspec.DecodeError, AttributeError):
        words = []
    return " ".join([str(response.status_code), *words])


def decode_answer(body: Body, response: httpx.Response) -> Answer | None:
    """The service's account of the body; None when the answer is no such account."""
    size = len(body.entries)
    try:
        if body.form == "one":
            answer = _decode_one(response)
        elif response.status_code in (200, 207):
            answer = msgspec.json.decode(response.content, type=Answer)
        else:
            return None
    except msgspec.DecodeError:
        return None
    return answer if answer is not None and answer.adds_up(size) else None


def _decode_one(response: httpx.Response) -> Answer | None:
    value = msgspec.json.decode(response.content)
    named: dict[int, str] = {201: "stored", 200: "duplicate"}
    outcome = named.get(response.status_code)
    if outcome is not None:
        if value.get("outcome") != outcome:
            return None
        return Answer(1, int(outcome == "stored"), int(outcome == "duplicate"), 0, 0)
    if response.status_code == 409:
        return Answer(1, 0, 0, 1, 0, [AnswerError(0, "conflicting", value.get("code", ""))])
    if response.status_code == 422:
        return Answer(1, 0, 0, 0, 1, [AnswerError(0, "rejected", value.get("code", ""))])
    return None


class Sender:
    """Sends courses, a few at a time, and gives every answer to the bookkeeper.

    `give_up` is called when the service stays away for longer than a body is resent.
    """

    def __init__(self, door: Door, books: Bookkeeper, give_up: Callable[[], None]) -> None:
        self.progress: Progress | None = None
        self._door = door
        self._books = books
        self._give_up = give_up
        self._free = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def submit(self, course: Course) -> None:
        """Waits for a place and sends on. Raises what an earlier course has met."""
        await self._free.acquire()
        if self._error is not None:
            self._free.release()
            raise self._error
        task = asyncio.create_task(self._send(course))
        self._tasks.add(task)
        task.add_done_callback(self._end)

    async def drain(self) -> None:
        """Waits until all is answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._error is not None:
            raise self._error

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free.release()
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    async def _send(self, course: Course) -> None:
        for body in course:
            try:
                response = await self._door.post(body)
            except UnreachableError as error:
                self._books.record_failure(body, str(error))
                self._give_up()
            else:
                answer = decode_answer(body, response)
                if answer is None:
                    reason = problem_of(response)
                    if response.status_code < 300:
                        reason += " the answer does not add up"
                    self._books.record_failure(body, reason)
                else:
                    self._books.record(body, answer)
            if self.progress is not None:
                self.progress.advance(sum(slot is not None for _, slot, _ in body.entries))


# --- The run ----------------------------------------------------------------------------------


class Performance(msgspec.Struct, rename="camel"):
    """The part of the performance answer that is looked at here."""

    vehicle_id: str
    total_kwh_consumed_ac: float | None
    total_kwh_delivered_dc: float
    efficiency_ratio: float | None
    average_battery_temp: float | None
    ac_readings: int
    dc_readings: int
    ac_coverage: float
    dc_coverage: float
    verdict: str


async def simulate(
    options: SimulationOptions,
    *,
    now: Callable[[], datetime],
    out: TextIO,
    progress_out: TextIO | None = None,
    stop: asyncio.Event | None = None,
    pause: Callable[[float], Awaitable[None]] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> SimulationAccount:
    """Declares a fleet, back-fills it, goes on live and ends with an account of every reading.

    `stop` ends the back-fill or the live part early, and the account follows. `pause` waits that
    many seconds, less when stopped. Tables go to `out`, progress to `progress_out`, which is
    standard error by default.
    Raises: UnreachableError, SetupError.
    """
    stopped = stop or asyncio.Event()

    async def pause_until_stopped(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), seconds)
        if stopped.is_set():
            # Resending goes on at a bounded pace, so that a stop loses no answer on its way.
            await asyncio.sleep(min(seconds, 0.25))

    door = Door(options, pause=pause or pause_until_stopped, transport=transport)
    try:
        await door.reach()
        shown_on = progress_out or sys.stderr
        run = _Run(options, door, now, out, shown_on, stopped, pause or pause_until_stopped)
        return await run.run()
    finally:
        await door.close()


class _Run:
    """The state of one simulation."""

    def __init__(
        self,
        options: SimulationOptions,
        door: Door,
        now: Callable[[], datetime],
        out: TextIO,
        progress_out: TextIO,
        stopped: asyncio.Event,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        self.options = options
        self.door = door
        self.now = now
        self.out = out
        self.progress_out = progress_out
        self.stopped = stopped
        self.pause = pause
        self.fleet = create_fleet(options)
        self.ledger = Ledger()
        self.books = Bookkeeper()
        self.sender = Sender(door, self.books, give_up=stopped.set)
        self.caught_up = to_micros(now())
        start = self.caught_up - options.backfill // timedelta(microseconds=1)
        self.start = start - start % SECOND
        self.position = self.start
        self.booked_until = self.start
        self.repeats_a_run = False
        self.visits: list[tuple[Vehicle, Micros]] = []
        readings = len(self.fleet.devices) * (self.caught_up - self.start) // self.fleet.interval
        self.backfill_readings = readings
        # About eight rounds of the eight kinds over the back-fill of any fleet.
        spoil_every = max(1, readings // options.batch // 64) if readings else 10
        self.packer = Packer(
            self.fleet,
            batch=options.batch,
            spoil_every=spoil_every if options.faults else 0,
            seed=options.seed,
            slot=self.ledger.slot,
        )

    async def run(self) -> SimulationAccount:
        options = self.options
        self.say(
            f"{len(self.fleet.meters):,} meters and {options.vehicles:,} vehicles, a reading each "
            f"every {options.interval:g} s, from {to_text(self.start)}, to {options.url}"
        )
        self.repeats_a_run = await self.has_been_here()
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
        repeated = self.repeats_a_run or self.door.unanswered > 0
        account.faults = self.books.rows(wanted, repeated=repeated)
        self.say(render_account(account))
        return account

    def say(self, text: str) -> None:
        self.out.write(text + "\n")
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

    # Devices and assignments

    async def declare(self) -> None:
        """Tells the service of every device that is not as it would assume, and who hangs where."""
        interval = f"PT{self.options.interval:.6f}".rstrip("0").rstrip(".") + "S"

        async def declare_device(device: Device) -> None:
            kind = "register" if device.is_register else "interval"
            value = {"energyKind": kind, "reportingInterval": interval}
            response = await self.door.put(device.path + device.id, value)
            if response.status_code not in (200, 201):
                raise SetupError(f"{device.id} was not declared: {problem_of(response)}")
            progress.advance()

        async def assign_vehicle(vehicle: Vehicle) -> None:
            await self.assign(vehicle)
            progress.advance()

        unusual = [d for d in self.fleet.devices if d.is_register or d.interval != 60 * SECOND]
        at_home = [vehicle for vehicle in self.fleet.vehicles if vehicle.meter is not None]
        total = len(unusual) + len(at_home)
        with Progress("declare", total, out=self.progress_out, unit="devices") as progress:
            await for_each(unusual, PUTS_AT_ONCE, declare_device)
            await for_each(at_home, PUTS_AT_ONCE, assign_vehicle)
        self.say(f"{len(unusual):,} devices declared, {len(at_home):,} vehicles assigned")

    async def assign(self, vehicle: Vehicle) -> None:
        """Assigns the vehicle's own meter for all of the run; an earlier run's assignment stays."""
        assert vehicle.meter is not None
        # A guest's assignment begins earlier, since a visit may be on at the start and cuts it.
        since = self.start - (HOUR if vehicle.guest_meter else 0)
        if await self.put_assignment(vehicle.meter.id, vehicle.id, since, None):
            piece = Assignment(vehicle.meter.id, vehicle.id, to_datetime(since), None)
            self.ledger.add([piece])
            return
        pieces = await self.fetch_assignments(vehicle)
        if pieces and to_micros(pieces[0].since) > since:
            until = to_micros(pieces[0].since)
            await self.put_assignment(vehicle.meter.id, vehicle.id, since, until)
            pieces = await self.fetch_assignments(vehicle)
        self.ledger.replace(vehicle.id, pieces)

    async def put_assignment(
        self, meter: str, vehicle: str, since: Micros, until: Micros | None
    ) -> bool:
        """False when it overlaps with another. Raises: SetupError on any other refusal."""
        value = {
            "meterId": meter,
            "vehicleId": vehicle,
            "since": to_text(since),
            "until": None if until is None else to_text(until),
        }
        response = await self.door.put("/v1/assignments", value)
        if response.status_code not in (200, 201, 409):
            raise SetupError(f"{vehicle} was not assigned: {problem_of(response)}")
        return response.status_code != 409

    async def fetch_assignments(self, vehicle: Vehicle) -> list[Assignment]:
        """The vehicle's assignments in the order of time."""
        pieces: list[Assignment] = []
        query: dict[str, str | int] = {"vehicleId": vehicle.id, "limit": PAGE_MAX}
        while True:
            response = await self.door.get("/v1/assignments", **query)
            if response.status_code != 200:
                raise SetupError(f"{vehicle.id}: {problem_of(response)}")
            page = msgspec.json.decode(response.content, type=AssignmentPage)
            pieces += page.items
            if page.next_cursor is None:
                return sorted(pieces, key=lambda piece: piece.since)
            query["cursor"] = page.next_cursor

    async def book_visits(self, until: Micros) -> None:
        """Moves every guest whose visit begins before `until` to the other charger and back."""
        for vehicle in self.fleet.vehicles:
            if vehicle.guest_meter is None:
                continue
            for begin in visits_of(vehicle, self.booked_until, until, first=self.start):
                await self.book_visit(vehicle, vehicle.guest_meter, begin)
        self.booked_until = until

    async def book_visit(self, vehicle: Vehicle, guest: Meter, begin: Micros) -> None:
        assert vehicle.meter is not None
        home = vehicle.meter.id
        end = begin + round(VISIT_SECONDS) * SECOND
        self.visits.append((vehicle, begin))
        for piece in await self.fetch_assignments(vehicle):
            since = to_micros(piece.since)
            until = None if piece.until is None else to_micros(piece.until)
            if piece.meter_id == guest.id and since == begin:
                break  # An earlier run has moved it.
            if piece.meter_id == home and since < begin and (until is None or until > end):
                await self.put_assignment(home, vehicle.id, since, begin)
                await self.put_assignment(guest.id, vehicle.id, begin, end)
                await self.put_assignment(home, vehicle.id, end, until)
                break
        self.ledger.replace(vehicle.id, await self.fetch_assignments(vehicle))

    # Readings

    async def backfill(self) -> None:
        progress = Progress("back-fill", self.backfill_readings, out=self.progress_out)
        with progress:
            self.sender.progress = progress
            await self.send_until(self.caught_up)
            await self.sender.drain()
            if not self.stopped.is_set():
                # Gaps are never sent, and some bursts come later.
                progress.total = progress.done

    async def live(self) -> None:
        """Sends each reading when it is due, gathered by the second, from the back-fill on."""
        begun = self.now()
        worst_shown = begun
        progress = Progress("live", None, out=self.progress_out)
        with progress:
            self.sender.progress = progress
            while not self.stopped.is_set():
                now = self.now()
                if self.options.duration is not None and now - begun >= self.options.duration:
                    break
                await self.send_until(to_micros(now))
                watched = self.options.watch or self.out.isatty()
                if watched and (now - worst_shown).total_seconds() >= WORST_EVERY_SECONDS:
                    worst_shown = now
                    progress.clear()
                    await self.show_worst()
                await self.pause(1.0)
            await self.sender.drain()

    async def send_until(self, until: Micros) -> None:
        """Sends all that is due before `until`; when stopped it ends at the end of a body."""
        await self.book_visits(until)
        for course in self.packer.pack(self.position, until, to_micros(self.now())):
            await self.sender.submit(course)
            if self.stopped.is_set():
                break
        self.position = self.packer.reached or self.position

    # What the service says at the end

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
            progress.advance()

        vehicles = self.fleet.vehicles
        with Progress("check", len(vehicles), out=self.progress_out, unit="vehicles") as progress:
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
        for vehicle, begin in self.visits:
            books.note(VISIT, await self.visit_outcome(vehicle, begin))

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
                if self.ledger.slot(meter, at) == UNASSIGNED
                and (meter.gap is None or _inside(meter.gap, at) is None)
            ]
            for begin in range(0, len(lines), self.options.batch):
                body = Body(lines[begin : begin + self.options.batch])
                answer = decode_answer(body, await self.door.post(body))
                held += answer.duplicate if answer is not None else 0

        await for_each(self.fleet.meters, IN_FLIGHT_MAX, resend)
        return held

    async def visit_outcome(self, vehicle: Vehicle, begin: Micros) -> str:
        assert vehicle.guest_meter is not None
        pieces = await self.fetch_assignments(vehicle)
        for piece, following in pairwise(pieces):
            if piece.until is None or piece.until > following.since:
                return "the ledger overlaps"
        for piece in pieces:
            end = None if piece.until is None else to_micros(piece.until)
            is_visit = to_micros(piece.since) == begin and end == begin + VISIT_SECONDS * SECOND
            if piece.meter_id == vehicle.guest_meter.id and is_visit:
                return "moved"
        return "not in the ledger"

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


def to_datetime(at: Micros) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at)


def visits_of(vehicle: Vehicle, since: Micros, until: Micros, *, first: Micros) -> Iterator[Micros]:
    """When the vehicle's visits begin in the window; at `first`, also one that is on already."""
    length = round(VISIT_SECONDS) * SECOND
    if since == first:
        since -= length - 1
    offset = round(vehicle.plug_in + VISIT_AFTER_SECONDS) * SECOND
    begin = since + (offset - since) % DAY
    while begin < until:
        yield begin
        begin += DAY


def windows(since: Micros, until: Micros) -> Iterator[tuple[Micros, int]]:
    """Cuts the time into windows of whole hours that one question may span, the last one longer."""
    hours_left = max(1, -(-(until - since) // HOUR))
    while hours_left > 0:
        hours = min(WINDOW_HOURS_MAX, hours_left)
        yield since, hours
        since += hours * HOUR
        hours_left -= hours


# --- On the screen ----------------------------------------------------------------------------


def render_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], left: set[int]) -> str:
    """Columns as wide as their widest cell; those in `left` are aligned to the left."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def render(row: tuple[str, ...]) -> str:
        parts = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(parts).rstrip()

    return "\n".join(render(row) for row in cells)


def render_worst(rows: Iterable[Performance]) -> str:
    """The worst ratio first; parked vehicles, whose meters show only standby, come last."""

    def order(row: Performance) -> tuple[bool, float, str]:
        ratio = row.efficiency_ratio
        return (ratio is None or row.total_kwh_delivered_dc == 0, ratio or 0.0, row.vehicle_id)

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    header = ("vehicle", "ratio", "AC kWh", "DC kWh", "temp C", "coverage", "verdict")
    cells = [
        (
            row.vehicle_id,
            number(row.efficiency_ratio, 3),
            number(row.total_kwh_consumed_ac, 2),
            number(row.total_kwh_delivered_dc, 2),
            number(row.average_battery_temp, 1),
            f"{min(row.ac_coverage, row.dc_coverage):.0%}",
            row.verdict,
        )
        for row in sorted(rows, key=order)[:WORST_ROWS]
    ]
    return render_table(header, cells, left={0, 6})


def render_account(account: SimulationAccount) -> str:
    """The account and the table of faults."""
    counts = [
        ("sent", account.sent),
        ("stored", account.stored),
        ("duplicate", account.duplicate),
        ("conflicting", account.conflicting),
        ("rejected", account.rejected),
        ("failed", account.failed),
    ]
    lines = ["", *(f"{name:<12}{count:>14,}" for name, count in counts)]
    lost = "?" if account.not_checked else f"{account.lost:,}"
    lines += [f"{'lost':<12}{lost:>14}", ""]
    if account.not_checked is None:
        lines.append(
            f"lost is counted over {account.checked:,} acknowledged readings, each looked for."
        )
    else:
        lines.append(f"lost is not known: {account.not_checked}")
    if account.also_held:
        lines.append(f"{account.also_held:,} more are held of the same hours, from another run.")
    if account.resent:
        lines.append(f"{account.resent:,} requests were sent again after a 503 or a broken line.")
    for reason, count in account.reasons.items():
        lines.append(f"{count:,} failed: {reason}")
    header = ("fault", "injected", "expected outcome", "as expected", "otherwise", "codes")
    cells = [
        (
            row.fault,
            f"{row.injected:,}",
            row.expected,
            f"{row.as_expected:,}",
            ", ".join(f"{count:,} {outcome}" for outcome, count in row.otherwise.items()) or "0",
            ", ".join(row.codes),
        )
        for row in account.faults
    ]
    lines += ["", render_table(header, cells, left={0, 2, 4, 5})]
    return "\n".join(lines)
