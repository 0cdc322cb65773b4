/* One element's Lion step (Chen et al., arXiv 2302.06675), in the order of operations that
 * kernels.h gives. sign(0) is 0, as published; sign(NaN) is NaN. */
#ifndef DSC_KERNELS_LION_H
#define DSC_KERNELS_LION_H

#include "bits.h"
#include "kernels.h"

DSC_HD void dsc_lion_step(float *p, float *m, float grad, const struct dsc_lion *h, bool decays) {
    float g = grad * h->grad_scale;
    float u = h->beta1 * *m + h->one_minus_beta1 * g;
    float step = u > 0.0f ? h->lr : u < 0.0f ? -h->lr : u;
    if (decays)
        step += h->decay * *p;
    *p = dsc_one_nan(*p - step);
    *m = dsc_one_nan(h->beta2 * *m + h->one_minus_beta2 * g);
}

#endif
