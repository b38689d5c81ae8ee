/* SmoothQuant's passes: magnitudes of columns, weights times the factors of their in-features, and their codes.
   Facts: docs/format/quantized-layouts.md, section 4d. The twin is smoothed.py. */
#include "numbers.h"

#define LARGEST 127.0f
/* Beside it, float32 has steps of 1: a sum with it is rounded to the nearest even. */
#define WHOLE 12582912.0f

void AT_LEVEL(column_magnitudes)(const uint16_t *values, size_t stride, size_t rows, size_t features, uint16_t *restrict out)
{
    memset(out, 0, features * sizeof *out);
    for (size_t row = 0; row < rows; row++) {
        const uint16_t *restrict own = values + row * stride;
        for (size_t i = 0; i < features; i++) {
            uint16_t magnitude = own[i] & 0x7FFF;
            out[i] = magnitude > out[i] ? magnitude : out[i];
        }
    }
}

/* float32's bits of a product: in float64, as torch has it. */
INLINE uint32_t product_of(uint16_t value, double factor)
{
    return bits_of((float)((double)float_of(from_float16(value)) * factor));
}

void AT_LEVEL(smoothed_magnitudes)(const uint16_t *values, size_t stride, size_t rows, size_t features,
                                   const double *restrict factors, uint16_t *restrict out)
{
    for (size_t row = 0; row < rows; row++) {
        const uint16_t *restrict own = values + row * stride;
        uint32_t largest = 0;
        for (size_t i = 0; i < features; i++) {
            uint32_t magnitude = product_of(own[i], factors[i]) & 0x7FFFFFFFu;
            largest = magnitude > largest ? magnitude : largest;
        }
        out[row] = to_float16(largest); /* the largest is so before and after rounding */
    }
}

void AT_LEVEL(smoothed)(const uint16_t *values, size_t stride, size_t rows, size_t features, const double *restrict factors,
                        uint16_t *restrict out, uint16_t *restrict most)
{
    for (size_t row = 0; row < rows; row++) {
        const uint16_t *restrict own = values + row * stride;
        uint16_t *restrict result = out + row * features;
        for (size_t i = 0; i < features; i++)
            result[i] = to_float16(product_of(own[i], factors[i]));
        uint16_t largest = 0;
        for (size_t i = 0; i < features; i++) {
            uint16_t magnitude = result[i] & 0x7FFF;
            largest = magnitude > largest ? magnitude : largest;
        }
        most[row] = largest;
    }
}

INLINE void codes_of(const uint16_t *restrict values, size_t features, float scale, int divided, int half, uint8_t *restrict out)
{
    for (size_t i = 0; i < features; i++) {
        float value = float_of(from_float16(values[i]));
        value = divided ? value / scale : value * scale;
        if (half)
            value = float_of(from_float16(to_float16(bits_of(value))));
        value = value < LARGEST ? value : LARGEST;
        value = value > -LARGEST ? value : -LARGEST;
        out[i] = (uint8_t)(int32_t)(value + WHOLE - WHOLE);
    }
}

void AT_LEVEL(smoothed_codes)(const uint16_t *values, size_t stride, size_t rows, size_t features, const float *scales, int divided,
                              int half, uint8_t *out)
{
    /* Constants in each call, so that each is a loop of its own. */
    for (size_t row = 0; row < rows; row++, values += stride, out += features) {
        if (divided)
            codes_of(values, features, scales[row], 1, 1, out);
        else if (half)
            codes_of(values, features, scales[row], 0, 1, out);
        else
            codes_of(values, features, scales[row], 0, 0, out);
    }
}
