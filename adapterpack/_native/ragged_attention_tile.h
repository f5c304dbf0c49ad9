/* The attention of some queries of a row, once more for each instruction set: the includer defines SET, TARGET, LANES (float32 of a vector),
   KEYS and QUERIES (how many of them have their sums in registers), FMA(a, b, c) for a b + c with one rounding, and SPREAD(x) for x in every
   lane; all are undefined again here.

   A lane is a query: scores are [positions, queries], so that their largest and their sum need nothing across lanes, and keys are read as
   they lie. */

typedef float JOIN(lanes, SET) __attribute__((vector_size(4 * LANES)));
typedef float JOIN(lanes_there, SET) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever an array lies */
typedef int32_t JOIN(places, SET) __attribute__((vector_size(4 * LANES)));
#define lanes JOIN(lanes, SET)
#define lanes_there JOIN(lanes_there, SET)
#define places JOIN(places, SET)
#define MOST (VECTORS * LANES)
#define AT(p) (*(lanes_there *)(p))

/* One of two numbers in each lane: `yes` where all bits are set. */
INLINE TARGET lanes NAME(pick)(const places where, const lanes yes, const lanes no) {
    return (lanes)((where & (places)yes) | (~where & (places)no));
}

/* e^x for x up to 0, to a few units of the last place (Cephes, expf). */
INLINE TARGET lanes NAME(exponential)(lanes x) {
    x = NAME(pick)(x < SPREAD(-87.0f), SPREAD(-87.0f), x);
    const lanes shifter = SPREAD(12582912.0f); /* 1.5 2^23: its sum with a number is rounded to an integer */
    const lanes shifted = FMA(x, SPREAD(1.44269504f), shifter), whole = shifted - shifter;
    const lanes rest = FMA(whole, SPREAD(2.12194440e-4f), FMA(whole, SPREAD(-0.693359375f), x));
    lanes sum = SPREAD(1.9875691500e-4f);
    sum = FMA(sum, rest, SPREAD(1.3981999507e-3f));
    sum = FMA(sum, rest, SPREAD(8.3334519073e-3f));
    sum = FMA(sum, rest, SPREAD(4.1665795894e-2f));
    sum = FMA(sum, rest, SPREAD(1.6666665459e-1f));
    sum = FMA(sum, rest, SPREAD(5.0000001201e-1f));
    sum = FMA(sum, rest * rest, rest) + SPREAD(1.0f);
    const places power = ((places)shifted - (places)shifter + 127) << 23;
    return sum * (lanes)power;
}

INLINE TARGET lanes NAME(capped)(const lanes x, const float cap) {
    const places sign = (places)x & (places)SPREAD(-0.0f);
    const lanes size = (lanes)((places)x ^ sign), small = NAME(exponential)(size * SPREAD(-2 / cap));
    return (lanes)((places)(SPREAD(cap) * (SPREAD(1.0f) - small) / (SPREAD(1.0f) + small)) | sign);
}

/* Scores [keys, MOST] of queries, `vectors` of them, [width, MOST]. */
INLINE TARGET void NAME(score)(const int vectors, const int keys, const float *queries, const float *key, const long width, float *scores) {
    lanes sum[KEYS][VECTORS];
    EACH(k, keys)
        EACH(v, vectors) sum[k][v] = (lanes){0};
    for (long i = 0; i < width; i++) {
        lanes query[VECTORS];
        EACH(v, vectors) query[v] = AT(queries + i * MOST + v * LANES);
        EACH(k, keys)
            EACH(v, vectors) sum[k][v] = FMA(SPREAD(key[k * width + i]), query[v], sum[k][v]);
    }
    EACH(k, keys)
        EACH(v, vectors) AT(scores + k * MOST + v * LANES) = sum[k][v];
}

/* The last few numbers of a row, with zeros behind them. */
INLINE TARGET lanes NAME(rest)(const float *from, const long left) {
    float there[LANES] = {0};
    memcpy(there, from, left * sizeof(float));
    return AT(there);
}

/* Scales the sums [queries, WIDEST] of some queries, and adds the values of some positions, each as often as it weighs, at `vectors` vectors;
   with `left` they are that many numbers of one. */
INLINE TARGET void NAME(add)(const int queries, const int vectors, const long left, const float *weights, const long keys, const float *value,
                             const long width, const float *scales, float *sums) {
    lanes sum[QUERIES][4];
    EACH(q, queries)
        EACH(v, vectors) sum[q][v] = AT(sums + q * WIDEST + v * LANES) * SPREAD(scales[q]);
    for (long k = 0; k < keys; k++) {
        lanes one[4];
        EACH(v, vectors) one[v] = left ? NAME(rest)(value + k * width, left) : (lanes)AT(value + k * width + v * LANES);
        EACH(q, queries)
            EACH(v, vectors) sum[q][v] = FMA(SPREAD(weights[k * MOST + q]), one[v], sum[q][v]);
    }
    EACH(q, queries)
        EACH(v, vectors) AT(sums + q * WIDEST + v * LANES) = sum[q][v];
}

