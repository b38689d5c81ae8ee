/* The kernels of verification: a rank's codes held against the source's numbers in one pass. They share no computing with the
   kernels that write (stages/quantization/kernels): orders come as tables of Python's, numbers by formulas of their own.

   Rows are contiguous; strides are in elements. Whoever calls has checked shapes and sizes. */
#ifndef HEADRACE_CHECKS_H
#define HEADRACE_CHECKS_H

#include "levels.h"

/* How a rank has its codes: integers in the order of a kernel, or as they are, two rows a byte; or float8_e4m3fn. */
enum stored_kind { INTEGERS, PAIRS, SMALL_FLOATS };

/* A rank's units of `columns` rows each, [units * columns, features] codes. `places`: where each code of a run lies in it, of
   the runs of 16 bytes that an order mixes; NULL where codes are signed, one behind the other. Factors are float32 [1 or rows,
   groups]. */
struct stored {
    enum stored_kind kind;
    int bits;
    size_t columns;
    const uint8_t *places;
    const uint8_t *data;
    size_t features;
    const float *scales, *zeros;
    size_t scale_rows, groups;
};

/* How the source has its numbers: 16- and 32-bit floats, float8_e4m3fn, or unsigned codes, of 4 bits two a byte, the first one
   low. */
enum expected_kind { BRAIN, HALF, SINGLE, EIGHT, CODES4, CODES8 };

/* Its rows [rows, features], a number less a zero point, times a scale: float32 [1 or rows, groups], NULL for none. */
struct expected {
    enum expected_kind kind;
    const void *data;
    size_t stride;
    const float *scales, *zeros;
    size_t scale_rows, zero_rows, groups;
};

/* |error| <= slope * |base| + constant + factor * the largest magnitude of the row or group; and for a number above `top` times
   that, `slack` times the difference more. `constant`: float32 [1 or rows, groups]. */
enum base { OF_EXPECTED, OF_ACTUAL, OF_PRODUCT };
enum largest { OF_NONE, OF_ROW, OF_GROUP };

struct bound {
    enum base base;
    enum largest largest;
    float slope, factor, top, slack;
    const float *constant;
    size_t rows, groups;
};

/* `greatest`: error; `worst`: its greatest part of what is allowed. Sums of squares of errors, expected and actual values. */
struct figures {
    float greatest, worst;
    double noise, power, square;
};

/* Codes of 4 bits of the source in words of eight, in-features [start, start + features) of its rows: [features / 8, columns], a
   word of eight in-features of a row; or, with `order`, [features, columns], a word of eight rows, each of which is in the nibble
   that it names. The first `skip` rows are none of those that are compared. `stride`: of a row of words. */
struct packed {
    const uint32_t *words;
    size_t stride, columns, start, features, skip;
    const uint8_t *order;
};

/* What makes numbers of codes, float32 [groups, rows] of groups of `size` in-features: of the rank, code * scale + zero, code
   signed; of the source, (code - zero) * scale. |error| <= slope * |code * scale| + constant, of the rank's groups. */
struct kept_factors {
    size_t rows, size, source_size;
    const float *scales, *zeros, *source_scales, *source_zeros, *constant;
    float slope;
};

/* Sums outside of these are computed in double: squares of very small or very large values are no float32. */
#define LEAST_SUM 1e-24
#define GREATEST_SUM 1e30
/* Parts of what is allowed that are this much worse than the worst so far, or less, are as good as equal to it: rows of one
   scale have equal ones, whose quotients need not be computed again. The worst is so much below 1 that none that is wrong is
   among them. */
#define ALIKE (1 + 0x1p-22f)
#define NEARLY (1 - 0x1p-20f)

struct checks {
    const char *name;
    /* Rows [first, first + rows) of the units. Factors and bounds are of these rows. Returns 1, or 0 where a value is not right
       for sure: then the figures are not whole. */
    int (*compared)(const struct stored *, size_t first, size_t rows, const struct expected *, const struct bound *,
                    struct figures *);
    /* Rows of the units, of 4 bits, from `first` on, and codes of the source that they must have kept; taken into the figures.
       Returns as `compared` does. */
    int (*kept)(const struct stored *, size_t first, const struct packed *, const struct kept_factors *, struct figures *);
    /* Words [m, n] as rows [n, m], `pitch` elements apart. */
    void (*words_as_rows)(const uint32_t *words, size_t stride, size_t m, size_t n, uint32_t *out, size_t pitch);
    /* Words [m, n] of 8 rows each, whose nibbles are at `places`, as rows [8 n, m / 2] of two codes a byte. */
    void (*columns_as_rows)(const uint32_t *words, size_t stride, size_t m, size_t n, const uint8_t *places, uint8_t *out,
                            size_t pitch);
};

int AT_LEVEL(compared)(const struct stored *, size_t, size_t, const struct expected *, const struct bound *, struct figures *);
int AT_LEVEL(kept)(const struct stored *, size_t, const struct packed *, const struct kept_factors *, struct figures *);
void AT_LEVEL(words_as_rows)(const uint32_t *, size_t, size_t, size_t, uint32_t *, size_t);
void AT_LEVEL(columns_as_rows)(const uint32_t *, size_t, size_t, size_t, const uint8_t *, uint8_t *, size_t);

#endif
