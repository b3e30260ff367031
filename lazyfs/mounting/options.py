"""Mount options as mount(8) writes them: ``-o rw,upperdir=/u,"cache=/a,b"``. The last one wins.

Paths become absolute here, because the daemon works in another directory.
"""

from __future__ import annotations

import os

from lazyfs.control import messages
from lazyfs.errors import UserError
from lazyfs.records import NamedTuple
from lazyfs.sources.access import LEARNING, PULLING, Access

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

BACKENDS = ("auto", "kernel", "fuse")
INDEX_REPOSITORY = "LAZYFS_INDEX_REPOSITORY"  # environment: index repositories if no option names one
LEARN = "LAZYFS_LEARN"  # environment: learn= if no option says it

# Options of mount(8), fstab(5) and systemd.mount(5) that are for other programs, or have no effect here: access times
# are never written to a read-only root, and an overlay keeps the defaults.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "nofail", "_netdev", "_rnetdev", "nouser"),
        *(
            "atime",
            "noatime",
            "diratime",
            "nodiratime",
            "relatime",
            "norelatime",
            "strictatime",
            "nostrictatime",
        ),
        *("async", "sync", "dirsync", "lazytime", "nolazytime", "silent", "loud", "iversion", "noiversion"),
        *("mand", "nomand"),
    )
)
_IGNORED_WITH_VALUE = frozenset(("comment", "uhelper", "helper", "fsname", "subtype"))
_IGNORED_PREFIXES = ("x-", "X-")


class MountOptions(NamedTuple):
    """Parsed mount options. Paths are absolute. Defaults: read-only, nodev, nosuid."""

    writable: bool = False
    ephemeral: bool = False  # writable was asked for by this name, with no upperdir in mind
    upperdir: str | None = None
    workdir: str | None = None
    backend: str = "auto"
    cache: str | None = None  # None: the default directory
    dev: bool = False
    suid: bool = False
    executable: bool = True
    allow_other: bool = False
    foreground: bool = False
    timeout_s: float = 30.0  # the longest a single read waits
    access: Access = Access()

    def having(self, **values: object) -> MountOptions:
        """A copy with these fields, of this record or of `access`."""
        own = {name: value for name, value in values.items() if name in self._fields}
        access = {name: value for name, value in values.items() if name not in own}
        return self._replace(access=self.access._replace(**access), **own)  # type: ignore[arg-type]


def split(text: str) -> Iterator[tuple[str, str | None]]:
    """The options of one string, as (name, value or None). A comma inside double quotes, or after a
    backslash, belongs to the value; the quotes and that backslash are dropped. Raises UserError."""
    item: list[str] = []
    quoted = False
    position = 0
    while position < len(text):
        character = text[position]
        if not quoted and character == "\\" and text[position + 1 : position + 2] in (",", "\\", '"'):
            item.append(text[position + 1])
            position += 1
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            yield from _pair("".join(item))
            item.clear()
        else:
            item.append(character)
        position += 1
    if quoted:
        raise UserError(f"mount options have an unclosed quote: {text:.200}", "close the double quote")
    yield from _pair("".join(item))


def _pair(item: str) -> Iterator[tuple[str, str | None]]:
    name, separator, value = item.strip(" \t").partition("=")
    if name:
        yield name, value if separator else None
    elif separator:
        raise UserError(f"mount option without a name: {item:.100}", "write NAME=VALUE")


