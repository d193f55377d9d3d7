"""Puts the service together: routes, errors, health, metrics, and what every request passes."""

import asyncio
import contextlib
import gc
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any, Final
from urllib.parse import unquote

import psycopg
from litestar import Litestar, Response, Router, asgi, get
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.enums import ScopeType
from litestar.response import Redirect
from litestar.types import ASGIApp, ControllerRouterHandler, Message, Receive, Scope, Send

from energy_platform import database, schema
from energy_platform.access import KeyRing
from energy_platform.errors import EnergyError, StorageError
from energy_platform.http import analytics, corrections, fleet, plausibility, quarantine
from energy_platform.http.access import is_local_request, is_loopback, require
from energy_platform.http.ingest import Answer, IngestEndpoint, Limits, answer_of_problem
from energy_platform.http.metrics import CONTENT_TYPE, Metrics
from energy_platform.http.openapi import OPENAPI_CONFIG
from energy_platform.http.problems import Problem, answer_problem
from energy_platform.http.service import Service, utc_now
from energy_platform.ingest import Writer
from energy_platform.settings import Settings

_log = logging.getLogger("energy_platform.http")

JOB_PAUSE_SECONDS: Final = 30.0
VACUUM_PAUSE_SECONDS: Final = 3600.0
REFUSED_LOG_SECONDS: Final = 1.0
INGEST_PATH: Final = "/v1/ingest"
GC_THRESHOLD: Final = 20_000  # objects made, net of those freed, until the young ones are looked at

_SLASH_OR_PERCENT: Final = re.compile("(%2[Ff]|%25)")


def create_app(
    settings: Settings,
    dsn: str,
    *,
    runs_jobs: bool = False,
    clock: Callable[[], datetime] = utc_now,
) -> ASGIApp:
    """The service on a migrated database. `runs_jobs`: the engine has no background workers.

    `clock` is the only source of time for what is stored and answered.
    """
    metrics = Metrics()
    state = State()
    ingest = IngestEndpoint(
        limits=Limits(
            settings.body_bytes_max,
            settings.body_readings_max,
            settings.queue_bytes_max,
            settings.late_window,
        ),
        clock=clock,
        metrics=metrics,
    )
    state.ingest = ingest
    state.metrics = metrics

    @contextlib.asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with _open_service(settings, dsn, clock, runs_jobs, metrics) as service:
            state.service = app.state.service = front.service = service
            if service.writer is not None:
                ingest.open(service.writer, service.keys)
            _rest_garbage_collector()
            if service.keys.is_open:
                _log.info("no API key exists: open to everyone on this machine, and to nobody else")
            yield

    app = Litestar(
        route_handlers=_routes(settings.serve_role, ingest),
        lifespan=[lifespan],
        state=state,
        dependencies={"service": Provide(_provide_service)},
        exception_handlers={Exception: answer_problem},
        openapi_config=OPENAPI_CONFIG,
        logging_config=None,
        request_max_body_size=settings.body_bytes_max,
    )
    front = _Front(app, metrics, ingest if settings.serve_role != "analytics" else None)
    return front


