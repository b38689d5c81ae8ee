"""Sizes in which a family was published, by which is told what no configuration of a container says (unsaid.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedSize:
    """A size of a model in which a family was published: what its configurations do not say goes with it.

    `when`: the keys and values of a configuration that tell it. `values`: the keys that it lacks, with their values.
    """

    name: str
    when: Mapping[str, Any]
    values: Mapping[str, Any]
