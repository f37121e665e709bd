/* Attention through positive features: the functions behind `native.scan`, `both_sides` and `features_step`.
 * `backends/performer.py` and `linear.py` are their slow reading.
 *
 * A token adds phi(k) [v, 1] to the sums S (D + 1, m) of its key-value head, and each of its queries asks them: phi(q) S,
 * numerator and denominator. With random rows W, phi(x) is 2^(x W), W scaled so that this is exp(W x') (FAVOR+, arXiv
 * 2009.14794); without, elu(x) + 1 (arXiv 2006.16236), which is always within reach and whose level never rises.
 *
 * Many tokens go by chunks. First each chunk makes its keys' features and what they add, all chunks at once; then the sums are
 * run along the chunks; then each chunk, again all at once, makes its queries' features six rows at a time, asks the sums of
 * all chunks before it, and meets its own triangle while they are in L1. One token reads S once and writes it once, which is
 * its limit: S is 66 KB a head.
 *
 * The sums are short of 2^level. A level rises only at a key whose weight would pass 2^limit, so earlier rows are the same to
 * the bit whatever comes later; what stands at an older level is brought down where it meets a newer one.
 */
#include "given.h"

typedef struct {
    View q, k, v, out; /* (C, H, D), (C, G, D), (C, G, D), (C, H, D) */
    const uint32_t *weights; /* W as words of neighbouring rows, (D, m) or (D / 2, m); null: elu(x) + 1, m = D */
    int64_t weights_bytes;
    float *sums; /* (G, D + 1, m) */
    int64_t sums_bytes;
    float *level; /* (G) */
    int64_t level_bytes;
    float *added; /* scratch: (chunks, G, D + 1, m), what each chunk adds, then the sums before it */
    int64_t added_bytes;
    uint32_t *keys; /* scratch: (chunks, G, words of m, CHUNK), features of keys */
    int64_t keys_bytes;
    float *levels; /* scratch: (G, C + 1), before the first token and behind each; then (G, C), |k'|^2 / 2 */
    int64_t levels_bytes;
    uint32_t *room; /* scratch: `room_words` for each thread */
    int64_t room_bytes;
    const float *near; /* (C, H) or null: out holds an answer over other keys already, and this is log2 of their weights' sum */
    int64_t near_bytes;
    int64_t tokens, heads, groups, width, count, wide; /* count: m */
    int64_t adds, asks; /* add the keys to the sums; answer the queries: over the sums alone, or, where both, causally */
    float half, reach, limit, log_count; /* log_count: log2(m) */
} Features;

typedef struct {
    View q, k, v; /* (B, H, D), (B, G, D), (B, G, D), heads tight */
    char *out; /* (B, H, D), tight */
    int64_t out_bytes;
    const uint32_t *weights; /* as above */
    int64_t weights_bytes;
    float *features; /* scratch: (R + 1, m) for each sequence and key-value head */
    int64_t features_bytes;
    const float *near; /* (B, H) or null */
    int64_t near_bytes;
    int64_t sequences, heads, groups, width, count, wide, adds;
    float half;  /* |x|^2 times this is |x'|^2 / 2 in powers of two */
    float reach; /* the norm of x up to which features are taken as they are */
    float limit, log_count;
} FeaturesStep;

typedef struct { /* the sums (G, D + 1, m) of a sequence and their level (G) */
    float *sums;
    int64_t sums_bytes;
    float *level;
    int64_t level_bytes;
} State;

