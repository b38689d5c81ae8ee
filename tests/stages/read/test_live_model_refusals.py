"""read, a model in memory: parameters without values, sharded ones, adapters and other objects are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from pipeline.errors import BadInput
from stages.read import open_source
from stages.read.live_model import open_model
from tests.support.live_models import build, stand_in


def refusals(model: Any) -> dict[str, str]:
    """What is found wrong, by subject."""
    with pytest.raises(BadInput) as caught:
        open_model(model)
    return {problem.subject: problem.found for problem in caught.value.problems}


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
