/* A product with a matrix that lies packed: 64 columns of it, for a panel of rows.
 *
 * A number is a sum over its inputs in their order, whatever the other rows. Of a matrix (N, K) in
 * bfloat16 it is one in float32 from end to end. A row that meets a matrix in 8 or 4 bits is
 * rounded to 8 bits first, in groups of 64 inputs as the matrix is (`eight_row`); a group is summed
 * exactly, in whole numbers, then scaled by both scales and added in float32.
 */
#pragma once

#include "given.h"
#include "simd.h"
#include "team.h"

#define COLUMNS 64 /* of a product, in one piece */
#define GROUP 64   /* inputs that share a scale */
#define PANEL 96   /* rows for which a group is unpacked once */
#define STEPS (GROUP / 4)
#define EIGHT (GROUP + 8) /* bytes of a row's group in 8 bits */
#define LEAST 1e-30f      /* a group of smaller numbers than this is one of zeros */
#define INFINITE 0x7f800000u
#define CHUNK \
    128 /* inputs that all rows of a panel meet before the next ones, where numbers are of 16 bits \
         */
#define SCALES (COLUMNS * 2) /* bytes */
#define AHEAD 4096           /* bytes: the processor's own prefetching ends with a page */

/* clang-format off */
/* How a matrix (N, K) lies: blocks of 64 rows (the last padded with zeros), one behind the other,
 * and in a block the words of each pair of columns side by side
 *
 *   w(0, 0..1) w(1, 0..1) .. w(63, 0..1)
 *   w(0, 2..3) w(1, 2..3) .. w(63, 2..3)
 *   ..                                      K / 2 lines of a block: b of `product` in simd.h
 *
 * 16 bits: words of two bfloat16, which is how oneDNN packs it.
 *  8 bits: words of four columns, each a byte, as a number + 128, so K / 4 lines; before each 16
 *          lines their 64 scales, bfloat16.
 *  4 bits: the same in half a line's bytes, as a number + 8. The lower halves of its first 64 bytes
 *          are the line's first quarter, the upper ones the second; its last 64 hold the others.
 *
 * How a row (K) of bfloat16 lies in 8 bits: 72 bytes for each 64 columns, one behind the other: the
 * numbers, int8; their scale, float32; their sum, int32.
 */
/* clang-format on */

INLINE int is_packing(int64_t bits) { return bits == 16 || bits == 8 || bits == 4; }

INLINE int64_t group_bytes(int64_t bits) { return SCALES + GROUP * COLUMNS * bits / 8; }

INLINE int64_t block_bytes(int64_t bits, int64_t inputs) {
    return bits == 16 ? inputs * COLUMNS * 2 : inputs / GROUP * group_bytes(bits);
}

INLINE int64_t whole_blocks(int64_t outputs) { return (outputs + COLUMNS - 1) / COLUMNS; }

INLINE int64_t packed_bytes(int64_t bits, int64_t outputs, int64_t inputs) {
    return whole_blocks(outputs) * block_bytes(bits, inputs);
}

INLINE int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

/* A panel's rows by tiles, in each as many but for one: a short one would wait for its own sums. */
INLINE int64_t tiles_of(int64_t rows) { return (rows + TILE - 1) / TILE; }

INLINE int64_t tile_rows(int64_t rows, int64_t tiles, int64_t tile) {
    return rows / tiles + (tile < rows % tiles);
}

/* Slow reading: `torch.Tensor.bfloat16`. */
INLINE __m512 rounded16(__m512 x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* Up to 16 bfloat16 as float32, zeros behind them. Slow reading: `torch.Tensor.float`. */
INLINE __m512 some16(const char *from, int64_t count) {
    const __mmask16 there = (__mmask16)((1u << least(count, 16)) - 1);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

/* A row of bfloat16, K a multiple of 64, in 8 bits; in place where out is x. What is not finite
 * makes its group so, by a scale that is not, beside zeros. Slow reading: `eight`. */
INLINE void eight_row(const char *x, int64_t width, char *out) {
    const __m512i sign = _mm512_set1_epi16(0x7fff);
    for (int64_t k = 0; k < width; k += GROUP, x += GROUP * 2, out += EIGHT) {
        const __m512i all = _mm512_max_epu16(_mm512_and_si512(_mm512_loadu_si512(x), sign),
                                             _mm512_and_si512(_mm512_loadu_si512(x + 64), sign));
        const __m256i half =
            _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        const __m128i some = _mm_max_epu16(_mm256_castsi256_si128(half),
                                           _mm256_extracti128_si256(half, 1)),
                      least_other = _mm_minpos_epu16(_mm_xor_si128(some, _mm_set1_epi16(-1)));
        const uint32_t bits = (uint32_t)(uint16_t)~_mm_extract_epi16(least_other, 0) << 16;
        float largest;
        memcpy(&largest, &bits, 4);
        const int is_zero = largest < LEAST; /* of NaN it is not */
        const __mmask16 there = bits < INFINITE ? 0xffff : 0;
        const float scale = is_zero ? 0.0f : largest / 127.0f;
        const __m512 by = _mm512_set1_ps(is_zero ? 0.0f : 127.0f / largest);
        __m512i numbers[4], sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            numbers[j] = _mm512_maskz_cvtps_epi32(there, _mm512_mul_ps(load16(0, x + 32 * j), by));
            sum = _mm512_add_epi32(sum, numbers[j]);
        }
        const int32_t total = _mm512_reduce_add_epi32(sum);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm_storeu_si128((__m128i *)(out + 16 * j), _mm512_cvtsepi32_epi8(numbers[j]));
        memcpy(out + GROUP, &scale, 4);
        memcpy(out + GROUP + 4, &total, 4);
    }
}

/* sum (rows, 64) += x numbers over a step, whose line is y. Slow reading: `torch.addmm`. */
INLINE void meet(const int rows, const char *x, int64_t row, const __m512i y[4], __m512 sum[][4]) {
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        const __m512i pair = _mm512_set1_epi32(word(x + i * row * 2));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = multiply_add(0, pair, y[j], sum[i][j]);
    }
}

