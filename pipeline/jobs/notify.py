"""Tells people elsewhere how runs end, by whatever Apprise reaches: mail, chat services, telephones, a JSON webhook.

The addresses are secrets: a schedule file names the environment variable or the file that has them, and no error repeats them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import Table
from pipeline.jobs.fleet import Fleet
from pipeline.jobs.runs import Run
from pipeline.planning.home import from_folder
from pipeline.planning.target_options import AbsolutePath
from pipeline.watching.units import human_bytes

LOGGER = logging.getLogger("headrace.notify")
WAITING = 200  # messages that wait to be sent; more than that are dropped
ATTEMPTS, PAUSE_SECONDS, CLOSE_SECONDS = 3, 5.0, 10.0
LONGEST_ERROR = 4000  # characters
_KINDS = {"done": "success", "refused": "failure", "failed": "failure", "crashed": "failure", "no engine": "failure"}
_TYPES = {"success": "success", "failure": "failure", "stall": "warning"}


class Secret(Table):
    """`{ env = "NAME" }` or `{ file = "/run/secrets/name" }`: the secret itself is no part of this value."""

    env: str | None = None
    file: AbsolutePath | None = None

    @model_validator(mode="after")
    def _one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError('one of { env = "NAME" } and { file = "PATH" }, not the secret itself')
        return self

    def read(self, subject: str) -> str:
        """The secret. Raises BadInput, about `subject`, where there is none."""
        place = f"the environment variable {self.env}" if self.env else str(self.file)
        try:
            text = os.environ.get(self.env, "") if self.env else self.file.read_text() if self.file else ""
        except (OSError, UnicodeDecodeError) as error:
            found = getattr(error, "strerror", None) or "bytes that are no text"
            raise BadInput([Problem(subject, f"{found} at {place}", "a file with the secret")]) from None
        if not text.strip():
            raise BadInput([Problem(subject, f"nothing at {place}", "a secret")])
        return text.strip()


def _no_text(value: Any) -> Any:
    """An empty table for anything but a reference to a secret: it may be the secret itself, and errors print their input."""
    return value if isinstance(value, Secret) or (isinstance(value, dict) and set(value) <= {"env", "file"}) else {}


class Notify(Table):
    """`[notify]`: which events are told, and the place of Apprise's URLs, separated by white space."""

    on: tuple[Literal["success", "failure", "stall"], ...] = ("failure", "stall")
    apprise: Annotated[Secret, BeforeValidator(_no_text)]

    def services(self) -> list[Any]:
        """Apprise's service for each URL. Raises BadInput where there is none, or one is no URL of Apprise's; none is named."""
        try:
            from apprise import Apprise
        except ModuleNotFoundError:
            raise BadInput([Problem("notify.apprise", "no package apprise", "pip install headrace[jobs]")]) from None
        # What these two log holds URLs, and so secrets.
        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        logging.getLogger("urllib3").setLevel(logging.WARNING)
        urls = self.apprise.read("notify.apprise").split()
        made = [Apprise.instantiate(url, suppress_exceptions=True) for url in urls]
        wrong = [f"URL {place} of {len(urls)}" for place, service in enumerate(made, 1) if service is None]
        if wrong:
            found = f"{', '.join(wrong)}, which Apprise does not know"
            raise BadInput([Problem("notify.apprise", found, "its URLs, with white space between")])
        return made


def message(event: str, run: Run, said: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The kind, title and body of an event's notification; None where it needs none."""
    title = f"headrace: {run.unit.name} {run.state}"
    if event == "stalled":
        return "stall", f"headrace: {run.unit.name} stalled", f"nothing written for {said['seconds'] / 60:.0f} minutes"
    if event != "ended" or run.state not in _KINDS:
        return None
    if run.state == "done":
        lines = [f"{human_bytes(int(run.total('bytes_written')))} written in {run.total('seconds'):.0f} s", *run.unit.outputs]
        return "success", title, "\n".join(lines)
    lines = [f"attempt {len(run.attempts)}, exit code {run.exit_code}", run.error[:LONGEST_ERROR], *run.unit.outputs]
    return "failure", title, "\n".join(filter(None, lines))


@contextmanager
def notifying(options: Notify, fleet: Fleet) -> Iterator[None]:
    """Notify of a fleet's events while the context lasts, never holding it up. Raises BadInput as `services` does."""
    services = options.services()
    waiting: queue.SimpleQueue[tuple[str, str, str] | None] = queue.SimpleQueue()
    ending = threading.Event()

    def hear(event: str, run: Run, said: Mapping[str, Any]) -> None:
        found = message(event, run, said)
        if found and found[0] in options.on:
            if waiting.qsize() < WAITING:
                waiting.put(found)
            else:
                LOGGER.error("dropped %r, as %d messages wait", found[1], WAITING)

    def send() -> None:
        while (found := waiting.get()) is not None:
            for place, service in enumerate(services, 1):
                name = f"Apprise URL {place} ({service.service_name})"
                for left in reversed(range(1 if ending.is_set() else ATTEMPTS)):
                    if _sent(service, found):
                        break
                    LOGGER.error("%s: %r was not delivered%s", name, found[1], f"; {left} attempts left" if left else "")
                    ending.wait(PAUSE_SECONDS if left else 0)

    thread = threading.Thread(target=send, name="headrace-notify", daemon=True)
    thread.start()
    fleet.listeners.append(hear)
    try:
        yield
    finally:
        ending.set()
        waiting.put(None)
        thread.join(CLOSE_SECONDS)


def _sent(service: Any, found: tuple[str, str, str]) -> bool:
    kind, title, body = found
    try:
        return bool(service.notify(title=title, body=body or title, notify_type=_TYPES[kind]))
    except Exception as error:  # a plugin's own; its text may hold parts of the URL
        LOGGER.error("a notification failed (%s)", type(error).__name__)
        return False


def anchored_secrets(values: Any, folder: Path) -> Any:
    """A table with the files of its secrets as absolute paths: they are relative to `folder`, as in all files."""
    if not isinstance(values, dict):
        return values
    if set(values) == {"file"} and isinstance(values["file"], str):
        return {"file": from_folder(values["file"], folder)}
    return {key: anchored_secrets(value, folder) for key, value in values.items()}
