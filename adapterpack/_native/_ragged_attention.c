/* Operators of ONNX Runtime for the attention of a pass whose tokens belong to several rows, any number to each.

   RaggedAttention(query, key, value, past_key, past_value [rows, kv_heads, length, width], token_rows [tokens], token_positions [tokens],
   cos_cache, sin_cache [positions, half], head_sink [heads]) -> attention, present_key, present_value. It is GroupQueryAttention
   (com.microsoft) with these two differences: a row's cache and a token's position in it are told for each token, and the caches are
   written where they lie. `query` alone may have queries, keys and values packed. Attributes: num_heads, kv_num_heads, scale, softcap,
   local_window_size. RaggedAttentionInt8 has caches of int8, and two inputs more: key_scales and value_scales [kv_heads, 1, width], what a
   number in a cache is multiplied by.

   A token attends to its row's positions up to its own. Its numbers are added up in one order whatever else is in the pass: over the width
   of a head one by one, over positions in blocks that begin at multiples of BLOCK, with the largest score so far taken off (Milakov and
   Gimelshein 2018, "Online normalizer calculation for softmax"), and the weights of a block in four sums, those of every fourth position. */

#include "common.h"
#include "ort_abi.h"
#include <math.h>

enum { BLOCK = 64, WIDEST = 256, VECTORS = 3, MOST_HEADS = 1 << 16, INT8_INPUTS = 10, MOST_INPUTS = 12 };

struct attention {
    ort_api api;
    int int8; /* whether its caches are */
    int64_t heads, kv_heads, window;
    float scale, softcap;
};

/* One run. Queries are rotated and scaled. */
struct run {
    const struct attention *op;
    const float *query, *key, *value, *cosines, *sines, *sinks, *key_scales, *value_scales;
    float *queries, *out;
    void *keys, *values; /* float or int8_t */
    const int64_t *rows, *positions;
    long tokens, stride, key_stride, length, width, half, each; /* each: the heads that share keys */
    long units;
    struct unit {
        long token, head, first, count; /* queries first ... first + count of the tokens from `token` on, by token and head */
    } *unit;
};

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t word_there __attribute__((aligned(1), may_alias));

#define NAME(x) JOIN(x, SET)
/* A loop over a few numbers, which a compiler is to write out, so that sums stay in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
#if defined(__x86_64__)
#define SET avx512
#define TARGET AVX512_TARGET
#define LANES 16
#define KEYS 8
#define QUERIES 6
#define FEW 8
#define FMA(a, b, c) ((lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SPREAD(x) ((lanes)_mm512_set1_ps(x))
#define WIDENED(p) ((lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(p)))))
#define QUARTER(p) _mm_loadu_si128((const void *)(p))
#define JOINED(p, apart) \
    ((places)_mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(QUARTER(p)), QUARTER((p) + (apart)), 1), \
                                                   QUARTER((p) + 2 * (apart)), 2), QUARTER((p) + 3 * (apart)), 3))
#define LOW32(a, b) _mm512_unpacklo_epi32((__m512i)(a), (__m512i)(b))
#define HIGH32(a, b) _mm512_unpackhi_epi32((__m512i)(a), (__m512i)(b))
#define LOW64(a, b) ((places)_mm512_unpacklo_epi64((__m512i)(a), (__m512i)(b)))
#define HIGH64(a, b) ((places)_mm512_unpackhi_epi64((__m512i)(a), (__m512i)(b)))
#include "ragged_attention_tile.h"
#define SET avx2
#define TARGET AVX2_TARGET
#define LANES 8
#define KEYS 4
#define QUERIES 3
#define FEW 8
#define FMA(a, b, c) ((lanes)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SPREAD(x) ((lanes)_mm256_set1_ps(x))
#define WIDENED(p) ((lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p)))))
#define QUARTER(p) _mm_loadu_si128((const void *)(p))
#define JOINED(p, apart) ((places)_mm256_inserti128_si256(_mm256_castsi128_si256(QUARTER(p)), QUARTER((p) + (apart)), 1))
#define LOW32(a, b) _mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b))
#define HIGH32(a, b) _mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b))
#define LOW64(a, b) ((places)_mm256_unpacklo_epi64((__m256i)(a), (__m256i)(b)))
#define HIGH64(a, b) ((places)_mm256_unpackhi_epi64((__m256i)(a), (__m256i)(b)))
#include "ragged_attention_tile.h"
#elif defined(__aarch64__)
#define SET neon
#define TARGET
#define LANES 4
#define KEYS 6
#define QUERIES 6
#define FEW 4
#define FMA(a, b, c) ((lanes)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define SPREAD(x) ((lanes)vdupq_n_f32(x))
#define WIDENED(p) ((lanes)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(*(const word_there *)(p)))))))
#define JOINED(p, apart) ((places)vld1q_s8((const int8_t *)(p)))
#define LOW32(a, b) vzip1q_s32((int32x4_t)(a), (int32x4_t)(b))
#define HIGH32(a, b) vzip2q_s32((int32x4_t)(a), (int32x4_t)(b))
#define LOW64(a, b) ((places)vzip1q_s64((int64x2_t)(a), (int64x2_t)(b)))
#define HIGH64(a, b) ((places)vzip2q_s64((int64x2_t)(a), (int64x2_t)(b)))
#include "ragged_attention_tile.h"
#endif

struct set {
    const char *name;
    void (*attend)(const struct run *, const struct unit *);
    long queries; /* of a unit */
};
static const struct set sets[] = {
#if defined(__x86_64__)
    {"avx512", attend_avx512, 16 * VECTORS},
    {"avx2", attend_avx2, 8 * VECTORS},
#elif defined(__aarch64__)
    {"neon", attend_neon, 4 * VECTORS},
#endif
    {NULL, NULL, 0}};
