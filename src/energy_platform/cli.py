"""The command line. Exit status: 0 done, 1 found something wrong, 2 wrong use, 3 not reachable."""

import argparse
import asyncio
import contextlib
import functools
import getpass
import gzip
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import uvicorn

from energy_platform import (
    __version__,
    access,
    corrections,
    database,
    doctor,
    files,
    logs,
    runtime,
    schema,
    workers,
)
from energy_platform.errors import (
    EnergyError,
    RequestError,
    SetupError,
    StorageError,
    UnreachableError,
)
from energy_platform.http import metrics
from energy_platform.http.access import is_loopback
from energy_platform.http.app import create_app
from energy_platform.http.protocol import JoinedWritesProtocol
from energy_platform.http.service import utc_now
from energy_platform.settings import OPTIONS, Settings, load_settings

DONE: Final = 0
FOUND_WRONG: Final = 1
WRONG_USE: Final = 2
NOT_REACHABLE: Final = 3

DEMO_END_SECONDS_MAX: Final = 15.0
FINDINGS_SHOWN_MAX: Final = 20  # of each part: who granted everything is not told so 200 times


class Command(NamedTuple):
    """A command: what it does, its positional arguments, and the function that runs it."""

    help: str
    run: Callable[[Settings, argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


# ---- up and serve -----------------------------------------------------------------------------


def run_up(settings: Settings, _arguments: argparse.Namespace) -> int:
    """Database, schema, service and jobs in one process, until SIGINT or SIGTERM."""
    started = time.monotonic()
    listener = _listen(settings)
    if settings.database_url:
        logs.set_up_logs()
        opened: Any = contextlib.nullcontext(settings.database_url)
    else:
        folder = Path(settings.data_dir)
        os.umask(0o077)  # logs and state files too are ours alone
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        logs.set_up_logs(folder / "service.log")
        _say(f"Starting TimescaleDB in {folder.resolve()} ...")
        opened = runtime.open_engine(settings)
    with listener, _stop_by_signal(), opened as dsn:
        applied = schema.migrate(dsn, settings)
        if applied:
            _say(f"Schema is new: {len(applied)} migrations applied.")
        has_key = _prepare_keys(dsn, settings)
        app = create_app(settings, dsn, runs_jobs=not settings.database_url)
        demo = _Demo() if settings.demo else None

        def greet(address: str) -> None:
            _greet(settings, address, time.monotonic() - started, is_open=not has_key)
            if demo:
                demo.start(address)

        server = _Server(uvicorn_config(app, settings), greet, demo.stop if demo else None)
        server.run(sockets=[listener])
    return DONE if server.started else WRONG_USE


def run_serve(settings: Settings, _arguments: argparse.Namespace) -> int:
    """The HTTP service alone."""
    logs.set_up_logs()
    if not settings.database_url:
        raise SetupError(
            "serve needs a database server: set ENERGY_DATABASE_URL.",
            hint="`energy-platform up` brings a database of its own",
        )
    with database.connect_now(settings.database_url, "energy-platform serve") as connection:
        missing = schema.missing_migrations(connection)
        if missing:
            problem = f"The database lacks {len(missing)} migrations."
        elif not schema.is_applied(connection):
            problem = "The database has not seen the sql/ of this release."
        else:
            problem = None
    if problem:
        raise SetupError(problem, hint="run `energy-platform migrate`")
    _prepare_keys(settings.database_url, settings)
    if settings.workers > 1:
        return _serve_by_workers(settings)
    app = create_app(settings, settings.database_url)
    server = _Server(uvicorn_config(app, settings))
    with _stop_by_signal():
        server.run(sockets=[_listen(settings)])
    return DONE if server.started else WRONG_USE


def _serve_by_workers(settings: Settings) -> int:
    """The service in several processes. This one holds the address, and serves nothing."""
    with (
        _bind(settings) as held,
        # In memory where there is such a folder: a write to a mapped file may wait for a disk.
        tempfile.TemporaryDirectory(
            prefix="energy-metrics-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        ) as folder,
    ):
        # From here on only sockets that say so as well share the address, which are the workers'.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        settings = msgspec.structs.replace(settings, port=held.getsockname()[1])
        asyncio.run(
            workers.Workers(
                functools.partial(_run_worker, settings, folder),
                settings.workers,
                functools.partial(metrics.forget_gauges, folder),
            ).keep()
        )
    return DONE


def _run_worker(settings: Settings, folder: str, number: int, line: workers.Line) -> None:
    """One of several processes of the service, from its start to its end."""
    logs.set_up_logs()
    metrics.share_metrics(folder, number)
    assert settings.database_url
    config = uvicorn_config(create_app(settings, settings.database_url), settings)
    server = _Server(config)

    async def say_alive() -> None:
        if not line.say_alive():
            server.should_exit = True

    config.callback_notify = say_alive
    config.timeout_notify = workers.ALIVE_SECONDS
    # A listener of its own takes connections from when the worker is ready until it ends. Of one
    # that is shared, the worker that wakes first takes most: 29 of 32 in the median of two workers.
    with contextlib.suppress(KeyboardInterrupt), _stop_by_signal():
        server.run(sockets=[_bind(settings, socket.SO_REUSEPORT)])
    if not line.say_alive():  # whoever made the folder was killed
        shutil.rmtree(folder, ignore_errors=True)


def uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=JoinedWritesProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )


def _listen(settings: Settings) -> socket.socket:
    """The service's socket, taken before anything else is started. Raises: SetupError."""
    listener = _bind(settings)
    listener.listen(2048)
    return listener


def _bind(settings: Settings, *options: int) -> socket.socket:
    """A socket that has the service's address. Raises: SetupError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in (socket.SO_REUSEADDR, *options):
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise SetupError(
            f"The service cannot listen on {settings.host} port {settings.port}: {error.strerror}.",
            hint="choose another by --port",
        ) from error
    return bound


class _Server(uvicorn.Server):
    """Uvicorn that says when and where it is ready, and has something end before it does."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[str], None] = lambda _: None,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._before_end = before_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._before_end:
            await self._before_end()
        await super().shutdown(sockets)


class _Demo:
    """A simulated fleet, in a process of its own so that it does not take the service's turns."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "energy_platform", "simulate", "--url", address, "--watch"],
            start_new_session=True,  # Ctrl-C is for us; the fleet ends by stop()
        )

    async def stop(self) -> None:
        """Let it ask for its account while the service still answers."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, DEMO_END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[None]:
    """SIGTERM before the service runs ends it as Ctrl-C does: what was opened is closed."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare_keys(dsn: str, settings: Settings) -> bool:
    """Make the bootstrap key; whether there is a key at all.

    Raises: SetupError for an address that others reach while there is none.
    """
    with database.connect_now(dsn, "energy-platform keys") as connection:
        if settings.bootstrap_key:
            access.bootstrap_key(connection, settings.bootstrap_key)
        has_key = bool(access.list_keys(connection))
        if not has_key and not is_loopback(settings.host):
            raise SetupError(
                f"{settings.host} can be reached by others, and there is no API key yet.",
                hint="make one with `energy-platform keys create`, or set ENERGY_BOOTSTRAP_KEY",
            )
    return has_key


def _greet(settings: Settings, address: str, seconds: float, *, is_open: bool) -> None:
    program = sys.argv[0] if sys.argv[0].endswith("energy-platform") else "energy-platform"
    folder = "" if settings.data_dir == "energy-data" else f" --data-dir {settings.data_dir}"
    instant = "'$(date -u +%FT%TZ)'"  # in the shell's own quotes
    reading = f'{{"meterId":"M-101","kwhConsumedAc":14.6,"voltage":231,"timestamp":"{instant}"}}'
    _say(
        f"""
Ready after {seconds:.1f} s: {address}  (Ctrl-C stops it)

  API reference    {address}/schema
  A first reading  curl {address}/v1/ingest -H 'Content-Type: application/json' -d \\
                     '{reading}'
  Live             curl {address}/v1/live/meters
  SQL              psql "$({program} dsn{folder} --role reader)"
  A fleet          {program} simulate --url {address} --faults
"""
    )
    if is_open:
        _say(
            "There is no API key yet: this is open to everyone on this machine, and to nobody else "
            f"({program} keys create).\n"
        )


def _say(text: str) -> None:
    print(text, flush=True)


# ---- migrate, doctor, jobs, dsn ----------------------------------------------------------------


def run_migrate(settings: Settings, _arguments: argparse.Namespace) -> int:
    """Schema to the newest version."""
    with runtime.open_database(settings) as dsn:
        applied = schema.migrate(dsn, settings)
        if settings.bootstrap_key:
            with database.connect_now(dsn, "energy-platform keys") as connection:
                access.bootstrap_key(connection, settings.bootstrap_key)
    for migration in applied:
        _say(f"applied {migration}")
    _say("The schema is at the newest version.")
    return DONE


def run_doctor(settings: Settings, _arguments: argparse.Namespace) -> int:
    """Say what is unsafe or late, each with its mend."""
    with (
        runtime.open_database(settings, may_create=False) as dsn,
        database.connect_now(dsn, "energy-platform doctor") as connection,
    ):
        findings = doctor.examine(connection, settings, utc_now())
    for part, found in itertools.groupby(findings, lambda finding: finding.part):
        _say(part)
        listed = list(found)
        for finding in listed[:FINDINGS_SHOWN_MAX]:
            mark = "* " if finding.severity == "remark" else ""
            _say(f"  {mark}{finding.subject}: {finding.problem}\n      {finding.mend}")
        if len(listed) > FINDINGS_SHOWN_MAX:
            _say(f"  and {len(listed) - FINDINGS_SHOWN_MAX} more")
    faults = sum(finding.severity == "fault" for finding in findings)
    _say(f"{faults} found." if faults else "Nothing is wrong.")
    return FOUND_WRONG if faults else DONE


def run_jobs(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run due jobs once, where the server has no background workers."""
    logs.set_up_logs()
    with (
        runtime.open_database(settings, may_create=False) as dsn,
        database.connect_now(dsn, "energy-platform jobs") as connection,
    ):
        if schema.missing_migrations(connection):
            raise SetupError("The schema is not there yet.", hint="run `energy-platform migrate`")
        runs = schema.run_due_jobs(connection, utc_now, run_all=arguments.all)
    for run in runs:
        seconds = (run.finished_at - run.started_at).total_seconds()
        _say(f"{'ok    ' if run.succeeded else 'FAILED'} {seconds:7.2f} s  {run.job_name}")
        if run.error:
            _say(f"    {run.error}")
    if not runs:
        _say("No job is due.")
    return DONE if all(run.succeeded for run in runs) else FOUND_WRONG


def run_dsn(settings: Settings, _arguments: argparse.Namespace) -> int:
    """Print the connection string of the running database."""
    _say(runtime.find_running(settings, settings.dsn_role))
    return DONE


# ---- keys -------------------------------------------------------------------------------------


def add_keys_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key; its secret is shown once")
    create.add_argument("name", help="whose key it is")
    create.add_argument(
        "--scope",
        action="append",
        choices=access.SCOPES,
        help="what it may do; repeat for several (default: ingest)",
    )
    bound = create.add_mutually_exclusive_group()
    bound.add_argument("--device", action="append", help="only for this device; repeat for several")
    bound.add_argument("--prefix", help="only for devices whose id begins with this")
    everything = actions.add_parser("list", help="all keys")
    revoke = actions.add_parser("revoke", help="end a key for good")
    revoke.add_argument("key_id")
    for action in (create, everything, revoke):
        _add_settings(action, "keys")  # they may stand behind the action as well


def run_keys(settings: Settings, arguments: argparse.Namespace) -> int:
    """API keys."""
    with (
        runtime.open_database(settings, may_create=arguments.action == "create") as dsn,
        database.connect_now(dsn, "energy-platform keys") as connection,
    ):
        if schema.missing_migrations(connection):
            schema.migrate(dsn, settings, keep_policies=True)
        if arguments.action == "create":
            key, secret = access.make_key(
                arguments.name, arguments.scope or ["ingest"], arguments.device, arguments.prefix
            )
            access.add_key(connection, key)
            print(f"{key.key_id} {key.name}: the secret is shown this once", file=sys.stderr)
            _say(secret)
        elif arguments.action == "list":
            for key in access.list_keys(connection):
                _say(_describe_key(key))
        else:
            access.revoke_key(connection, arguments.key_id)
            _say(f"{arguments.key_id} is revoked; services stop taking it within seconds.")
    return DONE


def _describe_key(key: access.Key) -> str:
    bound = ", ".join(key.device_ids or []) or (
        f"{key.device_prefix}*" if key.device_prefix else ""
    )
    state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "valid"
    scopes = ",".join(key.scopes)
    return f"{key.key_id}  {state:24}  {scopes:18}  {key.name}{f'  [{bound}]' if bound else ''}"


# ---- simulate, import, export -----------------------------------------------------------------


def run_simulate(settings: Settings, _arguments: argparse.Namespace) -> int:
    """A fleet that posts to a running service."""
    from energy_platform import simulator

    options = simulator.SimulationOptions(
        url=settings.url,
        key=settings.key,
        meters=settings.meters,
        vehicles=settings.vehicles,
        interval=settings.interval,
        backfill=settings.backfill,
        duration=settings.duration,
        faults=settings.faults,
        seed=settings.seed,
        batch=settings.batch,
        watch=settings.watch,
    )

    async def simulate() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        account = await simulator.simulate(options, now=utc_now, out=sys.stdout, stop=stop)
        return account.exit_status

    return asyncio.run(simulate())


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="NDJSON or CSV with the names of the contract, the UCI household power file (needs "
        "--meter and --time-zone), or a DC charging session (needs --vehicle and --set "
        "batteryTemp=...); plain or .gz",
    )
    parser.add_argument(
        "--set",
        dest="fill",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="fill a field where the file lacks it, such as batteryTemp=20; repeat for several. "
        "The summary says in how many lines",
    )
    parser.epilog = (
        "With --meter and --vehicle the meter is assigned to the vehicle, from one interval before "
        "the first reading until further notice, or as --since and --until say. An assignment of "
        "the two that holds then is left as it is; one that contradicts it is named and stays, "
        "while the readings are stored all the same. What is not a reading goes to quarantine with "
        "its line. The same file again is all duplicates. Readings older than ENERGY_LATE_WINDOW "
        "are refused; set it for `up`, `serve` and `migrate` as well. Exit status: 0 when every "
        "reading of the file is in the database, 1 when a reading is conflicting or out of time, "
        "the assignment was not made, the file is cut or holds no reading."
    )


def run_import(settings: Settings, arguments: argparse.Namespace) -> int:
    """A file in, through the same rules as the HTTP door."""
    options = files.ImportOptions(
        meter=settings.meter,
        vehicle=settings.vehicle,
        time_zone=settings.time_zone,
        fill=files.decode_fill(arguments.fill),
        since=settings.since,
        until=settings.until,
        late_window=settings.late_window,
    )
    with (
        files.open_source(Path(arguments.file), options) as source,
        runtime.open_database(settings) as dsn,
    ):
        files.prepare_database(dsn, settings)
        account = asyncio.run(
            files.import_source(
                source,
                options,
                dsn,
                clock=utc_now,
                out=sys.stderr,
                shows_progress=settings.progress,
            )
        )
    _say(files.render_account(account))
    return DONE if account.is_whole else FOUND_WRONG


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        help="where to; compressed where it ends in .gz; default: standard output",
    )


