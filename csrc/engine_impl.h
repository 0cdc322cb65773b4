/* What engine.c (life, backward) and engine_step.c (the boundary) share. Nobody else includes it.
 *
 * Names: a space whose reduce group is one rank is `alone` and has no buckets; a space `keeps`
 * gradients when they stay with this rank until the boundary (stages 0 and 1, or alone) and is
 * `early` when they are handed over inside backward (stages 2 and 3, or overlap). Where ranks share
 * no memory none is early: at stages 2 and 3 a round is exchanged when a backward pass ends
 * (engine_remote.c). The engine's flags follow from the first reduce group, so that they are equal
 * on all control ranks, and hold for all spaces that are not alone: where it is one rank, experts
 * over several keep theirs until the boundary at every stage. Invariant: an early engine at stage 0
 * or 1 hands over in the boundary's backward only, so that micro-steps add up as without overlap.
 */
#ifndef DSC_ENGINE_IMPL_H
#define DSC_ENGINE_IMPL_H

#include "bucket.h"
#include "engine.h"
#include "engine_needs.h"
#include "pool.h"
#include "source.h"
#include "update.h"

#include <sys/types.h>

enum { DSC__ENGINE_RUN = 4 * DSC_BLOCK };

/* Where the first non-finite element of a step was seen on this rank. */
struct dsc__culprit {
    int64_t param; /* -1: none */
    uint64_t elem, micro;
};

struct dsc_engine {
    struct dsc_engine_ranks ranks;
    struct dsc_comm *comm; /* of all control ranks */
    struct dsc_engine_options options;
    struct dsc_pool *pool;
    int rank, size; /* in comm */
    int32_t *ids;   /* per control rank, DSC_REDUCE_MAX each: of its reduce groups; -1: none */
    pid_t pid;      /* that opened it: a forked child has no windows */
    struct dsc_engine_ways ways;
    bool any_folded; /* as of the last meeting: some rank brings fp32 sums of 16-bit gradients */
    bool deferring;  /* see dsc_engine_begin_deferring */

    size_t n_params;
    struct dsc_param *params;
    int *param_space;
    size_t *param_segment;
    struct dsc_space *spaces;
    size_t n_spaces;
    struct dsc_holding *holdings; /* per space */
    struct dsc_io *io;            /* of states in files; NULL: they are in memory */
    bool file_failed;             /* in an earlier step, which is half done */
    float **local;                /* per space: fp32 sums over micro-steps; NULL until needed */
    bool *folded;                 /* per parameter: in `local` for this step */
    bool *touched;                /* per parameter: has got a gradient in the open step */
    bool *marked;                 /* per parameter: scratch of one call */
    atomic_bool *changed;         /* per parameter: written by somebody else, found in this step */
    struct dsc_source *sources;   /* per space: valid inside a step */
    size_t *n_folded;             /* per space: parameters that are or were folded in this step */
    struct dsc_spread *spread[DSC_REDUCE_MAX]; /* per reduce group; NULL where there is none */
    int n_groups;
    struct dsc_optim_args *args;
    float *steps;       /* per group: steps taken; SGD counts those with momentum; then scratch */
    float *shown_steps; /* per parameter: its group's; what is written here counts */
    double *squares;    /* per block of one DSC__ENGINE_RUN batch, of a space that is alone */
    struct dsc_norm *lamb_norms; /* NULL for other optimizers */
    char *meeting;               /* size * DSC_MEET_MAX */

    struct dsc_scaler scaler;
    uint64_t n_boundaries, n_micro; /* micro-steps of the open step */
    bool between;                   /* the halves of a foreign optimizer's step */
    int torn_by; /* 1 + the rank whose foreign optimizer raised in an earlier step; 0: none */
    bool pending_16bit; /* 16-bit gradients lie in .grad */
    bool boundary;      /* of the backward pass that runs or ran last */
    bool round_open;
    uint32_t n_rounds; /* ended in this step */
    double reduce_s;   /* of this step so far */
    struct dsc__culprit culprit;
    char label[64];
};

