"""Adds up what became of every line of a file, and shows it."""

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

from energy_platform.errors import Rejection
from energy_platform.files.formats import Format, ImportOptions
from energy_platform.ingest import OUTCOMES, Outcome
from energy_platform.readings import MeterReading, Reading
from energy_platform.settings import Settings

PROBLEMS_SHOWN_MAX: Final = 8
HOURS_MAX: Final = 744  # the longest window that the service answers


class Tally:
    """The energy of one device's readings, as they stand in the file. Unit: kWh."""

    def __init__(self) -> None:
        self.kwh_sum = 0.0
        self.kwh_increase = 0.0  # of a register, in the order of the file
        self.in_order = True
        self._last: tuple[datetime, float] | None = None

    def add(self, ts: datetime, kwh: float) -> None:
        self.kwh_sum += kwh
        if self._last:
            last_ts, last_kwh = self._last
            self.in_order &= last_ts <= ts
            self.kwh_increase += kwh - last_kwh if kwh >= last_kwh else kwh
        self._last = ts, kwh


class Account:
    """What became of a file. received = stored + duplicate + conflicting + rejected, always."""

    def __init__(
        self, name: str, size: int, file_format: Format, options: ImportOptions, begun_at: datetime
    ) -> None:
        self.name = name
        self.size = size
        self.title = file_format.title
        self.filled = file_format.filled
        self.options = options
        self.begun_at = begun_at
        self.seconds = 0.0
        self.received = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.codes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.first: datetime | None = None
        self.last: datetime | None = None
        self.tallies: dict[tuple[str, str], Tally] = {}  # by kind and id
        self.registers: set[tuple[str, str]] = set()  # which of them count a register
        self.repeated = 0
        self.clock_gap: timedelta | None = None
        self.cut: str | None = None
        self.declared: str | None = None
        self.assignment: str | None = None
        self.refusal: str | None = None  # why the assignment was not made
        self.oldest_refused: datetime | None = None

    def add(
        self,
        numbers: Sequence[int],
        readings: Sequence[Reading | Rejection],
        outcomes: list[Outcome],
    ) -> None:
        """What became of the lines with these numbers."""
        self.received += len(outcomes)
        self.outcomes.update(outcomes)
        assert self.received == self.outcomes.total(), "every line has exactly one outcome"
        for number, reading, outcome in zip(numbers, readings, outcomes, strict=True):
            if isinstance(reading, Rejection):
                self._add_problem(reading.code, reading.detail)
            elif outcome in ("stored", "duplicate"):
                self._add_reading(reading)
            else:
                self._add_problem(
                    outcome,
                    f"{self.name}:{number}: {reading.device_id} has other values stored "
                    f"at {to_text(reading.ts)}",
                )

    def _add_reading(self, reading: Reading) -> None:
        self.first = min(self.first or reading.ts, reading.ts)
        self.last = max(self.last or reading.ts, reading.ts)
        tally = self.tallies.setdefault((reading.kind, reading.device_id), Tally())
        if isinstance(reading, MeterReading):
            tally.add(reading.ts, reading.kwh_consumed_ac)
        else:
            tally.add(reading.ts, reading.kwh_delivered_dc)

    def _add_problem(self, code: str, detail: str) -> None:
        self.codes[code] += 1
        if len(self.problems) < PROBLEMS_SHOWN_MAX:
            self.problems.append(f"{detail} [{code}]")

    @property
    def is_whole(self) -> bool:
        """Whether all that is a reading is in the database now, and the assignment as well."""
        lost = self.outcomes["conflicting"] + self.codes["too_late"] + self.codes["in_future"]
        kept = self.outcomes["stored"] + self.outcomes["duplicate"]
        return not lost and bool(kept) and not self.refusal and not self.cut


