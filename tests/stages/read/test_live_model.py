"""read: the tensors of a model in memory are those of the directory that save_pretrained writes."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from pipeline.errors import BadInput
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.sinks.output_checks import check_source
from pipeline.tensor.placement import extent, slices, whole
from pipeline.tensor.tensors import Source
from stages.read import live_model, open_source, read
from stages.read.live_model import LiveTensor, open_model
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.places import ROOT
from tests.support.strategies import regions, shapes

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("Llama", {"rope_parameters": SCALED}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
}
DTYPES = ("float32", "float16", "bfloat16")


def build(kind: str, dtype: str = "float32", **options: Any) -> Any:
    """A seeded model of a few hundred thousand parameters; biases and norms, which start as constants, are random too."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(getattr(torch, dtype))


def stand_in(state: Mapping[str, Any], **config: Any) -> Any:
    """The least that is taken for a model: tensors by name, and a configuration."""
    keys = {"architectures": ["LlamaForCausalLM"], **config}
    return SimpleNamespace(state_dict=lambda **_: dict(state), config=SimpleNamespace(to_dict=lambda: keys))


def arrays(source: Source) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.block(whole(tensor.shape))) for name, tensor in source.tensors.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def described(source: Source) -> ModelConfig:
    family = find_family("huggingface", source.architecture) or find_family("huggingface", "LlamaForCausalLM")
    assert family
    return model_config(source.config, family, source.architecture, source.config_name)


def refusals(model: Any) -> dict[str, str]:
    """What is found wrong, by subject."""
    with pytest.raises(BadInput) as caught:
        open_model(model)
    return {problem.subject: problem.found for problem in caught.value.problems}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_it_is_the_directory_that_the_model_is_saved_to(name: str, dtype: str, tmp_path: Path) -> None:
    kind, options = DENSE[name]
    model = build(kind, dtype, **options)
    source = open_model(model)
    model.save_pretrained(tmp_path)
    saved = open_source(tmp_path)
    live, written = arrays(source), arrays(saved)
    assert live.keys() == written.keys()
    assert [name for name in live if not same(live[name], written[name])] == []
    assert ("lm_head.weight" in live) is not options.get("tie_word_embeddings", False)
    assert (source.container, source.architecture, source.dtype) == (saved.container, saved.architecture, saved.dtype)
    assert source.dtype == dtype
    assert source.nbytes == saved.nbytes
    assert source.config == saved.config
    assert described(source) == described(saved)


def test_opening_leaves_the_model_as_it_was() -> None:
    model = build("Llama", "bfloat16")
    before, state = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    open_model(model)
    assert model.config.to_dict() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_stacked_experts_stay_stacked_and_saving_cuts_them(tmp_path: Path) -> None:
    model = build("Mixtral", "bfloat16", num_local_experts=4)
    source = open_model(model)
    model.save_pretrained(tmp_path)
    live, saved = arrays(source), arrays(open_source(tmp_path))
    inner, hidden = SIZES["intermediate_size"], SIZES["hidden_size"]
    assert described(source) == described(open_source(tmp_path))
    # What transformers 5 keeps -> what it saves: the names of the original checkpoint, a tensor an expert.
    for n in range(SIZES["num_hidden_layers"]):
        theirs = f"model.layers.{n}.block_sparse_moe."
        router = live.pop(f"model.layers.{n}.mlp.gate.weight")
        gate_up = live.pop(f"model.layers.{n}.mlp.experts.gate_up_proj.weight")
        down = live.pop(f"model.layers.{n}.mlp.experts.down_proj.weight")
        assert (router.shape, gate_up.shape, down.shape) == ((4, hidden), (4, 2 * inner, hidden), (4, hidden, inner))
        assert same(router, saved.pop(f"{theirs}gate.weight"))
        for e in range(4):
            assert same(gate_up[e, :inner], saved.pop(f"{theirs}experts.{e}.w1.weight"))
            assert same(gate_up[e, inner:], saved.pop(f"{theirs}experts.{e}.w3.weight"))
            assert same(down[e], saved.pop(f"{theirs}experts.{e}.w2.weight"))
    assert live.keys() == saved.keys()
    assert all(same(live[name], saved[name]) for name in live)


