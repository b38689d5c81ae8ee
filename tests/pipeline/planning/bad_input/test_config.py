"""config.json: incomplete, of wrong types, out of range, not JSON, of an architecture or a quantization that nothing knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.model.tables import families
from tests.support import checkpoints
from tests.support.commands import LOOP_SECONDS, convert, limited, one, refused
from tests.support.places import DATA

LLAMA, MIXTRAL = checkpoints.LLAMA, checkpoints.MIXTRAL
REQUIRED = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "architectures"]


def model_of(tmp_path: Path, config: dict[str, Any], without: tuple[str, ...] = (), **changed: Any) -> Path:
    """A sound checkpoint of `config` whose config.json then has other values."""
    checkpoints.write(tmp_path / "model", config)
    written = {key: value for key, value in {**config, **changed}.items() if key not in without}
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    return tmp_path / "model"


def named(problems: list[str], model: Path, key: str) -> bool:
    """Whether a problem names the file and the key."""
    subjects = [problem.partition(": found ")[0] for problem in problems]
    return any(subject.startswith(f"{model / 'config.json'}: ") and key in subject.rpartition(": ")[2] for subject in subjects)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, LLAMA, without=(key,))
    problem = one(refused(model))
    assert named([problem], model, key)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_a_missing_key_of_a_model_with_experts(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, MIXTRAL, without=(key,))
    assert named(refused(model), model, key)


@pytest.mark.parametrize("name", ["gqa_tp2", "mixtral_tp2ep2", "tied_pp2"])
def test_a_checkpoint_that_is_converted_already(name: str, tmp_path: Path) -> None:
    """Not one in Hugging Face's form that lacks its architectures, and whose ranks are two sets of its tensors."""
    model = shutil.copytree(DATA / "dense" / "expected" / name, tmp_path / "ranks")
    split = json.loads((model / "config.json").read_text())["mapping"]
    problem = one(refused(model))
    assert problem.startswith(f"{model}: found a TensorRT-LLM checkpoint of ")
    assert f", tp_size {split['tp_size']}, pp_size {split['pp_size']}: it is converted already; expected a source" in problem
    assert f"trtllm-build --checkpoint_dir {model}. For other ranks, " in problem


def test_all_missing_keys_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA, without=tuple(key for key in REQUIRED if key != "architectures"))
    problems = refused(model)
    assert all(named(problems, model, key) for key in REQUIRED if key != "architectures")


@pytest.mark.parametrize("without", ["rope_theta", "num_key_value_heads", "tie_word_embeddings", "torch_dtype", "model_type"])
def test_keys_with_a_default_may_be_missing(tmp_path: Path, without: str) -> None:
    config = {**LLAMA, "num_key_value_heads": LLAMA["num_attention_heads"]}
    model = model_of(tmp_path, config, without=(without,))
    assert convert(model, tmp_path / "out").code == 0


