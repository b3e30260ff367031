"""Who keeps an image mounted: a client's connection, a hold by name, a target. And what the daemons say of it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from lazyfs.control import client, query
from lazyfs.control.client import Connection
from lazyfs.control.replies import REPLIES, STATS_OF_BACKEND, Entry
from lazyfs.control.requests import Attached
from lazyfs.errors import UserError
from tests.whole.mounting import DEADLINE_S, Host, entry_at, foreground_daemon, wait_until


def ask(machine: Host, **request: Any) -> dict[str, Any]:
    return client.ask_once(str(machine.socket), request, DEADLINE_S)


def lease(connection: Connection, image: str) -> dict[str, Any]:
    """Mounts the image and drops the mount's descriptor: only the connection holds it."""
    reply = connection.ask({"op": "lease", "image": image, "access": {}}, DEADLINE_S)
    os.close(connection.take_fd())
    return reply


def served(machine: Host) -> list[str]:
    return [entry["dev"] for entry in ask(machine, op="list")["mounts"]]


def test_a_hold_needs_no_target_and_survives_a_killed_worker(kernel_host: Host, image: str) -> None:
    with foreground_daemon(kernel_host.cache) as daemon:
        with Connection.open(str(kernel_host.socket)) as connection:
            dev = lease(connection, image)["dev"]
            connection.ask({"op": "hold", "name": "snapshot-1", "dev": dev}, DEADLINE_S)
        worker = kernel_host.daemon_pid()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: kernel_host.daemon_pid() != worker)
        with Connection.open(str(kernel_host.socket)) as connection:
            other = lease(connection, image.replace(":gzip", ":zstd"))["dev"]
            assert set(served(kernel_host)) == {dev, other}
        wait_until(lambda: other not in served(kernel_host))  # by then an image that nobody needs is let go
        (entry,) = ask(kernel_host, op="list")["mounts"]
        assert (entry["dev"], entry["targets"], entry["holds"]) == (dev, [], ["snapshot-1"])
        with Connection.open(str(kernel_host.socket)) as connection:
            joined = lease(connection, image)
            assert joined["joined"] is True and joined["dev"] == dev
        with pytest.raises(UserError, match="still mounted"):
            ask(kernel_host, op="stop")
        with pytest.raises(UserError, match="nothing is held"):
            ask(kernel_host, op="release", name="another")
        ask(kernel_host, op="release", name="snapshot-1")
        assert daemon.wait(DEADLINE_S) == 0


def test_a_name_holds_one_image(kernel_host: Host, image: str) -> None:
    with foreground_daemon(kernel_host.cache) as daemon:
        with Connection.open(str(kernel_host.socket)) as connection:
            first = lease(connection, image)["dev"]
            second = lease(connection, image.replace(":gzip", ":zstd"))["dev"]
            for dev in (first, second):
                connection.ask({"op": "hold", "name": "n", "dev": dev}, DEADLINE_S)
            with pytest.raises(UserError):
                connection.ask({"op": "hold", "name": "n", "dev": "0:1"}, DEADLINE_S)
        wait_until(lambda: served(kernel_host) == [second])
        ask(kernel_host, op="release", name="n")
        assert daemon.wait(DEADLINE_S) == 0


def test_a_lease_ends_with_the_report_of_a_target(kernel_host: Host, image: str) -> None:
    """The connection may stay open: what counts is the mount."""
    with foreground_daemon(kernel_host.cache) as daemon, Connection.open(str(kernel_host.socket)) as connection:
        dev = lease(connection, image)["dev"]
        connection.ask({"op": "attached", "attached": {"dev": dev, "target": "/gone", "image_dev": dev}}, DEADLINE_S)
        assert daemon.wait(DEADLINE_S) == 0


def test_replies_have_the_documented_fields(machine: Host, image: str) -> None:
    target = machine.mount(image)
    found = query.daemon_of(entry_at(target).dev)
    assert found is not None
    stats = {"ok", *REPLIES["stats"], *STATS_OF_BACKEND[machine.backend]}
    assert set(found.reply) == stats
    for op in ("list", "ping"):
        assert set(client.ask_once(found.socket_path, {"op": op}, DEADLINE_S)) == {"ok", *REPLIES[op]}
    (entry,) = client.ask_once(found.socket_path, {"op": "list"}, DEADLINE_S)["mounts"]
    assert set(entry) == set(Entry._fields) and entry["backend"] == machine.backend
    assert [set(one) for one in entry["targets"]] == [set(Attached._fields)]
    if machine.backend == "kernel":
        with Connection.open(found.socket_path) as connection:
            assert set(lease(connection, image)) == {"ok", *REPLIES["lease"]}
