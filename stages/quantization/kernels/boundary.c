#include "boundary.h"

#include <string.h>

static size_t size_of(char format)
{
    return format == 'B' ? 1 : format == 'H' ? 2 : format == 'd' ? 8 : 4;
}

static const char *named(char format)
{
    return format == 'B' ? "uint8" : format == 'H' ? "uint16" : format == 'I' ? "uint32" : format == 'd' ? "float64" : "float32";
}

static int refuse(struct matrix *matrix, const char *name, const char *wanted)
{
    give_back(matrix);
    PyErr_Format(PyExc_ValueError, "%s: %s expected", name, wanted);
    return 0;
}

int take(PyObject *array, struct matrix *matrix, const char *name, char format, enum access access)
{
    Py_buffer *view = &matrix->view;
    const int writing = access == WRITE || access == WRITE_STRIDED, strided = access == READ_STRIDED || access == WRITE_STRIDED;
    const int flags = PyBUF_FORMAT | PyBUF_STRIDES | (writing ? PyBUF_WRITABLE : 0);
    const size_t size = size_of(format);
    if (PyObject_GetBuffer(array, view, flags) < 0)
        return 0;
    matrix->held = 1;
    if (view->format == NULL || view->format[0] != format || view->format[1] != 0 || view->itemsize != (Py_ssize_t)size)
        return refuse(matrix, name, named(format));
    if (view->ndim != 1 && view->ndim != 2)
        return refuse(matrix, name, "one or two axes");
    const int last = view->ndim - 1;
    matrix->data = view->buf;
    matrix->rows = last ? (size_t)view->shape[0] : 1;
    matrix->columns = (size_t)view->shape[last];
    matrix->stride = matrix->columns;
    if (matrix->columns > 1 && view->strides[last] != (Py_ssize_t)size)
        return refuse(matrix, name, "contiguous rows");
    if (matrix->rows > 1 && matrix->columns > 0) {
        const Py_ssize_t step = view->strides[0], row = (Py_ssize_t)(matrix->columns * size);
        if (strided ? step < row || step % (Py_ssize_t)size : step != row)
            return refuse(matrix, name, strided ? "rows one behind the other" : "a contiguous array");
        matrix->stride = (size_t)step / size;
    }
    if ((uintptr_t)matrix->data % size)
        return refuse(matrix, name, "an aligned array");
    return 1;
}

char format_of(enum number type)
{
    return type == FLOAT8 ? 'B' : type == FLOAT32 ? 'f' : 'H';
}

int number_named(const char *name, enum number *type)
{
    static const char *const NAMES[] = {"bfloat16", "float16", "float32", "float8_e4m3fn"};
    for (int i = 0; i < 4; i++)
        if (strcmp(name, NAMES[i]) == 0) {
            *type = (enum number)i;
            return 1;
        }
    PyErr_Format(PyExc_ValueError, "%s: bfloat16, float16, float32 or float8_e4m3fn expected", name);
    return 0;
}

void give_back(struct matrix *matrix)
{
    if (matrix->held)
        PyBuffer_Release(&matrix->view);
    matrix->held = 0;
}

PyObject *wrong(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

PyObject *done(int fine, struct matrix *given, struct matrix *out)
{
    give_back(given);
    give_back(out);
    if (!fine)
        return NULL;
    Py_INCREF(Py_None);
    return Py_None;
}

/* Whether `rows` rows of `features` codes can be put into an order. */
int fits(const struct order *order, size_t rows, size_t features)
{
    const size_t run = !order->mixed ? 8 / (size_t)order->bits : order->columns > 1 ? 64 : 128 / (size_t)order->bits;
    return features % run == 0 && rows % order->columns == 0;
}

int order_of(int bits, Py_ssize_t columns, int mixed, struct order *order)
{
    if ((bits != 4 && bits != 8) || columns < 1 || columns > 64 || (columns > 1 && !mixed)) {
        wrong("4 or 8 bits, and 1 to 64 columns, 1 where they are not mixed, expected");
        return 0;
    }
    *order = (struct order){bits, (size_t)columns, mixed};
    return 1;
}
