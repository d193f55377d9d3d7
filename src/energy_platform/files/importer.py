"""The run of an import: lines of a file through the writer, the device declared on the way."""

import contextlib
import gzip
import math
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TextIO

import msgspec
import psycopg
from tqdm import tqdm

from energy_platform import database, fleet, schema
from energy_platform.errors import (
    ConflictError,
    NotFoundError,
    Rejection,
    SetupError,
    StorageError,
    UnprocessableError,
)
from energy_platform.files.account import Account, late_window_for, late_window_setting, to_text
from energy_platform.files.formats import (
    DeviceClass,
    Format,
    ImportOptions,
    check_window,
    create_format,
)
from energy_platform.ingest import Writer
from energy_platform.readings import (
    DEVICE_ID_PATTERN,
    Batch,
    Reading,
    TimeLimits,
    decode_lines,
)
from energy_platform.settings import Settings

BODY_READINGS: Final = 5_000
LINE_BYTES_MAX: Final = 1 << 20
ASSIGNMENTS_MAX: Final = 1_000
# An older reading is of a clock that was never set: no late window is advised for it.
CLOCKS_SET_SINCE: Final = datetime(2000, 1, 1, tzinfo=UTC)
STEP_DEFAULT: Final = timedelta(seconds=60)

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))
_DEVICES: Final[dict[DeviceClass, tuple[type[Any], type[Any]]]] = {
    "meter": (fleet.Meter, fleet.LiveMeter),
    "vehicle": (fleet.Vehicle, fleet.LiveVehicle),
}


# ---- The file ---------------------------------------------------------------------------------


class Line(NamedTuple):
    number: int
    text: bytes
    is_whole: bool


class Source:
    """An open file: its format, its lines, how far it is read, and whether it was cut short."""

    def __init__(self, path: Path, raw: BinaryIO, options: ImportOptions) -> None:
        self.name = path.name
        self.size = path.stat().st_size
        self.cut: str | None = None
        self._raw = raw
        is_compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=raw) if is_compressed else raw
        self.lines = self._read_lines()
        first = next(self.lines, None)
        if first is None:
            raise SetupError(f"{path} holds no line{f': {self.cut}' if self.cut else ''}.")
        self.format = create_format(self.name, first.text, options)
        if not self.format.has_header:
            self.lines = chain([first], self.lines)

    @property
    def position(self) -> int:
        """Bytes of the file that are read, compressed where it is."""
        return self._raw.tell()

    def _read_lines(self) -> Iterator[Line]:
        """Every line that is not blank; of one that is too long its beginning."""
        number = 0
        while text := self._read_piece():
            number += 1
            is_whole = piece_is_last = _ends_line(text)
            while not piece_is_last:
                piece_is_last = _ends_line(self._read_piece())
            if number == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            text = text.rstrip(b"\r\n")
            if text.strip():
                yield Line(number, text, is_whole)

    def _read_piece(self) -> bytes:
        try:
            piece: bytes = self._stream.readline(LINE_BYTES_MAX)
        except (EOFError, OSError, zlib.error) as error:
            self.cut = str(error)
            return b""
        return piece


def _ends_line(piece: bytes) -> bool:
    return piece.endswith(b"\n") or len(piece) < LINE_BYTES_MAX


@contextlib.contextmanager
def open_source(path: Path, options: ImportOptions) -> Iterator[Source]:
    """Open a file and tell its format by its first line.

    Raises: SetupError for what cannot be read, and where the format lacks an option that it needs.
    """
    check_window(options.since, options.until)
    for flag, device_id in (("--meter", options.meter), ("--vehicle", options.vehicle)):
        if device_id is not None and not re.match(DEVICE_ID_PATTERN, device_id):
            raise SetupError(f"{flag}: 1 to 64 printable ASCII characters without a space.")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}.") from None
    with raw:
        if not raw.seekable():
            raise SetupError(f"{path} cannot be read: it is a pipe; write a file first.")
        yield Source(path, raw, options)


# ---- The run ----------------------------------------------------------------------------------


