/* Attention of a few rows over the keys and values of their own request: committed rows, then tree rows by ancestor bit.
 *
 * Rows lie side by side, so scores, weights and their sums are made for a vector of rows at once; up to four rows share a
 * vector with those of the next keys. A score depends on its query and key alone, hidden keys add exactly zero, and weighted
 * values are summed over the keys as they are stored. So a tree node's result is, bit by bit, what the same path gives alone.
 */
#include <math.h>
#include <omp.h>

#include "exponential.h"
#include "kernels.h"
#include "visible.h"

#define MOST_ROWS 48 /* packed query rows of one piece of work: three tiles */
#define NEARBY 64    /* keys that stay near while all rows of a piece meet their values */
#define AHEAD 32     /* keys behind those at work whose values are fetched */
#define WORTH 4096   /* scores of a piece from which threads that had no piece of their own take a share of it */
#define LINE_BYTES 64

/* Packed rows first..first+count of KV head `g` of request `b`: the heads of its group at one node, then at the next. They
 * see keys up to `total`; `wide` is `count` in whole vectors, or FOUR, with a vector for several keys. */
typedef struct {
    long b, g, first, count, wide, total;
    const char *keys, *values;
} Piece;

/* Scratch: turned queries, scores [keys, wide], sums of each row's weights, results [rows, size], some keys. */
typedef struct {
    float *turned, *scores, *sums, *out, *near;
} Room;

static long pieces_of(const Attention *a) {
    return (a->heads / a->kv_heads * a->rows + MOST_ROWS - 1) / MOST_ROWS;
}

static Piece piece_of(const Attention *a, long number) {
    const long groups = a->heads / a->kv_heads, pieces = pieces_of(a), bytes = a->type == BFLOAT16 ? 2 : 4;
    Piece p = {.b = number / pieces / a->kv_heads, .g = number / pieces % a->kv_heads, .first = number % pieces * MOST_ROWS};
    const long left = groups * a->rows - p.first, place = a->slots[p.b] * a->slot_step + p.g * a->capacity * a->size;
    p.count = left < MOST_ROWS ? left : MOST_ROWS;
    p.wide = p.count <= FOUR && a->kind != BY_TILES ? FOUR : (p.count + LANES - 1) / LANES * LANES;
    p.total = end_of(a, p.b, (p.first + p.count - 1) / groups);
    p.keys = (const char *)a->keys + place * bytes;
    p.values = (const char *)a->values + place * bytes;
    return p;
}

static void score(const Attention *a, const Piece *p, long first, long last, const Room *to, const Room *mine) {
    specdec_scores(a, p->keys, to->turned, first, last, p->wide, to->scores, mine->near);
}

INLINE floats larger(floats one, floats other) {
    const ints more = other > one;
    return (floats)(((ints)other & more) | ((ints)one & ~more));
}

/* A largest score to take from the others. Only numbers can be compared: what is none must stay so. */
INLINE floats peak(floats top) {
    const ints none = top == -INFINITY;
    return (floats)((ints)top | (none & 0x7fc00000));
}

/* Turn the scores of a vector of rows, from row `i` on, into weights in place, and add up those of each. */
static void soften(const Attention *a, const Piece *p, long i, const Room *room) {
    const long wide = p->wide;
    float *scores = room->scores + i;
    floats top = (floats){0} - INFINITY, sum = {0};
    for (long j = 0; j < p->total; j++) top = larger(top, *(floats *)(scores + j * wide));
    top = peak(top);
    for (long j = 0; j < p->total; j++) {
        floats *x = (floats *)(scores + j * wide);
        *x = exponential((*x - top) * a->scale);
        sum += *x;
    }
    *(floats *)(room->sums + i) = sum;
}

typedef float four __attribute__((vector_size(4 * FOUR), aligned(4), may_alias));

