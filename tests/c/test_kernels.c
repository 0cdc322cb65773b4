/* Kernels: each operation against a slow reference, and every tier against the scalar one, bit for
 * bit. */
#define _GNU_SOURCE
#include "kernels/kernels.h"
#include "kernels/bits.h"

#include "case.h"
#include "fpenv.h"
#include "random.h"

#include <float.h>
#include <math.h>

/* ---- inputs ---- */

/* An ordinary value, a special one (zeros, infinities, NaNs quiet and signalling with payloads,
 * smallest and largest numbers), or any bits. */
static uint64_t random_bits(enum dsc_dtype dtype) {
    static const uint32_t f32[] = {0,          0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000,
                                   0xFFC12345, 0x7F800001, 0xFFA00001, 1,          0x807FFFFF,
                                   0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000};
    static const uint16_t f16[] = {0,      0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01,
                                   0xFD55, 1,      0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00};
    uint64_t random = next_random();
    unsigned kind = (unsigned)(random & 7), pick = (unsigned)(random >> 8) % 14;
    float ordinary = (float)((int64_t)(random >> 40) - (1 << 23)) * 0x1p-20f;
    uint64_t bits = next_random();
    if (dtype == DSC_I32 || dtype == DSC_I64)
        return bits;
    if (dtype == DSC_F16)
        return kind == 0 ? f16[pick] : kind == 1 ? bits & 0xFFFF : (random >> 48 & 0x83FF) | 0x3800;
    if (dtype == DSC_F64) {
        double wide = kind == 0 ? (double)dsc_f32_of_bits(f32[pick]) : (double)ordinary;
        uint64_t wide_bits;
        memcpy(&wide_bits, &wide, sizeof wide_bits);
        return kind == 1 ? bits : wide_bits;
    }
    uint32_t narrow = kind == 0   ? f32[pick]
                      : kind == 1 ? (uint32_t)bits
                                  : dsc_bits_of_f32(ordinary);
    return dtype == DSC_BF16 ? narrow >> 16 : narrow;
}

static void fill(void *buffer, enum dsc_dtype dtype, size_t n) {
    size_t size = dsc_dtype_size(dtype);
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = random_bits(dtype);
        memcpy((char *)buffer + i * size, &bits, size); /* little-endian */
    }
}

/* ---- every operation in one shape: a, b, c change, `in` is read, a value comes back ---- */

struct arrays {
    void *a, *b, *c;
    const void *in;
};

