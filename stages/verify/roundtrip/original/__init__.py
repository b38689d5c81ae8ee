"""original: a source's weights as numbers under Hugging Face's names, rows on demand.

Each weight is read as the source's own format says, by no code of the stages that convert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor, Source
from stages.verify.column_words import ColumnWords
from stages.verify.roundtrip.original.codes import LastBlock
from stages.verify.roundtrip.original.config import canonical_config
from stages.verify.roundtrip.original.grouped import of_module
from stages.verify.roundtrip.original.names import canonical
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.roundtrip.original.packed import unpack
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, to_float32

KEY = "quantization_config"
# Models whose queries, keys and values have biases that config.json does not speak of.
BIASED = (
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2ForSequenceClassification",
    "MiMoForCausalLM",
    "QWenLMHeadModel",
)
QKV = ("q_proj", "k_proj", "v_proj", "c_attn")
ATTENTION = (*QKV, "o_proj", "wqkv", "wo", "out_proj")


class Original:
    """A source's weights by Hugging Face's parameter names, as numbers.

    Experts are named one by one, however they are stored. Packed weights are dequantized, and named `<module>.weight`. Biases of
    zeros that a quantizer adds to modules without a bias are left out.
    """

    def __init__(self, source: Source) -> None:
        """Raises BadInput naming every tensor that no known format explains. Reads the small tensors that say shapes."""
        self._source = source
        self.config: dict[str, Any] = canonical_config(source)
        settings = source.config.get(KEY)
        numbers = self._unpacked(settings if isinstance(settings, Mapping) else {})
        self._numbers = canonical(source.container, source.architecture, self.config, numbers)

    def names(self) -> tuple[str, ...]:
        """The name of every weight. A tied lm_head that the source does not store is not among them."""
        return tuple(self._numbers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight: [out_features, in_features] of a matrix."""
        return self._numbers[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of the numbers as the source stores them; float32 for what was dequantized."""
        return self._numbers[name].dtype

    def exact(self, name: str) -> bool:
        """Whether the source stores numbers, and not codes of them."""
        return self._numbers[name].exact

    def coded(self, name: str) -> bool:
        """Whether the source stores codes that a rank can keep."""
        return self._numbers[name].coded

    def in_columns(self, name: str) -> bool:
        """Whether a weight's codes are packed along columns, and `columns` can say them."""
        return self._numbers[name].in_columns

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the first axis, of type `dtype(name)`, which must not be changed.

        Raises IndexError where there are no such rows.
        """
        numbers = self._of(name, start, stop)
        return numbers.rows(start, stop) if start < stop else np.empty((0, *numbers.shape[1:]), dtype=numbers.dtype)

    def block(self, name: str, start: int, stop: int, buffers: Buffers) -> StoredRows:
        """The same rows, at least one, as they are stored. `buffers`: to read into, until the next call with them.

        Raises IndexError where there are no such rows.
        """
        return self._of(name, start, stop).block(start, stop, buffers)

    def columns(self, name: str, start: int, stop: int, features: tuple[int, int]) -> ColumnWords | None:
        """In-features [features) of rows [start, stop), where their codes of 4 bits are packed along columns; None for others.

        Raises IndexError where there are no such rows.
        """
        return self._of(name, start, stop).columns(start, stop, features)

    def _of(self, name: str, start: int, stop: int) -> Numbers:
        numbers = self._numbers[name]
        if not 0 <= start <= stop <= numbers.shape[0]:
            raise IndexError(f"{name}: rows {start} to {stop} of {numbers.shape[0]}")
        return numbers

    def _unpacked(self, settings: Mapping[str, Any]) -> dict[str, Numbers]:
        """Every tensor as numbers, by the source's own names. Raises BadInput naming each that no format explains."""
        modules: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
        for (module, parameter), tensor in self._source.named.items():
            modules[module][parameter] = tensor
        last_block, result, problems = LastBlock(), dict[str, Numbers](), list[Problem]()
        for module, parameters in modules.items():
            try:
                numbers = unpack(module, parameters, of_module(self._source.names_of(module), settings), last_block)
            except BadInput as error:
                problems += error.problems
                continue
            packed = "weight" in numbers and not numbers["weight"].exact
            if packed and "bias" in numbers and not self._has_bias(module) and not _any(numbers["bias"]):
                del numbers["bias"]
            result |= {f"{module}.{parameter}" if module else parameter: values for parameter, values in numbers.items()}
        if problems:
            raise BadInput(problems)
        return result

    def _has_bias(self, module: str) -> bool:
        """Whether the architecture gives a bias to a module."""
        last = module.rpartition(".")[2]
        if last in QKV and self._source.architecture in BIASED:
            return True
        if last in ATTENTION:
            return bool(self.config.get("attention_bias") or self.config.get("bias"))
        return bool(self.config.get("mlp_bias"))


def _any(bias: Numbers) -> bool:
    """Whether any value is not zero."""
    assert isinstance(bias, StoredNumbers), "no format packs a bias"
    return bool(to_float32(bias.rows(0, bias.shape[0])).any())
