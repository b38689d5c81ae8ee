/* The kernels of verification as a Python module: arguments are checked, the interpreter's lock is let go of, and a kernel is
   called. */
#include "boundary.h"
#include "checks.h"

#include <string.h>

extern const struct checks checks_baseline;
#ifdef LEVELS
extern const struct checks checks_v3, checks_v4;
#endif

static const struct checks *const EVERY[] = {
#ifdef LEVELS
    &checks_v4,
    &checks_v3,
#endif
    &checks_baseline,
};
#define COUNT (sizeof EVERY / sizeof *EVERY)

static const struct checks *in_use = &checks_baseline;

#include "choosing.h"

/* The place of a name among some; an exception, and -1, where it is none of them. */
static int named(const char *name, const char *const *names, int count)
{
    for (int i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    PyErr_Format(PyExc_ValueError, "%s: no such name", name);
    return -1;
}

/* Takes factors float32 [1 or rows, groups], or None where that is allowed. */
static int take_factors(PyObject *array, struct matrix *matrix, const char *name, int optional, size_t rows, size_t features)
{
    if (optional && array == Py_None)
        return 1;
    if (!take(array, matrix, name, 'f', READ))
        return 0;
    const size_t groups = matrix->columns;
    if ((matrix->rows == 1 || matrix->rows == rows) && groups > 0 && features % groups == 0
        && (groups == 1 || features / groups % 16 == 0))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: a factor for each group of 16 n in-features, of one row or of all, expected", name);
    return 0;
}

/* The bytes of a unit's codes are those of `stored`, and rows [first, first + rows) are among them. */
static int fits_stored(const struct stored *stored, const struct matrix *units, size_t first, size_t rows)
{
    const size_t features = stored->features, bits = stored->kind == SMALL_FLOATS ? 8 : (size_t)stored->bits;
    const size_t run = stored->kind == INTEGERS && stored->places ? (stored->columns > 1 ? 64 : 128 / bits) : 8 / bits;
    const size_t per_unit = stored->kind == PAIRS ? 2 : stored->columns;
    if (features == 0 || (stored->kind != PAIRS && features % run))
        return 0;
    if (units->columns != (stored->kind == PAIRS ? features : stored->columns * features * bits / 8))
        return 0;
    return rows > 0 && first < units->rows * per_unit && rows <= units->rows * per_unit - first;
}

static int places_of(const struct matrix *places, int bits)
{
    const size_t count = bits == 4 ? 32 : 16;
    if (places->rows != 1 || places->columns != count)
        return 0;
    for (size_t i = 0; i < count; i++)
        if (((const uint8_t *)places->data)[i] >= count)
            return 0;
    return 1;
}

static PyObject *figures_of(int right, const struct figures *figures)
{
    if (!right) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    return Py_BuildValue("ffddd", figures->greatest, figures->worst, figures->noise, figures->power, figures->square);
}

enum { UNITS, PLACES, SCALES, ZEROS, VALUES, VALUE_SCALES, VALUE_ZEROS, CONSTANT, ARRAYS };

static PyObject *compared(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    static const char *const KINDS[] = {"integers", "pairs", "float8"};
    static const char *const TYPES[] = {"bfloat16", "float16", "float32", "float8_e4m3fn", "codes4", "codes8"};
    static const char *const BASES[] = {"expected", "actual", "product"};
    static const char *const LARGEST[] = {"", "row", "group"};
    static const char FORMATS[] = "HHfBBB";
    PyObject *given[ARRAYS];
    const char *kind, *type, *base, *largest;
    int bits, right = 0;
    Py_ssize_t columns, features, start;
    float worst;
    struct bound bound = {0};
    if (!PyArg_ParseTuple(arguments, "sinnnOOOOsOOOssffffOf", &kind, &bits, &columns, &features, &start, &given[UNITS],
                          &given[PLACES], &given[SCALES], &given[ZEROS], &type, &given[VALUES], &given[VALUE_SCALES],
                          &given[VALUE_ZEROS], &base,
                          &largest, &bound.slope, &bound.factor, &bound.top, &bound.slack, &given[CONSTANT], &worst))
        return NULL;
    const int stored_kind = named(kind, KINDS, 3), expected_kind = named(type, TYPES, 6), of = named(base, BASES, 3),
              by = named(largest, LARGEST, 3);
    if (PyErr_Occurred())
        return NULL;
    if ((bits != 4 && bits != 8) || columns < 1 || columns > 64 || features < 1 || start < 0
        || (columns > 1 && (stored_kind != INTEGERS || given[PLACES] == Py_None)) || (stored_kind == PAIRS && bits != 4))
        return wrong("4 or 8 bits, 1 to 64 columns, 1 where they are not mixed, and rows that are there, expected");
    struct matrix arrays[ARRAYS] = {0};
    const size_t width = (size_t)features, bits_of_value = expected_kind == CODES4 ? 4 : 8;
    struct matrix *values = &arrays[VALUES];
    int fine = take(given[UNITS], &arrays[UNITS], "units", 'B', READ)
        && (given[PLACES] == Py_None || take(given[PLACES], &arrays[PLACES], "places", 'B', READ))
        && take(given[VALUES], values, "values", FORMATS[expected_kind], READ_STRIDED);
    const size_t rows = fine ? values->rows : 0;
    fine = fine && take_factors(given[SCALES], &arrays[SCALES], "scales", 0, rows, width)
        && take_factors(given[ZEROS], &arrays[ZEROS], "zeros", 1, rows, width)
        && take_factors(given[VALUE_SCALES], &arrays[VALUE_SCALES], "scales of values", 1, rows, width)
        && take_factors(given[VALUE_ZEROS], &arrays[VALUE_ZEROS], "zeros of values", 1, rows, width)
        && take_factors(given[CONSTANT], &arrays[CONSTANT], "constant", 0, rows, width);
    const size_t groups = arrays[SCALES].columns;
    struct stored stored = {(enum stored_kind)stored_kind, bits, (size_t)columns, arrays[PLACES].data, arrays[UNITS].data, width,
                            arrays[SCALES].data, arrays[ZEROS].data, arrays[SCALES].rows, groups};
    struct expected expected = {(enum expected_kind)expected_kind, values->data, values->stride, arrays[VALUE_SCALES].data,
                                arrays[VALUE_ZEROS].data, arrays[VALUE_SCALES].rows, arrays[VALUE_ZEROS].rows,
                                arrays[VALUE_SCALES].columns};
    if (fine && (stored.places && !places_of(&arrays[PLACES], bits))) {
        wrong("places: a permutation of a run of 16 bytes expected");
        fine = 0;
    }
    if (fine && (!fits_stored(&stored, &arrays[UNITS], (size_t)start, rows) || width * bits_of_value % 8
                 || values->columns != (expected_kind >= CODES4 ? width * bits_of_value / 8 : width))) {
        wrong("whole units that the rows are among, and as many in-features of both, expected");
        fine = 0;
    }
    if (fine && ((stored.zeros && (arrays[ZEROS].columns != groups || arrays[ZEROS].rows != rows))
                 || (expected.zeros && (!expected.scales || arrays[VALUE_ZEROS].columns != expected.groups)))) {
        wrong("zeros: as many as there are scales expected");
        fine = 0;
    }
    const struct matrix *constant = &arrays[CONSTANT];
    if (fine && ((of == OF_PRODUCT && (!stored.zeros || constant->columns != groups)) || (bound.top > 0 && by == OF_NONE)
                 || (by == OF_GROUP && 2048 % (width / constant->columns) && constant->columns > 1))) {
        wrong("a bound of what there is expected");
        fine = 0;
    }
    struct figures figures = {.worst = worst};
    if (fine) {
        bound.base = (enum base)of;
        bound.largest = (enum largest)(by == OF_GROUP && constant->columns == 1 ? OF_ROW : by);
        bound.constant = constant->data;
        bound.rows = constant->rows;
        bound.groups = constant->columns;
        Py_BEGIN_ALLOW_THREADS
        right = in_use->compared(&stored, (size_t)start, rows, &expected, &bound, &figures);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < ARRAYS; i++)
        give_back(&arrays[i]);
    return fine ? figures_of(right, &figures) : NULL;
}

enum { KEPT_UNITS, KEPT_PLACES, WORDS, ORDER, OWN_SCALES, OWN_ZEROS, SOURCE_SCALES, SOURCE_ZEROS, BOUND, KEPT_ARRAYS };

/* The in-features of a group of factors [groups, rows]; an exception, and 0, where they are no factors of whole runs. */
static size_t group_size(const struct matrix *factors, const char *name, size_t rows, size_t features)
{
    const size_t groups = factors->rows;
    if (factors->columns == rows && groups > 0 && features % groups == 0 && features / groups % 32 == 0)
        return features / groups;
    PyErr_Format(PyExc_ValueError, "%s: a factor of each row for each group of 32 n in-features expected", name);
    return 0;
}

static PyObject *kept(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    static const char *const NAMES[] = {"units", "places", "words", "order", "scales", "zeros", "scales of the source",
                                        "zeros of the source", "constant"};
    static const char FORMATS[] = "BBIBfffff";
    PyObject *given[KEPT_ARRAYS];
    Py_ssize_t columns, features, first, start, skip;
    struct kept_factors each = {0};
    struct figures figures = {0};
    struct matrix arrays[KEPT_ARRAYS] = {0};
    int right = 0, fine = 1;
    if (!PyArg_ParseTuple(arguments, "nnnOOOOnnOOOOOff", &columns, &features, &first, &given[KEPT_UNITS], &given[KEPT_PLACES],
                          &given[WORDS], &given[ORDER], &start, &skip, &given[OWN_SCALES], &given[OWN_ZEROS],
                          &given[SOURCE_SCALES], &given[SOURCE_ZEROS], &given[BOUND], &each.slope, &figures.worst))
        return NULL;
    for (int i = 0; fine && i < KEPT_ARRAYS; i++) {
        const int optional = i == KEPT_PLACES || i == ORDER || i == OWN_ZEROS;
        fine = (optional && given[i] == Py_None) || take(given[i], &arrays[i], NAMES[i], FORMATS[i], i == WORDS ? READ_STRIDED : READ);
    }
    const struct matrix *words = &arrays[WORDS], *places = &arrays[KEPT_PLACES], *order = &arrays[ORDER], *scales = &arrays[OWN_SCALES];
    const size_t width = features > 0 ? (size_t)features : 0, rows = scales->columns, before = skip > 0 ? (size_t)skip : 0;
    const size_t compared = words->rows * (order->data ? 1 : 8), from = start > 0 ? (size_t)start : 0;
    const struct stored stored = {.kind = INTEGERS, .bits = 4, .columns = (size_t)columns, .places = places->data,
                                  .data = arrays[KEPT_UNITS].data, .features = width};
    const struct packed packed = {words->data, words->stride, words->columns, from, compared, before, order->data};
    if (fine && (columns < 1 || columns > 64 || (columns > 1 && !places->data) || !width || width % 32 || first < 0 || start < 0
                 || skip < 0 || from % 32 || compared % 32 || !compared || from >= width || compared > width - from
                 || !fits_stored(&stored, &arrays[KEPT_UNITS], (size_t)first, rows))) {
        wrong("whole units that the rows are among, and words of some of their in-features, expected");
        fine = 0;
    }
    if (fine && places->data && !places_of(places, 4)) {
        wrong("places: a permutation of a run of 16 bytes expected");
        fine = 0;
    }
    if (fine && (order->data ? before > 7 || words->columns != (before + rows + 7) / 8 : before || words->columns != rows)) {
        wrong("words of the rows expected");
        fine = 0;
    }
    for (size_t i = 0; fine && order->data && i < 8; i++)
        if (order->rows != 1 || order->columns != 8 || ((const uint8_t *)order->data)[i] > 7) {
            wrong("order: the places of the eight nibbles of a word expected");
            fine = 0;
        }
    for (int i = OWN_SCALES; fine && i < KEPT_ARRAYS; i++) {
        const size_t size = given[i] != Py_None ? group_size(&arrays[i], NAMES[i], rows, width) : 0;
        const int theirs = i == SOURCE_SCALES || i == SOURCE_ZEROS;
        size_t *common = theirs ? &each.source_size : &each.size;
        if (given[i] == Py_None)
            continue;
        fine = size > 0;
        if (fine && *common && *common != size) {
            wrong("as many groups of all factors expected");
            fine = 0;
        }
        *common = size;
    }
    if (fine) {
        each.rows = rows;
        each.scales = scales->data;
        each.zeros = arrays[OWN_ZEROS].data;
        each.source_scales = arrays[SOURCE_SCALES].data;
        each.source_zeros = arrays[SOURCE_ZEROS].data;
        each.constant = arrays[BOUND].data;
        Py_BEGIN_ALLOW_THREADS
        right = in_use->kept(&stored, (size_t)first, &packed, &each, &figures);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < KEPT_ARRAYS; i++)
        give_back(&arrays[i]);
    return fine ? figures_of(right, &figures) : NULL;
}

static PyObject *same_bytes(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *other;
    struct matrix one = {0}, two = {0};
    int same = 1;
    if (!PyArg_ParseTuple(arguments, "OO", &given, &other))
        return NULL;
    int fine = take(given, &one, "one", 'B', READ_STRIDED) && take(other, &two, "two", 'B', READ_STRIDED);
    if (fine && (one.rows != two.rows || one.columns != two.columns)) {
        wrong("two arrays of one shape expected");
        fine = 0;
    }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        const size_t whole = one.stride == one.columns && two.stride == two.columns ? one.rows * one.columns : one.columns;
        for (size_t row = 0; same && whole && row < one.rows * one.columns / whole; row++)
            same = memcmp((const char *)one.data + row * one.stride, (const char *)two.data + row * two.stride, whole) == 0;
        Py_END_ALLOW_THREADS
    }
    give_back(&one);
    give_back(&two);
    return fine ? PyBool_FromLong(same) : NULL;
}