/* Sizes and offsets, for a caller in another language to compare with its own. */
const int64_t features_layout[] = {
    sizeof(View), sizeof(State),
    sizeof(Features), FIELD(Features, q), FIELD(Features, k), FIELD(Features, v), FIELD(Features, out),
    FIELD(Features, weights), FIELD(Features, weights_bytes), FIELD(Features, sums), FIELD(Features, sums_bytes),
    FIELD(Features, level), FIELD(Features, level_bytes), FIELD(Features, added), FIELD(Features, added_bytes),
    FIELD(Features, keys), FIELD(Features, keys_bytes), FIELD(Features, levels), FIELD(Features, levels_bytes),
    FIELD(Features, room), FIELD(Features, room_bytes), FIELD(Features, near), FIELD(Features, near_bytes),
    FIELD(Features, tokens), FIELD(Features, heads), FIELD(Features, groups), FIELD(Features, width),
    FIELD(Features, count), FIELD(Features, wide), FIELD(Features, adds), FIELD(Features, asks),
    FIELD(Features, half), FIELD(Features, reach), FIELD(Features, limit), FIELD(Features, log_count),
    sizeof(FeaturesStep), FIELD(FeaturesStep, q), FIELD(FeaturesStep, k), FIELD(FeaturesStep, v),
    FIELD(FeaturesStep, out), FIELD(FeaturesStep, out_bytes), FIELD(FeaturesStep, weights),
    FIELD(FeaturesStep, weights_bytes), FIELD(FeaturesStep, features), FIELD(FeaturesStep, features_bytes),
    FIELD(FeaturesStep, near), FIELD(FeaturesStep, near_bytes), FIELD(FeaturesStep, sequences),
    FIELD(FeaturesStep, heads), FIELD(FeaturesStep, groups), FIELD(FeaturesStep, width),
    FIELD(FeaturesStep, count), FIELD(FeaturesStep, wide), FIELD(FeaturesStep, adds), FIELD(FeaturesStep, half),
    FIELD(FeaturesStep, reach), FIELD(FeaturesStep, limit), FIELD(FeaturesStep, log_count), -1};

#if defined(__x86_64__) && defined(__GNUC__)
#include "simd.h"
#include <omp.h>

#define WIDEST 256
#define HEADS 128 /* H, at most */
#define MOST 4096 /* m, at most */
#define CHUNK 128 /* tokens */

/* |x| of D elements. */
INLINE float norm(const int wide, const int64_t width, const char *x) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t w = 0; w < width * (wide ? 4 : 2); w += 64) {
        const __m512i words = _mm512_loadu_si512(x + w);
        sum = multiply_add(wide, words, words, sum);
    }
    return sqrtf(_mm512_reduce_add_ps(sum));
}

/* The exponents x W, (rows, m), of up to six rows of D elements, one every `row` of them; without W, the elements. */
INLINE void exponents(const int wide, const int64_t width, const uint32_t *weights, int64_t count, const char *x, int64_t row, int64_t rows, float *to) {
    const int64_t size = wide ? 4 : 2, words = width * size / 4;
    if (!weights) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j += 16) _mm512_storeu_ps(to + i * count + j, load16(wide, x + (i * row + j) * size));
        return;
    }
    tile_products(wide, rows, count, words, x, row * size, 4, weights, count, to, count, 0);
}

/* 16 features of their exponents. */
INLINE __m512 feature(const int wide, const uint32_t *weights, __m512 x, __m512 shift) {
    if (weights) return exp2_16(wide, _mm512_sub_ps(x, shift));
    const __m512 zero = _mm512_setzero_ps(), log2_e = _mm512_set1_ps(1.44269504f);
    return _mm512_add_ps(exp2_16(1, _mm512_mul_ps(_mm512_min_ps(zero, x), log2_e)), _mm512_max_ps(zero, x));
}

/* x (m), exponents, become features. */
INLINE void raise(const int wide, const uint32_t *weights, float *x, int64_t count, float shift) {
    for (int64_t j = 0; j < count; j += 16) _mm512_storeu_ps(x + j, feature(wide, weights, _mm512_loadu_ps(x + j), _mm512_set1_ps(shift)));
}

/* An answer over far keys, sums / total short of 2^level, joins the one over near keys that stands in out; near: log2 of the
 * sum of their weights. */
INLINE void join(const int wide, const int64_t width, char *out, const float *sums, float total, float level, float near) {
    if (total == 0.0f) return;
    const __m512 share = _mm512_set1_ps(1.0f / (1.0f + exp2f(near - log2f(total) - level))), by = _mm512_set1_ps(total);
    for (int64_t d = 0; d < width; d += 16) {
        char *to = out + d * (wide ? 4 : 2);
        const __m512 answer = load16(wide, to), far = _mm512_div_ps(_mm512_loadu_ps(sums + d), by);
        store16(wide, to, _mm512_fmadd_ps(share, _mm512_sub_ps(far, answer), answer));
    }
}

INLINE float highest(const float *x, int64_t count) {
    __m512 found = _mm512_loadu_ps(x);
    for (int64_t j = 16; j < count; j += 16) found = _mm512_max_ps(found, _mm512_loadu_ps(x + j));
    return _mm512_reduce_max_ps(found);
}

/* ---- many tokens --------------------------------------------------------------------------------------------------------- */

