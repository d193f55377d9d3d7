"""Is a row of the fleet what the vehicle's own answer and the oracle say, and do pages add up?"""

import base64
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest

from conftest import NOON, Clock, StartService
from oracle import Reading, World, counter, every, utc
from test_performance import GAPS, VERDICTS

DAY = utc(2026, 2, 10)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
FLEET = "/v1/analytics/fleet"


@pytest.fixture
def world(db: psycopg.Connection[Any]) -> World:
    return World(db)


# ---- figures ------------------------------------------------------------------------------------


def test_registers_step_from_their_last_reading_however_long_ago(world: World) -> None:
    for number, gap in enumerate(GAPS):
        meter = world.add_meter(f"m{number}", "register")
        vehicle = world.add_vehicle(f"v{number}", "register")
        world.assign(meter, vehicle, DAY)
        before = DAY - gap + timedelta(seconds=7)
        world.read_meter(meter, [Reading(before - HOUR, 3.0), Reading(before, 5.0)])
        world.read_vehicle(vehicle, [Reading(before - HOUR, 3.0), Reading(before, 5.0)])
        world.read_meter(meter, counter(60, DAY + 5 * MINUTE, 100, 8.0, 1.0))
        world.read_vehicle(vehicle, counter(60, DAY + 5 * MINUTE, 100, 7.0, 1.0))

    def check() -> None:
        for row in world.check_fleet(DAY, DAY + 3 * HOUR).values():
            assert row["total_kwh_consumed_ac"] == pytest.approx(3 + 99)
            assert row["total_kwh_delivered_dc"] == pytest.approx(2 + 99)
        world.check_fleet(DAY + 20 * MINUTE, DAY + 3 * HOUR)

    check()
    world.refresh()
    check()
    for number, gap in enumerate(GAPS):  # late, and behind what the rollup knows
        late = DAY - gap + timedelta(seconds=9)
        world.read_meter(f"m{number}", [Reading(late, 5.0), Reading(late - 3 * HOUR, 4.0)])
        world.read_vehicle(f"v{number}", [Reading(late, 5.0), Reading(late - 3 * HOUR, 4.0)])
    check()
    world.refresh()
    for table in ("meter", "vehicle"):
        world.db.execute(
            f"SELECT drop_chunks('{table}_telemetry_history', %s::timestamptz)", (DAY,)
        )
    check()


@pytest.mark.parametrize("kinds", [*itertools.product(("interval", "register"), repeat=2)])
def test_meters_that_change_hands(world: World, kinds: tuple[str, str]) -> None:
    # m1 feeds v1, nobody for a while in which it counts on, v2, and v1 again; m2 in between. Edges
    # share hours, and an assignment begins and ends within one.
    meters = [world.add_meter(f"m{i}", kinds[0]) for i in (1, 2)]
    vehicles = [world.add_vehicle(f"v{i}", kinds[1]) for i in (1, 2)]
    at = [DAY + HOUR * h for h in (1.1, 3, 3.75, 4.5, 4.6, 4.9, 7)]
    world.assign("m1", "v1", at[0], at[1])
    world.assign("m1", "v2", at[2], at[3])
    world.assign("m2", "v1", at[2], at[4])
    world.assign("m1", "v1", at[4], at[5])
    world.assign("m1", "v2", at[6])
    for number, device in enumerate(meters):
        world.read_meter(device, counter(97, DAY - HOUR, 400, 100 * number, 0.5))
    for device in vehicles:
        world.read_vehicle(device, counter(113, DAY - HOUR, 400, 10, 0.45))
    # The counter shows its reset to nobody, but the step after it is v2's.
    world.read_meter("m1", [Reading(at[1] + 20 * MINUTE, 1.0)])
    for state in range(3):
        if state == 1:
            world.refresh()
        if state == 2:
            world.read_meter("m1", [Reading(at[1] + 21 * MINUTE, 2.0)])
            world.read_vehicle("v1", [Reading(at[0] + MINUTE, 3.0)])
        for since, until in itertools.combinations(
            [DAY, DAY + HOUR, *at, at[2] + MINUTE, DAY + 9 * HOUR], 2
        ):
            if since < until:
                world.check_fleet(since, until)


def test_a_month_with_late_rows(world: World) -> None:
    for kind in ("interval", "register"):
        m, v = world.add_meter(f"m-{kind}", kind, 3600), world.add_vehicle(f"v-{kind}", kind, 3600)
        world.assign(m, v, DAY - 2 * HOUR, DAY + timedelta(days=20, minutes=3))
        world.read_meter(m, counter(1200, DAY, 31 * 72, 5.0, 0.1))
        world.read_vehicle(v, counter(1200, DAY, 31 * 72, 7.0, 0.09, celsius=-4.0))
    world.refresh(None, DAY + timedelta(days=30))
    for chunk in world.db.execute("SELECT show_chunks('meter_telemetry_history')").fetchall()[:9]:
        world.db.execute("SELECT compress_chunk(%s)", chunk)
    for day in (0, 3, 4, 17, 29):
        for device in ("interval", "register"):
            late = DAY + timedelta(days=day, minutes=127, seconds=1)
            world.read_meter(f"m-{device}", [Reading(late, 77.0)])
            world.read_vehicle(f"v-{device}", [Reading(late, 78.0, 80.0)])
    world.check_fleet(DAY, DAY + timedelta(days=31))
    world.check_fleet(DAY + 7 * MINUTE, DAY + timedelta(days=31, minutes=-3))


