/* The largest entries of a row: the one and where it stands first, or some with their log-probabilities. What is not a
 * number counts as largest.
 */
#include <math.h>

#include "exponential.h"
#include "kernels.h"

#define STRETCH 1024 /* entries that are searched for the largest once it is known to be among them */
#define MOST 32      /* entries of a row that are kept in order */

/* The largest of entries first..last, or NaN where one of them is. */
INLINE float largest(const void *x, int type, long first, long last) {
    floats top = (floats){0} - INFINITY;
    ints odd = {0};
    long i = first;
    for (; i + LANES <= last; i += LANES) {
        floats v = load(x, i, type);
        ints more = v > top;
        top = (floats)(((ints)v & more) | ((ints)top & ~more));
        odd |= v != v;
    }
    if (any(odd)) return NAN;
    float most = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) most = top[lane] > most ? top[lane] : most;
    for (; i < last; i++) {
        const float v = entry(x, i, type);
        if (v != v) return NAN;
        most = v > most ? v : most;
    }
    return most;
}

/* Where, from entry `start` on, the largest of `width` entries stands first, counted from there. */
INLINE long place_of(const void *x, int type, long start, long width) {
    float most = -INFINITY;
    long stretch = 0;
    for (long i = 0; i < width && most == most; i += STRETCH) {
        const long end = i + STRETCH < width ? i + STRETCH : width;
        const float here = largest(x, type, start + i, start + end);
        if (here > most || here != here) most = here, stretch = i;
    }
    for (long i = stretch;; i++) {
        const float v = entry(x, start + i, type);
        if (v == most || (v != v && most != most)) return i;
    }
}

/* places [rows] of rows [rows, width]. */
void specdec_largest(const void *x, int64_t *places, long rows, long width, int type, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++)
        places[r] = type == BFLOAT16 ? place_of(x, BFLOAT16, r * width, width) : place_of(x, FLOAT32, r * width, width);
}

/* Sixteen entries, or as many as there are before `width`, the rest minus infinity. */
INLINE floats some(const void *x, int type, long start, long i, long width) {
    if (i + LANES <= width) return load(x, start + i, type);
    floats v = (floats){0} - INFINITY;
    for (int lane = 0; i + lane < width; lane++) v[lane] = entry(x, start + i + lane, type);
    return v;
}

/* ln of the sum of exponentials, summed lane by lane and stretch by stretch whatever stands beside the row. */
INLINE float log_sum(const void *x, int type, long start, long width) {
    const float most = largest(x, type, start, start + width);
    floats sums = {0};
    for (long first = 0; first < width; first += STRETCH) {
        floats part = {0};
        for (long i = first; i < width && i < first + STRETCH; i += LANES)
            part += exponential(some(x, type, start, i, width) - most);
        sums += part;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return most + logf(sum);
}

/* The `count` largest of a row, at most MOST and no more than there are, the first of equals first. */
INLINE void top(const void *x, int type, long start, long width, long count, float *values, int64_t *places) {
    const float whole = log_sum(x, type, start, width);
    float kept[MOST];
    long have = 0;
    for (long i = 0; i < width; i += LANES) {
        const floats v = some(x, type, start, i, width);
        if (have == count && !any(v > kept[count - 1])) continue;
        for (int lane = 0; lane < LANES && i + lane < width; lane++) {
            long at = have;
            if (have == count && !(v[lane] > kept[--at])) continue;
            for (; at > 0 && v[lane] > kept[at - 1]; at--) kept[at] = kept[at - 1], places[at] = places[at - 1];
            kept[at] = v[lane], places[at] = i + lane;
            have += have < count;
        }
    }
    for (long at = 0; at < count; at++) values[at] = kept[at] - whole;
}

/* Log-probabilities and places [rows, count] of rows [rows, width] of logits. */
void specdec_top(const void *x, float *values, int64_t *places, long rows, long width, long count, int type,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++) {
        if (type == BFLOAT16) top(x, BFLOAT16, r * width, width, count, values + r * count, places + r * count);
        else top(x, FLOAT32, r * width, width, count, values + r * count, places + r * count);
    }
}
