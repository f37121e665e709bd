/* Softmax attention: the score of a key never leaves the core that computed it.
 *
 * The functions behind `native.py`: `attend` answers blocks of queries over runs of keys, `step`
 * one query per head of many sequences over their histories; `choose` finds the best blocks of keys
 * of each query and `chosen` adds them to what it has met. Plain C on pointers and
 * strides, float32 or bfloat16 in and out, float32 between; built at install, without a compiler at
 * run time. What they are given is checked first.
 *
 * Source: the tiles and the running maximum of FlashAttention-2 (Dao, arXiv 2307.08691,
 * section 3.1), the split histories of Flash-Decoding (Dao et al., 2023), written for registers:
 * six rows of queries meet 64 columns of a packed block, 24 sums in 24 registers. One change: the
 * running maximum is rounded up to a whole number. Scores are powers of two, so rescaling is exact,
 * and cutting a row's keys into several calls changes nothing.
 *
 * Letters: H query heads, G key-value heads, D width, C queries, B sequences. Words and `wide` are
 * told in simd.h. `eight`: keys and values are in 8 bits, each head's scale behind it, (D + 4)
 * bytes (int8.py).
 */
#include "given.h"

typedef struct { /* keys and values (n, G, D) */
    View k, v;
} Source;

typedef struct { /* `count` keys of a source from `first` on, that one at `position`; free: no query
                    is too far ahead of them */
    int64_t source, first, count, position, free;
} Run;

typedef struct { /* queries first..last, the first of them at `position`, and the runs that they may
                    see */
    int64_t first, last, position, run, end;
} Block;

typedef struct {
    View q, out;      /* (C, H, D) */
    float *log_total; /* (C, H) or null: log2 of each row's sum of 2^s */
    int64_t log_total_bytes;
    float *carry; /* sums (C, H, D), tops (C, H), totals (C, H) */
    int64_t carry_bytes;
    int64_t queries, heads, groups, width;
    int64_t before, ahead; /* a query at p sees the keys at p - before .. p + ahead */
    int64_t call, calls;   /* of so many calls this one meets its share of the keys; the carry goes
                              from one to the next */
    int64_t wide, eight;
    float scale; /* log2(e) / sqrt(D) */
    float cap;   /* log2(e) times the cap of scores; 0: none */
} Call;

typedef struct { /* `count` of the keys and values (kept, G D) of a sequence, from `first` on */
    int64_t sequence;
    const char *k, *v;
    int64_t k_row, v_row, kept, columns, first, count;
} History;

typedef struct {
    View q;    /* (B, H, D), heads tight */
    char *out; /* (B, H, D), tight */
    int64_t out_bytes;
    float *log_total; /* (B, H) or null */
    int64_t log_total_bytes;
    float *parts; /* for each part of each history: sums (H, D), tops (H), totals (H) */
    int64_t parts_bytes;
    int64_t sequences, heads, groups, width, wide, eight;
    float scale, cap; /* as of a Call */
} Step;

typedef struct { /* keys and values (layers, kept, G D) of a sequence, `place`: where its next token
                    is put */
    char *k, *v;
    int64_t k_bytes, v_bytes, k_layer, v_layer, k_row, v_row, kept, place;
} State;

typedef struct { /* a step at each of several layers; of a history k, v and rows are those of its
                    sequence's state */
    History *histories;
    int64_t histories_bytes;
    int64_t *starts; /* as of `step` */
    int64_t starts_bytes;
    const State *states;
    int64_t states_bytes;
    float *parts;
    int64_t parts_bytes;
    float *log_total; /* as of a Step */
    int64_t log_total_bytes;
    int64_t count, layers, sequences, heads, groups, width, wide, eight;
    float scale, cap;
} Steps;

typedef struct { /* queries first..last, the first of them at `position`, of a sequence */
    int64_t first, last, position, source;
} Rows;

typedef struct {
    View q, out;      /* (C, H, D) */
    float *log_total; /* (C, H): log2 of the sum of 2^s of which `out` is the answer as yet */
    int64_t log_total_bytes;
    int32_t *chosen; /* (C, G, best): blocks, in any order, -1 where there are no more */
    int64_t chosen_bytes;
    int64_t queries, heads, groups, width;
    int64_t block, best, window, sinks; /* in keys, but for the second */
    int64_t wide, eight;                /* eight: of keys and values, bounds are wide or not */
    float scale;
} Choice;

/* clang-format off */
/* What goes from call to call (`carry`), and what a part of a history leaves (in `parts`; C is 1):
 *
 *   | sums: C rows of H heads of D float32 | tops: C rows of H | totals: C rows of H |
 *
 * How histories are cut into parts of 256 keys, which `merge` puts together by sequences:
 *
 *   histories  [sequence 0: 600 keys    ][sequence 1: run of 100][sequence 1: run of 300]
 *   parts      [0: 256][1: 256][2: 88   ][3: 100                ][4: 256      ][5: 44   ]
 *   starts      0                         3                       4                      6
 */
/* clang-format on */

/* Sizes and offsets, for a caller in another language to compare with its own. */
/* clang-format off */
const int64_t softmax_layout[] = {
    sizeof(View), sizeof(Source), sizeof(Run), sizeof(Block), sizeof(History), sizeof(Rows),
    sizeof(State),
    sizeof(Call),
    FIELD(Call, q), FIELD(Call, out), FIELD(Call, log_total), FIELD(Call, log_total_bytes),
    FIELD(Call, carry), FIELD(Call, carry_bytes), FIELD(Call, queries), FIELD(Call, heads),
    FIELD(Call, groups), FIELD(Call, width), FIELD(Call, before), FIELD(Call, ahead),
    FIELD(Call, call), FIELD(Call, calls), FIELD(Call, wide), FIELD(Call, eight),
    FIELD(Call, scale), FIELD(Call, cap),
    sizeof(Step), FIELD(Step, q), FIELD(Step, out), FIELD(Step, out_bytes), FIELD(Step, log_total),
    FIELD(Step, log_total_bytes), FIELD(Step, parts), FIELD(Step, parts_bytes),
    FIELD(Step, sequences), FIELD(Step, heads), FIELD(Step, groups), FIELD(Step, width),
    FIELD(Step, wide), FIELD(Step, eight), FIELD(Step, scale), FIELD(Step, cap),
    sizeof(Steps), FIELD(Steps, histories), FIELD(Steps, histories_bytes), FIELD(Steps, starts),
    FIELD(Steps, starts_bytes), FIELD(Steps, states), FIELD(Steps, states_bytes),
    FIELD(Steps, parts), FIELD(Steps, parts_bytes), FIELD(Steps, log_total),
    FIELD(Steps, log_total_bytes), FIELD(Steps, count), FIELD(Steps, layers),
    FIELD(Steps, sequences), FIELD(Steps, heads), FIELD(Steps, groups), FIELD(Steps, width),
    FIELD(Steps, wide), FIELD(Steps, eight), FIELD(Steps, scale), FIELD(Steps, cap),
    sizeof(Choice), FIELD(Choice, q), FIELD(Choice, out), FIELD(Choice, log_total),
    FIELD(Choice, log_total_bytes), FIELD(Choice, chosen), FIELD(Choice, chosen_bytes),
    FIELD(Choice, queries), FIELD(Choice, heads), FIELD(Choice, groups), FIELD(Choice, width),
    FIELD(Choice, block), FIELD(Choice, best), FIELD(Choice, window), FIELD(Choice, sinks),
    FIELD(Choice, wide), FIELD(Choice, eight), FIELD(Choice, scale),
    -1,
};
/* clang-format on */

#ifdef HAS_AVX512
#include "cpu.h"
#include "simd.h"
#include "team.h"

/* Keys of a packed block; of short ones more, for each tile of them takes some time to begin. */
#define KEYS(WIDTH) ((WIDTH) == 32 ? 256 : 128)
#define MOST_KEYS 256
#define PART 256   /* keys of a history that one thread takes at a time */
#define STRIDE 64  /* keys of a part whose scores exist at a time */
#define NEXT 16    /* keys from those that are met to those that are fetched */
#define NEAR 60.0f /* powers of two: sums of such weights are far from float32's ends */

/* A product that the compiler makes no part of a sum, which would round it once less. Slow reading:
 * `torch.mul`. */
INLINE __m512 rounded_times(__m512 x, __m512 y) {
    return _mm512_mul_round_ps(x, y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* 2^(x - less), less being whole: to the same bits whatever it is. 0 for -inf. Slow reading:
 * `torch.exp2`. */
INLINE __m512 far_exp2_16(__m512 x, __m512 less) {
    return _mm512_scalef_ps(cubic(_mm512_reduce_ps(x, 0x08)),
                            _mm512_sub_ps(_mm512_roundscale_ps(x, 0x08), less));
}

/* The running softmax of one row: its top moves up to a whole number, its total and, by the factor
 * returned, its sums follow. scores (count) in multiples of 16, become 2^(s - top). Slow reading:
 * `_shifted`. */
INLINE float soften(const int wide, const int is_short, float *scores, int64_t count, float scale,
                    float *top, float *total) {
    __m512 highest = _mm512_loadu_ps(scores);
    for (int64_t j = 16; j < count; j += 16)
        highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + j));
    const float old = *top, found = ceilf(_mm512_reduce_max_ps(highest) * scale),
                now = found > old ? found : old;
    const float factor = now > old ? exp2f(old - now) : 1.0f;
    const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(now == -INFINITY ? 0.0f : now);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        const __m512 x = _mm512_loadu_ps(scores + j);
        const __m512 weight = is_short ? far_exp2_16(rounded_times(x, by), less)
                                       : exp2_16(wide, _mm512_fmsub_ps(x, by, less));
        sum = _mm512_add_ps(sum, weight);
        _mm512_storeu_ps(scores + j, weight);
    }
    *top = now;
    *total = *total * factor + _mm512_reduce_add_ps(sum);
    return factor;
}

