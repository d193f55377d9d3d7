"""What devices send: bytes to structs, structs to column arrays. Pure, no I/O, no clock.

The common case is one strict decode per reading. Whatever that decoder refuses is examined field by
field, so that the answer can say what is wrong, where, and under a code that does not depend on the
wording of a library.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import msgspec

from energy_platform.errors import MalformedError, Rejection, TooLargeError

AHEAD_MAX: Final = timedelta(minutes=5)  # a device's clock may run ahead of ours by this much
ZONE_OFFSET_MAX: Final = timedelta(hours=14)  # no local time is further from UTC

# `\Z`, not `$`: the latter also matches before a trailing line feed.
DEVICE_ID_PATTERN: Final = r"^[!-~]{1,64}\Z"
DeviceId = Annotated[str, msgspec.Meta(pattern=DEVICE_ID_PATTERN)]
EnergyKwh = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Volts = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Celsius = Annotated[float, msgspec.Meta(ge=-60, le=150)]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]


class MeterReading(
    msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, gc=False
):
    """AC energy at a meter. Units: kWh, V."""

    kind: ClassVar[str] = "meter"

    meter_id: DeviceId
    kwh_consumed_ac: EnergyKwh
    voltage: Volts
    ts: Instant = msgspec.field(name="timestamp")

    @property
    def device_id(self) -> str:
        return self.meter_id

    @property
    def values(self) -> tuple[float, ...]:
        return self.kwh_consumed_ac, self.voltage


class VehicleReading(
    msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, gc=False
):
    """DC energy into a battery. Units: %, kWh, degrees Celsius."""

    kind: ClassVar[str] = "vehicle"

    vehicle_id: DeviceId
    soc: Percent
    kwh_delivered_dc: EnergyKwh
    battery_temp: Celsius
    ts: Instant = msgspec.field(name="timestamp")

    @property
    def device_id(self) -> str:
        return self.vehicle_id

    @property
    def values(self) -> tuple[float, ...]:
        return self.soc, self.kwh_delivered_dc, self.battery_temp


Reading = MeterReading | VehicleReading


class TimeLimits(NamedTuple):
    """The instants between which a reading is taken: earliest <= ts <= latest."""

    earliest: datetime
    latest: datetime

    @classmethod
    def at(cls, now: datetime, late_window: timedelta) -> "TimeLimits":
        return cls(now - late_window, now + AHEAD_MAX)


Payload = bytes | msgspec.Raw


class Batch(NamedTuple):
    """A decoded body: for each position the bytes as they came and what they turned out to be."""

    payloads: Sequence[Payload]
    readings: list[Reading | Rejection]
    unknown_fields: int = 0


_meter_decoder = msgspec.json.Decoder(MeterReading)
_vehicle_decoder = msgspec.json.Decoder(VehicleReading)
_array_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_naive_decoder = msgspec.json.Decoder(datetime)

# A string, or a token that strict JSON does not have. Strings are matched so as to be passed over,
# also one that never ends, and without going back: time must grow with the length, not its square.
_STRING_OR_NOT_FINITE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|-?Infinity|NaN', re.DOTALL)

# Half of a surrogate pair: valid JSON, yet no character that any text could hold.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def decode_single(body: bytes, limits: TimeLimits) -> Batch:
    """Decode a body that is one JSON object.

    Raises: MalformedError where the body is not JSON, is not an object, or is nested too deep.
    """
    try:
        reading, unknown = decode_reading(body, limits)
    except RecursionError:
        raise _nested_too_deep() from None
    if isinstance(reading, Rejection) and (
        reading.code in ("not_json", "bad_utf8", "not_an_object") or _has_not_finite(body)
    ):
        raise MalformedError(
            f"The body is not a JSON object or array: {reading.detail}", code="not_json"
        )
    return Batch([body], [reading], unknown)


def decode_array(body: bytes, limits: TimeLimits, readings_max: int) -> Batch:
    """Decode a body that is a JSON array. An item that is not a reading costs itself alone.

    Raises: MalformedError where the body is not JSON or is nested too deep, TooLargeError.
    """
    # An array of a million `0,` would be cheap to send and dear to keep: bound the items before
    # an object is made for each. A reading has three commas of its own and one after it.
    if body.count(b",") > 16 * readings_max:
        raise _too_many(readings_max)
    try:
        payloads: Sequence[Payload] = _array_decoder.decode(body)
    except RecursionError:
        raise _nested_too_deep() from None
    except msgspec.DecodeError as error:
        payloads = _split_tolerantly(body, error)
    if len(payloads) > readings_max:
        raise _too_many(readings_max)
    return _decode_each(payloads, limits)


def decode_lines(body: bytes, limits: TimeLimits, readings_max: int) -> Batch:
    """Decode NDJSON: a reading a line, blank lines passed over.

    A line that is not JSON is one rejected reading. Raises: TooLargeError.
    """
    if body.count(b"\n") > 16 * readings_max:  # blank lines are cheap to send too
        raise _too_many(readings_max)
    lines = [line for line in map(bytes.strip, body.split(b"\n")) if line]
    if len(lines) > readings_max:
        raise _too_many(readings_max)
    return _decode_each(lines, limits)


def _decode_each(payloads: Sequence[Payload], limits: TimeLimits) -> Batch:
    readings: list[Reading | Rejection] = []
    unknown_fields = 0
    for payload in payloads:
        try:
            reading, unknown = decode_reading(payload, limits)
        except RecursionError:
            reading, unknown = Rejection("nested_too_deep", "$", "nested too deep"), 0
        readings.append(reading)
        unknown_fields += unknown
    return Batch(payloads, readings, unknown_fields)


def decode_reading(payload: Payload, limits: TimeLimits) -> tuple[Reading | Rejection, int]:
    """Decode one reading; also count the fields that are not known here.

    Raises: RecursionError where the payload is nested too deep.
    """
    raw = bytes(payload)
    reading: Reading
    try:
        # The wrong decoder refuses by the missing field, so a guess by substring is safe.
        reading = (_meter_decoder if b'"meterId"' in raw else _vehicle_decoder).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _examine(raw, limits)
    if limits.earliest <= reading.ts <= limits.latest:
        return reading, 0
    return _out_of_time(reading.ts, reading.device_id, limits), 0


# ---- What is wrong with it --------------------------------------------------------------------


def _examine(raw: bytes, limits: TimeLimits) -> tuple[Reading | Rejection, int]:
    """Decode slowly and say what is wrong; a reading with further fields ends here too."""
    if _has_not_finite(raw):
        return _examine_not_finite(raw), 0
    try:
        fields = _object_decoder.decode(raw)
    except UnicodeDecodeError as error:
        return Rejection("bad_utf8", "$", f"not UTF-8: {error.reason}"), 0
    except msgspec.ValidationError:
        return Rejection("not_an_object", "$", "a reading is a JSON object"), 0
    except msgspec.DecodeError as error:
        code = "bad_utf8" if _LONE_SURROGATE.search(raw) else "not_json"
        return Rejection(code, "$", str(error)), 0
    if "meterId" in fields and "vehicleId" in fields:
        return Rejection("both_ids", "$", "a reading has a meterId or a vehicleId, not both"), 0
    if "meterId" in fields:
        return _examine_fields(MeterReading, fields, limits)
    if "vehicleId" in fields:
        return _examine_fields(VehicleReading, fields, limits)
    return Rejection("no_id", "$", "a reading has a meterId or a vehicleId"), 0


def _examine_fields(
    kind: type[MeterReading] | type[VehicleReading],
    fields: dict[str, msgspec.Raw],
    limits: TimeLimits,
) -> tuple[Reading | Rejection, int]:
    values: dict[str, Any] = {}
    device_id: str | None = None
    for field in msgspec.structs.fields(kind):
        name = field.encode_name
        if name not in fields:
            return Rejection("missing_field", f"$.{name}", f"{name} is required", device_id), 0
        value = _examine_value(field.type, fields[name])
        if isinstance(value, _Fault):
            return Rejection(value.code, f"$.{name}", value.detail, device_id), 0
        values[field.name] = value
        device_id = device_id or value  # the id is the first field of both kinds
    reading = kind(**values)
    if not limits.earliest <= reading.ts <= limits.latest:
        return _out_of_time(reading.ts, reading.device_id, limits), 0
    return reading, len(fields) - len(values)


class _Fault(NamedTuple):
    code: str
    detail: str


def _examine_value(field_type: Any, raw: msgspec.Raw) -> Any:
    """The value, or the fault in it."""
    try:
        return msgspec.json.decode(raw, type=field_type)
    except UnicodeDecodeError as error:
        return _Fault("bad_utf8", f"not UTF-8: {error.reason}")
    except msgspec.DecodeError as error:
        detail = str(error)
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        return _Fault("bad_utf8", f"not UTF-8: {error.reason}")
    except msgspec.DecodeError:
        # Valid JSON syntax, yet no value: a number too large for a double.
        return _Fault("not_finite", "the number is too large to be represented")
    expected = float if field_type in (EnergyKwh, Volts, Percent, Celsius) else str
    if expected is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return _Fault("wrong_type", detail)
        return _Fault("out_of_range", detail)
    if not isinstance(value, str):
        return _Fault("wrong_type", detail)
    if field_type is DeviceId:
        return _Fault("bad_id", "an id is 1 to 64 printable ASCII characters without a space")
    return _examine_timestamp(raw)


def _examine_timestamp(raw: msgspec.Raw) -> _Fault:
    try:
        _naive_decoder.decode(raw)
    except msgspec.DecodeError:
        return _Fault("bad_timestamp", "not an RFC 3339 instant, such as 2026-02-10T00:55:12Z")
    return _Fault("no_offset", "the timestamp has no UTC offset: end it with Z or +01:00")


def _out_of_time(ts: datetime, device_id: str, limits: TimeLimits) -> Rejection:
    if ts > limits.latest:
        detail = _describe_ahead(ts - limits.latest + AHEAD_MAX)
        return Rejection("in_future", "$.timestamp", detail, device_id)
    detail = f"older than the late window, which begins at {limits.earliest.isoformat()}"
    return Rejection("too_late", "$.timestamp", detail, device_id)


def _describe_ahead(ahead: timedelta) -> str:
    """By how much a clock is ahead; whole hours are those of a time zone."""
    limit = f"{AHEAD_MAX.seconds // 60} minutes"
    hour = timedelta(hours=1)
    hours = round(ahead / hour)
    if hours and hours * hour <= ZONE_OFFSET_MAX and abs(ahead - hours * hour) <= AHEAD_MAX:
        unit = "hour" if hours == 1 else "hours"
        return f"{hours} {unit} ahead of the server to within {limit}: a local time sent as UTC?"
    return f"{ahead} ahead of the server, where {limit} may be: check the clock"


def _nested_too_deep() -> MalformedError:
    return MalformedError("The body is nested too deep.", code="nested_too_deep")


def _too_many(readings_max: int) -> TooLargeError:
    return TooLargeError(
        f"The body holds more than {readings_max} readings.", hint="send several bodies"
    )


# ---- NaN and Infinity: not JSON, yet gateways emit them ---------------------------------------


def _has_not_finite(raw: bytes) -> bool:
    if b"NaN" not in raw and b"Infinity" not in raw:
        return False
    return any(not match[0].startswith(b'"') for match in _STRING_OR_NOT_FINITE.finditer(raw))


def _blank_not_finite(raw: bytes) -> bytes:
    """The same with something valid of the same length in place of what one item may have wrong.

    That is NaN and Infinity, and escapes of half a surrogate pair, which are no character.
    """

    def blank(match: re.Match[bytes]) -> bytes:
        token = match[0]
        if token.startswith(b'"'):
            return _LONE_SURROGATE.sub(rb"\\ufffd", token)
        return b'"%s"' % (b" " * (len(token) - 2))

    return _STRING_OR_NOT_FINITE.sub(blank, raw)


def _examine_not_finite(raw: bytes) -> Rejection:
    """Whose it is and which field, as far as that can be seen."""
    device_id: str | None = None
    try:
        fields = _object_decoder.decode(_blank_not_finite(raw))
        for name in ("meterId", "vehicleId"):
            if name in fields:
                device_id = msgspec.json.decode(fields[name], type=DeviceId)
    except (msgspec.ValidationError, UnicodeDecodeError):
        pass
    except msgspec.DecodeError as error:
        return Rejection("not_json", "$", str(error))
    match = re.search(rb'"(\w{1,64})"\s*:\s*(?:-?Infinity|NaN)', raw)
    path = f"$.{match[1].decode()}" if match else "$"
    return Rejection("not_finite", path, "NaN and Infinity are not numbers of JSON", device_id)


def _split_tolerantly(body: bytes, error: msgspec.DecodeError) -> list[bytes]:
    """Split an array whose only faults are inside of items into its items, as they came."""
    if not _has_not_finite(body) and not _LONE_SURROGATE.search(body):
        raise MalformedError(f"The body is not JSON: {error}", code="not_json") from None
    strict = _blank_not_finite(body)
    try:
        items = _array_decoder.decode(strict)
    except RecursionError:
        raise _nested_too_deep() from None
    except msgspec.DecodeError:
        raise MalformedError(f"The body is not JSON: {error}", code="not_json") from None
    payloads: list[bytes] = []
    start = 0
    for item in map(bytes, items):
        start = strict.index(item, start)
        payloads.append(body[start : start + len(item)])
        start += len(item)
    return payloads


# ---- Structs to columns -----------------------------------------------------------------------


def transpose(readings: Iterable[Reading], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Turn readings of one kind into an array per column, in the order given."""
    rows = list(readings)
    return {column: [getattr(row, column) for row in rows] for column in columns}


METER_COLUMNS: Final = ("meter_id", "ts", "kwh_consumed_ac", "voltage")
VEHICLE_COLUMNS: Final = ("vehicle_id", "ts", "soc", "kwh_delivered_dc", "battery_temp")
