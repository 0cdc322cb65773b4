/* The data order: a bijection for every n, without visible structure, and the same for ever. */
#include "case.h"
#include "shuffle.h"

#include <math.h>

static void bad_arguments_leave_the_output_untouched(void) {
    int64_t out[2] = {-5, -5};
    CHECK_EQ_INT(dsc_shuffle_fill(0, 0, 0, 0, 1, 2, out), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "no samples"));
    CHECK_EQ_INT(dsc_shuffle_fill(0, 0, (uint64_t)INT64_MAX + 1, 0, 1, 2, out), DSC_EINVAL);
    CHECK_EQ_INT(dsc_shuffle_fill(0, 0, 10, UINT64_MAX, 1, 2, out), DSC_EINVAL);
    CHECK_EQ_INT(dsc_shuffle_fill(0, 0, 10, 0, UINT64_MAX, 3, out), DSC_EINVAL);
    CHECK(out[0] == -5 && out[1] == -5);
    CHECK_OK(dsc_shuffle_fill(0, 0, 0, 0, 1, 0, NULL));
    CHECK_EQ_INT(dsc_shuffle_at(1, 2, 0, 3), 0);
}

static void visits_each_once(uint64_t seed, uint64_t epoch, uint64_t n) {
    unsigned char *seen = calloc(n, 1);
    CHECK(seen);
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t x = dsc_shuffle_at(seed, epoch, n, i);
        CHECK(x < n);
        CHECK(!seen[x]);
        seen[x] = 1;
    }
    free(seen);
}

static void every_n_is_a_bijection(void) {
    for (uint64_t n = 1; n <= 300; n++)
        visits_each_once(n * 7, n % 5, n);
    const uint64_t large[] = {1023, 1024, 1025, 4095, 4096, 4097, 50000, 65536, 65537};
    for (size_t k = 0; k < sizeof large / sizeof *large; k++)
        visits_each_once(k, 1000 + k, large[k]);
}

static void huge_n_stays_in_range_and_does_not_repeat(void) {
    const uint64_t sizes[] = {UINT64_MAX, (UINT64_C(1) << 62) + 1, UINT64_C(1) << 62, INT64_MAX};
    for (size_t k = 0; k < 4; k++) {
        uint64_t last = sizes[k];
        for (uint64_t i = 0; i < 1000; i++) {
            const uint64_t x = dsc_shuffle_at(3, k, sizes[k], sizes[k] - 1 - i);
            CHECK(x < sizes[k] && x != last);
            last = x;
        }
    }
}

static void positions_wrap_around(void) {
    for (uint64_t i = 0; i < 40; i++)
        CHECK_EQ_INT(dsc_shuffle_at(9, 4, 13, i), dsc_shuffle_at(9, 4, 13, i % 13));
}

static void fill_equals_at_for_every_rank(void) {
    int64_t out[40];
    for (uint64_t world = 1; world <= 5; world++)
        for (uint64_t rank = 0; rank < world; rank++) {
            CHECK_OK(dsc_shuffle_fill(11, 2, 101, rank, world, 40, out));
            for (uint64_t k = 0; k < 40; k++)
                CHECK_EQ_INT(out[k], dsc_shuffle_at(11, 2, 101, rank + k * world));
        }
}

/* Number of positions at which two keys give the same sample of 10000: about 1 for unrelated keys.
 */
static int n_agreements(uint64_t seed_a, uint64_t epoch_a, uint64_t seed_b, uint64_t epoch_b) {
    int n = 0;
    for (uint64_t i = 0; i < 10000; i++)
        n += dsc_shuffle_at(seed_a, epoch_a, 10000, i) == dsc_shuffle_at(seed_b, epoch_b, 10000, i);
    return n;
}

static void other_seeds_and_epochs_are_unrelated_orders(void) {
    CHECK(n_agreements(0, 0, 0, 1) < 12);
    CHECK(n_agreements(0, 0, 1, 0) < 12);
    CHECK(n_agreements(0, 1, 1, 0) < 12);
    CHECK(n_agreements(5, 3, 4, 4) < 12);
    CHECK(n_agreements(UINT64_C(1) << 63, 0, 0, 0) < 12);
    CHECK_EQ_INT(n_agreements(5, 3, 5, 3), 10000);
}

