"""Is what was not a reading kept as it came, counted, and replayed with its sender's rights?"""

import base64
import json
from datetime import timedelta
from typing import Any

import httpx
import psycopg
import pytest

from conftest import Clock, StartService
from energy_platform.access import add_key, make_key, revoke_key

Db = psycopg.Connection[Any]

LINES = {"content-type": "application/x-ndjson"}


def meter(device_id: str = "M-1", **fields: Any) -> dict[str, Any]:
    ts = "2026-02-10T00:55:12Z"
    return {"meterId": device_id, "kwhConsumedAc": 1, "voltage": 230, "timestamp": ts, **fields}


def entries(api: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    answer = api.get("/v1/quarantine", params=query)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def replay(api: httpx.Client, **wanted: Any) -> dict[str, Any]:
    answer = api.post("/v1/quarantine/replay", json=wanted)
    assert answer.status_code == 200, answer.text
    account: dict[str, Any] = answer.json()
    outcomes = ("stored", "duplicate", "conflicting", "rejected")
    assert account["received"] == sum(account[outcome] for outcome in outcomes)
    assert account["received"] == sum(became["entries"] for became in account["became"])
    return account


def test_the_same_bytes_for_the_same_reason_are_kept_once(api: httpx.Client, clock: Clock) -> None:
    late = meter(timestamp="2020-01-01T00:00:00Z")
    api.post("/v1/ingest", json=[late, late])
    clock.advance(hours=1)
    api.post("/v1/ingest", json=late)
    (entry,) = entries(api)
    payload = json.dumps(late, separators=(",", ":")).encode()
    assert entry.pop("id") > 0
    assert entry.pop("detail")
    assert entry == {
        "code": "too_late",
        "path": "$.timestamp",
        "deviceId": "M-1",
        "count": 3,
        "firstSeen": "2026-02-10T12:00:00Z",
        "lastSeen": "2026-02-10T13:00:00Z",
        "payload": payload.decode(),
        "payloadBase64": base64.b64encode(payload).decode(),
        "payloadBytes": len(payload),
    }


ANY_BYTES = [
    b"\0",
    b"\xff\xfe\x00",
    b"not json",
    b'{"meterId":"M\\u0000"}',
    b'{"meterId":"M\xff"}',
    b'{"meterId":NaN}',
    '{"meterId":"Zähler 1"}'.encode(),
    b'"' + bytes(range(14, 256)),
    b"'; DROP TABLE quarantine; --",
    b"%s %(x)s",
]


def test_any_bytes_are_kept_as_they_came(api: httpx.Client) -> None:
    answer = api.post("/v1/ingest", content=b"\n".join(ANY_BYTES), headers=LINES)
    assert answer.json()["rejected"] == len(ANY_BYTES)
    kept = {base64.b64decode(entry["payloadBase64"]) for entry in entries(api)}
    assert kept == set(ANY_BYTES)
    for entry in entries(api):
        raw = base64.b64decode(entry["payloadBase64"])
        try:
            assert entry["payload"] == raw.decode()
        except UnicodeDecodeError:
            assert entry["payload"] is None
    account = replay(api, ids=[entry["id"] for entry in entries(api)])
    assert (account["received"], account["rejected"]) == (len(ANY_BYTES), len(ANY_BYTES))
    assert all(error["code"] and error["detail"] for error in account["errors"])
    assert [entry["count"] for entry in entries(api)] == [1] * len(ANY_BYTES)


@pytest.mark.parametrize("extra", [0, 1])
def test_64_kib_are_kept_and_a_cut_payload_is_not_replayed(
    start_service: StartService, extra: int
) -> None:
    api = start_service(late_window=timedelta(days=30))
    reading = meter(timestamp="2025-12-01T00:00:00Z", note="")
    payload = json.dumps(reading).encode()
    payload = payload.replace(b'""', b'"%s"' % (b"n" * (65_536 - len(payload) + extra)))
    api.post("/v1/ingest", content=payload, headers=LINES)
    (entry,) = entries(api)
    assert entry["payloadBytes"] == 65_536 + extra
    assert base64.b64decode(entry["payloadBase64"]) == payload[:65_536]
    account = replay(start_service(), ids=[entry["id"]])
    assert (account["stored"], account["rejected"]) == (1 - extra, extra)
    if extra:
        assert account["errors"][0]["code"] == "truncated"
    assert len(entries(api)) == extra


def test_two_long_payloads_with_one_beginning_are_two(api: httpx.Client) -> None:
    long = b"x" * 70_000
    api.post("/v1/ingest", content=long + b"1\n" + long + b"2\n" + long + b"1", headers=LINES)
    assert sorted(entry["count"] for entry in entries(api)) == [1, 2]


def test_entries_are_filtered(api: httpx.Client) -> None:
    api.post("/v1/ingest", json=[meter(f"M-{i}", voltage="x") for i in range(3)] + [{}])
    assert len(entries(api)) == 4
    assert {entry["deviceId"] for entry in entries(api, code="wrong_type")} == {"M-0", "M-1", "M-2"}
    assert [entry["code"] for entry in entries(api, deviceId="M-1")] == ["wrong_type"]
    assert entries(api, code="no_id", deviceId="M-1") == []
    assert entries(api, code="never") == []


def test_entries_are_counted_by_code_and_device(api: httpx.Client, clock: Clock) -> None:
    def counts(**query: str) -> dict[str, Any]:
        answer = api.get("/v1/quarantine/counts", params=query)
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content

    assert counts() == {
        "total": 0, "readings": 0, "byCode": [], "byDevice": [], "devicesOmitted": 0,
    }  # fmt: skip
    wrong = [meter("M-1", voltage="x"), meter("M-1", voltage="y"), meter("M-2", voltage="x")]
    api.post("/v1/ingest", json=[*wrong, {}])
    clock.advance(hours=1)
    late = meter("M-2", timestamp="2020-01-01T00:00:00Z")
    api.post("/v1/ingest", json=[late] * 5 + [wrong[0]])
    noon, one = "2026-02-10T12:00:00Z", "2026-02-10T13:00:00Z"
    assert counts() == {
        "total": 5,
        "readings": 10,
        "byCode": [
            {"code": "too_late", "entries": 1, "readings": 5, "firstSeen": one, "lastSeen": one},
            {"code": "wrong_type", "entries": 3, "readings": 4, "firstSeen": noon, "lastSeen": one},
            {"code": "no_id", "entries": 1, "readings": 1, "firstSeen": noon, "lastSeen": noon},
        ],
        "byDevice": [
            {"deviceId": "M-2", "entries": 2, "readings": 6, "codes": ["too_late", "wrong_type"],
             "lastSeen": one},
            {"deviceId": "M-1", "entries": 2, "readings": 3, "codes": ["wrong_type"],
             "lastSeen": one},
            {"deviceId": None, "entries": 1, "readings": 1, "codes": ["no_id"], "lastSeen": noon},
        ],
        "devicesOmitted": 0,
    }  # fmt: skip
    filtered = counts(code="wrong_type", deviceId="M-2")
    assert (filtered["total"], filtered["readings"]) == (1, 1)
    assert [count["code"] for count in filtered["byCode"]] == ["wrong_type"]
    assert [count["deviceId"] for count in filtered["byDevice"]] == ["M-2"]

    api.post("/v1/ingest", json=[meter(f"N-{number:03}", voltage="x") for number in range(120)])
    many = counts()
    assert (many["total"], len(many["byDevice"]), many["devicesOmitted"]) == (125, 100, 23)
    assert [count["deviceId"] for count in many["byDevice"]][:4] == ["M-2", "M-1", "N-000", "N-001"]
    assert counts(deviceId="N-119")["total"] == 1


def test_a_page_holds_8_mib_of_payloads_and_says_where_to_go_on(api: httpx.Client) -> None:
    def pages(limit: int) -> list[list[int]]:
        found: list[list[int]] = []
        cursor: dict[str, Any] = {}
        while True:
            page = api.get("/v1/quarantine", params={"limit": limit, **cursor}).json()
            found.append([entry["payloadBytes"] for entry in page["items"]])
            if page["nextCursor"] is None:
                return found
            cursor = {"cursor": page["nextCursor"]}

    for first in (0, 150):
        lines = [b"%04d" % number + b"x" * 65_600 for number in range(first, first + 150)]
        answer = api.post("/v1/ingest", content=b"\n".join(lines), headers=LINES)
        assert answer.json()["rejected"] == 150
    api.post("/v1/ingest", content=b"short", headers=LINES)
    # 128 payloads of 64 KiB are 8 MiB; the short one goes in beside them.
    assert [len(page) for page in pages(1_000)] == [129, 128, 44]
    assert [len(page) for page in pages(100)] == [100, 100, 100, 1]
    assert [size for page in pages(1_000) for size in page] == [5] + [65_604] * 300
    # A replay takes them in batches of such a size.
    account = replay(api, code="not_json")
    assert (account["received"], account["rejected"]) == (301, 301)
    assert account["became"] == [
        {"wasCode": "not_json", "outcome": "rejected", "code": "truncated", "entries": 300},
        {"wasCode": "not_json", "outcome": "rejected", "code": "not_json", "entries": 1},
    ]


def test_after_a_restart_with_a_wider_late_window_all_is_accounted_for(
    start_service: StartService,
) -> None:
    strict = start_service(late_window=timedelta(days=30))
    late = [meter(f"M-{n}", timestamp="2025-12-01T00:00:00Z") for n in range(150)]
    older = [meter(f"M-{n}", timestamp="2024-12-01T00:00:00Z") for n in range(120)]
    strict.post("/v1/ingest", json=late + older + [meter("M-0", voltage="x")])
    patient = start_service()
    patient.post("/v1/ingest", json=[late[0], {**late[1], "voltage": 1}])
    account = replay(patient, code="too_late")
    assert account["became"] == [
        {"wasCode": "too_late", "outcome": "stored", "code": None, "entries": 148},
        {"wasCode": "too_late", "outcome": "rejected", "code": "too_late", "entries": 120},
        {"wasCode": "too_late", "outcome": "conflicting", "code": "conflicting", "entries": 1},
        {"wasCode": "too_late", "outcome": "duplicate", "code": None, "entries": 1},
    ]
    # More stay than are listed one by one.
    assert (len(account["errors"]), account["errorsOmitted"]) == (100, 21)
    assert {entry["code"] for entry in entries(patient, limit=1000)} == {"too_late", "wrong_type"}
    assert len(entries(patient, limit=1000)) == 122


def test_a_device_is_replayed_alone_or_with_a_code(start_service: StartService) -> None:
    strict = start_service(late_window=timedelta(days=30))
    for device_id in ("M-1", "M-2"):
        late = [meter(device_id, timestamp=f"2025-12-0{day}T00:00:00Z") for day in (1, 2)]
        strict.post("/v1/ingest", json=[*late, meter(device_id, voltage="x")])
    patient = start_service()
    account = replay(patient, deviceId="M-1", code="wrong_type")
    assert (account["received"], account["rejected"]) == (1, 1)
    account = replay(patient, deviceId="M-1")
    assert (account["stored"], account["rejected"]) == (2, 1)
    assert [entry["code"] for entry in entries(patient, deviceId="M-1")] == ["wrong_type"]
    assert len(entries(patient, deviceId="M-2")) == 3
    assert replay(patient, deviceId="M-2", code="too_late")["stored"] == 2
    assert replay(patient, deviceId="M-3")["received"] == 0


def test_a_conflict_is_stored_once_the_wrong_reading_is_gone(api: httpx.Client, db: Db) -> None:
    api.post("/v1/ingest", json=meter(voltage=999))
    api.post("/v1/ingest", json=meter(voltage=230))
    db.execute("DELETE FROM meter_telemetry_history WHERE voltage = 999")
    assert replay(api, code="conflicting")["became"] == [
        {"wasCode": "conflicting", "outcome": "stored", "code": None, "entries": 1}
    ]
    assert entries(api) == []
    assert db.execute("SELECT voltage FROM meter_telemetry_history").fetchall() == [(230,)]


def test_what_was_too_late_is_stored_by_a_service_that_waits_longer(
    start_service: StartService, db: Db
) -> None:
    strict, patient = start_service(late_window=timedelta(days=30)), start_service()
    stamps = [f"2025-12-{day:02}T00:00:00Z" for day in range(1, 6)]
    strict.post("/v1/ingest", json=[meter(timestamp=ts) for ts in stamps] + [{}])
    assert replay(strict, code="too_late")["rejected"] == 5
    patient.post("/v1/ingest", json=meter(timestamp=stamps[0]))
    patient.post("/v1/ingest", json=meter(timestamp=stamps[1], voltage=1))
    account = replay(patient, code="too_late")
    assert (account["received"], account["stored"]) == (5, 3)
    assert (account["duplicate"], account["conflicting"], account["rejected"]) == (1, 1, 0)
    (left,) = entries(strict, code="too_late")  # the conflicting one, as it was
    assert left["count"] == 1
    assert account["errors"] == [
        {
            "id": left["id"],
            "outcome": "conflicting",
            "code": "conflicting",
            "path": "$",
            "detail": account["errors"][0]["detail"],
        }
    ]
    assert len(entries(strict)) == 2
    rows = db.execute("SELECT ts, voltage FROM meter_telemetry_history ORDER BY ts").fetchall()
    assert [voltage for _, voltage in rows] == [230, 1, 230, 230, 230]


def test_replay_by_ids_takes_these_only(start_service: StartService) -> None:
    strict, patient = start_service(late_window=timedelta(days=30)), start_service()
    strict.post(
        "/v1/ingest", json=[meter(f"M-{i}", timestamp="2025-12-01T00:00:00Z") for i in "abc"]
    )
    ids = [entry["id"] for entry in entries(strict)]
    assert replay(patient, ids=[ids[1], ids[1], 10**12])["stored"] == 1
    assert [entry["id"] for entry in entries(strict)] == [ids[0], ids[2]]
    assert replay(patient, ids=[ids[1]])["received"] == 0
    assert replay(patient, ids=[])["received"] == 0


def test_a_replay_that_asks_for_nothing_is_422(
    api: httpx.Client, subtests: pytest.Subtests
) -> None:
    bodies: list[Any] = [
        {},
        {"ids": [1], "code": "x"},
        {"ids": ["1"]},
        {"ids": [0]},
        {"ids": [2**63]},
        {"ids": 1},
        {"code": "a\0"},
        {"ids": [1], "deviceId": "M-1"},
        {"deviceId": "a b"},
        {"device_id": "M-1"},
        {"code": ""},
        {"id": [1]},
        [],
    ]
    for body in bodies:
        with subtests.test(str(body)):
            answer = api.post("/v1/quarantine/replay", json=body)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_body")


def test_a_conflict_stays_and_its_count_with_it(api: httpx.Client) -> None:
    api.post("/v1/ingest", json=meter())
    for _ in range(2):
        api.post("/v1/ingest", json=meter(voltage=1))
    (before,) = entries(api)
    assert (before["code"], before["deviceId"], before["count"]) == ("conflicting", "M-1", 2)
    for _ in range(2):
        assert replay(api, code="conflicting")["conflicting"] == 1
    assert entries(api) == [before]


def test_replay_goes_with_the_senders_rights(db: Db, start_service: StartService) -> None:
    admin, admin_secret = make_key("admin", ["admin"])
    gone, gone_secret = make_key("gone", ["ingest"])
    narrow, narrow_secret = make_key("narrow", ["ingest"], device_prefix="A-")
    for key in (admin, gone, narrow):
        add_key(db, key)
    strict = start_service(late_window=timedelta(days=30))
    for secret, device_id in ((gone_secret, "A-1"), (narrow_secret, "A-2"), (narrow_secret, "A-3")):
        strict.post(
            "/v1/ingest",
            json=[meter(device_id, timestamp="2025-12-01T00:00:00Z")],
            headers={"authorization": f"Bearer {secret}"},
        )
    revoke_key(db, gone.key_id)
    db.execute(
        "UPDATE api_key SET device_prefix = NULL, device_ids = '{A-3}' WHERE key_id = %s",
        [narrow.key_id],
    )
    patient = start_service()
    patient.headers["authorization"] = f"Bearer {admin_secret}"
    account = replay(patient, code="too_late")
    assert (account["stored"], account["rejected"]) == (1, 2)
    codes = {error["code"] for error in account["errors"]}
    assert codes == {"forbidden", "forbidden_device"}
    assert {entry["deviceId"] for entry in entries(patient)} == {"A-1", "A-2"}


def test_the_same_bytes_of_two_senders_are_two(db: Db, start_service: StartService) -> None:
    secrets = []
    for name in ("one", "two"):
        key, secret = make_key(name, ["ingest", "admin"])
        add_key(db, key)
        secrets.append(secret)
    api = start_service()
    for secret in secrets:
        api.headers["authorization"] = f"Bearer {secret}"
        api.post("/v1/ingest", json=[{}])
    assert [entry["count"] for entry in entries(api)] == [1, 1]


def test_nothing_in_quarantine_is_ever_in_a_figure(api: httpx.Client, db: Db) -> None:
    vehicle = {
        "vehicleId": "V-1",
        "soc": 50,
        "kwhDeliveredDc": 1,
        "batteryTemp": 20,
        "timestamp": "2026-02-10T00:55:12Z",
    }
    since = "2026-02-01T00:00:00Z"
    api.put("/v1/assignments", json={"meterId": "M-1", "vehicleId": "V-1", "since": since})
    api.post("/v1/ingest", json=[meter(), vehicle])
    before = api.get("/v1/analytics/performance/V-1").json()
    api.post(
        "/v1/ingest",
        json=[
            meter(kwhConsumedAc=500),
            {**vehicle, "kwhDeliveredDc": 500},
            meter(timestamp="2026-02-10T01:00:00"),
            {**vehicle, "soc": 101, "timestamp": "2026-02-10T01:00:00Z"},
            {**vehicle, "vehicleId": "V-2", "batteryTemp": 1000},
        ],
    )
    assert len(entries(api)) == 5
    assert api.get("/v1/analytics/performance/V-1").json() == before
    assert api.get("/v1/live/vehicles/V-1").json()["kwhDeliveredDc"] == 1
    assert api.get("/v1/vehicles/V-2").status_code == 404


def test_2_500_entries_are_replayed_in_batches(start_service: StartService, db: Db) -> None:
    strict, patient = start_service(late_window=timedelta(days=30)), start_service()
    late = [meter(f"M-{i}", timestamp="2025-12-01T00:00:00Z") for i in range(2_500)]
    strict.post("/v1/ingest", json=late)
    rejected = replay(strict, code="too_late")
    assert (rejected["rejected"], len(rejected["errors"])) == (2_500, 100)
    assert rejected["errorsOmitted"] == 2_400
    assert replay(patient, code="too_late")["stored"] == 2_500
    assert entries(strict) == []
    assert db.execute("SELECT count(*) FROM meter_telemetry_history").fetchone() == (2_500,)
