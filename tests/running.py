"""The whole platform, as a user runs it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import msgspec

SECONDS_MAX = 60.0  # in which a process does what it should


class Platform:
    """`energy-platform up` as a user runs it, in a process of its own."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.settings = settings
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ENERGY_")}
        environment |= {f"ENERGY_{name.upper()}": value for name, value in self.settings.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "energy_platform", "up", "--data-dir", str(self.data_dir),
             "--port", str(self.port)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("Ready after"):
                self.port = int(line.split("http://127.0.0.1:")[1].split()[0])
                break
        else:
            raise AssertionError("the service did not become ready")
        threading.Thread(target=_drain, args=(self._process.stdout,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill_service(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def kill_engine(self) -> None:
        state = msgspec.json.decode((self.data_dir / "engine.json").read_bytes())
        os.kill(state["pid"], signal.SIGKILL)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(30) == 0

    def __enter__(self) -> "Platform":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Served:
    """`energy-platform serve` on a database that is there, in processes of their own."""

    def __init__(self, dsn: str, *options: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[dict[str, Any]] = []  # of the log, as they come
        self.messages: list[str] = []  # what is said beside it
        self._more = threading.Condition()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ENERGY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "energy_platform", "serve", "--port", str(self.port), *options],
            stderr=subprocess.PIPE, text=True, env={**environment, "ENERGY_DATABASE_URL": dsn},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as pipe:
            for line in pipe:
                with self._more:
                    if line.startswith("{"):
                        self.lines.append(msgspec.json.decode(line))
                    else:
                        self.messages.append(line)
                    self._more.notify_all()

    def logged(self, event: str, **wanted: object) -> list[dict[str, Any]]:
        """The lines of the log with this event and these keys."""
        with self._more:
            wanted = {"event": event, **wanted}
            return [line for line in self.lines if wanted.items() <= line.items()]

    def await_logged(self, event: str, count: int, **wanted: object) -> list[dict[str, Any]]:
        """Those, once there are so many."""
        with self._more:
            assert self._more.wait_for(
                lambda: len(self.logged(event, **wanted)) >= count, timeout=SECONDS_MAX
            ), f"not {count} times in the log: {event} {wanted}"
            return self.logged(event, **wanted)

    def await_end(self) -> None:
        """Until its last process has ended, so that nobody holds the pipe."""
        self._reader.join(SECONDS_MAX)
        assert not self._reader.is_alive(), "a worker stays"

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and whatever workers it left."""
        self.process.terminate()
        try:
            self.process.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(SECONDS_MAX)
        for line in self.logged("worker serves") if self._reader.is_alive() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(line["worker_pid"], signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _drain(pipe: IO[str]) -> None:
    """Read on, so that what the process says later never fills the pipe."""
    with pipe:
        for _ in pipe:
            pass