/* tanh by its series up to 1/4, where 1 would swallow it, then by e^2x: relative error 5e-7. Slow
 * reading: `torch.tanh`. */
INLINE __m512 tanh16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), square = _mm512_mul_ps(x, x);
    __m512 p = _mm512_set1_ps(0.021869488f);
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-0.053968254f));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.13333333f));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-0.33333333f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    const __m512 power = exp2_16(1, _mm512_mul_ps(x, _mm512_set1_ps(2.88539008f)));
    const __m512 far =
        _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, one)));
    const __mmask16 is_near =
        _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.25f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(is_near, far, p);
}

/* Scores s (count) in multiples of 16, so that times scale they are cap tanh(scale s / cap). Slow
 * reading: `Capped._alter`. */
static __attribute__((noinline)) void cap_scores(float *scores, int64_t count, float scale,
                                                 float cap) {
    const __m512 by = _mm512_set1_ps(scale), over = _mm512_set1_ps(cap),
                 back = _mm512_set1_ps(cap / scale);
    for (int64_t j = 0; j < count; j += 16) {
        const __m512 x = _mm512_div_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + j), by), over);
        _mm512_storeu_ps(scores + j, _mm512_mul_ps(back, tanh16(x)));
    }
}

/* ---- 8 bits ---- */

#define SCALE 4 /* bytes of a scale */

/* Slow reading: `torch.Tensor.view`. */
INLINE float scale_at(const char *at) {
    float x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* 16 numbers as float32. Slow reading: `torch.Tensor.float`. */
INLINE __m512 numbers16(const char *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

/* What n rows of a head tell, side by side in the dtype of the queries. bytes: of a row's stride.
 * Slow reading: `dequantize`. */
INLINE void widen(const int wide, const int64_t width, const char *from, int64_t bytes, int64_t n,
                  char *to) {
    for (int64_t j = 0; j < n; j++, from += bytes)
        for (int64_t d = 0; d < width; d += 16, to += 16 * (wide ? 4 : 2))
            store16(wide, to,
                    _mm512_mul_ps(numbers16(from + d), _mm512_set1_ps(scale_at(from + width))));
}

/* Queries (H, D) as numbers of 16 bits, tight, and their scales (H): so products with numbers of 8
 * bits are whole and their sums exact, while a query is off by 2^-16 of its head's largest at most.
 * bytes: from head to head. Slow reading: `round_off`. */
INLINE void round_queries(int64_t heads, int64_t width, const char *q, int64_t bytes, int16_t *to,
                          float *scales) {
    for (int64_t h = 0; h < heads; h++, q += bytes, to += width) {
        __m512i top = _mm512_setzero_si512();
        for (int64_t d = 0; d < width; d += 16)
            top = _mm512_max_epi32(
                top, _mm512_and_si512(_mm512_castps_si512(load16(0, q + 2 * d)),
                                      _mm512_set1_epi32(0x7fffffff))); /* NaN is above all */
        const int32_t found = _mm512_reduce_max_epi32(top);
        const float largest = scale_at((const char *)&found), scale = largest / 32767.0f;
        const __mmask16 usable = scale > 0.0f && scale < INFINITY ? 0xffff : 0;
        scales[h] = largest < INFINITY ? scale : NAN;
        for (int64_t d = 0; d < width; d += 16) {
            const __m512 x = _mm512_div_ps(load16(0, q + 2 * d), _mm512_set1_ps(scale));
            _mm256_storeu_si256((__m256i *)(to + d),
                                _mm512_cvtsepi32_epi16(_mm512_maskz_cvtps_epi32(usable, x)));
        }
    }
}

/* ---- attend ---- */

/* The sums of 16 registers of float32, or of whole numbers, as one of float32. Slow reading:
 * `torch.sum`. */
INLINE __m512 sums_of(const int whole, const __m512i a[16]) {
#define ADD(X, Y) \
    (whole ? _mm512_add_epi32(X, Y) \
           : _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(X), _mm512_castsi512_ps(Y))))
    __m512i t[8], y[4], z[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        t[i] = ADD(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                   _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        y[i] = ADD(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]),
                   _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        z[i] = ADD(_mm512_shuffle_i32x4(y[2 * i], y[2 * i + 1], 0x88),
                   _mm512_shuffle_i32x4(y[2 * i], y[2 * i + 1], 0xdd));
    const __m512i found =
        ADD(_mm512_shuffle_i32x4(z[0], z[1], 0x88), _mm512_shuffle_i32x4(z[0], z[1], 0xdd));
    return whole ? _mm512_cvtepi32_ps(found) : _mm512_castsi512_ps(found);
}

/* Rows of queries of one head meet the keys low..high (multiples of 16) of a packed block; row i
 * sees lows[i]..highs[i]. Slow reading: `_shifted`. */
INLINE void tile(const int wide, const int is_short, const int rows, const int64_t width,
                 const char *q, int64_t q_row, const uint32_t *keys, const uint32_t *values,
                 int64_t low, int64_t high, const int64_t *lows, const int64_t *highs, float scale,
                 float cap, float *sums, int64_t sums_row, float *tops, float *totals,
                 int64_t heads) {
    float s[TILE][MOST_KEYS] __attribute__((aligned(64)));
    uint32_t p[TILE][MOST_KEYS / 2] __attribute__((aligned(64))); /* weights as bfloat16 */
    float factors[TILE];
    const int packed = wide ? 1 : 2;
    products(wide, rows, high - low, width / packed, q, q_row, 4, keys + low, KEYS(width),
             &s[0][low], MOST_KEYS, 0);
    for (int i = 0; i < rows; i++) {
        if (cap > 0.0f) cap_scores(&s[i][low], high - low, scale, cap);
        if (lows[i] > low || highs[i] < high)
            for (int64_t j = low; j < high; j += 16)
                hide(&s[i][j], j, lows[i], highs[i], -INFINITY);
        factors[i] = soften(wide, is_short, &s[i][low], high - low, scale, tops + i * heads,
                            totals + i * heads);
        if (!wide)
            for (int64_t j = low; j < high; j += 16)
                _mm256_store_si256((__m256i *)&p[i][j / 2],
                                   (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(&s[i][j])));
    }
    const char *weights = wide ? (const char *)&s[0][low] : (const char *)&p[0][low / 2];
    products(wide, rows, width, (high - low) / packed, weights, 4 * MOST_KEYS / packed, 4,
             values + low / packed * width, width, sums, sums_row, factors);
}

/* The weights of rows of queries at 16 * columns keys from `at` on, as bfloat16, their tops being
 * 0: no score leaves its register. totals: += each row's weights. Slow reading: `_shifted`. */
INLINE void weigh_keys(const int rows, const int columns, const int64_t words, const char *q,
                       int64_t q_row, const uint32_t *keys, int64_t at, int is_seen,
                       const int32_t *lows, const int32_t *highs, float scale,
                       uint32_t p[][MOST_KEYS / 2], __m512 *totals) {
    __m512 s[SUMS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * columns; i++) s[i] = _mm512_setzero_ps();
    accumulate(0, rows, columns, words, q, q_row, 4, keys + at, KEYS(2 * words), s);
    const __m512 by = _mm512_set1_ps(scale);
    const __m512i ascending =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        __m512 total = totals[i];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            __m512 weight = near_exp2_16(rounded_times(s[i * columns + j], by));
            if (!is_seen) {
                const __m512i key =
                    _mm512_add_epi32(ascending, _mm512_set1_epi32((int)at + 16 * j));
                const __mmask16 seen = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(lows[i]));
                weight = _mm512_maskz_mov_ps(
                    _mm512_mask_cmplt_epi32_mask(seen, key, _mm512_set1_epi32(highs[i])), weight);
            }
            total = _mm512_add_ps(total, weight);
            _mm256_store_si256((__m256i *)&p[i][at / 2 + 8 * j],
                               (__m256i)_mm512_cvtneps_pbh(weight));
        }
        totals[i] = total;
    }
}

/* `tile` of bfloat16 where all scores are near 0 (see NEAR): so all tops are 0, and what is found
 * is the same to the last bit, tops being whole. Slow reading: `_shifted`. */
