/* A whole decoder layer in one call: what the other kernels do, one after the other, with nothing in between.
 *
 *     heads = qkv(norm(x))              a draft head's layer reads [norm(embedded), norm(x)]
 *     a     = x + out(attention(heads))
 *     y     = a + down(gate(gate_up(norm(a))))
 *
 * Every step rounds where the same step rounds alone, so the result is the same bit by bit.
 */
#include "kernels.h"
#include "vectors.h"

typedef struct {
    const void *weight;
    const float *bias; /* [outputs, padded to panels] or NULL */
    long inputs, outputs;
} Matrix;

typedef struct {
    const void *x, *embedded;                                            /* [rows, hidden]; the second may be NULL */
    void *y;                                                             /* [rows, hidden]; may be x */
    const void *input_norm, *embedded_norm, *mlp_norm, *q_norm, *k_norm; /* weights, or NULL where there is none */
    Matrix qkv, out, gate_up, down;
    Attention attention; /* without query, out, keys and values */
    Placing placing;     /* without heads */
    long rows, hidden, intermediate;
    float eps;
    int type, tiles; /* of weights and states; how bfloat16 is multiplied, 0 for panels */
} Layer;

/* States between the steps; `wide` is what the panels' product reads of a narrow type. */
typedef struct {
    char *heads, *normed, *seen, *between, *inner;
    float *wide;
} Room;

INLINE long largest(long a, long b) { return a > b ? a : b; }

/* Parts of one allocation that lasts from call to call. Returns 1 without memory. */
static int furnish(const Layer *l, Room *room) {
    const long bytes = l->type == BFLOAT16 ? 2 : 4, line = 64;
    const long widest = largest(largest(l->qkv.inputs, l->out.inputs), largest(l->gate_up.inputs, l->down.inputs));
    const long sizes[] = {
        l->rows * l->qkv.outputs * bytes,   l->rows * largest(l->qkv.inputs, l->hidden) * bytes,
        l->rows * l->out.inputs * bytes,    l->rows * largest(l->gate_up.outputs, l->hidden) * bytes,
        l->rows * l->intermediate * bytes,  l->type == BFLOAT16 && !l->tiles ? l->rows * widest * 4 : 0,
    };
    char **places[] = {&room->heads, &room->normed, &room->seen, &room->between, &room->inner};
    long total = 0;
    for (int i = 0; i < 6; i++) total += (sizes[i] + line - 1) / line * line;
    char *at = (char *)scratch((size_t)total / sizeof(float));
    if (!at) return 1;
    for (int i = 0; i < 5; i++) *places[i] = at, at += (sizes[i] + line - 1) / line * line;
    room->wide = (float *)at;
    return 0;
}

static int multiply(const Layer *l, const Matrix *m, const void *x, void *y, const Room *room) {
    const int threads = l->attention.threads;
    if (l->tiles) {
        specdec_tiles(x, m->weight, m->bias, y, l->rows, m->inputs / 32, m->outputs, l->tiles, threads);
        return 0;
    }
    if (l->type == BFLOAT16)
        for (long i = 0; i < l->rows * m->inputs; i += LANES) store(room->wide, i, FLOAT32, load(x, i, BFLOAT16));
    return specdec_linear(l->type == BFLOAT16 ? room->wide : x, m->weight, m->bias, y, l->rows, m->inputs, m->outputs,
                          l->type, l->type, threads);
}

/* y = x + y */
INLINE void add(const void *x, void *y, long count, int type) {
    for (long i = 0; i < count; i += LANES) store(y, i, type, load(x, i, type) + load(y, i, type));
}

/* Rows of [norm(embedded), norm(x)]: each row is normed to its place. */
static void norm_both(const Layer *l, char *to) {
    const long bytes = l->hidden * (l->type == BFLOAT16 ? 2 : 4);
    for (long r = 0; r < l->rows; r++) {
        specdec_norm((const char *)l->embedded + r * bytes, l->embedded_norm, to + 2 * r * bytes, 1, l->hidden, l->eps, l->type);
        specdec_norm((const char *)l->x + r * bytes, l->input_norm, to + (2 * r + 1) * bytes, 1, l->hidden, l->eps, l->type);
    }
}

/* Queries and keys through norms of their own, in place. */
static void norm_heads(const Layer *l, char *heads) {
    const Placing *p = &l->placing;
    const long bytes = p->size * (l->type == BFLOAT16 ? 2 : 4), all = p->heads_count + 2 * p->kv_heads;
    for (long r = 0; r < l->rows; r++, heads += all * bytes) {
        char *keys = heads + p->heads_count * bytes;
        specdec_norm(heads, l->q_norm, heads, p->heads_count, p->size, l->eps, l->type);
        specdec_norm(keys, l->k_norm, keys, p->kv_heads, p->size, l->eps, l->type);
    }
}

static int attend(const Layer *l, const Room *room) {
    Placing placing = l->placing;
    Attention attention = l->attention;
    placing.heads = room->heads;
    specdec_place(&placing);
    attention.query = room->heads;
    attention.query_step = l->qkv.outputs;
    attention.request_step = attention.rows * l->qkv.outputs;
    attention.keys = placing.keys;
    attention.values = placing.values;
    attention.out = room->seen;
    return specdec_attention(&attention);
}

/* Returns 0, or 1 when there is no memory. */
int specdec_layer(const Layer *l) {
    Room room;
    if (furnish(l, &room)) return 1;
    const long count = l->rows * l->hidden;
    int failed = 0;
    if (l->embedded) norm_both(l, room.normed);
    else specdec_norm(l->x, l->input_norm, room.normed, l->rows, l->hidden, l->eps, l->type);
    failed |= multiply(l, &l->qkv, room.normed, room.heads, &room);
    if (l->q_norm) norm_heads(l, room.heads);
    failed |= attend(l, &room);
    failed |= multiply(l, &l->out, room.seen, room.between, &room);
    add(l->x, room.between, count, l->type);
    memcpy(l->y, room.between, (size_t)count * (l->type == BFLOAT16 ? 2 : 4));
    specdec_norm(l->y, l->mlp_norm, room.normed, l->rows, l->hidden, l->eps, l->type);
    failed |= multiply(l, &l->gate_up, room.normed, room.between, &room);
    specdec_gate(room.between, room.inner, l->rows, l->intermediate, l->type, l->attention.threads);
    failed |= multiply(l, &l->down, room.inner, room.normed, &room);
    add(room.normed, l->y, count, l->type);
    return failed;
}
