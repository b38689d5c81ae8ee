"""Secrets: where one is to be found, never what it is. A schedule file names an environment variable or a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import Table
from pipeline.planning.target_options import AbsolutePath


class Secret(Table):
    """`{ env = "NAME" }` or `{ file = "/run/secrets/name" }`: the secret itself is no part of this value.

    White space around it does not count.
    """

    env: Annotated[str | None, Field(min_length=1)] = None
    file: AbsolutePath | None = None

    @model_validator(mode="after")
    def _one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError('one of { env = "NAME" } and { file = "PATH" }, not the secret itself')
        return self

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"the environment variable {self.env}" if self.env else str(self.file)

    def read(self, subject: str, least_length: int = 1) -> str:
        """The secret. Raises BadInput, about `subject`, where there is none or one of fewer characters than `least_length`."""
        try:
            text = os.environ.get(self.env, "") if self.env else self.file.read_text() if self.file else ""
        except (OSError, UnicodeDecodeError) as error:
            found = getattr(error, "strerror", None) or "bytes that are no text"
            raise BadInput([Problem(subject, f"{found} at {self.place}", "a file with the secret")]) from None
        text = text.strip()
        if len(text) < least_length:
            found = f"{len(text)} characters at {self.place}" if text else f"nothing at {self.place}"
            raise BadInput([Problem(subject, found, f"a secret of {least_length} characters or more")])
        return text


def _no_text(value: Any) -> Any:
    """An empty table for anything but a reference to a secret: it may be the secret itself, and errors print their input."""
    return value if isinstance(value, Secret) or (isinstance(value, dict) and set(value) <= {"env", "file"}) else {}


SecretPlace = Annotated[Secret, BeforeValidator(_no_text)]


def anchored_secrets(values: Any, folder: Path) -> Any:
    """A table, and those in it, with the files of secrets as absolute paths: they are relative to `folder`, as in all files."""
    if not isinstance(values, dict):
        return values
    if set(values) == {"file"} and isinstance(values["file"], str):
        return {"file": folder / Path(values["file"]).expanduser()}
    return {key: anchored_secrets(value, folder) for key, value in values.items()}
