/* FAVOR+ (arXiv 2009.14794), one token at a time: the function behind `native.features_step`.
 *
 * With phi(x) = 2^(x W), W scaled so that this is exp(W x'), a step adds phi(k) [v, 1] to the sums S of a key-value head and
 * asks them with each of its queries. S is read once and written once, by the thread that has just made the features; that is
 * the step's limit, for S is 66 KB a head where W is 32 KB and everything else is smaller.
 *
 * The sums are short of 2^scale, and rise only for a key that would pass 2^limit: see `Performer._chunk`, the slow reading.
 */
#include <stdint.h>

typedef struct {
    const char *q, *k, *v; /* (B, H, D), (B, G, D), (B, G, D), heads tight */
    char *out;             /* (B, H, D), tight */
    const uint32_t *weights; /* W as words of neighbouring rows, (D, m) or (D / 2, m) */
    float *features;       /* scratch: (R + 1, m) for each sequence and key-value head */
    int64_t q_row, k_row, v_row;
    int64_t sequences, heads, groups, width, count, wide; /* count: m */
    float half;  /* |x|^2 times this is |x'|^2 / 2 in powers of two */
    float reach; /* the norm of x up to which features are taken as they are */
    float limit;
} FeaturesStep;

#if defined(__x86_64__) && defined(__GNUC__)
#include "simd.h"

#define WIDEST 256

/* |x| of D elements. */
INLINE float norm(const int wide, const int64_t width, const char *x) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t w = 0; w < width * (wide ? 4 : 2); w += 64) {
        const __m512i words = _mm512_loadu_si512(x + w);
        sum = multiply_add(wide, words, words, sum);
    }
    return sqrtf(_mm512_reduce_add_ps(sum));
}

/* x (m) = 2^(x - shift) */
INLINE void raise(float *x, int64_t count, float shift) {
    const __m512 less = _mm512_set1_ps(shift);
    for (int64_t j = 0; j < count; j += 16) _mm512_storeu_ps(x + j, exp2_16(_mm512_sub_ps(_mm512_loadu_ps(x + j), less)));
}

INLINE float highest(const float *x, int64_t count) {
    __m512 found = _mm512_loadu_ps(x);
    for (int64_t j = 16; j < count; j += 16) found = _mm512_max_ps(found, _mm512_loadu_ps(x + j));
    return _mm512_reduce_max_ps(found);
}

/* row (m) += by key (m), and its products with `queries` rows of (m) into answers, one every `stride`. */
INLINE void add_and_ask(const int queries, float *row, const float *key, const float *asking, int64_t count, float by, float *answers, int64_t stride) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        const __m512 s = _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(key + j), _mm512_loadu_ps(row + j));
        _mm512_storeu_ps(row + j, s);
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++) sum[i] = _mm512_fmadd_ps(s, _mm512_loadu_ps(asking + i * count + j), sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) answers[i * stride] = _mm512_reduce_add_ps(sum[i]);
}

/* One key-value head of one sequence: its sums (D + 1, m), their scale, and `features` as scratch. */
INLINE void features_head(const int wide, const int64_t width, const FeaturesStep *c, int64_t sequence, int64_t group, float *sums, float *scale, float *features) {
    const int64_t size = wide ? 4 : 2, words = width * size / 4, ratio = c->heads / c->groups, m = c->count;
    const char *q = c->q + (sequence * c->q_row + group * ratio * width) * size;
    const char *k = c->k + (sequence * c->k_row + group * width) * size;
    const char *v = c->v + (sequence * c->v_row + group * width) * size;
    for (int64_t r = 0; r < ratio; r += TILE) {
        const uint32_t *rows = (const uint32_t *)(q + r * width * size);
#define ROWS(R) \
    case R: products(wide, R, m, words, rows, words, c->weights, m, features + r * m, m, 0); break;
        switch (least(TILE, ratio - r)) { ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2) ROWS(1) }
    }
    for (int64_t r = 0; r < ratio; r++) {
        float *query = features + r * m;
        raise(query, m, norm(wide, width, q + r * width * size) <= c->reach ? 0.0f : highest(query, m)); /* a shift cancels in the answer */
    }
    float *key = features + ratio * m;
    products(wide, 1, m, words, (const uint32_t *)k, words, c->weights, m, key, m, 0);
    const float length = norm(wide, width, k), half = length * length * c->half;
    const float weight = (length <= c->reach ? 0.0f : highest(key, m)) - half;
    if (weight > *scale + c->limit) {
        const __m512 by = _mm512_set1_ps(exp2f(*scale - weight));
        for (int64_t j = 0; j < (width + 1) * m; j += 16) _mm512_storeu_ps(sums + j, _mm512_mul_ps(by, _mm512_loadu_ps(sums + j)));
        *scale = weight;
    }
    raise(key, m, half + *scale);
    float values[WIDEST + 16];
    for (int64_t d = 0; d < width; d += 16)
        _mm512_storeu_ps(values + d, wide ? _mm512_loadu_ps(v + 4 * d)
                                          : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + 2 * d))), 16)));
    values[width] = 1.0f;
    float answers[4][WIDEST + 16];
    for (int64_t r = 0; r < ratio; r += 4) {
        const int64_t asking = least(4, ratio - r);
        for (int64_t d = 0; d <= width; d++) {
            const float by = r ? 0.0f : values[d]; /* added once */
#define ASKING(Q) \
    case Q: add_and_ask(Q, sums + d * m, key, features + r * m, m, by, &answers[0][d], WIDEST + 16); break;
            switch (asking) { ASKING(4) ASKING(3) ASKING(2) ASKING(1) }
        }
        for (int64_t i = 0; i < asking; i++)
            for (int64_t d = 0; d < width; d += 16)
                store_answer(wide, c->out + ((sequence * c->heads + group * ratio + r + i) * width + d) * size, _mm512_loadu_ps(&answers[i][d]), answers[i][width]);
    }
}

#define HEAD(NAME, WIDE, WIDTH) \
    __attribute__((noinline)) static void NAME(const FeaturesStep *c, int64_t b, int64_t g, float *s, float *scale, float *f) { features_head(WIDE, WIDTH, c, b, g, s, scale, f); }
HEAD(head_narrow_64, 0, 64)
HEAD(head_narrow, 0, c->width)
HEAD(head_wide, 1, c->width)

/* states: for each sequence the addresses of its sums (G, D + 1, m) and their scales (G), both float32. */
void features_step(const FeaturesStep *c, float *const *states, int threads) {
    const int64_t tasks = c->sequences * c->groups, each = (c->heads / c->groups + 1) * c->count;
#pragma omp parallel for schedule(dynamic, 1) num_threads(tasks > 1 ? threads : 1)
    for (int64_t i = 0; i < tasks; i++) {
        const int64_t b = i / c->groups, g = i % c->groups;
        float *sums = states[2 * b] + g * (c->width + 1) * c->count, *scale = states[2 * b + 1] + g;
        (c->wide ? head_wide : c->width == 64 ? head_narrow_64 : head_narrow)(c, b, g, sums, scale, c->features + i * each);
    }
}

#else
void features_step(const FeaturesStep *c, float *const *states, int threads) { (void)c, (void)states, (void)threads; }
#endif