def prepare_database(dsn: str, settings: Settings) -> None:
    """Migrate a database that is not; make sure that it keeps what will be imported.

    Its policies are left as they are, for the service and `migrate` own them.
    Raises: SetupError where what the late window lets in would soon be dropped.
    """
    with database.connect_now(dsn, "energy-platform import") as connection:
        if schema.missing_migrations(connection):
            schema.migrate(dsn, settings)
        row = connection.execute(_SQL["fetch_kept"]).fetchone()
    assert row is not None
    kept = min((span for span in row if span is not None), default=None)
    if kept is not None and kept < settings.late_window:
        days = math.ceil(settings.late_window / timedelta(days=1))
        raise SetupError(
            f"This database keeps and rolls up the last {kept.days} days, so readings of "
            f"{days} days, which the late window lets in, would soon be dropped.",
            hint="run `energy-platform migrate`, or restart `up`, with "
            f"{late_window_setting(settings.late_window)}, and keep it set",
        )


async def import_source(
    source: Source,
    options: ImportOptions,
    dsn: str,
    *,
    clock: Callable[[], datetime],
    out: TextIO,
    shows_progress: bool = False,
) -> Account:
    """Store a file's readings, body by body; returns what became of each line.

    `clock` says how late a reading is, `out` has the progress bar.
    Raises: SetupError where all of the first body is older than the late window; StorageError. Then
    what is stored stays, and the file can be imported again.
    """
    account = Account(source.name, source.size, source.format, options, clock())
    started = time.monotonic()
    step = None
    async with (
        database.open_pool(dsn, name="import", connections_max=1) as pool,
        Writer(dsn, clock=clock, refresh_end=Settings().refresh_end) as writer,
    ):
        with tqdm(
            desc=source.name,
            total=source.size,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=out,
            disable=False if shows_progress else None,  # None: where `out` is no terminal
            dynamic_ncols=True,
        ) as bar:
            while lines := list(islice(source.lines, BODY_READINGS)):
                now = clock()
                batch = _decode(source, lines, now, account)
                if step is None:
                    _refuse_too_old(batch, account, now)
                    step = _measure_step(batch)
                    account.declared = await _declare(pool, source.format, step, now)
                try:
                    outcomes = await writer.record(batch, sum(map(len, batch.payloads)))
                except StorageError as error:
                    raise StorageError(
                        f"The database went away before line {lines[0].number} of {source.name}; "
                        "what was read before is stored. Import the file again: that comes out "
                        "as duplicate."
                    ) from error
                account.add([line.number for line in lines], batch.readings, outcomes)
                bar.update(source.position - bar.n)
        account.cut = source.cut
        account.repeated = source.format.repeated
        account.clock_gap = source.format.clock_gap
        if account.first is not None:
            await _assign(pool, account, account.first - (step or STEP_DEFAULT))
            account.registers = await _fetch_registers(pool, account)
    account.seconds = time.monotonic() - started
    return account


def _decode(source: Source, lines: list[Line], now: datetime, account: Account) -> Batch:
    """Lines to readings; the payload of each is the line as it stands in the file."""
    rows = [
        source.format.read(line.text)
        if line.is_whole
        else Rejection("line_too_long", "$", f"a line has at most {LINE_BYTES_MAX} bytes")
        for line in lines
    ]
    texts = [row for row in rows if isinstance(row, bytes)]
    limits = TimeLimits.at(now, account.options.late_window)
    decoded = decode_lines(b"\n".join(texts), limits, BODY_READINGS)
    assert len(decoded.readings) == len(texts)
    results = iter(decoded.readings)
    readings: list[Reading | Rejection] = []
    for line, row in zip(lines, rows, strict=True):
        reading = row if isinstance(row, Rejection) else next(results)
        if isinstance(reading, Rejection):
            if isinstance(row, bytes) and reading.code == "too_late":
                _note_refused(account, row)
            reading = msgspec.structs.replace(
                reading, detail=f"{source.name}:{line.number}: {reading.detail}"
            )
        readings.append(reading)
    return Batch([line.text for line in lines], readings, decoded.unknown_fields)


