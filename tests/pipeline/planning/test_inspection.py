"""`headrace inspect`, `families` and `formats`: what a checkpoint is, and what headrace knows, as tables and as JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import stages.quantization.sources
import stages.read
from pipeline import BadInput, plan
from pipeline.model.runtime import runtime
from pipeline.model.tables import CONFIGS
from pipeline.planning.family_table import list_texts
from tests.support import checkpoints, gguf_files, meta_files, quantized_checkpoints
from tests.support.commands import headrace, tree
from tests.support.places import DATA

LLAMA, MIXTRAL = checkpoints.LLAMA, checkpoints.MIXTRAL
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "head_dim": 16, "sliding_window": 32}
TIED = {**LLAMA, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def inspected(path: Path) -> dict[str, Any]:
    """What `inspect --json` says; the directory is as it was."""
    before = tree(path.parent)
    ran = headrace("inspect", path, "--json")
    assert (ran.code, ran.err) == (0, ""), ran
    assert tree(path.parent) == before
    return json.loads(ran.out)


def table(path: Path) -> dict[str, list[str]]:
    """What `inspect` prints: the rows by their label, a row that was wrapped in one line again."""
    ran = headrace("inspect", path)
    assert (ran.code, ran.err) == (0, ""), ran
    lines = ran.out.rstrip().splitlines()
    start = next(line.index(word) for line in lines for word in [line.split(maxsplit=1)[1]] if line.startswith("path"))
    found: dict[str, list[str]] = {}
    label = ""
    for line in lines:
        head, text = line[:start].strip(), line[start:].strip()
        if head:
            label = head
            found.setdefault(label, []).append(text)
        else:
            found[label][-1] += f" {text}"
    return found


def sizes(config: dict[str, Any]) -> dict[str, int]:
    names = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    return {**{name: config[name] for name in names}, "head_size": checkpoints.head_size(config)}


def facts(source: dict[str, np.ndarray]) -> dict[str, Any]:
    """What any unpacked source says of its tensors."""
    by_type: dict[str, int] = {}
    for array in source.values():
        name = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[array.dtype.name]
        by_type[name] = by_type.get(name, 0) + array.nbytes
    return {
        "tensors": len(source),
        "parameters": sum(array.size for array in source.values()),
        "bytes": sum(array.nbytes for array in source.values()),
        "bytes_by_dtype": by_type,
    }


def check(path: Path, expected: dict[str, Any], config: dict[str, Any], positions: int = 128) -> dict[str, Any]:
    """Compare what is said as JSON with what was written; returns what is said beside that."""
    said = inspected(path)
    assert {name: said.pop(name) for name in expected} == expected
    model = said.pop("model")
    assert model.pop("max_position_embeddings") == positions
    experts = {name: model.pop(name) for name in ("num_experts", "experts_per_token") if name in model}
    if config.get("num_local_experts"):
        assert experts == {"num_experts": config["num_local_experts"], "experts_per_token": config["num_experts_per_tok"]}
    else:
        assert not experts
    assert model == sizes(config)
    assert said.pop("pp_sizes") == [1, config["num_hidden_layers"]]
    files = said.pop("files")
    homes = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert {file["file"]: file["bytes"] for file in files} == {file.name: file.stat().st_size for file in homes}
    return said


@pytest.mark.parametrize(
    ("config", "family", "tied"),
    [(LLAMA, "llama", False), (MISTRAL, "mistral", False), (TIED, "llama", True), (MIXTRAL, "mixtral", False)],
    ids=["llama", "mistral", "tied", "mixtral"],
)
def test_a_hugging_face_directory(config: dict[str, Any], family: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "model"
    expected = {
        "path": str(path),
        "kind": "Hugging Face safetensors",
        "architecture": config["architectures"][0],
        "family": family,
        "dtype": config["torch_dtype"],
        "quantization": None,
        "tied_embeddings": tied,
        **facts(checkpoints.write(path, config)),
        "tp_sizes": [1, 2, 4, 8],
        "problems": [],
    }
    rest = check(path, expected, config)
    assert rest.keys() == {"conversions"} | ({"moe_sizes"} if "num_local_experts" in config else set())


def test_what_it_becomes_and_at_which_sizes(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
    checkpoints.write(tmp_path / "model", config)
    ways = {way["options"]: way for way in inspected(tmp_path / "model")["conversions"]}
    assert list(ways) == ["", "--quantization int8", "--quantization int4", "--quantization fp8_rowwise"]
    assert [way["becomes"] for way in ways.values()] == ["float16", "W8A16", "W4A16", "FP8_PER_CHANNEL_PER_TOKEN"]
    assert ways[""]["says"] == "converts at every --tp_size that divides: 1, 2, 4, 8"
    eighth = ways["--quantization int8"]["says"]
    assert eighth.startswith("converts at --tp_size 1, 2, 4, not at 8: at 8 ")
    assert eighth.endswith(" a rank, where the kernels need a multiple of 64")
    for options, way in ways.items():
        for size in (1, 2, 4, 8):
            given = {"quantization": options.split()[1]} if options else {}
            fits = size in way["tp_sizes"]
            try:
                plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=size, **given)
            except BadInput:
                assert not fits, (options, size)
            else:
                assert fits, (options, size)
    shown = table(tmp_path / "model")["converts"]
    assert shown[0] == "as it is, to float16: converts at every --tp_size that divides: 1, 2, 4, 8"
    assert shown[1] == f"--quantization int8, to W8A16: {eighth}"


def test_what_is_refused_as_it_is_may_become_something_else(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
    given = quantized_checkpoints.gptq(index="order")
    quantized_checkpoints.write(tmp_path / "model", config, given)
    ways = {way["options"]: way for way in inspected(tmp_path / "model")["conversions"]}
    assert ways[""]["becomes"] is None
    assert ways[""]["says"].startswith("no: model.layers.0.mlp.down_proj.g_idx: found groups in the order of the activations")
    assert ways["--dequantize"]["becomes"] == "float16"
    assert ways["--requantize --quantization int4_gptq --group_size 128"]["becomes"] == "W4A16_GPTQ"


def test_a_reason_that_all_options_have_is_said_once(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    said = inspected(tmp_path / "model")
    assert [way["becomes"] for way in said["conversions"]] == [None] * 4
    (row,) = table(tmp_path / "model")["converts"]
    assert row.startswith("as it is: no: ")
    assert "rope_scaling.alpha" in row


def test_shards(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", LLAMA, shards=3)
    said = inspected(tmp_path / "model")
    # The index is read, and holds nothing of the model.
    homes = [tmp_path / "model" / name for name in ("config.json", *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)))]
    assert said["files"] == [{"file": home.name, "bytes": home.stat().st_size} for home in homes]
    assert {name: said[name] for name in facts(source)} == facts(source)


def test_pytorch_files(tmp_path: Path) -> None:
    source = checkpoints.values(LLAMA)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    tensors = {name: meta_files.tensor(array) for name, array in source.items()}
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    expected = {"kind": "Hugging Face PyTorch .bin", "family": "llama", "dtype": "float16", **facts(source), "problems": []}
    check(tmp_path / "model", expected, LLAMA)


@pytest.mark.parametrize(("parts", "files"), [(1, 0), (4, 0), (2, 2)])
def test_a_meta_checkpoint(parts: int, files: int, tmp_path: Path) -> None:
    path = tmp_path / "model"
    config = {**LLAMA, "torch_dtype": "bfloat16"}
    source = checkpoints.values(config)
    meta_files.write(path, config, source, parts, files=files)
    said = inspected(path)
    kind = f"Meta checkpoint ({parts} part{'s' if parts > 1 else ''})"
    expected = {"kind": kind, "architecture": "LlamaForCausalLM", "family": "meta_llama", "dtype": "bfloat16", **facts(source)}
    assert {name: said[name] for name in expected} == expected
    assert (said["tied_embeddings"], said["tp_sizes"], said["pp_sizes"], said["problems"]) == (False, [1, 2, 4, 8], [1, 3], [])
    assert said["model"] == {**sizes(LLAMA), "max_position_embeddings": 2048}
    assert len(said["files"]) == 1 + parts * max(files, 1)


@pytest.mark.parametrize(("kind", "quantization"), [("F16", None), ("F32", None), ("Q8_0", "gguf"), ("Q4_0", "gguf")])
def test_a_gguf_file(kind: str, quantization: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, LLAMA, checkpoints.values(LLAMA), kind)
    said = check(path, {"kind": f"GGUF ({kind})", "architecture": "llama", "family": "gguf_llama", "problems": []}, LLAMA)
    assert said["quantization"] == quantization
    assert said["dtype"] == {"F16": "float16", "F32": "float32"}.get(kind)
    assert said["bytes"] == sum(said["bytes_by_dtype"].values()) < path.stat().st_size
    assert (said["tied_embeddings"], said["tp_sizes"]) == (False, [1, 2, 4, 8])


def test_a_gguf_file_with_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, MIXTRAL, checkpoints.values(MIXTRAL))
    said = check(path, {"architecture": "llama+experts", "family": "gguf_mixtral", "problems": []}, MIXTRAL)
    assert said["moe_sizes"]["4"] == [[1, 4], [2, 2], [4, 1]]


# Of each model its family, and what config.json calls the sizes that are not called so everywhere.
FAMILIES = {
    "exaone": ("exaone", {"num_hidden_layers": "num_layers"}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "internlm2": ("internlm2", {}),
    "phi3": ("phi3", {}),
    "phi3_longrope": ("phi3", {}),
    "phimoe": ("phimoe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_tied": ("qwen2", {}),
    "qwen3_untied": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    path = DATA / "families" / "models" / name
    family, names = FAMILIES[name]
    config = json.loads((path / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    said = inspected(path)
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert (said["family"], said["architecture"]) == (family, json.loads((path / "config.json").read_text())["architectures"][0])
    assert (said["tensors"], said["parameters"]) == (len(shapes), sum(map(math.prod, shapes.values())))
    if name == "internlm2":
        (problem,) = said["problems"]
        assert "rope_scaling.alpha: found dynamic without it" in problem
        assert "--rope_scaling none" in problem
    else:
        assert said["problems"] == []
    assert said["model"]["num_hidden_layers"] == said["pp_sizes"][1] or (family.startswith("phi") and said["pp_sizes"] == [1, 1])
    assert said["quantization"] is None
    assert said["dtype"] == (config.get("torch_dtype") or config["dtype"])
    for size in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert said["model"][size] == config[names.get(size, size)], size
    heads = [key for key in shapes if key in ("lm_head.weight", "output.weight")]
    assert said["tied_embeddings"] is not bool(heads)
    assert bool(said["model"].get("num_experts")) is ("moe" in name)
    shown = table(path)
    assert shown["family"] == [f"{family} ({said['architecture']})"]
    assert shown["embeddings"] == ["tied" if said["tied_embeddings"] else "not tied"]


def test_the_table_says_what_the_json_says(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", MIXTRAL)
    shown, said = table(tmp_path / "model"), inspected(tmp_path / "model")
    assert shown["path"][0].replace(" ", "") == str(tmp_path / "model").replace(" ", "")
    assert shown["source"] == ["Hugging Face safetensors, 2 files, 60 tensors, 818.4 KiB"]
    assert shown["family"] == ["mixtral (MixtralForCausalLM)"]
    assert shown["weights"] == [f"{said['parameters']:,} parameters; F16 818.4 KiB; --dtype auto: from float16"]
    assert shown["quantization"] == ["none"]
    assert shown["model"] == [", ".join(f"{name} {value}" for name, value in said["model"].items())]
    assert shown["embeddings"] == ["not tied"]
    assert shown["tp_size"] == ["1, 2, 4, 8"]
    assert shown["pp_size"][0].startswith("1 to 3")
    for size, pairs in said["moe_sizes"].items():
        text = ", ".join(f"{tp} x {ep}" for tp, ep in pairs)
        assert f"tp_size {size}: moe_tp_size x moe_ep_size {text}" in shown["pp_size"][0]


SHAPES: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "one kv head": {**LLAMA, "num_key_value_heads": 1},
    "heads of three": {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 8},
    "odd rows": {**LLAMA, "intermediate_size": 158},
    "nine heads": {**LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 162},
    "experts": MIXTRAL,
    "experts of odd rows": {**MIXTRAL, "intermediate_size": 42},
    "three experts": {**MIXTRAL, "num_local_experts": 3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizes_said_are_those_that_can_be_planned(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    checkpoints.write(tmp_path / "model", config)
    said = inspected(tmp_path / "model")

    def fits(**options: int) -> bool:
        try:
            plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **options)
        except BadInput:
            return False
        return True

    heads = config["num_attention_heads"]
    assert said["tp_sizes"] == [size for size in range(1, heads + 3) if fits(tp_size=size)]
    low, high = said["pp_sizes"]
    assert [size for size in range(1, high + 2) if fits(pp_size=size)] == list(range(low, high + 1))
    for size, pairs in said.get("moe_sizes", {}).items():
        tried = [(tp, ep) for tp in range(1, heads + 1) for ep in range(1, heads + 1) if tp * ep == int(size)]
        assert sorted(map(tuple, pairs)) == [
            (tp, ep) for tp, ep in tried if fits(tp_size=int(size), moe_tp_size=tp, moe_ep_size=ep)
        ]


def test_sizes_of_families_are_those_that_can_be_planned(tmp_path: Path) -> None:
    for name in ("gemma", "phi3", "internlm2", "qwen2_moe"):
        path = DATA / "families" / "models" / name
        said = inspected(path)
        found = []
        for size in range(1, said["model"]["num_attention_heads"] + 2):
            try:
                plan(model_dir=path, output_dir=tmp_path / "out", tp_size=size, dtype="bfloat16", rope_scaling="none")
            except BadInput:
                continue
            found.append(size)
        assert said["tp_sizes"] == found, name


def problems_of(path: Path) -> list[str]:
    """The problems that are said of a checkpoint that can be opened: alike as JSON and in the table, and no failure."""
    said = inspected(path)["problems"]
    shown = " ".join(table(path).get("problem", [])).replace(" ", "")
    assert all(problem.replace(" ", "") in shown for problem in said[:20])
    assert said, "a problem"
    return said


def test_an_unknown_architecture(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", {**LLAMA, "architectures": ["GPT2LMHeadModel"]})
    said = inspected(tmp_path / "model")
    assert (said["family"], said["architecture"]) == (None, "GPT2LMHeadModel")
    assert {name: said[name] for name in facts(source)} == facts(source)
    assert "model" not in said
    (problem,) = problems_of(tmp_path / "model")
    assert "architecture: found GPT2LMHeadModel; expected one of AquilaForCausalLM, " in problem
    assert table(tmp_path / "model")["family"] == ["unknown (GPT2LMHeadModel)"]


def test_a_configuration_that_is_wrong(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", LLAMA)
    wrong = {**LLAMA, "vocab_size": "many", "num_hidden_layers": 0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong))
    found = problems_of(tmp_path / "model")
    assert len(found) == 2
    assert any("vocab_size: found 'many'" in problem for problem in found)
    assert any("num_hidden_layers: found 0" in problem for problem in found)


def test_a_tensor_that_nothing_consumes(tmp_path: Path) -> None:
    tensors = {**checkpoints.values(LLAMA), "model.visual.weight": np.zeros(4, np.float16)}
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    (problem,) = problems_of(tmp_path / "model")
    assert problem.startswith("model.visual.weight: found a tensor that belongs nowhere")


def test_very_many_problems(tmp_path: Path) -> None:
    tensors = {**checkpoints.values(LLAMA), **{f"extra.x{n}.weight": np.zeros(4, np.float16) for n in range(30)}}
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    assert len(problems_of(tmp_path / "model")) == 30
    shown = table(tmp_path / "model")["problem"]
    assert len(shown) == 20
    assert shown[-1].endswith("... and 10 more")


def test_a_missing_tensor_and_one_of_another_shape(tmp_path: Path) -> None:
    tensors = checkpoints.values(LLAMA)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((95, 64), np.float16)
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    found = problems_of(tmp_path / "model")
    assert any(problem.startswith("model.norm.weight: found no such tensor") for problem in found)
    assert any(problem.startswith("lm_head.weight: found shape [95, 64]; expected [96, 64]") for problem in found)


def test_a_quantization_that_headrace_does_not_know(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**LLAMA, "quantization_config": {"quant_method": "nonsense"}})
    assert inspected(tmp_path / "model")["quantization"] == "nonsense"
    assert table(tmp_path / "model")["quantization"] == ["nonsense"]
    assert inspected(tmp_path / "model")["problems"] == []  # all its tensors are numbers


@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["table", "json"])
@pytest.mark.parametrize(
    "name", ["gone", "empty", "blank", "x" * 300, "no weights", "no configuration", "damaged", "a missing shard", "damaged.gguf"]
)
def test_what_cannot_be_opened_is_refused(name: str, json_: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name in ("blank", "damaged.gguf"):
        path.write_bytes(b"GGUF" if name == "damaged.gguf" else b"")
    elif len(name) < 100 and name != "gone":
        checkpoints.write(path, LLAMA, shards=2 if "shard" in name else 1)
        file = {"no configuration": "config.json", "a missing shard": "model-00002-of-00002.safetensors"}.get(
            name, "model.safetensors"
        )
        (path / file).unlink()
        if name == "damaged":
            (path / file).write_bytes(b"no weights")
    before = tree(tmp_path)
    ran = headrace("inspect", path, *json_)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert ran.err.startswith("headrace: 1 problem")
    assert str(path) in ran.err
    assert tree(tmp_path) == before


def tables() -> dict[str, dict[str, Any]]:
    """Every family's file, whose keys a file that extends another may leave to it."""
    found = {path.stem: tomllib.loads(path.read_text()) for path in (CONFIGS / "families").glob("*.toml")}

    def whole(name: str) -> dict[str, Any]:
        own = found[name]
        return {**(whole(own["extends"]) if "extends" in own else {}), **own}

    return {name: whole(name) for name in found}


