"""PyTorch files that are hostile, damaged or not what they seem: nothing of them is run, and the report names file and tensor.

Each case is shown to the reader; the command line, which says what the reader raises, is shown one of each format.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.tensors import LazyTensor
from stages.read import pickles, torch_pickle
from tests.support import checkpoints
from tests.support.commands import LOOP_SECONDS, convert, headrace, limited, one, refused, tree
from tests.support.examples import examples

FILE = "pytorch_model.bin"
FLOATS = np.arange(12, dtype=np.float32).tobytes()
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory whose weights are still to be written."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(checkpoints.LLAMA))
    return tmp_path / "model"


def state_dict() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in checkpoints.values(checkpoints.LLAMA).items()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """A small file in each format, by whether it is a zip archive."""
    path = tmp_path_factory.mktemp("sound") / FILE
    made = {}
    for zipped in (True, False):
        torch.save(torch.nn.Linear(3, 4).state_dict(), path, _use_new_zipfile_serialization=zipped)
        made[zipped] = path.read_bytes()
    return made


class Storage:
    """Pickled as the persistent id of a storage, whatever it says."""

    def __init__(self, *identity: Any) -> None:
        self.identity = ("storage", *identity)


class Call:
    """Pickled as a call of `function`: run by whoever unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.arguments, self.state) if self.state is not None else (self.function, self.arguments)


def tensor(
    shape: Any = (3, 4),
    strides: Any = (4, 1),
    offset: Any = 0,
    *,
    kind: Any = torch.FloatStorage,
    key: Any = "0",
    count: Any = 12,
    more: tuple[Any, ...] = (),
    view: tuple[Any, ...] = (),
) -> Call:
    """A pickled float32 tensor of the storage "0", FLOATS, unless it is said to be another."""
    storage = Storage(kind, key, "cpu", count, *view)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, collections.OrderedDict(), *more)


