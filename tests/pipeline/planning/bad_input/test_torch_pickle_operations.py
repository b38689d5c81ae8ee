"""Pickles of PyTorch files that are hostile, damaged or grow: nothing of them is run, and the report names what they ask for."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.read import pickles, torch_pickle
from tests.pipeline.planning.bad_input.torch_pickles import (
    FILE,
    FLOATS,
    MAGIC,
    PROTOCOL,
    SYSTEM,
    Call,
    archive,
    legacy,
    model_directory,
    pickled,
    problem,
    problem_of,
    problems,
    state_dict,
    tensor,
)
from tests.support.commands import LOOP_SECONDS, convert, limited, one, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path)


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


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("calls", [5, 20])
def test_pairs_that_a_call_goes_through_are_operations(
    kind: type, calls: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of them may be the argument of many calls."""
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1500)
    pairs = kind((f"n{n}", None) for n in range(100))
    report = problem(model, archive([Call(collections.OrderedDict, pairs) for _ in range(calls)]))
    assert ("more than 1,500 operations" in report) == (calls == 20)


@pytest.mark.parametrize("length", [pickles.MAX_LINE // 2 - 1, pickles.MAX_LINE // 2, 5000])
def test_long_names_put_together_on_the_stack(length: int, model: Path) -> None:
    text = b"X" + (length + 1).to_bytes(4, "little") + b"n" * (length + 1)
    report = problem(model, archive(b"\x80\x04" + text + text + b"\x93."))
    assert (f"a global's name of {2 * length + 2:,} characters" in report) == (2 * length + 2 > pickles.MAX_LINE)


def test_globals_without_end(model: Path) -> None:
    names = b"".join(b"cos\nn%d\n0" % n for n in range(3 * pickles.MAX_REFUSED))
    (model / FILE).write_bytes(archive(b"\x80\x02" + names + b"}."))
    report = problems(model / FILE)
    assert len(report) == pickles.MAX_REFUSED
    assert all("found the global os.n" in line for line in report)


@pytest.mark.parametrize("make", [archive, legacy])
def test_a_long_name_of_a_storage(make: Callable[..., bytes], model: Path) -> None:
    key = b"n" * (pickles.MAX_LINE + 1)
    for name in (key, key.decode()):
        assert "a storage's name of 1,025 bytes" in problem(model, make(pickled({"a": tensor(key=name, view=(None,))}, 4)))


def test_a_pickle_of_too_many_bytes(model: Path) -> None:
    with zipfile.ZipFile(model / FILE, "w") as file:
        file.writestr("archive/data.pkl", bytes(270_000_000))
    assert problem_of(model).startswith("data.pkl: found 270,000,000 bytes; expected names and shapes, in at most 268,435,456")


def test_other_bin_files_alone_are_no_model(model: Path) -> None:
    torch.save(Call(os.system, f"touch {model.parent / 'sentinel'}"), model / "training_args.bin")
    report = one(refused(model))
    assert "model.safetensors, or shards and model.safetensors.index.json" in report
    assert not (model.parent / "sentinel").exists()