INLINE void near_tile(const int rows, const int64_t width, const char *q, int64_t q_row,
                      const uint32_t *keys, const uint32_t *values, int64_t low, int64_t high,
                      const int64_t *lows, const int64_t *highs, float scale, float *sums,
                      int64_t sums_row, float *tops, float *totals, int64_t heads) {
    uint32_t p[2 * TILE][MOST_KEYS / 2] __attribute__((aligned(64)));
    float factors[2 * TILE];
    for (int i = 0; i < rows; i++) {
        const float old = tops[i * heads];
        factors[i] = old < 0.0f ? exp2f(old) : 1.0f;
        tops[i * heads] = 0.0f;
    }
    for (int i = 0; i < rows; i += TILE) {
        const int some = rows < TILE ? rows : TILE;
        __m512 found[TILE];
        int32_t from[TILE], to[TILE], is_seen = 1; /* columns of the block */
        for (int t = 0; t < some; t++) {
            found[t] = _mm512_setzero_ps();
            from[t] = (int32_t)least(lows[i + t], high),
            to[t] = (int32_t)least(most(highs[i + t], 0), high);
            is_seen &= from[t] <= low && to[t] == high;
        }
        int64_t j = low;
#define WEIGH(COLUMNS) \
    weigh_keys(some, COLUMNS, width / 2, q + i * q_row, q_row, keys, j, is_seen, from, to, scale, \
               p + i, found)
        for (; j + 64 <= high; j += 64) WEIGH(4);
        switch ((high - j) / 16) {
        case 3: WEIGH(3); break;
        case 2: WEIGH(2); break;
        case 1: WEIGH(1); break;
        }
        for (int t = 0; t < some; t++) {
            float *total = totals + (i + t) * heads;
            *total = *total * factors[i + t] + _mm512_reduce_add_ps(found[t]);
        }
    }
    products(0, rows, width, (high - low) / 2, (const char *)&p[0][low / 2], 2 * MOST_KEYS, 4,
             values + low / 2 * width, width, sums, sums_row, factors);
}

/* Whether n rows' tops are where `near_tile` leaves them, or below. */
INLINE int is_low(int64_t n, const float *tops, int64_t heads) {
    int found = 1;
    for (int64_t i = 0; i < n; i++) found &= tops[i * heads] <= 0.0f;
    return found;
}

/* The largest of squares; NaN is above all. Slow reading: `torch.max`. */
INLINE float largest(__m512i squares) {
    const uint32_t found = _mm512_reduce_max_epu32(squares);
    float x;
    memcpy(&x, &found, sizeof x);
    return x;
}

/* The largest square of the length of n packed keys. Slow reading: `torch.linalg.vector_norm`. */
INLINE float longest_key(int64_t n, const int64_t words, const uint32_t *keys) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t j = 0; j < n; j += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t w = 0; w < words; w++) {
            const __m512i x = _mm512_load_si512(keys + w * KEYS(2 * words) + j);
            sum = multiply_add(0, x, x, sum);
        }
        found = _mm512_max_epu32(found, _mm512_castps_si512(sum));
    }
    return largest(found);
}

/* That of n rows. bytes: of a row's stride. Slow reading: `torch.linalg.vector_norm`. */
INLINE float longest_row(int64_t n, const int64_t words, const char *rows, int64_t bytes) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t j = 0; j < n; j += 16) {
        __m512i sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const char *row = rows + least(j + i, n - 1) * bytes;
            __m512 own = _mm512_setzero_ps();
            for (int64_t w = 0; w < words; w += 16) {
                const __m512i x = _mm512_loadu_si512(row + 4 * w);
                own = multiply_add(0, x, x, own);
            }
            sum[i] = _mm512_castps_si512(own);
        }
        found = _mm512_max_epu32(found, _mm512_castps_si512(sums_of(0, sum)));
    }
    return largest(found);
}

/* The keys from..to of a run that a block's queries meet in this call. Slow reading: `split`. */
INLINE void find_share(const Call *c, const Block *block, const Run *run, int64_t *from,
                       int64_t *to) {
    const int64_t place = block->position - run->position; /* of the first query among these keys */
    const int64_t start = run->free ? 0 : most(0, place - c->before) & ~15;
    const int64_t end = least(run->count, place + block->last - block->first + c->ahead);
    const int64_t keys = KEYS(c->width);
    const int64_t share = (most(0, end - start) + c->calls * keys - 1) / (c->calls * keys) * keys;
    *from = start + c->call * share;
    *to = least(end, *from + share);
}

/* Rows first..last of `bytes` bytes. Head by head, keys are no stream that the core would foresee.
 */
INLINE void prefetch(const char *rows, int64_t stride, int64_t first, int64_t last, int64_t bytes) {
    for (int64_t j = first; j < last; j++)
        for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(rows + j * stride + b, _MM_HINT_T1);
}

/* The queries of a block, all heads of a group, over all its runs. Slow reading: `answer`. */
INLINE void attend_block(const int wide, const int is_short, const int64_t width, const Call *c,
                         const Source *sources, const Block *block, const Run *runs,
                         int64_t group) {
    uint32_t keys[WIDEST * KEYS(WIDEST) / 2 * (wide ? 2 : 1)] __attribute__((aligned(64)));
    uint32_t values[WIDEST * KEYS(WIDEST) / 2 * (wide ? 2 : 1)] __attribute__((aligned(64)));
    char widened[WIDEST * KEYS(WIDEST) * (wide ? 4 : 2)]
        __attribute__((aligned(64))); /* from 8 bits */
    const int64_t size = wide ? 4 : 2, words = width * size / 4, count = block->last - block->first,
                  sums_row = c->heads * width, kept = c->eight ? 1 : size; /* bytes of an element */
    const int64_t ratio = c->heads / c->groups, head = group * ratio;
    float *sums = c->carry, *tops = sums + c->queries * sums_row,
          *totals = tops + c->queries * c->heads, lengths[HEADS];
    for (int64_t h = 0; h < ratio && is_short; h++)
        lengths[h] = longest_row(
            count, words, c->q.at + (block->first * c->q.row + (head + h) * c->q.head) * size,
            c->q.row * size);
    for (int64_t i = block->first; i < block->last && c->call == 0; i++)
        for (int64_t h = head; h < head + ratio; h++) {
            memset(sums + i * sums_row + h * width, 0, sizeof(float) * width);
            tops[i * c->heads + h] = -INFINITY;
            totals[i * c->heads + h] = 0.0f;
        }
    for (const Run *run = runs + block->run; run < runs + block->end; run++) {
        const int64_t place =
            block->position - run->position; /* of the first query among these keys */
        const Source *source = sources + run->source;
        int64_t from, to;
        find_share(c, block, run, &from, &to);
        for (int64_t at = from; at < to; at += KEYS(width)) {
            const int64_t n = least(KEYS(width), to - at), key = run->first + at;
            const char *k = source->k.at + (group * source->k.head + key * source->k.row) * kept,
                       *v = source->v.at + (group * source->v.head + key * source->v.row) * kept;
            int64_t k_row = source->k.row * kept, v_row = source->v.row * kept;
            if (c->eight) {
                widen(wide, width, k, k_row, n, widened);
                k = widened, k_row = width * size;
            }
            pack_turned(k, k_row, n, words, keys, KEYS(width));
            const float length = is_short ? longest_key(n, words, keys) : 0.0f;
            if (c->eight) {
                widen(wide, width, v, v_row, n, widened);
                v = widened, v_row = width * size;
            }
            const int64_t whole = (n + 15) & ~15;
            const int is_poisoned = pack_rows(wide, v, v_row, 0, n, whole, width, values);
            const int64_t together =
                is_poisoned
                    ? 1
                    : TILE; /* then each row has a copy in which what it does not see is 0 */
            const Run *next = at + KEYS(width) < to ? run
                              : run + 1 < runs + block->end
                                  ? run + 1
                                  : run; /* the block of keys after this one */
            const Source *then = sources + next->source;
            int64_t first = at + KEYS(width), last = to;
            if (next != run) find_share(c, block, next, &first, &last);
            const char *next_k =
                then->k.at + (group * then->k.head + (next->first + first) * then->k.row) * kept;
            const char *next_v =
                then->v.at + (group * then->v.head + (next->first + first) * then->v.row) * kept;
            const int64_t coming = most(0, least(KEYS(width), last - first)),
                          each =
                              coming * TILE / (ratio * count) + 1; /* rows of it beside each tile */
            int64_t fetched = 0;
            for (int64_t h = head; h < head + ratio; h++) {
                /* no score is beyond NEAR, by Cauchy and Schwarz; nor NaN */
                const int is_near = is_short && !is_poisoned && c->cap == 0.0f &&
                                    lengths[h - head] * length * c->scale * c->scale <= NEAR * NEAR;
                for (int64_t i = 0, rows; i < count; i += rows) {
                    const int64_t row = block->first + i, left = count - i;
                    float *sum = sums + row * sums_row + h * width,
                          *top = tops + row * c->heads + h, *total = totals + row * c->heads + h;
                    const int goes_near = is_near && is_low(least(2 * TILE, left), top, c->heads);
                    rows = goes_near && left >= 2 * TILE ? 2 * TILE : least(together, left);
                    int64_t lows[2 * TILE], highs[2 * TILE];
                    for (int64_t t = 0; t < rows; t++) {
                        lows[t] = run->free ? 0 : most(0, place + i + t - c->before - at);
                        highs[t] = least(n, place + i + t + c->ahead + 1 - at);
                    }
                    const int64_t low = lows[0] & ~15, high = (most(highs[rows - 1], 0) + 15) & ~15;
                    prefetch(next_k, then->k.row * kept, fetched, least(coming, fetched + each),
                             width * kept);
                    prefetch(next_v, then->v.row * kept, fetched, least(coming, fetched + each),
                             width * kept);
                    fetched += each;
                    if (low >= high) continue;
                    if (is_poisoned)
                        pack_rows(wide, v, v_row, lows[0], highs[0], whole, width, values);
                    const char *q = c->q.at + (row * c->q.row + h * c->q.head) * size;
#define NEAR_TILE(R) \
    near_tile(R, width, q, c->q.row * 2, keys, values, low, high, lows, highs, c->scale, sum, \
              sums_row, top, total, c->heads)
#define ROWS(R) \
    case R: \
        if (goes_near) NEAR_TILE(R); \
        else \
            tile(wide, is_short, R, width, q, c->q.row *size, keys, values, low, high, lows, \
                 highs, c->scale, c->cap, sum, sums_row, top, total, c->heads); \
        break;
                    if (is_short && rows == 2 * TILE) NEAR_TILE(2 * TILE);
                    else switch (rows) {
                            ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2) ROWS(1)
                        }
                }
            }
        }
    }
    for (int64_t i = block->first; i < block->last && c->call == c->calls - 1; i++)
        for (int64_t h = head; h < head + ratio; h++) {
            const float total = totals[i * c->heads + h];
            for (int64_t d = 0; d < width; d += 16)
                store_answer(wide, c->out.at + (i * c->out.row + h * c->out.head + d) * size,
                             _mm512_loadu_ps(sums + i * sums_row + h * width + d), total);
            if (c->log_total) { /* the same wherever the top is */
                int power;
                const float fraction = frexpf(total, &power);
                c->log_total[i * c->heads + h] =
                    tops[i * c->heads + h] + (float)power + log2f(fraction);
            }
        }
}

