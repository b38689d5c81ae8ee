"""The address that a server listens on, as `--listen HOST:PORT` gives it, and the addresses of its pages."""

from __future__ import annotations

from dataclasses import dataclass

LOCALHOST = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
PAGE = "/headrace"


@dataclass(frozen=True)
class Listen:
    """Where a server listens: a host of this machine, without brackets, and a port; port 0 takes any that is free."""

    host: str = LOCALHOST
    port: int = 8787

    @property
    def address(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """What to open in a browser on the same machine."""
        host = LOCALHOST if self.host in EVERYWHERE else self.host
        return f"http://{Listen(host, self.port).address}"

    @property
    def origins(self) -> list[str]:
        """The hosts, in Bokeh's patterns, whose pages may follow this server's.

        Those of this machine may have any port, as a tunnel (`ssh -L`) has one of its own; where the server listens to every
        network, it can not know the names that others know it by.
        """
        hosts = ["localhost:*", "127.0.0.1:*", "[::1]:*"]
        return (
            [*hosts, f"*:{self.port}"] if self.host in EVERYWHERE else [*hosts, f"{Listen(self.host).address.rpartition(':')[0]}:*"]
        )


def parse_listen(text: str) -> Listen:
    """`HOST:PORT`, or `:PORT` for this machine alone. Raises ValueError where it is neither."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or not port.isascii() or not 0 < int(port) < 65536 or (":" in host and not bracketed):
        raise ValueError("HOST:PORT with a port from 1 to 65535, such as 127.0.0.1:8787")
    return Listen(host.strip("[]") or LOCALHOST, int(port))


def listen_text(text: str) -> str:
    """The same text, where it is an address that `parse_listen` takes."""
    parse_listen(text)
    return text
