/* Numbers that are computed with at once, as many as the processor's vectors hold; and rows, a lane each. Of longer vectors GCC takes
   comparisons and choices apart, number by number. */
#ifndef LANES_H
#define LANES_H
#include "numbers_of.h"

#ifndef LANES
#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define CODES 16
#define DEPTH 16 /* words of a row at once: 128 in-features */
#define OF_WORD 8 /* codes */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t patterns __attribute__((vector_size(4 * LANES)));
typedef float numbers __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(4 * LANES)));
typedef uint8_t some_codes __attribute__((vector_size(4 * LANES)));

/* LANES rows, or fewer: where a rank has their codes, their places among the factors, whether these follow one another, and ones in
   the lanes that are rows. */
struct lane_rows {
    const uint8_t *own[LANES];
    size_t place[LANES];
    int in_a_row;
    words valid;
    numbers one;
};

#endif
