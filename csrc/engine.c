/* The state machine. Names used throughout: a world of one has no buckets; an engine `keeps`
 * gradients when they stay with this rank until the boundary (stages 0 and 1, or a world of one)
 * and is `early` when they are handed over inside backward (stage 2, or overlap). An early engine
 * at stage 0 or 1 hands over in the boundary's backward only, so that micro-steps add up as without
 * overlap. */
#include "engine.h"

#include "alloc.h"
#include "arena.h"
#include "bucket.h"
#include "clip.h"
#include "fpenv.h"
#include "kernels/kernels.h"
#include "log.h"
#include "pool.h"
#include "update.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { RUN = 4 * DSC_BLOCK };

/* Where the first non-finite element of a step was seen on this rank. */
struct culprit {
    int64_t param; /* -1: none */
    uint64_t elem, micro;
};

/* What ranks tell each other before gradients move: everything that must agree. */
struct plan {
    uint64_t hyper_hash;
    double first_lr;
    uint32_t n_rounds; /* that this rank needs */
};

struct dsc_engine {
    struct dsc_comm *comm;
    struct dsc_engine_options options;
    struct dsc_pool *pool;
    int rank, size;
    bool early, keeps, has_16bit, has_f32;

    size_t n_params;
    struct dsc_param *params;
    int *param_space;
    size_t *param_segment;
    struct dsc_space *spaces;
    size_t n_spaces;
    struct dsc_holding *holdings; /* per space */
    float **local;                /* per space: fp32 sums over micro-steps; NULL until needed */
    bool *folded;                 /* per parameter: in `local` for this step */
    bool *marked;                 /* per parameter: scratch of one call */
    atomic_bool *changed;         /* per parameter: written by somebody else, found in this step */
    struct dsc_source *sources;   /* per space: valid inside a step */
    size_t n_folded;
    struct dsc_spread *spread;
    int n_groups;
    struct dsc_optim_args *args;
    double *squares; /* per block of one RUN batch, world of one */
    char *meeting;   /* size * DSC_MEET_MAX */

    struct dsc_scaler scaler;
    uint64_t n_steps, n_boundaries, n_micro; /* micro-steps of the open step */
    uint64_t first_momentum_step;
    bool pending_16bit; /* 16-bit gradients lie in .grad */
    bool boundary;      /* of the backward pass that runs or ran last */
    bool round_open;
    uint32_t n_rounds; /* ended in this step */
    struct culprit culprit;
    char label[64];
};

/* ---- opening ---- */

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t n) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u; /* FNV-1a */
    return hash;
}

static const uint64_t HASH_START = 0xcbf29ce484222325u;

struct identity {
    uint64_t hash, n_params, n_elems;
    int32_t stage, overlap, optim, n_groups;
    uint64_t bucket_elems;
    double clip;
};

static struct identity identity_of(const struct dsc_engine *e) {
    struct identity id;
    memset(&id, 0, sizeof id); /* padding is compared too */
    id.hash = e->options.names_hash ^ HASH_START;
    id.n_params = e->n_params;
    id.stage = e->options.stage;
    id.overlap = e->options.overlap;
    id.optim = (int32_t)e->options.optim;
    id.n_groups = e->n_groups;
    id.bucket_elems = e->options.bucket_elems;
    id.clip = e->options.clip;
    for (size_t i = 0; i < e->n_params; i++) {
        uint64_t row[3] = {e->params[i].n_elems, (uint64_t)e->params[i].dtype,
                           (uint64_t)e->params[i].group};
        id.hash = hash_bytes(id.hash, row, sizeof row);
        id.n_elems += e->params[i].n_elems;
    }
    return id;
}

