"""Errors of the system, in words: each names its file and says what to do where the system's own words do not."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.errors import BadInput, Problem

# What to do about an error, where the system's own words do not say enough.
REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "The quota there is used up: free space, or have it raised",
    errno.EROFS: "The file system is mounted read-only: an error of its disk may have made it so",
    errno.ESTALE: "The file server no longer knows the file: it was replaced or the share was exported anew; mount it again",
    errno.EMFILE: "This process may open no more files: raise `ulimit -n`, or give fewer --workers",
    errno.ENFILE: "The whole system may open no more files: end other programs, or raise fs.file-max",
    errno.EIO: "The disk or its connection fails: see the system's log",
}

# Time alone may mend these.
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT})


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Have errors of the system name this file where they name none, as those of calls on descriptors do not."""
    try:
        yield
    except OSError as error:
        raise named(error, path) from None


def named(error: OSError, path: object) -> OSError:
    """The same error with a file's name, unless it has one, or is none of the system's."""
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def sentence(error: OSError) -> str:
    """The error in words: what the system says, the file, and what to do where these do not say enough."""
    place = f" ({error.filename})" if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{error.strerror or error}{place}" + (f". {remedy}" if remedy else "")


def refusal(error: OSError, subject: object, expected: str, otherwise: str = "") -> BadInput:
    """An error of the system as a refusal: of its file, or of `subject` where it names none, and what was `expected`.

    `otherwise`: what somebody can do beside, such as choosing another place.
    """
    name = subject if error.filename is None else error.filename
    remedy = REMEDIES.get(error.errno or 0, "Free space" if otherwise else "") + (f", or {otherwise}" if otherwise else "")
    return BadInput([Problem(str(name), error.strerror or str(error), expected, remedy, passing=error.errno in PASSING)])


@contextmanager
def refusing(subject: object, expected: str) -> Iterator[None]:
    """Raise BadInput for an error of the system, as `refusal` says it."""
    try:
        yield
    except OSError as error:
        raise refusal(error, subject, expected) from error
