/* One block of a weight, once more for each instruction set and each way of storing: the includer defines NAME(x), TARGET, the vectors, and
   what a stored number is; TYPE and PLAIN are undefined again here.

   STORED is its type in memory, READ(p) reads LANES of them as float32, ROUND(x) rounds LANES float32 to nearest (ties to even) to a CODE,
   which BACK(code) reads as float32 again; WRITE(a, b, p) stores two of them. Where there is a NAN_CODE(x), ROUND does not hold for NaN, and that does.
   EXACT says that no number is rounded when it is stored, so that the sum itself is what was rounded; PLAIN that there is no weight, and
   the change is what is stored. */

/* Some rows of TILES vectors: new = old + sum_k up[k] down[k], added up in the order of k with one rounding a step (fused multiply-add). */
INLINE TARGET void NAME(tile)(const int rows, const int careful, const STORED *raw, STORED *out, const long stride, const float *up,
                              const long rank, const float *panel, lanes *error, lanes *inner, bits *moved) {
    lanes sum[ROWS][TILES];
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
        for (int t = 0; t < TILES; t += 2) {
            CODE codes[2];
            for (int u = 0; u < 2; u++) {
                const lanes change = sum[i][t + u];
                if (PLAIN) {
                    codes[u] = ROUND(change);
                    continue;
                }
                const lanes old = READ(raw + i * stride + (t + u) * LANES), new = old + change;
                codes[u] = ROUND(new);
#ifdef NAN_CODE
                if (careful) {
                    const bits nan = (bits)(new != new);
                    codes[u] = (codes[u] & ~nan) | (NAN_CODE(new) & nan);
                }
#endif
                const lanes back = BACK(codes[u]), lost = EXACT ? (new - old) - change : back - new;
                *error += lost * lost;
                *inner += lost * change;
                *moved |= (bits)back ^ (bits)old;
            }
            WRITE(codes[0], codes[1], out + i * stride + t * LANES);
        }
}

/* Some rows of a panel that reaches beyond the last column: through a copy that does. */
INLINE TARGET void NAME(edge)(const int rows, const int careful, const STORED *raw, STORED *out, const long stride, const long left,
                              const float *up, const long rank, const float *panel, lanes *error, lanes *inner, bits *moved) {
    STORED before[ROWS * PANEL] = {0}, after[ROWS * PANEL];
    for (int i = 0; i < rows && !PLAIN; i++) memcpy(before + i * PANEL, raw + i * stride, left * sizeof(STORED));
    for (int c = 0; c < PANEL; c += TILES * LANES)
        NAME(tile)(rows, careful, before + c, after + c, PANEL, up, rank, panel + c, error, inner, moved);
    for (int i = 0; i < rows; i++) memcpy(out + i * stride, after + i * PANEL, left * sizeof(STORED));
}

/* Some rows of all columns. */
INLINE TARGET void NAME(rows)(const int rows, const int careful, const struct block *b, const long row, struct sums *sums) {
    const float *up = b->up + row * b->rank;
    STORED *out = (STORED *)b->out + row * b->columns;
    const STORED *raw = PLAIN ? out : (const STORED *)b->raw + row * b->columns;
    const long whole = b->columns / PANEL * PANEL;
    lanes error = {0}, inner = {0};
    bits moved = {0};
    for (long c = 0; c < whole; c += TILES * LANES)
        NAME(tile)(rows, careful, raw + c, out + c, b->columns, up, b->rank, b->panels + c / PANEL * PANEL * b->rank + c % PANEL, &error,
                   &inner, &moved);
    if (whole < b->columns)
        NAME(edge)(rows, careful, raw + whole, out + whole, b->columns, b->columns - whole, up, b->rank, b->panels + whole * b->rank, &error,
                   &inner, &moved);
    for (int lane = 0; lane < LANES; lane++) { /* short sums in float32, long ones in float64 */
        sums->error += error[lane];
        sums->inner += inner[lane];
        sums->moved |= moved[lane] != 0;
    }
}

TARGET static void NAME(run)(const struct block *b, struct sums *sums) {
    for (long row = 0, rows; row < b->rows; row += rows) {
        struct sums added = {0, 0, 0};
        rows = b->rows - row >= ROWS ? ROWS : 1;
        if (rows == ROWS)
            NAME(rows)(ROWS, 0, b, row, &added);
        else
            NAME(rows)(1, 0, b, row, &added);
#ifdef NAN_CODE
        if (added.error != added.error) /* so it is wherever a number is not finite */
            for (long r = row; r < row + rows; r++) {
                if (r == row) added = (struct sums){0, 0, 0};
                NAME(rows)(1, 1, b, r, &added);
            }
#endif
        sums->error += added.error;
        sums->inner += added.inner;
        sums->moved |= added.moved;
    }
}

#undef TYPE
#undef PLAIN
