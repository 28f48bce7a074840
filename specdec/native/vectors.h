/* One register of floats in the compiler's own vector types: eight with AVX2, sixteen with AVX-512, four elsewhere. */
#ifndef SPECDEC_VECTORS_H
#define SPECDEC_VECTORS_H

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12 /* rows whose sums fit the registers beside one panel */
#define REGISTERS 32
#define EACH_ROWS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#define REGISTERS 16
#define EACH_ROWS(OF) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#else
#define LANES 4
#define ROWS 4
#define REGISTERS 16
#define EACH_ROWS(OF) OF(1) OF(2) OF(3) OF(4)
#endif
#define PANEL 16 /* outputs side by side in packed weights, and what a head's size must divide by */
#define PARTS (PANEL / LANES)

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1 };

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

INLINE floats load(const void *from, long at, int type) {
    if (type == FLOAT32) return *(const floats *)((const float *)from + at);
#if defined(__AVX512F__) /* in one step: the compiler takes five */
    const __m256i narrow = _mm256_loadu_si256((const __m256i_u *)((const uint16_t *)from + at));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__AVX2__)
    const __m128i narrow = _mm_loadu_si128((const __m128i_u *)((const uint16_t *)from + at));
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#else
    words bits = __builtin_convertvector(*(const halves *)((const uint16_t *)from + at), words);
    return (floats)(bits << 16);
#endif
}

/* One of them alone. */
INLINE float entry(const void *x, long at, int type) {
    if (type == FLOAT32) return ((const float *)x)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bfloat16: to nearest, ties to even, as torch rounds; what is not a number stays so. */
INLINE void store(void *to, long at, int type, floats x) {
    if (type == FLOAT32) {
        *(floats *)((float *)to + at) = x;
        return;
    }
    words bits = (words)x, odd = (words)(x != x);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (rounded & ~odd) | (odd & 0x7fc0);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i_u *)((uint16_t *)to + at), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    *(halves *)((uint16_t *)to + at) = __builtin_convertvector(rounded, halves);
#endif
}

/* Four of `stride` words each from LANES / 4 places, side by side. */
INLINE floats gather_fours(const uint32_t *from, long stride) {
#if defined(__AVX512F__)
    __m512i all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i_u *)from));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i_u *)(from + stride)), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i_u *)(from + 2 * stride)), 2);
    return (floats)_mm512_inserti32x4(all, _mm_loadu_si128((const __m128i_u *)(from + 3 * stride)), 3);
#elif defined(__AVX__)
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps((const float *)from));
    return (floats)_mm256_insertf128_ps(low, _mm_loadu_ps((const float *)(from + stride)), 1);
#else
    (void)stride;
    return *(const floats *)from;
#endif
}

/* Word `n` of each four, four times. */
INLINE floats spread_fours(floats fours, const int n) {
#if defined(__AVX512F__)
#define SPREAD(x, places) (floats)_mm512_permute_ps((__m512)(x), places)
#elif defined(__AVX__)
#define SPREAD(x, places) (floats)_mm256_permute_ps((__m256)(x), places)
#endif
#ifdef SPREAD
    return n == 0 ? SPREAD(fours, 0x00) : n == 1 ? SPREAD(fours, 0x55) : n == 2 ? SPREAD(fours, 0xaa) : SPREAD(fours, 0xff);
#else
    return fours[n] - (floats){0};
#endif
}

/* Is a comparison true anywhere? */
INLINE int any(ints truths) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)truths, (__m512i)truths) != 0;
#else
    int32_t all = 0;
    for (int lane = 0; lane < LANES; lane++) all |= truths[lane];
    return all != 0;
#endif
}

static pthread_key_t scratch_key;
static int scratch_known;

static void scratch_begin(void) { scratch_known = !pthread_key_create(&scratch_key, free); }

/* Scratch of this thread that lasts from call to call and goes with the thread; NULL without memory. */
static inline float *scratch(size_t count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    static __thread float *room;
    static __thread size_t have;
    if (count > have) {
        pthread_once(&once, scratch_begin);
        free(room);
        room = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
        have = room ? count : 0;
        if (scratch_known) pthread_setspecific(scratch_key, room);
    }
    return room;
}

#endif
