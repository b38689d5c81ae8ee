"""read, a model in memory: its values are read where they are, whatever their strides, in this process and by its workers."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.tensor.placement import extent, slices, whole
from stages.read import live_model, open_source, read
from stages.read.live_model import LiveTensor, open_model
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.live_models import DTYPES, arrays, build, same
from tests.support.places import ROOT
from tests.support.strategies import regions, shapes


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_read_in_place_and_cannot_be_written(dtype: str) -> None:
    model = build("Llama", dtype)
    source = open_model(model)
    for name, parameter in model.named_parameters():
        values_ = np.asarray(source.tensors[name].block(whole(tuple(parameter.shape))))
        bits = parameter.detach().view(torch.int16 if parameter.itemsize == 2 else torch.int32).numpy()
        assert np.shares_memory(values_, bits)
        assert not values_.flags.writeable


def test_a_pickled_tensor_is_the_same_memory() -> None:
    model = build("Llama", "bfloat16")
    source = open_model(model)
    before = source.tensors["lm_head.weight"]
    pickled = pickle.dumps(before)
    assert len(pickled) < 256
    parameter = model.lm_head.weight.detach().view(torch.int16).numpy()
    for tensor in (pickle.loads(pickled), copy.deepcopy(before)):
        assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype) == ((96, 64), ml_dtypes.bfloat16)
        assert np.shares_memory(np.asarray(tensor.block(((10, 20), (0, 64)))), parameter[10:20])
    block = pickle.loads(pickle.dumps(before.block(((10, 20), (8, 16)))))
    assert np.shares_memory(block.read(((0, 10), (0, 8))), parameter[10:20, 8:16])


def test_the_workers_of_this_process_read_the_model_itself() -> None:
    from distributed import Client

    model = build("Mistral", "float16")
    tensors = read(open_model(model).tensors, 4096, 8)
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as client:
        array = tensors["model.layers.1.mlp.down_proj.weight"]
        index = (array.name, 1, 0)
        block = client.get({index: array.dask[index]}, index)
        assert np.shares_memory(np.asarray(block), model.model.layers[1].mlp.down_proj.weight.detach().numpy())


def test_dask_arrays_hold_the_values() -> None:
    source = open_model(build("Llama", "bfloat16"))
    expected = arrays(source)
    for name, array in read(source.tensors, 4096, 8).items():
        assert same(values(array), expected[name])


def test_another_process_is_told_what_to_do(tmp_path: Path) -> None:
    source = open_model(build("Llama"))
    (tmp_path / "pickled").write_bytes(pickle.dumps(source.tensors["model.norm.weight"]))
    script = "import pickle, pathlib, sys; pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())"
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "pickled"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "RuntimeError: model.norm.weight: the model lives in another process" in ended.stderr
    assert "cut to scratch" in ended.stderr


def test_a_source_that_was_let_go_says_so() -> None:
    source = open_model(build("Llama"))
    pickled = pickle.dumps(source.tensors["model.norm.weight"])
    del source
    gc.collect()
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight: the model in memory was let go"):
        pickle.loads(pickled)


def test_the_registry_empties_with_the_model() -> None:
    gc.collect()
    before = len(live_model._OPENED)
    model = build("Llama")
    expected = model.lm_head.weight.detach().clone().numpy()
    source = open_model(model)
    # A plan goes on where the caller has let the model go: the source has its values, and these alone.
    del model
    gc.collect()
    tensor = source.tensors["lm_head.weight"]
    assert same(np.asarray(tensor.block(whole(tensor.shape))), expected)
    assert len(live_model._OPENED) == before + 1
    del source, tensor
    gc.collect()
    assert len(live_model._OPENED) == before


@examples(150)
@given(
    st.data(),
    shapes(least=0),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool]),
    st.booleans(),
)
def test_slices_are_those_of_numpy(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, turned: bool) -> None:
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    expected = bits.numpy().view(tensor_type(dtype)).reshape(shape)
    if turned:  # the same values, with the last axis first in memory
        tensor = tensor.movedim(-1, 0).contiguous().movedim(0, -1) if shape else tensor
    outer = data.draw(regions(shape, 0))
    inner = data.draw(regions(extent(outer), 0))
    opened = live_model.OpenedModel({"a": tensor})
    block = LiveTensor(opened, "a").block(outer)
    wanted = expected[slices(outer)][slices(inner)]
    for found in (block.read(inner), np.asarray(block[slices(inner)])):
        assert same(found, wanted)
        if found.size and tensor.is_contiguous():
            assert np.shares_memory(found, bits.numpy())


def tensor_type(dtype: torch.dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def test_a_parameter_that_is_not_contiguous(tmp_path: Path) -> None:
    model = build("Llama", "bfloat16")
    weight = model.model.layers[0].self_attn.k_proj.weight
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(weight.detach().t().contiguous().t())
    assert not model.state_dict()["model.layers.0.self_attn.k_proj.weight"].is_contiguous()
    live = arrays(open_model(model))
    model.save_pretrained(tmp_path)
    assert all(same(live[name], array) for name, array in arrays(open_source(tmp_path)).items())


MEMORY = """
import sys, types
import numpy as np, torch, xxhash
from pipeline.tensor.placement import pieces, whole
from stages.read.live_model import open_model

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

state = {f"{n}.weight": torch.ones(8192, 4096, dtype=torch.bfloat16) for n in range(4)}  # 64 MiB each
state["turned.weight"] = torch.ones(4096, 8192, dtype=torch.bfloat16).t()
config = types.SimpleNamespace(to_dict=lambda: {"architectures": ["LlamaForCausalLM"]})
model = types.SimpleNamespace(state_dict=lambda **_: dict(state), config=config)
open_model(types.SimpleNamespace(state_dict=lambda **_: {"a.weight": torch.ones(8, 8)}, config=config))  # what is imported
before, resident = status("VmHWM"), status("VmRSS")
source = open_model(model)
for name, tensor in source.tensors.items():
    if name != "turned.weight":
        np.asarray(tensor.block(whole(tensor.shape)))
    for region in pieces(whole(tensor.shape), 2, 4 << 20):
        xxhash.xxh3_64(np.ascontiguousarray(tensor.block(region)).view(np.uint8))
print(source.nbytes, before - resident, status("VmHWM") - before)
"""


def test_opening_and_reading_takes_little_memory() -> None:
    # What is freed goes back to the system at once: the allocator would keep a number of pieces that is up to chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ended = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    size, slack, grown = map(int, ended.stdout.split())
    assert size == 5 * 64 << 20
    # The peak before is what is in memory, so that whatever comes on top of it shows.
    assert slack < 8 << 20
    # A few pieces of 4 MiB where a tensor is not contiguous, and nothing elsewhere.
    assert grown < 20 << 20


def test_importing_the_module_imports_no_model_library() -> None:
    script = "import stages.read.live_model, sys; print({'torch', 'transformers', 'dask'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
