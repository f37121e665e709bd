/* What a decoder layer does between its products, each in one pass, and for a decode step what it
 * does on either side of its attention, products and all: the functions behind
 * `service/model/native.py`.
 *
 * For one token these are a dozen operators of torch a layer, each some microseconds of dispatch
 * for a few hundred numbers. Float32 between, rounded where torch rounds; `Layer` in transformer.py
 * is the slow reading. Rows are independent.
 */
#include "given.h"

typedef struct { /* a layer's weights, bfloat16, tight: norms (C), scales (heads + groups, D) or
                    null; and matrices, packed as product.h says */
    const char *attention_norm;
    int64_t attention_norm_bytes;
    const char *mlp_norm;
    int64_t mlp_norm_bytes;
    const char *scales;
    int64_t scales_bytes;
    const char *qkv;
    int64_t qkv_bytes;
    const char *out;
    int64_t out_bytes;
    const char *gate_up;
    int64_t gate_up_bytes;
    const char *down;
    int64_t down_bytes;
    int64_t width, inner, heads, groups, depth; /* C, F, H, G, D */
    int64_t bits;                               /* of a number of the matrices: 16, 8 or 4 */
    float epsilon;
} Layer;

typedef struct { /* what `decode` needs at a layer beside its weights: the turns (rows, 1, D) of
                    its positions, and who answers it */
    View cos, sin;
    Answer answer;
    const void *told;
    int64_t index; /* among the layers of who answers */
} Station;

/* clang-format off */
const int64_t layer_layout[] = {
    sizeof(View), sizeof(Station),
    sizeof(Layer), FIELD(Layer, attention_norm), FIELD(Layer, attention_norm_bytes),
    FIELD(Layer, mlp_norm), FIELD(Layer, mlp_norm_bytes), FIELD(Layer, scales),
    FIELD(Layer, scales_bytes), FIELD(Layer, qkv), FIELD(Layer, qkv_bytes), FIELD(Layer, out),
    FIELD(Layer, out_bytes), FIELD(Layer, gate_up), FIELD(Layer, gate_up_bytes),
    FIELD(Layer, down), FIELD(Layer, down_bytes), FIELD(Layer, width), FIELD(Layer, inner),
    FIELD(Layer, heads), FIELD(Layer, groups), FIELD(Layer, depth), FIELD(Layer, bits),
    FIELD(Layer, epsilon),
    -1,
};
/* clang-format on */

#ifdef HAS_AVX512
#include "product.h"
#include "simd.h"
#include "team.h"

#define MOST (1 << 20)  /* elements of a row, at most */
#define ALONE (1 << 16) /* elements up to which other threads are not worth waking */

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

/* silu(gate) up of one row, (F) each. Slow reading: `functional.silu`. */
INLINE void gate_row(const int wide, const char *gates, const char *ups, int64_t width, char *out) {
    const __m512 one = _mm512_set1_ps(1.0f), minus_log2_e = _mm512_set1_ps(-1.44269504f);
    const int64_t size = wide ? 4 : 2;
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 gate = load16(wide, gates + j * size), up = load16(wide, ups + j * size);
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
#pragma omp parallel for schedule(static) num_threads(rows *width > ALONE ? threads : 1)
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
#pragma omp parallel for schedule(static) num_threads(rows * heads * width > ALONE ? threads : 1)
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
#pragma omp parallel for schedule(static) num_threads(rows *width > ALONE ? threads : 1)
    for (int64_t i = 0; i < rows; i++) {
        const char *from = x->at + i * x->row * size;
        char *to = out + i * width * size;
        if (wide) gate_row(1, from, from + width * size, width, to);
        else gate_row(0, from, from + width * size, width, to);
    }
    return 0;
}

/* ---- a decode step: all of a layer but its attention ---- */

/* 64 columns of a panel of rows of a product, rounded to bfloat16. Slow reading:
 * `functional.linear`. */
INLINE void product_piece(int64_t rows, const char *x, int64_t inputs, int64_t bits,
                          const char *matrix, int64_t block, char *to, int64_t outputs) {
    float sums[PANEL][COLUMNS] __attribute__((aligned(64)));
    piece(bits, rows, x, inputs, inputs, matrix, block, sums);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < COLUMNS; j += 16)
            store16(0, to + (i * outputs + block * COLUMNS + j) * 2, _mm512_load_ps(&sums[i][j]));
}

