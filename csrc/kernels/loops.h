/* Every loop of the kernel table, compiled once per tier: no include guard, on purpose.
 *
 * The including file defines TIER (the name), VECTOR_BYTES (its register width), crc32c, and the
 * two conversions that compilers do not vectorise: widen_f16(float *, const uint16_t *, n),
 * narrow_f16(uint16_t *, const float *, n). The loops are plain C over the maths of <op>.h; the
 * compiler makes the vectors. Invariant: nothing here depends on TIER but the speed. */
#include "adagrad.h"
#include "adam.h"
#include "cast.h"
#include "combine.h"
#include "lamb.h"
#include "lion.h"
#include "norm.h"
#include "sgd.h"
#include "softmax.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(op) PASTE(op, TIER)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

/* fp16 goes through a buffer on the stack, which stays in L1. */
enum { CHUNK = 512 };

/* ---- conversions ---- */

static void NAME(copy_f32)(void *dst, const float *src, size_t n) {
    if (n) /* memmove takes no NULL */
        memmove(dst, src, n * sizeof *src);
}
static void NAME(to_f32_f32)(float *dst, const void *src, size_t n) {
    NAME(copy_f32)(dst, src, n);
}
static void NAME(to_f32_bf16)(float *dst, const void *src, size_t n) {
    const uint16_t *x = src;
    DSC_IVDEP
    for (size_t i = 0; i < n; i++)
        dst[i] = dsc_f32_of_bf16(x[i]);
}
static void NAME(from_f32_bf16)(void *dst, const float *src, size_t n) {
    uint16_t *y = dst;
    DSC_IVDEP
    for (size_t i = 0; i < n; i++)
        y[i] = dsc_bf16_of_f32(src[i]);
}
static void NAME(to_f32_f16)(float *dst, const void *src, size_t n) {
    widen_f16(dst, src, n);
}
static void NAME(from_f32_f16)(void *dst, const float *src, size_t n) {
    narrow_f16(dst, src, n);
}

/* ---- collectives ---- */

#define SAME(x) (x)
#define COMBINE(op, dtype, acc_type, src_type, acc_name, load)                                     \
    static void NAME(op##_##dtype)(void *acc, const void *src, size_t n) {                         \
        acc_type *a = acc;                                                                         \
        const src_type *x = src;                                                                   \
        DSC_IVDEP                                                                                  \
        for (size_t i = 0; i < n; i++)                                                             \
            a[i] = dsc_##op##_##acc_name(a[i], load(x[i]));                                        \
    }