struct dsc_space_needs dsc__engine_needs(const struct dsc_engine *e, size_t space);
const struct dsc_segment *dsc__engine_segment(const struct dsc_engine *e, size_t param);
bool dsc__engine_is_16bit(const struct dsc_engine *e, size_t param);
/* Of a space, -1: of no space, which is neither. */
static inline bool dsc__engine_shares(const struct dsc_engine *e, int space) {
    return space >= 0 && e->holdings[space].buckets;
}
static inline bool dsc__engine_keeps(const struct dsc_engine *e, int space) {
    return space >= 0 && (e->ways.keeps || !e->holdings[space].buckets);
}
/* dsc_engine_check; shared_only: of what is not alone. */
void dsc__engine_check(struct dsc_engine *e, const struct dsc_view *views, bool shared_only);
/* Some space has fp32 sums of 16-bit gradients in this step. */
bool dsc__engine_any_folded(const struct dsc_engine *e);
/* dsc_comm_cover on all communicators of the engine; returns what was set on the control one. */
bool dsc__engine_cover(struct dsc_engine *e, bool covered);
/* A parameter's gradient joins this rank's fp32 sums. */
enum dsc_status dsc__engine_fold_one(struct dsc_engine *e, size_t param, const void *grad,
                                     enum dsc_dtype dtype, uint64_t micro);
/* Memory for the fp32 sums of a space. */
enum dsc_status dsc__engine_need_local(struct dsc_engine *e, size_t s);
/* DSC_ESTATE in a forked child. */
enum dsc_status dsc__engine_usable(const struct dsc_engine *e);
/* DSC_ESTATE after a step that a foreign optimizer has left half done; see engine_step.c. */
enum dsc_status dsc__engine_check_whole(const struct dsc_engine *e);
/* Rounds of all spaces open and end together. sources: what did not arrive; NULL: nothing. */
void dsc__engine_open_round(struct dsc_engine *e);
enum dsc_status dsc__engine_end_round(struct dsc_engine *e, const struct dsc_source *sources);

/* engine_files.c. DSC_ENOMEM where masters, states and sums cannot fit in the memory that the
 * ranks' control groups allow; the kernel would end a process. Collective. */
enum dsc_status dsc__engine_check_room(struct dsc_engine *e);
/* Opens files where the options say so; collective. */
enum dsc_status dsc__engine_open_files(struct dsc_engine *e);
/* Masters or states of a space, a tensor of swap.h: of its file, or of memory. */
enum dsc_status dsc__engine_hold(struct dsc_holding *holding, int tensor, float **out);
/* A step has begun: the first windows are read while gradients are reduced. */
void dsc__engine_begin_files(struct dsc_engine *e);
/* A step is over, with this status, which is returned: nothing is under way any more. */
enum dsc_status dsc__engine_end_files(struct dsc_engine *e, enum dsc_status status);

/* Makes each space's source from the views; see engine_step.c. */
enum dsc_status dsc__engine_make_sources(struct dsc_engine *e, struct dsc_view *views);
/* Ends the open round with what did not arrive, and further rounds until nothing is left and all
 * ranks have as many; `marked` parameters' views lose their gradients. Collective. */
enum dsc_status dsc__engine_end_rounds(struct dsc_engine *e, struct dsc_view *views,
                                       uint32_t *n_rounds);
/* What the sources held has been handed over, and counts once. */
void dsc__engine_forget_sources(struct dsc_engine *e, struct dsc_view *views);
/* A round of its own for what the sources hold. */
enum dsc_status dsc__engine_hand_over(struct dsc_engine *e, struct dsc_view *views);
/* engine_remote.c. A round with what the views hold; a rank that is at its boundary takes part with
 * nothing. Collective. */
enum dsc_status dsc__engine_remote_round(struct dsc_engine *e, struct dsc_view *views);
/* At the boundary: takes part in the rounds of ranks that are still in backward passes. */
enum dsc_status dsc__engine_remote_gate(struct dsc_engine *e);
/* As dsc__engine_end_rounds. */
enum dsc_status dsc__engine_remote_end_rounds(struct dsc_engine *e, struct dsc_view *views,
                                              uint32_t *n_rounds);
/* Every rank's contributions have the same type. */
void dsc__engine_remote_set_dtypes(struct dsc_engine *e);
/* Whether the sources hold anything. */
bool dsc__engine_anything_left(const struct dsc_engine *e);
/* What the sum over ranks is divided by; wire.divisor is a part of it that is done already. */
double dsc__engine_divisor(const struct dsc_engine *e);

#endif
