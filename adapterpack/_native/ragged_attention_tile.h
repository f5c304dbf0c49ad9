/* The attention of some queries of a row, once more for each instruction set: the includer defines SET, TARGET, LANES (float32 of a vector),
   KEYS and QUERIES (how many of them have their sums in registers), FEW (queries for which a lane is a key), FMA(a, b, c) for a b + c with
   one rounding, SPREAD(x) for x in every lane, WIDENED(p) for int8 as float32, JOINED(p, apart) for 16 bytes of each of LANES / 4 keys, and
   the interleavings LOW32, HIGH32, LOW64 and HIGH64 within 16 bytes; all are undefined again here.

   Of many queries a lane is a query: scores are [positions, queries], so that their largest and their sum need nothing across lanes, and keys
   are read as they lie. Of few, as in a step, most lanes would be idle, so there a lane is a key. Both add up the same numbers in the same
   order. */

typedef float JOIN(lanes, SET) __attribute__((vector_size(4 * LANES)));
typedef float JOIN(lanes_there, SET) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever an array lies */
typedef int32_t JOIN(places, SET) __attribute__((vector_size(4 * LANES), may_alias));
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

/* Scales the sums [queries, WIDEST] of some queries, and adds the values of some positions, each as often as it weighs (weights of queries
   are `across` numbers apart, those of positions `along`), at `vectors` vectors; with `left` they are that many numbers of one. */
INLINE TARGET void NAME(add)(const int queries, const int vectors, const long left, const float *weights, const long across, const long along,
                             const long keys, const float *value, const long width, const float *scales, float *sums) {
    lanes sum[QUERIES][4];
    EACH(q, queries)
        EACH(v, vectors) sum[q][v] = AT(sums + q * WIDEST + v * LANES) * SPREAD(scales[q]);
    for (long k = 0; k < keys; k++) {
        lanes one[4];
        EACH(v, vectors) one[v] = left ? NAME(rest)(value + k * width, left) : (lanes)AT(value + k * width + v * LANES);
        EACH(q, queries)
            EACH(v, vectors) sum[q][v] = FMA(SPREAD(weights[q * across + k * along]), one[v], sum[q][v]);
    }
    EACH(q, queries)
        EACH(v, vectors) AT(sums + q * WIDEST + v * LANES) = sum[q][v];
}

INLINE TARGET void NAME(add_some)(const int queries, const float *weights, const long across, const long along, const long keys, const float *value,
                                  const long width, const float *scales, float *sums) {
    long at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES)
        NAME(add)(queries, 4, 0, weights, across, along, keys, value + at, width, scales, sums + at);
    for (; at + LANES <= width; at += LANES) NAME(add)(queries, 1, 0, weights, across, along, keys, value + at, width, scales, sums + at);
    if (at < width) NAME(add)(queries, 1, width - at, weights, across, along, keys, value + at, width, scales, sums + at);
}

INLINE TARGET void NAME(add_all)(const long count, const float *weights, const long across, const long along, const long keys, const float *value,
                                 const long width, const float *scales, float *sums) {
    long q = 0;
    for (; q + QUERIES <= count; q += QUERIES)
        NAME(add_some)(QUERIES, weights + q * across, across, along, keys, value, width, scales + q, sums + q * WIDEST);
    for (; q + 3 <= count; q += 3) NAME(add_some)(3, weights + q * across, across, along, keys, value, width, scales + q, sums + q * WIDEST);
    for (; q < count; q++) NAME(add_some)(1, weights + q * across, across, along, keys, value, width, scales + q, sums + q * WIDEST);
}

/* Some numbers of a cache as float32: where they lie, or in `room`. */
INLINE TARGET const float *NAME(widen)(const int int8, const void *from, const long count, float *room) {
    if (!int8) return from;
    const int8_t *numbers = from;
    long i = 0;
    for (; i + LANES <= count; i += LANES) AT(room + i) = WIDENED(numbers + i);
    for (; i < count; i++) room[i] = numbers[i];
    return room;
}

