/* The product of two factors, and a block of a weight changed by it: new = round(old + up @ down), and what the rounding lost.

   numpy goes over a block eight times for the latter; here a number is read once and written once. A sum is added up in the order of the
   rank with one rounding a step (fused multiply-add), whatever the instruction set, so that the bytes are the same on every processor.
   Only arithmetic is here: files, methods, other dtypes and whatever else a fold may be are left to Python. Every length is checked against
   every other before the first number is read. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { LANES = 16, TILES = 2, PANEL = LANES * TILES, ROWS = 4 };
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
/* The same where an array lies, which may be anywhere. */
typedef float lanes_there __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves_there __attribute__((vector_size(32), aligned(2), may_alias));

struct block {
    const void *raw; /* [rows, columns] as stored; unused by the product */
    void *out;       /* the same, or of the product in float32 */
    const float *up; /* [rows, rank] */
    const float *panels; /* [columns / PANEL rounded up, rank, PANEL]: the columns of down, zeros beyond the last */
    long rows, columns, rank;
};

struct sums {
    double error, inner; /* <E, E> and <E, D> */
    int moved;           /* whether any stored bit differs */
};

#define INLINE static inline __attribute__((always_inline))

/* bfloat16 is the upper half of float32. NaN becomes the quiet one of its sign, as in ml_dtypes. */
#define BF16_WIDE(p) ((lanes)(__builtin_convertvector((halves)*(const halves_there *)(p), bits) << 16))
#define BF16_NARROW(x, p)                                                                                     \
    do {                                                                                                      \
        const bits word = (bits)(x);                                                                          \
        const bits near = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;                                           \
        const bits nan = (bits)((word & 0x7FFFFFFF) > 0x7F800000);                                            \
        *(halves_there *)(p) = __builtin_convertvector((near & ~nan) | ((((word >> 16) & 0x8000) | 0x7FC0) & nan), halves); \
    } while (0)
#define F32_WIDE(p) ((lanes)*(const lanes_there *)(p))
#define F32_NARROW(x, p) (*(lanes_there *)(p) = (x))

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define NAME(x) JOIN(x, TYPE, SET)