static uint64_t run_accumulate(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                               int variant) {
    k->accumulate[dtype](x.a, x.in, n, variant);
    return 0;
}
static uint64_t run_to_f32(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                           int variant) {
    (void)variant;
    k->to_f32[dtype](x.a, x.in, n);
    return 0;
}
static uint64_t run_from_f32(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                             int variant) {
    (void)variant;
    k->from_f32[dtype](x.a, x.in, n);
    return 0;
}
static uint64_t run_finite(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                           int variant) {
    return variant ? k->copy_finite[dtype](x.a, x.in, n) : k->is_finite[dtype](x.in, n);
}
static uint64_t run_sum_squares(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                                int variant) {
    (void)dtype;
    (void)variant;
    double sum = k->sum_squares(x.in, n);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    return bits;
}
static uint64_t run_add_weighted(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                                 int variant) {
    (void)dtype;
    k->add_weighted(x.a, x.in, 0.37f, n, variant);
    return 0;
}
/* Variants: no, one, three rows, which overlap. */
static uint64_t run_add_weighted_rows(const struct dsc_kernels *k, struct arrays x, size_t n,
                                      int dtype, int variant) {
    static const float weights[] = {0.37f, -2.0f, 1e-3f};
    size_t n_rows = variant == 2 ? 3 : (size_t)variant;
    (void)dtype;
    k->add_weighted_rows(x.a, x.in, n / 3, weights, n_rows, n - n / 3 * 2);
    return 0;
}
/* One to nine rows, which overlap. */
static uint64_t run_dot_rows(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                             int variant) {
    (void)dtype;
    if (n >= 9)
        k->dot_rows(x.a, x.b, x.in, n / 9, (size_t)variant + 1, n / 9);
    return 0;
}
/* Variants: one row; rows of one, three and eight elements. */
static uint64_t run_softmax(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                            int variant) {
    static const size_t row[] = {0, 1, 3, 8};
    (void)dtype;
    k->softmax(x.a, x.in, variant ? n / row[variant] : 1, variant ? row[variant] : n);
    return 0;
}
static struct dsc_adam adam_hyper(int variant) {
    return (struct dsc_adam){.grad_scale = 0.37f,
                             .step_size = 1e-3f,
                             .beta1 = 0.9f,
                             .one_minus_beta1 = 0.1f,
                             .beta2 = 0.999f,
                             .one_minus_beta2 = 0.001f,
                             .inv_sqrt_c2 = 1.3f,
                             .eps = 1e-8f,
                             .decay = variant ? 0.01f : 0.0f,
                             .decoupled = variant == 2};
}
static uint64_t run_adam(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                         int variant) {
    struct dsc_adam h = adam_hyper(variant);
    (void)dtype;
    k->adam(x.a, x.b, x.c, x.in, n, &h);
    return 0;
}
/* Bits of variant: momentum, nesterov, first, weight decay. */
static uint64_t run_sgd(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                        int variant) {
    struct dsc_sgd h = {.grad_scale = 0.37f,
                        .lr = 0.01f,
                        .momentum = variant & 1 ? 0.9f : 0.0f,
                        .one_minus_dampening = 0.8f,
                        .weight_decay = variant & 8 ? 0.003f : 0.0f,
                        .nesterov = variant & 2,
                        .first = variant & 4};
    (void)dtype;
    k->sgd(x.a, variant & 1 ? x.b : NULL, x.in, n, &h);
    return 0;
}
/* Bits of variant: weight decay, raw numerator (Adagrad) or eps inside the root (LAMB). */
static uint64_t run_adagrad(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                            int variant) {
    struct dsc_adagrad h = {0.37f, 0.01f, variant & 1 ? 0.003f : 0.0f, 1e-10f, variant & 2};
    (void)dtype;
    k->adagrad(x.a, x.b, x.in, n, &h);
    return 0;
}
static uint64_t run_lion(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                         int variant) {
    struct dsc_lion h = {0.37f, 0.01f, 0.9f, 0.1f, 0.99f, 0.01f, variant ? 0.003f : 0.0f};
    (void)dtype;
    k->lion(x.a, x.b, x.in, n, &h);
    return 0;
}
static struct dsc_lamb lamb_hyper(int variant) {
    return (struct dsc_lamb){
        0.37f, 0.9f, 0.1f, 0.999f, 0.001f, 1e-6f, variant & 1 ? 0.01f : 0.0f, variant & 2};
}
static uint64_t run_lamb_moments(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                                 int variant) {
    struct dsc_lamb h = lamb_hyper(variant);
    double squares[2];
    uint64_t bits[2];
    (void)dtype;
    k->lamb_moments(x.a, x.b, x.c, x.in, n, &h, squares);
    memcpy(bits, squares, sizeof bits);
    return bits[0] * 31 + bits[1];
}
static uint64_t run_lamb_step(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                              int variant) {
    struct dsc_lamb h = lamb_hyper(variant);
    (void)dtype;
    k->lamb_step(x.a, x.in, x.c, n, 0.01f, &h);
    return 0;
}
static uint64_t run_combine(const struct dsc_kernels *k, struct arrays x, size_t n, int dtype,
                            int variant) {
    k->combine[dtype][variant](x.a, x.in, n);
    return 0;
}

enum { OF_DTYPE = DSC_DTYPE_COUNT, OF_ACC };
static const struct operation {
    const char *name;
    uint64_t (*run)(const struct dsc_kernels *, struct arrays, size_t, int, int);
    int out, in; /* dtype of a (and b, c), and of in */
    int n_dtypes, n_variants;
} operations[] = {
    {"accumulate", run_accumulate, DSC_F32, OF_DTYPE, DSC_TRAIN_DTYPE_COUNT, 2},
    {"to_f32", run_to_f32, DSC_F32, OF_DTYPE, DSC_TRAIN_DTYPE_COUNT, 1},
    {"from_f32", run_from_f32, OF_DTYPE, DSC_F32, DSC_TRAIN_DTYPE_COUNT, 1},
    {"finite", run_finite, OF_DTYPE, OF_DTYPE, DSC_TRAIN_DTYPE_COUNT, 2},
    {"sum_squares", run_sum_squares, DSC_F32, DSC_F32, 1, 1},
    {"add_weighted", run_add_weighted, DSC_F32, DSC_F32, 1, 2},
    {"add_weighted_rows", run_add_weighted_rows, DSC_F32, DSC_F32, 1, 3},
    {"dot_rows", run_dot_rows, DSC_F32, DSC_F32, 1, 9},
    {"softmax", run_softmax, DSC_F32, DSC_F32, 1, 4},
    {"adam", run_adam, DSC_F32, DSC_F32, 1, 3},
    {"sgd", run_sgd, DSC_F32, DSC_F32, 1, 16},
    {"adagrad", run_adagrad, DSC_F32, DSC_F32, 1, 4},
    {"lion", run_lion, DSC_F32, DSC_F32, 1, 2},
    {"lamb_moments", run_lamb_moments, DSC_F32, DSC_F32, 1, 4},
    {"lamb_step", run_lamb_step, DSC_F32, DSC_F32, 1, 4},
    {"combine", run_combine, OF_ACC, OF_DTYPE, DSC_REDUCE_DTYPE_COUNT, DSC_OP_COUNT},
};