/* The same, added to a stream (rows, outputs). Slow reading: `torch.add`. */
INLINE void added_piece(int64_t rows, const char *x, int64_t row, int64_t inputs, int64_t bits,
                        const char *matrix, int64_t block, const char *stream, int64_t stream_row,
                        char *to, int64_t outputs) {
    float sums[PANEL][COLUMNS] __attribute__((aligned(64)));
    piece(bits, rows, x, row, inputs, matrix, block, sums);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            const int64_t at = block * COLUMNS + j;
            store16(0, to + (i * outputs + at) * 2,
                    _mm512_add_ps(load16(0, stream + (i * stream_row + at) * 2),
                                  rounded16(_mm512_load_ps(&sums[i][j]))));
        }
}

/* 64 columns of the feed-forward's inner rows (rows, F), as the product behind it reads them. Slow
 * reading: `Layer.mlp`. */
INLINE void gated_piece(int64_t rows, const char *x, const Layer *layer, int64_t block, char *to) {
    float gates[PANEL][COLUMNS] __attribute__((aligned(64)));
    float ups[PANEL][COLUMNS] __attribute__((aligned(64)));
    char rounded[2][2 * COLUMNS] __attribute__((aligned(64)));
    const int is_eight = layer->bits < 16;
    const int64_t width = layer->width, inner = layer->inner, other = block + inner / COLUMNS;
    piece(layer->bits, rows, x, width, width, layer->gate_up, block, gates);
    piece(layer->bits, rows, x, width, width, layer->gate_up, other, ups);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            store16(0, rounded[0] + 2 * j, _mm512_load_ps(&gates[i][j]));
            store16(0, rounded[1] + 2 * j, _mm512_load_ps(&ups[i][j]));
        }
        char *row = to + i * inner * 2, *own = is_eight ? rounded[0] : row + block * COLUMNS * 2;
        gate_row(0, rounded[0], rounded[1], COLUMNS, own);
        if (is_eight) eight_row(own, COLUMNS, row + block * EIGHT);
    }
}

static const char *wrong_layer(const Layer *x, int64_t rows, int threads) {
    REQUIRE(within(rows, 0, MOST) && within(threads, 1, MOST),
            "there must be threads, and not too many rows");
    REQUIRE(within(x->width, COLUMNS, MOST) && x->width % COLUMNS == 0 &&
                within(x->inner, COLUMNS, MOST) && x->inner % COLUMNS == 0,
            "the widths of a layer must be multiples of 64");
    REQUIRE(within(x->depth, 32, WIDEST) && x->depth % 32 == 0 && within(x->heads, 1, MOST) &&
                within(x->groups, 1, MOST),
            "width must be a multiple of 32, up to 256");
    const int64_t answer = x->heads * x->depth, all = (x->heads + 2 * x->groups) * x->depth;
    REQUIRE(answer % COLUMNS == 0 && all % COLUMNS == 0 && all <= MOST,
            "all heads together must be a multiple of 64 wide");
    REQUIRE(is_packing(x->bits), "numbers must be of 16, 8 or 4 bits");
    REQUIRE(is_room(x->attention_norm, x->attention_norm_bytes, x->width, 2) &&
                is_room(x->mlp_norm, x->mlp_norm_bytes, x->width, 2),
            "a norm must hold a row");
    REQUIRE(!x->scales || is_room(x->scales, x->scales_bytes, (x->heads + x->groups) * x->depth, 2),
            "scales must hold (heads + groups, depth)");
    REQUIRE(is_room(x->qkv, x->qkv_bytes, packed_bytes(x->bits, all, x->width), 1) &&
                is_room(x->out, x->out_bytes, packed_bytes(x->bits, x->width, answer), 1) &&
                is_room(x->gate_up, x->gate_up_bytes, packed_bytes(x->bits, 2 * x->inner, x->width),
                        1) &&
                is_room(x->down, x->down_bytes, packed_bytes(x->bits, x->width, x->inner), 1),
            "a matrix must hold its numbers");
    return 0;
}

