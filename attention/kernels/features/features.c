/* Attention through positive features: the functions behind `native.py`. `torch.py` is their
 * slow reading.
 *
 * A token adds phi(k) [v, 1] to the sums S (D + 1, m) of its key-value head, and each of its
 * queries asks them: phi(q) S, numerator and denominator. With random rows W, phi(x) is 2^(x W -
 * |x|^2 half), W scaled so that this is exp(W x' - |x'|^2 / 2) (FAVOR+, arXiv 2009.14794); without,
 * elu(x) + 1 (arXiv 2006.16236), taken as 2^e + lift with e <= 0.
 *
 * Many tokens go by chunks. First each chunk makes its keys' features and what they add, all chunks
 * at once; then the sums are run along the chunks; then each chunk, again all at once, makes its
 * queries' features six rows at a time, asks the sums of all chunks before it, and meets its own
 * triangle while they are in L1. One token reads S once and writes it once, which is its limit: S
 * is 66 KB a head.
 *
 * Feature r of the sums is short of 2^level_r, which a key sets that would pass it by 2^limit; a
 * first key passes -inf. Why no row's total is then below 1 is told in __init__.py. Levels stand
 * still while chunks run: they go up to the first token that would raise one (or that is no number:
 * 0 x NaN is NaN), and on from there. So earlier rows are the same to the bit whatever comes later.
 */
#include "given.h"

typedef struct {
    View q, k, v, out;       /* (C, H, D), (C, G, D), (C, G, D), (C, H, D) */
    const uint32_t *weights; /* W as words of neighbouring rows, (D, m) or (D / 2, m); null: elu(x)
                                + 1, m = D */
    int64_t weights_bytes;
    float *sums; /* (G, D + 1, m) */
    int64_t sums_bytes;
    float *level; /* (G, m) */
    int64_t level_bytes;
    float
        *added; /* scratch: (chunks, G, D + 1, m), what each chunk adds, then the sums before it */
    int64_t added_bytes;
    uint32_t *keys; /* scratch: (chunks, G, words of m, CHUNK), features of keys */
    int64_t keys_bytes;
    uint32_t *room; /* scratch: `room_words` for each thread */
    int64_t room_bytes;
    float *near; /* (C, H) or null: out holds an answer over other keys already, and this is
                          log2 of their weights' sum */
    int64_t near_bytes;
    int64_t tokens, heads, groups, width, count, wide; /* count: m */
    int64_t adds, asks; /* add the keys to the sums; answer the queries: over the sums alone, or,
                           where both, causally */
    float half, limit, log_count; /* log_count: log2(m) */
} Features;

typedef struct {
    View q, k, v; /* (B, H, D), (B, G, D), (B, G, D), heads tight */
    char *out;    /* (B, H, D), tight */
    int64_t out_bytes;
    const uint32_t *weights; /* as above */
    int64_t weights_bytes;
    float *features; /* scratch: (R + 1, m) for each sequence and key-value head */
    int64_t features_bytes;
    float *near; /* (B, H) or null */
    int64_t near_bytes;
    int64_t sequences, heads, groups, width, count, wide, adds;
    float half, limit, log_count;
} FeaturesStep;

typedef struct { /* the sums (G, D + 1, m) of a sequence and their levels (G, m) */
    float *sums;
    int64_t sums_bytes;
    float *level;
    int64_t level_bytes;
} State;

typedef struct {         /* a step at each of several layers */
    FeaturesStep step;   /* without its tensors */
    const State *states; /* of each sequence all layers, one behind the other */
    int64_t states_bytes;
    State *own; /* room for those of one layer */
    int64_t own_bytes;
    int64_t layers;
    Answer answer; /* who answers over the keys that `near` tells of, or null */
    const void *told;
} FeaturesSteps;

/* clang-format off */
/* The sums of a key-value head, S (D + 1, m), and their level (m); `added` holds S of each chunk:
 *
 *               feature 0 .. m - 1
 *   value 0     sum of phi_r(k) v_0         x 2^-level_r, column by column
 *   ..
 *   value D-1   sum of phi_r(k) v_(D-1)
 *   "1"         sum of phi_r(k)             the denominators
 *
 * W as words: of float32 (D, m) as it is; of bfloat16 (D / 2, m), two rows of a column to a word,
 *
 *   w00w10 w01w11 w02w12 ..
 *   w20w30 w21w31 w22w32 ..
 *
 * `keys`, of each chunk and head: features of its 128 keys, turned as in simd.h, (words of m, 128).
 * `room` of a thread:   add  | features of a chunk's keys (128, m) | the same, packed by pairs |
 *                       ask  | S in the dtype of products (D, m)   | the same, turned          |
 */
/* clang-format on */

