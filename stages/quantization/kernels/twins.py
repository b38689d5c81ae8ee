"""The kernels in NumPy: what those in C are compared with, and what is used where these were not built."""

from stages.quantization.kernels.casts import cast as cast
from stages.quantization.kernels.columns import awq_codes as awq_codes
from stages.quantization.kernels.columns import transposed as transposed
from stages.quantization.kernels.float8 import float8_codes as float8_codes
from stages.quantization.kernels.float8 import float8_rescaled as float8_rescaled
from stages.quantization.kernels.float8 import float8_scales as float8_scales
from stages.quantization.kernels.gguf_blocks import gguf_numbers as gguf_numbers
from stages.quantization.kernels.layout import arranged as arranged
from stages.quantization.kernels.smoothed import column_magnitudes as column_magnitudes
from stages.quantization.kernels.smoothed import smoothed as smoothed
from stages.quantization.kernels.smoothed import smoothed_codes as smoothed_codes
from stages.quantization.kernels.smoothed import smoothed_magnitudes as smoothed_magnitudes
from stages.quantization.kernels.weight_only import weight_only_codes as weight_only_codes
from stages.quantization.kernels.weight_only import weight_only_scales as weight_only_scales
