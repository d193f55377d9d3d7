"""Do the modules import in one direction only?"""

import ast
from pathlib import Path

import pytest

import energy_platform

ROOT = Path(energy_platform.__file__).parent

# Each may import what stands in an earlier row, and nothing of its own row.
ROWS: list[set[str]] = [
    {"errors"},
    {"settings"},  # a setting that is none is a SetupError
    {"readings", "database"},
    {
        "ingest",
        "performance",
        "fleet",
        "quarantine",
        "access",
        "schema",
        "corrections",
        "plausibility",
    },
    {"http"},
    {"cli"},
]

# What stands outside of the rows, and what it may import. Nothing in the rows but cli imports them.
BESIDE: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "logs": set(),
    "embedded": {"errors"},
    # Knows processes, not what they do: the command line says that.
    "workers": {"errors"},
    # Says what is wrong with a running schema, for the command line.
    "doctor": {"database", "errors", "schema", "settings"},
    # Which database a command works on: the engine, or a server.
    "runtime": {"database", "embedded", "errors", "settings"},
    # A client of the HTTP door, in a process of its own: it must not reach into the service.
    "simulator": {"errors"},
    # A second door: files go through the same rules and the same writer as HTTP bodies do; on the
    # way it declares and assigns the device, and migrates a database that is new.
    "files": {"database", "errors", "fleet", "ingest", "readings", "schema", "settings"},
}

# The modules of a package, each of which may import only those before it.
INSIDE: dict[str, list[str]] = {
    "simulator": ["fleet", "faults", "account", "client", "assignments", "run", "__init__"],
    "files": ["formats", "account", "importer", "exporter", "__init__"],
}


def modules() -> dict[str, list[Path]]:
    """The top-level modules and packages, each with its files."""
    found: dict[str, list[Path]] = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if "node_modules" not in parts:
            found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return found


def imports_of(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """The other top-level modules of ours that a module imports."""
    known = set(modules())
    names = (name.split(".") for path in modules()[module] for name in imports_of(path))
    ours = {name[1] for name in names if name[0] == "energy_platform" and len(name) > 1}
    return ours & known - {module}


def test_every_module_has_its_place() -> None:
    assert set(modules()) <= set.union(*ROWS) | set(BESIDE)


@pytest.mark.parametrize("module", sorted(set.union(*ROWS)))
def test_imports_go_one_way(module: str) -> None:
    row = next(number for number, names in enumerate(ROWS) if module in names)
    allowed: set[str] = set().union(*ROWS[:row])
    if module == "cli":
        allowed |= set(BESIDE) - {"__main__"}
    assert own_imports(module) <= allowed


@pytest.mark.parametrize("module", sorted(BESIDE))
def test_what_stands_beside_imports_only_what_it_says(module: str) -> None:
    if module in modules():
        assert own_imports(module) <= BESIDE[module]


@pytest.mark.parametrize("package", sorted(INSIDE))
def test_imports_inside_a_package_go_one_way(package: str) -> None:
    order = INSIDE[package]
    paths = {path.stem: path for path in modules()[package]}
    assert set(paths) == set(order)
    for number, module in enumerate(order):
        names = (name.split(".") for name in imports_of(paths[module]))
        own = {name[2] for name in names if name[:2] == ["energy_platform", package] and name[2:]}
        assert own & set(order) <= set(order[:number]), module


@pytest.mark.parametrize(
    ("library", "importers"),
    [
        ("litestar", {"http"}),
        ("prometheus_client", {"http"}),
        ("zstandard", {"http"}),
        ("yoyo", {"schema"}),
        ("uvicorn", {"cli", "http"}),
        ("tqdm", {"simulator", "files"}),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, importers: set[str]) -> None:
    found = {
        module
        for module, paths in modules().items()
        if any(name.split(".")[0] == library for path in paths for name in imports_of(path))
    }
    assert found <= importers


@pytest.mark.parametrize("module", ["errors", "settings", "readings"])
def test_what_is_pure_imports_no_io(module: str) -> None:
    allowed = {
        "errors": {"typing", "msgspec"},
        "settings": {"difflib", "collections", "datetime", "typing", "msgspec", "energy_platform"},
        "readings": {"re", "collections", "datetime", "typing", "msgspec", "energy_platform"},
    }[module]
    (path,) = modules()[module]
    assert {name.split(".")[0] for name in imports_of(path)} <= allowed