static const struct set *set; /* the one that runs */

static void run_unit(void *data, size_t number) {
    const struct run *run = data;
    set->attend(run, run->unit + number);
}

/* One head rotated by its position, and scaled. */
static void rotate(const struct run *run, const float *from, float *to, int64_t position, float scale) {
    const long half = run->cosines ? run->half : 0;
    const float *cosine = run->cosines + position * half, *sine = run->sines + position * half;
    for (long i = 0; i < half; i++) {
        const float low = from[i], high = from[half + i];
        to[i] = scale * (low * cosine[i] - high * sine[i]);
        to[half + i] = scale * (high * cosine[i] + low * sine[i]);
    }
    for (long i = 2 * half; i < run->width; i++) to[i] = scale * from[i];
}

/* Numbers in steps of their scales. */
static void quantize(const float *from, const float *scales, int8_t *to, long count) {
    for (long i = 0; i < count; i++) {
        const float steps = from[i] / scales[i];
        to[i] = steps >= 127 ? 127 : steps > -128 ? (int8_t)lrintf(steps) : -128;
    }
}

/* Rotates a token's queries, and writes its keys and values into its row's cache. Queries take on the scales of keys. */
static void append(void *data, size_t token) {
    const struct run *run = data;
    const struct attention *op = run->op;
    const long width = run->width, position = run->positions[token];
    for (long head = 0; head < op->heads; head++) {
        float *query = run->queries + (token * op->heads + head) * width;
        rotate(run, run->query + token * run->stride + head * width, query, position, op->scale);
        for (long i = 0; op->int8 && i < width; i++) query[i] *= run->key_scales[head / run->each * width + i];
    }
    for (long head = 0; head < op->kv_heads; head++) {
        const long at = ((run->rows[token] * op->kv_heads + head) * run->length + position) * width;
        const long from = token * run->key_stride + head * width;
        if (op->int8) {
            float key[WIDEST];
            rotate(run, run->key + from, key, position, 1);
            quantize(key, run->key_scales + head * width, (int8_t *)run->keys + at, width);
            quantize(run->value + from, run->value_scales + head * width, (int8_t *)run->values + at, width);
        } else {
            rotate(run, run->key + from, (float *)run->keys + at, position, 1);
            memcpy((float *)run->values + at, run->value + from, width * sizeof(float));
        }
    }
}

