/* Some tokens and one part of an adapter, once more for each instruction set and each dtype of the factors: the includer defines NAME(x),
   TARGET, the vectors and what they compute, STORED (a factor's type in memory), and READ(p), which reads LANES of them as float32. TYPE is
   undefined again here.

   A number is added up in one order however many tokens and ranks go together, so that a row's answer does not depend on its neighbours. */

/* The last few numbers of a row, with zeros behind them. */
INLINE TARGET lanes NAME(rest)(const STORED *from, const long left) {
    STORED there[LANES] = {0};
    memcpy(there, from, left * sizeof(STORED));
    return READ(there);
}

/* hidden [tokens, CHUNK] at some ranks: the products of each token's x with as many rows of down, from `first` on. */
INLINE TARGET void NAME(shrink)(const int tokens, const int ranks, const float *const *x, const struct part *part, const long first,
                                float *hidden) {
    const long in = part->in;
    const STORED *down = (const STORED *)part->down + first * in, *soon = (const STORED *)part->up + first * in;
    lanes sum[4][8];
    EACH(t, tokens)
        EACH(r, ranks) sum[t][r] = (lanes){0};
    long i = 0;
    for (; i + LANES <= in; i += LANES) {
        for (size_t line = 0; tokens == 1 && line < ranks * LANES * sizeof(STORED); line += 64) {
            __builtin_prefetch((const char *)(down + ranks * in) + i * ranks * sizeof(STORED) + line);
            __builtin_prefetch((const char *)soon + i * ranks * sizeof(STORED) + line);
        }
        EACH(r, ranks) {
            const lanes factor = READ(down + r * in + i);
            EACH(t, tokens) sum[t][r] = FMA(factor, (lanes)*(const lanes_there *)(x[t] + i), sum[t][r]);
        }
    }
    if (i < in)
        EACH(t, tokens) {
            float last[LANES] = {0};
            memcpy(last, x[t] + i, (in - i) * sizeof(float));
            EACH(r, ranks)
                sum[t][r] = FMA(NAME(rest)(down + r * in + i, in - i), (lanes)*(const lanes_there *)last, sum[t][r]);
        }
    EACH(t, tokens)
        EACH(r, ranks) {
            float whole = 0;
            for (int lane = 0; lane < LANES; lane++) whole += sum[t][r][lane];
            hidden[t * CHUNK + r] = whole;
        }
}

/* Adds the products of each token's hidden numbers with up [ranks, out] to its own of `out`, some vectors of columns from `at` on. */
INLINE TARGET void NAME(expand)(const int tokens, const int vectors, const long left, const float *hidden, const long ranks, const STORED *up,
                                const long out, const long at, float *const *sums) {
    lanes sum[4][2];
    EACH(t, tokens)
        EACH(v, vectors) sum[t][v] = (lanes){0};
    for (long r = 0; r < ranks; r++)
        EACH(v, vectors) {
            const STORED *from = up + r * out + at + v * LANES;
            const lanes factor = left ? NAME(rest)(from, left) : READ(from);
            EACH(t, tokens) sum[t][v] = FMA(SPREAD(hidden[t * CHUNK + r]), factor, sum[t][v]);
        }
    EACH(t, tokens)
        EACH(v, vectors) {
            float *to = sums[t] + at + v * LANES;
            if (left)
                for (long lane = 0; lane < left; lane++) to[lane] += sum[t][v][lane];
            else
                *(lanes_there *)to = (lanes)*(const lanes_there *)to + sum[t][v];
        }
}

INLINE TARGET void NAME(tokens)(const int tokens, const struct part *part, const float *const *x, float *const *sums) {
    float hidden[4 * CHUNK];
    for (long first = 0; first < part->rank; first += CHUNK) {
        const long ranks = part->rank - first < CHUNK ? part->rank - first : CHUNK;
        const int step = tokens == 1 ? 8 : 4;
        long r = 0;
        for (; r + step <= ranks; r += step) NAME(shrink)(tokens, step, x, part, first + r, hidden + r);
        for (; r < ranks; r++) NAME(shrink)(tokens, 1, x, part, first + r, hidden + r);
        long at = 0;
        const STORED *rows = (const STORED *)part->up + first * part->out;
        for (; at + 2 * LANES <= part->out; at += 2 * LANES) NAME(expand)(tokens, 2, 0, hidden, ranks, rows, part->out, at, sums);
        for (; at < part->out; at += LANES)
            NAME(expand)(tokens, 1, part->out - at < LANES ? part->out - at : 0, hidden, ranks, rows, part->out, at, sums);
    }
}

static TARGET void NAME(part)(const struct part *part, int count, const float *const *x, float *const *sums) {
    for (; count >= 4; count -= 4, x += 4, sums += 4) NAME(tokens)(4, part, x, sums);
    for (; count; count--, x++, sums++) NAME(tokens)(1, part, x, sums);
}
#undef TYPE
