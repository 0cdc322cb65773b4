/* Conversions of every tier against arithmetic in double: rint and ldexp, no look at bits. */
#include "kernels/kernels.h"
#include "kernels/bits.h"

#include "case.h"

#include <math.h>

struct half {
    int n_fraction, min_exponent;
    uint32_t infinity;
};
static const struct half halves[DSC_TRAIN_DTYPE_COUNT] = {
    [DSC_BF16] = {7, -126, 0x7F80}, [DSC_F16] = {10, -14, 0x7C00}};

/* A finite half as a number: fraction times a power of two. */
static double value_of_half(const struct half *half, uint32_t bits) {
    int exponent = (int)((bits & 0x7FFF) >> half->n_fraction);
    double fraction = bits & ((1u << half->n_fraction) - 1);
    if (exponent)
        fraction += 1 << half->n_fraction;
    double value =
        ldexp(fraction, half->min_exponent - half->n_fraction + (exponent ? exponent - 1 : 0));
    return bits & 0x8000 ? -value : value;
}

/* x rounded to a half by division and rint, with no look at x's bits but for NaN. */
static uint16_t half_of(const struct half *half, float x) {
    uint32_t sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) /* sign, the upper payload, quiet */
        return (uint16_t)(sign | half->infinity | 1u << (half->n_fraction - 1) |
                          (dsc_bits_of_f32(x) & 0x7FFFFF) >> (23 - half->n_fraction));
    if (isinf(x))
        return (uint16_t)(sign | half->infinity);
    double magnitude = fabs((double)x);
    int exponent = magnitude > 0 ? ilogb(magnitude) : half->min_exponent;
    exponent = exponent < half->min_exponent ? half->min_exponent : exponent;
    double n_quanta = rint(ldexp(magnitude, half->n_fraction - exponent));
    double bits = n_quanta + ldexp(exponent - half->min_exponent, half->n_fraction);
    return (uint16_t)(sign | (bits >= half->infinity ? half->infinity : (uint32_t)bits));
}

static void check_narrowing(const float *x, size_t n) {
    static uint16_t got[1 << 16];
    for (int dtype = DSC_BF16; dtype <= DSC_F16; dtype++) {
        for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
            dsc_kernels_tier(*name)->from_f32[dtype](got, x, n);
            for (size_t i = 0; i < n; i++) {
                if (got[i] != half_of(&halves[dtype], x[i])) {
                    fprintf(stderr, "%s: %08x as %s is %04x, not %04x\n", *name,
                            dsc_bits_of_f32(x[i]), dsc_dtype_name((enum dsc_dtype)dtype), got[i],
                            half_of(&halves[dtype], x[i]));
                    exit(1);
                }
            }
        }
    }
}

static void all_halves_widen_to_their_value(void) {
    static uint16_t all[1 << 16];
    static float wide[1 << 16];
    for (uint32_t i = 0; i < 1 << 16; i++)
        all[i] = (uint16_t)i;
    for (int dtype = DSC_BF16; dtype <= DSC_F16; dtype++) {
        const struct half *half = &halves[dtype];
        for (const char *const *name = dsc_kernels_tiers(); *name; name++) {
            dsc_kernels_tier(*name)->to_f32[dtype](wide, all, 1 << 16);
            for (uint32_t i = 0; i < 1 << 16; i++) {
                uint32_t magnitude = i & 0x7FFF, sign = (i & 0x8000) << 16;
                if (magnitude < half->infinity) {
                    CHECK((double)wide[i] == value_of_half(half, i));
                    CHECK(!!signbit(wide[i]) == !!sign);
                    continue;
                }
                /* Infinity and NaN keep their fraction at the top; fp16 NaNs become quiet. */
                uint32_t fraction = (magnitude - half->infinity) << (23 - half->n_fraction);
                uint32_t quiet = dtype == DSC_F16 && fraction ? 0x400000 : 0;
                CHECK_EQ_INT(dsc_bits_of_f32(wide[i]), sign | 0x7F800000 | fraction | quiet);
            }
        }
    }
}

static void halves_survive_the_way_there_and_back(void) {
    static uint16_t all[1 << 16], back[1 << 16];
    static float wide[1 << 16];
    for (uint32_t i = 0; i < 1 << 16; i++)
        all[i] = (uint16_t)i;
    for (int dtype = DSC_BF16; dtype <= DSC_F16; dtype++) {
        const struct half *half = &halves[dtype];
        dsc_kernels()->to_f32[dtype](wide, all, 1 << 16);
        dsc_kernels()->from_f32[dtype](back, wide, 1 << 16);
        for (uint32_t i = 0; i < 1 << 16; i++) {
            bool nan = (i & 0x7FFF) > half->infinity;
            CHECK_EQ_INT(back[i], i | (nan ? 1u << (half->n_fraction - 1) : 0));
        }
    }
}

static void floats_over_the_whole_range_narrow_to_nearest_even(void) {
    static float x[1 << 16];
    uint32_t bits = 0;
    for (int round = 0; round < 12; round++) {
        for (size_t i = 0; i < 1 << 16; i++, bits += 5471u * 2 + 1) /* odd: visits all in the end */
            x[i] = dsc_f32_of_bits(bits);
        check_narrowing(x, 1 << 16);
    }
}

static void ties_between_halves_and_their_neighbours_narrow_right(void) {
    static float x[6];
    for (int dtype = DSC_BF16; dtype <= DSC_F16; dtype++) {
        for (uint32_t i = 0; i < halves[dtype].infinity; i++) {
            double here = value_of_half(&halves[dtype], i);
            double next = value_of_half(&halves[dtype], i + 1);
            float tie = (float)(here + (next - here) / 2);
            float triple[] = {tie, nextafterf(tie, 0), nextafterf(tie, INFINITY)};
            for (int j = 0; j < 3; j++) {
                x[2 * j] = triple[j];
                x[2 * j + 1] = -triple[j];
            }
            check_narrowing(x, 6);
        }
    }
}

static const struct test_case cases[] = {
    CASE(all_halves_widen_to_their_value),
    CASE(halves_survive_the_way_there_and_back),
    CASE(floats_over_the_whole_range_narrow_to_nearest_even),
    CASE(ties_between_halves_and_their_neighbours_narrow_right),
};
RUN_CASES(cases)