/* The levels of a key-value head along all tokens. */
INLINE void find_levels(const int wide, const int64_t width, const Features *c, int64_t group) {
    const int64_t size = wide ? 4 : 2;
    float *levels = c->levels + group * (c->tokens + 1), *halves = c->levels + c->groups * (c->tokens + 1) + group * c->tokens;
    levels[0] = c->level[group];
    for (int64_t i = 0; i < c->tokens; i++) {
        const char *k = c->k.at + (i * c->k.row + group * c->k.head) * size;
        const float length = norm(wide, width, k);
        float shift = 0.0f;
        if (!(length <= c->reach)) {
            float found[MOST];
            exponents(wide, width, c->weights, c->count, k, c->k.row, 1, found);
            shift = highest(found, c->count);
        }
        halves[i] = length * length * c->half;
        const float weight = shift - halves[i];
        levels[i + 1] = weight > levels[i] + c->limit ? weight : levels[i];
    }
    c->level[group] = levels[c->tokens];
}

/* What brings a number from an older level to a newer one; exactly 1 where it has not risen. */
INLINE float bring_down(float from, float to) { return from == to ? 1.0f : exp2f(from - to); }

/* What a chunk adds to the sums of a key-value head, relative to its last level; its keys' features are kept if it asks, too. */
INLINE void add_chunk(const int wide, const int64_t width, const Features *c, int64_t chunk, int64_t group, uint32_t *room) {
    const int64_t size = wide ? 4 : 2, packed = wide ? 1 : 2, m = c->count, words = m / packed, first = chunk * CHUNK;
    const int64_t n = least(CHUNK, c->tokens - first), whole = (n + 15) & ~15;
    const float *levels = c->levels + group * (c->tokens + 1) + first + 1, *halves = c->levels + c->groups * (c->tokens + 1) + group * c->tokens + first;
    uint32_t *rows = room, *pairs = rows + CHUNK * words;
    uint32_t values[CHUNK * WIDEST / (wide ? 1 : 2)] __attribute__((aligned(64)));
    float *added = c->added + (chunk * c->groups + group) * (width + 1) * m;
    float *total = added + width * m; /* the row of [v, 1] that is 1, summed before features are rounded */
    memset(total, 0, sizeof(float) * m);
    for (int64_t i = 0; i < n; i += TILE) {
        float e[TILE * MOST] __attribute__((aligned(64)));
        exponents(wide, width, c->weights, m, c->k.at + ((first + i) * c->k.row + group * c->k.head) * size, c->k.row, least(TILE, n - i), e);
        for (int64_t t = i; t < least(i + TILE, n); t++) {
            const __m512 less = _mm512_set1_ps(halves[t] + levels[t]), down = _mm512_set1_ps(bring_down(levels[t], levels[n - 1]));
            for (int64_t j = 0; j < m; j += 16) {
                const __m512 x = feature(wide, c->weights, _mm512_loadu_ps(e + (t - i) * m + j), less);
                store16(wide, (char *)(rows + t * words) + j * size, x);
                _mm512_storeu_ps(total + j, _mm512_fmadd_ps(x, down, _mm512_loadu_ps(total + j)));
            }
        }
    }
    if (c->asks) pack_turned((const char *)rows, 4 * words, n, words, c->keys + (chunk * c->groups + group) * words * CHUNK, CHUNK);
    for (int64_t i = 0; i < n; i++)
        if (levels[i] != levels[n - 1])
            for (int64_t j = 0; j < m; j += 16) {
                char *at = (char *)(rows + i * words) + j * size;
                store16(wide, at, _mm512_mul_ps(_mm512_set1_ps(bring_down(levels[i], levels[n - 1])), load16(wide, at)));
            }
    pack_rows(wide, (const char *)rows, 4 * words, 0, n, whole, m, pairs);
    pack_rows(wide, c->v.at + (first * c->v.row + group * c->v.head) * size, c->v.row * size, 0, n, whole, width, values);
    for (int64_t d = 0; d < width; d += TILE)
        tile_products(wide, least(TILE, width - d), m, whole / packed, (const char *)(values + d), 4, 4 * width, pairs, m, added + d * m, m, 0);
}

