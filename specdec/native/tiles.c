/* y = x W^T + b in bfloat16 on processors that multiply it: by tiles (AMX), or by pairs in a vector (AVX-512 BF16).
 *
 * A panel holds its weights in blocks of 32 inputs: sixteen pairs of neighbouring inputs, each pair's weights for sixteen
 * outputs side by side. That is a tile as AMX reads it, and sixteen vectors of pairs. Sums are float32 and run over the
 * blocks in order, whatever the number of rows: a row's result does not depend on its neighbours.
 */
#define _GNU_SOURCE
#include <omp.h>

#include "kernels.h"
#include "vectors.h"

#define PAIRS 16           /* of inputs in a block */
#define BLOCK (2 * PAIRS)  /* inputs of a block */
#define TILE_BYTES 1024    /* of a block of one panel */
#define NEAR (1024 * 1024) /* weights that stay near while all rows meet them */
#define AHEAD 2048         /* bytes behind the pairs at work from which the next ones are fetched */
#define MOST_ROWS 8        /* which share each read of weights */
#define MOST_PANELS 6

#if defined(__AVX512BF16__)
#include <immintrin.h>

typedef struct {
    const uint16_t *x; /* [rows, blocks, 32] */
    const char *w;     /* [panels, blocks, 16, 16, 2] */
    const float *bias; /* [panels * 16] or NULL */
    uint16_t *y;       /* [rows, outputs] */
    long rows, blocks, outputs;
} Product;

/* Sixteen sums of one row, with the bias, and only as far as there are outputs. */
INLINE void put(const Product *p, long row, long panel, floats y) {
    const long out = panel * PANEL;
    if (p->bias) y += *(const floats *)(p->bias + out);
    if (out + PANEL <= p->outputs) {
        store(p->y, row * p->outputs + out, BFLOAT16, y);
    } else {
        uint16_t last[PANEL];
        store(last, 0, BFLOAT16, y);
        memcpy(p->y + row * p->outputs + out, last, (size_t)(p->outputs - out) * sizeof *last);
    }
}

/* `rows` rows by `panels` panels into `total`; the counts are constants once inlined. Meanwhile weights are fetched from
 * `next` on, `every` bytes a step. */
INLINE void block(const Product *p, long row, long panel, const char *next, long every, __m512 *total, const int rows,
                  const int panels) {
    const long step = p->blocks * TILE_BYTES, wide = p->blocks * BLOCK;
    const char *w = p->w + panel * step;
    const uint16_t *x = p->x + row * wide;
    UNROLL for (int i = 0; i < rows * panels; i++) total[i] = _mm512_setzero_ps();
    for (long k = 0; k < p->blocks * PAIRS; k++) {
        __m512bh weights[MOST_PANELS];
        UNROLL for (int i = 0; i < panels; i++) {
            __builtin_prefetch(next + i * step + k * every);
            weights[i] = (__m512bh)_mm512_loadu_si512(w + i * step + k * 64);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * wide + 2 * k, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int i = 0; i < panels; i++)
                total[r * panels + i] = _mm512_dpbf16_ps(total[r * panels + i], weights[i], both);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int i = 0; i < panels; i++) put(p, row + r, panel + i, (floats)total[r * panels + i]);
    }
}

/* As many sums as fit the registers beside what is multiplied and where it stands. A single panel is what is left of many. */
#define SHAPES(OF)                                                                                                     \
    OF(1, 6) OF(2, 6) OF(3, 6) OF(4, 4) OF(4, 2) OF(5, 2) OF(6, 2) OF(7, 2) OF(8, 2)                                   \
    OF(1, 1) OF(2, 1) OF(3, 1) OF(4, 1) OF(5, 1) OF(6, 1) OF(7, 1) OF(8, 1)

/* Of exactly as many sums: of an array that is longer, GCC leaves some in memory. */
#define BLOCK_OF(rows, panels)                                                                                         \
    static void block_##rows##_##panels(const Product *p, long row, long panel, const char *next, long every) {        \
        __m512 total[rows * panels];                                                                                   \
        block(p, row, panel, next, every, total, rows, panels);                                                        \
    }
