"""Packages of other people that add to headrace, installed for a test: their folder on the path, and their entry points."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from stages.quantization.sources import formats
from tests.support.places import ROOT

TOY = ROOT / "tests/stand_ins/extension"


def toy_entry_points() -> dict[str, dict[str, str]]:
    """The toy's entry points, as its pyproject.toml has them."""
    return dict(tomllib.loads((TOY / "pyproject.toml").read_text())["project"]["entry-points"])


@contextmanager
def installed(site: Path, modules: Path, groups: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
    """As if a package `toy` of the modules in a folder were installed in the empty folder `site`."""
    metadata = site / "toy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    lines = [line for group, named in groups.items() for line in (f"[{group}]", *(f"{key} = {at}" for key, at in named.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        patch.syspath_prepend(site)
        formats.cache_clear()
        try:
            yield
        finally:
            formats.cache_clear()
