/* Gram matrices of narrow float32 matrices, and products with them, in float64: what a thin QR by Cholesky's factor needs.

   A library wants its operands in one dtype, so that every matrix is first copied to twice its size; here 64 rows at a time are widened
   where they are used. Many matrices are taken in one call, for each call is a wait for the interpreter's lock. Sums are added up in the
   order of the rows with one rounding a step (fused multiply-add), so their bytes depend on shapes alone. Only for processors with AVX-512.
   Every length is checked before the first number is read. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include "../avx512.h"

enum { LANES = 8, WIDTH = 2 * LANES, ROWS = 8, BLOCK = 64, LINE = 16, MOST = 256 }; /* columns are padded to WIDTH, at most MOST */
typedef double lanes __attribute__((vector_size(64)));
typedef float half __attribute__((vector_size(32)));
typedef double lanes_there __attribute__((vector_size(64), aligned(8), may_alias));
typedef float half_there __attribute__((vector_size(32), aligned(4), may_alias));

#define AT(p) (*(lanes_there *)(p))
#define NARROW(x) __builtin_convertvector(x, half)
#define WIDE(x) __builtin_convertvector(x, lanes)

static long padded(const long columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }

/* A matrix X [m, R] of float32 as parts [m, width] side by side, each in C order; or turned, as the R rows of X^T. */
struct matrix {
    const float *const *parts;
    const long *widths;
    long count;
};

/* rows of X as float64, side by side in [rows, pad]; what is beyond R is 0 already. */
TARGET static void widen(const struct matrix *X, const long first, const long rows, const long pad, double *out) {
    for (long part = 0; part < X->count; out += X->widths[part++]) {
        const long width = X->widths[part];
        const float *from = X->parts[part] + first * width;
        for (long i = 0; i < rows; i++)
            for (long r = 0; r < width; r++) out[i * pad + r] = from[i * width + r];
    }
}

/* The same of columns of X^T: each becomes a row. What comes next is fetched ahead: the processor does not follow so many rows. */
TARGET static void widen_turned(const struct matrix *X, const long first, const long rows, const long pad, double *out) {
    for (long r = 0; r < X->count; r++) {
        const float *from = X->parts[r] + first;
        for (long i = 0; i < BLOCK; i += LINE) __builtin_prefetch(from + BLOCK + i);
        for (long i = 0; i < rows; i++) out[i * pad + r] = from[i];
    }
}

/* G [pad, pad] += X^T X, of X [rows, pad]; only tiles that reach the diagonal or lie above it. */
TARGET static void add_gram(const double *X, const long rows, const long pad, double *G) {
    for (long a = 0; a < pad; a += ROWS)
        for (long b = a / WIDTH * WIDTH; b < pad; b += WIDTH) {
            lanes sum[ROWS][2];
            for (int i = 0; i < ROWS; i++) sum[i][0] = AT(G + (a + i) * pad + b), sum[i][1] = AT(G + (a + i) * pad + b + LANES);
            for (long row = 0; row < rows; row++) {
                const double *x = X + row * pad;
                const lanes one = AT(x + b), two = AT(x + b + LANES);
                for (int i = 0; i < ROWS; i++) sum[i][0] += x[a + i] * one, sum[i][1] += x[a + i] * two;
            }
            for (int i = 0; i < ROWS; i++) AT(G + (a + i) * pad + b) = sum[i][0], AT(G + (a + i) * pad + b + LANES) = sum[i][1];
        }
}

/* out [R, R] = the Gram matrix of the columns of X [m, R]. */
TARGET static void gram(const struct matrix *X, const int turned, const long m, const long R, double *scratch, double *out) {
    const long pad = padded(R);
    double *G = scratch, *wide = scratch + pad * pad;
    memset(scratch, 0, (pad * pad + BLOCK * pad) * sizeof(double));
    for (long row = 0; row < m; row += BLOCK) {
        const long rows = m - row < BLOCK ? m - row : BLOCK;
        if (turned)
            widen_turned(X, row, rows, pad, wide);
        else
            widen(X, row, rows, pad, wide);
        add_gram(wide, rows, pad, G);
    }
    for (long i = 0; i < R; i++)
        for (long j = 0; j < R; j++) out[i * R + j] = i < j ? G[i * pad + j] : G[j * pad + i];
}

