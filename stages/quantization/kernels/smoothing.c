/* The functions of the module for SmoothQuant. Each checks its arguments, lets go of the interpreter's lock, and calls a kernel. */
#include "functions.h"

#include <string.h>

/* Whether `one` has a number for each row, or each column, of a matrix. */
static int alike(const struct matrix *one, size_t count)
{
    return one->rows == 1 && one->columns == count;
}

PyObject *column_magnitudes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    struct matrix values = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OO", &given, &result))
        return NULL;
    int fine = take(given, &values, "values", 'H', READ_STRIDED) && take(result, &out, "out", 'H', WRITE);
    if (fine && !alike(&out, values.columns)) {
        wrong("out: one for each column expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->column_magnitudes(values.data, values.stride, values.rows, values.columns, out.data);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &values, &out);
}

PyObject *smoothed_magnitudes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *factor, *result;
    struct matrix values = {0}, factors = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OOO", &given, &factor, &result))
        return NULL;
    int fine = take(given, &values, "values", 'H', READ_STRIDED) && take(factor, &factors, "factors", 'd', READ)
        && take(result, &out, "out", 'H', WRITE);
    if (fine && (!alike(&factors, values.columns) || !alike(&out, values.rows))) {
        wrong("a factor for each column, and room for a magnitude of each row, expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->smoothed_magnitudes(values.data, values.stride, values.rows, values.columns, factors.data, out.data);
        Py_END_ALLOW_THREADS
    }
    give_back(&factors);
    return done(fine, &values, &out);
}

PyObject *smoothed(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *factor, *largest, *result;
    struct matrix values = {0}, factors = {0}, most = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OOOO", &given, &factor, &largest, &result))
        return NULL;
    int fine = take(given, &values, "values", 'H', READ_STRIDED) && take(factor, &factors, "factors", 'd', READ)
        && take(largest, &most, "most", 'H', WRITE) && take(result, &out, "out", 'H', WRITE);
    if (fine && (!alike(&factors, values.columns) || !alike(&most, values.rows))) {
        wrong("a factor for each column, and room for a magnitude of each row, expected");
        fine = 0;
    }
    if (fine && (out.rows != values.rows || out.columns != values.columns)) {
        wrong("out: the shape of the values expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->smoothed(values.data, values.stride, values.rows, values.columns, factors.data, out.data, most.data);
        Py_END_ALLOW_THREADS
    }
    give_back(&factors);
    give_back(&most);
    return done(fine, &values, &out);
}

PyObject *smoothed_codes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *factors, *result;
    const char *product;
    struct matrix values = {0}, scales = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OOsO", &given, &factors, &product, &result))
        return NULL;
    const int divided = strcmp(product, "divided") == 0, half = divided || strcmp(product, "half") == 0;
    if (!half && strcmp(product, "float") != 0)
        return wrong("a product that is half, float or divided expected");
    int fine = take(given, &values, "values", 'H', READ_STRIDED) && take(factors, &scales, "scales", 'f', READ)
        && take(result, &out, "out", 'B', WRITE);
    if (fine && !alike(&scales, values.rows)) {
        wrong("scales: one for each row expected");
        fine = 0;
    }
    if (fine && (out.rows != values.rows || out.columns != values.columns)) {
        wrong("out: the shape of the values expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->smoothed_codes(values.data, values.stride, values.rows, values.columns, scales.data, divided, half, out.data);
        Py_END_ALLOW_THREADS
    }
    give_back(&scales);
    return done(fine, &values, &out);
}
