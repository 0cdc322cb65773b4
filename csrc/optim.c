/* Adam, AdamW (one rule with a switch) and SGD: formulas in kernels.h, constants here. */
#include "optim.h"

#include <math.h>

#define REQUIRE(cond, key, value, allowed)                                                         \
    if (!(cond))                                                                                   \
    return DSC_FAIL(DSC_EINVAL, "parameter group %d: %s is %g, allowed: %s", group, key, (value),  \
                    allowed)

enum dsc_status dsc_optim_check(enum dsc_optim_kind kind, const struct dsc_hyper *h, int group) {
    REQUIRE(h->lr >= 0 && isfinite(h->lr), "lr", h->lr, "a finite number >= 0");
    REQUIRE(h->weight_decay >= 0 && isfinite(h->weight_decay), "weight_decay", h->weight_decay,
            "a finite number >= 0");
    if (kind == DSC_OPTIM_ADAM) {
        REQUIRE(h->beta1 >= 0 && h->beta1 < 1, "betas[0]", h->beta1, "0 <= beta < 1");
        REQUIRE(h->beta2 >= 0 && h->beta2 < 1, "betas[1]", h->beta2, "0 <= beta < 1");
        REQUIRE(h->eps >= 0 && isfinite(h->eps), "eps", h->eps, "a finite number >= 0");
    } else {
        REQUIRE(h->momentum >= 0 && isfinite(h->momentum), "momentum", h->momentum,
                "a finite number >= 0");
        REQUIRE(isfinite(h->dampening), "dampening", h->dampening, "a finite number");
        REQUIRE(!h->nesterov || (h->momentum > 0 && h->dampening == 0), "nesterov", 1.0,
                "only with momentum > 0 and dampening 0");
    }
    return DSC_OK;
}

void dsc_optim_prepare(enum dsc_optim_kind kind, const struct dsc_hyper *h, uint64_t step,
                       double grad_scale, struct dsc_optim_args *out) {
    out->kind = kind;
    if (kind == DSC_OPTIM_SGD) {
        out->sgd = (struct dsc_sgd){
            (float)grad_scale,      (float)h->lr, (float)h->momentum, (float)(1.0 - h->dampening),
            (float)h->weight_decay, h->nesterov,  step == 1};
        return;
    }
    double c1 = h->bias_correction ? 1.0 - pow(h->beta1, (double)step) : 1.0;
    double c2 = h->bias_correction ? 1.0 - pow(h->beta2, (double)step) : 1.0;
    out->adam = (struct dsc_adam){
        .grad_scale = (float)grad_scale,
        .step_size = (float)(h->lr / c1),
        .beta1 = (float)h->beta1,
        .one_minus_beta1 = (float)(1.0 - h->beta1),
        .beta2 = (float)h->beta2,
        .one_minus_beta2 = (float)(1.0 - h->beta2),
        .inv_sqrt_c2 = (float)(1.0 / sqrt(c2)),
        .eps = (float)h->eps,
        .decay = (float)(h->decoupled ? h->lr * h->weight_decay : h->weight_decay),
        .decoupled = h->decoupled,
    };
}

void dsc_optim_apply(const struct dsc_optim_args *args, float *p, float *const state[],
                     const float *grad, size_t n) {
    if (args->kind == DSC_OPTIM_ADAM)
        dsc_kernels()->adam(p, state[0], state[1], grad, n, &args->adam);
    else
        dsc_kernels()->sgd(p, state[0], grad, n, &args->sgd);
}
