"""What a HelloBench workload is: an image, the command in it, and how one knows that it is useful.

The 57 workloads of the paper "Slacker" (FAST'16) ran images of Docker Hub. Ours are built from Debian packages
(`images`), from the list in `catalogue`. The image's own configuration says what runs, so every runner starts
the same thing in its ordinary way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DISTRO, DATABASE, LANGUAGE = "distro", "database", "language"
WEB_SERVER, WEB_FRAMEWORK, OTHER = "web-server", "web-framework", "other"
CATEGORIES = (DISTRO, DATABASE, LANGUAGE, WEB_SERVER, WEB_FRAMEWORK, OTHER)

# Where an image comes from: the same software as the paper's, a near relative of it, or beside it and held back from
# tuning; each is reported apart.
SAME, RELATIVE, HELD_BACK = "E", "N", "H"

# On what an image is built.
SCRATCH = "scratch"  # nothing
MINBASE = "minbase"  # Debian's smallest
BUILDPACK = "buildpack"  # minbase with compilers and headers, as the fat images of languages on Docker Hub


@dataclass(frozen=True)
class Output:
    """The container ends by itself with exit code 0, and has printed `text`."""

    text: str


@dataclass(frozen=True)
class Http:
    """GET `path` at `port` of the host's loopback address is answered with `status`."""

    port: int
    path: str = "/"
    status: int = 200


@dataclass(frozen=True)
class Sql:
    """`SELECT 1` is answered: "postgres" as user postgres, "mariadb" as user root, both without password."""

    port: int
    dialect: str


@dataclass(frozen=True)
class Redis:
    """PING is answered with PONG."""

    port: int


@dataclass(frozen=True)
class Amqp:
    """The server begins the AMQP 0-9-1 handshake with Connection.Start."""

    port: int


Readiness = Output | Http | Sql | Redis | Amqp


@dataclass(frozen=True)
class Workload:
    """One image and its start.

    `steps` are the lines of a Containerfile after its FROM: one layer for each RUN and COPY, and CMD with what is
    run. `files` are the build context, name -> text, for COPY. `deadline_s`: from the start of the container to
    readiness, for the slowest sensible system; then the sample has failed.
    """

    name: str
    category: str
    ready: Readiness
    steps: str
    base: str = MINBASE
    kind: str = SAME
    files: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = 60.0

    @property
    def fat(self) -> bool:
        return self.base == BUILDPACK
