"""Read the values of a JSON object, each of the kind that the loader takes; every other value becomes a Problem."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from pipeline.errors import Problem

LARGEST = 1 << 31  # no size of a real model is larger
LARGEST_NUMBER = 1e38  # of float32, in which the classes compute


def shown(value: Any) -> str:
    """A value as text of at most 80 characters."""
    try:
        text = "null" if value is None else repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, lists thousands deep
        text = f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= 80 else text[:77] + "..."


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


class ConfigReader:
    """Reads the keys of one object of config.json, and collects what is wrong with them.

    `place`: the text before a key in a problem, such as "mapping.". `problems`: the problems so far. `usable`: False once a value
    that shapes depend on was wrong.
    """

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        self.values, self.place = values, place
        self.problems: list[Problem] = []
        self.usable = True

    def has(self, key: str) -> bool:
        """Whether a key has a value that is not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, expected: str, remedy: str = "", *, found: str = "", fatal: bool = False) -> None:
        """Record a problem with a key. `found`: its value by default. `fatal`: shapes depend on it."""
        if not found:
            found = shown(self.values[key]) if key in self.values else "no such key"
        self.problems.append(Problem(f"config.json: {self.place}{key}", found, expected, remedy))
        self.usable = self.usable and not fatal

    def size(self, key: str, *, least: int = 1, most: int = LARGEST, default: int | None = None) -> int:
        """A whole number from `least` to `most`; `default` where the key is missing or null; at least 1 where it is wrong."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.wrong(key, f"a whole number from {least} to {most}", fatal=True)
        return max(least, 1)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; `default` where the key is missing or null, false where it is wrong."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, "true or false", fatal=True)
        return value is True

    def text(self, key: str, allowed: Collection[str] = (), default: str | None = None) -> str:
        """One of `allowed`, or any text where that is empty; `default` where the key is missing or null, "" where it is wrong."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and value and (not allowed or value in allowed):
            return value
        self.wrong(key, " or ".join(allowed) if allowed else "a name", fatal=True)
        return ""

    def positive(self, key: str) -> None:
        """Check a number above 0 that no shape depends on."""
        value = self.values.get(key)
        if not is_number(value) or value <= 0:
            self.wrong(key, "a number greater than 0")

    def optional_number(self, key: str, *, zero: bool, null: bool) -> None:
        """Check a number above 0 that may be missing, and that no shape depends on. `zero`, `null`: what else it may be."""
        value = self.values.get(key)
        if key not in self.values or (null and value is None) or (is_number(value) and (value > 0 or (zero and value == 0))):
            return
        self.wrong(key, f"a number {'of 0 or more' if zero else 'greater than 0'}{', or null' if null else ''}")

    def optional_size(self, key: str) -> None:
        """Check a whole number from 1 that may be missing or null, and that no shape depends on."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST):
            self.wrong(key, f"a whole number from 1 to {LARGEST}, or null")

    def table(self, key: str) -> Mapping[str, Any] | None:
        """An object; None where there is none, which is recorded."""
        value = self.values.get(key)
        if isinstance(value, Mapping):
            return value
        self.wrong(key, "an object", fatal=True)
        return None

    def check_keys(self, known: Collection[str]) -> None:
        """Record keys that the loader does not know: it passes all of them to a constructor, which would raise."""
        for key in self.values:
            if key not in known:
                self.wrong(key, "no such key: TensorRT-LLM's loader raises on it", "Remove it")
