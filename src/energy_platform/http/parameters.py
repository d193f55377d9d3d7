"""Query parameters, cursors, ids and JSON bodies, with errors that name what is wrong."""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Generic, TypeVar
from urllib.parse import unquote

import msgspec
from litestar import Request
from litestar.params import PathParameter, QueryParameter

from energy_platform.errors import MalformedError, UnprocessableError, UnsupportedMediaError
from energy_platform.performance import Bucket, Fleet, Verdict
from energy_platform.readings import DEVICE_ID_PATTERN, DeviceId, Instant

T = TypeVar("T")

HOURS_MAX: Final = 744
PAGE_MAX: Final = 1_000

VehicleId = Annotated[str, PathParameter(description="id of the vehicle")]
MeterId = Annotated[str, PathParameter(description="id of the meter")]
Hours = Annotated[
    int, QueryParameter(ge=1, le=HOURS_MAX, description="length of the window in hours")
]
Until = Annotated[
    str | None, QueryParameter(description="end of the window, an RFC 3339 instant; default: now")
]
Buckets = Annotated[Bucket, QueryParameter(description="an hour or a local day")]
TimeZone = Annotated[
    str,
    QueryParameter(
        name="timeZone",
        description="IANA name of the zone whose clocks begin a bucket",
    ),
]
Limit = Annotated[int, QueryParameter(ge=1, le=PAGE_MAX, description="rows in a page")]
Verdicts = Annotated[Verdict | None, QueryParameter(description="only vehicles of this verdict")]
Cursor = Annotated[str | None, QueryParameter(description="nextCursor of the page before")]


class FleetPlace(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What the cursor of a fleet's page holds: its window, and the vehicle that it ended with."""

    since: Instant
    until: Instant
    ratio: float | None
    vehicle_id: DeviceId


_fleet_place_decoder = msgspec.json.Decoder(FleetPlace)
_instant_decoder = msgspec.json.Decoder(Instant)


class Page(msgspec.Struct, Generic[T], rename="camel"):
    """One page; nextCursor is null on the last."""

    items: list[T]
    next_cursor: str | None


def page_of(items: list[T], limit: int, key: str) -> Page[T]:
    """A page from up to limit + 1 rows: the one too many only says that there are more."""
    return make_page(items[:limit], key, more=len(items) > limit)


def make_page(items: list[T], key: str, *, more: bool) -> Page[T]:
    """A page of these rows, after which there are more, or none."""
    return Page(items, _encode_cursor(str(getattr(items[-1], key))) if more else None)


def _encode_cursor(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str | None:
    """The key that a page begins after. Raises: MalformedError."""
    if cursor is None:
        return None
    try:
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise _bad("cursor", "use nextCursor of the page before, as it is") from None
    if "\0" in key:
        raise _bad("cursor", "use nextCursor of the page before, as it is")
    return key


def decode_number_cursor(cursor: str | None) -> int | None:
    key = decode_cursor(cursor)
    if key is None:
        return None
    if not re.fullmatch(r"\d{1,18}", key):
        raise _bad("cursor", "use nextCursor of the page before, as it is")
    return int(key)


def decode_instant_cursor(cursor: str | None) -> datetime | None:
    key = decode_cursor(cursor)
    if key is None:
        return None
    try:
        return datetime.fromisoformat(key).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _bad("cursor", "use nextCursor of the page before, as it is") from None


def fleet_page_of(fleet: Fleet, limit: int) -> Fleet:
    """The same with at most `limit` of its items, and a cursor if it has more."""
    if len(fleet.items) > limit:
        del fleet.items[limit:]
        last = fleet.items[-1]
        place = FleetPlace(fleet.since, fleet.until, last.efficiency_ratio, last.vehicle_id)
        fleet.next_cursor = _encode_cursor(msgspec.json.encode(place).decode())
    return fleet


def decode_fleet_window(
    until: str | None, hours: int, cursor: str | None, now: datetime
) -> tuple[datetime, datetime, tuple[float | None, str] | None]:
    """The window, and the ratio and vehicle that the page begins behind: a page has the window of
    the one before it, also where that ended at its `now`. Raises: MalformedError."""
    key = decode_cursor(cursor)
    if key is None:
        return *decode_window(until, hours, now), None
    try:
        place = _fleet_place_decoder.decode(key)
    except msgspec.DecodeError:
        raise _bad("cursor", "use nextCursor of the page before, as it is") from None
    since, end = decode_window(until, hours, place.until)
    if (since, end) != (place.since, place.until):
        raise _bad("cursor", f"is of {place.since} to {place.until}; keep until and hours")
    return since, end, (place.ratio, place.vehicle_id)


def decode_window(until: str | None, hours: int, now: datetime) -> tuple[datetime, datetime]:
    """since and until of a window, in UTC. Raises: MalformedError that names the parameter."""
    if until is None:
        end = now
    else:
        # A `+` that was not percent-encoded arrives as a space.
        text = re.sub(r" (?=\d\d:\d\d$)", "+", until)
        try:
            end = _instant_decoder.decode(msgspec.json.encode(text)).astimezone(UTC)
        except (msgspec.DecodeError, OverflowError):
            raise _bad(
                "until", "an RFC 3339 instant with an offset, as 2026-02-10T00:00:00Z"
            ) from None
    try:
        return end - timedelta(hours=hours), end
    except OverflowError:
        raise _bad("until", "the window would begin before the year 1") from None


def decode_time_zone(name: str) -> str:
    """The name of a time zone; whether there is such a zone is the database's to say.

    Raises: MalformedError.
    """
    # PostgreSQL also takes POSIX rules such as UTC+3, which mean the opposite of what they say.
    if not re.match(r"(Etc/GMT[+-]?\d{1,2}|[A-Za-z][A-Za-z_/-]{0,63})\Z", name):
        raise _bad("timeZone", "an IANA name such as Europe/Paris")
    return name


def decode_id(name: str, value: str) -> str:
    """A device id. Raises: MalformedError."""
    if not re.match(DEVICE_ID_PATTERN, value):
        raise _bad(name, "1 to 64 printable ASCII characters without a space")
    return value


def decode_path_id(name: str, value: str) -> str:
    """A device id from a path, with slash and percent still encoded. Raises: MalformedError."""
    return decode_id(name, unquote(value))


async def decode_body(request: Request[Any, Any, Any], struct: type[T]) -> T:
    """A JSON body by our own strict decoder. Raises: RequestError that names the field."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaError("The content type must be application/json.")
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=struct)
    except msgspec.ValidationError as error:
        raise UnprocessableError(str(error), code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"The body is not JSON: {error}", code="not_json") from None


def _bad(name: str, expected: str) -> MalformedError:
    return MalformedError(f"{name}: {expected}", code="bad_parameter", parameter=name)
