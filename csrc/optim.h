/* Optimizers: hyper-parameters of a group become kernel arguments, and a run of elements is
 * stepped.
 *
 * Decides: which states an optimizer keeps, whether it needs whole parameters, and the arithmetic
 * in double that prepares a step. Invariant: nothing is cached between steps, so what a user writes
 * into param_groups is what the next step uses. */
#ifndef DSC_OPTIM_H
#define DSC_OPTIM_H

#include "dsc.h"
#include "kernels/kernels.h"

/* name, fp32 states per element, whole: a step needs all elements of a parameter at once.
 * FOREIGN is an optimizer that is not ours: the engine hands out gradients and takes values. */
#define DSC_OPTIM_MAP(X)                                                                           \
    X(DSC_OPTIM_ADAM, "adam", 2, false)                                                            \
    X(DSC_OPTIM_SGD, "sgd", 1, false)                                                              \
    X(DSC_OPTIM_ADAGRAD, "adagrad", 1, false)                                                      \
    X(DSC_OPTIM_LION, "lion", 1, false)                                                            \
    X(DSC_OPTIM_LAMB, "lamb", 2, true)                                                             \
    X(DSC_OPTIM_FOREIGN, "foreign", 0, false)

enum dsc_optim_kind {
#define X(kind, name, n_states, whole) kind,
    DSC_OPTIM_MAP(X)
#undef X
        DSC_OPTIM_COUNT
};
enum { DSC_OPTIM_MAX_STATES = 2 };

struct dsc_optim_info {
    const char *name;
    int n_states;
    bool whole;
};
/* The row of a kind; never NULL. */
const struct dsc_optim_info *dsc_optim_info(enum dsc_optim_kind kind);
/* DSC_EINVAL for a name that the table has not. */
enum dsc_status dsc_optim_find(const char *name, enum dsc_optim_kind *out);

/* One parameter group, as its dict says now. What an optimizer does not have is ignored. */
struct dsc_hyper {
    double lr, weight_decay, eps;
    double beta1, beta2;             /* Adam, Lion, LAMB */
    double momentum, dampening;      /* SGD */
    double lr_decay;                 /* Adagrad */
    double min_coeff, max_coeff;     /* LAMB */
    bool decoupled, bias_correction; /* Adam; bias_correction: LAMB too */
    bool nesterov;                   /* SGD */
    bool raw_numerator;              /* Adagrad: DeepSpeedCPUAdagrad's rule */
    bool eps_inside;                 /* LAMB */
};

/* Kernel arguments of one group and step. */
struct dsc_optim_args {
    enum dsc_optim_kind kind;
    union {
        struct dsc_adam adam;
        struct dsc_sgd sgd;
        struct dsc_adagrad adagrad;
        struct dsc_lion lion;
        struct dsc_lamb lamb;
    };
    double lamb_step, min_coeff, max_coeff; /* LAMB: step size before the trust ratio; its limits */
};

/* DSC_EINVAL names what is out of range ("parameter group 1: lr is -1, allowed: ..."). */
enum dsc_status dsc_optim_check(enum dsc_optim_kind kind, const struct dsc_hyper *hyper, int group);
/* `step` counts from 1. grad_scale multiplies every gradient element first. */
void dsc_optim_prepare(enum dsc_optim_kind kind, const struct dsc_hyper *hyper, uint64_t step,
                       double grad_scale, struct dsc_optim_args *out);
/* Steps a run of elements; not for LAMB (lamb.h) and FOREIGN. state[i] points to the run's own
 * elements; unused states may be NULL. */
void dsc_optim_apply(const struct dsc_optim_args *args, float *p, float *const state[],
                     const float *grad, size_t n);

#endif
