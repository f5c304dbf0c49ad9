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

enum { LANES = 8, WIDTH = 2 * LANES, ROWS = 8, BLOCK = 64, MOST = 256 }; /* columns are padded to WIDTH, and there are at most MOST */
typedef double lanes __attribute__((vector_size(64)));
typedef float half __attribute__((vector_size(32)));
typedef double lanes_there __attribute__((vector_size(64), aligned(8), may_alias));
typedef float half_there __attribute__((vector_size(32), aligned(4), may_alias));

#define AT(p) (*(lanes_there *)(p))
#define NARROW(x) __builtin_convertvector(x, half)
#define WIDE(x) __builtin_convertvector(x, lanes)

static long padded(const long columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }

/* rows of X [., R] as float64, side by side in [rows, pad]; what is beyond R is 0 already. */
TARGET static void widen(const float *X, const long rows, const long R, const long pad, double *out) {
    for (long i = 0; i < rows; i++)
        for (long r = 0; r < R; r++) out[i * pad + r] = X[i * R + r];
}

/* The same of columns of X [R, n]: each becomes a row. */
TARGET static void widen_turned(const float *X, const long n, const long rows, const long R, const long pad, double *out) {
    for (long r = 0; r < R; r++)
        for (long i = 0; i < rows; i++) out[i * pad + r] = X[r * n + i];
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

/* out [R, R] = the Gram matrix of the columns of X [m, R], or if turned of the rows of X [R, m]. */
TARGET static void gram(const float *X, const int turned, const long m, const long R, double *scratch, double *out) {
    const long pad = padded(R);
    double *G = scratch, *wide = scratch + pad * pad;
    memset(scratch, 0, (pad * pad + BLOCK * pad) * sizeof(double));
    for (long row = 0; row < m; row += BLOCK) {
        const long rows = m - row < BLOCK ? m - row : BLOCK;
        if (turned)
            widen_turned(X + row, m, rows, R, pad, wide);
        else
            widen(X + row * R, rows, R, pad, wide);
        add_gram(wide, rows, pad, G);
    }
    for (long i = 0; i < R; i++)
        for (long j = 0; j < R; j++) out[i * R + j] = i < j ? G[i * pad + j] : G[j * pad + i];
}

/* Some rows of X [., R] times WIDTH columns of Y [R, pad], of which the first columns are kept; and the largest and the least of each. */
INLINE TARGET void rows_times(const int rows, const float *X, const long R, const double *Y, const long pad, float *out, const long k,
                              const long columns, float *high, float *low) {
    lanes sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (lanes){0};
    for (long r = 0; r < R; r++) {
        const lanes one = AT(Y + r * pad), two = AT(Y + r * pad + LANES);
        for (int i = 0; i < rows; i++) {
            const double factor = X[i * R + r];
            sum[i][0] += factor * one, sum[i][1] += factor * two;
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
TARGET static void times(const float *X, const long m, const long R, const double *Y, const long k, double *scratch, float *out,
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
                rows_times(ROWS, X + row * R, R, scratch + c, pad, out + row * k + c, k, columns, high + c, low + c);
            else
                rows_times(1, X + row * R, R, scratch + c, pad, out + row * k + c, k, columns, high + c, low + c);
        }
        row += rows;
    }
    if (!signs) return;
    for (long c = 0; c < k; c++) signs[c] = high[c] < -low[c] ? -1 : 1, high[c] = (float)signs[c];
    for (long row = 0; row < m; row++)
        for (long c = 0; c < k; c++) out[row * k + c] *= high[c];
}

/* Some rows of Y [., R] times WIDTH columns of X [R, n]. */
INLINE TARGET void turned_times(const int rows, const double *Y, const long R, const float *X, const long n, float *out) {
    lanes sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (lanes){0};
    for (long r = 0; r < R; r++) {
        const lanes one = WIDE(*(half_there *)(X + r * n)), two = WIDE(*(half_there *)(X + r * n + LANES));
        for (int i = 0; i < rows; i++) sum[i][0] += Y[i * R + r] * one, sum[i][1] += Y[i * R + r] * two;
    }
    for (int i = 0; i < rows; i++)
        *(half_there *)(out + i * n) = NARROW(sum[i][0]), *(half_there *)(out + i * n + LANES) = NARROW(sum[i][1]);
}

/* out [k, n] = Y [k, R] X [R, n], rounded once. */
TARGET static void turned(const float *X, const long n, const long R, const double *Y, const long k, float *out) {
    const long whole = n - n % WIDTH;
    for (long c = 0; c < whole; c += WIDTH)
        for (long row = 0; row < k;) {
            const int rows = k - row >= ROWS ? ROWS : 1;
            if (rows == ROWS)
                turned_times(ROWS, Y + row * R, R, X + c, n, out + row * n + c);
            else
                turned_times(1, Y + row * R, R, X + c, n, out + row * n + c);
            row += rows;
        }
    for (long c = whole; c < n; c++)
        for (long row = 0; row < k; row++) {
            double sum = 0;
            for (long r = 0; r < R; r++) sum = __builtin_fma(Y[row * R + r], (double)X[r * n + c], sum);
            out[row * n + c] = (float)sum;
        }
}

/* A C-contiguous array of that many axes. */
static int view(PyObject *object, Py_buffer *buffer, const char *what, int flags, const char *format, int axes) {
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return 0;
    if (buffer->ndim == axes && buffer->format && !strcmp(buffer->format, format)) return 1;
    PyErr_Format(PyExc_TypeError, "%s: an array of %d axes and of format %s is expected", what, axes, format);
    PyBuffer_Release(buffer);
    return 0;
}

/* Matrices of float32 in a tuple, all of one shape. */
struct matrices {
    Py_buffer *buffers;
    Py_ssize_t count, shape[2];
};

static void release(struct matrices *X) {
    while (X->count) PyBuffer_Release(&X->buffers[--X->count]);
    free(X->buffers);
}

static int hold(PyObject *tuple, struct matrices *X) {
    const Py_ssize_t count = PyTuple_Size(tuple);
    *X = (struct matrices){0};
    if (count < 0) return 0;
    if (!(X->buffers = malloc((count + 1) * sizeof(Py_buffer)))) return PyErr_NoMemory(), 0;
    while (X->count < count && view(PyTuple_GetItem(tuple, X->count), &X->buffers[X->count], "X", 0, "f", 2)) {
        const Py_ssize_t *shape = X->buffers[X->count++].shape;
        if (X->count == 1) X->shape[0] = shape[0], X->shape[1] = shape[1];
        if (shape[0] == X->shape[0] && shape[1] == X->shape[1]) continue;
        PyErr_SetString(PyExc_ValueError, "X: matrices of one shape are expected");
        break;
    }
    if (X->count == count && !PyErr_Occurred()) return 1;
    release(X);
    return 0;
}

static PyObject *py_grams(PyObject *self, PyObject *args) {
    PyObject *tuple, *out_array, *found = NULL;
    struct matrices X;
    Py_buffer out;
    int is_turned;
    if (!PyArg_ParseTuple(args, "OpO:grams", &tuple, &is_turned, &out_array) || !hold(tuple, &X)) return NULL;
    if (view(out_array, &out, "out", PyBUF_WRITABLE, "d", 3)) {
        const long m = X.shape[is_turned], R = X.shape[!is_turned], pad = padded(R);
        double *scratch = NULL;
        if (out.shape[0] != X.count || out.shape[1] != R || out.shape[2] != R || R > MOST)
            PyErr_SetString(PyExc_ValueError, "out [count, R, R] does not fit X, or R is too large");
        else if (posix_memalign((void **)&scratch, 64, (pad * pad + BLOCK * pad + 1) * sizeof(double)))
            PyErr_NoMemory();
        else {
            Py_BEGIN_ALLOW_THREADS
            for (Py_ssize_t i = 0; i < X.count; i++) gram(X.buffers[i].buf, is_turned, m, R, scratch, (double *)out.buf + i * R * R);
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
    if (!PyArg_ParseTuple(args, "OOpOO:times", &tuple, &Y_array, &is_turned, &out_array, &signs_array) || !hold(tuple, &X)) return NULL;
    const int is_signed = signs_array != Py_None;
    if (is_signed && !view(signs_array, &signs, "signs", PyBUF_WRITABLE, "d", 2)) return release(&X), NULL;
    if (view(Y_array, &Y, "Y", 0, "d", 3)) {
        if (view(out_array, &out, "out", PyBUF_WRITABLE, "f", 3)) {
            const long m = X.shape[is_turned], R = X.shape[!is_turned], k = Y.shape[is_turned ? 1 : 2];
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
                    const double *y = (double *)Y.buf + i * R * k;
                    float *there = (float *)out.buf + i * m * k;
                    if (is_turned)
                        turned(X.buffers[i].buf, m, R, y, k, there);
                    else
                        times(X.buffers[i].buf, m, R, y, k, scratch, there, is_signed ? (double *)signs.buf + i * k : NULL);
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
#endif

static PyMethodDef methods[] = {
#if defined(__x86_64__)
    {"grams", py_grams, METH_VARARGS,
     "grams(X, turned, out)\n\nWrites X^T X of each matrix [m, R] of a tuple, or if turned X X^T of each [R, m], into out [count, R, R]."},
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
