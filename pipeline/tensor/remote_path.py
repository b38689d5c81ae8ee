"""A place in object storage, in the place of a path: its parts are taken apart and joined as those of a path are."""

from __future__ import annotations

from pathlib import Path, PosixPath
from typing import Any, NoReturn
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "az")  # that outputs can be written to


class RemotePath(PosixPath):
    """`s3://bucket/prefix` as a path. Nothing of the disk answers for it: `pipeline.tensor.bucket` does.

    `/`, `name`, `parent` and `with_name` are those of paths; the text is the URL.
    """

    def __str__(self) -> str:
        scheme, *rest = self.parts
        return f"{scheme}//{'/'.join(rest)}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002 (of paths)
        return self

    def expanduser(self) -> RemotePath:
        return self

    def stat(self, **_: Any) -> NoReturn:
        raise TypeError(f"{self} is not on a disk")

    def open(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self} is not on a disk")

    exists = is_file = is_dir = iterdir = unlink = mkdir = rmdir = stat  # type: ignore[assignment]


def as_path(text: str | Path) -> Path:
    """The path that a text names: a RemotePath where it is a URL."""
    if isinstance(text, Path):
        return text
    return RemotePath(text.rstrip("/")) if "://" in text else Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path is a place in object storage."""
    return isinstance(path, RemotePath)


def url_fault(url: str) -> str:
    """The reason why a URL names no place for outputs; "" where it does. It is said without the URL, which may hold a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        return "a URL that names a bucket and a prefix in it"
    if parts.scheme not in SCHEMES:
        return f"a directory, or a URL of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "a URL without a user, password or query: credentials come from the environment"
    if not parts.netloc or not parts.path.strip("/"):
        return f"a bucket and a prefix in it, as {parts.scheme}://bucket/ranks"
    return ""