static enum dsc_dtype dtype_of(int kind, int dtype) {
    if (kind == OF_ACC)
        return dtype == DSC_BF16 || dtype == DSC_F16 ? DSC_F32 : (enum dsc_dtype)dtype;
    return kind == OF_DTYPE ? (enum dsc_dtype)dtype : (enum dsc_dtype)kind;
}

/* ---- tier against tier ---- */

enum { MAX_N = 20011, ROOM = (MAX_N + 64) * 8 };
struct memory {
    _Alignas(64) char a[ROOM], b[ROOM], c[ROOM], in[ROOM];
};
static struct memory start, scalar_end, tier_end;

/* Bytes of each array that a run may touch, and a margin in which a write outside shows. */
static size_t room_of(size_t offset, size_t n) {
    return (offset + n + 32) * 8;
}

static uint64_t run_in(struct memory *memory, const struct dsc_kernels *kernels,
                       const struct operation *op, size_t offset, size_t n, int dtype,
                       int variant) {
    size_t out_at = offset * dsc_dtype_size(dtype_of(op->out, dtype));
    struct arrays x = {memory->a + out_at, memory->b + out_at, memory->c + out_at,
                       memory->in + offset * dsc_dtype_size(dtype_of(op->in, dtype))};
    size_t room = room_of(offset, n);
    memcpy(memory->a, start.a, room);
    memcpy(memory->b, start.b, room);
    memcpy(memory->c, start.c, room);
    memcpy(memory->in, start.in, room);
    return op->run(kernels, x, n, dtype, variant);
}

static bool ends_agree(size_t offset, size_t n) {
    size_t room = room_of(offset, n);
    return memcmp(scalar_end.a, tier_end.a, room) == 0 &&
           memcmp(scalar_end.b, tier_end.b, room) == 0 &&
           memcmp(scalar_end.c, tier_end.c, room) == 0 &&
           memcmp(scalar_end.in, tier_end.in, room) == 0;
}

static void compare(const struct dsc_kernels *tier, const struct operation *op, size_t offset,
                    size_t n, int dtype, int variant) {
    uint64_t expected =
        run_in(&scalar_end, dsc_kernels_tier("scalar"), op, offset, n, dtype, variant);
    uint64_t got = run_in(&tier_end, tier, op, offset, n, dtype, variant);
    if (expected != got || !ends_agree(offset, n)) {
        fprintf(stderr, "%s: %s, dtype %d, variant %d, n %zu, offset %zu: not scalar's bits\n",
                tier->name, op->name, dtype, variant, n, offset);
        exit(1);
    }
}

static void compare_all(size_t offset, size_t n) {
    for (size_t o = 0; o < sizeof operations / sizeof *operations; o++) {
        const struct operation *op = &operations[o];
        for (int dtype = 0; dtype < op->n_dtypes; dtype++) {
            fill(start.a, dtype_of(op->out, dtype), MAX_N);
            fill(start.b, DSC_F32, MAX_N);
            fill(start.c, DSC_F32, MAX_N);
            fill(start.in, dtype_of(op->in, dtype), MAX_N);
            for (int variant = 0; variant < op->n_variants; variant++)
                for (const char *const *name = dsc_kernels_tiers(); *name; name++)
                    compare(dsc_kernels_tier(*name), op, offset, n, dtype, variant);
        }
    }
}

static void tiers_agree_bit_for_bit_at_all_short_sizes(void) {
    static const size_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        compare_all(0, sizes[i]);
}
static void tiers_agree_bit_for_bit_at_long_sizes(void) {
    static const size_t sizes[] = {511, 512, 513, 1023, 1024, 1025, 4096, MAX_N};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        compare_all(0, sizes[i]);
}
static void tiers_agree_bit_for_bit_off_alignment(void) {
    for (size_t offset = 1; offset < 17; offset += 3)
        compare_all(offset, 1025 + offset);
}

