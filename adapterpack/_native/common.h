/* What both kernels share: the instruction sets that they are compiled for, and arrays from Python, checked before a number is read.

   Include it first. The module's own macro is SOURCE_HASH, by which Python tells whether it was compiled from the sources next to it. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")))
#define AVX512VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt")))
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD_TARGET
#elif defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16) /* clang before 16 has no such functions beside others */
#define DOTPROD_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

/* Whether this processor has an instruction set: avx512vnni, avx512 or avx2 of x86_64, dotprod or neon of aarch64, or plain, which all have. */
static int runs_here(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* whatever has AVX2 has F16C, for which clang has no name here */
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    if (!strcmp(name, "avx2")) return avx2;
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__aarch64__)
    if (!strcmp(name, "neon")) return 1;
#if defined(__linux__)
    if (!strcmp(name, "dotprod")) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    if (!strcmp(name, "dotprod")) return 1; /* every processor of Apple's that runs macOS has it */
#endif
#endif
    return !strcmp(name, "plain");
}

/* Each kernel's table of functions: the instruction set's name comes first in a row, and the row after the last one has none. */
#define NAME_OF(row) (*(const char *const *)(row))

/* The first row, so the fastest, that this processor runs; with a name the row of that name. An error where there is none. */
static const void *chosen(const void *table, size_t size, const char *name) {
    for (const char *row = table; NAME_OF(row); row += size)
        if (runs_here(NAME_OF(row)) && (!name || !strcmp(name, NAME_OF(row)))) return row;
    PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", name ? name : "that the kernel is compiled for");
    return NULL;
}

/* The names of the instruction sets that this processor runs, the fastest first. */
static PyObject *names_of(const void *table, size_t size) {
    PyObject *names = PyList_New(0);
    for (const char *row = table; names && NAME_OF(row); row += size) {
        if (!runs_here(NAME_OF(row))) continue;
        PyObject *name = PyUnicode_FromString(NAME_OF(row));
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* A C-contiguous array whose format is one of these letters of PEP 3118: of that many axes, unless they are 0, and of that many numbers,
   unless they are below 0. Returns 0, with an error set and no buffer taken, where it is another. */
__attribute__((unused)) static int view(PyObject *object, Py_buffer *buffer, const char *what, int flags, const char *formats, int axes, Py_ssize_t numbers) {
    if (PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return 0;
    const char *format = buffer->format ? buffer->format : "B";
    format += *format == '<'; /* the order of bytes here, which arrays from files name */
    const Py_ssize_t size = format[0] == 'B' ? 1 : strchr("He", format[0]) ? 2 : format[0] == 'f' ? 4 : 8;
    if (format[0] && !format[1] && strchr(formats, format[0]) && buffer->itemsize == size && (!axes || buffer->ndim == axes) &&
        (numbers < 0 || buffer->len == numbers * size))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: an array of another layout is expected: format %s, %d axes (0: any), %zd numbers (-1: any); "
                 "this one has format %s, %d axes and %zd bytes", what, formats, axes, numbers, format, buffer->ndim, buffer->len);
    PyBuffer_Release(buffer);
    return 0;
}

/* A module of these functions, which knows the hash of its sources. */
static PyObject *created(PyModuleDef *definition) {
    PyObject *module = PyModule_Create(definition);
    if (module && PyModule_AddStringConstant(module, "SOURCE_HASH", TEXT(SOURCE_HASH)) < 0) Py_CLEAR(module);
    return module;
}