def render_account(account: Account) -> str:
    """What a person reads at the end of an import."""
    o = account.outcomes
    rate = account.received / account.seconds if account.seconds else 0
    lines = [f"{account.name}: {account.title}, {account.size:,} bytes in {account.seconds:.1f} s"]

    def say(label: str, text: str) -> None:
        lines.append(f"  {label:11} {text}")

    sums = " + ".join(f"{o[outcome]:,} {outcome}" for outcome in OUTCOMES)
    say("received", f"{account.received:,} = {sums}  ({rate:,.0f}/s)")
    if account.codes:
        codes = ", ".join(f"{count:,} {code}" for code, count in account.codes.most_common())
        say("not stored", f"{codes}; each is in quarantine as it came:")
        for problem in account.problems:
            say("", problem)
        if account.codes.total() > len(account.problems):
            say("", f"and {account.codes.total() - len(account.problems):,} more")
    if account.cut:
        say("cut", f"the file ends too early: {account.cut}")
    if account.first and account.last:
        say("span", f"{to_text(account.first)} to {to_text(account.last)}, by {_count(account)}")
        say("energy", _render_energy(account))
    for name, count in account.filled.items():
        value = account.options.fill[name]
        say("set", f"{name}={value:g} in {count:,} lines: your value, not measured")
    if account.repeated:
        say("clock", f"{account.repeated:,} lines in a repeated hour, told apart by their order")
    if account.clock_gap:
        direction = "ahead of" if account.clock_gap > timedelta(0) else "behind"
        say("clock", f"`datetime` was taken: {abs(account.clock_gap)} {direction} `timestamp` in")
        say("", "every line that has both; one of them is a local time sent as UTC")
    if account.declared:
        say("declared", account.declared)
    if account.assignment:
        say("assignment", account.assignment)
    if account.refusal:
        say("assignment", f"NOT MADE: {account.refusal}")
    if account.oldest_refused:
        setting = late_window_for(account.begun_at - account.oldest_refused)
        say("too late", f"from {to_text(account.oldest_refused)}: set {setting} here, and for")
        say("", "`up`, `serve` and `migrate` as well; then import the file again")
    if account.first and account.begun_at - account.first > Settings().late_window:
        setting = late_window_setting(account.options.late_window)
        say("KEEP", f"{setting} set for `up`, `serve`, `migrate`:")
        say("", "without it their next start is refused, for it would drop these readings")
    if account.first and account.last:
        lines += _render_questions(account, account.first, account.last)
    return "\n".join(lines)


def _count(account: Account) -> str:
    kinds = Counter(kind for kind, _ in account.tallies)
    return " and ".join(f"{n:,} {kind}{'s' * (n > 1)}" for kind, n in sorted(kinds.items()))


def _render_energy(account: Account) -> str:
    parts = []
    for kind, current in (("meter", "AC"), ("vehicle", "DC")):
        own = {key: tally for key, tally in account.tallies.items() if key[0] == kind}
        if not own:
            continue
        unordered = [k for k, t in own.items() if k in account.registers and not t.in_order]
        kwh = math.fsum(
            t.kwh_increase if k in account.registers else t.kwh_sum
            for k, t in own.items()
            if k not in unordered
        )
        words = f"{kwh:,.3f} kWh {current}"
        if unordered:
            words += f" (without {len(unordered):,} registers that are not in the order of time)"
        parts.append(words)
    return ", ".join(parts)


def _render_questions(account: Account, first: datetime, last: datetime) -> list[str]:
    """How to ask for the answer: over HTTP the last window that can be asked for, in SQL all."""
    vehicle = account.options.vehicle or next(
        (device_id for kind, device_id in account.tallies if kind == "vehicle"), None
    )
    if not vehicle:
        return [
            "  in SQL      SELECT * FROM meter_energy_daily_v1 ORDER BY meter_id, day",
            "  ratio       needs a vehicle: import again with --vehicle to assign the meter to it",
        ]
    until = last.replace(second=0, microsecond=0) + timedelta(minutes=1)
    hours = min(HOURS_MAX, math.ceil((until - first) / timedelta(hours=1)))
    path = f"/v1/analytics/performance/{quote(vehicle, safe='')}"
    literal = vehicle.replace("'", "''")
    window = f"'{to_text(first)}', '{to_text(until)}'"
    return [
        f"  ask         curl 'http://127.0.0.1:8080{path}?until={to_text(until)}&hours={hours}'",
        f"  in SQL      SELECT * FROM vehicle_performance_v1('{literal}', {window})",
    ]


def late_window_setting(window: timedelta) -> str:
    """The setting with this late window, in whole days."""
    return f"ENERGY_LATE_WINDOW=P{math.ceil(window / timedelta(days=1))}D"


def late_window_for(age: timedelta) -> str:
    """The setting that lets readings of this age in, rounded up so that it holds for a while."""
    return late_window_setting(timedelta(days=math.ceil((age.days + 30) / 100) * 100))


def to_text(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
