"""The writer: readings join a queue, and their answer waits for the commit that holds them.

The writer takes all that is queued as soon as its connection is free. At low load a reading goes
alone at once; under load the batches grow by themselves. There is no timer and no acknowledgement
before the commit.

    record() -> queue -> plan_lanes() -> one transaction a lane -> the verdict of each reading
"""

import asyncio
import hashlib
import logging
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import psycopg
from psycopg import AsyncConnection

from energy_platform import database
from energy_platform.errors import OverloadedError, Rejection, StorageError
from energy_platform.readings import (
    METER_COLUMNS,
    VEHICLE_COLUMNS,
    Batch,
    MeterReading,
    Reading,
    VehicleReading,
    transpose,
)

Outcome = Literal["stored", "duplicate", "conflicting", "rejected"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("stored", "duplicate", "conflicting", "rejected")

TRANSACTION_READINGS_MAX: Final = 20_000
SHARED_READINGS_MIN: Final = 500  # that wait until a further connection takes its part
REFUSALS_ROUNDS_MAX: Final = 20  # of a transaction that is run again without what is implausible
ATTEMPTS_MAX: Final = 5  # of a transaction that deadlocks or cannot be serialized
QUARANTINE_PAYLOAD_BYTES_MAX: Final = 65_536
HARD_LIMIT_BROKEN: Final = "EP001"  # the SQLSTATE of sql/28_record.sql
CONFLICTING: Final = Rejection(
    "conflicting", "$", "the same device and instant are known with other values"
)

_log = logging.getLogger("energy_platform.ingest")
_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))


class _Kind(NamedTuple):
    """What differs between the two kinds of reading."""

    device_class: str
    columns: tuple[str, ...]
    key_of: Callable[[Reading], tuple[str, datetime]]
    record: Any
    fetch: Any
    catch_up: Any


_KINDS: Final = {
    struct: _Kind(
        struct.kind,
        columns,
        operator.attrgetter(*columns[:2]),
        _SQL[f"record_{struct.kind}_readings"],
        _SQL[f"fetch_{struct.kind}_readings"],
        _SQL[f"catch_up_{struct.kind}_live"],
    )
    for struct, columns in ((MeterReading, METER_COLUMNS), (VehicleReading, VEHICLE_COLUMNS))
}


class Submission:
    """The readings of one body on their way through the writer."""

    __slots__ = (
        "body_bytes",
        "done",
        "keep_unfit",
        "key_id",
        "outcomes",
        "payloads",
        "readings",
        "undecided",
    )

    def __init__(
        self,
        batch: Batch,
        body_bytes: int,
        key_id: str | None,
        keep_unfit: bool,
        done: "asyncio.Future[None]",
    ) -> None:
        self.payloads = batch.payloads
        self.readings = batch.readings
        self.body_bytes = body_bytes
        self.key_id = key_id
        self.keep_unfit = keep_unfit
        self.outcomes: list[Outcome] = ["rejected"] * len(batch.readings)
        self.undecided = len(batch.readings)
        self.done = done


class Item(NamedTuple):
    """One reading of a submission: the unit that a lane is made of."""

    submission: Submission
    position: int
    reading: Reading | Rejection


