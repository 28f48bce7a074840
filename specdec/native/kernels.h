/* What the kernels are called with, by each other and from Python. */
#ifndef SPECDEC_KERNELS_H
#define SPECDEC_KERNELS_H

#include <stdint.h>

/* How bfloat16 is multiplied: widened, by AVX-512's pairs (heads divisible by 8), by AMX's tiles (by 32). */
enum { BY_FLOATS = 0, BY_PAIRS = 1, BY_TILES = 2 };

typedef struct {
    const void *query;        /* rows of [heads, size]; `query_step` elements from row to row */
    const void *keys, *values; /* [kv_heads, capacity, size] of the layer's slot 0 */
    void *out;                /* [batch, rows, heads, size] */
    const int64_t *slots;     /* [batch] */
    const int64_t *lengths;   /* [batch] committed keys */
    const int64_t *ancestors; /* [batch, rows] words over tree rows, or NULL: causal */
    const int64_t *positions; /* [batch, rows], and */
    const int64_t *tree;      /* [batch, tree_rows] positions of stored tree rows; read when there is a window */
    long batch, rows, heads, kv_heads, size, capacity, slot_step, query_step, request_step, tree_rows, offset, window;
    float scale;
    int type, threads;
    int kind; /* how scores are made */
} Attention;

typedef struct {
    void *heads;              /* [batch, rows, heads + 2 * kv_heads, size]: queries and keys are turned in place */
    const void *cos, *sin;    /* [batch, rows, size]; the sine of the first half carries the minus */
    void *keys, *values;      /* [slots, kv_heads, capacity, size] */
    const int64_t *slots;     /* [batch] */
    const int64_t *indices;   /* [batch, rows] where each row is stored */
    long batch, rows, heads_count, kv_heads, size, capacity;
    int type, threads;
} Placing;

typedef struct {
    void *logits;         /* [rows, width], and then their gradients */
    const void *probs;    /* [.., width] the target's distributions, sums of one */
    const int64_t *index; /* [rows] which of them grades each row */
    const float *weights; /* [rows] */
    float *loss, *overlap; /* [rows] */
    uint8_t *hit;         /* [rows] */
    long rows, width;
    float rate;
    int type, kind, threads;
} Grading;

#define FOUR 4 /* rows that stand side by side with those of the next keys, where there are no more */

#define FEW 4 /* rows that one thread is done with before another has begun */

int specdec_linear(const float *x, const void *w, const float *bias, void *y, long rows, long inputs, long outputs,
                   int weight_type, int y_type, int threads);
void specdec_tiles(const uint16_t *x, const void *w, const float *bias, uint16_t *y, long rows, long blocks, long outputs,
                   int kind, int threads);
int specdec_attention(const Attention *a);

/* Rows first..first+count of KV head `g` of request `b`, the heads of its group at one node, then at the next: turned, as
 * scores `wide` rows a key are made of them. Room for as many rows, in whole vectors, of floats. */
void specdec_turn(const Attention *a, long b, long g, long first, long count, long wide, void *turned);
/* Scores [keys, wide] of turned queries with keys first..last; others are left alone, but that where `wide` is FOUR keys
 * come by vectors, and what is beyond the last of them is written, too. `room` is for 64 keys and a vector's in floats. */
void specdec_scores(const Attention *a, const void *keys, const void *turned, long first, long last, long wide,
                    float *scores, void *room);
void specdec_scores_begin(const Attention *a); /* by each thread, before its first and after its last scores */
void specdec_scores_end(const Attention *a);
void specdec_norm(const void *x, const void *weight, void *y, long rows, long width, float eps, int type, int threads);
void specdec_gate(const void *x, void *y, long rows, long width, int type, int threads);
void specdec_largest(const void *x, int64_t *places, long rows, long width, int type, int threads);
void specdec_top(const void *x, float *values, int64_t *places, long rows, long width, long count, int type,
                 int threads);
void specdec_place(const Placing *p);
void specdec_keep(char *slot, long planes, long plane_bytes, long heads, long head_bytes, long row_bytes, const int64_t *to,
                  const int64_t *at, long count);
int specdec_grade(const Grading *g);

#endif
