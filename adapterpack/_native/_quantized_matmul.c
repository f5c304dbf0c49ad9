/* An operator of ONNX Runtime that multiplies by a weight in 4 or 8 bits, which the process holds for it.

   QuantizedMatMul(x [..., in]) -> product [..., out], with the attribute `weight`: a number that hold() returned. It is MatMulNBits
   (com.microsoft) with accuracy_level 4: in each block of a row activations are rounded to int8, x = step code with step = largest / 127.

   The products of a block are whole numbers, and exact; blocks are added up in float32 from the first to the last, with fused multiply-add.
   So a row's numbers have the same bits in every instruction set, and whatever rows go together. A row with an infinity or NaN becomes NaN. */

#include "common.h"
#include "ort_abi.h"
#include <math.h>

#if defined(__aarch64__)
#define SIGN_BIT 128 /* codes are multiplied as signed numbers */
#else
#define SIGN_BIT 0
#endif

enum { COLUMNS = 32, PART = 96, MOST = 1 << 16, AXES = 8, WIDEST_BLOCK = 1 << 16, INFINITE = 0x7f800000, LEAST = 0x0d800000 /* 2^-100 */ };

struct weight {
    int number, bits, shift; /* the zero of all blocks, or what has been taken off the zeros of each */
    long in, out, block, blocks, width, strips; /* width: that of all blocks */
    uint8_t *codes; /* [strips, width / (32 / bits), COLUMNS, 4], of 4 bits the lower halves before the upper ones */
    float *scales;  /* [strips, blocks, COLUMNS] */
    uint8_t *zeros; /* likewise, NULL where all are the same */
    float *bias;    /* [strips, COLUMNS], or NULL */
};

/* One run, with activations [rows, width] rounded. */
struct run {
    const struct weight *weight;
    const float *x;
    float *out;
    int8_t *codes;
    float *steps;  /* [rows, blocks] */
    int32_t *sums; /* likewise, of the codes */
    long rows;
};

typedef int32_t word __attribute__((may_alias));

#define NAME(x) JOIN(x, SET)
/* A loop over a few numbers, which a compiler is to write out, so that sums stay in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
#if defined(__x86_64__)
#define SET avx512vnni
#define TARGET AVX512VNNI_TARGET
#define LANES 16
#define ROWS 6
#define FMA(a, b, c) ((lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DOT4(sum, codes, x) ((wholes)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(codes), (__m512i)(x)))
#define DOT8 DOT4
#define WIDENED(p) ((wholes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p))))
#include "quantized_matmul_tile.h"
#define SET avx2
#define TARGET AVX2_TARGET
#define LANES 8
#define ROWS 2
#define FMA(a, b, c) ((lanes)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define DOT4(sum, codes, x) \
    ((sum) + (wholes)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(codes), (__m256i)(x)), _mm256_set1_epi16(1)))
/* two products of 8 bits can be more than 16 bits hold */
#define DOT8(sum, codes, x) \
    ((sum) + (wholes)_mm256_madd_epi16(_mm256_and_si256((__m256i)(codes), _mm256_set1_epi16(255)), \
                                       _mm256_srai_epi16(_mm256_slli_epi16((__m256i)(x), 8), 8)) + \
     (wholes)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)(codes), 8), _mm256_srai_epi16((__m256i)(x), 8)))
#define WIDENED(p) ((wholes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p))))
#include "quantized_matmul_tile.h"
#elif defined(DOTPROD_TARGET)
#define SET dotprod
#define TARGET DOTPROD_TARGET
#define LANES 4
#define ROWS 6
#define FMA(a, b, c) ((lanes)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define DOT4(sum, codes, x) ((wholes)vdotq_s32((int32x4_t)(sum), (int8x16_t)(codes), (int8x16_t)(x)))
#define DOT8 DOT4
#define WIDENED(p) ((wholes){(p)[0], (p)[1], (p)[2], (p)[3]})
#include "quantized_matmul_tile.h"
#endif

