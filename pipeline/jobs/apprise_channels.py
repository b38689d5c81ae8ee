"""Notifications by whatever Apprise reaches: mail, chat services, telephones. Its package is optional."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.jobs.channels import DeliveryFailed
from pipeline.jobs.messages import Message

_TYPES = {"success": "success", "failure": "failure", "stall": "warning"}


class AppriseChannel:
    """One of Apprise's services. Its name tells the kind of service and which URL it was, as the URL itself holds secrets."""

    def __init__(self, service: Any, place: int) -> None:
        self.name = f"Apprise URL {place} ({service.service_name})"
        self._service = service

    def prepare(self, message: Message) -> Any:
        """The arguments of the service's `notify`: title, body and type."""
        return {"title": message.title, "body": message.body or message.title, "notify_type": _TYPES[message.kind]}

    def send(self, prepared: Any) -> None:
        """Tell the service once. Raises DeliveryFailed."""
        try:
            delivered = self._service.notify(**prepared)
        except Exception as error:  # a plugin's own; its text may hold parts of the URL
            raise DeliveryFailed(f"it failed ({type(error).__name__})", again=True) from None
        if not delivered:
            raise DeliveryFailed("it was not delivered", again=True)


def apprise_channels(subject: str, urls: list[str]) -> list[AppriseChannel]:
    """A channel for each URL. Raises BadInput where Apprise is not installed, or a URL is none of its own; no URL is named."""
    try:
        from apprise import Apprise
    except ModuleNotFoundError:
        raise BadInput([Problem(subject, "no package apprise", "pip install headrace[jobs]")]) from None
    # What these two log holds URLs, and so secrets.
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    made, problems = [], []
    for place, url in enumerate(urls, 1):
        service = Apprise.instantiate(url, suppress_exceptions=True)
        if service is None:
            problems.append(
                Problem(subject, f"URL {place} of {len(urls)}, which is none of Apprise's", "URLs apart by white space")
            )
        else:
            made.append(AppriseChannel(service, place))
    if problems:
        raise BadInput(problems)
    return made
