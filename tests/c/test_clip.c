/* The norm's fixed-point sum, against sums whose value is known exactly. */
#include "clip.h"

#include "case.h"

#include <float.h>
#include <math.h>

static struct dsc_norm sum_of(const double *parts, size_t n) {
    struct dsc_norm norm = {.n_nonfinite = 0};
    for (size_t i = 0; i < n; i++)
        dsc_norm_add(&norm, parts[i]);
    return norm;
}

static bool same(const struct dsc_norm *a, const struct dsc_norm *b) {
    return memcmp(a, b, sizeof *a) == 0;
}

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Exponents over the whole range of partial sums of fp32 squares, mantissas without pattern. */
static double random_part(uint64_t *state) {
    uint64_t bits = next_random(state);
    double mantissa = 1.0 + (double)(bits >> 12) * 0x1p-52;
    return ldexp(mantissa, (int)(next_random(state) % 500) - 245);
}

static void not_finite_and_negative_parts_give_nan_and_are_counted(void) {
    static const double bad[] = {NAN, INFINITY, -INFINITY, -1.0, 0x1p319};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double parts[] = {1.0, bad[i], 2.0, bad[i]};
        struct dsc_norm norm = sum_of(parts, 4);
        CHECK_EQ_INT(norm.n_nonfinite, 2);
        CHECK(isnan(dsc_norm_sum(&norm)));
        norm.n_nonfinite = 0;
        CHECK(dsc_norm_sum(&norm) == 3.0); /* they are not in the words */
    }
}

static void zero_parts_sum_to_zero(void) {
    double parts[] = {0.0, -0.0};
    struct dsc_norm norm = sum_of(parts, 2);
    CHECK(dsc_norm_sum(&norm) == 0.0 && !signbit(dsc_norm_sum(&norm)));
}

static void one_part_comes_back_as_it_went_in(void) {
    uint64_t state = 7;
    for (int i = 0; i < 100000; i++) {
        double part = random_part(&state);
        struct dsc_norm norm = sum_of(&part, 1);
        CHECK(dsc_norm_sum(&norm) == part);
    }
    for (int exponent = -298; exponent < 319; exponent++) {
        double part = ldexp(1.0, exponent);
        struct dsc_norm norm = sum_of(&part, 1);
        CHECK(dsc_norm_sum(&norm) == part);
    }
}

static void squares_of_the_smallest_and_largest_floats_are_exact(void) {
    double smallest = 0x1p-149 * 0x1p-149, largest = (double)FLT_MAX * (double)FLT_MAX;
    double parts[] = {smallest, largest};
    struct dsc_norm norm = sum_of(parts, 2), only_large = sum_of(&largest, 1);
    CHECK(!same(&norm, &only_large));
    CHECK(dsc_norm_sum(&norm) == largest);
    CHECK_EQ_INT(norm.word[0], 1 << 22); /* 2^-298 = 2^(22 - 320) */
}

static void rounding_is_to_nearest_even_with_everything_below_counted(void) {
    double half_up[] = {1.0, 0x1p-53};                /* tie: stays at the even 1.0 */
    double odd_half[] = {1.0 + DBL_EPSILON, 0x1p-53}; /* tie: goes up to even */
    double above[] = {1.0, 0x1p-53, 0x1p-298};        /* a hair above the tie */
    double below[] = {1.0, 0x1p-54, 0x1p-55, 0x1p-56};
    struct dsc_norm norm = sum_of(half_up, 2);
    CHECK(dsc_norm_sum(&norm) == 1.0);
    norm = sum_of(odd_half, 2);
    CHECK(dsc_norm_sum(&norm) == 1.0 + 2 * DBL_EPSILON);
    norm = sum_of(above, 3);
    CHECK(dsc_norm_sum(&norm) == 1.0 + DBL_EPSILON);
    norm = sum_of(below, 4);
    CHECK(dsc_norm_sum(&norm) == 1.0);
    /* Rounding up carries through a mantissa of ones. */
    double ones[] = {2.0 - DBL_EPSILON, 0x1p-53};
    norm = sum_of(ones, 2);
    CHECK(dsc_norm_sum(&norm) == 2.0);
}

static void carries_cross_all_words(void) {
    struct dsc_norm norm = {.n_nonfinite = 0};
    for (int i = 0; i < DSC_NORM_WORDS - 1; i++)
        norm.word[i] = UINT64_MAX;
    dsc_norm_add(&norm, 0x1p-298);
    CHECK_EQ_INT(norm.word[0], ((uint64_t)1 << 22) - 1);
    for (int i = 1; i < DSC_NORM_WORDS - 1; i++)
        CHECK_EQ_INT(norm.word[i], 0);
    CHECK_EQ_INT(norm.word[DSC_NORM_WORDS - 1], 1);
    CHECK(dsc_norm_sum(&norm) == 0x1p256);
}

