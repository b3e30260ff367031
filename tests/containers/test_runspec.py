"""Image configuration → runtime configuration. Pure."""

from __future__ import annotations

import pytest

from lazyfs.containers.accounts import Account
from lazyfs.containers.spec import DEFAULT_PATH, SpecOptions, build_spec, check_ids
from lazyfs.containers.specmounts import (
    IdRange,
    Mount,
    distinct_mounts,
    image_volumes,
    ordered_mounts,
    parse_bind,
    parse_tmpfs,
)
from lazyfs.core.oci.documents import ImageConfig
from lazyfs.errors import ImageError, UserError

PLAIN = ImageConfig("linux", "amd64", "", (), (), (), ("sh",), "", "", {}, (), "", ())
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1001:Bob:/home/bob:/bin/sh\n#no:x:5:5::/:\nodd\n"
GROUP = b"root:x:0:\nbob:x:1001:\nwheel:x:10:alice,bob\naudio:x:29:bob\nother:x:30:bobby\n"


def process(
    config: ImageConfig = PLAIN, account: Account | None = None, **options: object
) -> dict[str, object]:
    spec, _ = build_spec(config, account or Account(), SpecOptions(**options))  # type: ignore[arg-type]
    part = spec["process"]
    assert isinstance(part, dict)
    return part


# -- process ---------------------------------------------------------------------------------------------


def test_entrypoint_and_cmd_are_joined() -> None:
    both = PLAIN._replace(entrypoint=("/e", "1"), cmd=("c",))
    assert process(both)["args"] == ["/e", "1", "c"]
    assert process(both, command=("x", "y"))["args"] == ["/e", "1", "x", "y"]
    assert process(both, entrypoint=("/n",))["args"] == ["/n"]
    assert process(both, entrypoint=("/n",), command=("x",))["args"] == ["/n", "x"]
    assert process(both, entrypoint=(), command=("x",))["args"] == ["x"]


def test_no_command_is_refused() -> None:
    with pytest.raises(ImageError, match="no command"):
        process(PLAIN._replace(cmd=()))
    with pytest.raises(UserError, match="no command"):
        process(entrypoint=())
    with pytest.raises(ImageError, match="no command"):
        process(PLAIN._replace(cmd=("",)))
    with pytest.raises(ImageError, match="no command"):
        process(PLAIN._replace(entrypoint=("", "x"), cmd=("sh",)))


def test_an_empty_entrypoint_is_none() -> None:
    """ENTRYPOINT [""] is how a Dockerfile takes a base's one away."""
    empty = PLAIN._replace(entrypoint=("",), cmd=("c",))
    assert process(empty)["args"] == ["c"]
    assert process(empty, command=("x", "y"))["args"] == ["x", "y"]


def test_environment_keeps_the_images_order_and_adds_only_what_is_missing() -> None:
    config = PLAIN._replace(env=("B=1", "PATH=/p", "A=x=y"))
    assert process(config)["env"] == ["B=1", "PATH=/p", "A=x=y", "HOME=/"]
    assert process(config, env=("A=2", "C=3", "A=4"))["env"] == ["B=1", "PATH=/p", "A=4", "C=3", "HOME=/"]
    assert process(account=Account(home="/h"), terminal=True)["env"] == [
        f"PATH={DEFAULT_PATH}",
        "HOME=/h",
        "TERM=xterm",
    ]
    assert process(PLAIN._replace(env=("TERM=vt100", "HOME=/x", "PATH=")), terminal=True)["env"] == [
        "TERM=vt100",
        "HOME=/x",
        "PATH=",
    ]


def test_the_containers_name_is_in_the_environment() -> None:
    assert process(hostname="web")["env"] == [f"PATH={DEFAULT_PATH}", "HOME=/", "HOSTNAME=web"]
    assert process(PLAIN._replace(env=("HOSTNAME=mine",)), hostname="web")["env"] == [
        "HOSTNAME=mine",
        f"PATH={DEFAULT_PATH}",
        "HOME=/",
    ]


@pytest.mark.parametrize("entry", ["noequals", "=x", ""])
def test_what_is_no_variable_is_left_out(entry: str) -> None:
    spec, notes = build_spec(PLAIN._replace(env=("A=1", entry, "B=2")), Account(), SpecOptions())
    assert spec["process"]["env"][:2] == ["A=1", "B=2"] and len(spec["process"]["env"]) == 4
    assert notes == (f"the image's variable {entry!r} has no name or no value, and is left out",)


