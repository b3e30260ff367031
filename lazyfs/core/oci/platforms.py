"""Platforms of images: names, this host's, and the choice from an image index."""

from __future__ import annotations

import re

from lazyfs.core.oci.documents import INDEX_TYPES, MANIFEST_TYPES, Descriptor, ImageIndex, Platform
from lazyfs.errors import ImageError, UserError

_MACHINES = {  # uname -m (uname(2)) -> platform, as containerd's platforms package has it
    "x86_64": "linux/amd64", "aarch64": "linux/arm64", "armv7l": "linux/arm/v7", "armv8l": "linux/arm/v7",
    "armv6l": "linux/arm/v6", "i686": "linux/386", "i386": "linux/386", "ppc64le": "linux/ppc64le",
    "s390x": "linux/s390x", "riscv64": "linux/riscv64", "loongarch64": "linux/loong64",
    "mips64": "linux/mips64",
}  # fmt: skip
# The variant that is meant where none is written.
_DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}


def host_platform(machine: str) -> str:
    """The platform of a host whose `uname -m` is `machine`. UserError if it is not known."""
    try:
        return _MACHINES[machine]
    except KeyError:
        raise UserError(
            f"no image platform is known for this machine ({machine})", "give --platform"
        ) from None


def parse_platform(text: str) -> Platform:
    """Parse "os/architecture[/variant]". UserError if it is anything else."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.-]{1,32}", part) for part in parts):
        raise UserError(f"bad platform {text[:80]!r}", "write for example linux/amd64 or linux/arm/v7")
    return Platform(*parts)


def select_platform(index: ImageIndex, platform: str) -> Descriptor:
    """The index's manifest for `platform`, perhaps an index again, which the caller follows (MAX_INDEX_DEPTH).

    Prefers the exact variant, then the next lower one, which the same hardware runs. Takes a single entry without a
    platform if nothing else fits. ImageError lists what there is.
    """
    want = parse_platform(platform)
    default = _DEFAULT_VARIANTS.get(want.architecture, "")
    wanted = want.variant or default
    found: list[tuple[int, Descriptor]] = []
    for descriptor in index.manifests:
        have = descriptor.platform
        if have is None or (have.os, have.architecture) != (want.os, want.architecture):
            continue
        rank = _variant_rank(wanted, have.variant or default)
        if rank is not None:
            found.append((rank, descriptor))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    bare = [d for d in index.manifests if d.platform is None and d.media_type in MANIFEST_TYPES | INDEX_TYPES]
    if len(bare) == 1:
        return bare[0]
    known = sorted(
        {str(d.platform)[:40] for d in index.manifests if d.platform and d.platform.os != "unknown"}
    )
    raise ImageError(f"the image has no manifest for {want}", f"it has: {', '.join(known[:16]) or 'none'}")


def _variant_rank(wanted: str, have: str) -> int | None:
    """0 = the same variant, n = n steps below it, None = does not run."""
    if wanted == have:
        return 0
    numbers = [re.fullmatch(r"v(\d{1,2})", variant) for variant in (wanted, have)]
    if numbers[0] is None or numbers[1] is None:
        return None
    steps = int(numbers[0][1]) - int(numbers[1][1])
    return steps if steps > 0 else None