def test_families_lists_every_file() -> None:
    rows = json.loads(headrace("families", "--json").out)
    expected = tables()
    assert [row["family"] for row in rows] == sorted(expected)
    for row in rows:
        own = expected[row["family"]]
        assert (row["source"], row["architectures"], row["layout"]) == (own["container"], own["architectures"], own["layout"])
        assert (own.get("architecture") or own["architectures"][0]) in runtime().classes
        assert row["class"] in ("llama", "qwen", "phi", "gemma")
        assert row["pipeline_stages"] is (row["class"] != "phi")
        assert row["targets"][:3] == ["none", "int8", "int4"]
        assert row["proof"]
        assert (CONFIGS / "layouts" / f"{row['layout']}.toml").is_file()
    # No two families claim one architecture of one kind of source.
    claims = [(row["source"], architecture) for row in rows for architecture in row["architectures"]]
    assert len(claims) == len(set(claims))


def test_families_as_a_table() -> None:
    ran = headrace("families")
    assert (ran.code, ran.err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.out.splitlines() if line.startswith("│")]
    begins = [number for number, row in enumerate(cells) if row[0]]
    rows = [["".join(cell) for cell in zip(*cells[a:b], strict=True)] for a, b in itertools.pairwise([*begins, len(cells)])]
    said = {row[0]: row[1:] for row in rows}
    assert said.keys() == tables().keys()
    for name, own in tables().items():
        assert said[name][:2] == [own["container"], ",".join(own["architectures"])]
        assert said[name][3].startswith("none, int8, int4")
    assert all(wrapper in ran.out for wrapper in list_texts())


