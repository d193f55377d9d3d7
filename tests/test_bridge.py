"""Does one embedded engine behave, towards each of its clients, as a PostgreSQL server would?"""

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool

from energy_platform.embedded import Engine

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]

ENDLESS = "SELECT count(*) FROM generate_series(1, 1000000000)"
# Generous, for a loaded machine: a test waits so long only when it is about to fail.
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("bridge"), fsync=False) as engine:
        with psycopg.connect(engine.dsn(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE app")
        with psycopg.connect(engine.dsn(database="app"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION timescaledb")
        yield engine


@pytest.fixture
def connect(engine: Engine) -> Iterator[Connect]:
    """Opens autocommit connections to the database `app`, and closes them after the test."""
    opened: list[Connection] = []

    def connect(database: str = "app", user: str = "postgres", **options: Any) -> Connection:
        dsn = engine.dsn(user=user, database=database)
        connection = psycopg.connect(dsn, **{"autocommit": True, **options})
        opened.append(connection)
        return connection

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def table(connect: Connect) -> str:
    """An empty table `t (id, v)`."""
    connection = connect()
    connection.execute("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, v text)")
    return "t"


@pytest.fixture
def reader(connect: Connect, table: str) -> str:
    """A role that may read the table, and nothing else."""
    connection = connect()
    with contextlib.suppress(errors.DuplicateObject):
        connection.execute("CREATE ROLE reader LOGIN")
    connection.execute("GRANT SELECT ON t TO reader")
    return "reader"


def value(connection: Connection, query: LiteralString, *parameters: Any) -> Any:
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return row[0]


def vanish(connection: Connection) -> None:
    """Cuts the connection under the client, as a crash of the client would."""
    with socket.socket(fileno=os.dup(connection.fileno())) as raw:
        raw.shutdown(socket.SHUT_RDWR)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def finish(thread: threading.Thread) -> None:
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


class RawClient:
    """A client that can send what no library would."""

    def __init__(self, dsn: str) -> None:
        parameters = conninfo_to_dict(dsn)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(f"{parameters['host']}/.s.PGSQL.{parameters['port']}")

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, *, in_pieces_of: int | None = None) -> None:
        size = in_pieces_of or len(data)
        for start in range(0, len(data), size):
            self.socket.sendall(data[start : start + size])

    def receive_until(self, ending: bytes, *, times: int = 1) -> bytes:
        received = b""
        while not (received.endswith(ending) and received.count(ending) >= times):
            piece = self.socket.recv(65536)
            assert piece, f"connection closed after {received!r}"
            received += piece
        return received

    def receive_rest(self) -> bytes:
        return b"".join(iter(lambda: self.socket.recv(65536), b""))

    def start(self, **parameters: str) -> bytes:
        self.send(startup_message(parameters))
        return self.receive_until(READY)


READY = b"Z\0\0\0\x05I"


def startup_message(parameters: dict[str, str], version: int = 196608) -> bytes:
    pairs = "".join(f"{name}\0{text}\0" for name, text in parameters.items()).encode()
    body = struct.pack(">i", version) + pairs + b"\0"
    return struct.pack(">i", len(body) + 4) + body


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack(">i", len(body) + 4) + body


# ---- starting


def test_encryption_is_declined_and_bytes_may_come_one_at_a_time(engine: Engine) -> None:
    with RawClient(engine.dsn()) as client:
        for request in (80877104, 80877103):  # GSSAPI, TLS
            client.send(struct.pack(">ii", 8, request))
            assert client.socket.recv(1) == b"N"
        client.send(startup_message({"user": "postgres", "database": "app"}), in_pieces_of=1)
        client.receive_until(READY)
        client.send(message(b"Q", b"SELECT 6 * 7\0"), in_pieces_of=1)
        assert b"42" in client.receive_until(READY)


def test_a_newer_protocol_version_is_negotiated_down(engine: Engine) -> None:
    with RawClient(engine.dsn()) as client:
        parameters = {"user": "postgres", "_pq_.unknown": "1"}
        client.send(startup_message(parameters, version=196610))
        answer = client.receive_until(READY)
        assert answer.startswith(b"v")
        assert b"_pq_.unknown\0" in answer


@pytest.mark.parametrize(
    ("parameters", "message_part"),
    [
        ({"dbname": "nowhere"}, 'database "nowhere" does not exist'),
        ({"user": "nobody"}, 'role "nobody" does not exist'),
        ({"user": "pg_monitor"}, 'role "pg_monitor" is not permitted to log in'),
        ({"dbname": "template0"}, "not currently accepting connections"),
        ({"options": "-c no_such_setting=1"}, "unrecognized configuration parameter"),
        ({"options": "-c work_mem=plenty"}, "invalid value for parameter"),
        ({"options": "nonsense"}, "invalid command-line argument"),
        ({"replication": "database"}, "replication is not supported"),
        ({"client_encoding": "latin1"}, 'client encoding "latin1" is not supported'),
    ],
)
def test_a_wrong_start_is_refused_with_the_reason(
    engine: Engine, parameters: dict[str, str], message_part: str
) -> None:
    with pytest.raises(psycopg.OperationalError, match=message_part):
        psycopg.connect(make_conninfo(engine.dsn(), **parameters))


def test_a_missing_database_is_named_by_its_sqlstate(engine: Engine) -> None:
    with RawClient(engine.dsn()) as client:
        client.send(startup_message({"user": "postgres", "database": "nowhere"}))
        assert b"C3D000\0" in client.receive_rest()


def test_startup_options_become_the_settings_of_the_session(connect: Connect) -> None:
    connection = connect(
        options=r"-c search_path=a,\ b -c statement_timeout=30s --timezone=Europe/Berlin",
        application_name="billing",
    )
    assert value(connection, "SHOW search_path") == "a, b"
    assert value(connection, "SHOW statement_timeout") == "30s"
    assert value(connection, "SHOW application_name") == "billing"
    noon = value(connection, "SELECT timestamptz '2026-01-01 12:00+00'")
    assert noon.isoformat() == "2026-01-01T13:00:00+01:00"


def test_settings_of_role_and_database_apply(connect: Connect, reader: str) -> None:
    owner = connect()
    owner.execute("ALTER ROLE reader SET work_mem = '7MB'")
    owner.execute("ALTER ROLE reader IN DATABASE app SET DateStyle = 'German'")
    session = connect(user=reader)
    assert value(session, "SHOW work_mem") == "7MB"
    assert session.info.parameter_status("DateStyle") == "German, DMY"
    owner.execute("ALTER ROLE reader RESET ALL; ALTER ROLE reader IN DATABASE app RESET ALL")
    assert value(connect(user=reader), "SHOW work_mem") == "4MB"


def test_connecting_does_not_wait_for_an_open_transaction(connect: Connect, table: str) -> None:
    writer = connect(autocommit=False)
    writer.execute("INSERT INTO t VALUES (1)")
    for options in ("", "-c work_mem=5MB", "-c no_such_setting=1"):
        assert connect(options=options).info.transaction_status is TransactionStatus.IDLE
    late = connect(options="-c work_mem=6MB")
    refused = connect(options="-c no_such_setting=2")
    writer.rollback()
    assert value(late, "SHOW work_mem") == "6MB"
    with pytest.raises(psycopg.Error, match="unrecognized configuration parameter"):
        refused.execute("SELECT 1")


def test_a_server_without_its_command_line_is_what_sessions_see(connect: Connect) -> None:
    connection = connect()
    shown = {
        name: value(connection, "SELECT current_setting(%s)", name)
        for name in ("search_path", "enable_seqscan", "allow_system_table_mods", "fsync")
    }
    assert shown == {
        "search_path": '"$user", public',
        "enable_seqscan": "on",
        "allow_system_table_mods": "off",
        "fsync": "on",
    }


# ---- malformed input


def parse(name: bytes = b"", query: bytes = b"SELECT $1", tail: bytes = b"\0\0") -> bytes:
    return message(b"P", name + b"\0" + query + b"\0" + tail)


def bind(tail: bytes) -> bytes:
    return message(b"B", b"\0\0" + tail)


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\xff" * 6, id="no such message"),
        pytest.param(b"Q\x7f\xff\xff\xff", id="length too large"),
        pytest.param(b"S" + struct.pack(">i", 20_000), id="length too large for its kind"),
        pytest.param(b"Q" + struct.pack(">i", 3), id="length too small"),
        pytest.param(b"Q" + struct.pack(">i", -5), id="length negative"),
        pytest.param(message(b"Q", b"SELECT 1"), id="query without an end"),
        pytest.param(message(b"Q", b"SELECT 1\0more\0"), id="query with a rest"),
        pytest.param(message(b"P", b"name only\0"), id="parse without a query"),
        pytest.param(parse(tail=b"\0\x02\0\0\0\x17"), id="parse with a type missing"),
        pytest.param(parse(tail=b""), id="parse without a count"),
        pytest.param(parse() + bind(b"\0\0\0\x01\0\0\0\x64x"), id="bind value too short"),
        pytest.param(parse() + bind(b"\0\0\0\x01\xff\xff\xff\xfe\0\0"), id="bind length -2"),
        pytest.param(parse() + bind(b"\0\0\x7f\xff"), id="bind with values missing"),
        pytest.param(parse() + bind(b"\0\x01\0\x07\0\0\0\0"), id="bind with an unknown format"),
        pytest.param(parse() + bind(b"\0\x02\0\0\0\0\0\0\0\0"), id="bind with too many formats"),
        pytest.param(parse() + bind(b"\0\0\0\0\0\0\0"), id="bind with a rest"),
        pytest.param(message(b"D", b"X\0"), id="describe of what"),
        pytest.param(message(b"C", b""), id="close of nothing"),
        pytest.param(message(b"E", b"portal\0\0"), id="execute without a limit"),
        pytest.param(message(b"F", b"\0\0\0\x01\0\0\0\x01"), id="function call cut short"),
        pytest.param(message(b"S", b"x"), id="sync with a body"),
        pytest.param(message(b"p", b"password\0"), id="password not asked for"),
    ],
)
def test_a_malformed_message_ends_its_session_and_no_other(
    engine: Engine, connect: Connect, garbage: bytes
) -> None:
    bystander = connect()
    assert value(bystander, "SELECT 1") == 1
    boots = engine.statistics()["boots"]
    with RawClient(engine.dsn(database="app")) as client:
        client.start(user="postgres", database="app")
        client.send(garbage + message(b"S"))
        answer = client.receive_rest()
    assert b"SFATAL\0" in answer
    assert b"C08P01\0" in answer
    assert value(bystander, "SELECT 2") == 2
    assert engine.statistics()["boots"] == boots


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\0\0\x04",
        b"\x7f\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        startup_message({})[:-1] + b"x",
    ],
)
def test_a_malformed_start_is_refused(engine: Engine, garbage: bytes) -> None:
    with RawClient(engine.dsn()) as client:
        client.send(garbage)
        assert b"SFATAL\0" in client.receive_rest()


