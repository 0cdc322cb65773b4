/* Schedules: bad parameters, the published points of each formula, and index independence. */
#include "case.h"
#include "lr.h"

#include <math.h>

static const struct dsc_lr warmup = {DSC_LR_WARMUP, DSC_LR_LOG, 4, 0, 0.0, 1.0};

static void near(double got, double expected) {
    if (!(fabs(got - expected) <= 1e-15 * fmax(1.0, fabs(expected)))) {
        fprintf(stderr, "got %.17g, expected %.17g\n", got, expected);
        exit(1);
    }
}

static void refused(struct dsc_lr schedule, const char *name) {
    CHECK_EQ_INT(dsc_lr_check(&schedule), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), name));
}

static void bad_parameters_are_named(void) {
    CHECK_OK(dsc_lr_check(&warmup));
    refused((struct dsc_lr){DSC_LR_WARMUP, DSC_LR_LOG, 0, 0, 0, 1}, "warmup_num_steps");
    refused((struct dsc_lr){DSC_LR_WARMUP, DSC_LR_LOG, -7, 0, 0, 1}, "-7");
    refused((struct dsc_lr){DSC_LR_WARMUP_DECAY, DSC_LR_LOG, 4, 0, 0, 1}, "total_num_steps");
    refused((struct dsc_lr){DSC_LR_WARMUP_COSINE, DSC_LR_LOG, 4, -1, 0, 1}, "total_num_steps");
    refused((struct dsc_lr){DSC_LR_WARMUP, DSC_LR_LOG, 4, 0, NAN, 1}, "warmup_min_lr");
    refused((struct dsc_lr){DSC_LR_WARMUP, DSC_LR_LOG, 4, 0, 0, INFINITY}, "warmup_max_lr");
    refused((struct dsc_lr){DSC_LR_WARMUP_COSINE, DSC_LR_LOG, 4, 8, 0, NAN}, "cos_min_ratio");
    refused((struct dsc_lr){(enum dsc_lr_kind)3, DSC_LR_LOG, 4, 8, 0, 1}, "kind 3");
    refused((struct dsc_lr){DSC_LR_WARMUP, (enum dsc_lr_ramp)2, 4, 8, 0, 1}, "ramp 2");
}

static void log_warmup_starts_at_min_and_is_full_one_step_before_its_count(void) {
    const double expected[] = {0, 0, 0.5, log(3) / log(4), 1, 1, 1};
    for (int i = 0; i < 7; i++)
        near(dsc_lr_at(&warmup, i - 1, 0), expected[i]);
    CHECK(dsc_lr_at(&warmup, 3, 0) == 1.0); /* exactly */
}

static void linear_warmup_is_full_at_its_count(void) {
    struct dsc_lr schedule = warmup;
    schedule.ramp = DSC_LR_LINEAR;
    schedule.min = 0.5, schedule.max = 2.5;
    const double expected[] = {0.5, 0.5, 1, 1.5, 2, 2.5, 2.5};
    for (int i = 0; i < 7; i++)
        near(dsc_lr_at(&schedule, i - 1, 0), expected[i]);
}

static void warmup_of_one_step_counts_as_two(void) {
    for (int ramp = DSC_LR_LOG; ramp <= DSC_LR_LINEAR; ramp++) {
        struct dsc_lr one = warmup, two = warmup;
        one.ramp = two.ramp = (enum dsc_lr_ramp)ramp;
        one.n_warmup = 1, two.n_warmup = 2;
        for (int i = -1; i < 6; i++)
            CHECK(dsc_lr_at(&one, i, 0) == dsc_lr_at(&two, i, 0));
    }
    struct dsc_lr one = warmup;
    one.n_warmup = 1;
    CHECK(isfinite(dsc_lr_at(&one, 1, 0)));
}

static void decay_reaches_zero_at_total_and_stays(void) {
    const struct dsc_lr schedule = {DSC_LR_WARMUP_DECAY, DSC_LR_LOG, 4, 8, 0.0, 0.001};
    const double expected[] = {
        0, 0, 0.0005, 0.001 * log(3) / log(4), 0.001, 0.001, 0.00075, 0.0005, 0.00025, 0};
    for (int i = 0; i < 10; i++)
        near(dsc_lr_at(&schedule, i - 1, 0), expected[i]);
    CHECK(dsc_lr_at(&schedule, INT64_MAX, 0) == 0.0);
}

static void cosine_multiplies_base_and_skips_its_peak(void) {
    const struct dsc_lr schedule = {DSC_LR_WARMUP_COSINE, DSC_LR_LINEAR, 4, 8, 0.0, 1e-4};
    const double expected[] = {
        0,     0,    0.025, 0.05, 0.075, 0.085356803525421452, 0.050005, 0.014653196474578559,
        1e-05, 1e-05};
    for (int i = 0; i < 10; i++)
        near(dsc_lr_at(&schedule, i - 1, 0.1), expected[i]);
}

static void total_below_warmup_stays_finite(void) {
    for (int kind = DSC_LR_WARMUP_DECAY; kind <= DSC_LR_WARMUP_COSINE; kind++) {
        const struct dsc_lr schedule = {(enum dsc_lr_kind)kind, DSC_LR_LOG, 10, 3, 0.0, 0.1};
        for (int i = -1; i < 40; i++)
            CHECK(isfinite(dsc_lr_at(&schedule, i, 1.0)));
    }
}

static const struct test_case cases[] = {
    CASE(bad_parameters_are_named),
    CASE(log_warmup_starts_at_min_and_is_full_one_step_before_its_count),
    CASE(linear_warmup_is_full_at_its_count),
    CASE(warmup_of_one_step_counts_as_two),
    CASE(decay_reaches_zero_at_total_and_stays),
    CASE(cosine_multiplies_base_and_skips_its_peak),
    CASE(total_below_warmup_stays_finite),
};
RUN_CASES(cases)
