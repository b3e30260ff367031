"""What images are made from: options of mmdebstrap and Containerfiles, and hashes of them.

Two bases as one knows them from Docker Hub: MINBASE, one layer, like debian:12-slim, and BUILDPACK above it, like
buildpack-deps. They are images of their own in buildah's storage, called "localhost/minbase" and so on.
"""

from __future__ import annotations

import hashlib
import json

from benchmarks.hellobench.workloads import BUILDPACK, MINBASE, SCRATCH, Workload
from tests.realimages import ENVIRONMENT, SLIM, codename

# Part of every recipe: raise it when images come out differently from the same Containerfile.
FORMAT = 1

# As Debian's images on Docker Hub: no service starts, no recommended packages, nothing asks. apt as root, because
# its directories of the build are this session's own.
BASE_SETTINGS = r"""set -eu
printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"
chmod 755 "$1/usr/sbin/policy-rc.d"
printf 'force-unsafe-io\n' >"$1/etc/dpkg/dpkg.cfg.d/container"
echo 'debconf debconf/frontend select Noninteractive' | chroot "$1" debconf-set-selections
: >"$1/etc/resolv.conf"
: >"$1/etc/hostname"
chmod 644 "$1/etc/resolv.conf" "$1/etc/hostname"
# Alternatives of some packages link to manual pages, which are excluded, and fail without the directories.
for section in 1 2 3 4 5 6 7 8; do mkdir -p "$1/usr/share/man/man$section"; done
"""
MINBASE_OPTIONS = [
    *SLIM,
    # /usr is merged from the start, since the package that merges it later brings the whole of perl.
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    "--include=ca-certificates,netbase",
    '--aptopt=APT::Install-Recommends "0"',
    '--aptopt=APT::Sandbox::User "root"',
    '--aptopt=Acquire::Languages "none"',
    # Caches of apt's own, of 35 MB each.
    '--aptopt=Dir::Cache::pkgcache ""',
    '--aptopt=Dir::Cache::srcpkgcache ""',
    "--skip=output/dev",
    f"--customize-hook={BASE_SETTINGS}",
]
# Like Docker Hub's buildpack-deps: compilers, version control, and the headers that most languages' modules want.
BUILDPACK_PACKAGES = (
    "autoconf automake bzip2 curl default-libmysqlclient-dev dpkg-dev file g++ gcc git gnupg imagemagick libbz2-dev "
    "libc6-dev libcurl4-openssl-dev libdb-dev libevent-dev libffi-dev libgdbm-dev libglib2.0-dev libgmp-dev "
    "libjpeg-dev libkrb5-dev liblzma-dev libmagickcore-dev libmagickwand-dev libmaxminddb-dev libncurses5-dev "
    "libncursesw5-dev libpng-dev libpq-dev libreadline-dev libsqlite3-dev libssl-dev libtool libwebp-dev libxml2-dev "
    "libxslt1-dev libyaml-dev make mercurial openssh-client patch procps sq subversion unzip wget xz-utils zlib1g-dev"
)


def minbase_recipe() -> str:
    settings = "".join(f"ENV {variable}\n" for variable in ENVIRONMENT)
    return f'FROM scratch\nADD minbase.tar /\n{settings}LABEL org.opencontainers.image.base=debian\nCMD ["bash"]\n'


def buildpack_recipe() -> str:
    return f"FROM localhost/{MINBASE}\nRUN apt-get install -y {BUILDPACK_PACKAGES}\n"


def containerfile(workload: Workload) -> str:
    """The Containerfile of a workload. For SCRATCH its steps are of a builder on minbase, until their FROM scratch."""
    if workload.base == SCRATCH:
        return f"FROM localhost/{MINBASE} AS build\n{workload.steps}\n"
    return f"FROM localhost/{workload.base}\n{workload.steps}\n"


def base_recipe(base: str) -> str:
    """Hash of everything that a base is made from, except the packages' versions."""
    parts = [str(FORMAT), codename(), *MINBASE_OPTIONS, minbase_recipe()]
    return _hash(*parts, *([buildpack_recipe()] if base == BUILDPACK else []))


def recipe(workload: Workload) -> str:
    """Hash of everything that an image is made from, except the packages' versions."""
    base = MINBASE if workload.base == SCRATCH else workload.base
    files = [f"{name}\0{text}" for name, text in sorted(workload.files.items())]
    return _hash(base_recipe(base), containerfile(workload), *files)


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
