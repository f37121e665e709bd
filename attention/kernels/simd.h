/* What the kernels share: AVX-512 on words.
 *
 * A word is 32 bits: one float32, or two neighbouring bfloat16, which vdpbf16ps multiplies and adds
 * in float32. `wide` says which (float32: 1); it is a constant wherever it stands in a loop. No
 * function here is called from outside: each file that includes this has its own, inlined. The
 * instructions are asked for here, not by the compiler's options, since the machine that builds
 * need not be the one that runs; `supported` in cpu.h asks that one.
 */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma")

#define INLINE static inline __attribute__((always_inline))
#define TILE 6  /* rows of a product whose sums are in registers, with 64 columns */
#define SUMS 24 /* registers of them */

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 2^x by a polynomial on [0, 1) of relative error 7e-8; where it will be rounded to bfloat16
 * (2e-3), of 7e-5. 0 for -inf. Slow reading: `torch.exp2`. */
INLINE __m512 exp2_16(const int wide, __m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 p;
    if (!wide) {
        p = _mm512_set1_ps(0.07802452004189259f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.2260671591264144f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6958335392244068f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999252186224653f));
        return _mm512_scalef_ps(p, x);
    }
    p = _mm512_set1_ps(0.0018775766453451859f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00898934016274927f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05582631799263116f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24015361706488592f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931530731977913f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999999250635696f));
    return _mm512_scalef_ps(p, x);
}

/* 2^x on -1/2..1/2, of relative error 7.5e-5, where it will be rounded to bfloat16. Slow reading:
 * `torch.exp2`. */
INLINE __m512 cubic(__m512 x) {
    __m512 p = _mm512_set1_ps(0.05517166905792496f);
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0.24261112219321604f));
    p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(0.6932609854606555f));
    return _mm512_fmadd_ps(p, x, _mm512_set1_ps(0.9999280735394012f));
}

/* 2^x of |x| up to 120: added to a number of which 1 is the last bit, x is rounded to a whole one,
 * and that stands where an exponent does once it is moved there. Slow reading: `torch.exp2`. */
INLINE __m512 near_exp2_16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f), sum = _mm512_add_ps(x, magic);
    const __m512 p = cubic(_mm512_sub_ps(x, _mm512_sub_ps(sum, magic)));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(sum), 23)));
}

/* Slow reading: `torch.addcmul`. */
INLINE __m512 multiply_add(const int wide, __m512i x, __m512i y, __m512 sum) {
    return wide ? _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum)
                : _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

