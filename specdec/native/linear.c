/* y = x W^T + b for a few rows x and a large matrix W, packed in panels of sixteen outputs.
 *
 * A panel holds its weights input by input, so that one input's sixteen weights lie side by side. Every output is
 * summed over the inputs in order, whatever the number of rows: a row's result does not depend on its neighbours.
 */
#include <omp.h>

#include "kernels.h"
#include "vectors.h"

#define AHEAD 1024 /* bytes behind a single row's weights from which the next ones are fetched */
#define MANY 24    /* rows from which widening a panel first costs less than widening it for every few rows */

typedef struct {
    const float *x;    /* [rows, inputs] */
    const void *w;     /* [panels, inputs, 16] */
    const float *bias; /* [panels * 16] or NULL */
    void *y;           /* [rows, outputs] */
    long inputs, outputs;
    int y_type;
} Product;

/* Sixteen bits or thirty-two, with the bias, and only as far as there are outputs. */
INLINE void put(const Product *p, long row, long out, floats y) {
    if (p->bias) y += *(const floats *)(p->bias + out);
    if (out + LANES <= p->outputs) {
        store(p->y, row * p->outputs + out, p->y_type, y);
    } else if (out < p->outputs) {
        float last[LANES];
        const long size = p->y_type == BFLOAT16 ? 2 : 4;
        store(last, 0, p->y_type, y);
        memcpy((char *)p->y + (row * p->outputs + out) * size, last, (size_t)((p->outputs - out) * size));
    }
}

/* `rows` rows by `panels` panels at `w`, the first of them panel number `panel`; type and counts are constants once
 * inlined. Meanwhile the memory at `ahead` is fetched, a line an input: the weights that come next. */
INLINE void block(const Product *p, const void *w, int type, const char *ahead, long row, long panel, const int rows,
                  const int panels) {
    floats total[ROWS * PARTS];
    const int wide = panels * PARTS;
    const float *x = p->x + row * p->inputs;
    const long step = p->inputs * PANEL;
    UNROLL for (int i = 0; i < rows * wide; i++) total[i] = (floats){0};
    for (long k = 0; k < p->inputs; k++) {
        floats weights[ROWS * PARTS];
        UNROLL for (int i = 0; i < wide; i++)
            weights[i] = load(w, i / PARTS * step + k * PANEL + i % PARTS * LANES, type);
        if (ahead) __builtin_prefetch(ahead + k * 64);
        if (rows == 1 && type == BFLOAT16) /* narrow weights are used up sooner than the processor fetches the next */
            UNROLL for (int i = 0; i < panels; i++) __builtin_prefetch((const char *)w + 2 * (i * step + k * PANEL) + AHEAD);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int i = 0; i < wide; i++) total[r * wide + i] += weights[i] * x[r * p->inputs + k];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int i = 0; i < wide; i++) put(p, row + r, panel * PANEL + i * LANES, total[r * wide + i]);
    }
}

/* A single row takes several panels at once: enough sums in flight to hide the latency of one. */
INLINE void one_row(const Product *p, int type, long panel, long last) {
    const long step = p->inputs * PANEL * (type == BFLOAT16 ? 2 : 4);
    const char *w = (const char *)p->w + panel * step;
    for (; panel + ROWS / 2 <= last; panel += ROWS / 2, w += ROWS / 2 * step)
        block(p, w, type, NULL, 0, panel, 1, ROWS / 2);
    for (; panel < last; panel++, w += step) block(p, w, type, NULL, 0, panel, 1, 1);
}

/* A function for each number of rows that share a panel. */
#define UNDER(rows)                                                                                                    \
    static void under_##rows(const Product *p, const void *w, int type, const char *ahead, long row, long panel) {     \
        if (type == BFLOAT16) block(p, w, BFLOAT16, ahead, row, panel, rows, 1);                                       \
        else block(p, w, FLOAT32, ahead, row, panel, rows, 1);                                                         \
    }
EACH_ROWS(UNDER)
#define ENTRY(rows) [rows] = under_##rows,
static void (*const under[ROWS + 1])(const Product *p, const void *w, int type, const char *ahead, long row,
                                     long panel) = {EACH_ROWS(ENTRY)};

/* One panel of weights under all rows, in blocks of about as many; the first one fetches what comes next. */
static void under_rows(const Product *p, const void *w, int type, const char *next, long rows, long panel) {
    const long blocks = (rows + ROWS - 1) / ROWS;
    for (long i = 0; i < blocks; i++) {
        const long row = rows * i / blocks, below = rows * (i + 1) / blocks;
        under[below - row](p, w, type, i ? NULL : next, row, panel);
    }
}

/* Several rows share each panel; where they are many, narrow weights are widened once for all of them. */
static void few_rows(const Product *p, int type, long rows, long panel, long last, float *room) {
    const long weights = p->inputs * PANEL, step = weights * (type == BFLOAT16 ? 2 : 4);
    const char *w = (const char *)p->w + panel * step;
    for (; panel < last; panel++, w += step) {
        if (room) {
            for (long i = 0; i < weights; i += LANES) store(room, i, FLOAT32, load(w, i, type));
            under_rows(p, room, FLOAT32, w + step, rows, panel);
        } else {
            under_rows(p, w, type, w + step, rows, panel);
        }
    }
}

/* Panels are dealt to threads in runs; rows in strips, so that their inputs stay near. Returns 1 without memory. */
int specdec_linear(const float *x, const void *w, const float *bias, void *y, long rows, long inputs, long outputs,
                   int weight_type, int y_type, int threads) {
    const long strip = 48, panels = (outputs + PANEL - 1) / PANEL, size = y_type == BFLOAT16 ? 2 : 4;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        long mine = omp_get_thread_num(), of = omp_get_num_threads();
        long first = panels * mine / of, last = panels * (mine + 1) / of;
        const int widen = weight_type == BFLOAT16 && rows >= MANY;
        float *room = widen ? scratch((size_t)(inputs * PANEL)) : NULL;
        failed |= widen && !room;
        for (long row = 0; row < rows && !failed; row += strip) {
            long many = rows - row < strip ? rows - row : strip;
            Product p = {x + row * inputs, w, bias, (char *)y + row * outputs * size, inputs, outputs, y_type};
            if (many > 1) few_rows(&p, weight_type, many, first, last, room);
            else if (weight_type == BFLOAT16) one_row(&p, BFLOAT16, first, last);
            else one_row(&p, FLOAT32, first, last);
        }
    }
    return failed;
}
