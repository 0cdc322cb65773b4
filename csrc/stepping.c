/* Runs of a parameter go to the pool; each widens what is not fp32, steps, and rounds back. */
#include "stepping.h"

enum { RUN = 4 * DSC_BLOCK };

struct job {
    const struct dsc_optim_args *args;
    const struct dsc_stepped *stepped;
};

static float *widened(enum dsc_dtype dtype, void *data, size_t at, size_t n, float *scratch) {
    char *begin = (char *)data + at * dsc_dtype_size(dtype);
    if (dtype == DSC_F32)
        return (float *)(void *)begin;
    dsc_kernels()->to_f32[dtype](scratch, begin, n);
    return scratch;
}

static void rounded_back(enum dsc_dtype dtype, void *data, size_t at, size_t n,
                         const float *values) {
    if (dtype != DSC_F32)
        dsc_kernels()->from_f32[dtype]((char *)data + at * dsc_dtype_size(dtype), values, n);
}

static bool all_f32(const struct dsc_stepped *s) {
    return s->p_dtype == DSC_F32 && s->grad_dtype == DSC_F32 && s->state_dtype == DSC_F32;
}

static void do_runs(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    const struct dsc_stepped *s = job->stepped;
    if (all_f32(s)) { /* nothing to keep in cache between loops */
        size_t at = begin * RUN, n = dsc_min(end * RUN, s->n) - at;
        float *state[DSC_OPTIM_MAX_STATES] = {NULL};
        for (int k = 0; k < DSC_OPTIM_MAX_STATES && s->state[k]; k++)
            state[k] = (float *)s->state[k] + at;
        dsc_optim_apply(job->args, (float *)s->p + at, state, (const float *)s->grad + at, n);
        return;
    }
    float wide_p[RUN], wide_grad[RUN], wide_state[DSC_OPTIM_MAX_STATES][RUN];
    for (size_t i = begin; i < end; i++) {
        size_t at = i * RUN, n = dsc_min(RUN, s->n - at);
        float *p = widened(s->p_dtype, s->p, at, n, wide_p);
        const float *grad = widened(s->grad_dtype, (void *)s->grad, at, n, wide_grad);
        float *state[DSC_OPTIM_MAX_STATES] = {NULL};
        for (int k = 0; k < DSC_OPTIM_MAX_STATES && s->state[k]; k++)
            state[k] = widened(s->state_dtype, s->state[k], at, n, wide_state[k]);
        dsc_optim_apply(job->args, p, state, grad, n);
        rounded_back(s->p_dtype, s->p, at, n, p);
        for (int k = 0; k < DSC_OPTIM_MAX_STATES && s->state[k]; k++)
            rounded_back(s->state_dtype, s->state[k], at, n, state[k]);
    }
}

static const float *gradient(void *context, size_t begin, size_t n, float *scratch) {
    const struct dsc_stepped *s = context;
    return widened(s->grad_dtype, (void *)s->grad, begin, n, scratch);
}

enum dsc_status dsc_stepping_run(struct dsc_pool *pool, const struct dsc_optim_args *args,
                                 struct dsc_norm *norms, struct dsc_stepped *stepped) {
    if (args->kind != DSC_OPTIM_LAMB) {
        struct job job = {args, stepped};
        size_t n_runs = (stepped->n + RUN - 1) / RUN;
        /* Long pieces suit the memory; there have to be enough of them to share. */
        size_t grain = dsc_min(dsc_max(n_runs / 16, 8), 128);
        dsc_pool_run(pool, n_runs, grain, do_runs, &job);
        return DSC_OK;
    }
    if (stepped->p_dtype != DSC_F32 || stepped->state_dtype != DSC_F32)
        return DSC_FAIL(DSC_ETYPE, "LAMB steps fp32 parameters with fp32 states, not %s with %s",
                        dsc_dtype_name(stepped->p_dtype), dsc_dtype_name(stepped->state_dtype));
    struct dsc_lamb_job job = {.pool = pool,
                               .args = args,
                               .p = stepped->p,
                               .m = stepped->state[0],
                               .v = stepped->state[1],
                               .n = stepped->n,
                               .gradient = gradient,
                               .context = stepped,
                               .norms = norms};
    stepped->trust_ratio = dsc_lamb_step(&job);
    return DSC_OK;
}