def quote(value: str) -> str:
    """`value` as an option string must have it for `split` to give it back."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace(",", "\\,")


class Option(NamedTuple):
    """One line of the table below. `fields`: what of MountOptions or Access it sets; `read` makes the value of the
    first from the text behind "=", None for a flag, whose `fields` say the values. `form` and `text`: its help, ""
    for one that is not listed."""

    name: str
    fields: Mapping[str, object]
    read: Callable[[str, str | None, str | None], object] | None
    form: str
    text: str


def _flag(name: str, text: str, form: str = "", **fields: object) -> Option:
    return Option(name, fields, None, form or name, text)


def _value(
    name: str, field: str, form: str, text: str, read: Callable[[str, str | None, str | None], object]
) -> Option:
    return Option(name, {field: None}, read, f"{name}={form}", text)


def _path(name: str, value: str | None, directory: str | None) -> str:
    if not value or "\0" in value:
        raise UserError(f"mount option {name} needs a path", f"write {name}=/some/path")
    expanded = os.path.expanduser(value) if value.startswith("~/") else value
    return os.path.normpath(os.path.join(directory or os.getcwd(), expanded))


def _one_more_path(name: str, value: str | None, directory: str | None) -> tuple[str, ...]:
    return (_path(name, value, directory),)


def index_repository(name: str, value: str | None, directory: str | None = None) -> str:
    """Such a repository (core/oci/indexrepository.py) with an absolute path. What is wrong at first sight is a
    UserError; the rest is checked by who opens it, since that takes regular expressions."""
    hint = f"write {name}=HOST/REPOSITORY, oci:DIR or oci+https://HOST/PATH"
    text = value or ""
    if not text or not text.isprintable():
        raise UserError(f"{name} needs a repository", hint)
    plain = text.replace("{registry}", "r").replace("{repository}", "r")
    if "{" in plain or "}" in plain:
        raise UserError(f"{name}={text:.200} has an unknown placeholder", "{registry} and {repository} are known")
    if text.startswith("oci:"):
        path = _path(name, text[4:], directory)
        if ":" in path or "@" in path:
            raise UserError(f"{name}={text:.200} has a tag, or a directory with ':' in its name", hint)
        return f"oci:{path}"
    scheme, _, rest = plain.rpartition("://")
    host, _, path = rest.partition("/")
    tagged = ":" in path or "@" in plain or (":" in host and not path and not scheme.startswith("oci+"))
    if tagged or not host or " " in plain or scheme not in ("", "docker", "oci+https", "oci+http"):
        raise UserError(f"{name}={text:.200} is not a repository without tag", hint)
    return text


def _one_more_index_repository(name: str, value: str | None, directory: str | None) -> tuple[str, ...]:
    return (index_repository(name, value, directory),)


def _backend(name: str, value: str | None, _: str | None) -> str:
    if value not in BACKENDS:
        raise UserError(f"mount option {name}={value or ''} is unknown", "use backend=auto, kernel or fuse")
    return value


def _learning(name: str, value: str | None, _: str | None) -> str:
    if value not in LEARNING:
        raise UserError(f"{name}={value or '':.40} is unknown", f"use one of {', '.join(LEARNING)}")
    return value


def _pull(name: str, value: str | None, _: str | None) -> str:
    if value not in PULLING:
        raise UserError(f"mount option {name}={value or '':.40} is unknown", f"use pull={', '.join(PULLING)}")
    return value


def _seconds(name: str, value: str | None, _: str | None) -> float:
    try:
        return messages.parse_timeout(float((value or "").removesuffix("s")))
    except (ValueError, messages.ProtocolError):
        raise UserError(
            f"mount option {name}={value or '':.40} is not a time",
            f"give seconds from {messages.MIN_TIMEOUT_S:g} to {messages.MAX_TIMEOUT_S:g}: timeout=30",
        ) from None


def _platform(name: str, value: str | None, _: str | None) -> str:
    from lazyfs.core.oci.platforms import parse_platform  # with re and more: few name one

    try:
        return str(parse_platform(value or ""))
    except UserError:
        raise UserError(
            f"mount option {name}={value or '':.60} is not a platform",
            "write OS/ARCHITECTURE[/VARIANT]: platform=linux/arm64/v8",
        ) from None


# All options. An entry here is all that an option needs to be parsed, suggested and explained.
OPTIONS = (
    _flag("ro", "", writable=False),
    _flag("rw", "read-only (default); or writable, by an overlay whose upper\ndirectory is thrown away at the end",
          "ro, rw", writable=True),
    _value("upperdir", "upperdir", "DIR", "keep what is written there (with rw)", _path),
    _value("workdir", "workdir", "DIR", "overlayfs' own, on the same file system (default: beside upperdir)", _path),
    _flag("ephemeral", "rw without upperdir=, by a name that also mount(8) and fstab pass on",
          writable=True, ephemeral=True),
    _value("backend", "backend", "NAME", "auto (default), kernel (EROFS; root, Linux 6.12) or fuse (also without root)",
           _backend),
    _value("pull", "pull", "WHEN",
           "ask the registry always (default; if it is away, the image is\n"
           "as it was here last), missing: only for what is not known here,\nor never: what is cached must do", _pull),
    _flag("offline", "the same as pull=never", pull="never"),
    _value("cache", "cache", "DIR", "the block cache (root: /var/cache/lazyfs, others: ~/.cache/lazyfs)", _path),
    _value("timeout", "timeout_s", "SECONDS", "the longest a read waits before it fails with EIO (30)", _seconds),
    _value("platform", "platform", "OS/ARCH[/VARIANT]", "of an image for several (default: this host's)", _platform),
    _value("authfile", "auth_files", "FILE", "credentials, in place of those of docker and podman; may be repeated",
           _one_more_path),
    _value("ca", "ca_files", "FILE", "a further certificate authority (PEM); may be repeated", _one_more_path),
    _value("index_repository", "index_repositories", "REPO",
           "look for an index there, too, and push it there; {registry} and\n"
           "{repository} may be in it; may be repeated", _one_more_index_repository),
    _value("learn", "learn", "WHAT",
           "local (default): fetch ahead what earlier starts on this host\n"
           "read; off: do not; push: improve the image's startup pack, too", _learning),
    _flag("insecure", "plain HTTP, or certificates that do not verify", insecure=True),
    _flag("dev", "", dev=True),
    _flag("nodev", "", dev=False),
    _flag("suid", "device files and set-id bits count (root; off by default)", "dev, suid", suid=True),
    _flag("nosuid", "", suid=False),
    _flag("exec", "", executable=True),
    _flag("noexec", "nothing can be executed", executable=False),
    # mount(8): these imply further ones "unless overridden by subsequent options".
    _flag("user", "", executable=False, dev=False, suid=False),
    _flag("users", "", executable=False, dev=False, suid=False),
    _flag("owner", "", dev=False, suid=False),
    _flag("group", "", dev=False, suid=False),
    _flag("allow_other", "fuse without root: other users may enter (user_allow_other in /etc/fuse.conf)",
          allow_other=True),
    _flag("foreground", "stay until unmounted; Ctrl-C unmounts", foreground=True),
)  # fmt: skip
KNOWN = {option.name: option for option in OPTIONS}
_OF_USERS = ("user", "owner", "group")  # mount(8) takes a name behind them


def help_text() -> str:
    """The table, as help."""
    lines = ["mount options (-o, separated by commas; a value with a comma goes in double quotes):\n"]
    for option in OPTIONS:
        if option.text:
            lines.append(f"  {option.form:<19} {option.text.replace(chr(10), chr(10) + ' ' * 22)}\n")
    return "".join(lines)


def parse(
    texts: Iterable[str],
    base: MountOptions | None = None,
    *,
    sloppy: bool = False,
    directory: str | None = None,
) -> MountOptions:
    """The options of several ``-o`` strings over `base` (default: MountOptions()). `sloppy`: unknown ones
    are passed over (mount -s). Relative paths start at `directory` (default: the current one). Raises
    UserError."""
    options = MountOptions() if base is None else base
    for text in texts:
        for name, value in split(text):
            options = _apply(options, name, value, sloppy, directory)
    if not options.access.index_repositories and (named := os.environ.get(INDEX_REPOSITORY)):
        found = [index_repository(INDEX_REPOSITORY, one, directory) for one in named.replace(",", " ").split()]
        options = options.having(index_repositories=tuple(found))
    if options.access.learn is None and (named := os.environ.get(LEARN)):
        options = options.having(learn=_learning(LEARN, named, directory))
    return _checked(options)


def _apply(
    options: MountOptions, name: str, value: str | None, sloppy: bool, directory: str | None
) -> MountOptions:
    option = KNOWN.get(name)
    if option is not None and option.read is not None:
        (field,) = option.fields
        read = option.read(name, value, directory)
        if isinstance(read, tuple):  # each adds to what the others said
            read = (*(getattr(options.access, field) or ()), *read)
        return options.having(**{field: read})
    if option is not None:
        if value is not None and not (name in _OF_USERS and value):
            raise UserError(f"mount option {name} takes no value", f"write {name}, not {name}={value:.40}")
        return options.having(**option.fields)
    if name == "remount":
        raise UserError(
            "a lazyfs mount cannot be remounted", "unmount it and mount it again with the new options"
        )
    ignored = (
        (name in _IGNORED and value is None)
        or name in _IGNORED_WITH_VALUE
        or name.startswith(_IGNORED_PREFIXES)
    )
    if ignored or sloppy:
        return options
    raise UserError(f"unknown mount option {name:.60}", _suggestion(name))


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, KNOWN, 1)
    return (
        f"did you mean {close[0]}?"
        if close
        else "`lazyfs mount --help` lists the options; -s ignores unknown ones"
    )


def _checked(options: MountOptions) -> MountOptions:
    if options.workdir and not options.upperdir:
        raise UserError("mount option workdir= needs upperdir=", "give both, on the same file system")
    if options.upperdir and not options.writable:
        raise UserError("mount option upperdir= needs rw", "add rw: -o rw,upperdir=...")
    return options
