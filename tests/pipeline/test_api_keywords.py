"""The keywords that type checkers know are those that Job and EngineOptions have, and take values of the same types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel, ValidationError

import headrace
from pipeline.planning.builder_options import SWITCH, BuilderOption, known_options
from pipeline.planning.engine_options import EngineOptions, anchored
from pipeline.planning.job import Job
from pipeline.planning.keywords import BuildOptions, JobOptions, LoadOptions, ShapeOptions, Switch, TargetTable
from pipeline.planning.target_options import Shape, TargetOptions
from pipeline.run.loaders import OF_A_SOURCE

JOB, BUILD = get_type_hints(JobOptions), get_type_hints(BuildOptions)


def members(hint: Any) -> list[Any]:
    """A union's members, or the one type."""
    return [each for arg in get_args(hint) for each in members(arg)] if get_origin(hint) in (Union, UnionType) else [hint]


def takes(hint: Any, value: object) -> bool:
    """Whether a keyword of a type takes a value. True is no int here, but as a choice it equals 1, as it does for Job."""
    for kind in members(hint):
        if get_origin(kind) is Literal:
            fits = any(isinstance(value, type(choice)) and value == choice for choice in get_args(kind))
        elif get_origin(kind) is Sequence:
            fits = isinstance(value, tuple) and all(takes(get_args(kind)[0], each) for each in value)
        else:
            fits = type(value) is (type(Path()) if kind is Path else kind)
            fits = fits or (kind is float and type(value) is int)  # an int will do for a float
            fits = fits or ((is_typeddict(kind) or get_origin(kind) is dict) and isinstance(value, dict))
        if fits:
            return True
    return False


CHOICES = [
    choice
    for hint in [*JOB.values(), *BUILD.values()]
    for kind in members(hint)
    if get_origin(kind) is Literal
    for choice in get_args(kind)
]
TEXTS = ["1GiB", "127.0.0.1:8787", "no such"]
VALUES = [None, True, 1, 2, Path("x"), {}, ("no such",), ("read",), ({"output_dir": "x"},), *TEXTS, *dict.fromkeys(CHOICES)]


def accepted(model: type[BaseModel], values: Callable[[Any], Mapping[str, Any]]) -> list[Any]:
    """The values that a model takes, without turning one type into another beyond what its own fields do."""
    found = []
    for value in VALUES:
        try:
            model.model_validate(values(value), strict=True)
        except ValidationError:
            continue
        found.append(value)
    return found


def agree(hint: Any, taken: list[Any]) -> None:
    """Hold a keyword's type against the values that its field takes: each one of a list of choices, else their types."""
    hinted = [value for value in VALUES if takes(hint, value)]
    if True in hinted and bool not in members(hint):  # it equals a choice of 1: some versions of pydantic take it, some do not
        hinted, taken = ([value for value in values if value is not True] for values in (hinted, taken))
    assert {type(value) for value in hinted} == {type(value) for value in taken}
    if not {str, int, float} & set(members(hint)):  # of texts and numbers a field may refuse some
        assert hinted == taken


@pytest.mark.parametrize("name", Job.model_fields)
def test_a_keyword_of_convert_takes_what_its_field_takes(name: str) -> None:
    agree(JOB[name], accepted(Job, lambda value: {name: value}))


@pytest.mark.parametrize("name", EngineOptions.model_fields)
def test_a_keyword_of_build_takes_what_its_field_takes(name: str) -> None:
    agree(BUILD[name], accepted(EngineOptions, lambda value: anchored({name: value}, Path.cwd())))


def test_the_keywords_are_the_fields() -> None:
    assert JOB.keys() == Job.model_fields.keys()
    assert get_type_hints(ShapeOptions).keys() == Shape.model_fields.keys()
    assert get_type_hints(TargetTable).keys() == TargetOptions.model_fields.keys()
    loading = get_type_hints(LoadOptions)
    assert loading.keys() == (Shape.model_fields.keys() - {"tp_size", "pp_size", "dtype"}) | set(OF_A_SOURCE)
    assert all(hint == JOB[name] for hints in (get_type_hints(ShapeOptions), loading) for name, hint in hints.items())


def test_no_keyword_must_be_given() -> None:
    assert not any(each.__required_keys__ for each in (JobOptions, BuildOptions, LoadOptions, ShapeOptions, TargetTable))


def builders_type(option: BuilderOption) -> Any:
    """The type of one of trtllm-build's options."""
    if option.values == "none":
        return bool
    if option.choices:
        return Switch if set(option.choices) == SWITCH else Literal[option.choices]
    one: Any = {"int": int, "path": str | Path, "text": str}[option.type]
    return one | Sequence[one] if option.values == "many" else one


def test_the_builders_own_options_are_keywords_of_build() -> None:
    own = {
        name: option for name, option in known_options().items() if not option.refused and name not in EngineOptions.model_fields
    }
    assert BUILD.keys() == own.keys() | EngineOptions.model_fields.keys()
    assert {name: BUILD[name] for name in own} == {name: builders_type(option) for name, option in own.items()}
    assert len(own) > 50


def test_types_that_differ_are_seen() -> None:
    assert takes(JOB["tp_size"], 2)
    assert not takes(JOB["tp_size"], True)
    assert not takes(JOB["tp_size"], "2")
    assert takes(JOB["scratch_after"], ("read",))
    assert not takes(JOB["scratch_after"], ("no such",))
    assert takes(JOB["revision"], None)
    assert NoneType in members(JOB["revision"])
    with pytest.raises(AssertionError):
        agree(str | None, accepted(Job, lambda value: {"output_dir": value}))
    with pytest.raises(AssertionError):
        agree(Literal["auto"], accepted(Job, lambda value: {"dtype": value}))


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (headrace.plan, JobOptions),
        (headrace.convert, JobOptions),
        (headrace.build, BuildOptions),
        (headrace.load_from_hf_checkpoint, LoadOptions),
        (headrace.load_from_hf_llama, LoadOptions),
        (headrace.load_from_meta_llama, LoadOptions),
        (headrace.load_from_gptq_llama, LoadOptions),
    ],
)
def test_notebooks_see_the_keywords(function: Callable[..., Any], options: Any) -> None:
    """What completes in IPython asks the function for its signature, and has no type checker."""
    parameters = inspect.signature(function).parameters
    assert set(get_type_hints(options)) <= set(parameters)
    assert all(each.kind is not each.VAR_KEYWORD for each in parameters.values())
    assert parameters["output_dir" if options is not LoadOptions else "revision"].kind is inspect.Parameter.KEYWORD_ONLY
    if options is JobOptions:
        assert parameters["tp_size"].annotation == "int"
        assert "progress" in parameters or function is headrace.plan