/* A phase of rows that are normed into tight ones, as the product behind it reads them. Slow
 * reading: `functional.rms_norm`. */
INLINE void norm_rows(uint64_t call, int phase, int64_t rows, const char *x, int64_t row,
                      const char *weight, const Layer *layer, char *out) {
    const int64_t width = layer->width;
    for (int64_t i; (i = take(call, phase, rows)) >= 0; give(call, phase)) {
        char *to = out + i * width * 2;
        norm_row(0, x + i * row * 2, weight, width, layer->epsilon, to);
        if (layer->bits < 16) eight_row(to, width, to);
    }
    await(call, phase, rows);
}

typedef struct { /* what `question` was given, and below `output` */
    Layer layer;
    View x, cos, sin;
    char *out, *room;
} Asking;

typedef struct {
    Layer layer;
    View x, answer;
    char *out, *room;
} Answering;

_Static_assert(sizeof(Asking) <= GIVEN && sizeof(Answering) <= GIVEN, "threads are told no more");

/* Slow reading: `Layer.question`. */
static void ask(const void *given, uint64_t call) {
    const Asking *c = given;
    const Layer *layer = &c->layer;
    const int64_t rows = c->x.rows, width = layer->width, depth = layer->depth,
                  turned = layer->heads + layer->groups, all = turned + layer->groups,
                  panels = panels_of(rows), pieces = all * depth / COLUMNS * panels;
    norm_rows(call, 0, rows, c->x.at, c->x.row, layer->attention_norm, layer, c->room);
    for (int64_t p; (p = take(call, 1, pieces)) >= 0; give(call, 1)) {
        const int64_t i = p % panels * PANEL;
        product_piece(least(PANEL, rows - i), c->room + i * width * 2, width, layer->bits,
                      layer->qkv, p / panels, c->out + i * all * depth * 2, all * depth);
    }
    await(call, 1, pieces);
    for (int64_t i; (i = take(call, 2, rows)) >= 0; give(call, 2))
        for (int64_t h = 0; h < turned; h++) {
            char *head = c->out + (i * all + h) * depth * 2;
            turn_head(0, head, layer->scales ? layer->scales + h * depth * 2 : 0, depth,
                      layer->epsilon, c->cos.at + i * c->cos.row * 2,
                      c->sin.at + i * c->sin.row * 2, head);
        }
    await(call, 2, rows);
}

/* Slow reading: `Layer.output`. */
static void answer(const void *given, uint64_t call) {
    const Answering *c = given;
    const Layer *layer = &c->layer;
    const int64_t rows = c->x.rows, width = layer->width, inner = layer->inner,
                  asked = layer->heads * layer->depth, panels = panels_of(rows),
                  pieces = width / COLUMNS * panels, inners = inner / COLUMNS * panels;
    char *stream = c->room, *normed = stream + rows * width * 2,
         *gated = normed + rows * most(width, asked) * 2;
    const Rows answers = eight_rows(call, 0, layer->bits, &c->answer, asked, normed);
    for (int64_t p; (p = take(call, 1, pieces)) >= 0; give(call, 1)) {
        const int64_t i = p % panels * PANEL;
        added_piece(least(PANEL, rows - i), answers.at + i * answers.row * 2, answers.row, asked,
                    layer->bits, layer->out, p / panels, c->x.at + i * c->x.row * 2, c->x.row,
                    stream + i * width * 2, width);
    }
    await(call, 1, pieces);
    norm_rows(call, 2, rows, stream, width, layer->mlp_norm, layer, normed);
    for (int64_t p; (p = take(call, 3, inners)) >= 0; give(call, 3)) {
        const int64_t i = p % panels * PANEL;
        gated_piece(least(PANEL, rows - i), normed + i * width * 2, layer, p / panels,
                    gated + i * inner * 2);
    }
    await(call, 3, inners);
    for (int64_t p; (p = take(call, 4, pieces)) >= 0; give(call, 4)) {
        const int64_t i = p % panels * PANEL;
        added_piece(least(PANEL, rows - i), gated + i * inner * 2, inner, inner, layer->bits,
                    layer->down, p / panels, stream + i * width * 2, width, c->out + i * width * 2,
                    width);
    }
    await(call, 4, pieces);
}

