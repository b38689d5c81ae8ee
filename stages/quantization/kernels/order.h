/* The order in which TensorRT-LLM's kernels read codes. Facts: docs/format/quantized-layouts.md, sections 2 and 3. */
#ifndef HEADRACE_ORDER_H
#define HEADRACE_ORDER_H

#include "kernels.h"

#define TILE 64 /* in-features, whose bytes lie together where out-features alternate */

/* Codes of 8 bits: in each 16, the bytes of the two halves alternate. */
INLINE void mix8(const uint8_t *restrict codes, size_t count, uint8_t *restrict out)
{
    for (size_t i = 0; i < count; i += 16)
        for (size_t j = 0; j < 8; j++) {
            out[i + 2 * j] = codes[i + j];
            out[i + 2 * j + 1] = codes[i + 8 + j];
        }
}

/* Codes of 4 bits, one a byte: in each 32, the codes of the four quarters are neighbours, the first in the lowest bits. */
INLINE void mix4(const uint8_t *restrict codes, size_t count, uint8_t *restrict out)
{
    for (size_t i = 0; i < count; i += 32)
        for (size_t j = 0; j < 8; j++) {
            const uint8_t *own = codes + i + j;
            out[i / 2 + 2 * j] = (uint8_t)(own[0] | own[8] << 4);
            out[i / 2 + 2 * j + 1] = (uint8_t)(own[16] | own[24] << 4);
        }
}

/* Codes of 4 bits, one a byte, in pairs: the first of two in the low half. */
INLINE void pair4(const uint8_t *restrict codes, size_t count, uint8_t *restrict out)
{
    for (size_t i = 0; i < count / 2; i++)
        out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
}

#endif