/* SHORT: bfloat16 heads of 32; wider ones gain nothing by `near_tile`. */
#define ATTEND(NAME, WIDE, WIDTH, SHORT) \
    __attribute__((noinline)) static void NAME(const Call *c, const Source *s, const Block *b, \
                                               const Run *r, int64_t g) { \
        attend_block(WIDE, SHORT, WIDTH, c, s, b, r, g); \
    }
ATTEND(attend_narrow_32, 0, 32, 1)
ATTEND(attend_narrow_64, 0, 64, 0)
ATTEND(attend_narrow, 0, c->width, 0)
ATTEND(attend_wide_64, 1, 64, 0)
ATTEND(attend_wide, 1, c->width, 0)

static const char *wrong_heads(int64_t heads, int64_t groups, int64_t width, int64_t wide) {
    REQUIRE(within(heads, 1, HEADS) && within(groups, 1, heads) && heads % groups == 0,
            "heads must be a multiple of groups, up to 128");
    REQUIRE(within(width, 32, WIDEST) && width % 32 == 0,
            "width must be a multiple of 32, up to 256");
    REQUIRE(within(wide, 0, 1), "wide must be 0 or 1");
    return 0;
}

static int is_cap(float cap) { return cap >= 0.0f && cap < INFINITY; }

/* Rows of blocks, in ascending order, and the runs that they name. */
static const char *wrong_blocks(const Call *c, const Source *sources, int64_t source_count,
                                const Block *blocks, int64_t count, const Run *runs,
                                int64_t run_count) {
    for (int64_t i = 0; i < run_count; i++) {
        const Run *run = runs + i;
        REQUIRE(within(run->source, 0, source_count - 1), "a run must be of one of the sources");
        REQUIRE(within(run->first, 0, FAR) && within(run->count, 0, FAR) &&
                    run->first + run->count <= sources[run->source].k.rows,
                "a run must lie within its source");
        REQUIRE(within(run->position, -FAR, FAR), "a run must stand at a position");
    }
    for (int64_t i = 0, end = 0; i < count; end = blocks[i++].last) {
        REQUIRE(within(blocks[i].first, end, FAR) && blocks[i].first < blocks[i].last &&
                    blocks[i].last <= c->queries,
                "blocks must be of the queries, in their order, and none empty");
        REQUIRE(within(blocks[i].position, -FAR, FAR), "a block must stand at a position");
        REQUIRE(within(blocks[i].run, 0, blocks[i].end) && blocks[i].end <= run_count,
                "a block's runs must be among the runs");
    }
    return 0;
}

static const char *wrong_call(const Call *c, const Source *sources, int64_t source_count,
                              int threads) {
    const char *reason = wrong_heads(c->heads, c->groups, c->width, c->wide);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, rows = c->queries * c->heads;
    REQUIRE(within(c->queries, 0, FAR), "there are too many queries");
    REQUIRE(is_view(&c->q, size, c->queries, c->heads, c->width),
            "q must be (queries, heads, width)");
    REQUIRE(is_view(&c->out, size, c->queries, c->heads, c->width),
            "out must be (queries, heads, width)");
    REQUIRE(!c->log_total || is_room(c->log_total, c->log_total_bytes, rows, sizeof(float)),
            "log_total must hold (queries, heads)");
    REQUIRE(is_room(c->carry, c->carry_bytes, rows * (c->width + 2), sizeof(float)),
            "carry must hold (queries, heads, width + 2)");
    REQUIRE(within(c->before, 0, FAR) && within(c->ahead, 0, FAR),
            "before and ahead must be distances");
    REQUIRE(is_cap(c->cap), "cap must be a number, or 0 for none");
    REQUIRE(within(c->eight, 0, 1), "eight must be 0 or 1");
    REQUIRE(within(c->calls, 1, FAR) && within(c->call, 0, c->calls - 1) && threads >= 1,
            "call must be one of the calls, and there must be threads");
    const int64_t kept = c->eight ? 1 : size, across = c->width + (c->eight ? SCALE : 0);
    for (int64_t i = 0; i < source_count; i++)
        REQUIRE(is_view(&sources[i].k, kept, 0, c->groups, across) &&
                    is_view(&sources[i].v, kept, sources[i].k.rows, c->groups, across),
                "keys and values must be (n, groups, width), in 8 bits (n, groups, width + 4)");
    return 0;
}

typedef void (*Attending)(const Call *, const Source *, const Block *, const Run *, int64_t);

typedef struct { /* what `attend` was given */
    Call call;
    Attending answer;
    const Source *sources;
    const Block *blocks;
    const Run *runs;
    int64_t count;
} Blocks;

_Static_assert(sizeof(Blocks) <= GIVEN, "threads are told no more");

/* Slow reading: `dense`, `band`, `pattern`. */
static void attend_blocks(const void *given, uint64_t call) {
    const Blocks *c = given;
    const int64_t groups = c->call.groups, pieces = c->count * groups;
    for (int64_t p; (p = take(call, 0, pieces)) >= 0; give(call, 0))
        c->answer(&c->call, c->sources, c->blocks + p / groups, c->runs, p % groups);
    await(call, 0, pieces);
}

/* by_team: whose threads compute, the team's or OpenMP's. Slow reading: `dense`, `band`, `pattern`.
 */
const char *attend(const Call *c, const Source *sources, int64_t source_count, const Block *blocks,
                   int64_t count, const Run *runs, int64_t run_count, int threads, int by_team) {
    const char *reason = wrong_call(c, sources, source_count, threads);
    if (!reason) reason = wrong_blocks(c, sources, source_count, blocks, count, runs, run_count);
    if (reason) return reason;
    REQUIRE(count * c->groups < PIECES, "there are too many blocks");
    const Attending answer = c->wide          ? (c->width == 64 ? attend_wide_64 : attend_wide)
                             : c->width == 32 ? attend_narrow_32
                             : c->width == 64 ? attend_narrow_64
                                              : attend_narrow;
    const Blocks told = { *c, answer, sources, blocks, runs, count };
    if (by_team) {
        together(attend_blocks, &told, sizeof told, threads);
        return 0;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count * c->groups; i++)
        answer(c, sources, blocks + i / c->groups, runs, i % c->groups);
    return 0;
}

/* ---- step ---- */

/* A register of a key, as a query's is: float32, pairs of bfloat16, or of 8 bits whole numbers of
 * 16. Slow reading: `torch.Tensor.float`. */
INLINE __m512i key_at(const int wide, const int eight, const char *row, int64_t d) {
    if (!eight) return _mm512_loadu_si512(row + d * (wide ? 4 : 2));
    if (wide) return _mm512_castps_si512(numbers16(row + d));
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(row + d)));
}

/* Scores of up to 16 keys with up to 4 heads that share them, so that a key is read once for all:
 * a row of `to_row` for each head. What stands behind n means nothing. Of keys in 8 bits: `by` the
 * heads' scales; of bfloat16, q is numbers of 16 bits, and sums are whole. bytes: of a key's
 * stride, q_head: from head to head. Slow reading: `scores`. */
INLINE void score(const int wide, const int eight, const int heads, const int64_t width,
                  const char *q, int64_t q_head, const float *by, const char *k, int64_t bytes,
                  int64_t n, const char *const coming[2], float *to, int64_t to_row) {
    const int keys = 16 / heads, whole = eight && !wide;
    int64_t fetched = 0;
    float found[16] __attribute__((aligned(64))), scales[16] __attribute__((aligned(64)));
    for (int first = 0; first < 16; first += keys) {
        const char *row[16];
        __m512i sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < keys; i++) /* one that is not there is read as the last */
            row[i] = k + least(first + i, n - 1) * bytes;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
        for (int64_t d = 0; d < width; d += wide ? 16 : 32) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                x[h] = _mm512_loadu_si512(q + h * q_head + d * (wide ? 4 : 2));
#pragma GCC unroll 16
            for (int i = 0; i < keys; i++) {
                const __m512i y = key_at(wide, eight, row[i], d);
                if (coming) {
                    _mm_prefetch(coming[0] + fetched, _MM_HINT_T0);
                    _mm_prefetch(coming[1] + fetched, _MM_HINT_T0);
                    fetched += whole ? 32 : eight ? 16 : 64;
                }
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) {
                    __m512i *at = &sum[h * keys + i];
                    *at = whole ? _mm512_add_epi32(*at, _mm512_madd_epi16(x[h], y))
                                : _mm512_castps_si512(
                                      multiply_add(wide, x[h], y, _mm512_castsi512_ps(*at)));
                }
            }
        }
        __m512 sums = sums_of(whole, sum);
        if (eight) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) scales[i] = by[i / keys] * scale_at(row[i % keys] + width);
            sums = _mm512_mul_ps(sums, _mm512_load_ps(scales));
        }
        _mm512_store_ps(found, sums);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++)
            memcpy(to + h * to_row + first, found + h * keys, keys * sizeof(float));
    }
}

