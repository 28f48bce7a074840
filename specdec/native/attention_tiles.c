/* Attention in bfloat16 with scores by AMX tiles; the weighted values are summed as in attention.c, key after key.
 *
 * A tile takes keys as they are stored, sixteen of them by 32 of the head, and queries turned: so scores stand key by key
 * with the rows side by side, as what follows wants them. A score depends on its query and key alone, hidden keys add
 * exactly zero, and sums run over keys in order: a tree node's result is, bit by bit, what the same path gives alone.
 */
#include <math.h>
#include <omp.h>

#include "exponential.h"
#include "kernels.h"
#include "visible.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__)
#include <immintrin.h>

#include "amx.h"

#define LINE 32      /* numbers of a line of the processor's caches */
#define WIDE 16      /* keys, rows and pairs of a tile */
#define MOST_ROWS 48 /* packed query rows of one piece of work: three tiles */
#define NEARBY 64    /* keys that stay near while all rows of a piece meet their values */
#define AHEAD 32     /* keys behind those at work that are fetched */

/* Parts of a thread's scratch: turned queries, scores [keys, wide rows], results [rows, size], the last keys. */
typedef struct {
    uint16_t *turned, *last;
    float *scores, *out;
} Room;

/* Queries first..first+count of group `g`, as pairs of the head's numbers by rows; rows beyond are zeros. */
static void turn_queries(const Attention *a, long b, long g, long first, long count, long wide, uint16_t *turned) {
    const long groups = a->heads / a->kv_heads, size = a->size;
    memset(turned, 0, (size_t)(wide * size) * sizeof *turned);
    for (long i = 0; i < count; i++) {
        const long n = (first + i) / groups, head = g * groups + (first + i) % groups;
        const uint16_t *query = (const uint16_t *)a->query + b * a->request_step + n * a->query_step + head * size;
        uint16_t *to = turned + i / WIDE * WIDE * size + i % WIDE * 2;
        for (long pair = 0; pair < size / 2; pair++) memcpy(to + pair * 2 * WIDE, query + 2 * pair, 4);
    }
}

/* Scores of all rows with sixteen keys. */
INLINE void score(const uint16_t *keys, const uint16_t *turned, long size, long wide, float *scores) {
    const long step = WIDE * size; /* of the turned queries of one tile of rows */
    for (long i = 0; i < WIDE * size; i += LINE) __builtin_prefetch(keys + AHEAD * size + i);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (long d = 0; d < size; d += 2 * WIDE, turned += 2 * WIDE * WIDE) {
        _tile_loadd(3, keys + d, size * 2);
        _tile_loadd(4, turned, 64);
        _tile_dpbf16ps(0, 3, 4);
        if (wide > WIDE) {
            _tile_loadd(5, turned + step, 64);
            _tile_dpbf16ps(1, 3, 5);
        }
        if (wide > 2 * WIDE) {
            _tile_loadd(6, turned + 2 * step, 64);
            _tile_dpbf16ps(2, 3, 6);
        }
    }
    _tile_stored(0, scores, wide * 4);
    if (wide > WIDE) _tile_stored(1, scores + WIDE, wide * 4);
    if (wide > 2 * WIDE) _tile_stored(2, scores + 2 * WIDE, wide * 4);
}

/* Scores of all keys; the last few are copied to where sixteen can be read. */
static void score_all(const uint16_t *keys, long size, long total, long wide, const Room *room) {
    long j = 0;
    for (; j + WIDE <= total; j += WIDE) score(keys + j * size, room->turned, size, wide, room->scores + j * wide);
    if (j == total) return;
    memset(room->last, 0, (size_t)(WIDE * size) * sizeof *room->last);
    memcpy(room->last, keys + j * size, (size_t)((total - j) * size) * sizeof *room->last);
    score(room->last, room->turned, size, wide, room->scores + j * wide);
}

/* Turn scores into weights in place, and add up those of each of sixteen rows. */
INLINE floats soften(float *scores, long wide, long total, float scale) {
    floats top = (floats){0} - INFINITY, sum = {0};
    for (long j = 0; j < total; j++) {
        floats x = *(floats *)(scores + j * wide);
        ints more = x > top;
        top = (floats)(((ints)x & more) | ((ints)top & ~more));
    }
    ints none = top == -INFINITY; /* only numbers can be compared: what is none must stay so */
    top = (floats)((ints)top | (none & 0x7fc00000));
    for (long j = 0; j < total; j++) {
        floats *x = (floats *)(scores + j * wide);
        *x = exponential((*x - top) * scale);
        sum += *x;
    }
    return sum;
}

