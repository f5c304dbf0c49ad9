/* The kernel for factors of each dtype, for one instruction set. The includer defines SET, TARGET, LANES (float32 of a vector), FMA(a, b, c) for
   a b + c with one rounding, SPREAD(x) for x in every lane, and F16_READ; all are undefined again here. */

typedef float JOIN(lanes, SET) __attribute__((vector_size(4 * LANES)));
typedef float JOIN(lanes_there, SET) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever an array lies */
#define lanes JOIN(lanes, SET)
#define lanes_there JOIN(lanes_there, SET)

#define TYPE f32
#define STORED float
#define READ(p) ((lanes)*(const lanes_there *)(p))
#include "row_lora_tile.h"
#undef STORED
#undef READ
#define TYPE f16
#define STORED uint16_t
#define READ F16_READ
#include "row_lora_tile.h"
#undef STORED
#undef READ
#undef lanes
#undef lanes_there
#undef SET
#undef TARGET
#undef LANES
#undef FMA
#undef SPREAD
#undef F16_READ