/* Sizes and offsets, for a caller in another language to compare with its own. */
/* clang-format off */
const int64_t features_layout[] = {
    sizeof(View), sizeof(State), sizeof(Features), FIELD(Features, q), FIELD(Features, k),
    FIELD(Features, v), FIELD(Features, out), FIELD(Features, weights),
    FIELD(Features, weights_bytes), FIELD(Features, sums), FIELD(Features, sums_bytes),
    FIELD(Features, level), FIELD(Features, level_bytes), FIELD(Features, added),
    FIELD(Features, added_bytes), FIELD(Features, keys), FIELD(Features, keys_bytes),
    FIELD(Features, room), FIELD(Features, room_bytes), FIELD(Features, near),
    FIELD(Features, near_bytes), FIELD(Features, tokens), FIELD(Features, heads),
    FIELD(Features, groups), FIELD(Features, width), FIELD(Features, count), FIELD(Features, wide),
    FIELD(Features, adds), FIELD(Features, asks), FIELD(Features, half), FIELD(Features, limit),
    FIELD(Features, log_count),
    sizeof(FeaturesStep), FIELD(FeaturesStep, q), FIELD(FeaturesStep, k), FIELD(FeaturesStep, v),
    FIELD(FeaturesStep, out), FIELD(FeaturesStep, out_bytes), FIELD(FeaturesStep, weights),
    FIELD(FeaturesStep, weights_bytes), FIELD(FeaturesStep, features),
    FIELD(FeaturesStep, features_bytes), FIELD(FeaturesStep, near),
    FIELD(FeaturesStep, near_bytes), FIELD(FeaturesStep, sequences), FIELD(FeaturesStep, heads),
    FIELD(FeaturesStep, groups), FIELD(FeaturesStep, width), FIELD(FeaturesStep, count),
    FIELD(FeaturesStep, wide), FIELD(FeaturesStep, adds), FIELD(FeaturesStep, half),
    FIELD(FeaturesStep, limit), FIELD(FeaturesStep, log_count),
    sizeof(FeaturesSteps), FIELD(FeaturesSteps, step), FIELD(FeaturesSteps, states),
    FIELD(FeaturesSteps, states_bytes), FIELD(FeaturesSteps, own), FIELD(FeaturesSteps, own_bytes),
    FIELD(FeaturesSteps, layers), FIELD(FeaturesSteps, answer), FIELD(FeaturesSteps, told),
    -1,
};
/* clang-format on */

#ifdef HAS_AVX512
#include "simd.h"
#include "team.h"
#include <omp.h>

#define MOST 4096 /* m, at most */
#define CHUNK 128 /* tokens */

/* |x|^2 of D elements. Slow reading: `Features.half_squares`. */
INLINE float square(const int wide, const int64_t width, const char *x) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t w = 0; w < width * (wide ? 4 : 2); w += 64) {
        const __m512i words = _mm512_loadu_si512(x + w);
        sum = multiply_add(wide, words, words, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* |x|^2 half. Slow reading: `Features.half_squares`. */
INLINE float half_square(const int wide, const int64_t width, const char *x, float half) {
    return half ? square(wide, width, x) * half : 0.0f;
}

/* The exponents x W, (rows, m), of up to six rows of D elements, one every `row` of them; without
 * W, the elements. Slow reading: `Features.queries`. */
INLINE void exponents(const int wide, const int64_t width, const uint32_t *weights, int64_t count,
                      const char *x, int64_t row, int64_t rows, float *to) {
    const int64_t size = wide ? 4 : 2, words = width * size / 4;
    if (!weights) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j += 16)
                _mm512_storeu_ps(to + i * count + j, load16(wide, x + (i * row + j) * size));
        return;
    }
    tile_products(wide, rows, count, words, x, row * size, 4, weights, count, to, count, 0);
}

/* The exponents of 16 features, of 16 products with W or, without, of 16 elements. NaN stays NaN
 * where it stands second. Slow reading: `_elu`. */
INLINE __m512 exponent(const uint32_t *weights, __m512 x) {
    return weights
               ? x
               : _mm512_mul_ps(_mm512_min_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(1.44269504f));
}

/* 16 features, short of 2^less; 2^(min(x, 0) log2 e) + max(x, 0) without W. Where that lifts, -less
 * is no more than the limit. Slow reading: `Logs.times`. */
INLINE __m512 feature(const int wide, const uint32_t *weights, __m512 x, __m512 less) {
    if (weights) return exp2_16(wide, _mm512_sub_ps(x, less));
    const __m512 lift = _mm512_max_ps(_mm512_setzero_ps(), x),
                 by =
                     _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), less), _mm512_set1_ps(64.0f));
    return _mm512_fmadd_ps(lift, exp2_16(1, by),
                           exp2_16(1, _mm512_sub_ps(exponent(weights, x), less)));
}

/* The largest exponent + level of a query, which its features are taken relative to. Slow reading:
 * `Logs.asking`. */
