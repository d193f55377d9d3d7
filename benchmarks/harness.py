"""What every benchmark needs: a database, a service, a load, and a table of what came of it.

    with open_service(arguments.database_url) as service:
        run = run_wrk("single_post.lua", service.url, 64, arguments.seconds, expected={201})

Client, service and database share one machine, so a figure means something only beside another of
the same run. What is compared is therefore put under load in turn, round by round, and every figure
is a median with the least and the most of its rounds.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import make_conninfo

from energy_platform import runtime, schema
from energy_platform.embedded import Engine
from energy_platform.settings import Settings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 60.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


# ---- Arguments --------------------------------------------------------------------------------


def argument_parser(doc: str | None, *, is_timed: bool = True) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have, or all that put a load on something for a time.

    Parse them by parse_arguments().
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--database-url",
        default=os.environ.get("ENERGY_DATABASE_URL"),
        help="server to make databases on; default: ENERGY_DATABASE_URL, or the embedded engine",
    )
    parser.add_argument("--quick", action="store_true", help="run briefly, and keep no results")
    if is_timed:
        parser.add_argument("--rounds", type=int, help="of each load; default: 3 (quick: 1)")
        parser.add_argument("--seconds", type=int, help="of a round; default: 10 (quick: 2)")
        parser.add_argument("--peer", metavar="URL", help="another service to put the load on")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    # A thousand connections are more files than most shells allow; children inherit this.
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    arguments = parser.parse_args()
    if "rounds" in arguments:
        arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
        arguments.seconds = arguments.seconds or (2 if arguments.quick else 10)
    return arguments


# ---- Databases --------------------------------------------------------------------------------


@contextlib.contextmanager
def open_database(server: str | None, *, migrate: bool = True, fsync: bool = True) -> Iterator[str]:
    """A new database on the server, or on an embedded engine of its own; it is dropped after.

    `migrate=False` leaves it empty, for who migrates by other settings. `fsync` is the engine's.
    """
    with contextlib.ExitStack() as stack:
        if server:
            dsn = stack.enter_context(_create_database(server))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            dsn = stack.enter_context(Engine(folder, fsync=fsync)).dsn()
        if migrate:
            schema.migrate(dsn, Settings())
        yield dsn


@contextlib.contextmanager
def _create_database(server: str) -> Iterator[str]:
    with psycopg.connect(server, autocommit=True) as db:
        name = f"benchmark_{os.getpid()}_{time.monotonic_ns()}"
        db.execute(f"CREATE DATABASE {name}")
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")


# ---- Processes --------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What has been used since the start. The difference of two is what a load took."""

    service_cpu_seconds: float
    service_memory_bytes: int  # resident, now
    database_cpu_seconds: float | None  # None: the server is on another machine
    engine_memory_bytes: int | None = None  # of the embedded engine


class Process:
    """A server in a process of its own, on a free port of this machine."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self.command = [*command]
        self.environment = environment
        self.port = _find_free_port()
        self.log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "it has not been started"
        return self._process.pid

    def launch(self) -> None:
        """Start it, and do not wait."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ENERGY_")}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, __exit__ closes it
        self._process = subprocess.Popen(
            self.command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**inherited, "ENERGY_PORT": str(self.port), **self.environment},
        )

    def check(self) -> None:
        """Exit with what it said last if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            sys.exit(f"{' '.join(self.command)} ended:\n{self.read_log()}")

    def read_log(self) -> str:
        assert self.log is not None
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def wait_ready(self) -> None:
        """Return as soon as it answers a request, by whatever status."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            self.check()
            try:
                fetch(f"{self.url}/health/live")
            except OSError:
                time.sleep(0.02)
            else:
                return
        sys.exit(f"{' '.join(self.command)} did not become ready:\n{self.read_log()}")

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            sys.exit(f"{' '.join(self.command)} did not stop:\n{self.read_log()}")
        # Who does not catch SIGTERM dies of it.
        if status not in (0, -signal.SIGTERM):
            sys.exit(f"{' '.join(self.command)} ended with {status}:\n{self.read_log()}")

    def usage(self) -> Usage:
        """Of the process and its children."""
        cpu, memory = _measure_tree(self.pid)
        return Usage(cpu, memory, None)

    def __enter__(self) -> Self:
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()
        if self.log is not None:
            self.log.close()


