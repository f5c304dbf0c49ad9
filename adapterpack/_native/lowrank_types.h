/* The kernel for every way of storing, for one instruction set. The includer defines SET, TARGET, LANES (float32 of a vector), TILES and ROWS
   (the vectors of a row, and the rows, that are added up together), how float16 is converted, how LANES 16-bit integers are widened and the
   upper halves of twice LANES numbers are stored. All are undefined again here. */

typedef float JOIN(lanes, SET) __attribute__((vector_size(4 * LANES)));
typedef uint32_t JOIN(bits, SET) __attribute__((vector_size(4 * LANES)));
typedef uint16_t JOIN(halves, SET) __attribute__((vector_size(2 * LANES)));
/* The same where an array lies, which may be anywhere. */
typedef float JOIN(lanes_there, SET) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t JOIN(halves_there, SET) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define lanes JOIN(lanes, SET)
#define bits JOIN(bits, SET)
#define halves JOIN(halves, SET)
#define lanes_there JOIN(lanes_there, SET)
#define halves_there JOIN(halves_there, SET)

#define STORED float
#define CODE lanes
#define EXACT 1
#define READ(p) ((lanes)*(const lanes_there *)(p))
#define ROUND(x) (x)
#define BACK(code) (code)
#define WRITE(a, b, p) (*(lanes_there *)(p) = (a), *(lanes_there *)((p) + LANES) = (b))
#define TYPE product
#define PLAIN 1
#include "lowrank_block.h"
#define TYPE f32
#define PLAIN 0
#include "lowrank_block.h"
#undef STORED
#undef CODE
#undef EXACT
#undef READ
#undef ROUND
#undef BACK
#undef WRITE

#define STORED uint16_t
#define EXACT 0
#define CODE halves
#define READ F16_READ
#define ROUND F16_ROUND
#define BACK F16_BACK
#define WRITE(a, b, p) (*(halves_there *)(p) = (a), *(halves_there *)((p) + LANES) = (b))
#define TYPE f16
#define PLAIN 0
#include "lowrank_block.h"
#undef CODE
#undef READ
#undef ROUND
#undef BACK
#undef WRITE

/* bfloat16 is the upper half of float32. The carry of rounding would make other numbers of NaN, which becomes the quiet one of its sign
   instead, as in ml_dtypes. */
#define CODE bits
#define READ(p) ((lanes)(WIDE(p) << 16))
#define ROUND(x) ((bits)(x) + 0x7FFF + (((bits)(x) >> 16) & 1))
#define NAN_CODE(x) (((bits)(x) & 0x80000000) | 0x7FC00000)
#define BACK(code) ((lanes)((code) & 0xFFFF0000))
#define WRITE UPPER
#define TYPE bf16
#define PLAIN 0
#include "lowrank_block.h"
#undef STORED
#undef CODE
#undef EXACT
#undef READ
#undef ROUND
#undef NAN_CODE
#undef BACK
#undef WRITE

#undef lanes
#undef bits
#undef halves
#undef lanes_there
#undef halves_there
#undef SET
#undef TARGET
#undef LANES
#undef TILES
#undef ROWS
#undef F16_READ
#undef F16_ROUND
#undef F16_BACK
#undef WIDE
#undef UPPER
