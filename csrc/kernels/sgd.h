/* One element's SGD step with torch.optim.SGD's rule; kernels.h has the formula.
 *
 * The flags of `h` are the same for a whole loop, so choosing by them costs a blend, not a branch.
 */
#ifndef DSC_KERNELS_SGD_H
#define DSC_KERNELS_SGD_H

#include "bits.h"
#include "kernels.h"

DSC_HD float dsc_sgd_gradient(float p, float grad, const struct dsc_sgd *h) {
    float g = grad * h->grad_scale;
    return h->weight_decay != 0.0f ? g + h->weight_decay * p : g;
}

DSC_HD void dsc_sgd_step(float *p, float grad, const struct dsc_sgd *h) {
    *p = dsc_one_nan(*p - h->lr * dsc_sgd_gradient(*p, grad, h));
}

DSC_HD void dsc_sgd_momentum_step(float *p, float *buf, float grad, const struct dsc_sgd *h) {
    float g = dsc_sgd_gradient(*p, grad, h);
    float b = h->first ? g : h->momentum * *buf + h->one_minus_dampening * g;
    g = h->nesterov ? g + h->momentum * b : b;
    *p = dsc_one_nan(*p - h->lr * g);
    *buf = dsc_one_nan(b);
}

#endif
