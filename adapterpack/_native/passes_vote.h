/* TIES' vote, once more for each instruction set: the includer defines NAME(x) and TARGET. */

/* One place of LANES entries of all changes: trimmed, voted on, and what agrees added up. The steps and their order are those of numpy's
   way (see __init__.py), each rounded for itself. parts hold what each change votes; equal says that all weights are of one size. */
INLINE TARGET lanes NAME(place)(const struct votes *v, const long terms, const int equal, const float *values, const long stride,
                                lanes_there *parts) {
    lanes up = {0}, lead = {0};
    for (long t = 0; t < terms; t++) {
        const lanes x = (lanes)*(const lanes_there *)(values + t * stride);
        const lanes part = CHOSEN(~((lanes)((bits)x & 0x7FFFFFFF) < v->least[t]), x) * v->weights[t];
        parts[t] = (lanes_there)part;
        up += CHOSEN(part > 0, part);
        lead += part;
    }
    const bits won = (bits)(lead > 0);
    const lanes lost = lead - up, votes = up - lost;
    lanes merged = (lanes)((won & (bits)up) | (~won & (bits)lost));
    if (v->normalize) {
        lanes counted = {0}, count = {0};
        for (long place = 0; place < terms; place++) {
            const lanes part = (lanes)parts[equal ? place : v->order[place]];
            const bits with = (won & (bits)(part > 0)) | (~won & (bits)(part < 0));
            count += CHOSEN(with, (lanes){0} + 1);
            if (place + 1 == terms || (!equal && v->sizes[place + 1] != v->sizes[place])) {
                counted += count * v->sizes[place];
                count = (lanes){0};
            }
        }
        const bits none = (bits)(counted < FLT_MIN);
        merged /= (lanes)((none & (bits)((lanes){0} + FLT_MIN)) | (~none & (bits)counted));
    }
    const lanes size = (lanes)((bits)lead & 0x7FFFFFFF);
    return CHOSEN(size > votes * v->tie, merged);
}

TARGET static void NAME(elect)(const struct votes *v) {
    const long whole = v->count - v->count % LANES, left = v->count - whole;
    if (v->terms == 2 && v->sizes[0] == v->sizes[1]) { /* the most frequent: both parts stay in registers */
        lanes_there parts[2];
        for (long at = 0; at < whole; at += LANES)
            *(lanes_there *)(v->out + at) = (lanes_there)NAME(place)(v, 2, 1, v->values + at, v->count, parts);
    } else {
        for (long at = 0; at < whole; at += LANES)
            *(lanes_there *)(v->out + at) = (lanes_there)NAME(place)(v, v->terms, 0, v->values + at, v->count, v->parts);
    }
    if (!left) return;
    float last[LANES]; /* where the last entries are fewer: each change's through a copy that is as wide */
    memset(v->scratch, 0, v->terms * LANES * sizeof(float));
    for (long t = 0; t < v->terms; t++) memcpy(v->scratch + t * LANES, v->values + t * v->count + whole, left * sizeof(float));
    *(lanes_there *)last = (lanes_there)NAME(place)(v, v->terms, 0, v->scratch, LANES, v->parts);
    memcpy(v->out + whole, last, left * sizeof(float));
}

/* Counts the lower halves of the magnitudes whose upper half is this one. They are few: most places are passed by at once. */
TARGET static void NAME(lower)(const uint32_t *values, const long count, const uint32_t upper, int64_t *counts) {
    const long whole = count - count % LANES;
    for (long at = 0; at < whole; at += LANES) {
        const bits same = (bits)((((bits)*(const bits_there *)(values + at) >> 16) & 0x7FFF) == upper);
        uint64_t any[LANES / 2];
        memcpy(any, &same, sizeof(any));
        if (!(any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])) continue;
        for (int i = 0; i < LANES; i++) counts[values[at + i] & 0xFFFF] += ((values[at + i] >> 16) & 0x7FFF) == upper;
    }
    for (long at = whole; at < count; at++) counts[values[at] & 0xFFFF] += ((values[at] >> 16) & 0x7FFF) == upper;
}