/* Some rows of X times WIDTH columns of Y [R, pad], of which the first columns are kept; and the largest and the least of each. */
INLINE TARGET void rows_times(const int rows, const struct matrix *X, const long first, const double *Y, const long pad, float *out,
                              const long k, const long columns, float *high, float *low) {
    lanes sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (lanes){0};
    for (long part = 0; part < X->count; part++) {
        const long width = X->widths[part];
        const float *from = X->parts[part] + first * width;
        for (long r = 0; r < width; r++, Y += pad) {
            const lanes one = AT(Y), two = AT(Y + LANES);
            for (int i = 0; i < rows; i++) {
                const double factor = from[i * width + r];
                sum[i][0] += factor * one, sum[i][1] += factor * two;
            }
        }
    }
    for (int i = 0; i < rows; i++) {
        float line[WIDTH];
        *(half_there *)line = NARROW(sum[i][0]), *(half_there *)(line + LANES) = NARROW(sum[i][1]);
        for (int c = 0; c < WIDTH; c++) high[c] = line[c] > high[c] ? line[c] : high[c], low[c] = line[c] < low[c] ? line[c] : low[c];
        memcpy(out + i * k, line, columns * sizeof(float));
    }
}

/* out [m, k] = X [m, R] Y [R, k], rounded once; with signs [k] each column times its sign, by which its largest entry is positive. */
TARGET static void times(const struct matrix *X, const long m, const long R, const double *Y, const long k, double *scratch, float *out,
                         double *signs) {
    const long pad = padded(k);
    float *high = (float *)(scratch + R * pad), *low = high + pad;
    memset(scratch, 0, (R + 1) * pad * sizeof(double));
    for (long r = 0; r < R; r++) memcpy(scratch + r * pad, Y + r * k, k * sizeof(double));
    for (long row = 0; row < m;) {
        const int rows = m - row >= ROWS ? ROWS : 1;
        for (long c = 0; c < k; c += WIDTH) {
            const long columns = k - c < WIDTH ? k - c : WIDTH;
            if (rows == ROWS)
                rows_times(ROWS, X, row, scratch + c, pad, out + row * k + c, k, columns, high + c, low + c);
            else
                rows_times(1, X, row, scratch + c, pad, out + row * k + c, k, columns, high + c, low + c);
        }
        row += rows;
    }
    if (!signs) return;
    for (long c = 0; c < k; c++) signs[c] = high[c] < -low[c] ? -1 : 1, high[c] = (float)signs[c];
    for (long row = 0; row < m; row++)
        for (long c = 0; c < k; c++) out[row * k + c] *= high[c];
}

/* Some rows of Y [., R] times WIDTH columns of X^T [R, n]. */
INLINE TARGET void turned_times(const int rows, const double *Y, const struct matrix *X, const long first, const long n, float *out) {
    const long R = X->count;
    lanes sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (lanes){0};
    for (long r = 0; r < R; r++) {
        const float *from = X->parts[r] + first;
        __builtin_prefetch(from + BLOCK);
        const lanes one = WIDE(*(half_there *)from), two = WIDE(*(half_there *)(from + LANES));
        for (int i = 0; i < rows; i++) sum[i][0] += Y[i * R + r] * one, sum[i][1] += Y[i * R + r] * two;
    }
    for (int i = 0; i < rows; i++)
        *(half_there *)(out + i * n) = NARROW(sum[i][0]), *(half_there *)(out + i * n + LANES) = NARROW(sum[i][1]);
}

/* out [k, n] = Y [k, R] X^T, rounded once. */
TARGET static void turned(const struct matrix *X, const long n, const double *Y, const long k, float *out) {
    const long R = X->count, whole = n - n % WIDTH;
    for (long c = 0; c < whole; c += WIDTH)
        for (long row = 0; row < k;) {
            const int rows = k - row >= ROWS ? ROWS : 1;
            if (rows == ROWS)
                turned_times(ROWS, Y + row * R, X, c, n, out + row * n + c);
            else
                turned_times(1, Y + row * R, X, c, n, out + row * n + c);
            row += rows;
        }
    for (long c = whole; c < n; c++)
        for (long row = 0; row < k; row++) {
            double sum = 0;
            for (long r = 0; r < R; r++) sum = __builtin_fma(Y[row * R + r], (double)X->parts[r][c], sum);
            out[row * n + c] = (float)sum;
        }
}