/* out[rows, d..] += weights[keys, rows]' . values[keys, d..], so many vectors wide, over keys in order. */
INLINE void weigh_strip(const float *weights, long wide, const uint16_t *values, long size, long keys, const int rows,
                        const int vectors, long d, float *out) {
    floats total[2 * ROWS];
    UNROLL for (int i = 0; i < rows * vectors; i++)
        total[i] = *(floats *)(out + i / vectors * size + d + i % vectors * LANES);
    for (long j = 0; j < keys; j++) {
        const uint16_t *at = values + j * size + d;
        floats value[4];
        UNROLL for (int i = 0; i < vectors * LANES; i += LINE) __builtin_prefetch(at + AHEAD * size + i);
        UNROLL for (int i = 0; i < vectors; i++) value[i] = load(at, i * LANES, BFLOAT16);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int i = 0; i < vectors; i++) total[r * vectors + i] += value[i] * weights[j * wide + r];
        }
    }
    UNROLL for (int i = 0; i < rows * vectors; i++)
        *(floats *)(out + i / vectors * size + d + i % vectors * LANES) = total[i];
}

/* All of a head, in strips with as many sums as the registers hold: that hides the latency of one. */
INLINE void weigh(const float *weights, long wide, const uint16_t *values, long size, long keys, const int rows,
                  float *out) {
    const int vectors = rows > ROWS / 2 ? 2 : 4;
    long d = 0;
    for (; d + vectors * LANES <= size; d += vectors * LANES)
        weigh_strip(weights, wide, values, size, keys, rows, vectors, d, out);
    if (d < size) weigh_strip(weights, wide, values, size, keys, rows, 2, d, out);
}

/* Packed rows first..first+count of KV head `g` of request `b`. */
static void piece(const Attention *a, long b, long g, long first, long count, const Room *room) {
    const long groups = a->heads / a->kv_heads, size = a->size, wide = (count + WIDE - 1) / WIDE * WIDE;
    const long place = a->slots[b] * a->slot_step + g * a->capacity * size, total = end_of(a, b, (first + count - 1) / groups);
    const uint16_t *keys = (const uint16_t *)a->keys + place, *values = (const uint16_t *)a->values + place;
    turn_queries(a, b, g, first, count, wide, room->turned);
    score_all(keys, size, total, wide, room);
    for (long i = 0; i < count; i++) hide(a, b, (first + i) / groups, room->scores + i, total, wide);
    float sum[MOST_ROWS];
    for (long i = 0; i < wide; i += WIDE) *(floats *)(sum + i) = soften(room->scores + i, wide, total, a->scale);
    memset(room->out, 0, (size_t)(count * size) * sizeof *room->out);
    for (long j = 0; j < total; j += NEARBY) {
        const long many = total - j < NEARBY ? total - j : NEARBY;
#define WEIGH(i, rows) weigh(room->scores + j * wide + (i), wide, values + j * size, size, many, rows, room->out + (i) * size)
        IN_ROWS(count, WEIGH);
#undef WEIGH
    }
    for (long i = 0; i < count; i++) {
        const long n = (first + i) / groups, head = g * groups + (first + i) % groups;
        for (long d = 0; d < size; d += LANES)
            store(a->out, ((b * a->rows + n) * a->heads + head) * size + d, BFLOAT16,
                  *(floats *)(room->out + i * size + d) / sum[i]);
    }
}

/* Returns 0, or 1 when there is no memory. */
int specdec_attention_tiles(const Attention *a) {
    const long groups = a->heads / a->kv_heads, packed = groups * a->rows, size = a->size;
    long longest = 0;
    for (long b = 0; b < a->batch; b++) longest = end_of(a, b, a->rows - 1) > longest ? end_of(a, b, a->rows - 1) : longest;
    const long pieces = (packed + MOST_ROWS - 1) / MOST_ROWS, works = a->batch * a->kv_heads * pieces;
    const long scores = MOST_ROWS * (longest + WIDE), out = MOST_ROWS * size, turned = MOST_ROWS * size / 2;
    const int threads = works < a->threads ? (int)works : a->threads;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *all = scratch((size_t)(scores + out + turned + WIDE * size / 2));
        failed |= all == NULL;
        const Room room = {.scores = all, .out = all + scores, .turned = (uint16_t *)(all + scores + out),
                           .last = (uint16_t *)(all + scores + out + turned)};
        configure(WIDE, WIDE);
#pragma omp for schedule(dynamic, 1)
        for (long w = 0; w < works; w++) {
            if (!all) continue;
            const long first = w % pieces * MOST_ROWS, left = packed - first;
            piece(a, w / pieces / a->kv_heads, w / pieces % a->kv_heads, first, left < MOST_ROWS ? left : MOST_ROWS, &room);
        }
        _tile_release();
    }
    return failed;
}
#else
int specdec_attention_tiles(const Attention *a) { return a != NULL; /* never called */ }
#endif
