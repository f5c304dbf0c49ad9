/* An operator of ONNX Runtime that adds the changes of many LoRAs to a product, a different one for each row of a batch.

   AddLora(x [rows, tokens, in], product [rows, tokens, out], adapters [rows]) -> sum [rows, tokens, out], with the attribute `site`: the number
   of the linear layer in each adapter. `adapters` may name one for each token instead, [rows * tokens]. An adapter is a number that hold()
   returned, or -1 for none. Its factors are read where they lie, once for all rows that have it; a layer that stands for siblings (q, k, v)
   has a part for each.

   A number that no adapter has, or an adapter for a layer of other widths, is an error of the run. */

#include "common.h"
#include "ort_abi.h"

enum { CHUNK = 64, TOKENS = 16, MOST = 1 << 16 };

struct part {
    const void *down, *up; /* [rank, in], [rank, out] */
    long in, out, rank, at; /* its columns of the product are at ... at + out */
};

struct site {
    long count;
    struct part *parts;
};

#define NAME(x) JOIN(JOIN(x, TYPE), SET)
/* A loop over a few numbers, which a compiler is to write out, so that sums stay in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
#if defined(__x86_64__)
#define SET avx512
#define TARGET AVX512_TARGET
#define LANES 16
#define FMA(a, b, c) ((lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SPREAD(x) ((lanes)_mm512_set1_ps(x))
#define F16_READ(p) ((lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#include "row_lora_types.h"
#define SET avx2
#define TARGET AVX2_TARGET
#define LANES 8
#define FMA(a, b, c) ((lanes)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SPREAD(x) ((lanes)_mm256_set1_ps(x))
#define F16_READ(p) ((lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#include "row_lora_types.h"
#elif defined(__aarch64__)
#define SET neon
#define TARGET
#define LANES 4
#define FMA(a, b, c) ((lanes)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define SPREAD(x) ((lanes)vdupq_n_f32(x))
#define F16_READ(p) ((lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#include "row_lora_types.h"
#endif

typedef void (*work)(const struct part *, int, const float *const *, float *const *);
struct set {
    const char *name;
    work f32, f16;
};
static const struct set sets[] = {
#if defined(__x86_64__)
    {"avx512", part_f32_avx512, part_f16_avx512},
    {"avx2", part_f32_avx2, part_f16_avx2},
#elif defined(__aarch64__)
    {"neon", part_f32_neon, part_f16_neon},
#endif
    {NULL, NULL, NULL}};

struct adapter {
    int number, half;
    work work;
    long sites, views;
    struct site *site;
    struct part *parts;
    Py_buffer *view;
};

static struct adapter *adapters[MOST]; /* read by runs without the lock: whoever runs one with a number holds that adapter */

/* One run. */
struct run {
    const float *x;
    float *out;
    const int64_t *numbers;
    long rows, tokens, in, width, site;
    long *order; /* tokens by their place in x, those of an adapter together */
    struct piece {
        long first;
        int count;
    } *pieces;
};

static void run_piece(void *data, size_t number) {
    const struct run *run = data;
    const struct piece piece = run->pieces[number];
    const float *x[TOKENS];
    float *sums[TOKENS];
    const struct adapter *adapter = adapters[run->numbers[run->order[piece.first] / run->tokens]];
    const struct site *site = adapter->site + run->site;
    for (long p = 0; p < site->count; p++) {
        for (int t = 0; t < piece.count; t++) {
            const long token = run->order[piece.first + t];
            x[t] = run->x + token * run->in;
            sums[t] = run->out + token * run->width + site->parts[p].at;
        }
        adapter->work(site->parts + p, piece.count, x, sums);
    }
}

/* What is wrong with an adapter's number, NULL if nothing. */
static const char *problem(const struct run *run, int64_t number) {
    if (number < 0) return NULL;
    if (number >= MOST || !adapters[number]) return "a row names an adapter that is not held";
    const struct adapter *adapter = adapters[number];
    if (run->site < 0 || run->site >= adapter->sites) return "a row's adapter has no such layer";
    for (long p = 0; p < adapter->site[run->site].count; p++) {
        const struct part *part = adapter->site[run->site].parts + p;
        if (part->in != run->in || part->at > run->width - part->out) return "a row's adapter was made for a layer of other widths";
    }
    return NULL;
}

struct kernel {
    ort_api api;
    int64_t site;
};

