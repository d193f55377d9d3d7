"""A device's history out, as `import` takes it."""

import contextlib
import gzip
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TextIO

import msgspec
import psycopg
from tqdm import tqdm

from energy_platform import database
from energy_platform.errors import SetupError
from energy_platform.files.formats import DeviceClass, check_window
from energy_platform.readings import MeterReading, Reading, VehicleReading

PAGE_READINGS: Final = 5_000
BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
END: Final = datetime.max.replace(tzinfo=UTC)

_SQL = database.load_queries(Path(__file__).with_suffix(".sql"))
_STRUCTS: Final[dict[DeviceClass, Callable[..., Reading]]] = {
    "meter": MeterReading,
    "vehicle": VehicleReading,
}


class Export(NamedTuple):
    """What was written."""

    device_class: DeviceClass
    device_id: str
    energy_kind: str
    readings: int


def export_history(
    dsn: str,
    device_class: DeviceClass,
    device_id: str,
    since: datetime | None,
    until: datetime | None,
    path: Path | None,
    *,
    stdout: BinaryIO,
    out: TextIO,
    shows_progress: bool = False,
) -> Export:
    """Write a device's history as NDJSON, in the order of time; `import` takes it as it is.

    Into `path`, compressed where it ends in .gz, else to `stdout`. A file is whole or not there.
    Raises: SetupError where the device is not known or the file cannot be written.
    """
    check_window(since, until)
    with database.connect_now(dsn, "energy-platform export") as connection:
        known = connection.execute(
            _SQL[f"fetch_{device_class}_kind"], {"device_id": device_id}
        ).fetchone()
        if known is None:
            raise SetupError(f"No {device_class} {device_id!r} is known here.")
        readings = 0
        with (
            _open_sink(path, stdout) as sink,
            tqdm(
                desc=device_id,
                unit=" readings",
                unit_scale=True,
                file=out,
                disable=False if shows_progress else None,  # None: where `out` is no terminal
                dynamic_ncols=True,
            ) as bar,
        ):
            for page in _fetch_pages(connection, device_class, device_id, since, until):
                sink.write(b"".join(msgspec.json.encode(reading) + b"\n" for reading in page))
                readings += len(page)
                bar.update(len(page))
    return Export(device_class, device_id, known[0], readings)


def render_export(export: Export) -> str:
    """What a person reads at the end of an export; what the file does not say is said here."""
    text = f"{export.readings:,} readings of {export.device_id} written."
    if export.energy_kind == "register":
        text += (
            f"\nThey are a register: declare {export.device_id} as one elsewhere too, by PUT "
            f'/v1/{export.device_class}s with {{"energyKind":"register"}}.'
        )
    return text


def _fetch_pages(
    connection: psycopg.Connection[Any],
    device_class: DeviceClass,
    device_id: str,
    since: datetime | None,
    until: datetime | None,
) -> Iterator[list[Reading]]:
    reached = since or BEGINNING
    while True:
        parameters = {
            "device_id": device_id,
            "since": reached,
            "until": until or END,
            "limit": PAGE_READINGS,
        }
        rows = connection.execute(_SQL[f"fetch_{device_class}_page"], parameters).fetchall()
        if rows:
            yield [_STRUCTS[device_class](*row) for row in rows]
        if len(rows) < PAGE_READINGS:
            return
        reached = rows[-1][-1] + timedelta(microseconds=1)


@contextlib.contextmanager
def _open_sink(path: Path | None, stdout: BinaryIO) -> Iterator[Any]:
    if path is None:
        yield stdout
        stdout.flush()
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as raw:
            if path.suffix == ".gz":
                # No name and no time in it: the same history gives the same file.
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
                    yield packed
            else:
                yield raw
        os.replace(part, path)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)
