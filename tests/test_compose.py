"""Do the compose file and the Dockerfile fit the program that they start?

There is no container engine here, so they are held against the program itself: its settings, its
commands, its routes, its refusal to start without a key.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from energy_platform import cli
from energy_platform.settings import DATABASE_NAME, OPTIONS, check_retention, load_settings

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SECRETS = {
    "DATABASE_PASSWORD": 'p"w $x/@:',
    "ENERGY_BOOTSTRAP_KEY": "k" * 40,
    "PGADMIN_EMAIL": "dba@example.com",
    "PGADMIN_PASSWORD": "another",
}
_VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")


def interpolate(node: Any, environment: dict[str, str]) -> Any:
    """What compose makes of ${NAME:-default} and ${NAME:?message}."""
    if isinstance(node, dict):
        return {key: interpolate(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, environment) for value in node]
    if not isinstance(node, str):
        return node

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if operator == ":-":
            return environment.get(name) or rest
        assert environment.get(name), f"{name} has no value and no default"
        return environment[name]

    return _VARIABLE.sub(fill, node)


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text()))


@pytest.fixture(scope="module")
def services(raw: dict[str, Any]) -> dict[str, Any]:
    return dict(interpolate(raw, SECRETS)["services"])


def walk(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from walk(value)


def own_settings(service: dict[str, Any]) -> dict[str, str]:
    return {k: v for k, v in service["environment"].items() if k.startswith("ENERGY_")}


# ---- The file -----------------------------------------------------------------------------------


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    images = {name: service["image"] for name, service in services.items()}
    assert images["database"] == "timescale/timescaledb:2.29.2-pg17"
    for name, image in images.items():
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?(-\w+)?", image), name
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            assert re.match(r"FROM python:3\.\d+-slim-\w+", line)


def test_the_image_has_the_version_of_the_program(services: dict[str, Any]) -> None:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert services["migrate"]["image"] == services["service"]["image"]
    assert services["service"]["image"] == f"energy-platform:{version}"


def test_no_secret_has_a_default_or_stands_in_the_file(raw: dict[str, Any]) -> None:
    found = [match for text in walk(raw) for match in _VARIABLE.finditer(text)]
    for name, operator, message in (match.groups() for match in found):
        if re.search("PASSWORD|KEY|EMAIL", name):
            assert operator == ":?", name
            assert message.startswith(f"set {name}"), name
        else:
            assert operator == ":-", name
    assert {match[1] for match in found if match[2] == ":?"} == SECRETS.keys()
    for service in raw["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|KEY", name):
                assert _VARIABLE.fullmatch(value), name


def test_the_example_of_the_environment_names_every_variable(raw: dict[str, Any]) -> None:
    used = {match[1] for text in walk(raw) for match in _VARIABLE.finditer(text)}
    example = (ROOT / "deploy" / "env.example").read_text()
    named = dict(re.findall(r"^#?(\w+)=(.*)$", example, re.M))
    assert named.keys() == used
    assert all(not named[name] for name in SECRETS)
    for text in walk(raw):
        for name, operator, default in _VARIABLE.findall(text):
            assert operator != ":-" or named[name] == default, name


def test_only_the_api_is_reachable_from_outside(services: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert ports == {
        "database": ["127.0.0.1:5432:5432"],
        "migrate": [],
        "service": ["8080:8080"],
        "pgadmin": ["127.0.0.1:5050:5050"],
    }
    assert services["service"]["environment"]["ENERGY_PORT"] == "8080"
    assert services["pgadmin"]["environment"]["PGADMIN_LISTEN_PORT"] == "5050"


def test_each_starts_after_what_it_needs(services: dict[str, Any]) -> None:
    conditions = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert conditions == {
        "database": {},
        "migrate": {"database": "service_healthy"},
        "service": {
            "database": "service_healthy",
            "migrate": "service_completed_successfully",
        },
        "pgadmin": {"database": "service_healthy"},
    }
    for name, service in services.items():
        assert ("healthcheck" in service) == (name != "migrate"), name
        assert service["restart"] == ("no" if name == "migrate" else "unless-stopped"), name


def test_our_containers_have_no_rights_that_they_do_not_need(services: dict[str, Any]) -> None:
    for name in ("migrate", "service"):
        service = services[name]
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "USER 10001:10001" in dockerfile
    assert "--uid 10001" in dockerfile


def test_the_database_is_the_one_that_everyone_connects_to(services: dict[str, Any]) -> None:
    environment = services["database"]["environment"]
    assert environment["POSTGRES_DB"] == DATABASE_NAME == "energy_db"
    assert environment["POSTGRES_USER"] == "energy_user"
    for name in ("migrate", "service"):
        url = services[name]["environment"]["ENERGY_DATABASE_URL"]
        assert psycopg.conninfo.conninfo_to_dict(url) == {
            "host": "database",
            "port": "5432",
            "dbname": "energy_db",
            "user": "energy_user",
        }
        # In a variable of its own: in a URL it would have to be percent-encoded.
        assert services[name]["environment"]["PGPASSWORD"] == SECRETS["DATABASE_PASSWORD"]
    servers = json.loads((ROOT / "deploy" / "pgadmin-servers.json").read_text())["Servers"]
    (server,) = servers.values()
    assert (server["Host"], server["Port"]) == ("database", 5432)
    assert (server["MaintenanceDB"], server["Username"]) == ("energy_db", "energy_user")
    assert not any("password" in key.lower() for key in server)
    assert (
        "./deploy/pgadmin-servers.json:/pgadmin4/servers.json:ro"
        in (services["pgadmin"]["volumes"])
    )


def test_the_database_is_sized_and_keeps_its_data(
    raw: dict[str, Any], services: dict[str, Any]
) -> None:
    database = services["database"]
    assert {name for name in database["environment"] if name.startswith("TS_TUNE_")} == {
        "TS_TUNE_MEMORY",
        "TS_TUNE_NUM_CPUS",
        "TS_TUNE_MAX_CONNS",
        "TS_TUNE_MAX_BG_WORKERS",
        "TS_TUNE_WAL_DISK_SIZE",
    }
    assert database["shm_size"] == "1gb"
    assert "database-data:/var/lib/postgresql/data" in database["volumes"]
    named = {
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    assert raw["volumes"].keys() == named
    # Every process of the service: readers, 4 for admin, writers; and some for people and jobs.
    environment = services["service"]["environment"]
    each = (
        int(environment["ENERGY_READER_CONNECTIONS"])
        + int(environment["ENERGY_WRITER_CONNECTIONS"])
        + 4
    )
    most = int(environment["ENERGY_WORKERS"]) * each
    assert most <= int(database["environment"]["TS_TUNE_MAX_CONNS"]) // 2


# ---- Against the program ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["migrate", "service"])
def test_every_setting_is_one_that_the_command_reads(name: str, services: dict[str, Any]) -> None:
    (command,) = services[name]["command"]
    assert command in cli.COMMANDS
    given = own_settings(services[name])
    known = {option.environment_name for option in OPTIONS if command in option.commands}
    assert given.keys() <= known
    settings = load_settings(command, given)
    assert check_retention(settings) == []
    assert settings.late_window == timedelta(days=380)
    wider = {**given, "ENERGY_LATE_WINDOW": "P9000D"}
    assert check_retention(load_settings(command, wider)) == []


def test_migrate_and_service_agree_on_what_is_kept(services: dict[str, Any]) -> None:
    for option in OPTIONS:
        if {"migrate", "serve"} <= option.commands and option.field != "bootstrap_key":
            migrate, service = (
                own_settings(services[name]).get(option.environment_name)
                for name in ("migrate", "service")
            )
            assert migrate == service, option.environment_name
    # The secret that makes the first key is not in the process that the world talks to.
    assert "ENERGY_BOOTSTRAP_KEY" in own_settings(services["migrate"])
    assert "ENERGY_BOOTSTRAP_KEY" not in own_settings(services["service"])


def test_the_dockerfile_runs_commands_that_there_are() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.M)[-1]) == ["energy-platform"]
    (default,) = json.loads(re.findall(r"^CMD (.+)$", dockerfile, re.M)[-1])
    assert default in cli.COMMANDS
    assert "--require-hashes" in dockerfile
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M):
        for source in copied.split():
            assert (ROOT / source).exists(), source
            assert source in allowed, source


def test_the_service_starts_in_the_order_of_the_file_and_not_without_a_key(
    services: dict[str, Any], dsn: str
) -> None:
    others = {k: v for k, v in os.environ.items() if not k.startswith("ENERGY_")}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "energy_platform", *services[name]["command"]],
            env={**others, **own_settings(services[name]), "ENERGY_DATABASE_URL": dsn},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    too_early = run("service")
    assert too_early.returncode == cli.WRONG_USE
    assert "0.0.0.0 can be reached by others, and there is no API key" in too_early.stderr
    for _ in range(2):
        migrated = run("migrate")
        assert migrated.returncode == cli.DONE, migrated.stderr
    with psycopg.connect(dsn) as connection:
        keys = connection.execute("SELECT name, scopes FROM api_key").fetchall()
    assert keys == [("bootstrap", ["ingest", "read", "admin"])]


def test_the_health_check_tells_a_ready_service_from_none(
    services: dict[str, Any], api: httpx.Client
) -> None:
    how, python, *arguments = services["service"]["healthcheck"]["test"]
    assert (how, python) == ("CMD", "python")

    def check(port: int) -> int:
        own = [argument.replace(":8080/", f":{port}/") for argument in arguments]
        assert own != arguments
        return subprocess.run(
            [sys.executable, *own], capture_output=True, timeout=30, check=False
        ).returncode

    assert api.base_url.port
    assert check(api.base_url.port) == 0
    assert check(9) != 0


# ---- Against compose ----------------------------------------------------------------------------


def find_compose() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version"], capture_output=True, check=False)
            if found.returncode == 0:
                return command
    return None


def test_compose_itself_reads_the_file_and_asks_for_every_secret(tmp_path: Path) -> None:
    command = find_compose()
    if command is None:
        pytest.skip("no docker compose client: that compose takes the file is not proved")
    no_env_file = tmp_path / "empty.env"
    no_env_file.touch()
    clean = {k: v for k, v in os.environ.items() if k not in SECRETS}

    def read_config(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--file", str(COMPOSE), "--env-file", str(no_env_file), "config"],
            env={**clean, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    full = read_config(SECRETS)
    assert full.returncode == 0, full.stderr
    assert yaml.safe_load(full.stdout)["services"].keys() == {
        "database",
        "migrate",
        "service",
        "pgadmin",
    }
    for secret in SECRETS:
        without = read_config({k: v for k, v in SECRETS.items() if k != secret})
        assert without.returncode != 0, secret
        assert f"set {secret}" in without.stderr
