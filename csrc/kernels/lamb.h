/* One element of LAMB (You et al., arXiv 1904.00962): moments, then the direction, whose norm over
 * the whole parameter the step needs. The direction is computed twice, from the same p, m and v, so
 * that it needs no memory of its own. kernels.h has the formula. */
#ifndef DSC_KERNELS_LAMB_H
#define DSC_KERNELS_LAMB_H

#include "bits.h"
#include "kernels.h"

#include <math.h>

DSC_HD float dsc_lamb_direction(float p, float m, float v, const struct dsc_lamb *h, bool decays) {
    float root = h->eps_inside ? sqrtf(v + h->eps) : sqrtf(v) + h->eps;
    float u = m / root;
    return decays ? u + h->decay * p : u;
}

DSC_HD float dsc_lamb_moments(float p, float *m, float *v, float grad, const struct dsc_lamb *h,
                              bool decays) {
    float g = grad * h->grad_scale;
    float m1 = dsc_one_nan(h->beta1 * *m + h->one_minus_beta1 * g);
    float v1 = dsc_one_nan(h->beta2 * *v + h->one_minus_beta2 * g * g);
    *m = m1;
    *v = v1;
    return dsc_one_nan(dsc_lamb_direction(p, m1, v1, h, decays));
}

DSC_HD void dsc_lamb_step(float *p, float m, float v, float step, const struct dsc_lamb *h,
                          bool decays) {
    *p = dsc_one_nan(*p - step * dsc_lamb_direction(*p, m, v, h, decays));
}

#endif
