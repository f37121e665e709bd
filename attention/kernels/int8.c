/* Keys and values in 8 bits: the numbers of `int8.py`, which says what they tell and why.
 *
 * Of each row of D elements D whole numbers and, behind them, their scale, a float32. The same to
 * the bit as the slow reading: division and rounding are those of IEEE 754 in both.
 */
#include "given.h"

typedef struct {
    View k, v; /* (T, G, D) */
    char *out; /* (2, T, G, D + 4) */
    int64_t out_bytes, wide;
} Rounding;

/* Sizes and offsets, for a caller in another language to compare with its own. */
const int64_t int8_layout[] = {
    sizeof(Rounding),
    FIELD(Rounding, k),
    FIELD(Rounding, v),
    FIELD(Rounding, out),
    FIELD(Rounding, out_bytes),
    FIELD(Rounding, wide),
    -1,
};

#ifdef HAS_AVX512
#include "simd.h"

/* A row in 8 bits. The largest magnitude is found among the bits, where NaN is above infinity, and
 * that above all numbers. Slow reading: `round_off`. */
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

static const char *wrong_rounding(const Rounding *c, int threads) {
    const int64_t size = c->wide ? 4 : 2, rows = c->k.rows, heads = c->k.heads, width = c->k.width;
    REQUIRE(within(c->wide, 0, 1) && threads >= 1,
            "wide must be 0 or 1, and there must be threads");
    REQUIRE(within(heads, 1, HEADS) && within(width, 32, WIDEST) && width % 32 == 0,
            "heads must be up to 128, their width a multiple of 32 up to 256");
    REQUIRE(is_view(&c->k, size, 0, heads, width) && is_view(&c->v, size, rows, heads, width) &&
                c->v.rows == rows,
            "k and v must be (tokens, groups, width)");
    REQUIRE(is_room(c->out, c->out_bytes, 2 * rows * heads * (width + 4), 1),
            "out must hold (2, tokens, groups, width + 4)");
    return 0;
}

/* Slow reading: `round_off`. */
const char *quantize(const Rounding *c, int threads) {
    const char *reason = wrong_rounding(c, threads);
    if (reason) return reason;
    const int64_t rows = c->k.rows, heads = c->k.heads, width = c->k.width, size = c->wide ? 4 : 2;
#pragma omp parallel for num_threads(threads) if (rows > 32)
    for (int64_t i = 0; i < 2 * rows; i++) {
        const View *x = i < rows ? &c->k : &c->v;
        for (int64_t h = 0; h < heads; h++) {
            const char *from = x->at + (i % rows * x->row + h * x->head) * size;
            char *to = c->out + (i * heads + h) * (width + 4);
            if (c->wide) round_row(1, width, from, to);
            else round_row(0, width, from, to);
        }
    }
    return 0;
}

#else
const char *quantize(void) { return "this machine has no AVX-512"; }
#endif