class _Stamp(msgspec.Struct):
    timestamp: datetime


def _note_refused(account: Account, text: bytes) -> None:
    instant = msgspec.json.decode(text, type=_Stamp).timestamp
    if instant >= CLOCKS_SET_SINCE:
        account.oldest_refused = min(account.oldest_refused or instant, instant)


def _refuse_too_old(batch: Batch, account: Account, now: datetime) -> None:
    """A forgotten late window would put the whole file into quarantine: stop before that."""
    oldest = account.oldest_refused
    if oldest is None or any(not isinstance(reading, Rejection) for reading in batch.readings):
        return
    raise SetupError(
        f"The readings of {account.name} are older than the late window: they begin at "
        f"{to_text(oldest)}. Nothing was stored.",
        hint=f"set {late_window_for(now - oldest)} for this, and for `up`, `serve` and "
        "`migrate` as well, or what is that old is dropped",
    )


def _measure_step(batch: Batch) -> timedelta:
    """The median time from a reading of the first device to its next."""
    readings = [reading for reading in batch.readings if not isinstance(reading, Rejection)]
    own = [r.ts for r in readings if r.device_id == readings[0].device_id]
    steps = [later - earlier for earlier, later in pairwise(own) if later > earlier]
    return min(statistics.median_low(steps), fleet.INTERVAL_MAX) if steps else STEP_DEFAULT


async def _declare(
    pool: database.Pool, file_format: Format, step: timedelta, now: datetime
) -> str | None:
    """Declare the device of a file that names none, unless it is known as what the file needs."""
    if file_format.device is None:
        return None
    device_class, device_id = file_format.device
    device_type, live_type = _DEVICES[device_class]
    kind = file_format.energy_kind
    with contextlib.suppress(NotFoundError):
        known = await fleet.fetch_device(pool, device_type, device_id)
        if known.energy_kind == kind:
            return None
        # A change holds for the whole past, so it may not fall on readings of another kind.
        await fleet.fetch_live(pool, live_type, device_id, now)
        raise UnprocessableError(
            f"{device_class.capitalize()} {device_id} has readings of kind "
            f"{known.energy_kind}; those of this file are of kind {kind}.",
            hint="import it under an id of its own",
        )
    await fleet.put_device(pool, device_type, device_id, fleet.Declaration(kind, step))
    return f"{device_class} {device_id}: {kind}, a reading every {step.total_seconds():g} s"


async def _assign(pool: database.Pool, account: Account, begin: datetime) -> None:
    """Write that the meter fed the vehicle; an assignment that says so already is left as it is."""
    options = account.options
    if not options.meter or not options.vehicle:
        return
    pair = f"{options.meter} feeds {options.vehicle}"
    since = options.since or begin
    if not options.since and not options.until:
        for known in await fleet.fetch_assignments(
            pool, options.vehicle, options.meter, None, ASSIGNMENTS_MAX
        ):
            if known.since <= since and (known.until is None or known.until > since):
                account.assignment = f"{pair} {_span(known.since, known.until)}, as it was before"
                return
    request = fleet.AssignmentRequest(options.meter, options.vehicle, since, options.until)
    try:
        made, _ = await fleet.put_assignment(pool, request)
    except ConflictError as error:
        account.refusal = f"{pair} {_span(since, options.until)} is not possible: {error.message}"
    else:
        account.assignment = f"{pair} {_span(made.since, made.until)}"


def _span(since: datetime, until: datetime | None) -> str:
    return f"since {to_text(since)} until {to_text(until) if until else 'further notice'}"


async def _fetch_registers(pool: database.Pool, account: Account) -> set[tuple[str, str]]:
    ids = {
        f"{kind}s": [device_id for k, device_id in account.tallies if k == kind]
        for kind in _DEVICES
    }

    async def query(connection: psycopg.AsyncConnection[Any]) -> set[tuple[str, str]]:
        cursor = await connection.execute(_SQL["fetch_registers"], ids)
        return set(await cursor.fetchall())

    return await database.read(pool, query)