/* The same of all heads of a group. Slow reading: `scores`. */
INLINE void score_group(const int wide, const int eight, const int64_t width, int64_t heads,
                        const char *q, int64_t q_head, const float *by, const char *k,
                        int64_t bytes, int64_t n, const char *const coming[2], float *to,
                        int64_t to_row) {
    for (int64_t h = 0; h < heads;) {
        const int64_t some = heads - h >= 4 ? 4 : heads - h >= 2 ? 2 : 1;
#define SCORE(H) \
    case H: \
        score(wide, eight, H, width, q + h * q_head, q_head, by + h, k, bytes, n, coming, \
              to + h * to_row, to_row); \
        break;
        switch (some) { SCORE(4) SCORE(2) SCORE(1) }
        h += some;
    }
}

/* 32 values: of bfloat16 the even ones and the odd ones, else in their order. Slow reading:
 * `torch.Tensor.float`. */
INLINE void values32(const int wide, const int eight, const char *row, __m512 *even, __m512 *odd) {
    if (eight) *even = numbers16(row), *odd = numbers16(row + 16);
    else if (wide) *even = _mm512_loadu_ps(row), *odd = _mm512_loadu_ps(row + 64);
    else {
        const __m512i x = _mm512_loadu_si512(row), upper = _mm512_set1_epi32((int)0xffff0000);
        *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
        *odd = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
    }
}

/* sums (D) = factor sums + weights (n) v. Of bfloat16, 32 elements at a time, the even ones stand
 * before the odd ones. Slow reading: `weigh`. */
INLINE void gather(const int wide, const int eight, const int64_t width, const float *weights,
                   const char *v, int64_t bytes, int64_t n, float factor, float *sums) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t d = 0; d < width; d += 32) {
        __m512 a = _mm512_mul_ps(by, _mm512_loadu_ps(sums + d)),
               b = _mm512_mul_ps(by, _mm512_loadu_ps(sums + d + 16));
        for (int64_t j = 0; j < n; j++) {
            const char *row = v + j * bytes;
            const __m512 weight =
                _mm512_set1_ps(weights[j] * (eight ? scale_at(row + width) : 1.0f));
            __m512 even, odd;
            values32(wide, eight, row + d * (eight ? 1 : wide ? 4 : 2), &even, &odd);
            a = _mm512_fmadd_ps(weight, even, a);
            b = _mm512_fmadd_ps(weight, odd, b);
        }
        _mm512_storeu_ps(sums + d, a);
        _mm512_storeu_ps(sums + d + 16, b);
    }
}

/* The same of up to 4 heads that share values, 64 elements at a time (`blocks`: 2) or 32: so many
 * sums at once that none waits for the one before. weights: a row of STRIDE for each head, times
 * the scales of values in 8 bits. Slow reading: `weigh`. */
INLINE void gather_heads(const int wide, const int eight, const int heads, const int blocks,
                         const float *weights, const char *v, int64_t bytes, int64_t n,
                         const float *factors, float *sums, int64_t sums_row) {
    __m512 a[4][2], b[4][2];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 2
        for (int d = 0; d < blocks; d++) {
            const float *from = sums + h * sums_row + 32 * d;
            a[h][d] = _mm512_mul_ps(_mm512_set1_ps(factors[h]), _mm512_loadu_ps(from));
            b[h][d] = _mm512_mul_ps(_mm512_set1_ps(factors[h]), _mm512_loadu_ps(from + 16));
        }
    for (int64_t j = 0; j < n; j++) {
        __m512 weight[4];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) weight[h] = _mm512_set1_ps(weights[h * STRIDE + j]);
#pragma GCC unroll 2
        for (int d = 0; d < blocks; d++) {
            __m512 even, odd;
            values32(wide, eight, v + j * bytes + 32 * d * (eight ? 1 : wide ? 4 : 2), &even, &odd);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                a[h][d] = _mm512_fmadd_ps(weight[h], even, a[h][d]);
                b[h][d] = _mm512_fmadd_ps(weight[h], odd, b[h][d]);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 2
        for (int d = 0; d < blocks; d++) {
            _mm512_storeu_ps(sums + h * sums_row + 32 * d, a[h][d]);
            _mm512_storeu_ps(sums + h * sums_row + 32 * d + 16, b[h][d]);
        }
}

/* The same of all heads of a group; weights: told times the scales of values in 8 bits here. Slow
 * reading: `weigh`. */
INLINE void gather_group(const int wide, const int eight, const int64_t width, int64_t heads,
                         float *weights, const char *v, int64_t bytes, int64_t n,
                         const float *factors, float *sums) {
    const int64_t size = eight ? 1 : wide ? 4 : 2;
    for (int64_t j = 0; eight && j < n; j++) {
        const float scale = scale_at(v + j * bytes + width);
        for (int64_t h = 0; h < heads; h++) weights[h * STRIDE + j] *= scale;
    }
    for (int64_t h = 0; h < heads;) {
        const int64_t some = heads - h >= 4 ? 4 : heads - h >= 2 ? 2 : 1;
        for (int64_t d = 0; d < width; d += 64) {
            const float *w = weights + h * STRIDE, *f = factors + h;
            float *to = sums + h * width + d;
#define GATHER(H) \
    case H: gather_heads(wide, eight, H, 2, w, v + d * size, bytes, n, f, to, width); break; \
    case 8 + H: gather_heads(wide, eight, H, 1, w, v + d * size, bytes, n, f, to, width); break;
            switch (some + (width - d < 64 ? 8 : 0)) { GATHER(4) GATHER(2) GATHER(1) }
        }
        h += some;
    }
}

/* 32 sums of `gather` in the order of their elements. Slow reading: `torch.stack`. */
INLINE void in_order(const int wide, __m512 *a, __m512 *b) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 even = *a;
    if (wide) return;
    *a = _mm512_permutex2var_ps(even, low, *b);
    *b = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), *b);
}

/* One sequence's query, all heads, over up to PART keys: sums (H, D), tops (H), totals (H). Group
 * by group nothing is a stream to the processor: each fetches its share of the rows that are wanted
 * next, the values of these keys and the keys behind them, for all at once would wait for each
 * other. Slow reading: `_step`. */
INLINE void step_part(const int wide, const int eight, const int64_t width, const Step *c,
                      const char *q, const char *k, const char *v, int64_t k_bytes, int64_t v_bytes,
                      int64_t count, float *sums) {
    float s[HEADS][STRIDE] __attribute__((aligned(64))), factors[HEADS], by[HEADS];
    int16_t told[HEADS * WIDEST];
    const int64_t size = wide ? 4 : 2, ratio = c->heads / c->groups,
                  head = eight ? width + SCALE : width * size;
    float *tops = sums + c->heads * width, *totals = tops + c->heads;
    memset(sums, 0, sizeof(float) * c->heads * width);
    for (int64_t h = 0; h < c->heads; h++) tops[h] = -INFINITY, totals[h] = 0.0f, by[h] = 1.0f;
    if (eight && !wide) {
        round_queries(c->heads, width, q, width * size, told, by);
        q = (const char *)told;
    }
    for (int64_t at = 0; at < count; at += STRIDE) {
        const int64_t n = least(STRIDE, count - at);
        for (int64_t j = 0; j < n; j += 16)
            for (int64_t g = 0; g < c->groups; g++) {
                const int64_t part = 16 * g * head;
                const char *const coming[2] = { k + (at + j + NEXT) * k_bytes + part,
                                                v + (at + j) * v_bytes + part };
                score_group(wide, eight, width, ratio, q + g * ratio * width * size, width * size,
                            by + g * ratio, k + (at + j) * k_bytes + g * head, k_bytes, n - j,
                            coming, &s[g * ratio][j], STRIDE);
            }
        for (int64_t h = 0; h < c->heads; h++) {
            if (c->cap > 0.0f) cap_scores(s[h], (n + 15) & ~15, c->scale, c->cap);
            if (n % 16) hide(s[h] + (n & ~15), 0, 0, n % 16, -INFINITY);
            factors[h] = soften(wide, 0, s[h], (n + 15) & ~15, c->scale, tops + h, totals + h);
        }
        for (int64_t g = 0; g < c->groups; g++)
            gather_group(wide, eight, width, ratio, s[g * ratio], v + at * v_bytes + g * head,
                         v_bytes, n, factors + g * ratio, sums + g * ratio * width);
    }
}

#define STEP(NAME, WIDE, EIGHT, WIDTH) \
    __attribute__((noinline)) static void NAME(const Step *c, const char *q, const char *k, \
                                               const char *v, int64_t k_bytes, int64_t v_bytes, \
                                               int64_t n, float *s) { \
        step_part(WIDE, EIGHT, WIDTH, c, q, k, v, k_bytes, v_bytes, n, s); \
    }