static enum dsc_status compare_models(struct dsc_engine *e) {
    struct identity mine = identity_of(e), other;
    DSC_TRY(dsc_comm_meet(e->comm, "initialize", 0, &mine, sizeof mine, e->meeting));
    /* Every rank compares with rank 0, and all look at all, so that all fail together. */
    struct identity first;
    memcpy(&first, e->meeting, sizeof first);
    for (int r = 1; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        if (memcmp(&other, &first, sizeof other) != 0)
            return DSC_FAIL(
                DSC_EINVAL,
                "ranks initialise different engines: rank 0 has %llu parameters with %llu elements "
                "in %d groups (stage %d, overlap_comm %d, reduce_bucket_size %llu, clipping %g), "
                "rank %d has %llu with %llu in %d (stage %d, overlap_comm %d, reduce_bucket_size "
                "%llu, clipping %g)%s",
                (unsigned long long)first.n_params, (unsigned long long)first.n_elems,
                first.n_groups, first.stage, first.overlap, (unsigned long long)first.bucket_elems,
                first.clip, r, (unsigned long long)other.n_params,
                (unsigned long long)other.n_elems, other.n_groups, other.stage, other.overlap,
                (unsigned long long)other.bucket_elems, other.clip,
                first.n_elems == other.n_elems ? "; names, shapes, dtypes or settings differ" : "");
    }
    return DSC_OK;
}

static enum dsc_status hold_space(struct dsc_engine *e, size_t s) {
    const struct dsc_space *space = &e->spaces[s];
    struct dsc_holding *holding = &e->holdings[s];
    bool all = e->options.stage == 0 || e->size == 1;
    holding->space = space;
    holding->stepped = all ? (struct dsc_range){0, space->n_elems}
                           : dsc_partition_range(space->n_elems, e->rank, e->size);
    size_t n_bytes = dsc_range_size(holding->stepped) * sizeof(float);
    if (space->dtype != DSC_F32)
        DSC_TRY(dsc_arena_alloc(n_bytes, (void **)&holding->master));
    if (e->options.optim == DSC_OPTIM_ADAM)
        for (int i = 0; i < 2; i++)
            DSC_TRY(dsc_arena_alloc(n_bytes, (void **)&holding->state[i]));
    if (e->size == 1)
        return DSC_OK;
    struct dsc_bucket_options options = {
        .early = e->early,
        .settle_in_hooks = e->options.overlap,
        .shared_sums = e->options.stage == 0,
        .bucket_elems = e->options.bucket_elems,
        .pool = e->pool,
    };
    return dsc_buckets_open(e->comm, space, &options, &holding->buckets);
}

static enum dsc_status need_local(struct dsc_engine *e, size_t s) {
    if (e->local[s])
        return DSC_OK;
    return dsc_arena_alloc(e->spaces[s].n_elems * sizeof(float), (void **)&e->local[s]);
}

static enum dsc_status allocate(struct dsc_engine *e, const struct dsc_param *params) {
    size_t n = e->n_params;
    DSC_TRY(dsc_alloc(n * sizeof *e->params, (void **)&e->params));
    memcpy(e->params, params, n * sizeof *e->params);
    DSC_TRY(dsc_alloc(n * sizeof *e->param_space, (void **)&e->param_space));
    DSC_TRY(dsc_alloc(n * sizeof *e->param_segment, (void **)&e->param_segment));
    DSC_TRY(dsc_alloc(n * sizeof *e->folded, (void **)&e->folded));
    DSC_TRY(dsc_alloc(n * sizeof *e->marked, (void **)&e->marked));
    DSC_TRY(dsc_alloc(n * sizeof *e->changed, (void **)&e->changed));
    DSC_TRY(dsc_alloc((size_t)e->n_groups * sizeof *e->args, (void **)&e->args));
    DSC_TRY(dsc_alloc((size_t)e->size * DSC_MEET_MAX, (void **)&e->meeting));
    DSC_TRY(dsc_alloc(RUN * sizeof *e->squares, (void **)&e->squares));
    DSC_TRY(dsc_pool_open(e->options.n_threads, &e->pool));
    return dsc_space_build(params, n, &e->spaces, &e->n_spaces, e->param_space, e->param_segment);
}

