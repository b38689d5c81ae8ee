"""Sockets that listen at an address, without what serves them: the page's server is loaded when somebody asks for the page."""

from __future__ import annotations

import errno
import socket

from pipeline.errors import BadInput, Problem
from pipeline.planning.listen import Listen

BACKLOG = 128


def bound(listen: Listen, or_any_port: bool = False) -> list[socket.socket]:
    """Return sockets that listen at an address and do not block. Raises BadInput where it is taken or is not this machine's.

    `or_any_port`: take any free port where that of `listen` is taken.
    """
    try:
        return _listening(listen.host, listen.port)
    except OSError as error:
        if or_any_port and error.errno == errno.EADDRINUSE:
            return _listening(listen.host, 0)
        found = error.strerror or str(error)
        raise BadInput([Problem(f"--listen {listen.address}", found, "an address of this machine whose port is free")]) from None


def _listening(host: str, port: int) -> list[socket.socket]:
    """One socket for each address that a host has, all on one port. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in addresses):
            made = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port or sockets[0].getsockname()[1], *address[2:]))
            made.listen(BACKLOG)
            made.setblocking(False)
    except OSError:
        for made in sockets:
            made.close()
        raise
    return sockets