SHAPES(BLOCK_OF)

typedef void (*Block)(const Product *p, long row, long panel, const char *next, long every);
#define ENTRY(rows, panels) [rows][panels] = block_##rows##_##panels,
static const Block blocks[MOST_ROWS + 1][MOST_PANELS + 1] = {SHAPES(ENTRY)};

/* All rows by `many` panels. Weights that a few rows meet are fetched shortly before; where more rows meet them, each strip
 * of rows fetches its share of those after them. */
static void group(const Product *p, long panel, long many) {
    const long strips = (p->rows + MOST_ROWS - 1) / MOST_ROWS, step = p->blocks * TILE_BYTES;
    const char *w = p->w + panel * step;
    for (long strip = 0; strip < strips; strip++) {
        const long row = p->rows * strip / strips, below = p->rows * (strip + 1) / strips;
        const char *next = strips == 1 ? w + AHEAD : w + many * step + step * strip / strips;
        blocks[below - row][many](p, row, panel, next, 64 / strips);
    }
}

/* Panels in groups: a few rows take several at once, enough sums in flight to hide the latency of one. */
static void by_pairs(const Product *p, long panel, long last) {
    const long many = p->rows <= 3 ? 6 : p->rows <= 4 ? 4 : 2;
    for (; panel + many <= last; panel += many) group(p, panel, many);
    for (; panel < last; panel++) group(p, panel, 1);
}

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "amx.h"

#define REQUEST 0x1023 /* of arch_prctl: leave to use a part of the state; the kernel then keeps room for it */
#define TILE_DATA 18

/* Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights; odd ones belong to the lower half of a strip. Here the sums
 * of a tile go to where they belong. */
#define STORE(tile, first, many, panel)                                                                                \
    do {                                                                                                               \
        float sums[PAIRS * PANEL] __attribute__((aligned(64)));                                                        \
        _tile_stored(tile, sums, 64);                                                                                  \
        for (long r = 0; r < (many); r++) put(p, (first) + r, panel, *(floats *)(sums + r * PANEL));                   \
    } while (0)

/* Weights into tile 6 or 7; the tile behind them is fetched meanwhile, for by itself the processor does that too late. */
#define WEIGHTS(tile, at)                                                                                              \
    do {                                                                                                               \
        UNROLL for (int line = 0; line < TILE_BYTES; line += 64) __builtin_prefetch((at) + TILE_BYTES + line);         \
        _tile_loadd(tile, at, 64);                                                                                     \
    } while (0)

/* At most sixteen rows: four panels share what is read of x. */
static void short_strip(const Product *p, long row, long rows, long panel, long last) {
    const long step = p->blocks * TILE_BYTES, wide = p->blocks * BLOCK * 2;
    const char *x = (const char *)p->x + row * wide, *w = p->w + panel * step;
    for (; panel + 4 <= last; panel += 4, w += 4 * step) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (long k = 0; k < p->blocks; k++) {
            _tile_loadd(4, x + k * 64, wide);
            WEIGHTS(6, w + k * TILE_BYTES); _tile_dpbf16ps(0, 4, 6);
            WEIGHTS(7, w + step + k * TILE_BYTES); _tile_dpbf16ps(1, 4, 7);
            WEIGHTS(6, w + 2 * step + k * TILE_BYTES); _tile_dpbf16ps(2, 4, 6);
            WEIGHTS(7, w + 3 * step + k * TILE_BYTES); _tile_dpbf16ps(3, 4, 7);
        }
        STORE(0, row, rows, panel);
        STORE(1, row, rows, panel + 1);
        STORE(2, row, rows, panel + 2);
        STORE(3, row, rows, panel + 3);
    }
    for (; panel < last; panel++, w += step) {
        _tile_zero(0);
        for (long k = 0; k < p->blocks; k++) {
            _tile_loadd(4, x + k * 64, wide);
            WEIGHTS(6, w + k * TILE_BYTES); _tile_dpbf16ps(0, 4, 6);
        }
        STORE(0, row, rows, panel);
    }
}