INLINE TARGET void NAME(add_all)(const int queries, const float *weights, const long keys, const float *value, const long width,
                                 const float *scales, float *sums) {
    long at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) NAME(add)(queries, 4, 0, weights, keys, value + at, width, scales, sums + at);
    for (; at + LANES <= width; at += LANES) NAME(add)(queries, 1, 0, weights, keys, value + at, width, scales, sums + at);
    if (at < width) NAME(add)(queries, 1, width - at, weights, keys, value + at, width, scales, sums + at);
}

INLINE TARGET void NAME(attend_to)(const int vectors, const struct run *run, const struct unit *unit) {
    const struct attention *op = run->op;
    const long width = run->width, base = (run->rows[unit->token] * op->kv_heads + unit->head) * run->length * width;
    const float *keys = run->keys + base, *values = run->values + base, *from[MOST];
    float queries[WIDEST * MOST], scores[BLOCK * MOST], sums[MOST * WIDEST], scales[MOST], sink[MOST];
    int32_t firsts[MOST], lasts[MOST];
    long begin = run->length, end = 0;
    for (long q = 0; q < MOST; q++) {
        const long query = unit->first + (q < unit->count ? q : 0), head = unit->head * run->each + query % run->each;
        const long token = unit->token + query / run->each, last = run->positions[token];
        const long first = op->window > 0 && last >= op->window ? last - op->window + 1 : 0;
        from[q] = run->queries + (token * op->heads + head) * width;
        firsts[q] = first;
        lasts[q] = last;
        sink[q] = run->sinks ? run->sinks[head] : -1e30f;
        begin = first < begin ? first : begin;
        end = last >= end ? last + 1 : end;
    }
    for (long i = 0; i < width; i++)
        for (long q = 0; q < vectors * LANES; q++) queries[i * MOST + q] = from[q][i];
    lanes largest[VECTORS], total[VECTORS];
    EACH(v, vectors) {
        largest[v] = AT(sink + v * LANES);
        total[v] = SPREAD(run->sinks ? 1.0f : 0.0f);
    }
    for (long q = 0; q < unit->count; q++) memset(sums + q * WIDEST, 0, width * sizeof(float));
    for (long block = begin / BLOCK * BLOCK; block < end; block += BLOCK) {
        const long start = block < begin ? begin : block, stop = block + BLOCK < end ? block + BLOCK : end;
        long k = start;
        for (; k + KEYS <= stop; k += KEYS) NAME(score)(vectors, KEYS, queries, keys + k * width, width, scores + (k - start) * MOST);
        for (; k < stop; k++) NAME(score)(vectors, 1, queries, keys + k * width, width, scores + (k - start) * MOST);
        EACH(v, vectors) {
            places first, last;
            memcpy(&first, firsts + v * LANES, sizeof first);
            memcpy(&last, lasts + v * LANES, sizeof last);
            float *const own = scores + v * LANES;
            lanes most = largest[v];
            for (k = start; k < stop; k++) {
                lanes one = AT(own + (k - start) * MOST);
                if (op->softcap > 0) one = NAME(capped)(one, op->softcap);
                const places place = (places){0} + (int32_t)k;
                one = NAME(pick)((place >= first) & (place <= last), one, SPREAD(-1e30f));
                AT(own + (k - start) * MOST) = one;
                most = NAME(pick)(one > most, one, most);
            }
            const lanes scale = NAME(exponential)(largest[v] - most);
            lanes sum = total[v] * scale;
            for (k = start; k < stop; k++) {
                const lanes score = AT(own + (k - start) * MOST), weight = NAME(exponential)(score - most);
                const lanes one = NAME(pick)(score <= SPREAD(-1e30f), (lanes){0}, weight);
                AT(own + (k - start) * MOST) = one;
                sum += one;
            }
            largest[v] = most;
            total[v] = sum;
            AT(scales + v * LANES) = scale;
        }
        long q = 0;
        for (; q + QUERIES <= unit->count; q += QUERIES)
            NAME(add_all)(QUERIES, scores + q, stop - start, values + start * width, width, scales + q, sums + q * WIDEST);
        for (; q < unit->count; q++) NAME(add_all)(1, scores + q, stop - start, values + start * width, width, scales + q, sums + q * WIDEST);
    }
    float totals[MOST];
    EACH(v, vectors) AT(totals + v * LANES) = total[v];
    for (long q = 0; q < unit->count; q++)
        for (long i = 0; i < width; i++)
            run->out[(from[q] - run->queries) + i] = sums[q * WIDEST + i] / totals[q];
}

static TARGET void NAME(attend)(const struct run *run, const struct unit *unit) {
    if (unit->count <= LANES)
        NAME(attend_to)(1, run, unit);
    else if (unit->count <= 2 * LANES)
        NAME(attend_to)(2, run, unit);
    else
        NAME(attend_to)(3, run, unit);
}
#undef lanes
#undef lanes_there
#undef places
#undef MOST
#undef AT
#undef SET
#undef TARGET
#undef LANES
#undef KEYS
#undef QUERIES
#undef FMA
#undef SPREAD
