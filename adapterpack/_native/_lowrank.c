/* The product of two factors, and a block of a weight changed by it: new = round(old + up @ down), and what the rounding lost.

   numpy goes over a block eight times for the latter; here a number is read once and written once. A sum is added up in the order of the
   rank with one rounding a step (fused multiply-add), whatever the instruction set, so that the bytes are the same on every processor.
   Only arithmetic is here: files, methods, other dtypes and whatever else a fold may be are left to Python. Every length is checked against
   every other before the first number is read. */

#include "common.h"

enum { PANEL = 32 };

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

#define NAME(x) JOIN(JOIN(x, TYPE), SET)

#if defined(__x86_64__)
static const uint16_t even_then_odd[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                           1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
#define EVEN_THEN_ODD _mm512_loadu_si512(even_then_odd)
#endif

/* float16 is read and written by the processor's own conversions. */
#if defined(__x86_64__)
#define SET avx512
#define TARGET AVX512_TARGET
#define LANES 16
#define TILES 2
#define ROWS 8
#define F16_READ(p) ((lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define F16_ROUND(x) ((halves)_mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define F16_BACK(code) ((lanes)_mm512_cvtph_ps((__m256i)(code)))
#define WIDE(p) ((bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define UPPER(a, b, p) /* the even halves of what blending makes, then the odd ones */                       \
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16((__m512i)EVEN_THEN_ODD,                                   \
                                                    _mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)((a) >> 16), (__m512i)(b))))
#include "lowrank_types.h"
#define SET avx2
#define TARGET AVX2_TARGET
#define LANES 8
#define TILES 2
#define ROWS 4
#define F16_READ(p) ((lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define F16_ROUND(x) ((halves)_mm256_cvtps_ph((__m256)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define F16_BACK(code) ((lanes)_mm256_cvtph_ps((__m128i)(code)))
#define WIDE(p) ((bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define UPPER(a, b, p) /* packed in each half of the register, which is then put in order */ \
    _mm256_storeu_si256((__m256i *)(p), _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)((a) >> 16), (__m256i)((b) >> 16)), 0xD8))
#include "lowrank_types.h"
#elif defined(__aarch64__)
#define SET neon
#define TARGET
#define LANES 4
#define TILES 4
#define ROWS 4
#define F16_READ(p) ((lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define F16_ROUND(x) ((halves)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)(x))))
#define F16_BACK(code) ((lanes)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)(code))))
#define WIDE(p) ((bits)vmovl_u16(vld1_u16(p)))
#define UPPER(a, b, p) vst1q_u16(p, vuzp2q_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#include "lowrank_types.h"
#endif

typedef void (*work)(const struct block *, struct sums *);

struct set {
    const char *name;
    work product, bf16, f16, f32; /* without a weight, or with one of that dtype */
};
static const struct set sets[] = { /* the fastest first; none where no fused multiply-add is known */
#if defined(__x86_64__)
    {"avx512", run_product_avx512, run_bf16_avx512, run_f16_avx512, run_f32_avx512},
    {"avx2", run_product_avx2, run_bf16_avx2, run_f16_avx2, run_f32_avx2},
#elif defined(__aarch64__)
    {"neon", run_product_neon, run_bf16_neon, run_f16_neon, run_f32_neon},
#endif
    {NULL, NULL, NULL, NULL, NULL}};

/* Both functions: with raw it is the fold, without the product. */
static PyObject *run(PyObject *raw_array, PyObject *up_array, PyObject *panels_array, PyObject *out_array, const char *name) {
    PyObject *lost = NULL;
    Py_buffer raw = {0}, up, panels, out;
    const struct set *set = chosen(sets, sizeof(struct set), name);
    if (!set || !view(out_array, &out, "out", PyBUF_WRITABLE, raw_array ? "Hef" : "f", 2, -1)) return NULL;
    if (!view(up_array, &up, "up", 0, "f", 2, -1)) goto release_out;
    if (!view(panels_array, &panels, "panels", 0, "f", 3, -1)) goto release_up;
    if (raw_array && !view(raw_array, &raw, "raw", 0, "Hef", 2, -1)) goto release_panels;
    const Py_ssize_t rows = out.shape[0], columns = out.shape[1], rank = up.shape[1];
    if (up.shape[0] != rows || panels.shape[0] != columns / PANEL + (columns % PANEL != 0) || panels.shape[1] != rank ||
        panels.shape[2] != PANEL ||
        (raw_array && (raw.format[0] != out.format[0] || raw.shape[0] != rows || raw.shape[1] != columns))) {
        PyErr_SetString(PyExc_ValueError, "raw and out [rows, columns], up [rows, rank] and panels [ceil(columns / 32), rank, 32] do not fit");
        goto release_raw;
    }
    const struct block block = {raw.buf, out.buf, up.buf, panels.buf, rows, columns, rank};
    struct sums sums = {0, 0, 0};
    const work task = !raw_array ? set->product : out.format[0] == 'H' ? set->bf16 : out.format[0] == 'e' ? set->f16 : set->f32;
    Py_BEGIN_ALLOW_THREADS
    task(&block, &sums);
    Py_END_ALLOW_THREADS
    lost = Py_BuildValue("ddO", sums.error, sums.inner, sums.moved ? Py_True : Py_False);
release_raw:
    if (raw_array) PyBuffer_Release(&raw);
release_panels:
    PyBuffer_Release(&panels);
release_up:
    PyBuffer_Release(&up);
release_out:
    PyBuffer_Release(&out);
    return lost;
}

static PyObject *py_product(PyObject *self, PyObject *args) {
    PyObject *up, *panels, *out, *nothing;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OOO|s:product", &up, &panels, &out, &name)) return NULL;
    if (!(nothing = run(NULL, up, panels, out, name))) return NULL;
    Py_DECREF(nothing);
    Py_RETURN_NONE;
}

static PyObject *py_fold(PyObject *self, PyObject *args) {
    PyObject *raw, *up, *panels, *out;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OOOO|s:fold", &raw, &up, &panels, &out, &name)) return NULL;
    return run(raw, up, panels, out, name);
}

static PyObject *py_sets(PyObject *self, PyObject *none) { return names_of(sets, sizeof(struct set)); }

static PyMethodDef methods[] = {
    {"product", py_product, METH_VARARGS, "product(up, panels, out, set=fastest)\n\nWrites up @ down into out, float32."},
    {"fold", py_fold, METH_VARARGS,
     "fold(raw, up, panels, out, set=fastest) -> (error, inner, moved)\n\n"
     "Writes round(raw + up @ down) into out; 16-bit integers are bfloat16. error is <E, E> and inner <E, D> of the change D and what\n"
     "storing made of it, S = D + E; moved says whether any bit differs."},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor runs, the fastest first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_lowrank", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__lowrank(void) { return created(&module); }
