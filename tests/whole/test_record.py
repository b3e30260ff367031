"""`lazyfs record`: real starts, recorded; packs in the registry, in an index repository, in a directory; and what a
cold mount elsewhere makes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import COMMAND_DEADLINE_S, ROOT, stop_daemon
from tests.layout import Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole import starts
from tests.whole.mounting import Host, wait_until
from tests.whole.starts import FILE_BYTES, free_port, packs, reading

FOREVER = "exec sleep 1000"
NOBODY = 65534


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return starts.make_image(tmp_path_factory.mktemp("starts") / "layout")


@pytest.fixture
def pushed(layout: Layout, registry: RegistryServer, tmp_path: Path) -> str:
    """The image in a repository of its own, without an index: its name there."""
    name = "record/" + tmp_path.name.replace("[", "-").strip("]-_").lower()
    push(layout.path, "latest", f"{registry.host}/{name}:latest")
    return f"{name}:latest"


@pytest.fixture
def image(pushed: str, registry: RegistryServer) -> str:
    return f"{registry.host}/{pushed}"


@pytest.fixture(autouse=True)
def nothing_of_a_record_is_left() -> Iterator[None]:
    def left() -> set[Path]:
        return {path for path in leaks.RUNTIME_ROOT.glob("own-*")} | set(Path("/run/runc").glob("record-*"))

    before = left()
    yield
    wait_until(lambda: not left() - before)  # another session's end, too


def record(machine: Host, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return machine.lazyfs("record", "-o", machine.options, *words, check=check)


def reported(machine: Host, *words: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(record(machine, "--json", *words).stdout)
    return result


def another_host(machine: Host, tmp_path: Path) -> Host:
    directory = tmp_path / f"another-{len(list(tmp_path.glob('another-*')))}"
    directory.mkdir()
    return Host(machine.lazyfs, directory, machine.backend)


def requests_of_a_start(host: Host, proxy: FaultProxy, image: str, command: str, options: str = "") -> int:
    """Ranges and blobs that a cold start fetches."""
    proxy.clear()
    chosen = ",".join(filter(None, (host.options, options)))
    try:
        host.lazyfs("run", "--rm", "-o", chosen, image, "sh", "-c", command)
    finally:
        host.close()
    return len(proxy.matching("GET", "/blobs/"))


def test_a_recorded_start_needs_few_requests_elsewhere(
    machine: Host, image: str, pushed: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    command = reading(20, 3, 11, 7, 15, 1)
    machine.lazyfs("index", "-o", machine.options, "--push", image)
    report = reported(machine, "--push", image, "sh", "-c", command)
    assert report["image"] == image and report["starts"] == 1 and 0 < report["ready_s"] < COMMAND_DEADLINE_S
    assert report["block_bytes"] >= 6 * FILE_BYTES
    [attached] = report["attached"]
    [pack] = packs(image, machine.cache)
    assert attached["place"] == "" and attached["size_bytes"] == pack.size_bytes and attached["starts"] == 1
    assert {f"data/{number}" for number in (20, 3, 11, 7, 15, 1)} <= pack.files
    assert not {f"data/{number}" for number in (0, 9, 22)} & pack.files

    with_pack = requests_of_a_start(another_host(machine, tmp_path), proxy, f"{proxy.host}/{pushed}", command)
    assert with_pack <= 8
    assert not [one for one in proxy.requests if one.method != "GET" and one.method != "HEAD"]


def test_what_earlier_starts_needed_is_merged(machine: Host, image: str, tmp_path: Path) -> None:
    """On the same host, and on another one, which has neither that profile nor those blocks."""
    machine.lazyfs("index", "-o", machine.options, "--push", image)
    record(machine, "--push", image, "sh", "-c", reading(2, 3))
    record(machine, "--push", image, "sh", "-c", reading(4, 5))
    [pack] = packs(image, machine.cache)
    assert pack.starts == 2 and {f"data/{number}" for number in (2, 3, 4, 5)} <= pack.files
    assert any(touch.starts == 2 for touch in pack.profile.touches)  # the shell

    other = another_host(machine, tmp_path)
    try:
        record(other, "--push", image, "sh", "-c", reading(6, 7))
        [merged] = packs(image, other.cache)
        assert merged.starts == 3 and {"data/6", "data/7"} <= merged.files
        [pack] = packs(image, machine.cache)
        assert {f"data/{number}" for number in (2, 3, 4, 5)} <= pack.files
    finally:
        other.close()


def test_what_earlier_starts_needed_is_fetched_if_it_is_gone(machine: Host, image: str, layout: Layout) -> None:
    machine.lazyfs("index", "-o", machine.options, "--push", image)
    record(machine, image, "sh", "-c", reading(2, 3))
    machine.forget()
    machine.lazyfs("cache", "prune", "--cache", machine.cache)
    assert starts.known_starts(layout, machine.cache) == 1 and not list((machine.cache / "layers").iterdir())
    record(machine, "--push", image, "sh", "-c", reading(4))
    [pack] = packs(image, machine.cache)
    assert {"data/2", "data/3", "data/4"} <= pack.files


def test_replacing_a_pack_uploads_the_pack_only(
    machine: Host, image: str, pushed: str, proxy: FaultProxy
) -> None:
    through = f"{proxy.host}/{pushed}"
    record(machine, "--push", through, "sh", "-c", reading(2))  # and the index, which this host made
    assert machine.json("inspect", "-o", machine.options, image)["index"] != "none"
    proxy.clear()
    record(machine, "--push", through, "sh", "-c", reading(3))
    uploads = proxy.matching("PUT", "/blobs/uploads/")
    [pack] = packs(image, machine.cache)
    assert len(uploads) == 1 and pack.starts == 2
    assert uploads[0].headers["content-length"] == str(pack.size_bytes)
    # The artifact; and the list of what is attached, with it, and without the former one.
    assert len(proxy.matching("PUT", "/manifests/")) <= 3


def test_the_pack_is_no_larger_than_allowed(machine: Host, image: str) -> None:
    most = 2_600_000
    report = reported(machine, "--push", "--max-pack", most, image, "sh", "-c", reading(*range(8)))
    [pack] = packs(image, machine.cache)
    assert report["attached"][0]["size_bytes"] == pack.size_bytes <= most + 20_000
    assert "data/0" in pack.files and "data/7" not in pack.files, "what is needed last is left out"


def test_a_directory_becomes_an_index_repository(
    machine: Host, image: str, pushed: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """For an image that nobody may push to: with the index, which this host made."""
    directory = tmp_path / "packs"
    command = reading(9, 2, 17)
    report = reported(machine, "--output", directory, image, "sh", "-c", command)
    assert report["attached"][0]["place"] == f"oci:{directory}"
    assert machine.json("inspect", "-o", machine.options, image)["index"] != "attached"
    other = another_host(machine, tmp_path)
    count = requests_of_a_start(
        other, proxy, f"{proxy.host}/{pushed}", command, options=f"index_repository=oci:{directory}"
    )
    assert count <= 2, "all but the image's configuration is in the directory"


def test_an_index_repository_gets_index_and_pack(
    machine: Host, image: str, registry: RegistryServer, pushed: str
) -> None:
    repository = f"{registry.host}/{pushed.partition(':')[0]}-indexes"
    record(machine, "--push-to", repository, image, "sh", "-c", reading(5))
    [pack] = packs(image, machine.cache, repository)
    assert "data/5" in pack.files
    assert packs(image, machine.cache) == []


def test_a_page_cache_hides_nothing(machine: Host, image: str) -> None:
    """Others have it mounted, and read all of it: its layers are sealed, its pages in memory."""
    target = machine.mount(image)
    for number in range(starts.FILES):
        (target / f"data/{number}").read_bytes()
    (target / "bin/busybox").read_bytes()
    if machine.backend == "kernel":
        wait_until(lambda: len(list((machine.cache / "layers").glob("*/sound"))) == 2)
    report = reported(machine, image, "sh", "-c", reading(8, 13))
    assert report["block_bytes"] >= 2 * FILE_BYTES + 300_000
    assert (target / "data/8").read_bytes() == starts.content(8), "the other mount is as it was"


@pytest.mark.parametrize("kind", ["exit", "line", "port", "http", "seconds"])
def test_every_kind_of_readiness(kernel_host: Host, image: str, kind: str) -> None:
    port = free_port()
    command, words = {
        "exit": (reading(1), ["--until-exit"]),
        "line": (f"{reading(1)}; echo now up; {FOREVER}", ["--until-line", "now up"]),
        "port": (f"{reading(1)}; exec nc -l -p {port} -e sleep 1000", ["--until-port", str(port)]),
        "http": (
            f"{reading(1)}; mkdir /www; echo page > /www/index.html; exec httpd -f -p {port} -h /www",
            ["--until-http", f"http://127.0.0.1:{port}/"],
        ),
        "seconds": (f"{reading(1)}; {FOREVER}", ["--seconds", "1.5"]),
    }[kind]
    result = record(kernel_host, "--stop-timeout", "0.2", *words, image, "sh", "-c", command)
    assert "ready after" in result.stderr and result.stdout == ""
    report = reported(kernel_host, image, "true")
    assert report["starts"] == 2 and report["block_bytes"] >= FILE_BYTES


@pytest.mark.parametrize(
    ("command", "words", "status", "said"),
    [
        ("exit 3", [], 32, "failed with status 3"),
        ("echo last words; exit 1", ["--until-line", "never"], 32, "ended with status 1 before"),
        ("exit 0", ["--until-port", "1"], 32, "ended with status 0 before"),
        (FOREVER, ["--timeout", "0.5"], 32, "was not ready in time"),
        (FOREVER, ["--timeout", "0.5", "--until-http", "http://127.0.0.1:1/"], 32, "was not ready in time"),
        (FOREVER, ["--until-port", "70000"], 1, "is not a TCP port"),
        (FOREVER, ["--seconds", "-1"], 1, "is not a time"),
    ],
)
def test_a_start_that_fails_is_not_recorded(
    kernel_host: Host, image: str, layout: Layout, command: str, words: list[str], status: int, said: str
) -> None:
    words = ["--push", "--stop-timeout", "0.2", *words]
    result = record(kernel_host, *words, image, "sh", "-c", command, check=False)
    assert result.returncode == status and said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert ("last words" in result.stderr) == ("last words" in command)
    assert packs(image, kernel_host.cache) == [] and starts.known_starts(layout, kernel_host.cache) == 0


def test_a_command_that_is_not_there(kernel_host: Host, image: str) -> None:
    result = record(kernel_host, "--push", image, "/no/such/program", check=False)
    assert result.returncode == 127 and "nothing was recorded" in result.stderr
    assert packs(image, kernel_host.cache) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_nothing_is_left(
    machine: Host, image: str, layout: Layout, number: signal.Signals
) -> None:
    words = ["record", "-o", machine.options, "--push", "--stop-timeout", "0.2", "--until-line", "never", image]
    command = [sys.executable, "-m", "lazyfs.commands.main", *words, "sh", "-c", f"echo it runs; {FOREVER}"]
    before = set(leaks.RUNTIME_ROOT.glob("own-*"))
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line == "it runs\n":
                break
        assert set(leaks.RUNTIME_ROOT.glob("own-*")) - before
        process.send_signal(number)
        rest = process.stderr.read()  # to the end of the guard, too, which has it open
        status = process.wait(COMMAND_DEADLINE_S)
    # The container's first process ignores the signal, and is killed then; or runc, which has just started it, dies.
    assert status in ((-number,) if number == signal.SIGKILL else (128 + signal.SIGKILL, 128 + number))
    assert "clean-up" not in rest
    assert set(leaks.RUNTIME_ROOT.glob("own-*")) <= before
    assert not list(Path("/var/lib/lazyfs/containers").glob("record-*"))
    assert packs(image, machine.cache) == [] and starts.known_starts(layout, machine.cache) == 0


@pytest.fixture
def home() -> Iterator[Path]:
    """The home directory of an ordinary user, with a session's runtime directory in it."""
    home = Path(os.environ["TMPDIR"]) / "home-of-nobody"
    for directory in (home, home / "run"):
        directory.mkdir(mode=0o700)
        os.chown(directory, NOBODY, NOBODY)
    yield home
    stop_daemon(home / ".cache" / "lazyfs")
    subprocess.run(["rm", "-rf", str(home)], check=True)


def test_an_ordinary_user_records(home: Path, image: str) -> None:
    """By backend=fuse; the root is read-only then. /dev/fuse is open to everybody, as on most hosts."""
    script = (
        'mknod "$HOME/fuse" c 10 229 && chmod 666 "$HOME/fuse" && mount --bind "$HOME/fuse" /dev/fuse &&'
        f' exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"'
    )
    words = ["record", "--push", "--json", image, "sh", "-c", "cat /data/4 /data/5 > /dev/null"]
    environment = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), "XDG_CACHE_HOME": "", "XDG_STATE_HOME": ""}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "lazyfs.commands.main", *words],
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["attached"]
    assert not list((home / "run" / "lazyfs").glob("own-*"))
    [pack] = packs(image, home / ".cache" / "lazyfs")
    assert {"data/4", "data/5"} <= pack.files
