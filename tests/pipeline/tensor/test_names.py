"""Names: taken apart and put together they are the same; no two texts become one name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.names import TensorName, by_module, split_name, split_names


@given(st.text(alphabet="ab.", max_size=8))
def test_a_text_taken_apart_is_the_same_text(text: str) -> None:
    assert str(split_name(text)) == text


@given(st.sets(st.text(alphabet="ab.", max_size=6)))
def test_no_tensor_is_lost(texts: set[str]) -> None:
    assert len(split_names(dict.fromkeys(texts, 0))) == len(texts)


@pytest.mark.parametrize(
    ("text", "name"),
    [("m.0.weight", ("m.0", "weight")), ("weight", ("", "weight")), (".weight", ("", ".weight"))],
)
def test_the_parameter_stands_behind_the_last_dot(text: str, name: tuple[str, str]) -> None:
    assert split_name(text) == name


def test_by_module() -> None:
    names = [TensorName("a", "weight"), TensorName("b", "weight"), TensorName("a", "bias")]
    assert by_module({name: str(name) for name in names}) == {
        "a": {"weight": "a.weight", "bias": "a.bias"},
        "b": {"weight": "b.weight"},
    }
