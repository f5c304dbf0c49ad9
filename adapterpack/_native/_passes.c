/* Passes over dense entries: TIES' vote, and counts that an order statistic is read off.

   numpy goes over all changes twenty times for a vote; here a number is read once. Nothing is contracted to fused multiply-adds and every
   step is rounded as numpy rounds it, so that both give the same bytes. Every length is checked before the first number is read. */

#include "common.h"
#include <float.h>

enum { LANES = 16, HALF = 1 << 16, UPPER = 1 << 15 };
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
/* The same where an array lies, which may be anywhere. */
typedef float lanes_there __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t bits_there __attribute__((vector_size(64), aligned(4), may_alias));

struct votes {
    const float *values; /* [terms, count] */
    const float *least, *weights; /* [terms]: the magnitude from which on entries count, and what each change counts */
    const float *sizes; /* the sizes of the weights, rising, and whose they are: equal ones are counted together */
    const long *order;
    float *out, *scratch; /* [count], and [terms, LANES] */
    lanes_there *parts; /* [terms] */
    long terms, count;
    float tie; /* the share of all votes that a majority must exceed */
    int normalize;
};

#define CHOSEN(mask, x) ((lanes)((bits)(mask) & (bits)(x)))
#define NAME(x) JOIN(x, SET)

#if defined(__x86_64__)
#define SET avx512
#define TARGET AVX512_TARGET
#include "passes_vote.h"
#undef SET
#undef TARGET
#define SET avx2
#define TARGET AVX2_TARGET
#include "passes_vote.h"
#undef SET
#undef TARGET
#endif
#define SET plain
#define TARGET
#include "passes_vote.h"

/* Appends the magnitudes from low on below high to those kept before, and counts those from high on; returns how many are kept. */
static long between_plain(const uint32_t *values, const long count, const uint32_t low, const uint32_t high, uint32_t *out, long kept,
                          int64_t *above) {
    for (long at = 0; at < count; at++) {
        const uint32_t size = values[at] & 0x7FFFFFFF;
        out[kept] = size;
        kept += (size >= low) & (size < high);
        *above += size >= high;
    }
    return kept;
}

#if defined(__x86_64__)
AVX512_TARGET static long between_avx512(const uint32_t *values, const long count, const uint32_t low, const uint32_t high, uint32_t *out,
                                         long kept, int64_t *above) {
    const long whole = count - count % LANES;
    const __m512i first = _mm512_set1_epi32((int)low), end = _mm512_set1_epi32((int)high), bare = _mm512_set1_epi32(0x7FFFFFFF);
    for (long at = 0; at < whole; at += LANES) {
        const __m512i size = _mm512_and_si512(_mm512_loadu_si512(values + at), bare);
        const __mmask16 more = _mm512_cmpge_epu32_mask(size, end);
        const __mmask16 in = _mm512_cmpge_epu32_mask(size, first) & ~more;
        _mm512_mask_storeu_epi32(out + kept, (__mmask16)((1u << _mm_popcnt_u32(in)) - 1), _mm512_maskz_compress_epi32(in, size));
        kept += _mm_popcnt_u32(in);
        *above += _mm_popcnt_u32(more);
    }
    return between_plain(values + whole, count - whole, low, high, out, kept, above);
}
#endif

struct set {
    const char *name;
    long (*between)(const uint32_t *, long, uint32_t, uint32_t, uint32_t *, long, int64_t *);
    void (*elect)(const struct votes *);
    void (*lower)(const uint32_t *, long, uint32_t, int64_t *);
};
static const struct set sets[] = { /* the fastest first */
#if defined(__x86_64__)
    {"avx512", between_avx512, elect_avx512, lower_avx512},
    {"avx2", between_plain, elect_avx2, lower_avx2},
#endif
    {"plain", between_plain, elect_plain, lower_plain},
    {NULL, NULL, NULL, NULL}};

static int by_size(const void *left, const void *right) {
    const float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static PyObject *py_elect(PyObject *self, PyObject *args) {
    PyObject *values_array, *least_array, *weights_array, *out_array, *result = NULL;
    Py_buffer values, least, weights, out;
    struct votes votes = {0};
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OOOfpO|s:elect", &values_array, &least_array, &weights_array, &votes.tie, &votes.normalize, &out_array,
                          &name))
        return NULL;
    const struct set *set = chosen(sets, sizeof(struct set), name);
    if (!set || !view(out_array, &out, "out", PyBUF_WRITABLE, "f", 0, -1)) return NULL;
    if (!view(weights_array, &weights, "weights", 0, "f", 0, -1)) goto release_out;
    votes.count = out.len / 4, votes.terms = weights.len / 4;
    if (!view(least_array, &least, "least", 0, "f", 0, votes.terms)) goto release_weights;
    if (!view(values_array, &values, "values", 0, "f", 0, votes.terms * votes.count)) goto release_least;
    struct { float size; long term; } *ranked = malloc(votes.terms * sizeof(*ranked) + 1);
    float *numbers = malloc(votes.terms * (2 * LANES + 1) * sizeof(float) + 1);
    long *order = malloc(votes.terms * sizeof(long) + 1);
    if (ranked && numbers && order) {
        float *sizes = numbers + 2 * votes.terms * LANES;
        votes.parts = (lanes_there *)(numbers + votes.terms * LANES);
        votes.values = values.buf, votes.least = least.buf, votes.weights = weights.buf, votes.out = out.buf, votes.scratch = numbers;
        for (long t = 0; t < votes.terms; t++) {
            const float weight = votes.weights[t];
            ranked[t].size = weight < 0 ? -weight : weight, ranked[t].term = t;
        }
        qsort(ranked, votes.terms, sizeof(*ranked), by_size);
        for (long t = 0; t < votes.terms; t++) sizes[t] = ranked[t].size, order[t] = ranked[t].term;
        votes.sizes = sizes, votes.order = order;
        Py_BEGIN_ALLOW_THREADS
        set->elect(&votes);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    } else {
        PyErr_NoMemory();
    }
    free(ranked), free(numbers), free(order);
    PyBuffer_Release(&values);