def test_what_nests_too_deep_ends_one_session_and_damages_nothing(
    engine: Engine, connect: Connect, table: str
) -> None:
    bystander = connect()
    bystander.execute("INSERT INTO t VALUES (1, 'kept')")
    with pytest.raises(psycopg.OperationalError, match="the database engine ended"):
        connect().execute("SELECT " + "1+" * 200_000 + "1")
    assert value(bystander, "SELECT v FROM t") == "kept"
    # What a server of ordinary size can do, the engine can do too.
    assert value(bystander, "SELECT " + "abs(" * 2000 + "1" + ")" * 2000) == 1


# ---- transactions


def test_a_transaction_keeps_the_engine_until_it_ends(connect: Connect, table: str) -> None:
    first, second = connect(autocommit=False), connect()
    first.execute("INSERT INTO t VALUES (1)")
    seen: list[int] = []
    waiting = in_background(lambda: seen.append(value(second, "SELECT count(*) FROM t")))
    waiting.join(0.3)
    assert seen == []
    first.rollback()
    finish(waiting)
    assert seen == [0]


def test_read_modify_write_from_many_tasks_loses_no_update(engine: Engine, table: str) -> None:
    async def add_one(pool: AsyncConnectionPool, step: int) -> None:
        async with pool.connection() as connection, connection.transaction():
            cursor = await connection.execute("SELECT v::int FROM t WHERE id = 1 FOR UPDATE")
            row = await cursor.fetchone()
            assert row is not None
            if step % 5 == 0:
                await asyncio.sleep(0.001)
            await connection.execute("UPDATE t SET v = %s WHERE id = 1", (str(row[0] + 1),))

    async def run() -> str:
        dsn = engine.dsn(database="app")
        async with AsyncConnectionPool(dsn, min_size=8, max_size=8, open=False) as pool:
            await pool.wait()
            async with pool.connection() as connection:
                await connection.execute("INSERT INTO t VALUES (1, '0')")
            await asyncio.gather(*(add_one(pool, step) for step in range(200)))
            async with pool.connection() as connection:
                row = await (await connection.execute("SELECT v FROM t")).fetchone()
                assert row is not None
                return str(row[0])

    assert asyncio.run(run()) == "200"