static enum dsc_status hold_all(struct dsc_engine *e) {
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->holdings, (void **)&e->holdings));
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->local, (void **)&e->local));
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->sources, (void **)&e->sources));
    for (size_t s = 0; s < e->n_spaces; s++) {
        bool is_f32 = e->spaces[s].dtype == DSC_F32;
        e->has_f32 |= is_f32;
        e->has_16bit |= !is_f32;
        DSC_TRY(hold_space(e, s));
        if (!is_f32 && e->keeps && e->options.many_micro_steps)
            DSC_TRY(need_local(e, s));
    }
    if (e->size > 1 && e->options.stage > 0)
        DSC_TRY(dsc_spread_open(e->comm, &e->spread));
    return DSC_OK;
}

enum dsc_status dsc_engine_open(struct dsc_comm *comm, const struct dsc_engine_options *options,
                                const struct dsc_param *params, size_t n_params, int n_groups,
                                struct dsc_engine **out) {
    struct dsc_engine *e = NULL;
    if (options->stage < 0 || options->stage > 2)
        return DSC_FAIL(DSC_ENOTYET, "zero_optimization.stage is %d: not yet; allowed: 0, 1, 2",
                        options->stage);
    DSC_TRY(dsc_alloc(sizeof *e, (void **)&e));
    e->comm = comm;
    e->options = *options;
    e->rank = dsc_comm_rank(comm);
    e->size = dsc_comm_size(comm);
    e->early = e->size > 1 && (options->stage == 2 || options->overlap);
    e->keeps = e->size == 1 || options->stage < 2;
    e->n_params = n_params;
    e->n_groups = n_groups;
    e->scaler = options->scaler;
    e->culprit.param = -1;
    enum dsc_status status = allocate(e, params);
    if (status == DSC_OK)
        status = compare_models(e);
    if (status == DSC_OK)
        status = hold_all(e);
    if (status != DSC_OK) {
        dsc_engine_close(e);
        return status;
    }
    *out = e;
    return DSC_OK;
}

void dsc_engine_close(struct dsc_engine *e) {
    if (!e)
        return;
    for (size_t s = 0; e->holdings && s < e->n_spaces; s++) {
        struct dsc_holding *holding = &e->holdings[s];
        size_t n_bytes = dsc_range_size(holding->stepped) * sizeof(float);
        dsc_buckets_close(holding->buckets);
        dsc_arena_free(holding->master, n_bytes);
        for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
            dsc_arena_free(holding->state[i], n_bytes);
        if (e->local)
            dsc_arena_free(e->local[s], e->spaces[s].n_elems * sizeof(float));
    }
    dsc_spread_close(e->spread);
    dsc_space_free(e->spaces, e->n_spaces);
    dsc_pool_close(e->pool);
    dsc_free(e->sources);
    dsc_free(e->local);
    dsc_free(e->holdings);
    dsc_free(e->squares);
    dsc_free(e->meeting);
    dsc_free(e->args);
    dsc_free(e->changed);
    dsc_free(e->marked);
    dsc_free(e->folded);
    dsc_free(e->param_segment);
    dsc_free(e->param_space);
    dsc_free(e->params);
    dsc_free(e);
}

static const struct dsc_segment *segment_of(const struct dsc_engine *e, size_t param) {
    return &e->spaces[e->param_space[param]].segments[e->param_segment[param]];
}

void dsc_engine_load_masters(struct dsc_engine *e, const struct dsc_view *views) {
    for (size_t i = 0; i < e->n_params; i++)
        if (e->param_space[i] >= 0)
            dsc_update_load_master(&e->holdings[e->param_space[i]], segment_of(e, i),
                                   views[i].data);
}

/* ---- backward ---- */

bool dsc_engine_early(const struct dsc_engine *e) {
    return e->early;
}

static void tell_buckets(struct dsc_engine *e, bool inside) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_in_backward(e->holdings[s].buckets, inside);
}

static enum dsc_status end_round(struct dsc_engine *e, const struct dsc_source *sources) {
    for (size_t s = 0; s < e->n_spaces; s++) {
        DSC_TRY(dsc_buckets_end_round(e->holdings[s].buckets, sources ? &sources[s] : NULL));
        if (!e->options.overlap)
            dsc_buckets_settle_ready(e->holdings[s].buckets);
    }
    e->round_open = false;
    e->n_rounds++;
    return DSC_OK;
}

