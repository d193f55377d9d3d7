"""Starts the embedded engine, keeps it running, and says how to reach it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import stat
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psycopg.conninfo import make_conninfo

from energy_platform.embedded.node import EngineError, find_node, installed_modules

__all__ = ["Engine", "EngineError", "running_dsn"]

PORT = 5432
SOCKET_PATH_BYTES_MAX = 107
START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 15.0
LOCK_POLL_SECONDS = 0.05
RESTART_BACKOFF_SECONDS = (0.0, 0.1, 0.5, 2.0, 5.0)
# An engine that lived this long was healthy: the next failure is a new one.
HEALTHY_SECONDS = 60.0
LOG_BYTES_MAX = 10 * 1024 * 1024

_BRIDGE = Path(__file__).parent / "bridge" / "main.mjs"
_log = logging.getLogger("energy_platform.embedded")


class Engine:
    """A TimescaleDB that runs in a child process, its data in a folder.

    The folder is locked for as long as this process or the child lives. With `supervise`, a child
    that ends by itself is started again on the same socket; clients see their connections break,
    and connect anew. `fsync=False` trades the last commits before a power cut for speed: for tests.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        fsync: bool = True,
        log: Path | None = None,
        lock_wait_seconds: float = 10.0,
        supervise: bool = True,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._fsync = fsync
        self._log_path = log if log is not None else self.data_dir / "engine.log"
        self._lock_wait_seconds = lock_wait_seconds
        self._supervise = supervise
        self._lock_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None
        self._stopping = threading.Event()
        # One conversation on the child's pipes at a time.
        self._pipes = threading.Lock()

    def start(self) -> Engine:
        """Starts the engine and returns when it serves.

        Raises: EngineError when the folder is in use, or the engine is not installed or fails.
        """
        if self._process is not None:
            raise EngineError("this engine has been started already")
        node, modules = find_node().executable, installed_modules()
        self._stopping.clear()
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = _take_lock(self.data_dir, self._lock_wait_seconds)
        self._command = [
            node,
            str(_BRIDGE),
            *("--modules", str(modules)),
            *("--data", str(self.data_dir / "pgdata")),
            *("--fsync", "on" if self._fsync else "off"),
        ]
        try:
            self._spawn()
        except BaseException:
            self._release_lock()
            raise
        if self._supervise:
            self._supervisor = threading.Thread(
                target=self._keep_running, name="embedded-engine", daemon=True
            )
            self._supervisor.start()
        return self

    def stop(self) -> None:
        """Writes a checkpoint, ends the engine and frees the folder. Safe to call twice."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        if self._supervisor is not None:
            _close_leash(process)
            self._supervisor.join()
            self._supervisor = None
            process = self._process  # it may have been restarted meanwhile
            assert process is not None
        _end(process)
        self._process = None
        _state_file(self.data_dir).unlink(missing_ok=True)
        self._release_lock()

    def dsn(self, *, user: str = "postgres", database: str = "postgres") -> str:
        """Returns the libpq connection string of the engine."""
        return _dsn(_socket_dir(self.data_dir), user=user, database=database)

    @property
    def pid(self) -> int:
        """The process id of the child."""
        if self._process is None:
            raise EngineError("the engine is not running")
        return self._process.pid

    def statistics(self) -> dict[str, Any]:
        """Returns the child's counters: boots, kills, runs, syncs (files forced to disk)."""
        process = self._process
        if process is None:
            raise EngineError("the engine is not running")
        with self._pipes:
            assert process.stdin is not None
            process.stdin.write(b"statistics\n")
            process.stdin.flush()
            return _read_line(process, 10.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _spawn(self) -> None:
        """Starts the child and waits until it serves."""
        assert self._lock_fd is not None
        _state_file(self.data_dir).unlink(missing_ok=True)
        socket_dir = _socket_dir(self.data_dir)
        _make_private(socket_dir)
        with _open_log(self._log_path) as log:
            process = subprocess.Popen(
                [*self._command, "--socket", str(_socket_path(socket_dir))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(self._lock_fd,),
                # A Ctrl-C in the terminal is for the parent, which ends the child in its own time.
                start_new_session=True,
            )
        try:
            answer = _read_line(process, START_SECONDS_MAX)
            if not answer.get("ready"):
                raise EngineError(
                    f"the embedded engine did not start: {answer.get('error', 'no reason given')} "
                    f"(see {self._log_path})"
                )
        except BaseException:
            _end(process)
            raise
        self._process = process
        _write_state(self.data_dir, socket_dir, process.pid)

    def _keep_running(self) -> None:
        failures = 0
        while True:
            process = self._process
            assert process is not None
            since = time.monotonic()
            status = process.wait()
            if self._stopping.is_set():
                return
            _close_pipes(process)
            if time.monotonic() - since > HEALTHY_SECONDS:
                failures = 0
            failures = self._restart(status, failures)
            if self._stopping.is_set():
                return

    def _restart(self, status: int, failures: int) -> int:
        """Starts the child again, as often as it takes; returns the number of failures in a row."""
        while True:
            pause = RESTART_BACKOFF_SECONDS[min(failures, len(RESTART_BACKOFF_SECONDS) - 1)]
            _log.warning(
                "embedded engine ended, restarting",
                extra={"exit_status": status, "failures": failures, "pause_seconds": pause},
            )
            if self._stopping.wait(pause):
                return failures
            failures += 1
            try:
                self._spawn()
            except (EngineError, OSError, ValueError) as error:
                _log.error("embedded engine does not restart", extra={"reason": str(error)})
            else:
                return failures

    def _release_lock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def running_dsn(data_dir: Path, *, user: str = "postgres", database: str = "postgres") -> str:
    """Returns the connection string of the engine that another process runs on this folder.

    Raises: EngineError when none is running. The lock decides, for a file may have been left over.
    """
    folder = Path(data_dir).absolute()
    if not _is_locked(folder):
        raise EngineError(f"no embedded engine is running on {folder}")
    try:
        state = json.loads(_state_file(folder).read_text())
    except FileNotFoundError:
        raise EngineError(f"the embedded engine on {folder} is not ready yet") from None
    return _dsn(Path(state["socket_dir"]), user=user, database=database)


def _dsn(socket_dir: Path, *, user: str, database: str) -> str:
    return make_conninfo(host=str(socket_dir), port=PORT, user=user, dbname=database)


# ---- the folder


def _state_file(data_dir: Path) -> Path:
    return data_dir / "engine.json"


def _write_state(data_dir: Path, socket_dir: Path, pid: int) -> None:
    state = {"socket_dir": str(socket_dir), "port": PORT, "pid": pid, "parent_pid": os.getpid()}
    draft = _state_file(data_dir).with_suffix(".json.new")
    draft.write_text(json.dumps(state) + "\n")
    draft.replace(_state_file(data_dir))


def _open_lock(data_dir: Path) -> int:
    return os.open(data_dir / "engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _take_lock(data_dir: Path, wait_seconds: float) -> int:
    """Locks the folder; the child inherits the descriptor, so the lock outlives either one."""
    lock = _open_lock(data_dir)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(lock, 32, 0).decode().strip() or "unknown"
                os.close(lock)
                raise EngineError(
                    f"data folder {data_dir} is in use by process {holder}. "
                    "Stop that process, or choose another folder."
                ) from None
            time.sleep(LOCK_POLL_SECONDS)
        else:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock


def _is_locked(data_dir: Path) -> bool:
    try:
        lock = os.open(data_dir / "engine.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _socket_path(socket_dir: Path) -> Path:
    return socket_dir / f".s.PGSQL.{PORT}"


def _socket_dir(data_dir: Path) -> Path:
    """Returns the folder of the socket: the same for the same data folder, in every process."""
    inside = data_dir / "run"
    # A comma in a host name would mean several hosts to libpq.
    if len(os.fsencode(_socket_path(inside))) <= SOCKET_PATH_BYTES_MAX and "," not in str(inside):
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and len(os.fsencode(runtime)) < 50 and "," not in runtime and Path(runtime).is_dir():
        return Path(runtime, f"energy-platform-{digest}")
    return Path("/tmp", f"energy-platform-{os.getuid()}-{digest}")


def _make_private(directory: Path) -> None:
    """Makes the folder, or takes one that is there if it is ours alone."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EngineError(f"{directory} belongs to somebody else; remove it and start again")
    directory.chmod(0o700)


def _open_log(path: Path) -> Any:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")


# ---- the child


def _read_line(process: subprocess.Popen[bytes], timeout_seconds: float) -> dict[str, Any]:
    """Returns the next JSON line that the child prints, {} when it ends instead."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(timeout_seconds * 1000):
        raise EngineError(f"the embedded engine did not answer within {timeout_seconds:g} s")
    line = process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {}
    return answer


def _close_leash(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the child was faster
        process.stdin.close()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    _close_leash(process)
    process.stdout.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets the child shut down by closing its standard input; ends it when it does not."""
    _close_leash(process)
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        _log.error("embedded engine does not stop, killing it", extra={"child_pid": process.pid})
        process.kill()
        process.wait()
    _close_pipes(process)