static void what_leaves_the_top_is_not_finite(void) {
    struct dsc_norm norm = {.word = {[DSC_NORM_WORDS - 1] = (uint64_t)1 << 63}};
    dsc_norm_merge(&norm, &norm);
    CHECK(norm.n_nonfinite > 0);
    CHECK(isnan(dsc_norm_sum(&norm)));
}

/* Doubling by merging: FLT_MAX^2 summed 2^40 times. */
static void a_norm_holds_2_to_the_40_largest_squares(void) {
    double largest = (double)FLT_MAX * (double)FLT_MAX;
    struct dsc_norm norm = sum_of(&largest, 1);
    for (int i = 0; i < 40; i++)
        dsc_norm_merge(&norm, &norm);
    CHECK_EQ_INT(norm.n_nonfinite, 0);
    CHECK(dsc_norm_sum(&norm) == ldexp(largest, 40));
}

static void order_and_grouping_do_not_show(void) {
    enum { N_PARTS = 3000 };
    static double parts[N_PARTS];
    uint64_t state = 11;
    for (int i = 0; i < N_PARTS; i++)
        parts[i] = random_part(&state);
    struct dsc_norm expected = sum_of(parts, N_PARTS);
    for (int round = 0; round < 20; round++) {
        struct dsc_norm group[7] = {{.n_nonfinite = 0}}, total = {.n_nonfinite = 0};
        for (int i = N_PARTS - 1; i > 0; i--) {
            int j = (int)(next_random(&state) % (uint64_t)(i + 1));
            double held = parts[i];
            parts[i] = parts[j];
            parts[j] = held;
        }
        for (int i = 0; i < N_PARTS; i++)
            dsc_norm_add(&group[next_random(&state) % 7], parts[i]);
        for (int i = 6; i >= 0; i--)
            dsc_norm_merge(&total, &group[i]);
        CHECK(same(&total, &expected));
    }
}

/* Sums of 26-bit integers stay exact in 64 bits: an independent sum, at several scales. */
static void sums_of_integers_are_exact(void) {
    uint64_t state = 3;
    for (int scale = -290; scale <= 200; scale += 49) {
        struct dsc_norm norm = {.n_nonfinite = 0};
        uint64_t total = 0;
        for (int i = 0; i < 1000; i++) {
            uint64_t part = next_random(&state) >> 38;
            total += part;
            dsc_norm_add(&norm, ldexp((double)part, scale));
        }
        CHECK(dsc_norm_sum(&norm) == ldexp((double)total, scale));
    }
}

static void clip_factor_is_torchs(void) {
    CHECK(dsc_clip_factor(5.0, 1.0) == 1.0 / (5.0 + 1e-6));
    CHECK(dsc_clip_factor(0.5, 1.0) == 1.0);
    CHECK(dsc_clip_factor(0.0, 1.0) == 1.0);
    CHECK(dsc_clip_factor(1.0, 1.0) == 1.0 / (1.0 + 1e-6));
    CHECK(dsc_clip_factor(INFINITY, 1.0) == 0.0);
    CHECK(isnan(dsc_clip_factor(NAN, 1.0)));
    CHECK(dsc_clip_factor(1e30, 0.0) == 1.0); /* off */
    CHECK(dsc_clip_factor(1e30, -1.0) == 1.0);
}

static void clip_factor_never_exceeds_one(void) {
    uint64_t state = 5;
    for (int i = 0; i < 200000; i++) {
        double clip = ldexp(1.0 + (double)(next_random(&state) >> 12) * 0x1p-52, i % 20 - 10);
        double norm = clip - 1e-6 + ldexp((double)(next_random(&state) % 9) - 4, i % 20 - 63);
        double factor = dsc_clip_factor(norm, clip);
        CHECK(factor <= 1.0 && factor > 0.999);
    }
}

static const struct test_case cases[] = {
    CASE(not_finite_and_negative_parts_give_nan_and_are_counted),
    CASE(zero_parts_sum_to_zero),
    CASE(one_part_comes_back_as_it_went_in),
    CASE(squares_of_the_smallest_and_largest_floats_are_exact),
    CASE(rounding_is_to_nearest_even_with_everything_below_counted),
    CASE(carries_cross_all_words),
    CASE(what_leaves_the_top_is_not_finite),
    CASE(a_norm_holds_2_to_the_40_largest_squares),
    CASE(order_and_grouping_do_not_show),
    CASE(sums_of_integers_are_exact),
    CASE(clip_factor_is_torchs),
    CASE(clip_factor_never_exceeds_one),
};
RUN_CASES(cases)
