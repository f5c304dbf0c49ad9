/* One block of a weight, once more for each instruction set: the includer defines NAME(x), TARGET, and what a stored number is.

   STORED is its type in memory, WIDE(p) reads LANES of them as float32, NARROW(x, p) rounds LANES float32 to nearest (ties to even) and
   stores them. EXACT says that no number is rounded when it is stored, so that the sum itself is what was rounded; PLAIN that there is no
   weight, and the change is what is stored. HEIGHT is the number of rows that are added up together. */

/* Some rows of one panel: new = old + sum_k up[k] down[k], added up in the order of k with one rounding a step (fused multiply-add). */
INLINE TARGET void NAME(tile)(const int rows, const STORED *raw, STORED *out, const long stride, const float *up, const long rank,
                              const float *panel, lanes *error, lanes *inner, bits *moved) {
    lanes sum[HEIGHT][TILES];
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < TILES; t++) sum[i][t] = (lanes){0};
    for (long k = 0; k < rank; k++) {
        lanes down[TILES];
        for (int t = 0; t < TILES; t++) down[t] = (lanes)*(const lanes_there *)(panel + k * PANEL + t * LANES);
        for (int i = 0; i < rows; i++) {
            const float factor = up[i * rank + k];
            for (int t = 0; t < TILES; t++) sum[i][t] += factor * down[t];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < TILES; t++) {
            const STORED *from = raw + i * stride + t * LANES;
            STORED *to = out + i * stride + t * LANES;
            const lanes change = sum[i][t];
            if (PLAIN) {
                NARROW(change, to);
                continue;
            }
            const lanes old = WIDE(from), new = old + change;
            NARROW(new, to);
            const lanes back = WIDE(to), lost = EXACT ? (new - old) - change : back - new;
            *error += lost * lost;
            *inner += lost * change;
            *moved |= (bits)back ^ (bits)old;
        }
}

/* The same where a panel reaches beyond the last column: through a copy that does. */
INLINE TARGET void NAME(edge)(const int rows, const STORED *raw, STORED *out, const long stride, const long left, const float *up,
                              const long rank, const float *panel, lanes *error, lanes *inner, bits *moved) {
    STORED before[HEIGHT * PANEL] = {0}, after[HEIGHT * PANEL];
    for (int i = 0; i < rows && !PLAIN; i++) memcpy(before + i * PANEL, raw + i * stride, left * sizeof(STORED));
    NAME(tile)(rows, before, after, PANEL, up, rank, panel, error, inner, moved);
    for (int i = 0; i < rows; i++) memcpy(out + i * stride, after + i * PANEL, left * sizeof(STORED));
}

TARGET static void NAME(run)(const struct block *b, struct sums *sums) {
    const STORED *raw = b->raw;
    STORED *out = b->out;
    const long whole = b->columns / PANEL, left = b->columns % PANEL;
    bits moved = {0};
    for (long row = 0; row < b->rows;) {
        const int rows = b->rows - row >= HEIGHT ? HEIGHT : 1;
        const float *up = b->up + row * b->rank;
        const STORED *from = PLAIN ? out : raw + row * b->columns;
        STORED *to = out + row * b->columns;
        lanes error = {0}, inner = {0};
        for (long p = 0; p < whole; p++) {
            const float *panel = b->panels + p * b->rank * PANEL;
            if (rows == HEIGHT)
                NAME(tile)(HEIGHT, from + p * PANEL, to + p * PANEL, b->columns, up, b->rank, panel, &error, &inner, &moved);
            else
                NAME(tile)(1, from + p * PANEL, to + p * PANEL, b->columns, up, b->rank, panel, &error, &inner, &moved);
        }
        if (left)
            NAME(edge)(rows, from + whole * PANEL, to + whole * PANEL, b->columns, left, up, b->rank, b->panels + whole * b->rank * PANEL,
                       &error, &inner, &moved);
        for (int lane = 0; lane < LANES; lane++) { /* short sums in float32, long ones in float64 */
            sums->error += error[lane];
            sums->inner += inner[lane];
        }
        row += rows;
    }
    for (int lane = 0; lane < LANES; lane++) sums->moved |= moved[lane] != 0;
}
