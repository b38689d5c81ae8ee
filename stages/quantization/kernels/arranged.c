/* Codes that are packed already, as a stream of bits a row, in the kernels' order.
   Facts: docs/format/quantized-layouts.md, sections 2 and 3. The twin is `KernelLayout.arrange` of layout.py. */
#include "order.h"
#include <string.h>

/* 16 bytes hold 32 codes, the first in the lowest bits: in each word, the codes of the four words at the same place are neighbours. */
INLINE void mix_words(const uint8_t *restrict stream, size_t bytes, uint8_t *restrict out)
{
    for (size_t i = 0; i < bytes; i += 16) {
        uint32_t words[4], mixed[4];
        memcpy(words, stream + i, 16);
        for (int j = 0; j < 4; j++) {
            uint32_t a = words[0] >> 8 * j, b = words[1] >> 8 * j, c = words[2] >> 8 * j, d = words[3] >> 8 * j;
            uint32_t even = (a & 15u) | (b & 15u) << 4 | (c & 15u) << 8 | (d & 15u) << 12;
            uint32_t odd = (a >> 4 & 15u) | (b & 240u) | (c & 240u) << 4 | (d & 240u) << 8;
            mixed[j] = even | odd << 16;
        }
        memcpy(out + i, mixed, 16);
    }
}

INLINE void in_order(const uint8_t *stream, size_t rows, size_t row_bytes, size_t columns, int bits, uint8_t *out)
{
    const size_t run = columns == 1 ? row_bytes : TILE * (size_t)bits / 8;
    for (size_t row = 0; row < rows; row += columns)
        for (size_t start = 0; start < row_bytes; start += run)
            for (size_t column = 0; column < columns; column++, out += run) {
                const uint8_t *own = stream + (row + column) * row_bytes + start;
                if (bits == 8)
                    mix8(own, run, out);
                else
                    mix_words(own, run, out);
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
