/* Floats as bits, and the one NaN that arithmetic stores.
 *
 * Decides: which NaN a sum, product or step leaves behind. Machines differ in it (which operand's
 * payload, which sign), and compilers swap operands; so every arithmetic result that is NaN is
 * stored as the positive quiet NaN without payload. Copies keep NaNs as they are, conversions as
 * cast.h says. DSC_HD marks what a CUDA file may include, too. */
#ifndef DSC_KERNELS_BITS_H
#define DSC_KERNELS_BITS_H

#include "../dsc.h"

#include <float.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float arithmetic must round to float: on x86-32 build with -msse2 -mfpmath=sse"
#endif

#ifdef __CUDACC__
#define DSC_HD static inline __host__ __device__
#else
#define DSC_HD static inline
#endif

DSC_HD uint32_t dsc_bits_of_f32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
DSC_HD float dsc_f32_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
DSC_HD double dsc_f64_of_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

DSC_HD float dsc_one_nan(float x) {
    return x != x ? dsc_f32_of_bits(0x7FC00000u) : x;
}
DSC_HD double dsc_one_nan_f64(double x) {
    return x != x ? dsc_f64_of_bits(0x7FF8000000000000u) : x;
}

#endif