/* The same for four rows, a vector of keys at a time; weights are still added key by key. */
static void soften_fours(const Attention *a, const Piece *p, const Room *room) {
    const long end = (p->total * FOUR + LANES - 1) / LANES * LANES;
    float *scores = room->scores, highest[LANES];
    four sums = {0};
    for (long j = p->total * FOUR; j < end; j++) scores[j] = -INFINITY;
    floats top = (floats){0} - INFINITY;
    for (long j = 0; j < end; j += LANES) top = larger(top, *(floats *)(scores + j));
    *(floats *)highest = top;
    for (long j = FOUR; j < LANES; j++) highest[j % FOUR] = highest[j] > highest[j % FOUR] ? highest[j] : highest[j % FOUR];
    for (long j = FOUR; j < LANES; j++) highest[j] = highest[j % FOUR];
    top = peak(*(floats *)highest);
    for (long j = 0; j < end; j += LANES) {
        floats *x = (floats *)(scores + j);
        *x = exponential((*x - top) * a->scale);
        UNROLL for (int k = 0; k < LANES; k += FOUR) sums += *(four *)(scores + j + k);
    }
    memcpy(room->sums, &sums, sizeof sums);
}

static void hide_and_soften(const Attention *a, const Piece *p, long i, const Room *room) {
    const long groups = a->heads / a->kv_heads;
    for (long r = i; r < p->count && r < i + LANES; r++)
        hide(a, p->b, (p->first + r) / groups, room->scores + r, p->total, p->wide);
    if (p->wide < LANES) soften_fours(a, p, room);
    else soften(a, p, i, room);
}

/* Values by weights: `weights` and `out` are those of the first row, `values` of the first key; numbers first..last of a
 * head. */
typedef struct {
    const float *weights;
    const char *values;
    float *out;
    long wide, size, keys, first, last;
} Weighing;

/* out[rows, d..] += weights[keys, rows]' . values[keys, d..], so many vectors wide, over keys in order. */
INLINE void weigh_strip(const Weighing *w, int type, long d, const int rows, const int vectors) {
    const long bytes = type == BFLOAT16 ? 2 : 4, line = w->size * bytes, size = w->size, wide = w->wide, keys = w->keys;
    const char *values = w->values + d * bytes;
    const float *weights = w->weights;
    float *out = w->out + d;
    floats total[4 * ROWS];
    UNROLL for (int i = 0; i < rows * vectors; i++) total[i] = *(floats *)(out + i / vectors * size + i % vectors * LANES);
    for (long j = 0; j < keys; j++) {
        floats value[4];
        UNROLL for (int i = 0; i < vectors * LANES * bytes; i += LINE_BYTES) __builtin_prefetch(values + AHEAD * line + i);
        UNROLL for (int i = 0; i < vectors; i++) value[i] = load(values, i * LANES, type);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int i = 0; i < vectors; i++) total[r * vectors + i] += value[i] * weights[r];
        }
        values += line;
        weights += wide;
    }
    UNROLL for (int i = 0; i < rows * vectors; i++) *(floats *)(out + i / vectors * size + i % vectors * LANES) = total[i];
}

/* In strips with as many sums as the registers hold: that hides the latency of one. */
INLINE void weigh_rows(const Weighing *w, int type, const int rows) {
    long d = w->first;
#define STRIPS(vectors) for (; d + (vectors) * LANES <= w->last; d += (vectors) * LANES) weigh_strip(w, type, d, rows, vectors)
    if (4 * rows + 5 <= REGISTERS) STRIPS(4);
    if (2 * rows + 3 <= REGISTERS) STRIPS(2);
    STRIPS(1);
#undef STRIPS
}

/* A function for each number of rows: inlined together, they leave GCC too few registers. */
#define WEIGH(rows)                                                                                                    \
    static void weigh_##rows(const Weighing *w, int type) {                                                            \
        if (type == BFLOAT16) weigh_rows(w, BFLOAT16, rows);                                                           \
        else weigh_rows(w, FLOAT32, rows);                                                                             \
    }
EACH_ROWS(WEIGH)
#define ENTRY(rows) [rows] = weigh_##rows,
static void (*const weighers[ROWS + 1])(const Weighing *w, int type) = {EACH_ROWS(ENTRY)};

/* Numbers first..last of a head for all rows of a piece, and to where they belong. */
static void weigh(const Attention *a, const Piece *p, long first, long last, const Room *room) {
    const long size = a->size, wide = p->wide, groups = a->heads / a->kv_heads, bytes = a->type == BFLOAT16 ? 2 : 4;
    const long blocks = (p->count + ROWS - 1) / ROWS;
    for (long i = 0; i < p->count; i++)
        memset(room->out + i * size + first, 0, (size_t)(last - first) * sizeof *room->out);
    for (long j = 0; j < p->total; j += NEARBY) {
        const long many = p->total - j < NEARBY ? p->total - j : NEARBY;
        for (long block = 0; block < blocks; block++) {
            const long i = p->count * block / blocks, below = p->count * (block + 1) / blocks;
            const Weighing w = {room->scores + j * wide + i, p->values + j * size * bytes, room->out + i * size,
                                wide, size, many, first, last};
            weighers[below - i](&w, a->type);
        }
    }
    for (long i = 0; i < p->count; i++) {
        const long n = (p->first + i) / groups, head = p->g * groups + (p->first + i) % groups;
        for (long d = first; d < last; d += LANES)
            store(a->out, ((p->b * a->rows + n) * a->heads + head) * size + d, a->type,
                  *(floats *)(room->out + i * size + d) / room->sums[i]);
    }
}

