/* What a decoder layer does between its products, each in one pass: the functions behind
 * `service/model/native.py`.
 *
 * For one token these are a dozen operators of torch a layer, each some microseconds of dispatch
 * for a few hundred numbers. Float32 between, rounded once at the end; `layer` in transformer.py is
 * the slow reading. Rows are independent.
 */
#include "given.h"

#ifdef HAS_AVX512
#include "cpu.h"
#include "simd.h"

#define MOST (1 << 20) /* elements of a row, at most */
#define ALONE 32       /* rows up to which other threads are not worth waking */

/* Slow reading: `torch.mul`. */
INLINE __m512 scaled(const int wide, __m512 x, __m512 by, const char *weight, int64_t j) {
    x = _mm512_mul_ps(x, by);
    return weight ? _mm512_mul_ps(x, load16(wide, weight + j * (wide ? 4 : 2))) : x;
}

/* 1 / sqrt(mean of squares + epsilon) of a row. Slow reading: `torch.rsqrt`. */
INLINE __m512 inverse_rms(const int wide, const char *x, int64_t width, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 v = load16(wide, x + j * (wide ? 4 : 2));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)width + epsilon));
}

/* Slow reading: `functional.rms_norm`. */
INLINE void norm_row(const int wide, const char *x, const char *weight, int64_t width,
                     float epsilon, char *out) {
    const __m512 by = inverse_rms(wide, x, width, epsilon);
    for (int64_t j = 0; j < width; j += 16)
        store16(wide, out + j * (wide ? 4 : 2),
                scaled(wide, load16(wide, x + j * (wide ? 4 : 2)), by, weight, j));
}

/* One head: normed by its own weights where there are any, then pairs (i, i + D/2) turned. Slow
 * reading: `rotate`. */
INLINE void turn_head(const int wide, const char *x, const char *weight, int64_t width,
                      float epsilon, const char *cos, const char *sin, char *out) {
    float row[WIDEST];
    const int64_t size = wide ? 4 : 2, half = width / 2;
    const __m512 by = weight ? inverse_rms(wide, x, width, epsilon) : _mm512_set1_ps(1.0f);
    for (int64_t j = 0; j < width; j += 16)
        _mm512_storeu_ps(row + j, scaled(wide, load16(wide, x + j * size), by, weight, j));
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 other = _mm512_loadu_ps(row + (j < half ? j + half : j - half));
        store16(
            wide, out + j * size,
            _mm512_fmadd_ps(other, load16(wide, sin + j * size),
                            _mm512_mul_ps(_mm512_loadu_ps(row + j), load16(wide, cos + j * size))));
    }
}

/* silu(gate) up of one row, (gate, up) to (F). Slow reading: `functional.silu`. */
INLINE void gate_row(const int wide, const char *x, int64_t width, char *out) {
    const __m512 one = _mm512_set1_ps(1.0f), minus_log2_e = _mm512_set1_ps(-1.44269504f);
    const int64_t size = wide ? 4 : 2;
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 gate = load16(wide, x + j * size), up = load16(wide, x + (width + j) * size);
        const __m512 below = _mm512_add_ps(one, exp2_16(1, _mm512_mul_ps(gate, minus_log2_e)));
        store16(wide, out + j * size, _mm512_mul_ps(_mm512_div_ps(gate, below), up));
    }
}

/* RMSNorm of x (T, C) by weight (C) into out (T, C), the last two tight. Slow reading:
 * `functional.rms_norm`. */
const char *norm(const View *x, const char *weight, int64_t weight_bytes, float epsilon, char *out,
                 int64_t out_bytes, int wide, int threads) {
    const int64_t size = wide ? 4 : 2, rows = x->rows, width = x->width;
    REQUIRE(is_view(x, size, 0, 1, width) && within(width, 16, MOST) && width % 16 == 0 &&
                threads >= 1,
            "x must be rows of a multiple of 16 elements");
    REQUIRE(is_room(weight, weight_bytes, width, size) &&
                is_room(out, out_bytes, rows * width, size),
            "weight must hold a row, out all of them");
#pragma omp parallel for schedule(static) num_threads(rows > ALONE ? threads : 1)
    for (int64_t i = 0; i < rows; i++) {
        const char *from = x->at + i * x->row * size;
        char *to = out + i * width * size;
        if (wide) norm_row(1, from, weight, width, epsilon, to);
        else norm_row(0, from, weight, width, epsilon, to);
    }
    return 0;
}

/* Queries and keys (T, heads, D), tight, out of projected rows x (T, any); weights (heads, D),
 * tight, or null; cos and sin (T, 1, D). Slow reading: `rotate`. */
const char *turn(const View *x, const char *weights, int64_t weights_bytes, int64_t heads,
                 int64_t width, float epsilon, const View *cos, const View *sin, char *out,
                 int64_t out_bytes, int wide, int threads) {
    const int64_t size = wide ? 4 : 2, rows = x->rows;
    REQUIRE(within(width, 32, WIDEST) && width % 32 == 0 && within(heads, 1, MOST / width),
            "width must be a multiple of 32, up to 256");
    REQUIRE(is_view(x, size, 0, 1, x->width) && within(x->width, heads * width, MOST) &&
                threads >= 1,
            "x must be rows of all heads or more");
    REQUIRE(is_view(cos, size, rows, 1, width) && is_view(sin, size, rows, 1, width),
            "cos and sin must be (tokens, 1, width)");
    REQUIRE(!weights || is_room(weights, weights_bytes, heads * width, size),
            "weights must hold (heads, width)");
    REQUIRE(is_room(out, out_bytes, rows * heads * width, size),
            "out must hold (tokens, heads, width)");
#pragma omp parallel for schedule(static) num_threads(rows > ALONE ? threads : 1)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < heads; h++) {
            const char *from = x->at + (i * x->row + h * width) * size,
                       *weight = weights ? weights + h * width * size : 0;
            const char *c = cos->at + i * cos->row * size, *s = sin->at + i * sin->row * size;
            char *to = out + (i * heads + h) * width * size;
            if (wide) turn_head(1, from, weight, width, epsilon, c, s, to);
            else turn_head(0, from, weight, width, epsilon, c, s, to);
        }
    return 0;
}

/* silu(gate) up of x (T, 2 F) into out (T, F), tight. Slow reading: `functional.silu`. */
const char *gate(const View *x, char *out, int64_t out_bytes, int wide, int threads) {
    const int64_t size = wide ? 4 : 2, rows = x->rows, width = x->width / 2;
    REQUIRE(is_view(x, size, 0, 1, 2 * width) && within(width, 16, MOST) && width % 16 == 0 &&
                threads >= 1,
            "x must be rows of twice a multiple of 16 elements");
    REQUIRE(is_room(out, out_bytes, rows * width, size), "out must hold (tokens, half a row)");
#pragma omp parallel for schedule(static) num_threads(rows > ALONE ? threads : 1)
    for (int64_t i = 0; i < rows; i++) {
        const char *from = x->at + i * x->row * size;
        char *to = out + i * width * size;
        if (wide) gate_row(1, from, width, to);
        else gate_row(0, from, width, to);
    }
    return 0;
}

/* For a caller in another language to compare with its own. */
const int64_t layer_layout[] = { sizeof(View), -1 };

#else
int supported(void) { return 0; }
const char *norm(void) { return "this machine has no AVX-512"; }
const char *turn(void) { return "this machine has no AVX-512"; }
const char *gate(void) { return "this machine has no AVX-512"; }
const int64_t layer_layout[] = { sizeof(View), -1 };
#endif
