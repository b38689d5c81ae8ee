"""A decoder sees what is wrong with rank files: values in another place, copies that differ, padding, too little and too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from pipeline import convert
from pipeline.errors import VerificationFailed
from pipeline.tensor.checkpoint import Checkpoint
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from tests.end_to_end.test_family_forward import CASES, SIZES, TOLERANCE, build, difference, ranks_of
from tests.support.lazy import Held

Arrays = dict[str, np.ndarray]
TOKENS = torch.randint(SIZES["vocab_size"], (20,), generator=torch.Generator().manual_seed(5))
LAYER = "transformer.layers.1."


@dataclass(frozen=True)
class InMemory(Held):
    """A tensor of a rank file whose values are in memory."""

    path: str = ""

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> Held:
        return Held(np.ascontiguousarray(self.values).reshape(-1).view(dtype).reshape(shape))


@dataclass(frozen=True)
class Built:
    """A model's ranks, their tensors, and what the model computes."""

    checkpoint: Checkpoint
    files: tuple[Arrays, ...]
    theirs: Tensor

    def changed(self, rank: int, name: str, values: np.ndarray | None) -> Decoder:
        """A decoder of the ranks with other values of one tensor, or without it."""
        ranks = [dict(held) for held in self.checkpoint.ranks]
        del ranks[rank][name]
        if values is not None:
            ranks[rank][name] = InMemory(values)
        return Decoder(Checkpoint(self.checkpoint.directory, self.checkpoint.config, tuple(ranks)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    done: dict[tuple[str, str], Built] = {}

    def get(name: str, target: str = "tp2") -> Built:
        if (name, target) not in done:
            directory = tmp_path_factory.mktemp(name)
            model = build(CASES[name])
            model.save_pretrained(directory / "model")
            with torch.no_grad():
                theirs = model(TOKENS[None]).logits[0]
            checkpoint = open_checkpoint(ranks_of(directory / "model", directory / "ranks", target))
            files = tuple(load_file(directory / f"ranks/rank{n}.safetensors") for n in range(len(checkpoint.ranks)))
            done[name, target] = Built(checkpoint, files, theirs)
        return done[name, target]

    return get


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_moe", "qwen3", "phi3_partial", "phimoe_long", "granite_tied", "gemma3"])
def test_no_tensor_could_be_another(name: str, built: Callable[..., Built]) -> None:
    """That ranks compute what the model computes sees values in the wrong place, whichever tensor they are in."""
    made = built(name)
    for changed, values in made.files[0].items():
        # A copy changes on every rank, or the ranks would contradict one another.
        copied = np.array_equal(values, made.files[1][changed])
        moved = InMemory(np.roll(values, 1))
        ranks = [{**rank, changed: moved} if n == 0 or copied else rank for n, rank in enumerate(made.checkpoint.ranks)]
        decoder = Decoder(Checkpoint(made.checkpoint.directory, made.checkpoint.config, tuple(ranks)))
        assert difference(decoder.logits(TOKENS), made.theirs) > 100 * TOLERANCE, changed


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_moe", "qwen3", "phimoe", "gemma3"])
def test_no_copy_differs(name: str, built: Callable[..., Built]) -> None:
    """In one bit, of a row that no token asks for, or in the sign of a zero."""
    made, copies = built(name), 0
    for changed, values in made.files[0].items():
        if np.array_equal(values, made.files[1][changed]):
            copies += 1
            other = values.copy()
            other.reshape(-1).view(np.uint32)[-1] ^= 1
            with pytest.raises(VerificationFailed, match=f"rank1.safetensors: {changed}: found other values than on rank 0"):
                made.changed(1, changed, other).logits(TOKENS)
    assert copies >= 5, "norms, and in some families embedding, router and biases"


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_moe", "phi3", "phimoe", "gemma2"])
def test_every_tensor_is_needed(name: str, built: Callable[..., Built]) -> None:
    made = built(name)
    for rank in range(2):
        for missing in made.files[rank]:
            if missing == "lm_head.bias":
                continue  # a model without it is one that there is
            with pytest.raises(VerificationFailed, match=f"rank{rank}.safetensors: {missing}: found nothing"):
                made.changed(rank, missing, None).logits(TOKENS)


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_moe", "qwen3", "phi3", "phimoe", "gemma2"])
def test_every_shape_is_looked_at(name: str, built: Callable[..., Built]) -> None:
    """A vector of one value would be any vector; a matrix without its last row is another."""
    made = built(name)
    for changed, values in made.files[1].items():
        with pytest.raises(VerificationFailed, match=r"rank\d.safetensors: ") as raised:
            made.changed(1, changed, values[:1] if values.ndim == 1 else values[:-1]).logits(TOKENS)
        assert raised.value.problems[0].subject == f"rank1.safetensors: {changed}"


@pytest.mark.parametrize(
    ("target", "name", "rank"), [("tp4", "lm_head.weight", 3), ("rows", "transformer.vocab_embedding.weight", 1)]
)
def test_padding_is_zeros(target: str, name: str, rank: int, built: Callable[..., Built]) -> None:
    made = built("llama", target)
    values = made.files[rank][name].copy()
    assert not values[-1].any(), "the vocabulary is odd"
    values[-1, 5] = 1e-30
    with pytest.raises(VerificationFailed, match=f"rank{rank}.safetensors: {name}: found values in row {len(values) - 1}"):
        made.changed(rank, name, values).logits(TOKENS)


def test_what_nothing_uses_is_named(built: Callable[..., Built]) -> None:
    made = built("llama_biases", "pp2")
    ranks = [dict(held) for held in made.checkpoint.ranks]
    held = InMemory(np.ones(4, np.float32))
    more = {
        0: ("transformer.layers.9.mlp.fc.weight", "lm_head.weight", "transformer.layers.0.mlp.fc.zero"),
        1: (f"{LAYER}mlp.fc.bias", "embed_positions_local", "nowhere.clamp_val"),
    }
    for rank, names in more.items():
        ranks[rank] |= dict.fromkeys(names, held)
    decoder = Decoder(Checkpoint(made.checkpoint.directory, made.checkpoint.config, tuple(ranks)))
    expected = [f"rank{rank}.safetensors: {name}" for rank, names in more.items() for name in sorted(names)]
    assert set(expected) <= set(decoder.unused())
    with pytest.raises(VerificationFailed):
        decoder.logits(TOKENS)


def test_ranks_that_are_not_those_of_the_mapping(built: Callable[..., Built]) -> None:
    made = built("llama_biases", "pp2")
    with pytest.raises(VerificationFailed, match="found 1 rank files; expected 2"):
        Decoder(Checkpoint(made.checkpoint.directory, made.checkpoint.config, made.checkpoint.ranks[:1]))


def test_the_loader_s_own_buffers_are_no_surplus(tmp_path: Path) -> None:
    build(CASES["llama"]).save_pretrained(tmp_path / "model")
    options = {"dtype": "float32", "scheduler": "synchronous", "write_rope_buffers": True}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", **options)
    checkpoint = open_checkpoint(tmp_path / "ranks")
    assert "rotary_inv_freq" in checkpoint.ranks[0]
    decoder = Decoder(checkpoint)
    decoder.logits(TOKENS)
    assert decoder.unused() == []
