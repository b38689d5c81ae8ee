"""Notifications as a JSON POST that its receiver can check: signed with HMAC-SHA256 over the time and the body."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from pipeline.jobs.channels import DeliveryFailed
from pipeline.jobs.messages import Message

TIMESTAMP, SIGNATURE, DELIVERY = "X-Headrace-Timestamp", "X-Headrace-Signature", "X-Headrace-Delivery"
_TRY_AGAIN = (408, 425, 429)  # and all from 500


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body: the receiver's address is to be mended instead."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """A channel to one address.

    Every attempt at one message has the same X-Headrace-Delivery, so that a receiver can tell repetitions, and a signature over a
    timestamp of its own, so that it can refuse old ones.
    """

    name = "webhook"

    def __init__(self, url: str, secret: str, timeout_seconds: float, now: Callable[[], float] = time.time) -> None:
        self._url, self._secret, self._timeout, self._now = url, secret.encode(), timeout_seconds, now
        self._post = urllib.request.build_opener(_NoRedirects).open

    def prepare(self, message: Message) -> Any:
        """The delivery's number and body."""
        return str(uuid.uuid4()), json.dumps(message.values).encode()

    def send(self, prepared: Any) -> None:
        """POST once. Raises DeliveryFailed."""
        delivery, body = prepared
        timestamp = str(int(self._now()))
        headers: Mapping[str, str] = {
            "Content-Type": "application/json",
            "User-Agent": "headrace",
            DELIVERY: delivery,
            TIMESTAMP: timestamp,
            SIGNATURE: "sha256=" + sign(self._secret, timestamp, body),
        }
        request = urllib.request.Request(self._url, data=body, headers=dict(headers), method="POST")
        try:
            with self._post(request, timeout=self._timeout):
                return
        except urllib.error.HTTPError as error:
            error.close()
            again = error.code in _TRY_AGAIN or error.code >= 500
            raise DeliveryFailed(f"the receiver answered {error.code}", again) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise DeliveryFailed(f"the receiver did not answer ({type(reason).__name__})", again=True) from None


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256, as hexadecimal digits, of the timestamp's digits, a full stop and the body."""
    return hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