/* Of a Gram matrix G [R, R] of columns of lengths sizes: U [R, R] with U^T U = G, and its inverse; both above the diagonal. The factor is
   that of the correlations, G / (sizes sizes^T), whose diagonal is 1. Returns the trace of the inverse of these, or NaN if there is no factor. */
TARGET static double factor(const double *G, const long R, double *sizes, double *U, double *back) {
    double trace = 0;
    for (long i = 0; i < R; i++) sizes[i] = __builtin_sqrt(G[i * R + i]);
    for (long i = 0; i < R; i++)
        for (long j = 0; j < R; j++) U[i * R + j] = j < i ? 0 : G[i * R + j] / (sizes[i] * sizes[j]), back[i * R + j] = i == j;
    for (long k = 0; k < R; k++) {
        const double pivot = __builtin_sqrt(U[k * R + k]);
        if (!(pivot > 0)) return __builtin_nan("");
        for (long j = k; j < R; j++) U[k * R + j] /= pivot;
        for (long i = k + 1; i < R; i++)
            for (long j = i; j < R; j++) U[i * R + j] -= U[k * R + i] * U[k * R + j];
    }
    for (long i = R; i-- > 0;) {
        for (long k = i + 1; k < R; k++)
            for (long j = k; j < R; j++) back[i * R + j] -= U[i * R + k] * back[k * R + j];
        for (long j = i; j < R; j++) back[i * R + j] /= U[i * R + i], trace += back[i * R + j] * back[i * R + j];
    }
    for (long i = 0; i < R; i++)
        for (long j = i; j < R; j++) U[i * R + j] *= sizes[j], back[i * R + j] /= sizes[i];
    return trace;
}

/* A C-contiguous array of that many axes. */
static int view(PyObject *object, Py_buffer *buffer, const char *what, int flags, const char *format, int axes) {
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return 0;
    if (buffer->ndim == axes && buffer->format && !strcmp(buffer->format, format)) return 1;
    PyErr_Format(PyExc_TypeError, "%s: an array of %d axes and of format %s is expected", what, axes, format);
    PyBuffer_Release(buffer);
    return 0;
}

/* Matrices in a tuple, each a tuple of its parts, whose shapes are those of the first one's. */
struct matrices {
    Py_buffer *buffers;
    Py_ssize_t held, count, parts;
    long rows, columns; /* m and R */
    const float **starts;
    long *widths;
    int turned;
};

static void release(struct matrices *X) {
    while (X->held) PyBuffer_Release(&X->buffers[--X->held]);
    free(X->buffers), free(X->starts), free(X->widths);
}

/* The next part of a matrix, number part of its own. */
static int hold_part(PyObject *object, const Py_ssize_t part, struct matrices *X) {
    Py_buffer *buffer = &X->buffers[X->held];
    if (!view(object, buffer, "X", 0, "f", 2)) return 0;
    const Py_ssize_t width = buffer->shape[!X->turned], rows = buffer->shape[X->turned];
    X->held++;
    if (X->held == 1) X->rows = rows;
    if (X->held <= X->parts) X->widths[part] = width, X->columns += width;
    if (rows == X->rows && width == X->widths[part] && X->columns <= MOST) return 1;
    PyErr_SetString(PyExc_ValueError, "X: matrices of one shape, in parts of one shape, and of at most 256 columns are expected");
    return 0;
}

