"""What a line of a file says: the JSON of a reading, or why it is none. Pure, no I/O, no clock.

A format is told by the first line. A new one is a class here and a line in `create_format`.
"""

import csv
import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

import msgspec

from energy_platform.errors import Rejection, SetupError
from energy_platform.readings import ZONE_OFFSET_MAX, MeterReading, VehicleReading

DeviceClass = Literal["meter", "vehicle"]

_NAMES: Final = [
    [field.encode_name for field in msgspec.structs.fields(struct)]
    for struct in (MeterReading, VehicleReading)
]
# What --set may fill, by the id that a reading has: every field but the id and the timestamp.
_FILLABLE: Final = {id_name: numbers for id_name, *numbers, _timestamp in _NAMES}
_NUMERIC: Final = {name for names in _FILLABLE.values() for name in names}
QUARTER: Final = timedelta(minutes=15)  # time zones differ by whole ones
CLOCK_SLACK: Final = timedelta(seconds=2)  # one of two clocks of a line may show whole seconds
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class ImportOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What the caller says of a file that the file does not say itself."""

    meter: str | None = None
    vehicle: str | None = None
    time_zone: str | None = None
    fill: Mapping[str, float] = {}
    since: datetime | None = None
    until: datetime | None = None
    late_window: timedelta


def decode_fill(texts: Sequence[str]) -> dict[str, float]:
    """`--set name=value`, each. Raises: SetupError that names the nearest field."""
    fill = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in _NUMERIC:
            (near,) = difflib.get_close_matches(name, sorted(_NUMERIC), n=1, cutoff=0)
            raise SetupError(f"--set {text}: {name!r} is no field.", hint=f"did you mean {near}?")
        if not _NUMBER.fullmatch(value):
            raise SetupError(f"--set {text}: {value!r} is no number.", hint=f"--set {name}=20")
        fill[name] = float(value)
    return fill


def check_window(since: datetime | None, until: datetime | None) -> None:
    """Raises: SetupError."""
    for flag, instant in (("--since", since), ("--until", until)):
        if instant is not None and instant.tzinfo is None:
            raise SetupError(f"{flag} has no UTC offset.", hint="2026-02-10T00:00:00Z")
    if since and until and until <= since:
        raise SetupError("--until must be after --since.")


class Format:
    """How a line becomes the JSON of a reading, with what --set fills in."""

    title: str
    has_header = True
    device: tuple[DeviceClass, str] | None = None  # whose file it is, where it names none
    energy_kind: Literal["interval", "register"] = "interval"

    def __init__(self, options: ImportOptions) -> None:
        self._fill = options.fill
        self.filled: Counter[str] = Counter()  # in how many lines, by field

    @property
    def repeated(self) -> int:
        """How many lines of a repeated hour were told by their order."""
        return 0

    @property
    def clock_gap(self) -> timedelta | None:
        """By how much the clock that was taken is ahead of the file's other one, in every line."""
        return None

    def read(self, line: bytes) -> bytes | Rejection:
        """The JSON of the line's reading, or the reason why there is none."""
        fields = self._read_fields(line)
        if not isinstance(fields, dict):
            return fields
        for id_name, names in _FILLABLE.items():
            if id_name in fields:
                for name in names:
                    if name in self._fill and name not in fields:
                        fields[name] = self._fill[name]
                        self.filled[name] += 1
        return msgspec.json.encode(fields)

    def _read_fields(self, line: bytes) -> dict[str, Any] | bytes | Rejection:
        """The fields by their names of the contract, or JSON as it stands."""
        raise NotImplementedError


