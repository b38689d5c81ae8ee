"""Leases: who may write where. One attempt at a time holds an output directory, or a scratch that several runs share.

A lease is good for LEASE_SECONDS and is renewed every HEARTBEAT_SECONDS. One whose time is over still belongs to its holder until
somebody takes it, which happens only after the holder's process is known to be gone (`JobStore.lose`): so that a daemon that was
suspended for an hour and a new one never write side by side. Each taking has a new token.

The functions work inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from pipeline.jobs.tables import leases

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0


def acquire(connection: sa.Connection, attempt: int, resources: Sequence[str], now: float) -> None:
    """Give an attempt leases of resources that nobody holds."""
    for resource in resources:
        row = {"resource": resource, "token": 1, "attempt": attempt, "expires": now + LEASE_SECONDS}
        held = sa.select(leases.c.token).where(leases.c.resource == resource)
        token = connection.execute(held).scalar_one_or_none()
        if token is None:
            connection.execute(leases.insert().values(row))
        else:
            connection.execute(leases.update().where(leases.c.resource == resource).values(row | {"token": token + 1}))


def holders(connection: sa.Connection, resources: Sequence[str]) -> set[int]:
    """The attempts that hold any of the resources, in time or not."""
    rows = sa.select(leases.c.attempt).where(leases.c.resource.in_(resources), leases.c.attempt.is_not(None))
    return set(connection.execute(rows).scalars())


def renew(connection: sa.Connection, attempts: Sequence[int], now: float) -> None:
    """Give the attempts' leases new time."""
    connection.execute(leases.update().where(leases.c.attempt.in_(attempts)).values(expires=now + LEASE_SECONDS))


def release(connection: sa.Connection, attempt: int) -> None:
    """Take an attempt's leases from it."""
    connection.execute(leases.update().where(leases.c.attempt == attempt).values(attempt=None, expires=0.0))


def expired(connection: sa.Connection, now: float) -> set[int]:
    """The attempts that hold leases whose time is over."""
    rows = sa.select(leases.c.attempt).where(leases.c.attempt.is_not(None), leases.c.expires <= now)
    return set(connection.execute(rows).scalars())
