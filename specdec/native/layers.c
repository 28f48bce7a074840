/* Decoder layers in one call: what the other kernels do, one after the other, with nothing in between.
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
    const void *input_norm, *embedded_norm, *mlp_norm, *q_norm, *k_norm; /* weights, or NULL where there is none */
    Matrix qkv, out, gate_up, down;
    long hidden, intermediate;
    float eps;
    int type, tiles; /* of weights and states; how bfloat16 is multiplied, 0 for panels */
} Layer;

typedef struct {
    const void *x, *embedded;     /* [rows, hidden]; the second may be NULL */
    void *y;                      /* [rows, hidden]; may be x */
    const Attention **attentions; /* of each layer, without query, out, keys, values, heads and scale */
    Placing placing;              /* without heads; keys and values of the first layer */
    float scale;
    long rows, plane;   /* bytes from one layer's keys to the next one's */
    const int64_t *taps; /* [tap_count] layers before which states are copied, as many as layers: behind the last */
    void *features;      /* [rows, tap_count, hidden] */
    long tap_count;
} Forward;

/* A layer at work: where its states stand between the steps; `wide` is what the panels' product reads of a narrow type. */
typedef struct {
    const Layer *l;
    const Forward *f;
    Attention attention;
    Placing placing;
    char *heads, *normed, *seen, *between, *inner;
    float *wide;
} Work;

INLINE long bytes_of(const Layer *l) { return l->type == BFLOAT16 ? 2 : 4; }

INLINE long largest(long a, long b) { return a > b ? a : b; }

/* Parts of one allocation that lasts from call to call. Returns 1 without memory. */
static int furnish(Work *w) {
    const Layer *l = w->l;
    const long rows = w->f->rows, bytes = bytes_of(l), line = 64;
    const long widest = largest(largest(l->qkv.inputs, l->out.inputs), largest(l->gate_up.inputs, l->down.inputs));
    const long sizes[] = {
        rows * l->qkv.outputs * bytes,  rows * largest(l->qkv.inputs, l->hidden) * bytes,
        rows * l->out.inputs * bytes,   rows * largest(l->gate_up.outputs, l->hidden) * bytes,
        rows * l->intermediate * bytes, l->type == BFLOAT16 && !l->tiles ? rows * widest * 4 : 0,
    };
    char **places[] = {&w->heads, &w->normed, &w->seen, &w->between, &w->inner};
    long total = 0;
    for (int i = 0; i < 6; i++) total += (sizes[i] + line - 1) / line * line;
    char *at = (char *)scratch((size_t)total / sizeof(float));
    if (!at) return 1;
    for (int i = 0; i < 5; i++) *places[i] = at, at += (sizes[i] + line - 1) / line * line;
    w->wide = (float *)at;
    return 0;
}

static int multiply(const Work *w, const Matrix *m, const void *x, void *y) {
    const Layer *l = w->l;
    const int threads = w->attention.threads;
    const long rows = w->f->rows;
    if (l->tiles) {
        specdec_tiles(x, m->weight, m->bias, y, rows, m->inputs / 32, m->outputs, l->tiles, threads);
        return 0;
    }
    if (l->type == BFLOAT16)
        for (long i = 0; i < rows * m->inputs; i += LANES) store(w->wide, i, FLOAT32, load(x, i, BFLOAT16));
    return specdec_linear(l->type == BFLOAT16 ? w->wide : x, m->weight, m->bias, y, rows, m->inputs, m->outputs, l->type,
                          l->type, threads);
}

/* What is given for each row `r`, by all threads where there are rows enough. */
#define EACH_ROW(w, ...)                                                                                               \
    do {                                                                                                               \
        const long rows = (w)->f->rows;                                                                                \
        _Pragma("omp parallel for num_threads((w)->attention.threads) schedule(static) if (rows >= FEW)")              \
        for (long r = 0; r < rows; r++) __VA_ARGS__;                                                                   \
    } while (0)

static void norm_row(const Layer *l, const char *x, const void *weight, char *y) {
    specdec_norm(x, weight, y, 1, l->hidden, l->eps, l->type, 1);
}