/* Queries, keys and values (rows, H + 2 G, D), tight, of x (rows, C). room: (rows, C). Slow
 * reading: `Layer.question`. */
const char *question(const Layer *layer, const View *x, const View *cos, const View *sin, char *out,
                     int64_t out_bytes, char *room, int64_t room_bytes, int threads) {
    const int64_t rows = x->rows;
    const char *reason = wrong_layer(layer, rows, threads);
    if (reason) return reason;
    const int64_t width = layer->width, depth = layer->depth, turned = layer->heads + layer->groups,
                  all = turned + layer->groups;
    REQUIRE(is_view(x, 2, 0, 1, width), "x must be rows of the layer's width");
    REQUIRE(is_view(cos, 2, rows, 1, depth) && is_view(sin, 2, rows, 1, depth),
            "cos and sin must be (tokens, 1, width)");
    REQUIRE(is_room(out, out_bytes, rows * all * depth, 2),
            "out must hold (rows, heads + 2 groups, depth)");
    REQUIRE(is_room(room, room_bytes, rows * width, 2), "room must hold all rows");
    const Asking told = { *layer, *x, *cos, *sin, out, room };
    together(ask, &told, sizeof told, threads);
    return 0;
}

/* What the layer hands on (rows, C), tight, from its input x (rows, C) and attention's answer
 * (rows, H, D). room: (rows, C + max(C, H D) + F). Slow reading: `Layer.output`. */
const char *output(const Layer *layer, const View *x, const View *answers, char *out,
                   int64_t out_bytes, char *room, int64_t room_bytes, int threads) {
    const int64_t rows = x->rows;
    const char *reason = wrong_layer(layer, rows, threads);
    if (reason) return reason;
    const int64_t width = layer->width;
    REQUIRE(is_view(x, 2, 0, 1, width), "x must be rows of the layer's width");
    REQUIRE(is_tight(answers, 2, rows, layer->heads, layer->depth),
            "answer must be (rows, heads, depth), heads side by side");
    REQUIRE(is_room(out, out_bytes, rows * width, 2), "out must hold all rows");
    REQUIRE(is_room(room, room_bytes,
                    rows * behind_words(width, layer->heads * layer->depth, layer->inner), 2),
            "room must hold (rows, the width, that or the answer's, and the inner one)");
    const Answering told = { *layer, *x, *answers, out, room };
    together(answer, &told, sizeof told, threads);
    return 0;
}

/* Elements for each row that a layer of `decode` has beside the stream, of which a View tells: the
 * answers; then queries, keys and values with what `question` takes, later what `output` does. */
static int64_t room_words(const Layer *x) {
    const int64_t asked = x->heads * x->depth, before = asked + 2 * x->groups * x->depth + x->width;
    return asked + most(before, behind_words(x->width, asked, x->inner));
}

/* Some of the heads (rows, heads, D) of tight rows of `all` of them. */
static View heads_of(char *at, int64_t rows, int64_t all, int64_t first, int64_t heads,
                     int64_t depth) {
    return (View){ at + first * depth * 2, 2, rows, heads, depth, all * depth, depth, 1 };
}

/* One layer of `decode`; by no threads it is only looked at whether it can be. Slow reading:
 * `Transformer.stages`. */
