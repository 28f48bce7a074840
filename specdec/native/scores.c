/* Scores of queries with keys: by tiles (AMX), by pairs of bfloat16 (AVX-512 BF16), or float by float.
 *
 * Queries are turned, so that rows lie side by side: a strip holds as many rows as a vector, number by number of the head,
 * or pair by pair. Scores stand the same way, key by key; four rows or fewer stand beside themselves, for several keys at
 * once. A score depends on its query and key alone, and is summed over the head in order, whatever the other rows and keys.
 */
#include "kernels.h"
#include "vectors.h"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512F__)
#include "amx.h"
#define TILES
#endif

#define NEARBY 64 /* keys that stay near while all rows meet them */
#define AHEAD 32  /* keys behind those at work that are fetched */
#define LINE_WORDS 16

void specdec_turn(const Attention *a, long b, long g, long first, long count, long wide, void *turned) {
    const long groups = a->heads / a->kv_heads, size = a->size, strips = (count + LANES - 1) / LANES;
    const long copies = wide < LANES ? LANES / wide : 1; /* of a row, for as many keys */
    uint16_t *pairs = turned;
    float *numbers = turned;
    memset(turned, 0, (size_t)(strips * LANES * size) * (a->kind == BY_FLOATS ? sizeof *numbers : sizeof *pairs));
    for (long lane = 0; lane < copies * wide; lane++) {
        const long i = lane % wide, n = (first + i) / groups, head = g * groups + (first + i) % groups;
        const long from = b * a->request_step + n * a->query_step + head * size, to = lane / LANES * LANES * size;
        if (i >= count) continue;
        if (a->kind == BY_FLOATS) {
            for (long d = 0; d < size; d++) numbers[to + d * LANES + lane % LANES] = entry(a->query, from + d, a->type);
        } else {
            for (long d = 0; d < size; d += 2)
                memcpy(pairs + to + d * LANES + lane % LANES * 2, (const uint16_t *)a->query + from + d, 4);
        }
    }
}

/* total + queries . keys: four bytes, a float or a pair, of each. */
INLINE floats added(floats total, floats queries, floats keys, const int kind) {
#if defined(__AVX512BF16__)
    if (kind == BY_PAIRS) return (floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)queries, (__m512bh)keys);
#endif
    (void)kind;
    return total + queries * keys;
}

/* Four bytes of one key, for all rows. */
INLINE floats everywhere(const uint32_t *key) {
#if defined(__AVX512F__)
    return (floats)_mm512_set1_epi32((int)*key);
#else
    float number;
    memcpy(&number, key, sizeof number);
    return number - (floats){0}; /* adding would cost a step, and a sign of zero */
#endif
}

/* `keys` keys of `words` words with `strips` strips of rows; the counts are constants once inlined. */
INLINE void block(const uint32_t *key, const floats *turned, long words, float *scores, long wide, const int keys,
                  const int strips, const int kind) {
    floats total[12];
    for (long i = 0; i < keys * words; i += LINE_WORDS) __builtin_prefetch(key + AHEAD * words + i);
    UNROLL for (int i = 0; i < keys * strips; i++) total[i] = (floats){0};
    for (long d = 0; d < words; d++) {
        floats queries[3];
        UNROLL for (int s = 0; s < strips; s++) queries[s] = turned[s * words + d];
        UNROLL for (int j = 0; j < keys; j++) {
            const floats word = everywhere(key + j * words + d);
            UNROLL for (int s = 0; s < strips; s++)
                total[j * strips + s] = added(total[j * strips + s], queries[s], word, kind);
        }
    }
    UNROLL for (int i = 0; i < keys * strips; i++) *(floats *)(scores + i / strips * wide + i % strips * LANES) = total[i];
}

/* A few strips with `count` keys, enough of them at once to hide the latency of one sum. */
INLINE void strips_of(const uint32_t *keys, const floats *turned, long words, long count, float *scores, long wide,
                      const int strips, const int kind) {
    const int many = strips == 1 ? 8 : 4;
    long j = 0;
    for (; j + many <= count; j += many) block(keys + j * words, turned, words, scores + j * wide, wide, many, strips, kind);
    for (; j < count; j++) block(keys + j * words, turned, words, scores + j * wide, wide, 1, strips, kind);
}

INLINE void all_strips(const uint32_t *keys, const floats *turned, long words, long count, float *scores, long wide,
                       const int kind) {
    const long strips = wide / LANES;
    long s = 0;
#define STRIPS(many) strips_of(keys, turned + s * words, words, count, scores + s * LANES, wide, many, kind)
    for (; s + 3 <= strips; s += 3) STRIPS(3);
    if (s + 2 == strips) STRIPS(2);
    else if (s + 1 == strips) STRIPS(1);
#undef STRIPS
}

#define KEYS (LANES / FOUR) /* of a vector where rows are at most four */
#define VECTORS (REGISTERS == 32 ? 8 : 4)