INLINE float find_top(const uint32_t *weights, const float *x, const float *level, int64_t count) {
    __m512 found = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < count; j += 16)
        found = _mm512_max_ps(found, _mm512_add_ps(exponent(weights, _mm512_loadu_ps(x + j)),
                                                   _mm512_loadu_ps(level + j)));
    return _mm512_reduce_max_ps(found);
}

/* What 16 features of a query are less, so that they ask sums which are short of 2^level. Slow
 * reading: `Logs.asking`. */
INLINE __m512 relative(float top, const float *level) {
    return _mm512_sub_ps(_mm512_set1_ps(top), _mm512_loadu_ps(level));
}

/* Of 16 features of a key, |k|^2 half taken off: those that would pass their level by 2^limit. Slow
 * reading: `_raise`. */
INLINE __mmask16 passing(const uint32_t *weights, __m512 x, __m512 half, const float *level,
                         float limit) {
    const __m512 found = _mm512_sub_ps(exponent(weights, x), half);
    return _mm512_cmp_ps_mask(found, _mm512_add_ps(_mm512_loadu_ps(level), _mm512_set1_ps(limit)),
                              _CMP_GT_OQ);
}

/* Raise the levels (m) that a key would pass, its exponents (m), and with them the columns of the
 * sums (D + 1, m). Slow reading: `_raise`. */
INLINE void raise_levels(const uint32_t *weights, const int64_t width, const float *x, float half,
                         float limit, float *sums, float *level, int64_t m) {
    const __m512 less = _mm512_set1_ps(half);
    for (int64_t j = 0; j < m; j += 16) {
        const __mmask16 above = passing(weights, _mm512_loadu_ps(x + j), less, level + j, limit);
        if (!above) continue;
        const __m512 old = _mm512_loadu_ps(level + j),
                     now = _mm512_mask_sub_ps(old, above, exponent(weights, _mm512_loadu_ps(x + j)),
                                              less);
        const __m512 by =
            _mm512_mask_blend_ps(above, _mm512_set1_ps(1.0f), exp2_16(1, _mm512_sub_ps(old, now)));
        for (int64_t d = 0; d <= width; d++)
            _mm512_storeu_ps(sums + d * m + j,
                             _mm512_mul_ps(by, _mm512_loadu_ps(sums + d * m + j)));
        _mm512_storeu_ps(level + j, now);
    }
}

/* An answer over far keys, sums / total short of 2^level, joins the one over near keys that stands
 * in out; near: log2 of the sum of their weights, then of all. Slow reading: `_mix`. */
INLINE void join(const int wide, const int64_t width, char *out, const float *sums, float total,
                 float level, float *near) {
    const float log = log2f(total) + level, part = 1.0f / (1.0f + exp2f(*near - log));
    const __m512 share = _mm512_set1_ps(part), by = _mm512_set1_ps(total);
    for (int64_t d = 0; d < width; d += 16) {
        char *to = out + d * (wide ? 4 : 2);
        const __m512 answer = load16(wide, to), far = _mm512_div_ps(_mm512_loadu_ps(sums + d), by);
        store16(wide, to, _mm512_fmadd_ps(share, _mm512_sub_ps(far, answer), answer));
    }
    *near = (log > *near ? log : *near) + log2f(1.0f + exp2f(-fabsf(log - *near)));
}

/* ---- many tokens ---- */

/* The first token of a run raises what levels it passes. Slow reading: `_raise`. */
INLINE void begin_run(const int wide, const int64_t width, const Features *c, int64_t group) {
    const char *k = c->k.at + group * c->k.head * (wide ? 4 : 2);
    float x[MOST] __attribute__((aligned(64)));
    exponents(wide, width, c->weights, c->count, k, c->k.row, 1, x);
    raise_levels(c->weights, width, x, half_square(wide, width, k, c->half), c->limit,
                 c->sums + group * (width + 1) * c->count, c->level + group * c->count, c->count);
}

/* What a chunk adds to the sums of a key-value head; its keys' features are kept if it asks, too.
 * Returns the first of its tokens, in the run, that must begin a run of its own; then what it added
 * holds tokens that it should not. Slow reading: `_absorb`. */
