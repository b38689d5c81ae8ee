/* Arrays that come from Python: what they must be is said, and anything else is an exception. */
#ifndef HEADRACE_BOUNDARY_H
#define HEADRACE_BOUNDARY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>

#include "kernels.h"

/* A matrix [rows, columns] in memory that Python owns, held until it is given back. `stride`: of a row, in elements. */
struct matrix {
    Py_buffer view;
    void *data;
    size_t rows, columns, stride;
    int held;
};

enum access { READ, READ_STRIDED, WRITE, WRITE_STRIDED };

/* Takes the memory of an array of one or two axes (one: a matrix of one row), whose elements have `format`, as the module struct
   names it. Rows are contiguous, and the whole too, unless it is READ_STRIDED or WRITE_STRIDED. Returns 0 with an exception where it is anything else. */
int take(PyObject *array, struct matrix *matrix, const char *name, char format, enum access access);

/* The format of a type's values, which are passed as integers where Python's buffers do not know it. */
char format_of(enum number type);

/* Sets a type by NumPy's name. Returns 0 with an exception where it is none of ours. */
int number_named(const char *name, enum number *type);

void give_back(struct matrix *matrix);

/* Sets a ValueError of which `what` says what was expected. Returns NULL. */
PyObject *wrong(const char *what);

/* Gives both back. Returns None, or NULL where something was not fine. */
PyObject *done(int fine, struct matrix *given, struct matrix *out);

/* Sets an order. Returns 0 with an exception where there is no such order. */
int order_of(int bits, Py_ssize_t columns, int mixed, struct order *order);

/* Whether `rows` rows of `features` codes can be put into an order. */
int fits(const struct order *order, size_t rows, size_t features);

#endif