/* Chi-square of counts against a flat expectation, as standard deviations from its mean. */
static double chi_deviation(const int *count, int n_cells, double expected) {
    double chi = 0;
    for (int c = 0; c < n_cells; c++)
        chi += (count[c] - expected) * (count[c] - expected) / expected;
    return (chi - (n_cells - 1)) / sqrt(2.0 * (n_cells - 1));
}

/* Which value stands at which position, over many epochs: 16 x 16 cells for n = 1000. */
static void position_and_value_are_independent(void) {
    static int count[256];
    const uint64_t n = 1000, epochs = 200;
    for (uint64_t e = 0; e < epochs; e++)
        for (uint64_t i = 0; i < n; i++)
            count[i * 16 / n * 16 + dsc_shuffle_at(42, e, n, i) * 16 / n]++;
    /* Rows and columns have 62 or 63 members each: the flat expectation is off by under 1 %. */
    const double deviation = chi_deviation(count, 256, (double)(n * epochs) / 256);
    CHECK(fabs(deviation) < 6);
}

/* Neighbours in the order: the difference of consecutive samples mod n is flat as well. */
static void neighbours_are_independent(void) {
    static int count[100];
    const uint64_t n = 1000, epochs = 200;
    for (uint64_t e = 0; e < epochs; e++)
        for (uint64_t i = 0; i + 1 < n; i++) {
            const uint64_t a = dsc_shuffle_at(e, 0, n, i), b = dsc_shuffle_at(e, 0, n, i + 1);
            count[((b + n - a) % n - 1) * 100 / (n - 1)]++;
        }
    CHECK(fabs(chi_deviation(count, 100, (double)((n - 1) * epochs) / 100)) < 6);
}

static void every_order_of_four_is_equally_likely(void) {
    static int count[256];
    int packed[24];
    for (uint64_t seed = 0; seed < 24000; seed++) {
        unsigned code = 0;
        for (uint64_t i = 0; i < 4; i++)
            code = code << 2 | (unsigned)dsc_shuffle_at(seed, 0, 4, i);
        count[code]++;
    }
    int n_orders = 0;
    for (int c = 0; c < 256; c++)
        if (count[c]) {
            CHECK(n_orders < 24);
            packed[n_orders++] = count[c];
        }
    CHECK_EQ_INT(n_orders, 24);
    CHECK(fabs(chi_deviation(packed, 24, 1000)) < 5);
}

static void first_sample_is_flat_over_small_n(void) {
    static int count[13];
    for (uint64_t n = 2; n <= 13; n++) {
        memset(count, 0, sizeof count);
        for (uint64_t e = 0; e < 1000 * n; e++)
            count[dsc_shuffle_at(1, e, n, 0)]++;
        CHECK(fabs(chi_deviation(count, (int)n, 1000)) < 5);
    }
}

/* The order of every run ever started depends on these: a change here is a broken promise. */
static void golden_values_never_change(void) {
    const int64_t ten[] = {2, 6, 5, 9, 3, 1, 0, 4, 8, 7};
    const int64_t large[] = {847686608, 685147188, 542186924, 717300855,
                             962095437, 565935287, 95494588,  955835775};
    int64_t out[10];
    CHECK_OK(dsc_shuffle_fill(0, 0, 10, 0, 1, 10, out));
    for (int i = 0; i < 10; i++)
        CHECK_EQ_INT(out[i], ten[i]);
    CHECK_OK(dsc_shuffle_fill(1234, 7, UINT64_C(1000000007), 5, UINT64_C(100000000), 8, out));
    for (int i = 0; i < 8; i++)
        CHECK_EQ_INT(out[i], large[i]);
    CHECK_EQ_INT(dsc_shuffle_at(UINT64_MAX, UINT64_MAX, INT64_MAX, 123),
                 INT64_C(6507137434691675602));
}

static const struct test_case cases[] = {
    CASE(bad_arguments_leave_the_output_untouched),
    CASE(every_n_is_a_bijection),
    CASE(huge_n_stays_in_range_and_does_not_repeat),
    CASE(positions_wrap_around),
    CASE(fill_equals_at_for_every_rank),
    CASE(other_seeds_and_epochs_are_unrelated_orders),
    CASE(position_and_value_are_independent),
    CASE(neighbours_are_independent),
    CASE(every_order_of_four_is_equally_likely),
    CASE(first_sample_is_flat_over_small_n),
    CASE(golden_values_never_change),
};
RUN_CASES(cases)