struct set {
    const char *name;
    void (*round)(const struct run *, long row);
    void (*multiply)(const struct run *, long strip, long first, long count);
};
static const struct set sets[] = {
#if defined(__x86_64__)
    {"avx512vnni", round_avx512vnni, multiply_avx512vnni},
    {"avx2", round_avx2, multiply_avx2},
#elif defined(DOTPROD_TARGET)
    {"dotprod", round_dotprod, multiply_dotprod},
#endif
    {NULL, NULL, NULL}};
static const struct set *set; /* the one that runs */

static struct weight *weights[MOST]; /* read by runs without the lock: whoever runs one with a number holds that weight */

static void round_row(void *data, size_t row) { set->round(data, row); }

static void multiply_unit(void *data, size_t unit) {
    const struct run *run = data;
    const long strips = run->weight->strips, first = unit / strips * PART, left = run->rows - first;
    set->multiply(run, unit % strips, first, left < PART ? left : PART);
}

static ort_status multiply(struct run *run, ort_api api, const void *context) {
    const struct weight *weight = run->weight;
    const size_t numbers = (size_t)run->rows * weight->blocks;
    const long units = (run->rows + PART - 1) / PART * weight->strips;
    /* a few thousand products are done before another thread has begun */
    const int alone = (double)run->rows * weight->width * weight->out < 1 << 18;
    run->codes = malloc((size_t)run->rows * weight->width + 1);
    run->steps = malloc((numbers + 1) * sizeof(float));
    run->sums = malloc((numbers + 1) * sizeof(int32_t));
    ort_status status = run->codes && run->steps && run->sums ? NULL : failed(api, "there is not enough memory");
    if (!status && run->rows >= 16 && !alone)
        status = ort_parallel(api)(context, round_row, run->rows, 0, run);
    else
        for (long row = 0; !status && row < run->rows; row++) round_row(run, row);
    if (!status && !alone)
        status = ort_parallel(api)(context, multiply_unit, units, 0, run);
    else
        for (long unit = 0; !status && unit < units; unit++) multiply_unit(run, unit);
    free(run->codes);
    free(run->steps);
    free(run->sums);
    return status;
}

struct kernel {
    ort_api api;
    int64_t number;
};

static ort_status compute(void *data, void *context) {
    const struct kernel *kernel = data;
    const ort_api api = kernel->api;
    const struct weight *weight = kernel->number >= 0 && kernel->number < MOST ? weights[kernel->number] : NULL;
    if (!weight) return failed(api, "a product names a weight that is not held");
    int64_t shape[AXES];
    size_t axes;
    const void *value;
    void *described, *x, *made, *out;
    ort_status status = ort_input(api)(context, 0, &value);
    if (status || (status = ort_shape(api)(value, &described))) return status;
    if (!(status = ort_axes(api)(described, &axes)) && axes && axes <= AXES) status = ort_lengths(api)(described, shape, axes);
    ort_free_shape(api)(described);
    if (status) return status;
    if (!axes || axes > AXES || shape[axes - 1] != weight->in) return failed(api, "activations have another width than the weight");
    struct run run = {.weight = weight, .rows = 1};
    for (size_t axis = 0; axis + 1 < axes; axis++) run.rows *= shape[axis];
    shape[axes - 1] = weight->out;
    if ((status = ort_data(api)(value, &x)) || (status = ort_output(api)(context, 0, shape, axes, &made)) || (status = ort_data(api)(made, &out)))
        return status;
    run.x = x;
    run.out = out;
    return multiply(&run, api, context);
}

static ort_status create(const void *op, ort_api api, const void *info, void **made) {
    struct kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return failed(api, "there is not enough memory");
    kernel->api = api;
    ort_status status = ort_attribute(api)(info, "weight", &kernel->number);
    if (status) free(kernel);
    *made = status ? NULL : kernel;
    return status;
}

