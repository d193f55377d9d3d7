"""Who may do what, for which devices, and from where?"""

import asyncio
import hashlib
import json
from typing import Any

import httpx
import psycopg
import pytest

from conftest import Clock, StartService
from energy_platform import access, cli, database
from energy_platform.access import KeyRing, add_key, list_keys, make_key, revoke_key
from energy_platform.errors import (
    ForbiddenError,
    NotFoundError,
    SetupError,
    UnauthorizedError,
)
from energy_platform.http.access import is_local_request, is_loopback
from energy_platform.settings import Settings

Db = psycopg.Connection[Any]


def new_key(db: Db, *scopes: str, **bound: Any) -> tuple[str, dict[str, str]]:
    """A new key's id, and the header that it is sent with."""
    key, secret = make_key("test", list(scopes), **bound)
    add_key(db, key)
    return key.key_id, {"authorization": f"Bearer {secret}"}


def meter(device_id: str = "M-1", **fields: Any) -> dict[str, Any]:
    ts = "2026-02-10T00:55:12Z"
    return {"meterId": device_id, "kwhConsumedAc": 1, "voltage": 230, "timestamp": ts, **fields}


ROUTES: list[tuple[str, str, str | None, Any]] = [
    ("POST", "/v1/ingest", "ingest", meter()),
    ("GET", "/v1/analytics/performance/V-1", "read", None),
    ("GET", "/v1/analytics/performance/V-1/series", "read", None),
    ("GET", "/v1/analytics/fleet", "read", None),
    ("GET", "/v1/analytics/sessions/V-1", "read", None),
    ("GET", "/v1/live/meters", "read", None),
    ("GET", "/v1/live/vehicles", "read", None),
    ("GET", "/v1/live/meters/M-1", "read", None),
    ("GET", "/v1/live/vehicles/V-1", "read", None),
    ("GET", "/v1/meters", "read", None),
    ("GET", "/v1/vehicles", "read", None),
    ("GET", "/v1/meters/M-1", "read", None),
    ("GET", "/v1/vehicles/V-1", "read", None),
    ("GET", "/v1/assignments", "read", None),
    ("GET", "/metrics", "read", None),
    ("PUT", "/v1/meters/M-1", "admin", {}),
    ("PUT", "/v1/vehicles/V-1", "admin", {}),
    ("PUT", "/v1/assignments", "admin", {}),
    ("DELETE", "/v1/assignments/1", "admin", None),
    ("GET", "/v1/limits", "read", None),
    ("PUT", "/v1/limits/meter", "admin", {}),
    ("GET", "/v1/suspects", "read", None),
    ("POST", "/v1/corrections", "admin", {}),
    ("GET", "/v1/corrections", "admin", None),
    ("GET", "/v1/corrections/1/readings", "admin", None),
    ("GET", "/v1/quarantine", "admin", None),
    ("GET", "/v1/quarantine/counts", "admin", None),
    ("POST", "/v1/quarantine/replay", "admin", {"ids": []}),
    ("GET", "/health/live", None, None),
    ("GET", "/health/ready", None, None),
]


def test_every_route_asks_for_its_scope(
    db: Db, start_service: StartService, subtests: pytest.Subtests
) -> None:
    keys = {scope: new_key(db, scope)[1] for scope in access.SCOPES}
    headers = {"none": {}, "wrong": {"authorization": "Bearer ek_guess"}, **keys}
    api = start_service()
    for method, path, scope, body in ROUTES:
        for name, header in headers.items():
            with subtests.test(f"{method} {path} with {name}"):
                answer = api.request(method, path, json=body, headers=header)
                if scope is None:
                    assert answer.status_code == 200
                elif name in ("none", "wrong"):
                    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.headers["content-type"] == "application/problem+json"
                elif name != scope:
                    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
                    assert scope in answer.json()["detail"]
                else:
                    assert answer.status_code in (200, 201, 204, 404, 422)


def test_no_route_is_left_out(api: httpx.Client) -> None:
    known = {path for _, path, _, _ in ROUTES}
    for path in api.get("/schema/openapi.json").json()["paths"]:
        concrete = path.replace("{assignmentId}", "1").replace("{correctionId}", "1")
        concrete = concrete.replace("{deviceClass}", "meter")
        concrete = concrete.replace("{meterId}", "M-1").replace("{vehicleId}", "V-1")
        assert concrete in known, f"{path} has no row in ROUTES"


def test_an_authorization_header_that_is_none_is_401(
    db: Db, start_service: StartService, subtests: pytest.Subtests
) -> None:
    secret = new_key(db, "ingest")[1]["authorization"].split()[1]
    api = start_service()
    for header in ("", "Bearer", "Basic {}", "{}", "Bearer  x", "Bearer {} x", "Bearer \x80ü"):
        with subtests.test(header):
            sent = [(b"authorization", header.replace("{}", secret).encode("latin-1"))]
            answer = api.post("/v1/ingest", json=meter(), headers=sent)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_the_scheme_is_case_insensitive(db: Db, start_service: StartService) -> None:
    secret = new_key(db, "ingest")[1]["authorization"].split()[1]
    header = {"authorization": f"bearer {secret}"}
    assert start_service().post("/v1/ingest", json=meter(), headers=header).status_code == 201


