"""`[http]` of a schedule file: where the daemon listens, and who may change anything there."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from pipeline.jobs.files import Table
from pipeline.jobs.secret import SecretPlace
from pipeline.planning.listen import Listen, listen_text

DEFAULT = Listen(port=8788)


class Http(Table):
    """Where the daemon's page is, and the token, of 16 characters or more, without which nothing can be changed there.

    Without `listen` it is at DEFAULT, or on any free port of this machine where that is taken.
    """

    listen: Annotated[str, AfterValidator(listen_text)] | None = None
    token: SecretPlace | None = None
