/* One element's Adam or AdamW step (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv
 * 1711.05101), in the order of operations that kernels.h gives.
 *
 * `decay` is a constant where it is inlined. With no decay there is no decay term: 0 * p would turn
 * an infinite parameter into NaN. */
#ifndef DSC_KERNELS_ADAM_H
#define DSC_KERNELS_ADAM_H

#include "bits.h"
#include "kernels.h"

#include <math.h>

enum dsc_decay { DSC_DECAY_NONE, DSC_DECAY_L2, DSC_DECAY_DECOUPLED };

DSC_HD void dsc_adam_step(float *p, float *m, float *v, float grad, const struct dsc_adam *h,
                          enum dsc_decay decay) {
    float g = grad * h->grad_scale;
    if (decay == DSC_DECAY_L2)
        g += h->decay * *p;
    float m1 = h->beta1 * *m + h->one_minus_beta1 * g;
    float v1 = h->beta2 * *v + h->one_minus_beta2 * g * g;
    float step = h->step_size * m1 / (sqrtf(v1) * h->inv_sqrt_c2 + h->eps);
    if (decay == DSC_DECAY_DECOUPLED)
        step += h->decay * *p;
    *p = dsc_one_nan(*p - step);
    *m = dsc_one_nan(m1);
    *v = dsc_one_nan(v1);
}

#endif
