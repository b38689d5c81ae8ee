/* The functions of the module, and the kernels that they call. */
#ifndef HEADRACE_FUNCTIONS_H
#define HEADRACE_FUNCTIONS_H

#include "boundary.h"

/* The kernels of the level in use. */
extern const struct kernels *in_use;

/* Of quantizing.c, unpacking.c and smoothing.c. */
#define FUNCTIONS(EACH)                                                         \
    EACH(weight_only_scales)                                                    \
    EACH(weight_only_codes)                                                     \
    EACH(float8_scales)                                                         \
    EACH(float8_codes)                                                          \
    EACH(float8_rescaled)                                                       \
    EACH(cast)                                                                  \
    EACH(arranged)                                                              \
    EACH(transposed)                                                            \
    EACH(awq_codes)                                                             \
    EACH(gguf_numbers)                                                          \
    EACH(gguf_types)                                                            \
    EACH(column_magnitudes)                                                     \
    EACH(smoothed_magnitudes)                                                   \
    EACH(smoothed)                                                              \
    EACH(smoothed_codes)

#define DECLARED(name) PyObject *name(PyObject *, PyObject *);
FUNCTIONS(DECLARED)

#endif