enum dsc_status dsc_engine_begin_backward(struct dsc_engine *e, bool boundary, int *need) {
    /* Another backward pass after that of the boundary (a second loss): what came so far is a
     * round. */
    if (e->round_open)
        DSC_TRY(end_round(e, NULL));
    e->boundary = boundary;
    tell_buckets(e, true);
    *need = e->keeps && e->pending_16bit ? DSC_NEED_FOLD : DSC_NEED_NOTHING;
    return DSC_OK;
}

enum dsc_status dsc_engine_end_backward(struct dsc_engine *e, bool boundary, int *need) {
    enum dsc_status status = DSC_OK;
    *need = DSC_NEED_NOTHING;
    e->n_micro++;
    if (!e->keeps) {
        status = end_round(e, NULL);
    } else if (boundary) {
        e->pending_16bit = e->has_16bit;
    } else {
        if (e->has_16bit)
            *need |= DSC_NEED_FOLD;
        if (e->has_f32 && e->culprit.param < 0)
            *need |= DSC_NEED_CHECK;
    }
    tell_buckets(e, false);
    return status;
}

static void accuse(struct dsc_engine *e, size_t param, const void *grad, enum dsc_dtype dtype,
                   uint64_t micro) {
    size_t low = 0, n = e->params[param].n_elems, elem_size = dsc_dtype_size(dtype);
    if (e->culprit.param >= 0)
        return;
    while (n > 1) { /* the first half that is not finite holds the first element */
        size_t half = n / 2;
        if (dsc_kernels()->is_finite[dtype]((const char *)grad + low * elem_size, half)) {
            low += half;
            n -= half;
        } else {
            n = half;
        }
    }
    e->culprit = (struct culprit){(int64_t)param, low, micro};
}

static enum dsc_status fold_one(struct dsc_engine *e, size_t i, const void *grad,
                                enum dsc_dtype dtype, uint64_t micro) {
    size_t s = (size_t)e->param_space[i];
    DSC_TRY(need_local(e, s));
    size_t n = e->params[i].n_elems;
    if (!dsc_kernels()->is_finite[dtype](grad, n))
        accuse(e, i, grad, dtype, micro);
    dsc_kernels()->accumulate[dtype](e->local[s] + segment_of(e, i)->begin, grad, n, !e->folded[i]);
    e->n_folded += !e->folded[i];
    e->folded[i] = true;
    return DSC_OK;
}

static bool is_16bit(const struct dsc_engine *e, size_t param) {
    return e->param_space[param] >= 0 && e->params[param].dtype != DSC_F32;
}

enum dsc_status dsc_engine_fold(struct dsc_engine *e, const struct dsc_view *views) {
    unsigned saved = dsc_fp_enter();
    enum dsc_status status = DSC_OK;
    for (size_t i = 0; status == DSC_OK && i < e->n_params; i++)
        if (is_16bit(e, i) && views[i].grad)
            status = fold_one(e, i, views[i].grad, views[i].grad_dtype, e->n_micro);
    e->pending_16bit = false;
    dsc_fp_leave(saved);
    return status;
}

void dsc_engine_check(struct dsc_engine *e, const struct dsc_view *views) {
    for (size_t i = 0; e->culprit.param < 0 && i < e->n_params; i++)
        if (e->param_space[i] >= 0 && views[i].grad &&
            !dsc_kernels()->is_finite[views[i].grad_dtype](views[i].grad, e->params[i].n_elems))
            accuse(e, i, views[i].grad, views[i].grad_dtype, dsc_max(e->n_micro, 1));
}

static void open_round(struct dsc_engine *e) {
    e->round_open = true;
    for (size_t s = 0; s < e->n_spaces; s++)
        dsc_buckets_set_dtype(e->holdings[s].buckets, e->n_folded && e->spaces[s].dtype != DSC_F32
                                                          ? DSC_F32
                                                          : e->spaces[s].dtype);
}