/* One row of the sums of a key-value head along the chunks: what each adds becomes what stood before it. */
INLINE void run_along(const Features *c, int64_t chunks, int64_t group, int64_t row) {
    const int64_t m = c->count, each = (c->width + 1) * m;
    float *sums = c->sums + group * each + row * m;
    const float *levels = c->levels + group * (c->tokens + 1);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *added = c->added + (chunk * c->groups + group) * each + row * m;
        const float from = levels[chunk * CHUNK], to = levels[least(chunk * CHUNK + CHUNK, c->tokens)];
        const __m512 by = _mm512_set1_ps(bring_down(from, to));
        for (int64_t j = 0; j < m; j += 16) {
            const __m512 before = _mm512_loadu_ps(sums + j);
            _mm512_storeu_ps(sums + j, _mm512_fmadd_ps(by, before, _mm512_loadu_ps(added + j)));
            _mm512_storeu_ps(added + j, before);
        }
    }
}

/* The queries of a chunk, all heads of a group: over the sums, and causally over their own chunk. */
INLINE void ask_chunk(const int wide, const int64_t width, const Features *c, int64_t chunk, int64_t group, uint32_t *room) {
    const int64_t size = wide ? 4 : 2, packed = wide ? 1 : 2, m = c->count, words = m / packed, first = chunk * CHUNK;
    const int64_t n = least(CHUNK, c->tokens - first), ratio = c->heads / c->groups;
    const float *levels = c->levels + group * (c->tokens + 1) + first + 1; /* levels[-1]: before the chunk */
    const float *sums = c->adds ? c->added + (chunk * c->groups + group) * (width + 1) * m : c->sums + group * (width + 1) * m;
    const uint32_t *keys = c->keys + (chunk * c->groups + group) * words * CHUNK;
    uint32_t *rows = room, *turned = rows + width * words;
    uint32_t values[CHUNK * WIDEST / (wide ? 1 : 2)] __attribute__((aligned(64)));
    for (int64_t d = 0; d < width; d++)
        for (int64_t j = 0; j < m; j += 16) store16(wide, (char *)(rows + d * words) + j * size, _mm512_loadu_ps(sums + d * m + j));
    pack_turned((const char *)rows, 4 * words, width, words, turned, width);
    const char *v = c->v.at + (first * c->v.row + group * c->v.head) * size;
    const int is_poisoned = c->adds && pack_rows(wide, v, c->v.row * size, 0, n, (n + 15) & ~15, width, values);
    const int64_t together = is_poisoned ? 1 : TILE; /* then each row has a copy in which what it does not see is 0 */
    for (int64_t h = group * ratio; h < (group + 1) * ratio; h++)
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t count = least(TILE, n - i), seen = (i + count + 15) & ~15;
            const char *q = c->q.at + ((first + i) * c->q.row + h * c->q.head) * size;
            float e[TILE * MOST] __attribute__((aligned(64))), both[TILE][WIDEST], s[TILE][CHUNK] __attribute__((aligned(64)));
            uint32_t phi[TILE * MOST / (wide ? 1 : 2)] __attribute__((aligned(64))), p[TILE][CHUNK / 2];
            float factors[TILE], totals[TILE], below[TILE];
            exponents(wide, width, c->weights, m, q, c->q.row, count, e);
            for (int64_t t = 0; t < count; t++) { /* what is left out here cancels in the answer */
                const float length = norm(wide, width, q + t * c->q.row * size), shift = length <= c->reach ? 0.0f : highest(e + t * m, m);
                below[t] = shift - length * length * c->half;
                __m512 total = _mm512_setzero_ps();
                for (int64_t j = 0; j < m; j += 16) {
                    const __m512 x = feature(wide, c->weights, _mm512_loadu_ps(e + t * m + j), _mm512_set1_ps(shift));
                    store16(wide, (char *)(phi + t * words) + j * size, x);
                    total = _mm512_fmadd_ps(x, _mm512_loadu_ps(sums + width * m + j), total);
                }
                totals[t] = _mm512_reduce_add_ps(total);
            }
            tile_products(wide, count, width, words, (const char *)phi, 4 * words, 4, turned, width, both[0], WIDEST, 0);
            if (c->adds) tile_products(wide, count, seen, words, (const char *)phi, 4 * words, 4, keys, CHUNK, s[0], CHUNK, 0);
            for (int64_t t = 0; t < count && c->adds; t++) {
                const float level = levels[i + t];
                factors[t] = bring_down(levels[-1], level);
                if (levels[0] != level)
                    for (int64_t j = 0; j <= i + t; j++) s[t][j] *= bring_down(levels[j], level);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < seen; j += 16) {
                    if (j + 16 > i + t + 1) hide(&s[t][j], j, 0, i + t + 1, 0.0f);
                    sum = _mm512_add_ps(sum, _mm512_load_ps(&s[t][j]));
                    if (!wide) store16(0, (char *)p[t] + 2 * j, _mm512_load_ps(&s[t][j]));
                }
                totals[t] = totals[t] * factors[t] + _mm512_reduce_add_ps(sum);
            }
            for (int64_t t = 0; t < count && c->adds; t += together) {
                const char *weights = wide ? (const char *)s[t] : (const char *)p[t];
                if (is_poisoned) pack_rows(wide, v, c->v.row * size, 0, i + t + 1, seen, width, values);
                tile_products(wide, least(together, count - t), width, seen / packed, weights, 4 * CHUNK / packed, 4, values, width, both[t], WIDEST, factors + t);
            }
            for (int64_t t = 0; t < count; t++) {
                char *out = c->out.at + ((first + i + t) * c->out.row + h * c->out.head) * size;
                if (c->near)
                    join(wide, width, out, both[t], totals[t], c->level[group] + below[t] - c->log_count, c->near[(first + i + t) * c->heads + h]);
                else
                    for (int64_t d = 0; d < width; d += 16) store_answer(wide, out + d * size, _mm512_loadu_ps(&both[t][d]), totals[t]);
            }
        }
}

