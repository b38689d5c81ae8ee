"""A cache of 8 bits rounds what later steps read, and nothing of a step itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from stages.read.ranks import open_checkpoint
from stages.verify.forward.attention import KeyValueCache
from stages.verify.forward.cached import as_cached
from stages.verify.forward.decoder import Decoder
from tests.support import act_ranges, checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert

VALUES = torch.linspace(-3, 3, 1001)


def test_codes_of_int8() -> None:
    codes = np.clip(np.rint(VALUES.numpy() / np.float32(0.02)), -128, 127)
    assert np.array_equal(as_cached(VALUES, "INT8", 0.02).numpy(), codes * np.float32(0.02))


def test_codes_of_float8() -> None:
    expected = np.clip(VALUES.numpy() / np.float32(0.005), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(as_cached(VALUES, "FP8", 0.005).numpy(), expected * np.float32(0.005))


def test_no_codes() -> None:
    assert as_cached(VALUES, "", 1.0) is VALUES


def test_those_of_a_step_are_as_they_are() -> None:
    cache, k = KeyValueCache(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    first, _ = cache.extend(0, 0, k, k, "INT8", 0.5)
    assert first.equal(k)
    both, _ = cache.extend(0, 0, k, k, "INT8", 0.5)
    assert both[:, :3].equal(as_cached(k, "INT8", 0.5))
    assert both[:, 3:].equal(k)


@pytest.mark.parametrize("kind", ["int8_kv_cache", "fp8_kv_cache"])
def test_a_decoder_reads_its_cache_as_it_is_kept(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    tensors = source.values(source.LLAMA)
    checkpoints.save(folder / "model", source.LLAMA, tensors)
    ranges = act_ranges.write(folder / "ranges", tensors)
    logits = {}
    for name, flags in (("plain", ()), ("cache", (f"--{kind}", "--act_range", ranges))):
        assert convert(folder / "model", folder / name, "--tp_size", 2, *flags).code == 0
        decoder, cache = Decoder(open_checkpoint(folder / name)), KeyValueCache()
        tokens = torch.arange(12)
        steps = torch.cat([decoder.step(token, cache) for token in tokens.split(1)])
        logits[name] = decoder.logits(tokens), steps
        assert not decoder.unused()
    at_once, by_step = logits["cache"]
    assert at_once.equal(logits["plain"][0]), "nothing is read of the cache"
    assert torch.allclose(logits["plain"][1], logits["plain"][0], rtol=1e-4, atol=1e-4)
    largest = float(at_once.abs().max())
    assert by_step[0].equal(logits["plain"][1][0])
    assert 1e-4 * largest < float((by_step - at_once).abs().max()) < largest