/* y += x */
INLINE void add(const Layer *l, const char *x, char *y) {
    for (long i = 0; i < l->hidden; i += LANES) store(y, i, l->type, load(x, i, l->type) + load(y, i, l->type));
}

/* What the heads are made of: norm(x), behind it in a draft head the norm of what was embedded. */
static void norm_inputs(const Work *w, const char *x) {
    const Layer *l = w->l;
    const long bytes = l->hidden * bytes_of(l);
    const char *embedded = w->f->embedded;
    if (!l->embedded_norm) {
        EACH_ROW(w, norm_row(l, x + r * bytes, l->input_norm, w->normed + r * bytes));
        return;
    }
    EACH_ROW(w, {
        norm_row(l, embedded + r * bytes, l->embedded_norm, w->normed + 2 * r * bytes);
        norm_row(l, x + r * bytes, l->input_norm, w->normed + (2 * r + 1) * bytes);
    });
}

/* Queries and keys through norms of their own, in place. */
static void norm_heads(const Work *w) {
    const Layer *l = w->l;
    const Placing *p = &w->placing;
    const long bytes = p->size * bytes_of(l), all = p->heads_count + 2 * p->kv_heads;
    EACH_ROW(w, {
        char *heads = w->heads + r * all * bytes, *keys = heads + p->heads_count * bytes;
        specdec_norm(heads, l->q_norm, heads, p->heads_count, p->size, l->eps, l->type, 1);
        specdec_norm(keys, l->k_norm, keys, p->kv_heads, p->size, l->eps, l->type, 1);
    });
}

static int attend(Work *w) {
    Attention *a = &w->attention;
    w->placing.heads = w->heads;
    specdec_place(&w->placing);
    a->query = w->heads;
    a->heads = w->placing.heads_count;
    a->query_step = w->l->qkv.outputs;
    a->request_step = a->rows * a->query_step;
    a->keys = w->placing.keys;
    a->values = w->placing.values;
    a->scale = w->f->scale;
    a->out = w->seen;
    return specdec_attention(a);
}

static int layer(Work *w, const char *x, char *y) {
    const Layer *l = w->l;
    const long bytes = l->hidden * bytes_of(l);
    int failed = furnish(w);
    if (failed) return failed;
    norm_inputs(w, x);
    failed |= multiply(w, &l->qkv, w->normed, w->heads);
    if (l->q_norm) norm_heads(w);
    failed |= attend(w);
    failed |= multiply(w, &l->out, w->seen, w->between);
    EACH_ROW(w, {
        if (x != y) memcpy(y + r * bytes, x + r * bytes, (size_t)bytes);
        add(l, w->between + r * bytes, y + r * bytes);
        norm_row(l, y + r * bytes, l->mlp_norm, w->normed + r * bytes);
    });
    failed |= multiply(w, &l->gate_up, w->normed, w->between);
    specdec_gate(w->between, w->inner, w->f->rows, l->intermediate, l->type, w->attention.threads);
    failed |= multiply(w, &l->down, w->inner, w->normed);
    EACH_ROW(w, add(l, w->normed + r * bytes, y + r * bytes));
    return failed;
}

/* Copy the states before a layer to where its taps stand among the features; a tap may be asked for twice. */
static void tap(const Forward *f, long before, const char *x, long bytes) {
    for (long place = 0; place < f->tap_count; place++) {
        if (f->taps[place] != before) continue;
        for (long r = 0; r < f->rows; r++)
            memcpy((char *)f->features + (r * f->tap_count + place) * bytes, x + r * bytes, (size_t)bytes);
    }
}

/* Returns 0, or 1 when there is no memory. */
int specdec_layers(const Layer *layers, long count, const Forward *f) {
    const void *x = f->x;
    int failed = 0;
    for (long i = 0; i < count && !failed; i++, x = f->y) {
        Work w = {.l = layers + i, .f = f, .attention = *f->attentions[i], .placing = f->placing};
        w.placing.keys = (char *)f->placing.keys + i * f->plane;
        w.placing.values = (char *)f->placing.values + i * f->plane;
        tap(f, i, x, layers[i].hidden * bytes_of(layers + i));
        failed = layer(&w, x, f->y);
    }
    if (count) tap(f, count, x, layers->hidden * bytes_of(layers));
    return failed;
}
