"""How many bytes does a reading take, before and after its day is compressed, and why so many?

    python benchmarks/storage.py --database-url postgresql://postgres@127.0.0.1/postgres

Four sets of readings are stored as the migrations store them, and then in other ways, side by side:
another segment, order, chunk, type of values, or form of `received_at`. Two are real: the household
of the UCI repository (readings a minute, for meters) and one DC charging session (for vehicles),
read as `import` reads them from --data. There is one of each, so all devices have the same
readings, shifted: each begins hours later in the household's month, or charges four times a day
some minutes later. The others are those of seed.py. No file says when a reading was received: it is
40 to 1,940 ms after it was taken, to the microsecond, as the service notes it.

Bytes are all that is on disk for the chunks: tables, TOAST, indexes, and what is left of a chunk
after its rows have gone into columns. Nothing is timed, so a busy machine changes nothing. It takes
a server: of the many tables that come and go here, the embedded engine takes one for another.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg

from energy_platform.files.formats import ImportOptions, create_format
from energy_platform.readings import MeterReading, Reading, VehicleReading
from harness import HERE, Report, argument_parser, fetch_row, open_database, parse_arguments
from seed import MAKE_READINGS, create_devices

BEGIN = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
DAYS = 7
HOUSEHOLD = "uci-household-2006-12/household_power_consumption.txt"
CHARGER = "ev-dc-charge-obd-20230516-01/2023051601_charger.csv"
SHARED = HERE.parents[1] / "shared" / "data"

# By what a measure is multiplied to be a whole number: micro kWh, and hundredths of the others.
MEASURES = {
    "meter": {"kwh_consumed_ac": 1_000_000, "voltage": 100},
    "vehicle": {"soc": 100, "kwh_delivered_dc": 1_000_000, "battery_temp": 100},
}

# ---- The readings -----------------------------------------------------------------------------


class Source(NamedTuple):
    """A set of readings in a table of its own, with the columns of history."""

    title: str
    table: str
    device_class: str

    @property
    def id(self) -> str:
        return f"{self.device_class}_id"

    @property
    def measures(self) -> dict[str, int]:
        return MEASURES[self.device_class]

    def define(self) -> str:
        """The columns of history that are no measures have their place around them."""
        measures = ", ".join(f"{name} float8" for name in self.measures)
        return f'{self.id} text COLLATE "C", ts timestamptz, {measures}, received_at timestamptz'


def read_file(path: Path, options: ImportOptions) -> list[Reading]:
    """The readings that a file has, in its order, as `import` would take them."""
    lines = path.read_bytes().splitlines()
    found = create_format(path.name, lines[0], options)
    kind: type[Reading] = MeterReading if options.meter else VehicleReading
    readings: list[Reading] = []
    for line in map(found.read, lines[1:]):
        if isinstance(line, bytes):
            try:
                readings.append(msgspec.json.decode(line, type=kind))
            except msgspec.ValidationError:
                continue  # a line with a gap in it
    return readings


def shift_household(readings: list[Reading], devices: int) -> Iterator[tuple[Any, ...]]:
    """A week of minutes; a device is 431 minutes further in the month than the one before it."""
    for minute in range(DAYS * 1440):
        for device in range(devices):
            reading = readings[(minute + 431 * device) % len(readings)]
            yield f"M-R{device:05}", BEGIN + minute * MINUTE, *reading.values


def shift_session(readings: list[Reading], devices: int) -> Iterator[tuple[Any, ...]]:
    """Four sessions a day; a device begins 97 seconds after the one before it."""
    first = readings[0].ts
    at = sorted(
        (BEGIN + n * 6 * HOUR + device * timedelta(seconds=97) + (reading.ts - first), device, i)
        for n in range(4 * DAYS)
        for device in range(devices)
        for i, reading in enumerate(readings)
    )
    for ts, device, i in at:
        yield f"V-R{device:05}", ts, *readings[i].values


def copy_source(
    db: psycopg.Connection[Any], source: Source, rows: Iterable[tuple[Any, ...]]
) -> Source:
    """Add when each reading was received, and store them in the order of time."""
    chance = random.Random(source.table)
    db.execute(f"CREATE UNLOGGED TABLE {source.table} ({source.define()})")
    with db.cursor().copy(f"COPY {source.table} FROM STDIN") as copy:
        for row in rows:
            late = timedelta(microseconds=40_000 + int(1_900_000 * chance.random() ** 2))
            copy.write_row((*row, row[1] + late))
    return source


def make_source(db: psycopg.Connection[Any], source: Source, devices: int) -> Source:
    """Readings of the seeded fleet, one a minute."""
    db.execute(f"CREATE UNLOGGED TABLE {source.table} ({source.define()})")
    make = MAKE_READINGS[source.device_class]
    for hour in range(DAYS * 24):
        piece = {"since": BEGIN + hour * HOUR, "until": BEGIN + (hour + 1) * HOUR}
        db.execute(f"INSERT INTO {source.table} {make}", {**piece, "interval": MINUTE})
    return source


def load_sources(db: psycopg.Connection[Any], data: Path, devices: int) -> Iterator[Source]:
    if (data / HOUSEHOLD).is_file():
        options = ImportOptions(meter="M", time_zone="Europe/Paris", late_window=DAY)
        readings = read_file(data / HOUSEHOLD, options)
        source = Source("household, real", "household", "meter")
        yield copy_source(db, source, shift_household(readings, devices))
    else:
        print(f"There is no {data / HOUSEHOLD}: meters are measured by made readings only.")
    if (data / CHARGER).is_file():
        options = ImportOptions(vehicle="V", fill={"batteryTemp": 20.0}, late_window=DAY)
        readings = read_file(data / CHARGER, options)
        source = Source("DC charging, real", "charging", "vehicle")
        yield copy_source(db, source, shift_session(readings, devices))
    else:
        print(f"There is no {data / CHARGER}: vehicles are measured by made readings only.")
    create_devices(db, devices)
    yield make_source(db, Source("meters, made", "made_meter", "meter"), devices)
    yield make_source(db, Source("vehicles, made", "made_vehicle", "vehicle"), devices)


# ---- The ways to store them -------------------------------------------------------------------


class Layout(NamedTuple):
    """How readings are stored; as the migrations do it, but for what is given."""

    title: str
    segment: str | None = "{id}"
    order: str = "ts"
    chunk: timedelta = DAY
    value_type: str = "float8"
    is_scaled: bool = False  # whole numbers, by MEASURES
    received_type: str | None = "timestamptz"
    received: str = "received_at"


OFFSET = {
    "received_type": "integer",
    "received": "round(1000 * extract(epoch FROM received_at - ts))::integer",
}
LAYOUTS = [
    Layout("as migrated"),
    Layout("order ts DESC", order="ts DESC"),
    Layout("no segment, order id, ts", segment=None, order="{id}, ts"),
    Layout("no segment, order ts", segment=None),
    Layout("chunk of 7 days", chunk=7 * DAY),
    Layout("float4", value_type="float4"),
    Layout("numeric", value_type="numeric"),
    Layout("whole numbers (bigint)", value_type="bigint", is_scaled=True),
    Layout("whole numbers (integer)", value_type="integer", is_scaled=True),
    Layout("received_at to the ms", received="date_trunc('milliseconds', received_at)"),
    Layout("received_at to the s", received="date_trunc('second', received_at)"),
    Layout("received_at as ms after ts", **OFFSET),  # type: ignore[arg-type]
    Layout("no received_at", received_type=None),
    Layout("numeric, ms after ts", value_type="numeric", **OFFSET),  # type: ignore[arg-type]
    Layout(
        "whole numbers (bigint), ms after ts",
        value_type="bigint", is_scaled=True, **OFFSET,  # type: ignore[arg-type]
    ),
]  # fmt: skip


class Bytes(NamedTuple):
    """Of one reading. `compressed` is all that is left once the chunks are."""

    heap: float
    in_index: float
    compressed: float
    by_column: dict[str, float]  # what is in the compressed columns

    @property
    def raw(self) -> float:
        return self.heap + self.in_index


SIZES = """
SELECT coalesce(sum(pg_table_size(c.chunk)), 0)::bigint,
       coalesce(sum(pg_indexes_size(c.chunk)), 0)::bigint,
       coalesce(sum(pg_total_relation_size(s.compress_relid)), 0)::bigint
