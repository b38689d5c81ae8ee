"""One model, whatever it comes in: every kind of source gives the same rank files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zarr
from distributed import LocalCluster

from pipeline import BadInput, convert, plan
from tests.support import checkpoints, gguf_files, meta_files
from tests.support.directories import contents
from tests.support.places import ROOT

# An odd vocabulary, and fewer kv heads than there are ranks in the widest of these conversions.
CONFIG = {**checkpoints.LLAMA, "vocab_size": 93, "num_key_value_heads": 2}
TYPES = ("float32", "float16")
# What each kind of source is, and which values it can hold.
KINDS = {
    "safetensors shards": TYPES,
    "bin": TYPES,
    "bin shards": TYPES,
    "legacy bin": TYPES,
    "legacy bin shards": TYPES,
    "meta 1": TYPES,
    "meta 2": TYPES,
    "meta 4": TYPES,
    "meta 2 directories": TYPES,
    "live": TYPES,
    "gguf F32": TYPES,
    "gguf F16": ("float16",),
}


def config_of(dtype: str) -> dict[str, Any]:
    return {**CONFIG, "torch_dtype": dtype}


def write_bin(directory: Path, config: dict[str, Any], source: Mapping[str, np.ndarray], shards: int, zipped: bool) -> None:
    """Save a checkpoint as transformers 4 did, in torch's current format or the one before."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: meta_files.tensor(array) for name, array in source.items()}
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    weight_map = {}
    for n in range(shards):
        part, file = dict(list(tensors.items())[n::shards]), f"pytorch_model-{n + 1:05}-of-{shards:05}.bin"
        torch.save(part, directory / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def live(config: dict[str, Any], source: Mapping[str, np.ndarray]) -> Any:
    """The model in memory, with the values of a checkpoint."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(getattr(torch, config["torch_dtype"]))
    model.load_state_dict({name: meta_files.tensor(array) for name, array in source.items()})
    return model


def make(kind: str, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the model as a source of `kind`; returns the arguments of `convert` that name it."""
    source = checkpoints.values(config)
    family, *rest = kind.split()
    if kind == "live":
        return {"model": live(config, source)}
    if family == "meta":
        meta_files.write(path, config, source, int(rest[0]), vocabulary=rest[0] == "4", files=2 if "directories" in rest else 0)
        return {"meta_ckpt_dir": path}
    if family == "gguf":
        path = path.with_suffix(".gguf")
        gguf_files.write(path, config, source, rest[0])
    elif "bin" in kind:
        write_bin(path, config, source, 3 if "shards" in rest else 1, family != "legacy")
    else:
        checkpoints.save(path, config, source, shards=3 if rest else 1)
    return {"model_dir": path}


def ranks(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name.startswith("rank")}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, bytes]]:
    """The rank files of one safetensors file: by the type of its values, and that of the target."""
    result = {}
    for held in TYPES:
        folder = tmp_path_factory.mktemp("reference")
        checkpoints.write(folder / "model", config_of(held))
        for dtype in ("float32", "float16", "bfloat16"):
            convert(model_dir=folder / "model", output_dir=folder / dtype, tp_size=2, dtype=dtype, scheduler="threads")
            result[held, dtype] = ranks(folder / dtype)
    return result


@pytest.mark.parametrize(("kind", "held"), [(kind, held) for kind, types in KINDS.items() for held in types])
def test_every_kind_of_source_gives_the_same_ranks(
    kind: str, held: str, references: dict[tuple[str, str], dict[str, bytes]], tmp_path: Path
) -> None:
    source = make(kind, tmp_path / "model", config_of(held))
    for dtype in ("float32", "float16", "bfloat16"):
        convert(**source, output_dir=tmp_path / dtype, tp_size=2, dtype=dtype, scheduler="threads")
        assert ranks(tmp_path / dtype) == references[held, dtype], dtype


def test_a_live_model_has_the_configuration_of_its_directory(tmp_path: Path) -> None:
    model = live(config_of("float16"), checkpoints.values(config_of("float16")))
    model.save_pretrained(tmp_path / "saved")
    options = {"tp_size": 4, "pp_size": 3, "scheduler": "threads"}
    convert(model=model, output_dir=tmp_path / "live", **options)
    convert(model_dir=tmp_path / "saved", output_dir=tmp_path / "file", **options)
    assert contents(tmp_path / "live") == contents(tmp_path / "file")


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "tie_word_embeddings": False,
    },
}


def with_experts(kind: str, dtype: str = "bfloat16") -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **EXPERTS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(getattr(torch, dtype))