/* A line of a group, a byte a number. Slow reading: `Quantized.dense`. */
INLINE void line(const int bits, const char *group, int64_t s, __m512i y[4]) {
    const char *at = group + SCALES + s * COLUMNS * 4 * bits / 8;
    const __m512i low = _mm512_set1_epi8(15);
    if (bits == 8)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) y[j] = _mm512_loadu_si512(at + 64 * j);
    else
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512i codes = _mm512_loadu_si512(at + 64 * j);
            y[2 * j] = _mm512_and_si512(codes, low);
            y[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        }
}

/* sum += x y: 16 sums of four products each, x bytes from 0 on, y signed. The compiler's own form
 * of it copies each sum before and behind, which takes twice as long. Slow reading:
 * `torch.addmm`. */
INLINE __m512i multiply_add_bytes(__m512i x, __m512i y, __m512i sum) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}

/* sums (rows, 64) += both scales * (x numbers) over a group, x in 8 bits. zero: the byte that
 * stands for 0. Slow reading: `torch.addmm`. */
INLINE void group_product(const int bits, const int zero, const int rows, const char *x,
                          int64_t row, const char *group, float sums[][COLUMNS]) {
    __m512i sum[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        const uint32_t total = (uint32_t)word(x + i * row * 2 + GROUP + 4);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[i][j] = _mm512_set1_epi32((int)(0 - (uint32_t)zero * total));
    }
    for (int64_t s = 0; s < STEPS; s++) {
        __m512i y[4];
        line(bits, group, s, y);
        for (int j = 0; j < bits / 2; j++)
            _mm_prefetch(group + AHEAD + s * COLUMNS * 4 * bits / 8 + 64 * j, _MM_HINT_T0);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m512i four = _mm512_set1_epi32(word(x + i * row * 2 + s * 4));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = multiply_add_bytes(y[j], four, sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 scale = load16(0, group + 32 * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m512 own =
                             _mm512_castsi512_ps(_mm512_set1_epi32(word(x + i * row * 2 + GROUP))),
                         whole = _mm512_cvtepi32_ps(sum[i][j]);
            _mm512_store_ps(&sums[i][16 * j], _mm512_fmadd_ps(scale, _mm512_mul_ps(own, whole),
                                                              _mm512_load_ps(&sums[i][16 * j])));
        }
    }
}

/* The same over a number of rows, up to TILE, that is known at run time only. Slow reading:
 * `torch.addmm`. */
INLINE void group_products(const int bits, const int zero, int64_t rows, const char *x, int64_t row,
                           const char *group, float sums[][COLUMNS]) {
#define GROUP_PRODUCT(R) \
    case R: group_product(bits, zero, R, x, row, group, sums); break;
    switch (rows) {
        GROUP_PRODUCT(6)
        GROUP_PRODUCT(5) GROUP_PRODUCT(4) GROUP_PRODUCT(3) GROUP_PRODUCT(2) GROUP_PRODUCT(1)
    }
}

/* The same over a panel of rows, for which a group of 4 bits is unpacked once. Slow reading:
 * `torch.addmm`. */
INLINE void panel_products(const int bits, int64_t rows, const char *x, int64_t row,
                           const char *group, float sums[][COLUMNS]) {
    char bytes[SCALES + GROUP * COLUMNS] __attribute__((aligned(64)));
    if (bits == 4) {
        memcpy(bytes, group, SCALES);
        for (int64_t s = 0; s < STEPS; s++) {
            __m512i y[4];
            line(4, group, s, y);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_store_si512(bytes + SCALES + s * COLUMNS * 4 + 64 * j, y[j]);
        }
        group = bytes;
    }
    const int64_t tiles = tiles_of(rows);
    for (int64_t t = 0, i = 0, some; t < tiles; t++, i += some) {
        some = tile_rows(rows, tiles, t);
        group_products(8, bits == 4 ? 8 : 128, some, x + i * row * 2, row, group, sums + i);
    }
}

/* All groups of 64 columns. Slow reading: `functional.linear`. */
INLINE void groups_products(const int bits, int64_t rows, const char *x, int64_t row,
                            int64_t inputs, const char *block, float sums[][COLUMNS]) {
    memset(sums, 0, (size_t)rows * sizeof sums[0]);
    for (int64_t k = 0; k < inputs; k += GROUP, x += EIGHT, block += group_bytes(bits))
        if (rows > TILE) panel_products(bits, rows, x, row, block, sums);
        else group_products(bits, bits == 4 ? 8 : 128, rows, x, row, block, sums);
}

/* sums (rows, 64) += x numbers over some steps of 16 bits. coming: what is fetched meanwhile, two
 * lines a step, or null: all at once would wait for each other. Slow reading: `torch.addmm`. */
INLINE void chunk_product(const int rows, int64_t steps, const char *x, int64_t row,
                          const char *lines, const char *coming, float sums[][COLUMNS]) {
    __m512 sum[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_load_ps(&sums[i][16 * j]);
    for (int64_t s = 0; s < steps; s++) {
        __m512i y[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) y[j] = _mm512_loadu_si512(lines + s * COLUMNS * 4 + 64 * j);
        if (coming) {
            _mm_prefetch(coming + s * 128, _MM_HINT_T0);
            _mm_prefetch(coming + s * 128 + 64, _MM_HINT_T0);
        }
        meet(rows, x + s * 4, row, y, sum);
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_store_ps(&sums[i][16 * j], sum[i][j]);
}

/* 64 columns of 16 bits for a panel of several tiles: each line is read from memory once, and while
 * a chunk is met, the first two tiles fetch the next. Slow reading: `functional.linear`. */
INLINE void chunks_products(int64_t rows, const char *x, int64_t row, int64_t inputs,
                            const char *block, float sums[][COLUMNS]) {
    const int64_t tiles = tiles_of(rows);
    memset(sums, 0, (size_t)rows * sizeof sums[0]);
    for (int64_t k = 0; k < inputs; k += CHUNK) {
        const int64_t steps = least(CHUNK, inputs - k) / 2;
        const char *lines = block + k * COLUMNS * 2, *next = lines + steps * COLUMNS * 4;
        for (int64_t t = 0, i = 0, some; t < tiles; t++, i += some) {
            const char *coming = t < 2 && k + CHUNK < inputs ? next + t * steps * 128 : 0,
                       *from = x + (i * row + k) * 2;
            some = tile_rows(rows, tiles, t);
#define CHUNK_PRODUCT(R) \
    case R: \
        if (coming) chunk_product(R, steps, from, row, lines, coming, sums + i); \
        else chunk_product(R, steps, from, row, lines, 0, sums + i); \
        break;
            switch (some) { CHUNK_PRODUCT(6) CHUNK_PRODUCT(5) CHUNK_PRODUCT(4) CHUNK_PRODUCT(3) }
        }
    }
}

/* Up to PANEL rows of x, `row` elements of 16 bits apart, times 64 columns of a packed matrix; of 8
 * or 4 bits, of x in 8. Slow reading: `functional.linear`. */
static __attribute__((noinline)) void piece(int64_t bits, int64_t rows, const char *x, int64_t row,
                                            int64_t inputs, const char *matrix, int64_t block,
                                            float sums[][COLUMNS]) {
    const char *at = matrix + block * block_bytes(bits, inputs);
    if (bits == 8) groups_products(8, rows, x, row, inputs, at, sums);
    else if (bits == 4) groups_products(4, rows, x, row, inputs, at, sums);
    else if (rows > TILE) chunks_products(rows, x, row, inputs, at, sums);
    else
        tile_products(0, rows, COLUMNS, inputs / 2, x, row * 2, 4, (const uint32_t *)at, COLUMNS,
                      sums[0], COLUMNS, 0);
}

/* Elements for each row that a layer's `output` has beside what it was given: the stream; what a
 * product reads, of the width or of attention's answer; the feed-forward's inner row. */
INLINE int64_t behind_words(int64_t width, int64_t asked, int64_t inner) {
    return width + most(width, asked) + inner;
}

typedef struct { /* rows, `row` elements of 16 bits apart */
    const char *at;
    int64_t row;
} Rows;

/* A phase of rows (rows, heads, D), heads side by side, `width` in all: as a product with a matrix
 * of so many bits reads them, in `room` (rows, width) unless they are so where they lie. Slow
 * reading: `eight`. */
INLINE Rows eight_rows(uint64_t call, int phase, int64_t bits, const View *x, int64_t width,
                       char *room) {
    const int64_t rows = bits == 16 ? 0 : x->rows;
    for (int64_t i; (i = take(call, phase, rows)) >= 0; give(call, phase))
        eight_row(x->at + i * x->row * 2, width, room + i * width * 2);
    await(call, phase, rows);
    return bits == 16 ? (Rows){ x->at, x->row } : (Rows){ room, width };
}
