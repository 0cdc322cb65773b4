/* One optimizer step without an engine: a parameter of any training dtype, updated in place.
 *
 * Decides: how 16-bit parameters, gradients and states meet rules that are fp32: they are widened
 * run by run on the stack and rounded back. Invariant: fp32 memory is stepped where it lies. */
#ifndef DSC_STEPPING_H
#define DSC_STEPPING_H

#include "lamb.h"
#include "optim.h"
#include "pool.h"

/* Borrowed memory of one parameter, all n elements in one order. */
struct dsc_stepped {
    void *p;
    const void *grad;
    void *state[DSC_OPTIM_MAX_STATES]; /* NULL where the rule needs none */
    enum dsc_dtype p_dtype, grad_dtype, state_dtype;
    size_t n;
    double trust_ratio; /* LAMB: what came out */
};

/* norms: DSC_LAMB_NORMS of them, for LAMB only. LAMB takes fp32 parameters and states:
 * DSC_ETYPE for others. The caller has set the floating-point state. */
enum dsc_status dsc_stepping_run(struct dsc_pool *pool, const struct dsc_optim_args *args,
                                 struct dsc_norm *norms, struct dsc_stepped *stepped);

#endif