static ort_status compute(void *data, void *context) {
    const struct kernel *kernel = data;
    const ort_api api = kernel->api;
    const char *axes = "x and product have three axes, adapters one";
    int64_t x_shape[3], shape[3], rows;
    void *x, *product, *numbers, *out, *value;
    ort_status status = taken(api, context, 0, 3, x_shape, &x, axes);
    if (status || (status = taken(api, context, 1, 3, shape, &product, axes)) || (status = taken(api, context, 2, 1, &rows, &numbers, axes))) return status;
    const size_t total = (size_t)shape[0] * shape[1];
    if ((rows != shape[0] && rows != (int64_t)total) || shape[0] != x_shape[0] || shape[1] != x_shape[1])
        return failed(api, "x, product and adapters have other rows");
    if ((status = ort_output(api)(context, 0, shape, 3, &value)) || (status = ort_data(api)(value, &out))) return status;
    if (out != product) memcpy(out, product, total * shape[2] * sizeof(float));
    struct run run = {x, out, numbers, rows, rows ? total / rows : 0, x_shape[2], shape[2], kernel->site, NULL, NULL};
    for (long row = 0; row < rows; row++) {
        const char *wrong = problem(&run, run.numbers[row]);
        if (wrong) return failed(api, wrong);
    }
    long *order = malloc((total + 1) * sizeof(long));
    struct piece *pieces = malloc((total + 1) * sizeof(struct piece));
    if (!order || !pieces) status = failed(api, "there is not enough memory");
    long sorted = 0, count = 0;
    for (long row = 0; !status && row < rows; row++) {
        const int64_t number = run.numbers[row];
        long before = 0;
        while (run.numbers[before] != number) before++;
        if (number < 0 || before < row) continue; /* none, or with an earlier row */
        const long start = sorted;
        for (long other = row; other < rows; other++)
            for (long token = 0; run.numbers[other] == number && token < run.tokens; token++) order[sorted++] = other * run.tokens + token;
        for (long first = start; first < sorted; first += TOKENS)
            pieces[count++] = (struct piece){first, sorted - first < TOKENS ? sorted - first : TOKENS};
    }
    run.order = order;
    run.pieces = pieces;
    if (!status && count == 1) run_piece(&run, 0);
    if (!status && count > 1) status = ort_parallel(api)(context, run_piece, count, 0, &run);
    free(order);
    free(pieces);
    return status;
}

static ort_status create(const void *op, ort_api api, const void *info, void **made) {
    struct kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return failed(api, "there is not enough memory");
    kernel->api = api;
    ort_status status = ort_attribute(api)(info, "site", &kernel->site);
    if (status) free(kernel);
    *made = status ? NULL : kernel;
    return status;
}

static const char *op_name(const void *op) { return "AddLora"; }
static const char *no_name(const void *op) { return NULL; }
static size_t three(const void *op) { return 3; }
static size_t one(const void *op) { return 1; }
static int none(const void *op, size_t index) { return 0; }
static int type_of(const void *op, size_t index) { return index == 2 ? ORT_INT64 : ORT_FLOAT; }
static int float_of(const void *op, size_t index) { return ORT_FLOAT; }
static size_t in_place(int **inputs, int **outputs) { /* the sum may lie where the product does */
    static int product = 1, sum = 0;
    *inputs = &product;
    *outputs = &sum;
    return 1;
}
static void keep(int *inputs, int *outputs) {}

static const struct ort_operator add_lora = {
    .version = ORT_API, .name = op_name, .provider = no_name, .input_type = type_of, .input_count = three, .output_type = float_of,
    .output_count = one, .destroy = free, .input_kind = none, .output_kind = none, .input_memory = none, .create_checked = create,
    .compute_checked = compute, .in_place = in_place, .release_in_place = keep};

REGISTERS("adapterpack", &add_lora)

static void release(PyObject *capsule) {
    struct adapter *adapter = PyCapsule_GetPointer(capsule, "adapter");
    if (adapter->number >= 0) adapters[adapter->number] = NULL;
    for (long v = 0; v < adapter->views; v++) PyBuffer_Release(adapter->view + v);
    free(adapter->site);
    free(adapter->parts);
    free(adapter->view);
    free(adapter);
}

