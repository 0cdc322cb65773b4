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

static const struct dsc_lr_cycle cycle = {4, 2, 0, 0, 2};

static void cycle_refused(struct dsc_lr_cycle wrong, const char *name) {
    CHECK_EQ_INT(dsc_lr_cycle_check(&wrong), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), name));
}

static void bad_cycles_are_named(void) {
    CHECK_OK(dsc_lr_cycle_check(&cycle));
    CHECK_OK(dsc_lr_cycle_check(&(struct dsc_lr_cycle){0.5, 0, -1, -1, 0}));
    cycle_refused((struct dsc_lr_cycle){0, 2, 0, 0, 0}, "cycle_first_step_size");
    cycle_refused((struct dsc_lr_cycle){NAN, 2, 0, 0, 0}, "cycle_first_step_size");
    cycle_refused((struct dsc_lr_cycle){1, -1, 0, 0, 0}, "cycle_second_step_size");
    cycle_refused((struct dsc_lr_cycle){1, INFINITY, 0, 0, 0}, "cycle_second_step_size");
    cycle_refused((struct dsc_lr_cycle){1, 1, 0, 0, -1}, "decay_step_size");
}

static void cycle_rises_falls_and_decays(void) {
    const double rate[] = {1, 2, 3, 4, 5, 3, 1, 1 / 1.25, 1 / 1.5};
    const double mom[] = {0.9, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 0.9 * 1.25, 0.9 * 1.5};
    for (int k = 0; k < 9; k++) { /* index 6 is the first after the cycle */
        near(dsc_lr_cycle_at(&cycle, 1, 5, 0.5, k - 1), rate[k]);
        near(dsc_lr_cycle_mom_at(&cycle, 0.8, 0.9, 0.5, k - 1), mom[k]);
    }
}

static void stairs_are_floors_of_each_half(void) {
    const struct dsc_lr_cycle stairs = {6, 4, 2, 4, 0};
    const double level[] = {0, 0, 0, 0.5, 0.5, 0.5, 1, 0.75, 0.5, 0.25, 0};
    for (int k = 0; k < 11; k++)
        near(dsc_lr_cycle_at(&stairs, 0, 1, 9, k - 1), level[k]);
}

static void without_a_second_half_or_a_decay_the_cycle_ends_at_once(void) {
    const struct dsc_lr_cycle half = {4, 0, 0, 0, 0};
    const double rate[] = {1, 2, 3, 4, 1, 1, 1};
    for (int k = 0; k < 7; k++)
        near(dsc_lr_cycle_at(&half, 1, 5, 0.5, k - 1), rate[k]);
    CHECK(dsc_lr_cycle_mom_at(&half, 0.8, 0.9, 0.5, 1000) == 0.9);
}

static void range_test_grows_by_slope_or_stairs(void) {
    const double slope[] = {1, 1.25, 1.5, 1.75, 2, 2.25}, stairs[] = {1, 1, 1.5, 1.5, 2, 2};
    for (int k = 0; k < 6; k++) {
        near(dsc_lr_range_at(1, 2, 0.5, false, k - 1), slope[k]);
        near(dsc_lr_range_at(1, 2, 0.5, true, k - 1), stairs[k]);
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
    CASE(bad_cycles_are_named),
    CASE(cycle_rises_falls_and_decays),
    CASE(stairs_are_floors_of_each_half),
    CASE(without_a_second_half_or_a_decay_the_cycle_ends_at_once),
    CASE(range_test_grows_by_slope_or_stairs),
};
RUN_CASES(cases)
