"""The writer: readings join a queue, and their answer waits for the commit that holds them.

The writer takes all that is queued as soon as its connection is free. At low load a reading goes
alone at once; under load the batches grow by themselves. There is no timer and no acknowledgement
before the commit.

    record() -> queue -> plan_lanes() -> one transaction a lane -> the verdict of each reading
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

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
REFUSALS_ROUNDS_MAX: Final = 20  # of a transaction that is run again without what is implausible
ATTEMPTS_MAX: Final = 5  # of a transaction that deadlocks or cannot be serialized
QUARANTINE_PAYLOAD_BYTES_MAX: Final = 65_536
CONFLICTING: Final = Rejection(
    "conflicting", "$", "the same device and instant are known with other values"
)

_log = logging.getLogger("energy_platform.ingest")
_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))


class _Kind(NamedTuple):
    """What differs between the two kinds of reading."""

    device_class: str
    columns: tuple[str, ...]
    insert: Any
    fetch: Any


_KINDS: Final = {
    struct: _Kind(
        struct.kind,
        columns,
        _SQL[f"insert_{struct.kind}_readings"],
        _SQL[f"fetch_{struct.kind}_readings"],
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
    """Group commit over one connection or a few.

    `clock` gives the instant that is kept as received_at. A reading is late when its hour can be
    rolled up already, that is when it ended over `refresh_end` ago.
    """

    def __init__(
        self,
        dsn: str,
        *,
        clock: Callable[[], datetime],
        refresh_end: timedelta,
        connections: int = 1,
        queue_readings_max: int = 100_000,
        queue_bytes_max: int = 64 * 2**20,
    ) -> None:
        self._dsn = database.complete_dsn(dsn, "energy-platform writer")
        self._clock = clock
        self._refresh_end = refresh_end
        self._connections = connections
        self._queue: deque[Submission] = deque()
        self._queue_readings_max = queue_readings_max
        self._queue_bytes_max = queue_bytes_max
        self._wake = asyncio.Event()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.queued_readings = 0
        self.queued_bytes = 0
        self.transactions = 0
        self.transaction_readings = 0

    async def __aenter__(self) -> "Writer":
        self._tasks = [
            asyncio.create_task(self._run(), name=f"writer {number}")
            for number in range(self._connections)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write what is queued, then end."""
        self._closing = True
        self._wake.set()
        await asyncio.gather(*self._tasks)

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
        await submission.done
        return submission.outcomes

    # ---- the loop -----------------------------------------------------------------------------

    async def _run(self) -> None:
        connection: AsyncConnection[Any] | None = None
        while True:
            group = self._take()
            if not group:
                if self._closing:
                    break
                self._wake.clear()
                await self._wake.wait()
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
    ) -> AsyncConnection[Any]:
        """One transaction, again where that may help, and in halves where the data is at fault."""
        reconnected = connection is None
        is_repeated = False  # whether an earlier attempt may have been committed after all
        for attempt in range(ATTEMPTS_MAX):
            if connection is None or connection.closed:
                connection = await AsyncConnection.connect(
                    self._dsn, autocommit=True, prepare_threshold=0
                )
            try:
                async with connection.transaction():
                    # Plans are kept for good, and perhaps were made when the fleet was small.
                    await connection.execute("SET LOCAL enable_seqscan = off")
                    outcomes = await _store(connection, lane, received_at, is_repeated)
                self._settle(lane, outcomes)
                return connection
            except _Refused as refused:  # each time at least one more, so this comes to an end
                rounds += 1
                lane = _without(lane, refused.reasons, whole_keys=rounds > REFUSALS_ROUNDS_MAX)
                return await self._write_lane(connection, lane, received_at, rounds)
            except (psycopg.DataError, psycopg.IntegrityError) as error:
                return await self._write_halves(connection, lane, received_at, error)
            except (psycopg.Error, _RaceLost) as error:
                is_lost = isinstance(error, psycopg.Error) and database.is_unavailable(error)
                may_pass = isinstance(error, _RaceLost) or database.is_transient(error)
                again = may_pass or (is_lost and not reconnected)
                if is_lost or not again:
                    await connection.close()
                if not again or attempt == ATTEMPTS_MAX - 1:
                    raise
                if is_lost:
                    # Whether its transaction was committed all the same is told by received_at.
                    reconnected = is_repeated = True
        raise AssertionError("the loop returns or raises")

    async def _write_halves(
        self,
        connection: AsyncConnection[Any],
        lane: list[Item],
        received_at: datetime,
        error: psycopg.Error,
    ) -> AsyncConnection[Any]:
        """The database refuses a value: find the reading that holds it, and store the others."""
        if len(lane) > 1:
            middle = len(lane) // 2
            connection = await self._write_lane(connection, lane[:middle], received_at)
            return await self._write_lane(connection, lane[middle:], received_at)
        (item,) = lane
        if isinstance(item.reading, Rejection):
            raise error
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
    failure = StorageError()
    failure.__cause__ = error
    for submission in submissions:
        if not submission.done.done():
            submission.done.set_exception(failure)


