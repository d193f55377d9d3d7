"""What the routes share: pools, writer, keys, clock. Opened and closed with the application."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from energy_platform import database
from energy_platform.access import KeyRing
from energy_platform.ingest import Writer


def utc_now() -> datetime:
    return datetime.now(UTC)


class Service:
    """The parts of a running service. Ingest and analytics have pools of their own."""

    def __init__(
        self,
        *,
        read_pool: database.Pool,
        write_pool: database.Pool,
        keys: KeyRing,
        writer: Writer | None,
        late_window: timedelta,
        refresh_end: timedelta,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.read_pool = read_pool
        self.write_pool = write_pool
        self.keys = keys
        self.writer = writer
        self.late_window = late_window
        self.refresh_end = refresh_end
        self.clock = clock
