"""What became of every line that was sent, added up and shown in tables."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

import msgspec

from energy_platform.simulator.faults import EXPECTED, REJECTED, Body, Slot

WORST_ROWS = 10


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
