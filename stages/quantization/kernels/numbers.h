/* Conversions between the types of numbers, on bit patterns: to nearest even, NaN stays NaN with its sign, too large is infinity.

   No result and no operand on the way is a subnormal float32 unless the value itself is one: those are slow on some processors, and
   zeros in a process that another library has told to flush them. */
#ifndef HEADRACE_NUMBERS_H
#define HEADRACE_NUMBERS_H

#include "kernels.h"
#include <string.h>

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* float32's bits of float16's magnitude. */
INLINE uint32_t magnitude_of_float16(uint32_t magnitude)
{
    uint32_t moved = magnitude << 13;
    uint32_t normal = moved + (112u << 23);
    uint32_t small = bits_of(float_of(moved | (113u << 23)) - 0x1p-14f);
    uint32_t special = moved | (255u << 23);
    return magnitude < 0x400u ? small : magnitude < 0x7C00u ? normal : special;
}

/* float32's bits of float8_e4m3fn's magnitude. */
INLINE uint32_t magnitude_of_float8(uint32_t magnitude)
{
    uint32_t moved = magnitude << 20;
    uint32_t normal = moved + (120u << 23);
    uint32_t small = bits_of(float_of(moved | (121u << 23)) - 0x1p-6f);
    return magnitude < 0x08u ? small : magnitude < 0x7Fu ? normal : 0x7FC00000u;
}

INLINE uint32_t from_float16(uint16_t value)
{
    return magnitude_of_float16(value & 0x7FFFu) | (value & 0x8000u) << 16;
}

INLINE uint32_t from_bfloat16(uint16_t value)
{
    return (uint32_t)value << 16;
}

INLINE uint32_t from_float8(uint8_t value)
{
    return magnitude_of_float8(value & 0x7Fu) | (value & 0x80u) << 24;
}

INLINE uint16_t to_bfloat16(uint32_t bits)
{
    uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    uint32_t nan = (bits >> 16 & 0x8000u) | 0x7FC0u;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

INLINE uint16_t to_float16(uint32_t bits)
{
    uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    /* Beside a half, float32 has steps of 2 ** -24, which are those of float16's small numbers. */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    uint32_t result = magnitude < 0x38800000u ? small : magnitude < 0x477FF000u ? normal : special;
    return (uint16_t)(sign | result);
}

/* The magnitude of float8_e4m3fn; NaN for more than 464, where the largest, 448, is no longer the nearest. */
INLINE uint8_t to_float8(float value)
{
    uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    uint32_t normal = ((magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    /* Beside 2 ** 14, float32 has steps of 2 ** -9, which are those of float8's small numbers. */
    uint32_t small = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
    normal = normal < 0x7Fu ? normal : 0x7Fu;
    return (uint8_t)(magnitude < 0x3C800000u ? small : normal);
}

#endif
