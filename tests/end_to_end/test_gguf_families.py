"""Families with a GGUF architecture of their own: the bytes of the checkpoint that a file holds, verified, with its logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pipeline import convert
from pipeline.errors import BadInput
from pipeline.planning.job import make_job
from pipeline.planning.make_plan import make_plan
from pipeline.reporting.verification import verify
from stages.verify.forward.reference import set_head_epsilon
from tests.end_to_end.test_family_forward import CASES, CONTRADICTED, TOLERANCE, Case, build, difference, logits
from tests.pipeline.reporting import test_verify_families as verified
from tests.support import checkpoints, gguf_families
from tests.support.directories import contents
from tests.support.own_names import internlm2

GEMMA = {"query_pre_attn_scalar": 40}  # of all Gemma models here, whose size tells nothing
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 30.0, "rope_theta": 1e6}
FAMILIES: Mapping[str, Case] = {
    **{name: CASES[name] for name in ("qwen2", "qwen2_tied", "qwen2_moe", "qwen3", "qwen3_tied")},
    **{name: CASES[name] for name in ("phi3", "phi3_long", "phi3_partial", "phi3_window")},
    **{name: CASES[name] for name in ("gemma", "gemma2", "gemma2_window", "gemma3", "granite", "granite_tied", "mistral")},
    "qwen2_yarn": Case(CASES["qwen2"].config, CASES["qwen2"].model, {"rope_parameters": YARN}),
    "qwen3_moe": CONTRADICTED["qwen3_moe_normalized"],
    "internlm2": CASES["llama"],
}
PATTERN = {"attention.sliding_window_pattern": 2}  # of the Gemma 3 here: others have 6
# Those of whose architecture transformers reads GGUF files.
READ = (*(name for name in FAMILIES if name.startswith(("qwen", "phi3"))), "gemma2", "gemma2_window", "gemma3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each family's model as transformers saves it in bfloat16, made when it is first asked for."""

    class Models(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            directory = tmp_path_factory.mktemp(name) / "model"
            build(FAMILIES[name]).to(torch.bfloat16).save_pretrained(directory)
            if name == "internlm2":
                config = json.loads((directory / "config.json").read_text())
                checkpoints.save(directory, *internlm2(config, gguf_families.read_tensors(directory)))
            self[name] = directory
            return directory

    return Models()


def write(path: Path, directory: Path, kind: str, name: str) -> Any:
    metadata = PATTERN if name == "gemma3" else {}
    return gguf_families.write(path, directory, kind, metadata=metadata, vectors=("ffn_gate_inp_shexp",) if kind == "F32" else ())


def options(name: str, **more: Any) -> dict[str, Any]:
    return {"tp_size": 2, "scheduler": "synchronous", **(GEMMA if name[:6] in ("gemma2", "gemma3") else {}), **more}


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("F16", "F32"))])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_checkpoint_that_it_holds(name: str, kind: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", models[name], kind, name)
    gguf_families.save_twin(tmp_path / "twin", models[name], held)
    for source in ("model.gguf", "twin"):
        convert(model_dir=tmp_path / source, output_dir=tmp_path / f"{source}-ranks", dtype="bfloat16", **options(name))
    ours, theirs = (tmp_path / f"{source}-ranks" for source in ("model.gguf", "twin"))
    for rank in range(2):
        assert (ours / f"rank{rank}.safetensors").read_bytes() == (theirs / f"rank{rank}.safetensors").read_bytes(), rank
    assert described(ours) == described(theirs)


def described(ranks: Path) -> dict[str, Any]:
    """config.json; TensorRT-LLM's Gemma computes one function for both names of its activation, of which GGUF has neither."""
    config: dict[str, Any] = json.loads((ranks / "config.json").read_text())
    return {**config, "hidden_act": config["hidden_act"].removesuffix("_pytorch_tanh")}


def read_by_transformers(path: Path, directory: Path) -> Any:
    """The weights of a GGUF file by transformers' own reader, in the model of `directory`: it takes few keys of a configuration."""
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ranks_compute_what_the_model_computes(name: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    """Where transformers reads the file itself, what it makes of it; else the model that the file was made of."""
    write(tmp_path / "model.gguf", models[name], "F32", name)
    convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "ranks", dtype="float32", **options(name))
    if name in READ:
        model = read_by_transformers(tmp_path / "model.gguf", models[name])
    elif name == "internlm2":
        model = build(FAMILIES[name])
        model.load_state_dict({key: values.bfloat16().float() for key, values in model.state_dict().items()})
    else:
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32, attn_implementation="eager")
    set_head_epsilon(model, 1e-5)
    tokens = torch.randint(99, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = model.eval()(tokens[None]).logits[0]
    assert difference(logits(tmp_path / "ranks", tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("BF16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_verified_with_their_logits(name: str, kind: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", models[name], kind, name)
    check(tmp_path, options(name), {"dense"})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in verified.FAMILIES])
def test_packed_weights_are_quantized_again(name: str, tmp_path: Path) -> None:
    build(verified.sized(name)).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    write(tmp_path / "model.gguf", tmp_path / "model", "Q8_0", name)
    check(tmp_path, options(name, use_weight_only=True), {"dense", "weight-only"})


def check(directory: Path, given: dict[str, Any], stored: set[str]) -> None:
    convert(model_dir=directory / "model.gguf", output_dir=directory / "ranks", dtype="bfloat16", **given)
    result = verify(directory / "ranks", directory / "model.gguf", logits=True, tokens=11)
    result.check()
    summary = result.summary()
    assert summary["logits"]["comparisons"][-1]["max_relative"] < 1e-5
    assert {row["storage"] for row in summary["round_trip"]["tensors"]} == stored


def test_blocks_of_256_are_those_that_the_gguf_package_unpacks(tmp_path: Path) -> None:
    """The package cannot pack Q4_K: random codes, with scales of a weight's size."""
    build(Case(CASES["qwen3"].config, CASES["qwen3"].model, {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})).to(
        torch.bfloat16
    ).save_pretrained(tmp_path / "model")
    random = np.random.default_rng(3)

    def packed(array: np.ndarray) -> np.ndarray:
        blocks = random.integers(0, 256, (*array.shape[:-1], array.shape[-1] // 256, 144), dtype=np.uint8)
        blocks[..., :4] = random.uniform(1e-4, 1e-3, (*blocks.shape[:-1], 2)).astype(np.float16).view(np.uint8)
        return blocks.reshape(*array.shape[:-1], -1)

    held = gguf_families.write(tmp_path / "model.gguf", tmp_path / "model", "Q4_K", packed=packed)
    gguf_families.save_twin(tmp_path / "twin", tmp_path / "model", held)
    check(tmp_path, options("qwen3"), {"dense"})
    convert(model_dir=tmp_path / "twin", output_dir=tmp_path / "theirs", dtype="bfloat16", **options("qwen3"))
    for rank in range(2):
        file = f"rank{rank}.safetensors"
        assert (tmp_path / "ranks" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


REFUSED = {
    "granite without positions": ("granite", {"rope.scaling.finetuned": False}, r"rope\.scaling\.finetuned: found False"),
    "granite without a scale of scores": ("granite", {"attention.scale": None}, r"attention\.scale: found 0\.0"),
    "mistral3 with a temperature": ("mistral", {"attention.temperature_scale": 0.1}, r"attention\.temperature_scale: found 0\.1"),
    "qwen2 with half heads turned": ("qwen2", {"rope.dimension_count": 8}, r"rope\.share: found 0\.5"),
    "qwen2 that sees what comes": ("qwen2", {"attention.causal": False}, r"attention\.causal: found False"),
    "qwen3 with a sigmoid router": ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func: found 2"),
    "qwen3 with scaled experts": ("qwen3_moe", {"expert_weights_scale": 2.5}, r"expert_weights_scale: found 2\.5"),
    "phi3 with a factor of its own": ("phi3_long", {"rope.scaling.attn_factor": 1.7}, r"attention_factor: found 1\.7"),
    "gemma2 of no published size": ("gemma2", {}, "query_pre_attn_scalar: found none, and block_count 2, .*Give --query_pre_attn"),
    "gemma3 of no published size": (
        "gemma3",
        PATTERN,
        "query_pre_attn_scalar: found none, and block_count 2, .*Give --query_pre_attn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_class_would_compute_otherwise_is_refused(case: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    name, metadata, message = REFUSED[case]
    gguf_families.write(tmp_path / "model.gguf", models[name], metadata=metadata)
    with pytest.raises(BadInput, match=message):
        convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "ranks", scheduler="synchronous")
    assert not (tmp_path / "ranks").exists()


def test_the_size_of_a_published_model_says_what_scores_are_divided_by(tmp_path: Path) -> None:
    """Gemma 3 270M's, with a vocabulary and an MLP that are small."""
    sizes = {"num_hidden_layers": 18, "hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    case = Case(CASES["gemma3"].config, CASES["gemma3"].model, {**CASES["gemma3"].options, **sizes, "sliding_window_pattern": 6})
    build(case).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    gguf_families.write(tmp_path / "model.gguf", tmp_path / "model")
    plan = make_plan(make_job({"model_dir": tmp_path / "model.gguf", "output_dir": tmp_path / "ranks"}))
    assert json.loads(plan.targets[0].output.config)["query_pre_attn_scalar"] == 256
    assert any("query_pre_attn_scalar 256: Gemma 3 270M's" in note for note in plan.notes)


@pytest.mark.parametrize("named", ["model-00001-of-00003.gguf", "model-00003-of-00003.gguf", "."])
def test_a_model_in_parts_is_the_whole_model(named: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    gguf_families.write(tmp_path / "whole.gguf", models["qwen3_moe"], "Q8_0")
    gguf_families.write(tmp_path / "parts" / "model.gguf", models["qwen3_moe"], "Q8_0", parts=3)
    for source, output in ((tmp_path / "whole.gguf", "a"), (tmp_path / "parts" / named, "b")):
        convert(model_dir=source, output_dir=tmp_path / output, **options("qwen3_moe"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