def test_an_error_aborts_the_transaction_until_rollback(connect: Connect, table: str) -> None:
    connection = connect(autocommit=False)
    connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(errors.DivisionByZero):
        connection.execute("SELECT 1 / 0")
    with pytest.raises(errors.InFailedSqlTransaction):
        connection.execute("SELECT 1")
    connection.rollback()
    assert value(connection, "SELECT count(*) FROM t") == 0


def test_a_client_that_vanishes_in_a_transaction_is_rolled_back(
    connect: Connect, table: str
) -> None:
    lost, other = connect(autocommit=False), connect()
    lost.execute("INSERT INTO t VALUES (1)")
    lost.execute("SET LOCAL search_path = pg_catalog")
    vanish(lost)
    assert value(other, "SELECT count(*) FROM t") == 0
    assert value(other, "SHOW search_path") == '"$user", public'


def test_an_idle_transaction_is_ended_so_that_others_proceed(connect: Connect, table: str) -> None:
    idle, other = connect(autocommit=False), connect()
    idle.execute("SET idle_in_transaction_session_timeout = '200ms'")
    idle.commit()
    idle.execute("INSERT INTO t VALUES (1)")
    assert value(other, "SELECT count(*) FROM t") == 0
    with pytest.raises(errors.IdleInTransactionSessionTimeout):
        idle.execute("SELECT 1")


def test_savepoints_and_isolation_levels_work(connect: Connect, table: str) -> None:
    connection = connect()
    with connection.transaction():
        connection.execute("SET LOCAL TimeZone = 'Asia/Kolkata'")
        connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        connection.execute("INSERT INTO t VALUES (1)")
        with contextlib.suppress(errors.UniqueViolation), connection.transaction():
            connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO t VALUES (2)")
    assert value(connection, "SELECT count(*) FROM t") == 2