/* The parts of one site, a sequence of (down, up, at). */
static int fill(struct adapter *adapter, struct site *site, PyObject *parts) {
    for (Py_ssize_t p = 0; p < site->count; p++) {
        PyObject *item = PySequence_GetItem(parts, p), *down, *up;
        struct part *part = site->parts + p;
        Py_buffer *view_down = adapter->view + adapter->views, *view_up = view_down + 1;
        if (item && !PyTuple_Check(item)) PyErr_SetString(PyExc_TypeError, "a part is a tuple of down, up and the first column");
        int there = item && PyTuple_Check(item) && PyArg_ParseTuple(item, "OOl:hold", &down, &up, &part->at);
        there = there && view(down, view_down, "down", 0, adapter->half ? "e" : "f", 2, -1);
        adapter->views += there;
        there = there && view(up, view_up, "up", 0, adapter->half ? "e" : "f", 2, -1);
        adapter->views += there;
        Py_XDECREF(item); /* the views keep its arrays */
        if (!there) return 0;
        part->down = view_down->buf;
        part->up = view_up->buf;
        part->rank = view_down->shape[0];
        part->in = view_down->shape[1];
        part->out = view_up->shape[1];
        if (view_up->shape[0] != part->rank || part->at < 0) {
            PyErr_SetString(PyExc_ValueError, "down [rank, in] and up [rank, out] have one rank, and columns begin at 0 or later");
            return 0;
        }
    }
    return 1;
}

static PyObject *py_hold(PyObject *self, PyObject *args) {
    PyObject *sites;
    int half;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "Op|s:hold", &sites, &half, &name)) return NULL;
    const struct set *set = chosen(sets, sizeof(struct set), name);
    if (!set) return NULL;
    const Py_ssize_t count = PySequence_Size(sites);
    Py_ssize_t parts = 0;
    for (Py_ssize_t s = 0; s < count; s++) {
        PyObject *own = PySequence_GetItem(sites, s);
        const Py_ssize_t length = own ? PySequence_Size(own) : -1;
        Py_XDECREF(own);
        if (length < 0) return NULL;
        parts += length;
    }
    struct adapter *adapter = count < 0 ? NULL : calloc(1, sizeof *adapter);
    if (!adapter) return count < 0 ? NULL : PyErr_NoMemory();
    adapter->number = -1;
    adapter->half = half;
    adapter->work = half ? set->f16 : set->f32;
    PyObject *capsule = PyCapsule_New(adapter, "adapter", release);
    if (!capsule) {
        free(adapter);
        return NULL;
    }
    adapter->sites = count;
    adapter->site = calloc(count + 1, sizeof(struct site));
    adapter->parts = calloc(parts + 1, sizeof(struct part));
    adapter->view = calloc(2 * parts + 1, sizeof(Py_buffer));
    int right = adapter->site && adapter->parts && adapter->view;
    if (!right) PyErr_NoMemory();
    struct part *next = adapter->parts;
    for (Py_ssize_t s = 0; right && s < count; s++) {
        PyObject *own = PySequence_GetItem(sites, s);
        adapter->site[s] = (struct site){own ? PySequence_Size(own) : 0, next};
        if ((right = own && adapter->site[s].count >= 0 && adapter->site[s].count <= adapter->parts + parts - next))
            right = fill(adapter, adapter->site + s, own);
        else if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "the sites changed meanwhile");
        next += right ? adapter->site[s].count : 0;
        Py_XDECREF(own);
    }
    int number = 0;
    while (right && number < MOST && adapters[number]) number++;
    if (right && number == MOST) {
        PyErr_SetString(PyExc_MemoryError, "65,536 adapters are held already");
        right = 0;
    }
    if (right) {
        adapter->number = number;
        adapters[number] = adapter;
    }
    PyObject *result = right ? Py_BuildValue("iO", number, capsule) : NULL;
    Py_DECREF(capsule);
    return result;
}

static PyObject *py_sets(PyObject *self, PyObject *nothing) { return names_of(sets, sizeof(struct set)); }

static PyMethodDef methods[] = {
    {"hold", py_hold, METH_VARARGS,
     "hold(sites, half, set=fastest) -> (number, holder)\n\nMakes an adapter's factors known to AddLora under a number, as long as the holder is there. A site is a\n"
     "sequence of (down [rank, in], up [rank, out], first column), C-contiguous, in float16 if half, else float32."},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor runs, the fastest first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_row_lora", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__row_lora(void) { return created(&module); }
