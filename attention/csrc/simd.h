/* What the kernels share: AVX-512 on words.
 *
 * A word is 32 bits: one float32, or two neighbouring bfloat16, which vdpbf16ps multiplies and adds in float32. `wide` says
 * which (float32: 1); it is a constant wherever it stands in a loop. No function here is called from outside: each file that
 * includes this has its own, inlined. The instructions are asked for here, not by the compiler's options, since the machine
 * that builds need not be the one that runs; `supported` in softmax.c asks that one.
 */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

#define INLINE static inline __attribute__((always_inline))
#define TILE 6 /* rows of a product whose sums are in registers, with 64 columns */

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 2^x by a polynomial on [0, 1) of relative error 7e-8; 0 for -inf. */
INLINE __m512 exp2_16(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(0.0018775766453451859f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00898934016274927f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05582631799263116f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24015361706488592f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931530731977913f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999999250635696f));
    return _mm512_scalef_ps(p, x);
}

INLINE __m512 multiply_add(const int wide, __m512i x, __m512i y, __m512 sum) {
    return wide ? _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum) : _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

/* to (elements) = sums / total, in the answer's dtype */
INLINE void store_answer(const int wide, char *to, __m512 sum, float total) {
    const __m512 answer = total == 0.0f ? _mm512_setzero_ps() : _mm512_div_ps(sum, _mm512_set1_ps(total));
    if (wide)
        _mm512_storeu_ps(to, answer);
    else
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(answer));
}

/* c (rows, 16 columns) = factors c + a b over `steps` words: a by rows, b (steps, columns). No factors: c = a b. */
INLINE void product(const int wide, const int rows, const int columns, int64_t steps, const uint32_t *a, int64_t a_row,
                    const uint32_t *b, int64_t b_row, float *c, int64_t c_row, const float *factors) {
    __m512 sum[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            sum[i][j] = factors ? _mm512_mul_ps(_mm512_loadu_ps(c + i * c_row + 16 * j), _mm512_set1_ps(factors[i])) : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s++) {
        __m512i y[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) y[j] = _mm512_loadu_si512(b + s * b_row + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m512i x = _mm512_set1_epi32((int)a[i * a_row + s]);
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++) sum[i][j] = multiply_add(wide, x, y[j], sum[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) _mm512_storeu_ps(c + i * c_row + 16 * j, sum[i][j]);
}

/* The same over `count` columns, a multiple of 16. */
INLINE void products(const int wide, const int rows, int64_t count, int64_t steps, const uint32_t *a, int64_t a_row,
                     const uint32_t *b, int64_t b_row, float *c, int64_t c_row, const float *factors) {
    int64_t j = 0;
    for (; j + 64 <= count; j += 64) product(wide, rows, 4, steps, a, a_row, b + j, b_row, c + j, c_row, factors);
    switch ((count - j) / 16) {
    case 3: product(wide, rows, 3, steps, a, a_row, b + j, b_row, c + j, c_row, factors); break;
    case 2: product(wide, rows, 2, steps, a, a_row, b + j, b_row, c + j, c_row, factors); break;
    case 1: product(wide, rows, 1, steps, a, a_row, b + j, b_row, c + j, c_row, factors); break;
    }
}
