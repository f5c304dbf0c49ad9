/* The kernel for every way of storing, for one instruction set. */

#define TYPE product
#define STORED float
#define EXACT 1
#define PLAIN 1
#define HEIGHT PRODUCT_ROWS
#define WIDE F32_WIDE
#define NARROW F32_NARROW
#include "kernel.h"
#undef TYPE
#undef STORED
#undef EXACT
#undef PLAIN
#undef HEIGHT
#undef WIDE
#undef NARROW

#define TYPE bf16
#define STORED uint16_t
#define EXACT 0
#define PLAIN 0
#define HEIGHT ROWS
#define WIDE BF16_WIDE
#define NARROW BF16_NARROW
#include "kernel.h"
#undef TYPE
#undef STORED
#undef EXACT
#undef PLAIN
#undef HEIGHT
#undef WIDE
#undef NARROW

#define TYPE f16
#define STORED uint16_t
#define EXACT 0
#define PLAIN 0
#define HEIGHT ROWS
#define WIDE F16_WIDE
#define NARROW F16_NARROW
#include "kernel.h"
#undef TYPE
#undef STORED
#undef EXACT
#undef PLAIN
#undef HEIGHT
#undef WIDE
#undef NARROW

#define TYPE f32
#define STORED float
#define EXACT 1
#define PLAIN 0
#define HEIGHT ROWS
#define WIDE F32_WIDE
#define NARROW F32_NARROW
#include "kernel.h"
#undef TYPE
#undef STORED
#undef EXACT
#undef PLAIN
#undef HEIGHT
#undef WIDE
#undef NARROW
