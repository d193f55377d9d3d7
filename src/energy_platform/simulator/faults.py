"""What goes wrong on the way: readings gathered into bodies, some spoilt on purpose."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from energy_platform.simulator.fleet import DAY, HOUR, Device, Fleet, Micros, to_text

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
IMPOSSIBLE = "impossible"
"""Each of these is named further, and must be rejected."""

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

SPOILT_IN_TURN = (
    REPEAT,
    REPEAT_ONE,
    CONFLICT,
    CONFLICT_ONE,
    IMPOSSIBLE,
    SHUFFLED,
    CUT_HALF,
    CUT_WHOLE,
)
CONFLICTS_IN_A_BODY = 20


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
        (msgspec.json.encode({**reading, **change}), f"{IMPOSSIBLE}: {name}")
        for change, name in spoilt
    ]
    encoded.append((msgspec.json.encode({**vehicle, "soc": 140.0}), f"{IMPOSSIBLE}: soc 140"))
    # No JSON encoder writes this, but gateways do.
    not_a_number = msgspec.json.encode({**reading, energy: 0}).replace(
        f'"{energy}":0'.encode(), f'"{energy}":NaN'.encode()
    )
    encoded.append((not_a_number, f"{IMPOSSIBLE}: NaN"))
    return encoded


def other_values(line: bytes) -> bytes:
    """The same device and instant with another measurement."""
    reading = msgspec.json.decode(line)
    measure = "voltage" if "meterId" in reading else "batteryTemp"
    reading[measure] = round(reading[measure] + 3.5, 2)
    return msgspec.json.encode(reading)


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
            if device.in_gap(at):
                self.not_sent[slot] += 1
                continue
            held_until = device.held_until(at)
            if held_until is not None:
                self._held.setdefault(device, []).append((device.line(at), slot, LATE))
                self._release_at[device] = held_until
                continue
            entries.append((device.line(at), slot, RESET if device.just_reset(at) else PLAIN))
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
        kind = SPOILT_IN_TURN[self._spoilt % len(SPOILT_IN_TURN)]
        self._spoilt += 1
        if kind in (CUT_HALF, CUT_WHOLE) and any(fault == RESET for _, _, fault in entries):
            # After a cut nobody knows whether a line is new, and a reset must be.
            kind = SHUFFLED
        yield self._spoil(kind, entries, now)

    def _spoil(self, kind: str, entries: list[Entry], now: Micros) -> Course:
        if kind == REPEAT:
            return [Body(entries), Body([(line, None, REPEAT) for line, _, _ in entries])]
        if kind == REPEAT_ONE:
            line = self._source.choice(entries)[0]
            return [Body(entries), Body([(line, None, REPEAT_ONE)], form="one")]
        if kind == CONFLICT:
            chosen = self._source.sample(entries, min(CONFLICTS_IN_A_BODY, len(entries)))
            return [
                Body(entries),
                Body([(other_values(line), None, CONFLICT) for line, _, _ in chosen]),
            ]
        if kind == CONFLICT_ONE:
            line = self._source.choice(entries)[0]
            return [Body(entries), Body([(other_values(line), None, CONFLICT_ONE)], form="one")]
        if kind == IMPOSSIBLE:
            # Among good neighbours: one bad reading never costs a good one.
            mixed = list(entries)
            for bad, fault in impossible_readings(self._source.choice(entries)[0], now):
                mixed.insert(self._source.randrange(len(mixed) + 1), (bad, None, fault))
            return [Body(mixed, form="array")]
        named = self._named(entries, kind)
        if kind == SHUFFLED:
            self._source.shuffle(named)
            return [Body(named)]
        return [Body(named, cut="half" if kind == CUT_HALF else "whole")]

    @staticmethod
    def _named(entries: list[Entry], name: str) -> list[Entry]:
        return [(line, slot, name if fault == PLAIN else fault) for line, slot, fault in entries]