WRONG: dict[str, tuple[Any, ...]] = {
    "vocab_size": ("96", None, True, [96], {"a": 1}, 96.5, 0, -96, float("nan"), float("inf")),
    "hidden_size": ("64", 0, -64, 64.5, float("inf")),
    "num_hidden_layers": ("3", 0, -3, 2.5, [3]),
    "num_attention_heads": ("8", 0, -8, 7.5),
    "num_key_value_heads": ("4", 0, -4, [4, 4, 4]),
    "intermediate_size": ("160", 0, -160),
    "max_position_embeddings": ("128", 0, -128, [128]),
    "head_dim": ("8", -8, 7.5),
    "hidden_act": (5, None, ["silu"]),
    "rms_norm_eps": ("1e-5", None, True, float("nan"), float("inf")),
    "rope_theta": ("1e4", [1], float("nan"), float("inf"), 0, -1.0),
    "attention_bias": ("false", 0, "yes"),
    "mlp_bias": ("false", 1),
    "tie_word_embeddings": ("false", 0),
    "rope_scaling": (5, "linear", [], ["ab"], True),
    "rope_parameters": (5, "default", ["ab"]),
    "torch_dtype": ("int8", "float64", 16, ["float16"]),
    "architectures": ([], "LlamaForCausalLM", None, [5], {"a": 1}, [None]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_of_another_type_or_out_of_range(tmp_path: Path, key: str, value: Any) -> None:
    model = model_of(tmp_path, LLAMA, **{key: value})
    assert named(refused(model), model, key)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("value", ["4", 0, -4, 1.5])
def test_wrong_numbers_of_experts(tmp_path: Path, key: str, value: Any) -> None:
    model = model_of(tmp_path, MIXTRAL, **{key: value})
    assert named(refused(model), model, key)


def test_more_experts_a_token_than_there_are(tmp_path: Path) -> None:
    model = model_of(tmp_path, MIXTRAL, num_experts_per_tok=5)
    assert named(refused(model), model, "num_experts_per_tok")


@pytest.mark.parametrize("key", ["num_attention_heads", "num_hidden_layers", "num_local_experts"])
def test_absurd_sizes_end_in_a_report_not_in_a_loop(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, MIXTRAL, head_dim=8, **{key: 2**33})
    ran = limited({"RLIMIT_CPU": LOOP_SECONDS}, "plan", "--model_dir", model, "--output_dir", tmp_path / "out")
    assert ran.code == 2, "killed, as it did not end" if ran.code < 0 else ran
    assert "headrace: " in ran.err


def test_a_head_size_that_does_not_divide(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA, hidden_size=65)
    assert one(refused(model)).startswith(f"{model / 'config.json'}: hidden_size: found 65; expected a multiple of")


@pytest.mark.parametrize("key", [*REQUIRED[:-1], "num_key_value_heads"])
def test_a_size_that_contradicts_the_tensors(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, LLAMA, **{key: LLAMA[key] * 2})
    assert all(problem.startswith(("model.", "lm_head.")) for problem in refused(model))


@pytest.mark.parametrize("text", ["", "{", "not json", "\xff\xfe", "[" * 100_000, '{"a":' * 100_000])
def test_a_configuration_that_is_not_json(tmp_path: Path, text: str) -> None:
    model = model_of(tmp_path, LLAMA)
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert one(refused(model)).startswith(f"{model / 'config.json'}: found text that is not JSON")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("5", "int"), ("null", "NoneType"), ('"a"', "str")])
def test_a_configuration_that_is_no_object(tmp_path: Path, text: str, kind: str) -> None:
    model = model_of(tmp_path, LLAMA)
    (model / "config.json").write_text(text)
    assert one(refused(model)).startswith(f"{model / 'config.json'}: found a JSON {kind}")


def test_no_configuration(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA)
    (model / "config.json").unlink()
    assert one(refused(model)).startswith(f"{model / 'config.json'}: found no such file")


def test_a_configuration_that_is_a_directory(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA)
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert one(refused(model)).startswith(f"{model / 'config.json'}: found ")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "llamaforcausallm", "LlamaModel", ""])
def test_an_unknown_architecture_lists_those_known(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path, LLAMA, architectures=[name])
    problem = one(refused(model))
    assert problem.startswith(f"{model / 'config.json'}: architecture")
    known = [known for family in families() if family.container == "huggingface" for known in family.architectures]
    assert {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"} <= set(known)
    assert all(architecture in problem for architecture in known)


@pytest.mark.parametrize(
    ("settings", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8"}, "fp8"), ({"bits": 4}, "unknown"), ("awq", "awq")],
)
def test_a_quantized_checkpoint_is_refused_by_its_method(tmp_path: Path, settings: Any, method: str) -> None:
    model = model_of(tmp_path, LLAMA, quantization_config=settings)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(model / "model.safetensors")
    save_file({**stored, name: stored[name].astype(np.int8)}, model / "model.safetensors", metadata={"format": "pt"})
    problem = next(each for each in refused(model) if "quantization_config" in each)
    assert problem.startswith(f"{model / 'config.json'}: quantization_config: found quant_method {method}, and no module packed in")
    assert all(known in problem for known in ("GPTQ", "AWQ", "compressed-tensors", "ModelOpt", "fbgemm"))


def test_a_configuration_and_an_output_directory_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA, without=("vocab_size",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    report = "\n".join(refused(model))
    assert "vocab_size: found" in report
    assert "notes.txt" in report