@pytest.mark.parametrize("entry", ["A\0=b", "A=\0", "A=\ud800"])
def test_bad_variables_are_refused(entry: str) -> None:
    with pytest.raises(ImageError, match="variable"):
        process(PLAIN._replace(env=(entry,)))
    for bad in (entry, "noequals", "=x", ""):
        with pytest.raises(UserError, match="variable"):
            process(env=(bad,))


@pytest.mark.parametrize(
    ("given", "cwd"), [("", "/"), ("/a/b", "/a/b"), ("rel", "/rel"), ("/procure", "/procure")]
)
def test_working_directory(given: str, cwd: str) -> None:
    assert process(PLAIN._replace(working_dir=given))["cwd"] == cwd


@pytest.mark.parametrize(
    "cwd",
    [
        "/proc",
        "/proc/self/fd/8",
        "//proc/self/fd/8",
        "proc/1",
        "/x/../proc/self",
        "/./proc/",
        "/../../proc/self/cwd",
    ],
)
def test_a_working_directory_under_proc_is_refused(cwd: str) -> None:
    """CVE-2024-21626: it would be one of runc's descriptors on the host."""
    with pytest.raises(ImageError, match="under /proc"):
        process(PLAIN._replace(working_dir=cwd))
    with pytest.raises(UserError, match="under /proc"):
        process(cwd=cwd)


def test_capabilities_are_active_for_root_only() -> None:
    for uid, count in ((0, 14), (5, 0)):
        capabilities = process(account=Account(uid=uid))["capabilities"]
        assert isinstance(capabilities, dict)
        assert len(capabilities["bounding"]) == 14
        assert len(capabilities["effective"]) == len(capabilities["permitted"]) == count
        assert capabilities["inheritable"] == capabilities["ambient"] == []
        assert "CAP_SYS_ADMIN" not in capabilities["bounding"]


def test_the_container_is_confined() -> None:
    spec, notes = build_spec(PLAIN, Account(additional_gids=(3,)), SpecOptions(read_only=True, hostname="h"))
    assert notes == ()
    assert spec["process"]["noNewPrivileges"] is False  # set-id programs of the image work, as in Docker
    assert spec["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": [0, 3]}
    assert process(no_new_privileges=True)["noNewPrivileges"] is True
    assert spec["root"] == {"path": "rootfs", "readonly": True}
    assert spec["hostname"] == "h"
    linux = spec["linux"]
    assert [n["type"] for n in linux["namespaces"]] == ["pid", "ipc", "uts", "mount"]
    assert "/proc/kcore" in linux["maskedPaths"]
    assert "/proc/sys" in linux["readonlyPaths"]
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]


def test_a_terminal_has_its_size_from_the_start() -> None:
    assert process(terminal=True, terminal_size=(80, 25))["consoleSize"] == {"width": 80, "height": 25}
    assert "consoleSize" not in process(terminal=True)
    assert "consoleSize" not in process(terminal_size=(80, 25))