/* The numbers [width, LANES] of keys that lie `apart` bytes from each other, a multiple of 16 bytes of each. */
INLINE TARGET void NAME(turn)(const int int8, const char *keys, const long apart, const long bytes, float *turned) {
    for (long at = 0; at < bytes; at += 16) {
        places part[4], even[2], odd[2];
        EACH(i, 4) part[i] = JOINED(keys + at + i * apart, 4 * apart);
        EACH(i, 2) {
            even[i] = (places)LOW32(part[2 * i], part[2 * i + 1]);
            odd[i] = (places)HIGH32(part[2 * i], part[2 * i + 1]);
        }
        part[0] = LOW64(even[0], even[1]);
        part[1] = HIGH64(even[0], even[1]);
        part[2] = LOW64(odd[0], odd[1]);
        part[3] = HIGH64(odd[0], odd[1]);
        EACH(i, 4) {
            if (int8) {
                EACH(byte, 4)
                    AT(turned + (at + 4 * i + byte) * LANES) = __builtin_convertvector((part[i] << (24 - 8 * byte)) >> 24, lanes);
            } else
                AT(turned + (at / 4 + i) * LANES) = (lanes)part[i];
        }
    }
}

/* The queries of a unit, by number, and the positions that they see. */
struct JOIN(span, SET) {
    const float *from[MOST];
    float sink[MOST];
    int32_t firsts[MOST], lasts[MOST];
    long begin, end;
};

INLINE TARGET void NAME(describe)(const struct run *run, const struct unit *unit, const long queries, struct JOIN(span, SET) *span) {
    const struct attention *op = run->op;
    span->begin = run->length;
    span->end = 0;
    for (long q = 0; q < queries; q++) {
        const long query = unit->first + (q < unit->count ? q : 0), head = unit->head * run->each + query % run->each;
        const long token = unit->token + query / run->each, last = run->positions[token];
        const long first = op->window > 0 && last >= op->window ? last - op->window + 1 : 0;
        span->from[q] = run->queries + (token * op->heads + head) * run->width;
        span->firsts[q] = first;
        span->lasts[q] = last;
        span->sink[q] = run->sinks ? run->sinks[head] : -1e30f;
        span->begin = first < span->begin ? first : span->begin;
        span->end = last >= span->end ? last + 1 : span->end;
    }
}

/* A score as it counts: capped, and at positions that the query does not see so small that it weighs nothing. */
INLINE TARGET lanes NAME(seen)(const lanes score, const float cap, const places place, const places first, const places last) {
    return NAME(pick)((place >= first) & (place <= last), cap > 0 ? NAME(capped)(score, cap) : score, SPREAD(-1e30f));
}

INLINE TARGET lanes NAME(weigh)(const lanes score, const lanes most) {
    return NAME(pick)(score <= SPREAD(-1e30f), (lanes){0}, NAME(exponential)(score - most));
}

INLINE TARGET void NAME(put)(const struct run *run, const struct unit *unit, const struct JOIN(span, SET) *span, const float *sums, const float *totals) {
    const float *scales = run->value_scales + unit->head * run->width;
    for (long q = 0; q < unit->count; q++)
        for (long i = 0; i < run->width; i++) {
            const float mean = sums[q * WIDEST + i] / totals[q];
            run->out[span->from[q] - run->queries + i] = run->op->int8 ? mean * scales[i] : mean;
        }
}

