/* Some of a row's numbers as float32, in loops that the compiler makes vectors of. */
#ifndef HEADRACE_NUMBERS_OF_H
#define HEADRACE_NUMBERS_OF_H

#include "checks.h"

#include <string.h>

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The number that a pattern of `exponent` and `mantissa` bits stands for: `least` is its smallest step, `special` the first magnitude
   that is no number, or infinite. */
INLINE float small_float(uint32_t pattern, int exponent, int mantissa, float least, uint32_t special, int infinite)
{
    const uint32_t magnitude = pattern & ((1u << (exponent + mantissa)) - 1);
    const uint32_t bias = 127u - ((1u << (exponent - 1)) - 1);
    const uint32_t normal = (magnitude << (23 - mantissa)) + (bias << 23);
    const uint32_t subnormal = as_bits((float)(int32_t)magnitude * least);
    const uint32_t no_number = infinite ? 0x7F800000u | magnitude << (23 - mantissa) : 0x7FC00000u;
    uint32_t bits = magnitude < 1u << mantissa ? subnormal : normal;
    bits = magnitude < special ? bits : no_number;
    return as_float(bits | (pattern >> (exponent + mantissa) & 1u) << 31);
}

INLINE float of_half(uint16_t value)
{
    return small_float(value, 5, 10, 0x1p-24f, 0x7C00u, 1);
}

INLINE float of_eight(uint8_t value)
{
    return small_float(value, 4, 3, 0x1p-9f, 0x7Fu, 0);
}

INLINE float of_brain(uint16_t value)
{
    return as_float((uint32_t)value << 16);
}

/* Codes of 4 bits, two a byte, the first one low, as bytes. */
INLINE void halves(const uint8_t *restrict data, size_t count, uint8_t *restrict codes)
{
    for (size_t i = 0; i < count / 2; i++) {
        codes[2 * i] = data[i] & 15;
        codes[2 * i + 1] = data[i] >> 4;
    }
}

#if defined(__GNUC__) && !defined(__clang__)
typedef uint8_t sixteen __attribute__((vector_size(16)));

/* Bytes at some places of 16: one operation where processors have it. */
INLINE void picked(const uint8_t *from, const uint8_t *places, uint8_t *to)
{
    sixteen data, mask;
    memcpy(&data, from, 16);
    memcpy(&mask, places, 16);
    data = __builtin_shuffle(data, mask);
    memcpy(to, &data, 16);
}
#else
INLINE void picked(const uint8_t *from, const uint8_t *places, uint8_t *to)
{
    for (int i = 0; i < 16; i++)
        to[i] = from[places[i]];
}
#endif

/* Codes of 8 bits out of runs of 16 bytes. */
INLINE void unmixed8(const uint8_t *data, size_t count, const uint8_t *places, uint8_t *codes)
{
    for (size_t i = 0; i < count; i += 16)
        picked(data + i, places, codes + i);
}

/* Codes of 4 bits out of runs of 16 bytes: nibble p is in byte p / 2. */
INLINE void unmixed4(const uint8_t *data, size_t count, const uint8_t *places, uint8_t *codes)
{
    uint8_t bytes[32], high[32], either[32], pair[32];
    for (int i = 0; i < 32; i++) {
        bytes[i] = places[i] / 2;
        high[i] = places[i] % 2 ? 0xFF : 0;
    }
    for (size_t i = 0; i < count; i += 32)
        for (int half = 0; half < 32; half += 16) {
            picked(data + i / 2, bytes + half, pair);
            for (int j = 0; j < 16; j++)
                either[j] = (uint8_t)((pair[j] >> 4 & high[half + j]) | (pair[j] & 15 & ~high[half + j]));
            memcpy(codes + i + half, either, 16);
        }
}

#endif
