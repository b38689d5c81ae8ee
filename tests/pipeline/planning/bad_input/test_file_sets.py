"""Two sets of weights in one directory, wrappers' names, what trainers leave behind: each cause is one problem, or a note."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS
from pipeline.planning.job import make_job
from pipeline.planning.make_plan import make_plan
from tests.support import checkpoints
from tests.support.commands import convert, headrace, one, refused

LLAMA = checkpoints.LLAMA
INDEX = "model.safetensors.index.json"


def model_of(tmp_path: Path, *, shards: int = 1, rename: Any = None, **changed: Any) -> Path:
    """A checkpoint of LLAMA with other values of config.json, and with its tensors under other names."""
    model = tmp_path / "model"
    checkpoints.write(model, LLAMA, shards=shards)
    (model / "config.json").write_text(json.dumps({**LLAMA, **changed}))
    if rename:
        stored = load_file(model / "model.safetensors")
        save_file({rename(name): values for name, values in stored.items()}, model / "model.safetensors", metadata={"format": "pt"})
    return model


def notes(model: Path, tmp_path: Path) -> str:
    plan = make_plan(make_job({"model_dir": model, "output_dir": tmp_path / "planned", "scratch_after": "none"}))
    return "\n".join(plan.notes)


def same_as_plain(model: Path, tmp_path: Path) -> bool:
    """Whether a model is converted to the same bytes as the plain one, and verified against itself."""
    checkpoints.write(tmp_path / "plain", LLAMA)
    assert convert(tmp_path / "plain", tmp_path / "expected").code == 0
    ran = convert(model, tmp_path / "out")
    assert ran.code == 0, ran
    assert headrace("verify", tmp_path / "out", "--source", model, "--quiet").code == 0
    return all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
        for name in ("rank0.safetensors", "config.json")
    )


def inner(name: str) -> str:
    return name.replace("model.", "model.language_model.") if name.startswith("model.") else name


RENAMED: dict[str, Any] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "language_model.": lambda name: f"language_model.{name}",
    "any.0.thing.": lambda name: f"any.0.thing.{name}",
    "model.language_model.": inner,
    "without model.": lambda name: name.removeprefix("model."),
    "inside": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP": lambda name: name.replace("layers.1.mlp.", "layers.1._fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("case", RENAMED)
def test_the_names_of_a_wrapper_are_taken_off_with_a_note(tmp_path: Path, case: str) -> None:
    model = model_of(tmp_path, rename=RENAMED[case])
    assert "names: " in notes(model, tmp_path)
    assert same_as_plain(model, tmp_path)


def test_names_that_are_known_stay_and_nothing_is_said(tmp_path: Path) -> None:
    assert "names: " not in notes(model_of(tmp_path), tmp_path)


def test_a_tied_model_whose_names_all_begin_alike_is_no_wrapped_one(tmp_path: Path) -> None:
    model = model_of(tmp_path, tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    save_file({name: each for name, each in stored.items() if name != "lm_head.weight"}, model / "model.safetensors")
    assert "names: " not in notes(model, tmp_path)


@pytest.mark.parametrize("case", ["prefix", "other"])
def test_names_of_another_kind_are_one_problem(tmp_path: Path, case: str) -> None:
    model = model_of(tmp_path, rename=lambda name: f"net.{name[::-1]}" if case == "prefix" else name[::-1])
    problem = one(refused(model))
    assert "tensors" in problem
    assert "none with a name of the family llama" in problem
    assert "such as model.embed_tokens.weight" in problem
    assert ("with the prefix 'net." in problem) == (case == "prefix")
    assert "remove" not in problem


def test_names_that_would_become_one_are_left(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    stored = load_file(model / "model.safetensors")
    save_file({**stored, "_orig_mod.model.norm.weight": stored["model.norm.weight"]}, model / "model.safetensors")
    assert one(refused(model)).startswith("_orig_mod.model.norm.weight: found a tensor that belongs nowhere")


def test_no_first_remedy_loses_a_tensor(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    stored = load_file(model / "model.safetensors")
    save_file({**stored, "model.extra.weight": stored["model.norm.weight"]}, model / "model.safetensors")
    assert "would be lost: mend the configuration, or" in one(refused(model))


# Two sets of files.


def copy_as(model: Path, **names: str) -> None:
    for old, new in names.items():
        shutil.copy(model / f"{old}.safetensors", model / f"{new}.safetensors")


def test_files_beside_those_of_the_index_are_noted(tmp_path: Path) -> None:
    model = model_of(tmp_path, shards=2)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "consolidated.safetensors")
    told = notes(model, tmp_path)
    assert "consolidated.safetensors (1 file) beside model-*-of-00002.safetensors (2 files) are not read" in told


def test_one_file_beside_shards_is_two_sets(tmp_path: Path) -> None:
    model = model_of(tmp_path, shards=2)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model.safetensors")
    for _ in range(2):
        problem = one(refused(model))
        assert "two sets of weights" in problem
        assert "model-*-of-00002.safetensors (2 files)" in problem
        assert "model.safetensors (1 file)" in problem
        (model / INDEX).unlink(missing_ok=True)


def test_a_stale_index_is_named_with_both_sets(tmp_path: Path) -> None:
    model = model_of(tmp_path, shards=3)
    plain = model_of(tmp_path / "other")
    for path in model.glob("model-*"):
        path.unlink()
    shutil.copy(plain / "model.safetensors", model / "model.safetensors")
    problem = one(refused(model))
    assert problem.startswith(
        f"{model / INDEX}: found an index of model-*-of-00003.safetensors (3 files), not there, beside model.saf"
    )


def test_two_sets_without_an_index_are_one_problem(tmp_path: Path) -> None:
    model = model_of(tmp_path, shards=2)
    (model / INDEX).unlink()
    plain = model_of(tmp_path / "other")
    shutil.copy(plain / "model.safetensors", model / "consolidated.safetensors")
    report = refused(model)
    assert len(report) <= 2
    assert all("tensors in both consolidated.safetensors and model-*-of-00002.safetensors, such as" in each for each in report)


def test_missing_shards_are_known_by_the_others_numbers(tmp_path: Path) -> None:
    model = model_of(tmp_path, shards=3)
    (model / INDEX).unlink()
    (model / "model-00002-of-00003.safetensors").unlink()
    problem = one(refused(model))
    assert problem.startswith(f"{model / 'model-00002-of-00003.safetensors'}: found no such file; expected all 3 files")


# Containers that are known and not read.

CONTAINERS = {
    "zero-directory": ("pytorch_model.bin/pytorch_model-00001-of-00001.bin",),
    "dcp": ("pytorch_model_fsdp_0/__0_0.distcp",),
    "zero": ("global_step10/mp_rank_00_model_states.pt",),
    "mistral": ("params.json", "consolidated.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "flax": ("flax_model.msgpack",),
    "tensorflow": ("tf_model.h5",),
}


@pytest.mark.parametrize("configured", [True, False], ids=["with config.json", "without"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_is_not_read_is_named_with_what_makes_one(tmp_path: Path, name: str, configured: bool) -> None:
    row = load_table(CONFIGS / "formats", "containers")[name]
    for file in CONTAINERS[name]:
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / file).write_bytes(b"{}")
    if configured:
        (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    problem = one(refused(tmp_path / "model"))
    assert row["title"] in problem
    assert row["remedy"] in problem


def test_every_container_is_tried() -> None:
    assert CONTAINERS.keys() == load_table(CONFIGS / "formats", "containers").keys()


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_that_are_read_go_before(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path)
    for file in CONTAINERS[name]:
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_bytes(b"{}")
    assert convert(model, tmp_path / "out").code == 0


def test_adapters_that_are_not_merged_are_one_problem(tmp_path: Path) -> None:
    model = model_of(tmp_path, rename=lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))
    stored = load_file(model / "model.safetensors")
    stored["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.ones((4, 64), np.float16)
    save_file(stored, model / "model.safetensors")
    problem = one(refused(model))
    assert "4 tensors of LoRA modules of PEFT" in problem
    assert "merge_and_unload" in problem


def test_weights_that_zero_3_left_empty_are_one_problem(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    stored = load_file(model / "model.safetensors")
    save_file(
        {name: np.zeros(0, np.float16) if "proj" in name else each for name, each in stored.items()}, model / "model.safetensors"
    )
    assert "21 of 30 tensors without values (shape [0]), as ZeRO-3 leaves them" in one(refused(model))


# What the configuration says, and what the tensors are.


@pytest.mark.parametrize(
    "said", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, {"quant_method": "new"}, "awq"]
)
def test_settings_that_a_merge_left_behind_are_left_aside(tmp_path: Path, said: Any) -> None:
    model = model_of(tmp_path, quantization_config=said)
    assert "quantization_config of config.json (" in notes(model, tmp_path)
    assert same_as_plain(model, tmp_path)


@pytest.mark.parametrize("said", [{"quant_method": "bitnet"}, {"quant_method": "x", "transform_config": {"a": 1}}])
def test_settings_by_which_plain_weights_are_others_are_refused(tmp_path: Path, said: Any) -> None:
    assert any("quantization_config" in each for each in refused(model_of(tmp_path, quantization_config=said)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tied_copy_of_another_type_is_one_if_its_values_are_equal(tmp_path: Path, dtype: Any) -> None:
    model = model_of(tmp_path, tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].astype(dtype)
    save_file(stored, model / "model.safetensors")
    assert convert(model, tmp_path / "out").code == 0
    stored["lm_head.weight"][5, 7] += 0.0625
    save_file(stored, model / "model.safetensors")
    problem = one(refused(model, output=tmp_path / "again"))
    assert problem.startswith("lm_head.weight: found other values, though the configuration says tied")
    assert problem.index("Set tie_word_embeddings to false") < problem.index("leave the copy out")


def test_a_tied_copy_in_bfloat16(tmp_path: Path) -> None:
    model = model_of(tmp_path, tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    stored["lm_head.weight"] = (stored["model.embed_tokens.weight"] * 0 + 2).astype(ml_dtypes.bfloat16)
    stored["model.embed_tokens.weight"] = stored["lm_head.weight"].astype(np.float16)
    save_file(stored, model / "model.safetensors")
    assert convert(model, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    "buffer",
    [f"model.layers.0.self_attn.{name}" for name in ("rotary_emb.cos_cached", "rotary_emb.sin_cached", "masked_bias", "bias")]
    + ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"],
)
def test_buffers_that_old_writers_saved_are_no_strangers(tmp_path: Path, buffer: str) -> None:
    model = model_of(tmp_path)
    stored = load_file(model / "model.safetensors")
    save_file({**stored, buffer: np.ones((1, 1, 4), np.float32)}, model / "model.safetensors")
    assert same_as_plain(model, tmp_path)


def test_a_configuration_of_the_first_checkpoints(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    rest = {key: value for key, value in LLAMA.items() if key not in ("max_position_embeddings", "architectures")}
    said = {**rest, "architectures": ["LLaMAForCausalLM"], "max_sequence_length": LLAMA["max_position_embeddings"]}
    (model / "config.json").write_text(json.dumps(said))
    assert same_as_plain(model, tmp_path)


def test_keys_that_transformers_has_values_for_may_be_missing_and_a_note_says_so(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    said = {key: value for key, value in LLAMA.items() if key not in ("hidden_act", "rms_norm_eps", "max_position_embeddings")}
    (model / "config.json").write_text(json.dumps(said))
    told = notes(model, tmp_path)
    assert "hidden_act silu: config.json has no hidden_act" in told
    assert "norm_epsilon 1e-06: config.json has no rms_norm_eps" in told
    assert "max_position_embeddings 2048: " in told


@pytest.mark.parametrize(
    ("name", "same"), [("half", "float16"), ("torch.float16", "float16"), ("auto", "float16"), ("torch.half", "float16")]
)
def test_torch_dtype_as_people_write_it(tmp_path: Path, name: str, same: str) -> None:
    model = model_of(tmp_path, torch_dtype=name)
    assert convert(model, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == same


@pytest.mark.parametrize("dtype", ["C64", "F4", "F6_E2M3", "NEW"])
def test_a_type_of_safetensors_that_is_not_read_is_one_problem(tmp_path: Path, dtype: str) -> None:
    model = model_of(tmp_path)
    raw = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"] = dtype
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    problem = one(refused(model))
    assert f"and {len(load_names(header)) - 1} more: found dtype '{dtype}'" in problem
    assert ("convert the model that it was made from" in problem) == (dtype != "NEW")


def load_names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]