@pytest.mark.parametrize(
    "sizes", [{"tp_size": 1}, {"tp_size": 4, "moe_ep_size": 2}, {"tp_size": 2, "pp_size": 2, "moe_ep_size": 2}]
)
@pytest.mark.parametrize("kind", EXPERTS)
def test_fused_experts_of_a_live_model(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = with_experts(kind)
    stacks = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    assert stacks, "transformers 5 keeps a layer's experts in one parameter"
    model.save_pretrained(tmp_path / "saved")
    for name, source in (("live", {"model": model}), ("file", {"model_dir": tmp_path / "saved"})):
        convert(**source, output_dir=tmp_path / name, **sizes, scheduler="threads")
    assert contents(tmp_path / "live") == contents(tmp_path / "file")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A scheduler whose workers are other processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        yield running.scheduler_address


@pytest.mark.parametrize("kind", ["Llama", "Mixtral", "Qwen2Moe"])
def test_a_live_model_reaches_workers_elsewhere_through_scratch(kind: str, cluster: str, tmp_path: Path) -> None:
    config = config_of("float16")
    model = live(config, checkpoints.values(config)) if kind == "Llama" else with_experts(kind)
    options = {"model": model, "tp_size": 2, "pp_size": 2}
    convert(**options, output_dir=tmp_path / "here", scheduler="threads")
    result = convert(**options, output_dir=tmp_path / "there", scheduler=cluster)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert list(result.phases) == ["scratch after read", "write"]
    assert not (tmp_path / ".headrace-scratch").exists(), "scratch is removed after success"


def test_what_is_in_that_scratch(cluster: str, tmp_path: Path) -> None:
    source = checkpoints.values(config_of("float16"))
    options = {"model": live(config_of("float16"), source), "scheduler": cluster, "keep_scratch": True}
    convert(**options, output_dir=tmp_path / "one")
    (directory,) = (tmp_path / ".headrace-scratch").iterdir()
    group = zarr.open(directory, mode="r")
    assert {name: group[name][:].tobytes() for name in group} == {name: array.tobytes() for name, array in source.items()}
    # Another job of the same model reads it.
    (cut,) = plan(**options, output_dir=tmp_path / "two", tp_size=2).summary()["scratch"]
    assert (cut["path"], cut["reused"]) == (str(directory), True)


@pytest.mark.parametrize("after", ["auto", "none", "read", "rename,unpack", "shard"])
def test_other_cuts_beside_it(after: str, cluster: str, tmp_path: Path) -> None:
    source = checkpoints.values(config_of("float16"))
    options = {"model": live(config_of("float16"), source), "tp_size": 2}
    convert(**options, output_dir=tmp_path / "here", scheduler="threads")
    result = convert(**options, output_dir=tmp_path / "there", scheduler=cluster, scratch_after=after)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    named = [f"scratch after {stage}" for stage in after.split(",") if stage not in ("auto", "none", "read")]
    assert list(result.phases) == ["scratch after read", *named, "write"]


def test_the_plan_says_why_a_live_model_is_cut(tmp_path: Path) -> None:
    model = live(config_of("float16"), checkpoints.values(config_of("float16")))
    nbytes = sum(array.nbytes for array in checkpoints.values(config_of("float16")).values())
    # Nothing of the cluster is asked for until the plan is carried out.
    summary = plan(model=model, output_dir=tmp_path / "out", scheduler="tcp://127.0.0.1:1").summary()
    assert [phase["name"] for phase in summary["phases"]] == ["scratch after read", "write"]
    assert [(cut["stage"], cut["bytes"]) for cut in summary["scratch"]] == [("read", nbytes)]
    reasons = summary["scratch_reasons"]
    why = "as the model is in this process and the workers are elsewhere"
    assert reasons["read"] == f"cut: {nbytes:,} bytes written, {why}"
    assert all(reasons[stage].startswith("no cut: ") for stage in ("rename", "unpack", "shard"))
    assert summary["source"]["kind"] == "Hugging Face model in memory"
    for scheduler in ("threads", "local", "synchronous"):
        here = plan(model=model, output_dir=tmp_path / "out", scheduler=scheduler).summary()
        assert here["scratch"] == []
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_a_live_model_is_up_to_date_until_a_parameter_changes(tmp_path: Path) -> None:
    model = live(config_of("float16"), checkpoints.values(config_of("float16")))
    options = {"output_dir": tmp_path / "out", "tp_size": 2, "scheduler": "threads"}
    convert(model=model, **options)
    before = contents(tmp_path / "out")
    again = live(config_of("float16"), checkpoints.values(config_of("float16")))
    for same in (model, again):
        assert convert(model=same, **options).up_to_date
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] += 1
    assert not plan(model=model, **options).up_to_date
    with pytest.raises(BadInput, match="--overwrite"):
        convert(model=model, **options)
    assert contents(tmp_path / "out") == before
    assert not convert(model=model, **options, overwrite=True).up_to_date
    assert contents(tmp_path / "out") != before


def test_a_live_model_is_one_source(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", CONFIG)
    model = live(config_of("float16"), checkpoints.values(config_of("float16")))
    for more in ({"model_dir": tmp_path / "model"}, {"meta_ckpt_dir": tmp_path / "model"}):
        with pytest.raises(BadInput, match="a second source beside a model in memory"):
            convert(model=model, output_dir=tmp_path / "out", **more)
    with pytest.raises(BadInput, match="--quant_ckpt_path"):
        convert(model=model, output_dir=tmp_path / "out", quant_ckpt_path=tmp_path / "model")
    with pytest.raises(BadInput, match=r"an object of type builtins\.str"):
        convert(model="name", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


IMPORTS = """
import json, sys
import pipeline
found = [sorted({"torch", "transformers"} & sys.modules.keys())]
for options in json.loads(sys.argv[1]):
    pipeline.plan(**options).summary()
    pipeline.convert(**options)
    found.append(sorted({"torch", "transformers"} & sys.modules.keys()))
print(json.dumps(found))
"""


def test_neither_torch_nor_transformers_is_imported_for_files(tmp_path: Path) -> None:
    jobs = []
    for kind in ("safetensors", "bin", "legacy bin shards", "meta 2", "gguf F16"):
        source = make(kind, tmp_path / kind, config_of("float16"))
        output = str(tmp_path / f"{kind} out")
        jobs.append({name: str(path) for name, path in source.items()} | {"output_dir": output, "scheduler": "threads"})
    ran = subprocess.run([sys.executable, "-c", IMPORTS, json.dumps(jobs)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[]] * (1 + len(jobs))
