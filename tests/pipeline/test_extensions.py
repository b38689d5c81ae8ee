"""Entry points: what they name is taken in the order of their names, and whatever is wrong with one is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

from pipeline.errors import BadInput
from pipeline.extensions import extensions, members
from tests.support.extensions import installed

GROUP = "headrace.tests"
MODULE = """
class Animal:
    def __init__(self, name):
        self.name = name

    def speak(self):
        return self.name

class Silent:
    name = "silent"

cat, dog, again, own = Animal("cat"), Animal("dog"), Animal("cat"), Animal("own")
silent, nameless, odd, mute = Silent(), Animal(""), Animal(3), Animal("mute")
mute.speak = "no"
"""


class Animal(Protocol):
    """A name and a method."""

    name: str

    def speak(self) -> str: ...


def found(tmp_path: Path, points: Mapping[str, str]) -> list[str]:
    (tmp_path / "animals_of_a_test.py").write_text(MODULE)
    (tmp_path / "fails_to_import.py").write_text("raise RuntimeError('no such library')\n")
    with installed(tmp_path / "site", tmp_path, {GROUP: points}):
        return [animal.speak() for animal in extensions(GROUP, Animal, ["own"])]


def test_none() -> None:
    assert extensions(GROUP, Animal, []) == ()


def test_they_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    assert found(tmp_path, {"b": "animals_of_a_test:cat", "a": "animals_of_a_test:dog"}) == ["dog", "cat"]


def test_what_a_protocol_asks_for() -> None:
    assert members(Animal) == ["name", "speak"]


WRONG = {
    "animals_of_a_test:silent": "animals_of_a_test:silent without speak",
    "animals_of_a_test:mute": "animals_of_a_test:mute without speak",
    "animals_of_a_test:Animal": "animals_of_a_test:Animal, which is a class",
    "animals_of_a_test:nameless": "animals_of_a_test:nameless of the name ''",
    "animals_of_a_test:odd": "animals_of_a_test:odd of the name 3",
    "animals_of_a_test:own": "the name 'own' again",
    "fails_to_import:cat": "fails_to_import:cat, which cannot be loaded (RuntimeError: no such library)",
    "no_such_module_at_all:cat": "No module named 'no_such_module_at_all'",
    "animals_of_a_test:bird": "no attribute 'bird'",
}


@pytest.mark.parametrize("value", WRONG)
def test_what_is_wrong_with_one(value: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        found(tmp_path, {"animal": value})
    (problem,) = refused.value.problems
    assert problem.subject == f"entry point animal of {GROUP} of the package toy"
    assert WRONG[value] in problem.found
    assert problem.remedy == "Mend or uninstall that package"


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    points = {"a": "animals_of_a_test:cat", "b": "animals_of_a_test:again", "c": "animals_of_a_test:silent"}
    with pytest.raises(BadInput) as refused:
        found(tmp_path, points)
    again, silent = refused.value.problems
    assert (again.found, again.expected) == ("the name 'cat' again", "another than that of animals_of_a_test:cat")
    assert silent.expected == "an object with name, speak"
