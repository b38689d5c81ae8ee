/* Codes that are packed already, as a stream of bits a row, in the kernels' order.
   Facts: docs/format/quantized-layouts.md, sections 2 and 3. The twin is `KernelLayout.arrange` of layout.py. */
#include "order.h"
#include <string.h>

#define RUN 1024 /* bytes that are mixed at once */
#define LOW 0x0F0F0F0Fu

/* At most RUN bytes. Each 16 hold 32 codes, the first in the lowest bits: of their four words, the codes at the same place become
   neighbours. Nibbles are paired on whole words, before any byte moves. */
INLINE void mix_pairs(const uint8_t *restrict stream, size_t bytes, uint8_t *restrict out)
{
    uint32_t words[RUN / 4], even[2][RUN / 16], odd[2][RUN / 16];
    memcpy(words, stream, bytes);
    for (size_t i = 0; i < bytes / 16; i++) {
        uint32_t a = words[4 * i], b = words[4 * i + 1], c = words[4 * i + 2], d = words[4 * i + 3];
        even[0][i] = (a & LOW) | (b & LOW) << 4;
        even[1][i] = (c & LOW) | (d & LOW) << 4;
        odd[0][i] = (a >> 4 & LOW) | (b & ~LOW);
        odd[1][i] = (c >> 4 & LOW) | (d & ~LOW);
    }
    const uint8_t *first = (const uint8_t *)even[0], *second = (const uint8_t *)even[1];
    const uint8_t *third = (const uint8_t *)odd[0], *fourth = (const uint8_t *)odd[1];
    for (size_t i = 0; i < bytes / 4; i++) {
        out[4 * i] = first[i];
        out[4 * i + 1] = second[i];
        out[4 * i + 2] = third[i];
        out[4 * i + 3] = fourth[i];
    }
}

INLINE void mix(const uint8_t *stream, size_t bytes, int bits, uint8_t *out)
{
    if (bits == 8)
        mix8(stream, bytes, out);
    else
        mix_pairs(stream, bytes, out);
}

INLINE void in_order(const uint8_t *stream, size_t rows, size_t row_bytes, size_t columns, int bits, uint8_t *out)
{
    const size_t tile = TILE * (size_t)bits / 8;
    uint8_t mixed[RUN];
    for (size_t row = 0; row < rows; row++)
        for (size_t start = 0; start < row_bytes; start += RUN) {
            const size_t count = row_bytes - start < RUN ? row_bytes - start : RUN;
            const uint8_t *own = stream + row * row_bytes + start;
            if (columns == 1) {
                mix(own, count, bits, out + row * row_bytes + start);
                continue;
            }
            /* The tiles of the rows of a group alternate. */
            uint8_t *to = out + row / columns * columns * row_bytes + start * columns + row % columns * tile;
            mix(own, count, bits, mixed);
            for (size_t i = 0; i < count; i += tile)
                memcpy(to + i * columns, mixed + i, tile);
        }
}

void AT_LEVEL(arranged)(const uint8_t *stream, size_t rows, size_t row_bytes, struct order order, uint8_t *out)
{
    if (!order.mixed) {
        const uint8_t signs = order.bits == 8 ? 0x80 : 0x88;
        for (size_t i = 0; i < rows * row_bytes; i++)
            out[i] = stream[i] ^ signs;
    } else if (order.bits == 8) {
        in_order(stream, rows, row_bytes, order.columns, 8, out);
    } else {
        in_order(stream, rows, row_bytes, order.columns, 4, out);
    }
}