#define MANY(NAME, WIDE, WIDTH) \
    __attribute__((noinline)) static void add_##NAME(const Features *c, int64_t i, int64_t g, uint32_t *room) { add_chunk(WIDE, WIDTH, c, i, g, room); } \
    __attribute__((noinline)) static void ask_##NAME(const Features *c, int64_t i, int64_t g, uint32_t *room) { ask_chunk(WIDE, WIDTH, c, i, g, room); } \
    __attribute__((noinline)) static void levels_##NAME(const Features *c, int64_t g) { find_levels(WIDE, WIDTH, c, g); }
MANY(narrow_64, 0, 64)
MANY(narrow, 0, c->width)
MANY(wide, 1, c->width)

#define CHOOSE(WORK) (c->wide ? WORK##_wide : c->width == 64 ? WORK##_narrow_64 : WORK##_narrow)

static const char *wrong_features(int64_t heads, int64_t groups, int64_t width, int64_t wide, const uint32_t *weights, int64_t bytes, int64_t count) {
    REQUIRE(within(heads, 1, HEADS) && within(groups, 1, heads) && heads % groups == 0, "heads must be a multiple of groups, up to 128");
    REQUIRE(within(width, 32, WIDEST) && width % 32 == 0, "width must be a multiple of 32, up to 256");
    REQUIRE(within(count, 32, MOST) && count % 32 == 0, "features must be a multiple of 32, up to 4096");
    REQUIRE(within(wide, 0, 1), "wide must be 0 or 1");
    REQUIRE(weights ? bytes >= width * count * (wide ? 4 : 2) : count == width, "weights must hold (width, features)");
    return 0;
}

/* 32-bit words of scratch that a thread needs. */
static int64_t room_words(const Features *c) { return 2 * most(CHUNK, c->width) * c->count / (c->wide ? 1 : 2); }

static const char *wrong_call(const Features *c, int threads) {
    const char *reason = wrong_features(c->heads, c->groups, c->width, c->wide, c->weights, c->weights_bytes, c->count);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, chunks = (c->tokens + CHUNK - 1) / CHUNK, each = c->groups * (c->width + 1) * c->count;
    REQUIRE(within(c->tokens, 0, FAR) && threads >= 1, "there must be threads, and not too many tokens");
    REQUIRE(is_room(c->sums, c->sums_bytes, each, sizeof(float)), "sums must hold (groups, width + 1, features)");
    REQUIRE(is_room(c->level, c->level_bytes, c->groups, sizeof(float)), "level must hold (groups)");
    REQUIRE(is_room(c->room, c->room_bytes, threads * room_words(c), sizeof(uint32_t)), "room must hold what each thread needs");
    if (c->adds) {
        REQUIRE(is_view(&c->k, size, c->tokens, c->groups, c->width), "k must be (tokens, groups, width)");
        REQUIRE(is_view(&c->v, size, c->tokens, c->groups, c->width), "v must be (tokens, groups, width)");
        REQUIRE(is_room(c->added, c->added_bytes, chunks * each, sizeof(float)), "added must hold (chunks, groups, width + 1, features)");
        REQUIRE(is_room(c->keys, c->keys_bytes, chunks * c->groups * c->count * CHUNK, size), "keys must hold (chunks, groups, features, 128)");
        REQUIRE(is_room(c->levels, c->levels_bytes, c->groups * (2 * c->tokens + 1), sizeof(float)), "levels must hold (groups, 2 tokens + 1)");
    }
    if (c->asks) {
        REQUIRE(is_view(&c->q, size, c->tokens, c->heads, c->width), "q must be (tokens, heads, width)");
        REQUIRE(is_view(&c->out, size, c->tokens, c->heads, c->width), "out must be (tokens, heads, width)");
        REQUIRE(!c->near || is_room(c->near, c->near_bytes, c->tokens * c->heads, sizeof(float)), "near must hold (tokens, heads)");
    }
    return 0;
}