class Service(Process):
    """The service as a user runs it: `serve` on a migrated database, or `up` with a data folder.

    Settings are given by name: `Service(dsn, queue_readings_max=1000)`. Once it runs, `dsn` leads
    to its database in either case.
    """

    def __init__(
        self, dsn: str | None = None, *, data_dir: Path | None = None, **settings: Any
    ) -> None:
        assert (dsn is None) != (data_dir is None), "a server's database or a folder"
        place = {"database_url": dsn} if dsn else {"data_dir": data_dir}
        environment = {f"ENERGY_{k.upper()}": str(v) for k, v in {**place, **settings}.items()}
        command = [sys.executable, "-m", "energy_platform", "serve" if dsn else "up"]
        super().__init__(command, **environment)
        self.data_dir = data_dir
        self.dsn = dsn or ""
        self._postmaster: int | None = None

    def wait_ready(self) -> None:
        super().wait_ready()
        if self.data_dir:
            self.dsn = runtime.find_running(Settings(data_dir=str(self.data_dir)))
        else:
            self._postmaster = find_postmaster(self.dsn)

    def usage(self) -> Usage:
        """The embedded engine is a child of the service, but counted as the database."""
        if self.data_dir is None:
            cpu, memory = _measure_tree(self.pid)
            database = _measure_tree(self._postmaster)[0] if self._postmaster else None
            return Usage(cpu, memory, database)
        engine = json.loads((self.data_dir / "engine.json").read_text())["pid"]
        cpu, memory = _measure_tree(self.pid, but=engine)
        return Usage(cpu, memory, *_measure_tree(engine))

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels as they stand there."""
        lines = fetch(f"{self.url}/metrics").decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def open_service(server: str | None, **settings: Any) -> Iterator[Service]:
    """The service on a new database of the server, or with an embedded engine in a new folder."""
    if server:
        with open_database(server) as dsn, Service(dsn, **settings) as service:
            yield service
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            Service(data_dir=Path(folder), **settings) as service,
        ):
            yield service


def fetch(url: str) -> bytes:
    """The body of an answer, of whatever status. Raises: OSError where there is none."""
    place = urlsplit(url)
    with contextlib.closing(HTTPConnection(place.netloc, timeout=30)) as connection:
        connection.request("GET", f"{place.path}?{place.query}")
        return connection.getresponse().read()


def find_postmaster(dsn: str) -> int | None:
    """The server's first process, None if it is not on this machine."""
    with psycopg.connect(dsn) as db:
        pid = fetch_row(db, "SELECT pg_backend_pid()")[0]
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text()
            # A server elsewhere may have a process of this number, but not with this title.
            if title.startswith("postgres:") and db.info.dbname in title:
                return _read_stat(pid)[0]
    return None


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _read_stat(pid: int) -> tuple[int, float, int]:
    """Parent, CPU seconds (with those of children that have ended), resident bytes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(map(int, fields[11:15]))
    return int(fields[1]), ticks / TICKS_PER_SECOND, int(fields[21]) * PAGE_BYTES


def _measure_tree(root: int, but: int | None = None) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process and all below it, but for one branch."""
    stats = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                stats[int(folder.name)] = _read_stat(int(folder.name))
    tree = {root}
    while grown := {
        pid for pid, (parent, *_) in stats.items() if parent in tree and pid not in {*tree, but}
    }:
        tree |= grown
    return sum(stats[pid][1] for pid in tree), sum(stats[pid][2] for pid in tree)


# ---- Load by wrk ------------------------------------------------------------------------------


class WrkRun(NamedTuple):
    """What wrk saw: requests a second, milliseconds, and how often each status came."""

    rate: float
    p50: float
    p99: float
    statuses: dict[int, int]


