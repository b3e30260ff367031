"""Imports go down by rooms only, inside a room without circles, and two starts load a stated list and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lazyfs"

# From the bottom up; the rooms of one line do not know each other. DESIGN.md, "Rooms", quotes this.
ROOMS = """
errors records
core system
tasks
sources cache decoding fuse
images control
indexing
serving mounting
daemon containers
commands
"""
LEVEL = {room: level for level, line in enumerate(ROOMS.split("\n")) for room in line.split()}

# The room or module that alone may import a library.
ONLY = {
    "httpx": "sources.connections",
    "httpcore": "sources.connections",
    "pyfuse3": "fuse",
    "rich": "commands",
    "matplotlib": "commands",
    "argparse": "commands",
}

# Names in the cache directory, parts of paths in cache/ only: others ask it where something is.
CACHE_NAMES = set(
    "layers indexes scans profiles refs uppers tmp table present groups namespace.erofs".split()  # noqa: SIM905
)

# What makes a module impure: I/O, clocks, tasks, processes, randomness. `urllib.parse` is pure, and `mmap` is
# there as the type of a buffer that somebody else has mapped.
IMPURE = set(
    """
asyncio concurrent ctypes fcntl glob http httpx multiprocessing os pathlib pyfuse3 random select shutil
signal socket ssl subprocess tempfile threading time trio urllib.error urllib.request urllib.robotparser
""".split()  # noqa: SIM905 -- easier to read
)


def modules() -> dict[str, Path]:
    """All modules by their name below lazyfs: "core.oci.digests"."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.partition(".")[0]


def ours(path: Path) -> set[str]:
    return {one for name in imports(path) if (one := name.removeprefix("lazyfs.")) in MODULES}


def test_every_module_lies_in_a_room() -> None:
    assert {room(name) for name in MODULES} == set(LEVEL)
    assert {name for name in MODULES if "." not in name} == {"errors", "records", "tasks"}
    assert all((path.parent / "__init__.py").read_text() == "" for path in MODULES.values())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    allowed = {other for other in LEVEL if LEVEL[other] < LEVEL[room(name)]} | {room(name)}
    assert {one for one in ours(MODULES[name]) if room(one) not in allowed} == set()


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_no_circles_inside_a_room(name: str) -> None:
    inside = {one: ours(path) for one, path in MODULES.items() if room(one) == name}
    TopologicalSorter({one: known & set(inside) for one, known in inside.items()}).prepare()


# What decides, outside of core: it lies beside what acts.
PURE = {"serving.schedule", "serving.sources"}


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if room(name) == "core" or name in PURE])
def test_what_decides_is_pure(name: str) -> None:
    imported = {one + "." for one in imports(MODULES[name])}
    assert not {one for one in imported if any(one.startswith(impure + ".") for impure in IMPURE)}
    assert not any(isinstance(node, ast.Await) for node in ast.walk(ast.parse(MODULES[name].read_text())))


@pytest.mark.parametrize("library", sorted(ONLY))
def test_a_library_has_one_room(library: str) -> None:
    importers = {name for name, path in MODULES.items() if any(room(one) == library for one in imports(path))}
    assert {name for name in importers if not f"{name}.".startswith(ONLY[library] + ".")} == set()


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if room(name) != "cache"])
def test_only_the_cache_room_knows_its_names(name: str) -> None:
    calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call)]
    joins = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "join"]
    parts = {part.value for call in joins for part in call.args if isinstance(part, ast.Constant)}
    assert not parts & CACHE_NAMES


def test_the_design_quotes_the_rooms() -> None:
    assert "\n".join(f"    {line}" for line in reversed(ROOMS.strip().split("\n"))) in (ROOT / "DESIGN.md").read_text()


def test_files_and_functions_stay_small() -> None:
    """A file has 400 lines at most, a function 60."""
    long_files, long_functions = set(), set()
    for folder in ("lazyfs", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            name, text = str(path.relative_to(ROOT)), path.read_text()
            if len(text.splitlines()) > 400:
                long_files.add(name)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    if node.end_lineno - node.lineno >= 60:
                        long_functions.add(f"{name}: {node.name}")
    assert long_files == set()
    assert long_functions == set()


# -- the two light starts --------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """What of lazyfs a fresh interpreter has imported after `code`, but for packages."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    return {one for name in done.stdout.split() if (one := name.removeprefix("lazyfs.")) in MODULES}


def test_the_client_loads_this_and_no_more() -> None:
    """What `lazyfs mount` needs until it talks to the daemon."""
    assert loaded_by("import lazyfs.commands.mounthelper") == set(
        """
        errors records commands.end commands.mounthelper cache.places control.client control.messages control.rundir
        mounting.acquire mounting.attach mounting.launch mounting.lease mounting.mount mounting.options mounting.target
        sources.access system.devices system.host core.lightjson system.private system.process system.sockets
        system.startup
        """.split()  # noqa: SIM905 -- easier to read
    )


def test_the_keeper_loads_this_and_no_more() -> None:
    """It stays as long as anything is mounted, and must never grow."""
    assert loaded_by("import lazyfs.daemon.keeper") == set(
        """
        errors daemon.arguments daemon.handover daemon.keeper fuse.wire
        system.detached system.mountapi system.sockets system.syscalls
        """.split()  # noqa: SIM905 -- easier to read
    )
