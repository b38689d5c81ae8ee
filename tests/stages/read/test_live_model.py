"""read: the tensors of a model in memory are those of the directory that save_pretrained writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from pipeline.model.dtypes import TABLE, DType
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.sinks.output_checks import check_source
from pipeline.tensor.tensors import Source
from stages.read import open_source
from stages.read.live_model import open_model
from tests.support.live_models import DTYPES, SIZES, arrays, build, same, stand_in

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


def described(source: Source) -> ModelConfig:
    family = find_family("huggingface", source.architecture) or find_family("huggingface", "LlamaForCausalLM")
    assert family
    return model_config(source.config, family, source.architecture, source.config_name)


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


def test_codes_of_quantized_tensors_stay_as_they_are() -> None:
    state = {"a.weight": torch.arange(6, dtype=torch.uint8), "b.weight": torch.arange(-3, 3, dtype=torch.int8)}
    source = open_model(stand_in(state))
    assert all(same(array, state[name].numpy()) for name, array in arrays(source).items())
    assert source.dtype is None


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.safetensors)
def test_every_type_of_the_table_is_read_bit_for_bit(row: DType) -> None:
    bits = torch.arange(48, dtype=torch.uint8) % (2 if row.safetensors == "BOOL" else 251)
    matrix = bits.view(getattr(torch, row.numpy.name)).reshape(2, -1)
    found = arrays(open_model(stand_in({"first.weight": torch.zeros(2), "a.weight": matrix, "b.weight": matrix.t()})))
    assert found["a.weight"].dtype == row.numpy
    assert found["a.weight"].tobytes() == bits.numpy().tobytes()
    assert same(found["b.weight"], np.ascontiguousarray(found["a.weight"].T))


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
