"""Which files of a repository are chosen, by their names alone."""

from __future__ import annotations

import pytest

from stages.read.hub_files import COMPANIONS, choose, gguf_models
from stages.read.quantizer import FILES
from stages.read.remote_image import NAMES

SPLIT = [f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]


@pytest.mark.parametrize(
    ("names", "place", "files"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "m.gguf"], "", ("model.safetensors",)),
        (["config.json", "pytorch_model.bin", "consolidated.00.pth", "m.gguf"], "", ("pytorch_model.bin",)),
        (["params.json", "consolidated.01.pth", "m.gguf"], "", ("consolidated.00.pth", "consolidated.01.pth")),
        (["config.json", "m.gguf", "mmproj-m.gguf", "m-imatrix.gguf", "imatrix.gguf"], "m.gguf", ("m.gguf",)),
        (SPLIT[1:], SPLIT[0], tuple(SPLIT)),
    ],
    ids=["safetensors", "pickles", "Meta", "GGUF", "parts"],
)
def test_the_best_format_counts(names: list[str], place: str, files: tuple[str, ...]) -> None:
    weights = choose(names)
    assert weights is not None
    assert (weights.place, weights.files) == (place, files)


@pytest.mark.parametrize("names", [[], ["README.md", "config.json"], ["a-Q4_0.gguf", "a-Q8_0.gguf"], ["mmproj-F16.gguf"]])
def test_none_and_several_are_no_choice(names: list[str]) -> None:
    assert choose(names) is None


MODELS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.IQ4_XS.gguf", "f16.gguf", "m-imatrix-Q5_0.gguf", *SPLIT]


@pytest.mark.parametrize(
    ("tag", "stems"),
    [
        ("Q4_K_M", ["m-Q4_K_M"]),
        ("q4_k_m", ["m-Q4_K_M"]),
        ("iq4_xs", ["m.IQ4_XS"]),
        ("F16", ["f16"]),
        ("Q5_0", ["m-imatrix-Q5_0"]),
        ("Q8_0", ["Q8_0/m-Q8_0"]),
        ("m-Q8_0", ["Q8_0/m-Q8_0"]),
        ("K_M", ["m-Q4_K_M"]),
        ("_M", []),
        ("4_K_M", []),
        ("Q4.K_M", []),
        ("Q2_K", []),
    ],
)
def test_a_tag_is_the_end_of_a_name(tag: str, stems: list[str]) -> None:
    assert [stem for stem, _ in gguf_models(MODELS, tag)] == stems


def test_a_tag_means_gguf_whatever_else_there_is() -> None:
    weights = choose(["config.json", "model.safetensors", "tokenizer.json", "m-Q8_0.gguf"], "Q8_0")
    assert weights is not None
    assert (weights.first, weights.files) == ((), ("m-Q8_0.gguf",))
    assert weights.beside(["tokenizer.json"]) == []


@pytest.mark.parametrize("name", FILES)
def test_a_quantizers_own_settings_are_fetched_from_anywhere(name: str) -> None:
    assert COMPANIONS.fullmatch(name)
    assert name in NAMES
