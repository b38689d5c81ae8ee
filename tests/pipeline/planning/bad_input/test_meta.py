"""Meta checkpoints whose params.json or parts are missing, damaged, or do not fit one another; and options that name no source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import checkpoints, meta_files
from tests.support.commands import REFUSED, headrace, one, refused, tree

CONFIG = {**checkpoints.LLAMA, "torch_dtype": "bfloat16"}
PARTS = 4
Part = dict[str, np.ndarray]


def model_of(tmp_path: Path, change: Callable[[list[Part]], Any] = lambda _: None, parts: int = PARTS, **params: Any) -> Path:
    """A checkpoint whose parts are changed, and whose params.json has other values; None takes a key away."""
    shares = meta_files.shares(CONFIG, checkpoints.values(CONFIG), parts)
    change(shares)
    values = {key: value for key, value in {**meta_files.params(CONFIG), **params}.items() if value is not None}
    meta_files.save(tmp_path / "model", values, shares)
    return tmp_path / "model"


def refused_both(model: Path) -> list[str]:
    """The problems of a directory, which are the same by either flag."""
    problems = refused(model)
    ran = headrace("convert", "--meta_ckpt_dir", model, "--output_dir", model.parent / "out", "--scheduler", "threads")
    assert ran.code == 2
    assert [line.removeprefix("  - ") for line in ran.err.splitlines() if line.startswith("  - ")] == problems
    return problems


def test_no_params_json(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "params.json").unlink()
    assert one(refused_both(model)).startswith(f"{model / 'params.json'}: found no such file; expected the model's parameters")


@pytest.mark.parametrize("text", ["", "{", "not json", "\xff\xfe", "[" * 100_000])
def test_params_that_are_not_json(tmp_path: Path, text: str) -> None:
    model = model_of(tmp_path)
    (model / "params.json").write_bytes(text.encode("latin-1"))
    assert one(refused_both(model)).startswith(f"{model / 'params.json'}: found text that is not JSON")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("5", "int"), ("null", "NoneType"), ('"a"', "str")])
def test_params_that_are_no_object(tmp_path: Path, text: str, kind: str) -> None:
    model = model_of(tmp_path)
    (model / "params.json").write_text(text)
    assert one(refused_both(model)).startswith(f"{model / 'params.json'}: found a JSON {kind}")


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, **{key: None})
    assert one(refused_both(model)).startswith(f"{model / 'params.json'}: {key}: found nothing; expected the model's ")


def test_all_missing_keys_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "params.json").write_text("{}")
    subjects = [problem.partition(": found ")[0].rpartition(": ")[2] for problem in refused_both(model)]
    assert {"dim", "n_layers", "n_heads", "norm_eps", "hidden_dim"} <= set(" or ".join(subjects).split(" or "))


WRONG: dict[str, tuple[Any, ...]] = {
    "dim": ("64", 0, -64, 64.5, True, [64], 10**90),
    "n_layers": ("3", 0, -3, 2.5, True),
    "n_heads": ("8", 0, -8, 7.5, True),
    "n_kv_heads": ("4", 0, -1, 3),
    "vocab_size": ("96", 0, -2, 96.5, True),
    "hidden_dim": ("160", 0, -160, 1.5),
    "norm_eps": ("1e-5", True, 0, float("nan")),
    "rope_theta": ("1e4", [1], float("inf"), 0),
    "rope_scaling": (5, "linear", []),
    "head_dim": ("8", 0, -8, 7.5, True),
    "sliding_window": ("8", -1, 7.5, True, [8]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_of_another_type_or_out_of_range(tmp_path: Path, key: str, value: Any) -> None:
    model = model_of(tmp_path, **{key: value})
    assert all(problem.startswith(f"{model / 'params.json'}: ") for problem in refused_both(model))
    assert any(key in problem.partition(": found ")[0].rpartition(": ")[2] for problem in refused(model))


LATER = {
    "moe": {"num_experts": 8},
    "yarn": {"factor": 4},
    "use_qk_norm": True,
    "nope_layer_interval": 4,
    "vision_encoder": {"a": 1},
}


@pytest.mark.parametrize("key", LATER)
def test_what_later_models_compute_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    """Their tensors may all have names that are known."""
    problem = one(refused_both(model_of(tmp_path, **{key: LATER[key]})))
    assert problem.startswith(f"{tmp_path / 'model/params.json'}: {key}: found a value; expected ")
    assert "in Hugging Face's layout" in problem
    assert not refused_none(tmp_path / "plain", **{key: type(LATER[key])()})


def refused_none(place: Path, **params: Any) -> list[str]:
    """The problems of a checkpoint whose params.json has a key that says nothing."""
    ran = headrace("plan", "--meta_ckpt_dir", model_of(place, **params), "--output_dir", place / "out")
    return ran.err.splitlines() if ran.code else []


@pytest.mark.parametrize(
    ("key", "value"),
    [("multiple_of", value) for value in ("256", 0, [1], {})]
    + [("ffn_dim_multiplier", value) for value in ("1.3", [1], float("inf"))],
)
def test_numbers_that_give_no_hidden_dim(tmp_path: Path, key: str, value: Any) -> None:
    model = model_of(tmp_path, hidden_dim=None, **{key: value})
    problem = one(refused_both(model))
    assert problem.startswith(f"{model / 'params.json'}: hidden_dim: found none, and dim 64, ")
    assert f"{key} {value!r}" in problem


def test_absurd_numbers_that_give_hidden_dim(tmp_path: Path) -> None:
    model = model_of(tmp_path, hidden_dim=None, ffn_dim_multiplier=1e300)
    assert one(refused_both(model)).startswith(f"{model / 'params.json'}: hidden_dim")


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_kv_heads", "vocab_size", "hidden_dim"])
def test_a_size_that_contradicts_the_tensors_is_said_by_metas_names(tmp_path: Path, key: str) -> None:
    model = model_of(tmp_path, **{key: meta_files.params(CONFIG)[key] * 2})
    problems = refused_both(model)
    assert all(problem.startswith(("layers.", "tok_embeddings.", "norm.", "output.")) for problem in problems), problems


@pytest.mark.parametrize("gone", [(0,), (2,), (0, 2)], ids=str)
def test_a_missing_part(tmp_path: Path, gone: tuple[int, ...]) -> None:
    model = model_of(tmp_path)
    for number in gone:
        (model / f"consolidated.{number:02}.pth").unlink()
    problems = refused_both(model)
    assert [problem.partition(": found ")[0] for problem in problems] == [str(model / f"consolidated.{n:02}.pth") for n in gone]
    assert all("no such file; expected one of 4 parts" in problem for problem in problems)


def test_the_last_part_missing(tmp_path: Path) -> None:
    # Nothing says how many parts there were, but the tensors are too small.
    model = model_of(tmp_path)
    (model / "consolidated.03.pth").unlink()
    problems = refused_both(model)
    assert "layers.0.attention.wq.weight: found shape [48, 64]; expected [64, 64] by the model's configuration" in problems


def test_a_part_of_an_absurd_number(tmp_path: Path) -> None:
    model = model_of(tmp_path, parts=1)
    (model / "consolidated.00.pth").rename(model / "consolidated.999.pth")
    ran = headrace("convert", "--meta_ckpt_dir", model, "--output_dir", tmp_path / "out")
    assert ran.code == 2
    assert "999 problems" in ran.err
    # Numbers that no checkpoint has are no parts at all.
    (model / "consolidated.999.pth").rename(model / f"consolidated.{10**15}.pth")
    ran = headrace("convert", "--meta_ckpt_dir", model, "--output_dir", tmp_path / "out")
    assert ran.code == 2
    assert "expected consolidated.00.pth and its other parts" in ran.err


def test_no_parts(tmp_path: Path) -> None:
    model = model_of(tmp_path, parts=1)
    (model / "consolidated.00.pth").unlink()
    assert one(refused(model)).startswith(f"{model}: found params.json; expected ")
    problem = without_source(tmp_path, "--meta_ckpt_dir", model)
    assert problem.startswith(f"{model}: found params.json; expected consolidated.00.pth and its other parts")


def test_a_part_twice(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "consolidated.01").mkdir()
    shutil.copy(model / "consolidated.01.pth", model / "consolidated.01" / "consolidated-00001.pth")
    problem = one(refused_both(model))
    assert problem == f"{model / 'consolidated.01.pth'}: found part 1 again, beside consolidated.01; expected each part once"


def test_a_directory_without_files(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "consolidated.03.pth").unlink()
    (model / "consolidated.03").mkdir()
    (model / "consolidated.03" / "notes.txt").touch()
    assert one(refused_both(model)).startswith(f"{model / 'consolidated.03'}: found a directory without consolidated-*.pth")


def test_a_tensor_in_two_files_of_a_part(tmp_path: Path) -> None:
    meta_files.write(tmp_path / "model", CONFIG, checkpoints.values(CONFIG), 2, files=2)
    folder = tmp_path / "model" / "consolidated.01"
    first, second = sorted(folder.iterdir())
    held = torch.load(second)
    name = next(iter(torch.load(first)))
    torch.save({**held, name: torch.load(first)[name]}, second)
    assert one(refused_both(tmp_path / "model")) == f"{name}: found the tensor again in {second}; expected one home in a part"


def drop(name: str, number: int) -> Callable[[list[Part]], Any]:
    return lambda parts: parts[number].pop(name)


def put(name: str, number: int, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Part]], Any]:
    return lambda parts: parts[number].update({name: make(parts[number].get(name, np.zeros(4, np.float32)))})


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "norm.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_tensor_that_one_part_lacks(tmp_path: Path, name: str, number: int) -> None:
    problems = refused_both(model_of(tmp_path, drop(name, number)))
    if number:
        assert one(problems) == f"{name}: found no such tensor in part {number}; expected a share in every part"
    else:
        found = [f"{name}: found a tensor of part {n} that part 0 does not have; expected a share in every part" for n in (1, 2, 3)]
        assert problems == found


def test_a_tensor_that_no_part_has(tmp_path: Path) -> None:
    def change(parts: list[Part]) -> None:
        for part in parts:
            del part["layers.2.feed_forward.w3.weight"]

    problem = one(refused_both(model_of(tmp_path, change)))
    assert problem.startswith("layers.2.feed_forward.w3.weight: found no such tensor; expected shape [160, 64]")


SHAPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "rows of another length": ("layers.0.attention.wq.weight", lambda a: a[:, :-1]),
    "columns of another length": ("layers.0.attention.wo.weight", lambda a: a[:-1]),
    "an axis less": ("layers.0.feed_forward.w2.weight", lambda a: a[:, 0]),
    "an axis more": ("layers.0.feed_forward.w1.weight", lambda a: a[None]),
    "a number": ("layers.0.attention.wv.weight", lambda a: a[0, 0]),
    "a longer norm": ("norm.weight", lambda a: np.concatenate([a, a])),
    "another type": ("output.weight", lambda a: a.astype(np.float32)),
    "another type of a norm": ("layers.2.ffn_norm.weight", lambda a: a.astype(np.float16)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shares_that_do_not_fit_one_another(tmp_path: Path, case: str) -> None:
    name, make = SHAPES[case]
    problem = one(refused_both(model_of(tmp_path, put(name, 2, make))))
    assert problem.startswith(f"{name}: found "), problem
    assert " in part 2; expected a share like part 0's, bfloat16 [" in problem


def test_shares_whose_sum_is_too_long(tmp_path: Path) -> None:
    name = "layers.0.attention.wk.weight"
    problem = one(refused_both(model_of(tmp_path, put(name, 3, lambda a: np.concatenate([a, a])))))
    assert problem == f"{name}: found shape [40, 64]; expected [32, 64] by the model's configuration"


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.attention_norm.weight", "layers.2.ffn_norm.weight"])
def test_a_norm_that_differs_between_parts(tmp_path: Path, name: str) -> None:
    def change(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[-1] = 7
        return changed

    problem = one(refused_both(model_of(tmp_path, put(name, 3, change))))
    assert problem == f"{name}: found other values in part 3 than in part 0; expected the same: every part holds it whole"


def test_a_norm_of_values_that_are_no_numbers_is_no_difference(tmp_path: Path) -> None:
    # Bits are compared: values that are unequal to themselves are equal here.
    def change(parts: list[Part]) -> None:
        for part in parts:
            part["norm.weight"] = np.full_like(part["norm.weight"], np.nan)

    ran = headrace("plan", "--model_dir", model_of(tmp_path, change), "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "name", ["vision.projection.weight", "layers.0.feed_forward.gate.weight", "layers.3.attention.wq.weight", "weight"]
)
def test_a_tensor_that_nothing_consumes(tmp_path: Path, name: str, parts: int) -> None:
    # Nothing says how an unknown tensor is split: that parts have other values of it is no problem of its own.
    def change(shares: list[Part]) -> None:
        for number, share in enumerate(shares):
            share[name] = np.full((8, 64), number, np.float32)

    assert one(refused_both(model_of(tmp_path, change, parts))).startswith(f"{name}: found a tensor that belongs nowhere")


def test_a_bias(tmp_path: Path) -> None:
    name = "layers.0.attention.wq.bias"
    problem = one(refused_both(model_of(tmp_path, lambda parts: [part.update({name: np.zeros(16, np.float32)}) for part in parts])))
    assert problem.startswith(f"{name}: found a tensor that the configuration does not speak of")


@pytest.mark.parametrize("shape", [(), (0,), (96,), (0, 64), (96, 16, 1)], ids=str)
def test_an_embedding_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def change(parts: list[Part]) -> None:
        for part in parts:
            part["tok_embeddings.weight"] = np.zeros(shape, part["norm.weight"].dtype)

    model = model_of(tmp_path, change, vocab_size=-1)
    assert any("tok_embeddings.weight: found" in problem or "vocab_size: found" in problem for problem in refused_both(model))


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    model = model_of(tmp_path)
    path = model / "consolidated.02.pth"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no checkpoint"}[damage])
    assert one(refused_both(model)).startswith(f"{path}: found ")


def test_damaged_parts_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    for number in (1, 3):
        (model / f"consolidated.{number:02}.pth").write_bytes(b"no checkpoint")
    assert [problem.partition(":")[0] for problem in refused_both(model)] == [
        str(model / f"consolidated.{number:02}.pth") for number in (1, 3)
    ]


def test_a_part_that_leads_nowhere(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "consolidated.01.pth").unlink()
    (model / "consolidated.01.pth").symlink_to("gone")
    assert one(refused_both(model)).startswith(f"{model / 'consolidated.01.pth'}: found a file that cannot be read")


def test_two_sources(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    problem = one(refused(model, "--meta_ckpt_dir", model))
    assert problem.startswith("--meta_ckpt_dir: found a second source beside --model_dir; expected one source")


def without_source(tmp_path: Path, *flags: object) -> str:
    """The report of a conversion that has no --model_dir."""
    before = tree(tmp_path)
    ran = headrace("convert", *flags, "--output_dir", tmp_path / "out", "--scheduler", "threads")
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    head, problem = ran.err.splitlines()
    assert head.endswith(REFUSED)
    assert tree(tmp_path) == before
    return problem.removeprefix("  - ")


def test_no_source(tmp_path: Path) -> None:
    assert without_source(tmp_path).startswith("--model_dir: found nothing; expected a value: Checkpoint to read")


@pytest.mark.parametrize("name", ["gone", "gone/deeper", "x" * 300])
def test_a_directory_that_is_not_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert without_source(tmp_path, "--meta_ckpt_dir", path).startswith(f"{path}: found no such directory")


def test_a_directory_that_is_a_file_or_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty"):
        path = tmp_path / name
        assert without_source(tmp_path, "--meta_ckpt_dir", path).startswith(f"{path / 'params.json'}: found no such file")


def test_a_hugging_face_directory_is_no_meta_checkpoint(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", CONFIG)
    assert without_source(tmp_path, "--meta_ckpt_dir", tmp_path / "model").startswith(
        f"{tmp_path / 'model' / 'params.json'}: found "
    )


def test_a_quantized_checkpoint_beside_meta_is_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    problem = without_source(tmp_path, "--meta_ckpt_dir", model, "--quant_ckpt_path", tmp_path / "quantized")
    assert problem.startswith("--quant_ckpt_path: found ")
    assert "expected --model_dir" in problem


def test_sizes_that_ranks_do_not_divide(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    assert one(refused(model, "--tp_size", 3)).startswith("--tp_size 3: found num_attention_heads 8; expected one of: 1, 2, 4, 8")


def test_an_output_inside_the_checkpoint(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    problems = refused(model, output=model)
    assert problems
    assert json.loads((model / "params.json").read_text())["dim"] == 64
