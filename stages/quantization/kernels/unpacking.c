/* The functions of the module that change types and orders. Each checks its arguments, lets go of the interpreter's lock, and calls a
   kernel. */
#include "functions.h"

#include <string.h>

PyObject *cast(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    const char *from_name, *to_name;
    enum number from, to;
    struct matrix values = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OssO", &given, &from_name, &to_name, &result) || !number_named(from_name, &from)
        || !number_named(to_name, &to))
        return NULL;
    if (from == to || to == FLOAT8)
        return wrong("another type, not float8_e4m3fn, expected");
    int fine = take(given, &values, "values", format_of(from), READ_STRIDED) && take(result, &out, "out", format_of(to), WRITE);
    if (fine && (values.rows != out.rows || values.columns != out.columns)) {
        wrong("out: the shape of the values expected");
        fine = 0;
    }
    if (fine) {
        const size_t from_row = values.stride * (size_t)values.view.itemsize, to_row = out.stride * (size_t)out.view.itemsize;
        Py_BEGIN_ALLOW_THREADS
        if (values.stride == values.columns)
            in_use->cast(values.data, from, values.rows * values.columns, to, out.data);
        else
            for (size_t row = 0; row < values.rows; row++)
                in_use->cast((char *)values.data + row * from_row, from, values.columns, to, (char *)out.data + row * to_row);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &values, &out);
}

PyObject *arranged(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    int bits, mixed;
    Py_ssize_t columns;
    struct order order;
    struct matrix stream = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OinpO", &given, &bits, &columns, &mixed, &result)
        || !order_of(bits, columns, mixed, &order))
        return NULL;
    int fine = take(given, &stream, "stream", 'B', READ) && take(result, &out, "out", 'B', WRITE);
    if (fine && (!fits(&order, stream.rows, stream.columns * 8 / (size_t)bits) || out.rows != stream.rows / order.columns
                 || out.columns != order.columns * stream.columns)) {
        wrong("whole groups of rows, whole tiles of a row, and as much room for them expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->arranged(stream.data, stream.rows, stream.columns, order, out.data);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &stream, &out);
}

PyObject *transposed(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    struct matrix words = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OO", &given, &result))
        return NULL;
    int fine = take(given, &words, "words", 'I', READ_STRIDED) && take(result, &out, "out", 'I', WRITE_STRIDED);
    if (fine && (out.rows != words.columns || out.columns != words.rows)) {
        wrong("out: the shape of the words, its axes exchanged, expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->transposed(words.data, words.stride, words.rows, words.columns, out.data, out.stride);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &words, &out);
}

PyObject *awq_codes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    struct matrix words = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OO", &given, &result))
        return NULL;
    int fine = take(given, &words, "words", 'I', READ_STRIDED) && take(result, &out, "out", 'B', WRITE_STRIDED);
    if (fine && (words.rows % 2 || out.rows != 8 * words.columns || out.columns != words.rows / 2)) {
        wrong("out: eight rows for each column of words, and a byte for two rows of them, expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->awq_codes(words.data, words.stride, words.rows, words.columns, out.data, out.stride);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &words, &out);
}

PyObject *gguf_numbers(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *result;
    const char *name, *to_name;
    int type = 0;
    enum number to;
    struct matrix blocks = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OssO", &given, &name, &to_name, &result) || !number_named(to_name, &to))
        return NULL;
    if (to == FLOAT8)
        return wrong("numbers of another type than float8_e4m3fn expected");
    while (type < BLOCK_TYPES && strcmp(name, BLOCKS[type].name) != 0)
        type++;
    if (type == BLOCK_TYPES)
        return wrong("a type of gguf_types() expected");
    const size_t size = BLOCKS[type].bytes, elements = BLOCKS[type].elements;
    int fine = take(given, &blocks, "blocks", 'B', READ) && take(result, &out, "out", format_of(to), WRITE);
    if (fine && (blocks.columns % size || out.rows != blocks.rows || out.columns != blocks.columns / size * elements)) {
        wrong("whole blocks, and room for each of their elements, expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        const size_t count = blocks.rows * (blocks.columns / size);
        if (to == FLOAT32)
            in_use->gguf_numbers(blocks.data, count, (enum block)type, out.data);
        else
            in_use->gguf_cast(blocks.data, count, (enum block)type, to, out.data);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &blocks, &out);
}

PyObject *gguf_types(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    if (!PyArg_ParseTuple(arguments, ""))
        return NULL;
    PyObject *types = PyDict_New();
    for (int i = 0; types != NULL && i < BLOCK_TYPES; i++) {
        PyObject *sizes = Py_BuildValue("(nn)", (Py_ssize_t)BLOCKS[i].bytes, (Py_ssize_t)BLOCKS[i].elements);
        if (sizes == NULL || PyDict_SetItemString(types, BLOCKS[i].name, sizes) < 0)
            Py_CLEAR(types);
        Py_XDECREF(sizes);
    }
    return types;
}
