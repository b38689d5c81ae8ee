/* The kernels: one pass over a few rows at a time, no intrinsics. The compiler makes vectors of the inner loops.

   Each file of the kernels is compiled once for each level of instructions (levels.h), and level.c puts the names of a level
   into a table. module.c takes the table of the highest level that the processor has; it and the files that it names know
   Python, the kernels do not.

   Rows are contiguous; a stride is in elements. Whoever calls has checked shapes and sizes: the kernels check values alone. */
#ifndef HEADRACE_KERNELS_H
#define HEADRACE_KERNELS_H

#include "levels.h"

/* 16-bit types and float8_e4m3fn are passed as integers of their width. */
enum number { BFLOAT16, FLOAT16, FLOAT32, FLOAT8 };

/* The order of codes of `bits` bits, as KernelLayout of layout.py has it. */
struct order {
    int bits;
    size_t columns;
    int mixed;
};

/* GGUF's types of blocks that are taken apart here, by the names of the package gguf. */
enum block { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL };
#define BLOCK_TYPES 11

struct block_type {
    const char *name;
    size_t bytes, elements;
};

extern const struct block_type BLOCKS[BLOCK_TYPES];

/* `scales`: of each segment of each row. Those that return int return 0, or 1 where a value is not finite: then the output is not
   whole. */
struct kernels {
    const char *name;
    int (*weight_only_scales)(const uint16_t *values, enum number type, size_t rows, size_t features, size_t segments, int bits,
                              float *scales);
    /* `work`: order.columns * features bytes. */
    int (*weight_only_codes)(const uint16_t *values, enum number type, size_t rows, size_t features, size_t segments,
                             struct order order, uint8_t *work, uint8_t *out, float *scales);
    int (*float8_scales)(const void *values, enum number type, size_t rows, size_t features, size_t segments, float clamp,
                         float *scales);
    int (*float8_codes)(const void *values, enum number type, size_t rows, size_t features, size_t segments, float clamp,
                        uint8_t *out, float *scales);
    void (*float8_rescaled)(const uint8_t *codes, size_t count, float scale, float common, uint8_t *out);
    void (*cast)(const void *values, enum number from, size_t count, enum number to, void *out);
    void (*arranged)(const uint8_t *stream, size_t rows, size_t row_bytes, struct order order, uint8_t *out);
    /* `out_stride`, `row_bytes`: of a row of `out`. */
    void (*transposed)(const uint32_t *words, size_t stride, size_t rows, size_t columns, uint32_t *out, size_t out_stride);
    void (*gguf_numbers)(const uint8_t *blocks, size_t count, enum block type, float *out);
    /* `to`: BFLOAT16 or FLOAT16. */
    void (*gguf_cast)(const uint8_t *blocks, size_t count, enum block type, enum number to, uint16_t *out);
    void (*awq_codes)(const uint32_t *words, size_t stride, size_t features, size_t columns, uint8_t *out, size_t row_bytes);
    void (*column_magnitudes)(const uint16_t *values, size_t stride, size_t rows, size_t features, uint16_t *out);
    void (*smoothed_magnitudes)(const uint16_t *values, size_t stride, size_t rows, size_t features, const double *factors,
                                uint16_t *out);
    /* `most`: the same as smoothed_magnitudes gives. */
    void (*smoothed)(const uint16_t *values, size_t stride, size_t rows, size_t features, const double *factors, uint16_t *out,
                     uint16_t *most);
    /* `divided`, or multiplied, in float32; `half`: then rounded to float16, as all quotients are. */
    void (*smoothed_codes)(const uint16_t *values, size_t stride, size_t rows, size_t features, const float *scales, int divided,
                           int half, uint8_t *out);
};

/* The kernels of the level that a file is compiled for, so that the compiler holds each against what the table takes. */
int AT_LEVEL(weight_only_scales)(const uint16_t *, enum number, size_t, size_t, size_t, int, float *);
int AT_LEVEL(weight_only_codes)(const uint16_t *, enum number, size_t, size_t, size_t, struct order, uint8_t *, uint8_t *, float *);
int AT_LEVEL(float8_scales)(const void *, enum number, size_t, size_t, size_t, float, float *);
int AT_LEVEL(float8_codes)(const void *, enum number, size_t, size_t, size_t, float, uint8_t *, float *);
void AT_LEVEL(float8_rescaled)(const uint8_t *, size_t, float, float, uint8_t *);
void AT_LEVEL(cast)(const void *, enum number, size_t, enum number, void *);
void AT_LEVEL(arranged)(const uint8_t *, size_t, size_t, struct order, uint8_t *);
void AT_LEVEL(transposed)(const uint32_t *, size_t, size_t, size_t, uint32_t *, size_t);
void AT_LEVEL(awq_codes)(const uint32_t *, size_t, size_t, size_t, uint8_t *, size_t);
void AT_LEVEL(gguf_numbers)(const uint8_t *, size_t, enum block, float *);
void AT_LEVEL(gguf_cast)(const uint8_t *, size_t, enum block, enum number, uint16_t *);
void AT_LEVEL(column_magnitudes)(const uint16_t *, size_t, size_t, size_t, uint16_t *);
void AT_LEVEL(smoothed_magnitudes)(const uint16_t *, size_t, size_t, size_t, const double *, uint16_t *);
void AT_LEVEL(smoothed)(const uint16_t *, size_t, size_t, size_t, const double *, uint16_t *, uint16_t *);
void AT_LEVEL(smoothed_codes)(const uint16_t *, size_t, size_t, size_t, const float *, int, int, uint8_t *);

#endif