def run_export(settings: Settings, arguments: argparse.Namespace) -> int:
    """A device's history out, as `import` takes it."""
    if (settings.meter is None) == (settings.vehicle is None):
        raise SetupError("export writes the history of one device.", hint="--meter or --vehicle")
    path = Path(arguments.file) if arguments.file else None
    try:
        with runtime.open_database(settings, may_create=False) as dsn:
            export = files.export_history(
                dsn,
                "meter" if settings.meter else "vehicle",
                settings.meter or settings.vehicle or "",
                settings.since,
                settings.until,
                path,
                stdout=sys.stdout.buffer,
                out=sys.stderr,
                shows_progress=settings.progress,
            )
    except BrokenPipeError:
        # The reader has what it wanted, as `head` does; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    print(files.render_export(export), file=sys.stderr)
    return DONE


def add_correct_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    void = actions.add_parser("void", help="take readings out of history")
    replace = actions.add_parser("replace", help="put other readings in their place")
    replace.add_argument(
        "file",
        help="the readings as they are sent to ingest, one a line, plain or .gz; - for standard "
        "input",
    )
    for action in (void, replace):
        _add_settings(action, "correct")
    parser.epilog = (
        "Name the device by --meter or --vehicle, and one reading by --at, or all of a time by "
        "--since and --until. The originals are kept with the reason. The same again changes "
        "nothing."
    )


