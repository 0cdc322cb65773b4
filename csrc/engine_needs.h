/* What an engine holds: told from its settings and ranks before anything is allocated.
 *
 * Decides: which arrays of a space exist at which stage, and how gradients go. Invariant: the
 * engine opens by this and the planner (plan.h) counts by this, so that a plan is what is
 * allocated. */
#ifndef DSC_ENGINE_NEEDS_H
#define DSC_ENGINE_NEEDS_H

#include "bucket.h"
#include "engine.h"

/* DSC_ENOTYET where the engine cannot do what the options ask for. */
enum dsc_status dsc_engine_check_options(const struct dsc_engine_options *options);
/* Whether spaces are cut at parameter borders only. */
bool dsc_engine_keeps_whole(const struct dsc_engine_options *options);

/* The engine's flags; engine_impl.h says what they mean. */
struct dsc_engine_ways {
    bool alone;  /* the first reduce group is one rank */
    bool remote; /* ranks share no memory: never early */
    bool early, keeps;
    bool folds; /* 16-bit gradients add up in fp32 over micro-steps */
};
/* n_first: ranks of the first reduce group. */
struct dsc_engine_ways dsc_engine_ways_of(const struct dsc_engine_options *options, int n_first,
                                          bool remote);

/* What one rank holds of one space. */
struct dsc_space_needs {
    struct dsc_range stepped; /* what this rank steps; the arrays are of it, 4 bytes an element */
    bool owns;                /* that is its own part */
    bool master;
    int n_states; /* from the start */
    int n_filed;  /* masters and states that have a place in a file, at once or later; 0: none */
    int64_t n_buffers; /* windows for them in memory, while they are stepped */
    bool grads;        /* for a foreign optimizer */
    bool spread;       /* new values come from other ranks */
    bool shared;       /* the reduce group is more than one rank: there are buckets */
    bool keeps;        /* gradients stay with this rank until the boundary */
    bool local;        /* fp32 sums over micro-steps, of the whole space, from the start */
    struct dsc_bucket_options buckets; /* but for the pool */
};
struct dsc_space_needs dsc_engine_needs(const struct dsc_engine_options *options,
                                        const struct dsc_engine_ways *ways,
                                        const struct dsc_space *space, int rank);

#endif
