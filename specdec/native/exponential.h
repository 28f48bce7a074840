#ifndef SPECDEC_EXPONENTIAL_H
#define SPECDEC_EXPONENTIAL_H

#include "vectors.h"

/* exp for x <= 0, to about 2 ulp (Cephes expf); exactly 0 below -87; what is not a number stays so. */
INLINE floats exponential(floats x) {
#if defined(__AVX512F__) /* the same, with its own rounding and scaling: half the steps */
    const __m512 all = (__m512)x, n = _mm512_roundscale_ps(_mm512_mul_ps(all, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), all), p = _mm512_set1_ps(1.9875691500e-4f);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return (floats)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(all, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), p, n);
#else
    ints none = x < -87.0f;
    floats safe = (floats)((ints)x & ~none);
    ints n = __builtin_convertvector(safe * 1.44269504088896341f - 0.5f, ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = safe - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    words power = (words)((n + 127) << 23);
    return (floats)((ints)(p * (floats)power) & ~none);
#endif
}

#endif
