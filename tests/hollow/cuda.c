/* The part of a hollow CUDA that does something: one device whose memory is the host's. Copies copy; launches, products and captures only
   count. ONNX Runtime's own CUDA provider runs on it, up to its kernels. `cuda.py` compiles it with empty functions for all other names. */

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define HANDLE(name) int name(void **handle) { *handle = calloc(1, 64); return 0; }
#define PUT(type, offset, value) (*(type *)((char *)at + (offset)) = (value))

static int capturing, captures, replays, instantiated;

int hollow_captures(void) { return captures; }
int hollow_replays(void) { return replays; }

int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(int code) { return "hollow"; }
const char *cudaGetErrorName(int code) { return "hollow"; }
const char *cublasGetStatusName(int code) { return "hollow"; }
const char *cublasGetStatusString(int code) { return "hollow"; }

int cudaGetDeviceProperties(void *at, int device) { /* the layout of CUDA 13; an H100's figures */
  memset(at, 0, 1008);
  strcpy(at, "hollow");
  PUT(size_t, 288, (size_t)8 << 30); /* totalGlobalMem */
  PUT(size_t, 296, 49152);           /* sharedMemPerBlock */
  PUT(int, 304, 65536);              /* regsPerBlock */
  PUT(int, 308, 32);                 /* warpSize */
  PUT(int, 320, 1024);               /* maxThreadsPerBlock */
  PUT(int, 324, 1024);               /* maxThreadsDim */
  PUT(int, 328, 1024);
  PUT(int, 332, 64);
  PUT(int, 336, 2147483647);         /* maxGridSize */
  PUT(int, 340, 65535);
  PUT(int, 344, 65535);
  PUT(int, 360, 9);                  /* major */
  PUT(int, 384, 132);                /* multiProcessorCount */
  PUT(int, 596, 50 << 20);           /* l2CacheSize */
  PUT(int, 604, 2048);               /* maxThreadsPerMultiProcessor */
  PUT(size_t, 624, 233472);          /* sharedMemPerMultiprocessor */
  PUT(int, 632, 65536);              /* regsPerMultiprocessor */
  PUT(size_t, 672, 232448);          /* sharedMemPerBlockOptin */
  PUT(int, 688, 32);                 /* maxBlocksPerMultiProcessor */
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;   /* shared memory of a block */
    case 10: *value = 32; break;     /* threads of a warp */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability, major */
    case 76: *value = 0; break;
    case 97: *value = 232448; break; /* shared memory of a block that asks for more */
    default: *value = 1;
  }
  return 0;
}

int cudaFuncGetAttributes(void *at, const void *function) {
  memset(at, 0, 144);
  PUT(int, 24, 1024); /* maxThreadsPerBlock */
  return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int size, size_t shared, unsigned flags) {
  *blocks = 1;
  return 0;
}

static int take(void **to, size_t bytes) { *to = calloc(1, bytes ? bytes : 1); return *to ? 0 : 2; }

int cudaMalloc(void **to, size_t bytes) { return take(to, bytes); }
int cudaMallocHost(void **to, size_t bytes) { return take(to, bytes); }
int cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return take(to, bytes); }
int cudaMallocFromPoolAsync(void **to, size_t bytes, void *pool, void *stream) { return take(to, bytes); }
int cudaFree(void *what) { free(what); return 0; }
int cudaFreeHost(void *what) { free(what); return 0; }
int cudaFreeAsync(void *what, void *stream) { free(what); return 0; }
int cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = (size_t)8 << 30; return 0; }

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { memmove(to, from, bytes); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  if (!capturing) memmove(to, from, bytes);
  return 0;
}
int cudaMemcpy2DAsync(void *to, size_t pitch, const void *from, size_t source, size_t width, size_t height, int kind, void *stream) {
  for (size_t row = 0; row < height; row++) memmove((char *)to + row * pitch, (const char *)from + row * source, width);
  return 0;
}
int cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
int cudaPointerGetAttributes(void *at, const void *what) { memset(at, 0, 88); PUT(int, 0, 2); return 0; } /* all of it is the device's */

HANDLE(cudaStreamCreate)
int cudaStreamCreateWithFlags(void **handle, unsigned flags) { return cudaStreamCreate(handle); }
HANDLE(cudaEventCreate)
int cudaEventCreateWithFlags(void **handle, unsigned flags) { return cudaEventCreate(handle); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 0; return 0; }
HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate)
HANDLE(cudaMemPoolCreate)
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { *(unsigned long long *)value = 0; return 0; }

int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; captures++; return cudaStreamCreate(graph); }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { instantiated++; return cudaStreamCreate(executable); }
int cudaGraphLaunch(void *executable, void *stream) { replays++; return 0; }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return 0; }
HANDLE(__cudaRegisterFatBinary_)
void **__cudaRegisterFatBinary(void *binary) { void *handle; __cudaRegisterFatBinary_(&handle); return handle; }

/* TensorRT: its provider loads and says which nodes it would take, which is none. */
static void nothing(void) {}
static void *table[256];
static void **object = table;
__attribute__((constructor)) static void fill(void) { for (int i = 0; i < 256; i++) table[i] = nothing; }
int getInferLibVersion(void) { return 101000; }
void *createInferRuntime_INTERNAL(void) { return &object; }
void *getPluginRegistry(void) { return &object; }
HANDLE(cudnnCreate)
