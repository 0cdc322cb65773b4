/* Constants of each rule, made in double; the formulas are in kernels.h. */
#include "optim.h"

#include <math.h>
#include <string.h>

static const struct dsc_optim_info infos[DSC_OPTIM_COUNT] = {
#define X(kind, name, n_states, whole) [kind] = {name, n_states, whole},
    DSC_OPTIM_MAP(X)
#undef X
};

const struct dsc_optim_info *dsc_optim_info(enum dsc_optim_kind kind) {
    return &infos[kind];
}

enum dsc_status dsc_optim_find(const char *name, enum dsc_optim_kind *out) {
    for (int kind = 0; kind < DSC_OPTIM_COUNT; kind++)
        if (strcmp(infos[kind].name, name) == 0) {
            *out = (enum dsc_optim_kind)kind;
            return DSC_OK;
        }
    return DSC_FAIL(DSC_EINVAL, "there is no optimizer '%s' in the core", name);
}

#define REQUIRE(cond, key, value, allowed)                                                         \
    if (!(cond))                                                                                   \
    return DSC_FAIL(DSC_EINVAL, "parameter group %d: %s is %g, allowed: %s", group, key, (value),  \
                    allowed)

static enum dsc_status check_betas(const struct dsc_hyper *h, int group) {
    REQUIRE(h->beta1 >= 0 && h->beta1 < 1, "betas[0]", h->beta1, "0 <= beta < 1");
    REQUIRE(h->beta2 >= 0 && h->beta2 < 1, "betas[1]", h->beta2, "0 <= beta < 1");
    return DSC_OK;
}

static enum dsc_status check_sgd(const struct dsc_hyper *h, int group) {
    REQUIRE(h->momentum >= 0 && isfinite(h->momentum), "momentum", h->momentum,
            "a finite number >= 0");
    REQUIRE(isfinite(h->dampening), "dampening", h->dampening, "a finite number");
    REQUIRE(!h->nesterov || (h->momentum > 0 && h->dampening == 0), "nesterov", 1.0,
            "only with momentum > 0 and dampening 0");
    return DSC_OK;
}

enum dsc_status dsc_optim_check(enum dsc_optim_kind kind, const struct dsc_hyper *h, int group) {
    if (kind == DSC_OPTIM_FOREIGN)
        return DSC_OK; /* its own business */
    REQUIRE(h->lr >= 0 && isfinite(h->lr), "lr", h->lr, "a finite number >= 0");
    REQUIRE(h->weight_decay >= 0 && isfinite(h->weight_decay), "weight_decay", h->weight_decay,
            "a finite number >= 0");
    if (kind == DSC_OPTIM_SGD)
        return check_sgd(h, group);
    if (kind != DSC_OPTIM_ADAGRAD)
        DSC_TRY(check_betas(h, group));
    if (kind != DSC_OPTIM_LION)
        REQUIRE(h->eps >= 0 && isfinite(h->eps), "eps", h->eps, "a finite number >= 0");
    if (kind == DSC_OPTIM_ADAGRAD)
        REQUIRE(h->lr_decay >= 0 && isfinite(h->lr_decay), "lr_decay", h->lr_decay,
                "a finite number >= 0");
    if (kind == DSC_OPTIM_LAMB) {
        REQUIRE(h->min_coeff >= 0, "min_coeff", h->min_coeff, "a number >= 0");
        REQUIRE(h->max_coeff >= h->min_coeff, "max_coeff", h->max_coeff, "at least min_coeff");
    }
    return DSC_OK;
}

static void prepare_adam(const struct dsc_hyper *h, double c1, double c2, double grad_scale,
                         struct dsc_adam *out) {
    *out = (struct dsc_adam){
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

static void prepare_lamb(const struct dsc_hyper *h, double c1, double c2, double grad_scale,
                         struct dsc_optim_args *out) {
    out->lamb = (struct dsc_lamb){
        .grad_scale = (float)grad_scale,
        .beta1 = (float)h->beta1,
        .one_minus_beta1 = (float)(1.0 - h->beta1),
        .beta2 = (float)h->beta2,
        .one_minus_beta2 = (float)(1.0 - h->beta2),
        .eps = (float)h->eps,
        .decay = (float)h->weight_decay,
        .eps_inside = h->eps_inside,
    };
    out->lamb_step = h->lr * sqrt(c2) / c1;
    out->min_coeff = h->min_coeff;
    out->max_coeff = h->max_coeff;
}

void dsc_optim_prepare(enum dsc_optim_kind kind, const struct dsc_hyper *h, uint64_t step,
                       double grad_scale, struct dsc_optim_args *out) {
    double c1 = h->bias_correction ? 1.0 - pow(h->beta1, (double)step) : 1.0;
    double c2 = h->bias_correction ? 1.0 - pow(h->beta2, (double)step) : 1.0;
    out->kind = kind;
    switch (kind) {
    case DSC_OPTIM_ADAM:
        prepare_adam(h, c1, c2, grad_scale, &out->adam);
        break;
    case DSC_OPTIM_SGD:
        out->sgd = (struct dsc_sgd){
            (float)grad_scale,      (float)h->lr, (float)h->momentum, (float)(1.0 - h->dampening),
            (float)h->weight_decay, h->nesterov,  step == 1};
        break;
    case DSC_OPTIM_ADAGRAD:
        out->adagrad = (struct dsc_adagrad){
            (float)grad_scale, (float)(h->lr / (1.0 + (double)(step - 1) * h->lr_decay)),
            (float)h->weight_decay, (float)h->eps, h->raw_numerator};
        break;
    case DSC_OPTIM_LION:
        out->lion = (struct dsc_lion){(float)grad_scale,
                                      (float)h->lr,
                                      (float)h->beta1,
                                      (float)(1.0 - h->beta1),
                                      (float)h->beta2,
                                      (float)(1.0 - h->beta2),
                                      (float)(h->lr * h->weight_decay)};
        break;
    case DSC_OPTIM_LAMB:
        prepare_lamb(h, c1, c2, grad_scale, out);
        break;
    case DSC_OPTIM_FOREIGN:
    case DSC_OPTIM_COUNT:
        break;
    }
}

void dsc_optim_apply(const struct dsc_optim_args *args, float *p, float *const state[],
                     const float *grad, size_t n) {
    const struct dsc_kernels *kernels = dsc_kernels();
    switch (args->kind) {
    case DSC_OPTIM_ADAM:
        kernels->adam(p, state[0], state[1], grad, n, &args->adam);
        break;
    case DSC_OPTIM_SGD:
        kernels->sgd(p, state[0], grad, n, &args->sgd);
        break;
    case DSC_OPTIM_ADAGRAD:
        kernels->adagrad(p, state[0], grad, n, &args->adagrad);
        break;
    case DSC_OPTIM_LION:
        kernels->lion(p, state[0], grad, n, &args->lion);
        break;
    case DSC_OPTIM_LAMB:
    case DSC_OPTIM_FOREIGN:
    case DSC_OPTIM_COUNT:
        break;
    }
}