@pytest.mark.parametrize("tie", [True, False])
def test_memory_that_names_share_is_read_once_whatever_the_configuration_says(tie: bool, tmp_path: Path) -> None:
    model = build("Llama", tie_word_embeddings=tie)
    model.lm_head.weight = model.model.embed_tokens.weight
    source = open_model(model)
    model.save_pretrained(tmp_path)
    assert source.tensors.keys() == open_source(tmp_path).tensors.keys()
    assert "lm_head.weight" not in source.tensors
    # Equal values in two places are two tensors.
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    assert "lm_head.weight" in open_model(model).tensors


def test_of_names_that_no_table_ties_the_first_stays() -> None:
    whole_, empty = torch.arange(12.0).reshape(3, 4), torch.empty(0, 4)
    state = {"b.weight": whole_, "a.weight": whole_, "part.weight": whole_[:2], "turned.weight": whole_.t()}
    assert list(open_model(stand_in({**state, "e.weight": empty, "f.weight": empty})).tensors) == [
        "b.weight",
        "part.weight",
        "turned.weight",
        "e.weight",
        "f.weight",
    ]


def test_keys_that_are_not_saved_are_not_read(tmp_path: Path) -> None:
    model = build("Llama")
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    source = open_model(model)
    model.save_pretrained(tmp_path)
    assert source.tensors.keys() == open_source(tmp_path).tensors.keys()


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


def test_parameters_on_the_meta_device_are_named() -> None:
    with torch.device("meta"):
        model = build("Llama", num_hidden_layers=1)
    found = refusals(model)
    assert found.keys() == model.state_dict().keys()
    assert set(found.values()) == {"a parameter on the meta device"}
    model = build("Llama")
    model.model.norm.weight = nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises(BadInput, match=r"model\.norm\.weight: .* expected values in memory\. Load the model without offloading"):
        open_model(model)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: "text", "an object of type str"),
        (lambda: torch.zeros(4, dtype=torch.complex64), "values of type complex64"),
        (lambda: torch.zeros(4, 4).to_sparse(), "a tensor of type Tensor and layout torch.sparse_coo"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(make: Callable[[], Any], found: str) -> None:
    state = {"good.weight": torch.zeros(4), "bad.weight": make(), "worse.weight": make()}
    assert refusals(stand_in(state)) == {"bad.weight": found, "worse.weight": found}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_refused() -> None:
    model = build("Llama", num_hidden_layers=1)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,))))
    assert refusals(model) == {"lm_head.weight": "a tensor of type DTensor and layout torch.strided"}


def test_what_is_no_model_is_refused_by_its_type(tmp_path: Path) -> None:
    assert refusals(tmp_path) == {"model": f"an object of type {type(tmp_path).__module__}.{type(tmp_path).__qualname__}"}
    assert refusals(nn.Linear(2, 2)) == {"model": "an object of type torch.nn.modules.linear.Linear"}
    assert refusals(transformers.LlamaForCausalLM) == {"model": "an object of type builtins.type"}


def test_float64_is_refused_as_in_a_directory(tmp_path: Path) -> None:
    model = build("Llama", "float64")
    assert refusals(model) == {"the model's configuration: dtype": "'float64'"}
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="dtype: found 'float64'"):
        open_source(tmp_path)