static PyObject *words_as_rows(PyObject *Py_UNUSED(self), PyObject *arguments)
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
        in_use->words_as_rows(words.data, words.stride, words.rows, words.columns, out.data, out.stride);
        Py_END_ALLOW_THREADS
    }
    return done(fine, &words, &out);
}

static PyObject *columns_as_rows(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *given, *order, *result;
    struct matrix words = {0}, places = {0}, out = {0};
    if (!PyArg_ParseTuple(arguments, "OOO", &given, &order, &result))
        return NULL;
    int fine = take(given, &words, "words", 'I', READ_STRIDED) && take(order, &places, "places", 'B', READ)
        && take(result, &out, "out", 'B', WRITE_STRIDED);
    if (fine && (words.rows % 2 || out.rows != 8 * words.columns || out.columns != words.rows / 2)) {
        wrong("out: eight rows for each column of words, and a byte for two rows of them, expected");
        fine = 0;
    }
    for (size_t i = 0; fine && i < 8; i++)
        if (places.rows != 1 || places.columns != 8 || ((const uint8_t *)places.data)[i] > 7) {
            wrong("places: those of the eight nibbles of a word expected");
            fine = 0;
        }
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        in_use->columns_as_rows(words.data, words.stride, words.rows, words.columns, places.data, out.data, out.stride);
        Py_END_ALLOW_THREADS
    }
    give_back(&places);
    return done(fine, &words, &out);
}

static PyMethodDef METHODS[] = {
    {"compared", compared, METH_VARARGS, NULL},
    {"kept", kept, METH_VARARGS, NULL},
    {"same_bytes", same_bytes, METH_VARARGS, NULL},
    {"words_as_rows", words_as_rows, METH_VARARGS, NULL},
    {"columns_as_rows", columns_as_rows, METH_VARARGS, NULL},
    {"level", level, METH_NOARGS, NULL},
    {"levels", levels, METH_NOARGS, NULL},
    {"use", use, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define MODULE_DOC "The kernels of verification in C; _kernels.pyi has their types."
#include "definition.h"