const char *features(const Features *c, int threads) {
    const char *reason = wrong_call(c, threads);
    if (reason) return reason;
    const int64_t chunks = (c->tokens + CHUNK - 1) / CHUNK, tasks = chunks * c->groups;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *room = c->room + omp_get_thread_num() * room_words(c);
        if (c->adds) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t g = 0; g < c->groups; g++) CHOOSE(levels)(c, g);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; i++) CHOOSE(add)(c, i / c->groups, i % c->groups, room);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < c->groups * (c->width + 1); i++) run_along(c, chunks, i / (c->width + 1), i % (c->width + 1));
        }
        if (c->asks) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; i++) CHOOSE(ask)(c, i / c->groups, i % c->groups, room);
        }
    }
    return 0;
}

/* ---- one token of each of many sequences ----------------------------------------------------------------------------------- */

/* row (m) += by key (m) where it adds, and its products with `queries` rows of (m) into answers, one every `stride`. */
INLINE void add_and_ask(const int adds, const int queries, float *row, const float *key, const float *asking, int64_t count, float by,
                        float *answers, int64_t stride) {
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
        for (int i = 0; i < queries; i++) sum[i] = _mm512_fmadd_ps(s, _mm512_loadu_ps(asking + i * count + j), sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) answers[i * stride] = _mm512_reduce_add_ps(sum[i]);
}

/* Add a key to the sums (D + 1, m) of its head, whose features stay in key (m); `values` (D + 1) are [v, 1] afterwards. */
INLINE void take_key(const int wide, const int64_t width, const FeaturesStep *c, const char *k, const char *v, float *sums, float *level, float *key, float *values) {
    const int64_t size = wide ? 4 : 2, m = c->count;
    exponents(wide, width, c->weights, m, k, width, 1, key);
    const float length = norm(wide, width, k), half = length * length * c->half;
    const float weight = (length <= c->reach ? 0.0f : highest(key, m)) - half;
    if (weight > *level + c->limit) {
        const __m512 by = _mm512_set1_ps(exp2f(*level - weight));
        for (int64_t j = 0; j < (width + 1) * m; j += 16) _mm512_storeu_ps(sums + j, _mm512_mul_ps(by, _mm512_loadu_ps(sums + j)));
        *level = weight;
    }
    raise(wide, c->weights, key, m, half + *level);
    for (int64_t d = 0; d < width; d += 16) _mm512_storeu_ps(values + d, load16(wide, v + d * size));
    values[width] = 1.0f;
}

