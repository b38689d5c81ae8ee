"""load_from_hf_checkpoint, load_from_hf_llama, load_from_meta_llama: the tensors of the rank files, without the files."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.models import make
from pipeline import BadInput, convert, load_from_hf_checkpoint, load_from_hf_llama, load_from_meta_llama
from pipeline.tensor.placement import Region, shift
from stages.read.mapped import MappedBlock
from tests.support import checkpoints, gguf_files, meta_files
from tests.support.commands import tree
from tests.support.examples import by_night
from tests.support.places import DATA, ROOT

GOLDENS = {
    f"{folder}/{case['case']}": (DATA / folder, case["arguments"])
    for folder in ("dense", "families")
    for case in json.loads((DATA / folder / "cases.json").read_text())
}
# One of each way in which a family differs: fused sources, norms plus one, experts, ties, float32 routers, an own head.
FAMILIES = (
    "qwen2_tied_tp2pp2",
    "qwen2_moe_tp4ep2_f16",
    "qwen3_moe_ep2",
    "gemma3_tp2",
    "gemma2_f32",
    "internlm2_tp4_f16",
    "phi3_longrope_tp1",
    "phimoe_tp2",
    "exaone_tp2",
)
CASES = [name for name in GOLDENS if name.startswith("dense/") or name.removeprefix("families/") in FAMILIES]


def arguments(case: str) -> dict[str, Any]:
    """A golden case's arguments as keywords; of flags, True."""
    folder, text = GOLDENS[case]
    words = shlex.split(text)
    result: dict[str, Any] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            value = words[number + 1] if number + 1 < len(words) and not words[number + 1].startswith("--") else True
            result[word[2:]] = int(value) if isinstance(value, str) and value.isdigit() else value
    for name in result.keys() & {"model_dir", "meta_ckpt_dir"}:
        result[name] = folder / result[name]
    if "internlm2" in case:  # its dynamic rope is refused for 1.2
        result["rope_scaling"] = "keep"
    return result


def same(loaded: Mapping[str, torch.Tensor], file: Path) -> None:
    """Whether a rank's tensors are those of its file: names, types, shapes and bits."""
    expected = load_file(file)
    assert set(loaded) == expected.keys()
    assert len(loaded) == len(expected)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert tensor.is_contiguous()
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), name


def every_rank(load: Callable[..., Any], source: Any, output: Path, options: dict[str, Any]) -> None:
    """Load each rank of a finished conversion and compare it with its file, and its configuration with config.json."""
    tp_size, pp_size = options.get("tp_size", 1), options.get("pp_size", 1)
    config = json.loads((output / "config.json").read_text())
    assert len(list(output.glob("rank*.safetensors"))) == tp_size * pp_size
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            loaded = load(source, tp_rank=tp_rank, pp_rank=pp_rank, **options)
            same(loaded, output / f"rank{pp_rank * tp_size + tp_rank}.safetensors")
            assert loaded.config == config
            assert list(loaded.config) == list(config)


@pytest.mark.parametrize("case", CASES)
def test_every_golden_case(case: str, tmp_path: Path) -> None:
    options = arguments(case)
    convert(**options, output_dir=tmp_path, scheduler="threads")
    if "meta_ckpt_dir" in options:
        every_rank(load_from_meta_llama, options.pop("meta_ckpt_dir"), tmp_path, options)
    else:
        every_rank(load_from_hf_checkpoint, options.pop("model_dir"), tmp_path, options)


@pytest.mark.parametrize("case", ["dense/gqa_tp2pp2pe0", "dense/oddvocab_tied_tp2pe1", "dense/mixtral_tp2ep2", "dense/mha_tp2_f32"])
def test_models_in_memory(case: str, tmp_path: Path) -> None:
    options = arguments(case)
    directory = options.pop("model_dir")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    convert(model_dir=directory, output_dir=tmp_path, scheduler="threads", **options)
    every_rank(load_from_hf_llama, model, tmp_path, options)


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_other_files_and_directories_too(kind: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), kind)
    meta_files.write(tmp_path / "meta", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), 4)
    for name in ("model.gguf", "meta"):
        options = {"tp_size": 2, "pp_size": 2, "write_rope_buffers": True, "dtype": "float16"}
        convert(model_dir=tmp_path / name, output_dir=tmp_path / "out" / name, scheduler="threads", **options)
        every_rank(load_from_hf_checkpoint, tmp_path / name, tmp_path / "out" / name, options)


