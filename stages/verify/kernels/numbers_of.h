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

/* The number that a pattern of `exponent` and `mantissa` bits stands for: `least` is its smallest step, `special` the first
   magnitude that is no number, or infinite. */
INLINE float small_float(uint32_t pattern, int exponent, int mantissa, float least, uint32_t special, int infinite)
{
    const uint32_t magnitude = pattern & ((1u << (exponent + mantissa)) - 1);
    const uint32_t bias = 127u - ((1u << (exponent - 1)) - 1);
    const uint32_t normal = (magnitude << (23 - mantissa)) + (bias << 23);
    const uint32_t subnormal = as_bits((float)(int32_t)magnitude * least);
    const uint32_t no_number = infinite ? 0x7F800000u | magnitude << (23 - mantissa) : 0x7FC00000u;
    /* Masks: of a condition, the compiler makes a branch around the multiplication, and no vectors. */
    const uint32_t small = -(uint32_t)(magnitude < 1u << mantissa), fine = -(uint32_t)(magnitude < special);
    const uint32_t bits = (((subnormal & small) | (normal & ~small)) & fine) | (no_number & ~fine);
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

/* Where the codes of a run of 16 bytes are: in which byte, and 255 where it is its high half that holds the code. */
struct run {
    uint8_t bytes[32], high[32];
};

INLINE struct run run_of(const uint8_t *places, int bits)
{
    struct run run = {{0}, {0}};
    for (int i = 0; places != NULL && i < 128 / bits; i++) {
        run.bytes[i] = bits == 8 ? places[i] : places[i] / 2;
        run.high[i] = bits == 4 && places[i] % 2 ? 0xFF : 0;
    }
    return run;
}

#if defined(__GNUC__) && !defined(__clang__)
typedef uint8_t sixteen __attribute__((vector_size(16)));

/* Bytes at some places of 16: one operation where processors have it. */
INLINE sixteen picked(const uint8_t *from, const uint8_t *places)
{
    sixteen data, mask;
    memcpy(&data, from, 16);
    memcpy(&mask, places, 16);
    return __builtin_shuffle(data, mask);
}

INLINE void picked8(const uint8_t *from, const struct run *run, uint8_t *to)
{
    const sixteen data = picked(from, run->bytes);
    memcpy(to, &data, 16);
}

INLINE void picked4(const uint8_t *from, const struct run *run, int first, uint8_t *to)
{
    sixteen high, data = picked(from, run->bytes + first);
    memcpy(&high, run->high + first, 16);
    data = (data >> 4 & high) | (data & 15 & ~high);
    memcpy(to, &data, 16);
}
#else
INLINE void picked8(const uint8_t *from, const struct run *run, uint8_t *to)
{
    for (int i = 0; i < 16; i++)
        to[i] = from[run->bytes[i]];
}

INLINE void picked4(const uint8_t *from, const struct run *run, int first, uint8_t *to)
{
    for (int i = 0; i < 16; i++)
        to[i] = run->high[first + i] ? from[run->bytes[first + i]] >> 4 : from[run->bytes[first + i]] & 15;
}
#endif

/* Codes of 8 bits out of runs of 16 bytes. */
INLINE void unmixed8(const uint8_t *data, size_t count, const struct run *run, uint8_t *codes)
{
    for (size_t i = 0; i < count; i += 16)
        picked8(data + i, run, codes + i);
}

/* Codes of 4 bits out of runs of 16 bytes. */
INLINE void unmixed4(const uint8_t *data, size_t count, const struct run *run, uint8_t *codes)
{
    for (size_t i = 0; i < count; i += 32) {
        picked4(data + i / 2, run, 0, codes + i);
        picked4(data + i / 2, run, 16, codes + i + 16);
    }
}

#endif
