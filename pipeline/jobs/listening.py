"""`[http]` of a schedule file: where the daemon listens, and who may change anything there."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.jobs.files import Table
from pipeline.jobs.secret import SecretPlace
from pipeline.watching.listen import listen_text

DEFAULT = "127.0.0.1:8788"


class Http(Table):
    """Where the daemon's page is, and the token for what changes anything."""

    listen: Annotated[str, AfterValidator(listen_text)] = Field(DEFAULT, description="HOST:PORT.")
    token: SecretPlace | None = Field(None, description="16 characters or more; without it nothing can be changed over HTTP.")
