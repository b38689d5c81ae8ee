"""`verify` of outputs that other tools may have written, in every form that the loader takes, and of what cannot be done at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline import convert
from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.reporting.generation import generate_text
from pipeline.reporting.verification import verify
from tests.pipeline.reporting.test_verify import Tensors, rewrite
from tests.support import checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its ranks at TP 2."""
    place = tmp_path_factory.mktemp("llama")
    checkpoints.write(place / "model", checkpoints.LLAMA)
    convert(model_dir=place / "model", output_dir=place / "ranks", tp_size=2, scheduler="synchronous")
    return place / "model", place / "ranks"


# Forms of config.json that the loader takes, too


def _as_stages(ranks: Path, first: int) -> None:
    """Move layers of two stages, so that the first has `first` of them."""
    held = [load_file(ranks / f"rank{rank}.safetensors") for rank in range(2)]
    front = "transformer.layers."
    layers: list[Tensors] = []
    for tensors in held:
        for number in sorted({int(name.split(".")[2]) for name in tensors if name.startswith(front)}):
            own = f"{front}{number}."
            layers.append({name.removeprefix(own): tensors.pop(name) for name in list(tensors) if name.startswith(own)})
    for number, layer in enumerate(layers):
        stage, local = (0, number) if number < first else (1, number - first)
        held[stage] |= {f"{front}{local}.{name}": values for name, values in layer.items()}
    for rank, tensors in enumerate(held):
        save_file(tensors, ranks / f"rank{rank}.safetensors")


FORMS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (checkpoints.LLAMA, {}, {"quantization": None}),
    (checkpoints.LLAMA, {}, {"moe": None}),
    (checkpoints.LLAMA, {"pp_size": 2}, {"mapping": {"pp_partition": [1, 2]}}),
    (checkpoints.MIXTRAL, {"tp_size": 2}, {"mapping": {"moe_tp_size": -1, "moe_ep_size": -1}}),
    (checkpoints.MIXTRAL, {"tp_size": 2, "moe_ep_size": 2}, {"mapping": {"moe_tp_size": 1, "moe_ep_size": -1}}),
    (checkpoints.MIXTRAL, {"tp_size": 2, "moe_ep_size": 2}, {"mapping": {"moe_tp_size": None, "moe_ep_size": 2}}),
]


@pytest.mark.parametrize(("model", "options", "change"), FORMS, ids=[str(change) for _, _, change in FORMS])
def test_every_form_that_the_contract_takes_is_read_alike_by_all_levels(
    model: dict[str, Any], options: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints.write(tmp_path / "model", model)
    ranks = tmp_path / "ranks"
    convert(model_dir=tmp_path / "model", output_dir=ranks, dtype="float32", scheduler="synchronous", **options)
    (ranks / "headrace.json").unlink()
    mapping = change.get("mapping", {})
    if "pp_partition" in mapping:
        _as_stages(ranks, mapping["pp_partition"][0])
    config = json.loads((ranks / "config.json").read_text())
    rewrite(ranks / "config.json", **{**change, **({"mapping": {**config["mapping"], **mapping}} if mapping else {})})
    result = verify(ranks, tmp_path / "model", logits=True, tokens=5)
    result.check()
    assert result.round_trip is not None
    assert result.logits is not None


def test_more_kv_heads_than_the_source_has_are_a_finding(tmp_path: Path) -> None:
    """The shapes on two ranks are those of one head that both have."""
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "num_key_value_heads": 1})
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", tp_size=2, scheduler="synchronous")
    (tmp_path / "ranks/headrace.json").unlink()
    rewrite(tmp_path / "ranks/config.json", num_key_value_heads=2)
    found = [str(finding.problem) for finding in verify(tmp_path / "ranks", tmp_path / "model").findings]
    assert any("found rows 8 to 16 of model.layers.0.self_attn.k_proj.weight, by config.json" in each for each in found), found


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"norm_epsilon": "x"}, "config.json: norm_epsilon"),
        ("config.json", {"quantization": None}, "no tokenizer"),
        ("headrace.json", {"source": None, "options": None}, "no tokenizer"),
        ("headrace.json", {"source": {"path": 5}}, "no tokenizer"),
    ],
)
def test_what_nothing_can_be_generated_from_is_refused(
    file: str, change: dict[str, Any], said: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(llama[1], tmp_path / "ranks"))
    rewrite(ranks / file, **change)
    with pytest.raises(BadInput, match=said):
        next(generate_text(ranks, "The capital"))


# What logits need is looked at before anything is read


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr("pipeline.reporting.verification.read_once", read)


@pytest.mark.usefixtures("nothing_is_read")
def test_logits_without_transformers(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BadInput([Problem("transformers", "not installed", "the library that runs the source")])

    monkeypatch.setattr("stages.verify.forward.transformers_model.transformers_library", missing)
    source, ranks = llama
    with pytest.raises(BadInput, match="transformers: found not installed"):
        verify(ranks, source, logits=True)


@pytest.mark.usefixtures("nothing_is_read")
def test_a_prompt_without_a_tokenizer(llama: tuple[Path, Path]) -> None:
    source, ranks = llama
    with pytest.raises(BadInput, match="no tokenizer"):
        verify(ranks, source, logits=True, prompt="The capital")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("tokens", [[], [3, 10**6]])
def test_a_prompt_that_the_model_has_no_tokens_for(
    tokens: list[int], llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Words:
        def encode(self, _: str) -> list[int]:
            return tokens

    monkeypatch.setattr("pipeline.reporting.verification.open_tokenizer", lambda _: Words())
    source, ranks = llama
    with pytest.raises(BadInput, match=r"tokens: found .*; expected some of 0 to 95"):
        verify(ranks, source, logits=True, prompt="?")


@pytest.mark.usefixtures("nothing_is_read")
def test_a_class_that_transformers_lacks(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama[0], tmp_path / "model"))
    rewrite(source / "config.json", architectures=["ArcticForCausalLM"])
    with pytest.raises(BadInput, match=r"ArcticForCausalLM, which transformers .* has no class for"):
        verify(llama[1], source, logits=True)


def test_what_cannot_be_computed_of_the_ranks_is_a_finding(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> None:
        raise VerificationFailed([Problem("rank1.safetensors: lm_head.weight", "another copy", "the same on every rank")])

    monkeypatch.setattr("stages.verify.forward.logits.compare_logits", differs)
    source, ranks = llama
    result = verify(ranks, source, logits=True)
    assert [(finding.level, finding.problem.subject) for finding in result.findings] == [
        ("logits", "rank1.safetensors: lm_head.weight")
    ]
    assert (result.round_trip is not None, result.logits) == (True, None)
    result.summary()