static int hold(PyObject *tuple, const int turned, struct matrices *X) {
    *X = (struct matrices){.turned = turned, .count = PyTuple_Size(tuple)};
    if (X->count < 0) return 0;
    if (!X->count) return PyErr_SetString(PyExc_ValueError, "X: there is no matrix"), 0;
    for (Py_ssize_t i = 0; i < X->count; i++) {
        PyObject *parts = PyTuple_GetItem(tuple, i);
        if (!PyTuple_Check(parts)) return PyErr_SetString(PyExc_TypeError, "X: a tuple of tuples of arrays is expected"), 0;
        if (!i) X->parts = PyTuple_Size(parts);
        if (PyTuple_Size(parts) == X->parts) continue;
        return PyErr_SetString(PyExc_ValueError, "X: matrices of equally many parts are expected"), 0;
    }
    X->buffers = calloc(X->count * X->parts + 1, sizeof(Py_buffer));
    X->widths = calloc(X->parts + 1, sizeof(long));
    if (!X->buffers || !X->widths) return release(X), PyErr_NoMemory(), 0;
    for (Py_ssize_t i = 0; i < X->count; i++) {
        PyObject *parts = PyTuple_GetItem(tuple, i);
        for (Py_ssize_t part = 0; part < X->parts; part++)
            if (!hold_part(PyTuple_GetItem(parts, part), part, X)) return release(X), 0;
    }
    X->starts = calloc(X->columns + X->parts + 1, sizeof(float *));
    return X->starts ? 1 : (release(X), PyErr_NoMemory(), 0);
}

/* One of them, until the next is asked for: its parts, or where they are turned all their rows. */
static struct matrix nth(const struct matrices *X, const Py_ssize_t i) {
    long count = 0;
    for (Py_ssize_t part = 0; part < X->parts; part++) {
        const float *start = X->buffers[i * X->parts + part].buf;
        for (long r = 0; r < (X->turned ? X->widths[part] : 1); r++) X->starts[count++] = start + r * X->rows;
    }
    return (struct matrix){X->starts, X->turned ? NULL : X->widths, count};
}

static PyObject *py_grams(PyObject *self, PyObject *args) {
    PyObject *tuple, *out_array, *found = NULL;
    struct matrices X;
    Py_buffer out;
    int is_turned;
    if (!PyArg_ParseTuple(args, "O!pO:grams", &PyTuple_Type, &tuple, &is_turned, &out_array) || !hold(tuple, is_turned, &X)) return NULL;
    if (view(out_array, &out, "out", PyBUF_WRITABLE, "d", 3)) {
        const long R = X.columns, pad = padded(R);
        double *scratch = NULL;
        if (out.shape[0] != X.count || out.shape[1] != R || out.shape[2] != R)
            PyErr_SetString(PyExc_ValueError, "out [count, R, R] does not fit X");
        else if (posix_memalign((void **)&scratch, 64, (pad * pad + BLOCK * pad + 1) * sizeof(double)))
            PyErr_NoMemory();
        else {
            Py_BEGIN_ALLOW_THREADS
            for (Py_ssize_t i = 0; i < X.count; i++) {
                const struct matrix one = nth(&X, i);
                gram(&one, is_turned, X.rows, R, scratch, (double *)out.buf + i * R * R);
            }
            Py_END_ALLOW_THREADS
            free(scratch);
            found = Py_NewRef(Py_None);
        }
        PyBuffer_Release(&out);
    }
    release(&X);
    return found;
}

