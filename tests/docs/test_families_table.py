"""docs/families.md's tables are what `headrace families` says, and what it says a family was compared with, it was."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence

import pytest

from pipeline.model.tables import CONFIGS, Family, families, find_family
from pipeline.planning.family_table import PROOFS, list_families, list_texts
from tests.end_to_end import test_classifiers, test_family_forward, test_gguf_families, test_text_parts
from tests.support import gguf_families
from tests.support.places import DATA, DOCS, ROOT
from tests.support.remote_models import remote_models

TEXT = (DOCS / "families.md").read_text()
SOURCES = {"huggingface": "Hugging Face", "gguf": "GGUF", "meta": "Meta"}
# GGUF's architectures whose files tests/end_to_end/test_gguf_families.py makes of Hugging Face's.
GGUF = {gguf_families.ARCHITECTURES[case.model.__name__] for case in test_gguf_families.FAMILIES.values()} | {"internlm2"}
# Other families of the same models, and the tests that make one of the other.
RENAMED = {
    "gguf_llama": "tests/stages/read/test_gguf_conversion.py",
    "gguf_mixtral": "tests/stages/read/test_gguf_conversion.py",
    "meta_llama": "tests/stages/read/test_meta.py",
    "llama_first": "tests/pipeline/planning/bad_input/test_file_sets.py",
}


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def found(title: str) -> str:
    section = TEXT[TEXT.index(f"## {title}\n") :]
    match = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert match is not None
    return match[0].strip()


def test_the_table_is_that_of_the_families() -> None:
    rows = [
        (
            f"`{row['family']}`",
            SOURCES[row["source"]],
            ", ".join(f"`{name}`" for name in row["architectures"]),
            f"{row['class']}{'' if row['pipeline_stages'] else ', no stages'}",
            ", ".join(row["targets"]),
            "; ".join(row["proof"]),
        )
        for row in list_families()
    ]
    assert found("Families") == table(("family", "source", "architectures", "class", "targets", "compared with"), rows)


def test_the_table_is_that_of_the_wrappers() -> None:
    rows = [(f"`{name}`", f"`{text}`" if text else "what its configuration names") for name, text in list_texts().items()]
    assert found("Text of other models") == table(("architecture", "its text is read as"), rows)


def own_tables() -> Mapping[str, dict[str, object]]:
    return {path.stem: tomllib.loads(path.read_text()) for path in (CONFIGS / "families").glob("*.toml")}


def converted_by_nvidia() -> set[str]:
    """The families of the models whose conversion by NVIDIA's converter is in tests/data."""
    names = set()
    for folder in ("dense", "families"):
        for model in (DATA / folder / "models").iterdir():
            if not (model / "config.json").is_file():
                names.add("meta_llama")
                continue
            family = find_family("huggingface", json.loads((model / "config.json").read_text())["architectures"][0])
            assert family is not None
            names.add(family.name)
    return names


def run_by_transformers() -> set[str]:
    kinds = [case.model.__name__ for cases in (test_family_forward.CASES, test_classifiers.CASES) for case in cases.values()]
    return {family.name for kind in kinds if (family := find_family("huggingface", kind))} | {
        family for _, family, _ in test_text_parts.WRAPPERS.values()
    }


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_a_family_was_compared_with_what_it_says(family: Family) -> None:
    assert "proof" in own_tables()[family.name], "what a family extends proves nothing of it"
    assert set(family.proof) <= PROOFS.keys()
    remote = {model.config["architectures"][0] for model in remote_models().values()}
    known = {
        "converter": family.name in converted_by_nvidia(),
        "transformers": family.name in run_by_transformers(),
        "modelling code": set(family.architectures) <= remote,
        "the same model": (ROOT / RENAMED.get(family.name, "none")).is_file() or set(family.architectures) <= GGUF,
    }
    assert {word for word, true in known.items() if true} == set(family.proof)
