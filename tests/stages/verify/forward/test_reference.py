"""The source run layer by layer computes what transformers computes with the whole model in memory."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import BadInput, VerificationFailed
from stages.read import open_model, open_source
from stages.verify.forward import transformers_model
from stages.verify.forward.reference import Reference
from stages.verify.roundtrip.original import Original
from tests.end_to_end.test_family_forward import CASES, CONTRADICTED, SIZES, build, difference, old_style
from tests.support import checkpoints, gguf_files, meta_files, quantized_checkpoints
from tests.support.own_names import exaone, internlm2
from tests.support.places import DATA

ROUNDING = 1e-6  # of the greatest logit: a sum of experts in another order
TURNED = 1e-5  # of models that are run by another class, with heads in its order
GOLDENS = sorted(path.parent for path in DATA.glob("*/models/*/*.json") if path.name in ("config.json", "params.json"))


def prompts(vocabulary: int) -> list[Tensor]:
    """Two, of different lengths: the longer is beyond what long rope was trained on, the other is not."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in (20, 11)]


HEADS = 1e-5  # the epsilon of q and k norms in the models that are built


def run(directory: Path, head_epsilon: float = 0.0) -> Reference:
    original = Original(open_source(directory))
    return Reference(original.config, original, head_epsilon)


def whole(directory: Path) -> Any:
    """The model of a Hugging Face directory, loaded by transformers itself."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def check(ours: Reference, theirs: Any, vocabulary: int) -> None:
    for tokens in prompts(vocabulary):
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
        found = ours.logits(tokens)
        assert found.dtype == torch.float32
        assert difference(found, expected) <= (TURNED if type(ours._model) is not type(theirs) else ROUNDING)


@pytest.mark.parametrize("name", [*CASES, *CONTRADICTED])
def test_every_family_in_both_styles_of_configuration(name: str, tmp_path: Path) -> None:
    model = build({**CASES, **CONTRADICTED}[name])
    model.save_pretrained(tmp_path)
    check(run(tmp_path, HEADS), model, SIZES["vocab_size"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old_style(json.loads(path.read_text()))))
    check(run(tmp_path, HEADS), model, SIZES["vocab_size"])


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "qwen2_moe"])
def test_a_model_in_memory(name: str) -> None:
    model = build(CASES[name])
    original = Original(open_model(model))
    check(Reference(original.config, original), model, SIZES["vocab_size"])


# Early Phi-3 models call long rope so.
def test_su_is_long_rope(tmp_path: Path) -> None:
    model = build(CASES["phi3_long"])
    model.save_pretrained(tmp_path)
    config = old_style(json.loads((tmp_path / "config.json").read_text()))
    config["rope_scaling"]["type"] = "su"
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(run(tmp_path), model, SIZES["vocab_size"])


# Containers and families that transformers does not read: the same model, as it does

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BF16: dict[str, Any] = {**checkpoints.LLAMA, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "head_dim": 8}
SCALED = {**BF16, "rope_scaling": LLAMA3}
MIXTRAL: dict[str, Any] = {**checkpoints.MIXTRAL, "torch_dtype": "float32", "rope_theta": 10000.0}


def spread(config: dict[str, Any]) -> dict[str, Any]:
    """A model's tensors: small enough that no attention is decided by one position."""
    return {name: array * (0.3 if array.ndim > 1 else 1) for name, array in checkpoints.values(config).items()}


