/* One LAMB step over a whole parameter, in two passes with the trust ratio in between.
 *
 * Decides: the shape of the two norms: blocks of DSC_BLOCK elements counted from the parameter's
 * first, each summed in 16 lanes, combined by an exact sum. Invariant: the ratio depends on the
 * parameter's values only, never on ranks, threads, tiers or where the parameter lies. */
#ifndef DSC_LAMB_H
#define DSC_LAMB_H

#include "clip.h"
#include "optim.h"
#include "pool.h"

/* One round of the pool takes at most DSC_LAMB_PIECES, each with two norms. */
enum { DSC_LAMB_PIECES = 256, DSC_LAMB_NORMS = 2 * DSC_LAMB_PIECES };

struct dsc_lamb_job {
    struct dsc_pool *pool;
    const struct dsc_optim_args *args;
    float *p, *m, *v;
    size_t n;
    /* The gradient of elements [begin, begin + n), n <= DSC_BLOCK: `scratch` filled, or memory that
     * is there. Called from the pool's threads, once per block, before the block's p is read. */
    const float *(*gradient)(void *context, size_t begin, size_t n, float *scratch);
    void *context;
    struct dsc_norm *norms; /* DSC_LAMB_NORMS, for work */
};

/* Returns the trust ratio. */
double dsc_lamb_step(const struct dsc_lamb_job *job);

#endif