def plan_lanes(submissions: Iterable[Submission], late_before: datetime) -> list[list[Item]]:
    """Sort readings into transactions: first all that are on time, then the late ones.

    TimescaleDB logs one dirty range, [oldest, newest], for each transaction and chunk. One
    straggler in a live batch would dirty every hour of its day up to now; so the late readings go
    by themselves, and those of one day only together where their hours are neighbours.
    """
    on_time: list[Item] = []
    late: list[tuple[int, Item]] = []  # with the hour, counted from the epoch
    for submission in submissions:
        for position, reading in enumerate(submission.readings):
            item = Item(submission, position, reading)
            if isinstance(reading, Rejection) or reading.ts >= late_before:
                on_time.append(item)
            else:
                late.append((int(reading.ts.timestamp() // 3600), item))
    lanes = [on_time] if on_time else []
    if late:
        lane_of_hour = _number_runs({hour for hour, _ in late})
        late_lanes: list[list[Item]] = [[] for _ in range(max(lane_of_hour.values()) + 1)]
        for hour, item in late:
            late_lanes[lane_of_hour[hour]].append(item)
        lanes += late_lanes
    return lanes


def _number_runs(hours: set[int]) -> dict[int, int]:
    """Number the runs of neighbouring hours within each UTC day: 0, 1, 2 ..."""
    numbers: dict[int, int] = {}
    previous = None
    run = 0
    for hour in sorted(hours):
        if previous is None or hour // 24 != previous // 24:
            run = 0
        elif hour != previous + 1:
            run += 1
        numbers[hour] = run
        previous = hour
    return numbers


class Writer:
    """Group commit over one connection, and over further ones while much is waiting.

    Of single readings, one connection makes larger groups and shorter waits than two; of bodies of
    many, two keep the database at work while the next ones are decoded.

    `clock` gives the instant that is kept as received_at. A reading is late when its hour can be
    rolled up already, that is when it ended over `refresh_end` ago.
    """

    def __init__(
        self,
        dsn: str,
        *,
        clock: Callable[[], datetime],
        refresh_end: timedelta,
        connections: int = 2,
        queue_readings_max: int = 100_000,
        queue_bytes_max: int = 64 * 2**20,
    ) -> None:
        # Plans are kept for good, and perhaps were made when the tables were small.
        self._dsn = database.complete_dsn(
            dsn, "energy-platform writer", options="-c enable_seqscan=off"
        )
        self._clock = clock
        self._refresh_end = refresh_end
        self._connections = connections
        self._queue: deque[Submission] = deque()
        self._queue_readings_max = queue_readings_max
        self._queue_bytes_max = queue_bytes_max
        self._wake = asyncio.Event()
        self._wake_others = asyncio.Event()  # once there is enough for further connections
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.queued_readings = 0
        self.queued_bytes = 0
        self.transactions = 0
        self.transaction_readings = 0

    async def __aenter__(self) -> "Writer":
        self._tasks = [
            asyncio.create_task(self._run(is_first=number == 0), name=f"writer {number}")
            for number in range(self._connections)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write what is queued, then end."""
        self._closing = True
        self._wake.set()
        self._wake_others.set()
        await asyncio.gather(*self._tasks)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is let in at the moment, however small it is."""
        return self._closing or (
            self.queued_readings >= self._queue_readings_max
            or self.queued_bytes >= self._queue_bytes_max
        )

    async def record(
        self, batch: Batch, body_bytes: int, key_id: str | None = None, *, keep_unfit: bool = True
    ) -> list[Outcome]:
        """Store a body's readings; returns each one's outcome once it is on disk.

        `keep_unfit` puts what is not stored in quarantine; a replay has it there already.
        Raises: OverloadedError, StorageError. Then nothing of the body is acknowledged, and sending
        it again is safe.
        """
        if not batch.readings:
            return []
        count = len(batch.readings)
        # An empty queue admits any body, or one over the limit could never be sent.
        if self._closing or (
            self._queue
            and (
                self.queued_readings + count > self._queue_readings_max
                or self.queued_bytes + body_bytes > self._queue_bytes_max
            )
        ):
            raise OverloadedError
        submission = Submission(
            batch, body_bytes, key_id, keep_unfit, asyncio.get_running_loop().create_future()
        )
        self._queue.append(submission)
        self.queued_readings += count
        self.queued_bytes += body_bytes
        self._wake.set()
        if self.queued_readings >= SHARED_READINGS_MIN:
            self._wake_others.set()
        await submission.done
        return submission.outcomes

    # ---- the loop -----------------------------------------------------------------------------

    async def _run(self, *, is_first: bool) -> None:
        wake = self._wake if is_first else self._wake_others
        readings_min = 1 if is_first else SHARED_READINGS_MIN
        connection: AsyncConnection[Any] | None = None
        while True:
            group = self._take() if self.queued_readings >= readings_min else []
            if not group:
                if self._closing:
                    break
                wake.clear()
                await wake.wait()
                continue
            try:
                connection = await self._write(connection, group)
            except Exception as error:  # a mistake of ours must not end the writer
                _fail(group, error)
        if connection is not None:
            await connection.close()

    def _take(self) -> list[Submission]:
        """All that is queued, up to what one transaction should hold; at least one body."""
        group: list[Submission] = []
        readings = 0
        while self._queue and (
            not group or readings + len(self._queue[0].readings) <= TRANSACTION_READINGS_MAX
        ):
            submission = self._queue.popleft()
            readings += len(submission.readings)
            self.queued_bytes -= submission.body_bytes
            group.append(submission)
        self.queued_readings -= readings
        return group

    async def _write(
        self, connection: AsyncConnection[Any] | None, group: list[Submission]
    ) -> AsyncConnection[Any] | None:
        """Write a group lane by lane. Returns the connection to go on with, None if it is lost."""
        now = self._clock()
        late_before = now - self._refresh_end
        late_before = late_before.replace(minute=0, second=0, microsecond=0)
        for lane in plan_lanes(group, late_before):
            try:
                connection = await self._write_lane(connection, lane, now)
            except Exception as error:
                _fail((item.submission for item in lane), error)
                if connection is not None:
                    await connection.close()
                connection = None
        return connection

    async def _write_lane(
        self,
        connection: AsyncConnection[Any] | None,
        lane: list[Item],
        received_at: datetime,
        rounds: int = 0,
        *,
        is_repeated: bool = False,
    ) -> AsyncConnection[Any]:
        """One transaction, again where that may help, and in halves where the data is at fault.

        `is_repeated`: parts of the lane may be committed already; their received_at tells.
        """
        reconnected = connection is None
        for attempt in range(ATTEMPTS_MAX):
            if connection is None or connection.closed:
                connection = await AsyncConnection.connect(
                    self._dsn, autocommit=True, prepare_threshold=0
                )
            try:
                outcomes = await _store(connection, lane, received_at, is_repeated=is_repeated)
                self._settle(lane, outcomes)
                return connection
            except psycopg.errors.UniqueViolation:
                if attempt == ATTEMPTS_MAX - 1:
                    await connection.close()
                    raise
                await _catch_up(connection, lane)
            except _Refused as refused:  # each time at least one more, so this comes to an end
                rounds += 1
                lane = _without(lane, refused.reasons, whole_keys=rounds > REFUSALS_ROUNDS_MAX)
                return await self._write_lane(
                    connection, lane, received_at, rounds, is_repeated=is_repeated
                )
            except _NotQuarantined as error:  # the readings themselves are stored
                return await self._write_halves(
                    connection, lane, received_at, error.reason, is_repeated=True
                )
            except (psycopg.DataError, psycopg.IntegrityError) as error:
                return await self._write_halves(
                    connection, lane, received_at, error, is_repeated=is_repeated
                )
            except (psycopg.Error, _RaceLost) as error:
                is_lost = isinstance(error, psycopg.Error) and database.is_unavailable(error)
                may_pass = isinstance(error, _RaceLost) or database.is_transient(error)
                again = may_pass or (is_lost and not reconnected)
                again = again and attempt < ATTEMPTS_MAX - 1
                if is_lost or not again:
                    await connection.close()
                if not again:
                    raise
                if is_lost:
                    reconnected = True
            is_repeated = True
        raise AssertionError("the loop returns or raises")

    async def _write_halves(
        self,
        connection: AsyncConnection[Any],
        lane: list[Item],
        received_at: datetime,
        error: psycopg.Error,
        *,
        is_repeated: bool,
    ) -> AsyncConnection[Any]:
        """The database refuses a value: find the reading that holds it, and store the others."""
        if len(lane) > 1:
            for half in (lane[: len(lane) // 2], lane[len(lane) // 2 :]):
                connection = await self._write_lane(connection, half, received_at, is_repeated=True)
            return connection
        (item,) = lane
        if isinstance(item.reading, Rejection):  # not even the quarantine takes it
            _fail([item.submission], error)
            return connection
        refusal = Rejection("refused", "$", str(error).strip(), item.reading.device_id)
        return await self._write_lane(connection, [item._replace(reading=refusal)], received_at)

    def _settle(self, lane: list[Item], outcomes: list[Outcome]) -> None:
        self.transactions += 1
        self.transaction_readings += len(lane)
        for (submission, position, reading), outcome in zip(lane, outcomes, strict=True):
            submission.readings[position] = reading  # or why it was refused
            submission.outcomes[position] = outcome
            submission.undecided -= 1
            if not submission.undecided and not submission.done.done():
                submission.done.set_result(None)


def _fail(submissions: Iterable[Submission], error: Exception) -> None:
    """Answer 503 to all of these that have no answer yet."""
    if not database.is_unavailable(error):
        _log.error("transaction failed", exc_info=error)
    for submission in submissions:
        if not submission.done.done():
            failure = StorageError()
            failure.__cause__ = error
            submission.done.set_exception(failure)


class _RaceLost(Exception):
    """A reading was neither inserted nor is it visible: store the lane again."""


class _NotQuarantined(Exception):
    """The database refuses a value of what was to be kept in quarantine."""

    def __init__(self, reason: psycopg.Error) -> None:
        super().__init__()
        self.reason = reason


class _Refused(Exception):
    """Readings break a hard limit and nothing was stored: try again without them."""

    def __init__(self, reasons: dict[int, Rejection]) -> None:
        super().__init__()
        self.reasons = reasons  # by place in the lane


def _without(lane: list[Item], reasons: Mapping[int, Rejection], *, whole_keys: bool) -> list[Item]:
    """The lane with refusals in place of readings, wherever the same reading is repeated.

    Another reading of the same device and instant is judged for itself; but with `whole_keys` it
    is refused with the first, so that a body full of such pairs comes to an end.
    """

    def key_of(reading: Reading) -> tuple[object, ...]:
        key = reading.device_id, reading.ts
        return key if whole_keys else (*key, reading.values)

    by_key = {
        key_of(reading): reason
        for place, reason in reasons.items()
        if not isinstance(reading := lane[place].reading, Rejection)
    }

    def settle(item: Item) -> Item:
        if isinstance(item.reading, Rejection):
            return item
        return item._replace(reading=by_key.get(key_of(item.reading), item.reading))

    return [settle(item) for item in lane]


class _Part:
    """The readings of one kind in a lane, by their place there."""

    def __init__(self, kind: _Kind, readings: dict[int, Reading]) -> None:
        self.kind = kind
        self.readings = readings
        # A key that comes twice in a lane is settled here: the first by position is the first, so
        # it is the last that this dict is told.
        keys = [*map(kind.key_of, readings.values())]
        self.firsts = dict(zip(reversed(keys), reversed(readings), strict=True))
        self.sent = list(self.firsts.values())

    def columns(self) -> dict[str, list[Any]]:
        columns = transpose([self.readings[place] for place in self.sent], self.kind.columns)
        columns[f"{self.kind.device_class}_ts"] = columns.pop("ts")
        return columns


def _part(lane: Sequence[Item]) -> list[_Part]:
    """The lane's readings by kind, in the order in which the database takes them."""
    readings: dict[type[Reading], dict[int, Reading]] = {struct: {} for struct in _KINDS}
    for place, (_, _, reading) in enumerate(lane):
        if not isinstance(reading, Rejection):
            readings[type(reading)][place] = reading
    return [_Part(kind, readings[struct]) for struct, kind in _KINDS.items() if readings[struct]]


async def _store(
    connection: AsyncConnection[Any], lane: list[Item], received_at: datetime, *, is_repeated: bool
) -> list[Outcome]:
    """Store a lane in one transaction, then quarantine what is unfit; returns each item's outcome.

    With `is_repeated`, rows of the same received_at and values are of an attempt before this one.
    Raises: _Refused, _RaceLost, _NotQuarantined.
    """
    outcomes: list[Outcome] = ["rejected"] * len(lane)
    parts = _part(lane)
    lost = await _record(connection, parts, received_at) if parts else {}
    for part in parts:
        for place in part.readings:
            outcomes[place] = "stored"
        known: dict[int, list[_Known]] = {}
        if places := lost[part.kind.device_class]:
            known = await _fetch_known(connection, part, places)
        for place, found in known.items():
            ours = _Known(part.readings[place].values, received_at)
            if not (is_repeated and ours in found):
                outcomes[place] = "duplicate"
        if known or len(part.sent) < len(part.readings):
            for place, outcome in _compare(part, known, outcomes):
                outcomes[place] = outcome
    unfit = [
        item
        for item, outcome in zip(lane, outcomes, strict=True)
        if outcome in ("rejected", "conflicting") and item.submission.keep_unfit
    ]
    if unfit:
        columns = quarantine_columns(unfit, received_at)
        try:
            await connection.execute(
                _SQL["quarantine_payloads"], {**columns, "is_repeated": is_repeated}
            )
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise _NotQuarantined(error) from error
    return outcomes


async def _record(
    connection: AsyncConnection[Any], parts: Sequence[_Part], received_at: datetime
) -> dict[str, list[int]]:
    """The transaction. Returns the places of what was not inserted, by device class.

    Raises: _Refused.
    """
    columns: dict[str, Any] = {"received_at": received_at}
    for part in parts:
        columns |= part.columns()
    of_class = {part.kind.device_class: part for part in parts}
    # Both kinds in one transaction; always in this order, so that two writers lock in one.
    query = "\nUNION ALL\n".join(part.kind.record for part in parts)
    try:
        cursor = await connection.execute(query, columns)
    except psycopg.Error as error:
        if error.sqlstate != HARD_LIMIT_BROKEN:
            raise
        device_class, refusals = _refusal_decoder.decode(error.diag.message_detail or "")
        sent = of_class[device_class].sent
        readings = of_class[device_class].readings
        raise _Refused(
            {
                (place := sent[position - 1]): Rejection(
                    code, "$", detail, readings[place].device_id
                )
                for position, code, detail in refusals
            }
        ) from None
    lost: dict[str, list[int]] = {device_class: [] for device_class in of_class}
    for device_class, position in await cursor.fetchall():
        lost[device_class].append(of_class[device_class].sent[position - 1])
    return lost


_refusal_decoder = msgspec.json.Decoder(tuple[str, list[tuple[int, str, str]]])


def _compare(
    part: _Part, known: Mapping[int, Sequence["_Known"]], outcomes: Sequence[Outcome]
) -> Iterator[tuple[int, Outcome]]:
    """Tell duplicate from conflicting, by the values that are known under a reading's key."""
    for place, reading in part.readings.items():
        first = part.firsts[part.kind.key_of(reading)]
        if place != first or outcomes[place] != "stored":
            values = (
                [row.values for row in known[first]]
                if first in known
                else [part.readings[first].values]
            )
            yield place, "duplicate" if reading.values in values else "conflicting"


async def _catch_up(connection: AsyncConnection[Any], lane: list[Item]) -> None:
    """Live rows are behind history: somebody has filled it by other ways than this one."""
    for part in _part(lane):
        device_ids = [reading.device_id for reading in part.readings.values()]
        await connection.execute(part.kind.catch_up, {"device_ids": device_ids})


class _Known(NamedTuple):
    """What is stored under a key, or was until a correction."""

    values: tuple[float, ...]
    received_at: datetime


async def _fetch_known(
    connection: AsyncConnection[Any], part: _Part, places: list[int]
) -> dict[int, list[_Known]]:
    """What is known under the keys of these places. Raises: _RaceLost where nothing is."""
    keys = transpose([part.readings[place] for place in places], part.kind.columns[:2])
    bounds = {"ts_min": min(keys["ts"]), "ts_max": max(keys["ts"])}
    cursor = await connection.execute(part.kind.fetch, {**keys, **bounds})
    known: dict[int, list[_Known]] = {}
    for position, received_at, *values in await cursor.fetchall():
        known.setdefault(places[position - 1], []).append(_Known(tuple(values), received_at))
    if len(known) != len(places):
        raise _RaceLost
    return known


_QUARANTINE_COLUMNS: Final = (
    "fingerprint",
    "payload",
    "payload_bytes",
    "code",
    "path",
    "detail",
    "device_id",
    "key_id",
    "count",
)


def quarantine_columns(items: Sequence[Item], seen_at: datetime) -> dict[str, Any]:
    """One array per column; the same bytes for the same reason from the same sender once."""
    rows: dict[bytes, list[Any]] = {}
    for submission, position, reading in items:
        reason = reading if isinstance(reading, Rejection) else CONFLICTING
        device_id = reading.device_id
        payload = bytes(submission.payloads[position])
        key_id = submission.key_id
        fingerprint = hashlib.sha256(
            "\0".join((reason.code, reason.path, key_id or "", "")).encode() + payload
        ).digest()
        if fingerprint in rows:
            rows[fingerprint][-1] += 1
            continue
        rows[fingerprint] = [
            fingerprint,
            payload[:QUARANTINE_PAYLOAD_BYTES_MAX],
            len(payload),
            reason.code,
            reason.path,
            _storable(reason.detail),
            device_id,
            key_id,
            1,
        ]
    arrays = map(list, zip(*rows.values(), strict=True))
    columns = dict(zip(_QUARANTINE_COLUMNS, arrays, strict=True))
    return {**columns, "seen_at": seen_at}


def _storable(text: str) -> str:
    """PostgreSQL's text holds every character but NUL."""
    return text.replace("\0", "\\0")[:2000]
