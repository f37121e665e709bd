/* What Python hands to a kernel, and what is asked of it before any of it is touched.
 *
 * A function that is called from outside returns null when it is done; otherwise it did nothing and
 * returns what was wrong with its arguments. `library.py` describes tensors as they are, so a fault
 * in what it passes on ends there and not in the heap.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* A tensor (rows, heads, width) of elements of `size` bytes; row, head and element are its strides:
 * element (i, h, d) stands at `at + (i row + h head + d element) size`. */
typedef struct {
    char *at;
    int64_t size, rows, heads, width, row, head, element;
} View;

/* Elsewhere, or built with -DWITHOUT_AVX512 as for a machine without, nothing is computed and
 * `supported` says so. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(WITHOUT_AVX512)
#define HAS_AVX512 1
#endif

#define WIDEST 256 /* D, at most */
#define HEADS 128  /* H, at most */

/* No position, distance or count reaches it, so no sum or product of them leaves 64 bits. */
#define FAR ((int64_t)1 << 40)

#define REQUIRE(CONDITION, REASON) \
    do { \
        if (!(CONDITION)) return REASON; \
    } while (0)
#define FIELD(STRUCT, NAME) (int64_t)offsetof(STRUCT, NAME)

static inline int within(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

/* Whether a view has these rows or more, and of these heads and this width exactly, element beside
 * element. */
static inline int is_view(const View *x, int64_t size, int64_t rows, int64_t heads, int64_t width) {
    return (x->at || x->rows == 0) && x->size == size && within(x->rows, rows, FAR) &&
           x->heads == heads && x->width == width && x->element == 1;
}

/* The same, with the heads of a row side by side. */
static inline int is_tight(const View *x, int64_t size, int64_t rows, int64_t heads,
                           int64_t width) {
    return is_view(x, size, rows, heads, width) && (x->head == width || heads == 1);
}

/* Whether tight memory holds `count` numbers of `size` bytes. */
static inline int is_room(const void *at, int64_t bytes, int64_t count, int64_t size) {
    return count == 0 || (at && bytes >= count * size);
}

/* Who answers one token of each sequence at one of the layers that a backend has, and puts its key
 * and value into the sequence's state: q, out (B, H, D), k, v (B, G, D). `told` is of its own. By
 * no threads nothing is touched, it is only said what is wrong. */
typedef const char *(*Answer)(const void *told, int64_t layer, const View *q, const View *k,
                              const View *v, char *out, int64_t out_bytes, int threads);
