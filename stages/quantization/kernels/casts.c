/* Each value in another type, rounded once. The twin is casts.py. */
#include "numbers.h"

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint8_t u8;

#define EACH(FROM, TO, RESULT)                                                  \
    do {                                                                        \
        const FROM *restrict in = values;                                       \
        TO *restrict result = out;                                              \
        for (size_t i = 0; i < count; i++)                                      \
            result[i] = RESULT;                                                 \
    } while (0)

void AT_LEVEL(cast)(const void *restrict values, enum number from, size_t count, enum number to, void *restrict out)
{
    switch (from) {
    case BFLOAT16:
        if (to == FLOAT16)
            EACH(u16, u16, to_float16(from_bfloat16(in[i])));
        else
            EACH(u16, u32, from_bfloat16(in[i]));
        break;
    case FLOAT16:
        if (to == BFLOAT16)
            EACH(u16, u16, to_bfloat16(from_float16(in[i])));
        else
            EACH(u16, u32, from_float16(in[i]));
        break;
    case FLOAT32:
        if (to == BFLOAT16)
            EACH(u32, u16, to_bfloat16(in[i]));
        else
            EACH(u32, u16, to_float16(in[i]));
        break;
    case FLOAT8:
        if (to == BFLOAT16)
            EACH(u8, u16, (u16)(from_float8(in[i]) >> 16)); /* exact */
        else if (to == FLOAT16)
            EACH(u8, u16, to_float16(from_float8(in[i])));
        else
            EACH(u8, u32, from_float8(in[i]));
        break;
    }
}
