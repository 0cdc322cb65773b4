/* The parts of a row's softmax: subtract the largest, exponentiate, divide by the sum.
 *
 * Invariant: every operation is written out here, none is the C library's, whose exp differs
 * between machines. */
#ifndef DSC_KERNELS_SOFTMAX_H
#define DSC_KERNELS_SOFTMAX_H

#include "cast.h"

enum { DSC_BITS_OF_87 = 0x42AE0000 };

/* e^x for x <= 0, within 2 units in the last place; 0 below -87, which keeps 2^n a normal number.
 * x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series up to r^7 / 7!. */
DSC_HD float dsc_exp_of_negative(float x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f; /* n * ln2_high is exact */
    /* On bits, by masks (cast.h says why). A NaN is not small and goes through to the end. */
    int32_t magnitude = (int32_t)(dsc_bits_of_f32(x) & 0x7FFFFFFFu);
    bool small = magnitude > DSC_BITS_OF_87 && magnitude <= 0x7F800000;
    float y = dsc_f32_of_bits(dsc_choose(small, 0x80000000u | DSC_BITS_OF_87, dsc_bits_of_f32(x)));
    float shifted = y * 1.44269504f + to_integer;
    float n = shifted - to_integer;
    float r = (y - n * ln2_high) - n * ln2_low;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    uint32_t power = dsc_bits_of_f32(shifted) - dsc_bits_of_f32(to_integer) + 127u;
    uint32_t result = dsc_bits_of_f32(e * dsc_f32_of_bits(power << 23));
    return dsc_f32_of_bits(dsc_choose(small, 0u, result));
}

/* out = x - the largest x. */
DSC_HD void dsc_softmax_shift(float *out, const float *x, size_t n) {
    float top = n ? x[0] : 0.0f;
    for (size_t i = 1; i < n; i++)
        top = x[i] > top ? x[i] : top;
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] - top;
}

DSC_HD void dsc_softmax_scale(float *e, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += (double)e[i];
    double scale = 1.0 / sum;
    for (size_t i = 0; i < n; i++)
        e[i] = dsc_one_nan((float)((double)e[i] * scale));
}

#endif