static const char *pass(const Layer *layer, const Station *at, char *x, int64_t x_bytes,
                        int64_t rows, char *room, int64_t room_bytes, int threads) {
    const char *reason = wrong_layer(layer, rows, threads ? threads : 1);
    if (reason) return reason;
    const int64_t width = layer->width, depth = layer->depth, heads = layer->heads,
                  groups = layer->groups, all = heads + 2 * groups, own = rows * heads * depth * 2,
                  stream_bytes = rows * width * 2, asked_bytes = rows * all * depth * 2;
    REQUIRE(is_room(x, x_bytes, rows * width, 2) &&
                is_room(room, room_bytes, rows * room_words(layer), 2),
            "x must hold all rows, room what a layer needs");
    REQUIRE(is_view(&at->cos, 2, rows, 1, depth) && is_view(&at->sin, 2, rows, 1, depth),
            "cos and sin must be (tokens, 1, width)");
    REQUIRE(at->answer, "somebody must answer");
    char *asked = room + own;
    const View stream = heads_of(x, rows, 1, 0, 1, width),
               answers = heads_of(room, rows, heads, 0, heads, depth),
               q = heads_of(asked, rows, all, 0, heads, depth),
               k = heads_of(asked, rows, all, heads, groups, depth),
               v = heads_of(asked, rows, all, heads + groups, groups, depth);
    if (threads)
        reason = question(layer, &stream, &at->cos, &at->sin, asked, asked_bytes,
                          asked + asked_bytes, stream_bytes, threads);
    if (!reason) reason = at->answer(at->told, at->index, &q, &k, &v, room, own, threads);
    if (!reason && threads)
        reason = output(layer, &stream, &answers, x, stream_bytes, asked,
                        rows * behind_words(width, heads * depth, layer->inner) * 2, threads);
    return reason;
}

/* A decode step through `count` of a model's layers from `first` on, attention and all: x (rows,
 * C), tight, becomes what the last of them hands on. room: `room_words` of each row. Slow reading:
 * `Transformer.stages`. */
const char *decode(const Layer *layers, int64_t layers_bytes, const Station *stations,
                   int64_t stations_bytes, int64_t first, int64_t count, char *x, int64_t x_bytes,
                   int64_t rows, char *room, int64_t room_bytes, int threads) {
    REQUIRE(within(first, 0, MOST) && within(count, 0, MOST) &&
                is_room(layers, layers_bytes, first + count, sizeof(Layer)) &&
                is_room(stations, stations_bytes, first + count, sizeof(Station)),
            "there must be so many layers, and a station of each");
    REQUIRE(within(threads, 1, MOST), "there must be threads");
    for (int64_t i = first; i < first + count; i++) {
        const char *reason = pass(layers + i, stations + i, x, x_bytes, rows, room, room_bytes, 0);
        if (reason) return reason;
    }
    for (int64_t i = first; i < first + count; i++) {
        const char *reason =
            pass(layers + i, stations + i, x, x_bytes, rows, room, room_bytes, threads);
        if (reason) return reason;
    }
    return 0;
}

typedef struct { /* what `multiply` was given */
    View x;
    const char *matrix, *bias;
    int64_t bits, outputs;
    char *out, *room;
    int wide;
} Factors;

/* Slow reading: `functional.linear`. */
static void products_of(const void *given, uint64_t call) {
    const Factors *c = given;
    float sums[PANEL][COLUMNS] __attribute__((aligned(64)));
    const int64_t panels = panels_of(c->x.rows), pieces = whole_blocks(c->outputs) * panels,
                  size = c->wide ? 4 : 2;
    const Rows x = eight_rows(call, 0, c->bits, &c->x, c->x.width, c->room);
    for (int64_t p; (p = take(call, 1, pieces)) >= 0; give(call, 1)) {
        const int64_t first = p % panels * PANEL, block = p / panels,
                      rows = least(PANEL, c->x.rows - first),
                      columns = least(COLUMNS, c->outputs - block * COLUMNS);
        piece(c->bits, rows, x.at + first * x.row * 2, x.row, c->x.width, c->matrix, block, sums);
        for (int64_t i = 0; i < rows; i++) {
            char answer[4 * COLUMNS] __attribute__((aligned(64)));
            for (int64_t j = 0; j < columns; j += 16) {
                __m512 sum = _mm512_load_ps(&sums[i][j]);
                if (c->bias)
                    sum = _mm512_add_ps(sum,
                                        some16(c->bias + (block * COLUMNS + j) * 2, columns - j));
                store16(c->wide, answer + j * size, c->wide ? rounded16(sum) : sum);
            }
            memcpy(c->out + ((first + i) * c->outputs + block * COLUMNS) * size, answer,
                   (size_t)(columns * size));
        }
    }
    await(call, 1, pieces);
}

/* x (rows, C) times a packed matrix (outputs, C), plus a bias (outputs) or null, rounded to
 * bfloat16: (rows, outputs), tight, as float32 where `wide`. room: (rows, C), of 16 bits none. Slow
 * reading: `functional.linear`. */