class LinesFormat(Format):
    """Our own: a reading a line, as `export` writes them and POST /v1/ingest takes them."""

    title = "NDJSON"
    has_header = False

    def _read_fields(self, line: bytes) -> dict[str, Any] | bytes:
        if not self._fill:
            return line
        try:
            return dict(_object_decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return line  # what is wrong with it is for the decoder to say


class TableFormat(Format):
    """A line is cells; the header says what they are. Of two columns with one name the first."""

    def __init__(self, options: ImportOptions, header: list[str], delimiter: str) -> None:
        super().__init__(options)
        self._width = len(header)
        self._places = {name: header.index(name) for name in header}
        self._delimiter = delimiter

    def _read_fields(self, line: bytes) -> dict[str, Any] | Rejection:
        try:
            cells = _split(line.decode(), self._delimiter)
        except UnicodeDecodeError as error:
            return Rejection("bad_utf8", "$", f"not UTF-8: {error.reason}")
        except csv.Error as error:
            return Rejection("wrong_columns", "$", f"cannot be split into columns: {error}")
        if len(cells) != self._width:
            return Rejection(
                "wrong_columns", "$", f"{len(cells)} columns, the header has {self._width}"
            )
        return self._read_cells({name: cells[n].strip() for name, n in self._places.items()})

    def _read_cells(self, cells: dict[str, str]) -> dict[str, Any] | Rejection:
        raise NotImplementedError


class OwnTableFormat(TableFormat):
    """Our own: the header has the names of the contract. Other columns are passed over."""

    title = "CSV"

    def _read_cells(self, cells: dict[str, str]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, text in cells.items():
            if text and name in _NUMERIC:
                fields[name] = _number(text)
            elif text and (name in _FILLABLE or name == "timestamp"):
                fields[name] = text
        return fields


class HouseholdFormat(TableFormat):
    """The UCI household power file: the mean power of each minute, in local time without a zone.

    Unit: kW, so the energy of a minute is a sixtieth of it in kWh. `?` is a missing value.
    """

    title = "UCI household power"

    def __init__(self, options: ImportOptions, header: list[str], delimiter: str) -> None:
        super().__init__(options, header, delimiter)
        if options.meter is None:
            raise SetupError(f"The file ({self.title}) names no meter.", hint="give --meter M-1")
        if options.time_zone is None:
            raise SetupError(
                f"The file ({self.title}) is in local time and does not say where.",
                hint="give --time-zone; the original is --time-zone Europe/Paris",
            )
        self._meter = options.meter
        self.device = ("meter", options.meter)
        self._clock = LocalClock(options.time_zone)

    @property
    def repeated(self) -> int:
        return self._clock.repeated

    def _read_cells(self, cells: dict[str, str]) -> dict[str, Any] | Rejection:
        fields: dict[str, Any] = {"meterId": self._meter}
        power, voltage = cells["Global_active_power"], cells["Voltage"]
        if power not in ("", "?"):
            fields["kwhConsumedAc"] = _number(power, 60)
        if voltage not in ("", "?"):
            fields["voltage"] = _number(voltage)
        try:
            day, month, year = map(int, cells["Date"].split("/"))
            hour, minute, second = map(int, cells["Time"].split(":"))
            local = datetime(year, month, day, hour, minute, second)  # noqa: DTZ001 (it is local)
        except ValueError:
            return fields | {"timestamp": f"{cells['Date']} {cells['Time']}"}
        instant = self._clock.place(local)
        if isinstance(instant, Rejection):
            return msgspec.structs.replace(instant, device_id=self._meter)
        return fields | {"timestamp": instant}


class ChargerFormat(TableFormat):
    """What a DC charger logs of a session. Its energy is a register in Wh; no temperature."""

    title = "DC charging session"
    energy_kind = "register"

    def __init__(self, options: ImportOptions, header: list[str], delimiter: str) -> None:
        super().__init__(options, header, delimiter)
        if options.vehicle is None:
            raise SetupError(
                f"The file ({self.title}) names no vehicle.", hint="give --vehicle V-1"
            )
        if "batteryTemp" not in options.fill:
            raise SetupError(
                f"The file ({self.title}) has no battery temperature, and a reading has one.",
                hint="give one of your own: --set batteryTemp=20; the summary will say so",
            )
        self._vehicle = options.vehicle
        self.device = ("vehicle", options.vehicle)
        self._clock_gaps: set[timedelta | None] = set()  # None: one that no time zone explains

    @property
    def clock_gap(self) -> timedelta | None:
        return next(iter(self._clock_gaps)) if len(self._clock_gaps) == 1 else None

    def _read_cells(self, cells: dict[str, str]) -> dict[str, Any]:
        if "timestamp" in cells:
            self._compare_clocks(cells["datetime"], cells["timestamp"])
        fields: dict[str, Any] = {"vehicleId": self._vehicle}
        if soc := cells["soc"]:
            fields["soc"] = _number(soc)
        if energy := cells["charged_energy"]:
            fields["kwhDeliveredDc"] = _number(energy, 1000)
        if instant := cells["datetime"]:
            fields["timestamp"] = instant.replace(" ", "T", 1)
        return fields

    def _compare_clocks(self, instant: str, epoch: str) -> None:
        """Note by how much `datetime` is ahead of `timestamp`, which counts seconds."""
        try:
            gap = datetime.fromisoformat(instant) - datetime.fromtimestamp(float(epoch), UTC)
        except (ValueError, TypeError, OverflowError, OSError):
            return  # one of them is missing, or no instant: that is for the decoder to say
        quarters = round(gap / QUARTER) * QUARTER
        is_zone = abs(gap - quarters) <= CLOCK_SLACK and abs(quarters) <= ZONE_OFFSET_MAX
        self._clock_gaps.add(quarters if is_zone else None)


def create_format(name: str, first: bytes, options: ImportOptions) -> Format:
    """The format that the first line of the file `name` is in.

    Raises: SetupError that says what is understood, or which option is missing or one too many.
    """
    found = _tell_format(name, first, options)
    if found.device is None and bool(options.meter) != bool(options.vehicle):
        raise SetupError(
            f"{name} names its devices itself.",
            hint="--meter and --vehicle together assign the one to the other",
        )
    if options.time_zone and not isinstance(found, HouseholdFormat):
        raise SetupError(f"A {found.title} file has UTC offsets: --time-zone is not for it.")
    return found


def _tell_format(name: str, first: bytes, options: ImportOptions) -> Format:
    if first.lstrip()[:1] == b"{" or ".ndjson" in name or ".jsonl" in name:
        return LinesFormat(options)
    text = first.decode("utf-8", "replace")
    delimiter = ";" if text.count(";") > text.count(",") else ","
    try:
        header = [cell.strip() for cell in _split(text, delimiter)]
    except csv.Error:
        header = []
    if {"Date", "Time", "Global_active_power", "Voltage"} <= set(header):
        return HouseholdFormat(options, header, delimiter)
    if {"datetime", "soc", "charged_energy"} <= set(header):
        return ChargerFormat(options, header, delimiter)
    if "timestamp" in header and _FILLABLE.keys() & set(header):
        return OwnTableFormat(options, header, delimiter)
    raise SetupError(
        f"{name} is in no format that is understood; it begins with {text[:80]!r}.",
        hint="NDJSON or CSV with the names of the contract (meterId, kwhConsumedAc, "
        "voltage, timestamp), the UCI household power file, or a DC charging session "
        "(datetime, soc, charged_energy)",
    )


def _number(text: str, divisor: float = 1) -> float | str:
    """A number; any other text as it is, for the decoder to refuse."""
    return float(text) / divisor if _NUMBER.fullmatch(text) else text


def _split(text: str, delimiter: str) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    return next(csv.reader([text], delimiter=delimiter, strict=True))


class LocalClock:
    """Puts local times in their place on the time line, in the order in which they are asked for.

    An hour that the clocks go through twice is told by that order: of its two instants the first
    that is not before the one asked for last.
    """

    def __init__(self, zone: str) -> None:
        try:
            self._zone = ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            raise SetupError(
                f"There is no time zone {zone!r}.", hint="an IANA name, such as Europe/Paris"
            ) from None
        self._last = datetime.min.replace(tzinfo=UTC)
        self.repeated = 0  # how many were told by their order

    def place(self, local: datetime) -> datetime | Rejection:
        """The instant in UTC of a local time without a zone."""
        try:
            first = local.replace(tzinfo=self._zone).astimezone(UTC)
            second = local.replace(tzinfo=self._zone, fold=1).astimezone(UTC)
        except OverflowError:
            return Rejection("bad_timestamp", "$.timestamp", f"{local} is out of the calendar")
        if first == second:
            self._last = first
            return first
        words = f"{local} in {self._zone.key}"
        # In a gap fold=0 counts with the offset before it, and so comes out later.
        if first > second:
            detail = f"{words} does not exist: the clocks went forward over it"
            return Rejection("nonexistent_time", "$.timestamp", detail)
        for instant in (first, second):
            if instant >= self._last:
                self._last = instant
                self.repeated += 1
                return instant
        detail = f"{words} was twice, and the lines are not in the order of time"
        return Rejection("ambiguous_time", "$.timestamp", detail)