/* Divides the queries into units: some queries of one row, at consecutive positions, that share keys. Returns the products that they take. */
static double divide(struct run *run) {
    double products = 0;
    for (long token = 0, count; token < run->tokens; token += count) {
        count = 1;
        while (token + count < run->tokens && run->rows[token + count] == run->rows[token] &&
               run->positions[token + count] == run->positions[token] + count)
            count++;
        products += 2.0 * run->op->heads * run->width * count * (run->positions[token] + 0.5 * count);
        for (long head = 0; head < run->op->kv_heads; head++)
            for (long first = 0; first < count * run->each; first += set->queries) {
                const long left = count * run->each - first;
                run->unit[run->units++] = (struct unit){token, head, first, left < set->queries ? left : set->queries};
            }
    }
    return products;
}

/* What is wrong with the lengths of a run, NULL if nothing. */
static const char *problem(const struct run *run, int64_t rows, int64_t places) {
    if (run->width > WIDEST || 2 * run->half > run->width) return "heads are wider than 256, or narrower than the tables of rotation";
    for (long token = 0; token < run->tokens; token++) {
        if (run->rows[token] < 0 || run->rows[token] >= rows) return "a token names a row that the cache lacks";
        if (run->positions[token] < 0 || run->positions[token] >= run->length) return "a token is outside of its row's cache";
        if (run->cosines && run->positions[token] >= places) return "a token is at a position that the tables of rotation lack";
    }
    return NULL;
}

static ort_status attend(struct run *run, const void *context) {
    const ort_api api = run->op->api;
    const long most = run->tokens * run->op->heads + 1;
    run->unit = malloc(most * sizeof *run->unit);
    run->queries = malloc(most * run->width * sizeof(float));
    ort_status status = run->unit && run->queries ? NULL : failed(api, "there is not enough memory");
    if (!status) {
        const double products = divide(run);
        /* a few thousand products are done before another thread has begun */
        const int alone = products < 1 << 18;
        if (run->tokens >= 16 && !alone)
            status = ort_parallel(api)(context, append, run->tokens, 0, run);
        else
            for (long token = 0; token < run->tokens; token++) append(run, token);
        if (alone)
            for (long unit = 0; unit < run->units; unit++) run_unit(run, unit);
        else if (!status)
            status = ort_parallel(api)(context, run_unit, run->units, run->units, run);
    }
    free(run->queries);
    free(run->unit);
    return status;
}

static ort_status compute(void *data, void *context) {
    const struct attention *op = data;
    const ort_api api = op->api;
    struct run run = {.op = op};
    int64_t shapes[MOST_INPUTS][4] = {{0}};
    void *inputs[MOST_INPUTS] = {NULL}, *outputs[3], *value;
    static const size_t axes[MOST_INPUTS] = {3, 3, 3, 4, 4, 1, 1, 2, 2, 1, 3, 3};
    ort_status status;
    for (size_t i = 0; i < (op->int8 ? MOST_INPUTS : INT8_INPUTS); i++)
        if ((status = taken(api, context, i, axes[i], shapes[i], inputs + i, "an input has another number of axes"))) return status;
    const int64_t *cache = shapes[3], rows = cache[0], wide = op->heads * cache[3], narrow = op->kv_heads * cache[3];
    run.tokens = shapes[0][0] * shapes[0][1];
    run.length = cache[2];
    run.width = cache[3];
    run.half = shapes[7][1];
    run.each = op->heads / op->kv_heads;
    run.query = inputs[0];
    run.key = inputs[1] ? inputs[1] : run.query + wide;
    run.value = inputs[2] ? inputs[2] : run.key + narrow;
    run.stride = inputs[1] ? wide : wide + 2 * narrow;
    run.key_stride = inputs[1] ? narrow : run.stride;
    run.rows = inputs[5];
    run.positions = inputs[6];
    run.cosines = inputs[7];
    run.sines = inputs[8];
    run.sinks = inputs[9];
    run.key_scales = inputs[10];
    run.value_scales = inputs[11];
    const int64_t shape[3] = {shapes[0][0], shapes[0][1], wide};
    int right = shapes[0][2] == run.stride && shapes[5][0] == run.tokens && shapes[6][0] == run.tokens && cache[1] == op->kv_heads &&
                !memcmp(cache, shapes[4], sizeof shapes[4]) && !memcmp(shapes[7], shapes[8], sizeof shapes[8]) && !inputs[1] == !inputs[2];
    for (int i = 1; i < 3; i++)
        right = right && (!inputs[i] || (shapes[i][0] * shapes[i][1] == run.tokens && shapes[i][2] == narrow));
    for (int i = INT8_INPUTS; op->int8 && i < MOST_INPUTS; i++) right = right && shapes[i][0] * shapes[i][1] * shapes[i][2] == narrow;
    if (!right || (run.sinks && shapes[9][0] != op->heads)) return failed(api, "queries, keys, values, caches and tables do not belong together");
    const char *wrong = problem(&run, rows, shapes[7][0]);
    if (wrong) return failed(api, wrong);
    for (size_t i = 0; i < 3; i++)
        if ((status = ort_output(api)(context, i, i ? cache : shape, i ? 4 : 3, &value)) || (status = ort_data(api)(value, outputs + i))) return status;
    if (outputs[1] != inputs[3] || outputs[2] != inputs[4]) return failed(api, "caches are written where they are read");
    run.out = outputs[0];
    run.keys = outputs[1];
    run.values = outputs[2];
    return attend(&run, context);
}

