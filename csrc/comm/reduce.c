/* The one place where ranks' values are combined.
 *
 * Decides: order and rounding. Rank order; a sum starts at +0.0; 16-bit floats are combined in fp32
 * and rounded once, after AVG's division. In two steps (the ranks of a node, then nodes) the same
 * holds for each step, and the division and the rounding belong to the second. Invariant: the
 * result depends on nothing but the values and the steps: not on chunks, not on who reduces, not on
 * the thread's floating-point control state. */
#include "backend.h"

#include "../fpenv.h"
#include "../kernels/kernels.h"

#include <string.h>

/* Accumulators of one block: they stay in the first-level cache. */
enum { BLOCK_BYTES = 8192 };

static bool is_wide(enum dsc_dtype dtype) {
    return dtype == DSC_BF16 || dtype == DSC_F16;
}

/* Not inlined, so that it stays between the two changes of the control state (fpenv.h). */
__attribute__((noinline)) static void divide(void *acc, enum dsc_dtype dtype, int by, size_t n) {
    if (dtype == DSC_F64) {
        double *x = acc;
        for (size_t i = 0; i < n; i++)
            x[i] /= by;
        return;
    }
    float *x = acc, divisor = (float)by;
    for (size_t i = 0; i < n; i++)
        x[i] /= divisor;
}

struct reduction {
    char *dst;
    const void *const *srcs;
    int n_srcs;
    enum dsc_dtype from, to; /* the sources' and dst's; they differ in the width of floats only */
    enum dsc_op op;
    int divisor; /* 0: nothing is divided */
    bool stream, direct;
};

static bool is_sum(const struct reduction *r) {
    return r->op == DSC_SUM || r->op == DSC_AVG;
}

/* Sums of types without a kernel that adds the first source to +0.0. */
static bool starts_from_zeros(const struct reduction *r) {
    return is_sum(r) && (int)r->from >= DSC_TRAIN_DTYPE_COUNT;
}

/* acc = the sources' elements from `at` on, combined. */
static void combine_block(void *acc, const struct reduction *r, size_t at, size_t n) {
    const struct dsc_kernels *k = dsc_kernels();
    size_t size = dsc_dtype_size(r->from);
    const char *first = (const char *)r->srcs[0] + at * size;
    int i = 1;

    if (is_sum(r) && !starts_from_zeros(r)) {
        k->accumulate[r->from](acc, first, n, true); /* +0.0 + x in one pass */
    } else if (is_sum(r)) {
        memset(acc, 0, n * size);
        i = 0;
    } else if (is_wide(r->from)) {
        k->to_f32[r->from](acc, first, n);
    } else {
        /* No neutral element exists for every type, so the first rank's values start. */
        memmove(acc, first, n * size);
    }
    for (; i < r->n_srcs; i++)
        k->combine[r->from][r->op](acc, (const char *)r->srcs[i] + at * size, n);
    if (r->divisor)
        divide(acc, r->from, r->divisor, n);
}

static void reduce_block(const struct reduction *r, size_t at, size_t n) {
    _Alignas(64) char acc[BLOCK_BYTES], rounded[BLOCK_BYTES / 2];
    const char *result = acc;
    size_t size = dsc_dtype_size(r->to);

    if (r->direct) { /* the lines stay in the first-level cache until the last source is added */
        combine_block(r->dst + at * size, r, at, n);
        return;
    }
    combine_block(acc, r, at, n);
    if (is_wide(r->to)) {
        dsc_kernels()->from_f32[r->to](rounded, (const float *)(const void *)acc, n);
        result = rounded;
    }
    if (r->stream)
        dsc__stream_copy(r->dst + at * size, result, n * size);
    else
        memcpy(r->dst + at * size, result, n * size);
}

static void reduce(struct reduction *r, size_t n_elems) {
    size_t block = BLOCK_BYTES / dsc_max(dsc_dtype_size(r->from), sizeof(float));
    if (n_elems == 0)
        return;
    r->direct = !r->stream && !is_wide(r->to);
    /* A source that is the result's memory must be the first, and one that is read at once. */
    for (int i = starts_from_zeros(r) ? 0 : 1; i < r->n_srcs; i++)
        r->direct = r->direct && r->srcs[i] != r->dst;
    /* A rank whose user flushes denormals must give the same bits as the others. */
    uint64_t caller = dsc_fp_enter();
    for (size_t i = 0; i < n_elems; i += block)
        reduce_block(r, i, dsc_min(block, n_elems - i));
    dsc_fp_leave(caller);
}

void dsc__reduce(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                 enum dsc_dtype dtype, enum dsc_op op, bool stream) {
    int divisor = op == DSC_AVG ? n_srcs : 0;
    struct reduction r = {dst, srcs, n_srcs, dtype, dtype, op, divisor, stream, false};
    reduce(&r, n_elems);
}

enum dsc_dtype dsc__sum_dtype(enum dsc_dtype dtype) {
    return is_wide(dtype) ? DSC_F32 : dtype;
}

void dsc__reduce_ranks(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                       enum dsc_dtype dtype, enum dsc_op op) {
    struct reduction r = {dst, srcs, n_srcs, dtype, dsc__sum_dtype(dtype), op, 0, false, false};
    reduce(&r, n_elems);
}

void dsc__reduce_nodes(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                       enum dsc_dtype dtype, enum dsc_op op, int n_ranks) {
    int divisor = op == DSC_AVG ? n_ranks : 0;
    struct reduction r = {dst,     srcs,  n_srcs, dsc__sum_dtype(dtype), dtype, op,
                          divisor, false, false};
    reduce(&r, n_elems);
}
