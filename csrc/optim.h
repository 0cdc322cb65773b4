/* Optimizers: hyper-parameters of a group become kernel arguments, and a run of elements is
 * stepped.
 *
 * Decides: which state an optimizer keeps and the arithmetic in double that prepares a step.
 * Invariant: nothing is cached between steps but the count of steps, so what a user writes into
 * param_groups is what the next step uses. */
#ifndef DSC_OPTIM_H
#define DSC_OPTIM_H

#include "dsc.h"
#include "kernels/kernels.h"

enum dsc_optim_kind { DSC_OPTIM_ADAM, DSC_OPTIM_SGD };
enum { DSC_OPTIM_MAX_STATES = 2 };

/* One parameter group, as its dict says now. What an optimizer does not have is ignored. */
struct dsc_hyper {
    double lr, weight_decay;
    double beta1, beta2, eps;        /* Adam */
    double momentum, dampening;      /* SGD */
    bool decoupled, bias_correction; /* Adam */
    bool nesterov;                   /* SGD */
};

/* Kernel arguments of one group and step. */
struct dsc_optim_args {
    enum dsc_optim_kind kind;
    struct dsc_adam adam;
    struct dsc_sgd sgd;
};

/* DSC_EINVAL names what is out of range ("group 1: lr is -1, allowed: >= 0"). */
enum dsc_status dsc_optim_check(enum dsc_optim_kind kind, const struct dsc_hyper *hyper, int group);
/* `step` counts from 1. grad_scale multiplies every gradient element first. */
void dsc_optim_prepare(enum dsc_optim_kind kind, const struct dsc_hyper *hyper, uint64_t step,
                       double grad_scale, struct dsc_optim_args *out);
/* state[i] points to the run's own elements; unused states may be NULL. */
void dsc_optim_apply(const struct dsc_optim_args *args, float *p, float *const state[],
                     const float *grad, size_t n);

#endif
