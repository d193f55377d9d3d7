"""POST /v1/ingest: from bytes to the writer, and its verdicts back.

The route is a bare ASGI function, because that is what most of the traffic is; what Litestar would
do for a handler (reading, errors, OpenAPI) is done here by hand.
"""

import logging
import zlib
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
import zstandard
from litestar.types import Receive, Scope, Send

from energy_platform.access import Key, KeyRing
from energy_platform.errors import (
    MalformedError,
    OverloadedError,
    Rejection,
    RequestError,
    TooLargeError,
    UnsupportedMediaError,
)
from energy_platform.http.metrics import Metrics
from energy_platform.http.problems import MEDIA_TYPE, Problem, problem_of
from energy_platform.ingest import CONFLICTING, OUTCOMES, Outcome, Writer
from energy_platform.quarantine import Entry, Verdict
from energy_platform.readings import (
    Batch,
    Reading,
    TimeLimits,
    decode_array,
    decode_lines,
    decode_reading,
    decode_single,
)

ERRORS_MAX: Final = 100
GZIP_MEMBERS_MAX: Final = 1_000
GZIP_CHUNK_BYTES: Final = 65_536
ZSTD_CHUNK_BYTES: Final = 1_024  # a byte of zstd may become 32 KiB

_JSON: Final = b"application/json"
_LINES: Final = b"application/x-ndjson"

_log = logging.getLogger("energy_platform.http")

# How a rejection of one reading is answered when that reading is the whole body.
_STATUS_OF_CODE: Final = {"conflicting": 409, "forbidden_device": 403}


class Limits(NamedTuple):
    """What a body may be, and how old a reading."""

    body_bytes_max: int
    body_readings_max: int
    arriving_bytes_max: int
    late_window: timedelta


class ItemError(msgspec.Struct):
    """One reading that was not taken, by its position in the body from 0."""

    index: int
    outcome: str
    code: str
    path: str
    detail: str


class Account(msgspec.Struct, rename="camel"):
    """What became of a body of many readings; received is the sum of the four outcomes."""

    received: int
    stored: int
    duplicate: int
    conflicting: int
    rejected: int
    errors: list[ItemError]
    errors_omitted: int


class Answer:
    """A response as the two messages that send it."""

    __slots__ = ("body", "start", "status")

    def __init__(
        self,
        status: int,
        content: bytes,
        media_type: bytes = b"application/json",
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        self.status = status
        self.start: Any = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", media_type),
                (b"content-length", str(len(content)).encode()),
                *headers,
            ],
        }
        self.body: Any = {"type": "http.response.body", "body": content, "more_body": False}

    async def send(self, send: Send) -> None:
        await send(self.start)
        await send(self.body)


_STORED: Final = Answer(201, b'{"outcome":"stored"}')
_DUPLICATE: Final = Answer(200, b'{"outcome":"duplicate"}')


