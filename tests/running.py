"""The whole platform, as a user runs it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec


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


def _drain(pipe: IO[str]) -> None:
    """Read on, so that what the process says later never fills the pipe."""
    with pipe:
        for _ in pipe:
            pass
