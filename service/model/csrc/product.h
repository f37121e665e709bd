/* A product with a matrix that lies packed: 64 columns of it, for a panel of rows.
 *
 * A number is a sum over its inputs in their order, whatever the other rows. Of a matrix (N, K) in
 * bfloat16 it is one in float32 from end to end; of one in 8 or 4 bits each group of 64 inputs is
 * summed with whole numbers, which bfloat16 holds exactly, and then scaled and added in float32.
 */
#pragma once

#include "simd.h"

#define COLUMNS 64 /* of a product, in one piece */
#define GROUP 64   /* inputs that share a scale */
#define PANEL 96   /* rows for which a group is unpacked once */
#define STEPS (GROUP / 2)
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
 *  8 bits: two int8 in a word's place; before each 32 lines their 64 scales, bfloat16.
 *  4 bits: the same in a quarter of a line's bytes. Its 16-bit word i holds element i of the four
 *          quarters of the line, the first one lowest, each as a number + 8.
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

/* 16 int8 as float32. Slow reading: `torch.Tensor.float`. */
INLINE __m512 bytes16(const char *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

/* -8..7 as bfloat16, twice: an index may have any fifth bit. */
static const uint16_t FOURS[32] __attribute__((aligned(64))) = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};

/* A line of a group as words of bfloat16. Slow reading: `Quantized.dense`. */
INLINE void line(const int bits, const char *group, int64_t s, __m512i y[4]) {
    const char *at = group + SCALES + s * COLUMNS * 2 * bits / 8;
    if (bits == 4) {
        const __m512i codes = _mm512_loadu_si512(at), table = _mm512_load_si512(FOURS);
        y[0] = _mm512_permutexvar_epi16(codes, table);
        y[1] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4), table);
        y[2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 8), table);
        y[3] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 12), table);
        return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        y[j] = bits == 16
                   ? _mm512_loadu_si512(at + 64 * j)
                   : (__m512i)_mm512_cvtne2ps_pbh(bytes16(at + 32 * j + 16), bytes16(at + 32 * j));
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

/* sums (rows, 64) += scales * (x numbers) over a group. 16 bits: of a group that is unpacked, its
 * scales before it. Slow reading: `torch.addmm`. */
INLINE void group_product(const int bits, const int rows, const char *x, int64_t row,
                          const char *group, float sums[][COLUMNS]) {
    __m512 sum[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t s = 0; s < STEPS; s++) {
        __m512i y[4];
        line(bits, group, s, y);
        for (int j = 0; bits != 16 && j < bits / 4; j++)
            _mm_prefetch(group + AHEAD + s * COLUMNS * 2 * bits / 8 + 64 * j, _MM_HINT_T0);
        meet(rows, x + s * 4, row, y, sum);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 scale = load16(0, group + 32 * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
            _mm512_store_ps(&sums[i][16 * j],
                            _mm512_fmadd_ps(scale, sum[i][j], _mm512_load_ps(&sums[i][16 * j])));
    }
}

/* The same over a number of rows, up to TILE, that is known at run time only. Slow reading:
 * `torch.addmm`. */
INLINE void group_products(const int bits, int64_t rows, const char *x, int64_t row,
                           const char *group, float sums[][COLUMNS]) {
#define GROUP_PRODUCT(R) \
    case R: group_product(bits, R, x, row, group, sums); break;
    switch (rows) {
        GROUP_PRODUCT(6)
        GROUP_PRODUCT(5) GROUP_PRODUCT(4) GROUP_PRODUCT(3) GROUP_PRODUCT(2) GROUP_PRODUCT(1)
    }
}

/* The same over a panel of rows, for which the group is unpacked once. Slow reading:
 * `torch.addmm`. */
INLINE void panel_products(const int bits, int64_t rows, const char *x, int64_t row,
                           const char *group, float sums[][COLUMNS]) {
    char words[SCALES + GROUP * COLUMNS * 2] __attribute__((aligned(64)));
    memcpy(words, group, SCALES);
    for (int64_t s = 0; s < STEPS; s++) {
        __m512i y[4];
        line(bits, group, s, y);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm512_store_si512(words + SCALES + s * COLUMNS * 4 + 64 * j, y[j]);
    }
    const int64_t tiles = tiles_of(rows);
    for (int64_t t = 0, i = 0, some; t < tiles; t++, i += some) {
        some = tile_rows(rows, tiles, t);
        group_products(16, some, x + i * row * 2, row, words, sums + i);
    }
}

/* All groups of 64 columns. Slow reading: `functional.linear`. */
INLINE void groups_products(const int bits, int64_t rows, const char *x, int64_t row,
                            int64_t inputs, const char *block, float sums[][COLUMNS]) {
    memset(sums, 0, (size_t)rows * sizeof sums[0]);
    for (int64_t k = 0; k < inputs; k += GROUP, block += group_bytes(bits))
        if (rows <= TILE) group_products(bits, rows, x + k * 2, row, block, sums);
        else panel_products(bits, rows, x + k * 2, row, block, sums);
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

/* Up to PANEL rows of x times 64 columns of a packed matrix. Slow reading: `functional.linear`. */
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