# ---- prepared statements and pipelines


def test_the_same_statement_name_in_two_sessions_is_two_statements(engine: Engine) -> None:
    def define(number: bytes) -> bytes:
        return message(b"P", b"same\0SELECT " + number + b"\0\0\0") + message(b"S")

    run = message(b"B", b"\0same\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0") + message(b"S")
    with RawClient(engine.dsn()) as first, RawClient(engine.dsn()) as second:
        for client, number in ((first, b"1111"), (second, b"2222")):
            client.start(user="postgres", database="app")
            client.send(define(number))
            client.receive_until(READY)
        for client, number in ((first, b"1111"), (second, b"2222"), (first, b"1111")):
            client.send(run)
            assert number in client.receive_until(READY)
        first.send(define(b"3333"))
        assert b"C42P05\0" in first.receive_until(READY)
        first.send(message(b"C", b"Ssame\0") + define(b"4444") + run)
        assert b"4444" in first.receive_until(READY, times=2)


def test_closing_a_portal_is_not_taken_for_another_answer(engine: Engine) -> None:
    close_portal = message(b"C", b"Pno such portal\0")
    define = message(b"P", b"named\0SELECT 4321\0\0\0")
    run = message(b"B", b"\0named\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0")
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(close_portal + define + message(b"S"))
        client.receive_until(READY)
        client.send(run + close_portal + message(b"S"))
        assert b"4321" in client.receive_until(READY)


def test_the_unnamed_statement_survives_the_turns_of_others(
    engine: Engine, connect: Connect
) -> None:
    other = connect()
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(message(b"P", b"\0SELECT 1234\0\0\0") + message(b"S"))
        client.receive_until(READY)
        assert value(other, "SELECT 1") == 1
        other.execute("SELECT %s::int", (5,))
        client.send(
            message(b"B", b"\0\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0") + message(b"S")
        )
        assert b"1234" in client.receive_until(READY)


@pytest.mark.parametrize("command", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_forgetting_all_statements_forgets_those_of_one_session(
    connect: Connect, command: LiteralString
) -> None:
    first, second = connect(), connect()
    for connection in (first, second):
        for number in range(3):
            assert value(connection, "SELECT %s::int + 1", number) == number + 1
            connection.execute("SELECT %s::int", (number,), prepare=True)
    first.execute(command)
    assert first.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
    second.execute("SELECT %s::int", (7,), prepare=True)
    assert first.execute("SELECT %s::text", ("again",), prepare=True).fetchone() == ("again",)
    assert second.execute("SELECT %s::int", (8,), prepare=True).fetchone() == (8,)


def test_statements_that_the_client_evicts_are_closed(connect: Connect) -> None:
    connection = connect()
    connection.prepared_max = 3
    for number in range(20):
        query = sql.SQL("SELECT %s::int + {}").format(number)
        assert connection.execute(query, (1,), prepare=True).fetchone() == (number + 1,)
    assert value(connection, "SELECT count(*) FROM pg_prepared_statements") <= 4


def test_deallocate_finds_the_sessions_own_statement(engine: Engine, connect: Connect) -> None:
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(message(b"P", b'my "own"\0SELECT 1\0\0\0') + message(b"S"))
        client.receive_until(READY)
        deallocate = message(b"Q", b'SELECT 2; DEALLOCATE PREPARE "my ""own""" /* done */;\0')
        client.send(deallocate)
        assert b"CDEALLOCATE\0" in client.receive_until(READY)[:-6].replace(b"\0\0\0\x0f", b"")
        client.send(deallocate)
        assert b"C26000\0" in client.receive_until(READY)


def test_statements_of_sql_are_reachable_by_the_protocol(connect: Connect) -> None:
    connection = connect()
    connection.execute("PREPARE by_sql AS SELECT 17")
    assert connection.pgconn.exec_prepared(b"by_sql", []).get_value(0, 0) == b"17"
    connection.execute("DEALLOCATE by_sql")


def test_a_pipeline_answers_in_order(connect: Connect) -> None:
    connection = connect()
    with connection.pipeline():
        cursors = [connection.execute("SELECT %s::int", (number,)) for number in range(300)]
        assert [cursor.fetchone() for cursor in cursors] == [(number,) for number in range(300)]


def test_an_error_in_a_pipeline_skips_to_the_next_sync(connect: Connect, table: str) -> None:
    connection = connect()

    def run_pipeline() -> None:
        with connection.pipeline() as pipeline:
            connection.execute("INSERT INTO t VALUES (1)")
            pipeline.sync()
            connection.execute("INSERT INTO t VALUES (2)")
            connection.execute("INSERT INTO t VALUES (1)")
            connection.execute("INSERT INTO t VALUES (3)")
            pipeline.sync()

    with pytest.raises(errors.UniqueViolation):
        run_pipeline()
    connection.execute("INSERT INTO t VALUES (4)")
    assert connection.execute("SELECT id FROM t ORDER BY id").fetchall() == [(1,), (4,)]


def test_a_flush_with_nothing_to_flush_keeps_nobody_waiting(
    engine: Engine, connect: Connect
) -> None:
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(parse(query=b"SELECT 1", tail=b"\0\0") + message(b"S") + message(b"H"))
        client.receive_until(READY)
        assert value(connect(), "SELECT 1") == 1


def test_a_long_pipeline_is_larger_than_any_buffer(connect: Connect, table: str) -> None:
    connection = connect()
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO t VALUES (%s, %s)", [(number, "x" * 2000) for number in range(3000)]
        )
    assert value(connection, "SELECT sum(length(v)) FROM t") == 6_000_000


