/* From sums to new values: unscale, clip, optimizer, cast, and the new values to the other ranks.
 *
 * Decides: the order in which elements are stepped and spread. An element-wise optimizer does all
 * in one pass; LAMB walks parameters first and casts and spreads then; a foreign optimizer gets
 * gradients, runs, and its values are cast and spread. Invariant: which rank steps an element
 * changes no bit. */
#ifndef DSC_UPDATE_H
#define DSC_UPDATE_H

#include "bucket.h"
#include "lamb.h"
#include "optim.h"
#include "spread.h"
#include "swap.h"

#include <stdatomic.h>

/* What this rank holds of one space. */
struct dsc_holding {
    const struct dsc_space *space;
    struct dsc_comm *comm;    /* of the reduce group */
    struct dsc_range stepped; /* elements that this rank steps: its own, or all of them (stage 0) */
    bool owns;                /* its own */
    float *master;            /* fp32 values of `stepped`; NULL where parameters are their own */
    float *state[DSC_OPTIM_MAX_STATES]; /* of `stepped` */
    float *grads;                       /* of `stepped`, for a foreign optimizer; else NULL */
    struct dsc_buckets *buckets;        /* NULL in a group of one */
    struct dsc_spread *spread; /* NULL: what this rank steps is all that it has, or where all have
                                  it */
    struct dsc_swap *swap; /* masters and states are a file's, mapped; NULL: they are in memory */
};

struct dsc_update {
    struct dsc_pool *pool;
    struct dsc_view *views;
    const struct dsc_source *source;   /* gradients in a group of one */
    const struct dsc_optim_args *args; /* per group */
    double grad_scale;                 /* for a foreign optimizer; `args` have it in them */
    struct dsc_norm *norms;            /* LAMB: DSC_LAMB_NORMS */
    const char *label;                 /* for waits */
    atomic_bool *changed; /* per parameter: set where a 16-bit value is not its master's: somebody
                             else wrote it, and the master takes it before the step */
};

/* Steps and spreads one space; not for a foreign optimizer. Collective where holding->spread is
 * set. */
enum dsc_status dsc_update_run(const struct dsc_update *update, const struct dsc_holding *holding);
/* Masters take what changed outside; holding->grads = the gradients, averaged, unscaled, clipped.
 */
enum dsc_status dsc_update_gradients(const struct dsc_update *update,
                                     const struct dsc_holding *holding);
/* Casts what is stepped and spreads it. Collective where holding->spread is set. */
enum dsc_status dsc_update_values(const struct dsc_update *update,
                                  const struct dsc_holding *holding);
/* master = the parameter's values, for the parts of one parameter that this rank steps. */
void dsc_update_load_master(const struct dsc_holding *holding, const struct dsc_segment *segment,
                            const struct dsc_view *view);

#endif