# ---- Bound keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound", [{"device_ids": ["A-1", "A-2"]}, {"device_prefix": "A-"}], ids=["ids", "prefix"]
)
def test_a_bound_key_sends_for_its_devices_only(
    db: Db, start_service: StartService, bound: dict[str, Any]
) -> None:
    key_id, header = new_key(db, "ingest", **bound)
    api = start_service()

    def post(body: Any, content: bytes | None = None) -> httpx.Response:
        sent = content or json.dumps(body).encode()
        typed = {**header, "content-type": "application/json"}
        return api.post("/v1/ingest", content=sent, headers=typed)

    assert post(meter("A-1")).status_code == 201
    forbidden = post(meter("B-1"))
    assert (forbidden.status_code, forbidden.json()["code"]) == (403, "forbidden_device")
    assert forbidden.headers["content-type"] == "application/problem+json"
    body = [meter("B-1"), meter("A-2"), meter("A-1", voltage=1), meter("B-2", voltage="x"), {}]
    account = post(body).json()
    assert account["received"] == 5
    assert (account["stored"], account["conflicting"], account["rejected"]) == (1, 1, 3)
    assert [(error["index"], error["code"]) for error in account["errors"]] == [
        (0, "forbidden_device"),
        (2, "conflicting"),
        (3, "forbidden_device"),
        (4, "no_id"),
    ]
    only = post([meter("B-1")]).json()
    assert (only["received"], only["rejected"]) == (1, 1)
    gateway = post(None, b'[{"meterId":"B-1","voltage":NaN}]').json()
    assert gateway["errors"][0]["code"] == "forbidden_device"
    # Counted, not kept.
    kept = db.execute("SELECT code, key_id FROM quarantine ORDER BY code").fetchall()
    assert kept == [("conflicting", key_id), ("no_id", key_id)]
    stored = db.execute("SELECT meter_id FROM meter_telemetry_history ORDER BY 1").fetchall()
    assert stored == [("A-1",), ("A-2",)]


# ---- The life of a key ------------------------------------------------------------------------


def run_ring(dsn: str, monotonic: Clock, scenario: Any, *, loopback_only: bool = False) -> None:
    async def inside() -> None:
        async with database.open_pool(dsn, name="test", connections_max=2) as pool:
            ring = KeyRing(
                pool,
                loopback_only=loopback_only,
                monotonic=lambda: monotonic.now.timestamp(),
            )
            await scenario(ring)

    asyncio.run(inside())


def test_a_revoked_key_stops_and_a_new_one_works(dsn: str, db: Db, clock: Clock) -> None:
    key_id, header = new_key(db, "ingest")

    async def scenario(ring: KeyRing) -> None:
        key = await ring.authorize(header["authorization"], "ingest")
        assert key is not None
        assert key.key_id == key_id
        assert ring.sender(key_id) == key
        revoke_key(db, key_id)
        # A key made just now is looked for, yet at most once a second.
        _, newer = new_key(db, "ingest")
        with pytest.raises(UnauthorizedError):
            await ring.authorize(newer["authorization"], "ingest")
        clock.advance(seconds=access.RELOAD_SECONDS)
        assert await ring.authorize(newer["authorization"], "ingest")
        with pytest.raises(UnauthorizedError):
            await ring.authorize(header["authorization"], "ingest")
        with pytest.raises(ForbiddenError):
            ring.sender(key_id)
        with pytest.raises(ForbiddenError):
            ring.sender("key_never")
        assert ring.sender(None) is None

    run_ring(dsn, clock, scenario)


@pytest.mark.parametrize("loopback_only", [True, False])
def test_open_ends_with_the_first_key_for_good(
    dsn: str, db: Db, clock: Clock, loopback_only: bool
) -> None:
    async def scenario(ring: KeyRing) -> None:
        assert not ring.is_open  # before the keys were read
        if loopback_only:
            assert await ring.authorize(None, "admin") is None
        else:
            with pytest.raises(UnauthorizedError):
                await ring.authorize(None, "read")
        assert ring.is_open is loopback_only
        key_id, _ = new_key(db, "read")
        revoke_key(db, key_id)
        await ring.load()
        assert not ring.is_open
        with pytest.raises(UnauthorizedError):
            await ring.authorize(None, "read")

    run_ring(dsn, clock, scenario, loopback_only=loopback_only)


def test_only_the_sha_256_of_a_secret_is_kept(db: Db) -> None:
    key, secret = make_key("gateway", ["ingest"], ["M-1"])
    assert secret.startswith("ek_")
    assert len(secret) > 40
    assert secret != make_key("gateway", ["ingest"])[1]
    add_key(db, key)
    (row,) = db.execute("SELECT api_key::text, secret_sha256 FROM api_key").fetchall()
    assert secret not in row[0]
    assert row[1] == hashlib.sha256(secret.encode()).digest()


