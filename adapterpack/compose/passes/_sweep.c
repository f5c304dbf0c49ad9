/* The product of a block of rows with a few columns, and the way back: there = D X, back += D^T there, in one pass over D.

   A library packs both operands for each product, which costs as much as multiplying where there are only 32 columns; here eight rows of D
   are multiplied from both sides while they are at hand. Sums are added up in the order of the columns, and of the rows, with one rounding
   a step (fused multiply-add), so their bytes depend on shapes alone. Only for processors with AVX-512: elsewhere a library does as well.
   Every length is checked before the first number is read. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <string.h>

#if defined(__x86_64__)
#include "../avx512.h"

enum { LANES = 16, PANEL = 2 * LANES, ROWS = 8 };
typedef float lanes __attribute__((vector_size(64)));
typedef float lanes_there __attribute__((vector_size(64), aligned(4), may_alias));

#define AT(p) (*(lanes_there *)(p))

/* Some rows and one panel of PANEL columns; width is the number of all columns. */
INLINE TARGET void tile(const int rows, const float *D, const long n, const float *X, const long width, float *there, float *back) {
    lanes sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (lanes){0};
    for (long j = 0; j < n; j++) {
        const lanes one = AT(X + j * width), two = AT(X + j * width + LANES);
        for (int i = 0; i < rows; i++) {
            const float factor = D[i * n + j];
            sum[i][0] += factor * one;
            sum[i][1] += factor * two;
        }
    }
    for (int i = 0; i < rows; i++) {
        AT(there + i * width) = sum[i][0];
        AT(there + i * width + LANES) = sum[i][1];
    }
    if (!back) return;
    for (long j = 0; j < n; j++) {
        lanes one = AT(back + j * width), two = AT(back + j * width + LANES);
        for (int i = 0; i < rows; i++) {
            const float factor = D[i * n + j];
            one += factor * sum[i][0];
            two += factor * sum[i][1];
        }
        AT(back + j * width) = one;
        AT(back + j * width + LANES) = two;
    }
}

TARGET static void sweep(const float *D, const long m, const long n, const float *X, const long width, float *there, float *back) {
    for (long row = 0; row < m;) {
        const int rows = m - row >= ROWS ? ROWS : 1;
        for (long p = 0; p < width; p += PANEL) {
            if (rows == ROWS)
                tile(ROWS, D + row * n, n, X + p, width, there + row * width + p, back ? back + p : NULL);
            else
                tile(1, D + row * n, n, X + p, width, there + row * width + p, back ? back + p : NULL);
        }
        row += rows;
    }
}

/* A C-contiguous matrix of float32. */
static int view(PyObject *object, Py_buffer *buffer, const char *what, int flags) {
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return 0;
    if (buffer->ndim == 2 && buffer->format && !strcmp(buffer->format, "f")) return 1;
    PyErr_Format(PyExc_TypeError, "%s: a matrix of float32 is expected", what);
    PyBuffer_Release(buffer);
    return 0;
}

static PyObject *py_sweep(PyObject *self, PyObject *args) {
    PyObject *arrays[4], *found = NULL;
    Py_buffer buffers[4];
    const char *names[] = {"D", "X", "there", "back"};
    int held = 0;
    if (!PyArg_ParseTuple(args, "OOOO:sweep", &arrays[0], &arrays[1], &arrays[2], &arrays[3])) return NULL;
    const int given = arrays[3] == Py_None ? 3 : 4;
    while (held < given && view(arrays[held], &buffers[held], names[held], held < 2 ? 0 : PyBUF_WRITABLE)) held++;
    if (held == given) {
        const Py_ssize_t m = buffers[0].shape[0], n = buffers[0].shape[1], width = buffers[1].shape[1];
        if (buffers[1].shape[0] == n && buffers[2].shape[0] == m && buffers[2].shape[1] == width && width % PANEL == 0 &&
            (given == 3 || (buffers[3].shape[0] == n && buffers[3].shape[1] == width))) {
            Py_BEGIN_ALLOW_THREADS
            sweep(buffers[0].buf, m, n, buffers[1].buf, width, buffers[2].buf, given == 4 ? buffers[3].buf : NULL);
            Py_END_ALLOW_THREADS
            found = Py_NewRef(Py_None);
        } else {
            PyErr_SetString(PyExc_ValueError, "D [m, n], X [n, width], there [m, width] and back [n, width] do not fit, or 32 is not in width");
        }
    }
    while (held--) PyBuffer_Release(&buffers[held]);
    return found;
}

#endif

static PyMethodDef methods[] = {
#if defined(__x86_64__)
    {"sweep", py_sweep, METH_VARARGS, "sweep(D, X, there, back)\n\nWrites D X into there and adds D^T there to back, if it is not None."},
#endif
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sweep", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sweep(void) {
#if defined(__x86_64__)
    if (has_avx512()) return PyModule_Create(&module);
#endif
    PyErr_SetString(PyExc_ImportError, "this processor has no AVX-512");
    return NULL;
}
