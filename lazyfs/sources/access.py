"""How an image is reached: one record from the mount options to the HTTP client, the wire and the state file."""

from __future__ import annotations

from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Repositories = tuple[str, ...]
    Learning = str  # one of LEARNING
    Pulling = str  # one of PULLING

# What of a user's environment leads to credentials (section "Credentials" of the README): nothing else of it is
# kept or sent.
ENVIRONMENT = (
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "PATH",  # where docker-credential-* helpers are
)
# What is learned from starts: they are recorded for this host, and fetched ahead at the next cold one; neither; or they
# also improve the pack that is attached to the image.
LEARNING = ("local", "off", "push")
# When a registry is asked what a tag means: at every mount (if it is away, what it meant last counts); only if that is
# not known here; or never, and not for what is missing of the image either.
PULLING = ("always", "missing", "never")
_MAX_CHARACTERS = 4096  # PATH_MAX
_MAX_ENVIRONMENT_CHARACTERS = 64 << 10
_MAX_FILES = 64  # CA or authentication files
_MAX_REPOSITORIES = 16


class Access(NamedTuple):
    """How an image and its sources are reached. A new field needs nothing but a name in mounting/options.py."""

    platform: str | None = None  # OS/ARCH[/VARIANT]; None: this host's
    pull: Pulling = "always"
    insecure: bool = False  # plain http to any host; certificates are not verified
    ca_files: tuple[str, ...] = ()  # more trusted CAs (PEM), absolute paths
    auth_files: tuple[str, ...] | None = None  # credential files in order of preference; None: the usual places
    environ: Mapping[str, str] | None = None  # of the user it is reached for; None: this process's
    # Where indexes are looked up beside the image's own repository, in this order (core/oci/indexrepository.py).
    index_repositories: Repositories = ()
    learn: Learning | None = None  # None: local

    @property
    def offline(self) -> bool:
        """Whether no source is asked."""
        return self.pull == "never"

    @property
    def learns(self) -> bool:
        """Whether starts are recorded, and fetched ahead."""
        return self.learn != "off"

    def to_json(self) -> dict[str, Any]:
        """What from_json() reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    def for_user_of(self, environ: Mapping[str, str]) -> Access:
        """For a process whose environment is another one: with what leads to this user's credentials."""
        return self._replace(environ={name: environ[name] for name in ENVIRONMENT if environ.get(name)})


def from_json(value: object) -> Access:
    """The record of an untrusted JSON value. Raises ValueError, also for unknown fields: a newer client may mean them
    seriously.
    """
    if not isinstance(value, dict):
        raise ValueError("access is not an object")
    value = dict(value)
    if _boolean(value.pop("offline", False), "offline"):  # what older versions said and saved
        value["pull"] = "never"
    if unknown := set(value) - set(Access._fields):
        raise ValueError(f"unknown option {min(unknown)!r:.40}")
    kinds = {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in Access.__annotations__.items()}
    return Access(**{name: _CHECKS[kinds[name]](item, name) for name, item in value.items()})


def _text(value: object, what: str, limit: int = _MAX_CHARACTERS) -> str:
    if not isinstance(value, str) or not value or len(value) > limit or "\0" in value:
        raise ValueError(f"{what} is not a text of 1 to {limit} characters")
    return value


def _boolean(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} is neither true nor false")
    return value


def _paths(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_FILES:
        raise ValueError(f"{what} is not a list of at most {_MAX_FILES} paths")
    paths = tuple(_text(item, what) for item in value)
    if not all(path.startswith("/") for path in paths):
        raise ValueError(f"{what} has a relative path")
    return paths


def _repositories(value: object, what: str) -> Repositories:
    if not isinstance(value, list) or len(value) > _MAX_REPOSITORIES:
        raise ValueError(f"{what} is not a list of at most {_MAX_REPOSITORIES} repositories")
    return tuple(_text(item, what) for item in value)


def _environment(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(name in ENVIRONMENT for name in value):
        raise ValueError(f"{what} has an unknown variable")
    return {name: _text(item, name, _MAX_ENVIRONMENT_CHARACTERS) for name, item in value.items()}


def _learning(value: object, what: str) -> Learning:
    if value not in LEARNING:
        raise ValueError(f"{what} is none of {', '.join(LEARNING)}")
    return str(value)


def _pulling(value: object, what: str) -> Pulling:
    if value not in PULLING:
        raise ValueError(f"{what} is none of {', '.join(PULLING)}")
    return str(value)


def _or_none(check: Callable[[object, str], object]) -> Callable[[object, str], object]:
    return lambda value, what: None if value is None else check(value, what)


# By the fields' types, as they are written above.
_CHECKS: dict[str, Callable[[object, str], Any]] = {
    "str | None": _or_none(_text),
    "bool": _boolean,
    "tuple[str, ...]": _paths,
    "tuple[str, ...] | None": _or_none(_paths),
    "Repositories": _repositories,
    "Pulling": _pulling,
    "Learning | None": _or_none(_learning),
    "Mapping[str, str] | None": _or_none(_environment),
}
