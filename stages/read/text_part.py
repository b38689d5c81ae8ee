"""The text model inside a model of several kinds of input: a source with its tensors and its configuration alone.

One rule for all wrappers, which are data (`configs/formats/wrappers.toml`, table `texts`). The text model's configuration lies in
an entry, or at the top. What stands before its tensors' names is taken off. A tensor beside the text model's modules, whose name
begins with none of theirs, belongs to another input and is left out; one inside them that has no place there stays, so that it is
refused by its name.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from pipeline.errors import Problem
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS, Family, families, find_family
from pipeline.printed import many
from pipeline.tensor.tensors import LazyTensor, Source, tensor_bytes
from stages.read.huggingface import declared_dtype
from stages.read.quantizer import KEY, settings_in
from stages.read.wrapped_names import known_names

TIED = "tie_word_embeddings"
_SHOWN = 8  # parts, or keys, in a note


def text_part(source: Source) -> Source:
    """Return the text model of a source that wraps one, with a note of what is left out; any other source as it is."""
    if source.container != "huggingface" or source.architecture not in _texts()["wrappers"]:
        return source
    key, inner = _configuration(source.config)
    found = _text_family(source, inner)
    if found is None:
        return source
    architecture, family = found
    tensors, left_out = _divided(source.tensors, family)
    default = _texts()["defaults"].get(family.name, {}) if key else {}
    missing = [name for name in default if name not in inner]
    shared = {name: source.config[name] for name in _texts()["shared"] if source.config.get(name) is not None}
    # A null says nothing: it does not hide what the wrapper says for all of its parts.
    own = {name: value for name, value in inner.items() if value is not None or name not in shared}
    config = {**default, **shared, **own, "architectures": [architecture], "model_type": family.name}
    if settings := settings_in(inner) or settings_in(shared):
        config[KEY] = settings
    if own.get(TIED, shared.get(TIED)) != shared.get(TIED):
        config[TIED] = not _has_head(tensors, family)  # two keys that contradict one another: the tensors decide
    said = f"text of {source.architecture}: {key or 'its configuration'} is read as {architecture}'s"
    notes = [f"{said}; left out are {', '.join(_parts(left_out))}" if left_out else f"{said}; nothing is left out"]
    if missing:
        told = ", ".join(f"{name} {default[name]}" for name in missing)
        notes.append(f"{key} of {source.config_name.rpartition('/')[2]} lacks what transformers' default is: {told}")
    return replace(
        source,
        architecture=architecture,
        config=config,
        tensors=tensors,
        dtype=_dtype(inner, source),
        notes=(*source.notes, *notes),
        prefixes=tuple(_texts()["prefixes"]),
    )


def wrappers() -> Mapping[str, str]:
    """Return the wrappers whose text is converted, with its architecture; "" for the one that their configuration says."""
    table: Mapping[str, str] = _texts()["wrappers"]
    return table


def bare_names(names: Iterable[str]) -> list[str]:
    """The names of the text model inside a wrapper without what stands before them: of tensors that have one of its prefixes."""
    rest = [name[len(prefix) :] for name in names if (prefix := _prefix(name))]
    return [name if name.startswith(("model.", "lm_head.", "output.")) else f"model.{name}" for name in rest]


def family_of_type(config: Mapping[str, Any]) -> Family | None:
    """The family that transformers' name of a type of model is: ours have the same names, less the part that says text."""
    kind = str(config.get("model_type", "")).removesuffix("_text")
    return next((family for family in families() if family.name == kind and family.container == "huggingface"), None)


@cache
def _texts() -> dict[str, Any]:
    table: dict[str, Any] = load_table(CONFIGS / "formats", "wrappers")["texts"]
    return table


def _configuration(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The text model's configuration, and its key in the wrapper's; "" where it lies at the top."""
    for key in _texts()["configs"]:
        if isinstance(config.get(key), Mapping):
            return key, config[key]
    return "", config


def _text_family(source: Source, inner: Mapping[str, Any]) -> tuple[str, Family] | None:
    """The text model's architecture and family; None where no family is for it."""
    told = _texts()["wrappers"][source.architecture]
    listed = inner.get("architectures") if inner is not source.config else None
    own = listed[0] if isinstance(listed, list) and listed else None
    for architecture in (told, own):
        if isinstance(architecture, str) and (family := find_family("huggingface", architecture)):
            return architecture, family
    typed = family_of_type(inner) if inner is not source.config else None
    return (typed.architectures[0], typed) if typed else None


def _divided(tensors: Mapping[str, LazyTensor], family: Family) -> tuple[dict[str, LazyTensor], Mapping[str, list[LazyTensor]]]:
    """The text model's tensors by its family's names, with those that belong nowhere, and those of each part that is left out."""
    known, own = known_names(family), {_first(row) for row in (*family.rename, *family.ignore)}
    text: dict[str, LazyTensor] = {}
    left_out: dict[str, list[LazyTensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        inside, adapter = _inside(name, known), _adapter(name)
        if adapter or (inside is None and _first(name) not in own and not _prefix(name)):
            left_out[adapter or _first(name)].append(tensor)
        else:
            text[inside or name] = tensor
    return text, left_out


def _adapter(name: str) -> str:
    """The kind of low-rank matrix of another input that a tensor is; "" for none."""
    table = _texts()
    pairs = itertools.pairwise(name.split("."))
    return next((f"{a}.{b}" for a, b in pairs if a in table["adapters"] and b in table["adapter_inputs"]), "")


def _first(name: str) -> str:
    """The first segment of a name, behind `model.` where it has that."""
    return name.removeprefix("model.").partition(".")[0]


def _prefix(name: str) -> str:
    """The prefix of a name of a text model's tensor; "" for none."""
    return next((prefix for prefix in _texts()["prefixes"] if name.startswith(prefix)), "")


def _inside(name: str, known: Callable[[str], bool]) -> str | None:
    """A text tensor's name in its own model; None where nothing leads to one."""
    bare = ".".join(segment for segment in name.split(".") if segment != _texts()["adapted"])
    if known(bare):
        return bare
    rest = bare[len(prefix) :] if (prefix := _prefix(bare)) else ""
    return next((each for each in (rest, f"model.{rest}") if rest and known(each)), None)


def _dtype(inner: Mapping[str, Any], source: Source) -> str | None:
    """The text model's own type, as NVIDIA's converter takes it, or the wrapper's."""
    problems: list[Problem] = []
    found = declared_dtype(inner, source.config_name, problems)
    return found if found and not problems else source.dtype


def _has_head(tensors: Mapping[str, LazyTensor], family: Family) -> bool:
    heads = {row[0] for tied in family.ties if (row := family.sources().find(tied))}
    return any(name.rpartition(".")[0] in heads for name in tensors)


def _parts(left_out: Mapping[str, list[LazyTensor]]) -> list[str]:
    told = [
        f"{part} ({many(len(tensors), 'tensor')}, {sum(map(tensor_bytes, tensors)):,} bytes)"
        for part, tensors in sorted(left_out.items())
    ]
    return [*told[:_SHOWN], *([f"and {len(told) - _SHOWN} more parts"] if len(told) > _SHOWN else [])]
