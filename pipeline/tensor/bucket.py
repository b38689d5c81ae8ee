"""Objects in object storage as outputs need them: whole small ones, conditional writes, and uploads in parts.

S3, and what speaks its protocol, is asked through botocore, whose calls name each part of an upload, so that one goes on after a
crash. Google's and Microsoft's stores are asked through obstore, whose uploads are one stream that begins anew.

Credentials are those of each provider's own chain (the environment, its configuration, the machine's role), and stand in no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import BadInput, Problem
from pipeline.tensor.remote_path import as_path, is_remote, url_fault
from pipeline.tensor.store_requests import all_below, ask_obstore, ask_s3, naming_store, pages, whole_bucket

IN_PARTS = ("s3",)  # the stores whose uploads go on after a crash


@dataclass(frozen=True)
class Upload:
    """An upload in parts that is neither complete nor aborted. `begun`: seconds since the epoch."""

    url: str
    id: str
    begun: float


def in_parts(url: str) -> bool:
    """Whether the store of a URL takes an object in parts that stay when a run ends."""
    return urlsplit(url).scheme in IN_PARTS


def read_object_at(url: str) -> tuple[bytes, str] | None:
    """The bytes of a small object, and which one it is as `put_object` takes it; None where there is none."""
    bucket, key = _place(url)
    try:
        if in_parts(url):
            said = ask_s3(url, "get_object", Bucket=bucket, Key=key, read=True)
            return said["Body"], said["ETag"]
        got = ask_obstore(url, "get", key)
        # Google's store tells objects apart by a version of its own.
        return bytes(got.bytes()), json.dumps({key: got.meta.get(key) for key in ("e_tag", "version")})
    except FileNotFoundError:
        return None


def object_size(url: str) -> int | None:
    """The bytes of an object; None where there is none."""
    bucket, key = _place(url)
    try:
        if in_parts(url):
            return int(ask_s3(url, "head_object", Bucket=bucket, Key=key)["ContentLength"])
        return int(ask_obstore(url, "head", key)["size"])
    except FileNotFoundError:
        return None


def objects_below(url: str, deep: bool = False) -> dict[str, int]:
    """The bytes of each object below a prefix, by its name there; without `deep`, of those directly below it.

    Empty objects that stand for folders do not count.
    """
    bucket, key = _place(url)
    prefix = f"{key}/" if key else ""
    if not in_parts(url):
        each = ask_obstore(url, "list_with_delimiter", prefix)["objects"] if not deep else all_below(url, prefix)
        return _named({str(one["path"])[len(prefix) :]: int(one["size"]) for one in each})
    found: dict[str, int] = {}
    asked = {"Bucket": bucket, "Prefix": prefix, **({} if deep else {"Delimiter": "/"})}
    for page in pages(url, "list_objects_v2", asked, {"NextContinuationToken": "ContinuationToken"}):
        found |= {one["Key"][len(prefix) :]: int(one["Size"]) for one in page.get("Contents", ())}
    return _named(found)


def put_object(url: str, data: bytes, only_if: str = "") -> None:
    """Write an object whole.

    `only_if`: "absent", or which object must still be there, by `read_object_at`. Raises FileExistsError where that is not so, and
    OSError with ENOTSUP where the store knows no such conditions.
    """
    bucket, key = _place(url)
    if in_parts(url):
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_if == "absent" else {"IfMatch": only_if} if only_if else {}
        ask_s3(url, "put_object", Bucket=bucket, Key=key, Body=data, **condition)
        return
    mode: Any = "create" if only_if == "absent" else json.loads(only_if) if only_if else "overwrite"
    ask_obstore(url, "put", key, data, mode=mode)


def remove_object(url: str) -> None:
    """Remove an object, if it is there."""
    bucket, key = _place(url)
    if in_parts(url):
        ask_s3(url, "delete_object", Bucket=bucket, Key=key)
        return
    try:
        ask_obstore(url, "delete", key)
    except FileNotFoundError:
        return


def begin_upload(url: str) -> str:
    """Begin the upload of an object in parts, and return its id."""
    bucket, key = _place(url)
    return str(ask_s3(url, "create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])


def upload_part(url: str, upload: str, number: int, data: bytearray) -> str:
    """Upload a part, from 1, and return its ETag. Raises FileNotFoundError where the upload is complete, or was aborted."""
    bucket, key = _place(url)
    return str(ask_s3(url, "upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data)["ETag"])


def uploaded_parts(url: str, upload: str) -> dict[int, tuple[int, str]] | None:
    """The bytes and ETag of each part that an upload has, by its number; None where the upload is no more."""
    bucket, key = _place(url)
    found: dict[int, tuple[int, str]] = {}
    asked = {"Bucket": bucket, "Key": key, "UploadId": upload}
    try:
        for page in pages(url, "list_parts", asked, {"NextPartNumberMarker": "PartNumberMarker"}):
            found |= {int(one["PartNumber"]): (int(one["Size"]), str(one["ETag"])) for one in page.get("Parts", ())}
    except FileNotFoundError:
        return None
    return found


def complete_upload(url: str, upload: str, etags: Mapping[int, str]) -> None:
    """Make an object of the parts of an upload. Raises FileNotFoundError where the upload is no more."""
    bucket, key = _place(url)
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(etags.items())]
    ask_s3(url, "complete_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})


def abort_upload(url: str, upload: str) -> None:
    """Give up an upload, and the parts that it has."""
    bucket, key = _place(url)
    try:
        ask_s3(url, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
    except FileNotFoundError:
        return


def uploads_below(url: str) -> list[Upload]:
    """The uploads below a prefix that are neither complete nor aborted; none where the store names none."""
    if not in_parts(url):
        return []
    bucket, key = _place(url)
    asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    markers = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
    found = []
    for page in pages(url, "list_multipart_uploads", asked, markers):
        for one in page.get("Uploads", ()):
            found.append(Upload(f"s3://{bucket}/{one['Key']}", str(one["UploadId"]), one["Initiated"].timestamp()))
    return sorted(found, key=lambda each: (each.url, each.id))


class ObjectStream:
    """A stream that makes an object when it is closed, and none where it is not: bytes are sent as soon as there are `part_bytes`.

    Its methods raise OSError where the store fails.
    """

    def __init__(self, url: str, part_bytes: int) -> None:
        import obstore

        self.url = url
        self._writer = obstore.open_writer(whole_bucket(url), _place(url)[1], buffer_size=part_bytes, max_concurrency=1)

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        with naming_store(self.url):
            self._writer.write(data)

    def close(self) -> None:
        """Make the object."""
        with naming_store(self.url):
            self._writer.close()


def missing_package(url: str) -> Problem | None:
    """The package that a store needs and that is not installed."""
    name = "botocore" if in_parts(url) else "obstore"
    try:
        __import__(name)
    except ModuleNotFoundError:
        return Problem(url, f"no package {name}", "it installed", "Run pip install 'headrace[s3]'")
    return None


def _named(sizes: Mapping[str, int]) -> dict[str, int]:
    """Objects by name without the empty ones that a console makes to show a folder; obstore leaves out the "/" at their end."""
    folders = {name[: place.start()] for name in sizes for place in re.finditer("/", name)}
    return {name: nbytes for name, nbytes in sizes.items() if name and (nbytes or name.rstrip("/") not in folders)}


def _place(url: str) -> tuple[str, str]:
    """The bucket of a URL, or the account, and the key in it."""
    parts = urlsplit(url)
    return parts.netloc, parts.path.strip("/")


def check_url(subject: str, url: str) -> None:
    """Raise BadInput where a URL is no place for outputs or its package is missing; a URL that may hold a secret is not shown."""
    if fault := url_fault(url):
        raise BadInput([Problem(subject, f"{urlsplit(url).scheme}://...", fault)])
    if missing := missing_package(url):
        raise BadInput([missing])


def output_at(text: str | Path) -> Path:
    """The place of a finished output that a text names. Raises BadInput as `check_url` does."""
    path = as_path(text)
    if is_remote(path):
        check_url("output", str(path))
    return path
