/* GGUF's blocks as float32. Each holds 32 or 256 elements: codes of some bits, and their scales. The twin is gguf_blocks.py.

   A value is one multiplication, or two and an addition, in float32, in the order of ggml's own dequantizers. Those of codes whose
   values are a lattice (IQ1 to IQ3) are left to the twin. */
#include "numbers.h"

/* GCC would unroll short loops before it makes vectors of them, and then makes none. */
#if defined(__GNUC__) && !defined(__clang__)
#define AS_VECTORS _Pragma("GCC unroll 1")
#else
#define AS_VECTORS
#endif

INLINE float half_at(const uint8_t *bytes)
{
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return float_of(from_float16(value));
}

/* 32 codes of 4 bits in 16 bytes: the first half of them in the low nibbles. `high`: bits of the codes that come above these. */
INLINE void nibbles(const uint8_t *restrict bytes, uint32_t high, int32_t offset, int32_t *restrict codes)
{
    AS_VECTORS
    for (int i = 0; i < 16; i++) {
        codes[i] = (int32_t)((bytes[i] & 15u) | (high >> i & 1u) << 4) + offset;
        codes[16 + i] = (int32_t)((uint32_t)bytes[i] >> 4 | (high >> (16 + i) & 1u) << 4) + offset;
    }
}

INLINE void scaled(const int32_t *restrict codes, int count, float scale, float *restrict out)
{
    AS_VECTORS
    for (int i = 0; i < count; i++)
        out[i] = scale * (float)codes[i];
}

INLINE void shifted(const int32_t *restrict codes, int count, float scale, float least, float *restrict out)
{
    AS_VECTORS
    for (int i = 0; i < count; i++)
        out[i] = scale * (float)codes[i] + least;
}

INLINE void q4_0(const uint8_t *block, float *out)
{
    int32_t codes[32];
    nibbles(block + 2, 0, -8, codes);
    scaled(codes, 32, half_at(block), out);
}

INLINE void q4_1(const uint8_t *block, float *out)
{
    int32_t codes[32];
    nibbles(block + 4, 0, 0, codes);
    shifted(codes, 32, half_at(block), half_at(block + 2), out);
}

INLINE void q5_0(const uint8_t *block, float *out)
{
    int32_t codes[32];
    uint32_t high;
    memcpy(&high, block + 2, sizeof high);
    nibbles(block + 6, high, -16, codes);
    scaled(codes, 32, half_at(block), out);
}

INLINE void q5_1(const uint8_t *block, float *out)
{
    int32_t codes[32];
    uint32_t high;
    memcpy(&high, block + 4, sizeof high);
    nibbles(block + 8, high, 0, codes);
    shifted(codes, 32, half_at(block), half_at(block + 2), out);
}

INLINE void q8_0(const uint8_t *restrict block, float *restrict out)
{
    const float scale = half_at(block);
    AS_VECTORS
    for (int i = 0; i < 32; i++)
        out[i] = scale * (float)(int8_t)block[2 + i];
}

INLINE void iq4_nl(const uint8_t *restrict block, float *restrict out)
{
    static const int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const float scale = half_at(block);
    AS_VECTORS
    for (int i = 0; i < 16; i++) {
        out[i] = scale * (float)VALUES[block[2 + i] & 15];
        out[16 + i] = scale * (float)VALUES[block[2 + i] >> 4];
    }
}

/* 16 scales and minima of 4 bits; each 32 bytes hold four runs of 32 codes of 2 bits. */
INLINE void q2_k(const uint8_t *restrict block, float *restrict out)
{
    const float scale = half_at(block + 80), least = half_at(block + 82);
    for (int run = 0; run < 16; run++) {
        const uint8_t *codes = block + 16 + run / 8 * 32 + run % 2 * 16;
        const int shift = run % 8 / 2 * 2;
        const float own = scale * (float)(block[run] & 15), low = least * (float)(block[run] >> 4);
        AS_VECTORS
        for (int i = 0; i < 16; i++)
            out[16 * run + i] = own * (float)(codes[i] >> shift & 3) - low;
    }
}

/* The third bit of a code is in the first 32 bytes, turned over; a scale has its low 4 bits in 8 bytes and its high 2 in 4 more. */
INLINE void q3_k(const uint8_t *restrict block, float *restrict out)
{
    const uint8_t *scales = block + 96;
    const float scale = half_at(block + 108);
    for (int run = 0; run < 16; run++) {
        const uint8_t *codes = block + 32 + run / 8 * 32 + run % 2 * 16, *high = block + run % 2 * 16;
        const int shift = run % 8 / 2 * 2, bit = run / 2;
        const int low = scales[run % 8] >> run / 8 * 4 & 15, rest = scales[8 + run % 4] >> run / 4 * 2 & 3;
        const float own = scale * (float)((low | rest << 4) - 32);
        AS_VECTORS
        for (int i = 0; i < 16; i++)
            out[16 * run + i] = own * (float)((codes[i] >> shift & 3) - ((high[i] >> bit & 1) ^ 1) * 4);
    }
}

