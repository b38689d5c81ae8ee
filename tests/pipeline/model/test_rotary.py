"""Rope scaling in either style of config.json, by either key; what readers would take for two things is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.pipeline.model.test_model_config import FILE, PHI_3, read, refused, without
from tests.support.checkpoints import LLAMA, LLAMA3


def test_the_style_of_transformers_5_means_the_same() -> None:
    old = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    new = {**without(LLAMA, "rope_theta", "torch_dtype"), "dtype": "float16", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    assert read(old) == read(new)
    assert read(new).rotary_base == 500000.0
    assert read(new).rotary_scaling == LLAMA3


LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
AXES = {"mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
    ("said", "kind", "scaling", "base"),
    [
        ({"rope_parameters": {**LINEAR, "rope_theta": 5e5}}, "linear", LINEAR, 5e5),  # the older name in the newer style
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, "linear", LINEAR, 5e5),
        ({"rope_scaling": {}, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "llama3", LLAMA3, 5e5),
        ({"rope_scaling": {**LINEAR, "rope_type": None, "low_freq_factor": None}}, "linear", LINEAR, 10000.0),
        ({"rope_scaling": {**YARN, "beta_fast": None, "mscale": None}}, "yarn", YARN, 10000.0),  # transformers has values for null
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "linear", LINEAR, 10000.0),
        ({"rope_scaling": {**LINEAR, "rope_type": "linear"}}, "linear", {**LINEAR, "rope_type": "linear"}, 10000.0),
        ({"rope_scaling": {"rope_theta": 5e5}}, "default", None, 5e5),
        ({"rope_scaling": {"full_attention": {**LINEAR, "rope_theta": 5e5}}}, "linear", LINEAR, 5e5),
        (
            {
                "rope_scaling": {"type": "mrope", "rope_type": "default", **AXES},
                "rope_parameters": {"rope_type": "default", **AXES},
            },
            "default",
            {"type": "mrope", "rope_type": "default", **AXES},
            10000.0,
        ),
    ],
    ids=str,
)
def test_scaling_is_read_by_either_key_and_in_either_style(said: Any, kind: str, scaling: Any, base: float) -> None:
    model = read({**without(LLAMA, "rope_theta"), **said})
    assert (model.rotary_type, model.rotary_scaling, model.rotary_base) == (kind, scaling, base)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_scaling: found rope_type 'llama3', type 'linear'"),
        ({"rope_parameters": {**LLAMA3, "type": "linear"}}, "rope_parameters: found rope_type 'llama3', type 'linear'"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2.0}},
            "rope_scaling: found {'type': 'linear', 'factor': 4.0}",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling: found {'type': 'linear', 'factor': 4.0}",
        ),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": LINEAR}, "rope_scaling: found {'type': 'default'}"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta: found 10000.0; expected 500000.0, as rope_parameters.",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}},
            "rope_theta: found 10000.0; expected 500000.0, as rope_scaling.",
        ),
        (
            {"rope_parameters": {"full_attention": [8]}},
            "rope_parameters: found {'full_attention': [8]}; expected null or an object",
        ),
    ],
    ids=str,
)
def test_rope_that_readers_would_take_for_two_things_is_refused(said: Any, found: str) -> None:
    (problem,) = refused({**without(LLAMA, "rope_theta"), **said})
    assert problem.startswith(f"{FILE}: {found}")


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "key", "value"),
    [
        *((LINEAR, "factor", value) for value in ("2", 0, -1.0, math.nan, math.inf, True, [2.0])),
        (LLAMA3, "low_freq_factor", "1.0"),
        (YARN, "original_max_position_embeddings", "32"),
        (YARN, "beta_fast", "32"),
        (YARN, "mscale", -1.0),
        (YARN, "mscale_all_dim", False),
    ],
)
def test_what_a_scaling_is_computed_with_are_numbers(scaling: Any, key: str, value: Any, style: str) -> None:
    (problem,) = refused({**LLAMA, style: {**scaling, key: value}})
    assert problem.startswith(f"{FILE}: {style}.{key}: found {value!r}; expected a number ")


def test_a_scale_of_0_is_one() -> None:
    scaling = {**YARN, "mscale": 1.0, "mscale_all_dim": 0}
    assert read({**LLAMA, "rope_scaling": scaling}).rotary_scaling == scaling


def test_the_share_that_is_turned_is_one_in_both_styles() -> None:
    assert read({**PHI_3, "rope_scaling": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.5}).rotary_pct == 0.5
    (problem,) = refused({**PHI_3, "rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.75})
    assert problem.startswith(f"{FILE}: partial_rotary_factor: found 0.75; expected 0.5, as rope_parameters.partial_rotary_factor")


def test_default_rope_parameters_are_no_scaling() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1234.0}
    model = read({**without(LLAMA, "rope_theta"), "rope_parameters": parameters})
    assert (model.rotary_base, model.rotary_scaling) == (1234.0, None)
