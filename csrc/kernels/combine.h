/* What collectives do to two elements: sum, product, minimum, maximum.
 *
 * Integers wrap (unsigned arithmetic). Minimum and maximum give NaN where either side is NaN, and
 * the accumulator where both are equal, so the sign of a zero depends on the order of ranks only.
 */
#ifndef DSC_KERNELS_COMBINE_H
#define DSC_KERNELS_COMBINE_H

#include "bits.h"

#define DSC_COMBINE_FLOAT(type, name, one_nan)                                                     \
    DSC_HD type dsc_sum_##name(type acc, type x) {                                                 \
        return one_nan(acc + x);                                                                   \
    }                                                                                              \
    DSC_HD type dsc_prod_##name(type acc, type x) {                                                \
        return one_nan(acc * x);                                                                   \
    }                                                                                              \
    DSC_HD type dsc_min_##name(type acc, type x) {                                                 \
        return one_nan(x < acc || x != x ? x : acc);                                               \
    }                                                                                              \
    DSC_HD type dsc_max_##name(type acc, type x) {                                                 \
        return one_nan(x > acc || x != x ? x : acc);                                               \
    }

#define DSC_COMBINE_INT(type, utype, name)                                                         \
    DSC_HD type dsc_sum_##name(type acc, type x) {                                                 \
        return (type)((utype)acc + (utype)x);                                                      \
    }                                                                                              \
    DSC_HD type dsc_prod_##name(type acc, type x) {                                                \
        return (type)((utype)acc * (utype)x);                                                      \
    }                                                                                              \
    DSC_HD type dsc_min_##name(type acc, type x) {                                                 \
        return x < acc ? x : acc;                                                                  \
    }                                                                                              \
    DSC_HD type dsc_max_##name(type acc, type x) {                                                 \
        return x > acc ? x : acc;                                                                  \
    }

DSC_COMBINE_FLOAT(float, f32, dsc_one_nan)
DSC_COMBINE_FLOAT(double, f64, dsc_one_nan_f64)
DSC_COMBINE_INT(int32_t, uint32_t, i32)
DSC_COMBINE_INT(int64_t, uint64_t, i64)

#endif
