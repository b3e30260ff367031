"""Real images for the tests, built from Debian packages once per machine as OCI image layouts.

    layout = images.busybox()                      # one small layer; builds in a second
    layout = images.debian()                       # five layers with everything layers can do
    push(layout, "gzip", f"{registry.host}/demo:latest")

Each layout has the same trees under several tags: "gzip", "zstd" (one frame per layer), "zstd-frames",
"none" (uncompressed), and "platforms", an image index whose linux/amd64 entry is "gzip" and whose
linux/arm64/v8 entry is another, tiny image. They live in ~/.cache/lazyfs-test-images; a changed recipe
builds anew under another name.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import layertar
from tests.layertar import EXAMPLE_ACL, LayerTar, capability
from tests.layout import GZIP, PLAIN, ZSTD, ZSTD_FRAMES, Layout

TAGS = (GZIP, ZSTD, ZSTD_FRAMES, PLAIN)
BUILD_DEADLINE_S = 600
CAP_NET_RAW = 1 << 13
# After the merge of / and /usr the base has links here; a package's directory would replace them.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Documents and translations: half of the files, and nothing that a test looks at.
SLIM = [
    f"--dpkgopt=path-exclude={pattern}"
    for pattern in ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
]
PACKAGES = ["file", "libmagic1", "libmagic-mgc", "iputils-ping"]
PACKAGES += ["libpython3.11-minimal", "python3.11-minimal"]
ENVIRONMENT = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


def images_directory() -> Path:
    """The per-user cache of built images; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "lazyfs-test-images")


def built(name: str, build: Callable[[Path], None], *, sources: Sequence[str] = ()) -> Path:
    """The directory that `build` fills, built if it is not there yet.

    It is there whole or not at all, and two processes never build it at the same time.
    The name ends in a hash over this package's builders and the given source files, so a changed recipe
    is another image.
    """
    here = Path(__file__).parent
    recipe = hashlib.sha256(codename().encode())
    for source in sorted({__file__, str(here / "layertar.py"), str(here / "layout.py"), *sources}):
        recipe.update(Path(source).read_bytes())
    base = images_directory()
    base.mkdir(parents=True, exist_ok=True)
    destination = base / f"{name}-{recipe.hexdigest()[:12]}"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not destination.is_dir():
            for stale in base.glob(f"{name}-*"):
                shutil.rmtree(stale)
            building = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))
            try:
                building.chmod(0o755)  # a web server of another user may serve it
                build(building)
                building.rename(destination)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    return destination


def busybox() -> Path:
    """One layer: Debian's busybox-static with links for its applets."""
    return built("busybox", _build_busybox)


def debian() -> Path:
    """Debian's minbase, packages above it, and layers of changes of every kind."""
    return built("debian", _build_debian)