class IngestEndpoint:
    """The route's parts, put together once at start."""

    _writer: Writer
    _keys: KeyRing

    def __init__(self, *, limits: Limits, clock: Callable[[], datetime], metrics: Metrics) -> None:
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._arriving = Arriving(limits.arriving_bytes_max)

    def open(self, writer: Writer, keys: KeyRing) -> None:
        """Take readings from now on."""
        self._writer = writer
        self._keys = keys

    async def answer(self, scope: Scope, receive: Receive) -> Answer:
        """The answer to a request, whatever happens."""
        try:
            return await self._post_ingest(scope, receive)
        except RequestError as error:
            return answer_of_problem(problem_of(error))
        except Exception as error:
            answer = answer_of_problem(problem_of(error))
            if answer.status == 500:
                _log.exception("request failed", extra={"path": scope["path"]})
            return answer

    async def _post_ingest(self, scope: Scope, receive: Receive) -> Answer:
        if self._writer.is_full:
            return _QUEUE_FULL  # before anything is done for it: to refuse must be cheap
        if scope["method"] != "POST":  # type: ignore[typeddict-item]
            return answer_of_problem(
                Problem(405, "method_not_allowed", "Readings come by POST.", {}, {"Allow": "POST"})
            )
        headers = dict(scope["headers"])
        authorization = headers.get(b"authorization")
        key = await self._keys.authorize(
            authorization.decode("latin-1") if authorization else None, "ingest"
        )
        media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type not in (_JSON, _LINES):
            raise UnsupportedMediaError(
                "The content type must be application/json or application/x-ndjson."
            )
        body = await read_body(headers, receive, self._limits.body_bytes_max, self._arriving)
        batch, is_many = self._decode(body, media_type)
        if batch.unknown_fields:
            self._metrics.unknown_fields.inc(batch.unknown_fields)
        outcomes = await self._record(batch, len(body), key)
        return _answer_many(batch, outcomes) if is_many else _answer_one(batch, outcomes)

    def _decode(self, body: bytes, media_type: bytes) -> tuple[Batch, bool]:
        times = TimeLimits.at(self._clock(), self._limits.late_window)
        readings_max = self._limits.body_readings_max
        if media_type == _LINES:
            return decode_lines(body, times, readings_max), True
        if body.lstrip(b" \t\r\n")[:1] == b"[":
            return decode_array(body, times, readings_max), True
        return decode_single(body, times), False

    async def _record(self, batch: Batch, body_bytes: int, key: Key | None) -> list[Outcome]:
        forbidden = _forbid_devices(batch, key)
        if forbidden:
            kept = [i for i in range(len(batch.readings)) if i not in forbidden]
            allowed = Batch([batch.payloads[i] for i in kept], [batch.readings[i] for i in kept])
            recorded = await self._writer.record(allowed, body_bytes, key.key_id if key else None)
            outcomes: list[Outcome] = ["rejected"] * len(batch.readings)
            for i, outcome, reading in zip(kept, recorded, allowed.readings, strict=True):
                outcomes[i] = outcome
                batch.readings[i] = reading  # the writer may have found why it is refused
        else:
            outcomes = await self._writer.record(batch, body_bytes, key.key_id if key else None)
        for outcome in OUTCOMES:
            if count := outcomes.count(outcome):
                self._metrics.readings[outcome].inc(count)
        return outcomes

    async def replay(self, entries: list[Entry]) -> list[Verdict]:
        """Run quarantined payloads through ingest again, with their senders' rights."""
        times = TimeLimits.at(self._clock(), self._limits.late_window)
        verdicts: list[Verdict | None] = [None] * len(entries)
        by_sender: dict[str | None, list[tuple[int, bytes, Reading]]] = {}
        for i, entry in enumerate(entries):
            if not entry.is_whole:
                verdicts[i] = Verdict(
                    "rejected", "truncated", "$", "only its first 64 KiB are kept"
                )
                continue
            try:
                key = self._keys.sender(entry.key_id)
                reading, _ = decode_reading(entry.payload, times)
            except RequestError as error:
                verdicts[i] = Verdict("rejected", error.code, "$", str(error))
                continue
            except RecursionError:
                reading = Rejection("nested_too_deep", "$", "nested too deep")
            if not isinstance(reading, Rejection) and key and not key.may_send(reading.device_id):
                reading = _forbidden_device(reading.device_id)
            if isinstance(reading, Rejection):
                verdicts[i] = Verdict("rejected", reading.code, reading.path, reading.detail)
                continue
            by_sender.setdefault(entry.key_id, []).append((i, entry.payload, reading))
        for key_id, sent in by_sender.items():
            batch = Batch([payload for _, payload, _ in sent], [reading for *_, reading in sent])
            body_bytes = sum(len(payload) for _, payload, _ in sent)
            outcomes = await self._writer.record(batch, body_bytes, key_id, keep_unfit=False)
            for (i, _, _), outcome, reading in zip(sent, outcomes, batch.readings, strict=True):
                verdicts[i] = Verdict(outcome, *(_reason(outcome, reading) or ()))
        assert all(verdicts)
        return [verdict for verdict in verdicts if verdict is not None]


# ---- Reading the body -------------------------------------------------------------------------


