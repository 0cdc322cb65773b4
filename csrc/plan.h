/* The planner: what training a model will take, before any of it is allocated.
 *
 * Decides: how what one rank holds adds up to a node, phase by phase. Which arrays there are, how
 * large, and who owns what it asks engine_needs, bucket_sizes, spread and space, by which the
 * engine allocates. Invariant: it allocates nothing that is as large as the model. */
#ifndef DSC_PLAN_H
#define DSC_PLAN_H

#include "engine.h"
#include "fetch.h"

/* What memory is for: name, in a table. */
#define DSC_PLAN_KIND_MAP(X)                                                                       \
    X(DSC_PLAN_PARAMETERS, "parameters")                                                           \
    X(DSC_PLAN_FROZEN, "frozen parameters")                                                        \
    X(DSC_PLAN_GATHERED, "gathered parameters")                                                    \
    X(DSC_PLAN_BUFFERS, "buffers")                                                                 \
    X(DSC_PLAN_GRADIENTS, "gradients")                                                             \
    X(DSC_PLAN_MICRO_SUMS, "sums over micro-steps")                                                \
    X(DSC_PLAN_SUMS, "reduced sums")                                                               \
    X(DSC_PLAN_MASTERS, "masters")                                                                 \
    X(DSC_PLAN_STATES, "optimizer states")                                                         \
    X(DSC_PLAN_STAGING, "staging")                                                                 \
    X(DSC_PLAN_ROUNDING, "rounding")

#define DSC_PLAN_PHASE_MAP(X)                                                                      \
    X(DSC_PLAN_INITIALIZE, "initialize")                                                           \
    X(DSC_PLAN_FORWARD, "forward")                                                                 \
    X(DSC_PLAN_BACKWARD, "backward")                                                               \
    X(DSC_PLAN_STEP, "step")

#define DSC_PLAN_TRAFFIC_MAP(X)                                                                    \
    X(DSC_PLAN_REDUCE, "gradients to their owners")                                                \
    X(DSC_PLAN_SHARE_SUMS, "sums to all ranks")                                                    \
    X(DSC_PLAN_SPREAD, "new values to all ranks")                                                  \
    X(DSC_PLAN_GATHER, "parameters to all ranks")

#define X(name, text) name,
enum dsc_plan_kind { DSC_PLAN_KIND_MAP(X) DSC_PLAN_KIND_COUNT };
enum dsc_plan_phase { DSC_PLAN_PHASE_MAP(X) DSC_PLAN_PHASE_COUNT };
enum dsc_plan_traffic { DSC_PLAN_TRAFFIC_MAP(X) DSC_PLAN_TRAFFIC_COUNT };
#undef X

/* A reduce group: rank r of the job is its rank r / stride % n_ranks. */
struct dsc_plan_group {
    int n_ranks, stride;
    /* At stage 3: elements that stay gathered, and the most others that are used at a time. */
    size_t kept_elems, used_elems;
};

struct dsc_plan_frozen {
    size_t n_elems, elem_size;
    int reduce;
};

struct dsc_plan_model {
    const struct dsc_param *params; /* those that are trained, as they are trained; groups unused */
    size_t n_params;
    const struct dsc_plan_frozen *frozen; /* parameters that are not */
    size_t n_frozen;
    size_t buffer_bytes;
    size_t given_bytes; /* of all parameters and buffers as the model is made, before the cast */
    size_t cast_bytes;  /* of the largest parameter that changes its type; 0: none does */
    double foreign_state_bytes; /* per element, of an optimizer that torch runs */
    bool momentum;              /* SGD has one */
};

struct dsc_plan_job {
    struct dsc_plan_model model;
    const struct dsc_engine_options *options;
    uint64_t n_micro_steps; /* of a step */
    int n_ranks, n_nodes;   /* n_nodes divides n_ranks; more than one: ranks share no memory */
    struct dsc_plan_group reduce[DSC_REDUCE_MAX]; /* the first is of all ranks */
    size_t n_reduce;
    struct dsc_fetch_limits fetch;                /* stage 3, where ranks share no memory */
    bool params_in_files;                         /* stage 3 */
    size_t comm_private_bytes, comm_shared_bytes; /* of a rank's communicator */
};

/* Bytes in one optimizer step. */
struct dsc_plan_bytes {
    uint64_t times;        /* per step */
    size_t sent, received; /* by the rank with most */
    size_t between_nodes;  /* sent by a node to others */
};

struct dsc_plan {
    /* private_bytes: of the rank with most in all; the others of the node with most. Gradients and
     * gathered parameters as in the phase that has most. */
    size_t private_bytes[DSC_PLAN_KIND_COUNT], shared_bytes[DSC_PLAN_KIND_COUNT];
    size_t file_bytes[DSC_PLAN_KIND_COUNT];
    size_t rank_bytes[DSC_PLAN_PHASE_COUNT]; /* private, of that rank */
    size_t node_bytes[DSC_PLAN_PHASE_COUNT]; /* of that node: all its ranks, and what they share */
    struct dsc_plan_bytes traffic[DSC_PLAN_TRAFFIC_COUNT];
};

/* scale multiplies the size of every tensor. */
enum dsc_status dsc_plan_make(const struct dsc_plan_job *job, double scale, struct dsc_plan *out);
/* The largest scale with which no phase takes more than n_bytes on a node; 0: none does. */
enum dsc_status dsc_plan_fit(const struct dsc_plan_job *job, size_t n_bytes, double *scale);

/* The names of the tables above. */
const char *dsc_plan_kind_name(enum dsc_plan_kind kind);
const char *dsc_plan_phase_name(enum dsc_plan_phase phase);
const char *dsc_plan_traffic_name(enum dsc_plan_traffic traffic);

#endif