INLINE TARGET void NAME(attend_many)(const int vectors, const struct run *run, const struct unit *unit) {
    const int int8 = run->op->int8;
    const long width = run->width, base = (run->rows[unit->token] * run->op->kv_heads + unit->head) * run->length;
    const long bytes = width * (int8 ? sizeof(int8_t) : sizeof(float));
    const char *keys = (const char *)run->keys + base * bytes, *values = (const char *)run->values + base * bytes;
    float queries[WIDEST * MOST], scores[BLOCK * MOST], sums[MOST * WIDEST], scales[MOST], totals[MOST], room[BLOCK * WIDEST];
    struct JOIN(span, SET) span;
    NAME(describe)(run, unit, MOST, &span);
    for (long i = 0; i < width; i++)
        for (long q = 0; q < vectors * LANES; q++) queries[i * MOST + q] = span.from[q][i];
    lanes largest[VECTORS], total[VECTORS];
    EACH(v, vectors) {
        largest[v] = AT(span.sink + v * LANES);
        total[v] = SPREAD(run->sinks ? 1.0f : 0.0f);
    }
    for (long q = 0; q < unit->count; q++) memset(sums + q * WIDEST, 0, width * sizeof(float));
    for (long block = span.begin / BLOCK * BLOCK; block < span.end; block += BLOCK) {
        const long start = block < span.begin ? span.begin : block, stop = block + BLOCK < span.end ? block + BLOCK : span.end;
        const float *some = NAME(widen)(int8, keys + start * bytes, (stop - start) * width, room);
        long k = start;
        for (; k + KEYS <= stop; k += KEYS, some += KEYS * width) NAME(score)(vectors, KEYS, queries, some, width, scores + (k - start) * MOST);
        for (; k < stop; k++, some += width) NAME(score)(vectors, 1, queries, some, width, scores + (k - start) * MOST);
        EACH(v, vectors) {
            places first, last;
            memcpy(&first, span.firsts + v * LANES, sizeof first);
            memcpy(&last, span.lasts + v * LANES, sizeof last);
            float *const own = scores + v * LANES;
            lanes most = largest[v], parts[4] = {{0}};
            for (k = start; k < stop; k++) {
                const lanes one = NAME(seen)(AT(own + (k - start) * MOST), run->op->softcap, (places){0} + (int32_t)k, first, last);
                AT(own + (k - start) * MOST) = one;
                most = NAME(pick)(one > most, one, most);
            }
            for (k = start; k < stop; k++) parts[k % 4] += AT(own + (k - start) * MOST) = NAME(weigh)(AT(own + (k - start) * MOST), most);
            const lanes scale = NAME(exponential)(largest[v] - most);
            largest[v] = most;
            total[v] = total[v] * scale + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
            AT(scales + v * LANES) = scale;
        }
        some = NAME(widen)(int8, values + start * bytes, (stop - start) * width, room);
        NAME(add_all)(unit->count, scores, 1, MOST, stop - start, some, width, scales, sums);
    }
    EACH(v, vectors) AT(totals + v * LANES) = total[v];
    NAME(put)(run, unit, &span, sums, totals);
}

/* Scores of some queries, [queries, BLOCK], and of the keys `turned`. */
INLINE TARGET void NAME(score_turned)(const int queries, const float *const *from, const float *turned, const long width, float *scores) {
    lanes sum[4];
    EACH(q, queries) sum[q] = (lanes){0};
    for (long i = 0; i < width; i++) {
        const lanes key = AT(turned + i * LANES);
        EACH(q, queries) sum[q] = FMA(key, SPREAD(from[q][i]), sum[q]);
    }
    EACH(q, queries) AT(scores + q * BLOCK) = sum[q];
}

