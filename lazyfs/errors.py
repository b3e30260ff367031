"""Errors that say whose fault they are, so that the user knows where to look.

The base class is never raised. Each subclass names one party: the user, the remote server, the image,
or this host (disk, kernel, privileges). Two name a kind of failure as well, because callers act on it:
`NotFound` and `Unsupported`. `hint` is the next thing to try. The command line prints ``message`` and ``hint``
on one line and exits with `exit_code`; mount(8)'s codes are used throughout (mount(8), "EXIT STATUS"): 1 usage
or permissions, 2 system error, 32 mount failure.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not typing's: neither light start, the client's or the keeper's, loads typing (3 ms)
if TYPE_CHECKING:
    from typing import ClassVar


class LazyfsError(Exception):
    """Base of all expected failures; raise a subclass.

    `fault`: the party. `code`: the kind, for programs; it goes over the wire and never changes its meaning. A subclass
    that is caught inside one process only has its parent's code.
    """

    fault: ClassVar[str] = ""
    code: ClassVar[str] = ""
    exit_code: ClassVar[int] = 32

    def __init__(self, message: str, hint: str = "") -> None:
        if type(self) is LazyfsError:
            raise TypeError("raise one of LazyfsError's subclasses")
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(LazyfsError):
    """The command was called wrongly, or lacks rights the user can give."""

    fault = code = "user"
    exit_code = 1


class RemoteError(LazyfsError):
    """A registry or blob server failed. `temporary` says whether trying again may help."""

    fault = code = "remote"
    exit_code = 32

    def __init__(self, message: str, hint: str = "", *, temporary: bool = True) -> None:
        super().__init__(message, hint)
        self.temporary = temporary


class ImageError(LazyfsError):
    """The image, its index or a cached format is damaged, hostile or not supported."""

    fault = code = "image"
    exit_code = 32


class NotFound(LazyfsError):
    """What was asked for is not where the reference says: an image, a tag, a blob, a file of a layout.

    Whoever was asked answered well, so no party failed. It counts as the image's fault, but is no ImageError: nothing
    is damaged, and asking again does not help.
    """

    fault = "image"
    code = "not_found"
    exit_code = 32


class HostError(LazyfsError):
    """This host's disk, kernel or privileges stand in the way."""

    fault = code = "host"
    exit_code = 2


class Unsupported(HostError):
    """This host's kernel, or this backend on it, cannot do what was asked for; another way may."""

    code = "unsupported"
