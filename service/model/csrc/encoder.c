/* What a layer of BERT's kind does behind its attention, products and all, in one call: the
 * function behind `service/model/encoder_layer.py`.
 *
 * A product's bias, its activation, the sum with the stream and the LayerNorm are done where its
 * numbers stand, and threads take pieces of 96 rows and 64 columns: none waits for one that the
 * machine has given to somebody else, as all do at the end of each of oneDNN's products. Float32
 * between, rounded where torch rounds; `Layer.output` in transformer.py is the slow reading. Rows
 * are independent.
 */
#include "given.h"

typedef struct { /* weights, bfloat16, tight: matrices as product.h packs them; biases and norms of
                    a row each */
    const char *out;
    int64_t out_bytes;
    const char *up;
    int64_t up_bytes;
    const char *down;
    int64_t down_bytes;
    const char *out_bias;
    int64_t out_bias_bytes;
    const char *up_bias;
    int64_t up_bias_bytes;
    const char *down_bias;
    int64_t down_bias_bytes;
    const char *attention_norm;
    int64_t attention_norm_bytes;
    const char *attention_norm_bias;
    int64_t attention_norm_bias_bytes;
    const char *mlp_norm;
    int64_t mlp_norm_bytes;
    const char *mlp_norm_bias;
    int64_t mlp_norm_bias_bytes;
    int64_t width, inner, heads, depth; /* C, F, H, D */
    int64_t activation;
    int64_t bits; /* of a number of the matrices: 16, 8 or 4 */
    float epsilon;
} EncoderLayer;

enum { GELU, GELU_TANH, RELU, ACTIVATIONS }; /* as `ACTIVATIONS` in encoder_layer.py */

/* clang-format off */
const int64_t encoder_layout[] = {
    sizeof(View),
    sizeof(EncoderLayer), FIELD(EncoderLayer, out), FIELD(EncoderLayer, out_bytes),
    FIELD(EncoderLayer, up), FIELD(EncoderLayer, up_bytes), FIELD(EncoderLayer, down),
    FIELD(EncoderLayer, down_bytes), FIELD(EncoderLayer, out_bias),
    FIELD(EncoderLayer, out_bias_bytes), FIELD(EncoderLayer, up_bias),
    FIELD(EncoderLayer, up_bias_bytes), FIELD(EncoderLayer, down_bias),
    FIELD(EncoderLayer, down_bias_bytes), FIELD(EncoderLayer, attention_norm),
    FIELD(EncoderLayer, attention_norm_bytes), FIELD(EncoderLayer, attention_norm_bias),
    FIELD(EncoderLayer, attention_norm_bias_bytes), FIELD(EncoderLayer, mlp_norm),
    FIELD(EncoderLayer, mlp_norm_bytes), FIELD(EncoderLayer, mlp_norm_bias),
    FIELD(EncoderLayer, mlp_norm_bias_bytes), FIELD(EncoderLayer, width),
    FIELD(EncoderLayer, inner), FIELD(EncoderLayer, heads), FIELD(EncoderLayer, depth),
    FIELD(EncoderLayer, activation), FIELD(EncoderLayer, bits), FIELD(EncoderLayer, epsilon),
    -1,
};
/* clang-format on */

#ifdef HAS_AVX512
#include "product.h"
#include "simd.h"
#include "team.h"

#define MOST (1 << 20) /* elements of a row, at most */
#define SOME 16        /* rows that are normed as one piece */

/* x Phi(x), where it will be rounded to bfloat16: Phi(-u) = h(u) e^(-u^2 / 2), h by a polynomial on
 * 0..6 of relative error 3e-4; behind that the answer is what it is there, below 6e-9. Slow
 * reading: `functional.gelu`. */
INLINE __m512 gelu16(__m512 x) {
    const __m512 u = _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_abs_ps(x)); /* NaN stays */
    __m512 p = _mm512_set1_ps(2.67273822e-06f);
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-7.91129496e-05f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.00100869476f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-0.00730706565f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.0336006135f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-0.104830302f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.234722495f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-0.395440489f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.499852479f));
    const __m512 power =
        near_exp2_16(_mm512_mul_ps(u, _mm512_mul_ps(u, _mm512_set1_ps(-0.72134752f))));
    return _mm512_fnmadd_ps(_mm512_mul_ps(u, p), power, _mm512_max_ps(x, _mm512_setzero_ps()));
}

/* x / (1 + e^-2u), u the tanh's argument. Slow reading: `functional.gelu`. */
INLINE __m512 gelu_tanh16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), square = _mm512_mul_ps(x, x);
    const __m512 u = _mm512_mul_ps(
        x, _mm512_fmadd_ps(square, _mm512_set1_ps(-0.10294324f), _mm512_set1_ps(-2.30220819f)));
    return _mm512_div_ps(x, _mm512_add_ps(one, exp2_16(1, u)));
}

