/* A head's distribution against the target's: losses of rows of logits and their gradients, a row at a time in cache.
 * Every loss is alike: d loss / d logit = a (q - p) + b (q S - u),  u = q where q < p, S = sum u; see training/losses.py.
 */
#include <math.h>

#include "exponential.h"
#include "kernels.h"

#define NOTHING (-1e30f) /* a logit of probability zero, and no infinity: zero times it is zero */
#define SMALLEST 1e-6f   /* overlap below which its logarithm is cut, as in training/losses.py */

enum { KL = 0, TV = 1, LK = 2, ALPHA = 3 };

/* ln x for normal x > 0, to about 1 ulp (Cephes logf); 0 for anything smaller, which p ln p has no use for. */
INLINE floats logarithm(floats x) {
    ints none = ~(x >= 1.17549435e-38f);
    words bits = (words)x;
    ints n = (ints)(bits >> 23) - 126;
    floats m = (floats)((bits & 0x007fffffu) | 0x3f000000u); /* 1/2 <= m < 1 */
    ints low = m < 0.707106781186547524f;
    n += low; /* -1 where true */
    m = m + (floats)((ints)m & low) - 1.0f;
    floats e = __builtin_convertvector(n, floats), z = m * m;
    floats y = m * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
    return (floats)((ints)(m + y + e * 0.693359375f) & ~none);
}

INLINE float total(floats x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* `width` entries of a row to floats, filled up to whole registers; returns the largest. */
INLINE float widened(const void *from, long start, long width, int type, float *to, float filling) {
    floats top = (floats){0} - INFINITY;
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        floats v = load(from, start + i, type);
        ints more = v > top;
        top = (floats)(((ints)v & more) | ((ints)top & ~more));
        *(floats *)(to + i) = v;
    }
    float most = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) most = top[lane] > most ? top[lane] : most;
    for (; i < width; i++) {
        to[i] = entry(from, start + i, type);
        most = to[i] > most ? to[i] : most;
    }
    for (; i % LANES; i++) to[i] = filling;
    return most;
}

INLINE long first_of(const float *x, long width, float value) {
    long i = 0;
    while (i < width && x[i] != value) i++;
    return i;
}

typedef struct {
    float loss, overlap;
    int hit;
} Grade;

/* One row; its logits become the gradient of weight * loss. x and p: room for the row, in whole registers. */
INLINE Grade grade(const Grading *g, long row, int type, float *x, float *p) {
    const long width = g->width, padded = (width + LANES - 1) / LANES * LANES;
    const float most = widened(g->logits, row * width, width, type, x, NOTHING);
    const float likeliest = widened(g->probs, g->index[row] * width, width, type, p, 0);
    Grade found = {.hit = first_of(x, width, most) == first_of(p, width, likeliest)};
    floats sums = {0}, scores = {0}, entropies = {0}, masses = {0};
    for (long i = 0; i < padded; i += LANES) {
        floats v = *(floats *)(x + i) - most, mass = *(floats *)(p + i);
        scores += mass * v;
        entropies += mass * logarithm(mass);
        masses += mass;
        v = exponential(v);
        sums += v;
        *(floats *)(x + i) = v;
    }
    const float sum = total(sums), share = 1.0f / sum;
    const float kl = total(entropies) - (total(scores) - logf(sum) * total(masses));
    floats shared = {0}, under = {0};
    for (long i = 0; i < padded; i += LANES) {
        floats q = *(floats *)(x + i) * share, mass = *(floats *)(p + i);
        ints less = q < mass;
        floats below = (floats)((ints)q & less);
        shared += below + (floats)((ints)mass & ~less);
        under += below;
    }
    found.overlap = sum == sum ? total(shared) : NAN; /* q of NaN is not less than p */
    const float safe = found.overlap > SMALLEST ? found.overlap : SMALLEST, mix = expf(-g->rate * found.overlap);
    float a = 0, b = 1;
    switch (g->kind) {
    case KL: a = 1, b = 0, found.loss = kl; break;
    case TV: found.loss = 1 - found.overlap; break;
    case LK: a = mix, b = 1 - mix, found.loss = mix * kl + b * (1 - found.overlap); break;
    default: b = 1 / safe, found.loss = -logf(safe);
    }
    if (sum != sum) found.loss = NAN;
    const float weight = g->weights[row], all = total(under);
    for (long i = 0; i < padded; i += LANES) {
        floats q = *(floats *)(x + i) * share, mass = *(floats *)(p + i);
        floats below = (floats)((ints)q & (q < mass));
        *(floats *)(x + i) = weight * (a * (q - mass) + b * (q * all - below));
    }
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(g->logits, row * width + i, type, *(floats *)(x + i));
    if (i < width) {
        uint32_t rest[LANES];
        store(rest, 0, type, *(floats *)(x + i));
        const size_t each = type == FLOAT32 ? 4 : 2;
        memcpy((char *)g->logits + (size_t)(row * width + i) * each, rest, (size_t)(width - i) * each);
    }
    return found;
}

/* Not 0 when memory ran out; the logits are then half gradients. */
int specdec_grade(const Grading *g) {
    const long padded = (g->width + LANES - 1) / LANES * LANES;
    int failed = 0;
#pragma omp parallel num_threads(g->threads) reduction(| : failed)
    {
        float *room = scratch((size_t)(2 * padded));
        failed |= room == NULL;
#pragma omp for schedule(static)
        for (long row = 0; row < g->rows; row++) {
            if (room == NULL) continue;
            const Grade found = g->type == BFLOAT16 ? grade(g, row, BFLOAT16, room, room + padded)
                                                    : grade(g, row, FLOAT32, room, room + padded);
            g->loss[row] = found.loss, g->overlap[row] = found.overlap, g->hit[row] = (uint8_t)found.hit;
        }
    }
    return failed;
}