release_least:
    PyBuffer_Release(&least);
release_weights:
    PyBuffer_Release(&weights);
release_out:
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_upper(PyObject *self, PyObject *args) {
    PyObject *values_array, *counts_array;
    Py_buffer values, counts;
    if (!PyArg_ParseTuple(args, "OO:upper", &values_array, &counts_array)) return NULL;
    if (!view(values_array, &values, "values", 0, "f", 0, -1)) return NULL;
    if (!view(counts_array, &counts, "counts", PyBUF_WRITABLE, "lq", 0, UPPER)) {
        PyBuffer_Release(&values);
        return NULL;
    }
    const uint32_t *value = values.buf;
    const long count = values.len / 4;
    int64_t *counted = counts.buf;
    Py_BEGIN_ALLOW_THREADS
    for (long at = 0; at < count; at++) counted[(value[at] >> 16) & 0x7FFF]++;
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&counts);
    PyBuffer_Release(&values);
    Py_RETURN_NONE;
}

static PyObject *py_lower(PyObject *self, PyObject *args) {
    PyObject *values_array, *counts_array;
    Py_buffer values, counts;
    unsigned int upper;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OIO|s:lower", &values_array, &upper, &counts_array, &name)) return NULL;
    const struct set *set = chosen(sets, sizeof(struct set), name);
    if (!set || !view(values_array, &values, "values", 0, "f", 0, -1)) return NULL;
    if (!view(counts_array, &counts, "counts", PyBUF_WRITABLE, "lq", 0, HALF)) {
        PyBuffer_Release(&values);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    set->lower(values.buf, values.len / 4, upper, counts.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&counts);
    PyBuffer_Release(&values);
    Py_RETURN_NONE;
}

static PyObject *py_between(PyObject *self, PyObject *args) {
    PyObject *values_array, *out_array;
    Py_buffer values, out;
    unsigned int low, high;
    long kept;
    int64_t above = 0;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "OIIOl|s:between", &values_array, &low, &high, &out_array, &kept, &name)) return NULL;
    const struct set *set = chosen(sets, sizeof(struct set), name);
    if (!set || !view(values_array, &values, "values", 0, "f", 0, -1)) return NULL;
    if (!view(out_array, &out, "out", PyBUF_WRITABLE, "f", 0, -1)) {
        PyBuffer_Release(&values);
        return NULL;
    }
    const int fits = kept >= 0 && kept <= out.len / 4 - values.len / 4;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        kept = set->between(values.buf, values.len / 4, low, high, out.buf, kept, &above);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&values);
    if (!fits) return PyErr_Format(PyExc_ValueError, "out has no room for all values after those that are kept already");
    return Py_BuildValue("Ll", (long long)above, kept);
}

static PyObject *py_reached(PyObject *self, PyObject *args) {
    PyObject *counts_array;
    Py_buffer counts;
    long long wanted, above = 0;
    if (!PyArg_ParseTuple(args, "OL:reached", &counts_array, &wanted) || !view(counts_array, &counts, "counts", 0, "lq", 0, -1)) return NULL;
    const int64_t *counted = counts.buf;
    long place = counts.len / 8 - 1;
    while (place > 0 && above + counted[place] < wanted) above += counted[place--];
    PyBuffer_Release(&counts);
    return Py_BuildValue("lL", place, above);
}

static PyObject *py_sets(PyObject *self, PyObject *none) { return names_of(sets, sizeof(struct set)); }

static PyMethodDef methods[] = {
    {"elect", py_elect, METH_VARARGS,
     "elect(values, least, weights, tie, normalize, out, set=fastest)\n\nTIES' vote on values [terms, ...] of at least a magnitude each."},
    {"upper", py_upper, METH_VARARGS, "upper(values, counts)\n\nAdds to counts [32768] the upper halves of the magnitudes' bits."},
    {"lower", py_lower, METH_VARARGS,
     "lower(values, upper, counts, set=fastest)\n\nAdds to counts [65536] the lower halves of the magnitudes with that upper half."},
    {"between", py_between, METH_VARARGS,
     "between(values, low, high, out, kept, set=fastest) -> (above, kept)\n\nAppends to out [kept:] the magnitudes whose bits are from low on "
     "below high; says how many are above, and how many out holds then."},
    {"reached", py_reached, METH_VARARGS,
     "reached(counts, wanted) -> (bin, above): where the counts, added up from the last, reach a number, and their sum beyond there"},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor runs, the fastest first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_passes", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__passes(void) { return created(&module); }
