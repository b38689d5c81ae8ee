"""`headrace verify`: what is right passes, NVIDIA's own files too; each of many mutations is caught, by the tensor's name."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from pipeline import convert
from pipeline.errors import VerificationFailed
from pipeline.reporting.verification import verify
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import headrace
from tests.support.places import DATA

CASES = {
    f"{kind}/{case['case']}": (DATA / kind, shlex.split(case["arguments"]))
    for kind in ("dense", "families", "quantized")
    for case in json.loads((DATA / kind / "cases.json").read_text())
}
WINDOW = "runtime_defaults.max_attention_window: found none"  # no class of 1.2 sets a window
# What the reference gets wrong (docs/architecture.md), and what a round trip says of it.
WRONG = {
    "dense/mha_tp2pp2": "layers.1.mlp.fc.weight: found no such tensor",  # a lost layer
    "dense/bias_gqa_tp4": "mlp.gate_proj.bias: found rows from 0 in no rank file",  # biases left out
    **dict.fromkeys(("dense/mistral_tp2", "families/phi3_longrope_tp1", "families/phi3_longrope_f16"), WINDOW),
    **{f"families/gemma{name}": WINDOW for name in ("2_tp1", "2_tp2", "2_tp2_bf16", "2_f32", "3_tp1", "3_tp2", "3_tp4_f16")},
    **{f"families/internlm2_{name}": "dynamic without it" for name in ("tp1", "tp2", "tp4_f16", "pp2")},
    "families/exaone_pp2": "rank1.safetensors: transformer.layers.0.attention.qkv.weight",  # one stage's layers on all
    "quantized/fp8fbgemm_q_bf16-fp8_rowwise_meta-tp2pp1-auto-sm80": "values off",  # codes without their scales
}


@pytest.mark.parametrize("case", CASES)
def test_what_nvidia_wrote_is_what_its_source_says_or_is_known_to_be_wrong(case: str, tmp_path: Path) -> None:
    folder, arguments = CASES[case]
    output = folder / "expected" / case.partition("/")[2]
    # Which GPU the files are for, only headrace.json would say.
    options: dict[str, Any] = {
        "quant_ckpt_path": _beside(folder, arguments),
        "sm": 90 if "--sm 90" in " ".join(arguments) else None,
    }
    if "/phi" in case:
        assert [finding.problem.subject for finding in verify(output).findings][:1] == ["config.json: rotary_pct"]
        output = Path(shutil.copytree(output, tmp_path / "out"))
        rewrite(output / "config.json", rotary_pct=1.0)
    result = verify(output, folder / arguments[1], **options)
    if case in WRONG:
        assert not result.ok
        with pytest.raises(VerificationFailed, match=WRONG[case].replace(".", r"\.")):
            result.check()
    else:
        result.check()


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def checksums(directory: Path) -> dict[str, dict[str, list[list[Any]]]]:
    """What headrace.json says of the bytes of rank files, as they are now."""
    result = {}
    for path in sorted(directory.glob("rank*.safetensors")):
        held = {name: values.contiguous().view(-1).view(torch.uint8).numpy() for name, values in load_file(path).items()}
        result[path.name] = {name: [[values.nbytes, xxhash.xxh3_64_hexdigest(values.data)]] for name, values in held.items()}
    return result


def _beside(folder: Path, arguments: list[str]) -> Path | None:
    return folder / arguments[arguments.index("--quant_ckpt_path") + 1] if "--quant_ckpt_path" in arguments else None


# Mutations

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str], None]


def shuffle_heads(tensors: Tensors, name: str) -> None:
    """Exchange two kv heads: on a rank whose qkv is 2 q heads, 2 k heads, 2 v heads of 64 rows."""
    rows = tensors[name]
    size = rows.shape[0] // 6 if rows.ndim > 1 and rows.dtype != torch.int8 else 64
    rows = rows.clone()
    first, second = rows[2 * size : 3 * size].clone(), rows[3 * size : 4 * size].clone()
    rows[2 * size : 3 * size], rows[3 * size : 4 * size] = second, first
    tensors[name] = rows


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def transpose_block(tensors: Tensors, name: str) -> None:
    values = tensors[name].clone()
    values[:64, :64] = values[:64, :64].T.clone()
    tensors[name] = values


def zero_first(tensors: Tensors, name: str) -> None:
    values = tensors[name].clone()
    values.view(-1)[0] = 0
    tensors[name] = values


def flip_a_byte(tensors: Tensors, name: str) -> None:
    values = tensors[name].contiguous().clone()
    values.view(-1).view(torch.uint8)[values.numel() // 2] ^= 0x40
    tensors[name] = values


def exchange_gate_and_up(tensors: Tensors, name: str) -> None:
    other = name.replace("mlp.fc", "mlp.gate")
    tensors[name], tensors[other] = tensors[other], tensors[name]


def halve(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name] * 0.5


def negate(tensors: Tensors, name: str) -> None:
    tensors[name] = -tensors[name]


def twice_the_first_row(tensors: Tensors, name: str) -> None:
    values = tensors[name].clone()
    values[1] = values[0]
    tensors[name] = values


QKV, DENSE, FC = (f"transformer.layers.1.{module}" for module in ("attention.qkv", "attention.dense", "mlp.fc"))
MODEL: dict[str, Any] = {
    **quantized_checkpoints.LLAMA,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "vocab_size": 131,
}
DENSE_CHANGES: list[tuple[Change, str]] = [
    (shuffle_heads, f"{QKV}.weight"),
    (drop, f"{QKV}.bias"),
    (drop, "lm_head.weight"),
    (transpose_block, f"{DENSE}.weight"),
    (flip_a_byte, f"{DENSE}.weight"),
    (flip_a_byte, "transformer.layers.0.input_layernorm.weight"),
    (exchange_gate_and_up, f"{FC}.weight"),
    (halve, "transformer.ln_f.weight"),
    (zero_first, "transformer.vocab_embedding.weight"),
    (twice_the_first_row, "lm_head.weight"),
]
QUANTIZED_CHANGES: dict[str, list[tuple[Change, str]]] = {
    "int8": [(zero_first, f"{FC}.per_channel_scale"), (flip_a_byte, f"{QKV}.weight"), (exchange_gate_and_up, f"{FC}.weight")],
    "int4": [
        (zero_first, f"{QKV}.per_channel_scale"),
        (halve, f"{DENSE}.per_channel_scale"),
        (exchange_gate_and_up, f"{FC}.weight"),
    ],
    "gptq": [
        (zero_first, f"{FC}.weights_scaling_factor"),
        (negate, f"{FC}.weights_scaling_factor"),
        (halve, f"{QKV}.zero"),
        (flip_a_byte, f"{DENSE}.weight"),
        (exchange_gate_and_up, f"{FC}.weight"),
    ],
    "awq": [(zero_first, f"{FC}.weights_scaling_factor"), (halve, f"{DENSE}.zero"), (exchange_gate_and_up, f"{FC}.weight")],
    "fp8": [
        (zero_first, f"{FC}.weights_scaling_factor"),
        (halve, f"{QKV}.activation_scaling_factor"),
        (negate, f"{DENSE}.weights_scaling_factor"),
        (flip_a_byte, f"{DENSE}.weight"),
        (halve, "transformer.layers.0.attention.kv_cache_scaling_factor"),
    ],
    "rowwise": [
        (zero_first, f"{FC}.per_channel_scale"),
        (halve, "transformer.layers.0.mlp.clamp_val"),
        (flip_a_byte, f"{FC}.weight"),
    ],
    "modelopt awq": [(halve, f"{DENSE}.prequant_scaling_factor"), (zero_first, f"{FC}.weights_scaling_factor")],
}
ALL = [("dense", *change) for change in DENSE_CHANGES] + [
    (kind, *each) for kind, found in QUANTIZED_CHANGES.items() for each in found
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A source and its ranks at TP 2, by kind; made once."""
    made: dict[str, tuple[Path, Path]] = {}
    formats = {
        "gptq": quantized_checkpoints.gptq(sym=False),
        "awq": quantized_checkpoints.awq(),
        "fp8": quantized_checkpoints.modelopt_float8(),
        "modelopt awq": quantized_checkpoints.modelopt_awq(),
    }
    flags: dict[str, dict[str, Any]] = {
        "int8": {"use_weight_only": True},
        "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
        "rowwise": {"use_fp8_rowwise": True},
        "fp8": {"fp8_kv_cache": True},
    }

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            if kind in formats:
                config = {**quantized_checkpoints.LLAMA, "num_key_value_heads": 4}
                quantized_checkpoints.write(place / "model", config, formats[kind])
            else:
                checkpoints.save(place / "model", MODEL, quantized_checkpoints.values(MODEL))
            options = {"dtype": "bfloat16", "tp_size": 2, "scheduler": "synchronous", **flags.get(kind, {})}
            convert(model_dir=place / "model", output_dir=place / "ranks", **options)
            made[kind] = place / "model", place / "ranks"
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["dense", *QUANTIZED_CHANGES])
def test_an_untouched_output_passes_every_level(kind: str, outputs: Callable[[str], tuple[Path, Path]]) -> None:
    source, ranks = outputs(kind)
    result = verify(ranks, source, logits=True, tokens=9)
    result.check()
    assert result.integrity["checksums"] == result.integrity["tensors"]
    assert result.round_trip is not None
    assert result.logits is not None


