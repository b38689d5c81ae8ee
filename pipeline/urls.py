"""Addresses that people give: whether one has a secret in it, which is then nowhere written or printed."""

from __future__ import annotations

from urllib.parse import urlsplit

NO_SECRET = "a URL without a user, password or query: credentials come from the environment"


def holds_secret(url: str) -> bool:
    """Whether a URL has a user, a password, a query or a fragment in it, which signed addresses have."""
    if "://" not in url:
        return False
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address: nobody knows what it holds
        return True
    return bool("@" in parts.netloc or parts.query or parts.fragment)


def shown(url: str) -> str:
    """A URL as it may be printed: of one with a secret in it the scheme alone."""
    return f"{url.partition('://')[0]}://..." if holds_secret(url) else url
