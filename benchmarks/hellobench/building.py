"""Builds images with Debian's buildah, from Debian packages, into one OCI layout.

A `Session` owns a directory with buildah's storage, which is thrown away at its end (some 15 GB after a full build);
nothing is put into /var/lib/containers. What a later session needs again is in the layout: the bases stay there
under their own names as tags, and a layer that was compressed once is known by its DiffID. The caller holds a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import tarfile
import time
from pathlib import Path

from benchmarks import host
from benchmarks.hellobench.imagestore import RECIPE_KEY, ImageStore
from benchmarks.hellobench.recipes import (
    MINBASE_OPTIONS,
    base_recipe,
    buildpack_recipe,
    containerfile,
    minbase_recipe,
    recipe,
)
from benchmarks.hellobench.workloads import BUILDPACK, MINBASE, SCRATCH, Workload
from tests.layout import GZIP, LAYER_TYPES, MANIFEST_TYPE, Descriptor, Layout
from tests.realimages import bootstrap

# Where the library of buildah and skopeo keeps a cache, whatever their storage is.
CONTAINERS = Path("/var/lib/containers")
GZIP_LEVEL = 6
COMPRESS_DEADLINE_S = 600.0


class Session:
    """A series of builds with one storage, as a context manager. `directory` is deleted before and after it.

    `archives` keeps the packages that apt downloaded, for this and later sessions.
    """

    def __init__(self, store: ImageStore, directory: Path, archives: Path) -> None:
        self._store = store
        self._directory = directory
        self._archives = archives
        self._tars = directory / "tars"  # an OCI layout of plain tars
        self._bases: set[str] = set()
        self._made_containers = False

    def __enter__(self) -> Session:
        self._clear()  # of an interrupted session
        for name in ("tmp", "lists/partial"):
            (self._directory / name).mkdir(parents=True)
        (self._archives / "partial").mkdir(parents=True, exist_ok=True)
        self._made_containers = not CONTAINERS.exists()
        CONTAINERS.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        if self._made_containers:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                CONTAINERS.rmdir()
        self._store.sweep()

    def build(self, workload: Workload) -> dict[str, str]:
        """Build an image and tag it in the layout; gives the versions of its packages.

        For SCRATCH, those of its builder.
        """
        self._base(MINBASE if workload.base == SCRATCH else workload.base)
        context = self._directory / "context" / workload.name
        for name, text in workload.files.items():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            (context / name).write_text(text)
        self._bud(workload.name, containerfile(workload), context)
        origin = workload.name
        if workload.base == SCRATCH:
            origin = f"{workload.name}-builder"
            self._bud(origin, containerfile(workload), context, "--target", "build")
        packages = self._packages(origin)
        self._export(workload.name, recipe(workload))
        return packages

    def _base(self, base: str) -> None:
        """Have a base in the storage: built, or taken from the layout."""
        if base in self._bases:
            return
        if self._store.built_recipe(base) == base_recipe(base):
            self._skopeo_copy(f"oci:{self._store.path}:{base}", f"{self._storage}localhost/{base}")
            self._update_lists(base)
        elif base == BUILDPACK:
            self._base(MINBASE)
            self._bud(base, buildpack_recipe(), self._directory / "context" / base)
            self._export(base, base_recipe(base))
        else:
            context = self._directory / "context" / base
            context.mkdir(parents=True)
            bootstrap(context / "minbase.tar", *MINBASE_OPTIONS, reproducible=False)
            with tarfile.open(context / "minbase.tar", "a") as tar:  # /dev without nodes, which runtimes bring
                entry = tarfile.TarInfo("./dev")
                entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, int(time.time())
                tar.addfile(entry)
            self._bud(base, minbase_recipe(), context)
            self._update_lists(base)
            self._export(base, base_recipe(base))
        self._bases.add(base)

    def _update_lists(self, base: str) -> None:
        """Fetch the package lists, once in a session, by the base's own apt and sources."""
        if self._bases:
            return
        name = self._buildah("from", "--pull-never", f"localhost/{base}").strip()
        self._buildah("run", "--isolation", "chroot", *self._apt_mounts(), name, "--", "apt-get", "update")
        self._buildah("rm", name)

    def _bud(self, tag: str, text: str, context: Path, *options: str) -> None:
        context.mkdir(parents=True, exist_ok=True)
        recipe_path = self._directory / f"Containerfile.{tag}"
        recipe_path.write_text(text)
        self._buildah(
            "bud", "--layers", "--quiet", "--pull-never", "--isolation", "chroot", *self._apt_mounts(), *options,
            "-f", str(recipe_path), "-t", f"localhost/{tag}", str(context),
        )  # fmt: skip

    def _apt_mounts(self) -> list[str]:
        lists = self._directory / "lists"
        return ["-v", f"{self._archives}:/var/cache/apt/archives", "-v", f"{lists}:/var/lib/apt/lists"]

    def _packages(self, tag: str) -> dict[str, str]:
        name = self._buildah("from", "--pull-never", f"localhost/{tag}").strip()
        command = ["dpkg-query", "-W", "-f", r"${Package}\t${Version}\n"]
        lines = self._buildah("run", "--user", "root", "--isolation", "chroot", name, "--", *command).splitlines()
        self._buildah("rm", name)
        return {package: version for package, _, version in sorted(line.partition("\t") for line in lines)}

    def _export(self, tag: str, recipe_hash: str) -> None:
        """Copy an image from the storage into the layout, compressing the layers that it does not have yet."""
        self._skopeo_copy(f"{self._storage}localhost/{tag}", f"oci:{self._tars}:{tag}")
        tars = Layout(self._tars)
        manifest = tars.document(tars.resolve(tag))
        config = tars.blob_path(manifest["config"]["digest"]).read_bytes()
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self._store.add_blob(config, manifest["config"]["mediaType"]),
            # A plain tar's digest is its DiffID.
            "layers": [self._compressed(tars.blob_path(layer["digest"])) for layer in manifest["layers"]],
            "annotations": {RECIPE_KEY: recipe_hash},
        }
        self._store.tag(tag, self._store.add_json(document, MANIFEST_TYPE))

    def _compressed(self, tar: Path) -> Descriptor:
        diff_id = f"sha256:{tar.name}"
        known = self._store.layers.get(diff_id)
        if known is None or not self._store.blob_path(known["digest"]).exists():
            compressed = self._directory / "tmp" / f"{tar.name}.gz"
            with compressed.open("wb") as out:
                # -n: neither name nor time, so that the same tar becomes the same blob.
                command = ["pigz", f"-{GZIP_LEVEL}", "-n", "-c", str(tar)]
                subprocess.run(command, stdout=out, check=True, timeout=COMPRESS_DEADLINE_S)
            with compressed.open("rb") as blob:
                digest = f"sha256:{hashlib.file_digest(blob, 'sha256').hexdigest()}"
            size = compressed.stat().st_size
            compressed.chmod(0o644)
            compressed.replace(self._store.blob_path(digest))
            self._store.remember(diff_id, digest, size, tar.stat().st_size)
            known = self._store.layers[diff_id]
        return {"mediaType": LAYER_TYPES[GZIP], "digest": known["digest"], "size": known["size"]}

    @property
    def _storage(self) -> str:
        return f"containers-storage:[overlay@{self._directory}/root+{self._directory}/runroot]"

    def _skopeo_copy(self, source: str, destination: str) -> None:
        options = ["--insecure-policy", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        self._isolated("skopeo", *options, source, destination)

    def _buildah(self, *arguments: str) -> str:
        storage = ["--root", f"{self._directory}/root", "--runroot", f"{self._directory}/runroot"]
        return self._isolated("buildah", *storage, "--storage-driver", "overlay", *arguments)

    def _isolated(self, *command: str) -> str:
        """Run a command in a mount namespace of its own, with a tmpfs where the library's cache has its fixed place.

        What it mounts goes with it; what it starts, too, by a PID namespace.
        """
        script = f'mount -t tmpfs none {shlex.quote(str(CONTAINERS))} && exec "$@"'
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        environment = os.environ | {"TMPDIR": f"{self._directory}/tmp"}
        return host.run("unshare", *namespaces, "sh", "-c", script, "sh", *command, env=environment)

    def _clear(self) -> None:
        if self._directory.exists():
            host.unmount_below(self._directory)
            host.run("rm", "-rf", "--one-file-system", self._directory)
