/* The engine: from gradients to new parameters, one optimizer step at a time.
 *
 * Decides: the state machine of micro-step, boundary and skip; which memory exists at which stage.
 * ZeRO's stage is data: stage 0 shares the sums and steps everything on every rank, stages 1 and 2
 * step what a rank owns and spread it; stage 2 (and overlap) settles gradients inside backward.
 * Stage 3 is as stage 2, but a rank steps what it owns in the parameters' own memory, which all
 * ranks share or of which each has its part, and spreads nothing.
 * Invariant: with one micro-step per step, stage, overlap and bucket size change no bit (contract
 * N1); a step in the steady state allocates nothing (M2).
 *
 * An engine belongs to one thread at a time. It never keeps a view or a gradient between calls. */
#ifndef DSC_ENGINE_H
#define DSC_ENGINE_H

#include "comm/comm.h"
#include "optim.h"
#include "pool.h"
#include "scaler.h"
#include "space.h"
#include "swap.h"
#include "wire.h"

struct dsc_engine;

/* Ranks over which gradients of some parameters are added up, and their states shared out. */
struct dsc_reduce {
    struct dsc_comm *comm;
    int id; /* the same on its ranks, another one on the others: what must agree is compared by it
             */
};
/* Who steps together. Ranks of the first reduce group, equally many on all control ranks, train the
 * same parameters (of the same names and shapes); those of the others hold the same experts: fewer
 * ranks than the first group's, or with ranks of other first groups. Control ranks outside it have
 * other parameters, and step, skip and clip with it. */
enum { DSC_REDUCE_MAX = 16 };
struct dsc_engine_ranks {
    struct dsc_comm *control;
    struct dsc_reduce reduce[DSC_REDUCE_MAX]; /* dsc_param.reduce is an index */
    size_t n_reduce;
    int n_averaged; /* what every sum is divided by: the data-parallel ranks, for experts too */
};
/* The ordinary case: all ranks of a communicator are parallel over data. */
struct dsc_engine_ranks dsc_engine_ranks_of(struct dsc_comm *comm);

struct dsc_engine_options {
    int stage;             /* 0, 1, 2, 3 */
    bool overlap;          /* overlap_comm */
    size_t bucket_elems;   /* reduce_bucket_size, >= 1 */
    double clip;           /* gradient_clipping; 0 turns it off */
    bool skip_nonfinite;   /* a step with a non-finite gradient is skipped, else reported only */
    bool many_micro_steps; /* gradient_accumulation_steps > 1: fp32 sums are there from the start */
    bool narrow_sums; /* 16-bit gradients add up in their own type over micro-steps, not in fp32 */
    bool no_masters;  /* 16-bit parameters are their own masters */
    bool sum_only;    /* gradients of ranks are added, not averaged */
    struct dsc_wire wire; /* how gradients travel between ranks */
    enum dsc_optim_kind optim;
    bool whole; /* cut between parameters, for a foreign optimizer that needs them whole */
    struct dsc_scaler scaler;
    struct dsc_swap_options swap; /* masters and states in files */
    int n_threads;                /* of this rank */
    struct dsc_team team;         /* whose threads they are; none: the engine's own */
    uint64_t
        names_hash; /* of parameter names, so that ranks with different models are told apart */
};

/* What a step did. */
struct dsc_step_report {
    bool over;    /* the step is done, even where a status other than DSC_OK came back */
    bool stepped; /* false: skipped because of a non-finite gradient */
    bool nonfinite;
    double norm;  /* of the averaged, unscaled gradients, before clipping */
    double scale; /* the loss scale that the gradients were made with */
    double next_scale;
    int bad_rank;       /* where the first non-finite element arose; -1: on no rank, in the sum */
    int bad_param;      /* of that rank's parameters */
    size_t bad_elem;    /* within the parameter, in storage order */
    uint64_t bad_micro; /* backward pass within the step, counted from 1 */
    int changed_param;  /* a 16-bit parameter that somebody else wrote to since the last step; -1 */
    double reduce_s; /* this rank's time in the reduction of the step's gradients, waits included */
    double gather_s; /* and in taking over new values from the ranks that stepped them */
    size_t n_changed; /* how many of them this rank saw among what it steps */
};

struct dsc_engine_counters {
    uint64_t n_settled, n_bytes_settled, n_bytes_settled_in_backward, n_extra_slots;
    size_t private_bytes, shared_bytes, file_bytes; /* by formula; see docs/zero.md */
    size_t owned_elems, padded_elems;
};

/* Collective: compares the ranks' models, builds spaces and partition. The communicators must stay
 * open as long as the engine. */
enum dsc_status dsc_engine_open(const struct dsc_engine_ranks *ranks,
                                const struct dsc_engine_options *options,
                                const struct dsc_param *params, size_t n_params, int n_groups,
                                struct dsc_engine **out);
/* NULL is fine; local. */
void dsc_engine_close(struct dsc_engine *engine);

/* Masters take the parameters' values (after the initial broadcast). */
void dsc_engine_load_masters(struct dsc_engine *engine, const struct dsc_view *views);

/* Whether gradients have to be handed over one by one inside backward. */
bool dsc_engine_early(const struct dsc_engine *engine);

/* What the caller must do with gradients at this point: bits. Calls that take gradients take them
 * out of the views too (grad becomes NULL); the caller drops those. */
