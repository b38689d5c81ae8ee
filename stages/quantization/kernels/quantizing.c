/* The functions of the module that quantize. Each checks its arguments, lets go of the interpreter's lock, and calls a kernel. */
#include "functions.h"

static int divides(Py_ssize_t parts, size_t whole)
{
    return parts > 0 && whole > 0 && whole % (size_t)parts == 0;
}

PyObject *weight_only_scales(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    const char *name;
    Py_ssize_t segments;
    int bits, bad = 0;
    enum number type;
    struct matrix values = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OsniO", &given, &name, &segments, &bits, &result) || !number_named(name, &type))
        return NULL;
    if ((bits != 4 && bits != 8) || (type != BFLOAT16 && type != FLOAT16))
        return wrong("4 or 8 bits, of bfloat16 or float16, expected");
    int fine = take(given, &values, "values", 'H', READ) && take(result, &out, "out", 'f', WRITE);
    if (fine && (!divides(segments, values.columns) || out.rows != values.rows || out.columns != (size_t)segments)) {
        wrong("as many equal segments of a row as columns of scales expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        bad = in_use->weight_only_scales(values.data, type, values.rows, values.columns, (size_t)segments, bits, out.data);
        Py_END_ALLOW_THREADS
    }
    give_back(&values);
    give_back(&out);
    return fine ? PyBool_FromLong(!bad) : NULL;
}

PyObject *weight_only_codes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result, *factors;
    const char *name;
    Py_ssize_t segments, columns;
    int bits, mixed, bad = 0;
    enum number type;
    struct order order;
    struct matrix values = {0}, out = {0}, scales = {0};
    void *work = NULL;
    if (!PyArg_ParseTuple(arguments, "OsninpOO", &given, &name, &segments, &bits, &columns, &mixed, &factors, &result)
        || !number_named(name, &type) || !order_of(bits, columns, mixed, &order))
        return NULL;
    if (type != BFLOAT16 && type != FLOAT16)
        return wrong("bfloat16 or float16 expected");
    int fine = take(given, &values, "values", 'H', READ) && take(result, &out, "out", 'B', WRITE)
        && take(factors, &scales, "scales", 'f', WRITE);
    if (fine && (!divides(segments, values.columns) || !fits(&order, values.rows, values.columns))) {
        wrong("whole groups of rows, and whole tiles and equal segments of a row, expected");
        fine = 0;
    }
    if (fine && (out.rows != values.rows / order.columns || out.columns != order.columns * values.columns * (size_t)bits / 8)) {
        wrong("out: a row for each group of rows expected");
        fine = 0;
    }
    if (fine && (scales.rows != values.rows || scales.columns != (size_t)segments)) {
        wrong("scales: one for each segment of each row expected");
        fine = 0;
    }
    if (fine && (work = PyMem_Malloc(order.columns * values.columns)) == NULL) {
        PyErr_NoMemory();
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        bad = in_use->weight_only_codes(values.data, type, values.rows, values.columns, (size_t)segments, order, work, out.data,
                                        scales.data);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(work);
    give_back(&values);
    give_back(&out);
    give_back(&scales);
    return fine ? PyBool_FromLong(!bad) : NULL;
}

/* Of both functions for float8: scales, and `codes` before them. */
static PyObject *float8(PyObject *arguments, int codes)
{
    PyObject *given, *result = NULL, *factors;
    const char *name;
    Py_ssize_t segments;
    float clamp;
    int bad = 0;
    enum number type;
    struct matrix values = {0}, out = {0}, scales = {0};
    int parsed = codes ? PyArg_ParseTuple(arguments, "OsnfOO", &given, &name, &segments, &clamp, &factors, &result)
                       : PyArg_ParseTuple(arguments, "OsnfO", &given, &name, &segments, &clamp, &factors);
    if (!parsed || !number_named(name, &type))
        return NULL;
    if (type == FLOAT8 || !(clamp > 0))
        return wrong("bfloat16, float16 or float32, and a clamp above 0, expected");
    int fine = take(given, &values, "values", format_of(type), READ) && take(factors, &scales, "scales", 'f', WRITE)
        && (!codes || take(result, &out, "out", 'B', WRITE));
    if (fine && (!divides(segments, values.columns) || scales.rows != values.rows || scales.columns != (size_t)segments
                 || (codes && (out.rows != values.rows || out.columns != values.columns)))) {
        wrong("equal segments of a row, and as much room for results, expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        if (codes)
            bad = in_use->float8_codes(values.data, type, values.rows, values.columns, (size_t)segments, clamp, out.data,
                                       scales.data);
        else
            bad = in_use->float8_scales(values.data, type, values.rows, values.columns, (size_t)segments, clamp, scales.data);
        Py_END_ALLOW_THREADS
    }
    give_back(&values);
    give_back(&out);
    give_back(&scales);
    return fine ? PyBool_FromLong(!bad) : NULL;
}

PyObject *float8_scales(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    return float8(arguments, 0);
}

PyObject *float8_codes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    return float8(arguments, 1);
}

PyObject *float8_rescaled(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    float scale, common;
    struct matrix codes = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OffO", &given, &scale, &common, &result))
        return NULL;
    int fine = take(given, &codes, "codes", 'B', READ) && take(result, &out, "out", 'B', WRITE);
    if (fine && (codes.rows != out.rows || codes.columns != out.columns)) {
        wrong("out: the shape of the codes expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->float8_rescaled(codes.data, codes.rows * codes.columns, scale, common, out.data);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &codes, &out);
}