/* The same of up to FEW queries. */
INLINE TARGET void NAME(attend_few)(const struct run *run, const struct unit *unit) {
    const int int8 = run->op->int8;
    const long width = run->width, base = (run->rows[unit->token] * run->op->kv_heads + unit->head) * run->length, count = unit->count;
    const long bytes = width * (int8 ? sizeof(int8_t) : sizeof(float)), whole = (bytes + 15) / 16 * 16;
    const char *keys = (const char *)run->keys + base * bytes, *values = (const char *)run->values + base * bytes;
    float scores[FEW * BLOCK], sums[FEW * WIDEST], turned[(WIDEST + 15) * LANES], room[BLOCK * WIDEST];
    float largest[LANES], total[LANES], scales[LANES], mosts[LANES];
    char last_keys[LANES * (WIDEST * sizeof(float) + 16)];
    struct JOIN(span, SET) span;
    places step;
    EACH(i, LANES) step[i] = i;
    NAME(describe)(run, unit, LANES, &span);
    AT(largest) = AT(mosts) = AT(span.sink);
    AT(total) = SPREAD(run->sinks ? 1.0f : 0.0f);
    for (long q = 0; q < count; q++) memset(sums + q * WIDEST, 0, width * sizeof(float));
    for (long block = span.begin / BLOCK * BLOCK; block < span.end; block += BLOCK) {
        const long start = block < span.begin ? (span.begin - block) / LANES * LANES : 0, stop = (block + BLOCK < span.end ? block + BLOCK : span.end) - block;
        for (long k = start; k < stop; k += LANES) {
            const char *some = keys + (block + k) * bytes;
            /* the next block's numbers come meanwhile: the processor itself does not look beyond a page */
            for (long at = 0; at < LANES * bytes; at += 64) {
                __builtin_prefetch(some + BLOCK * bytes + at);
                __builtin_prefetch(values + (block + BLOCK + k) * bytes + at);
            }
            if (k + LANES > stop || whole > bytes) {
                memset(last_keys, 0, LANES * whole);
                for (long i = 0; i < LANES && k + i < stop; i++) memcpy(last_keys + i * whole, some + i * bytes, bytes);
                NAME(turn)(int8, last_keys, whole, whole, turned);
            } else
                NAME(turn)(int8, some, bytes, bytes, turned);
            long q = 0;
            for (; q + 3 <= count; q += 3) NAME(score_turned)(3, span.from + q, turned, width, scores + q * BLOCK + k);
            for (; q < count; q++) NAME(score_turned)(1, span.from + q, turned, width, scores + q * BLOCK + k);
        }
        for (long q = 0; q < count; q++) {
            const places first = (places){0} + span.firsts[q], last = (places){0} + span.lasts[q];
            float *const own = scores + q * BLOCK;
            lanes most = SPREAD(largest[q]);
            for (long k = start; k < stop; k += LANES) {
                const lanes one = NAME(seen)(AT(own + k), run->op->softcap, step + (int32_t)(block + k), first, last);
                AT(own + k) = one;
                most = NAME(pick)(one > most, one, most);
            }
            for (int i = LANES / 2; i; i /= 2)
                for (int j = 0; j < i; j++) most[j] = most[j + i] > most[j] ? most[j + i] : most[j];
            mosts[q] = most[0];
        }
        AT(scales) = NAME(exponential)(AT(largest) - AT(mosts));
        for (long q = 0; q < count; q++) {
            float *const own = scores + q * BLOCK;
            four parts = {0};
            for (long k = start; k < stop; k += LANES) AT(own + k) = NAME(weigh)(AT(own + k), SPREAD(mosts[q]));
            for (long k = start; k < stop; k += 4) parts += *(const four *)(own + k);
            total[q] = total[q] * scales[q] + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
            largest[q] = mosts[q];
        }
        const float *some = NAME(widen)(int8, values + (block + start) * bytes, (stop - start) * width, room);
        NAME(add_all)(count, scores + start, BLOCK, 1, stop - start, some, width, scales, sums);
    }
    NAME(put)(run, unit, &span, sums, total);
}

static TARGET void NAME(attend)(const struct run *run, const struct unit *unit) {
    if (unit->count <= FEW)
        NAME(attend_few)(run, unit);
    else if (unit->count <= LANES)
        NAME(attend_many)(1, run, unit);
    else if (unit->count <= 2 * LANES)
        NAME(attend_many)(2, run, unit);
    else
        NAME(attend_many)(3, run, unit);
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
#undef FEW
#undef WIDENED
#undef QUARTER
#undef JOINED
#undef LOW32
#undef HIGH32
#undef LOW64
#undef HIGH64
