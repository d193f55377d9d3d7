"""The devices and what they measure, as a function of the seed, the device and the instant."""

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec

# Instants are whole microseconds since 1970 in here: exact, and quick to compare.
Micros = int

SECOND: Micros = 1_000_000
HOUR: Micros = 3600 * SECOND
DAY_SECONDS = 86_400.0
DAY: Micros = 86_400 * SECOND

# Registers count from here (2024-01-01), so that they show what a device of some years shows.
COUNTER_EPOCH_SECONDS = 1_704_067_200.0
COUNTER_EPOCH_DAY = 19_723

BATCH_MAX = 9_000  # a service takes 10,000 in a body; faults are added to some

CONSTANT_UNTIL_SOC = 80.0
TAPER_ENDS_AFTER = 4.0  # time constants; the charger then stops at 2 % of its power
THERMAL_SECONDS = 2880.0
VISIT_AFTER_SECONDS = 900  # since plugging in
VISIT_SECONDS = 3600
HOLD_BACK_SECONDS = 3 * 3600.0
GAP_SECONDS = 1800.0
NOISE_SIZE = 4096

_noise_source = random.Random("noise")
NOISE = tuple(_noise_source.gauss(0.0, 1.0) for _ in range(NOISE_SIZE))


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


def _since(begin: float, at: Micros) -> float:
    """Seconds since the clock last showed `begin`, a second of the UTC day."""
    return (at / SECOND - begin) % DAY_SECONDS


class Device:
    """What meters and vehicles share: an id, a place in the interval, and a counter of energy."""

    path: str

    def __init__(self, identifier: str, interval: Micros, source: random.Random) -> None:
        self.id = identifier
        self.interval = interval
        self.phase: Micros = source.randrange(max(1, interval // 1000)) * 1000
        self.is_register = source.random() < 0.1
        self.noise_offset = source.randrange(NOISE_SIZE)
        # When its faults begin, in seconds of the UTC day, the same every day; see `plan_faults`.
        self.reset_at: float | None = None
        self.gap_at: float | None = None
        self.held_back_at: float | None = None

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
        return self.counter(seconds) - self.counter(seconds - _since(self.reset_at, at))

    def just_reset(self, at: Micros) -> bool:
        """Whether this is the first reading after a register reset."""
        return self.reset_at is not None and _since(self.reset_at, at) < self.interval / SECOND

    def in_gap(self, at: Micros) -> bool:
        """Whether this reading is never sent."""
        return self.gap_at is not None and _since(self.gap_at, at) < GAP_SECONDS

    def held_until(self, at: Micros) -> Micros | None:
        """When this reading is sent at last, if it is held back for a late burst."""
        if self.held_back_at is None:
            return None
        waited = _since(self.held_back_at, at)
        if waited >= HOLD_BACK_SECONDS:
            return None
        return at + round((HOLD_BACK_SECONDS - waited) * SECOND)

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
        self.plug_in = round(plug_in_hour * 60) * 60  # second of the UTC day
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

    def visits(self, since: Micros, until: Micros) -> range:
        """When the stays at the guest meter begin that begin in the window."""
        offset = (self.plug_in + VISIT_AFTER_SECONDS) * SECOND
        return range(since + (offset - since) % DAY, until, DAY)

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


def plan_faults(
    meters: list[Meter], vehicles: list[Vehicle], seed: int, interval: Micros
) -> list[Meter]:
    """Gives one device in fifty each fault that belongs to a device; returns the guest meters.

    The times are of the day, not of the run, so that a second run tells the same story. What goes
    wrong with whole bodies is in `faults`.
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
            device.held_back_at = source.uniform(0.0, DAY_SECONDS)
        for device in others[count : 2 * count]:
            device.gap_at = source.uniform(0.0, DAY_SECONDS)

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