def pickled(value: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.identity if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def archive(value: Any, *, records: dict[str, bytes | None] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of a pickled value, or of bytes of a pickle, with other records or, where one is None, without it."""
    data = value if isinstance(value, bytes) else pickled(value)
    held = {"data.pkl": data, "byteorder": b"little", "data/0": FLOATS, "version": b"3\n", **(records or {})}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in held.items():
            if content is not None:
                file.writestr(f"archive/{name}" if not name.startswith("/") else name[1:], content)
    return buffer.getvalue()


def legacy(
    value: Any, keys: Any = ("0",), storages: bytes | None = None, head: tuple[Any, ...] = (MAGIC, PROTOCOL, SYSTEM)
) -> bytes:
    parts = [*head, value, list(keys) if isinstance(keys, tuple) else keys]
    data = struct.pack("<q", 12) + FLOATS if storages is None else storages
    return b"".join(part if isinstance(part, bytes) else pickled(part) for part in parts) + data


def problems(path: Path) -> list[str]:
    """Every problem that the reader finds in a file; each is whole, and begins with the file's name. The file is as it was."""
    before = tree(path.parent)
    with pytest.raises(BadInput) as refusal:
        torch_pickle.open_file(path)
    assert tree(path.parent) == before
    found = [str(problem) for problem in refusal.value.problems]
    assert found
    assert all(text.startswith(f"{path}: ") and ": found " in text and "; expected " in text for text in found), found
    return found


def problem_of(model: Path) -> str:
    """The one problem of a model's file, without the file's name."""
    return one(problems(model / FILE)).removeprefix(f"{model / FILE}: ")


def problem(model: Path, content: bytes) -> str:
    """The same of a model with this file."""
    (model / FILE).write_bytes(content)
    return problem_of(model)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_files_that_these_tests_damage_are_sound(zipped: bool, model: Path) -> None:
    torch.save(state_dict(), model / FILE, _use_new_zipfile_serialization=zipped)
    assert convert(model, model.parent / "out").code == 0


@pytest.mark.parametrize("make", [archive, legacy])
def test_the_tensors_that_these_tests_damage_are_sound(make: Callable[..., bytes], tmp_path: Path) -> None:
    view = (None,) if make is legacy else ()
    (tmp_path / FILE).write_bytes(make({"a": tensor(view=view)}))
    _, tensors = torch_pickle.open_file(tmp_path / FILE)
    assert np.asarray(tensors["a"].block(((0, 3), (0, 4)))).tobytes() == FLOATS
    assert torch.load(tmp_path / FILE, weights_only=True)["a"].numpy().tobytes() == FLOATS


# Nothing of a pickle is run.


def hostile(sentinel: Path) -> dict[str, tuple[Any, str]]:
    """By name: a value whose unpickling would make the sentinel, and the global that the report must name."""
    command = f"touch {sentinel}"
    system = f"{os.name}.system"
    evil = Call(os.system, command)
    return {
        "the whole": (evil, system),
        "a tensor": ({"a": tensor(), "b": evil}, system),
        "a name": ({"a": tensor(), evil: 1}, system),
        "a shape": ({"a": tensor(shape=(evil, 4))}, system),
        "a storage": ({"a": Call(torch._utils._rebuild_tensor_v2, evil, 0, (1,), (1,), False, {})}, system),
        "a storage's key": ({"a": tensor(key=evil)}, system),
        "a storage's class": ({"a": tensor(kind=os.system)}, system),
        "an attribute": (Call(collections.OrderedDict, state={"_metadata": evil}), system),
        "pairs of a dictionary": (Call(collections.OrderedDict, [["a", evil]]), system),
        "a parameter": ({"a": Call(torch._utils._rebuild_parameter, tensor(), evil, {})}, system),
        "a list": ({"model": {"a": tensor()}, "other": [(1, [evil])]}, system),
        "eval": ({"a": Call(eval, f"__import__('os').system({command!r})")}, "__builtin__.eval"),
        "exec": ({"a": Call(exec, f"open({str(sentinel)!r}, 'w')")}, "__builtin__.exec"),
        "open": ({"a": Call(open, str(sentinel), "w")}, "io.open"),
        "a nested pickle": ({"a": Call(pickle.loads, pickled(evil))}, "ickle.loads"),
        "a nested file": ({"a": Call(torch.storage._load_from_bytes, b"")}, "torch.storage._load_from_bytes"),
        "a method": ({"a": Call(Path.touch, sentinel)}, "pathlib."),
        "another reconstructor": ({"a": Call(torch._utils._rebuild_qtensor, 1)}, "torch._utils._rebuild_qtensor"),
        "a module": (torch.nn.Linear(3, 4), "torch.nn.modules.linear.Linear"),
        "an array": ({"a": np.zeros(3)}, "numpy"),
        "a set": ({"a": {1, 2}}, "__builtin__.set"),
    }


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize("case", hostile(Path("x")))
def test_no_global_outside_the_list_is_run(case: str, make: Callable[..., bytes], model: Path) -> None:
    sentinel = model.parent / "sentinel"
    value, name = hostile(sentinel)[case]
    (model / FILE).write_bytes(make(value))
    report = problems(model / FILE)
    assert all(line.startswith(f"{model / FILE}: found the global ") for line in report)
    assert any(name in line.partition(";")[0] for line in report)
    assert all("Nothing of it was run" in line for line in report)
    assert not sentinel.exists()


@pytest.mark.parametrize("make", [archive, legacy])
def test_the_command_says_what_the_reader_raises(make: Callable[..., bytes], model: Path) -> None:
    sentinel = model.parent / "sentinel"
    (model / FILE).write_bytes(make(hostile(sentinel)["a list"][0]))
    assert refused(model) == problems(model / FILE)
    assert not sentinel.exists()


@pytest.mark.parametrize("part", range(5))
def test_no_pickle_of_a_legacy_file_is_run(part: int, model: Path) -> None:
    sentinel = model.parent / "sentinel"
    parts: list[Any] = [MAGIC, PROTOCOL, SYSTEM, {"a": tensor(view=(None,))}, ["0"]]
    parts[part] = [Call(os.system, f"touch {sentinel}")]
    (model / FILE).write_bytes(b"".join(map(pickled, parts)) + struct.pack("<q", 12) + FLOATS)
    assert all(line.startswith(f"{model / FILE}: found ") for line in problems(model / FILE))
    assert not sentinel.exists()


def test_python_itself_would_have_run_them(tmp_path: Path) -> None:
    # Else the tests above would prove nothing.
    pickle.loads(pickled(hostile(tmp_path / "sentinel")["the whole"][0]))
    assert (tmp_path / "sentinel").exists()


def test_every_global_outside_the_list_is_named_once(model: Path) -> None:
    (model / FILE).write_bytes(archive({"a": Call(os.getcwd), "b": [Call(os.getpid), Call(os.getcwd)], "c": tensor()}))
    report = problems(model / FILE)
    assert [line.partition("found the global ")[2].partition(";")[0] for line in report] == [
        f"{os.name}.getcwd",
        f"{os.name}.getpid",
    ]


NAMES = [b"cos\nsystem\n", b"ctorch\nos.system\n", b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", b"c\n\n", b"c\x1b[31m\nx\n"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(name: bytes, model: Path) -> None:
    report = problem(model, archive(b"\x80\x02" + name + b"."))
    assert report.startswith("found the global ")
    assert "\x1b" not in report


def stack_global(module: str, name: str) -> bytes:
    texts = (bytes([0x8C, len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + b"".join(texts) + b"\x93."


def test_names_put_together_on_the_stack(model: Path) -> None:
    assert problem(model, archive(stack_global("os", "system"))).startswith("found the global os.system;")


def test_the_text_protocol_which_torch_cannot_have_used(model: Path) -> None:
    # It has opcodes of its own that make instances.
    for content in (pickle.dumps({"a": 1}, 0), b"(S'touch sentinel'\nios\nsystem\n."):
        assert "no checkpoint of torch.save" in problem(model, archive(content))


OPCODES = {
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a mark that is missing": b"\x80\x02t.",
    "a memo that is empty": b"\x80\x02h\x05.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call of a dictionary": b"\x80\x02})R.",
    "a call with a number": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
    "a call with too many": b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02K\x03tR.",
    "a new object of a known class": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id of a number": b"\x80\x02K\x01Q.",
    "items of a number": b"\x80\x02K\x01(K\x01K\x02u.",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "an append to a dictionary": b"\x80\x02}K\x01a.",
    "text that is no UTF-8": b"\x80\x02X\x02\0\0\0\xff\xff.",
    "a long text that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a longer one": b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.",
    "bytes that are not there": b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "an integer of 2,000 bits": b"\x80\x02\x8a\xfa" + b"\x7f" * 250 + b".",
    "a decimal integer": b"\x80\x02L" + b"9" * 5000 + b"L\n.",
    "a frame that is longer": b"\x80\x04\x95" + b"\xff" * 8 + b"}",
    "out-of-band data": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize("case", OPCODES)
def test_pickles_that_are_damaged(case: str, make: Callable[..., bytes], model: Path) -> None:
    report = problem(model, make(OPCODES[case]))
    assert report.startswith("found what is no checkpoint of torch.save, or a damaged one (")


def deep(levels: int) -> bytes:
    """A tuple of two of the tuple before it, and so on, as a dictionary's key: hashing it takes 2 ** levels steps."""
    steps = b"".join(b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(levels))
    return b"\x80\x02}K\x01q\x00" + steps + b"K\x02s."


BOMBS = {
    "a memo of 4 billion places": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a hash of 2 ** 100 steps": deep(100),
    "lists nested a million deep": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "tuples nested a million deep": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "marks nested a million deep": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00X\x05\0\0\0modelh\x00s.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickles_that_grow_are_refused_in_bounded_memory_and_time(case: str, model: Path) -> None:
    (model / FILE).write_bytes(archive(BOMBS[case]))
    limits = {"RLIMIT_CPU": LOOP_SECONDS, "RLIMIT_AS": 4 << 30}
    ran = limited(limits, "plan", "--model_dir", model, "--output_dir", model.parent / "out")
    assert ran.code == 2, ran
    assert f"{model / FILE}: " in ran.err


def test_colliding_keys_take_no_time(model: Path) -> None:
    # Multiples of 2 ** 61 - 1 have one hash: a dictionary of them would compare each with all others.
    keys = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 100_000))
    (model / FILE).write_bytes(archive(b"\x80\x02}(" + keys + b"u."))
    ran = limited({"RLIMIT_CPU": LOOP_SECONDS}, "plan", "--model_dir", model, "--output_dir", model.parent / "out")
    assert ran.code == 2
    assert "a key of type int" in ran.err


def test_a_pickle_of_too_many_operations(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    assert "more than 1,000 operations" in problem(model, archive(b"\x80\x02" + b"N0" * 600 + b"N."))


def test_a_pickle_of_too_many_bytes(model: Path) -> None:
    with zipfile.ZipFile(model / FILE, "w") as file:
        file.writestr("archive/data.pkl", bytes(270_000_000))
    assert problem_of(model).startswith("data.pkl: found 270,000,000 bytes; expected names and shapes, in at most 268,435,456")


# Tensors that their storages contradict.

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


# Values that are no state dict.

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


# Archives.


def test_a_big_endian_archive(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"byteorder": b"big"}))
    assert report.startswith("found byteorder big; expected a file of a little-endian machine")


def test_an_unknown_byte_order(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"byteorder": b"\x1b[2Jmiddle" * 20}))
    assert report.startswith("found byteorder '\\x1b[2J")


def test_a_big_endian_legacy_file(model: Path) -> None:
    report = problem(model, legacy({"a": tensor(view=(None,))}, head=(MAGIC, PROTOCOL, {**SYSTEM, "little_endian": False})))
    assert "expected a file of a little-endian machine" in report


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive(compression: int, model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, compression=compression))
    assert report.startswith("archive/data.pkl: found compressed data; expected data stored as they are")


def test_one_compressed_record(model: Path) -> None:
    (model / FILE).write_bytes(archive({"a": tensor()}, records={"data/0": None}))
    with zipfile.ZipFile(model / FILE, "a") as file:
        file.writestr("archive/data/0", FLOATS, zipfile.ZIP_DEFLATED)
    assert problem_of(model).startswith("archive/data/0: found compressed data")


def test_an_encrypted_archive(model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = content.index(b"PK\1\2")  # the flags of the directory's first entry
    content[at + 8] |= 1
    assert problem(model, bytes(content)).startswith("archive/data.pkl: found encrypted data")


@pytest.mark.parametrize("record", ["constants.pkl", "code/__torch__.py"])
def test_a_torchscript_archive(record: str, model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={record: b"\x80\x02)."}))
    assert report.startswith("found a TorchScript archive; expected a state dict. Load it with torch, and save the state_dict()")


def test_an_archive_without_a_pickle(model: Path) -> None:
    report = problem(model, archive({}, records={"data.pkl": None}))
    assert report.startswith("found a zip archive of 3 records, none of them */data.pkl")


@pytest.mark.parametrize("name", ["/data.pkl", "/a/b/data.pkl", "/data.pkl/"])
def test_a_pickle_at_another_place(name: str, model: Path) -> None:
    report = problem(model, archive({}, records={"data.pkl": None, name: pickled({})}))
    assert "none of them */data.pkl" in report


def test_two_pickles(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"/other/data.pkl": pickled({})}))
    assert report.startswith("found a zip archive of 5 records, 2 of them */data.pkl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_stands_twice(model: Path) -> None:
    (model / FILE).write_bytes(archive({"a": tensor()}))
    with zipfile.ZipFile(model / FILE, "a") as file:
        file.writestr("archive/data/0", FLOATS[::-1])
    assert "a record that stands twice" in problem_of(model)


@pytest.mark.parametrize("version", [b"11\n", b"x", b"-1", b"", b"\xff", b"9" * 500])
def test_another_version(version: bytes, model: Path) -> None:
    assert "found " in problem(model, archive({"a": tensor()}, records={"version": version}))


def entry(content: bytes, name: str) -> int:
    """Where the directory's entry of a record begins."""
    at = content.index(b"PK\1\2")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\1\2", at + 4)
    return at


@pytest.mark.parametrize("offset", [0, 7, 2**31, 2**32 - 2])
@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_a_record_that_is_not_where_the_directory_says(record: str, offset: int, model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = entry(bytes(content), record)
    if record == "archive/data.pkl" and offset == 0:
        offset = 1
    content[at + 42 : at + 46] = struct.pack("<I", offset)
    assert "damaged one (" in problem(model, bytes(content))


@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0"])
def test_a_record_that_reaches_past_the_end(record: str, model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = entry(bytes(content), record)
    content[at + 20 : at + 28] = struct.pack("<II", 10**6, 10**6)
    assert "cut short in data" in problem(model, bytes(content))


def test_a_directory_that_is_said_to_be_enormous(model: Path) -> None:
    # A sparse file of 3 GiB whose last bytes say that all before them are the directory.
    (model / FILE).write_bytes(b"PK\3\4")
    nbytes = (3 << 30) - 22
    with (model / FILE).open("r+b") as file:
        file.truncate(nbytes)
        file.seek(nbytes)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, nbytes, 0, 0))
    assert f"a directory of {nbytes:,} bytes" in problem_of(model)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(model: Path, sound: dict[bool, bytes], zipped: bool) -> None:
    (model / FILE).write_bytes(sound[zipped])
    for length in range(len(sound[zipped]) - 1, -1, -1):
        os.truncate(model / FILE, length)
        assert opened(model / FILE) is None, length
    (model / FILE).write_bytes(sound[zipped][:-1])
    assert plan(model) == 2


@pytest.mark.parametrize("zipped", [True, False])
@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes(model: Path, sound: dict[bool, bytes], zipped: bool, data: st.DataObject) -> None:
    content = bytearray(sound[zipped])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (model / FILE).write_bytes(content)
    # Values, names and padding may be any; what must not be is another exception, which would come out of the call.
    opened(model / FILE)


@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x02", b"PK\3\4", b"\x80\x02}(", b"\x80\x02(ctorch\nSize\n"])
)
def test_random_bytes(model: Path, content: bytes, start: bytes) -> None:
    (model / FILE).write_bytes(start + content)
    assert opened(model / FILE) is None
    (model / FILE).write_bytes(archive(start + content + b"."))
    assert not opened(model / FILE)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_whose_tensors_are_sound_is_still_no_model(zipped: bool, model: Path, sound: dict[bool, bytes]) -> None:
    (model / FILE).write_bytes(sound[zipped])
    assert opened(model / FILE)
    assert plan(model) == 2


def opened(path: Path) -> Mapping[str, LazyTensor] | None:
    """The tensors that the reader finds in a file, None where it refuses it. Any other exception comes out here."""
    try:
        return torch_pickle.open_file(path)[1]
    except BadInput:
        return None


def plan(model: Path) -> int:
    ran = headrace("plan", "--model_dir", model, "--output_dir", model.parent / "out")
    assert ran.code == 0 or ran.err.startswith("headrace: "), ran
    return ran.code


# Other files.


def test_a_tar_archive_of_the_first_torch(model: Path) -> None:
    with tarfile.open(model / FILE, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    assert problem_of(model).startswith("found a tar archive, as torch made before 0.2")


def test_a_name_that_looks_like_a_tar_archive(tmp_path: Path) -> None:
    # In the legacy format, at the place where tar archives say what they are.
    for length in range(90, 130):
        name = "n" * length + "ustar"
        torch.save({name: torch.ones(3)}, tmp_path / FILE, _use_new_zipfile_serialization=False)
        if (tmp_path / FILE).read_bytes()[257:262] == b"ustar":
            assert torch_pickle.open_file(tmp_path / FILE)[1].keys() == {name}
            return
    raise AssertionError("no name fell on that place")


OTHERS = {
    "empty": b"",
    "one byte": b"P",
    "the beginning of a zip": b"PK\3\4",
    "text": b"<!DOCTYPE html>\n<p>Not found</p>\n",
    "a page": b"<!DOCTYPE html><html>Not found</html>",
    "zeros": bytes(4096),
    "a bare pickle": pickle.dumps({"a": [1.0, 2.0]}),
    "another magic number": legacy({}, head=(MAGIC + 1, PROTOCOL, SYSTEM)),
    "another protocol": legacy({}, head=(MAGIC, PROTOCOL + 1, SYSTEM)),
    "no keys": legacy({"a": tensor(view=(None,))}, keys={}),
    "keys that are numbers": legacy({"a": tensor(view=(None,))}, keys=[0]),
    "a key that no tensor has": legacy({"a": tensor(view=(None,))}, keys=["1"]),
    "a storage of a negative size": legacy({"a": tensor(view=(None,))}, storages=struct.pack("<q", -1)),
    "a storage past the end": legacy({"a": tensor(view=(None,))}, storages=struct.pack("<q", 2**62)),
    "no storages": legacy({"a": tensor(view=(None,))}, storages=b""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_that_are_none_of_torchs(case: str, model: Path) -> None:
    report = problem(model, OTHERS[case])
    assert report.startswith("found what is no checkpoint of torch.save, or a damaged one (")


def test_a_system_that_does_not_say_its_byte_order(model: Path) -> None:
    for system in ({}, [], "little_endian", 5):
        assert "found sys_info" in problem(model, legacy({}, head=(MAGIC, PROTOCOL, system)))


def test_safetensors_under_another_name(model: Path) -> None:
    checkpoints.write(model.parent / "other", checkpoints.LLAMA)
    shutil.copy(model.parent / "other/model.safetensors", model / FILE)
    assert problem_of(model).startswith("found what is no checkpoint of torch.save")


def test_a_file_that_is_a_directory(model: Path) -> None:
    (model / FILE).mkdir()
    assert one(refused(model)).startswith(f"{model / FILE}: found a file that cannot be read")


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


def test_other_bin_files_alone_are_no_model(model: Path) -> None:
    torch.save(Call(os.system, f"touch {model.parent / 'sentinel'}"), model / "training_args.bin")
    report = one(refused(model))
    assert "model.safetensors, or shards and model.safetensors.index.json" in report
    assert not (model.parent / "sentinel").exists()