INLINE int64_t add_chunk(const int wide, const int64_t width, const Features *c, int64_t chunk,
                         int64_t group, uint32_t *room) {
    const int64_t size = wide ? 4 : 2, packed = wide ? 1 : 2, m = c->count, words = m / packed,
                  first = chunk * CHUNK;
    const int64_t n = least(CHUNK, c->tokens - first), whole = (n + 15) & ~15;
    const float *level = c->level + group * m;
    uint32_t *rows = room, *pairs = rows + CHUNK * words;
    uint32_t values[CHUNK * WIDEST / (wide ? 1 : 2)] __attribute__((aligned(64)));
    float *added = c->added + (chunk * c->groups + group) * (width + 1) * m;
    float *total =
        added + width * m; /* the row of [v, 1] that is 1, summed before features are rounded */
    memset(total, 0, sizeof(float) * m);
    for (int64_t i = 0; i < n; i += TILE) {
        float x[TILE * MOST] __attribute__((aligned(64)));
        const char *k = c->k.at + ((first + i) * c->k.row + group * c->k.head) * size,
                   *v = c->v.at + ((first + i) * c->v.row + group * c->v.head) * size;
        exponents(wide, width, c->weights, m, k, c->k.row, least(TILE, n - i), x);
        for (int64_t t = 0; t < least(TILE, n - i); t++) {
            const char *key = k + t * c->k.row * size;
            const int is_number =
                square(wide, width, key) + square(wide, width, v + t * c->v.row * size) < INFINITY;
            const __m512 half = _mm512_set1_ps(half_square(wide, width, key, c->half));
            __mmask16 above = 0;
            for (int64_t j = 0; j < m; j += 16) {
                const __m512 from = _mm512_loadu_ps(x + t * m + j),
                             less = _mm512_add_ps(half, _mm512_loadu_ps(level + j));
                const __m512 phi = feature(wide, c->weights, from, less);
                above |= passing(c->weights, from, half, level + j, c->limit);
                store16(wide, (char *)(rows + (i + t) * words) + j * size, phi);
                _mm512_storeu_ps(total + j, _mm512_add_ps(phi, _mm512_loadu_ps(total + j)));
            }
            if ((above || !is_number) && first + i + t) return first + i + t;
        }
    }
    if (c->asks)
        pack_turned((const char *)rows, 4 * words, n, words,
                    c->keys + (chunk * c->groups + group) * words * CHUNK, CHUNK);
    pack_rows(wide, (const char *)rows, 4 * words, 0, n, whole, m, pairs);
    pack_rows(wide, c->v.at + (first * c->v.row + group * c->v.head) * size, c->v.row * size, 0, n,
              whole, width, values);
    for (int64_t d = 0; d < width; d += TILE)
        tile_products(wide, least(TILE, width - d), m, whole / packed, (const char *)(values + d),
                      4, 4 * width, pairs, m, added + d * m, m, 0);
    return c->tokens;
}

/* One row of the sums of a key-value head along the chunks: what each adds becomes what stood
 * before it. Slow reading: `_add`. */
INLINE void run_along(const Features *c, int64_t chunks, int64_t group, int64_t row) {
    const int64_t m = c->count, each = (c->width + 1) * m;
    float *sums = c->sums + group * each + row * m;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *added = c->added + (chunk * c->groups + group) * each + row * m;
        for (int64_t j = 0; j < m; j += 16) {
            const __m512 before = _mm512_loadu_ps(sums + j);
            _mm512_storeu_ps(sums + j, _mm512_add_ps(before, _mm512_loadu_ps(added + j)));
            _mm512_storeu_ps(added + j, before);
        }
    }
}

/* The queries of a chunk, all heads of a group: over the sums, and causally over their own chunk.
 * Slow reading: `_scan`. */
