/* The table of a level's kernels, which kernels.h declares. */
#include "kernels.h"

const struct kernels AT_LEVEL(kernels) = {
    .name = LEVEL_NAME,
    .weight_only_scales = AT_LEVEL(weight_only_scales),
    .weight_only_codes = AT_LEVEL(weight_only_codes),
    .float8_scales = AT_LEVEL(float8_scales),
    .float8_codes = AT_LEVEL(float8_codes),
    .float8_rescaled = AT_LEVEL(float8_rescaled),
    .cast = AT_LEVEL(cast),
    .arranged = AT_LEVEL(arranged),
    .transposed = AT_LEVEL(transposed),
    .gguf_numbers = AT_LEVEL(gguf_numbers),
    .gguf_cast = AT_LEVEL(gguf_cast),
    .awq_codes = AT_LEVEL(awq_codes),
    .column_magnitudes = AT_LEVEL(column_magnitudes),
    .smoothed_magnitudes = AT_LEVEL(smoothed_magnitudes),
    .smoothed = AT_LEVEL(smoothed),
    .smoothed_codes = AT_LEVEL(smoothed_codes),
};
