"""read, PyTorch files: what torch.save wrote, bit for bit, in both of its formats; torch is not imported."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.tensor.placement import whole
from stages.cast import as_type
from stages.read.mapped import MappedTensor
from stages.read.strided import StridedTensor
from stages.read.torch_pickle import MAGIC, PROTOCOL, open_file
from tests.support.torch_files import bits, both_formats, check, random, saved

# Types that a state dict may hold; those after BOOL are pickled another way (_rebuild_tensor_v3).
TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@both_formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_is_read_bit_for_bit(zipped: bool, protocol: int, tmp_path: Path) -> None:
    state = {str(dtype): random((3, 5), dtype, n) for n, dtype in enumerate(TYPES)}
    file, tensors = open_file(saved(tmp_path / "m.bin", state, zipped=zipped, protocol=protocol))
    assert tensors.keys() == state.keys()
    assert (file.path, file.size_bytes) == (tmp_path / "m.bin", (tmp_path / "m.bin").stat().st_size)
    for name, tensor in state.items():
        assert isinstance(tensors[name], MappedTensor)
        check(tensors[name], tensor)


@both_formats
def test_views_of_storages(zipped: bool, tmp_path: Path) -> None:
    base = random((6, 8, 4), torch.float32)
    state = {
        "whole": base,
        "again": base,  # shared: the same bytes
        "rows": base[2:5],
        "one": base[3, 2:6],
        "transposed": base.transpose(0, 2),
        "columns": base[:, 1:3],
        "steps": base[::2, ::3, ::2],
        "expanded": random((1, 5), torch.float16)[:, :3].expand(7, 3),
        "repeated scalar": torch.tensor(2.5).expand(3, 2),
        "a row of a column": base[:, :1, 0].T,
    }
    _, tensors = open_file(saved(tmp_path / "m.bin", state, zipped=zipped))
    for name, tensor in state.items():
        check(tensors[name], tensor)
        assert isinstance(tensors[name], MappedTensor if tensor.is_contiguous() else StridedTensor), name
    assert tensors["again"] == tensors["whole"]


@both_formats
def test_scalars_and_empty_tensors(zipped: bool, tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(2.5),
        "scalar of a matrix": random((3, 4), torch.bfloat16)[1, 2],
        "empty": torch.zeros(0),
        "no rows": torch.zeros(0, 4, dtype=torch.float16),
        "no columns": torch.zeros(3, 0),
        "empty slice": torch.arange(12.0).reshape(3, 4)[3:, 2:].T,
    }
    _, tensors = open_file(saved(tmp_path / "m.bin", state, zipped=zipped))
    for name, tensor in state.items():
        check(tensors[name], tensor)


@both_formats
def test_state_dicts_of_modules(zipped: bool, tmp_path: Path) -> None:
    # Ordered dictionaries with an attribute `_metadata`; with keep_vars, of parameters.
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for keep_vars in (False, True):
        state = module.state_dict(keep_vars=keep_vars)
        assert state._metadata
        _, tensors = open_file(saved(tmp_path / "m.bin", state, zipped=zipped))
        assert tensors.keys() == state.keys()
        for name, tensor in state.items():
            check(tensors[name], tensor)


@both_formats
@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_a_state_dict_inside_a_training_checkpoint(name: str, zipped: bool, tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 4).state_dict()
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]}
    checkpoint = {"epoch": 3, "done": True, "args": None, "optimizer": optimizer, name: state}
    _, tensors = open_file(saved(tmp_path / "m.bin", checkpoint, zipped=zipped))
    assert tensors.keys() == state.keys()
    check(tensors["weight"], state["weight"])


def test_a_tensor_that_is_called_model_is_a_tensor(tmp_path: Path) -> None:
    state = {"model": torch.ones(3), "weight": torch.zeros(2)}
    _, tensors = open_file(saved(tmp_path / "m.bin", state))
    assert tensors.keys() == state.keys()


@both_formats
def test_tensors_survive_pickling(zipped: bool, tmp_path: Path) -> None:
    state = {"a": random((3, 4), torch.bfloat16), "b": random((3, 4), torch.bfloat16).T}
    _, tensors = pickle.loads(pickle.dumps(open_file(saved(tmp_path / "m.bin", state, zipped=zipped))))
    for name, tensor in state.items():
        check(tensors[name], tensor)


@pytest.mark.parametrize("shift_by", range(8))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_unaligned_values_cast_as_aligned_ones(dtype: torch.dtype, shift_by: int, tmp_path: Path) -> None:
    # In the legacy format nothing aligns a storage: a name of another length moves it.
    state = {"n" * (shift_by + 1): torch.arange(-8, 8, dtype=torch.float32).reshape(4, 4).to(dtype)}
    _, tensors = open_file(saved(tmp_path / "m.bin", state, zipped=False))
    ((name, tensor),) = state.items()
    block = tensors[name].block(whole((4, 4)))
    for wanted in (np.dtype(np.float32), np.dtype(np.float16), tensors[name].dtype):
        cast = np.asarray(as_type(block, wanted))
        assert cast.astype(np.float64).tolist() == tensor.to(torch.float64).tolist()
    part = block.read(((1, 3), (1, 3)))
    assert np.ascontiguousarray(part).view(np.uint8).tobytes() == bits(tensor[1:3, 1:3])


def test_the_offsets_that_legacy_files_really_have_are_odd(tmp_path: Path) -> None:
    offsets = set()
    for n in range(1, 9):
        _, tensors = open_file(saved(tmp_path / "m.bin", {"n" * n: torch.ones(2)}, zipped=False))
        offsets |= {tensor.offset % 8 for tensor in tensors.values() if isinstance(tensor, MappedTensor)}
    assert offsets == set(range(8))


def legacy(value: bytes, keys: list[Any], storages: list[tuple[int, bytes]]) -> bytes:
    """A file of the legacy format around the pickle of an object."""
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, system))
    return head + value + pickle.dumps(keys, 2) + b"".join(struct.pack("<q", count) + data for count, data in storages)


def python2(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def test_storage_views_and_text_of_python_2(tmp_path: Path) -> None:
    # Neither is written any more: a tensor of elements 3 to 7 of a view of elements 2 to 9, pickled by Python 2.
    view = b"(" + python2("140") + b"K\x02K\x08t"
    identity = b"(" + python2("storage") + b"ctorch\nFloatStorage\n" + python2("139") + python2("cuda:0") + b"K\x0a" + view + b"tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + b"K\x01K\x02K\x02\x86K\x02K\x01\x86\x89ccollections\nOrderedDict\n)RtR"
    )
    pairs = b"](](" + python2("layer.weight") + tensor + b"ee"
    held = np.arange(10, dtype=np.float32)
    path = tmp_path / "m.bin"
    path.write_bytes(legacy(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.", ["139"], [(10, held.tobytes())]))
    _, tensors = open_file(path)
    assert np.asarray(tensors["layer.weight"].block(whole((2, 2)))).tolist() == [[3, 4], [5, 6]]
    # torch itself agrees.
    loaded = torch.load(path, map_location="cpu", weights_only=False, encoding="utf-8")
    assert loaded["layer.weight"].tolist() == [[3, 4], [5, 6]]


def test_a_zip_of_more_than_4_gib(tmp_path: Path) -> None:
    # Sparse: torch reserves the storages' bytes and writes none.
    with torch.serialization.skip_data():
        saved(tmp_path / "m.bin", {"big": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.empty(3)})
    _, tensors = open_file(tmp_path / "m.bin")
    small = tensors["b"]
    assert isinstance(small, MappedTensor)
    assert small.offset > 5 << 30
    with (tmp_path / "m.bin").open("r+b") as file:
        file.seek(small.offset)
        file.write(np.array([1, 2, 3], np.float32).tobytes())
    assert np.asarray(small.block(((0, 3),))).tolist() == [1, 2, 3]
    assert not np.asarray(tensors["big"].block((((5 << 30) - 9, 5 << 30),))).any()


@pytest.mark.parametrize("extra", [b"", b"\xfe\xca\x04\x00abcd"])
def test_archives_of_other_writers(extra: bytes, tmp_path: Path) -> None:
    # Another folder and order, 64-bit local headers, no alignment, no byteorder, extra fields in one header alone.
    saved(tmp_path / "m.bin", {"a": random((3, 5), torch.float16), "b": random((4,), torch.float64)})
    state = torch.load(tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as old, zipfile.ZipFile(tmp_path / "n.bin", "w") as new:
        for name in reversed(old.namelist()):
            if not name.endswith(("byteorder", ".format_version", "serialization_id")):
                entry = zipfile.ZipInfo(name.replace("m/", "étrange folder/"))
                entry.extra = extra
                with new.open(entry, "w", force_zip64=True) as record:
                    record.write(old.read(name))
    _, tensors = open_file(tmp_path / "n.bin")
    for name, tensor in state.items():
        check(tensors[name], tensor)


def test_the_fingerprint_is_that_of_names_shapes_and_places(tmp_path: Path) -> None:
    def digest(state: dict[str, torch.Tensor], zipped: bool) -> str:
        return open_file(saved(tmp_path / "m.bin", state, zipped=zipped))[0].header_sha256

    digests = [digest({"a": torch.ones(3)}, True), digest({"b": torch.ones(3)}, True), digest({"a": torch.ones(4)}, True)]
    assert len(set(digests)) == 3
    assert digest({"a": torch.zeros(3)}, True) == digests[0]
    # In the legacy format a storage's key is an address: the same tensors may be pickled otherwise.
    assert digest({"a": torch.ones(3)}, False) != digest({"b": torch.ones(3)}, False)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    saved(tmp_path / "m.bin", {"a": torch.ones(3)})
    script = "import sys; from pathlib import Path; from stages.read.torch_pickle import open_file; "
    script += "open_file(Path(sys.argv[1])); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "m.bin"], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
