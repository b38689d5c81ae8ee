"""The header parser beside the safetensors library: never laxer, nothing but BadInput, and all that save_file writes is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from pipeline.errors import BadInput
from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.tensor.placement import whole
from stages.read.safetensors import open_file
from tests.support.examples import examples

SIZES = {name: row.numpy.itemsize for name, row in BY_SAFETENSORS.items()}
VALID = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(5, np.float16)}, metadata={"format": "pt"})


def blob(header: bytes | str, data_bytes: int = 0) -> bytes:
    """A file of this header, whatever it says, and so many bytes behind it."""
    header = header if isinstance(header, bytes) else header.encode()
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            return file.keys() is not None
    except SafetensorError:
        return False


def accepts(path: Path) -> bool:
    """Whether headrace takes the file; fails on any error but BadInput, on one without a problem, and on one that names no file."""
    try:
        open_file(path)
    except BadInput as error:
        problems = error.problems
    else:
        return True
    assert problems
    assert all(problem.subject.startswith(str(path)) for problem in problems)
    return False


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "file.safetensors"


def check_never_laxer(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if accepts(path):
        assert library_accepts(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
lengths = st.integers(0, 5) | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 10**30]) | st.integers(-2, -1)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BY_SAFETENSORS, "F4", "C64", "f32", ""]) | json_values,
        "shape": st.lists(lengths, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-2, 24) | lengths, min_size=1, max_size=3) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=4)


@given(content=st.binary(max_size=80))
@example(content=b"")
@example(content=bytes(7))
@example(content=bytes(8))
@example(content=b"\xff" * 8)
def test_random_bytes(scratch: Path, content: bytes) -> None:
    check_never_laxer(scratch, content)


@given(header=st.binary(max_size=60), data_bytes=st.integers(0, 16))
@example(header=b"{}", data_bytes=0)
@example(header=b"{}", data_bytes=1)
@example(header=b"\xef\xbb\xbf{}", data_bytes=0)
@example(header=b"{}\0", data_bytes=0)
@example(header=b"[" * 100_000, data_bytes=0)
@example(header=b'{"a":' * 100_000, data_bytes=0)
def test_random_header_bytes(scratch: Path, header: bytes, data_bytes: int) -> None:
    check_never_laxer(scratch, blob(header, data_bytes))


@examples(500)
@given(header=headers | json_values, data_bytes=st.integers(0, 24))
def test_random_json(scratch: Path, header: Any, data_bytes: int) -> None:
    check_never_laxer(scratch, blob(json.dumps(header), data_bytes))


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header whose tensors lie one behind the other, as the format wants them, in random order and under random names."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=4).filter(lambda name: name != "__metadata__"), unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(list(SIZES))), draw(st.lists(st.integers(0, 4), max_size=3))
        size = SIZES[dtype] * int(np.prod(shape, dtype=int))
        header[name] = entry(dtype, shape, [end, end + size])
        end += size
    return dict(draw(st.permutations(list(header.items())))), end


@given(made=laid_out(), moved=st.integers(-2, 2))
def test_whole_files_are_read_and_a_byte_more_or_less_is_refused(
    scratch: Path, made: tuple[dict[str, Any], int], moved: int
) -> None:
    header, end = made
    scratch.write_bytes(blob(json.dumps(header), max(end + moved, 0)))
    whole_file = max(end + moved, 0) == end
    assert accepts(scratch) is whole_file
    assert library_accepts(scratch) is whole_file


@examples(400)
@given(data=st.data())
def test_mutated_valid_files(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(VALID)
    header_end = 8 + int.from_bytes(VALID[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # The bytes that numbers and names are made of find more than random ones do.
        value = data.draw(st.sampled_from(b'0123456789-.,:"[]{}eE \\') | st.integers(0, 255))
        at = data.draw(st.integers(0, header_end - 1))
        kind = data.draw(st.sampled_from(["replace", "replace", "insert", "delete"]))
        if kind == "replace":
            content[at] = value
        elif kind == "insert":
            content.insert(at, value)
        else:
            del content[at]
    if data.draw(st.booleans()):  # a length that fits again lets the parser see the rest
        content[:8] = (len(content) - 8 - (len(VALID) - header_end)).to_bytes(8, "little")
    check_never_laxer(scratch, bytes(content))


@given(length=st.integers(0, len(VALID) - 1))
def test_every_truncation_is_refused(scratch: Path, length: int) -> None:
    scratch.write_bytes(VALID[:length])
    assert not accepts(scratch)


@given(
    made=st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["f4", "f2", "i8", "u1", "?"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    # Not {}: of no tensors and empty metadata the library makes a file that it does not read itself.
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2),
)
def test_what_save_file_writes_is_read_bit_for_bit(scratch: Path, made: dict[str, Any], metadata: dict[str, str] | None) -> None:
    random = np.random.default_rng(0)
    arrays = {name: np.asarray(random.integers(0, 2, shape)).astype(dtype) for name, (dtype, shape) in made.items()}
    save_file(arrays, scratch, metadata=metadata)
    _, tensors = open_file(scratch)
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        read = np.asarray(tensor.block(whole(tensor.shape)))
        assert (read.shape, read.dtype, read.tobytes()) == (arrays[name].shape, arrays[name].dtype, arrays[name].tobytes())


def test_zero_dimensional_and_zero_size_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16), "thin": np.zeros((3, 0), "f2")}, path)
    _, tensors = open_file(path)
    assert float(np.asarray(tensors["scalar"].block(()))) == 2.5
    assert np.asarray(tensors["empty"].block(((0, 0), (0, 4)))).shape == (0, 4)
    assert np.asarray(tensors["thin"].block(((0, 3), (0, 0)))).shape == (3, 0)


HUGE = "9" * 4000
# name -> (file, what the report must say)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "7 bytes": (bytes(7), "7 bytes"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "a header of 1,000 bytes in a file of 10"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "not JSON": (blob("{tensor}"), "not JSON"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "not JSON"),
    "empty header": (blob(""), "not JSON"),
    "JSON, but a list": (blob("[]"), "a JSON list"),
    "JSON cut short": (blob('{"a":{"dtype":"F32"'), "not JSON"),
    "nested too deep": (blob("[" * 100_000), "not JSON"),
    "entry is a number": (blob(json.dumps({"a": 5})), ": a: found an entry 5"),
    "entry without a dtype": (blob(json.dumps({"a": {"shape": [], "data_offsets": [0, 0]}})), ": a: found an entry"),
    "unknown dtype": (blob(json.dumps({"a": entry("F33")}), 4), ": a: found dtype 'F33'; expected one of F64"),
    "dtype is a number": (blob(json.dumps({"a": entry(32)}), 4), ": a: found "),
    "size is not shape x dtype": (blob(json.dumps({"a": entry("F32", [3])}), 4), ": a: found 4 bytes; expected 12"),
    "past the end": (blob(json.dumps({"a": entry("F32", [2], [0, 8])}), 4), ": a: found data_offsets [0, 8]"),
    "negative offset": (blob(json.dumps({"a": entry("F32", [1], [-4, 0])}), 4), ": a: found data_offsets [-4, 0]"),
    "negative shape": (blob(json.dumps({"a": entry("F32", [-1, -1])}), 4), ": a: found shape [-1, -1]"),
    "offsets backwards": (blob(json.dumps({"a": entry("F32", [1], [4, 0])}), 4), ": a: found data_offsets [4, 0]"),
    "three offsets": (blob(json.dumps({"a": entry("F32", [1], [0, 2, 4])}), 4), ": a: found "),
    "offset is a fraction": (blob(json.dumps({"a": entry("F32", [1], [0.0, 4.0])}), 4), ": a: found data_offsets [0.0, 4.0]"),
    "offset is true": (blob(json.dumps({"a": entry("F32", [1], [False, 4])}), 4), ": a: found data_offsets"),
    "shape is a string": (blob(json.dumps({"a": entry("F32", "1")}), 4), ": a: found shape 1"),
    "overlap": (blob(json.dumps({"a": entry(), "b": entry("F32", [1], [2, 6])}), 6), ": b: found data_offsets [2, 6] overlapping"),
    "twice the same bytes": (blob(json.dumps({"a": entry(), "b": entry()}), 4), ": b: found data_offsets [0, 4] overlapping"),
    "gap": (blob(json.dumps({"a": entry(), "b": entry("F32", [1], [8, 12])}), 12), ": b: found data_offsets [8, 12] after 4 bytes"),
    "gap in front": (blob(json.dumps({"a": entry("F32", [1], [4, 8])}), 8), ": a: found data_offsets [4, 8] after 4 bytes"),
    "bytes behind the last": (blob(json.dumps({"a": entry()}), 5), "5 bytes of data; expected 4"),
    "one byte missing": (blob(json.dumps({"a": entry()}), 3), ": a: found data_offsets [0, 4]"),
    "duplicate key": (blob(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}', 4), "twice"),
    "duplicate offsets": (blob('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}}', 4), "twice"),
    # The library reads lengths as unsigned 64-bit numbers, and a product that overflows them as damage.
    "product overflows": (blob(json.dumps({"a": entry("F32", [2**63, 4, 0], [0, 0])})), ": a: "),
    "length of 2**64": (blob(json.dumps({"a": entry("F32", [2**64, 0], [0, 0])})), ": a: "),
    "product of 8,000 digits": (blob(f'{{"a":{{"dtype":"F32","shape":[{HUGE},{HUGE}],"data_offsets":[0,4]}}}}', 4), "4,000 digits"),
    "offset of 4,000 digits": (blob(f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,{HUGE}]}}}}', 4), "4,000 digits"),
    "offset of 5,000 digits": (blob(f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,{"9" * 5000}]}}}}', 4), ""),
    "minus zero": (blob('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', 4), ""),
    # Neither is JSON by the standard, though Python's parser takes both.
    "half a surrogate pair": (blob('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4), ""),
    "NaN": (blob('{"__metadata__":{"a":NaN}}'), ""),
    "metadata is a number": (blob('{"__metadata__":5}'), "__metadata__"),
    "metadata of numbers": (blob('{"__metadata__":{"format":5}}'), "__metadata__"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, report = DAMAGED[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput) as refusal:
        open_file(path)
    assert str(path) in str(refusal.value)
    assert report in str(refusal.value)


def test_all_problems_of_a_file_come_in_one_report(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(blob(json.dumps({"a": entry("F33"), "b": entry("F32", [3]), "c": entry("F32", [1], [0, 400])}), 4))
    with pytest.raises(BadInput) as refusal:
        open_file(path)
    assert [problem.subject for problem in refusal.value.problems] == [f"{path}: {name}" for name in "abc"]


def test_a_header_longer_than_the_library_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:  # sparse: takes no space
        file.write((100_000_001).to_bytes(8, "little") + b"{}")
        file.truncate(100_000_100)
    assert not library_accepts(path)
    assert not accepts(path)