/* One key-value head of one sequence: its sums (D + 1, m), their level, and (R + 1, m) of scratch. */
INLINE void step_head(const int wide, const int64_t width, const FeaturesStep *c, int64_t sequence, int64_t group, float *sums, float *level, float *features) {
    const int64_t size = wide ? 4 : 2, ratio = c->heads / c->groups, m = c->count;
    const char *q = c->q.at + (sequence * c->q.row + group * ratio * width) * size;
    float *key = features + ratio * m, values[WIDEST + 16], answers[4][WIDEST + 16];
    if (c->adds)
        take_key(wide, width, c, c->k.at + (sequence * c->k.row + group * width) * size, c->v.at + (sequence * c->v.row + group * width) * size, sums, level, key, values);
    for (int64_t r = 0; r < ratio; r += TILE)
        exponents(wide, width, c->weights, m, q + r * width * size, width, least(TILE, ratio - r), features + r * m);
    for (int64_t r = 0; r < ratio; r += 4) {
        const int64_t asking = least(4, ratio - r), row = sequence * c->heads + group * ratio + r;
        float below[4];
        for (int64_t i = 0; i < asking; i++) { /* what is left out here cancels in the answer */
            float *query = features + (r + i) * m;
            const float length = norm(wide, width, q + (r + i) * width * size), shift = length <= c->reach ? 0.0f : highest(query, m);
            raise(wide, c->weights, query, m, shift);
            below[i] = shift - length * length * c->half;
        }
        const int adds = c->adds && r == 0; /* once */
        for (int64_t d = 0; d <= width; d++) {
#define ASKING(Q) \
    case Q: add_and_ask(0, Q, sums + d * m, key, features + r * m, m, 0.0f, &answers[0][d], WIDEST + 16); break; \
    case Q + 4: add_and_ask(1, Q, sums + d * m, key, features + r * m, m, values[d], &answers[0][d], WIDEST + 16); break;
            switch (asking + 4 * adds) { ASKING(4) ASKING(3) ASKING(2) ASKING(1) }
        }
        for (int64_t i = 0; i < asking; i++) {
            char *out = c->out + (row + i) * width * size;
            if (c->near)
                join(wide, width, out, answers[i], answers[i][width], *level + below[i] - c->log_count, c->near[row + i]);
            else
                for (int64_t d = 0; d < width; d += 16) store_answer(wide, out + d * size, _mm512_loadu_ps(&answers[i][d]), answers[i][width]);
        }
    }
}

#define HEAD(NAME, WIDE, WIDTH) \
    __attribute__((noinline)) static void NAME(const FeaturesStep *c, int64_t b, int64_t g, float *s, float *level, float *f) { step_head(WIDE, WIDTH, c, b, g, s, level, f); }
HEAD(head_narrow_64, 0, 64)
HEAD(head_narrow, 0, c->width)
HEAD(head_wide, 1, c->width)

static const char *wrong_step(const FeaturesStep *c, const State *states, int64_t count, int threads) {
    const char *reason = wrong_features(c->heads, c->groups, c->width, c->wide, c->weights, c->weights_bytes, c->count);
    if (reason) return reason;
    const int64_t size = c->wide ? 4 : 2, rows = c->sequences * c->heads;
    REQUIRE(within(c->sequences, 0, FAR) && count == c->sequences && threads >= 1, "there must be threads, and a state for each sequence");
    REQUIRE(is_tight(&c->q, size, c->sequences, c->heads, c->width), "q must be (sequences, heads, width), heads side by side");
    if (c->adds) {
        REQUIRE(is_tight(&c->k, size, c->sequences, c->groups, c->width), "k must be (sequences, groups, width), heads side by side");
        REQUIRE(is_tight(&c->v, size, c->sequences, c->groups, c->width), "v must be (sequences, groups, width), heads side by side");
    }
    REQUIRE(is_room(c->out, c->out_bytes, rows * c->width, size), "out must hold (sequences, heads, width)");
    REQUIRE(!c->near || is_room(c->near, c->near_bytes, rows, sizeof(float)), "near must hold (sequences, heads)");
    REQUIRE(is_room(c->features, c->features_bytes, (rows + c->sequences * c->groups) * c->count, sizeof(float)), "features must hold (sequences, heads + groups, features)");
    for (int64_t i = 0; i < count; i++)
        REQUIRE(is_room(states[i].sums, states[i].sums_bytes, c->groups * (c->width + 1) * c->count, sizeof(float)) && is_room(states[i].level, states[i].level_bytes, c->groups, sizeof(float)),
                "a state must hold (groups, width + 1, features) and (groups)");
    return 0;
}

const char *features_step(const FeaturesStep *c, const State *states, int64_t count, int threads) {
    const char *reason = wrong_step(c, states, count, threads);
    if (reason) return reason;
    const int64_t tasks = c->sequences * c->groups, each = (c->heads / c->groups + 1) * c->count;
#pragma omp parallel for schedule(dynamic, 1) num_threads(tasks > 1 ? threads : 1)
    for (int64_t i = 0; i < tasks; i++) {
        const int64_t b = i / c->groups, g = i % c->groups;
        float *sums = states[b].sums + g * (c->width + 1) * c->count, *level = states[b].level + g;
        (c->wide ? head_wide : c->width == 64 ? head_narrow_64 : head_narrow)(c, b, g, sums, level, c->features + i * each);
    }
    return 0;
}

#else
const char *features(void) { return "this machine has no AVX-512"; }
const char *features_step(void) { return "this machine has no AVX-512"; }
#endif
