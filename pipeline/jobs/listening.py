"""`[http]` of a schedule file: where the daemon listens, and who may change anything there."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from pipeline.jobs.files import Table
from pipeline.jobs.secret import SecretPlace
from pipeline.watching.listen import listen_text

DEFAULT = "127.0.0.1:8788"


class Http(Table):
    """Where the daemon's page is, and the token, of 16 characters or more, without which nothing can be changed there."""

    listen: Annotated[str, AfterValidator(listen_text)] = DEFAULT
    token: SecretPlace | None = None
