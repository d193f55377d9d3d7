"""Several processes of the service: started, watched, replaced where one dies, ended together.

A worker says every second that it is alive, on a line that it holds with this process. When a
worker dies its end of the line is closed, and it is replaced; when this process dies the other end
is, and the workers end by themselves. They share nothing but the address and the database.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from typing import Final

from energy_platform.errors import SetupError

ALIVE_SECONDS: Final = 1  # a worker says so every second or two
SILENT_SECONDS_MAX: Final = 30.0  # of a worker that starts, serves or ends; then it is killed
EARLY_SECONDS: Final = 60.0  # one that dies sooner makes the pause before the next one longer
PAUSE_SECONDS_MAX: Final = 30.0
LEAVE_SECONDS_MAX: Final = 5.0  # between the end of a worker's line and its own

_spawn = multiprocessing.get_context("spawn")
_log = logging.getLogger("energy_platform.workers")

Run = Callable[[int, "Line"], None]


class Line:
    """A worker's end of the line to the process that watches it."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def say_alive(self) -> bool:
        """Say that this worker serves; False where nobody listens any more."""
        try:
            self._end.send(b".", socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # what was said before is still to be heard
        except ConnectionError:
            return False
        return True


class _Worker:
    """A worker process, and this end of its line."""

    def __init__(self, run: Run, number: int) -> None:
        self.serves = False
        self._line, theirs = socket.socketpair()
        self._line.setblocking(False)
        self.process = _spawn.Process(target=run, args=(number, Line(theirs)), daemon=True)
        with theirs:
            self.process.start()

    async def wait(self) -> int | None:
        """Its exit status, once it has ended; it is killed where it is silent for too long."""
        loop = asyncio.get_running_loop()
        with self._line:
            try:
                while True:
                    async with asyncio.timeout(SILENT_SECONDS_MAX):
                        if not await loop.sock_recv(self._line, 4096):
                            break
                    if not self.serves:
                        _log.info("worker serves", extra={"worker_pid": self.process.pid})
                    self.serves = True
            except TimeoutError:
                _log.error("worker is silent", extra={"worker_pid": self.process.pid})
                self.process.kill()
        self.process.join(LEAVE_SECONDS_MAX)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


class Workers:
    """Keeps `count` workers running until SIGTERM, SIGINT or SIGHUP.

    `run(number, line)` is what a worker does; it is called in a new process, so it must be possible
    to pickle it. `forget(number)` is called here when the worker of that number has ended.
    """

    def __init__(self, run: Run, count: int, forget: Callable[[int], None]) -> None:
        self._run = run
        self._count = count
        self._forget = forget
        self._workers: set[_Worker] = set()
        self._stopping = asyncio.Event()

    async def keep(self) -> None:
        """Raises: SetupError where a worker cannot start while no other serves."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        keepers = [asyncio.create_task(self._keep(number)) for number in range(self._count)]
        try:
            await asyncio.gather(*keepers)
        finally:
            self._stop()
            await asyncio.gather(*keepers, return_exceptions=True)

    def _stop(self) -> None:
        self._stopping.set()
        for worker in self._workers:
            worker.process.terminate()  # it answers what it has taken, then ends

    async def _keep(self, number: int) -> None:
        """One worker after the other."""
        early = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            worker = _Worker(self._run, number)
            self._workers.add(worker)
            status = await worker.wait()
            self._workers.remove(worker)
            self._forget(number)
            if self._stopping.is_set():
                break
            pause = min(2**early - 1, PAUSE_SECONDS_MAX)  # none for the first
            early = early + 1 if time.monotonic() - started < EARLY_SECONDS else 0
            died = {"worker_pid": worker.process.pid, "exit_status": status, "pause": pause}
            _log.error("worker died" if worker.serves else "worker did not start", extra=died)
            if not worker.serves and not any(other.serves for other in self._workers):
                raise SetupError(
                    f"A worker process ended with status {status} before it could serve, and no "
                    "other serves.",
                    hint="its own message stands above",
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