/* float16 by the processor's own conversions. */
#if defined(__x86_64__)
#define SET avx512
#define PRODUCT_ROWS 8 /* as many sums as there are registers for */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define F16_WIDE(p) ((lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define F16_NARROW(x, p) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#include "kernels.h"
#undef SET
#undef TARGET
#undef F16_WIDE
#undef F16_NARROW
#undef PRODUCT_ROWS
#define SET avx2
#define PRODUCT_ROWS ROWS
#define TARGET __attribute__((target("avx2,fma,f16c")))
INLINE TARGET lanes wide_avx2(const uint16_t *from) {
    float two[LANES];
    for (int i = 0; i < LANES; i += 8) _mm256_storeu_ps(two + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    return (lanes)*(const lanes_there *)two;
}
INLINE TARGET void narrow_avx2(lanes x, uint16_t *to) {
    float two[LANES];
    *(lanes_there *)two = x;
    for (int i = 0; i < LANES; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(two + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#define F16_WIDE wide_avx2
#define F16_NARROW narrow_avx2
#include "kernels.h"
#elif defined(__aarch64__)
#define SET neon
#define PRODUCT_ROWS ROWS
#define TARGET
INLINE lanes wide_neon(const uint16_t *from) {
    float four[LANES];
    for (int i = 0; i < LANES; i += 4) vst1q_f32(four + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
    return (lanes)*(const lanes_there *)four;
}
INLINE void narrow_neon(lanes x, uint16_t *to) {
    float four[LANES];
    *(lanes_there *)four = x;
    for (int i = 0; i < LANES; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(four + i))));
}
#define F16_WIDE wide_neon
#define F16_NARROW narrow_neon
#include "kernels.h"
#else
#error "no fused multiply-add is known here"
#endif

typedef void (*work)(const struct block *, struct sums *);

struct set {
    const char *name;
    work product, bf16, f16, f32; /* without a weight, or with one of that dtype */
};
static const struct set sets[] = { /* the best first */
#if defined(__x86_64__)
    {"avx512", run_product_avx512, run_bf16_avx512, run_f16_avx512, run_f32_avx512},
    {"avx2", run_product_avx2, run_bf16_avx2, run_f16_avx2, run_f32_avx2},
#else
    {"neon", run_product_neon, run_bf16_neon, run_f16_neon, run_f32_neon},
#endif
};
enum { SETS = sizeof(sets) / sizeof(sets[0]) };

static int supported(int number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (number == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return 1;
#endif
}

/* A C-contiguous array of that many dimensions and one of these formats. */
static int view(PyObject *object, Py_buffer *buffer, const char *what, int flags, int dimensions, const char *formats) {
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return 0;
    const char *format = buffer->format ? buffer->format : "B";
    const Py_ssize_t size = format[0] == 'f' ? 4 : 2;
    if (buffer->ndim != dimensions || !format[0] || format[1] || !strchr(formats, format[0]) || buffer->itemsize != size) {
        PyErr_Format(PyExc_TypeError, "%s: %d dimensions of format %s are expected, found %d of %s", what, dimensions, formats,
                     buffer->ndim, format);
        PyBuffer_Release(buffer);
        return 0;
    }
    return 1;
}

/* Both functions: with raw it is the fold, without the product. */
static PyObject *run(PyObject *raw_array, PyObject *up_array, PyObject *panels_array, PyObject *out_array, const char *name) {
    PyObject *found = NULL;
    Py_buffer raw = {0}, up, panels, out;
    int number = 0;
    while (number < SETS && (!supported(number) || (name && strcmp(name, sets[number].name)))) number++;
    if (number == SETS) return PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", name ? name : "for it");
    if (!view(out_array, &out, "out", PyBUF_WRITABLE, 2, raw_array ? "Hef" : "f")) return NULL;
    if (!view(up_array, &up, "up", 0, 2, "f")) goto release_out;
    if (!view(panels_array, &panels, "panels", 0, 3, "f")) goto release_up;
    if (raw_array && !view(raw_array, &raw, "raw", 0, 2, "Hef")) goto release_panels;
    const Py_ssize_t rows = out.shape[0], columns = out.shape[1], rank = up.shape[1];
    if (up.shape[0] != rows || panels.shape[0] != columns / PANEL + (columns % PANEL != 0) || panels.shape[1] != rank ||
        panels.shape[2] != PANEL ||
        (raw_array && (raw.format[0] != out.format[0] || raw.shape[0] != rows || raw.shape[1] != columns))) {
        PyErr_SetString(PyExc_ValueError, "raw and out [rows, columns], up [rows, rank] and panels [ceil(columns / 32), rank, 32] do not fit");
        goto release_raw;
    }
    const struct block block = {raw.buf, out.buf, up.buf, panels.buf, rows, columns, rank};
    struct sums sums = {0, 0, 0};
    const struct set *set = sets + number;
    const work task = !raw_array ? set->product : out.format[0] == 'H' ? set->bf16 : out.format[0] == 'e' ? set->f16 : set->f32;
    Py_BEGIN_ALLOW_THREADS
    task(&block, &sums);
    Py_END_ALLOW_THREADS
    found = Py_BuildValue("ddO", sums.error, sums.inner, sums.moved ? Py_True : Py_False);
release_raw:
    if (raw_array) PyBuffer_Release(&raw);
release_panels:
    PyBuffer_Release(&panels);
release_up:
    PyBuffer_Release(&up);
release_out:
    PyBuffer_Release(&out);
    return found;
}

static PyObject *py_product(PyObject *self, PyObject *args) {
    PyObject *up, *panels, *out, *found;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OOO|s:product", &up, &panels, &out, &name)) return NULL;
    if (!(found = run(NULL, up, panels, out, name))) return NULL;
    Py_DECREF(found);
    Py_RETURN_NONE;
}

static PyObject *py_fold(PyObject *self, PyObject *args) {
    PyObject *raw, *up, *panels, *out;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OOOO|s:fold", &raw, &up, &panels, &out, &name)) return NULL;
    return run(raw, up, panels, out, name);
}

/* The instruction sets that this processor has, the best first. */
static PyObject *py_sets(PyObject *self, PyObject *none) {
    PyObject *found = PyList_New(0);
    for (int number = 0; found && number < SETS; number++) {
        if (!supported(number)) continue;
        PyObject *name = PyUnicode_FromString(sets[number].name);
        if (!name || PyList_Append(found, name) < 0) Py_CLEAR(found);
        Py_XDECREF(name);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"product", py_product, METH_VARARGS, "product(up, panels, out, set=best)\n\nWrites up @ down into out, float32."},
    {"fold", py_fold, METH_VARARGS,
     "fold(raw, up, panels, out, set=best) -> (error, inner, moved)\n\n"
     "Writes round(raw + up @ down) into out; 16-bit integers are bfloat16. error is <E, E> and inner <E, D> of the change D and what\n"
     "storing made of it, S = D + E; moved says whether any bit differs."},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor has, the best first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
    int number = 0;
    while (number < SETS && !supported(number)) number++;
    if (number == SETS) {
        PyErr_SetString(PyExc_ImportError, "this processor has no fused multiply-add");
        return NULL;
    }
    return PyModule_Create(&module);
}
