"""docs/architecture.md: the functions on a tensor's way are where it says, and it counts what is to be read for them rightly."""

from __future__ import annotations

import ast
import re

from tests.support.places import DOCS, ROOT

TEXT = (DOCS / "architecture.md").read_text()
LINK = re.compile(r"\[((?:`[\w.]+`(?:, )?)+)\]\(\.\./([\w/]+\.py)\)")
WAY = TEXT[TEXT.index("## One tensor's way") : TEXT.index("## The rules")]


def defined(path: str) -> set[str]:
    """Every function, class, method and name that a module defines."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_each_step_names_a_function_that_is_there() -> None:
    steps = [(name, path) for names, path in LINK.findall(WAY) for name in re.findall(r"`([\w.]+)`", names)]
    assert len(steps) > 20
    assert [step for step in steps if step[0].split(".")[-1] not in defined(step[1])] == []


def test_what_is_to_be_read_is_counted_rightly() -> None:
    first, second = WAY.split("The same layer from a GPTQ checkpoint")
    dense = {path for _, path in LINK.findall(first)}
    packed = dense | {path for _, path in LINK.findall(second)}
    found = re.search(r"the first, (\d+) modules are opened, ([\d,]+) lines in all; the second, (\d+) and ([\d,]+)", WAY)
    assert found
    said = [int(figure.replace(",", "")) for figure in found.groups()]
    lines = [sum(len((ROOT / path).read_text().splitlines()) for path in paths) for paths in (dense, packed)]
    assert (said[0], said[2]) == (len(dense), len(packed))
    assert all(abs(a - b) < 0.1 * b for a, b in zip((said[1], said[3]), lines, strict=True)), lines
