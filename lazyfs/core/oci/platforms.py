"""Platforms of images: names, this host's, and the choice from an image index."""

from __future__ import annotations

import re

from lazyfs.core.oci.documents import Descriptor, ImageIndex, Platform
from lazyfs.errors import ImageError, UserError

_MACHINES = {  # uname -m (uname(2)) -> platform, as containerd's platforms package has it
    "x86_64": "linux/amd64", "aarch64": "linux/arm64", "armv7l": "linux/arm/v7", "armv8l": "linux/arm/v7",
    "armv6l": "linux/arm/v6", "i686": "linux/386", "i386": "linux/386", "ppc64le": "linux/ppc64le",
    "s390x": "linux/s390x", "riscv64": "linux/riscv64", "loongarch64": "linux/loong64",
    "mips64": "linux/mips64",
}  # fmt: skip
# Other words for systems and architectures, and the variants that go without saying (containerd's platforms package).
_SYSTEMS = {"macos": "darwin"}
_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "i386": "386", "aarch64": "arm64", "armhf": "arm", "armel": "arm",
}  # fmt: skip
_NAMED_VARIANTS = {"armhf": "v7", "armel": "v6"}
_DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
_KNOWN_ARCHITECTURES = {text.split("/")[1] for text in _MACHINES.values()} | _ARCHITECTURES.keys()


def host_platform(machine: str) -> str:
    """The platform of a host whose `uname -m` is `machine`. UserError if it is not known."""
    try:
        return _MACHINES[machine]
    except KeyError:
        raise UserError(
            f"no image platform is known for this machine ({machine})", "give --platform"
        ) from None


def parse_platform(text: str) -> Platform:
    """Parse "os/architecture[/variant]", or an architecture alone, of Linux. In the usual words ("linux/x86_64" is
    linux/amd64). UserError if it is anything else."""
    parts = text.lower().split("/")
    if len(parts) == 1 and parts[0] in _KNOWN_ARCHITECTURES:
        parts = ["linux", parts[0]]
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.-]{1,32}", part) for part in parts):
        raise UserError(f"bad platform {text[:80]!r}", "write for example linux/amd64 or linux/arm/v7")
    return _usual(Platform(*parts))


def _usual(platform: Platform) -> Platform:
    """The same platform in Go's words. A variant that goes without saying is left out."""
    system, architecture, variant = (text.lower() for text in platform)
    variant = variant or _NAMED_VARIANTS.get(architecture, "")
    architecture = _ARCHITECTURES.get(architecture, architecture)
    if variant.isdecimal():
        variant = f"v{variant}"
    if variant == _DEFAULT_VARIANTS.get(architecture) and architecture != "arm":
        variant = ""
    return Platform(_SYSTEMS.get(system, system), architecture, variant)


def runs_on(have: Platform, want: Platform) -> bool:
    """Whether `want` runs an image whose config says `have`; true if that says nothing."""
    return not (have.os and have.architecture) or _rank(have, want) is not None


def select_platform(index: ImageIndex, platform: str) -> Descriptor:
    """The index's manifest for `platform`, perhaps an index again, which the caller follows (MAX_INDEX_DEPTH).

    Prefers the exact variant, then the next lower one, which the same hardware runs. Takes a single entry without a
    platform if nothing else fits. ImageError lists what there is.
    """
    want = parse_platform(platform)
    images = [descriptor for descriptor in index.manifests if descriptor.is_image]
    ranks = [(_rank(one.platform, want), one) for one in images if one.platform is not None]
    found = [(rank, one) for rank, one in ranks if rank is not None]
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    bare = [one for one in images if one.platform is None]
    if len(bare) == 1:
        return bare[0]
    known = sorted({str(one.platform)[:40] for one in images if one.platform and one.platform.os != "unknown"})
    raise ImageError(f"the image has no manifest for {want}", f"it has: {', '.join(known[:16]) or 'none'}")


def _rank(have: Platform, want: Platform) -> int | None:
    """0: the very platform that is wanted; n: n steps below it, which the same hardware runs; None: does not run."""
    have, want = _usual(have), _usual(want)
    if (have.os, have.architecture) != (want.os, want.architecture):
        return None
    default = _DEFAULT_VARIANTS.get(want.architecture, "")
    wanted, there = want.variant or default, have.variant or default
    if wanted == there:
        return 0
    numbers = [re.fullmatch(r"v(\d{1,2})", variant) for variant in (wanted, there)]
    if numbers[0] is None or numbers[1] is None:
        return None
    steps = int(numbers[0][1]) - int(numbers[1][1])
    return steps if steps > 0 else None
