"""Does the HTTP service answer as the contract says, also to what nobody should send?"""

import gzip
import json
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest
import zstandard

from conftest import NOON, Clock, StartService

Db = psycopg.Connection[Any]

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
METER_BYTES = json.dumps(METER).encode()


def post(api: httpx.Client, body: bytes | Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.post(
        "/v1/ingest", content=content, headers={"content-type": "application/json", **named}
    )


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["type"] == "about:blank"
    assert problem["title"]
    assert problem["detail"]
    return problem


def counts(answer: httpx.Response) -> tuple[int, int, int, int]:
    """stored, duplicate, conflicting, rejected of an account that adds up."""
    account = answer.json()
    parts = tuple(account[name] for name in ("stored", "duplicate", "conflicting", "rejected"))
    assert account["received"] == sum(parts)
    assert len(account["errors"]) + account["errorsOmitted"] == sum(parts[2:])
    assert answer.status_code == (207 if sum(parts[2:]) else 200)
    return parts


# ---- POST /v1/ingest: one ---------------------------------------------------------------------


@pytest.mark.parametrize("reading", [METER, VEHICLE], ids=["meter", "vehicle"])
def test_one_is_stored_then_duplicate_then_conflicting(
    api: httpx.Client, db: Db, reading: dict[str, Any]
) -> None:
    stored = post(api, reading)
    assert (stored.status_code, stored.json()) == (201, {"outcome": "stored"})
    duplicate = post(api, {**reading, "firmware": "unknown fields change nothing"})
    assert (duplicate.status_code, duplicate.json()) == (200, {"outcome": "duplicate"})
    other = {**reading, next(name for name in reading if name.startswith("kwh")): 3}
    problem = assert_problem(post(api, other), 409, "conflicting")
    assert [error["index"] for error in problem["errors"]] == [0]
    kind = "meter" if "meterId" in reading else "vehicle"
    assert len(db.execute(f"SELECT FROM {kind}_telemetry_history").fetchall()) == 1


REJECTED: list[tuple[str, dict[str, Any], str, str]] = [
    ("both ids", {**METER, "vehicleId": "V"}, "both_ids", "$"),
    ("neither", {}, "no_id", "$"),
    ("id of 65", {**METER, "meterId": "x" * 65}, "bad_id", "$.meterId"),
    ("NUL in id", {**METER, "meterId": "M\0"}, "bad_id", "$.meterId"),
    ("line feed after id", {**METER, "meterId": "M\n"}, "bad_id", "$.meterId"),
    ("a number as text", {**METER, "voltage": "231"}, "wrong_type", "$.voltage"),
    ("out of range", {**VEHICLE, "soc": 100.1}, "out_of_range", "$.soc"),
    ("missing", {k: v for k, v in METER.items() if k != "voltage"}, "missing_field", "$.voltage"),
    ("naive", {**METER, "timestamp": "2026-02-10T00:55:12"}, "no_offset", "$.timestamp"),
    ("epoch", {**METER, "timestamp": 1770684912}, "wrong_type", "$.timestamp"),
    ("future", {**METER, "timestamp": "2026-02-10T12:05:00.001Z"}, "in_future", "$.timestamp"),
    ("too late", {**METER, "timestamp": "2025-01-26T11:59:59Z"}, "too_late", "$.timestamp"),
]


def test_one_that_is_no_reading_is_422_with_its_reason(
    api: httpx.Client, db: Db, subtests: pytest.Subtests
) -> None:
    for name, reading, code, path in REJECTED:
        with subtests.test(name):
            problem = assert_problem(post(api, reading), 422, code)
            (error,) = problem["errors"]
            assert (error["index"], error["code"], error["path"]) == (0, code, path)
            assert error["detail"]
    with subtests.test("1e999"):
        assert_problem(post(api, METER_BYTES.replace(b"231", b"1e999")), 422, "not_finite")
    with subtests.test("nothing is stored, all is kept"):
        assert db.execute("SELECT FROM meter_telemetry_history").fetchall() == []
        assert len(db.execute("SELECT FROM quarantine").fetchall()) == len(REJECTED) + 1


def test_the_edges_of_time_are_taken(api: httpx.Client) -> None:
    for ts in (NOON + timedelta(minutes=5), NOON - timedelta(days=380)):
        assert post(api, {**METER, "timestamp": ts.isoformat()}).status_code == 201


def test_what_is_no_json_document_of_readings_is_400(
    api: httpx.Client, db: Db, subtests: pytest.Subtests
) -> None:
    deep = b"[" * 5_000 + b"]" * 5_000
    for body, code in [
        (b"", "not_json"),
        (b"{", "not_json"),
        (b"hello", "not_json"),
        (b"17", "not_json"),
        (b'"text"', "not_json"),
        (b"null", "not_json"),
        (b"[1,]", "not_json"),
        (b"[NaN", "not_json"),
        (METER_BYTES.replace(b"231", b"NaN"), "not_json"),
        (METER_BYTES + METER_BYTES, "not_json"),
        (deep, "nested_too_deep"),
        (b"[NaN," + deep + b"]", "nested_too_deep"),
        (METER_BYTES.replace(b"231", deep), "nested_too_deep"),
    ]:
        with subtests.test(repr(body[:30])):
            assert_problem(post(api, body), 400, code)
    assert db.execute("SELECT FROM quarantine").fetchall() == []


# ---- POST /v1/ingest: many --------------------------------------------------------------------


def test_many_are_all_stored_then_all_duplicate(api: httpx.Client) -> None:
    body = [METER, VEHICLE, {**METER, "meterId": "M-102"}]
    assert counts(post(api, body)) == (3, 0, 0, 0)
    assert counts(post(api, body)) == (0, 3, 0, 0)


def test_an_empty_array_is_an_account_of_nothing(api: httpx.Client) -> None:
    answer = post(api, b" [ ] ")
    assert answer.status_code == 200
    assert answer.json() == {
        "received": 0,
        "stored": 0,
        "duplicate": 0,
        "conflicting": 0,
        "rejected": 0,
        "errors": [],
        "errorsOmitted": 0,
    }
    assert counts(post(api, b"", content_type="application/x-ndjson")) == (0, 0, 0, 0)


def test_of_the_same_device_and_instant_the_first_by_position_counts(
    api: httpx.Client, db: Db
) -> None:
    answer = post(api, [METER, METER, {**METER, "voltage": 5}, {**METER, "voltage": 6}, METER])
    assert counts(answer) == (1, 2, 2, 0)
    assert [(e["index"], e["outcome"], e["code"]) for e in answer.json()["errors"]] == [
        (2, "conflicting", "conflicting"),
        (3, "conflicting", "conflicting"),
    ]
    assert db.execute("SELECT voltage FROM meter_telemetry_history").fetchall() == [(231,)]
    assert counts(post(api, [{**METER, "voltage": 5}, METER])) == (0, 1, 1, 0)


BAD_ITEMS: list[tuple[str, bytes, str, str]] = [
    ("no object", b"1", "not_an_object", "$"),
    ("NaN item", b"NaN", "not_finite", "$"),
    ("-Infinity", METER_BYTES.replace(b"231", b"-Infinity"), "not_finite", "$.voltage"),
    ("1e999", METER_BYTES.replace(b"231", b"1e999"), "not_finite", "$.voltage"),
    ("bad UTF-8", METER_BYTES.replace(b"M-101", b"M\xff"), "bad_utf8", "$.meterId"),
    ("NUL", METER_BYTES.replace(b"M-101", b"M\\u0000"), "bad_id", "$.meterId"),
]


def test_one_bad_reading_never_costs_a_good_one(
    api: httpx.Client, subtests: pytest.Subtests
) -> None:
    for name, bad, code, path in BAD_ITEMS:
        for place in (0, 2, 4):
            with subtests.test(f"{name} at {place}"):
                good = [
                    {**METER, "meterId": f"{code}-{name[:2].strip()}-NaN-{place}-{i}"}
                    for i in range(4)
                ]
                items = [json.dumps(reading).encode() for reading in good]
                items.insert(place, bad)
                answer = post(api, b"[" + b",".join(items) + b"]")
                assert counts(answer) == (4, 0, 0, 1)
                (error,) = answer.json()["errors"]
                assert (error["index"], error["outcome"]) == (place, "rejected")
                assert (error["code"], error["path"]) == (code, path)


def test_lines_count_as_many_and_a_bad_line_is_one_rejected_reading(api: httpx.Client) -> None:
    lines = b"\r\n".join([b"", METER_BYTES, b" ", b"not json", json.dumps(VEHICLE).encode(), b""])
    answer = post(api, lines, content_type="application/x-ndjson")
    assert counts(answer) == (2, 0, 0, 1)
    assert answer.json()["errors"][0]["code"] == "not_json"
    assert counts(post(api, METER_BYTES, content_type="application/x-ndjson")) == (0, 1, 0, 0)


def test_at_most_100_errors_are_listed_and_all_are_kept(api: httpx.Client, db: Db) -> None:
    answer = post(api, [METER, *({"n": i} for i in range(250))])
    assert counts(answer) == (1, 0, 0, 250)
    assert [error["index"] for error in answer.json()["errors"]] == list(range(1, 101))
    assert answer.json()["errorsOmitted"] == 150
    assert db.execute("SELECT sum(count) FROM quarantine").fetchone() == (250,)


def test_10_000_readings_are_taken_in_one_body(api: httpx.Client) -> None:
    body = [{**METER, "meterId": f"M-{i}"} for i in range(10_000)]
    assert counts(post(api, body)) == (10_000, 0, 0, 0)


# ---- POST /v1/ingest: headers, sizes, codings ---------------------------------------------------


def test_content_types(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for content_type, status in [
        ("application/json", 201),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;x=y", 200),
        ("application/x-ndjson; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/jsonx", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
    ]:
        with subtests.test(content_type):
            answer = post(api, METER_BYTES, content_type=content_type)
            assert answer.status_code == status
            if status == 415:
                assert_problem(answer, 415, "unsupported_media_type")
    with subtests.test("none"):
        answer = api.post("/v1/ingest", content=METER_BYTES)
        assert_problem(answer, 415, "unsupported_media_type")


def zstd(plain: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)


LINES = METER_BYTES + b"\n" + json.dumps(VEHICLE).encode()


def test_codings(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for number, (coding, body) in enumerate(
        [
            ("identity", LINES),
            ("gzip", gzip.compress(LINES)),
            ("GZIP", gzip.compress(LINES)),
            ("gzip", gzip.compress(LINES[:20]) + gzip.compress(b"") + gzip.compress(LINES[20:])),
            ("zstd", zstd(LINES)),
            ("zstd", zstd(LINES, write_content_size=False, write_checksum=True)),
            ("zstd", zstd(LINES[:20]) + zstd(b"") + zstd(LINES[20:])),
        ]
    ):
        with subtests.test(f"{coding} {number}"):
            answer = post(api, body, content_type="application/x-ndjson", content_encoding=coding)
            assert counts(answer) == ((0, 2, 0, 0) if number else (2, 0, 0, 0))


def test_codings_that_are_no_good(api: httpx.Client, db: Db, subtests: pytest.Subtests) -> None:
    for coding, body, status, code in [
        ("br", LINES, 415, "unsupported_media_type"),
        ("gzip, gzip", LINES, 415, "unsupported_media_type"),
        ("gzip", LINES, 400, "bad_encoding"),
        ("gzip", gzip.compress(LINES)[:-1], 400, "bad_encoding"),
        ("gzip", gzip.compress(LINES)[:12], 400, "bad_encoding"),
        ("gzip", gzip.compress(LINES) + b"x", 400, "bad_encoding"),
        ("gzip", gzip.compress(b"") * 60_000, 400, "bad_encoding"),
        ("gzip", gzip.compress(b" " * 2**25), 413, "too_large"),
        ("zstd", LINES, 400, "bad_encoding"),
        ("zstd", zstd(LINES)[:-1], 400, "bad_encoding"),
        ("zstd", zstd(LINES)[:12], 400, "bad_encoding"),
        ("zstd", zstd(LINES) + b"x", 400, "bad_encoding"),
        ("zstd", zstd(b" " * 2**25), 413, "too_large"),
        ("zstd", zstd(b" " * 2**30), 413, "too_large"),
    ]:
        with subtests.test(f"{coding} {body[:8]!r} {len(body)} {code}"):
            answer = post(api, body, content_type="application/x-ndjson", content_encoding=coding)
            assert_problem(answer, status, code)
    assert db.execute("SELECT FROM meter_telemetry_history").fetchall() == []
    assert db.execute("SELECT FROM quarantine").fetchall() == []


def test_a_body_over_the_limit_is_413(start_service: StartService) -> None:
    api = start_service(body_bytes_max=2_000, body_readings_max=3)
    fits = METER_BYTES.ljust(2_000)
    assert post(api, fits).status_code == 201
    assert_problem(post(api, fits + b" "), 413, "too_large")
    chunked = api.post(
        "/v1/ingest",
        content=iter([fits, b" " * 10]),
        headers={"content-type": "application/json"},
    )
    assert_problem(chunked, 413, "too_large")
    assert counts(post(api, [METER] * 3)) == (0, 3, 0, 0)
    assert_problem(post(api, [METER] * 4), 413, "too_large")
    lines = b"\n".join([METER_BYTES] * 4)
    assert_problem(post(api, lines, content_type="application/x-ndjson"), 413, "too_large")
    answer = api.put("/v1/meters/M-1", content=b" " * 2_001, headers=JSON)
    assert_problem(answer, 413, "too_large")


JSON = {"content-type": "application/json"}


# ---- Analytics --------------------------------------------------------------------------------


def test_the_briefs_example(api: httpx.Client) -> None:
    assert counts(post(api, [METER, VEHICLE])) == (2, 0, 0, 0)
    since = "2026-02-01T00:00:00Z"
    api.put("/v1/assignments", json={"meterId": "M-101", "vehicleId": "V-201", "since": since})
    answer = api.get("/v1/analytics/performance/V-201")
    assert answer.status_code == 200
    body = answer.json()
    assert body == {
        "vehicleId": "V-201",
        "since": "2026-02-09T12:00:00Z",
        "until": "2026-02-10T12:00:00Z",
        "totalKwhConsumedAc": 14.6,
        "totalKwhDeliveredDc": 11.2,
        "efficiencyRatio": 0.7671232876712328,
        "averageBatteryTemp": 36.0,
        "meteredKwhDeliveredDc": 11.2,
        "acReadings": 1,
        "dcReadings": 1,
        "acCoverage": pytest.approx(1 / 1440),
        "dcCoverage": pytest.approx(1 / 1440),
        "verdict": "insufficient_data",
        "suspectReadings": 0,
    }


def test_the_window_is_half_open_and_moves(api: httpx.Client, clock: Clock) -> None:
    post(api, VEHICLE)

    def dc(**query: Any) -> float:
        answer = api.get("/v1/analytics/performance/V-201", params=query)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["totalKwhDeliveredDc"])

    assert dc(until="2026-02-10T00:55:12Z") == 0
    assert dc(until="2026-02-10T00:55:12.000001Z", hours=1) == 11.2
    assert dc(until="2026-02-10T02:55:12+01:00", hours=1) == 11.2  # 01:55:12Z
    assert dc(until="2026-02-10T01:55:12.000001Z", hours=1) == 0
    # A plus that was not percent-encoded arrives as a space.
    plain = api.get("/v1/analytics/performance/V-201?hours=1&until=2026-02-10T02:55:12+01:00")
    assert plain.json()["until"] == "2026-02-10T01:55:12Z"
    assert dc(until="9999-12-31T23:59:59Z", hours=744) == 0
    assert dc(until="0002-01-01T00:00:00Z") == 0
    clock.advance(hours=13)
    assert dc() == 0


def test_a_vehicle_that_is_silent_or_unknown(api: httpx.Client) -> None:
    problem = assert_problem(api.get("/v1/analytics/performance/V-9"), 404, "unknown_vehicle")
    assert "V-9" in problem["detail"]
    api.put("/v1/vehicles/V-9", json={})
    body = api.get("/v1/analytics/performance/V-9").json()
    assert body["totalKwhConsumedAc"] is None
    assert body["efficiencyRatio"] is None
    assert body["averageBatteryTemp"] is None
    assert (body["totalKwhDeliveredDc"], body["dcCoverage"], body["acCoverage"]) == (0, 0, 0)
    assert body["verdict"] == "no_meter"


BAD_PARAMETERS = {
    "hours": ["0", "745", "-1", "1.5", "abc", "", "1e400", "9" * 30],
    "until": [
        "",
        "now",
        "1770684912",
        "2026-02-10",
        "2026-02-10T00:00:00",
        "2026-02-10T00:00:00Z\n",
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "\0",
        '"',
    ],
}


def test_a_bad_parameter_is_400_and_named(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for name, values in BAD_PARAMETERS.items():
        for value in values:
            with subtests.test(f"{name}={value!r}"):
                answer = api.get("/v1/analytics/performance/V-201", params={name: value})
                assert name in assert_problem(answer, 400, "bad_parameter")["detail"]


# ---- Live -------------------------------------------------------------------------------------


def test_live_is_the_newest_reading_by_the_devices_clock(api: httpx.Client, clock: Clock) -> None:
    post(api, METER)
    post(api, {**METER, "timestamp": "2026-02-09T23:00:00Z", "voltage": 1})
    expected = {
        "meterId": "M-101",
        "timestamp": "2026-02-10T00:55:12Z",
        "kwhConsumedAc": 14.6,
        "voltage": 231.0,
        "receivedAt": "2026-02-10T12:00:00Z",
        "staleSeconds": 39888.0,
    }
    assert api.get("/v1/live/meters/M-101").json() == expected
    assert api.get("/v1/live/meters").json() == {"items": [expected], "nextCursor": None}
    post(api, {**VEHICLE, "timestamp": "2026-02-10T12:04:00Z"})
    vehicle = api.get("/v1/live/vehicles/V-201").json()
    assert vehicle["staleSeconds"] == 0  # its clock is ahead of ours
    assert (vehicle["soc"], vehicle["batteryTemp"]) == (75, 36)
    clock.advance(minutes=5)
    assert api.get("/v1/live/vehicles/V-201").json()["staleSeconds"] == 60
    assert_problem(api.get("/v1/live/meters/M-9"), 404, "unknown_meter")
    assert_problem(api.get("/v1/live/vehicles/V-9"), 404, "unknown_vehicle")


def walk(api: httpx.Client, path: str, **query: Any) -> list[list[dict[str, Any]]]:
    """All pages of a list."""
    pages = []
    while True:
        answer = api.get(path, params=query)
        assert answer.status_code == 200, answer.text
        pages.append(answer.json()["items"])
        if answer.json()["nextCursor"] is None:
            return pages
        query["cursor"] = answer.json()["nextCursor"]


def test_lists_come_in_pages(api: httpx.Client) -> None:
    ids = sorted(["M-1", "M-10", "M-2", "m-1", "~", "!", "V/1", "%41"])
    post(api, [{**METER, "meterId": device_id} for device_id in ids])
    for path in ("/v1/live/meters", "/v1/meters"):
        for limit in (1, 3, 4, 8, 1000):
            pages = walk(api, path, limit=limit)
            assert [item["meterId"] for page in pages for item in page] == ids
            assert all(len(page) == limit for page in pages[:-1])
            assert len(pages) == -(-len(ids) // limit)
    for index in range(5):
        since = (NOON + timedelta(hours=index)).isoformat()
        until = (NOON + timedelta(hours=index + 1)).isoformat()
        answer = api.put("/v1/assignments", json=assignment(since=since, until=until))
        assert answer.status_code == 201, answer.text
    assert [len(page) for page in walk(api, "/v1/assignments", limit=2)] == [2, 2, 1]
    for index in range(5):
        post(api, {"n": index})
    pages = walk(api, "/v1/quarantine", limit=2)
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [item["payload"] for page in pages for item in page] == [
        json.dumps({"n": index}) for index in (4, 3, 2, 1, 0)
    ]


LISTS = ["live/meters", "live/vehicles", "meters", "vehicles", "assignments", "quarantine"]


def test_a_bad_page_is_400(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for path in LISTS:
        for query in ("limit=0", "limit=1001", "limit=x", "cursor=%00", "cursor=!", "cursor=%FF"):
            with subtests.test(f"{path}?{query}"):
                answer = api.get(f"/v1/{path}?{query}")
                assert query.split("=")[0] in assert_problem(answer, 400, "bad_parameter")["detail"]
        with subtests.test(f"{path} with NUL in the cursor"):
            assert_problem(api.get(f"/v1/{path}?cursor=AA"), 400, "bad_parameter")
    for path in ("assignments", "quarantine"):
        with subtests.test(f"{path} with a cursor that is no number"):
            assert_problem(api.get(f"/v1/{path}?cursor=LTE"), 400, "bad_parameter")
    for query in ("deviceId=%00", "deviceId=", "code=%00", "code=A%20b"):
        with subtests.test(f"quarantine?{query}"):
            assert_problem(api.get(f"/v1/quarantine?{query}"), 400, "bad_parameter")
            assert_problem(api.get(f"/v1/quarantine/counts?{query}"), 400, "bad_parameter")


# ---- Devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meter", "vehicle"])
def test_a_device_is_declared_changed_and_read(api: httpx.Client, kind: str) -> None:
    path = f"/v1/{kind}s/D-1"
    assert_problem(api.get(path), 404, f"unknown_{kind}")
    declared = {"energyKind": "register", "reportingInterval": "PT900S"}
    answer = api.put(path, json=declared)
    assert (answer.status_code, answer.json()) == (201, {f"{kind}Id": "D-1", **declared})
    answer = api.put(path, json=declared)
    assert (answer.status_code, answer.json()) == (200, {f"{kind}Id": "D-1", **declared})
    assert api.get(path).json() == {f"{kind}Id": "D-1", **declared}
    changed = {f"{kind}Id": "D-1", "energyKind": "interval", "reportingInterval": "PT60S"}
    assert api.put(path, json=changed | {f"{kind}Id": "D-1"}).status_code == 422
    del changed[f"{kind}Id"]
    assert api.put(path, json=changed).json() == {f"{kind}Id": "D-1", **changed}
    listed = {"items": [{f"{kind}Id": "D-1", **changed}], "nextCursor": None}
    assert api.get(f"/v1/{kind}s").json() == listed


def test_a_device_is_registered_by_its_first_reading(api: httpx.Client) -> None:
    post(api, [METER, VEHICLE])
    expected = {"energyKind": "interval", "reportingInterval": "PT60S"}
    assert api.get("/v1/meters/M-101").json() == {"meterId": "M-101", **expected}
    assert api.get("/v1/vehicles/V-201").json() == {"vehicleId": "V-201", **expected}
    api.put("/v1/meters/M-101", json={"energyKind": "register"})
    post(api, {**METER, "timestamp": "2026-02-10T00:56:12Z"})
    assert api.get("/v1/meters/M-101").json()["energyKind"] == "register"


ODD_IDS = [
    "V/1",
    "/",
    "a//b",
    "V%41",
    "100%",
    "%2F",
    "?",
    "#",
    "..",
    "!",
    '"',
    "a+b&c=d;e",
    "\\",
    "{x}",
]


def test_odd_ids_go_through_every_path(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for device_id in ODD_IDS:
        encoded = quote(device_id, safe="").replace(".", "%2E")
        with subtests.test(device_id):
            body = [{**METER, "meterId": device_id}, {**VEHICLE, "vehicleId": device_id}]
            assert counts(post(api, body)) == (2, 0, 0, 0)
            for path in (f"/v1/meters/{encoded}", f"/v1/live/meters/{encoded}"):
                assert api.get(path).json().get("meterId") == device_id, path
            for path in (
                f"/v1/vehicles/{encoded}",
                f"/v1/live/vehicles/{encoded}",
                f"/v1/analytics/performance/{encoded}",
            ):
                assert api.get(path).json().get("vehicleId") == device_id, path
            put = api.put(f"/v1/meters/{encoded}", json={})
            assert (put.status_code, put.json()["meterId"]) == (200, device_id)
            api.put("/v1/assignments", json=assignment(meterId=device_id, vehicleId=device_id))
            for name in ("meterId", "vehicleId"):
                found = api.get("/v1/assignments", params={name: device_id}).json()["items"]
                assert [item[name] for item in found] == [device_id]


def test_an_id_that_is_none_is_400(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for encoded in ("x" * 65, "%00", "a%20b", "%C3%A4", "%0A", "M%0A"):
        for method, path, name in (
            ("GET", f"/v1/meters/{encoded}", "meterId"),
            ("PUT", f"/v1/meters/{encoded}", "meterId"),
            ("GET", f"/v1/live/meters/{encoded}", "meterId"),
            ("GET", f"/v1/analytics/performance/{encoded}", "vehicleId"),
            ("GET", f"/v1/assignments?vehicleId={encoded}", "vehicleId"),
        ):
            with subtests.test(f"{method} {path}"):
                answer = api.request(method, path, json={} if method == "PUT" else None)
                assert name in assert_problem(answer, 400, "bad_parameter")["detail"]


def test_a_declaration_that_is_none(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for content, status, code in [
        (b"", 400, "not_json"),
        (b"{", 400, "not_json"),
        (b'{"a":' * 5_000, 422, "invalid_body"),
        (b"[]", 422, "invalid_body"),
        (b"null", 422, "invalid_body"),
        (b'{"energyKind":"sum"}', 422, "invalid_body"),
        (b'{"energyKind":null}', 422, "invalid_body"),
        (b'{"reportingInterval":60}', 422, "invalid_body"),
        (b'{"reportingInterval":"60"}', 422, "invalid_body"),
        (b'{"reportingInterval":"PT0S"}', 422, "out_of_range"),
        (b'{"reportingInterval":"-PT60S"}', 422, "out_of_range"),
        (b'{"reportingInterval":"P32D"}', 422, "out_of_range"),
        (b'{"reportingInterval":"P999999999999D"}', 422, "invalid_body"),
        (b'{"unknown":1}', 422, "invalid_body"),
        (b'{"energyKind":"\xff"}', 400, "not_json"),
    ]:
        with subtests.test(repr(content[:40])):
            assert_problem(api.put("/v1/meters/M-1", content=content, headers=JSON), status, code)
    with subtests.test("content type"):
        answer = api.put("/v1/meters/M-1", content=b"{}", headers={"content-type": "text/plain"})
        assert_problem(answer, 415, "unsupported_media_type")
    assert_problem(api.get("/v1/meters/M-1"), 404, "unknown_meter")


# ---- Assignments ------------------------------------------------------------------------------


def assignment(**fields: Any) -> dict[str, Any]:
    since = "2026-02-10T00:00:00Z"
    return {"meterId": "M-1", "vehicleId": "V-1", "since": since, "until": None, **fields}


def test_an_assignment_is_made_repeated_ended_and_deleted(api: httpx.Client) -> None:
    made = api.put("/v1/assignments", json=assignment())
    number = made.json()["id"]
    assert (made.status_code, made.json()) == (201, {"id": number, **assignment()})
    again = api.put("/v1/assignments", json=assignment())
    assert (again.status_code, again.json()) == (200, made.json())
    ended = api.put("/v1/assignments", json=assignment(until="2026-02-10T06:00:00Z"))
    expected = {"id": number, **assignment(until="2026-02-10T06:00:00Z")}
    assert (ended.status_code, ended.json()) == (200, expected)
    for query in ("", "?meterId=M-1", "?vehicleId=V-1", "?meterId=M-1&vehicleId=V-1"):
        assert api.get(f"/v1/assignments{query}").json()["items"] == [expected]
    assert api.get("/v1/assignments?meterId=M-2").json()["items"] == []
    assert api.get("/v1/meters/M-1").status_code == 200  # registered by its first assignment
    assert api.get("/v1/vehicles/V-1").status_code == 200
    assert api.delete(f"/v1/assignments/{number}").status_code == 204
    assert_problem(api.delete(f"/v1/assignments/{number}"), 404, "not_found")
    assert api.get("/v1/assignments").json()["items"] == []


def test_an_overlap_is_409_and_names_the_assignment(api: httpx.Client) -> None:
    first = api.put("/v1/assignments", json=assignment(until="2026-02-10T06:00:00Z")).json()
    for other in (
        assignment(meterId="M-2", since="2026-02-10T05:59:59Z"),
        assignment(vehicleId="V-2", since="2026-02-09T00:00:00Z"),
        assignment(since="2026-02-10T01:00:00Z", until="2026-02-10T02:00:00Z"),
    ):
        answer = api.put("/v1/assignments", json=other)
        problem = assert_problem(answer, 409, "assignment_overlap")
        assert problem["overlapping"] == first
        assert f"assignment {first['id']}" in problem["detail"]
    assert_problem(api.get("/v1/meters/M-2"), 404, "unknown_meter")  # nothing was left behind
    # Ends that touch do not overlap.
    for other in (
        assignment(vehicleId="V-2", since="2026-02-10T06:00:00Z"),
        assignment(meterId="M-2", since="2026-02-09T00:00:00Z", until="2026-02-10T00:00:00Z"),
    ):
        assert api.put("/v1/assignments", json=other).status_code == 201
    # Nor may the end of an entry be moved over the next.
    answer = api.put("/v1/assignments", json=assignment(until="2026-02-10T06:00:01Z"))
    assert_problem(answer, 409, "assignment_overlap")


def test_an_assignment_is_kept_in_utc(api: httpx.Client) -> None:
    body = assignment(since="2026-02-10T01:00:00+01:00", until="2026-02-10T06:00:00.1234567+02:00")
    answer = api.put("/v1/assignments", json=body)
    assert answer.json()["since"] == "2026-02-10T00:00:00Z"
    assert answer.json()["until"] == "2026-02-10T04:00:00.123457Z"
    assert api.get("/v1/assignments").json()["items"] == [answer.json()]


def test_an_assignment_that_is_none(api: httpx.Client, subtests: pytest.Subtests) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"since": "2026-02-10T00:00:00"}, "invalid_body"),
        ({"since": None}, "invalid_body"),
        ({"since": 1770684912}, "invalid_body"),
        ({"until": "2026-02-11T00:00:00"}, "invalid_body"),
        ({"until": "2026-02-10T00:00:00Z"}, "empty_window"),
        ({"until": "2026-02-10T01:00:00+01:00"}, "empty_window"),
        ({"until": "2026-02-09T00:00:00Z"}, "empty_window"),
        ({"since": "0001-01-01T00:00:00+01:00"}, "out_of_range"),
        ({"until": "9999-12-31T23:59:59-01:00"}, "out_of_range"),
        ({"meterId": "M 1"}, "invalid_body"),
        ({"vehicleId": ""}, "invalid_body"),
        ({"vehicleId": "V\0"}, "invalid_body"),
        ({"vehicleId": 1}, "invalid_body"),
        ({"note": "unknown"}, "invalid_body"),
    ]
    for fields, code in cases:
        with subtests.test(str(fields)):
            assert_problem(api.put("/v1/assignments", json=assignment(**fields)), 422, code)
    with subtests.test("missing"):
        answer = api.put("/v1/assignments", json={"meterId": "M", "vehicleId": "V"})
        assert "since" in assert_problem(answer, 422, "invalid_body")["detail"]
    for number in ("0", "-1", "9" * 30):
        with subtests.test(f"DELETE {number[:5]}"):
            assert_problem(api.delete(f"/v1/assignments/{number}"), 404, "not_found")
    assert api.delete("/v1/assignments/x").status_code in (400, 404)
    assert api.get("/v1/assignments").json()["items"] == []


def test_a_correction_changes_past_answers_at_once(api: httpx.Client) -> None:
    post(api, [METER, VEHICLE])

    def ac() -> Any:
        return api.get("/v1/analytics/performance/V-201").json()["totalKwhConsumedAc"]

    assert ac() is None
    body = assignment(meterId="M-101", vehicleId="V-201")
    number = api.put("/v1/assignments", json=body).json()["id"]
    assert ac() == 14.6
    api.put("/v1/assignments", json={**body, "until": "2026-02-10T00:55:12Z"})
    assert ac() == 0
    api.delete(f"/v1/assignments/{number}")
    assert ac() is None


# ---- The service ------------------------------------------------------------------------------


def test_every_error_is_a_problem_document(api: httpx.Client, subtests: pytest.Subtests) -> None:
    for method, path, status, code in [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/meters/a/b", 404, "not_found"),
        ("POST", "/v1/ingest/x", 404, "not_found"),
        ("GET", "/v1/ingest", 405, "method_not_allowed"),
        ("DELETE", "/v1/ingest", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/ingest", 405, "method_not_allowed"),
        ("POST", "/v1/meters/M-1", 405, "method_not_allowed"),
        ("DELETE", "/v1/meters/M-1", 405, "method_not_allowed"),
        ("PUT", "/v1/live/meters", 405, "method_not_allowed"),
        ("POST", "/v1/analytics/performance/V-1", 405, "method_not_allowed"),
        ("GET", "/v1/quarantine/replay", 405, "method_not_allowed"),
        ("POST", "/health/live", 405, "method_not_allowed"),
        ("PATCH", "/v1/meters/M-1", 405, "method_not_allowed"),
        ("PROPFIND", "/v1/meters", 405, "method_not_allowed"),
    ]:
        with subtests.test(f"{method} {path}"):
            answer = api.request(method, path)
            assert_problem(answer, status, code)
            if status == 405:
                assert answer.headers["allow"]


def test_head_and_options_do_no_harm(api: httpx.Client) -> None:
    for path in ("/health/live", "/v1/meters", "/v1/ingest", "/nowhere"):
        head = api.head(path)
        assert head.content == b""
        assert head.status_code in (200, 404, 405)
        assert api.options(path).status_code in (200, 204, 404, 405)


def test_health_is_open_and_says_what_is_checked(api: httpx.Client) -> None:
    assert api.get("/health/live").json() == {"status": "live"}
    ready = api.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert set(ready.json()["checks"]) == {"database", "schema", "jobs"}


def test_ready_is_503_on_a_schema_that_lacks_a_migration(api: httpx.Client, db: Db) -> None:
    db.execute("DELETE FROM _yoyo_migration WHERE migration_id = '0002_fleet'")
    ready = api.get("/health/ready")
    assert ready.status_code == 503
    assert "0002_fleet" in ready.json()["checks"]["schema"]
    assert "retry-after" in ready.headers


def test_metrics_count_readings_and_name_routes_by_template(api: httpx.Client) -> None:
    post(api, [METER, METER, {**METER, "voltage": 1}, {}, {**VEHICLE, "x": 1, "y": 2}])
    api.get("/v1/live/meters/M-101")
    api.get("/nowhere/at/all")
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = dict(
        line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")
    )
    for outcome, count in (("stored", 2), ("duplicate", 1), ("conflicting", 1), ("rejected", 1)):
        assert float(lines[f'energy_readings_total{{outcome="{outcome}"}}']) == count
    assert float(lines["energy_unknown_fields_total"]) == 2
    assert float(lines["energy_transaction_readings_total"]) == 5
    assert float(lines["energy_queue_readings"]) == 0
    assert "M-101" not in answer.text
    assert "/nowhere" not in answer.text


def test_schema_is_a_page_that_works_offline(api: httpx.Client) -> None:
    assert api.get("/").headers["location"] == "/schema"
    page = api.get("/schema")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for outside in ('src="http', "src='http", 'href="http', "@import", "//cdn"):
        assert outside not in page.text


ROUTES = {
    "/v1/ingest": {"post"},
    "/v1/analytics/performance/{vehicleId}": {"get"},
    "/v1/analytics/performance/{vehicleId}/series": {"get"},
    "/v1/analytics/fleet": {"get"},
    "/v1/analytics/sessions/{vehicleId}": {"get"},
    "/v1/live/vehicles": {"get"},
    "/v1/live/meters": {"get"},
    "/v1/live/vehicles/{vehicleId}": {"get"},
    "/v1/live/meters/{meterId}": {"get"},
    "/v1/meters": {"get"},
    "/v1/vehicles": {"get"},
    "/v1/meters/{meterId}": {"get", "put"},
    "/v1/vehicles/{vehicleId}": {"get", "put"},
    "/v1/assignments": {"get", "put"},
    "/v1/assignments/{assignmentId}": {"delete"},
    "/v1/quarantine": {"get"},
    "/v1/quarantine/counts": {"get"},
    "/v1/quarantine/replay": {"post"},
    "/v1/corrections": {"get", "post"},
    "/v1/corrections/{correctionId}/readings": {"get"},
    "/v1/limits": {"get"},
    "/v1/limits/{deviceClass}": {"put"},
    "/v1/suspects": {"get"},
    "/health/live": {"get"},
    "/health/ready": {"get"},
    "/metrics": {"get"},
}


def references_of(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in references_of(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in references_of(value)]
    return []


def test_the_openapi_document_holds_every_route(api: httpx.Client) -> None:
    answer = api.get("/schema/openapi.json")
    assert answer.status_code == 200
    document = answer.json()
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"]
    for path, methods in ROUTES.items():
        assert methods <= set(document["paths"][path]), path
    operations = [
        (path, method, operation)
        for path, described in document["paths"].items()
        for method, operation in described.items()
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(names) == len(set(names))
    for path, method, operation in operations:
        assert operation["responses"], path
        assert all(r.get("description") for r in operation["responses"].values()), path
        assert ("requestBody" in operation) == (method in ("post", "put")), (path, method)
        in_path = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert in_path == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        for parameter in operation.get("parameters", []):
            assert parameter["schema"], (path, parameter)
    for reference in references_of(document):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in node, reference
            node = node[part]
    again = api.get("/schema/openapi.json")
    assert again.json() == document


def test_a_role_serves_its_own_routes(start_service: StartService) -> None:
    ingest, analytics = start_service(serve_role="ingest"), start_service(serve_role="analytics")
    assert post(ingest, METER).status_code == 201
    assert_problem(ingest.get("/v1/live/meters"), 404, "not_found")
    assert_problem(post(analytics, METER), 404, "not_found")
    assert analytics.get("/v1/live/meters/M-101").status_code == 200
    for client in (ingest, analytics):
        assert client.get("/health/ready").status_code == 200
        assert client.get("/metrics").status_code == 200
    for client, served in ((ingest, True), (analytics, False)):
        paths = client.get("/schema/openapi.json").json()["paths"]
        assert ("/v1/ingest" in paths) is ("/v1/quarantine" in paths) is served
        assert ("/v1/meters" in paths) is not served


def test_an_instant_is_rfc_3339(api: httpx.Client) -> None:
    post(api, {**METER, "timestamp": "2026-02-10T06:25:12.5000004+05:30"})
    ts = api.get("/v1/live/meters/M-101").json()["timestamp"]
    assert ts == "2026-02-10T00:55:12.500000Z"
    assert datetime.fromisoformat(ts)


def test_what_a_put_leaves_out_stays_as_it_is(api: httpx.Client) -> None:
    whole = {"energyKind": "register", "reportingInterval": "PT300S"}
    assert api.put("/v1/meters/M-1", json=whole).status_code == 201
    assert api.put("/v1/meters/M-1", json={}).json() == {"meterId": "M-1", **whole}
    changed = api.put("/v1/meters/M-1", json={"reportingInterval": "PT60S"}).json()
    assert changed == {"meterId": "M-1", "energyKind": "register", "reportingInterval": "PT60S"}
    new = api.put("/v1/vehicles/V-1", json={"energyKind": "register"}).json()
    assert new == {"vehicleId": "V-1", "energyKind": "register", "reportingInterval": "PT60S"}

    entry = {"meterId": "M-1", "vehicleId": "V-1", "since": "2026-01-01T00:00:00Z"}
    assert api.put("/v1/assignments", json=entry).json()["until"] is None
    end = {"until": "2026-01-02T00:00:00Z"}
    assert api.put("/v1/assignments", json=entry | end).json()["until"] == end["until"]
    assert api.put("/v1/assignments", json=entry).json()["until"] == end["until"]
    assert api.put("/v1/assignments", json=entry | {"until": None}).json()["until"] is None
