"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
WATCHING = "Watching"
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.", rich_help_panel=WATCHING)]
LogFormat = Annotated[
    Literal["text", "json"], typer.Option("--log_format", help="Progress as text or as JSON lines.", rich_help_panel=WATCHING)
]
