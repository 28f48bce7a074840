/* Attention of a few rows over the keys and values of their own request: committed rows, then tree rows by ancestor bit.
 *
 * A score is summed over the head in order, the weighted values over the keys as they are stored, and hidden keys add
 * exactly zero. So a tree node's result is, bit by bit, what the same path gives alone.
 */
#include <math.h>
#include <omp.h>

#include "exponential.h"
#include "kernels.h"
#include "visible.h"

#define MOST_ROWS 48 /* packed query rows of one piece of work */
#define TILE 64      /* keys that stay near while all rows of a piece meet them */

/* Rows first..last of a cache as float32 [TILE, size]. */
INLINE void stage(const void *from, int type, long size, long first, long last, float *tile) {
    for (long i = 0; i < (last - first) * size; i += LANES) store(tile, i, FLOAT32, load(from, first * size + i, type));
}

/* A square of lanes and vectors turned over its diagonal. */
INLINE void transpose(floats v[LANES]) {
    UNROLL for (int half = LANES / 2; half; half /= 2) {
        ints low;
        UNROLL for (int i = 0; i < LANES; i++) low[i] = i & half ? i - half + LANES : i;
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            floats a = v[i], b = v[i + half];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + half] = __builtin_shuffle(a, b, low + half);
        }
    }
}

/* Rows first..last turned to [size, TILE]; keys beyond are zeros. */
INLINE void stage_turned(const void *from, int type, long size, long first, long last, float *tile) {
    for (long j = 0; j < last - first; j += LANES) {
        for (long d = 0; d < size; d += LANES) {
            floats v[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                v[i] = first + j + i < last ? load(from, (first + j + i) * size + d, type) : (floats){0};
            transpose(v);
            UNROLL for (int i = 0; i < LANES; i++) store(tile, (d + i) * TILE + j, FLOAT32, v[i]);
        }
    }
}

/* Scores of `rows` queries [rows, size] with the first `count` keys of a turned tile, in whole panels; each is summed
 * over the head in order. */
INLINE void score(const float *query, const float *tile, long size, long count, const int rows, float *scores,
                  long stride) {
    for (long j = 0; j < count; j += PANEL) {
        floats total[ROWS * PARTS];
        UNROLL for (int i = 0; i < rows * PARTS; i++) total[i] = (floats){0};
        for (long d = 0; d < size; d++) {
            floats key[PARTS];
            UNROLL for (int i = 0; i < PARTS; i++) key[i] = *(const floats *)(tile + d * TILE + j + i * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int i = 0; i < PARTS; i++) total[r * PARTS + i] += key[i] * query[r * size + d];
            }
        }
        UNROLL for (int i = 0; i < rows * PARTS; i++)
            *(floats *)(scores + i / PARTS * stride + j + i % PARTS * LANES) = total[i];
    }
}

/* out[rows, size] += weights[rows, keys] . tile[keys, size], over keys in order. */
INLINE void weigh(const float *weights, long stride, const float *tile, long size, long keys, const int rows,
                  float *out) {
    for (long d = 0; d < size; d += PANEL) {
        floats total[ROWS * PARTS];
        UNROLL for (int i = 0; i < rows * PARTS; i++)
            total[i] = *(floats *)(out + i / PARTS * size + d + i % PARTS * LANES);
        for (long j = 0; j < keys; j++) {
            floats value[PARTS];
            UNROLL for (int i = 0; i < PARTS; i++) value[i] = *(const floats *)(tile + j * size + d + i * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int i = 0; i < PARTS; i++) total[r * PARTS + i] += value[i] * weights[r * stride + j];
            }
        }
        UNROLL for (int i = 0; i < rows * PARTS; i++)
            *(floats *)(out + i / PARTS * size + d + i % PARTS * LANES) = total[i];
    }
}

/* Sums of the weights of `rows` rows, each in the order of the keys. */
INLINE void add_up(const float *weights, long stride, long keys, const int rows, float *sum) {
    float total[ROWS] = {0};
    for (long j = 0; j < keys; j++) {
        UNROLL for (int r = 0; r < rows; r++) total[r] += weights[r * stride + j];
    }
    UNROLL for (int r = 0; r < rows; r++) sum[r] = total[r];
}

