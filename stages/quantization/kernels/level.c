/* The table of a level's kernels. */
#include "kernels.h"

extern int AT_LEVEL(weight_only_scales)(const uint16_t *, enum number, size_t, size_t, size_t, int, float *);
extern int AT_LEVEL(weight_only_codes)(const uint16_t *, enum number, size_t, size_t, size_t, struct order, uint8_t *, uint8_t *);
extern int AT_LEVEL(float8_scales)(const void *, enum number, size_t, size_t, size_t, float, float *);
extern int AT_LEVEL(float8_codes)(const void *, enum number, size_t, size_t, size_t, float, uint8_t *);
extern void AT_LEVEL(float8_rescaled)(const uint8_t *, size_t, float, float, uint8_t *);
extern void AT_LEVEL(cast)(const void *, enum number, size_t, enum number, void *);
extern void AT_LEVEL(arranged)(const uint8_t *, size_t, size_t, struct order, uint8_t *);
extern void AT_LEVEL(transposed)(const uint32_t *, size_t, size_t, size_t, uint32_t *);
extern void AT_LEVEL(awq_codes)(const uint32_t *, size_t, size_t, size_t, uint8_t *);
extern void AT_LEVEL(gguf_numbers)(const uint8_t *, size_t, enum block, float *);

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
    .awq_codes = AT_LEVEL(awq_codes),
};
