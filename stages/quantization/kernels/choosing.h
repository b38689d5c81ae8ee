/* The choice of a level, for the file of a module, which has defined EVERY, the tables of its levels, the highest first, COUNT
   of them, and `in_use`, one of them. */
#ifndef HEADRACE_CHOOSING_H
#define HEADRACE_CHOOSING_H

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

static int begin(PyObject *Py_UNUSED(module))
{
    size_t highest = 0;
    while (!has(highest))
        highest++;
    in_use = EVERY[highest];
    return 0;
}

#endif
