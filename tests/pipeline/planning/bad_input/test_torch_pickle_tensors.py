"""Tensors of PyTorch files that their storages contradict, and values that are no state dict: the report names file and tensor."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.planning.bad_input.torch_pickles import (
    FILE,
    Call,
    Storage,
    archive,
    legacy,
    model_directory,
    problem,
    problems,
    state_dict,
    tensor,
)
from tests.support.commands import one, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path)


NO_TENSOR = "found a shape, strides or an offset that no tensor has"
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a shape larger than its storage": (
        {"shape": (3, 5), "strides": (5, 1)},
        "found shape [3, 5] up to byte 60 of its storage; expected at most 48",
    ),
    "strides longer than its storage": ({"strides": (5, 1)}, "found shape [3, 4] up to byte 56 of its storage"),
    "an offset behind its storage": ({"offset": 1}, "found shape [3, 4] up to byte 52 of its storage"),
    "a negative offset": ({"offset": -1}, NO_TENSOR),
    "a negative stride": ({"strides": (-4, 1), "offset": 8}, NO_TENSOR),
    "a negative length": ({"shape": (-3, -4)}, NO_TENSOR),
    "a length that is no number": ({"shape": ("3", 4)}, NO_TENSOR),
    "a length of true": ({"shape": (True, 4)}, NO_TENSOR),
    "a length that is a fraction": ({"shape": (3.0, 4)}, NO_TENSOR),
    "a shape that is a list": ({"shape": [3, 4]}, NO_TENSOR),
    "a shape that is a number": ({"shape": 12}, NO_TENSOR),
    "fewer strides than lengths": ({"strides": (1,)}, NO_TENSOR),
    "too many axes": ({"shape": (1,) * 9, "strides": (1,) * 9}, NO_TENSOR),
    "a length beyond numbers": ({"shape": (2**62 + 1,), "strides": (1,)}, NO_TENSOR),
    "a stride beyond numbers": ({"shape": (2,), "strides": (2**100,)}, NO_TENSOR),
    "an offset beyond numbers": ({"offset": 2**100}, NO_TENSOR),
    "a stride of 2 ** 62": ({"shape": (2, 2), "strides": (2**62, 1)}, "up to byte 18,446,744,073,709,551,624 of its storage"),
    "an offset of 2 ** 62": ({"offset": 2**62}, "of its storage; expected at most 48"),
    "expanded beyond any disk": (
        {"shape": (2**62, 2), "strides": (0, 1)},
        f"found shape [{2**62}, 2]; expected one that its storage of 48 bytes can hold",
    ),
    "expanded eight times": ({"shape": (2**62,) * 8, "strides": (0,) * 8}, "expected one that its storage of 48 bytes can hold"),
    "empty, but long": ({"shape": (2**62, 0), "strides": (0, 1)}, "expected one that its storage of 48 bytes can hold"),
    "another storage": ({"key": "1"}, "found no storage 1 in the file"),
    "a storage elsewhere": ({"key": "../data.pkl"}, "found no storage ../data.pkl in the file"),
    "values to be negated": ({"more": ({"neg": True},)}, "found values that torch conjugates or negates"),
}
KINDS = {
    "QInt8": 48,
    "QUInt8": 48,
    "QInt32": 12,
    "QUInt4x2": 48,
    "QUInt2x4": 48,
    "ComplexFloat": 6,
    "ComplexDouble": 3,
    "Untyped": 48,
}


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_their_storages_contradict(case: str, make: Callable[..., bytes], model: Path) -> None:
    arguments, expected = TENSORS[case]
    view = (None,) if make is legacy else ()
    report = problem(model, make({"layer.weight": tensor(**arguments, view=view), "sound": tensor(view=view)}))
    assert report.startswith("layer.weight: found ")
    assert expected in report


@pytest.mark.parametrize("kind", KINDS)
def test_storages_of_what_is_no_weights(kind: str, model: Path) -> None:
    report = problem(model, archive({"layer.weight": tensor(kind=getattr(torch, f"{kind}Storage"), count=KINDS[kind])}))
    assert report.startswith(f"layer.weight: found values of type {kind}Storage, which are no weights")


@pytest.mark.parametrize("count", [0, 1, 11, 13, 2**40, 2**62])
def test_storages_of_another_size_than_they_say(count: int, model: Path) -> None:
    made = {"a": tensor((1,), (1,), count=count), "b": tensor((0,), (1,), count=count)}
    (model / FILE).write_bytes(archive(made))
    report = problems(model / FILE)
    assert [line.startswith(f"{model / FILE}: {name}: ") for line, name in zip(report, "ab", strict=True)] == [True, True]
    assert f"found a storage of 48 bytes; expected one of {4 * count:,}" in report[0]


@pytest.mark.parametrize("count", [-1, 2**63, 2**100, "12", None, 12.0, True])
def test_storages_of_no_size(count: Any, model: Path) -> None:
    report = problem(model, archive({"a": tensor(count=count)}))
    assert "a storage of no known class or size" in report


@pytest.mark.parametrize("view", [("1", 0, 13), ("1", 13, 0), ("1", -1, 2), ("1", 0), "view", ("1", "0", 1)])
def test_views_outside_their_storage(view: Any, model: Path) -> None:
    assert problem(model, legacy({"a": tensor(view=(view,))})).startswith("found what is no checkpoint of torch.save")


@pytest.mark.parametrize(
    "identity", [(), ("storage",), ("storage", 1, "0", "cpu", 12), ("stock", torch.FloatStorage, "0", "cpu", 12), 5, "0"]
)
def test_persistent_ids_that_are_none(identity: Any, model: Path) -> None:
    storage = Storage()
    storage.identity = identity
    assert problem(model, archive({"a": storage})).startswith("found what is no checkpoint of torch.save")


def test_every_bad_tensor_of_every_file_is_named_in_one_report(model: Path) -> None:
    for n in (1, 2):
        made = {f"{n}.a": tensor(offset=1), f"{n}.b": tensor(key="5"), f"{n}.c": 3, f"{n}.d": tensor()}
        (model / f"pytorch_model-0000{n}-of-00002.bin").write_bytes(archive(made))
    report = refused(model)
    files = [model / f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert [line.partition(": found")[0] for line in report] == [
        f"{file}: {n}.{x}" for n, file in enumerate(files, 1) for x in "abc"
    ]


VALUES: dict[str, tuple[Any, str]] = {
    "a tensor": (tensor(), "found a tensor; expected a dictionary of tensors"),
    "a list": ([tensor()], "found a value of type list; expected a dictionary of tensors"),
    "a tuple": ((tensor(), tensor()), "found a value of type tuple; expected"),
    "nothing": (None, "found a value of type NoneType; expected"),
    "a storage": (Storage(torch.FloatStorage, "0", "cpu", 12), "found a storage without a tensor; expected"),
    "a number": ({"a": tensor(), "step": 5}, "step: found a value of type int; expected a tensor"),
    "text": ({"a": tensor(), "version": "1" * 9000}, "version: found a value of type str; expected a tensor"),
    "a nested list": ({"a": tensor(), "b": [["c"]]}, "b: found a value of type list"),
    "a dictionary": ({"a": tensor(), "b": {"c": tensor()}}, "b: found a dictionary; expected a tensor"),
    "a storage without a tensor": ({"a": Storage(torch.FloatStorage, "0", "cpu", 12)}, "a: found a storage without a tensor"),
    "a shape": ({"a": torch.Size([2])}, "a: found a value of type tuple"),
    "a number for a key": ({"a": tensor(), 5: tensor()}, "a key of type int: found a name that is no printable text"),
    "nothing for a key": ({None: tensor()}, "a key of type NoneType: found a name"),
    "a tuple for a key": ({(1, 2): tensor()}, "a key of type tuple: found a name"),
    "a key that is no text": ({"\ud800": tensor()}, "'\\ud800': found a name that is no printable text"),
    "a key that moves the cursor": ({"a\x1b[2J\n": tensor()}, "'a\\x1b[2J\\n': found a name that is no printable text"),
    "two state dicts": (
        {"model": {"a": tensor()}, "module": {"a": tensor()}},
        "found tensors under model and module; expected one",
    ),
    "one that is deeper": ({"model": {"module": {"a": tensor()}}}, "model: found a dictionary; expected a tensor"),
    "an object of another name": ({"weights": {"a": tensor()}}, "weights: found a dictionary; expected a tensor"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_no_state_dict(case: str, model: Path) -> None:
    value, report = VALUES[case]
    assert problem(model, archive(value)).startswith(report)


def test_a_tensor_without_a_storage(model: Path) -> None:
    made = Call(torch._utils._rebuild_tensor_v2, [1.0, 2.0], 0, (2,), (1,), False, collections.OrderedDict())
    assert problem(model, archive({"a": made})).startswith("a: found a tensor without a storage")


def test_a_type_is_no_tensor(model: Path) -> None:
    report = problem(model, archive(b"\x80\x02}X\x01\0\0\0actorch\nfloat32\ns."))
    assert report.startswith("a: found a value of type ")


def test_a_missing_shard_of_an_index(model: Path) -> None:
    torch.save(state_dict(), model / "pytorch_model-00001-of-00002.bin")
    shards = dict.fromkeys(state_dict(), "pytorch_model-00001-of-00002.bin") | {
        "lm_head.weight": "pytorch_model-00002-of-00002.bin"
    }
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    missing = model / "pytorch_model-00002-of-00002.bin"
    assert one(refused(model)).startswith(
        f"{missing}: found no such file; expected the 1 tensors that pytorch_model.bin.index.json"
    )


def test_the_same_tensor_in_two_files(model: Path) -> None:
    torch.save(state_dict(), model / "pytorch_model-1.bin")
    torch.save({"model.norm.weight": state_dict()["model.norm.weight"]}, model / "pytorch_model-2.bin")
    assert one(refused(model)).startswith("model.norm.weight: found the tensor in both pytorch_model-1.bin and pytorch_model-2.bin")


def test_integers_in_the_place_of_weights(model: Path) -> None:
    torch.save({**state_dict(), "lm_head.weight": torch.zeros(96, 64, dtype=torch.int64)}, model / FILE)
    assert one(refused(model)).startswith("lm_head.weight: found values of type I64; expected weights")
