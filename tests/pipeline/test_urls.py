"""Which addresses hold a secret, and what is shown of those."""

from __future__ import annotations

import pytest

from pipeline.urls import holds_secret, shown


@pytest.mark.parametrize(
    "url", ["s3://bucket/m", "hf://org/name@main", "https://host:8080/a/b", "/a/directory@host?no=url", "az://box/m", "file:///a"]
)
def test_plain_addresses_are_shown(url: str) -> None:
    assert (holds_secret(url), shown(url)) == (False, url)


@pytest.mark.parametrize("rest", ["key:secret@host/m", ":secret@host/m", "key@host", "host/m?X=secret", "host/m#a", "[secret/m"])
def test_of_others_the_scheme_alone(rest: str) -> None:
    assert (holds_secret(f"https://{rest}"), shown(f"https://{rest}")) == (True, "https://...")
