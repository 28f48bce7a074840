/* Draft trees of a head: the likeliest children of a frontier, level by level, and the likeliest nodes of all in the end.
 *
 * A level of eight rows is some hundred numbers: what takes time is to walk over the logits, once.
 */
#include <math.h>

#include "kernels.h"
#include "vectors.h"

typedef struct {
    const void *logits;        /* [batch, rows, vocab] of the frontier */
    const int64_t *ids;        /* [vocab] what each entry is to the target */
    const char *y;             /* [batch, rows] of `y_bytes`: what the logits were read off */
    const float *scores;       /* [batch, rows] of the frontier, and */
    const int64_t *at, *bits;  /* [batch, rows] which candidates it is, and its ancestor words; NULL: the root */
    int64_t *tokens, *parents; /* [batch, room] candidates of all levels, and */
    float *paths;              /* [batch, room] their log-probabilities */
    int64_t *next_tokens, *next_at, *next_bits; /* [batch, width] the frontier that follows */
    float *next_scores;        /* [batch, width] */
    char *next_y;              /* [batch, width] of `y_bytes`, of each one's parent */
    long batch, rows, vocab, width, room, count, rows_before, y_bytes;
    long likely;               /* told: how many of the new frontier, at least one, have children that may reach `floor` */
    double floor;
    int type, threads;
} Level;

typedef struct {
    const int64_t *roots;            /* [batch] */
    const int64_t *tokens, *parents; /* [batch, room] candidates */
    const float *paths;              /* [batch, room] */
    int64_t *next_tokens, *next_parents, *depths, *ancestors; /* [batch, nodes] */
    float *scores;                   /* [batch, nodes] */
    long batch, room, count, nodes;
} Choosing;

/* Where the `keep` largest of `count` scores stand, falling, the first of equals first. */
INLINE void best(const float *scores, long count, long keep, long *places) {
    long have = 0;
    for (long i = 0; i < count; i++) {
        long at = have;
        if (have == keep && !(scores[i] > scores[places[--at]])) continue;
        for (; at > 0 && scores[i] > scores[places[at - 1]]; at--) places[at] = places[at - 1];
        places[at] = i;
        have += have < keep;
    }
}

/* Children of request `b`, and the likeliest of them. */
static void grow(Level *l, long b, const float *values, const int64_t *entries) {
    const long children = l->rows * l->width, from = b * l->room + l->count;
    float *paths = l->paths + from;
    for (long i = 0; i < children; i++) {
        const long row = b * l->rows + i / l->width;
        paths[i] = (l->at ? l->scores[row] : 0) + values[b * children + i];
        l->tokens[from + i] = l->ids[entries[b * children + i]];
        l->parents[from + i] = l->at ? l->at[row] : -1;
    }
    long places[64];
    best(paths, children, l->width, places);
    for (long j = 0; j < l->width; j++) {
        const long to = b * l->width + j, row = b * l->rows + places[j] / l->width, bit = l->rows_before + j;
        l->next_tokens[to] = l->tokens[from + places[j]];
        l->next_scores[to] = paths[places[j]];
        l->next_at[to] = l->count + places[j];
        const uint64_t own = bit < 64 ? (uint64_t)1 << bit : 0; /* no level follows a full word */
        l->next_bits[to] = (int64_t)((l->at ? (uint64_t)l->bits[row] : 0) | own);
        memcpy(l->next_y + to * l->y_bytes, l->y + row * l->y_bytes, (size_t)l->y_bytes);
        if (j >= l->likely && exp((double)paths[places[j]]) >= l->floor) l->likely = j + 1;
    }
}

/* Width at most 32, and what else `specdec_top` asks. Returns the probability that the new frontier holds, the mean of all
 * requests; -1 without memory. */
double specdec_level(Level *l) {
    const long found = l->batch * l->rows * l->width;
    float *values = scratch((size_t)(3 * found + 16));
    if (!values) return -1;
    int64_t *entries = (int64_t *)(values + (found + 15) / 16 * 16);
    specdec_top(l->logits, values, entries, l->batch * l->rows, l->vocab, l->width, l->type, l->threads);
    l->likely = l->floor > 0 ? 1 : l->width; /* what is no number reaches no floor, but there is none */
    for (long b = 0; b < l->batch; b++) grow(l, b, values, entries);
    double held = 0;
    for (long b = 0; b < l->batch; b++)
        for (long j = 0; j < l->likely; j++) held += exp((double)l->next_scores[b * l->width + j]);
    return held / (double)l->batch;
}

/* Nodes, the root included, whose expected gain beyond their price is largest: of the likeliest candidates, a request.
 * prices [most] of 1, 2, ... nodes; most at most 64. */
long specdec_worth(const float *paths, const double *prices, long batch, long room, long count, long most) {
    const long keep = count < most - 1 ? count : most - 1;
    double won[64] = {0}, largest = 0;
    for (long b = 0; b < batch; b++) {
        long places[64];
        best(paths + b * room, count, keep, places);
        for (long i = 0; i < keep; i++) won[i] += exp((double)paths[b * room + places[i]]) / (double)batch;
    }
    long nodes = 1;
    double sum = 0;
    for (long i = 0; i < keep; i++) {
        sum += won[i];
        if (sum - prices[i + 1] > largest) largest = sum - prices[i + 1], nodes = i + 2;
    }
    return nodes;
}

/* The root and the likeliest candidates of each request, in the order they were found: parents come before children. At
 * most 64 nodes, all of which there are candidates for. */
void specdec_choose(const Choosing *c) {
    for (long b = 0; b < c->batch; b++) {
        const long from = b * c->room, to = b * c->nodes, keep = c->nodes - 1;
        const float *paths = c->paths + from;
        long places[64];
        best(paths, c->count, keep, places);
        for (long i = 1; i < keep; i++) { /* by place */
            const long place = places[i];
            long at = i;
            for (; at > 0 && places[at - 1] > place; at--) places[at] = places[at - 1];
            places[at] = place;
        }
        c->next_tokens[to] = c->roots[b];
        c->next_parents[to] = c->depths[to] = 0;
        c->ancestors[to] = 1;
        c->scores[to] = 0;
        for (long n = 1; n < c->nodes; n++) {
            const long place = places[n - 1], above = c->parents[from + place];
            long parent = n - 1;
            while (parent > 0 && places[parent - 1] != above) parent--;
            c->next_tokens[to + n] = c->tokens[from + place];
            c->next_parents[to + n] = parent;
            c->depths[to + n] = c->depths[to + parent] + 1;
            c->ancestors[to + n] = (int64_t)((uint64_t)c->ancestors[to + parent] | (uint64_t)1 << n);
            c->scores[to + n] = paths[place];
        }
    }
}
