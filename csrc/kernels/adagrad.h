/* One element's Adagrad step (Duchi, Hazan and Singer, JMLR 12, 2011), in the order of operations
 * that kernels.h gives. The flag is the same for a whole loop. */
#ifndef DSC_KERNELS_ADAGRAD_H
#define DSC_KERNELS_ADAGRAD_H

#include "bits.h"
#include "kernels.h"

#include <math.h>

/* With no decay there is no decay term: 0 * p would turn an infinite parameter into NaN. */
DSC_HD void dsc_adagrad_step(float *p, float *sum, float grad, const struct dsc_adagrad *h,
                             bool decays) {
    float raw = grad * h->grad_scale;
    float g = decays ? raw + h->weight_decay * *p : raw;
    float s = *sum + g * g;
    float numerator = h->raw_numerator ? raw : g;
    *p = dsc_one_nan(*p - h->step_size * numerator / (sqrtf(s) + h->eps));
    *sum = dsc_one_nan(s);
}

#endif