/* 16 elements as float32. Slow reading: `torch.Tensor.float`. */
INLINE __m512 load16(const int wide, const char *from) {
    return wide ? _mm512_loadu_ps(from)
                : _mm512_castsi512_ps(_mm512_slli_epi32(
                      _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* Slow reading: `torch.Tensor.bfloat16`. */
INLINE void store16(const int wide, char *to, __m512 x) {
    if (wide) _mm512_storeu_ps(to, x);
    else _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* A row of one head in 8 bits, its scale behind it (int8.py). The largest magnitude is found among
 * the bits, where NaN is above infinity, and that above all numbers. Slow reading: `round_off`. */
INLINE void round_row(const int wide, int64_t width, const char *from, char *to) {
    const int64_t size = wide ? 4 : 2;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512 most_of = _mm512_set1_ps(127.0f), least_of = _mm512_set1_ps(-127.0f);
    __m512i top = _mm512_setzero_si512();
    for (int64_t d = 0; d < width; d += 16) {
        const __m512i x = _mm512_castps_si512(load16(wide, from + d * size));
        top = _mm512_max_epi32(top, _mm512_and_si512(x, magnitude));
    }
    const int32_t found = _mm512_reduce_max_epi32(top);
    float largest;
    memcpy(&largest, &found, sizeof largest);
    const int is_number = largest < INFINITY;
    const float scale = is_number ? largest / 127.0f : NAN;
    const __mmask16 usable = is_number && scale > 0.0f ? 0xffff : 0;
    for (int64_t d = 0; d < width; d += 16) {
        __m512 x = _mm512_div_ps(load16(wide, from + d * size), _mm512_set1_ps(scale));
        x = _mm512_max_ps(_mm512_min_ps(x, most_of), least_of);
        const __m512i told = _mm512_maskz_cvtps_epi32(usable, x); /* to the nearest, ties to even */
        _mm_storeu_si128((__m128i *)(to + d), _mm512_cvtepi32_epi8(told));
    }
    memcpy(to + width, &scale, sizeof scale);
}

/* to (elements) = sums / total, in the answer's dtype. Slow reading: `torch.div`. */
INLINE void store_answer(const int wide, char *to, __m512 sum, float total) {
    const __m512 answer =
        total == 0.0f ? _mm512_setzero_ps() : _mm512_div_ps(sum, _mm512_set1_ps(total));
    store16(wide, to, answer);
}

/* A word, wherever it stands: rows of bfloat16 may begin in the middle of one. Slow reading:
 * `torch.Tensor.view`. */
INLINE int32_t word(const char *at) {
    int32_t x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* sum (rows, 16 columns) += a b over `steps` words: a by strides in bytes, b (steps, columns). Slow
 * reading: `torch.addmm`. */
INLINE void accumulate(const int wide, const int rows, const int columns, int64_t steps,
                       const char *a, int64_t a_row, const int64_t a_step, const uint32_t *b,
                       int64_t b_row, __m512 *sum) {
    for (int64_t s = 0; s < steps; s++) {
        __m512i y[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) y[j] = _mm512_loadu_si512(b + s * b_row + 16 * j);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const __m512i x = _mm512_set1_epi32(word(a + i * a_row + s * a_step));
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++)
                sum[i * columns + j] = multiply_add(wide, x, y[j], sum[i * columns + j]);
        }
    }
}

/* c (rows, 16 columns) = factors c + a b, as `accumulate`. No factors: c = a b. Slow reading:
 * `torch.addmm`. */
INLINE void product(const int wide, const int rows, const int columns, int64_t steps, const char *a,
                    int64_t a_row, const int64_t a_step, const uint32_t *b, int64_t b_row, float *c,
                    int64_t c_row, const float *factors) {
    __m512 sum[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            sum[i * columns + j] = factors ? _mm512_mul_ps(_mm512_loadu_ps(c + i * c_row + 16 * j),
                                                           _mm512_set1_ps(factors[i]))
                                           : _mm512_setzero_ps();
    accumulate(wide, rows, columns, steps, a, a_row, a_step, b, b_row, sum);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++)
            _mm512_storeu_ps(c + i * c_row + 16 * j, sum[i * columns + j]);
}

/* The same over `count` columns, a multiple of 16. Slow reading: `torch.addmm`. */
INLINE void products(const int wide, const int rows, int64_t count, int64_t steps, const char *a,
                     int64_t a_row, const int64_t a_step, const uint32_t *b, int64_t b_row,
                     float *c, int64_t c_row, const float *factors) {
    int64_t j = 0;
    for (; j + 64 <= count; j += 64)
        product(wide, rows, 4, steps, a, a_row, a_step, b + j, b_row, c + j, c_row, factors);
    switch ((count - j) / 16) {
    case 3:
        product(wide, rows, 3, steps, a, a_row, a_step, b + j, b_row, c + j, c_row, factors);
        break;
    case 2:
        product(wide, rows, 2, steps, a, a_row, a_step, b + j, b_row, c + j, c_row, factors);
        break;
    case 1:
        product(wide, rows, 1, steps, a, a_row, a_step, b + j, b_row, c + j, c_row, factors);
        break;
    }
}

/* The same over a number of rows, up to TILE, that is known at run time only. Slow reading:
 * `torch.addmm`. */
INLINE void tile_products(const int wide, int64_t rows, int64_t count, int64_t steps, const char *a,
                          int64_t a_row, const int64_t a_step, const uint32_t *b, int64_t b_row,
                          float *c, int64_t c_row, const float *factors) {
#define PRODUCTS(R) \
    case R: products(wide, R, count, steps, a, a_row, a_step, b, b_row, c, c_row, factors); break;
    switch (rows) { PRODUCTS(6) PRODUCTS(5) PRODUCTS(4) PRODUCTS(3) PRODUCTS(2) PRODUCTS(1) }
}

/* Which of 16 columns, the first of them `column`, stand within low..high. Slow reading:
 * `Band.hidden`. */
INLINE __mmask16 seen16(int64_t column, int64_t low, int64_t high) {
    const int64_t a = least(most(low - column, 0), 16), b = least(most(high - column, 0), 16);
    return (__mmask16)(((1u << b) - 1) & ~((1u << a) - 1));
}

/* Put `instead` where the 16 scores, the first of them of column `column`, stand outside low..high.
 * Slow reading: `Band.hidden`. */
INLINE void hide(float *scores, int64_t column, int64_t low, int64_t high, float instead) {
    _mm512_storeu_ps(scores,
                     _mm512_mask_blend_ps(seen16(column, low, high), _mm512_set1_ps(instead),
                                          _mm512_loadu_ps(scores)));
}

/* 16 rows of 16 words, transposed. Slow reading: `torch.t`. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* clang-format off */
/* How rows are packed for a product (words of 32 bits; one row of `rows` a line):
 *
 *   rows (n, D), float32        turned (D, columns)           packed as they are (n, D)
 *   a0 a1 a2 ..                 a0 b0 c0 .. 0                 a0 a1 a2 ..
 *   b0 b1 b2 ..                 a1 b1 c1 .. 0                 b0 b1 b2 ..
 *   c0 c1 c2 ..                 a2 b2 c2 .. 0                 c0 c1 c2 ..
 *
 *   rows (n, D), bfloat16       turned (D / 2, columns)       packed by pairs of rows (n / 2, D)
 *   a0a1 a2a3 ..                a0a1 b0b1 c0c1 .. 0           a0b0 a1b1 a2b2 ..
 *   b0b1 b2b3 ..                a2a3 b2b3 c2c3 .. 0           c0d0 c1d1 c2d2 ..
 *
 * A product over D reads turned keys, a word of a query beside those of 16 keys; one over n reads
 * packed values, a word of weights beside 16 words of a row, or of a pair of rows.
 */
/* clang-format on */

/* n rows of words, transposed: (words, columns), zeros up to a multiple of 16 columns. bytes: of a
 * row's stride. Slow reading: `torch.t`. */
INLINE void pack_turned(const char *k, int64_t bytes, int64_t n, const int64_t words, uint32_t *to,
                        const int64_t columns) {
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t w = 0; w < words; w += 16) {
            __m512i r[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                r[i] = j + i < n ? _mm512_loadu_si512(k + (j + i) * bytes + 4 * w)
                                 : _mm512_setzero_si512();
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (w + i) * columns + j, r[i]);
        }
}

/* Rows first..last of (last, D) as a product over rows reads them: float32 as they are, bfloat16
 * (whole / 2, D) as pairs of rows; the others up to `whole`, a multiple of 16, are zeros. bytes: of
 * a row's stride. Tells whether an element is NaN or infinite: 0 times it is NaN, so a row that
 * must not see it may not even weigh it by 0. Slow reading: `torch.isfinite`. */
INLINE int pack_rows(const int wide, const char *v, int64_t bytes, int64_t first, int64_t last,
                     int64_t whole, const int64_t width, uint32_t *to) {
    const __m512i zero = _mm512_setzero_si512();
    if (wide) {
        __mmask16 found = 0;
        for (int64_t j = 0; j < whole; j++)
            for (int64_t d = 0; d < width; d += 16) {
                const __m512i x =
                    first <= j && j < last ? _mm512_loadu_si512(v + j * bytes + 4 * d) : zero;
                found |= _mm512_fpclass_ps_mask(_mm512_castsi512_ps(x),
                                                0x99); /* either NaN, either infinity */
                _mm512_storeu_si512(to + j * width + d, x);
            }
        return found != 0;
    }
    __mmask32 found = 0;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const __m512i ascending =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i left = _mm512_or_si512(
        ascending, _mm512_slli_epi32(_mm512_add_epi32(ascending, _mm512_set1_epi32(32)), 16));
    const __m512i right =
        _mm512_add_epi32(left, _mm512_set1_epi32(0x00100010)); /* elements 16.. of both rows */
    for (int64_t j = 0; j < whole; j += 2)
        for (int64_t d = 0; d < width; d += 32) {
            const __m512i a =
                first <= j && j < last ? _mm512_loadu_si512(v + j * bytes + 2 * d) : zero;
            const __m512i b = first <= j + 1 && j + 1 < last
                                  ? _mm512_loadu_si512(v + (j + 1) * bytes + 2 * d)
                                  : zero;
            found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, exponent), exponent) |
                     _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, exponent), exponent);
            _mm512_storeu_si512(to + j / 2 * width + d, _mm512_permutex2var_epi16(a, left, b));
            _mm512_storeu_si512(to + j / 2 * width + d + 16,
                                _mm512_permutex2var_epi16(a, right, b));
        }
    return found != 0;
}