def test_keys_are_listed_and_revoked(db: Db) -> None:
    assert list_keys(db) == []
    first, _ = make_key("one", ["ingest", "read"], device_prefix="M-")
    second, _ = make_key("two", ["admin"], ["M-1"])
    add_key(db, first)
    add_key(db, second)
    revoke_key(db, first.key_id)
    listed = {key.key_id: key for key in list_keys(db)}
    assert listed[first.key_id].revoked_at is not None
    assert listed[second.key_id].revoked_at is None
    assert listed[second.key_id].device_ids == ["M-1"]
    revoked_at = listed[first.key_id].revoked_at
    revoke_key(db, first.key_id)  # again: nothing changes
    assert {key.key_id: key for key in list_keys(db)}[first.key_id].revoked_at == revoked_at
    with pytest.raises(NotFoundError):
        revoke_key(db, "key_never")


@pytest.mark.parametrize(
    ("scopes", "secret"),
    [
        (["everything"], None),
        (["ingest"], "short"),
        (["ingest"], "x" * 31),
        (["ingest"], "x" * 513),
        (["ingest"], "with a space " * 4),
        (["ingest"], "x" * 40 + "\n"),
    ],
)
def test_a_key_that_is_none_is_a_setup_error(scopes: list[str], secret: str | None) -> None:
    with pytest.raises(SetupError):
        make_key("x", scopes, secret=secret)


def test_keys_by_the_command_line(
    dsn: str, db: Db, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENERGY_DATABASE_URL", dsn)
    assert cli.main(["keys", "create", "gateway", "--prefix", "A-"]) == cli.DONE
    secret = capsys.readouterr().out.strip()
    (key,) = list_keys(db)
    assert key.secret_sha256 == hashlib.sha256(secret.encode()).digest()
    assert (key.name, key.scopes, key.device_prefix) == ("gateway", ["ingest"], "A-")
    assert cli.main(["keys", "list"]) == cli.DONE
    listed = capsys.readouterr().out
    assert key.key_id in listed
    assert "A-*" in listed
    assert secret not in listed
    assert cli.main(["keys", "revoke", key.key_id]) == cli.DONE
    assert list_keys(db)[0].revoked_at is not None
    assert cli.main(["keys", "revoke", "key_never"]) == cli.WRONG_USE


# ---- Who may reach a service without keys -----------------------------------------------------


def test_an_address_that_others_reach_needs_a_key(dsn: str, db: Db) -> None:
    everywhere = Settings(host="0.0.0.0")
    with pytest.raises(SetupError, match=r"0\.0\.0\.0"):
        cli._prepare_keys(dsn, everywhere)
    cli._prepare_keys(dsn, Settings())
    assert list_keys(db) == []
    cli._prepare_keys(dsn, Settings(host="0.0.0.0", bootstrap_key="b" * 32))
    (key,) = list_keys(db)
    assert (key.name, key.scopes) == ("bootstrap", list(access.SCOPES))
    # Where there is a key, the environment's is not made again, nor after it was revoked.
    cli._prepare_keys(dsn, Settings(bootstrap_key="c" * 32))
    assert len(list_keys(db)) == 1
    cli._prepare_keys(dsn, everywhere)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("a.localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("127.0.0.1.nip.io", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


HEADERS: list[tuple[str, str, bool]] = [
    ("host", "127.0.0.1:8080", True),
    ("host", "LOCALHOST", True),
    ("host", "[::1]:8080", True),
    ("host", "evil.example:8080", False),
    ("host", "127.0.0.1.nip.io", False),
    ("host", "localhost@evil.example", False),
    ("host", "[", False),
    ("host", "[::1", False),
    ("host", "", False),
    ("origin", "http://localhost:3000", True),
    ("origin", "https://evil.example", False),
    ("origin", "http://[", False),
    ("origin", "null", False),
    ("origin", "", False),
]


@pytest.mark.parametrize(("name", "value", "local"), HEADERS)
def test_open_is_open_to_this_machine_only(name: str, value: str, local: bool) -> None:
    assert is_local_request([(name.encode(), value.encode())]) is local


def test_an_open_service_answers_no_other_host_or_origin(api: httpx.Client, db: Db) -> None:
    for name, value, local in HEADERS:
        answer = api.post("/v1/ingest", json=meter(), headers={name: value})
        if local:
            assert answer.status_code in (200, 201), (name, value)
        elif answer.text != "Invalid HTTP request received.":  # the server's own answer
            assert (answer.status_code, answer.json()["code"]) == (403, "not_local"), (name, value)
            assert answer.headers["content-type"] == "application/problem+json"


def test_with_a_key_any_host_is_answered(db: Db, start_service: StartService) -> None:
    _, header = new_key(db, "ingest")
    named = {**header, "host": "energy.example.org", "origin": "https://energy.example.org"}
    assert start_service().post("/v1/ingest", json=meter(), headers=named).status_code == 201
