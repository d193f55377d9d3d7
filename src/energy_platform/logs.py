"""Logs: one JSON object a line, constant event text plus keys. ERROR means: wake someone."""

import logging
import logging.handlers
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec

FILE_BYTES_MAX: Final = 16 * 2**20

_STANDARD: Final = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time, level, pid, logger, event, the record's extra keys, and the traceback if there is."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "pid": record.process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()

    @staticmethod
    def converter(seconds: float | None) -> Any:
        return time.gmtime(seconds)


def set_up_logs(file: Path | None = None) -> None:
    """Everything to a file and warnings to the terminal, or everything to the terminal."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(JsonFormatter())
    root.handlers = [terminal]
    if file is not None:
        terminal.setLevel(logging.WARNING)
        rotating = logging.handlers.RotatingFileHandler(
            file, maxBytes=FILE_BYTES_MAX, backupCount=3, encoding="utf-8"
        )
        rotating.setFormatter(JsonFormatter())
        root.addHandler(rotating)
    # Libraries that would log every connection or query at INFO.
    for name in ("yoyo", "uvicorn", "httpx", "faker"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A lost connection is told by the request or job that it was lost to.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
