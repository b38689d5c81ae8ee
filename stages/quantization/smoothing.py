"""The layers of a target in SmoothQuant: which matrices share their factors, and what stands before each.

Facts: docs/format/quantized-layouts.md, section 4d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.model.quantization import Quantization
from pipeline.model.tables import Slot
from pipeline.tensor.derived import constant
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import X_RANGE, Y_RANGE, plain
from stages.quantization.entries import Entry, entries_of, whole_entry
from stages.quantization.targets import smoothquant, smoothquant_codes
from stages.quantization.targets.smoothquant_values import Product

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray
    from stages.shard import Sharding


@dataclass(frozen=True)
class Sharing:
    """The modules of a layer that take the same activations. `norm`: before them; or else `owner`, which has their first scale."""

    modules: tuple[str, ...]
    norm: str = ""
    owner: str = ""


LAYER = (
    Sharing(("attention.qkv",), norm="input_layernorm"),
    Sharing(("attention.dense",), owner="attention"),
    Sharing(("mlp.fc", "mlp.gate"), norm="post_layernorm"),
    Sharing(("mlp.proj",), owner="mlp"),
)


@dataclass(frozen=True)
class _Part:
    """One source's share of a module."""

    name: str
    slot: Slot
    parameters: Mapping[str, BlockArray]


@dataclass(frozen=True)
class Smoothing:
    """The packing of a target's layers. `weight`: the float16 numbers of a module's parameters; `source`: its source's name."""

    sharding: Sharding
    quantization: Quantization
    weight: Callable[[Mapping[str, BlockArray]], BlockArray]
    source: Callable[[str], str]

    def entries(self, modules: Mapping[str, Mapping[str, BlockArray]], layer: int) -> dict[TensorName, Entry]:
        """The quantized modules of a layer, with their biases, and what changes in the norms before them."""
        base, entries = f"transformer.layers.{layer}", dict[TensorName, Entry]()
        for sharing in LAYER:
            kept = {name: self._parts(f"{base}.{name}", modules) for name in sharing.modules}
            parts = {f"{base}.{name}": each for name, each in kept.items() if each}
            for part in (each for several in parts.values() for each in several if "bias" in each.parameters):
                entries[TensorName(part.name, "bias")] = Entry(part.parameters["bias"], part.slot, plain("bias"))
            if self.quantization.from_numbers:
                entries |= self._quantized(base, layer, sharing, parts, modules)
            else:
                entries |= self._kept(base, layer, sharing, parts)
        return entries

    def _parts(self, name: str, modules: Mapping[str, Mapping[str, BlockArray]]) -> list[_Part]:
        """The parts of a module in the order of its rows; none where the model has no such module."""
        slot = self.sharding.layout.find(name)
        names = [f"{name}.{part.name}" for part in slot.module.parts] or [name] if slot else []
        found = [(each, self.sharding.layout.find(each)) for each in names if each in modules]
        return [_Part(each, slot, modules[each]) for each, slot in found if slot]

    def _quantized(
        self,
        base: str,
        layer: int,
        sharing: Sharing,
        parts: Mapping[str, list[_Part]],
        modules: Mapping[str, Mapping[str, BlockArray]],
    ) -> dict[TensorName, Entry]:
        quantization, result = self.quantization, dict[TensorName, Entry]()
        weights = {each.name: self.weight(each.parameters) for several in parts.values() for each in several}
        named = [(self.source(name), weight) for name, weight in weights.items()]
        first = next(iter(parts.values()))[0]
        assert quantization.smoothquant is not None, "of an algorithm that smooths"
        smooth = smoothquant.factors(named, first.parameters[X_RANGE], quantization.smoothquant)
        for name, several in parts.items():
            outputs = [each.parameters[Y_RANGE] for each in several]
            steps = smoothquant.steps(smooth, several[0].parameters[X_RANGE], outputs)
            packed, own = self._packed(several, weights, smooth, steps), smoothquant.Packed()
            if several[0].slot.part and not self._by_part(several[0].slot):
                own["per_channel_scale"] = packed[0]["per_channel_scale"]  # one for all parts
                packed = [{"weight": each["weight"]} for each in packed]
            for part, each in zip(several, packed, strict=True):
                result |= entries_of(part.name, part.slot, each)
            if not quantization.per_token:
                own["act_scale"] = smoothquant.act_scale(outputs)
            if sharing.owner:
                own["smoother"] = smoothquant.smoother(smooth)
            result |= entries_of(name, Slot(several[0].slot.module, None, layer, None), own)
            if several[0] is first:
                result |= self._first_scale(base, layer, sharing, steps)
        if sharing.norm:
            name = f"{base}.{sharing.norm}"
            slot = self.sharding.layout.find(name)
            assert slot is not None, name
            gain = modules[name]["weight"]
            result[TensorName(name, "weight")] = Entry(
                smoothquant.divided(self.source(name), gain, smooth), slot, plain("weight", matrix=False)
            )
        return result

    def _first_scale(self, base: str, layer: int, sharing: Sharing, steps: BlockArray | None) -> dict[TensorName, Entry]:
        """The scale that activations are multiplied by; with a scale a token, 1 behind a norm, and nothing elsewhere."""
        name = TensorName(f"{base}.{sharing.norm}", "scale_to_int") if sharing.norm else None
        name = name or TensorName(f"{base}.{sharing.owner}", "quantization_scaling_factor")
        if not self.quantization.per_token and steps is not None:
            return dict([whole_entry(name, layer, smoothquant.to_int(steps)[0])])
        return dict([whole_entry(name, layer, constant(str(name), (1.0,)))]) if sharing.norm else {}

    def _by_part(self, slot: Slot) -> bool:
        """Whether each part of a fused module has its own scales: those of attention, or all, where each row has one."""
        return self.quantization.per_channel or bool(slot.part and slot.part.heads)

    def _packed(
        self, parts: list[_Part], weights: Mapping[str, BlockArray], smooth: BlockArray, steps: BlockArray
    ) -> list[smoothquant.Packed]:
        quantization, model = self.quantization, self.sharding.model
        named = [(self.source(each.name), weights[each.name]) for each in parts]
        if quantization.per_channel:
            return [smoothquant.by_channel(*each, smooth, steps, quantization.per_token) for each in named]
        per_token = quantization.per_token
        if self._by_part(parts[0].slot):
            alike = model.num_attention_heads == model.num_key_value_heads
            product: Product = "float" if alike else "divided"
            each_alone = [smoothquant.by_tensor([each], smooth, steps, per_token, product, True) for each in named]
            return [packed for [packed] in each_alone]
        return smoothquant.by_tensor(named, smooth, steps, per_token, "half", False)

    def _kept(self, base: str, layer: int, sharing: Sharing, parts: Mapping[str, list[_Part]]) -> dict[TensorName, Entry]:
        """Modules whose source has codes of 8 bits with a scale a row: as they are, and nothing smoothed."""
        result = self._first_scale(base, layer, sharing, None)
        for name, several in parts.items():
            for part in several:
                result |= entries_of(part.name, part.slot, smoothquant_codes.pack(self.source(part.name), part.parameters))
            if sharing.owner:
                packed = {"smoother": smoothquant_codes.no_smoother(several[0].parameters)}
                result |= entries_of(name, Slot(several[0].slot.module, None, layer, None), packed)
        return result
