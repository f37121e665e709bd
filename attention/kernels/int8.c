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
