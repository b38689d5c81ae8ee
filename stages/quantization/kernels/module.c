/* The kernels as a Python module: its table of functions, and the level of instructions that they use. */
#include "functions.h"

extern const struct kernels kernels_baseline;
#ifdef LEVELS
extern const struct kernels kernels_v3, kernels_v4;
#endif

static const struct kernels *const EVERY[] = {
#ifdef LEVELS
    &kernels_v4,
    &kernels_v3,
#endif
    &kernels_baseline,
};
#define COUNT (sizeof EVERY / sizeof *EVERY)

const struct kernels *in_use = &kernels_baseline;

#include "choosing.h"

#define WITH_ARGUMENTS(name) {#name, name, METH_VARARGS, NULL},
static PyMethodDef METHODS[] = {
    FUNCTIONS(WITH_ARGUMENTS)
    {"level", level, METH_NOARGS, NULL},
    {"levels", levels, METH_NOARGS, NULL},
    {"use", use, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define MODULE_DOC "The kernels in C; _kernels.pyi has their types."
#include "definition.h"