STEP(step_narrow_64, 0, 0, 64)
STEP(step_narrow, 0, 0, c->width)
STEP(step_wide_64, 1, 0, 64)
STEP(step_wide, 1, 0, c->width)
STEP(step_narrow_eight_64, 0, 1, 64)
STEP(step_narrow_eight, 0, 1, c->width)
STEP(step_wide_eight, 1, 1, c->width)

/* The answer of one sequence from the parts first..last. Slow reading: `torch.logsumexp`. */
static void merge(const Step *c, int64_t sequence, int64_t first, int64_t last) {
    const int64_t width = c->width, size = c->wide ? 4 : 2, floats = c->heads * (width + 2);
    for (int64_t h = 0; h < c->heads; h++) {
        float sums[WIDEST] __attribute__((aligned(64))) = { 0 }, top = -INFINITY, total = 0.0f;
        for (int64_t p = first; p < last; p++)
            top = fmaxf(top, c->parts[p * floats + c->heads * width + h]);
        for (int64_t p = first; p < last; p++) {
            const float *part = c->parts + p * floats,
                        factor = top == -INFINITY ? 1.0f : exp2f(part[c->heads * width + h] - top);
            for (int64_t d = 0; d < width; d += 16)
                _mm512_store_ps(sums + d, _mm512_fmadd_ps(_mm512_set1_ps(factor),
                                                          _mm512_loadu_ps(part + h * width + d),
                                                          _mm512_load_ps(sums + d)));
            total += factor * part[c->heads * width + c->heads + h];
        }
        for (int64_t d = 0; d < width; d += 32) {
            __m512 a = _mm512_load_ps(sums + d), b = _mm512_load_ps(sums + d + 16);
            in_order(c->wide || c->eight, &a, &b);
            char *to = c->out + ((sequence * c->heads + h) * width + d) * size;
            store_answer((int)c->wide, to, a, total);
            store_answer((int)c->wide, to + 16 * size, b, total);
        }
        if (c->log_total) c->log_total[sequence * c->heads + h] = top + log2f(total);
    }
}

static const char *wrong_step(const Step *c, const History *histories, int64_t count,
                              int64_t starts_bytes, int threads) {
    const char *reason = wrong_heads(c->heads, c->groups, c->width, c->wide);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, columns = c->groups * (c->width + (c->eight ? SCALE : 0));
    REQUIRE(within(c->eight, 0, 1), "eight must be 0 or 1");
    REQUIRE(is_cap(c->cap), "cap must be a number, or 0 for none");
    REQUIRE(within(c->sequences, 0, FAR) && threads >= 1,
            "there must be threads, and not too many sequences");
    REQUIRE(is_tight(&c->q, size, c->sequences, c->heads, c->width),
            "q must be (sequences, heads, width), heads side by side");
    REQUIRE(is_room(c->out, c->out_bytes, c->sequences * c->heads * c->width, size),
            "out must hold (sequences, heads, width)");
    REQUIRE(!c->log_total ||
                is_room(c->log_total, c->log_total_bytes, c->sequences * c->heads, sizeof(float)),
            "log_total must hold (sequences, heads)");
    REQUIRE(within(count, 0, FAR) && starts_bytes >= (count + 1) * (int64_t)sizeof(int64_t),
            "starts must hold one number more than there are histories");
    int64_t parts = 0;
    for (int64_t i = 0; i < count; i++) {
        const History *x = histories + i;
        REQUIRE(within(x->sequence, i ? x[-1].sequence : 0, c->sequences - 1),
                "histories must be of the sequences, in their order");
        REQUIRE(within(x->kept, 0, FAR) && within(x->first, 0, x->kept) &&
                    within(x->count, 0, x->kept - x->first),
                "a history must lie within its state");
        REQUIRE(x->columns == columns && x->k_row >= columns && x->v_row >= columns,
                "a state must be (kept, groups x width), in 8 bits (kept, groups x (width + 4))");
        parts = least(FAR, parts + (x->count + PART - 1) / PART);
    }
    REQUIRE(within(parts, 0, PIECES - 1) && count < PIECES &&
                is_room(c->parts, c->parts_bytes, parts * c->heads * (c->width + 2), sizeof(float)),
            "parts must hold (parts, heads, width + 2)");
    return 0;
}

typedef struct { /* what `step` was given */
    Step step;
    const History *histories;
    const int64_t *starts;
    int64_t count, parts;
} Stepping;

_Static_assert(sizeof(Stepping) <= GIVEN, "threads are told no more");

/* Slow reading: `step`. */
static void step_parts(const void *given, uint64_t call) {
    const Stepping *told = given;
    const Step *c = &told->step;
    void (*answer)(const Step *, const char *, const char *, const char *, int64_t, int64_t,
                   int64_t, float *) = c->eight  ? (c->wide          ? step_wide_eight
                                                    : c->width == 64 ? step_narrow_eight_64
                                                                     : step_narrow_eight)
                                       : c->wide ? (c->width == 64 ? step_wide_64 : step_wide)
                                                 : (c->width == 64 ? step_narrow_64 : step_narrow);
    const int64_t size = c->wide ? 4 : 2, kept = c->eight ? 1 : size, count = told->count,
                  *starts = told->starts;
    for (int64_t p; (p = take(call, 0, told->parts)) >= 0; give(call, 0)) {
        int64_t low = 0, high = count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (starts[middle] <= p) low = middle;
            else high = middle;
        }
        const History *x = told->histories + low;
        const int64_t at = (p - starts[low]) * PART, k_bytes = x->k_row * kept,
                      v_bytes = x->v_row * kept;
        answer(c, c->q.at + x->sequence * c->q.row * size, x->k + (x->first + at) * k_bytes,
               x->v + (x->first + at) * v_bytes, k_bytes, v_bytes, least(PART, x->count - at),
               c->parts + p * c->heads * (c->width + 2));
    }
    await(call, 0, told->parts);
    for (int64_t i; (i = take(call, 1, count)) >= 0; give(call, 1)) {
        const History *x = told->histories + i;
        int64_t end = i + 1;
        if (i && x->sequence == x[-1].sequence) continue;
        while (end < count && told->histories[end].sequence == x->sequence) end++;
        merge(c, x->sequence, starts[i], starts[end]);
    }
    await(call, 1, count);
}

/* Slow reading: `step`. */
static void run_step(const Step *c, const History *histories, int64_t count, int64_t *starts,
                     int threads) {
    starts[0] = 0;
    for (int64_t i = 0; i < count; i++)
        starts[i + 1] = starts[i] + (histories[i].count + PART - 1) / PART;
    const Stepping told = { *c, histories, starts, count, starts[count] };
    together(step_parts, &told, sizeof told, starts[count] > 1 ? threads : 1);
}

/* histories: in the order of their sequences. starts (count + 1) is filled with the number of each
 * history's first part; parts begin at fixed places, so that an answer does not depend on the
 * others or on the threads. Slow reading: `step`. */
const char *step(const Step *c, const History *histories, int64_t count, int64_t *starts,
                 int64_t starts_bytes, int threads) {
    const char *reason = wrong_step(c, histories, count, starts_bytes, threads);
    if (reason) return reason;
    run_step(c, histories, count, starts, threads);
    return 0;
}

static const char *wrong_states(const Steps *c, int64_t layer, const View *k, const View *v) {
    const int64_t size = c->wide ? 4 : 2, kept = c->eight ? 1 : size,
                  columns = c->groups * (c->width + (c->eight ? SCALE : 0));
    REQUIRE(within(c->eight, 0, 1), "eight must be 0 or 1");
    REQUIRE(within(c->layers, 1, FAR) && within(layer, 0, c->layers - 1), "there is no such layer");
    REQUIRE(within(c->count, 0, FAR) && within(c->sequences, 0, FAR) &&
                is_room(c->histories, c->histories_bytes, c->count, sizeof(History)) &&
                is_room(c->states, c->states_bytes, c->sequences, sizeof(State)),
            "there must be a state of each sequence, and all histories");
    REQUIRE(is_tight(k, size, c->sequences, c->groups, c->width) &&
                is_tight(v, size, c->sequences, c->groups, c->width),
            "k and v must be (sequences, groups, width), heads side by side");
    for (int64_t i = 0; i < c->sequences; i++) {
        const State *x = c->states + i;
        REQUIRE(within(x->kept, 1, FAR) && within(x->place, 0, x->kept - 1) &&
                    within(x->k_row, columns, FAR) && within(x->v_row, columns, FAR) &&
                    within(x->k_layer, 0, FAR) && within(x->v_layer, 0, FAR),
                "a state must be (layers, kept, groups x width, or in 8 bits width + 4), with a "
                "place for its token");
        REQUIRE((__int128)layer * x->k_layer + (__int128)(x->kept - 1) * x->k_row + columns <=
                        x->k_bytes / kept &&
                    (__int128)layer * x->v_layer + (__int128)(x->kept - 1) * x->v_row + columns <=
                        x->v_bytes / kept &&
                    x->k && x->v,
                "a state must hold all its layers");
    }
    for (int64_t i = 0; i < c->count; i++)
        REQUIRE(within(c->histories[i].sequence, 0, c->sequences - 1) &&
                    c->histories[i].kept == c->states[c->histories[i].sequence].kept,
                "a history must be of one of the states");
    return 0;
}

/* The keys or values of a token, all heads side by side, as they are kept. Slow reading:
 * `round_off`. */
