/* Sources that are packed along their columns: GPTQ's words, which hold in-features of one column, and AWQ's, which hold eight columns.
   Facts: docs/format/quantized-layouts.md, sections 5 and 6. The twin is columns.py. */
#include "kernels.h"
#include <string.h>

#define BLOCK 16

/* `rows` and `columns` at most BLOCK. */
INLINE void transposed_block(const uint32_t *words, size_t stride, size_t rows, size_t columns, uint32_t *out, size_t out_stride)
{
    for (size_t column = 0; column < columns; column++)
        for (size_t row = 0; row < rows; row++)
            out[column * out_stride + row] = words[row * stride + column];
}

void AT_LEVEL(transposed)(const uint32_t *words, size_t stride, size_t rows, size_t columns, uint32_t *out, size_t out_stride)
{
    /* Words of the same rows one after the other, as they lie in the file. */
    for (size_t row = 0; row < rows; row += BLOCK)
        for (size_t column = 0; column < columns; column += BLOCK) {
            const uint32_t *from = words + row * stride + column;
            uint32_t *to = out + column * out_stride + row;
            if (rows - row >= BLOCK && columns - column >= BLOCK) {
                transposed_block(from, stride, BLOCK, BLOCK, to, out_stride);
            } else {
                size_t height = rows - row < BLOCK ? rows - row : BLOCK;
                transposed_block(from, stride, height, columns - column < BLOCK ? columns - column : BLOCK, to, out_stride);
            }
        }
}

/* Which nibble of a word each of its eight columns is. */
static const unsigned char NIBBLE[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/* Bytes of two in-features a row, of the words from `first` to `last` and the in-features from `start` to `stop`. */
INLINE void awq_edge(const uint32_t *words, size_t stride, size_t row_bytes, size_t first, size_t last, size_t start, size_t stop,
                     uint8_t *out)
{
    for (size_t word = first; word < last; word++)
        for (size_t k = start; k < stop; k += 2) {
            uint32_t even = words[k * stride + word], odd = words[(k + 1) * stride + word];
            for (size_t column = 0; column < 8; column++) {
                int shift = 4 * NIBBLE[column];
                out[(8 * word + column) * row_bytes + k / 2] = (uint8_t)((even >> shift & 15u) | (odd >> shift & 15u) << 4);
            }
        }
}

/* In-features of a block, whose bytes are a line of the processor's cache. */
#define LINE 128

/* BLOCK words of LINE in-features: a line of each of their columns. `out`: the first column's, whose rows are `row_bytes` apart. */
INLINE void awq_block(const uint32_t *restrict words, size_t stride, size_t row_bytes, uint8_t *restrict out)
{
    uint32_t codes[8][LINE / 8][BLOCK];
    for (size_t part = 0; part < LINE / 8; part++) {
        const uint32_t *rows = words + 8 * part * stride;
        for (size_t column = 0; column < 8; column++) {
            const int shift = 4 * NIBBLE[column];
            for (size_t i = 0; i < BLOCK; i++) {
                const uint32_t *own = rows + i;
                uint32_t low = (own[0] >> shift & 15u) | (own[stride] >> shift & 15u) << 4 | (own[2 * stride] >> shift & 15u) << 8
                    | (own[3 * stride] >> shift & 15u) << 12;
                uint32_t high = (own[4 * stride] >> shift & 15u) | (own[5 * stride] >> shift & 15u) << 4
                    | (own[6 * stride] >> shift & 15u) << 8 | (own[7 * stride] >> shift & 15u) << 12;
                codes[column][part][i] = low | high << 16;
            }
        }
    }
    for (size_t column = 0; column < 8; column++)
        for (size_t i = 0; i < BLOCK; i++) {
            uint32_t line[LINE / 8];
            for (size_t part = 0; part < LINE / 8; part++)
                line[part] = codes[column][part][i];
            memcpy(out + (8 * i + column) * row_bytes, line, sizeof line);
        }
}

void AT_LEVEL(awq_codes)(const uint32_t *words, size_t stride, size_t features, size_t columns, uint8_t *out, size_t row_bytes)
{
    /* Words of the same rows one after the other, as they lie in the file. */
    const size_t blocks = columns / BLOCK * BLOCK, lines = features / LINE * LINE;
    for (size_t start = 0; start < lines; start += LINE)
        for (size_t word = 0; word < blocks; word += BLOCK)
            awq_block(words + start * stride + word, stride, row_bytes, out + 8 * word * row_bytes + start / 2);
    awq_edge(words, stride, row_bytes, 0, blocks, lines, features, out);
    awq_edge(words, stride, row_bytes, blocks, columns, 0, features, out);
}
