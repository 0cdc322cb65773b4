/* The shape of a sum of squares or products: 16 lanes, then one tree.
 *
 * Invariant: element i goes to lane i mod 16, in index order, so the additions are the same for
 * every width of vector; a product of fp32 values is exact in fp64. */
#ifndef DSC_KERNELS_NORM_H
#define DSC_KERNELS_NORM_H

#include "bits.h"

enum { DSC_LANES = 16 };

/* Folds upper half onto lower half until one is left. */
DSC_HD double dsc_sum_lanes(double lane[DSC_LANES]) {
    for (int half = DSC_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return dsc_one_nan_f64(lane[0]);
}

DSC_HD float dsc_sum_lanes_f32(float lane[DSC_LANES]) {
    for (int half = DSC_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return dsc_one_nan(lane[0]);
}

#endif
