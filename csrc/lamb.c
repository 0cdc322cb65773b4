/* The two passes of LAMB. Both compute the direction, from the same numbers: see kernels/lamb.h. */
#include "lamb.h"

#include <math.h>
#include <string.h>

struct round {
    const struct dsc_lamb_job *job;
    size_t first_block, n_blocks, grain;
    float step;
};

static size_t block_size(const struct dsc_lamb_job *job, size_t block) {
    return dsc_min(DSC_BLOCK, job->n - block * DSC_BLOCK);
}

static void moments(void *context, size_t begin, size_t end) {
    const struct round *round = context;
    const struct dsc_lamb_job *job = round->job;
    const struct dsc_kernels *kernels = dsc_kernels();
    float scratch[DSC_BLOCK];
    double squares[2];
    struct dsc_norm *norms = &job->norms[begin / round->grain * 2]; /* of p, of the direction */
    memset(norms, 0, 2 * sizeof *norms);
    for (size_t k = begin; k < end; k++) {
        size_t at = (round->first_block + k) * DSC_BLOCK;
        size_t n = block_size(job, round->first_block + k);
        const float *grad = job->gradient(job->context, at, n, scratch);
        kernels->lamb_moments(job->m + at, job->v + at, job->p + at, grad, n, &job->args->lamb,
                              squares);
        dsc_norm_add(&norms[0], squares[0]);
        dsc_norm_add(&norms[1], squares[1]);
    }
}

static void steps(void *context, size_t begin, size_t end) {
    const struct round *round = context;
    const struct dsc_lamb_job *job = round->job;
    /* From the end: that is what the caches still hold of the first pass. */
    size_t at = (round->n_blocks - end) * DSC_BLOCK;
    size_t n = dsc_min((round->n_blocks - begin) * DSC_BLOCK, job->n) - at;
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

/* Blocks of a piece: long pieces suit the memory, but there have to be enough of them to share. */
static size_t grain_for(size_t n_blocks) {
    return dsc_min(dsc_max(n_blocks / 16, 8), 256);
}

double dsc_lamb_step(const struct dsc_lamb_job *job) {
    struct dsc_norm norms[2] = {{.n_nonfinite = 0}, {.n_nonfinite = 0}};
    size_t n_blocks = (job->n + DSC_BLOCK - 1) / DSC_BLOCK, grain = grain_for(n_blocks);
    struct round round = {job, 0, n_blocks, grain, 0};
    for (; round.first_block < n_blocks; round.first_block += DSC_LAMB_PIECES * grain) {
        size_t n = dsc_min(DSC_LAMB_PIECES * grain, n_blocks - round.first_block);
        dsc_pool_run(job->pool, n, grain, moments, &round);
        for (size_t k = 0; k < 2 * ((n + grain - 1) / grain); k++)
            dsc_norm_merge(&norms[k % 2], &job->norms[k]);
    }
    double ratio = trust_ratio(norms, job->args);
    round.step = (float)(job->args->lamb_step * ratio);
    dsc_pool_run(job->pool, n_blocks, grain, steps, &round);
    return ratio;
}