def twins(directory: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A Hugging Face model, and its tensors."""
    tensors = {name: array.astype(checkpoints.values(config)[name].dtype) for name, array in spread(config).items()}
    checkpoints.save(directory, config, tensors)
    return whole(directory), tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("renamed", [internlm2, exaone])
def test_families_that_transformers_does_not_know(renamed: Any, tied: bool, tmp_path: Path) -> None:
    biases = {"attention_bias": True} if renamed is internlm2 else {}
    config = {**SCALED, **biases, "tie_word_embeddings": tied}
    model, tensors = twins(tmp_path / "hf", config)
    checkpoints.save(tmp_path / "own", *renamed(config, tensors))
    check(run(tmp_path / "own"), model, config["vocab_size"])


@pytest.mark.parametrize("scaled", [False, True])
def test_meta(scaled: bool, tmp_path: Path) -> None:
    config = SCALED if scaled else BF16
    model, tensors = twins(tmp_path / "hf", config)
    params = {**meta_files.params(config), **({"use_scaled_rope": True} if scaled else {})}
    meta_files.save(tmp_path / "meta", params, meta_files.shares(config, tensors, 2))
    check(run(tmp_path / "meta"), model, config["vocab_size"])


def test_meta_with_a_factor_of_its_own(tmp_path: Path) -> None:
    config = {**BF16, "rope_scaling": {**LLAMA3, "factor": 32.0}}
    model, tensors = twins(tmp_path / "hf", config)
    params = {**meta_files.params(config), "use_scaled_rope": True, "rope_scaling_factor": 32}
    meta_files.save(tmp_path / "meta", params, meta_files.shares(config, tensors))
    check(run(tmp_path / "meta"), model, config["vocab_size"])


@pytest.mark.parametrize("config", [BF16, {**BF16, "tie_word_embeddings": True}, {**BF16, "attention_bias": True}, MIXTRAL])
def test_gguf(config: dict[str, Any], tmp_path: Path) -> None:
    model, tensors = twins(tmp_path / "hf", config)
    gguf_files.write(tmp_path / "model.gguf", config, tensors, "F32")
    check(run(tmp_path / "model.gguf"), model, config["vocab_size"])


def test_gguf_with_scaled_positions(tmp_path: Path) -> None:
    config = {**BF16, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    model, tensors = twins(tmp_path / "hf", config)
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    gguf_files.write(tmp_path / "model.gguf", config, tensors, "F32", metadata=metadata)
    check(run(tmp_path / "model.gguf"), model, config["vocab_size"])


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed fp8", "modelopt awq", "fbgemm"])
def test_quantized_sources_run_as_the_numbers_that_they_stand_for(name: str, tmp_path: Path) -> None:
    config = {**quantized_checkpoints.LLAMA, "num_hidden_layers": 3}
    stands_for = quantized_checkpoints.write(tmp_path / "packed", config, quantized_checkpoints.formats()[name])
    quantized_checkpoints.write_float(tmp_path / "float", config, stands_for)
    check(run(tmp_path / "packed"), whole(tmp_path / "float"), config["vocab_size"])


@pytest.mark.parametrize("directory", GOLDENS, ids=lambda path: path.name)
def test_every_golden_model_runs(directory: Path) -> None:
    ours = run(directory)
    assert ours.logits(torch.arange(5)).isfinite().all()


# What does not fit


class Changed:
    """An Original with some weights left out, added, or of another shape."""

    def __init__(
        self, original: Original, without: tuple[str, ...] = (), shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self.original, self.shapes = original, dict(shapes or {})
        self.left = [name for name in original.names() if name not in without] + [*self.shapes.keys() - set(original.names())]

    def names(self) -> list[str]:
        return self.left

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or self.original.shape(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.original.rows(name, start, stop)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Original:
    directory = tmp_path_factory.mktemp("mixtral")
    checkpoints.write(directory, MIXTRAL)
    return Original(open_source(directory))


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def test_every_weight_that_does_not_fit_is_named(mixtral: Original) -> None:
    missing = (EXPERT, "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
    weights = Changed(mixtral, missing, {"model.layers.0.mlp.gate_proj.weight": (160, 64), "model.embed_tokens.weight": (96, 32)})
    with pytest.raises(VerificationFailed) as caught:
        Reference(mixtral.config, weights)
    found = {problem.subject: problem.found for problem in caught.value.problems}
    assert found == {
        **dict.fromkeys(missing, "no such weight"),
        "model.layers.0.mlp.gate_proj.weight": "a weight that the model has no place for",
        "model.embed_tokens.weight": "shape [96, 32]",
    }


def test_an_expert_of_another_shape_is_named(mixtral: Original) -> None:
    with pytest.raises(VerificationFailed, match=rf"{EXPERT}: found shape \[80, 64\]; expected \[160, 64\]"):
        Reference(mixtral.config, Changed(mixtral, shapes={EXPERT: (80, 64)}))


def test_a_tied_head_that_is_there_is_used(mixtral: Original) -> None:
    """As for every weight: what the source holds is what it means."""
    tokens = torch.arange(7)
    config = {**mixtral.config, "tie_word_embeddings": True}
    expected = Reference(mixtral.config, mixtral).logits(tokens)
    assert torch.equal(Reference(config, mixtral).logits(tokens), expected)
    tied = Reference(config, Changed(mixtral, ("lm_head.weight",))).logits(tokens)
    assert difference(tied, expected) > 0.01


def test_tokens_that_the_model_does_not_have(mixtral: Original) -> None:
    ours = Reference(mixtral.config, mixtral)
    for tokens in (
        torch.tensor([0, 96]),
        torch.tensor([-1]),
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(0, dtype=torch.long),
    ):
        with pytest.raises(IndexError, match="tokens 0 to 95"):
            ours.logits(tokens)


def test_models_and_configurations_that_transformers_does_not_know(mixtral: Original) -> None:
    with pytest.raises(BadInput, match="ArcticForCausalLM, which transformers"):
        Reference({**mixtral.config, "architectures": ["ArcticForCausalLM"]}, mixtral)
    with pytest.raises(BadInput, match=r"configuration: found what transformers .* refuses"):
        Reference({**mixtral.config, "hidden_act": "no such function"}, mixtral)


def test_local_layers_without_a_window_are_no_model_of_transformers(tmp_path: Path) -> None:
    build(CASES["gemma2"]).save_pretrained(tmp_path)
    original = Original(open_source(tmp_path))
    ours = Reference({**original.config, "sliding_window": None}, original)
    with pytest.raises(BadInput, match=r"configuration: found what transformers .* refuses .*sliding_window"):
        ours.logits(prompts(SIZES["vocab_size"])[0])


def test_how_weights_were_stored_is_nothing_to_the_model(mixtral: Original) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    ours = Reference({**mixtral.config, "quantization_config": settings}, mixtral)
    assert not hasattr(ours._model.config, "quantization_config")


def test_buffers_that_nothing_computes_are_refused(mixtral: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4 leaves them on the meta device."""
    monkeypatch.setattr(transformers.MixtralForCausalLM, "_init_weights", lambda *_: None)
    with pytest.raises(BadInput, match=r"model\.rotary_emb\.inv_freq: found a buffer .*transformers 5"):
        Reference(mixtral.config, mixtral)


def test_transformers_is_only_needed_here(mixtral: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match=r"transformers: found not installed .*headrace\[verify\]"):
        Reference(mixtral.config, mixtral)


# In little memory, and without a trace


class Watched(Changed):
    """An Original that notes what is read, and which layers have parameters in memory meanwhile."""

    def __init__(self, original: Original) -> None:
        super().__init__(original)
        self.read: list[tuple[str, int, int]] = []
        self.loaded: set[tuple[str, ...]] = set()
        self.reference: Reference | None = None

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.read.append((name, start, stop))
        if self.reference is not None:
            self.loaded.add(layers_in_memory(self.reference))
        return super().rows(name, start, stop)


def layers_in_memory(ours: Reference) -> tuple[str, ...]:
    held = [name for name, parameter in ours._model.named_parameters() if not parameter.is_meta]
    return tuple(sorted({name.split(".")[2] for name in held if name.startswith("model.layers.")}))


def test_one_layer_is_in_memory_at_a_time_and_each_weight_is_read_once(mixtral: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_model, "BLOCK_BYTES", 64 * 4 * 40)  # 40 rows
    weights = Watched(mixtral)
    weights.reference = ours = Reference(mixtral.config, weights)
    assert weights.read == [("model.norm.weight", 0, 64)]
    ours.logits(torch.tensor([7, 3, 7, 50]))
    assert weights.loaded == {(), ("0",), ("1",), ("2",)}
    assert layers_in_memory(ours) == ()
    embedding = [each for each in weights.read if each[0] == "model.embed_tokens.weight"]
    assert embedding == [("model.embed_tokens.weight", n, n + 1) for n in (3, 7, 50)]
    assert max(stop - start for name, start, stop in weights.read if len(mixtral.shape(name)) > 1) == 40
    for name in set(mixtral.names()) - {"model.embed_tokens.weight"}:
        rows = [row for read, start, stop in weights.read for row in range(start, stop) if read == name]
        assert rows == list(range(mixtral.shape(name)[0])), name


def test_nothing_is_said_and_nothing_changed(tmp_path: Path) -> None:
    """transformers has remarks on every configuration, and writes in what it is given."""
    build(CASES["phi3_long"]).save_pretrained(tmp_path)
    config = old_style(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    original = Original(open_source(tmp_path))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    transformers.logging.set_verbosity_info()
    transformers.logging.add_handler(handler)
    try:
        Reference(original.config, original).logits(torch.arange(20))
        assert not said
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.remove_handler(handler)
        transformers.logging.set_verbosity_warning()
    assert original.config == config
