/* Whom a row sees: committed keys, then tree rows by ancestor bit, within its window. */
#ifndef SPECDEC_VISIBLE_H
#define SPECDEC_VISIBLE_H

#include <math.h>

#include "kernels.h"
#include "vectors.h"

/* Keys that row `n` of request `b` may see at all: everything behind is hidden. */
INLINE long end_of(const Attention *a, long b, long n) {
    if (!a->ancestors) return a->lengths[b] + n + 1;
    return a->lengths[b] + a->offset + a->rows;
}

/* Hide what row `n` must not see of its first `total` scores, which stand `step` apart. */
INLINE void hide(const Attention *a, long b, long n, float *scores, long total, long step) {
    const long length = a->lengths[b];
    if (a->ancestors) {
        const uint64_t word = (uint64_t)a->ancestors[b * a->rows + n];
        for (long j = length; j < total; j++)
            if (j - length > 63 || !((word >> (j - length)) & 1)) scores[j * step] = -INFINITY;
    } else {
        for (long j = length + n + 1; j < total; j++) scores[j * step] = -INFINITY;
    }
    if (a->window <= 0) return;
    const long position = a->positions[b * a->rows + n];
    for (long j = 0; j < total; j++) {
        const long at = j < length || !a->ancestors ? j : a->tree[b * a->tree_rows + j - length];
        if (position - at >= a->window) scores[j * step] = -INFINITY;
    }
}

#endif
