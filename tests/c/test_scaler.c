/* The loss scale, step by step, for a string of '.' (clean) and 'x' (overflow) boundary steps. */
#include "case.h"
#include "scaler.h"

static struct dsc_scaler dynamic(double initial, int64_t window, int64_t hysteresis,
                                 bool consecutive) {
    struct dsc_scaler scaler;
    dsc_scaler_init_dynamic(&scaler, initial, 1.0, window, hysteresis, consecutive);
    return scaler;
}

/* Feeds `steps` and compares the scale after each with `expected`. */
static void follows(struct dsc_scaler scaler, const char *steps, const double *expected) {
    for (size_t i = 0; steps[i]; i++) {
        CHECK_OK(dsc_scaler_update(&scaler, steps[i] == 'x'));
        if (scaler.scale != expected[i]) {
            fprintf(stderr, "step %zu of %s: scale %g, expected %g\n", i, steps, scaler.scale,
                    expected[i]);
            exit(1);
        }
    }
}

static void overflow_at_minimum_is_an_error_that_changes_nothing(void) {
    struct dsc_scaler scaler = dynamic(2, 10, 1, false);
    CHECK_OK(dsc_scaler_update(&scaler, true));
    CHECK(scaler.scale == 1.0);
    const struct dsc_scaler before = scaler;
    CHECK_EQ_INT(dsc_scaler_update(&scaler, true), DSC_ESTATE);
    CHECK(scaler.scale == before.scale && scaler.iter == before.iter &&
          scaler.last_overflow == before.last_overflow &&
          scaler.hysteresis_left == before.hysteresis_left);
    CHECK(strstr(dsc_last_error(), "min_loss_scale") && strstr(dsc_last_error(), "minimum (1)"));
}

static void overflow_at_minimum_is_allowed_while_hysteresis_lasts(void) {
    struct dsc_scaler scaler = dynamic(1, 10, 2, false);
    CHECK_OK(dsc_scaler_update(&scaler, true));
    CHECK(scaler.scale == 1.0);
    CHECK_EQ_INT(dsc_scaler_update(&scaler, true), DSC_ESTATE);
}

static void a_scale_that_may_stay_at_its_minimum_counts_on(void) {
    struct dsc_scaler scaler = dynamic(1, 10, 1, false);
    scaler.stays_at_min = true;
    CHECK_OK(dsc_scaler_update(&scaler, true));
    CHECK(scaler.scale == 1.0 && scaler.iter == 1 && scaler.last_overflow == 0);
}

static void minimum_bounds_the_halving(void) {
    struct dsc_scaler scaler;
    dsc_scaler_init_dynamic(&scaler, 10, 6, 10, 1, false);
    CHECK_OK(dsc_scaler_update(&scaler, true));
    CHECK(scaler.scale == 6.0);
}

static void static_scale_never_moves_and_never_fails(void) {
    struct dsc_scaler scaler;
    dsc_scaler_init_static(&scaler, 128);
    for (int i = 0; i < 100; i++)
        CHECK_OK(dsc_scaler_update(&scaler, i % 3 != 0));
    CHECK(scaler.scale == 128.0);
    CHECK_EQ_INT(scaler.iter, 100);
    CHECK_EQ_INT(scaler.last_overflow, 98);
}

static void first_growth_needs_window_plus_one_clean_steps(void) {
    const double expected[] = {16, 16, 32, 32, 64, 64, 128};
    follows(dynamic(16, 2, 2, false), ".......", expected);
}

static void growth_after_an_overflow_needs_window_plus_one_clean_steps(void) {
    follows(dynamic(16, 2, 1, false), "x....x...", (double[]){8, 8, 8, 16, 16, 8, 8, 8, 16});
    follows(dynamic(16, 3, 1, false), "x....x...", (double[]){8, 8, 8, 8, 16, 8, 8, 8, 8});
}

static void hysteresis_spares_the_first_overflow_only(void) {
    follows(dynamic(16, 1000, 2, false), "xx.x", (double[]){16, 8, 8, 4});
    follows(dynamic(16, 1000, 3, false), "xxx.x", (double[]){16, 16, 8, 8, 4});
}

static void growth_refills_hysteresis(void) {
    follows(dynamic(16, 2, 2, false), "xx...xx", (double[]){16, 8, 8, 8, 16, 16, 8});
}

static void consecutive_hysteresis_is_refilled_by_any_clean_step(void) {
    follows(dynamic(16, 1000, 2, true), "x.x.xx", (double[]){16, 16, 16, 16, 16, 8});
}

static void growth_stops_before_infinity(void) {
    struct dsc_scaler scaler = dynamic(0x1p1023, 1, 1, false);
    for (int i = 0; i < 5; i++)
        CHECK_OK(dsc_scaler_update(&scaler, false));
    CHECK(scaler.scale == 0x1p1023);
}

static const struct test_case cases[] = {
    CASE(overflow_at_minimum_is_an_error_that_changes_nothing),
    CASE(overflow_at_minimum_is_allowed_while_hysteresis_lasts),
    CASE(a_scale_that_may_stay_at_its_minimum_counts_on),
    CASE(minimum_bounds_the_halving),
    CASE(static_scale_never_moves_and_never_fails),
    CASE(first_growth_needs_window_plus_one_clean_steps),
    CASE(growth_after_an_overflow_needs_window_plus_one_clean_steps),
    CASE(hysteresis_spares_the_first_overflow_only),
    CASE(growth_refills_hysteresis),
    CASE(consecutive_hysteresis_is_refilled_by_any_clean_step),
    CASE(growth_stops_before_infinity),
};
RUN_CASES(cases)