def run_correct(settings: Settings, arguments: argparse.Namespace) -> int:
    """Void or replace readings of a device."""
    wish: dict[str, Any] = {
        "action": arguments.action,
        "reason": settings.reason,
        "meterId": settings.meter,
        "vehicleId": settings.vehicle,
        "timestamp": settings.at,
        "since": settings.since,
        "until": settings.until,
    }
    if not settings.reason:
        raise SetupError("A correction needs a --reason.")
    if arguments.action == "replace":
        is_piped = arguments.file == "-"
        text = sys.stdin.buffer.read() if is_piped else Path(arguments.file).read_bytes()
        if text.startswith(b"\x1f\x8b"):  # as `export` writes it
            text = gzip.decompress(text)
        wish["readings"] = [
            _decode_line(number, line)
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    request = corrections.decode_request(msgspec.json.encode(wish))

    async def correct(dsn: str) -> corrections.MadeCorrection:
        async with database.open_pool(dsn, name="correct", connections_max=1) as pool:
            return await corrections.correct(
                pool,
                request,
                made_by=f"command line ({getpass.getuser()})",
                now=utc_now(),
                late_window=settings.late_window,
                refresh_end=settings.refresh_end,
            )

    with runtime.open_database(settings, may_create=False) as dsn:
        with database.connect_now(dsn, "energy-platform correct") as connection:
            if schema.missing_migrations(connection):
                raise SetupError("The schema is not there.", hint="run `energy-platform migrate`")
        made = asyncio.run(correct(dsn))
    if made.correction_id is None:
        _say("Nothing had to change.")
    else:
        rollups = "follow at the next refresh" if not made.rolled_up else "show it already"
        _say(
            f"Correction {made.correction_id}: {made.voided} readings taken out, {made.stored} put "
            f"in. Every answer has changed; the rollups {rollups}."
        )
    return DONE


def _decode_line(number: int, line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"Line {number} is no JSON: {error}.", hint="one reading a line") from None


COMMANDS: Final[dict[str, Command]] = {
    "up": Command("database, schema, service and jobs, all in one", run_up),
    "serve": Command("the HTTP service alone, on a database server", run_serve),
    "migrate": Command("bring the schema to the newest version", run_migrate),
    "doctor": Command("say what is unsafe or late", run_doctor),
    "jobs": Command(
        "run due jobs where the server has no background workers",
        run_jobs,
        lambda parser: _add_flag(parser, "--all", "run every job, due or not"),
    ),
    "dsn": Command("print the connection string of the running database", run_dsn),
    "simulate": Command("a fleet that posts to a running service", run_simulate),
    "import": Command(
        "a file in, through the rules of the service", run_import, add_import_arguments
    ),
    "export": Command("a device's history out, as NDJSON", run_export, add_export_arguments),
    "correct": Command(
        "void or replace readings, with a reason", run_correct, add_correct_arguments
    ),
    "keys": Command("make, list and revoke API keys", run_keys, add_keys_arguments),
}


def _add_flag(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(flag, action="store_true", help=text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="energy-platform",
        description="AC energy at the meter, DC energy in the battery, and the ratio between them.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(sub)
        _add_settings(sub, name)
    return parser


def _add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    """The settings of a command as options; one that is not given is not in the result."""
    group = parser.add_argument_group("settings (each is also an environment variable)")
    for option in OPTIONS:
        if command not in option.commands:
            continue
        given: dict[str, Any] = {"metavar": option.name.upper().split("_")[-1]}
        if option.type is bool:
            given = {"action": argparse.BooleanOptionalAction}
        text = f"{option.description} [{option.environment_name}]".replace("%", "%%")
        group.add_argument(
            option.flag, dest=option.field, default=argparse.SUPPRESS, help=text, **given
        )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    try:
        settings = load_settings(arguments.command, os.environ, vars(arguments))
        return command.run(settings, arguments)
    except (UnreachableError, StorageError) as error:
        return _fail(error, NOT_REACHABLE)
    except (SetupError, RequestError) as error:
        return _fail(error, WRONG_USE)
    except OSError as error:
        return _fail(SetupError(str(error)), WRONG_USE)
    except KeyboardInterrupt:
        return DONE


def _fail(error: EnergyError, status: int) -> int:
    print(f"energy-platform: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
    return status
