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

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)begin},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef DEFINITION = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernels",
    .m_doc = "The kernels in C; _kernels.pyi has their types.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&DEFINITION);
}
