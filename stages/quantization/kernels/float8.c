/* float8_e4m3fn with a scale for each share of a row, and codes of one scale as codes of another.
   Facts: docs/format/quantized-layouts.md, sections 4b and 4c. The twin is float8.py. */
#include "numbers.h"

#define LARGEST 448.0f
#define LEAST_SCALE (1.0f / (448.0f * 512.0f))

INLINE uint32_t wide(const void *values, enum number type, size_t i)
{
    if (type == BFLOAT16)
        return from_bfloat16(((const uint16_t *)values)[i]);
    if (type == FLOAT16)
        return from_float16(((const uint16_t *)values)[i]);
    return ((const uint32_t *)values)[i];
}

/* The scale of a share of a row; 0 where a value is not finite. */
INLINE float scale_of(const void *values, enum number type, size_t first, size_t count, float clamp)
{
    float largest;
    if (type == FLOAT32) {
        uint32_t most = 0;
        for (size_t i = first; i < first + count; i++) {
            uint32_t magnitude = ((const uint32_t *)values)[i] & 0x7FFFFFFFu;
            most = magnitude > most ? magnitude : most;
        }
        largest = float_of(most);
    } else {
        uint16_t most = 0;
        for (size_t i = first; i < first + count; i++) {
            uint16_t magnitude = ((const uint16_t *)values)[i] & 0x7FFF;
            most = magnitude > most ? magnitude : most;
        }
        largest = float_of(type == FLOAT16 ? from_float16(most) : from_bfloat16(most));
    }
    if (bits_of(largest) >= 0x7F800000u)
        return 0;
    float scale = (largest < clamp ? largest : clamp) / LARGEST;
    return scale > LEAST_SCALE ? scale : LEAST_SCALE;
}

INLINE int scales_of(const void *values, enum number type, size_t shares, size_t share, float clamp, float *scales)
{
    for (size_t i = 0; i < shares; i++) {
        scales[i] = scale_of(values, type, i * share, share, clamp);
        if (scales[i] == 0)
            return 1;
    }
    return 0;
}

INLINE int codes_of(const void *values, enum number type, size_t shares, size_t share, float clamp, uint8_t *restrict out,
                    float *restrict scales)
{
    for (size_t n = 0; n < shares; n++) {
        const float scale = scales[n] = scale_of(values, type, n * share, share, clamp);
        if (scale == 0)
            return 1;
        for (size_t i = n * share; i < (n + 1) * share; i++) {
            uint32_t bits = wide(values, type, i);
            float value = float_of(bits & 0x7FFFFFFFu);
            value = (value < clamp ? value : clamp) / scale;
            value = value < LARGEST ? value : LARGEST;
            out[i] = (uint8_t)(to_float8(value) | (bits >> 24 & 0x80u));
        }
    }
    return 0;
}

int AT_LEVEL(float8_scales)(const void *values, enum number type, size_t rows, size_t features, size_t segments, float clamp,
                            float *scales)
{
    const size_t shares = rows * segments, share = features / segments;
    if (type == BFLOAT16)
        return scales_of(values, BFLOAT16, shares, share, clamp, scales);
    if (type == FLOAT16)
        return scales_of(values, FLOAT16, shares, share, clamp, scales);
    return scales_of(values, FLOAT32, shares, share, clamp, scales);
}

int AT_LEVEL(float8_codes)(const void *values, enum number type, size_t rows, size_t features, size_t segments, float clamp,
                           uint8_t *out, float *scales)
{
    const size_t shares = rows * segments, share = features / segments;
    if (type == BFLOAT16)
        return codes_of(values, BFLOAT16, shares, share, clamp, out, scales);
    if (type == FLOAT16)
        return codes_of(values, FLOAT16, shares, share, clamp, out, scales);
    return codes_of(values, FLOAT32, shares, share, clamp, out, scales);
}

void AT_LEVEL(float8_rescaled)(const uint8_t *restrict codes, size_t count, float scale, float common, uint8_t *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        float value = float_of(from_float8(codes[i])) * scale / common;
        out[i] = (uint8_t)(to_float8(value) | (bits_of(value) >> 24 & 0x80u));
    }
}