/* Finite input in every place and one bad element in every place of three vectors. */
static void one_bad_element_is_found_wherever_it_is(void) {
    static const uint16_t bad[DSC_TRAIN_DTYPE_COUNT][3] = {
        {0x7F80, 0xFF80, 0x7FC0}, {0x7F80, 0xFF80, 0xFFFF}, {0x7C00, 0xFC00, 0x7C01}};
    static uint16_t largest[DSC_TRAIN_DTYPE_COUNT] = {0, 0xFF7F, 0xFBFF};
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        const struct dsc_kernels *k = dsc_kernels_tier(*name);
        for (int dtype = 0; dtype < DSC_TRAIN_DTYPE_COUNT; dtype++) {
            size_t size = dsc_dtype_size((enum dsc_dtype)dtype);
            for (size_t n = 1; n < 200; n++) {
                uint32_t good = dtype == DSC_F32 ? 0xFF7FFFFF : largest[dtype];
                for (size_t i = 0; i < n; i++)
                    memcpy(start.in + i * size, &good, size);
                CHECK(k->is_finite[dtype](start.in, n));
                CHECK(k->copy_finite[dtype](start.a, start.in, n));
                uint32_t one = bad[dtype][n % 3];
                one = dtype == DSC_F32 ? one << 16 : one;
                memcpy(start.in + next_random() % n * size, &one, size);
                CHECK(!k->is_finite[dtype](start.in, n));
                CHECK(!k->copy_finite[dtype](start.a, start.in, n));
                CHECK(memcmp(start.a, start.in, n * size) == 0); /* complete all the same */
            }
        }
    }
}

/* ---- arithmetic against a slow reference ---- */

static float one_nan(float x) {
    return isnan(x) ? dsc_f32_of_bits(0x7FC00000) : x;
}

static void accumulation_starts_at_plus_zero_and_stores_one_nan(void) {
    float x[] = {
        -0.0f, 0.0f, 1.5f, dsc_f32_of_bits(0xFF812345), INFINITY, -INFINITY, dsc_f32_of_bits(1)};
    float dst[7];
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        const struct dsc_kernels *k = dsc_kernels_tier(*name);
        memset(dst, 0xFF, sizeof dst); /* must not be read */
        k->accumulate[DSC_F32](dst, x, 7, true);
        for (int i = 0; i < 7; i++)
            CHECK_EQ_INT(dsc_bits_of_f32(dst[i]), dsc_bits_of_f32(one_nan(0.0f + x[i])));
        CHECK_EQ_INT(dsc_bits_of_f32(dst[0]), 0);
        float minus[] = {INFINITY, 1, -1.5f, 2, -INFINITY, -INFINITY, dsc_f32_of_bits(2)};
        k->accumulate[DSC_F32](dst, minus, 7, false);
        CHECK_EQ_INT(dsc_bits_of_f32(dst[3]), 0x7FC00000);
        CHECK_EQ_INT(dsc_bits_of_f32(dst[4]), 0x7FC00000);
        CHECK_EQ_INT(dsc_bits_of_f32(dst[2]), 0);
        CHECK_EQ_INT(dsc_bits_of_f32(dst[6]), 3);
    }
}

static void sum_of_squares_is_sixteen_lanes_and_a_tree(void) {
    static float x[5000];
    for (size_t n = 0; n < 5000; n += 1 + n / 3) {
        volatile double lane[16] = {0};
        for (size_t i = 0; i < n; i++) {
            x[i] = ldexpf((float)(int32_t)next_random(), (int)(next_random() % 60) - 60);
            volatile double square = (double)x[i] * (double)x[i];
            lane[i % 16] = lane[i % 16] + square;
        }
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; i++)
                lane[i] = lane[i] + lane[i + half];
        for (const char *const *name = dsc_kernels_tiers(); *name; name++)
            CHECK(dsc_kernels_tier(*name)->sum_squares(x, n) == lane[0]);
    }
}

static void sum_of_squares_of_extremes_neither_overflows_nor_vanishes(void) {
    float large[] = {FLT_MAX, -FLT_MAX}, small[] = {dsc_f32_of_bits(1)}, nans[] = {1, -NAN, 2};
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        const struct dsc_kernels *k = dsc_kernels_tier(*name);
        CHECK(k->sum_squares(large, 2) == 2 * ((double)FLT_MAX * (double)FLT_MAX));
        CHECK(k->sum_squares(small, 1) == 0x1p-298);
        CHECK(isnan(k->sum_squares(nans, 3)));
        CHECK(k->sum_squares(NULL, 0) == 0.0);
    }
}

/* Each operation rounds by itself: a fused or reordered one would give other bits. */
static void adam_rounds_every_operation_in_the_order_of_its_formula(void) {
    for (int i = 0; i < 20000; i++) {
        int variant = i % 3;
        struct dsc_adam h = adam_hyper(variant);
        float p = (float)(int32_t)next_random() * 0x1p-31f,
              m = (float)(int32_t)next_random() * 0x1p-35f;
        float v = (float)(uint32_t)next_random() * 0x1p-45f,
              x = (float)(int32_t)next_random() * 0x1p-33f;
        volatile float g = x * h.grad_scale, t, u, m1, v1, step;
        if (variant == 1) {
            t = h.decay * p;
            g = g + t;
        }
        t = h.beta1 * m, u = h.one_minus_beta1 * g;
        m1 = t + u;
        t = h.one_minus_beta2 * g;
        t = t * g, u = h.beta2 * v;
        v1 = u + t;
        t = sqrtf(v1);
        t = t * h.inv_sqrt_c2;
        t = t + h.eps, u = h.step_size * m1;
        step = u / t;
        if (variant == 2) {
            t = h.decay * p;
            step = step + t;
        }
        float expected = p - step;
        dsc_kernels_tier("scalar")->adam(&p, &m, &v, &x, 1, &h);
        CHECK(p == expected && m == m1 && v == v1);
    }
}