def run_wrk(
    script: str,
    url: str,
    connections: int,
    seconds: float,
    env: Mapping[str, str] | None = None,
    *,
    expected: Collection[int] = range(200, 300),
) -> WrkRun:
    """Run a wrk script of this folder on one thread; exit on a status that is not expected."""
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed (Debian: apt-get install wrk)")
    finished = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "60s",
         "-s", str(HERE / "count.lua"), url],
        env={**os.environ, "WRK_SCRIPT": str(HERE / script), **(env or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if finished.returncode:
        sys.exit(f"wrk failed: {finished.stderr or finished.stdout}")
    said = json.loads(finished.stdout.splitlines()[-1])
    statuses = {int(status): count for status, count in said["statuses"].items()}
    if said["broken"] or said["timeouts"] or not statuses or not {*statuses} <= {*expected}:
        sys.exit(f"{url} did not answer as expected:\n{finished.stdout}")
    return WrkRun(sum(statuses.values()) / said["seconds"], said["p50"], said["p99"], statuses)


# ---- Results ----------------------------------------------------------------------------------


class Spread(NamedTuple):
    """The median of rounds, with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        rounds = [*values]
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    def __format__(self, spec: str) -> str:
        """As one number where the rounds agree: f"{spread:,.0f}"."""
        median, least, most = (format(value, spec) for value in self)
        return median if least == most else f"{median} ({least}–{most})"


class Report:
    """Markdown tables, printed as they come, and the same figures as JSON.

    write() keeps both in results/; not of a quick run, which is no result.
    """

    def __init__(self, script: str, title: str, arguments: argparse.Namespace) -> None:
        self._name = Path(script).stem + ("" if arguments.database_url else "_embedded")
        self._is_kept = not arguments.quick
        self._lines: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._run = describe_run(arguments)
        self.say(f"# {title}\n\n`python benchmarks/{Path(script).name}`\n")
        self.say("{machine}; {database}; Python {python}; commit {commit}.".format(**self._run))

    def say(self, text: str) -> None:
        """A line of the Markdown: a sentence, or a table's head."""
        print(text, flush=True)
        self._lines.append(text)

    def say_shared(self, arguments: argparse.Namespace) -> None:
        """The sentence without which the figures of a load mislead."""
        rounds = f"{arguments.rounds} round{'s' if arguments.rounds > 1 else ''}"
        self.say(
            f"Client, service and database share these {os.cpu_count()} cores: only ratios within "
            "one run travel to another machine.\n"
            f"Median of {rounds} of {arguments.seconds} s (least–most)."
        )

    def open_table(self, *columns: str) -> None:
        """The first column is text, the others are figures."""
        dashes = ["---", *["--:"] * (len(columns) - 1)]
        self.say(f"\n| {' | '.join(columns)} |\n|{'|'.join(dashes)}|")

    def add_row(self, *cells: str, **figures: object) -> None:
        """A row of the table, and its figures by name for the JSON."""
        self.say(f"| {' | '.join(cells)} |")
        self._rows.append(
            {k: v._asdict() if isinstance(v, Spread) else v for k, v in figures.items()}
        )

    def write(self) -> None:
        if not self._is_kept:
            return
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self._name}.md").write_text("\n".join(self._lines) + "\n")
        document = {**self._run, "rows": self._rows}
        (RESULTS / f"{self._name}.json").write_text(json.dumps(document, indent=1) + "\n")


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, what a commit waits for, and the arguments."""
    server = arguments.database_url
    with open_database(server, migrate=False) as dsn, psycopg.connect(dsn) as db:
        postgres, timescale, fsync, commit_mode = fetch_row(
            db,
            "SELECT current_setting('server_version'), (SELECT default_version"
            " FROM pg_available_extensions WHERE name = 'timescaledb'),"
            " current_setting('fsync'), current_setting('synchronous_commit')",
        )
    durability = f", fsync {fsync}, synchronous_commit {commit_mode}" if server else ""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    kept = {k: v for k, v in vars(arguments).items() if k not in ("database_url", "quick")}
    return {
        "machine": f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "database": f"PostgreSQL {postgres.split()[0]}, TimescaleDB {timescale} "
        f"({'server' if server else 'embedded engine'}{durability})",
        "python": platform.python_version(),
        "commit": commit,
        "arguments": kept,
    }


def fetch_row(db: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = db.execute(query).fetchone()
    assert row is not None
    return tuple(row)