enum dsc_status dsc_engine_arrive(struct dsc_engine *e, size_t param, const void *grad,
                                  enum dsc_dtype dtype, bool *taken) {
    int s = e->param_space[param];
    bool finite = true;
    *taken = false;
    if (!e->early || s < 0 || (e->keeps && !e->boundary))
        return DSC_OK;
    if (!e->round_open)
        open_round(e);
    struct dsc_buckets *buckets = e->holdings[s].buckets;
    /* A second gradient in one round (a checkpointed module used twice, a second loss) stays in
     * .grad and goes with the next round. */
    if (!dsc_buckets_expects(buckets, e->param_segment[param]))
        return DSC_OK;
    unsigned saved = dsc_fp_enter();
    enum dsc_status status = DSC_OK;
    const void *src = grad;
    enum dsc_dtype src_dtype = dtype;
    if (e->keeps && e->n_folded && is_16bit(e, param)) {
        status = fold_one(e, param, grad, dtype, e->n_micro + 1);
        src = e->local[s] + segment_of(e, param)->begin;
        src_dtype = DSC_F32;
    }
    if (status == DSC_OK)
        status = dsc_buckets_arrive(buckets, e->param_segment[param], src, src_dtype, &finite);
    if (!finite)
        accuse(e, param, src, src_dtype, e->n_micro + 1);
    if (src != grad)
        e->folded[param] = false; /* n_folded stays: it says that this step's slots are fp32 */
    dsc_fp_leave(saved);
    *taken = status == DSC_OK;
    return status;
}

/* ---- the boundary ---- */

static uint64_t hyper_hash(const struct dsc_engine *e, const struct dsc_hyper *groups) {
    uint64_t hash = HASH_START;
    for (int g = 0; g < e->n_groups; g++) {
        const struct dsc_hyper *h = &groups[g];
        double row[] = {
            h->lr,       h->weight_decay, h->beta1,     h->beta2,           h->eps,
            h->momentum, h->dampening,    h->decoupled, h->bias_correction, h->nesterov};
        hash = hash_bytes(hash, row, sizeof row);
    }
    return hash;
}

/* Makes each space's source; where sums over micro-steps exist, the last gradients join them. */
static enum dsc_status make_sources(struct dsc_engine *e, struct dsc_view *views) {
    for (size_t i = 0; e->keeps && e->n_folded && i < e->n_params; i++)
        if (is_16bit(e, i) && views[i].grad) {
            DSC_TRY(fold_one(e, i, views[i].grad, views[i].grad_dtype, dsc_max(e->n_micro, 1)));
            views[i].grad = NULL;
        }
    for (size_t s = 0; s < e->n_spaces; s++)
        e->sources[s] = (struct dsc_source){
            .views = views,
            .local = e->n_folded && e->spaces[s].dtype != DSC_F32 ? e->local[s] : NULL,
            .folded = e->folded,
        };
    return DSC_OK;
}

static enum dsc_status meet_plan(struct dsc_engine *e, const struct plan *mine,
                                 struct plan *agreed) {
    struct plan first, other;
    *agreed = *mine;
    if (e->size == 1)
        return DSC_OK;
    DSC_TRY(dsc_comm_meet(e->comm, e->label, 1, mine, sizeof *mine, e->meeting));
    memcpy(&first, e->meeting, sizeof first);
    for (int r = 1; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        if (other.hyper_hash != first.hyper_hash)
            return DSC_FAIL(
                DSC_EINVAL,
                "optimizer settings differ between ranks: group 0 has lr %.9g on rank 0 "
                "and %.9g on rank %d%s; every rank must use the same param_groups",
                first.first_lr, other.first_lr, r,
                first.first_lr == other.first_lr ? " (another key or group differs)" : "");
        agreed->n_rounds = (uint32_t)dsc_max(agreed->n_rounds, other.n_rounds);
    }
    agreed->n_rounds = (uint32_t)dsc_max(agreed->n_rounds, first.n_rounds);
    return DSC_OK;
}