static const char *op_name(const void *op) { return "QuantizedMatMul"; }
static const char *no_name(const void *op) { return NULL; }
static size_t one(const void *op) { return 1; }
static int none(const void *op, size_t index) { return 0; }
static int float_of(const void *op, size_t index) { return ORT_FLOAT; }

static const struct ort_operator quantized_matmul = {
    .version = ORT_API, .name = op_name, .provider = no_name, .input_type = float_of, .input_count = one, .output_type = float_of,
    .output_count = one, .destroy = free, .input_kind = none, .output_kind = none, .input_memory = none, .create_checked = create,
    .compute_checked = compute};

REGISTERS("adapterpack.products", &quantized_matmul)

static void discard(struct weight *weight) {
    free(weight->codes);
    free(weight->scales);
    free(weight->zeros);
    free(weight->bias);
    free(weight);
}

static void release(PyObject *capsule) {
    struct weight *weight = PyCapsule_GetPointer(capsule, "weight");
    weights[weight->number] = NULL;
    discard(weight);
}

/* Lays out a weight whose codes are [out, blocks, block * bits / 8], scales [out, blocks], and zeros [out, the bytes of as many codes]. */
static void fill(struct weight *weight, const uint8_t *codes, const float *scales, const uint8_t *zeros, const float *bias) {
    const long each = 8 / weight->bits, bytes = weight->width / each, mask = weight->bits == 4 ? 15 : 255;
    const uint8_t flip = weight->bits == 8 ? SIGN_BIT : 0;
    for (long column = 0; column < weight->strips * COLUMNS; column++) {
        const long strip = column / COLUMNS, inside = column % COLUMNS;
        const int there = column < weight->out;
        const uint8_t *from = codes + column * bytes;
        uint8_t *to = weight->codes + strip * bytes * COLUMNS + inside * 4;
        for (long group = 0; group * 4 < bytes; group++, to += COLUMNS * 4)
            for (int byte = 0; byte < 4; byte++) {
                const uint8_t *pair = from + group * 4 + byte / 2;
                if (!there)
                    to[byte] = 0;
                else if (each == 1)
                    to[byte] = from[group * 4 + byte] ^ flip;
                else /* codes 8 group + byte, and 4 more */
                    to[byte] = (pair[0] >> byte % 2 * 4 & 15) | (pair[2] >> byte % 2 * 4 & 15) << 4;
            }
        for (long block = 0; block < weight->blocks; block++) {
            const long at = (strip * weight->blocks + block) * COLUMNS + inside;
            weight->scales[at] = there ? scales[column * weight->blocks + block] : 0;
            if (!zeros) continue;
            const uint8_t *zero = zeros + column * ((weight->blocks + each - 1) / each) + block / each;
            weight->zeros[at] = there ? *zero >> block % each * weight->bits & mask : 0;
        }
        if (bias) weight->bias[column] = there ? bias[column] : 0;
    }
}