FROM (SELECT format('%I.%I', chunk_schema, chunk_name)::regclass AS chunk
      FROM timescaledb_information.chunks WHERE hypertable_name = 'stored') c
LEFT JOIN _timescaledb_catalog.compression_settings s ON s.relid = c.chunk
"""


def measure(db: psycopg.Connection[Any], source: Source, layout: Layout) -> Bytes:
    """Store the readings so, compress their chunks, and count."""
    measures = [
        (name, f"round({name} * {scale})" if layout.is_scaled else name)
        for name, scale in source.measures.items()
    ]
    columns = ", ".join(f"{name} {layout.value_type} NOT NULL" for name, _ in measures)
    values = ", ".join(value for _, value in measures)
    if layout.received_type:
        columns += f", received_at {layout.received_type} NOT NULL"
        values += f", {layout.received}"
    db.execute(
        f'CREATE TABLE stored ({source.id} text COLLATE "C" NOT NULL, ts timestamptz NOT NULL,'
        f" {columns}, PRIMARY KEY ({source.id}, ts))"
    )
    try:
        db.execute(
            "SELECT create_hypertable('stored', by_range('ts', %s),"
            " create_default_indexes => false)",
            (layout.chunk,),
        )
        segment = (layout.segment or "").format(id=source.id)
        db.execute(
            "ALTER TABLE stored SET (timescaledb.enable_columnstore,"
            f" timescaledb.segmentby = '{segment}',"
            f" timescaledb.orderby = '{layout.order.format(id=source.id)}')"
        )
        rows = db.execute(
            f"INSERT INTO stored SELECT {source.id}, ts, {values} FROM {source.table}"
        ).rowcount
        heap, index, _ = fetch_row(db, SIZES)
        db.execute("SELECT compress_chunk(c) FROM show_chunks('stored') c")
        left = sum(fetch_row(db, SIZES))
        by_column = {name: size / rows for name, size in measure_columns(db).items()}
        return Bytes(heap / rows, index / rows, left / rows, by_column)
    finally:
        db.execute("DROP TABLE stored")


def measure_columns(db: psycopg.Connection[Any]) -> dict[str, int]:
    """Bytes in each column of the compressed chunks."""
    tables = db.execute(
        "SELECT s.compress_relid::text FROM timescaledb_information.chunks c"
        " JOIN _timescaledb_catalog.compression_settings s"
        "   ON s.relid = format('%I.%I', c.chunk_schema, c.chunk_name)::regclass"
        " WHERE c.hypertable_name = 'stored'"
    ).fetchall()
    sizes: Counter[str] = Counter()
    for (table,) in tables:
        columns = [
            name
            for (name,) in db.execute(
                "SELECT attname FROM pg_attribute"
                " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
                (table,),
            )
        ]
        sums = ", ".join(f'sum(pg_column_size("{name}"))::bigint' for name in columns)
        sizes.update(dict(zip(columns, fetch_row(db, f"SELECT {sums} FROM {table}"), strict=True)))
    return sizes


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default=str(SHARED), help="folder of the real readings")
    parser.add_argument("--devices", type=int, help="of each set; default: 100 (quick: 10)")
    arguments = parse_arguments(parser)
    if not arguments.database_url:
        print("Bytes a reading are measured on a server only: set ENERGY_DATABASE_URL.")
        return
    data = Path(vars(arguments).pop("data"))  # no part of the result
    devices = arguments.devices or (10 if arguments.quick else 100)
    report = Report(__file__, "Bytes a reading", arguments)
    report.say(f"\n{devices} devices, {DAYS} days in chunks of one.")
    with (
        open_database(arguments.database_url, fsync=False) as dsn,
        psycopg.connect(dsn, autocommit=True, options="-c timezone=UTC -c jit=off") as db,
    ):
        db.execute("SET synchronous_commit = off")
        for source in load_sources(db, data, devices):
            tell_source(db, source, report)
            db.execute(f"DROP TABLE {source.table}")
    report.write()


def tell_source(db: psycopg.Connection[Any], source: Source, report: Report) -> None:
    (readings,) = fetch_row(db, f"SELECT count(*) FROM {source.table}")
    measures = [*source.measures]
    report.say(f"\n## {source.title}: {readings:,} readings")
    report.open_table(
        "stored", "heap", "index", "raw", "compressed", "/ raw",
        *(f"in {name}" for name in ("ts", *measures, "received_at")),
    )  # fmt: skip
    for layout in LAYOUTS:
        try:
            size = measure(db, source, layout)
        except psycopg.errors.NumericValueOutOfRange:
            report.add_row(layout.title, *["-"] * 4, "does not fit", *["-"] * (len(measures) + 2))
            continue
        columns = [size.by_column.get(name) for name in ("ts", *measures, "received_at")]
        report.add_row(
            layout.title,
            *(f"{n:.1f}" for n in (size.heap, size.in_index, size.raw, size.compressed)),
            f"{size.compressed / size.raw:.3f}",
            *("-" if n is None else f"{n:.2f}" for n in columns),
            source=source.title, layout=layout.title, readings=readings, **size._asdict(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
