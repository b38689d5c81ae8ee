"""Delivering messages without ever holding up who sends them: a queue and a thread for each channel, with retries."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from typing import Any, Protocol

from pipeline.jobs.messages import Message

LOGGER = logging.getLogger("headrace.notify")
WAITING = 200  # messages that a channel holds; more than that, and the newest are dropped
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


class DeliveryFailed(Exception):
    """A message was not delivered. Its text holds no secret; `again`: another attempt may do better."""

    def __init__(self, text: str, again: bool) -> None:
        super().__init__(text)
        self.again = again


class Channel(Protocol):
    """Where messages go. `name` is what logs call it."""

    name: str

    def prepare(self, message: Message) -> Any: ...
    def send(self, prepared: Any) -> None: ...


class Outbox:
    """The messages on their way to one channel."""

    def __init__(self, channel: Channel, attempts: int, first_pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        """`attempts` at each message; the pause after a failed one doubles."""
        self._channel, self._attempts, self._pause = channel, attempts, first_pause_seconds
        self._queue: queue.Queue[Message | None] = queue.Queue(WAITING)
        self._hurry = threading.Event()  # the process ends: no more pauses
        self._thread = threading.Thread(target=self._work, name=f"headrace-{channel.name}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Take a message in; returns at once."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            LOGGER.error("%s: dropped %r, as %d messages wait", self._channel.name, message.title, WAITING)

    def hurry(self) -> None:
        """From now on, one more attempt at each message and no pause."""
        self._hurry.set()

    def close(self, seconds: float) -> None:
        """Deliver what waits, in a hurry and for at most some seconds."""
        self.hurry()
        end = time.monotonic() + seconds
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            LOGGER.error("%s: %d messages were not delivered", self._channel.name, self._queue.qsize())
            return
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            LOGGER.error("%s: not all messages were delivered", self._channel.name)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._deliver(message)
            except Exception as error:  # a fault of ours; the next message may fare better
                LOGGER.error("%s: %r was not delivered (%s)", self._channel.name, message.title, type(error).__name__)

    def _deliver(self, message: Message) -> None:
        prepared = self._channel.prepare(message)
        pause = self._pause
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts or self._hurry.is_set()
            try:
                self._channel.send(prepared)
            except DeliveryFailed as error:
                if last or not error.again:
                    LOGGER.error("%s: %r was not delivered: %s", self._channel.name, message.title, error)
                    return
                LOGGER.warning("%s: attempt %d at %r: %s", self._channel.name, attempt, message.title, error)
                # Some more or less, so that many senders do not come back at once.
                self._hurry.wait(min(pause, LONGEST_PAUSE_SECONDS) * random.uniform(0.75, 1.25))
                pause *= 2
            else:
                LOGGER.info("%s: %r delivered", self._channel.name, message.title)
                return