/* LayerNorm of a row, in place where out is x. Slow reading: `functional.layer_norm`. */
INLINE void layer_norm_row(const char *x, const char *weight, const char *bias, int64_t width,
                           float epsilon, char *out) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t j = 0; j < width; j += 16) sum = _mm512_add_ps(sum, load16(0, x + j * 2));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 v = _mm512_sub_ps(load16(0, x + j * 2), mean);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 by =
        _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon));
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_sub_ps(load16(0, x + j * 2), mean), by);
        store16(0, out + j * 2,
                _mm512_fmadd_ps(v, load16(0, weight + j * 2), load16(0, bias + j * 2)));
    }
}

/* 64 columns of a product of a panel of rows, with its bias, added to a stream (rows, outputs).
 * Slow reading: `torch.add`. */
INLINE void summed_piece(int64_t rows, const char *x, int64_t row, int64_t inputs, int64_t bits,
                         const char *matrix, int64_t block, const char *bias, const char *stream,
                         int64_t stream_row, char *to, int64_t outputs) {
    float sums[PANEL][COLUMNS] __attribute__((aligned(64)));
    piece(bits, rows, x, row, inputs, matrix, block, sums);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            const int64_t at = block * COLUMNS + j;
            const __m512 own = _mm512_add_ps(_mm512_load_ps(&sums[i][j]), load16(0, bias + at * 2));
            store16(0, to + (i * outputs + at) * 2,
                    _mm512_add_ps(load16(0, stream + (i * stream_row + at) * 2), rounded16(own)));
        }
}

/* The same through an activation, as the product behind it reads them. Slow reading: `Layer.mlp`.
 */
INLINE void activated_piece(const int activation, int64_t rows, const char *x, int64_t inputs,
                            int64_t bits, const char *matrix, int64_t block, const char *bias,
                            char *to, int64_t outputs) {
    float sums[PANEL][COLUMNS] __attribute__((aligned(64)));
    piece(bits, rows, x, inputs, inputs, matrix, block, sums);
    for (int64_t i = 0; i < rows; i++) {
        char rounded[2 * COLUMNS] __attribute__((aligned(64))),
            *row = to + i * outputs * 2, *own = bits < 16 ? rounded : row + block * COLUMNS * 2;
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            const __m512 v = _mm512_add_ps(_mm512_load_ps(&sums[i][j]),
                                           load16(0, bias + (block * COLUMNS + j) * 2));
            store16(0, own + j * 2,
                    activation == GELU ? gelu16(v)
                    : activation == GELU_TANH
                        ? gelu_tanh16(v)
                        : _mm512_max_ps(_mm512_setzero_ps(), v)); /* NaN stays */
        }
        if (bits < 16) eight_row(own, COLUMNS, row + block * EIGHT);
    }
}

typedef struct { /* what `encoder_output` was given */
    EncoderLayer layer;
    View x, answer;
    char *out, *room;
} Answering;

_Static_assert(sizeof(Answering) <= GIVEN, "threads are told no more");

/* A phase of rows that are normed where they lie; in 8 bits, too, unless that is null. Slow
 * reading: `functional.layer_norm`. */
INLINE void layer_norm_rows(uint64_t call, int phase, int64_t rows, char *x, const char *weight,
                            const char *bias, int64_t width, float epsilon, char *eight) {
    const int64_t pieces = (rows + SOME - 1) / SOME;
    for (int64_t p; (p = take(call, phase, pieces)) >= 0; give(call, phase))
        for (int64_t i = p * SOME; i < least(rows, (p + 1) * SOME); i++) {
            char *row = x + i * width * 2;
            layer_norm_row(row, weight, bias, width, epsilon, row);
            if (eight) eight_row(row, width, eight + i * width * 2);
        }
    await(call, phase, pieces);
}

