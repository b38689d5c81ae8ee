"""The address that a server listens on, parsed from `--listen HOST:PORT`, and the URLs of its pages."""

from __future__ import annotations

from dataclasses import dataclass

LOCALHOST = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
PAGE = "/headrace"


@dataclass(frozen=True)
class Listen:
    """The address of a server: a host of this machine, without brackets, and a port; port 0 means any free one."""

    host: str = LOCALHOST
    port: int = 8787

    @property
    def address(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL to open in a browser on the same machine."""
        host = LOCALHOST if self.host in EVERYWHERE else self.host
        return f"http://{Listen(host, self.port).address}"


def parse_listen(text: str) -> Listen:
    """Parse `HOST:PORT`, or `:PORT` for connections from this machine only. Raises ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or not port.isascii() or not 0 < int(port) < 65536 or (":" in host and not bracketed):
        raise ValueError("HOST:PORT with a port from 1 to 65535, such as 127.0.0.1:8787")
    return Listen(host.strip("[]") or LOCALHOST, int(port))


def listen_text(text: str) -> str:
    """Return `text` unchanged if `parse_listen` accepts it. Raises ValueError where it does not."""
    parse_listen(text)
    return text