static PyObject *py_times(PyObject *self, PyObject *args) {
    PyObject *tuple, *Y_array, *out_array, *signs_array, *found = NULL;
    struct matrices X;
    Py_buffer Y, out, signs = {0};
    int is_turned;
    if (!PyArg_ParseTuple(args, "O!OpOO:times", &PyTuple_Type, &tuple, &Y_array, &is_turned, &out_array, &signs_array) ||
        !hold(tuple, is_turned, &X))
        return NULL;
    const int is_signed = signs_array != Py_None;
    if (is_signed && !view(signs_array, &signs, "signs", PyBUF_WRITABLE, "d", 2)) return release(&X), NULL;
    if (view(Y_array, &Y, "Y", 0, "d", 3)) {
        if (view(out_array, &out, "out", PyBUF_WRITABLE, "f", 3)) {
            const long m = X.rows, R = X.columns, k = Y.shape[is_turned ? 1 : 2];
            double *scratch = NULL;
            if (Y.shape[0] != X.count || Y.shape[is_turned ? 2 : 1] != R || out.shape[0] != X.count ||
                out.shape[is_turned ? 1 : 2] != k || out.shape[is_turned ? 2 : 1] != m ||
                (is_signed && (is_turned || signs.shape[0] != X.count || signs.shape[1] != k)))
                PyErr_SetString(PyExc_ValueError, "X [m, R], Y [count, R, k], out [count, m, k] and signs [count, k] do not fit");
            else if (posix_memalign((void **)&scratch, 64, ((R + 1) * padded(k) + 1) * sizeof(double)))
                PyErr_NoMemory();
            else {
                Py_BEGIN_ALLOW_THREADS
                for (Py_ssize_t i = 0; i < X.count; i++) {
                    const struct matrix one = nth(&X, i);
                    const double *y = (double *)Y.buf + i * R * k;
                    float *there = (float *)out.buf + i * m * k;
                    if (is_turned)
                        turned(&one, m, y, k, there);
                    else
                        times(&one, m, R, y, k, scratch, there, is_signed ? (double *)signs.buf + i * k : NULL);
                }
                Py_END_ALLOW_THREADS
                free(scratch);
                found = Py_NewRef(Py_None);
            }
            PyBuffer_Release(&out);
        }
        PyBuffer_Release(&Y);
    }
    if (is_signed) PyBuffer_Release(&signs);
    release(&X);
    return found;
}

static PyObject *py_factors(PyObject *self, PyObject *args) {
    PyObject *arrays[3], *found = NULL;
    Py_buffer G, U, back;
    double limit;
    if (!PyArg_ParseTuple(args, "OOOd:factors", &arrays[0], &arrays[1], &arrays[2], &limit)) return NULL;
    if (!view(arrays[0], &G, "G", 0, "d", 3)) return NULL;
    if (view(arrays[1], &U, "U", PyBUF_WRITABLE, "d", 3)) {
        if (view(arrays[2], &back, "back", PyBUF_WRITABLE, "d", 3)) {
            const long count = G.shape[0], R = G.shape[1];
            double *sizes = NULL;
            if (G.shape[2] != R || R > MOST || memcmp(U.shape, G.shape, 3 * sizeof *G.shape) || memcmp(back.shape, G.shape, 3 * sizeof *G.shape))
                PyErr_SetString(PyExc_ValueError, "G, U and back [count, R, R] do not fit, or R is too large");
            else if (!(sizes = malloc((R + 1) * sizeof(double))))
                PyErr_NoMemory();
            else {
                int are_well = 1;
                Py_BEGIN_ALLOW_THREADS
                for (long i = 0; i < count && are_well; i++) {
                    const long at = i * R * R;
                    are_well = factor((double *)G.buf + at, R, sizes, (double *)U.buf + at, (double *)back.buf + at) < limit;
                }
                Py_END_ALLOW_THREADS
                free(sizes);
                found = PyBool_FromLong(are_well);
            }
            PyBuffer_Release(&back);
        }
        PyBuffer_Release(&U);
    }
    PyBuffer_Release(&G);
    return found;
}
#endif

static PyMethodDef methods[] = {
#if defined(__x86_64__)
    {"grams", py_grams, METH_VARARGS,
     "grams(X, turned, out)\n\nWrites X^T X of each matrix [m, R] of a tuple into out [count, R, R]. Each is a tuple of parts [m, r] that "
     "stand side by side, or if turned of parts [r, m] of X^T."},
    {"factors", py_factors, METH_VARARGS,
     "factors(G, U, back, limit)\n\nWrites the Cholesky factors U, U^T U = G, of matrices [count, R, R], and their inverses. False where one "
     "has none, or the trace of the inverse of its correlations is not below the limit."},
    {"times", py_times, METH_VARARGS,
     "times(X, Y, turned, out, signs)\n\nWrites X Y into out [count, m, k], or if turned Y X into out [count, k, m]. With signs "
     "[count, k] columns are multiplied by 1 or -1, so that the largest entry of each is positive."},
#endif
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_grams", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__grams(void) {
#if defined(__x86_64__)
    if (has_avx512()) return PyModule_Create(&module);
#endif
    PyErr_SetString(PyExc_ImportError, "this processor has no AVX-512");
    return NULL;
}