INLINE void ask_chunk(const int wide, const int64_t width, const Features *c, int64_t chunk,
                      int64_t group, uint32_t *room) {
    const int64_t size = wide ? 4 : 2, packed = wide ? 1 : 2, m = c->count, words = m / packed,
                  first = chunk * CHUNK;
    const int64_t n = least(CHUNK, c->tokens - first), ratio = c->heads / c->groups;
    const float ones[TILE] = { 1, 1, 1, 1, 1, 1 }; /* what stands in `both` is added to */
    const float *level = c->level + group * m;
    const float *sums = c->adds ? c->added + (chunk * c->groups + group) * (width + 1) * m
                                : c->sums + group * (width + 1) * m;
    const uint32_t *keys = c->keys + (chunk * c->groups + group) * words * CHUNK;
    uint32_t *rows = room, *turned = rows + width * words;
    uint32_t values[CHUNK * WIDEST / (wide ? 1 : 2)] __attribute__((aligned(64)));
    for (int64_t d = 0; d < width; d++)
        for (int64_t j = 0; j < m; j += 16)
            store16(wide, (char *)(rows + d * words) + j * size, _mm512_loadu_ps(sums + d * m + j));
    pack_turned((const char *)rows, 4 * words, width, words, turned, width);
    if (c->adds)
        pack_rows(wide, c->v.at + (first * c->v.row + group * c->v.head) * size, c->v.row * size, 0,
                  n, (n + 15) & ~15, width, values);
    for (int64_t h = group * ratio; h < (group + 1) * ratio; h++)
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t count = least(TILE, n - i), seen = (i + count + 15) & ~15;
            const char *q = c->q.at + ((first + i) * c->q.row + h * c->q.head) * size;
            float e[TILE * MOST] __attribute__((aligned(64))), both[TILE][WIDEST],
                s[TILE][CHUNK] __attribute__((aligned(64)));
            uint32_t phi[TILE * MOST / (wide ? 1 : 2)] __attribute__((aligned(64))),
                p[TILE][CHUNK / 2];
            float totals[TILE], below[TILE];
            exponents(wide, width, c->weights, m, q, c->q.row, count, e);
            for (int64_t t = 0; t < count; t++) { /* what is left out here cancels in the answer */
                const float top = find_top(c->weights, e + t * m, level, m);
                below[t] =
                    c->near ? top - square(wide, width, q + t * c->q.row * size) * c->half : 0.0f;
                __m512 total = _mm512_setzero_ps();
                for (int64_t j = 0; j < m; j += 16) {
                    const __m512 x = feature(wide, c->weights, _mm512_loadu_ps(e + t * m + j),
                                             relative(top, level + j));
                    store16(wide, (char *)(phi + t * words) + j * size, x);
                    total = _mm512_fmadd_ps(x, _mm512_loadu_ps(sums + width * m + j), total);
                }
                totals[t] = _mm512_reduce_add_ps(total);
            }
            tile_products(wide, count, width, words, (const char *)phi, 4 * words, 4, turned, width,
                          both[0], WIDEST, 0);
            if (c->adds)
                tile_products(wide, count, seen, words, (const char *)phi, 4 * words, 4, keys,
                              CHUNK, s[0], CHUNK, 0);
            for (int64_t t = 0; t < count && c->adds; t++) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < seen; j += 16) {
                    if (j + 16 > i + t + 1) hide(&s[t][j], j, 0, i + t + 1, 0.0f);
                    sum = _mm512_add_ps(sum, _mm512_load_ps(&s[t][j]));
                    if (!wide) store16(0, (char *)p[t] + 2 * j, _mm512_load_ps(&s[t][j]));
                }
                totals[t] += _mm512_reduce_add_ps(sum);
            }
            if (c->adds) {
                const char *weights = wide ? (const char *)s[0] : (const char *)p[0];
                tile_products(wide, count, width, seen / packed, weights, 4 * CHUNK / packed, 4,
                              values, width, both[0], WIDEST, ones);
            }
            for (int64_t t = 0; t < count; t++) {
                char *out = c->out.at + ((first + i + t) * c->out.row + h * c->out.head) * size;
                if (c->near)
                    join(wide, width, out, both[t], totals[t], below[t] - c->log_count,
                         c->near + (first + i + t) * c->heads + h);
                else
                    for (int64_t d = 0; d < width; d += 16)
                        store_answer(wide, out + d * size, _mm512_loadu_ps(&both[t][d]), totals[t]);
            }
        }
}

#define MANY(NAME, WIDE, WIDTH) \
    __attribute__((noinline)) static int64_t add_##NAME(const Features *c, int64_t i, int64_t g, \
                                                        uint32_t *room) { \
        return add_chunk(WIDE, WIDTH, c, i, g, room); \
    } \
    __attribute__((noinline)) static void ask_##NAME(const Features *c, int64_t i, int64_t g, \
                                                     uint32_t *room) { \
        ask_chunk(WIDE, WIDTH, c, i, g, room); \
    } \
    __attribute__((noinline)) static void begin_##NAME(const Features *c, int64_t g) { \
        begin_run(WIDE, WIDTH, c, g); \
    }
MANY(narrow_64, 0, 64)
MANY(narrow, 0, c->width)
MANY(wide, 1, c->width)

#define CHOOSE(WORK) (c->wide ? WORK##_wide : c->width == 64 ? WORK##_narrow_64 : WORK##_narrow)

static const char *wrong_features(int64_t heads, int64_t groups, int64_t width, int64_t wide,
                                  const uint32_t *weights, int64_t bytes, int64_t count) {
    REQUIRE(within(heads, 1, HEADS) && within(groups, 1, heads) && heads % groups == 0,
            "heads must be a multiple of groups, up to 128");
    REQUIRE(within(width, 32, WIDEST) && width % 32 == 0,
            "width must be a multiple of 32, up to 256");
    REQUIRE(within(count, 32, MOST) && count % 32 == 0,
            "features must be a multiple of 32, up to 4096");
    REQUIRE(within(wide, 0, 1), "wide must be 0 or 1");
    REQUIRE(weights ? bytes >= width * count * (wide ? 4 : 2) : count == width,
            "weights must hold (width, features)");
    return 0;
}

/* 32-bit words of scratch that a thread needs. */
static int64_t room_words(const Features *c) {
    return 2 * most(CHUNK, c->width) * c->count / (c->wide ? 1 : 2);
}

