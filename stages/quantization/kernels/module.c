/* The kernels as a Python module: its table of functions, and the level of instructions that they use. */
#include "boundary.h"

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

static int has(size_t number)
{
#ifdef LEVELS
    __builtin_cpu_init();
    if (number == 0)
        return __builtin_cpu_supports("x86-64-v4");
    if (number == 1)
        return __builtin_cpu_supports("x86-64-v3");
#endif
    (void)number;
    return 1;
}

static PyObject *level(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(ignored))
{
    return PyUnicode_FromString(in_use->name);
}

static PyObject *levels(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(ignored))
{
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names != NULL && i < COUNT; i++) {
        PyObject *name = has(i) ? PyUnicode_FromString(EVERY[i]->name) : NULL;
        if (name != NULL && PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    if (names != NULL && PyErr_Occurred())
        Py_CLEAR(names);
    return names;
}

static PyObject *use(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *wanted, *name;
    if (!PyArg_ParseTuple(arguments, "U", &wanted))
        return NULL;
    for (size_t i = 0; i < COUNT; i++)
        if (has(i) && PyUnicode_CompareWithASCIIString(wanted, EVERY[i]->name) == 0) {
            name = PyUnicode_FromString(in_use->name);
            in_use = EVERY[i];
            return name;
        }
    return wrong("a level that this processor has expected");
}

#define WITH_ARGUMENTS(name) {#name, name, METH_VARARGS, NULL},
static PyMethodDef METHODS[] = {
    FUNCTIONS(WITH_ARGUMENTS)
    {"level", level, METH_NOARGS, NULL},
    {"levels", levels, METH_NOARGS, NULL},
    {"use", use, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int begin(PyObject *Py_UNUSED(module))
{
    size_t highest = 0;
    while (!has(highest))
        highest++;
    in_use = EVERY[highest];
    return 0;
}

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
