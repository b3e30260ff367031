"""How images and their sources are reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class SourceOptions(NamedTuple):
    """How to reach a source.

    `insecure`: plain http is allowed to any host, and certificates are not verified. `ca_files`: more trusted
    CAs (PEM). `auth_files`: credential files in order of preference; None = the usual places of this process.
    `environ`: what credential helpers get; None = this process's environment. `max_connections`: for ranges
    and documents; streams have as many of their own. `patience_s`: a server that is silent for so long is
    asked again on a new connection.
    """

    insecure: bool = False
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None
    max_connections: int = 8
    environ: Mapping[str, str] | None = None
    patience_s: float = 30.0


class ImageOptions(NamedTuple):
    """How to reach and open an image. `timeout_s` bounds each read; None for platform means this host's;
    `push_index`: a missing index is made by the client, who pushes it.
    """

    offline: bool = False
    insecure: bool = False
    timeout_s: float = 30.0
    platform: str | None = None
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None
    push_index: bool = False
    environ: Mapping[str, str] | None = None  # of the user the image is opened for; None: this process's

    def source_options(self) -> SourceOptions:
        from lazyfs.sources.credentials import auth_files_of  # heavier than options are

        auth_files = self.auth_files
        if auth_files is None and self.environ is not None:
            auth_files = auth_files_of(self.environ)
        # Half of it, so that a connection that fell silent costs a read time, but does not fail it.
        patience_s = self.timeout_s / 2
        return SourceOptions(
            self.insecure, self.ca_files, auth_files, environ=self.environ, patience_s=patience_s
        )