static const char *wrong_call(const Features *c, int threads) {
    const char *reason = wrong_features(c->heads, c->groups, c->width, c->wide, c->weights,
                                        c->weights_bytes, c->count);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, chunks = (c->tokens + CHUNK - 1) / CHUNK,
                  each = c->groups * (c->width + 1) * c->count;
    REQUIRE(within(c->tokens, 0, FAR) && threads >= 1,
            "there must be threads, and not too many tokens");
    REQUIRE(is_room(c->sums, c->sums_bytes, each, sizeof(float)),
            "sums must hold (groups, width + 1, features)");
    REQUIRE(is_room(c->level, c->level_bytes, c->groups * c->count, sizeof(float)),
            "level must hold (groups, features)");
    REQUIRE(is_room(c->room, c->room_bytes, threads * room_words(c), sizeof(uint32_t)),
            "room must hold what each thread needs");
    if (c->adds) {
        REQUIRE(is_view(&c->k, size, c->tokens, c->groups, c->width),
                "k must be (tokens, groups, width)");
        REQUIRE(is_view(&c->v, size, c->tokens, c->groups, c->width),
                "v must be (tokens, groups, width)");
        REQUIRE(is_room(c->added, c->added_bytes, chunks * each, sizeof(float)),
                "added must hold (chunks, groups, width + 1, features)");
        REQUIRE(is_room(c->keys, c->keys_bytes, chunks * c->groups * c->count * CHUNK, size),
                "keys must hold (chunks, groups, features, 128)");
    }
    if (c->asks) {
        REQUIRE(is_view(&c->q, size, c->tokens, c->heads, c->width),
                "q must be (tokens, heads, width)");
        REQUIRE(is_view(&c->out, size, c->tokens, c->heads, c->width),
                "out must be (tokens, heads, width)");
        REQUIRE(!c->near || is_room(c->near, c->near_bytes, c->tokens * c->heads, sizeof(float)),
                "near must hold (tokens, heads)");
    }
    return 0;
}

/* Make what each chunk of a run from `first` on adds. Returns the first token that must begin a run
 * of its own, c->tokens if none must. Slow reading: `_absorb`. */
static int64_t add_all(const Features *c, int64_t first, int threads) {
    const int64_t chunks = (c->tokens + CHUNK - 1) / CHUNK;
    int64_t stop = c->tokens;
#pragma omp parallel num_threads(threads) reduction(min : stop)
    {
        uint32_t *room = c->room + omp_get_thread_num() * room_words(c);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = first * c->groups; i < chunks * c->groups; i++)
            stop = least(stop, CHOOSE(add)(c, i / c->groups, i % c->groups, room));
    }
    return stop;
}

/* Take the tokens of a run up to the first that must begin another, and their sums. Slow reading:
 * `Features.absorb`. */
static void add_run(Features *c, int threads) {
    for (int64_t g = 0; g < c->groups; g++) CHOOSE(begin)(c, g);
    const int64_t stop = add_all(c, 0, threads);
    if (stop < c->tokens) {
        c->tokens = stop;
        add_all(c, stop / CHUNK, threads); /* what the chunk of that token added holds it */
    }
    const int64_t chunks = (c->tokens + CHUNK - 1) / CHUNK, rows = c->width + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < c->groups * rows; i++) run_along(c, chunks, i / rows, i % rows);
}

/* Slow reading: `_ask`. */
static void ask_all(const Features *c, int threads) {
    const int64_t chunks = (c->tokens + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *room = c->room + omp_get_thread_num() * room_words(c);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < chunks * c->groups; i++)
            CHOOSE(ask)(c, i / c->groups, i % c->groups, room);
    }
}

/* The rows of a view behind the first `done`. */
static void leave(View *x, int64_t done) { x->at += done * x->row * x->size, x->rows -= done; }

/* Leave the first `done` tokens of a call behind. */
static void advance(Features *c, int64_t done) {
    if (c->adds) leave(&c->k, done), leave(&c->v, done);
    if (c->asks) leave(&c->q, done), leave(&c->out, done);
    if (c->near) c->near += done * c->heads;
}

/* Slow reading: `Features.scan`, `Features.both_sides`, `Features.absorb`, `Features.join`. */
const char *features(const Features *given, int threads) {
    const char *reason = wrong_call(given, threads);
    if (reason) return reason;
    Features run = *given;
    int64_t left = given->tokens, most_at_once = left;
    while (left) {
        const int64_t wanted = run.tokens = least(left, most_at_once);
        if (run.adds) add_run(&run, threads);
        if (run.asks) ask_all(&run, threads);
        most_at_once =
            run.tokens < wanted ? TILE : 2 * most_at_once; /* where one level rises, others are
                                                              near: look less far ahead */
        left -= run.tokens;
        advance(&run, run.tokens);
    }
    return 0;
}

/* ---- one token of each of many sequences ---- */

/* row (m) += by key (m) where it adds, and its products with `queries` rows of (m) into answers,
 * one every `stride`. Slow reading: `torch.addmm`. */
INLINE void add_and_ask(const int adds, const int queries, float *row, const float *key,
                        const float *asking, int64_t count, float by, float *answers,
                        int64_t stride) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        __m512 s = _mm512_loadu_ps(row + j);
        if (adds) {
            s = _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(key + j), s);
            _mm512_storeu_ps(row + j, s);
        }
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++)
            sum[i] = _mm512_fmadd_ps(s, _mm512_loadu_ps(asking + i * count + j), sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) answers[i * stride] = _mm512_reduce_add_ps(sum[i]);
}