INLINE void put(const Steps *c, const char *from, char *to) {
    const int64_t size = c->wide ? 4 : 2, width = c->width;
    if (!c->eight) memcpy(to, from, (size_t)(c->groups * width * size));
    for (int64_t g = 0; g < c->groups && c->eight; g++)
        if (c->wide) round_row(1, width, from + g * width * size, to + g * (width + SCALE));
        else round_row(0, width, from + g * width * size, to + g * (width + SCALE));
}

/* An `Answer`: each sequence's next token is put at its place, then all are answered as by `step`.
 * Slow reading: `step`. */
const char *step_layer(const void *told, int64_t layer, const View *q, const View *k, const View *v,
                       char *out, int64_t out_bytes, int threads) {
    const Steps *c = told;
    const char *reason = wrong_heads(c->heads, c->groups, c->width, c->wide);
    if (!reason) reason = wrong_states(c, layer, k, v);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, kept = c->eight ? 1 : size;
    for (int64_t i = 0; i < c->count; i++) {
        History *x = c->histories + i;
        const State *state = c->states + x->sequence;
        x->k = state->k + layer * state->k_layer * kept;
        x->v = state->v + layer * state->v_layer * kept;
        x->k_row = state->k_row, x->v_row = state->v_row;
    }
    const Step own = { *q,
                       out,
                       out_bytes,
                       c->log_total,
                       c->log_total_bytes,
                       c->parts,
                       c->parts_bytes,
                       c->sequences,
                       c->heads,
                       c->groups,
                       c->width,
                       c->wide,
                       c->eight,
                       c->scale,
                       c->cap };
    reason = wrong_step(&own, c->histories, c->count, c->starts_bytes, most(1, threads));
    if (reason || !threads) return reason;
    for (int64_t i = 0; i < c->sequences; i++) {
        const State *x = c->states + i;
        put(c, k->at + i * k->row * size, x->k + (layer * x->k_layer + x->place * x->k_row) * kept);
        put(c, v->at + i * v->row * size, x->v + (layer * x->v_layer + x->place * x->v_row) * kept);
    }
    run_step(&own, c->histories, c->count, c->starts, threads);
    return 0;
}

/* ---- the best blocks ---- */

#define ASKING 48   /* queries of a task */
#define BEST 256    /* blocks that one of them chooses, at most */
#define COLUMNS 128 /* blocks of keys that are packed together */
#define QUEUE 8 /* runs of up to 16 keys: half of them wait for memory while the others are met */

/* The last block behind the window of the query at a position, itself not counted. Slow reading:
 * `Blocks.behind`. */
INLINE int64_t behind(const Choice *c, int64_t position) {
    return position > c->window ? (position - c->window + c->block - 1) / c->block : 0;
}

/* What of rows of words is above zero, and what below. Slow reading: `torch.clamp`. */
INLINE void part(const int wide, int64_t rows, int64_t words, const char *q, int64_t bytes,
                 uint32_t *above, uint32_t *below) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t w = 0; w < words; w += 16) {
            const __m512i x = _mm512_loadu_si512(q + i * bytes + 4 * w),
                          sign = wide ? _mm512_srai_epi32(x, 31) : _mm512_srai_epi16(x, 15);
            _mm512_storeu_si512(above + i * words + w, _mm512_andnot_si512(sign, x));
            _mm512_storeu_si512(below + i * words + w, _mm512_and_si512(sign, x));
        }
}

/* Scores as whole numbers of the same order, NaN above all others. Slow reading: `ranks`. */
INLINE __m512i ranks(__m512 s) {
    const __m512i largest = _mm512_set1_epi32(0x7fffffff),
                  x = _mm512_castps_si512(_mm512_add_ps(s, _mm512_setzero_ps())); /* -0 is 0 */
    const __m512i found = _mm512_xor_si512(x, _mm512_and_si512(_mm512_srai_epi32(x, 31), largest));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q), found, largest);
}

/* Slow reading: `torch.min`. */
INLINE int64_t lowest(const int64_t *held, int64_t room) {
    __m512i low = _mm512_loadu_si512(held);
    for (int64_t j = 8; j < room; j += 8) low = _mm512_min_epi64(low, _mm512_loadu_si512(held + j));
    return _mm512_reduce_min_epi64(low);
}

/* Keep the best of what is held (room) and of the scores of n blocks, the first of them `block`:
 * rank and block as one number, of equals the later block. From the last to the first, for near
 * blocks tend to be better, and most others then fail at the first look. Slow reading: `choose`. */
INLINE void keep(const float *scores, int64_t block, int64_t n, int64_t *held, int64_t room) {
    int32_t found[16];
    int64_t bar = lowest(held, room);
    for (int64_t j = (n - 1) & ~15; j >= 0; j -= 16) {
        const __m512i rank = ranks(_mm512_loadu_ps(scores + j));
        uint32_t better = _mm512_cmpgt_epi32_mask(rank, _mm512_set1_epi32((int32_t)(bar >> 32))) &
                          ((1u << least(16, n - j)) - 1);
        if (better) _mm512_storeu_si512(found, rank);
        while (better) {
            const int lane = 31 - __builtin_clz(better);
            const int64_t key =
                (int64_t)((uint64_t)(uint32_t)found[lane] << 32 | (uint64_t)(block + j + lane));
            better ^= 1u << lane;
            if (key <= bar) continue;
            int64_t at = 0;
            while (held[at] != bar) at++;
            held[at] = key;
            bar = lowest(held, room);
        }
    }
}

/* The best blocks of a task's queries for a group of heads: those whose keys' bounds allow the
 * largest scores, summed over the heads (k: the highest of each element, v: the lowest). Slow
 * reading: `choose`. */
INLINE void choose_rows(const int wide, const int64_t width, const Choice *c, const Source *sources,
                        const Rows *rows, int64_t group) {
    uint32_t high[WIDEST * COLUMNS / 2 * (wide ? 2 : 1)] __attribute__((aligned(64)));
    uint32_t low[WIDEST * COLUMNS / 2 * (wide ? 2 : 1)] __attribute__((aligned(64)));
    uint32_t above[TILE * WIDEST], below[TILE * WIDEST];
    float s[TILE][COLUMNS] __attribute__((aligned(64)));
    int64_t held[ASKING * BEST];
    const float ones[TILE] = { 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f };
    const int64_t size = wide ? 4 : 2, words = width * size / 4, ratio = c->heads / c->groups,
                  count = rows->last - rows->first, room = (c->best + 7) & ~7,
                  first = c->sinks / c->block, end = behind(c, rows->position + count - 1);
    const Source *bounds = sources + rows->source;
    for (int64_t i = 0; i < count * room; i++) held[i] = i % room < c->best ? INT64_MIN : INT64_MAX;
    for (int64_t at = first + (end - first - 1) / COLUMNS * COLUMNS; first < end && at >= first;
         at -= COLUMNS) {
        const int64_t n = least(COLUMNS, end - at), whole = (n + 15) & ~15;
        pack_turned(bounds->k.at + (group * bounds->k.head + at * bounds->k.row) * size,
                    bounds->k.row * size, n, words, high, COLUMNS);
        pack_turned(bounds->v.at + (group * bounds->v.head + at * bounds->v.row) * size,
                    bounds->v.row * size, n, words, low, COLUMNS);
        for (int64_t i = 0; i < count; i += TILE) {
            const int64_t some = least(TILE, count - i);
            for (int64_t h = 0; h < ratio; h++) {
                part(wide, some, words,
                     c->q.at +
                         ((rows->first + i) * c->q.row + (group * ratio + h) * c->q.head) * size,
                     c->q.row * size, above, below);
                tile_products(wide, some, whole, words, (const char *)above, 4 * words, 4, high,
                              COLUMNS, s[0], COLUMNS, h ? ones : 0);
                tile_products(wide, some, whole, words, (const char *)below, 4 * words, 4, low,
                              COLUMNS, s[0], COLUMNS, ones);
            }
            for (int64_t t = 0; t < some; t++)
                keep(s[t], at, least(n, behind(c, rows->position + i + t) - at),
                     held + (i + t) * room, room);
        }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t b = 0; b < c->best; b++) {
            const int64_t key = held[i * room + b];
            c->chosen[((rows->first + i) * c->groups + group) * c->best + b] =
                key == INT64_MIN ? -1 : (int32_t)(uint32_t)key;
        }
}

/* One query, the heads of a group, meets `count` runs of up to 16 keys. by: as of `score`. Slow
 * reading: `_answer`. */
INLINE void meet(const int wide, const int eight, const int64_t width, const Choice *c,
                 const Source *source, const char *q, int64_t q_head, const float *by,
                 int64_t group, const int64_t *at, const int64_t *n, int64_t count, float *sums,
                 float *tops, float *totals) {
    float s[16 * QUEUE] __attribute__((aligned(64)));
    const int64_t size = eight  ? 1
                         : wide ? 4
                                : 2,
                  ratio = c->heads / c->groups, k_row = source->k.row * size,
                  v_row = source->v.row * size;
    const char *k = source->k.at + group * source->k.head * size,
               *v = source->v.at + group * source->v.head * size;
    for (int64_t h = 0; h < ratio; h++, q += q_head) {
        for (int64_t i = 0; i < count; i++) {
            score(wide, eight, 1, width, q, 0, by + h, k + at[i] * k_row, k_row, n[i], 0,
                  s + 16 * i, 16);
            hide(s + 16 * i, 0, 0, n[i], -INFINITY);
        }
        const float factor = soften(wide, 0, s, 16 * count, c->scale, tops + h, totals + h);
        for (int64_t i = 0; i < count; i++)
            gather(wide, eight, width, s + 16 * i, v + at[i] * v_row, v_row, n[i],
                   i ? 1.0f : factor, sums + h * width);
    }
}