# ---- COPY


def test_copy_in_and_out_as_text_and_binary(connect: Connect, table: str) -> None:
    connection = connect()
    rows = [(number, f"text {number}\t\\ ä") for number in range(20_000)]
    with connection.cursor() as cursor:
        with cursor.copy("COPY t FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        with cursor.copy("COPY (SELECT * FROM t ORDER BY id) TO STDOUT") as copy:
            copy.set_types(["int4", "text"])
            assert list(copy.rows()) == rows
        cursor.execute("TRUNCATE t")
        with cursor.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for row in rows:
                copy.write_row(row)
        with cursor.copy("COPY (SELECT * FROM t ORDER BY id) TO STDOUT (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            assert list(copy.rows()) == rows


def test_bad_copy_data_is_an_error_and_the_session_goes_on(connect: Connect, table: str) -> None:
    connection = connect(autocommit=False)

    def copy_badly() -> None:
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            copy.write("not a number\tx\n")
            for number in range(50_000):
                copy.write_row((number, "y"))

    with pytest.raises(errors.InvalidTextRepresentation):
        copy_badly()
    connection.rollback()
    assert value(connection, "SELECT count(*) FROM t") == 0


def test_a_copy_that_the_client_gives_up_stores_nothing(connect: Connect, table: str) -> None:
    connection = connect()

    def give_up() -> None:
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            copy.write_row((1, "x"))
            raise ValueError("changed my mind")

    with pytest.raises(ValueError, match="changed my mind"):
        give_up()
    assert value(connection, "SELECT count(*) FROM t") == 0


def test_a_client_that_vanishes_in_a_copy_stores_nothing(
    engine: Engine, connect: Connect, table: str
) -> None:
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(message(b"Q", b"COPY t FROM STDIN\0"))
        client.receive_until(b"G\0\0\0\x0b\0\0\x02\0\0\0\0")
        client.send(message(b"d", b"1\tx\n"))
    assert value(connect(), "SELECT count(*) FROM t") == 0


def test_another_message_in_a_copy_ends_the_session(
    engine: Engine, connect: Connect, table: str
) -> None:
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(message(b"Q", b"COPY t FROM STDIN\0") + message(b"d", b"1\tx\n"))
        client.send(message(b"Q", b"SELECT 1\0"))
        assert b"C08P01\0" in client.receive_rest()
    assert value(connect(), "SELECT count(*) FROM t") == 0


def test_copy_messages_outside_of_a_copy_are_ignored(engine: Engine) -> None:
    with RawClient(engine.dsn()) as client:
        client.start(user="postgres", database="app")
        client.send(message(b"d", b"stray") + message(b"c") + message(b"Q", b"SELECT 99\0"))
        assert b"99" in client.receive_until(READY)


# ---- settings


def test_settings_belong_to_the_session_that_made_them(connect: Connect) -> None:
    first, second = connect(), connect()
    first.execute("SET search_path TO pg_catalog")
    first.execute("SET TimeZone TO 'Asia/Kolkata'")
    first.execute("SET work_mem = '9MB'")
    first.execute("SELECT set_config('app.tenant', '7', false)")
    first.execute("SELECT set_config(%s, %s, false)", ("app.second", "8"))
    assert value(second, "SHOW search_path") == '"$user", public'
    assert value(second, "SHOW work_mem") == "4MB"
    assert value(second, "SELECT current_setting('app.tenant', true)") in (None, "")
    assert value(first, "SHOW search_path") == "pg_catalog"
    assert value(first, "SHOW work_mem") == "9MB"
    assert value(first, "SELECT current_setting('app.tenant')") == "7"
    assert value(first, "SELECT current_setting('app.second')") == "8"


def test_the_client_is_told_of_the_settings_it_decodes_by(connect: Connect) -> None:
    first, second = connect(), connect()
    first.execute("SET TimeZone TO 'Asia/Kolkata'")
    assert first.info.parameter_status("TimeZone") == "Asia/Kolkata"
    assert second.info.parameter_status("TimeZone") == "UTC"
    moment = "SELECT timestamptz '2026-01-01 00:00+00'"
    assert value(first, moment).isoformat() == "2026-01-01T05:30:00+05:30"
    with first.transaction():
        first.execute("SET LOCAL TimeZone TO 'Europe/Berlin'")
        assert value(first, moment).isoformat() == "2026-01-01T01:00:00+01:00"
    assert value(first, moment).isoformat() == "2026-01-01T05:30:00+05:30"
    first.execute("BEGIN")
    first.execute("SET TimeZone TO 'Europe/Berlin'")
    assert first.info.parameter_status("TimeZone") == "Europe/Berlin"
    first.execute("ROLLBACK")
    assert first.info.parameter_status("TimeZone") == "Asia/Kolkata"
    first.execute("RESET TimeZone")
    assert first.info.parameter_status("TimeZone") == "UTC"


def test_local_settings_end_with_their_transaction(connect: Connect) -> None:
    connection, other = connect(), connect()
    connection.execute("SET work_mem = '9MB'")
    with connection.transaction():
        connection.execute("SET LOCAL work_mem = '20MB'")
        assert value(connection, "SHOW work_mem") == "20MB"
    assert value(other, "SHOW work_mem") == "4MB"
    assert value(connection, "SHOW work_mem") == "9MB"


@pytest.mark.parametrize("command", ["RESET ALL", "DISCARD ALL", "RESET search_path"])
def test_a_reset_goes_back_to_how_the_session_started(
    connect: Connect, command: LiteralString
) -> None:
    connection = connect(options="-c search_path=here")
    connection.execute("SET search_path = there")
    connection.execute(command)
    assert value(connection, "SHOW search_path") == "here"
    assert value(connection, "SHOW enable_seqscan") == "on"
    assert value(connect(), "SHOW search_path") == '"$user", public'


def test_settings_changed_in_a_block_are_followed(connect: Connect) -> None:
    first, second = connect(), connect()
    first.execute("DO $$ BEGIN SET search_path = pg_catalog; END $$")
    assert value(second, "SHOW search_path") == '"$user", public'
    assert value(first, "SHOW search_path") == "pg_catalog"


# ---- roles


def test_grants_bite(connect: Connect, reader: str) -> None:
    session = connect(user=reader)
    assert session.execute("SELECT current_user, session_user").fetchone() == (reader, reader)
    assert session.info.parameter_status("is_superuser") == "off"
    assert value(session, "SELECT count(*) FROM t") == 0
    for statement in ("INSERT INTO t VALUES (1)", "DROP TABLE t", "CREATE ROLE other"):
        with pytest.raises(errors.InsufficientPrivilege):
            session.execute(statement)
    assert value(connect(), "SELECT current_user") == "postgres"


@pytest.mark.parametrize(
    "attempt",
    [
        "SET SESSION AUTHORIZATION postgres",
        "set session session authorization 'postgres'",
        "SET session_authorization = postgres",
        "SELECT set_config('session_authorization', 'postgres', false)",
        "SELECT 1; SET SESSION AUTHORIZATION postgres",
    ],
)
def test_a_role_does_not_become_another(
    connect: Connect, reader: str, attempt: LiteralString
) -> None:
    session = connect(user=reader)
    with pytest.raises(errors.InsufficientPrivilege):
        session.execute(attempt)
    assert value(session, "SELECT current_user") == reader


@pytest.mark.parametrize(
    "statement", ["RESET SESSION AUTHORIZATION", "SET SESSION AUTHORIZATION DEFAULT", "RESET ROLE"]
)
def test_a_role_may_go_back_to_itself(
    connect: Connect, reader: str, statement: LiteralString
) -> None:
    session = connect(user=reader)
    session.execute(statement)
    assert value(session, "SELECT current_user") == reader


def test_a_session_that_escapes_from_its_role_in_a_block_is_ended(
    connect: Connect, reader: str
) -> None:
    session = connect(user=reader)
    with contextlib.suppress(psycopg.Error):
        session.execute("DO $$ BEGIN EXECUTE 'SET session authorization postgres'; END $$")
        assert value(session, "SELECT current_user") == reader
    assert value(connect(user=reader), "SELECT current_user") == reader
    assert value(connect(), "SELECT current_user") == "postgres"


def test_settings_of_superusers_are_refused_to_others(engine: Engine, reader: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="permission denied to set parameter"):
        psycopg.connect(
            engine.dsn(user=reader, database="app"), options="-c allow_system_table_mods=on"
        )


def test_set_role_lasts_while_others_take_their_turns(connect: Connect, reader: str) -> None:
    owner, other = connect(), connect()
    owner.execute("SET ROLE reader")
    assert value(other, "SELECT current_user") == "postgres"
    assert owner.execute("SELECT current_user, session_user").fetchone() == (reader, "postgres")
    owner.execute("SET SESSION AUTHORIZATION reader")
    assert value(other, "SELECT session_user") == "postgres"
    assert value(owner, "SELECT session_user") == reader
    owner.execute("RESET SESSION AUTHORIZATION")
    assert value(owner, "SELECT session_user") == "postgres"


def test_a_role_can_connect_as_soon_as_it_is_made(connect: Connect) -> None:
    owner = connect()
    with owner.transaction():
        owner.execute("DO $$ BEGIN CREATE ROLE fresh LOGIN; END $$")
    assert value(connect(user="fresh"), "SELECT current_user") == "fresh"
    owner.execute("DROP ROLE fresh")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connect(user="fresh")


# ---- interruption


def test_a_cancelled_statement_fails_and_other_sessions_keep_their_state(
    engine: Engine, connect: Connect, table: str
) -> None:
    bystander, victim = connect(), connect()
    bystander.execute("SET search_path TO pg_catalog, public")
    bystander.execute("SELECT %s::int", (1,), prepare=True)
    victim.execute("INSERT INTO t VALUES (1)")
    running = in_background(lambda: expect_cancelled(victim, ENDLESS))
    cancel_until_done(victim, running)
    assert value(victim, "SELECT count(*) FROM t") == 1
    assert value(bystander, "SHOW search_path") == "pg_catalog, public"
    assert bystander.execute("SELECT %s::int", (2,), prepare=True).fetchone() == (2,)


def expect_cancelled(connection: Connection, statement: LiteralString) -> None:
    with pytest.raises(errors.QueryCanceled):
        connection.execute(statement)


def cancel_until_done(connection: Connection, running: threading.Thread) -> None:
    """Cancels again and again: a cancel that comes before the statement is void, as in a server."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running.is_alive() and time.monotonic() < deadline:
        connection.cancel_safe(timeout=5)
        running.join(0.2)
    assert not running.is_alive()


def test_what_follows_a_cancelled_statement_in_its_transaction_fails(
    connect: Connect, table: str
) -> None:
    connection = connect()
    connection.execute("SET statement_timeout = '200ms'")
    connection.execute("BEGIN")
    connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(errors.QueryCanceled, match="statement timeout"):
        connection.execute(ENDLESS)
    with pytest.raises(errors.InFailedSqlTransaction):
        connection.execute("INSERT INTO t VALUES (2)")
    connection.execute("ROLLBACK")
    assert value(connection, "SHOW statement_timeout") == "200ms"
    assert value(connection, "SELECT count(*) FROM t") == 0


def test_a_timeout_in_a_pipeline_skips_to_the_next_sync(connect: Connect, table: str) -> None:
    connection = connect()
    connection.execute("SET statement_timeout = '200ms'")

    def run_pipeline() -> None:
        with connection.pipeline() as pipeline:
            connection.execute("INSERT INTO t VALUES (1)")
            connection.execute(ENDLESS)
            connection.execute("INSERT INTO t VALUES (2)")
            pipeline.sync()

    with pytest.raises(errors.QueryCanceled):
        run_pipeline()
    connection.execute("INSERT INTO t VALUES (3)")
    assert connection.execute("SELECT id FROM t").fetchall() == [(3,)]


def test_a_timeout_in_the_middle_of_an_answer_is_no_answer(connect: Connect) -> None:
    connection, bystander = connect(), connect()
    connection.execute("SET statement_timeout = '300ms'")
    # The last row may have been sent in part: then the connection cannot be saved.
    with pytest.raises((errors.QueryCanceled, psycopg.OperationalError)):
        connection.execute("SELECT repeat('x', 100000) FROM generate_series(1, 1000000)")
    assert value(bystander, "SELECT 1") == 1


def test_a_local_timeout_holds_in_its_transaction_only(connect: Connect) -> None:
    connection = connect()
    connection.execute("BEGIN")
    connection.execute("SET LOCAL statement_timeout = '100ms'")
    expect_cancelled(connection, ENDLESS)
    connection.execute("ROLLBACK")
    assert value(connection, "SELECT count(*) FROM generate_series(1, 3000000)") == 3_000_000


def test_a_copy_that_waits_for_its_client_can_be_cancelled(engine: Engine, table: str) -> None:
    with RawClient(engine.dsn()) as client, RawClient(engine.dsn()) as canceller:
        answer = client.start(user="postgres", database="app")
        key = answer[answer.index(b"K\0\0\0\x0c") + 5 :][:8]
        client.send(message(b"Q", b"COPY t FROM STDIN\0"))
        client.receive_until(b"G\0\0\0\x0b\0\0\x02\0\0\0\0")
        canceller.send(struct.pack(">ii", 16, 80877102) + key)
        assert b"C57014\0" in client.receive_until(READY)


def test_a_statement_that_waits_for_its_turn_can_be_cancelled(connect: Connect, table: str) -> None:
    holder, waiter = connect(autocommit=False), connect()
    holder.execute("INSERT INTO t VALUES (1)")
    waiting = in_background(lambda: expect_cancelled(waiter, "SELECT count(*) FROM t"))
    cancel_until_done(waiter, waiting)
    holder.commit()
    assert value(waiter, "SELECT count(*) FROM t") == 1


# ---- sizes


def test_large_values_pass_in_both_directions(connect: Connect) -> None:
    connection = connect()
    assert len(value(connection, "SELECT repeat('x', 50000000)")) == 50_000_000
    assert value(connection, "SELECT length(%s)", "y" * 20_000_000) == 20_000_000


def test_a_server_side_cursor_reads_in_portions(connect: Connect) -> None:
    connection = connect(autocommit=False)
    with connection.cursor("portions") as cursor:
        cursor.itersize = 1000
        cursor.execute("SELECT generate_series(1, 20000)")
        assert sum(row[0] for row in cursor) == 200_010_000


def test_a_client_that_reads_slowly_slows_the_engine_down(connect: Connect) -> None:
    connection = connect()
    with connection.cursor().copy(
        "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 60000)) TO STDOUT"
    ) as copy:
        time.sleep(0.2)
        assert sum(len(data) for data in copy) == 60_000 * 1001


def test_memory_that_one_statement_needed_is_given_back(engine: Engine, connect: Connect) -> None:
    connection = connect()
    assert value(connection, "SELECT length(repeat('x', 500000000) || 'y')") == 500_000_001
    deadline = time.monotonic() + PATIENCE_SECONDS
    while engine.statistics()["heap_bytes"] > 1 << 30:
        assert time.monotonic() < deadline
        connection.execute("SELECT 1")
        time.sleep(0.1)


# ---- databases


def test_databases_are_cloned_and_dropped(connect: Connect, table: str) -> None:
    owner = connect("postgres")
    connect().execute("INSERT INTO t VALUES (1, 'cloned')")
    owner.execute("CREATE DATABASE clone TEMPLATE app")
    clone = connect("clone")
    assert value(clone, "SELECT v FROM t") == "cloned"
    assert value(connect(), "SELECT current_database()") == "app"
    with pytest.raises(errors.ObjectInUse, match="being accessed by other users"):
        owner.execute("DROP DATABASE clone")
    owner.execute('DROP DATABASE IF EXISTS "clone" WITH (FORCE)')
    with pytest.raises(psycopg.OperationalError):
        clone.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connect("clone")


def test_two_databases_are_served_in_turns(connect: Connect) -> None:
    first, second = connect("app"), connect("postgres")
    first.execute("SET work_mem = '11MB'")
    for _ in range(2):
        assert value(first, "SELECT current_database()") == "app"
        assert value(second, "SELECT current_database()") == "postgres"
    assert value(first, "SHOW work_mem") == "11MB"


# ---- what is not there


def test_listening_is_refused_in_so_many_words(connect: Connect, table: str) -> None:
    connection = connect()
    with pytest.raises(errors.FeatureNotSupported, match="LISTEN is not supported"):
        connection.execute("LISTEN news")
    connection.execute("NOTIFY news")
    assert value(connection, "SELECT 1") == 1


def test_other_encodings_are_refused_before_they_do_harm(connect: Connect) -> None:
    connection = connect()
    for statement in ("SET client_encoding TO latin1", "SET NAMES 'latin1'"):
        with pytest.raises(errors.FeatureNotSupported, match="client encoding"):
            connection.execute(statement)
    connection.execute("SET client_encoding TO 'UTF-8'")
    assert value(connection, "SELECT 'ä' || %s", "ö") == "äö"


# ---- other clients


def test_psql_works(engine: Engine, table: str) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("psql is not installed: that it works with the engine is not proved")
    script = "\\copy t FROM STDIN\n1\tone\n\\.\n\\d t\nSELECT v FROM t;\n"
    command = [psql, engine.dsn(database="app"), "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"t_pkey" PRIMARY KEY' in done.stdout
    assert "one" in done.stdout


def test_yoyo_applies_and_rolls_back_migrations(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "0001_things.sql").write_text("CREATE TABLE things (id int);")
    (tmp_path / "0001_things.rollback.sql").write_text("DROP TABLE things;")
    (tmp_path / "0002_index.sql").write_text(
        "-- depends: 0001_things\n-- transactional: false\nCREATE INDEX ON things (id);"
    )
    parameters = conninfo_to_dict(engine.dsn())
    uri = f"postgresql+psycopg://postgres@/app?host={parameters['host']}&port={parameters['port']}"
    for command in ("apply", "apply", "rollback"):
        options = ["--batch", "--no-config-file", "--database", uri]
        done = subprocess.run(
            [sys.executable, "-m", "yoyo", command, *options, str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


TESTS_OF_A_USER = """
import psycopg
import pytest
from pytest_postgresql import factories


def load(**connection):
    with psycopg.connect(**{k: v for k, v in connection.items() if k != "autocommit"}) as c:
        c.execute("CREATE TABLE loaded (id int)")


server = factories.postgresql_noproc(load=[load])
postgresql = factories.postgresql("server")


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_has_a_clean_database(postgresql, attempt):
    postgresql.execute("INSERT INTO loaded VALUES (1)")
    postgresql.commit()
    assert postgresql.execute("SELECT count(*) FROM loaded").fetchone() == (1,)


def test_a_connection_left_open_does_not_keep_the_database(postgresql):
    info = postgresql.info
    left = psycopg.connect(host=info.host, port=info.port, user=info.user, dbname=info.dbname)
    left.execute("SELECT 1")
    left.commit()
    pytest.left_open = left
"""


def test_pytest_postgresql_works_unmodified(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(TESTS_OF_A_USER)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    where = conninfo_to_dict(engine.dsn())
    options = [f"--postgresql-host={where['host']}", f"--postgresql-port={where['port']}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