/* Slow reading: `Layer.output`. */
static void follow(const void *given, uint64_t call) {
    const Answering *c = given;
    const EncoderLayer *layer = &c->layer;
    const int64_t rows = c->x.rows, width = layer->width, inner = layer->inner,
                  asked = layer->heads * layer->depth, panels = panels_of(rows),
                  pieces = width / COLUMNS * panels, inners = inner / COLUMNS * panels;
    char *stream = c->room, *eight = stream + rows * width * 2,
         *fed = eight + rows * most(width, asked) * 2;
    const Rows answers = eight_rows(call, 0, layer->bits, &c->answer, asked, eight);
    for (int64_t p; (p = take(call, 1, pieces)) >= 0; give(call, 1)) {
        const int64_t i = p % panels * PANEL;
        summed_piece(least(PANEL, rows - i), answers.at + i * answers.row * 2, answers.row, asked,
                     layer->bits, layer->out, p / panels, layer->out_bias,
                     c->x.at + i * c->x.row * 2, c->x.row, stream + i * width * 2, width);
    }
    await(call, 1, pieces);
    layer_norm_rows(call, 2, rows, stream, layer->attention_norm, layer->attention_norm_bias, width,
                    layer->epsilon, layer->bits == 16 ? 0 : eight);
    const char *normed = layer->bits == 16 ? stream : eight;
    for (int64_t p; (p = take(call, 3, inners)) >= 0; give(call, 3)) {
        const int64_t i = p % panels * PANEL, n = least(PANEL, rows - i), block = p / panels;
        const char *x = normed + i * width * 2;
        char *to = fed + i * inner * 2;
#define ACTIVATED(A) \
    case A: \
        activated_piece(A, n, x, width, layer->bits, layer->up, block, layer->up_bias, to, inner); \
        break;
        switch (layer->activation) { ACTIVATED(GELU) ACTIVATED(GELU_TANH) ACTIVATED(RELU) }
    }
    await(call, 3, inners);
    for (int64_t p; (p = take(call, 4, pieces)) >= 0; give(call, 4)) {
        const int64_t i = p % panels * PANEL;
        summed_piece(least(PANEL, rows - i), fed + i * inner * 2, inner, inner, layer->bits,
                     layer->down, p / panels, layer->down_bias, stream + i * width * 2, width,
                     c->out + i * width * 2, width);
    }
    await(call, 4, pieces);
    layer_norm_rows(call, 5, rows, c->out, layer->mlp_norm, layer->mlp_norm_bias, width,
                    layer->epsilon, 0);
}

static const char *wrong_encoder(const EncoderLayer *x) {
    REQUIRE(within(x->width, COLUMNS, MOST) && x->width % COLUMNS == 0 &&
                within(x->inner, COLUMNS, MOST) && x->inner % COLUMNS == 0,
            "the widths of a layer must be multiples of 64");
    REQUIRE(within(x->depth, 2, WIDEST) && x->depth % 2 == 0 && within(x->heads, 1, HEADS),
            "heads must be of an even width, and not too many");
    REQUIRE(is_packing(x->bits) && (x->bits == 16 || x->heads * x->depth % GROUP == 0),
            "numbers must be of 16 bits, or of 8 or 4 and all heads a multiple of 64 wide");
    REQUIRE(within(x->activation, 0, ACTIVATIONS - 1), "there is no such activation");
    REQUIRE(
        is_room(x->out, x->out_bytes, packed_bytes(x->bits, x->width, x->heads * x->depth), 1) &&
            is_room(x->up, x->up_bytes, packed_bytes(x->bits, x->inner, x->width), 1) &&
            is_room(x->down, x->down_bytes, packed_bytes(x->bits, x->width, x->inner), 1),
        "a matrix must hold its numbers");
    REQUIRE(is_room(x->up_bias, x->up_bias_bytes, x->inner, 2), "a bias must hold a row");
    const char *rows[] = { x->out_bias, x->down_bias,    x->attention_norm, x->attention_norm_bias,
                           x->mlp_norm, x->mlp_norm_bias };
    const int64_t bytes[] = { x->out_bias_bytes,       x->down_bias_bytes,
                              x->attention_norm_bytes, x->attention_norm_bias_bytes,
                              x->mlp_norm_bytes,       x->mlp_norm_bias_bytes };
    for (int i = 0; i < 6; i++)
        REQUIRE(is_room(rows[i], bytes[i], x->width, 2), "a bias and a norm must hold a row");
    return 0;
}

/* What the layer hands on (rows, C), tight, from its input x (rows, C) and attention's answer
 * (rows, H, D). room: (rows, C + max(C, H D) + F). Slow reading: `Layer.output`. */
const char *encoder_output(const EncoderLayer *layer, const View *x, const View *answers, char *out,
                           int64_t out_bytes, char *room, int64_t room_bytes, int threads) {
    const char *reason = wrong_encoder(layer);
    if (reason) return reason;
    const int64_t rows = x->rows, width = layer->width, inner = layer->inner;
    REQUIRE(within(rows, 0, MOST) && within(threads, 1, MOST),
            "there must be threads, and not too many rows");
    REQUIRE(is_view(x, 2, 0, 1, width), "x must be rows of the layer's width");
    REQUIRE(is_tight(answers, 2, rows, layer->heads, layer->depth),
            "answer must be (rows, heads, depth), heads side by side");
    REQUIRE(is_room(out, out_bytes, rows * width, 2), "out must hold all rows");
    REQUIRE(is_room(room, room_bytes,
                    rows * behind_words(width, layer->heads * layer->depth, inner), 2),
            "room must hold (rows, the width, that or the answer's, and the inner one)");
    const Answering told = { *layer, *x, *answers, out, room };
    together(follow, &told, sizeof told, threads);
    return 0;
}

#else
const char *encoder_output(void) { return "this machine has no AVX-512"; }
#endif
