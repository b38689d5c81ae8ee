"""Tells people and programs elsewhere how jobs end: `[notify]` of a schedule file, and the subscriber that sends notifications."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.jobs.apprise_channels import apprise_channels
from pipeline.jobs.channels import Channel, Outbox
from pipeline.jobs.events import Event, Hub
from pipeline.jobs.files import Table
from pipeline.jobs.messages import Kind, message
from pipeline.jobs.secret import SecretPlace
from pipeline.jobs.webhook import Webhook

CLOSE_SECONDS = 10.0  # how long the end of the daemon waits for deliveries
LEAST_SECRET = 16  # characters


def _masked(url: Any) -> Any:
    """A URL with its user and password made unreadable, as the errors about it say it again."""
    if not isinstance(url, str) or "@" not in urlsplit(url).netloc:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=f"***:***@{parts.hostname}").geturl()


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address that begins with https:// or http://")
    if parts.username:
        raise ValueError("an address without a user or password in it, as the signature says who calls")
    return url


class WebhookOptions(Table):
    """`[notify.webhook]`: JSON is POSTed to `url`, signed with a secret of 16 characters or more.

    `timeout_seconds` is for one attempt; between those at one message it pauses for 1, 2, 4, ... seconds, at most 60.
    """

    url: Annotated[str, AfterValidator(_address), BeforeValidator(_masked)]
    secret: SecretPlace
    timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 10.0
    attempts: Annotated[int, Field(ge=1, le=20)] = 5


class Notify(Table):
    """`[notify]`: which events are told, and to whom.

    `apprise`: the place of Apprise's URLs, separated by white space. They hold secrets.
    """

    on: tuple[Kind, ...] = ("failure", "stall")
    webhook: WebhookOptions | None = None
    apprise: SecretPlace | None = None

    def channels(self) -> list[tuple[Channel, int]]:
        """Each channel, and how many attempts it gets. Raises BadInput where a secret is not there or a URL is none."""
        made: list[tuple[Channel, int]] = []
        if self.webhook:
            secret = self.webhook.secret.read("notify.webhook.secret", LEAST_SECRET)
            made.append((Webhook(self.webhook.url, secret, self.webhook.timeout_seconds), self.webhook.attempts))
        if self.apprise:
            urls = self.apprise.read("notify.apprise").split()
            made += [(channel, 3) for channel in apprise_channels("notify.apprise", urls)]
        return made


class Notifier:
    """Sends notifications of a hub's events; never delays its publisher or makes it fail."""

    def __init__(self, kinds: Sequence[Kind], outboxes: Sequence[Outbox]) -> None:
        self._kinds, self._outboxes = frozenset(kinds), tuple(outboxes)

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        said = message(event)
        if said is not None and said.kind in self._kinds:
            for outbox in self._outboxes:
                outbox.put(said)


@contextmanager
def notifying(options: Notify, hub: Hub) -> Iterator[None]:
    """Notify of a hub's events while the context lasts. Raises BadInput as `Notify.channels` does."""
    outboxes = [Outbox(channel, attempts) for channel, attempts in options.channels()]
    unsubscribe = hub.subscribe(Notifier(options.on, outboxes))
    try:
        yield
    finally:
        unsubscribe()
        end = time.monotonic() + CLOSE_SECONDS
        for outbox in outboxes:
            outbox.hurry()
        for outbox in outboxes:
            outbox.close(max(0.0, end - time.monotonic()))
