"""Connections, named queries, bounded retry, and the only border where SQLSTATEs become errors."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, LiteralString, TypeVar, cast

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import class_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from energy_platform.errors import OverloadedError, SetupError, StorageError, UnreachableError

Pool = AsyncConnectionPool[AsyncConnection[Any]]
T = TypeVar("T")
Row = TypeVar("Row")

CONNECT_SECONDS_MAX: Final = 5
READ_ATTEMPTS_MAX: Final = 3

_QUERY = re.compile(r"^-- name: (\w+)\n((?:--[^\n]*\n)*)(.*?)(?=^-- name: |\Z)", re.M | re.S)


def load_queries(path: Path) -> dict[str, LiteralString]:
    """The named queries of a .sql file: `-- name: verb_noun`, a description, the statement."""
    found = _QUERY.findall(path.read_text("utf-8"))
    return {name: cast(LiteralString, statement.strip()) for name, _, statement in found}


def complete_dsn(dsn: str, application_name: str, *, options: str = "") -> str:
    """Add what every connection of ours has: a name, a connect timeout, UTC; and more options."""
    given = conninfo_to_dict(dsn)
    defaults: dict[str, Any] = {
        "application_name": application_name,
        "connect_timeout": CONNECT_SECONDS_MAX,
        # Temporary tables come last, so that none can stand in front of ours.
        "options": f"-c timezone=UTC -c search_path=public,pg_temp {options}".rstrip(),
        # A server that vanishes without a word is noticed within half a minute.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 25_000,
    }
    return make_conninfo(dsn, **{k: v for k, v in defaults.items() if k not in given})


def open_pool(dsn: str, *, name: str, connections_max: int, waiting_max: int = 256) -> Pool:
    """A pool that is not yet connected; `async with` it. Connections are autocommit."""
    return AsyncConnectionPool(
        complete_dsn(dsn, f"energy-platform {name}"),
        min_size=1,
        max_size=connections_max,
        max_waiting=waiting_max,
        timeout=CONNECT_SECONDS_MAX,
        # Give up soon, so that the next query tries afresh: the pauses between tries grow and grow.
        reconnect_timeout=CONNECT_SECONDS_MAX,
        kwargs={"autocommit": True, "prepare_threshold": 0},
        name=name,
        open=False,
    )


def is_transient(error: psycopg.Error) -> bool:
    """Whether the same transaction may succeed when it is simply run again."""
    return error.sqlstate in ("40001", "40P01", "55P03")  # 55P03: a lock was not to be had in time


def is_unavailable(error: Exception) -> bool:
    """Whether the database is gone, starting, stopping or out of resources.

    Class 08 connection, 53 resources, 57P shutdown; a lost connection has no SQLSTATE at all.
    """
    if isinstance(error, PoolTimeout | PoolClosed | TimeoutError | ConnectionError):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return state.startswith(("08", "53", "57P", "58"))


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise StorageError where to ask again may help; leave every other error as it is."""
    try:
        yield
    except TooManyRequests as error:
        raise OverloadedError("Too many queries are waiting for the database.") from error
    except Exception as error:
        if is_unavailable(error):
            raise StorageError from error
        if isinstance(error, psycopg.Error) and is_transient(error):
            raise StorageError(
                "The database was busy with the same rows; nothing was changed, so ask again."
            ) from error
        raise


async def read(pool: Pool, query: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
    """Run a query that changes nothing, again on a fresh connection where one was lost."""
    with storage_errors():
        for attempt in range(READ_ATTEMPTS_MAX):
            try:
                async with pool.connection() as connection:
                    return await query(connection)
            except psycopg.Error as error:
                again = is_transient(error) or is_unavailable(error)
                if isinstance(error, PoolTimeout | TooManyRequests) or not again:
                    raise
                if attempt == READ_ATTEMPTS_MAX - 1:
                    raise
        raise AssertionError("the loop returns or raises")


async def fetch_rows(
    pool: Pool,
    query: Any,
    row_type: type[Row],
    parameters: Mapping[str, Any],
    *,
    keeps_plan: bool = False,
) -> list[Row]:
    """All rows of a query that changes nothing, each a `row_type` by the names of the columns.

    `keeps_plan` is for queries whose plan is the same whatever the parameters. Others are planned
    for theirs: a filter that is not asked for is one plan, and one that is is another.
    """

    async def fetch(connection: AsyncConnection[Any]) -> list[Row]:
        async with connection.cursor(row_factory=class_row(row_type)) as cursor:
            await cursor.execute(query, parameters, prepare=None if keeps_plan else False)
            return await cursor.fetchall()

    return await read(pool, fetch)


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[AsyncConnection[Any]]:
    """A connection in a transaction."""
    with storage_errors():
        async with pool.connection() as connection, connection.transaction():
            yield connection


def connect_now(dsn: str, application_name: str) -> psycopg.Connection[Any]:
    """A connection for the command line. Raises: UnreachableError."""
    try:
        return psycopg.connect(complete_dsn(dsn, application_name), autocommit=True)
    except psycopg.ProgrammingError as error:
        raise SetupError(f"This is no connection string: {str(error).strip()}.") from error
    except psycopg.OperationalError as error:
        raise UnreachableError(f"The database cannot be reached: {str(error).strip()}") from error