/* Ends the round of this step with what did not arrive; marks what it takes, so that it counts
 * once. */
static enum dsc_status end_last_round(struct dsc_engine *e, struct dsc_view *views) {
    if (!e->round_open && e->n_rounds > 0)
        return DSC_OK;
    if (!e->round_open)
        open_round(e);
    for (size_t i = 0; i < e->n_params; i++)
        e->marked[i] =
            e->param_space[i] >= 0 &&
            dsc_buckets_expects(e->holdings[e->param_space[i]].buckets, e->param_segment[i]);
    DSC_TRY(end_round(e, e->sources));
    for (size_t i = 0; i < e->n_params; i++)
        if (e->marked[i]) {
            views[i].grad = NULL;
            e->folded[i] = false;
        }
    return DSC_OK;
}

static bool anything_left(const struct dsc_engine *e) {
    enum dsc_dtype dtype;
    for (size_t i = 0; i < e->n_params; i++)
        if (e->param_space[i] >= 0 &&
            dsc_source_at(&e->sources[e->param_space[i]], segment_of(e, i), segment_of(e, i)->begin,
                          &dtype))
            return true;
    return false;
}

/* Gradients become sums; the norm of this rank's part goes into *norm. */
static enum dsc_status reduce_early(struct dsc_engine *e, struct dsc_view *views, struct plan *plan,
                                    struct dsc_norm *norm) {
    struct plan agreed;
    dsc_engine_check(e, views); /* usually nothing is left to look at */
    DSC_TRY(end_last_round(e, views));
    bool left = anything_left(e);
    plan->n_rounds = e->n_rounds + left;
    DSC_TRY(meet_plan(e, plan, &agreed));
    for (; e->n_rounds < agreed.n_rounds; left = false) {
        open_round(e);
        DSC_TRY(end_round(e, left ? e->sources : NULL));
    }
    for (size_t s = 0; s < e->n_spaces; s++)
        DSC_TRY(dsc_buckets_finish(e->holdings[s].buckets, agreed.n_rounds, norm, e->label));
    return DSC_OK;
}

struct norm_job {
    const struct dsc_space *space;
    const struct dsc_source *source;
    size_t first_block;
    double *squares;
};

static void norm_blocks(void *context, size_t begin, size_t end) {
    const struct norm_job *job = context;
    float scratch[DSC_BLOCK];
    for (size_t k = begin; k < end; k++) {
        size_t at = (job->first_block + k) * DSC_BLOCK;
        dsc_source_read(job->source, job->space, (struct dsc_range){at, at + DSC_BLOCK}, scratch);
        job->squares[k] = dsc_kernels()->sum_squares(scratch, DSC_BLOCK);
    }
}

/* A world of one: gradients are their own sums and stay where they are. */
static void norm_alone(struct dsc_engine *e, struct dsc_norm *norm) {
    for (size_t s = 0; s < e->n_spaces; s++) {
        size_t n_blocks = e->spaces[s].n_elems / DSC_BLOCK;
        for (size_t at = 0; at < n_blocks; at += RUN) {
            size_t n = dsc_min(RUN, n_blocks - at);
            struct norm_job job = {&e->spaces[s], &e->sources[s], at, e->squares};
            dsc_pool_run(e->pool, n, 32, norm_blocks, &job);
            for (size_t k = 0; k < n; k++)
                dsc_norm_add(norm, e->squares[k]);
        }
    }
}

static enum dsc_status reduce(struct dsc_engine *e, struct dsc_view *views, struct plan *plan,
                              struct dsc_norm *norm) {
    struct plan agreed;
    if (e->early)
        return reduce_early(e, views, plan, norm);
    DSC_TRY(meet_plan(e, plan, &agreed));
    if (e->size == 1)
        norm_alone(e, norm);
    for (size_t s = 0; e->size > 1 && s < e->n_spaces; s++)
        DSC_TRY(dsc_buckets_exchange(e->holdings[s].buckets, &e->sources[s], norm, e->label));
    return DSC_OK;
}

