"""Which meter feeds which vehicle when: tells the service, and keeps what the service has."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

import msgspec

from energy_platform.errors import SetupError
from energy_platform.simulator.client import Door, problem_of
from energy_platform.simulator.faults import UNASSIGNED, Slot
from energy_platform.simulator.fleet import (
    HOUR,
    SECOND,
    VISIT_SECONDS,
    Device,
    Micros,
    Vehicle,
    to_micros,
    to_text,
)

PAGE_MAX = 1000
VISIT_LENGTH: Micros = VISIT_SECONDS * SECOND
OPEN: Micros = 2**62
"""The end of an assignment that has none."""


class Piece(NamedTuple):
    """A meter feeds a vehicle in since <= instant < until."""

    since: Micros
    until: Micros
    meter: str
    vehicle: str


class AssignmentItem(msgspec.Struct, rename="camel"):
    meter_id: str
    vehicle_id: str
    since: datetime
    until: datetime | None = None


class AssignmentPage(msgspec.Struct, rename="camel"):
    items: list[AssignmentItem]
    next_cursor: str | None = None


class Assignments:
    """The assignments of a run that begins at `start`, and the visits to other chargers."""

    def __init__(self, door: Door, start: Micros) -> None:
        self.visits: list[tuple[Vehicle, Micros]] = []
        """Who was booked to be at another charger, and from when."""
        self._door = door
        self._start = start
        # A visit that is on when the run starts counts.
        self._booked_until = start - VISIT_LENGTH + 1
        self._by_meter: dict[str, list[Piece]] = defaultdict(list)
        self._by_vehicle: dict[str, list[Piece]] = {}

    def slot(self, device: Device, at: Micros) -> Slot:
        """Whose count a reading of that device and instant raises."""
        if isinstance(device, Vehicle):
            return f"dc {device.id}"
        for since, until, _, vehicle in self._by_meter.get(device.id, ()):
            if since <= at < until:
                return f"ac {vehicle}"
        return UNASSIGNED

    async def assign_home(self, vehicle: Vehicle) -> None:
        """Assigns the vehicle's own meter for all of the run; an earlier run's assignment stays."""
        assert vehicle.meter is not None
        # A guest's assignment begins earlier, since a visit may be on at the start and cuts it.
        since = self._start - (HOUR if vehicle.guest_meter else 0)
        piece = Piece(since, OPEN, vehicle.meter.id, vehicle.id)
        if await self._put(piece):
            self._keep(vehicle, [piece])
            return
        known = await self._fetch(vehicle)
        if known and known[0].since > since:
            await self._put(piece._replace(until=known[0].since))
            known = await self._fetch(vehicle)
        self._keep(vehicle, known)

    async def book_visits(self, vehicles: Iterable[Vehicle], until: Micros) -> None:
        """Moves every guest whose visit begins before `until` to the other charger and back."""
        for vehicle in vehicles:
            if vehicle.guest_meter is not None:
                for begin in vehicle.visits(self._booked_until, until):
                    await self._book(vehicle, begin)
        self._booked_until = until

    async def visit_outcome(self, vehicle: Vehicle, begin: Micros) -> str:
        """What the service has of a booked visit."""
        pieces = await self._fetch(vehicle)
        if any(piece.until > following.since for piece, following in pairwise(pieces)):
            return "the ledger overlaps"
        return "moved" if _visit(vehicle, begin) in pieces else "not in the ledger"

    async def _book(self, vehicle: Vehicle, begin: Micros) -> None:
        assert vehicle.meter is not None
        self.visits.append((vehicle, begin))
        visit = _visit(vehicle, begin)
        for piece in await self._fetch(vehicle):
            if piece.meter == visit.meter and piece.since == begin:
                break  # An earlier run has moved it.
            if (
                piece.meter == vehicle.meter.id
                and piece.since < begin
                and piece.until > visit.until
            ):
                await self._put(piece._replace(until=begin))
                await self._put(visit)
                await self._put(piece._replace(since=visit.until))
                break
        self._keep(vehicle, await self._fetch(vehicle))

    async def _put(self, piece: Piece) -> bool:
        """False when it overlaps with another. Raises: SetupError on any other refusal."""
        value = {
            "meterId": piece.meter,
            "vehicleId": piece.vehicle,
            "since": to_text(piece.since),
            "until": None if piece.until == OPEN else to_text(piece.until),
        }
        response = await self._door.put("/v1/assignments", value)
        if response.status_code not in (200, 201, 409):
            raise SetupError(f"{piece.vehicle} was not assigned: {problem_of(response)}")
        return response.status_code != 409

    async def _fetch(self, vehicle: Vehicle) -> list[Piece]:
        """The vehicle's assignments in the order of time."""
        pieces: list[Piece] = []
        query: dict[str, str | int] = {"vehicleId": vehicle.id, "limit": PAGE_MAX}
        while True:
            response = await self._door.get("/v1/assignments", **query)
            if response.status_code != 200:
                raise SetupError(f"{vehicle.id}: {problem_of(response)}")
            page = msgspec.json.decode(response.content, type=AssignmentPage)
            for item in page.items:
                until = OPEN if item.until is None else to_micros(item.until)
                pieces.append(Piece(to_micros(item.since), until, item.meter_id, item.vehicle_id))
            if page.next_cursor is None:
                return sorted(pieces)
            query["cursor"] = page.next_cursor

    def _keep(self, vehicle: Vehicle, pieces: list[Piece]) -> None:
        """Puts these in the place of all that was known of the vehicle."""
        for piece in self._by_vehicle.get(vehicle.id, ()):
            self._by_meter[piece.meter].remove(piece)
        self._by_vehicle[vehicle.id] = pieces
        for piece in pieces:
            self._by_meter[piece.meter].append(piece)


def _visit(vehicle: Vehicle, begin: Micros) -> Piece:
    assert vehicle.guest_meter is not None
    return Piece(begin, begin + VISIT_LENGTH, vehicle.guest_meter.id, vehicle.id)
