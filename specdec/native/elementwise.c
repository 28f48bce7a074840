/* What stands between the products of a decoder layer, one pass over each row: RMS norm and the gated activation.
 *
 * They round where torch's operations round, and the sum of squares runs in a fixed order.
 */
#include <math.h>

#include "exponential.h"
#include "kernels.h"

INLINE floats rounded(floats x, int type) {
    if (type == FLOAT32) return x;
    uint16_t small[LANES];
    store(small, 0, BFLOAT16, x);
    return load(small, 0, BFLOAT16);
}

INLINE void norm(const void *from, const void *weight, void *y, int type, long r, long width, float eps) {
    floats squares = {0};
    for (long i = 0; i < width; i += LANES) {
        floats x = load(from, r * width + i, type);
        squares += x * x;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += squares[i];
    float scale = 1.0f / sqrtf(sum / (float)width + eps);
    for (long i = 0; i < width; i += LANES) {
        floats x = rounded(load(from, r * width + i, type) * scale, type);
        store(y, r * width + i, type, x * load(weight, i, type));
    }
}

/* x [rows, width] / sqrt(mean(x^2) + eps) * weight [width]; the width divides by the panel. */
void specdec_norm(const void *x, const void *weight, void *y, long rows, long width, float eps, int type, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= FEW)
    for (long r = 0; r < rows; r++) {
        if (type == BFLOAT16) norm(x, weight, y, BFLOAT16, r, width, eps);
        else norm(x, weight, y, FLOAT32, r, width, eps);
    }
}

INLINE void gate(const void *from, void *y, int type, long row, long width) {
    for (long i = 0; i < width; i += LANES) {
        floats x = load(from, 2 * row * width + i, type), up = load(from, (2 * row + 1) * width + i, type);
        ints positive = x > 0;
        floats e = exponential((floats)((words)x | 0x80000000u)); /* of -|x|: neither side overflows */
        floats top = (floats)(((ints)x & positive) | ((ints)(x * e) & ~positive));
        store(y, row * width + i, type, rounded(top / (1.0f + e), type) * up);
    }
}

/* silu(gate) * up for rows of [gate, up], each of `width`, which divides by the panel. */
void specdec_gate(const void *x, void *y, long rows, long width, int type, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++) {
        if (type == BFLOAT16) gate(x, y, BFLOAT16, r, width);
        else gate(x, y, FLOAT32, r, width);
    }
}

INLINE void turn(void *x, long at, const void *cos, const void *sin, long angle, long size, int type) {
    const long half = size / 2;
    for (long i = 0; i < half; i += LANES) {
        floats a = load(x, at + i, type), b = load(x, at + half + i, type);
        floats c = rounded(a * load(cos, angle + i, type), type);
        floats d = rounded(b * load(cos, angle + half + i, type), type);
        store(x, at + i, type, c + b * load(sin, angle + i, type));
        store(x, at + half + i, type, d + a * load(sin, angle + half + i, type));
    }
}

INLINE void place(const Placing *p, int type, long b, long n) {
    const long all = p->heads_count + 2 * p->kv_heads, bytes = p->size * (type == BFLOAT16 ? 2 : 4);
    const long first = (b * p->rows + n) * all, angle = (b * p->rows + n) * p->size;
    for (long h = 0; h < p->heads_count + p->kv_heads; h++)
        turn(p->heads, (first + h) * p->size, p->cos, p->sin, angle, p->size, type);
    for (long g = 0; g < p->kv_heads; g++) {
        long to = (p->slots[b] * p->kv_heads + g) * p->capacity + p->indices[b * p->rows + n];
        const char *key = (const char *)p->heads + (first + p->heads_count + g) * bytes;
        memcpy((char *)p->keys + to * bytes, key, (size_t)bytes);
        memcpy((char *)p->values + to * bytes, key + p->kv_heads * bytes, (size_t)bytes);
    }
}

/* In each head of each plane, `head_bytes` and `plane_bytes` apart, row at[i] moves to row to[i]. Both rise, and no row moves
 * behind itself, so that none is written before it is read. */
void specdec_keep(char *slot, long planes, long plane_bytes, long heads, long head_bytes, long row_bytes, const int64_t *to,
                  const int64_t *at, long count) {
    for (long h = 0; h < planes * heads; h++) {
        char *rows = slot + h / heads * plane_bytes + h % heads * head_bytes;
        for (long i = 0; i < count; i++) memcpy(rows + to[i] * row_bytes, rows + at[i] * row_bytes, (size_t)row_bytes);
    }
}

/* Turn queries and keys to their positions, and store keys and values; half a head divides by the lanes. */
void specdec_place(const Placing *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->batch * p->rows >= FEW)
    for (long i = 0; i < p->batch * p->rows; i++) {
        if (p->type == BFLOAT16) place(p, BFLOAT16, i / p->rows, i % p->rows);
        else place(p, FLOAT32, i / p->rows, i % p->rows);
    }
}
