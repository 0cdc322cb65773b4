/* fp32 from and to bf16 and fp16, and the test for finite values, all on bits.
 *
 * Decides: rounding is to nearest even, denormals are kept, too large becomes infinity. NaN stays
 * NaN: narrowing keeps sign and upper payload and makes it quiet (what F16C, AVX-512 and ARM do for
 * fp16); fp16 to fp32 makes it quiet as well; bf16 to fp32 appends zeros, nothing else.
 * Branch-free, so that a compiler can turn a loop over them into vectors. */
#ifndef DSC_KERNELS_CAST_H
#define DSC_KERNELS_CAST_H

#include "bits.h"

DSC_HD float dsc_f32_of_bf16(uint16_t x) {
    return dsc_f32_of_bits((uint32_t)x << 16);
}

DSC_HD uint16_t dsc_bf16_of_f32(float x) {
    uint32_t bits = dsc_bits_of_f32(x);
    uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    uint32_t quiet = bits >> 16 | 0x0040u;
    /* Signed comparison: SSE2 has no unsigned one. */
    return (uint16_t)((int32_t)(bits & 0x7FFFFFFFu) > 0x7F800000 ? quiet : rounded);
}

/* yes ? a : b by masks. Where one side is float arithmetic, compilers make a branch of ?:, because
 * that arithmetic might trap, and then make no vectors. */
DSC_HD uint32_t dsc_choose(bool yes, uint32_t a, uint32_t b) {
    uint32_t mask = 0u - (uint32_t)yes;
    return (a & mask) | (b & ~mask);
}

DSC_HD float dsc_f32_of_f16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    int32_t magnitude = x & 0x7FFF;
    uint32_t shifted = (uint32_t)magnitude << 13;
    /* A denormal is its integer times 2^-24, exactly. */
    uint32_t small = dsc_bits_of_f32((float)magnitude * 0x1p-24f);
    uint32_t normal = shifted + ((127u - 15u) << 23);
    uint32_t top = shifted + ((255u - 31u) << 23); /* infinity and NaN */
    top |= magnitude > 0x7C00 ? 0x00400000u : 0u;
    uint32_t bits = dsc_choose(magnitude < 0x0400, small, normal);
    return dsc_f32_of_bits(sign | dsc_choose(magnitude >= 0x7C00, top, bits));
}

DSC_HD uint16_t dsc_f16_of_f32(float x) {
    uint32_t bits = dsc_bits_of_f32(x);
    int32_t magnitude = (int32_t)(bits & 0x7FFFFFFFu);
    /* Below 2^-14 the result counts in 2^-24, the last place of floats in [0.5, 1): adding 0.5
     * rounds. */
    float lifted = dsc_f32_of_bits((uint32_t)magnitude) + 0.5f;
    uint32_t small = dsc_bits_of_f32(lifted) - 0x3F000000u;
    int32_t rebased = magnitude - ((127 - 15) << 23);
    int32_t normal = (rebased + 0x0FFF + (rebased >> 13 & 1)) >> 13;
    normal = normal > 0x7C00 ? 0x7C00 : normal;
    uint32_t quiet = 0x7E00u | (bits >> 13 & 0x03FFu);
    uint32_t half = dsc_choose(magnitude < ((127 - 14) << 23), small, (uint32_t)normal);
    half = dsc_choose(magnitude > 0x7F800000, quiet, half);
    return (uint16_t)((bits >> 16 & 0x8000u) | half);
}

/* The top bit of the result is set where x is infinite or NaN: adding one to the exponent field
 * overflows into it. OR over many elements keeps it. */
DSC_HD uint32_t dsc_nonfinite_f32(uint32_t bits) {
    return (bits & 0x7FFFFFFFu) + 0x00800000u;
}
DSC_HD uint16_t dsc_nonfinite_bf16(uint16_t bits) {
    return (uint16_t)((bits & 0x7FFFu) + 0x0080u);
}
DSC_HD uint16_t dsc_nonfinite_f16(uint16_t bits) {
    return (uint16_t)((bits & 0x7FFFu) + 0x0400u);
}

#endif