def test_the_arguments_of_the_function(world: World) -> None:
    assert world.check_fleet(DAY, DAY + HOUR) == {}
    world.add_vehicle("v")
    world.check_fleet(DAY, DAY + HOUR)
    for since, until in ((DAY, DAY), (DAY, None), ("-infinity", DAY), (DAY, "infinity")):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="since must be before"):
            world.db.execute("SELECT * FROM fleet_performance_v1(%s, %s)", (since, until))


# ---- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture
def fleet(world: World) -> World:
    """A fleet of one hour before noon with every verdict."""
    since = NOON - HOUR
    for number, (ac, ac_kwh, dc, dc_kwh, assigned, _) in enumerate(VERDICTS):
        meter, vehicle = world.add_meter(f"m{number:02}"), world.add_vehicle(f"v{number:02}")
        if assigned:
            world.assign(meter, vehicle, since)
        world.read_meter(meter, every(60, since, ac, ac_kwh))
        world.read_vehicle(vehicle, every(60, since, dc, dc_kwh))
    return world


def pages(api: httpx.Client, query: str) -> Iterator[dict[str, Any]]:
    url: str | None = f"{FLEET}?{query}"
    while url:
        answer = api.get(url)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        yield page
        cursor = page["nextCursor"]
        url = f"{FLEET}?{query}&cursor={cursor}" if cursor else None


def test_pages_hold_each_vehicle_once_and_totals_are_of_all(
    api: httpx.Client, fleet: World
) -> None:
    whole = api.get(f"{FLEET}?hours=1").json()
    assert (whole["since"], whole["until"]) == ("2026-02-10T11:00:00Z", "2026-02-10T12:00:00Z")
    assert whole["nextCursor"] is None
    assert whole["vehicles"] == len(whole["items"]) == len(VERDICTS)
    for item in whole["items"]:
        assert item == api.get(f"/v1/analytics/performance/{item['vehicleId']}?hours=1").json()
    wanted = [verdict for *_, verdict in VERDICTS]
    assert whole["verdicts"] == {verdict: wanted.count(verdict) for verdict in set(wanted)}
    assert sum(whole["verdicts"].values()) == len(VERDICTS)

    # The worst ratio first, those without a ratio last, ids in order where ratios are the same.
    order = [
        (i["efficiencyRatio"] is None, round(i["efficiencyRatio"] or 0, 9), i["vehicleId"])
        for i in whole["items"]
    ]
    assert order == sorted(order)
    assert len({ratio for _, ratio, _ in order}) < len(order)
    assert [is_null for is_null, _, _ in order].count(True) > 2

    def total(name: str) -> float:
        return sum(item[name] or 0 for item in whole["items"])

    names = ("totalKwhConsumedAc", "totalKwhDeliveredDc", "meteredKwhDeliveredDc")
    for name in (*names, "acReadings", "dcReadings"):
        assert whole["totals"][name] == pytest.approx(total(name), rel=1e-9), name
    assert whole["totals"]["efficiencyRatio"] == pytest.approx(total(names[2]) / total(names[0]))

    for limit in (1, 3, len(VERDICTS)):
        found = list(pages(api, f"hours=1&limit={limit}"))
        assert [item for page in found for item in page["items"]] == whole["items"]
        assert {len(page["items"]) for page in found[:-1]} <= {limit}
        for page in found:
            for name in ("since", "until", "vehicles", "totals", "verdicts"):
                assert page[name] == whole[name]


def test_the_filter_leaves_totals_and_counts_alone(api: httpx.Client, fleet: World) -> None:
    whole = api.get(f"{FLEET}?hours=1").json()
    for verdict in whole["verdicts"]:
        found = list(pages(api, f"hours=1&limit=2&verdict={verdict}"))
        items = [item for page in found for item in page["items"]]
        assert items == [item for item in whole["items"] if item["verdict"] == verdict]
        assert len(items) == whole["verdicts"][verdict]
        for page in found:
            assert (page["totals"], page["verdicts"]) == (whole["totals"], whole["verdicts"])


def test_without_vehicles_there_is_an_empty_page(api: httpx.Client) -> None:
    answer = api.get(FLEET).json()
    assert (answer["vehicles"], answer["items"], answer["nextCursor"]) == (0, [], None)
    assert answer["totals"] == {
        "totalKwhConsumedAc": None,
        "totalKwhDeliveredDc": 0,
        "meteredKwhDeliveredDc": 0,
        "efficiencyRatio": None,
        "acReadings": 0,
        "dcReadings": 0,
    }
    assert set(answer["verdicts"].values()) == {0}
    assert len(answer["verdicts"]) == 5