/* Eight scales and minima of 6 bits in 12 bytes. */
INLINE int scale_of_eight(const uint8_t *bytes, int run)
{
    return run < 4 ? bytes[run] & 63 : (bytes[run + 4] & 15) | bytes[run - 4] >> 6 << 4;
}

INLINE int least_of_eight(const uint8_t *bytes, int run)
{
    return run < 4 ? bytes[run + 4] & 63 : bytes[run + 4] >> 4 | bytes[run] >> 6 << 4;
}

INLINE void q4_k(const uint8_t *restrict block, float *restrict out)
{
    const float scale = half_at(block), least = half_at(block + 2);
    for (int run = 0; run < 8; run++) {
        const uint8_t *codes = block + 16 + run / 2 * 32;
        const int shift = run % 2 * 4;
        const float own = scale * (float)scale_of_eight(block + 4, run), low = least * (float)least_of_eight(block + 4, run);
        AS_VECTORS
        for (int i = 0; i < 32; i++)
            out[32 * run + i] = own * (float)(codes[i] >> shift & 15) - low;
    }
}

INLINE void q5_k(const uint8_t *restrict block, float *restrict out)
{
    const float scale = half_at(block), least = half_at(block + 2);
    const uint8_t *high = block + 16;
    for (int run = 0; run < 8; run++) {
        const uint8_t *codes = block + 48 + run / 2 * 32;
        const int shift = run % 2 * 4;
        const float own = scale * (float)scale_of_eight(block + 4, run), low = least * (float)least_of_eight(block + 4, run);
        AS_VECTORS
        for (int i = 0; i < 32; i++)
            out[32 * run + i] = own * (float)((codes[i] >> shift & 15) | (high[i] >> run & 1) << 4) - low;
    }
}

/* 16 scales of 8 bits. Of each half of the block, 64 bytes hold the low 4 bits of the codes and 32 the high 2. */
INLINE void q6_k(const uint8_t *restrict block, float *restrict out)
{
    const uint8_t *scales = block + 192;
    const float scale = half_at(block + 208);
    for (int run = 0; run < 16; run++) {
        const int part = run / 8, quarter = run % 8 / 2, side = run % 2 * 16;
        const uint8_t *codes = block + 64 * part + quarter % 2 * 32 + side, *high = block + 128 + 32 * part + side;
        const int shift = quarter / 2 * 4;
        const float own = scale * (float)(int8_t)scales[run];
        AS_VECTORS
        for (int i = 0; i < 16; i++)
            out[16 * run + i] = own * (float)(((codes[i] >> shift & 15) | (high[i] >> 2 * quarter & 3) << 4) - 32);
    }
}

#define EACH(TYPE, NUMBERS)                                                     \
    case TYPE:                                                                  \
        for (size_t i = 0; i < count; i++)                                      \
            NUMBERS(blocks + i * size, out + i * elements);                     \
        break

void AT_LEVEL(gguf_numbers)(const uint8_t *blocks, size_t count, enum block type, float *out)
{
    const size_t size = BLOCKS[type].bytes, elements = BLOCKS[type].elements;
    switch (type) {
    EACH(Q4_0, q4_0);
    EACH(Q4_1, q4_1);
    EACH(Q5_0, q5_0);
    EACH(Q5_1, q5_1);
    EACH(Q8_0, q8_0);
    EACH(IQ4_NL, iq4_nl);
    EACH(Q2_K, q2_k);
    EACH(Q3_K, q3_k);
    EACH(Q4_K, q4_k);
    EACH(Q5_K, q5_k);
    EACH(Q6_K, q6_k);
    }
}

#define AT_ONCE 2048 /* numbers, a multiple of each type's, which stay in the processor's nearest cache until they are cast */

void AT_LEVEL(gguf_cast)(const uint8_t *blocks, size_t count, enum block type, enum number to, uint16_t *out)
{
    const size_t size = BLOCKS[type].bytes, elements = BLOCKS[type].elements, step = AT_ONCE / elements;
    float numbers[AT_ONCE];
    for (size_t i = 0; i < count; i += step) {
        const size_t some = count - i < step ? count - i : step;
        AT_LEVEL(gguf_numbers)(blocks + i * size, some, type, numbers);
        AT_LEVEL(cast)(numbers, FLOAT32, some * elements, to, out + i * elements);
    }
}
