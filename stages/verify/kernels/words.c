/* Words that are packed along columns, as rows of codes. The twins are words.py.

   Lines of memory are read whole into a tile of the processor's nearest cache, in which rows of a power of two do not meet. */
#include "checks.h"

#define SIDE 16  /* columns of words at once: a line of memory */
#define DEPTH 64 /* rows of them */

INLINE size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

INLINE void tile_as_rows(const uint32_t *restrict words, size_t stride, size_t deep, size_t wide, uint32_t *restrict out,
                         size_t pitch)
{
    uint32_t tile[SIDE][DEPTH];
    for (size_t row = 0; row < deep; row++)
        for (size_t column = 0; column < wide; column++)
            tile[column][row] = words[row * stride + column];
    for (size_t column = 0; column < wide; column++)
        for (size_t row = 0; row < deep; row++)
            out[column * pitch + row] = tile[column][row];
}

void AT_LEVEL(words_as_rows)(const uint32_t *words, size_t stride, size_t m, size_t n, uint32_t *out, size_t pitch)
{
    for (size_t i = 0; i < m; i += DEPTH)
        for (size_t j = 0; j < n; j += SIDE) {
            const size_t deep = least(m - i, DEPTH), wide = least(n - j, SIDE);
            if (deep == DEPTH && wide == SIDE)
                tile_as_rows(words + i * stride + j, stride, DEPTH, SIDE, out + j * pitch + i, pitch);
            else
                tile_as_rows(words + i * stride + j, stride, deep, wide, out + j * pitch + i, pitch);
        }
}

/* Two rows of words, that of an even number and the one behind it, make a byte of each of eight rows. */
INLINE void column_as_rows(const uint32_t *restrict even, const uint32_t *restrict odd, size_t count, const uint8_t *places,
                           uint8_t *restrict out, size_t pitch)
{
    for (int row = 0; row < 8; row++) {
        const int shift = 4 * places[row];
        uint8_t *own = out + (size_t)row * pitch;
        for (size_t i = 0; i < count; i++)
            own[i] = (uint8_t)((even[i] >> shift & 15) | (odd[i] >> shift & 15) << 4);
    }
}

void AT_LEVEL(columns_as_rows)(const uint32_t *words, size_t stride, size_t m, size_t n, const uint8_t *places, uint8_t *out,
                               size_t pitch)
{
    uint32_t even[SIDE][DEPTH], odd[SIDE][DEPTH];
    for (size_t i = 0; i < m; i += 2 * DEPTH)
        for (size_t j = 0; j < n; j += SIDE) {
            const size_t deep = least((m - i) / 2, DEPTH), wide = least(n - j, SIDE);
            const uint32_t *own = words + i * stride + j;
            for (size_t row = 0; row < deep; row++)
                for (size_t column = 0; column < wide; column++) {
                    even[column][row] = own[2 * row * stride + column];
                    odd[column][row] = own[(2 * row + 1) * stride + column];
                }
            for (size_t column = 0; column < wide; column++) {
                uint8_t *to = out + 8 * (j + column) * pitch + i / 2;
                if (deep == DEPTH)
                    column_as_rows(even[column], odd[column], DEPTH, places, to, pitch);
                else
                    column_as_rows(even[column], odd[column], deep, places, to, pitch);
            }
        }
}
