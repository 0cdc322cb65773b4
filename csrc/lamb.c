/* The two passes of LAMB. Both compute the direction, from the same numbers: see kernels/lamb.h. */
#include "lamb.h"

#include <math.h>
#include <string.h>

struct round {
    const struct dsc_lamb_job *job;
    size_t first_block;
    float step;
};

static size_t block_size(const struct dsc_lamb_job *job, size_t block) {
    return dsc_min(DSC_BLOCK, job->n - block * DSC_BLOCK);
}

static void moments(void *context, size_t begin, size_t end) {
    const struct round *round = context;
    const struct dsc_lamb_job *job = round->job;
    const struct dsc_kernels *kernels = dsc_kernels();
    float scratch[DSC_BLOCK], direction[DSC_BLOCK];
    struct dsc_norm *norms = &job->norms[begin / DSC_LAMB_GRAIN * 2]; /* of p, of the direction */
    memset(norms, 0, 2 * sizeof *norms);
    for (size_t k = begin; k < end; k++) {
        size_t at = (round->first_block + k) * DSC_BLOCK;
        size_t n = block_size(job, round->first_block + k);
        const float *grad = job->gradient(job->context, at, n, scratch);
        kernels->lamb_moments(direction, job->m + at, job->v + at, job->p + at, grad, n,
                              &job->args->lamb);
        dsc_norm_add(&norms[0], kernels->sum_squares(job->p + at, n));
        dsc_norm_add(&norms[1], kernels->sum_squares(direction, n));
    }
}

static void steps(void *context, size_t begin, size_t end) {
    const struct round *round = context;
    const struct dsc_lamb_job *job = round->job;
    size_t at = begin * DSC_BLOCK, n = dsc_min(end * DSC_BLOCK, job->n) - at;
    dsc_kernels()->lamb_step(job->p + at, job->m + at, job->v + at, n, round->step,
                             &job->args->lamb);
}

/* clamp(|p| / |u|); 1 where a norm is 0 or not finite. */
static double trust_ratio(const struct dsc_norm norms[2], const struct dsc_optim_args *args) {
    double p = sqrt(dsc_norm_sum(&norms[0])), u = sqrt(dsc_norm_sum(&norms[1]));
    if (!(p > 0 && u > 0))
        return 1.0;
    return fmin(fmax(p / u, args->min_coeff), args->max_coeff);
}

double dsc_lamb_step(const struct dsc_lamb_job *job) {
    struct dsc_norm norms[2] = {{.n_nonfinite = 0}, {.n_nonfinite = 0}};
    size_t n_blocks = (job->n + DSC_BLOCK - 1) / DSC_BLOCK;
    for (size_t at = 0; at < n_blocks; at += DSC_LAMB_PIECES * DSC_LAMB_GRAIN) {
        size_t n = dsc_min(DSC_LAMB_PIECES * DSC_LAMB_GRAIN, n_blocks - at);
        struct round round = {job, at, 0};
        dsc_pool_run(job->pool, n, DSC_LAMB_GRAIN, moments, &round);
        for (size_t k = 0; k < 2 * ((n + DSC_LAMB_GRAIN - 1) / DSC_LAMB_GRAIN); k++)
            dsc_norm_merge(&norms[k % 2], &job->norms[k]);
    }
    double ratio = trust_ratio(norms, job->args);
    struct round round = {job, 0, (float)(job->args->lamb_step * ratio)};
    dsc_pool_run(job->pool, n_blocks, DSC_LAMB_GRAIN, steps, &round);
    return ratio;
}