static void adam_is_within_ulps_of_double_arithmetic(void) {
    for (int i = 0; i < 20000; i++) {
        int variant = i % 3;
        struct dsc_adam h = adam_hyper(variant);
        float p = (float)(int32_t)next_random() * 0x1p-31f,
              m = (float)(int32_t)next_random() * 0x1p-35f;
        float v = (float)(uint32_t)next_random() * 0x1p-45f,
              x = (float)(int32_t)next_random() * 0x1p-33f;
        double decay = variant ? (double)h.decay * p : 0.0;
        double g = (double)x * h.grad_scale + (variant == 1 ? decay : 0.0);
        double m1 = (double)h.beta1 * m + (double)h.one_minus_beta1 * g;
        double v1 = (double)h.beta2 * v + (double)h.one_minus_beta2 * g * g;
        double step = h.step_size * m1 / (sqrt(v1) * h.inv_sqrt_c2 + h.eps);
        double p1 = p - step - (variant == 2 ? decay : 0.0);
        /* What terms of a sum lose in rounding counts by their size, also where they cancel. */
        double m_terms =
            fabs((double)h.beta1 * m) + 0.1 * (fabs((double)x * h.grad_scale) + fabs(decay));
        double slack = 4 * FLT_EPSILON;
        dsc_kernels()->adam(&p, &m, &v, &x, 1, &h);
        CHECK(fabs(m - m1) <= slack * m_terms);
        if (variant != 1) { /* with L2, g itself may cancel */
            CHECK(fabs(v - v1) <= slack * v1);
            CHECK(fabs(p - p1) <=
                  slack * (fabs(p1) + fabs(decay) + fabs(step) * (1 + m_terms / fabs(m1))));
        }
    }
}

/* Two NaNs that meet have payloads and signs; what is stored has neither. */
static void optimizers_store_one_nan_whatever_came_in(void) {
    float nans[16], p[16], m[16], v[16], wild[16];
    struct dsc_sgd sgd = {.grad_scale = 1, .lr = 0.1f, .momentum = 0.9f, .one_minus_dampening = 1};
    for (uint32_t i = 0; i < 16; i++)
        nans[i] = dsc_f32_of_bits((i & 1 ? 0xFFC00000 : 0x7FC00000) | (i + 1));
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        struct dsc_adam adam = adam_hyper(2);
        memcpy(p, nans, sizeof p);
        memcpy(m, nans + 3, 13 * sizeof *m), memcpy(m + 13, nans, 3 * sizeof *m);
        memcpy(v, nans + 5, 11 * sizeof *v), memcpy(v + 11, nans, 5 * sizeof *v);
        memcpy(wild, nans + 7, 9 * sizeof *wild), memcpy(wild + 9, nans, 7 * sizeof *wild);
        dsc_kernels_tier(*name)->adam(p, m, v, wild, 16, &adam);
        for (int i = 0; i < 16; i++)
            CHECK(dsc_bits_of_f32(p[i]) == 0x7FC00000 && dsc_bits_of_f32(m[i]) == 0x7FC00000 &&
                  dsc_bits_of_f32(v[i]) == 0x7FC00000);
        memcpy(p, nans, sizeof p);
        memcpy(m, wild, sizeof m);
        dsc_kernels_tier(*name)->sgd(p, m, wild, 16, &sgd);
        for (int i = 0; i < 16; i++)
            CHECK(dsc_bits_of_f32(p[i]) == 0x7FC00000 && dsc_bits_of_f32(m[i]) == 0x7FC00000);
        memcpy(p, nans, sizeof p);
        sgd.momentum = 0;
        dsc_kernels_tier(*name)->sgd(p, NULL, wild, 16, &sgd);
        sgd.momentum = 0.9f;
        for (int i = 0; i < 16; i++)
            CHECK(dsc_bits_of_f32(p[i]) == 0x7FC00000);
    }
}

static void sgd_follows_its_formula(void) {
    for (int variant = 0; variant < 16; variant++) {
        for (int i = 0; i < 500; i++) {
            float p = (float)(int32_t)next_random() * 0x1p-31f,
                  buf = (float)(int32_t)next_random() * 0x1p-31f;
            float x = (float)(int32_t)next_random() * 0x1p-31f;
            volatile float g = x * 0.37f, t, u, b = buf;
            if (variant & 8) {
                t = 0.003f * p;
                g = g + t;
            }
            if (variant & 1) {
                t = 0.9f * b, u = 0.8f * g;
                b = variant & 4 ? g : t + u;
                t = 0.9f * b;
                g = variant & 2 ? g + t : b;
            }
            t = 0.01f * g;
            float expected = p - t;
            struct arrays arrays = {&p, &buf, NULL, &x};
            run_sgd(dsc_kernels_tier("scalar"), arrays, 1, DSC_F32, variant);
            CHECK(p == expected && buf == b);
        }
    }
}