def test_adapters_are_refused() -> None:
    model = build("Llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.ModuleDict({"base_layer": attention.q_proj, "lora_A": nn.Linear(64, 4)})
    found = refusals(model)
    assert found == {"model.layers.0.self_attn.q_proj.base_layer.weight": "a module with an adapter"}


def test_codes_of_quantized_tensors_stay_as_they_are() -> None:
    state = {"a.weight": torch.arange(6, dtype=torch.uint8), "b.weight": torch.arange(-3, 3, dtype=torch.int8)}
    source = open_model(stand_in(state))
    assert all(same(array, state[name].numpy()) for name, array in arrays(source).items())
    assert source.dtype is None


def test_only_stacks_of_matrices_are_given_a_module() -> None:
    stack, matrix = torch.zeros(2, 3, 4), torch.zeros(3, 4)
    state = {"experts.down_proj": stack, "x.weight": stack + 1, "x.bias": stack + 2, "x.qweight": matrix, "inv_freq": matrix[0]}
    assert list(open_model(stand_in(state)).tensors) == ["experts.down_proj.weight", "x.weight", "x.bias", "x.qweight", "inv_freq"]


def test_the_model_inside_a_wrapper_is_opened() -> None:
    model = build("Llama")
    bare = open_model(model)
    data_parallel = type("DistributedDataParallel", (nn.Module,), {})()
    data_parallel.module = torch.compile(model)
    source = open_model(data_parallel)
    assert (source.architecture, source.config, source.files) == (bare.architecture, bare.config, bare.files)
    sharded = type("FSDPLlamaForCausalLM", (transformers.LlamaForCausalLM,), {})(model.config)
    assert open_model(sharded).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(("architectures", "found"), [(["MistralForCausalLM"], "MistralForCausalLM"), (None, ""), ([], "")])
def test_where_the_class_is_no_models_the_configuration_names_it(architectures: Any, found: str) -> None:
    assert open_model(stand_in({"a.weight": torch.zeros(2)}, architectures=architectures)).architecture == found


def test_a_configuration_becomes_plain_values() -> None:
    # As transformers 4 has it: torch_dtype, and types that JSON does not know.
    config = open_model(stand_in({"a.weight": torch.zeros(2, dtype=torch.float16)}, torch_dtype=torch.float32)).config
    assert config == {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    model = build("Llama", "bfloat16")
    model.config.dtype = torch.float32  # as it was loaded, before the parameters were cast
    config = open_model(model).config
    assert json.loads(json.dumps(config)) == config
    assert (config["dtype"], config["rope_parameters"]["rope_theta"]) == ("bfloat16", 10000.0)


def fingerprint(model: Any) -> str:
    (file,) = open_model(model).files
    return file.header_sha256


def test_any_value_changes_the_fingerprint() -> None:
    model = build("Llama", "bfloat16", num_hidden_layers=1, tie_word_embeddings=True)
    seen = {fingerprint(model)}
    for count, parameter in enumerate(model.parameters(), 2):
        flat = parameter.detach().view(-1)
        flat[len(flat) - 1] += 1
        seen.add(fingerprint(model))
        assert len(seen) == count


def test_the_fingerprint_is_of_values_names_types_shapes_and_configuration(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b.weight": torch.zeros(2)}
    base = fingerprint(stand_in(state))
    turned = state["a.weight"].t().contiguous().t()
    assert fingerprint(stand_in({**state, "a.weight": turned})) == base
    others = [
        stand_in({**state, "c.weight": torch.zeros(0)}),
        stand_in({**state, "a.weight": state["a.weight"].view(torch.float16)}),
        stand_in({**state, "a.weight": state["a.weight"].reshape(3, 2)}),
        stand_in(state, rope_theta=1.0),
    ]
    assert len({base, *map(fingerprint, others)}) == 5
    # A run can be taken up by another process that has loaded the same model.
    model = build("Qwen2", "float16")
    model.save_pretrained(tmp_path)
    (live,) = open_model(model).files
    (loaded,) = open_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)).files
    assert live == loaded
    assert live.size_bytes == open_source(tmp_path).nbytes


def test_no_output_directory_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_model(stand_in({"a.weight": torch.zeros(2)}))
    for directory in (tmp_path, Path(), Path("/"), tmp_path / "model-in-memory", source.location):
        assert check_source(directory, [file.path for file in source.files]) == []
    assert source.files[0].fingerprint()["path"] == "model-in-memory"
    assert source.companions == ()


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
