"""One line that tells how far a long task is."""

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self, TextIO

BAR_WIDTH = 24
TERMINAL_EVERY_SECONDS = 0.2
LOG_EVERY_SECONDS = 10.0


class Progress:
    """Shows a count, its rate and the time left: in place on a terminal, else a line every 10 s.

    Without a `total` there is no bar and no time left. `clock` counts seconds.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        out: TextIO,
        unit: str = "readings",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._out = out
        self._clock = clock
        self._in_place = out.isatty()
        self._every_seconds = TERMINAL_EVERY_SECONDS if self._in_place else LOG_EVERY_SECONDS
        self._started = self._shown = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Adds to what is done, and shows it when the last showing is old enough."""
        self.done += count
        if self._clock() - self._shown >= self._every_seconds:
            self._show()

    def clear(self) -> None:
        """Wipes the line from a terminal to make room for other text; `advance` brings it back."""
        if self._in_place:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def close(self) -> None:
        """Shows the last state and ends the line."""
        self._show()
        if self._in_place:
            self._out.write("\n")
            self._out.flush()

    def line(self) -> str:
        """What is shown now, without the control characters."""
        elapsed = self._clock() - self._started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        speed = f"{rate:,.0f}/s"
        if not self.total:
            return f"{self.label}  {self.done:,} {self.unit}  {speed}"
        share = min(1.0, self.done / self.total)
        bar = ("#" * int(share * BAR_WIDTH)).ljust(BAR_WIDTH, "-")
        if self.done >= self.total:
            left = f"in {timedelta(seconds=int(elapsed))}"
        elif rate > 0:
            left = f"{timedelta(seconds=int((self.total - self.done) / rate))} left"
        else:
            left = "-"
        counts = f"{self.done:,} of {self.total:,} {self.unit}"
        return f"{self.label} [{bar}] {share:4.0%}  {counts}  {speed}  {left}"

    def _show(self) -> None:
        self._shown = self._clock()
        if self._in_place:
            self._out.write(f"\r{self.line()}\x1b[K")
        else:
            self._out.write(f"{self.line()}\n")
        self._out.flush()