static PyObject *py_hold(PyObject *self, PyObject *args) {
    PyObject *given[4], *result = NULL, *capsule;
    Py_buffer views[4];
    struct weight *weight = calloc(1, sizeof *weight);
    if (!weight) return PyErr_NoMemory();
    int taken_views = 0, number = 0;
    if (!PyArg_ParseTuple(args, "OOOOlli:hold", given, given + 1, given + 2, given + 3, &weight->in, &weight->block, &weight->bits)) goto end;
    const long block = weight->block;
    if ((weight->bits != 4 && weight->bits != 8) || block < 8 || block % 8 || block > WIDEST_BLOCK || weight->in < 1 || weight->in > PY_SSIZE_T_MAX / 64) {
        PyErr_SetString(PyExc_ValueError, "weights have 4 or 8 bits, rows of one number or more, and blocks of a multiple of 8 numbers up to 65,536");
        goto end;
    }
    const long each = 8 / weight->bits;
    weight->blocks = (weight->in - 1) / block + 1;
    weight->width = weight->blocks * block;
    if (!view(given[1], views, "scales", 0, "f", 2, -1)) goto end;
    taken_views = 1;
    weight->out = views[0].shape[0];
    weight->strips = (weight->out + COLUMNS - 1) / COLUMNS;
    if (!weight->out || weight->width > PY_SSIZE_T_MAX / 64 / weight->out || views[0].shape[1] != weight->blocks) {
        PyErr_SetString(PyExc_ValueError, "scales are [out, blocks]");
        goto end;
    }
    const Py_ssize_t sizes[4] = {0, weight->out * weight->width / each, weight->out * ((weight->blocks + each - 1) / each), weight->out};
    const char *names[4] = {NULL, "codes", "zeros", "bias"}, *formats[4] = {NULL, "B", "B", "f"};
    PyObject *others[4] = {NULL, given[0], given[2], given[3]};
    const void *data[4] = {views[0].buf, NULL, NULL, NULL};
    for (int i = 1; i < 4; i++) {
        if (i > 1 && others[i] == Py_None) continue;
        if (!view(others[i], views + taken_views, names[i], 0, formats[i], 0, sizes[i])) goto end;
        data[i] = views[taken_views++].buf;
    }
    const size_t columns = weight->strips * COLUMNS;
    weight->codes = aligned_alloc(64, columns * weight->width / each); /* a multiple of 64, as columns are of 32 and a width of 8 */
    weight->scales = malloc(columns * weight->blocks * sizeof(float));
    if (data[2]) weight->zeros = malloc(columns * weight->blocks);
    if (data[3]) weight->bias = malloc(columns * sizeof(float));
    if (!weight->codes || !weight->scales || !weight->zeros != !data[2] || !weight->bias != !data[3]) {
        PyErr_NoMemory();
        goto end;
    }
    weight->shift = (data[2] ? 0 : 1 << (weight->bits - 1)) - (weight->bits == 8 ? SIGN_BIT : 0);
    Py_BEGIN_ALLOW_THREADS;
    fill(weight, data[1], data[0], data[2], data[3]);
    Py_END_ALLOW_THREADS;
    while (number < MOST && weights[number]) number++;
    weight->number = number;
    if (number == MOST)
        PyErr_SetString(PyExc_MemoryError, "65,536 weights are held already");
    else if ((capsule = PyCapsule_New(weight, "weight", release))) {
        weights[number] = weight;
        result = Py_BuildValue("iN", number, capsule);
        weight = NULL;
    }
end:
    for (int i = 0; i < taken_views; i++) PyBuffer_Release(views + i);
    if (weight) discard(weight);
    return result;
}

static PyObject *py_use(PyObject *self, PyObject *args) {
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|s:use", &name)) return NULL;
    const struct set *wanted = chosen(sets, sizeof(struct set), name);
    if (!wanted) return NULL;
    set = wanted;
    Py_RETURN_NONE;
}

static PyObject *py_sets(PyObject *self, PyObject *nothing) { return names_of(sets, sizeof(struct set)); }

static PyMethodDef methods[] = {
    {"hold", py_hold, METH_VARARGS,
     "hold(codes, scales, zeros, bias, in, block, bits) -> (number, holder)\n\nMakes a copy of a weight known to QuantizedMatMul under a number, as "
     "long as the holder is there: uint8 codes\n[out, blocks, block * bits / 8], float32 scales [out, blocks], the zeros' codes in as many bits, each "
     "row of them whole\nbytes, or None for the middle, and a float32 bias [out] or None."},
    {"use", py_use, METH_VARARGS, "use(set=fastest)\n\nLets the operator compute with an instruction set, in all sessions."},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor runs, the fastest first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_quantized_matmul", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__quantized_matmul(void) {
    PyObject *made = created(&module);
    if (made && sets[0].name) set = chosen(sets, sizeof(struct set), NULL);
    PyErr_Clear(); /* where no set runs, sets() is empty and nobody asks */
    return made;
}