/* A task's queries, the heads of a group, meet the keys of the blocks that they chose and put them
 * together with what they have met. Slow reading: `chosen`. */
INLINE void chosen_rows(const int wide, const int eight, const int64_t width, const Choice *c,
                        const Source *sources, const Rows *rows, int64_t group) {
    float sums[HEADS * WIDEST] __attribute__((aligned(64))), tops[HEADS], totals[HEADS], by[HEADS];
    int16_t told[HEADS * WIDEST];
    int64_t at[QUEUE], n[QUEUE];
    const int64_t size = wide ? 4 : 2, ratio = c->heads / c->groups, kept = eight ? 1 : size,
                  bytes = eight ? width + SCALE : width * size;
    const Source *source = sources + rows->source;
    for (int64_t row = rows->first; row < rows->last; row++) {
        const int64_t near = rows->position + row - rows->first - c->window;
        const char *q = c->q.at + (row * c->q.row + group * ratio * c->q.head) * size;
        int64_t waiting = 0, met = 0, q_head = c->q.head * size;
        memset(sums, 0, sizeof(float) * ratio * width);
        for (int64_t h = 0; h < ratio; h++) tops[h] = -INFINITY, totals[h] = 0.0f, by[h] = 1.0f;
        if (eight && !wide) {
            round_queries(ratio, width, q, q_head, told, by);
            q = (const char *)told, q_head = width * size;
        }
        for (int64_t b = 0; b < c->best; b++) {
            const int64_t block = c->chosen[(row * c->groups + group) * c->best + b];
            const int64_t to = least((block + 1) * c->block, near);
            for (int64_t j = most(block * c->block, c->sinks); block >= 0 && j < to; j += 16) {
                at[waiting] = j, n[waiting] = least(16, to - j);
                prefetch(source->k.at + group * source->k.head * kept, source->k.row * kept, j,
                         j + n[waiting], bytes);
                prefetch(source->v.at + group * source->v.head * kept, source->v.row * kept, j,
                         j + n[waiting], bytes);
                if (++waiting < QUEUE) continue;
                meet(wide, eight, width, c, source, q, q_head, by, group, at, n, QUEUE / 2, sums,
                     tops, totals);
                waiting -= QUEUE / 2, met = 1;
                memcpy(at, at + QUEUE / 2, sizeof(int64_t) * waiting);
                memcpy(n, n + QUEUE / 2, sizeof(int64_t) * waiting);
            }
        }
        if (waiting)
            meet(wide, eight, width, c, source, q, q_head, by, group, at, n, waiting, sums, tops,
                 totals);
        for (int64_t h = 0; h < ratio && (waiting || met); h++) {
            const int64_t head = group * ratio + h;
            const float old = c->log_total[row * c->heads + head], top = fmaxf(old, tops[h]);
            const float by = top == -INFINITY ? 1.0f : exp2f(old - top),
                        more = top == -INFINITY ? 1.0f : exp2f(tops[h] - top);
            for (int64_t d = 0; d < width; d += 32) {
                char *to = c->out.at + (row * c->out.row + head * c->out.head + d) * size;
                __m512 a = _mm512_loadu_ps(sums + h * width + d),
                       b = _mm512_loadu_ps(sums + h * width + d + 16);
                in_order(wide || eight, &a, &b);
                a = _mm512_fmadd_ps(_mm512_set1_ps(by), load16(wide, to),
                                    _mm512_mul_ps(_mm512_set1_ps(more), a));
                b = _mm512_fmadd_ps(_mm512_set1_ps(by), load16(wide, to + 16 * size),
                                    _mm512_mul_ps(_mm512_set1_ps(more), b));
                store_answer(wide, to, a, by + more * totals[h]);
                store_answer(wide, to + 16 * size, b, by + more * totals[h]);
            }
        }
    }
}

#define TASK(NAME, FUNCTION, ...) \
    __attribute__((noinline)) static void NAME(const Choice *c, const Source *s, const Rows *r, \
                                               int64_t g) { \
        FUNCTION(__VA_ARGS__, c, s, r, g); \
    }
TASK(choose_narrow_64, choose_rows, 0, 64)
TASK(choose_narrow, choose_rows, 0, c->width)
TASK(choose_wide_64, choose_rows, 1, 64)
TASK(choose_wide, choose_rows, 1, c->width)
TASK(chosen_narrow_64, chosen_rows, 0, 0, 64)
TASK(chosen_narrow, chosen_rows, 0, 0, c->width)
TASK(chosen_wide_64, chosen_rows, 1, 0, 64)
TASK(chosen_wide, chosen_rows, 1, 0, c->width)
TASK(chosen_narrow_eight, chosen_rows, 0, 1, c->width)
TASK(chosen_wide_eight, chosen_rows, 1, 1, c->width)

/* What both functions ask for; blocks: whether the sources are of blocks, not of keys. */
static const char *wrong_choice(const Choice *c, const Source *sources, int64_t source_count,
                                const Rows *rows, int64_t count, int is_of_blocks, int threads) {
    const char *reason = wrong_heads(c->heads, c->groups, c->width, c->wide);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2;
    REQUIRE(within(c->queries, 0, FAR) && threads >= 1,
            "there must be threads, and not too many queries");
    REQUIRE(is_view(&c->q, size, c->queries, c->heads, c->width),
            "q must be (queries, heads, width)");
    REQUIRE(within(c->best, 1, BEST), "a query must choose 1 to 256 blocks");
    REQUIRE(within(c->block, 1, (int64_t)1 << 31) && within(c->window, c->block, FAR) &&
                within(c->sinks, 0, FAR),
            "a window must be as wide as a block, and sinks a number");
    REQUIRE(is_room(c->chosen, c->chosen_bytes, c->queries * c->groups * c->best, sizeof(int32_t)),
            "chosen must hold (queries, groups, best)");
    REQUIRE(within(c->eight, 0, 1), "eight must be 0 or 1");
    const int is_told = is_of_blocks || !c->eight;
    const int64_t kept = is_told ? size : 1, across = c->width + (is_told ? 0 : SCALE);
    for (int64_t i = 0; i < source_count; i++)
        REQUIRE(is_view(&sources[i].k, kept, 0, c->groups, across) &&
                    is_view(&sources[i].v, kept, sources[i].k.rows, c->groups, across),
                "keys and values must be (n, groups, width), in 8 bits (n, groups, width + 4)");
    for (int64_t i = 0, end = 0; i < count; end = rows[i++].last) {
        REQUIRE(within(rows[i].first, end, rows[i].last) && rows[i].last <= c->queries &&
                    rows[i].last - rows[i].first <= ASKING,
                "rows must be of the queries, in their order, and not too many");
        REQUIRE(within(rows[i].source, 0, source_count - 1), "rows must be of one of the sources");
        REQUIRE(within(rows[i].position, 0, FAR), "rows must stand at a position");
        const int64_t next = rows[i].position + rows[i].last - rows[i].first,
                      needed = is_of_blocks ? behind(c, next - 1) : next;
        REQUIRE(needed <= sources[rows[i].source].k.rows,
                "a source must hold what its rows may choose");
    }
    return 0;
}

/* Fills `chosen`. The sources are bounds of whole blocks of keys. Slow reading: `choose`. */
const char *choose(const Choice *c, const Source *sources, int64_t source_count, const Rows *rows,
                   int64_t count, int threads) {
    const char *reason = wrong_choice(c, sources, source_count, rows, count, 1, threads);
    if (reason) return reason;
    void (*answer)(const Choice *, const Source *, const Rows *, int64_t) =
        c->wide ? (c->width == 64 ? choose_wide_64 : choose_wide)
                : (c->width == 64 ? choose_narrow_64 : choose_narrow);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count * c->groups; i++)
        answer(c, sources, rows + i / c->groups, i % c->groups);
    return 0;
}

/* Adds the keys of the chosen blocks to the answers. Slow reading: `chosen`. */
const char *chosen(const Choice *c, const Source *sources, int64_t source_count, const Rows *rows,
                   int64_t count, int threads) {
    const char *reason = wrong_choice(c, sources, source_count, rows, count, 0, threads);
    if (reason) return reason;
    REQUIRE(is_view(&c->out, c->wide ? 4 : 2, c->queries, c->heads, c->width),
            "out must be (queries, heads, width)");
    REQUIRE(is_room(c->log_total, c->log_total_bytes, c->queries * c->heads, sizeof(float)),
            "log_total must hold (queries, heads)");
    void (*answer)(const Choice *, const Source *, const Rows *, int64_t) =
        c->eight  ? (c->wide ? chosen_wide_eight : chosen_narrow_eight)
        : c->wide ? (c->width == 64 ? chosen_wide_64 : chosen_wide)
                  : (c->width == 64 ? chosen_narrow_64 : chosen_narrow);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count * c->groups; i++)
        answer(c, sources, rows + i / c->groups, i % c->groups);
    return 0;
}

#else
int supported(void) { return 0; }
const char *attend(void) { return "this machine has no AVX-512"; }
const char *step(void) { return "this machine has no AVX-512"; }
const char *step_layer(void) { return "this machine has no AVX-512"; }
const char *choose(void) { return "this machine has no AVX-512"; }
const char *chosen(void) { return "this machine has no AVX-512"; }
#endif
