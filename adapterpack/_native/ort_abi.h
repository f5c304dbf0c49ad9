/* The part of ONNX Runtime's C interface that an operator of one's own needs. Its wheels have no headers; the order of the functions in
   its tables never changes, new ones are appended. */

#include <stddef.h>
#include <stdint.h>

enum { ORT_API = 18, ORT_INVALID_ARGUMENT = 2, ORT_FLOAT = 1, ORT_INT8 = 3, ORT_INT64 = 7, ORT_OPTIONAL = 1 };

typedef const void *const *ort_api; /* the functions by their places */
typedef void *ort_status;           /* NULL if all went well */

struct ort_base {
    ort_api (*api)(uint32_t version);
    const char *(*version)(void);
};

struct ort_operator {
    uint32_t version;
    void *(*create)(const void *op, ort_api api, const void *info);
    const char *(*name)(const void *op);
    const char *(*provider)(const void *op);
    int (*input_type)(const void *op, size_t index);
    size_t (*input_count)(const void *op);
    int (*output_type)(const void *op, size_t index);
    size_t (*output_count)(const void *op);
    void (*compute)(void *kernel, void *context);
    void (*destroy)(void *kernel);
    int (*input_kind)(const void *op, size_t index);
    int (*output_kind)(const void *op, size_t index);
    int (*input_memory)(const void *op, size_t index);
    void *variadic[4];
    ort_status (*create_checked)(const void *op, ort_api api, const void *info, void **kernel);
    ort_status (*compute_checked)(void *kernel, void *context);
    void *infer, *first_version, *last_version;
    size_t (*in_place)(int **inputs, int **outputs);
    void (*release_in_place)(int *inputs, int *outputs);
    void *alias, *release_alias;
};

#define ORT(api, place, result, ...) ((result(*)(__VA_ARGS__))(api)[place])
#define ort_fail(api) ORT(api, 0, ort_status, int code, const char *message)
#define ort_create_domain(api) ORT(api, 26, ort_status, const char *name, void **domain)
#define ort_add_operator(api) ORT(api, 27, ort_status, void *domain, const struct ort_operator *op)
#define ort_add_domain(api) ORT(api, 28, ort_status, void *options, void *domain)
#define ort_data(api) ORT(api, 51, ort_status, const void *value, void **data)
#define ort_axes(api) ORT(api, 61, ort_status, const void *info, size_t *count)
#define ort_lengths(api) ORT(api, 62, ort_status, const void *info, int64_t *lengths, size_t count)
#define ort_shape(api) ORT(api, 65, ort_status, const void *value, void **info)
#define ort_float_attribute(api) ORT(api, 85, ort_status, const void *info, const char *name, float *number)
#define ort_attribute(api) ORT(api, 86, ort_status, const void *info, const char *name, int64_t *number)
#define ort_input(api) ORT(api, 90, ort_status, const void *context, size_t index, const void **value)
#define ort_output(api) ORT(api, 91, ort_status, void *context, size_t index, const int64_t *lengths, size_t axes, void **value)
#define ort_free_shape(api) ORT(api, 99, void, void *info)
#define ort_parallel(api) ORT(api, 274, ort_status, const void *context, void (*work)(void *, size_t), size_t total, size_t batches, void *data)

INLINE ort_status failed(ort_api api, const char *message) { return ort_fail(api)(ORT_INVALID_ARGUMENT, message); }

/* The lengths and the numbers of an input; NULL in place of them where an optional one is left out, and `wrong` where it has other axes. */
__attribute__((unused)) static ort_status taken(ort_api api, const void *context, size_t index, size_t axes, int64_t *lengths, void **data, const char *wrong) {
    const void *value = NULL;
    void *shape;
    size_t count = 0;
    *data = NULL;
    ort_status status = ort_input(api)(context, index, &value);
    if (status || !value || (status = ort_shape(api)(value, &shape))) return status;
    if (!(status = ort_axes(api)(shape, &count)) && count == axes) status = ort_lengths(api)(shape, lengths, axes);
    ort_free_shape(api)(shape);
    if (status) return status;
    return count == axes ? ort_data(api)(value, data) : failed(api, wrong);
}

/* What ONNX Runtime calls for the options of every session that is to know operators; their domain lives as long as the process, since
   sessions refer to it. */
#define REGISTERS(name, ...) \
    __attribute__((visibility("default"))) ort_status RegisterCustomOps(void *options, const struct ort_base *base) { \
        static void *domain; \
        static const struct ort_operator *const operators[] = {__VA_ARGS__}; \
        const ort_api api = base->api(ORT_API); \
        ort_status status = NULL; \
        void *made = domain; \
        if (!domain && (status = ort_create_domain(api)(name, &made))) return status; \
        for (size_t i = 0; !domain && i < sizeof operators / sizeof *operators; i++) \
            if ((status = ort_add_operator(api)(made, operators[i]))) return status; \
        domain = made; \
        return ort_add_domain(api)(options, domain); \
    }
