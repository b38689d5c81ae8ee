/* Sources that are packed along their columns: GPTQ's words, which hold in-features of one column, and AWQ's, which hold eight columns.
   Facts: docs/format/quantized-layouts.md, sections 5 and 6. The twin is columns.py. */
#include "kernels.h"

#define BLOCK 16

/* `rows` and `columns` at most BLOCK. */
INLINE void transposed_block(const uint32_t *words, size_t stride, size_t rows, size_t columns, uint32_t *out, size_t out_stride)
{
    for (size_t column = 0; column < columns; column++)
        for (size_t row = 0; row < rows; row++)
            out[column * out_stride + row] = words[row * stride + column];
}

void AT_LEVEL(transposed)(const uint32_t *words, size_t stride, size_t rows, size_t columns, uint32_t *out)
{
    for (size_t column = 0; column < columns; column += BLOCK)
        for (size_t row = 0; row < rows; row += BLOCK) {
            const uint32_t *from = words + row * stride + column;
            uint32_t *to = out + column * rows + row;
            if (rows - row >= BLOCK && columns - column >= BLOCK) {
                transposed_block(from, stride, BLOCK, BLOCK, to, rows);
            } else {
                size_t height = rows - row < BLOCK ? rows - row : BLOCK;
                transposed_block(from, stride, height, columns - column < BLOCK ? columns - column : BLOCK, to, rows);
            }
        }
}

/* Which nibble of a word each of its eight columns is. */
static const unsigned char NIBBLE[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/* Bytes of two in-features a row, of the words from `first` to `last` and the in-features from `start` to `stop`. */
INLINE void awq_edge(const uint32_t *words, size_t stride, size_t features, size_t first, size_t last, size_t start, size_t stop,
                     uint8_t *out)
{
    for (size_t word = first; word < last; word++)
        for (size_t k = start; k < stop; k += 2) {
            uint32_t even = words[k * stride + word], odd = words[(k + 1) * stride + word];
            for (size_t column = 0; column < 8; column++) {
                int shift = 4 * NIBBLE[column];
                out[(8 * word + column) * (features / 2) + k / 2] = (uint8_t)((even >> shift & 15u) | (odd >> shift & 15u) << 4);
            }
        }
}

/* BLOCK words of 32 in-features: 16 bytes of each of their columns. `out`: of the first column's. */
INLINE void awq_block(const uint32_t *words, size_t stride, size_t row_bytes, uint8_t *out)
{
    uint32_t codes[8][BLOCK][4];
    for (size_t part = 0; part < 4; part++) {
        const uint32_t *own = words + 8 * part * stride;
        for (size_t column = 0; column < 8; column++) {
            int shift = 4 * NIBBLE[column];
            uint32_t joined[BLOCK] = {0};
            for (int row = 0; row < 8; row++)
                for (size_t i = 0; i < BLOCK; i++)
                    joined[i] |= (own[(size_t)row * stride + i] >> shift & 15u) << 4 * row;
            for (size_t i = 0; i < BLOCK; i++)
                codes[column][i][part] = joined[i];
        }
    }
    for (size_t i = 0; i < BLOCK; i++)
        for (size_t column = 0; column < 8; column++) {
            uint32_t *row = (uint32_t *)(void *)(out + (8 * i + column) * row_bytes);
            for (size_t part = 0; part < 4; part++)
                row[part] = codes[column][i][part];
        }
}

void AT_LEVEL(awq_codes)(const uint32_t *words, size_t stride, size_t features, size_t columns, uint8_t *out)
{
    const size_t whole = features % 8 ? 0 : features / 32 * 32; /* else rows of bytes are not aligned to words */
    for (size_t word = 0; word < columns; word += BLOCK) {
        size_t last = columns - word < BLOCK ? columns : word + BLOCK, start = 0;
        if (last - word == BLOCK)
            for (; start < whole; start += 32)
                awq_block(words + start * stride + word, stride, features / 2, out + 8 * word * (features / 2) + start / 2);
        awq_edge(words, stride, features, word, last, start, features, out);
    }
}