static void adagrad_and_lion_follow_their_formulas(void) {
    for (int i = 0; i < 4000; i++) {
        float p = (float)(int32_t)next_random() * 0x1p-31f, q = p;
        float m = (float)(int32_t)next_random() * 0x1p-31f, sum = fabsf(m);
        float x = i % 7 ? (float)(int32_t)next_random() * 0x1p-31f : 0.0f;
        if (i % 7 == 0)
            m = 0;
        volatile float raw = x * 0.37f, t = 0.003f * p, u, g = i & 1 ? raw + t : raw;
        t = g * g;
        volatile float s = sum + t, root = sqrtf(s) + 1e-10f, step = 0.01f * (i & 2 ? raw : g);
        step = step / root;
        float p_adagrad = p - step;
        t = 0.9f * m, u = 0.1f * raw;
        t = t + u;
        step = t > 0 ? 0.01f : t < 0 ? -0.01f : 0.0f;
        u = 0.003f * q;
        if (i & 1)
            step = step + u;
        float p_lion = q - step;
        t = 0.99f * m, u = 0.01f * raw;
        volatile float m_lion = t + u;
        run_adagrad(dsc_kernels_tier("scalar"), (struct arrays){&p, &sum, NULL, &x}, 1, DSC_F32,
                    i & 3);
        run_lion(dsc_kernels_tier("scalar"), (struct arrays){&q, &m, NULL, &x}, 1, DSC_F32, i & 1);
        CHECK(p == p_adagrad && sum == s && q == p_lion && m == m_lion);
    }
}

static void sums_over_rows_are_those_of_one_row_after_the_other(void) {
    enum { ROWS = 6, WIDTH = 83, STRIDE = 90 };
    float x[ROWS * STRIDE], weights[ROWS], acc[WIDTH], expected[WIDTH], dots[ROWS];
    for (int i = 0; i < ROWS * STRIDE; i++)
        x[i] = (float)((int64_t)(next_random() >> 40) - (1 << 23)) * 0x1p-20f;
    for (int r = 0; r < ROWS; r++)
        weights[r] = x[r] + 0.5f;
    for (int i = 0; i < WIDTH; i++)
        acc[i] = expected[i] = x[i * 3];
    dsc_kernels()->add_weighted_rows(acc, x, STRIDE, weights, ROWS, WIDTH);
    for (int r = 0; r < ROWS; r++)
        dsc_kernels()->add_weighted(expected, x + r * STRIDE, weights[r], WIDTH, false);
    CHECK(memcmp(acc, expected, sizeof acc) == 0);
    dsc_kernels()->dot_rows(dots, x, x, STRIDE, ROWS, WIDTH);
    for (int r = 0; r < ROWS; r++) {
        float lane[16] = {0};
        for (int i = 0; i < WIDTH; i++)
            lane[i % 16] += x[i] * x[r * STRIDE + i];
        for (int half = 8; half > 0; half /= 2)
            for (int i = 0; i < half; i++)
                lane[i] += lane[i + half];
        CHECK(dots[r] == lane[0]);
    }
}

static void softmax_is_within_ulps_of_double_arithmetic(void) {
    enum { ROWS = 200, WIDTH = 9 };
    static float x[ROWS * WIDTH], got[ROWS * WIDTH];
    for (int i = 0; i < ROWS * WIDTH; i++)
        x[i] = (float)((int64_t)(next_random() >> 40) - (1 << 23)) * 0x1p-20f * (float)(i % 11);
    dsc_kernels()->softmax(got, x, ROWS, WIDTH);
    for (int r = 0; r < ROWS; r++) {
        float top = -INFINITY;
        double sum = 0;
        for (int e = 0; e < WIDTH; e++)
            top = fmaxf(top, x[r * WIDTH + e]);
        for (int e = 0; e < WIDTH; e++)
            sum += exp((double)(x[r * WIDTH + e] - top));
        for (int e = 0; e < WIDTH; e++) {
            double expected = exp((double)(x[r * WIDTH + e] - top)) / sum;
            CHECK(fabs(got[r * WIDTH + e] - expected) <= 4e-7 * expected + 1e-37);
        }
    }
}

