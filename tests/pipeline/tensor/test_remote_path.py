"""Places in object storage: URLs that name none are told from those that do, without what they may hold."""

from __future__ import annotations

import pytest

from pipeline.tensor.remote_path import url_fault


@pytest.mark.parametrize("url", ["s3://bucket/ranks", "gs://bucket/a/b", "az://box/m/"])
def test_places(url: str) -> None:
    assert url_fault(url) == ""


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("https://host/ranks", "a directory, or a URL of s3://, gs://, az://"),
        ("s3://me:secret@bucket/ranks", "a URL without a user, password or query"),
        ("s3://bucket/ranks?secret", "a URL without a user, password or query"),
        ("s3://bucket", "a bucket and a prefix in it, as s3://bucket/ranks"),
        ("s3:///ranks", "a bucket and a prefix in it, as s3://bucket/ranks"),
        ("s3://[secret/ranks", "a URL that names a bucket and a prefix in it"),
        ("s3://secret]/ranks", "a URL that names a bucket and a prefix in it"),
    ],
)
def test_what_is_none(url: str, fault: str) -> None:
    assert url_fault(url).startswith(fault)
    assert "secret" not in url_fault(url)