/* Add a key to the sums (D + 1, m) of its head, whose features stay in key (m); `values` (D + 1)
 * are [v, 1] afterwards. Slow reading: `Features.step`. */
INLINE void take_key(const int wide, const int64_t width, const FeaturesStep *c, const char *k,
                     const char *v, float *sums, float *level, float *key, float *values) {
    const int64_t size = wide ? 4 : 2, m = c->count;
    exponents(wide, width, c->weights, m, k, width, 1, key);
    const float half = half_square(wide, width, k, c->half);
    raise_levels(c->weights, width, key, half, c->limit, sums, level, m);
    for (int64_t j = 0; j < m; j += 16)
        _mm512_storeu_ps(key + j,
                         feature(wide, c->weights, _mm512_loadu_ps(key + j),
                                 _mm512_add_ps(_mm512_set1_ps(half), _mm512_loadu_ps(level + j))));
    for (int64_t d = 0; d < width; d += 16)
        _mm512_storeu_ps(values + d, load16(wide, v + d * size));
    values[width] = 1.0f;
}

/* One key-value head of one sequence: its sums (D + 1, m), their level, and (R + 1, m) of scratch.
 * Slow reading: `Features.step`. */
INLINE void step_head(const int wide, const int64_t width, const FeaturesStep *c, int64_t sequence,
                      int64_t group, float *sums, float *level, float *features) {
    const int64_t size = wide ? 4 : 2, ratio = c->heads / c->groups, m = c->count;
    const char *q = c->q.at + (sequence * c->q.row + group * ratio * width) * size;
    float *key = features + ratio * m, values[WIDEST + 16], answers[4][WIDEST + 16];
    if (c->adds)
        take_key(wide, width, c, c->k.at + (sequence * c->k.row + group * width) * size,
                 c->v.at + (sequence * c->v.row + group * width) * size, sums, level, key, values);
    for (int64_t r = 0; r < ratio; r += TILE)
        exponents(wide, width, c->weights, m, q + r * width * size, width, least(TILE, ratio - r),
                  features + r * m);
    for (int64_t r = 0; r < ratio; r += 4) {
        const int64_t asking = least(4, ratio - r), row = sequence * c->heads + group * ratio + r;
        float below[4];
        for (int64_t i = 0; i < asking; i++) { /* what is left out here cancels in the answer */
            float *query = features + (r + i) * m;
            const float top = find_top(c->weights, query, level, m);
            below[i] =
                c->near ? top - square(wide, width, q + (r + i) * width * size) * c->half : 0.0f;
            for (int64_t j = 0; j < m; j += 16)
                _mm512_storeu_ps(query + j, feature(wide, c->weights, _mm512_loadu_ps(query + j),
                                                    relative(top, level + j)));
        }
        const int adds = c->adds && r == 0; /* once */
        for (int64_t d = 0; d <= width; d++) {
#define ASKING(Q) \
    case Q: \
        add_and_ask(0, Q, sums + d * m, key, features + r * m, m, 0.0f, &answers[0][d], \
                    WIDEST + 16); \
        break; \
    case Q + 4: \
        add_and_ask(1, Q, sums + d * m, key, features + r * m, m, values[d], &answers[0][d], \
                    WIDEST + 16); \
        break;
            switch (asking + 4 * adds) { ASKING(4) ASKING(3) ASKING(2) ASKING(1) }
        }
        for (int64_t i = 0; i < asking; i++) {
            char *out = c->out + (row + i) * width * size;
            if (c->near)
                join(wide, width, out, answers[i], answers[i][width], below[i] - c->log_count,
                     c->near + row + i);
            else
                for (int64_t d = 0; d < width; d += 16)
                    store_answer(wide, out + d * size, _mm512_loadu_ps(&answers[i][d]),
                                 answers[i][width]);
        }
    }
}

#define HEAD(NAME, WIDE, WIDTH) \
    __attribute__((noinline)) static void NAME(const FeaturesStep *c, int64_t b, int64_t g, \
                                               float *s, float *level, float *f) { \
        step_head(WIDE, WIDTH, c, b, g, s, level, f); \
    }
HEAD(head_narrow_64, 0, 64)
HEAD(head_narrow, 0, c->width)
HEAD(head_wide, 1, c->width)