@pytest.mark.parametrize("blind", [False, True], ids=["later", "by the converter"])
@pytest.mark.parametrize(("kind", "change", "name"), ALL, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_change_is_caught_and_named(
    kind: str, change: Change, name: str, blind: bool, outputs: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The first level sees what came later; a converter's own mistake, whose checksums are right, the round trip sees."""
    source, ranks = outputs(kind)
    broken = Path(shutil.copytree(ranks, tmp_path / "broken"))
    tensors = load_file(broken / "rank1.safetensors")
    change(tensors, name)
    save_file({key: value.contiguous() for key, value in tensors.items()}, broken / "rank1.safetensors")
    if blind:
        provenance = json.loads((broken / "headrace.json").read_text())
        provenance["xxh3"] = checksums(broken)
        (broken / "headrace.json").write_text(json.dumps(provenance))
    ran = headrace("verify", broken, "--source", source, "--quiet")
    assert ran.code == 5, ran
    module, _, parameter = name.rpartition(".")
    # A weight that its scales make wrong is named with them.
    assert any(f"rank1.safetensors: {module}." in line and parameter in line for line in ran.err.splitlines()), ran.err
    assert "rank0.safetensors" not in ran.err


def test_another_source_is_not_taken_for_its_own(outputs: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, ranks = outputs("dense")
    checkpoints.save(tmp_path / "other", MODEL, quantized_checkpoints.values(MODEL, seed=7))
    with pytest.raises(VerificationFailed, match=r"attention\.qkv\.weight"):
        verify(ranks, tmp_path / "other").check()


# The command


def test_the_summary_is_json(outputs: Callable[[str], tuple[Path, Path]]) -> None:
    source, ranks = outputs("int4")
    ran = headrace("verify", ranks, "--source", source, "--logits", "--tokens", 5, "--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["ok"] is True
    fc = next(row for row in summary["round_trip"]["tensors"] if row["name"] == "transformer.layers.1.mlp.fc.weight")
    assert fc["storage"] == "weight-only"
    assert fc["sources"] == ["model.layers.1.mlp.gate_proj.weight"]
    assert 10 < fc["snr_db"] < 30
    assert 0 < fc["bound"] <= 1
    assert [each["against"] for each in summary["logits"]["comparisons"]] == ["source", "joined ranks"]


def test_a_table_says_what_was_seen(outputs: Callable[[str], tuple[Path, Path]]) -> None:
    source, ranks = outputs("dense")
    ran = headrace("verify", ranks, "--source", source)
    assert ran.code == 0, ran.err
    assert "nothing wrong" in ran.out
    assert "attention.qkv" in ran.out


def test_no_checkpoint_is_a_bad_request(tmp_path: Path) -> None:
    ran = headrace("verify", tmp_path)
    assert ran.code == 2
    assert "config.json" in ran.err


def test_logits_need_a_source(outputs: Callable[[str], tuple[Path, Path]]) -> None:
    ran = headrace("verify", outputs("dense")[1], "--logits")
    assert ran.code == 2
    assert "--source" in ran.err


@pytest.mark.parametrize("damage", ["cut", "gone", "no header"])
def test_a_damaged_rank_file_is_a_finding(damage: str, outputs: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    source, ranks = outputs("dense")
    broken = Path(shutil.copytree(ranks, tmp_path / "broken"))
    path = broken / "rank0.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -100 if damage == "cut" else 4])
    ran = headrace("verify", broken, "--source", source)
    assert ran.code == 5
    assert "rank0.safetensors" in ran.err


# Which GPUs integer weights are for


def test_codes_for_other_gpus_are_right_when_that_is_said() -> None:
    output, source = DATA / "quantized/expected/q_bf16-int8-tp2pp1-auto-sm90", DATA / "quantized/models/q_bf16"
    wrong = verify(output, source).findings
    assert wrong
    assert all("for other GPUs than SM 80, say for which: --sm" in finding.problem.remedy for finding in wrong)
    ran = headrace("verify", output, "--source", source, "--sm", 90, "--quiet")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(("sm", "said"), [(88, "expected one of 75, 80"), (90, "expected 80, as headrace.json says")])
def test_another_gpu_than_headrace_json_says_is_refused(sm: int, said: str, outputs: Callable[[str], tuple[Path, Path]]) -> None:
    ran = headrace("verify", outputs("int8")[1], "--sm", sm)
    assert ran.code == 2
    assert f"--sm: found {sm}; {said}" in ran.err