def test_a_rootless_container_has_a_user_namespace_and_no_resources() -> None:
    options = SpecOptions(uid_ranges=(IdRange(0, 1000, 1),), gid_ranges=(IdRange(0, 100, 1),))
    spec, notes = build_spec(PLAIN, Account(additional_gids=(10,)), options)
    assert "resources" not in spec["linux"]
    assert {"type": "user"} in spec["linux"]["namespaces"]
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 1}]
    assert spec["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 100, "size": 1}]
    assert "additionalGids" not in spec["process"]["user"]
    assert "supplementary groups" in notes[0]
    kinds = {m["destination"]: m for m in spec["mounts"]}
    assert kinds["/sys"]["type"] == "none"
    assert "gid=5" not in kinds["/dev/pts"]["options"]
    assert check_ids(Account(uid=0), options) == ""
    assert check_ids(Account(uid=33), options) == "uid 33"
    assert check_ids(Account(gid=33), options) == "gid 33"
    more = options._replace(uid_ranges=(IdRange(0, 1, 1), IdRange(1, 9, 50)))
    assert check_ids(Account(uid=33), more) == ""


# -- annotations -----------------------------------------------------------------------------------------


def test_annotations_say_what_the_image_is_and_labels_win() -> None:
    config = PLAIN._replace(
        variant="v2",
        stop_signal="SIGQUIT",
        exposed_ports=("80/tcp", "53/udp"),
        labels={"org.opencontainers.image.os": "mine", "maintainer": "m", "org.label-schema.name": "n"},
    )
    spec, notes = build_spec(config, Account(), SpecOptions())
    assert notes == ()
    assert spec["annotations"] == {
        "org.opencontainers.image.os": "mine",
        "org.opencontainers.image.architecture": "amd64",
        "org.opencontainers.image.variant": "v2",
        "org.opencontainers.image.stopSignal": "SIGQUIT",
        "org.opencontainers.image.exposedPorts": "80/tcp,53/udp",
        "maintainer": "m",
        "org.label-schema.name": "n",
    }


@pytest.mark.parametrize(
    "label",
    [
        "org.systemd.property.ExecStart",
        "run.oci.handler",
        "run.oci.hooks.stdout",
        "io.kubernetes.cri-o.Devices",
        "io.katacontainers.config.hypervisor.path",
        "module.wasm.image/variant",
        "dev.gvisor.spec.mount",
        "",
        "ORG.opencontainers.image.os",
    ],
)
def test_labels_that_runtimes_obey_do_not_become_annotations(label: str) -> None:
    spec, notes = build_spec(PLAIN._replace(labels={label: "x"}), Account(), SpecOptions())
    assert label not in spec["annotations"]
    assert len(notes) == 1
    assert "1 of the image's labels" in notes[0]


def test_huge_labels_are_left_out() -> None:
    spec, notes = build_spec(PLAIN._replace(labels={"version": "x" * 100_000}), Account(), SpecOptions())
    assert "version" not in spec["annotations"]
    assert notes


# -- mounts ----------------------------------------------------------------------------------------------


def test_mounts_come_parents_first_and_the_last_one_wins() -> None:
    wanted = [
        Mount("/a/b", "tmpfs", "tmpfs"),
        Mount("/a", "bind", "/host"),
        Mount("/dev/shm", "bind", "/host/shm"),
        Mount("/etc/hosts", "bind", "/1"),
        Mount("/etc/hosts", "bind", "/2"),
    ]
    mounts = ordered_mounts(wanted)
    places = [m.destination for m in mounts]
    assert len(set(places)) == len(places)
    assert places.index("/proc") < places.index("/dev") < places.index("/dev/shm") < places.index("/a")
    assert places.index("/a") < places.index("/a/b")
    assert next(m for m in mounts if m.destination == "/dev/shm").source == "/host/shm"
    assert next(m for m in mounts if m.destination == "/etc/hosts").source == "/2"


def test_binds() -> None:
    assert parse_bind("/a:/b") == Mount("/b", "bind", "/a", ("rbind", "rprivate"))
    assert parse_bind("/a:/b/../c/:ro,noexec").destination == "/c"
    assert parse_bind("/a:/b:ro").options == ("rbind", "rprivate", "ro")
    assert parse_bind("/a:/b:rslave").options == ("rbind", "rslave")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/a",
        "a:/b",
        "/a:b",
        "/a:/",
        "/a:/proc",
        "/a:/x/../proc/sys",
        "/a:/b:c",
        "/a:/b:ro:x",
        "/a:/b\0",
        ":/b",
    ],
)
def test_bad_binds(text: str) -> None:
    with pytest.raises(UserError):
        parse_bind(text)


def test_tmpfs() -> None:
    assert parse_tmpfs("/t") == Mount("/t", "tmpfs", "tmpfs", ("nosuid", "nodev", "mode=1777"))
    assert parse_tmpfs("/t:size=1m,mode=700,ro").options == ("nosuid", "nodev", "size=1m", "mode=700", "ro")


@pytest.mark.parametrize(
    "text", ["", "t", "/", "/proc/x", "/t:tmpcopyup", "/t:size=", "/t:mode=1,uid=../x", "/t:a=b"]
)
def test_bad_tmpfs(text: str) -> None:
    with pytest.raises(UserError):
        parse_tmpfs(text)


def test_two_mounts_at_one_place_are_refused() -> None:
    with pytest.raises(UserError, match="two mounts"):
        distinct_mounts([parse_bind("/a:/x"), parse_tmpfs("/x/")])


def test_volumes_are_normalised() -> None:
    volumes = ("/data/", "data", "./data", "/v//w", "", "/", "/..", '["/a",', "/x/../dev/shm")
    assert image_volumes(PLAIN._replace(volumes=volumes)) == ("/data", "/v/w", '/["/a",', "/dev/shm")


@pytest.mark.parametrize("volume", ["/a\0", "/\ud800"])
def test_hostile_volumes_are_refused(volume: str) -> None:
    with pytest.raises(ImageError, match="volume"):
        image_volumes(PLAIN._replace(volumes=(volume,)))


def test_too_many_volumes_are_refused() -> None:
    with pytest.raises(ImageError, match="volumes"):
        image_volumes(PLAIN._replace(volumes=tuple(f"/v{n}" for n in range(1000))))