/* One thread does all of a piece. */
static void alone(const Attention *a, const Piece *p, const Room *room) {
    specdec_turn(a, p->b, p->g, p->first, p->count, p->wide, room->turned);
    score(a, p, 0, p->total, room, room);
    for (long i = 0; i < p->wide; i += LANES) hide_and_soften(a, p, i, room);
    weigh(a, p, 0, a->size, room);
}

static long parts_of(long whole, long part) { return (whole + part - 1) / part; }

/* All threads do `left` pieces from number `first` on together, step by step, in the rooms of as many threads. */
static void together(const Attention *a, long first, long left, long longest, const Room *rooms, const Room *mine) {
    const long strips = MOST_ROWS / LANES, runs = parts_of(longest, NEARBY), wide = 2 * LANES, lines = parts_of(a->size, wide);
#pragma omp for schedule(static)
    for (long w = 0; w < left; w++) {
        const Piece p = piece_of(a, first + w);
        specdec_turn(a, p.b, p.g, p.first, p.count, p.wide, rooms[w].turned);
    }
#pragma omp for schedule(static)
    for (long w = 0; w < left * runs; w++) {
        const Piece p = piece_of(a, first + w / runs);
        const long from = w % runs * NEARBY, to = from + NEARBY < p.total ? from + NEARBY : p.total;
        if (from < to) score(a, &p, from, to, rooms + w / runs, mine);
    }
#pragma omp for schedule(static)
    for (long w = 0; w < left * strips; w++) {
        const Piece p = piece_of(a, first + w / strips);
        if (w % strips * LANES < p.wide) hide_and_soften(a, &p, w % strips * LANES, rooms + w / strips);
    }
#pragma omp for schedule(static)
    for (long w = 0; w < left * lines; w++) {
        const Piece p = piece_of(a, first + w / lines);
        const long from = w % lines * wide, to = from + wide < a->size ? from + wide : a->size;
        weigh(a, &p, from, to, rooms + w / lines);
    }
}

/* Rooms have to hold so many keys. Returns one of NULLs without memory. */
static Room room_for(const Attention *a, long keys) {
    const long heads = MOST_ROWS * a->size, scores = MOST_ROWS * keys, near = (NEARBY + LANES / FOUR) * a->size;
    float *all = scratch((size_t)(2 * heads + scores + MOST_ROWS + near));
    if (!all) return (Room){0};
    return (Room){all, all + heads, all + heads + scores, all + heads + scores + MOST_ROWS,
                  all + 2 * heads + scores + MOST_ROWS};
}

/* Each thread takes pieces of its own; where the last ones would leave threads idle, they are done together. Returns 0, or 1
 * when there is no memory. */
int specdec_attention(const Attention *a) {
    const long works = a->batch * a->kv_heads * pieces_of(a), packed = a->heads / a->kv_heads * a->rows;
    long longest = 0;
    for (long b = 0; b < a->batch; b++) longest = end_of(a, b, a->rows - 1) > longest ? end_of(a, b, a->rows - 1) : longest;
    const int share = longest * (packed < MOST_ROWS ? packed : MOST_ROWS) >= WORTH;
    const int threads = share || works >= a->threads ? a->threads : (int)works;
    Room rooms[threads];
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), of = omp_get_num_threads();
        const long left = share ? works % of : 0;
        rooms[me] = room_for(a, longest);
        if (!rooms[me].scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            specdec_scores_begin(a);
#pragma omp for schedule(dynamic, 1)
            for (long w = 0; w < works - left; w++) {
                const Piece p = piece_of(a, w);
                alone(a, &p, rooms + me);
            }
            if (left) together(a, works - left, left, longest, rooms, rooms + me);
            specdec_scores_end(a);
        }
    }
    return failed;
}