def test_values_are_made_of_blocks_and_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**checkpoints.MIXTRAL, "torch_dtype": "bfloat16"}
    checkpoints.write(tmp_path / "model", config)
    options = {"tp_size": 4, "moe_ep_size": 2, "dtype": "float16"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **options)
    for block, piece in ((1000, 1), (30_000, 700), (1000, 1 << 20)):
        monkeypatch.setattr("pipeline.run.loaders.PIECE_BYTES", piece)
        monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda *_, size=block: size)
        monkeypatch.setattr("pipeline.planning.compose.ROW_MULTIPLE", 1)
        every_rank(load_from_hf_checkpoint, tmp_path / "model", tmp_path / "out", options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "torch_dtype": "bfloat16"}, shards=2)
    return tmp_path / "model"


def test_a_rank_is_a_mapping(model: Path) -> None:
    weights = load_from_hf_checkpoint(str(model), tp_size=2, tp_rank=1)
    assert isinstance(weights, Mapping)
    names = list(weights)
    assert len(weights) == len(names) == len(set(names)) == 24
    assert "lm_head.weight" in weights
    for stranger in ("lm_head", "", "model.norm.weight", 5, None):
        assert stranger not in weights
    assert weights.shape("transformer.layers.0.attention.qkv.weight") == (64, 64)
    assert weights["transformer.layers.0.attention.qkv.weight"].shape == (64, 64)
    assert weights.get("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        weights["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        weights.shape("nothing")


def test_the_first_stage_has_no_head_and_the_last_no_embedding(model: Path) -> None:
    first, last = (load_from_hf_checkpoint(model, pp_size=2, pp_rank=rank) for rank in (0, 1))
    assert "lm_head.weight" not in first
    assert "transformer.vocab_embedding.weight" not in last
    with pytest.raises(KeyError):
        first["lm_head.weight"]


def test_a_tensor_is_made_anew_and_its_own(model: Path) -> None:
    before = tree(model)
    weights = load_from_hf_checkpoint(model)
    tensor = weights["transformer.ln_f.weight"]
    kept = tensor.clone()
    tensor.zero_()
    assert torch.equal(weights["transformer.ln_f.weight"], kept)
    assert tree(model) == before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """The regions of tensors that are read."""
    made: list[Region] = []
    read = MappedBlock.read

    def record(block: MappedBlock, region: Region) -> np.ndarray:
        made.append(shift(region, [start for start, _ in block.region]))
        return read(block, region)

    monkeypatch.setattr(MappedBlock, "read", record)
    return made


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
def test_nothing_is_read_until_a_tensor_is_asked_for(kind: str, tmp_path: Path, reads: list[Region]) -> None:
    source = checkpoints.values(checkpoints.LLAMA)
    load = load_from_meta_llama if kind == "meta" else load_from_hf_checkpoint
    if kind == "hf":
        checkpoints.save(tmp_path / "model", checkpoints.LLAMA, source)
    elif kind == "meta":
        # Of several parts the norms are compared, which are a few kilobytes of any model.
        meta_files.write(tmp_path / "model", checkpoints.LLAMA, source, 1)
    else:
        gguf_files.write(tmp_path / "model", checkpoints.LLAMA, source)
    weights = load(tmp_path / "model", tp_size=2, tp_rank=1)
    assert {name: weights.shape(name) for name in weights}.keys() == set(weights)
    assert "lm_head.weight" in weights
    assert weights.config["vocab_size"] == 96
    assert not reads
    assert weights["transformer.ln_f.weight"].shape == (64,)
    assert reads == [((0, 64),)]
    assert weights["lm_head.weight"].shape == (48, 64)
    assert reads[1:] == [((48, 96), (0, 64))]


def test_nothing_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    before = tree(model.parent)
    weights = load_from_hf_checkpoint("model", tp_size=2)
    assert sum(tensor.numel() for tensor in weights.values()) > 0
    assert tree(model.parent) == before


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank"),
        ({"tp_size": 2, "tp_rank": -1}, "tp_rank"),
        ({"tp_rank": 1}, "tp_rank"),
        ({"pp_size": 3, "pp_rank": 3}, "pp_rank"),
        ({"pp_rank": -1}, "pp_rank"),
        ({"tp_size": 0}, "tp_"),
        ({"tp_size": 3}, "--tp_size 3"),
        ({"pp_size": 4}, "--pp_size 4"),
        ({"dtype": "int4"}, "--dtype"),
        ({"nonsense": 1}, "nonsense"),
        ({"output_dir": "somewhere"}, "output_dir"),
        ({"workers": 2}, "workers"),
        ({"scheduler": "threads"}, "scheduler"),
        ({"scratch_after": "read"}, "scratch_after"),
        ({"moe_ep_size": 2}, "moe_ep_size 2"),
        ({"use_parallel_embedding": "perhaps"}, "--use_parallel_embedding"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_bad_input(model: Path, options: dict[str, Any], subject: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_from_hf_checkpoint(model, **options)
    assert any(subject in problem.subject for problem in caught.value.problems), caught.value


def test_everything_wrong_with_ranks_is_said_at_once(model: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_from_hf_checkpoint(model, tp_size=2, tp_rank=5, pp_size=2, pp_rank=-3)
    assert [problem.subject for problem in caught.value.problems] == ["tp_rank", "pp_rank"]


def test_sources_that_cannot_be_loaded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="gone"):
        load_from_hf_checkpoint(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"params\.json"):
        load_from_meta_llama(model)
    with pytest.raises(BadInput, match="an object of type"):
        load_from_hf_llama(model)
    with pytest.raises(BadInput, match="a second source"):
        load_from_meta_llama(model, model_dir=model)
    (model / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00001-of-00002"):
        load_from_hf_checkpoint(model)


def test_a_checkpoint_that_changes_while_it_is_read_is_named(model: Path) -> None:
    weights = load_from_hf_checkpoint(model)
    for path in model.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="shorter"):
        weights["lm_head.weight"]


def test_a_quantized_checkpoint_beside_the_model(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    other = np.full((64, 64), 3, np.float32)
    checkpoints.save(tmp_path / "other", {}, {name: other})
    weights = load_from_hf_checkpoint(model, quant_ckpt_path=tmp_path / "other")
    assert torch.equal(weights["transformer.layers.0.attention.dense.weight"], torch.full((64, 64), 3, dtype=torch.bfloat16))


MEMORY = """
import sys
from pathlib import Path
import torch
from pipeline import load_from_hf_checkpoint

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

name, dtype = sys.argv[2:]
weights = load_from_hf_checkpoint(sys.argv[1], tp_size=2, tp_rank=1, dtype=dtype)
weights["transformer.ln_f.weight"]  # what is imported when the first tensor is made
before, slack = status("VmRSS"), status("VmHWM") - status("VmRSS")
tensor = weights[name]
print(tensor.nbytes, slack, status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_night(
        [
            ("lm_head.weight", "bfloat16"),
            ("transformer.layers.0.mlp.proj.weight", "float16"),
            ("transformer.layers.0.attention.qkv.weight", "bfloat16"),
        ],
        [("transformer.layers.0.attention.qkv.weight", "bfloat16")],
    ),
)
def test_loading_a_tensor_takes_little_more_memory_than_it_has(big: Path, name: str, dtype: str) -> None:
    command = [sys.executable, "-c", MEMORY, str(big), name, dtype]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    nbytes, slack, grown = map(int, ran.stdout.split())
    # The peak before is what is in memory, so that whatever comes on top of it shows.
    assert slack < 16 << 20
    # A piece of 4 MiB as it is read and as it is cast; a rank's columns are mapped with the rows that they are cut from.
    assert nbytes // 2 < grown < nbytes + (24 << 20)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5 GB of 8B-shaped bf16 that takes no disk."""
    directory = tmp_path_factory.mktemp("big")
    make(directory, "8B", layers=1, sparse=True)
    assert sum(path.stat().st_size for path in directory.iterdir()) > 1 << 30
    return directory


ALONE = """
import sys
from pipeline import load_from_hf_checkpoint, load_from_hf_llama, load_from_meta_llama
assert "torch" not in sys.modules
for load, source in ((load_from_hf_checkpoint, sys.argv[1]), (load_from_meta_llama, sys.argv[2])):
    weights = load(source, tp_size=2, tp_rank=1)
    print(sum(tensor.numel() for tensor in weights.values()))
"""


def test_the_import_of_pipeline_is_enough(model: Path, tmp_path: Path) -> None:
    meta_files.write(tmp_path / "meta", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), 2)
    command = [sys.executable, "-c", ALONE, str(model), str(tmp_path / "meta")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counts = [sum(tensor.numel() for tensor in load_from_hf_checkpoint(model, tp_size=2, tp_rank=1).values())] * 2
    assert [int(line) for line in ran.stdout.split()] == counts