/* Turn scores into weights in place; [count] is whole vectors, padded with -infinity. */
static void soften(float *scores, long count, float scale) {
    floats top = (floats){0} - INFINITY;
    for (long j = 0; j < count; j += LANES) {
        floats x = *(floats *)(scores + j);
        ints more = x > top;
        top = (floats)(((ints)x & more) | ((ints)top & ~more));
    }
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    if (most == -INFINITY) most = NAN; /* only numbers can be compared: what is none must stay so */
    for (long j = 0; j < count; j += LANES) {
        floats *x = (floats *)(scores + j);
        *x = exponential((*x - most) * scale);
    }
}

/* Packed rows first..first+count of KV head `g` of request `b`: the heads of its group at one node, then at the next. */
static void piece(const Attention *a, int type, long b, long g, long first, long count, float *room) {
    long groups = a->heads / a->kv_heads, size = a->size, bytes = type == BFLOAT16 ? 2 : 4, total = 0;
    for (long i = 0; i < count; i++) {
        long end = end_of(a, b, (first + i) / groups);
        total = end > total ? end : total;
    }
    long stride = (total + PANEL - 1) / PANEL * PANEL;
    float *query = room, *out = query + MOST_ROWS * size, *tile = out + MOST_ROWS * size, *scores = tile + TILE * size;
    const char *keys = (const char *)a->keys + (a->slots[b] * a->slot_step + g * a->capacity * size) * bytes;
    const char *values = (const char *)a->values + (a->slots[b] * a->slot_step + g * a->capacity * size) * bytes;
    for (long i = 0; i < count; i++) {
        long n = (first + i) / groups, head = g * groups + (first + i) % groups;
        for (long d = 0; d < size; d += LANES)
            *(floats *)(query + i * size + d) = load(a->query, b * a->request_step + n * a->query_step + head * size + d, type);
    }
    for (long j = 0; j < total; j += TILE) {
        long many = total - j < TILE ? total - j : TILE;
        stage_turned(keys, type, size, j, j + many, tile);
#define SCORE(i, rows) score(query + (i) * size, tile, size, many, rows, scores + (i) * stride + j, stride)
        IN_ROWS(count, SCORE);
#undef SCORE
    }
    for (long i = 0; i < count; i++) {
        float *row = scores + i * stride;
        for (long j = total; j < stride; j++) row[j] = -INFINITY;
        hide(a, b, (first + i) / groups, row, total, 1);
        soften(row, stride, a->scale);
    }
    float sum[MOST_ROWS];
#define ADD_UP(i, rows) add_up(scores + (i) * stride, stride, total, rows, sum + (i))
    IN_ROWS(count, ADD_UP);
#undef ADD_UP
    for (long i = 0; i < count * size; i++) out[i] = 0;
    for (long j = 0; j < total; j += TILE) {
        long many = total - j < TILE ? total - j : TILE;
        stage(values, type, size, j, j + many, tile);
#define WEIGH(i, rows) weigh(scores + (i) * stride + j, stride, tile, size, many, rows, out + (i) * size)
        IN_ROWS(count, WEIGH);
#undef WEIGH
    }
    for (long i = 0; i < count; i++) {
        long n = (first + i) / groups, head = g * groups + (first + i) % groups;
        for (long d = 0; d < size; d += LANES)
            store(a->out, ((b * a->rows + n) * a->heads + head) * size + d, type,
                  *(floats *)(out + i * size + d) / sum[i]);
    }
}

/* Returns 0, or 1 when there is no memory. */
int specdec_attention(const Attention *a) {
    if (a->tiles) return specdec_attention_tiles(a);
    long groups = a->heads / a->kv_heads, packed = groups * a->rows, longest = 0;
    for (long b = 0; b < a->batch; b++) {
        long end = a->lengths[b] + a->offset + a->rows;
        longest = end > longest ? end : longest;
    }
    long pieces = (packed + MOST_ROWS - 1) / MOST_ROWS, works = a->batch * a->kv_heads * pieces;
    size_t floats_each = (size_t)MOST_ROWS * (2 * a->size + longest + PANEL) + TILE * a->size;
    int threads = works < a->threads ? (int)works : a->threads, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *room = scratch(floats_each);
        failed |= room == NULL;
#pragma omp for schedule(dynamic, 1)
        for (long w = 0; w < works; w++) {
            if (!room) continue;
            long first = w % pieces * MOST_ROWS, left = packed - first;
            long g = w / pieces % a->kv_heads, b = w / pieces / a->kv_heads;
            long count = left < MOST_ROWS ? left : MOST_ROWS;
            if (a->type == BFLOAT16) piece(a, BFLOAT16, b, g, first, count, room);
            else piece(a, FLOAT32, b, g, first, count, room);
        }
    }
    return failed;
}