static void softmax_of_infinities_is_zero_or_nan(void) {
    float x[] = {0, -INFINITY, 1, INFINITY, 0, 1, NAN, 0, 1, -INFINITY, -INFINITY, -INFINITY};
    dsc_kernels()->softmax(x, x, 4, 3);
    CHECK(x[0] > 0 && x[1] == 0 && x[2] > x[0]);
    for (int i = 3; i < 12; i++)
        CHECK_EQ_INT(dsc_bits_of_f32(x[i]), 0x7FC00000);
}

static void infinite_parameters_without_decay_stay_infinite(void) {
    struct dsc_adam adam = adam_hyper(0);
    struct dsc_sgd sgd = {.grad_scale = 1, .lr = 0.1f};
    struct dsc_lamb lamb = lamb_hyper(0);
    float p = INFINITY, m = 0, v = 0, g = 1;
    run_adagrad(dsc_kernels(), (struct arrays){&p, &m, NULL, &g}, 1, DSC_F32, 0);
    CHECK(p == INFINITY);
    run_lion(dsc_kernels(), (struct arrays){&p, &m, NULL, &g}, 1, DSC_F32, 0);
    CHECK(p == INFINITY);
    dsc_kernels()->lamb_step(&p, &m, &v, 1, 0.1f, &lamb);
    CHECK(p == INFINITY);
    dsc_kernels()->adam(&p, &m, &v, &g, 1, &adam);
    CHECK(p == INFINITY);
    dsc_kernels()->sgd(&p, NULL, &g, 1, &sgd);
    CHECK(p == INFINITY);
}

#define COMBINED(type, dtype, op, a, b)                                                            \
    __extension__({                                                                                \
        type acc_ = (a), src_ = (b);                                                               \
        dsc_kernels_tier(*name)->combine[dtype][op](&acc_, &src_, 1);                              \
        acc_;                                                                                      \
    })

static void combine_wraps_integers_and_propagates_nan(void) {
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        CHECK(COMBINED(int32_t, DSC_I32, DSC_SUM, INT32_MAX, 1) == INT32_MIN);
        CHECK(COMBINED(int64_t, DSC_I64, DSC_SUM, INT64_MAX, 2) == INT64_MIN + 1);
        CHECK(COMBINED(int64_t, DSC_I64, DSC_PROD, (int64_t)1 << 40, (int64_t)1 << 30) == 0);
        CHECK(COMBINED(int64_t, DSC_I64, DSC_MIN, -5, 3) == -5);
        CHECK(COMBINED(int32_t, DSC_I32, DSC_MAX, -5, 3) == 3);
        CHECK(COMBINED(float, DSC_F32, DSC_AVG, 1.5f, 2.0f) == 3.5f);
        CHECK(COMBINED(double, DSC_F64, DSC_PROD, 1.5, -2.0) == -3.0);
        CHECK(COMBINED(float, DSC_F32, DSC_MIN, 1.5f, -2.0f) == -2.0f);
        CHECK(COMBINED(double, DSC_F64, DSC_MAX, 1.5, -2.0) == 1.5);
        for (int op = DSC_SUM; op < DSC_OP_COUNT; op++) {
            CHECK_EQ_INT(dsc_bits_of_f32(COMBINED(float, DSC_F32, op, -NAN, 1.0f)), 0x7FC00000);
            CHECK_EQ_INT(dsc_bits_of_f32(COMBINED(float, DSC_F32, op, 1.0f, -NAN)), 0x7FC00000);
            CHECK(isnan(COMBINED(double, DSC_F64, op, 1.0, NAN)));
            CHECK(isnan(COMBINED(double, DSC_F64, op, NAN, 1.0)));
        }
    }
}

static void combine_of_halves_adds_in_fp32(void) {
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        float acc[2] = {1.0f, 3.0f};
        uint16_t f16[2] = {0x0001, 0xC000},
                 bf16[2] = {0x3F81, 0x4000}; /* 2^-24, -2; 1.0078125, 2 */
        dsc_kernels_tier(*name)->combine[DSC_F16][DSC_SUM](acc, f16, 2);
        CHECK(acc[0] == 1.0f && acc[1] == 1.0f); /* 1 + 2^-24 ties to even */
        dsc_kernels_tier(*name)->combine[DSC_BF16][DSC_PROD](acc, bf16, 2);
        CHECK(acc[0] == 1.0078125f && acc[1] == 2.0f);
        dsc_kernels_tier(*name)->combine[DSC_F16][DSC_MIN](acc, f16, 2);
        CHECK(acc[0] == 0x1p-24f && acc[1] == -2.0f);
    }
}

static void buffers_may_be_the_same(void) {
    float x[70], y[70];
    for (int i = 0; i < 70; i++)
        x[i] = (float)i;
    for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
        const struct dsc_kernels *k = dsc_kernels_tier(*name);
        memcpy(y, x, sizeof y);
        k->accumulate[DSC_F32](y, y, 70, false);
        k->combine[DSC_F32][DSC_SUM](y, y, 70);
        CHECK(k->copy_finite[DSC_F32](y, y, 70));
        k->from_f32[DSC_F32](y, y, 70);
        for (int i = 0; i < 70; i++)
            CHECK(y[i] == 4 * x[i]);
    }
}