class Arriving:
    """How many bytes of bodies have come in part: what slow or many senders may take of memory."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0


async def read_body(
    headers: dict[bytes, bytes], receive: Receive, bytes_max: int, arriving: Arriving
) -> bytes:
    """The body, decompressed. Both the compressed and the plain size are bounded.

    Raises: TooLargeError, UnsupportedMediaError, MalformedError; OverloadedError where too much is
    arriving at once.
    """
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"identity", b"gzip", b"zstd"):
        raise UnsupportedMediaError("The content encoding must be gzip, zstd or none.")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > bytes_max:
        raise _too_large(bytes_max)
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            message: Any = await receive()
            if message["type"] == "http.disconnect":
                raise MalformedError("The client went away before the body was complete.")
            chunk = message.get("body", b"")
            size += len(chunk)
            arriving.bytes += len(chunk)
            if size > bytes_max:
                raise _too_large(bytes_max)
            if arriving.bytes > max(arriving.bytes_max, size):  # alone, any body may come
                raise OverloadedError("Too many bodies are arriving at once.")
            chunks.append(chunk)
            if not message.get("more_body", False):
                break
    finally:
        arriving.bytes -= size
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if coding == b"gzip":
        return _gunzip(body, bytes_max)
    if coding == b"zstd":
        return _unzstd(body, bytes_max)
    return body


def _gunzip(body: bytes, bytes_max: int) -> bytes:
    """Piece by piece, because what follows a member is copied when the member ends."""
    plain = bytearray()
    member = None
    members = 0
    try:
        for start in range(0, len(body), GZIP_CHUNK_BYTES):
            rest: bytes = body[start : start + GZIP_CHUNK_BYTES]
            while rest:  # a gzip file may have several members
                if member is None:
                    member = zlib.decompressobj(wbits=31)
                    members += 1
                    if members > GZIP_MEMBERS_MAX:
                        raise _bad_encoding(f"has over {GZIP_MEMBERS_MAX} members")
                plain += member.decompress(rest, bytes_max + 1 - len(plain))
                if len(plain) > bytes_max:
                    raise _too_large(bytes_max)
                rest = member.unused_data
                if member.eof:
                    member = None
    except zlib.error as error:
        raise _bad_encoding(f"is not gzip: {error}") from None
    if member is not None:
        raise _bad_encoding("is cut short")
    return bytes(plain)


def _unzstd(body: bytes, bytes_max: int) -> bytes:
    """Piece by piece, because the output of a piece cannot be bounded."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
    plain = bytearray()
    frame = None
    try:
        for start in range(0, len(body), ZSTD_CHUNK_BYTES):
            rest: bytes = body[start : start + ZSTD_CHUNK_BYTES]
            while rest:  # a zstd file may have several frames
                frame = frame or decompressor.decompressobj()
                plain += frame.decompress(rest)
                if len(plain) > bytes_max:
                    raise _too_large(bytes_max)
                rest = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise _bad_encoding(f"is not zstd: {error}") from None
    if frame is not None:
        raise _bad_encoding("is cut short")
    return bytes(plain)


def _bad_encoding(fault: str) -> MalformedError:
    return MalformedError(f"The compressed body {fault}.", code="bad_encoding")


def _too_large(bytes_max: int) -> TooLargeError:
    return TooLargeError(f"The body is over {bytes_max} bytes.", hint="send several bodies")


# ---- Rights -----------------------------------------------------------------------------------


def _forbid_devices(batch: Batch, key: Key | None) -> set[int]:
    """Reject readings of devices that the key is not for; their positions. They are not kept."""
    if key is None or (key.device_ids is None and key.device_prefix is None):
        return set()
    forbidden = set()
    for i, reading in enumerate(batch.readings):
        device_id = reading.device_id
        if device_id is not None and not key.may_send(device_id):
            batch.readings[i] = _forbidden_device(device_id)
            forbidden.add(i)
    return forbidden


def _forbidden_device(device_id: str) -> Rejection:
    return Rejection("forbidden_device", "$", f"the API key is not for {device_id}", device_id)


# ---- Answers ----------------------------------------------------------------------------------


class _Reason(NamedTuple):
    code: str
    path: str
    detail: str


def _reason(outcome: Outcome, reading: object) -> _Reason | None:
    """Why a reading was not taken; None for one that is stored, now or before."""
    if outcome in ("stored", "duplicate"):
        return None
    rejection = reading if isinstance(reading, Rejection) else CONFLICTING
    return _Reason(rejection.code, rejection.path, rejection.detail)


def _answer_one(batch: Batch, outcomes: list[Outcome]) -> Answer:
    (outcome,) = outcomes
    if outcome == "stored":
        return _STORED
    if outcome == "duplicate":
        return _DUPLICATE
    reason = _reason(outcome, batch.readings[0])
    assert reason is not None
    status = _STATUS_OF_CODE.get(reason.code, 422)
    errors = [{"index": 0, "outcome": outcome, **reason._asdict()}]
    return answer_of_problem(
        Problem(status, reason.code, reason.detail, {"outcome": outcome, "errors": errors})
    )


def _answer_many(batch: Batch, outcomes: list[Outcome]) -> Answer:
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    unfit = counts["conflicting"] + counts["rejected"]
    errors = []
    if unfit:
        for index, (outcome, reading) in enumerate(zip(outcomes, batch.readings, strict=True)):
            reason = _reason(outcome, reading)
            if reason is not None:
                errors.append(ItemError(index, outcome, *reason))
                if len(errors) == ERRORS_MAX:
                    break
    account = Account(len(outcomes), **counts, errors=errors, errors_omitted=unfit - len(errors))
    assert account.received == sum(counts.values()), "every reading has exactly one outcome"
    return Answer(207 if unfit else 200, msgspec.json.encode(account))


def answer_of_problem(problem: Problem) -> Answer:
    """The same problem document for the bare ASGI routes."""
    headers = tuple(
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in problem.headers.items()
    )
    return Answer(problem.status, problem.body, MEDIA_TYPE.encode(), headers)


_QUEUE_FULL: Final = answer_of_problem(problem_of(OverloadedError()))
