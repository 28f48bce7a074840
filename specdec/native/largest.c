/* The largest entry of a row and where it stands first; what is not a number counts as largest. */
#include <math.h>

#include "kernels.h"
#include "vectors.h"

#define STRETCH 1024 /* entries that are searched for the largest once it is known to be among them */

INLINE float entry(const void *x, long at, int type) {
    if (type == FLOAT32) return ((const float *)x)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

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
    float most = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) {
        if (odd[lane]) return NAN;
        most = top[lane] > most ? top[lane] : most;
    }
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
