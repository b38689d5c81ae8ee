/* int8 and int4 with a scale for each share of a row: scale, rounding, packing and order in one pass.
   Facts: docs/format/quantized-layouts.md, section 4a. The twin is weight_only.py. */
#include "numbers.h"
#include "order.h"

/* The largest number below a half: added before truncation it rounds halves up, as C's round(), and nothing else. */
#define HALF 0x1.fffffep-2f

/* Magnitudes of 16-bit floats order like the integers that their bits spell. */
INLINE uint16_t largest(const uint16_t *values, size_t count)
{
    uint16_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t magnitude = values[i] & 0x7FFF;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

INLINE float magnitude_of(uint16_t value, int half)
{
    uint32_t magnitude = value & 0x7FFFu;
    return float_of(half ? magnitude_of_float16(magnitude) : magnitude << 16);
}

INLINE int is_finite(uint16_t magnitude, int half)
{
    return magnitude < (half ? 0x7C00 : 0x7F80);
}

/* Unsigned codes, one a byte. */
INLINE void quantized(const uint16_t *restrict values, size_t count, float scale, int half, int bits, uint8_t *restrict codes)
{
    const int32_t middle = 1 << (bits - 1);
    const float divisor = scale == 0 ? 1 : scale; /* of a row of zeros */
    for (size_t i = 0; i < count; i++) {
        int32_t negative = values[i] >> 15, most = middle - 1 + negative;
        int32_t code = (int32_t)(magnitude_of(values[i], half) / divisor + HALF);
        code = code < most ? code : most;
        codes[i] = (uint8_t)(middle + (negative ? -code : code));
    }
}

INLINE int scales_of(const uint16_t *values, size_t rows, size_t features, size_t segments, int half, int bits, float *scales)
{
    const size_t share = features / segments;
    for (size_t i = 0; i < rows * segments; i++) {
        uint16_t most = largest(values + i * share, share);
        if (!is_finite(most, half))
            return 1;
        scales[i] = magnitude_of(most, half) / (float)(1 << (bits - 1));
    }
    return 0;
}

INLINE void ordered(const uint8_t *codes, size_t features, size_t columns, int mixed, int bits, uint8_t *out)
{
    if (!mixed) {
        const size_t bytes = features * (size_t)bits / 8;
        if (bits == 4)
            pair4(codes, features, out);
        for (size_t i = 0; i < bytes; i++)
            out[i] = bits == 4 ? out[i] ^ 0x88 : codes[i] ^ 0x80; /* signed codes */
        return;
    }
    const size_t run = columns == 1 ? features : TILE;
    for (size_t start = 0; start < features; start += run)
        for (size_t column = 0; column < columns; column++, out += run * (size_t)bits / 8) {
            if (bits == 8)
                mix8(codes + column * features + start, run, out);
            else
                mix4(codes + column * features + start, run, out);
        }
}

INLINE int codes_of(const uint16_t *values, size_t rows, size_t features, size_t segments, size_t columns, int mixed, int half,
                    int bits, uint8_t *work, uint8_t *out, float *scales)
{
    const size_t share = features / segments;
    for (size_t row = 0; row < rows; row += columns) {
        for (size_t i = 0; i < columns * segments; i++) {
            const uint16_t *own = values + row * features + i * share;
            float *scale = scales + row * segments + i;
            if (scales_of(own, 1, share, 1, half, bits, scale))
                return 1;
            quantized(own, share, *scale, half, bits, work + i * share);
        }
        ordered(work, features, columns, mixed, bits, out + row * features * (size_t)bits / 8);
    }
    return 0;
}

int AT_LEVEL(weight_only_scales)(const uint16_t *values, enum number type, size_t rows, size_t features, size_t segments, int bits,
                                 float *scales)
{
    if (type == FLOAT16)
        return scales_of(values, rows, features, segments, 1, bits, scales);
    return scales_of(values, rows, features, segments, 0, bits, scales);
}

int AT_LEVEL(weight_only_codes)(const uint16_t *values, enum number type, size_t rows, size_t features, size_t segments,
                                struct order order, uint8_t *work, uint8_t *out, float *scales)
{
    /* Constants in each call, so that each is a loop of its own. */
    if (type == FLOAT16)
        return order.bits == 8
            ? codes_of(values, rows, features, segments, order.columns, order.mixed, 1, 8, work, out, scales)
            : codes_of(values, rows, features, segments, order.columns, order.mixed, 1, 4, work, out, scales);
    return order.bits == 8
        ? codes_of(values, rows, features, segments, order.columns, order.mixed, 0, 8, work, out, scales)
        : codes_of(values, rows, features, segments, order.columns, order.mixed, 0, 4, work, out, scales);
}