/* 17 to 32 rows, by two panels. */
static void long_strip(const Product *p, long row, long low, long panel, long last) {
    const long step = p->blocks * TILE_BYTES, wide = p->blocks * BLOCK * 2;
    const char *x = (const char *)p->x + row * wide, *below = x + PAIRS * wide, *w = p->w + panel * step;
    for (; panel + 2 <= last; panel += 2, w += 2 * step) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (long k = 0; k < p->blocks; k++) {
            _tile_loadd(4, x + k * 64, wide); _tile_loadd(5, below + k * 64, wide);
            WEIGHTS(6, w + k * TILE_BYTES); WEIGHTS(7, w + step + k * TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(3, 5, 7);
        }
        STORE(0, row, PAIRS, panel);
        STORE(1, row + PAIRS, low, panel);
        STORE(2, row, PAIRS, panel + 1);
        STORE(3, row + PAIRS, low, panel + 1);
    }
    for (; panel < last; panel++, w += step) {
        _tile_zero(0); _tile_zero(1);
        for (long k = 0; k < p->blocks; k++) {
            _tile_loadd(4, x + k * 64, wide); _tile_loadd(5, below + k * 64, wide);
            WEIGHTS(6, w + k * TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
        }
        STORE(0, row, PAIRS, panel);
        STORE(1, row + PAIRS, low, panel);
    }
}

/* As many panels as stay near, under all strips of rows, and so on. */
static void by_tiles(const Product *p, long first, long last) {
    long many = NEAR / (p->blocks * TILE_BYTES) & ~3L;
    if (many < 4 || p->rows <= 2 * PAIRS) many = last - first;
    for (long panel = first; panel < last; panel += many) {
        const long end = panel + many < last ? panel + many : last;
        for (long row = 0; row < p->rows; row += 2 * PAIRS) {
            const long left = p->rows - row < 2 * PAIRS ? p->rows - row : 2 * PAIRS;
            if (left <= PAIRS) {
                configure(left, left);
                short_strip(p, row, left, panel, end);
            } else {
                configure(PAIRS, left - PAIRS);
                long_strip(p, row, left - PAIRS, panel, end);
            }
        }
    }
    _tile_release();
}

static int tiles_allowed(void) { return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0; }
#else
static void by_tiles(const Product *p, long first, long last) { by_pairs(p, first, last); }
static int tiles_allowed(void) { return 0; }
#endif

/* 2 for tiles, 1 for pairs in a vector, 0 where bfloat16 is not multiplied. To be called before the first product. */
int specdec_tiles_kind(void) { return tiles_allowed() ? 2 : 1; }

/* Panels are dealt to threads in runs. kind: at most what `specdec_tiles_kind` gives, and not 0. */
void specdec_tiles(const uint16_t *x, const void *w, const float *bias, uint16_t *y, long rows, long blocks, long outputs,
                   int kind, int threads) {
    const long panels = (outputs + PANEL - 1) / PANEL;
    const Product p = {x, w, bias, y, rows, blocks, outputs};
#pragma omp parallel num_threads(threads)
    {
        const long mine = omp_get_thread_num(), of = omp_get_num_threads();
        const long first = panels * mine / of, last = panels * (mine + 1) / of;
        if (kind == 2) by_tiles(&p, first, last);
        else by_pairs(&p, first, last);
    }
}
#else
int specdec_tiles_kind(void) { return 0; }

void specdec_tiles(const uint16_t *x, const void *w, const float *bias, uint16_t *y, long rows, long blocks, long outputs,
                   int kind, int threads) {
    (void)x, (void)w, (void)bias, (void)y, (void)rows, (void)blocks, (void)outputs, (void)kind, (void)threads;
}
#endif
