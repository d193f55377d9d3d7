"""Which database a command works on: the server of ENERGY_DATABASE_URL, or the embedded engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from energy_platform.database import connect_now
from energy_platform.embedded import Engine, EngineError, running_dsn
from energy_platform.errors import SetupError, UnreachableError
from energy_platform.settings import DATABASE_NAME, Settings

_USERS = {"owner": "postgres", "ingest": "energy_ingest", "reader": "energy_reader"}


@contextlib.contextmanager
def open_engine(settings: Settings) -> Iterator[str]:
    """Start the embedded engine on its folder; yields the database's connection string.

    Raises: SetupError.
    """
    engine = Engine(Path(settings.data_dir), fsync=settings.embedded_fsync)
    try:
        engine.start()
    except EngineError as error:
        raise SetupError(str(error), code="engine") from error
    try:
        with connect_now(engine.dsn(), "energy-platform start") as connection:
            _create_database(connection)
        yield engine.dsn(database=DATABASE_NAME)
    finally:
        engine.stop()


def _create_database(connection: psycopg.Connection[Any]) -> None:
    known = connection.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE_NAME,))
    if known.fetchone() is None:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE_NAME)))


@contextlib.contextmanager
def open_database(settings: Settings, *, may_create: bool = True) -> Iterator[str]:
    """The connection string of the database at hand.

    The server where one is set, the engine that another process runs on the data folder, or else
    the engine, started for as long as this takes.

    Raises: SetupError; UnreachableError where the folder holds no database and none may be made.
    """
    if settings.database_url:
        yield settings.database_url
        return
    try:
        dsn = find_running(settings)
    except UnreachableError as error:
        if not may_create and not (Path(settings.data_dir) / "pgdata").is_dir():
            raise UnreachableError(f"There is no database in {settings.data_dir}.") from error
        with open_engine(settings) as dsn:
            yield dsn
        return
    yield dsn


def find_running(settings: Settings, role: str = "owner") -> str:
    """The connection string of the database that is running. Raises: UnreachableError."""
    if settings.database_url:
        if role == "owner":
            return settings.database_url
        parameters = conninfo_to_dict(settings.database_url)
        parameters.pop("password", None)  # it is the owner's
        return make_conninfo("", **{**parameters, "user": _USERS[role]})
    try:
        return running_dsn(Path(settings.data_dir), user=_USERS[role], database=DATABASE_NAME)
    except EngineError as error:
        raise UnreachableError(str(error)) from error