static const char *wrong_step(const FeaturesStep *c, const State *states, int64_t count,
                              int threads) {
    const char *reason = wrong_features(c->heads, c->groups, c->width, c->wide, c->weights,
                                        c->weights_bytes, c->count);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, rows = c->sequences * c->heads;
    REQUIRE(within(c->sequences, 0, PIECES / HEADS - 1) && count == c->sequences && threads >= 1,
            "there must be threads, and a state for each sequence");
    REQUIRE(is_tight(&c->q, size, c->sequences, c->heads, c->width),
            "q must be (sequences, heads, width), heads side by side");
    if (c->adds) {
        REQUIRE(is_tight(&c->k, size, c->sequences, c->groups, c->width),
                "k must be (sequences, groups, width), heads side by side");
        REQUIRE(is_tight(&c->v, size, c->sequences, c->groups, c->width),
                "v must be (sequences, groups, width), heads side by side");
    }
    REQUIRE(is_room(c->out, c->out_bytes, rows * c->width, size),
            "out must hold (sequences, heads, width)");
    REQUIRE(!c->near || is_room(c->near, c->near_bytes, rows, sizeof(float)),
            "near must hold (sequences, heads)");
    REQUIRE(is_room(c->features, c->features_bytes, (rows + c->sequences * c->groups) * c->count,
                    sizeof(float)),
            "features must hold (sequences, heads + groups, features)");
    for (int64_t i = 0; i < count; i++)
        REQUIRE(is_room(states[i].sums, states[i].sums_bytes, c->groups * (c->width + 1) * c->count,
                        sizeof(float)) &&
                    is_room(states[i].level, states[i].level_bytes, c->groups * c->count,
                            sizeof(float)),
                "a state must hold (groups, width + 1, features) and (groups, features)");
    return 0;
}

typedef struct { /* what `features_step` was given */
    FeaturesStep step;
    const State *states;
} Stepping;

_Static_assert(sizeof(Stepping) <= GIVEN, "threads are told no more");

/* Slow reading: `Features.step`. */
static void step_heads(const void *given, uint64_t call) {
    const Stepping *told = given;
    const FeaturesStep *c = &told->step;
    const int64_t tasks = c->sequences * c->groups, each = (c->heads / c->groups + 1) * c->count;
    for (int64_t i; (i = take(call, 0, tasks)) >= 0; give(call, 0)) {
        const int64_t b = i / c->groups, g = i % c->groups;
        float *sums = told->states[b].sums + g * (c->width + 1) * c->count,
              *level = told->states[b].level + g * c->count;
        (c->wide          ? head_wide
         : c->width == 64 ? head_narrow_64
                          : head_narrow)(c, b, g, sums, level, c->features + i * each);
    }
    await(call, 0, tasks);
}

/* Slow reading: `Features.step`. */
static void run_step(const FeaturesStep *c, const State *states, int threads) {
    const Stepping told = { *c, states };
    together(step_heads, &told, sizeof told, c->sequences * c->groups > 1 ? threads : 1);
}

/* Slow reading: `Features.step`, `Features.join_step`. */
const char *features_step(const FeaturesStep *c, const State *states, int64_t count, int threads) {
    const char *reason = wrong_step(c, states, count, threads);
    if (!reason) run_step(c, states, threads);
    return reason;
}

/* An `Answer`: as `features_step`, behind who answers over other keys, where there is somebody.
 * Slow reading: `Features.step`, `Features.join_step`. */
const char *features_layer(const void *told, int64_t layer, const View *q, const View *k,
                           const View *v, char *out, int64_t out_bytes, int threads) {
    const FeaturesSteps *c = told;
    FeaturesStep step = c->step;
    const char *reason = wrong_features(step.heads, step.groups, step.width, step.wide,
                                        step.weights, step.weights_bytes, step.count);
    if (reason) return reason;
    const int64_t levels = step.groups * step.count, sums = levels * (step.width + 1);
    REQUIRE(within(c->layers, 1, PIECES) && within(layer, 0, c->layers - 1),
            "there is no such layer");
    REQUIRE(within(step.sequences, 0, PIECES) &&
                is_room(c->states, c->states_bytes, step.sequences, sizeof(State)) &&
                is_room(c->own, c->own_bytes, step.sequences, sizeof(State)),
            "there must be a state of each sequence");
    REQUIRE(!c->answer == !step.near, "who answers over other keys must tell of their weights");
    for (int64_t i = 0; i < step.sequences; i++) {
        const State *x = c->states + i;
        REQUIRE(is_room(x->sums, x->sums_bytes, c->layers * sums, sizeof(float)) &&
                    is_room(x->level, x->level_bytes, c->layers * levels, sizeof(float)),
                "a state must hold all its layers");
        c->own[i] = (State){ x->sums + layer * sums, sums * (int64_t)sizeof(float),
                             x->level + layer * levels, levels * (int64_t)sizeof(float) };
    }
    step.q = *q, step.k = *k, step.v = *v, step.out = out, step.out_bytes = out_bytes;
    reason = wrong_step(&step, c->own, step.sequences, most(1, threads));
    if (!reason && c->answer) reason = c->answer(c->told, layer, q, k, v, out, out_bytes, threads);
    if (!reason && threads) run_step(&step, c->own, threads);
    return reason;
}

#else
const char *features(void) { return "this machine has no AVX-512"; }
const char *features_step(void) { return "this machine has no AVX-512"; }
const char *features_layer(void) { return "this machine has no AVX-512"; }
#endif