/* Everyone's part of the norm; after it, all sums of all ranks are there. */
static enum dsc_status meet_norm(struct dsc_engine *e, struct dsc_norm *norm) {
    if (e->size == 1)
        return DSC_OK;
    struct dsc_norm part = *norm;
    DSC_TRY(dsc_comm_meet(e->comm, e->label, 2, &part, sizeof part, e->meeting));
    memset(norm, 0, sizeof *norm);
    for (int r = 0; r < e->size; r++) {
        memcpy(&part, e->meeting + (size_t)r * sizeof part, sizeof part);
        dsc_norm_merge(norm, &part);
    }
    return DSC_OK;
}

/* Where it began: the earliest micro-step, then the lowest rank. Only runs when something is wrong.
 */
static enum dsc_status find_culprit(struct dsc_engine *e, const struct dsc_view *views,
                                    struct dsc_step_report *report) {
    struct culprit seen;
    dsc_engine_check(e, views);
    memcpy(e->meeting, &e->culprit, sizeof seen);
    if (e->size > 1) {
        struct culprit mine = e->culprit;
        DSC_TRY(dsc_comm_meet(e->comm, e->label, 3, &mine, sizeof mine, e->meeting));
    }
    for (int r = 0; r < e->size; r++) {
        memcpy(&seen, e->meeting + (size_t)r * sizeof seen, sizeof seen);
        if (seen.param < 0 || (report->bad_rank >= 0 && seen.micro >= report->bad_micro))
            continue;
        report->bad_rank = r;
        report->bad_param = (int)seen.param;
        report->bad_elem = seen.elem;
        report->bad_micro = seen.micro;
    }
    return DSC_OK;
}

static enum dsc_status prepare_args(struct dsc_engine *e, const struct dsc_hyper *groups,
                                    double grad_scale) {
    uint64_t step = e->n_steps + 1;
    bool momentum = false;
    for (int g = 0; g < e->n_groups; g++)
        momentum |= e->options.optim == DSC_OPTIM_SGD && groups[g].momentum != 0;
    if (momentum && e->first_momentum_step == 0) {
        e->first_momentum_step = step;
        for (size_t s = 0; s < e->n_spaces; s++)
            DSC_TRY(dsc_arena_alloc(dsc_range_size(e->holdings[s].stepped) * sizeof(float),
                                    (void **)&e->holdings[s].state[0]));
    }
    if (momentum)
        step = step - e->first_momentum_step + 1;
    for (int g = 0; g < e->n_groups; g++)
        dsc_optim_prepare(e->options.optim, &groups[g], step, grad_scale, &e->args[g]);
    return DSC_OK;
}

static enum dsc_status update(struct dsc_engine *e, struct dsc_view *views,
                              const struct dsc_hyper *groups, double grad_scale) {
    DSC_TRY(prepare_args(e, groups, grad_scale));
    for (size_t s = 0; s < e->n_spaces; s++) {
        struct dsc_update update = {e->comm,        e->pool, e->spread, views,
                                    &e->sources[s], e->args, e->label,  e->changed};
        DSC_TRY(dsc_update_run(&update, &e->holdings[s]));
    }
    e->n_steps++;
    return DSC_OK;
}

static void forget_step(struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_reset(e->holdings[s].buckets);
    memset(e->folded, 0, e->n_params * sizeof *e->folded);
    e->n_folded = 0;
    e->n_micro = 0;
    e->n_rounds = 0;
    e->pending_16bit = false;
    e->culprit.param = -1;
    e->n_boundaries++;
}

static void count_changes(struct dsc_engine *e, struct dsc_step_report *report) {
    for (size_t i = e->n_params; i-- > 0;)
        if (atomic_exchange_explicit(&e->changed[i], false, memory_order_relaxed)) {
            report->changed_param = (int)i;
            report->n_changed++;
        }
}