def unpack(layout: Path, tag: str, bundle: Path) -> Path:
    """What `umoci unpack` makes of an image; returns the root. It cannot read zstd: unpack "gzip" instead."""
    _run("umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle))
    return bundle / "rootfs"


def codename() -> str:
    """The Debian release of this host, from os-release(5)."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")


def bootstrap(tar: Path, *options: str, reproducible: bool = True) -> None:
    """Make a minimal Debian root file system as a tar, if `reproducible` the same bytes for the same package versions.

    Python then compiles its modules so that each import reads the source, too, to compare its hash (py_compile
    obeys SOURCE_DATE_EPOCH). Images that people run do not.
    """
    environment = os.environ | ({"SOURCE_DATE_EPOCH": str(layertar.MTIME_S)} if reproducible else {})
    _run("mmdebstrap", "--quiet", "--variant=minbase", *options, codename(), str(tar), env=environment)


def _build_busybox(directory: Path) -> None:
    program = shutil.which("busybox") or "/bin/busybox"
    listed = subprocess.run([program, "--list"], check=True, stdout=subprocess.PIPE, text=True, timeout=30)
    tar = LayerTar()
    for path, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777), ("dev", 0o755)):
        tar.dir(path, mode)
    for path in ("proc", "sys", "var", "var/data"):
        tar.dir(path)
    tar.file("bin/busybox", Path(program).read_bytes(), 0o755)
    for applet in sorted(set(listed.stdout.split()) - {"busybox"}):
        tar.symlink(f"bin/{applet}", "busybox")
    tar.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
    tar.file("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
    _all_variants(Layout(directory), [tar.data()], {"Env": ENVIRONMENT, "Cmd": ["/bin/sh"]})


def _build_debian(directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lazyfs-image-") as scratch:
        base = Path(scratch, "base.tar")
        bootstrap(base, *SLIM)
        scratch_path = Path(scratch)
        layers: list[bytes | Path] = [base, _packages_layer(scratch_path)]
        layers += [_changes_layer(), _gnu_tar_layer(scratch_path)]
        layout = Layout(directory)
        config: dict[str, Any] = {
            "Env": [*ENVIRONMENT, "LANG=C.UTF-8"],
            "Cmd": ["python3.11"],
            "WorkingDir": "/opt",
            "Labels": {"org.example.suite": "lazyfs"},
        }
        # The last layer is umoci's own: inserted into a draft, then read back so that all variants have it.
        draft = Layout(Path(scratch, "draft"))
        draft.tag("draft", draft.add_image([draft.add_layer(layers[0], PLAIN)], config))
        inserted = Path(scratch, "inserted")
        (inserted / "deep").mkdir(parents=True)
        (inserted / "deep" / "file").write_text("inserted by umoci\n")
        (inserted / "link").symlink_to("deep/file")
        _run("umoci", "insert", "--image", f"{draft.path}:draft", str(inserted), "/opt/inserted")
        blob = draft.blob_path(draft.document(draft.resolve("draft"))["layers"][-1]["digest"])
        _all_variants(layout, [*layers, gzip.decompress(blob.read_bytes())], config)


def _all_variants(layout: Layout, layers: Sequence[bytes | Path], config: dict[str, Any]) -> None:
    for tag in TAGS:
        layout.tag(tag, layout.add_image([layout.add_layer(layer, tag) for layer in layers], config))
    other = LayerTar().file("other-platform", b"arm64\n").data()
    arm = layout.add_image([layout.add_layer(other)], architecture="arm64", variant="v8")
    amd = {k: v for k, v in layout.resolve(GZIP).items() if k != "annotations"}
    platforms = [
        (arm, {"os": "linux", "architecture": "arm64", "variant": "v8"}),
        (amd, {"os": "linux", "architecture": "amd64"}),
    ]
    layout.tag("platforms", layout.add_index(platforms))


def _packages_layer(scratch: Path) -> Path:
    """The files of some packages as dpkg has them: GNU tar, "./" before each name, directories repeated."""
    debs = scratch / "debs"
    debs.mkdir()
    _run("apt-get", "-q", "-q", "-o", "APT::Sandbox::User=root", "download", *PACKAGES, cwd=debs)
    path = scratch / "packages.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for deb in sorted(debs.glob("*.deb")):
            dpkg = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
            with dpkg, tarfile.open(fileobj=dpkg.stdout, mode="r|") as package:
                for member in package:
                    member.name = _merged(member.name)
                    if member.islnk():
                        member.linkname = _merged(member.linkname)
                    out.addfile(member, package.extractfile(member) if member.isreg() else None)
    return path


def _merged(name: str) -> str:
    """ "./lib/x" as "./usr/lib/x"."""
    parts = name.removeprefix("./").split("/", 1)
    return f"./usr/{'/'.join(parts)}" if parts[0] in MERGED else name


def _changes_layer() -> bytes:
    """Everything that one layer can do to the layers below it, and every kind of entry."""
    tar = LayerTar()
    # Deletions: a file, a directory, a file of the package layer, a directory's whole content.
    tar.whiteout("etc/issue").whiteout("var/lib/apt").whiteout("usr/bin/file")
    tar.dir("etc/apt").opaque("etc/apt").file("etc/apt/only.conf", b"kept\n")
    # Replacements: directory by file, file by directory, link by file, link by directory, file by file.
    tar.file("etc/logrotate.d", b"once a directory\n")
    tar.dir("etc/debian_version", 0o750).file("etc/debian_version/inner", b"once a file\n")
    tar.file("etc/os-release", b"ID=lazyfs-test\n").dir("var/lock", 0o1777)
    tar.file("etc/passwd", b"root:x:0:0:root:/root:/bin/bash\napp:x:1000:1000::/opt:/bin/sh\n")
    tar.file("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
    tar.dir("root", 0o750, gid=1000)  # metadata only
    # Hard links: to lower layers' files, in one layer over directories.
    tar.dir("opt").hardlink("opt/bash", "usr/bin/bash").hardlink("opt/python", "usr/bin/python3.11")
    tar.dir("opt/a").file("opt/a/one", b"shared\n" * 1000, 0o640, uid=1000).hardlink("opt/two", "opt/a/one")
    # Extended attributes, capabilities, access control lists.
    net_raw = {"security.capability": capability(CAP_NET_RAW)}
    tar.file("opt/ping", b"\x7fELF not really", 0o755, xattrs=net_raw)
    tar.file("opt/acl", b"acl", 0o640, xattrs={"system.posix_acl_access": EXAMPLE_ACL})
    tar.dir("opt/acls", xattrs={"system.posix_acl_default": EXAMPLE_ACL})
    tar.file("opt/xattrs", b"x", xattrs={"user.note": b"caf\xc3\xa9", "user.binary": b"\x01\xff\xfe=\n\x02"})
    tar.file("opt/xattr-long", xattrs={"user.long": b"v" * 1500})
    # Devices, pipes, special modes.
    tar.dir("opt/dev").device("opt/dev/null", tarfile.CHRTYPE, 1, 3, 0o666)
    tar.device("opt/dev/loop", tarfile.BLKTYPE, 7, 300).fifo("opt/dev/pipe", 0o622)
    tar.file("opt/setuid", b"#!/bin/sh\n", 0o6755, uid=1000, gid=1000).dir("opt/sticky", 0o1777)
    # Names, times, owners, sizes.
    tar.file("opt/caf\udce9", b"latin-1\n").file("opt/" + "n" * 255, b"long\n")
    tar.file("opt/" + "/".join(["deep"] * 60), b"deep\n").symlink("opt/long-link", "x" * 1000)
    tar.file("opt/ns", mtime_ns=1_600_000_000_123_456_789).file("opt/before-1970", mtime_ns=-86_400 * 10**9)
    tar.file("opt/owner", b"o", uid=3_000_000_000, gid=2_500_000)
    pattern = bytes(i * 7 % 251 for i in range(4096)) * 800
    for size in (0, 1, 4095, 4096, 4097, 70_000, 3 << 20):
        tar.file(f"opt/size-{size}", pattern[:size])
    # Written twice (the later one holds), without its directory, with odd prefixes.
    tar.file("opt/twice", b"first\n").file("opt/twice", b"second, longer\n", 0o600)
    tar.file("srv/no/parent/file", b"orphan\n").file("./opt/dot", b"dot\n").file("/opt/slash", b"slash\n")
    tar.symlink("opt/absolute", "/etc/os-release").symlink("opt/dangling", "../nowhere")
    tar.symlink("opt/lib", "../lib")
    return tar.data()


def _gnu_tar_layer(scratch: Path) -> Path:
    """A layer by GNU tar: sparse files in PAX form 1.0 (umoci cannot read the older types)."""
    source = scratch / "sparse"
    (source / "opt" / "sparse").mkdir(parents=True)
    shapes: dict[str, tuple[int, list[int]]] = {
        "holes": (20 << 20, [0, 5 << 20, 9 << 20]),
        "end": (8 << 20, [4096]),
        "all": (1 << 20, []),
    }
    for name, (size, pieces) in shapes.items():
        with (source / "opt" / "sparse" / name).open("wb") as file:
            file.truncate(size)
            for offset in pieces:
                file.seek(offset)
                file.write(f"piece at {offset}\n".encode() * 500)
    path = scratch / "gnu.tar"
    form = ["--sparse", "--format=posix", "--sort=name", "--pax-option=delete=atime,delete=ctime"]
    owner = ["--owner=0", "--group=0", f"--mtime=@{layertar.MTIME_S}"]
    _run("tar", *form, *owner, "-C", str(source), "-cf", str(path), ".")
    return path


def _run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    result = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        timeout=BUILD_DEADLINE_S,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {result.returncode}\n{result.stderr[-4000:]}")


if __name__ == "__main__":  # before a test run, so that no test's time-out pays for the first build
    for image in (busybox, debian):
        print(f"test image {image.__name__}: {image()}")
