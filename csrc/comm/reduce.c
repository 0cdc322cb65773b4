/* The one place where ranks' values are combined.
 *
 * Decides: order and rounding. Rank order; a sum starts at +0.0; 16-bit floats are combined in fp32
 * and rounded once, after AVG's division. Invariant: the result depends on nothing but the values:
 * not on chunks, not on who reduces, not on the thread's floating-point control state. */
#include "backend.h"

#include "../kernels/kernels.h"

#include <fenv.h>
#include <string.h>

/* Accumulators of one block: they stay in the first-level cache. */
enum { BLOCK_BYTES = 8192 };

static bool is_wide(enum dsc_dtype dtype) {
    return dtype == DSC_BF16 || dtype == DSC_F16;
}

static void divide(void *acc, enum dsc_dtype dtype, int by, size_t n) {
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

/* One block: offset in bytes into every source. */
static void reduce_block(void *dst, const void *const *srcs, int n_srcs, size_t offset, size_t n,
                         enum dsc_dtype dtype, enum dsc_op op) {
    const struct dsc_kernels *k = dsc_kernels();
    _Alignas(64) char acc[BLOCK_BYTES];
    size_t n_acc_bytes = n * (is_wide(dtype) ? sizeof(float) : dsc_dtype_size(dtype));
    int from = 0;

    if (op == DSC_SUM || op == DSC_AVG) {
        memset(acc, 0, n_acc_bytes);
    } else {
        /* No neutral element exists for every type, so the first rank's values start. */
        const char *first = (const char *)srcs[0] + offset;
        if (is_wide(dtype))
            k->to_f32[dtype]((float *)(void *)acc, first, n);
        else
            memcpy(acc, first, n_acc_bytes);
        from = 1;
    }
    for (int r = from; r < n_srcs; r++)
        k->combine[dtype][op](acc, (const char *)srcs[r] + offset, n);
    if (op == DSC_AVG)
        divide(acc, dtype, n_srcs, n);
    if (is_wide(dtype))
        k->from_f32[dtype]((char *)dst + offset, (const float *)(const void *)acc, n);
    else
        memcpy((char *)dst + offset, acc, n_acc_bytes);
}

void dsc__reduce(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                 enum dsc_dtype dtype, enum dsc_op op) {
    size_t size = dsc_dtype_size(dtype);
    size_t block = BLOCK_BYTES / dsc_max(size, sizeof(float));
    fenv_t caller;

    if (n_elems == 0)
        return;
    /* A rank whose user flushes denormals must give the same bits as the others. */
    (void)fegetenv(&caller);
    (void)fesetenv(FE_DFL_ENV);
    for (size_t i = 0; i < n_elems; i += block)
        reduce_block(dst, srcs, n_srcs, i * size, dsc_min(block, n_elems - i), dtype, op);
    (void)fesetenv(&caller);
}