const char *multiply(const View *x, const char *matrix, int64_t matrix_bytes, int64_t bits,
                     int64_t outputs, const char *bias, int64_t bias_bytes, char *out,
                     int64_t out_bytes, char *room, int64_t room_bytes, int wide, int threads) {
    REQUIRE(is_view(x, 2, 0, 1, x->width) && within(x->width, 2, MOST) &&
                within(x->rows, 0, MOST) && within(threads, 1, MOST),
            "x must be rows, and not too many");
    REQUIRE(is_packing(bits) && x->width % (bits == 16 ? 2 : GROUP) == 0,
            "numbers must be of 16 bits and an even width, or of 8 or 4 and a multiple of 64");
    REQUIRE(within(outputs, 1, MOST), "there must be outputs, and not too many");
    REQUIRE(is_room(matrix, matrix_bytes, packed_bytes(bits, outputs, x->width), 1),
            "matrix must hold its numbers");
    REQUIRE(!bias || is_room(bias, bias_bytes, outputs, 2), "bias must hold a number per output");
    REQUIRE(is_room(out, out_bytes, x->rows * outputs, wide ? 4 : 2),
            "out must hold (rows, outputs)");
    REQUIRE(bits == 16 || is_room(room, room_bytes, x->rows * x->width, 2),
            "room must hold all rows");
    const Factors told = { *x, matrix, bias, bits, outputs, out, room, wide };
    together(products_of, &told, sizeof told, threads);
    return 0;
}

typedef struct { /* what `look_up` was given */
    const int64_t *ids;
    const char *matrix;
    char *out;
    int64_t count, width;
} Looking;

/* Slow reading: `functional.embedding`. */
static void rows_of(const void *given, uint64_t call) {
    const Looking *c = given;
    const int64_t width = c->width;
    for (int64_t i; (i = take(call, 0, c->count)) >= 0; give(call, 0)) {
        const char *from =
            c->matrix + c->ids[i] / COLUMNS * block_bytes(16, width) + c->ids[i] % COLUMNS * 4;
        for (int64_t w = 0; w < width / 2; w++)
            memcpy(c->out + (i * width / 2 + w) * 4, from + w * COLUMNS * 4, 4);
    }
    await(call, 0, c->count);
}

/* Rows, by their numbers (count), of a packed matrix (outputs, width) of 16 bits: (count, width),
 * tight. Slow reading: `functional.embedding`. */
const char *look_up(const char *ids, int64_t ids_bytes, int64_t count, const char *matrix,
                    int64_t matrix_bytes, int64_t outputs, int64_t width, char *out,
                    int64_t out_bytes, int threads) {
    REQUIRE(within(count, 0, PIECES - 1) && within(width, 2, MOST) && width % 2 == 0 &&
                within(outputs, 1, MOST) && within(threads, 1, MOST),
            "there must be threads, and rows of an even width");
    REQUIRE(is_room(ids, ids_bytes, count, 8), "ids must be 64 bits wide");
    REQUIRE(is_room(matrix, matrix_bytes, packed_bytes(16, outputs, width), 1),
            "matrix must hold its numbers");
    REQUIRE(is_room(out, out_bytes, count * width, 2), "out must hold (ids, width)");
    const Looking told = { (const int64_t *)ids, matrix, out, count, width };
    for (int64_t i = 0; i < count; i++)
        REQUIRE(within(told.ids[i], 0, outputs - 1), "an id must be the number of a row");
    together(rows_of, &told, sizeof told, count * width > ALONE / 16 ? threads : 1);
    return 0;
}

#else
const char *norm(void) { return "this machine has no AVX-512"; }
const char *turn(void) { return "this machine has no AVX-512"; }
const char *gate(void) { return "this machine has no AVX-512"; }
const char *question(void) { return "this machine has no AVX-512"; }
const char *output(void) { return "this machine has no AVX-512"; }
const char *decode(void) { return "this machine has no AVX-512"; }
const char *multiply(void) { return "this machine has no AVX-512"; }
const char *look_up(void) { return "this machine has no AVX-512"; }
#endif
