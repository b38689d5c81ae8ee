"""Compare rows of a rank's tensor with those of the source that they hold.

Values that are stored as numbers must be the source's, rounded once to the model's type, bit for bit. Values that are stored as
codes may differ by as much as their format allows (bounds.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, partial

import ml_dtypes
import numpy as np

from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from stages.verify.kernels import checks
from stages.verify.matrices import Matrix, matrix
from stages.verify.named_weights import SourceWeights
from stages.verify.roundtrip import exact_codes, searched
from stages.verify.roundtrip.bounds import OfSource, allowed, rounding
from stages.verify.roundtrip.figures import BlockPlace, Figures
from stages.verify.roundtrip.kept_codes import compare_columns, knows_columns
from stages.verify.roundtrip.one_pass import knows, one_pass
from stages.verify.roundtrip.origin import Origin
from stages.verify.roundtrip.reached import MEASURED, largest_code, shared_by
from stages.verify.roundtrip.smoothed import allowed_error, is_smoothed, norm_factors
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, rounded, same_bits, to_float32

BLOCK_ELEMENTS = 1 << 17  # that are computed with at once: 512 KiB as float32
COLUMNS_ELEMENTS = 1 << 25  # that are read at once where the source has them along columns: each block maps whole lines of it
COLUMNS = 128  # rows whose words are read together
ONE_PASS_ELEMENTS = 1 << 20  # that are read at once where they need not be in memory as float32
BIT_BYTES = 1 << 21  # whose bits are compared at once
MODEL_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LEAST = {"float16": 2.0**-25}  # what a type has no number for, but zero


class SourceRows:
    """Rows of the source that several ranks ask for in turn: read once for all of them."""

    def __init__(self, source: SourceWeights) -> None:
        self.source = source
        self._name, self._first, self._rows = "", 0, StoredRows(np.empty(0))
        self._buffers = Buffers()

    def rows(self, name: str, start: int, stop: int) -> StoredRows:
        """Rows [start, stop) of a weight, which must not be changed: until others are asked for."""
        first = self._first
        if self._name != name or start < first or stop > first + len(self._rows.values):
            self._name, self._rows = "", StoredRows(np.empty(0))  # not two at once
            self._name, self._first, self._rows = name, start, self.source.block(name, start, stop, self._buffers)
        return self._rows.some(start - self._first, stop - self._first)


class TensorComparison:
    """Compares one rank's tensor with the source, some of its units at a time; `figures` are those of what has been compared.

    A unit is the rows that lie together in the file (`Matrix`), or a value of a vector. `kept`: the codes of a packed source are in
    the rank files unchanged. `origins`: of the tensor's rows. `buffers`: to compute in, which others may use between two blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: SourceRows,
        kept: bool,
        rank: int,
        name: str,
        origins: Sequence[Origin],
        buffers: Buffers | None = None,
    ) -> None:
        self.figures = Figures()
        self._checkpoint, self._factors = checkpoint, dict[str, np.ndarray]()
        self._tensor: FileTensor = checkpoint.ranks[rank][name]
        self._dtype = MODEL_DTYPES.get(checkpoint.config.get("dtype", ""), np.dtype(np.float32))
        self._rows, self._source, self._kept, self._buffers = rows, rows.source, kept, buffers or Buffers()
        self._origins: dict[int, list[Origin]] = defaultdict(list)
        self._matrices: dict[int, Matrix] = {}
        self._of_source: dict[int, dict[str, float | None]] = {}
        for origin in origins:
            self._origins[origin.expert or 0].append(origin)
            if len(self._tensor.shape) > 1 and (origin.expert or 0) not in self._matrices:
                self._matrices[origin.expert or 0] = matrix(checkpoint, rank, origin.module, origin.expert)

    @cached_property
    def _any_matrix(self) -> Matrix | None:
        return next(iter(self._matrices.values()), None)

    @property
    def unit_bytes(self) -> int:
        """The bytes of a unit."""
        return self._any_matrix.unit_bytes if self._any_matrix else self._tensor.dtype.itemsize

    @property
    def matrix_units(self) -> int:
        """The units of a matrix; where the tensor is a stack of several, its experts' follow one another."""
        return self._any_matrix.shape[0] // self._any_matrix.period if self._any_matrix else self._tensor.shape[0]

    @cached_property
    def block_units(self) -> int:
        """The units that are to be compared at once: as many as stay in the processor's cache while it is computed with them."""
        whole = self._any_matrix
        if whole is None:
            return max(BIT_BYTES // self.unit_bytes, 1)
        origins = [each for some in self._origins.values() for each in some if each.source]
        if whole.kind == "dense" and all(self._same_type(each) for each in origins):
            return max(BIT_BYTES // (self._features * self._tensor.dtype.itemsize), 1)
        if self._kept and knows_columns(whole) and any(self._source.in_columns(each.source) for each in origins):
            rows = max(COLUMNS_ELEMENTS // whole.shape[1] // COLUMNS, 1) * COLUMNS
            return max(rows // whole.period, self._few_units)
        return self._few_units

    @cached_property
    def _few_units(self) -> int:
        """The units of codes that are compared at once where they are compared row by row."""
        assert self._any_matrix
        elements = ONE_PASS_ELEMENTS if knows(self._any_matrix) else BLOCK_ELEMENTS
        return max(elements // (self._features * self._any_matrix.period), 1)

    @cached_property
    def _features(self) -> int:
        """The longest rows of the tensor or of the source: of row-parallel weights, the source's are longer."""
        assert self._any_matrix
        origins = [each for some in self._origins.values() for each in some if each.source]
        return max([self._any_matrix.shape[1], *(math.prod(self._source.shape(each.source)[1:]) for each in origins)])

    def compare(self, data: np.ndarray, first: int) -> None:
        """Compare units from `first` on, uint8 [units, unit_bytes] as the file has them; they are of one matrix."""
        expert, unit = divmod(first, self.matrix_units)
        stored = self._matrices.get(expert)
        period = stored.period if stored else 1
        start = unit * period
        for origin in self._origins[expert]:
            top, bottom = max(start, origin.rows[0]), min(start + len(data) * period, origin.rows[1])
            if top >= bottom:
                continue
            place = BlockPlace(top, origin.expert)
            left, right = (top - start) // period, -(-(bottom - start) // period)
            some, base = data[left:right], start + left * period
            if stored is None or stored.kind == "dense":
                actual = some.view(self._tensor.dtype)
                self._compare_numbers(actual.reshape(-1) if stored is None else actual, origin, place)
            elif not self._compare_columns(stored, some, base, bottom - top, origin, place):
                for at in range(0, len(some), self._few_units):
                    few, row = some[at : at + self._few_units], base + at * period
                    upper, lower = max(row, top), min(row + len(few) * period, bottom)
                    power = self.figures.power
                    self._compare_codes(stored, few, row, lower - upper, origin, BlockPlace(upper, origin.expert))
                    if stored.kind in MEASURED and self._is_measured(stored, origin):
                        codes = few[upper - row : lower - row]  # a row is a unit
                        # Where all values are zeros in the model's type, there is no largest one.
                        if self.figures.power - power > codes.size * LEAST.get(self._dtype.name, 1e-35) ** 2:
                            self.figures.reach(shared_by(stored, origin), largest_code(stored, codes))

    def _same_type(self, origin: Origin) -> bool:
        """Whether the rank has an origin's values as the source does, if it is right."""
        return not origin.source or (self._source.exact(origin.source) and self._source.dtype(origin.source) == self._tensor.dtype)

    def _expected(self, origin: Origin, row: int, count: int) -> StoredRows:
        """The source's values of some rows of the rank from `row` on."""
        start = origin.source_rows[0] + row - origin.rows[0]
        rows = self._rows.rows(origin.source, start, start + count)
        return rows if origin.columns is None else rows.columns(*origin.columns)

    def _compare_numbers(self, actual: np.ndarray, origin: Origin, place: BlockPlace) -> None:
        """Count values that are stored as numbers, which must be the source's, rounded once.

        Where the source is packed, its numbers may have been computed in another order: they may differ by two roundings.
        """
        if not origin.source:
            self._compare_padding(to_float32(actual), place)
            return
        rows = self._expected(origin, place.row, len(actual))
        expected = rows.numbers(self._buffers) if rows.bits or rows.scales is not None else rows.values
        if origin.added:
            # An addition in float16 is rounded there (docs/format/families.md, section 7); in float64 it undoes a subtraction.
            wide = expected if expected.dtype in (np.float16, np.float64) else to_float32(expected)
            expected = wide + wide.dtype.type(origin.added)
        if _same(actual, expected):
            self.figures.equal(actual.size)
            return
        numbers = to_float32(expected, self._buffers.array("expected", expected.shape))
        if actual.shape != expected.shape:
            self.figures.compare(np.full(expected.shape, np.nan, np.float32), numbers, 0.0, place)
            return
        wanted = rounded(expected, actual.dtype)
        same = same_bits(actual, wanted)
        if same and same_bits(rounded(wanted, expected.dtype), expected):
            self.figures.lossless(numbers)
            return
        found = to_float32(actual, self._buffers.array("numbers", actual.shape))
        if is_smoothed(self._checkpoint, origin.tensor):
            # By which factors it is divided is told by the weights behind it, which are compared with them.
            wrong = ~np.isfinite(found) | ((found == 0) != (numbers == 0)) | (found * numbers < 0)
            self.figures.compare(np.where(wrong, np.float32(np.nan), found), found, 0.0, place, buffers=self._buffers)
        elif same or not self._source.exact(origin.source):
            bound = partial(rounding, numbers, actual.dtype, 2, self._buffers)
            self.figures.compare(found, numbers, bound, place, same, self._buffers)
        else:
            self.figures.compare(found, to_float32(wanted), 0.0, place, buffers=self._buffers)

    def _compare_columns(self, stored: Matrix, data: np.ndarray, base: int, count: int, origin: Origin, place: BlockPlace) -> bool:
        """Count values as `_compare_codes` does, where their codes are the source's, which lie along columns, and all are right."""
        if not (self._kept and origin.source and knows_columns(stored) and self._source.in_columns(origin.source)):
            return False
        start, features = origin.source_rows[0] + place.row - origin.rows[0], origin.columns or (0, stored.shape[1])
        words = self._source.columns(origin.source, start, start + count, features)
        if words is None or features[1] - features[0] != stored.shape[1]:
            return False
        found = compare_columns(stored, data, base, place.row, words, self._dtype, self.figures.worst)
        return found is not None and self.figures.right(count * stored.shape[1], *found)

    def _compare_codes(self, stored: Matrix, data: np.ndarray, base: int, count: int, origin: Origin, place: BlockPlace) -> None:
        """Count values that are stored as codes: `count` rows from `place.row` on, of units that begin with row `base`."""
        first, last = place.row, place.row + count
        rows = self._expected(origin, first, count) if origin.source else None
        kept = self._keeps(stored, origin)
        held = exact_codes.kept_scales(stored, rows, first, last, self._dtype) if kept and rows is not None else None
        bound = held.allowance if held else allowed(stored, first, last, self._dtype, kept, self._scales(stored, origin))
        if rows is not None and (
            held is None or (held.right and (held.tell_codes or exact_codes.same_codes(stored, data, base, first, rows)))
        ):
            found = one_pass(stored, data, base, first, rows, bound, self.figures.worst)
            if found and self.figures.right(count * stored.shape[1], *found):
                return
        actual = stored.numbers(data, base, self._buffers)[first - base : last - base]
        if rows is None:
            self._compare_padding(actual, place)
            return
        expected = rows.numbers(self._buffers)
        if actual.shape != expected.shape:
            self.figures.compare(np.full(expected.shape, np.nan, np.float32), expected, 0.0, place)
            return
        if held:
            codes = stored.signed(data)[first - base : last - base]
            exactly = partial(exact_codes.allowed_error, codes, rows, held, actual, expected)
            self.figures.compare(actual, expected, exactly, place, buffers=self._buffers)
            return
        if stored.kind == "smoothquant" and not kept:
            codes = stored.signed(data)[first - base : last - base]
            self._compare_smoothed(stored, actual, expected, origin, place, codes if self._by_row(origin) else None)
            return
        factors = stored.prequant
        if stored.kind == "awq" and factors is not None and not kept:
            groups = stored.scales(first, last).shape[1]
            off = partial(searched.allowed_error, expected, factors, groups)
            self.figures.compare(actual * factors, expected, off, place, buffers=self._buffers)
            return
        at_most = partial(bound.of, actual, expected, stored.zeros(first, last), self._buffers)
        self.figures.compare(actual if factors is None else actual * factors, expected, at_most, place, buffers=self._buffers)

    def _keeps(self, stored: Matrix, origin: Origin) -> bool:
        """Whether the rank has the codes of an origin. Those of float8 with one scale, and of 4-bit floats, it has of no others."""
        if stored.kind in ("fp8", "nvfp4") and self._scales(stored, origin) is None:
            return False
        # Numbers are quantized to NVFP4 by no conversion.
        return bool(origin.source) and (self._kept or stored.kind == "nvfp4") and self._source.coded(origin.source)

    def _is_measured(self, stored: Matrix, origin: Origin) -> bool:
        """Whether a matrix has a scale that was measured of the source's numbers."""
        return not self._keeps(stored, origin) and (stored.kind != "fp8" or self._scales(stored, origin) is None)

    def _scales(self, stored: Matrix, origin: Origin) -> OfSource | None:
        """The scales of float codes in the source, of a matrix that has one of all; None where a part has none."""
        if stored.kind not in ("fp8", "nvfp4"):
            return None
        expert = origin.expert or 0
        if expert not in self._of_source:
            names = {each.source for each in self._origins[expert] if each.source}
            self._of_source[expert] = {name: self._source.common_scale(name) for name in names}
        found = self._of_source[expert]
        scales = [scale for scale in found.values() if scale is not None]
        own = found.get(origin.source)
        return OfSource(own, max(scales)) if own is not None and len(scales) == len(found) else None

    def _by_row(self, origin: Origin) -> bool:
        """Whether the rows of a matrix of SmoothQuant are whole and have a scale each."""
        algorithm = str(self._checkpoint.config.get("quantization", {}).get("quant_algo"))
        return "PER_CHANNEL" in algorithm and origin.columns is None

    def _compare_smoothed(
        self,
        stored: Matrix,
        actual: np.ndarray,
        expected: np.ndarray,
        origin: Origin,
        place: BlockPlace,
        codes: np.ndarray | None,
    ) -> None:
        """Count values of SmoothQuant; those of in-features that the norm makes zeros are as they may be.

        `codes`: of whole rows that have a scale each; None for others.
        """
        factors = stored.prequant
        if factors is None:
            if origin.module not in self._factors:
                self._factors[origin.module] = norm_factors(self._checkpoint, self._source, origin)
            factors = self._factors[origin.module]
            hidden = np.isnan(factors)
            factors, expected = np.where(hidden, np.float32(0), factors), np.where(hidden, np.float32(0), expected)
        bound = partial(allowed_error, stored, expected, place.row, factors, codes)
        self.figures.compare(actual * factors, expected, bound, place, buffers=self._buffers)

    def _compare_padding(self, actual: np.ndarray, place: BlockPlace) -> None:
        """Count rows behind the end of the vocabulary, which must be zeros."""
        if actual.any():
            self.figures.compare(actual, np.zeros_like(actual), 0.0, place)
        else:
            self.figures.equal(actual.size)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are of one type and equal bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = checks.same_bytes(a, b)
    return same_bits(a, b) if same is None else same