def names_of(package: Any, constant: str) -> set[str]:
    """What the files of a package call what they have under a name."""
    files = [Path(path) for folder in package.__path__ for path in Path(folder).glob("*.py")]
    modules = [
        importlib.import_module(f"{package.__name__}.{path.stem}") for path in files if f"\n{constant} = " in path.read_text()
    ]
    return {getattr(module, constant).name for module in modules}


def test_formats_lists_every_module() -> None:
    said = json.loads(headrace("formats", "--json").out)
    assert list(said) == ["sources", "quantized", "not read"]
    names = {kind: [row["name"] for row in rows] for kind, rows in said.items()}
    assert set(names["sources"]) == names_of(stages.read, "READER")
    assert {"huggingface", "gguf", "meta"} <= set(names["sources"])
    assert set(names["quantized"]) == names_of(stages.quantization.sources, "FORMAT")
    assert all(len(rows) == len(set(rows)) for rows in names.values())
    assert all(row["is"] and not row["is"].endswith(".") for rows in said.values() for row in rows)


def test_formats_as_a_table() -> None:
    ran = headrace("formats")
    assert (ran.code, ran.err) == (0, "")
    for kind, rows in json.loads(headrace("formats", "--json").out).items():
        for row in rows:
            assert any(f"│ {kind} " in line and f"│ {row['name']} " in line for line in ran.out.splitlines()), row