static enum dsc_status step(struct dsc_engine *e, struct dsc_view *views,
                            const struct dsc_hyper *groups, struct dsc_step_report *report) {
    struct dsc_norm norm;
    struct plan plan = {.hyper_hash = hyper_hash(e, groups), .first_lr = groups[0].lr};
    memset(&norm, 0, sizeof norm);
    snprintf(e->label, sizeof e->label, "engine.step %llu",
             (unsigned long long)e->n_boundaries + 1);
    DSC_TRY(make_sources(e, views));
    DSC_TRY(reduce(e, views, &plan, &norm));
    DSC_TRY(meet_norm(e, &norm));
    double inverse = 1.0 / (e->scaler.scale * e->size);
    report->norm = sqrt(dsc_norm_sum(&norm)) * inverse;
    report->scale = e->scaler.scale;
    report->nonfinite = norm.n_nonfinite > 0;
    if (report->nonfinite)
        DSC_TRY(find_culprit(e, views, report));
    report->stepped = !(report->nonfinite && e->options.skip_nonfinite);
    if (report->stepped)
        DSC_TRY(update(e, views, groups, inverse * dsc_clip_factor(report->norm, e->options.clip)));
    count_changes(e, report);
    forget_step(e);
    enum dsc_status status = dsc_scaler_update(&e->scaler, !report->stepped);
    report->next_scale = e->scaler.scale;
    return status;
}

enum dsc_status dsc_engine_step(struct dsc_engine *e, struct dsc_view *views,
                                const struct dsc_hyper *groups, struct dsc_step_report *report) {
    *report = (struct dsc_step_report){.bad_rank = -1, .bad_param = -1, .changed_param = -1};
    for (int g = 0; g < e->n_groups; g++)
        DSC_TRY(dsc_optim_check(e->options.optim, &groups[g], g));
    unsigned saved = dsc_fp_enter();
    enum dsc_status status = step(e, views, groups, report);
    dsc_fp_leave(saved);
    return status;
}

double dsc_engine_scale(const struct dsc_engine *e) {
    return e->scaler.scale;
}

uint64_t dsc_engine_n_steps(const struct dsc_engine *e) {
    return e->n_steps;
}

struct dsc_engine_counters dsc_engine_counters(const struct dsc_engine *e) {
    struct dsc_engine_counters sum = {0};
    for (size_t s = 0; s < e->n_spaces; s++) {
        const struct dsc_holding *holding = &e->holdings[s];
        size_t n_stepped = dsc_range_size(holding->stepped);
        sum.owned_elems += n_stepped;
        sum.padded_elems += e->spaces[s].n_elems - e->spaces[s].n_used;
        sum.private_bytes += (holding->master ? 4 : 0) * n_stepped;
        for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
            sum.private_bytes += (holding->state[i] ? 4 : 0) * n_stepped;
        sum.private_bytes += (e->local[s] ? 4 : 0) * e->spaces[s].n_elems;
        if (!holding->buckets)
            continue;
        struct dsc_bucket_counters counters = dsc_buckets_counters(holding->buckets);
        sum.n_settled += counters.n_settled;
        sum.n_bytes_settled += counters.n_bytes_settled;
        sum.n_bytes_settled_in_backward += counters.n_bytes_settled_in_backward;
        sum.n_extra_slots += counters.n_extra_slots;
        sum.private_bytes += dsc_buckets_private_bytes(holding->buckets);
        sum.shared_bytes += dsc_buckets_shared_bytes(holding->buckets);
    }
    return sum;
}

const float *dsc_engine_state(const struct dsc_engine *e, size_t param, int which, size_t *begin,
                              size_t *n) {
    if (e->param_space[param] < 0)
        return NULL;
    const struct dsc_holding *holding = &e->holdings[e->param_space[param]];
    const struct dsc_segment *segment = segment_of(e, param);
    const float *base = which < 0 ? holding->master : holding->state[which];
    struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), holding->stepped);
    *begin = part.begin - segment->begin;
    *n = dsc_range_size(part);
    return base && *n ? base + (part.begin - holding->stepped.begin) : NULL;
}
