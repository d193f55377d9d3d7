"""A clean, migrated database for each test, and the real service on it, with a clock of its own.

The database is TimescaleDB: the embedded engine, or the server named by ENERGY_TEST_DATABASE_URL.
pytest-postgresql clones it for each test from a template that was migrated once.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from energy_platform import schema
from energy_platform.embedded import Engine
from energy_platform.http.app import create_app
from energy_platform.http.protocol import JoinedWritesProtocol
from energy_platform.settings import Settings, load_settings
from running import Platform

LONG = os.environ.get("ENERGY_TEST_PROFILE", "quick") == "long"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# The brief's own instant, a little later: every test that does not say otherwise begins here.
NOON = datetime(2026, 2, 10, 12, 0, tzinfo=UTC)


class Clock:
    """Time that a test moves. No test waits for the wall clock."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **parts: float) -> datetime:
        self.now += timedelta(**parts)
        return self.now


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What only a server can prove is skipped without one, and says so."""
    if item.get_closest_marker("server") and not os.environ.get("ENERGY_TEST_DATABASE_URL"):
        pytest.skip(
            "ENERGY_TEST_DATABASE_URL is unset: what sessions do to each other is not proved"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of exactness did, added up in one line."""
    done: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, counts in report.user_properties:
                if name == "exactness":
                    done.update({**counts, "wrong": outcome == "failed"})
    if done:
        terminalreporter.write_line(f"exactness: {json.dumps(done)}")


@pytest.fixture(scope="session", autouse=True)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The server that holds the tests' databases; pytest-postgresql is told where it is."""
    given = os.environ.get("ENERGY_TEST_DATABASE_URL")
    if given:
        _tell_pytest_postgresql(request.config, given)
        yield given
        return
    with Engine(tmp_path_factory.mktemp("engine"), fsync=False) as engine:
        _tell_pytest_postgresql(request.config, engine.dsn())
        yield engine.dsn()


def _tell_pytest_postgresql(config: pytest.Config, dsn: str) -> None:
    parameters = conninfo_to_dict(dsn)
    for option in ("host", "port", "user", "password"):
        value = parameters.get(option)
        if value is not None:
            setattr(config.option, f"postgresql_{option}", value)


def _migrate_template(**connection: Any) -> None:
    parameters = {
        name: connection.get(name) for name in ("host", "port", "user", "password", "dbname")
    }
    dsn = make_conninfo(**{name: value for name, value in parameters.items() if value})
    schema.migrate(dsn, load_settings("migrate", {}))


timescale = factories.postgresql_noproc(load=[_migrate_template])
postgresql = factories.postgresql("timescale")


@pytest.fixture
def dsn(postgresql: psycopg.Connection[Any]) -> str:
    """The connection string of a clean, migrated database."""
    info = postgresql.info
    return make_conninfo(
        host=info.host,
        port=info.port,
        user=info.user,
        password=info.password or None,
        dbname=info.dbname,
    )


@pytest.fixture(scope="module")
def module_dsn(timescale: NoopExecutor) -> Iterator[str]:
    """A clean, migrated database that all tests of a file share."""
    place: dict[str, Any] = {
        "host": timescale.host,
        "port": timescale.port,
        "user": timescale.user,
        "password": timescale.password,
        "dbname": f"{timescale.dbname}_module",
    }
    janitor = DatabaseJanitor(**place, template_dbname=timescale.template_dbname)
    janitor.drop()
    with janitor:
        yield make_conninfo(**{name: value for name, value in place.items() if value})


@pytest.fixture
def db(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection to it, in UTC."""
    with psycopg.connect(dsn, autocommit=True, options="-c timezone=UTC") as connection:
        yield connection


@pytest.fixture
def clock() -> Clock:
    return Clock()


class RunningService:
    """A service on loopback, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            http=JoinedWritesProtocol,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> httpx.Client:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the service did not start")
            self._thread.join(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the service did not stop"


StartService = Callable[..., httpx.Client]


@pytest.fixture
def start_service(dsn: str, clock: Clock) -> Iterator[StartService]:
    """Start services on the test's database; settings are given by name."""
    running: list[RunningService] = []

    def start(**settings: Any) -> httpx.Client:
        service = RunningService(create_app(Settings(**settings), dsn, clock=clock))
        client = service.__enter__()
        running.append(service)
        return client

    yield start
    for service in running:
        service.__exit__()


@pytest.fixture
def api(start_service: StartService) -> httpx.Client:
    """A client of a service with default settings."""
    return start_service()


@pytest.fixture
def shared_data() -> Path:
    """Real measurements beside the checkout, each with a SOURCE.txt."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            "real measurements (shared/data) are not here: the import of them is not proved"
        )
    return SHARED_DATA


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """`energy-platform up` in a process of its own, on a data folder of its own."""
    with Platform(tmp_path / "data") as running:
        yield running