class _RaceLost(Exception):
    """A reading was neither inserted nor is it visible: run the transaction again."""


class _Refused(Exception):
    """Readings break a hard limit: run the transaction again without them."""

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


async def _store(
    connection: AsyncConnection[Any], lane: list[Item], received_at: datetime, is_repeated: bool
) -> list[Outcome]:
    """The statements of one transaction; returns the outcome of each item. Raises: _Refused."""
    outcomes: list[Outcome] = ["rejected"] * len(lane)
    for struct, kind in _KINDS.items():
        readings = {
            i: reading for i, (*_, reading) in enumerate(lane) if isinstance(reading, struct)
        }
        if readings:
            settled = await _store_kind(connection, kind, readings, received_at, is_repeated)
            for i, outcome in settled.items():
                outcomes[i] = outcome
    unfit = [
        item
        for item, outcome in zip(lane, outcomes, strict=True)
        if outcome in ("rejected", "conflicting") and item.submission.keep_unfit
    ]
    if unfit:
        columns = quarantine_columns(unfit, received_at)
        await connection.execute(
            _SQL["quarantine_payloads"], {**columns, "is_repeated": is_repeated}
        )
    return outcomes


async def _store_kind(
    connection: AsyncConnection[Any],
    kind: _Kind,
    readings: Mapping[int, Reading],
    received_at: datetime,
    is_repeated: bool,
) -> dict[int, Outcome]:
    """Store readings of one kind, by their place in the lane; returns the outcome of each place.

    Raises: _Refused.
    """
    # A key that comes twice in a statement is settled here: the first by position is the first.
    firsts: dict[tuple[str, datetime], int] = {}
    for place, reading in readings.items():
        firsts.setdefault((reading.device_id, reading.ts), place)
    outcomes: dict[int, Outcome] = dict.fromkeys(readings, "stored")
    unique = list(firsts.values())
    columns = transpose([readings[place] for place in unique], kind.columns)
    cursor = await connection.execute(kind.insert, {**columns, "received_at": received_at})
    losers: list[int] = []
    doubtful: list[int] = []
    for position, is_stored in await cursor.fetchall():
        (doubtful if is_stored else losers).append(unique[position - 1])
    if doubtful:
        await _judge(connection, kind, readings, set(unique) - set(losers), doubtful)
    if not losers and len(unique) == len(readings):
        return outcomes

    # What is known under a key: the values of the reading that was inserted, or what was there.
    known = {place: {readings[place].values} for place in unique}
    if losers:
        rows = await _fetch_known(connection, kind, readings, losers)
        for place in losers:
            known[place] = {values for values, _ in rows[place]}
            # The same received_at: an earlier attempt of this very transaction was committed.
            if not (is_repeated and any(at == received_at for _, at in rows[place])):
                outcomes[place] = "duplicate"
    for place, reading in readings.items():
        first = firsts[reading.device_id, reading.ts]
        if place != first or outcomes[place] != "stored":
            is_same = reading.values in known[first]
            outcomes[place] = "duplicate" if is_same else "conflicting"
    return outcomes


async def _judge(
    connection: AsyncConnection[Any],
    kind: _Kind,
    readings: Mapping[int, Reading],
    stored: Collection[int],
    doubtful: Collection[int],
) -> None:
    """Have implausible readings flagged. Raises: _Refused for those that break a hard limit.

    With a doubtful reading all of its device's are judged: once it is refused, they follow another.
    """
    devices = {readings[place].device_id for place in doubtful}
    places = [place for place in stored if readings[place].device_id in devices]
    keys = {
        "device_class": kind.device_class,
        "device_ids": [readings[place].device_id for place in places],
        "ts": [readings[place].ts for place in places],
    }
    cursor = await connection.execute(_SQL["fetch_refusals"], keys)
    reasons = {
        (place := places[position - 1]): Rejection(code, "$", detail, readings[place].device_id)
        for position, code, detail in await cursor.fetchall()
    }
    if reasons:
        raise _Refused(reasons)
    await connection.execute(_SQL["judge_inserted"], keys)


async def _fetch_known(
    connection: AsyncConnection[Any],
    kind: _Kind,
    readings: Mapping[int, Reading],
    losers: list[int],
) -> dict[int, list[tuple[tuple[float, ...], datetime]]]:
    """By place: the values that are stored under its key, or were corrected, and received_at.

    Raises: _RaceLost where nothing is known under a key.
    """
    keys = transpose([readings[place] for place in losers], kind.columns[:2])
    bounds = {"ts_min": min(keys["ts"]), "ts_max": max(keys["ts"])}
    cursor = await connection.execute(kind.fetch, {**keys, **bounds})
    known: dict[int, list[tuple[tuple[float, ...], datetime]]] = {}
    for position, received_at, *values in await cursor.fetchall():
        known.setdefault(losers[position - 1], []).append((tuple(values), received_at))
    if len(known) != len(losers):
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