def _rest_garbage_collector() -> None:
    """Do not look through what stays for good again and again: routes, schemas, modules.

    Requests leave no cycles behind, so that young objects are rarely worth a look either. With
    Python's defaults a tenth of the time of single readings went into collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 10)


def _routes(role: str, ingest: IngestEndpoint) -> list[ControllerRouterHandler]:
    routes: list[ControllerRouterHandler] = [
        Router("/health", route_handlers=[get_live, get_ready], tags=["service"]),
        get_metrics,
        get_root,
    ]
    if role in ("all", "ingest"):

        @asgi(INGEST_PATH, copy_scope=False)
        async def post_ingest(scope: Scope, receive: Receive, send: Send) -> None:
            answer = await ingest.answer(scope, receive)
            await answer.send(send)

        routes += [post_ingest, quarantine.router, corrections.router]
    if role in ("all", "analytics"):
        routes += [analytics.router, fleet.router, plausibility.router]
    return routes


async def _provide_service(state: State) -> Service:
    service: Service = state.service
    return service


@contextlib.asynccontextmanager
async def _open_service(
    settings: Settings,
    dsn: str,
    clock: Callable[[], datetime],
    runs_jobs: bool,
    metrics: Metrics,
) -> AsyncIterator[Service]:
    """Open pools, keys, writer and jobs; close them in reverse, the writer once it has drained."""
    async with contextlib.AsyncExitStack() as stack:
        read_pool = await stack.enter_async_context(
            database.open_pool(
                settings.read_url or dsn,
                name="reader",
                connections_max=settings.reader_connections,
            )
        )
        write_pool = await stack.enter_async_context(
            database.open_pool(dsn, name="admin", connections_max=4)
        )
        keys = KeyRing(
            write_pool, loopback_only=is_loopback(settings.host), monotonic=time.monotonic
        )
        await keys.load()
        writer = None
        if settings.serve_role in ("all", "ingest"):
            writer = await stack.enter_async_context(
                Writer(
                    dsn,
                    clock=clock,
                    refresh_end=settings.refresh_end,
                    connections=settings.writer_connections,
                    queue_readings_max=settings.queue_readings_max,
                    queue_bytes_max=settings.queue_bytes_max,
                )
            )
            await stack.enter_async_context(_background(metrics.follow(writer)))
        await stack.enter_async_context(_background(keys.keep_fresh()))
        if runs_jobs:
            await stack.enter_async_context(_job_loop(dsn, clock))
        yield Service(
            read_pool=read_pool,
            write_pool=write_pool,
            keys=keys,
            writer=writer,
            late_window=settings.late_window,
            refresh_end=settings.refresh_end,
            clock=clock,
        )


@contextlib.asynccontextmanager
async def _background(coroutine: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def _job_loop(dsn: str, clock: Callable[[], datetime]) -> AsyncIterator[None]:
    """Run due jobs in a thread, on a connection of their own, until the service stops."""
    stopping = threading.Event()

    def run() -> None:
        pause = 1.0
        vacuumed = time.monotonic()
        while not stopping.wait(pause):
            pause = JOB_PAUSE_SECONDS
            try:
                with database.connect_now(dsn, "energy-platform jobs") as connection:
                    schema.run_due_jobs(connection, clock, stop=stopping.is_set)
                    if time.monotonic() - vacuumed > VACUUM_PAUSE_SECONDS:
                        schema.vacuum(connection)
                        vacuumed = time.monotonic()
            except (EnergyError, psycopg.Error) as error:
                _log.warning("jobs put off", extra={"error": str(error)})
            except Exception:
                _log.exception("jobs put off")

    thread = asyncio.create_task(asyncio.to_thread(run))
    try:
        yield
    finally:
        stopping.set()
        await thread


# ---- Service routes ---------------------------------------------------------------------------


@get("/live", summary="The process runs")
async def get_live() -> dict[str, str]:
    return {"status": "live"}


@get("/ready", summary="Database, schema version and jobs")
async def get_ready(service: NamedDependency[Service]) -> Response[dict[str, Any]]:
    try:
        checks = await schema.check_ready(service.write_pool)
    except StorageError as error:
        checks = {"database": str(error)}
    is_ready = checks.get("database") == "ok" and checks.get("schema") == "ok"
    return Response(
        {"status": "ready" if is_ready else "not ready", "checks": checks},
        status_code=200 if is_ready else 503,
        headers={} if is_ready else {"Retry-After": "2"},
    )


@get("/metrics", summary="Prometheus metrics", guards=[require("read")], tags=["service"])
async def get_metrics(state: State) -> Response[bytes]:
    return Response(state.metrics.render(), media_type=CONTENT_TYPE)


@get("/", include_in_schema=False)
async def get_root() -> Redirect:
    return Redirect("/schema")


# ---- What every request passes ----------------------------------------------------------------


class _Front:
    """In front of Litestar: who may talk to an open service, ids with a slash, metrics, the log.

    Readings go past Litestar: what it wraps around a route takes longer than storing a reading.
    """

    service: Service

    def __init__(self, app: Litestar, metrics: Metrics, ingest: IngestEndpoint | None) -> None:
        self._app = app
        self._metrics = metrics
        self._ingest = ingest
        self._refused = 0  # bodies of readings since it was logged
        self._refused_logged_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        answer: Answer | None = None
        try:
            if self.service.keys.is_open and not is_local_request(scope["headers"]):
                answer = _NOT_LOCAL
            elif self._ingest and scope["path"] == INGEST_PATH:
                scope["path_template"] = INGEST_PATH
                answer = await self._ingest.answer(scope, receive)
            else:
                _decode_path(scope)
                await self._app(scope, receive, send_and_note)
            if answer:
                status = answer.status
                await answer.send(send)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Any, status: int, seconds: float) -> None:
        route = scope.get("path_template", "unknown")
        self._metrics.note_request(scope["method"], route, status, seconds)
        # Readings that are taken are counted, not logged: they are nearly all of the traffic. Those
        # that come too fast have a line a second.
        path = scope["path"]
        if path == INGEST_PATH and status == 503:
            self._note_refused()
        elif path != INGEST_PATH or status >= 400:
            extra = {
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(seconds, 6),
            }
            _log.log(logging.ERROR if status == 500 else logging.INFO, "request", extra=extra)

    def _note_refused(self) -> None:
        self._refused += 1
        now = time.monotonic()
        if now - self._refused_logged_at >= REFUSED_LOG_SECONDS:
            _log.warning("readings refused", extra={"status": 503, "requests": self._refused})
            self._refused = 0
            self._refused_logged_at = now


def _decode_path(scope: Any) -> None:
    """An id may hold a slash or a percent sign. Left encoded, a slash stays inside its segment of
    the path, and decode_path_id() decodes each exactly once.
    """
    raw_path = scope.get("raw_path") or b""
    if b"%2" in raw_path:
        parts = _SLASH_OR_PERCENT.split(raw_path.decode("latin-1"))
        parts[::2] = map(unquote, parts[::2])
        scope["path"] = "".join(parts)


_NOT_LOCAL: Final = answer_of_problem(
    Problem(
        403,
        "not_local",
        "No API key exists yet, so the service answers only Host and Origin headers of this "
        "machine. Make a key with `energy-platform keys create`.",
    )
)