enum dsc_engine_need {
    DSC_NEED_NOTHING = 0,
    DSC_NEED_FOLD = 1,      /* call fold */
    DSC_NEED_CHECK = 2,     /* call check, before fold */
    DSC_NEED_HAND_OVER = 4, /* call hand_over, after fold */
};
/* Around each backward pass. `boundary`: the step follows. */
enum dsc_status dsc_engine_begin_backward(struct dsc_engine *engine, bool boundary, int *need);
enum dsc_status dsc_engine_end_backward(struct dsc_engine *engine, bool boundary, int *need);
/* Adds 16-bit gradients to this rank's fp32 sums. */
enum dsc_status dsc_engine_fold(struct dsc_engine *engine, struct dsc_view *views);
/* Stage 2 where ranks share no memory: the gradients of a backward pass go to their owners.
 * Collective, with ranks that call step too. */
enum dsc_status dsc_engine_hand_over(struct dsc_engine *engine, struct dsc_view *views);
/* Forgets this rank's fp32 sums of the open step, as zero_grad means it. What has been published
 * (stage 2, overlap) is with its owner and stays. */
void dsc_engine_drop_sums(struct dsc_engine *engine);
/* While deferring, backward passes only add up on this rank, at every stage. */
enum dsc_status dsc_engine_begin_deferring(struct dsc_engine *engine);
/* Ends it: what was added up is handed over where the stage hands gradients over inside backward
 * (and taken out of the views); else it stays until the boundary. */
enum dsc_status dsc_engine_end_deferring(struct dsc_engine *engine, struct dsc_view *views);
/* Looks for the first non-finite element of gradients that stay where they are. */
void dsc_engine_check(struct dsc_engine *engine, const struct dsc_view *views);

/* A gradient that autograd has just completed. *taken: the caller drops it; else it stays. */
enum dsc_status dsc_engine_arrive(struct dsc_engine *engine, size_t param, const void *grad,
                                  enum dsc_dtype dtype, bool *taken);

/* The boundary. Collective. `views` may be written to. The caller drops all gradients after.
 * With a foreign optimizer this is the first half: where it says stepped and not over, gradients
 * are ready to be lent, and after the optimizer has run the second half follows. */
enum dsc_status dsc_engine_step(struct dsc_engine *engine, struct dsc_view *views,
                                const struct dsc_hyper *groups, struct dsc_step_report *report);
/* The second half. Collective. failed: this rank's optimizer raised; then every rank gets an error,
 * and, where there are others, steps are refused until mend. */
enum dsc_status dsc_engine_end_step(struct dsc_engine *engine, struct dsc_view *views, bool failed,
                                    struct dsc_step_report *report);
/* Every rank has loaded parameters and states. */
void dsc_engine_mend(struct dsc_engine *engine);

/* The first parameter that is to be stepped and has got no gradient on this rank since the last
 * step; -1 where there is none. */
int64_t dsc_engine_unused(const struct dsc_engine *engine, const struct dsc_view *views);

/* For a rank that fails before it can call step: takes part in the meeting, so that the others get
 * an error at once instead of waiting. */
void dsc_engine_refuse_step(struct dsc_engine *engine);

/* The loss scale for the next backward pass. */
double dsc_engine_scale(const struct dsc_engine *engine);
struct dsc_engine_counters dsc_engine_counters(const struct dsc_engine *engine);

/* The gradient that a step would use now, of one parameter, on every rank of its reduce group:
 * averaged and unscaled, not clipped. Collective over the control ranks, each with a parameter of
 * the same index or of another group. grad: n_elems of the parameter, in storage order. Gradients
 * that are handed over by it are taken out of the views. */
enum dsc_status dsc_engine_get_grad(struct dsc_engine *engine, size_t param, struct dsc_view *views,
                                    float *grad);
/* Replaces it. Collective, the same values on all ranks of the reduce group. An fp32 parameter of
 * an engine that keeps gradients has it in .grad, scaled by what *into_grad says (0: done, nothing
 * to store). */
enum dsc_status dsc_engine_set_grad(struct dsc_engine *engine, size_t param, struct dsc_view *views,
                                    const float *grad, double *into_grad);

/* The ranks over which a parameter is reduced: this one's number among them, and how many. */
void dsc_engine_place(const struct dsc_engine *engine, size_t param, int *rank, int *size);
/* The part of a parameter that `rank` of its reduce group steps: elements [*begin, *begin + *n); at
 * stage 0 all. */
void dsc_engine_part(const struct dsc_engine *engine, size_t param, int rank, size_t *begin,
                     size_t *n);
/* fp32 memory of a parameter that this rank holds: elements [begin, begin + n) of it. */
struct dsc_held {
    float *values;
    size_t begin, n;
    void *block; /* that it lies in, of block_bytes; for dsc_arena_retain */
    size_t block_bytes;
};
enum { DSC_HELD_GRADIENT = -2, DSC_HELD_MASTER = -1 };
/* which: the gradient of a foreign optimizer's step, the master (none where the model is fp32), or
 * optimizer state 0, 1. values NULL: not held here. */
struct dsc_held dsc_engine_held(const struct dsc_engine *engine, size_t param, int which);
/* Steps that each parameter's group has taken (SGD: with momentum), as fp32 numbers that may be
 * written to: one for each parameter, because whoever counts them on does so for each. */
struct dsc_held dsc_engine_steps(const struct dsc_engine *engine);
/* SGD's momentum is held from the first step that has it; this makes it so now. */
enum dsc_status dsc_engine_hold_momentum(struct dsc_engine *engine);

/* The loss scale with its history: for saving and loading. */
struct dsc_scaler dsc_engine_scaler(const struct dsc_engine *engine);
void dsc_engine_set_scaler(struct dsc_engine *engine, const struct dsc_scaler *scaler);

#endif
