/* The two passes of LAMB. Both compute the direction, from the same numbers: see kernels/lamb.h. */
#include "lamb.h"

#include "clip.h"

#include <math.h>

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
    for (size_t k = begin; k < end; k++) {
        size_t at = (round->first_block + k) * DSC_BLOCK;
        size_t n = block_size(job, round->first_block + k);
        const float *grad = job->gradient(job->context, at, n, scratch);
        kernels->lamb_moments(direction, job->m + at, job->v + at, job->p + at, grad, n,
                              &job->args->lamb);
        job->squares[2 * k] = kernels->sum_squares(job->p + at, n);
        job->squares[2 * k + 1] = kernels->sum_squares(direction, n);
    }
}

static void steps(void *context, size_t begin, size_t end) {
    const struct round *round = context;
    const struct dsc_lamb_job *job = round->job;
    for (size_t k = begin; k < end; k++) {
        size_t at = k * DSC_BLOCK;
        dsc_kernels()->lamb_step(job->p + at, job->m + at, job->v + at, block_size(job, k),
                                 round->step, &job->args->lamb);
    }
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
    for (size_t at = 0; at < n_blocks; at += DSC_LAMB_RUN) {
        size_t n = dsc_min(DSC_LAMB_RUN, n_blocks - at);
        struct round round = {job, at, 0};
        dsc_pool_run(job->pool, n, 16, moments, &round);
        for (size_t k = 0; k < 2 * n; k++)
            dsc_norm_add(&norms[k % 2], job->squares[k]);
    }
    double ratio = trust_ratio(norms, job->args);
    struct round round = {job, 0, (float)(job->args->lamb_step * ratio)};
    dsc_pool_run(job->pool, n_blocks, 16, steps, &round);
    return ratio;
}
