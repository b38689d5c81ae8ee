"""Parts of rank files that are assembled: a task gathers the bytes of one and uploads it, or sends a whole file as one stream."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.tensor.bucket import ObjectStream, object_size, upload_part
from pipeline.tensor.metering import meter

STREAM = 0  # the number of the one part of a file that is a stream


@dataclass(frozen=True, slots=True)
class RankPart:
    """The bytes [start, end) of a rank's file of `file_bytes`, which goes to `url`.

    `sink`: the number of its output among a plan's, or, for the task that makes the part, among those written. `number`: from 1, or
    STREAM. `head`: the bytes that the part begins with and no tensor has: of the file's header. `padding`: the ranges of the file's
    bytes in the part that nobody writes, which are zeros, in order. `step_bytes`: how many bytes a stream sends at once.
    """

    url: str
    sink: int
    rank: int
    number: int
    start: int
    end: int
    file_bytes: int
    head: bytes
    step_bytes: int
    padding: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """The part as messages name it."""
        return self.url if self.number == STREAM else f"{self.url}, part {self.number}"


@dataclass(frozen=True, slots=True)
class UploadedPart:
    """A part that the store has: what it answered is its `etag`. `sink`: the number of its output among those written."""

    sink: int
    rank: int
    number: int
    etag: str


class PartBytes:
    """The bytes of a part while they are gathered, in any order; all of them are in memory. `filled`: how many are there."""

    def __init__(self, part: RankPart, upload: str) -> None:
        self.part, self.upload = part, upload
        self.data = bytearray(part.end - part.start)
        self.data[: len(part.head)] = part.head
        self.filled = len(part.head) + sum(stop - start for start, stop in part.padding)

    def write(self, data: memoryview, offset: int) -> None:
        """Take bytes of the file from `offset`."""
        first = offset - self.part.start
        self.data[first : first + len(data)] = data
        self.filled += len(data)

    def sent(self) -> UploadedPart:
        """Upload the part; its ETag is "" where the file is whole already. Raises OSError where the store fails."""
        part = self.part
        _check(part, part.start + self.filled)
        try:
            with meter("write", 0):  # its bytes are counted as they are gathered
                etag = upload_part(part.url, self.upload, part.number, self.data)
        except FileNotFoundError:
            if object_size(part.url) != part.file_bytes:
                raise
            etag = ""  # this is done again by a cluster that has lost a worker
        return UploadedPart(part.sink, part.rank, part.number, etag)

    def __enter__(self) -> PartBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.data = bytearray()


class RankStream:
    """A rank's file as it is sent from the first byte to the last. What is not sent whole is not there."""

    def __init__(self, part: RankPart) -> None:
        self.part = part
        self._at = 0
        self._stream = ObjectStream(part.url, part.step_bytes)

    def write(self, data: memoryview, offset: int) -> None:
        """Send the next bytes of the file."""
        self._pad(offset)
        if offset != self._at:
            raise RuntimeError(f"{self.part.url}: bytes from {offset:,} where those from {self._at:,} are next")
        self._stream.write(bytes(data))
        self._at += len(data)

    def sent(self) -> UploadedPart:
        """Make the object whole."""
        self._pad(self.part.end)
        _check(self.part, self._at)
        with meter("write", 0):
            self._stream.close()
        return UploadedPart(self.part.sink, self.part.rank, STREAM, "")

    def _pad(self, stop: int) -> None:
        """Send the padding that is next, before the bytes from `stop`."""
        for start, end in self.part.padding:
            if self._at == start < min(end, stop):
                while self._at < end:
                    count = min(end - self._at, self.part.step_bytes)
                    self._stream.write(bytes(count))
                    self._at += count

    def __enter__(self) -> RankStream:
        self.write(memoryview(self.part.head), 0)
        return self

    def __exit__(self, *_: object) -> None:
        del self._stream  # one that is not closed makes no object


def _check(part: RankPart, at: int) -> None:
    if at != part.end:
        raise OSError(errno.EREMOTEIO, f"{at - part.start:,} bytes of {part.end - part.start:,} were made", part.name)


def gathering(part: RankPart, uploads: Mapping[str, str]) -> PartBytes | RankStream:
    """The taker of the bytes of a part. `uploads`: the id of the upload of each rank's file, by its URL."""
    return RankStream(part) if part.number == STREAM else PartBytes(part, uploads[part.url])
