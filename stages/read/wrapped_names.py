"""Names that a wrapper has changed: prefixes and parts are taken off where the family's names are beneath, and that is noted.

A parameter that stands for a module (transformers 5's stacks of experts) gets a parameter's name, and so do its scales.

What trainers leave in the place of a model's tensors (adapters that are not merged, the empty weights of ZeRO-3) is one problem.
The parts are data, in `configs/formats/wrappers.toml`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, takewhile
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.config_values import lookup
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS, Family, find_family
from pipeline.printed import many
from pipeline.tensor.tensors import LazyTensor, Source

_SHOWN = 3  # names in a message
_LOOKED_AT = 64  # names that tell whether a source has those of its family


def unwrapped(source: Source) -> Source:
    """Return a source under its family's own names, with a note of what was taken off.

    Where most names are known they stay, and where no way leads to names of the family, all stay as they are. Raises BadInput for
    modules of an adapter and for weights without values.
    """
    table = _wrappers()
    if problems := [*_unmerged(source, table["adapters"]), *_emptied(source)]:
        raise BadInput(problems)
    family = find_family(source.container, source.architecture)
    if family is None or not source.tensors:
        return source
    known = known_names(family)
    tensors: Mapping[str, LazyTensor] = source.tensors
    notes = []
    found = {part: wrapper for part, wrapper in table["segments"].items() if any(f"{part}." in name for name in tensors)}
    if found and (shorter := _renamed(tensors, lambda name: ".".join(part for part in name.split(".") if part not in found))):
        tensors = shorter
        notes += [f"names: {part!r} of {wrapper} is taken out of them" for part, wrapper in found.items()]
    sample = list(tensors)[:_LOOKED_AT]
    if 2 * sum(map(known, sample)) <= len(sample):
        for way, prefix, done in _ways(tensors, table, family, known):
            renamed = _renamed(tensors, way)
            if renamed and 2 * sum(map(known, renamed)) > len(renamed):
                count = sum(way(name) != name for name in tensors)
                notes.append(f"names: the prefix {prefix!r} {done.format(count)}")
                tensors = renamed
                break
        else:
            return source
    tensors = _stacks(tensors, family)
    told = _told(tensors, family, source.config)
    notes += [
        f"{key} {size}: {source.config_name.rpartition('/')[2]} does not say it, its tensors do" for key, size in told.items()
    ]
    return replace(source, tensors=tensors, config={**source.config, **told}, notes=(*source.notes, *notes))


def _told(tensors: Mapping[str, LazyTensor], family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that a configuration does not have and that the family takes from the rows of a tensor, by their first keys."""
    return {
        family.fields[field][0]: tensors[name].shape[0]
        for field, name in family.told.items()
        if name in tensors and tensors[name].shape and all(lookup(config, key) is None for key in family.fields[field])
    }


def _stacks(tensors: Mapping[str, LazyTensor], family: Family) -> Mapping[str, LazyTensor]:
    """Tensors under names that have a parameter: where a module's own name is that of a tensor, it is its weight.

    And what the name goes on with is another parameter of it (`experts.gate_up_proj_scale_inv`).
    """
    rows, ends = family.rows(), _wrappers()["stacks"]
    stacks = [name for name, tensor in tensors.items() if len(tensor.shape) > 2 and rows.find(name)]
    if not stacks:
        return tensors
    named = {f"{name}{end}": f"{name}.{parameter}" for name in stacks for end, parameter in ends.items()}
    return _renamed(tensors, lambda name: named.get(name, name)) or tensors


@cache
def _wrappers() -> dict[str, Any]:
    return load_table(CONFIGS / "formats", "wrappers")


def no_name_fits(source: Source, family: Family) -> Problem:
    """Return the one problem of a source none of whose tensors has a name of its family."""
    names = list(source.tensors)
    common = next(iter(_prefixes(source.tensors)), ("", ""))[0]
    alike = f", all with the prefix {common!r}" if common else ""
    found = f"{many(len(names), 'tensor')}{alike}, none with a name of the family {family.name}: {some(names)}"
    expected = f"names such as {some([f'{module}.weight' for module in family.rename])}"
    remedy = "Export the model's own state_dict, with the names that transformers gives it, or mend `architectures`"
    return Problem(str(source.location), found, expected, remedy)


def some(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def known_names(family: Family) -> Callable[[str], bool]:
    """Return whether a tensor's name is one of a family's, whatever its parameter is."""
    rows, ignored = family.rows(), family.ignored()

    def known(name: str) -> bool:
        # A parameter may have dots of its own (`q_proj.weight.absmax`).
        return any(rows.find(each) or ignored.find(each) for each in accumulate(name.split("."), "{}.{}".format))

    return known


def _ways(
    names: Collection[str], table: Mapping[str, Any], family: Family, known: Callable[[str], bool]
) -> Iterator[tuple[Callable[[str], str], str, str]]:
    """Yield the ways that may lead to a family's names, each with the prefix that it is about and what is done with it."""
    for prefix, becomes in (*_prefixes(names), *table["replaced"].items()):
        done = f"of {{}} tensors is {f'read as {becomes!r}' if becomes else 'taken off'}"
        yield partial(_without, prefix=prefix, becomes=becomes), prefix, done
    # A model without its head is a module of its own in transformers, and is saved without the name that it has inside the other.
    first = f"{Counter(row.partition('.')[0] for row in family.rename).most_common(1)[0][0]}."
    yield partial(_with, prefix=first, known=known), first, "is put before the names of {} tensors, saved without it"


def _prefixes(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what all names begin with, up to each of its dots, the longest first, each with "" in its place."""
    first, last = min(names).split("."), max(names).split(".")  # what these have in common, all names between them have
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))]
    for prefix in reversed(list(accumulate(common, "{}.{}".format))):
        yield f"{prefix}.", ""


def _renamed(tensors: Mapping[str, LazyTensor], rename: Callable[[str], str]) -> dict[str, LazyTensor] | None:
    """Return tensors under other names; None where two would have the same."""
    result = {rename(name): tensor for name, tensor in tensors.items()}
    return result if len(result) == len(tensors) else None


def _without(name: str, prefix: str, becomes: str) -> str:
    return becomes + name[len(prefix) :] if name.startswith(prefix) else name


def _with(name: str, prefix: str, known: Callable[[str], bool]) -> str:
    return f"{prefix}{name}" if not known(name) and known(f"{prefix}{name}") else name


def _unmerged(source: Source, row: Mapping[str, Any]) -> list[Problem]:
    parts = [f".{part}." for part in row["segments"]]
    names = [name for name in source.tensors if any(part in f".{name}." for part in parts)]
    if not names:
        return []
    expected = "weights that the adapter is merged into"
    return [
        Problem(str(source.location), f"{many(len(names), 'tensor')} of {row['title']}: {some(names)}", expected, row["remedy"])
    ]


def _emptied(source: Source) -> list[Problem]:
    names = [name for name, tensor in source.tensors.items() if tensor.shape == (0,) and name.endswith(("weight", "bias"))]
    if 2 * len(names) < len(source.tensors) or not names:  # fewer are mistakes of their own, and named so
        return []
    found = f"{len(names)} of {len(source.tensors)} tensors without values (shape [0]), as ZeRO-3 leaves them: {some(names)}"
    remedy = "Save it with stage3_gather_16bit_weights_on_model_save, or gather the training's shards with zero_to_fp32.py"
    return [Problem(str(source.location), found, "the values of every tensor", remedy)]