/* ---- the floating-point state ---- */

#if defined(__x86_64__)
static void a_caller_that_flushes_or_rounds_otherwise_gets_the_same_bits(void) {
    static const unsigned states[] = {0x9FC0, 0xFFC0, 0x3F80,
                                      0x5F80}; /* FTZ DAZ; + to zero; down; up */
    for (size_t s = 0; s < sizeof states / sizeof *states; s++) {
        for (size_t o = 0; o < sizeof operations / sizeof *operations; o++) {
            const struct operation *op = &operations[o];
            fill(start.a, dtype_of(op->out, 0), MAX_N);
            fill(start.b, DSC_F32, MAX_N);
            fill(start.c, DSC_F32, MAX_N);
            fill(start.in, dtype_of(op->in, 0), MAX_N);
            uint64_t expected = run_in(&scalar_end, dsc_kernels(), op, 0, 1000, 0, 0);
            _mm_setcsr(states[s]);
            uint64_t saved = dsc_fp_enter();
            uint64_t got = run_in(&tier_end, dsc_kernels(), op, 0, 1000, 0, 0);
            dsc_fp_leave(saved);
            CHECK_EQ_INT(_mm_getcsr(), states[s]); /* flags included */
            _mm_setcsr(0x1F80);
            CHECK(expected == got && ends_agree(0, 1000));
        }
    }
}
#endif

/* ---- dispatch ---- */

static void tiers_are_listed_slowest_first_and_the_last_serves(void) {
    const char *const *names = dsc_kernels_tiers();
    size_t n = 0;
    unsetenv("DSC_ISA");
    CHECK(strcmp(names[0], "scalar") == 0);
    for (; names[n]; n++)
        CHECK(strcmp(dsc_kernels_tier(names[n])->name, names[n]) == 0);
    CHECK(dsc_kernels_tier("sse9") == NULL);
    CHECK_OK(dsc_kernels_check());
}
static void without_dsc_isa_the_fastest_tier_serves(void) {
    unsetenv("DSC_ISA");
    const char *name = dsc_kernels()->name, *const *last = dsc_kernels_tiers();
    while (last[1])
        last++;
    CHECK(strcmp(name, *last) == 0);
}
static void dsc_isa_forces_a_tier(void) {
    setenv("DSC_ISA", "scalar", 1);
    CHECK(strcmp(dsc_kernels()->name, "scalar") == 0);
    CHECK_OK(dsc_kernels_check());
}
static void an_unknown_dsc_isa_is_an_error_with_the_choices(void) {
    setenv("DSC_ISA", "avx1024", 1);
    CHECK_EQ_INT(dsc_kernels_check(), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "DSC_ISA=avx1024"));
    CHECK(strstr(dsc_last_error(), "scalar"));
    CHECK(dsc_kernels() != NULL);
}

static const struct test_case cases[] = {
    CASE(an_unknown_dsc_isa_is_an_error_with_the_choices),
    CASE(dsc_isa_forces_a_tier),
    CASE(without_dsc_isa_the_fastest_tier_serves),
    CASE(tiers_are_listed_slowest_first_and_the_last_serves),
    CASE(one_bad_element_is_found_wherever_it_is),
    CASE(accumulation_starts_at_plus_zero_and_stores_one_nan),
    CASE(sum_of_squares_is_sixteen_lanes_and_a_tree),
    CASE(sum_of_squares_of_extremes_neither_overflows_nor_vanishes),
    CASE(adam_rounds_every_operation_in_the_order_of_its_formula),
    CASE(adam_is_within_ulps_of_double_arithmetic),
    CASE(optimizers_store_one_nan_whatever_came_in),
    CASE(sgd_follows_its_formula),
    CASE(adagrad_and_lion_follow_their_formulas),
    CASE(sums_over_rows_are_those_of_one_row_after_the_other),
    CASE(softmax_is_within_ulps_of_double_arithmetic),
    CASE(softmax_of_infinities_is_zero_or_nan),
    CASE(infinite_parameters_without_decay_stay_infinite),
    CASE(combine_wraps_integers_and_propagates_nan),
    CASE(combine_of_halves_adds_in_fp32),
    CASE(buffers_may_be_the_same),
#if defined(__x86_64__)
    CASE(a_caller_that_flushes_or_rounds_otherwise_gets_the_same_bits),
#endif
    CASE(tiers_agree_bit_for_bit_at_all_short_sizes),
    CASE(tiers_agree_bit_for_bit_at_long_sizes),
    CASE(tiers_agree_bit_for_bit_off_alignment),
};
RUN_CASES(cases)