/* Scores of four rows with so many vectors of keys: each is read once, four words at a time. */
INLINE void block_of_four(const uint32_t *key, const floats *turned, long words, float *scores, const int vectors,
                           const int kind) {
    floats total[VECTORS];
    UNROLL for (int i = 0; i < vectors; i++) total[i] = (floats){0};
    for (long i = 0; i < vectors * KEYS * words; i += LINE_WORDS) __builtin_prefetch(key + AHEAD * words + i);
    for (long d = 0; d < words; d += 4) {
        UNROLL for (int i = 0; i < vectors; i++) {
            const floats some = gather_fours(key + i * KEYS * words + d, words);
            UNROLL for (int n = 0; n < 4; n++) total[i] = added(total[i], turned[d + n], spread_fours(some, n), kind);
        }
    }
    UNROLL for (int i = 0; i < vectors; i++) *(floats *)(scores + i * LANES) = total[i];
}

/* The last keys, fewer than a vector's, are copied to `beyond`. */
INLINE void four_rows(const uint32_t *keys, const floats *turned, long words, long count, float *scores, uint32_t *beyond,
                      const int kind) {
    long j = 0;
    for (; j + VECTORS * KEYS <= count; j += VECTORS * KEYS)
        block_of_four(keys + j * words, turned, words, scores + j * FOUR, VECTORS, kind);
    for (; j + KEYS <= count; j += KEYS) block_of_four(keys + j * words, turned, words, scores + j * FOUR, 1, kind);
    if (j == count) return;
    memset(beyond, 0, (size_t)(KEYS * words) * sizeof *beyond);
    memcpy(beyond, keys + j * words, (size_t)((count - j) * words) * sizeof *beyond);
    block_of_four(beyond, turned, words, scores + j * FOUR, 1, kind);
}

INLINE void all_rows(const uint32_t *keys, const floats *turned, long words, long count, float *scores, long wide,
                     uint32_t *beyond, const int kind) {
    if (wide < LANES) four_rows(keys, turned, words, count, scores, beyond, kind);
    else all_strips(keys, turned, words, count, scores, wide, kind);
}

static void by_floats(const Attention *a, const void *keys, const void *turned, long first, long last, float *scores,
                      long wide, float *room) {
    for (long j = first; j < last; j += NEARBY) {
        const long many = last - j < NEARBY ? last - j : NEARBY;
        const float *near = (const float *)keys + j * a->size;
        if (a->type == BFLOAT16) {
            for (long i = 0; i < many * a->size; i += LANES) store(room, i, FLOAT32, load(keys, j * a->size + i, BFLOAT16));
            near = room;
        }
        uint32_t *beyond = (uint32_t *)room + NEARBY * a->size;
        all_rows((const uint32_t *)near, turned, a->size, many, scores + j * wide, wide, beyond, BY_FLOATS);
    }
}

#if defined(__AVX512BF16__)
static void by_pairs(const Attention *a, const uint16_t *keys, const void *turned, long first, long last, float *scores,
                     long wide, void *room) {
    for (long j = first; j < last; j += NEARBY) {
        const long many = last - j < NEARBY ? last - j : NEARBY;
        all_rows((const uint32_t *)(keys + j * a->size), turned, a->size / 2, many, scores + j * wide, wide, room, BY_PAIRS);
    }
}
#endif

#ifdef TILES
#define LINE 32 /* numbers of a line of the processor's caches */
#define WIDE 16 /* keys, rows and pairs of a tile */

/* Scores of all rows with sixteen keys. A tile takes keys as they are stored, sixteen of them by 32 of the head. */
INLINE void tile_of_keys(const uint16_t *keys, const uint16_t *turned, long size, long wide, float *scores) {
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

/* The last few keys are copied to `room`, where sixteen can be read. */
static void by_tiles(const Attention *a, const uint16_t *keys, const uint16_t *turned, long first, long last,
                     float *scores, long wide, uint16_t *room) {
    const long size = a->size;
    long j = first;
    for (; j + WIDE <= last; j += WIDE) tile_of_keys(keys + j * size, turned, size, wide, scores + j * wide);
    if (j == last) return;
    memset(room, 0, (size_t)(WIDE * size) * sizeof *room);
    memcpy(room, keys + j * size, (size_t)((last - j) * size) * sizeof *room);
    tile_of_keys(room, turned, size, wide, scores + j * wide);
}
#endif

void specdec_scores_begin(const Attention *a) {
#ifdef TILES
    if (a->kind == BY_TILES) configure(WIDE, WIDE);
#endif
    (void)a;
}

void specdec_scores_end(const Attention *a) {
#ifdef TILES
    if (a->kind == BY_TILES) _tile_release();
#endif
    (void)a;
}

void specdec_scores(const Attention *a, const void *keys, const void *turned, long first, long last, long wide,
                    float *scores, void *room) {
#ifdef TILES
    if (a->kind == BY_TILES) {
        by_tiles(a, keys, turned, first, last, scores, wide, room);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    if (a->kind == BY_PAIRS) {
        by_pairs(a, keys, turned, first, last, scores, wide, room);
        return;
    }
#endif
    by_floats(a, keys, turned, first, last, scores, wide, room);
}