def test_pages_stay_in_their_window_while_readings_arrive(
    start_service: StartService, fleet: World, clock: Clock
) -> None:
    api = start_service()
    seen = []
    for number, page in enumerate(pages(api, "hours=1&limit=4")):
        assert page["until"] == "2026-02-10T12:00:00Z"
        seen += [item["vehicleId"] for item in page["items"]]
        # Time goes on, readings come, hours are rolled up: the sums' last digits may change.
        clock.advance(minutes=7)
        for vehicle in fleet.vehicles:
            fleet.read_vehicle(vehicle, every(1, NOON + number * HOUR, 3, 50.0))
        fleet.refresh()
    assert sorted(seen) == sorted(fleet.vehicles)
    assert number == 3


def test_equal_ratios_that_differ_in_the_last_digit_are_paged_by_id(
    api: httpx.Client, world: World
) -> None:
    # 0.1 + 0.2 and 0.3 are the same kWh, but not the same float.
    parts = {"a": [0.3, 0.0], "b": [0.1, 0.2], "c": [0.3, 0.0], "d": [0.2, 0.1], "e": [0.3, 0.0]}
    for name, kwh in parts.items():
        world.assign(world.add_meter(f"m{name}"), world.add_vehicle(name), NOON - HOUR)
        world.read_meter(f"m{name}", [Reading(NOON - HOUR, 0.4)])
        world.read_vehicle(
            name, [Reading(NOON - HOUR + i * MINUTE, part) for i, part in enumerate(kwh)]
        )
    found = [page["items"][0] for page in pages(api, "hours=1&limit=1")]
    assert [item["vehicleId"] for item in found] == list(parts)
    assert len({item["efficiencyRatio"] for item in found}) == 2


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


GOOD_CURSOR = encoded('["2026-02-10T11:00:00Z","2026-02-10T12:00:00Z",1,"V-1"]')
BAD_CURSORS = [
    "%", "x", encoded("V-1"), encoded("{}"), encoded("[]"),
    encoded('["2026-02-10T11:00:00","2026-02-10T12:00:00Z",1,"V-1"]'),
    encoded('["2026-02-10T11:00:00Z","2026-02-10T12:00:00Z","1","V-1"]'),
    encoded('["2026-02-10T11:00:00Z","2026-02-10T12:00:00Z",1e999,"V-1"]'),
    encoded('["2026-02-10T11:00:00Z","2026-02-10T12:00:00Z",1,"V 1"]'),
    encoded('["2026-02-10T11:00:00Z","2026-02-10T12:00:00Z",1,"V-1",2]'),
    # Of another window.
    encoded('["2026-02-10T10:00:00Z","2026-02-10T12:00:00Z",1,"V-1"]'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("verdict=fine", "verdict"),
        ("verdict=", "verdict"),
        ("hours=0", "hours"),
        ("hours=745", "hours"),
        ("until=yesterday", "until"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        *((f"hours=1&cursor={cursor}", "cursor") for cursor in BAD_CURSORS),
        (f"hours=1&until=2026-02-10T11:59:00Z&cursor={GOOD_CURSOR}", "cursor"),
    ],
)
def test_a_bad_parameter_is_named(api: httpx.Client, query: str, name: str) -> None:
    answer = api.get(f"{FLEET}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter"), answer.text
    assert name in answer.json()["detail"]


def test_raw_rows_that_are_gone_are_a_422_for_the_whole_fleet(
    api: httpx.Client, world: World
) -> None:
    for vehicle in ("v1", "v2"):
        world.add_vehicle(vehicle)
    world.assign(world.add_meter("m"), "v1", NOON - 90 * HOUR)
    world.read_meter("m", every(600, NOON - 80 * HOUR, 480, 1.0))
    world.read_vehicle("v1", every(600, NOON - 80 * HOUR, 480, 0.9))
    world.read_vehicle("v2", every(600, NOON - 30 * HOUR, 180, 0.9))
    world.refresh()
    oldest = DAY - timedelta(days=1)
    for table in ("meter", "vehicle"):
        world.db.execute(
            f"SELECT drop_chunks('{table}_telemetry_history', %s::timestamptz)", (oldest,)
        )

    def ask(until: str, hours: int) -> httpx.Response:
        return api.get(FLEET, params={"until": until, "hours": hours})

    answer = ask("2026-02-10T12:30:00Z", 72)
    assert (answer.status_code, answer.json()["code"]) == (422, "raw_expired")
    assert datetime.fromisoformat(answer.json()["oldest"]) == oldest
    # v2 alone has nothing in the hour that is cut, and whole hours are exact for all.
    assert api.get(
        "/v1/analytics/performance/v2", params={"until": "2026-02-10T12:30:00Z", "hours": 72}
    ).is_success
    assert ask("2026-02-10T12:00:00Z", 72).json()["totals"]["acReadings"] == 432
    assert ask("2026-02-10T12:30:00Z", 24).json()["totals"]["acReadings"] == 144 - 3
    world.check_fleet(NOON - 72 * HOUR, NOON.astimezone(UTC))