#define COMBINE_F16(op)                                                                            \
    static void NAME(op##_f16)(void *acc, const void *src, size_t n) {                             \
        float *a = acc, wide[CHUNK];                                                               \
        const uint16_t *x = src;                                                                   \
        for (size_t at = 0; at < n; at += CHUNK) {                                                 \
            size_t part = dsc_min(CHUNK, n - at);                                                  \
            widen_f16(wide, x + at, part);                                                         \
            NAME(op##_f32)(a + at, wide, part);                                                    \
        }                                                                                          \
    }
#define COMBINE_OP(op)                                                                             \
    COMBINE(op, f32, float, float, f32, SAME)                                                      \
    COMBINE(op, bf16, float, uint16_t, f32, dsc_f32_of_bf16)                                       \
    COMBINE(op, f64, double, double, f64, SAME)                                                    \
    COMBINE(op, i32, int32_t, int32_t, i32, SAME)                                                  \
    COMBINE(op, i64, int64_t, int64_t, i64, SAME)                                                  \
    COMBINE_F16(op)
COMBINE_OP(sum)
COMBINE_OP(prod)
COMBINE_OP(min)
COMBINE_OP(max)

/* ---- accumulation ---- */

/* The first addend meets +0.0, not what is in memory. */
#define ACCUMULATE(dtype, src_type, load)                                                          \
    static void NAME(accumulate_##dtype)(float *dst, const void *src, size_t n, bool first) {      \
        const src_type *x = src;                                                                   \
        if (!first) {                                                                              \
            NAME(sum_##dtype)(dst, src, n);                                                        \
            return;                                                                                \
        }                                                                                          \
        DSC_IVDEP                                                                                  \
        for (size_t i = 0; i < n; i++)                                                             \
            dst[i] = dsc_sum_f32(0.0f, load(x[i]));                                                \
    }
ACCUMULATE(f32, float, SAME)
ACCUMULATE(bf16, uint16_t, dsc_f32_of_bf16)

static void NAME(accumulate_f16)(float *dst, const void *src, size_t n, bool first) {
    if (first) {
        const uint16_t *x = src;
        for (size_t at = 0; at < n; at += CHUNK) { /* the second pass finds the part in L1 */
            size_t part = dsc_min(CHUNK, n - at);
            widen_f16(dst + at, x + at, part);
            NAME(accumulate_f32)(dst + at, dst + at, part, true);
        }
    } else {
        NAME(sum_f16)(dst, src, n);
    }
}

/* ---- finite? ---- */

#define FINITE(dtype, bits_type)                                                                   \
    static bool NAME(is_finite_##dtype)(const void *src, size_t n) {                               \
        const bits_type *x = src;                                                                  \
        bits_type any = 0;                                                                         \
        for (size_t i = 0; i < n; i++)                                                             \
            any |= dsc_nonfinite_##dtype(x[i]);                                                    \
        return !(any >> (8 * sizeof any - 1));                                                     \
    }                                                                                              \
    static bool NAME(copy_finite_##dtype)(void *dst, const void *src, size_t n) {                  \
        const bits_type *x = src;                                                                  \
        bits_type *y = dst, any = 0;                                                               \
        DSC_IVDEP                                                                                  \
        for (size_t i = 0; i < n; i++) {                                                           \
            y[i] = x[i];                                                                           \
            any |= dsc_nonfinite_##dtype(x[i]);                                                    \
        }                                                                                          \
        return !(any >> (8 * sizeof any - 1));                                                     \
    }
FINITE(f32, uint32_t)
FINITE(bf16, uint16_t)
FINITE(f16, uint16_t)

/* ---- norm ---- */

/* A vector type, because sums in an array go through memory in every round (gcc 12: 40 instead of
 * 54 GB/s from L2 with AVX-512, 44 instead of 58 with AVX2). */
typedef double NAME(doubles) __attribute__((vector_size(VECTOR_BYTES)));

enum { NAME(WIDTH) = VECTOR_BYTES / (int)sizeof(double), NAME(N_SUMS) = DSC_LANES / NAME(WIDTH) };

/* One element for each lane. */
static inline __attribute__((always_inline)) void
NAME(add_squares)(NAME(doubles) sums[NAME(N_SUMS)], const float x[DSC_LANES]) {
    for (int k = 0; k < NAME(N_SUMS); k++) {
        NAME(doubles) wide; /* element by element: gcc makes one conversion of it */
        for (int j = 0; j < NAME(WIDTH); j++)
            wide[j] = (double)x[k * NAME(WIDTH) + j];
        sums[k] += wide * wide;
    }
}

/* The sum of all lanes, after what fills no whole round of them. */
static double NAME(end_squares)(const NAME(doubles) sums[NAME(N_SUMS)], const float *rest,
                                size_t n) {
    double lane[DSC_LANES];
    memcpy(lane, sums, sizeof lane);
    for (size_t i = 0; i < n; i++)
        lane[i] += (double)rest[i] * (double)rest[i];
    return dsc_sum_lanes(lane);
}

static double NAME(sum_squares)(const float *x, size_t n) {
    NAME(doubles) sums[NAME(N_SUMS)] = {{0}};
    size_t whole = n - n % DSC_LANES;
    for (size_t i = 0; i < whole; i += DSC_LANES)
        NAME(add_squares)(sums, x + i);
    return NAME(end_squares)(sums, x + whole, n - whole);
}

/* ---- mixture of experts ---- */

static void NAME(add_weighted)(float *acc, const float *x, float weight, size_t n, bool first) {
    if (first) {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            acc[i] = dsc_one_nan(weight * x[i]);
    } else {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            acc[i] = dsc_one_nan(acc[i] + weight * x[i]);
    }
}

typedef float NAME(floats) __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

static void NAME(add_weighted_rows)(float *acc, const float *x, size_t stride, const float *weights,
                                    size_t n_rows, size_t n) {
    enum { WIDTH = VECTOR_BYTES / (int)sizeof(float), BLOCK = 4 * WIDTH };
    size_t at = 0;
    for (; n_rows && at + BLOCK <= n; at += BLOCK) {
        NAME(floats) *out = (NAME(floats) *)(void *)(acc + at);
        NAME(floats) a = out[0], b = out[1], c = out[2], d = out[3];
        for (size_t r = 0; r < n_rows; r++) {
            const NAME(floats) *row = (const NAME(floats) *)(const void *)(x + r * stride + at);
            a += row[0] * weights[r];
            b += row[1] * weights[r];
            c += row[2] * weights[r];
            d += row[3] * weights[r];
        }
        out[0] = a;
        out[1] = b;
        out[2] = c;
        out[3] = d;
        for (size_t i = at; i < at + BLOCK; i++)
            acc[i] = dsc_one_nan(acc[i]);
    }
    for (size_t r = 0; r < n_rows; r++)
        NAME(add_weighted)(acc + at, x + r * stride + at, weights[r], n - at, false);
}

/* Several rows at once: one alone would wait for its own sums. */
enum { ROWS_AT_ONCE = 4, LANE_VECTORS = DSC_LANES * (int)sizeof(float) / VECTOR_BYTES };

static inline __attribute__((always_inline)) void NAME(dot_some)(float *out, const float *x,
                                                                 const float *rows, size_t stride,
                                                                 size_t n_rows, size_t n) {
    NAME(floats) sums[ROWS_AT_ONCE][LANE_VECTORS] = {{{0}}};
    size_t whole = n - n % DSC_LANES;
    for (size_t i = 0; i < whole; i += DSC_LANES) {
        const NAME(floats) *a = (const NAME(floats) *)(const void *)(x + i);
        for (size_t r = 0; r < n_rows; r++) {
            const NAME(floats) *b = (const NAME(floats) *)(const void *)(rows + r * stride + i);
            for (int k = 0; k < LANE_VECTORS; k++)
                sums[r][k] += a[k] * b[k];
        }
    }
    for (size_t r = 0; r < n_rows; r++) {
        float lane[DSC_LANES];
        memcpy(lane, sums[r], sizeof lane);
        for (size_t i = whole; i < n; i++)
            lane[i - whole] += x[i] * rows[r * stride + i];
        out[r] = dsc_sum_lanes_f32(lane);
    }
}

static void NAME(dot_rows)(float *out, const float *x, const float *rows, size_t stride,
                           size_t n_rows, size_t n) {
    size_t r = 0;
    for (; r + ROWS_AT_ONCE <= n_rows; r += ROWS_AT_ONCE)
        NAME(dot_some)(out + r, x, rows + r * stride, stride, ROWS_AT_ONCE, n);
    for (; r < n_rows; r++)
        NAME(dot_some)(out + r, x, rows + r * stride, stride, 1, n);
}

/* The exponentials of all rows are one loop: a row is often shorter than a vector. */
static void NAME(softmax)(float *out, const float *x, size_t n_rows, size_t n) {
    for (size_t r = 0; r < n_rows; r++)
        dsc_softmax_shift(out + r * n, x + r * n, n);
    DSC_IVDEP
    for (size_t i = 0; i < n_rows * n; i++)
        out[i] = dsc_exp_of_negative(out[i]);
    for (size_t r = 0; r < n_rows; r++)
        dsc_softmax_scale(out + r * n, n);
}

/* ---- optimizers ---- */

static void NAME(adam)(float *p, float *m, float *v, const float *grad, size_t n,
                       const struct dsc_adam *hyper) {
    const struct dsc_adam h = *hyper; /* a copy that no store can change */
    if (h.decay == 0.0f) {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            dsc_adam_step(&p[i], &m[i], &v[i], grad[i], &h, DSC_DECAY_NONE);
    } else if (h.decoupled) {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            dsc_adam_step(&p[i], &m[i], &v[i], grad[i], &h, DSC_DECAY_DECOUPLED);
    } else {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            dsc_adam_step(&p[i], &m[i], &v[i], grad[i], &h, DSC_DECAY_L2);
    }
}

static void NAME(sgd)(float *p, float *buf, const float *grad, size_t n,
                      const struct dsc_sgd *hyper) {
    const struct dsc_sgd h = *hyper;
    if (h.momentum == 0.0f) {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            dsc_sgd_step(&p[i], grad[i], &h);
    } else {
        DSC_IVDEP
        for (size_t i = 0; i < n; i++)
            dsc_sgd_momentum_step(&p[i], &buf[i], grad[i], &h);
    }
}

/* A rule with and without its decay term: the choice stands outside the loop. */
#define WITH_DECAY(decay, statement)                                                               \
    if ((decay) != 0.0f) {                                                                         \
        DSC_IVDEP                                                                                  \
        for (size_t i = 0; i < n; i++)                                                             \
            statement(true);                                                                       \
    } else {                                                                                       \
        DSC_IVDEP                                                                                  \
        for (size_t i = 0; i < n; i++)                                                             \
            statement(false);                                                                      \
    }

static void NAME(adagrad)(float *p, float *sum, const float *grad, size_t n,
                          const struct dsc_adagrad *hyper) {
    const struct dsc_adagrad h = *hyper;
#define STEP(decays) dsc_adagrad_step(&p[i], &sum[i], grad[i], &h, decays)
    WITH_DECAY(h.weight_decay, STEP)
#undef STEP
}

static void NAME(lion)(float *p, float *m, const float *grad, size_t n,
                       const struct dsc_lion *hyper) {
    const struct dsc_lion h = *hyper;
#define STEP(decays) dsc_lion_step(&p[i], &m[i], grad[i], &h, decays)
    WITH_DECAY(h.decay, STEP)
#undef STEP
}

/* The squares are taken on the way: in a loop of their own they would leave the memory idle. */
static inline __attribute__((always_inline)) void
NAME(lamb_moments_of)(float *m, float *v, const float *p, const float *grad, size_t n,
                      const struct dsc_lamb *h, bool decays, double squares[2]) {
    NAME(doubles) of_p[NAME(N_SUMS)] = {{0}}, of_u[NAME(N_SUMS)] = {{0}};
    size_t whole = n - n % DSC_LANES;
    float u[DSC_LANES];
    for (size_t at = 0; at < whole; at += DSC_LANES) {
        DSC_IVDEP
        for (size_t i = 0; i < DSC_LANES; i++)
            u[i] = dsc_lamb_moments(p[at + i], &m[at + i], &v[at + i], grad[at + i], h, decays);
        NAME(add_squares)(of_p, p + at);
        NAME(add_squares)(of_u, u);
    }
    for (size_t i = whole; i < n; i++)
        u[i - whole] = dsc_lamb_moments(p[i], &m[i], &v[i], grad[i], h, decays);
    squares[0] = NAME(end_squares)(of_p, p + whole, n - whole);
    squares[1] = NAME(end_squares)(of_u, u, n - whole);
}

static void NAME(lamb_moments)(float *m, float *v, const float *p, const float *grad, size_t n,
                               const struct dsc_lamb *hyper, double squares[2]) {
    const struct dsc_lamb h = *hyper;
    if (h.decay != 0.0f)
        NAME(lamb_moments_of)(m, v, p, grad, n, &h, true, squares);
    else
        NAME(lamb_moments_of)(m, v, p, grad, n, &h, false, squares);
}

static void NAME(lamb_step)(float *p, const float *m, const float *v, size_t n, float step,
                            const struct dsc_lamb *hyper) {
    const struct dsc_lamb h = *hyper;
#define STEP(decays) dsc_lamb_step(&p[i], m[i], v[i], step, &h, decays)
    WITH_DECAY(h.decay, STEP)
#undef STEP
}

/* ---- the table ---- */

#define TRAIN_ROW(op)                                                                              \
    { [DSC_F32] = NAME(op##_f32), [DSC_BF16] = NAME(op##_bf16), [DSC_F16] = NAME(op##_f16) }
#define OP_ROW(dtype)                                                                              \
    {                                                                                              \
        [DSC_SUM] = NAME(sum_##dtype), [DSC_AVG] = NAME(sum_##dtype),                              \
        [DSC_MIN] = NAME(min_##dtype), [DSC_MAX] = NAME(max_##dtype),                              \
        [DSC_PROD] = NAME(prod_##dtype)                                                            \
    }

const struct dsc_kernels NAME(dsc__kernels) = {
    .name = TEXT(TIER),
    .accumulate = TRAIN_ROW(accumulate),
    .to_f32 = TRAIN_ROW(to_f32),
    .from_f32 = {[DSC_F32] = NAME(copy_f32),
                 [DSC_BF16] = NAME(from_f32_bf16),
                 [DSC_F16] = NAME(from_f32_f16)},
    .copy_finite = TRAIN_ROW(copy_finite),
    .is_finite = TRAIN_ROW(is_finite),
    .sum_squares = NAME(sum_squares),
    .add_weighted = NAME(add_weighted),
    .add_weighted_rows = NAME(add_weighted_rows),
    .dot_rows = NAME(dot_rows),
    .softmax = NAME(softmax),
    .crc32c = crc32c,
    .adam = NAME(adam),
    .sgd = NAME(sgd),
    .adagrad = NAME(adagrad),
    .lion = NAME(lion),
    .lamb_moments = NAME(lamb_moments),
    .lamb_step = NAME(lamb_step),
    .combine = {[DSC_F32] = OP_ROW(f32),
                [DSC_BF16] = OP_ROW(bf16),
                [DSC_F16] = OP_ROW(f16),
                [DSC_F64] = OP_ROW(f64),
                [DSC_I32] = OP_ROW(i32),
                [DSC_I64] = OP_ROW(i64)},
};
