/* Some rows of a product and one strip of columns, once more for each instruction set: the includer defines SET, TARGET, LANES (float32 of a
   vector), ROWS (how many have their sums in registers), FMA(a, b, c) for a b + c with one rounding, DOT4(sum, codes, x) and DOT8, which add
   to each number the products of its four bytes, and WIDENED(p) for LANES uint8 as int32; all are undefined again here. */

typedef float JOIN(lanes, SET) __attribute__((vector_size(4 * LANES)));
typedef float JOIN(lanes_there, SET) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever an array lies */
typedef int32_t JOIN(wholes, SET) __attribute__((vector_size(4 * LANES), may_alias));
#define lanes JOIN(lanes, SET)
#define lanes_there JOIN(lanes_there, SET)
#define wholes JOIN(wholes, SET)

/* Rounds a row to codes, and adds up those of each block. */
static TARGET void NAME(round)(const struct run *run, const long row) {
    const struct weight *weight = run->weight;
    for (long block = 0; block < weight->blocks; block++) {
        const long first = block * weight->block, left = weight->in - first, count = left < weight->block ? left : weight->block;
        const float *x = run->x + row * weight->in + first;
        int8_t *codes = run->codes + row * weight->width + first;
        word largest = 0, sum = 0;
        for (long i = 0; i < count; i++) {
            const word size = ((const word *)x)[i] & INT32_MAX; /* floats without a sign are in the order of their bits */
            largest = size > largest ? size : largest;
        }
        union {
            word bits;
            float number;
        } most = {largest};
        /* all codes are 0 where they cannot be told, as for an infinity, or need not, as for a row of zeros */
        const int told = largest >= LEAST && largest < INFINITE;
        const float inverse = told ? 127 / most.number : 0, shifter = 12582912; /* 1.5 2^23: its sum with a number is rounded to an integer */
        for (long i = 0; i < count && told; i++) {
            union {
                float number;
                word bits;
            } code = {x[i] * inverse + shifter};
            codes[i] = (int8_t)code.bits;
            sum += codes[i];
        }
        memset(codes + (told ? count : 0), 0, weight->block - (told ? count : 0));
        run->steps[row * weight->blocks + block] = largest < INFINITE ? told * most.number / 127 : NAN;
        run->sums[row * weight->blocks + block] = sum;
    }
}

INLINE TARGET void NAME(tile)(const int rows, const int bits, const int zeros, const struct run *run, const long row, const long strip, const long at) {
    const struct weight *weight = run->weight;
    const long blocks = weight->blocks, width = weight->width, groups = weight->block * bits / 32;
    const uint8_t *codes = weight->codes + strip * COLUMNS * (width * bits / 8) + at * 4;
    const long first = strip * blocks * COLUMNS + at;
    lanes sum[ROWS][2];
    EACH(r, rows)
        EACH(v, 2) sum[r][v] = (lanes){0};
    for (long block = 0; block < blocks; block++) {
        wholes dots[ROWS][2];
        EACH(v, 2) {
            const wholes zero = (wholes){0} + weight->shift + (zeros ? WIDENED(weight->zeros + first + block * COLUMNS + v * LANES) : (wholes){0});
            EACH(r, rows) dots[r][v] = -zero * run->sums[(row + r) * blocks + block];
        }
        const word *x = (const word *)(run->codes + row * width + block * weight->block);
        for (long group = 0; group < groups; group++, codes += 4 * COLUMNS, x += 8 / bits)
            EACH(v, 2) {
                const wholes code = *(const wholes *)(codes + v * 4 * LANES);
                if (bits == 8)
                    EACH(r, rows) dots[r][v] = DOT8(dots[r][v], code, (wholes){0} + x[r * width / 4]);
                else {
                    const wholes low = code & 0x0f0f0f0f, high = code >> 4 & 0x0f0f0f0f;
                    EACH(r, rows) dots[r][v] = DOT4(dots[r][v], low, (wholes){0} + x[r * width / 4]);
                    EACH(r, rows) dots[r][v] = DOT4(dots[r][v], high, (wholes){0} + x[r * width / 4 + 1]);
                }
            }
        EACH(v, 2) {
            const lanes scale = *(const lanes_there *)(weight->scales + first + block * COLUMNS + v * LANES);
            EACH(r, rows)
                sum[r][v] = FMA(__builtin_convertvector(dots[r][v], lanes), scale * run->steps[(row + r) * blocks + block], sum[r][v]);
        }
    }
    EACH(v, 2) {
        const long column = strip * COLUMNS + at + v * LANES, left = weight->out - column;
        EACH(r, rows) {
            if (weight->bias) sum[r][v] += *(const lanes_there *)(weight->bias + column);
            float *to = run->out + (row + r) * weight->out + column;
            if (left >= LANES)
                *(lanes_there *)to = (lanes)sum[r][v];
            else
                for (long lane = 0; lane < left; lane++) to[lane] = sum[r][v][lane];
        }
    }
}

INLINE TARGET void NAME(rows)(const int bits, const int zeros, const struct run *run, const long strip, long row, long left) {
    for (long count; left > 0; row += count, left -= count) {
        const long tiles = (left + ROWS - 1) / ROWS;
        count = (left + tiles - 1) / tiles;
        for (long at = 0; at < COLUMNS; at += 2 * LANES) switch (count) {
#if ROWS > 2
            case 6: NAME(tile)(6, bits, zeros, run, row, strip, at); break;
            case 5: NAME(tile)(5, bits, zeros, run, row, strip, at); break;
            case 4: NAME(tile)(4, bits, zeros, run, row, strip, at); break;
            case 3: NAME(tile)(3, bits, zeros, run, row, strip, at); break;
#endif
            case 2: NAME(tile)(2, bits, zeros, run, row, strip, at); break;
            default: NAME(tile)(1, bits, zeros, run, row, strip, at);
            }
    }
}

static TARGET void NAME(multiply)(const struct run *run, const long strip, const long first, const long count) {
    const struct weight *weight = run->weight;
    if (weight->bits == 4 && weight->zeros)
        NAME(rows)(4, 1, run, strip, first, count);
    else if (weight->bits == 4)
        NAME(rows)(4, 0, run, strip, first, count);
    else if (weight->zeros)
        NAME(rows)(8, 1, run, strip, first, count);
    else
        NAME(rows)(8, 0, run, strip, first, count);
}
#undef lanes
#undef lanes_there
#undef wholes
#undef SET
#undef TARGET
#undef LANES
#undef ROWS
#undef FMA
#undef DOT4
#undef DOT8
#undef WIDENED
