"""Imports go down only: each module may import those that stand before it in this list, and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lazyfs"

# From the bottom up. DESIGN.md, "Layout", says what each group is for.
ORDER = """
errors process quickstart
core.reference core.lightsha core.oci
core.pax core.tar core.tree core.erofsformat core.erofs core.erofsread
core.deflate core.blocks core.spans core.sections core.index core.scan core.analysis core.plan
concurrency linux mountinfo detached host
zstream thinning gzipscan inflate
transfer urls credentials http download registryauth registry imagelayout source
cachelayer cache scans evict fill assemble resolve windows fetch indexer publish firstindex images
fuse.wire fuse.devices fuse.tuning fuse.mounting fuse.root
report progress options paths control controlserver
keeperlink keeper roots revival daemon fusecontrol fusemount
commands launch query unmount uppers mounts foreground doctor
accounts specmounts rootless runspec imageroot bundle runc mountedroot containers
analysisplot analyze
arguments cli mounthelper
""".split()  # noqa: SIM905 -- one group a line, as DESIGN.md has them

# What makes a module impure: I/O, clocks, tasks, processes, randomness. `urllib.parse` is pure, and `mmap` is
# there as the type of a buffer that somebody else has mapped.
IMPURE = set(
    """
asyncio concurrent ctypes fcntl glob http httpx multiprocessing os pathlib pyfuse3 random select shutil
signal socket ssl subprocess tempfile threading time trio urllib.error urllib.request urllib.robotparser
""".split()  # noqa: SIM905 -- as above
)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


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


def test_the_list_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(modules())


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down(name: str) -> None:
    known = modules()
    below = set(ORDER[: ORDER.index(name)])
    wanted = {one.removeprefix("lazyfs.") for one in imports(known[name]) if one.startswith("lazyfs.")}
    assert wanted & set(known) - {name} <= below


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("core.")])
def test_the_core_is_pure(name: str) -> None:
    imported = {one + "." for one in imports(modules()[name])}
    assert not {one for one in imported if any(one.startswith(impure + ".") for impure in IMPURE)}
    assert not any(isinstance(node, ast.Await) for node in ast.walk(ast.parse(modules()[name].read_text())))


def test_one_module_imports_httpx_and_one_package_pyfuse3() -> None:
    importers = {name: set(imports(path)) for name, path in modules().items()}
    assert [name for name, wanted in importers.items() if "httpx" in wanted] == ["http"]
    assert all(name.startswith("fuse.") for name, wanted in importers.items() if "pyfuse3" in wanted)


def test_files_stay_small() -> None:
    root = PACKAGE.parent
    files = [path for folder in ("lazyfs", "tests", "benchmarks") for path in (root / folder).rglob("*.py")]
    assert {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 500} == {}