static const struct ort_operator of_floats, of_int8;

static ort_status create(const void *made_of, ort_api api, const void *info, void **made) {
    struct attention *op = malloc(sizeof *op);
    if (!op) return failed(api, "there is not enough memory");
    op->api = api;
    op->int8 = made_of == &of_int8;
    ort_status status;
    if ((status = ort_attribute(api)(info, "num_heads", &op->heads)) || (status = ort_attribute(api)(info, "kv_num_heads", &op->kv_heads)) ||
        (status = ort_attribute(api)(info, "local_window_size", &op->window)) || (status = ort_float_attribute(api)(info, "scale", &op->scale)) ||
        (status = ort_float_attribute(api)(info, "softcap", &op->softcap)))
        free(op);
    else if (op->kv_heads < 1 || op->heads < 1 || op->heads > MOST_HEADS || op->heads % op->kv_heads) {
        free(op);
        status = failed(api, "heads are a multiple of those of keys, and at most 65,536");
    }
    *made = status ? NULL : op;
    return status;
}

static const char *op_name(const void *op) { return op == &of_int8 ? "RaggedAttentionInt8" : "RaggedAttention"; }
static const char *no_name(const void *op) { return NULL; }
static size_t inputs_of(const void *op) { return op == &of_int8 ? MOST_INPUTS : INT8_INPUTS; }
static size_t outputs_of(const void *op) { return 3; }
static int is_optional(const void *op, size_t index) { return index == 1 || index == 2 || (index > 6 && index < INT8_INPUTS) ? ORT_OPTIONAL : 0; }
static int none(const void *op, size_t index) { return 0; }
static int of_cache(const void *op) { return op == &of_int8 ? ORT_INT8 : ORT_FLOAT; }
static int type_of(const void *op, size_t index) {
    if (index == 5 || index == 6) return ORT_INT64;
    return index == 3 || index == 4 ? of_cache(op) : ORT_FLOAT;
}
static int output_type_of(const void *op, size_t index) { return index ? of_cache(op) : ORT_FLOAT; }
static size_t in_place(int **inputs, int **outputs) {
    static int past[] = {3, 4}, present[] = {1, 2};
    *inputs = past;
    *outputs = present;
    return 2;
}
static void keep(int *inputs, int *outputs) {}

#define OPERATOR \
    {.version = ORT_API, .name = op_name, .provider = no_name, .input_type = type_of, .input_count = inputs_of, \
     .output_type = output_type_of, .output_count = outputs_of, .destroy = free, .input_kind = is_optional, .output_kind = none, \
     .input_memory = none, .create_checked = create, .compute_checked = compute, .in_place = in_place, .release_in_place = keep}
static const struct ort_operator of_floats = OPERATOR, of_int8 = OPERATOR;

REGISTERS("adapterpack.attention", &of_floats, &of_int8)

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
    {"use", py_use, METH_VARARGS, "use(set=fastest)\n\nLets the operator compute with an instruction set, in all sessions."},
    {"sets", py_sets, METH_NOARGS, "sets() -> the instruction sets that this processor runs, the fastest first"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ragged_attention", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ragged_attention(void) {
    PyObject *made = created(&module);
    if (made && sets[0].name) set = chosen(sets, sizeof(struct set), NULL);
    PyErr_Clear(); /* where no set runs, sets() is empty and nobody asks */
    return made;
}
