"""What is a reading, and what is wrong with what is not? Pure: bytes in, structs out."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy_platform.errors import MalformedError, Rejection, TooLargeError
from energy_platform.readings import (
    Batch,
    MeterReading,
    Reading,
    TimeLimits,
    VehicleReading,
    decode_array,
    decode_lines,
    decode_reading,
    decode_single,
)

NOW = datetime(2026, 2, 10, 12, tzinfo=UTC)
LIMITS = TimeLimits.at(NOW, timedelta(days=380))
READINGS_MAX = 1_000

METER: dict[str, Any] = {
    "meterId": "M-101",
    "kwhConsumedAc": 14.6,
    "voltage": 231,
    "timestamp": "2026-02-10T00:55:12Z",
}
VEHICLE: dict[str, Any] = {
    "vehicleId": "V-201",
    "soc": 75,
    "kwhDeliveredDc": 11.2,
    "batteryTemp": 36,
    "timestamp": "2026-02-10T00:55:12Z",
}


def encode(fields: dict[str, Any], **literals: bytes) -> bytes:
    """Fields as JSON; `literals` replace a value by bytes that need not be JSON."""
    parts = {name: json.dumps(value).encode() for name, value in fields.items()} | literals
    return b"{" + b",".join(b'"%s":%s' % (k.encode(), v) for k, v in parts.items()) + b"}"


def decode(payload: bytes) -> Reading | Rejection:
    return decode_reading(payload, LIMITS)[0]


def decode_many(body: bytes) -> Batch:
    return decode_array(body, LIMITS, READINGS_MAX)


def test_decodes_a_meter_and_a_vehicle() -> None:
    ts = datetime(2026, 2, 10, 0, 55, 12, tzinfo=UTC)
    assert decode(encode(METER)) == MeterReading("M-101", 14.6, 231.0, ts)
    assert decode(encode(VEHICLE)) == VehicleReading("V-201", 75.0, 11.2, 36.0, ts)


@pytest.mark.parametrize(
    ("base", "name", "literal", "code"),
    [
        pytest.param(base, name, literal, code, id=f"{name} {literal[:24]!r} {code}")
        for base, names in (
            (METER, ("kwhConsumedAc", "voltage")),
            (VEHICLE, ("soc", "kwhDeliveredDc", "batteryTemp")),
        )
        for name in names
        for literal, code in (
            (b'"1"', "wrong_type"),
            (b"true", "wrong_type"),
            (b"null", "wrong_type"),
            (b"[1]", "wrong_type"),
            (b"{}", "wrong_type"),
            (b"1e999", "not_finite"),
            (b"-1e999", "not_finite"),
            (b"9" * 5_000, "not_finite"),
            (b"9" * 400, "out_of_range"),
            (b"-1000", "out_of_range"),
            (b"1000000001", "out_of_range"),
            (b"NaN", "not_finite"),
            (b"Infinity", "not_finite"),
            (b"-Infinity", "not_finite"),
            (b'"\xff"', "bad_utf8"),
        )
    ]
    + [
        pytest.param(METER, "meterId", literal, code, id=f"meterId {literal[:24]!r} {code}")
        for literal, code in (
            (b'""', "bad_id"),
            (b'"M 1"', "bad_id"),
            (b'"M-1\\n"', "bad_id"),
            (b'"M\\u0000"', "bad_id"),
            (b'"M\\u007f"', "bad_id"),
            ('"Zähler"'.encode(), "bad_id"),
            (b'"%s"' % (b"x" * 65), "bad_id"),
            (b"17", "wrong_type"),
            (b"null", "wrong_type"),
            (b'"\xff"', "bad_utf8"),
        )
    ]
    + [
        pytest.param(VEHICLE, "timestamp", literal, code, id=f"timestamp {literal!r} {code}")
        for literal, code in (
            (b"1770684912", "wrong_type"),
            (b"1770684912.5", "wrong_type"),
            (b"null", "wrong_type"),
            (b'"1770684912"', "bad_timestamp"),
            (b'""', "bad_timestamp"),
            (b'"yesterday"', "bad_timestamp"),
            (b'"2026-02-10"', "bad_timestamp"),
            (b'"2026-02-30T00:00:00Z"', "bad_timestamp"),
            (b'"2026-02-10T00:00:60Z"', "bad_timestamp"),
            (b'"2026-02-10T00:55:12"', "no_offset"),
            (b'"2026-02-10T12:05:00.000001Z"', "in_future"),
            (b'"9999-12-31T23:59:59-23:59"', "in_future"),
            (b'"2025-01-26T11:59:59.999999Z"', "too_late"),
            (b'"0001-01-01T00:00:00+23:59"', "too_late"),
        )
    ],
)
def test_says_what_is_wrong_and_where(
    base: dict[str, Any], name: str, literal: bytes, code: str
) -> None:
    rejection = decode(encode(base, **{name: literal}))
    assert isinstance(rejection, Rejection)
    assert (rejection.code, rejection.path) == (code, f"$.{name}")
    assert rejection.detail


@pytest.mark.parametrize(
    ("ahead", "detail"),
    [
        ("0:05:00.000001", "0:05:00.000001 ahead of the server, where 5 minutes may be"),
        ("0:54:59", "0:54:59 ahead of the server, where"),
        ("0:55:00", "1 hour ahead of the server to within 5 minutes: a local time sent as UTC?"),
        ("2:00:07", "2 hours ahead of the server to within 5 minutes: a local time sent as UTC?"),
        ("1:55:00", "2 hours ahead"),
        ("2:05:00", "2 hours ahead"),
        ("2:05:01", "2:05:01 ahead of the server, where 5 minutes may be: check the clock"),
        ("14:04:00", "14 hours ahead"),
        ("14:59:00", "14:59:00 ahead of the server, where"),
        ("15:00:00", "15:00:00 ahead of the server, where"),
    ],
)
def test_a_clock_ahead_by_the_hours_of_a_time_zone_is_named(ahead: str, detail: str) -> None:
    hours, minutes, seconds = ahead.split(":")
    ts = NOW + timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))
    for fields in ({}, {"note": "an unknown field is examined on another way"}):
        rejection = decode(encode({**METER, **fields, "timestamp": ts.isoformat()}))
        assert isinstance(rejection, Rejection)
        assert (rejection.code, rejection.path) == ("in_future", "$.timestamp")
        assert rejection.device_id == METER["meterId"]
        assert rejection.detail.startswith(detail)


@pytest.mark.parametrize("base", [METER, VEHICLE], ids=["meter", "vehicle"])
def test_every_field_is_required(base: dict[str, Any]) -> None:
    for name in list(base)[1:]:
        rejection = decode(encode({k: v for k, v in base.items() if k != name}))
        assert isinstance(rejection, Rejection)
        assert (rejection.code, rejection.path) == ("missing_field", f"$.{name}")


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"{}", "no_id"),
        (encode({**METER, **VEHICLE}), "both_ids"),
        (encode({"meterId": None, "vehicleId": None}), "both_ids"),
        (b"[]", "not_an_object"),
        (b"1", "not_an_object"),
        (b"1e999", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"", "not_json"),
        (b"hello", "not_json"),
        (encode(METER)[:-1], "not_json"),
        (encode(METER) + b"x", "not_json"),
        (encode(METER, voltage=b"01"), "not_json"),
        (encode(METER, voltage=b"+1"), "not_json"),
        (b"\xef\xbb\xbf" + encode(METER), "not_json"),
        (b"{'meterId':NaN}", "not_json"),
        (b'{"meter\xffId":1}', "bad_utf8"),
        (b"NaN", "not_finite"),
    ],
)
def test_says_what_is_wrong_with_the_whole(payload: bytes, code: str) -> None:
    rejection = decode(payload)
    assert isinstance(rejection, Rejection)
    assert (rejection.code, rejection.path) == (code, "$")


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("kwhConsumedAc", 0, 1e9),
        ("voltage", 0, 1_000_000),
        ("soc", 0, 100),
        ("kwhDeliveredDc", 0, 1e9),
        ("batteryTemp", -60, 150),
    ],
)
def test_limits_are_inclusive(name: str, lowest: float, highest: float) -> None:
    base = METER if name in METER else VEHICLE
    for value in (lowest, highest):
        assert not isinstance(decode(encode({**base, name: value})), Rejection)
    for value in (lowest - 1e-6, highest + 1e-6):
        rejection = decode(encode({**base, name: value}))
        assert isinstance(rejection, Rejection)
        assert (rejection.code, rejection.path) == ("out_of_range", f"$.{name}")


@pytest.mark.parametrize("device_id", ["x", "x" * 64, "!", "~", "V/1", "%41", '"', "..", "NaN"])
def test_an_id_is_1_to_64_printable_characters(device_id: str) -> None:
    assert not isinstance(decode(encode({**METER, "meterId": device_id})), Rejection)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-02-10T12:05:00Z", NOW + timedelta(minutes=5)),
        ("2025-01-26T12:00:00Z", NOW - timedelta(days=380)),
        ("2026-02-10T01:55:12+01:00", datetime(2026, 2, 10, 0, 55, 12, tzinfo=UTC)),
        ("2026-02-09T19:10:12-05:45", datetime(2026, 2, 10, 0, 55, 12, tzinfo=UTC)),
        ("2026-02-10T00:55:12-00:00", datetime(2026, 2, 10, 0, 55, 12, tzinfo=UTC)),
        ("2026-02-10T00:00:00.1234564Z", datetime(2026, 2, 10, 0, 0, 0, 123456, tzinfo=UTC)),
        ("2026-02-10T00:00:00.1234567Z", datetime(2026, 2, 10, 0, 0, 0, 123457, tzinfo=UTC)),
        ("2026-02-09T23:59:59.9999999Z", datetime(2026, 2, 10, tzinfo=UTC)),
    ],
)
def test_an_instant_is_kept_to_the_microsecond(text: str, expected: datetime) -> None:
    reading = decode(encode({**METER, "timestamp": text}))
    assert isinstance(reading, MeterReading)
    assert reading.ts == expected


def test_unknown_fields_are_ignored_and_counted() -> None:
    extra = encode({**METER, "firmware": "1.2", "nested": {"a": [1, {}]}})
    body = b"[%s,%s,%s]" % (extra, encode(METER), extra)
    batch = decode_many(body)
    assert batch.unknown_fields == 4
    assert all(reading == decode(encode(METER)) for reading in batch.readings)


def test_the_last_of_duplicate_keys_counts() -> None:
    doubled = encode(METER).replace(b"{", b'{"meterId":"M-100","voltage":5,')
    assert decode(doubled) == decode(encode(METER))


def test_a_key_may_be_escaped() -> None:
    assert decode(encode(METER).replace(b"meterId", b"meter\\u0049d")) == decode(encode(METER))
    both = encode(METER).replace(b"meterId", b"meter\\u0049d")[:-1] + b',"vehicleId":"V"}'
    rejection = decode(both)
    assert isinstance(rejection, Rejection)
    assert rejection.code == "both_ids"


def test_a_rejection_names_the_device_where_it_can_be_read() -> None:
    for payload in (
        encode(METER, voltage=b"NaN"),
        encode(METER, voltage=b'"1"'),
        encode({**METER, "timestamp": "2027-01-01T00:00:00Z"}),
    ):
        rejection = decode(payload)
        assert isinstance(rejection, Rejection)
        assert rejection.device_id == "M-101"
    assert decode(encode(METER, meterId=b"NaN")).device_id is None


# ---- Bodies -----------------------------------------------------------------------------------

GOOD = encode(METER)

BAD_ITEMS: dict[bytes, str] = {
    b"NaN": "not_finite",
    b"-Infinity": "not_finite",
    encode(METER, voltage=b"NaN"): "not_finite",
    encode(METER, voltage=b" -Infinity "): "not_finite",
    encode({**METER, "note": "NaN"}, voltage=b"1e999"): "not_finite",
    encode({**METER, "note": '"NaN'}, voltage=b"Infinity"): "not_finite",
    encode({**METER, "meterId": ""}): "bad_id",
    b'{"meterId":"\xff"}': "bad_utf8",
    b"null": "not_an_object",
    b"[[]]": "not_an_object",
    b'"\\"NaN, ] Infinity"': "not_an_object",
    b"1e999": "not_an_object",
    b"{}": "no_id",
}


@given(
    items=st.lists(st.sampled_from([GOOD, encode(VEHICLE), encode({**METER, "x": "NaN,]}\\"})])),
    bad=st.sampled_from(list(BAD_ITEMS)),
    place=st.integers(0, 20),
    space=st.sampled_from([b"", b" ", b"\n\t\r "]),
)
def test_a_bad_item_costs_itself_alone(
    items: list[bytes], bad: bytes, place: int, space: bytes
) -> None:
    place = min(place, len(items))
    sent = [*items[:place], bad, *items[place:]]
    body = b"[" + b",".join(space + item + space for item in sent) + b"]"
    batch = decode_many(space + body + space)
    assert list(map(bytes, batch.payloads)) == sent  # as they came
    for item, reading in zip(sent, batch.readings, strict=True):
        if item is bad:
            assert isinstance(reading, Rejection)
            assert reading.code == BAD_ITEMS[bad]
        else:
            assert reading == decode(item)
            assert not isinstance(reading, Rejection)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "not_json"),
        (b"1", "not_json"),
        (b"null", "not_json"),
        (b'"text"', "not_json"),
        (b"{", "not_json"),
        (b'{"meterId"}', "not_json"),
        (encode(METER, voltage=b"NaN"), "not_json"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested_too_deep"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_body_of_one_that_is_no_object_is_malformed(body: bytes, code: str) -> None:
    with pytest.raises(MalformedError) as caught:
        decode_single(body, LIMITS)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[", "not_json"),
        (b"[1", "not_json"),
        (b"[1 1]", "not_json"),
        (b"[1,]", "not_json"),
        (b"[] x", "not_json"),
        (b"[NaN", "not_json"),
        (b"[NaN NaN]", "not_json"),
        (b"[NaNa]", "not_json"),
        (b"[nan]", "not_json"),
        (b"[+Infinity]", "not_json"),
        (b'["NaN]', "not_json"),
        (b"[" * 5_000 + b"]" * 5_000, "nested_too_deep"),
        (b"[NaN," + b"[" * 5_000 + b"]" * 5_000 + b"]", "nested_too_deep"),
        (b"[" * 5_000, "nested_too_deep"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_an_array_that_is_not_json_is_malformed(body: bytes, code: str) -> None:
    with pytest.raises(MalformedError) as caught:
        decode_many(body)
    assert caught.value.code == code


def test_an_empty_array_has_no_readings() -> None:
    assert decode_many(b" [ ] ").readings == []


def test_lines_may_be_blank_end_in_cr_lf_and_need_not_be_json() -> None:
    body = b"\r\n".join(
        [b"", GOOD, b"  ", b"not json", b"[1]", encode(METER, voltage=b"NaN"), GOOD]
    )
    batch = decode_lines(body, LIMITS, READINGS_MAX)
    codes = [reading.code if isinstance(reading, Rejection) else "" for reading in batch.readings]
    assert codes == ["", "not_json", "not_an_object", "not_finite", ""]
    deep = b'{"a":' * 5_000 + b"\n" + GOOD
    first, second = decode_lines(deep, LIMITS, READINGS_MAX).readings
    assert isinstance(first, Rejection)
    assert first.code == "nested_too_deep"
    assert second == decode(GOOD)


def test_a_body_of_too_many_readings_is_too_large() -> None:
    assert len(decode_array(b"[%s]" % b",".join([GOOD] * 3), LIMITS, 3).readings) == 3
    for body in (b"[%s]" % b",".join([GOOD] * 4), b"[%s0]" % (b"0," * 100)):
        with pytest.raises(TooLargeError):
            decode_array(body, LIMITS, 3)
    assert len(decode_lines(b"\n".join([GOOD] * 3), LIMITS, 3).readings) == 3
    with pytest.raises(TooLargeError):
        decode_lines(b"\n".join([GOOD] * 4), LIMITS, 3)


def test_no_body_takes_more_time_than_its_length_deserves() -> None:
    body = b'["' + b'\\"' * 500_000 + b"NaN"
    started = time.perf_counter()
    with pytest.raises(MalformedError):
        decode_many(body)
    assert time.perf_counter() - started < 5  # going back at each quote, it took half an hour


# ---- Properties -------------------------------------------------------------------------------

ids = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
instants = st.datetimes(
    LIMITS.earliest.replace(tzinfo=None),
    LIMITS.latest.replace(tzinfo=None),
    timezones=st.just(UTC),
)
kwh = st.floats(0, 1e9)
readings = st.one_of(
    st.builds(MeterReading, ids, kwh, st.floats(0, 1_000_000), instants),
    st.builds(VehicleReading, ids, st.floats(0, 100), kwh, st.floats(-60, 150), instants),
)
offsets = st.integers(-1_439, 1_439).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(reading=readings, offset=offsets)
def test_a_valid_reading_is_decoded_to_itself(reading: Reading, offset: timezone) -> None:
    elsewhere = msgspec.structs.replace(reading, ts=reading.ts.astimezone(offset))
    batch = decode_single(msgspec.json.encode(elsewhere), LIMITS)
    assert batch.readings == [reading]
    assert batch.unknown_fields == 0


alphabet = st.characters(categories=(), include_characters='[]{}",:\\ 012.eE+-NaInfityultrs\n\x00ÿ')
json_like = st.text(alphabet, max_size=60).map(str.encode)
mutated = st.tuples(st.binary(max_size=4), st.integers(0, 90)).map(
    lambda cut: encode(METER)[: cut[1]] + cut[0] + encode(METER)[cut[1] + len(cut[0]) :]
)


@given(st.one_of(st.binary(), json_like, mutated, json_like.map(lambda inner: b"[%s]" % inner)))
def test_arbitrary_bytes_raise_nothing_but_what_is_documented(body: bytes) -> None:
    decoders: list[Callable[[bytes], Batch]] = [
        lambda body: decode_single(body, LIMITS),
        decode_many,
        lambda body: decode_lines(body, LIMITS, READINGS_MAX),
    ]
    for decoder in decoders:
        try:
            batch = decoder(body)
        except (MalformedError, TooLargeError):
            continue
        assert len(batch.payloads) == len(batch.readings)
        for reading in batch.readings:
            if isinstance(reading, Rejection):
                assert len(reading.path) < 80
            else:
                assert LIMITS.earliest <= reading.ts <= LIMITS.latest


def test_half_a_surrogate_pair_costs_its_own_item_alone() -> None:
    good = GOOD
    for bad in (rb'{"note":"\ud83d"}', rb'{"meterId":"\udc00"}', rb'"\ud83d\ud83d"'):
        batch = decode_array(b"[" + b",".join((good, bad, good)) + b"]", LIMITS, 10)
        first, middle, last = batch.readings
        assert isinstance(first, MeterReading)
        assert isinstance(last, MeterReading)
        assert isinstance(middle, Rejection)
        assert middle.code == "bad_utf8"
        assert bytes(batch.payloads[1]) == bad
    # A whole pair, and a backslash before a u, are text like any other.
    fine = rb'{"note":"\ud83d\ude00 \\\\ud83d",' + good[1:]
    batch = decode_array(b"[" + fine + b"]", LIMITS, 10)
    assert isinstance(batch.readings[0], MeterReading)
