"""Talks to the service, and sends again what was not answered."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
from tqdm import tqdm

from energy_platform.errors import SetupError, UnreachableError
from energy_platform.simulator.account import Answer, AnswerError, Bookkeeper
from energy_platform.simulator.faults import Body, Course
from energy_platform.simulator.fleet import SimulationOptions

IN_FLIGHT_MAX = 4
ATTEMPTS_MAX = 20
PAUSE_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 60.0

Item = TypeVar("Item")


async def for_each(
    items: Iterable[Item], at_once: int, act: Callable[[Item], Awaitable[None]]
) -> None:
    """Acts on every item, some at a time. The first error stops it and is raised as it is."""
    remaining = iter(items)

    async def work() -> None:
        for item in remaining:
            await act(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Door:
    """One HTTP client to the service, that resends what was not answered."""

    def __init__(
        self, options: SimulationOptions, pause: Callable[[float], Awaitable[None]]
    ) -> None:
        self.resent = 0
        self.unanswered = 0
        self._base = options.url.rstrip("/")
        self._pause = pause
        self._client = httpx.AsyncClient(
            base_url=self._base,
            headers={"Authorization": f"Bearer {options.key}"} if options.key else {},
            timeout=ANSWER_SECONDS_MAX,
            # A proxy of the environment cannot reach the loopback address of this machine.
            trust_env=urlsplit(self._base).hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def reach(self) -> None:
        """Raises: UnreachableError when nothing answers at the address."""
        try:
            await self._client.get("/health/live")
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise UnreachableError(f"no service answers at {self._base}: {error}") from error

    async def post(self, body: Body) -> httpx.Response:
        content = body.encode()
        headers = {"Content-Type": body.content_type}
        if body.cut is not None:
            await self._post_and_cut(content, headers, body.cut)
        return await self.request("POST", "/v1/ingest", content=content, headers=headers)

    async def put(self, path: str, value: dict[str, Any]) -> httpx.Response:
        content = msgspec.json.encode(value)
        headers = {"Content-Type": "application/json"}
        return await self.request("PUT", path, content=content, headers=headers)

    async def get(self, path: str, **query: str | int) -> httpx.Response:
        return await self.request("GET", path, params=query)

    async def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Sends, and sends again the same bytes while the service is away, which is always safe.

        Raises: UnreachableError after ATTEMPTS_MAX; SetupError on 401 and 403.
        """
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                response = await self._client.request(method, path, **more)
            except httpx.TransportError as error:
                self.unanswered += 1
                reason = f"no answer: {type(error).__name__}"
                delay = min(5.0, 0.25 * 2**attempt)
            else:
                if response.status_code in (401, 403):
                    raise SetupError(f"{method} {path}: {problem_of(response)}")
                if response.status_code not in (502, 503, 504):
                    return response
                reason = problem_of(response)
                delay = retry_after_seconds(response)
            if attempt < ATTEMPTS_MAX:
                self.resent += 1
                await self._pause(delay)
        raise UnreachableError(f"{method} {path}: {reason}")

    async def _post_and_cut(
        self, content: bytes, headers: dict[str, str], cut: Literal["half", "whole"]
    ) -> None:
        """Begins the same request and hangs up before the answer."""

        async def send_and_hang_up() -> AsyncIterator[bytes]:
            yield content if cut == "whole" else content[: len(content) // 2]
            raise ConnectionAbortedError

        promised = {**headers, "Content-Length": str(len(content))}
        # Whatever goes wrong here is what this fault is for.
        with contextlib.suppress(ConnectionAbortedError, httpx.TransportError):
            await self._client.post("/v1/ingest", content=send_and_hang_up(), headers=promised)


def retry_after_seconds(response: httpx.Response) -> float:
    """How long the service asks to wait, within reason."""
    try:
        seconds = float(response.headers.get("Retry-After", "1"))
    except ValueError:
        seconds = 1.0
    return min(max(seconds, 0.05), PAUSE_SECONDS_MAX)


def problem_of(response: httpx.Response) -> str:
    """The status, code and detail of a problem answer, in one line."""
    try:
        problem = msgspec.json.decode(response.content)
        words = [str(problem[name]) for name in ("code", "detail") if problem.get(name)]
    except (msgspec.DecodeError, AttributeError):
        words = []
    return " ".join([str(response.status_code), *words])


def decode_answer(body: Body, response: httpx.Response) -> Answer | None:
    """The service's account of the body; None when the answer is no such account."""
    size = len(body.entries)
    try:
        if body.form == "one":
            answer = _decode_one(response)
        elif response.status_code in (200, 207):
            answer = msgspec.json.decode(response.content, type=Answer)
        else:
            return None
    except msgspec.DecodeError:
        return None
    return answer if answer is not None and answer.adds_up(size) else None


def _decode_one(response: httpx.Response) -> Answer | None:
    value = msgspec.json.decode(response.content)
    named: dict[int, str] = {201: "stored", 200: "duplicate"}
    outcome = named.get(response.status_code)
    if outcome is not None:
        if value.get("outcome") != outcome:
            return None
        return Answer(1, int(outcome == "stored"), int(outcome == "duplicate"), 0, 0)
    if response.status_code == 409:
        return Answer(1, 0, 0, 1, 0, [AnswerError(0, "conflicting", value.get("code", ""))])
    if response.status_code == 422:
        return Answer(1, 0, 0, 0, 1, [AnswerError(0, "rejected", value.get("code", ""))])
    return None


class Sender:
    """Sends courses, a few at a time, and gives every answer to the bookkeeper.

    `give_up` is called when the service stays away for longer than a body is resent.
    """

    def __init__(self, door: Door, books: Bookkeeper, give_up: Callable[[], None]) -> None:
        self.bar: tqdm[Any] | None = None  # counts the readings that are answered
        self._door = door
        self._books = books
        self._give_up = give_up
        self._free = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def submit(self, course: Course) -> None:
        """Waits for a place and sends on. Raises what an earlier course has met."""
        await self._free.acquire()
        if self._error is not None:
            self._free.release()
            raise self._error
        task = asyncio.create_task(self._send(course))
        self._tasks.add(task)
        task.add_done_callback(self._end)

    async def drain(self) -> None:
        """Waits until all is answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._error is not None:
            raise self._error

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free.release()
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    async def _send(self, course: Course) -> None:
        for body in course:
            try:
                response = await self._door.post(body)
            except UnreachableError as error:
                self._books.record_failure(body, str(error))
                self._give_up()
            else:
                answer = decode_answer(body, response)
                if answer is None:
                    reason = problem_of(response)
                    if response.status_code < 300:
                        reason += " the answer does not add up"
                    self._books.record_failure(body, reason)
                else:
                    self._books.record(body, answer)
            if self.bar is not None:
                self.bar.update(sum(slot is not None for _, slot, _ in body.entries))
